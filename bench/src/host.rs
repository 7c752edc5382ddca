//! What a reader must know of the machine and the build to make sense of figures. Nothing in it names the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

/// The machine in two words, as the results' folder is called: `vm-2core`.
pub fn short_name() -> String {
    let kind = if cpu_field("flags").contains("hypervisor") { "vm" } else { "metal" };
    format!("{kind}-{}core", cores())
}

/// Today, as 2026-01-31.
pub fn today() -> String {
    output("date", &["-u", "+%F"]).unwrap_or_else(|| "undated".to_owned())
}

/// Lines of a table: what, value.
pub fn facts(store_folder: &Path) -> Vec<(&'static str, String)> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![
        ("commit", commit()),
        ("kernel", format!("Linux {}", kernel.trim())),
        ("CPU", format!("{} x {}", cores(), cpu_field("model name"))),
        ("memory", memory()),
        ("stores on", file_system(store_folder)),
    ]
}

fn commit() -> String {
    let head = output("git", &["rev-parse", "--short=12", "HEAD"]);
    let changed = output("git", &["status", "--porcelain", "--untracked-files=no"]);
    match (head, changed) {
        (Some(head), Some(changed)) if changed.is_empty() => head,
        (Some(head), _) => format!("{head} with changes"),
        (None, _) => "unknown".to_owned(),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn cpu_field(name: &str) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim());
    value.to_owned()
}

fn memory() -> String {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kibibytes = text.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    kibibytes.map_or_else(String::new, |kibibytes| format!("{} GiB", kibibytes.div_ceil(1 << 20)))
}

/// The file system that a folder is on, and its device.
fn file_system(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (device, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        folder.starts_with(point).then_some((point.len(), device, kind))
    });
    let Some((_, device, kind)) = mounts.max_by_key(|(length, ..)| *length) else {
        return "unknown".to_owned();
    };
    let name = device.rsplit('/').next().unwrap_or(device);
    let queue = Path::new("/sys/block").join(name).join("queue");
    let read = |field: &str| fs::read_to_string(queue.join(field)).unwrap_or_default();
    let rotates = match read("rotational").trim() {
        "0" => ", solid state",
        "1" => ", called rotating",
        _ => "",
    };
    let cache = read("write_cache");
    let cache = if cache.is_empty() { String::new() } else { format!(", {}", cache.trim()) };
    format!("{kind} on {name}{rotates}{cache}")
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_found() {
        let facts = facts(Path::new("/"));
        assert!(facts.iter().all(|(_, value)| !value.is_empty()), "{facts:?}");
        assert!(short_name().ends_with("core"));
    }
}
