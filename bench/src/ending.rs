//! What a run puts outside of its own memory, processes and folders, and how they go at its end.
//!
//! ```text
//!   returned, failed, panicked: what is dropped ends or removes itself
//!   a signal, a node gone:      `end` ends and removes all that is held, then the program
//! ```
//!
//! Beside the flow. Invariants: whatever a run starts or makes is held from its first moment, so that no way out leaves
//! it behind; stores lie in a folder of the run's own, which is removed whole, and nothing else of the folder around it
//! is touched; once `end` has begun, nothing is started or made, and nobody else says why the run ends.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use crate::failure::Failure;

/// How long killed processes are waited for: the kernel may be in the middle of a write of theirs.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How often a folder is removed anew because something came into it meanwhile.
const REMOVALS_MAX: u32 = 50;
/// How long an end is waited for at a time.
const LOOK_LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);

static HELD: Mutex<Held> =
    Mutex::new(Held { next: 0, children: BTreeMap::new(), folders: BTreeMap::new() });

/// All that goes at the end, by numbers of its own.
struct Held {
    next: u64,
    children: BTreeMap<u64, Arc<Mutex<Child>>>,
    folders: BTreeMap<u64, Traces>,
}

/// What goes of a folder.
struct Traces {
    /// With all that is in it.
    whole: Option<PathBuf>,
    /// If nothing is in it, the deepest first.
    if_empty: Vec<PathBuf>,
}

/// Lets SIGINT, SIGTERM and SIGHUP end the run; SIGHUP stays ignored where `nohup` asked for it.
///
/// # Errors
/// [`Failure::Signals`] if they cannot be caught.
pub fn at_signals() -> Result<(), Failure> {
    let mut wanted = vec![SIGINT, SIGTERM];
    wanted.extend((!is_ignored(SIGHUP)).then_some(SIGHUP));
    let mut signals = Signals::new(wanted).map_err(Failure::Signals)?;
    let wait = move || {
        if let Some(signal) = signals.forever().next() {
            let name = signal_name(signal).unwrap_or("a signal");
            end(&format!("interrupted by {name}; processes ended, files removed"), 128 + signal);
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .map(drop)
        .map_err(Failure::Signals)
}

/// Ends all processes, removes all files, says why, and ends the program. Who comes second waits for the first.
pub fn end(why: &str, code: i32) -> ! {
    // Held until the program is gone.
    let held = held();
    for child in held.children.values() {
        // It may have ended by itself.
        _ = lock(child).kill();
    }
    let deadline = Instant::now() + KILL_LIMIT;
    let is_there = |child: &Arc<Mutex<Child>>| matches!(lock(child).try_wait(), Ok(None));
    while held.children.values().any(is_there) && Instant::now() < deadline {
        std::thread::sleep(PAUSE);
    }
    // The last first: it may lie in what was made for one before it.
    for traces in held.folders.values().rev() {
        traces.remove();
    }
    eprintln!("twinpoint-bench: {why}");
    std::process::exit(code)
}

/// A folder that goes when this is dropped, or when the run ends otherwise.
pub struct Folder {
    key: u64,
    path: PathBuf,
}

impl Folder {
    /// A folder of the run's own in `parent`, which is made if it is not there. It goes with all that is in it.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn of_stores(parent: &Path) -> Result<Folder, Failure> {
        Folder::hold(parent, |traces| {
            let name = format!("twinpoint-bench-{}", std::process::id());
            let mut path = parent.join(&name);
            let mut builder = DirBuilder::new();
            // One that is there was left behind by a killed run, or is somebody else's.
            for number in 2.. {
                match builder.mode(0o700).create(&path) {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                        path = parent.join(format!("{name}-{number}"));
                    }
                    Err(error) => return Err(Failure::File(path, error)),
                    Ok(()) => break,
                }
            }
            traces.whole = Some(path.clone());
            Ok(path)
        })
    }

    /// A folder for results, made if it is not there. If it was made and stays empty, it goes.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn of_results(path: &Path) -> Result<Folder, Failure> {
        Folder::hold(path, |_| Ok(path.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn hold(
        around: &Path,
        make: impl FnOnce(&mut Traces) -> Result<PathBuf, Failure>,
    ) -> Result<Folder, Failure> {
        let mut held = held();
        let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
        let missing = around.ancestors().take_while(is_missing).map(Path::to_owned);
        let mut traces = Traces { whole: None, if_empty: missing.collect() };
        let made = fs::create_dir_all(around)
            .map_err(|error| Failure::File(around.to_owned(), error))
            .and_then(|()| make(&mut traces));
        match made {
            Ok(path) => {
                let key = held.next_key();
                held.folders.insert(key, traces);
                Ok(Folder { key, path })
            }
            Err(failure) => {
                traces.remove();
                Err(failure)
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Some(traces) = held().folders.remove(&self.key) {
            traces.remove();
        }
    }
}

impl Traces {
    fn remove(&self) {
        if let Some(path) = &self.whole {
            let mut removed = fs::remove_dir_all(path);
            for _ in 0..REMOVALS_MAX {
                let is_late = |error: &io::Error| error.kind() == ErrorKind::DirectoryNotEmpty;
                if !removed.as_ref().is_err_and(is_late) {
                    break;
                }
                std::thread::sleep(PAUSE);
                removed = fs::remove_dir_all(path);
            }
            let is_gone = |error: &io::Error| error.kind() == ErrorKind::NotFound;
            if let Some(error) = removed.err().filter(|error| !is_gone(error)) {
                eprintln!("twinpoint-bench: {} stays behind: {error}", path.display());
            }
        }
        for path in &self.if_empty {
            // One with something in it stays.
            _ = fs::remove_dir(path);
        }
    }
}

/// A process that ends when this is dropped, or when the run ends otherwise. What a terminal tells its foreground does
/// not reach it: the run ends it in its turn.
pub struct Process {
    key: u64,
    id: u32,
    child: Arc<Mutex<Child>>,
}

impl Process {
    /// Starts it.
    ///
    /// # Errors
    /// If the system cannot.
    pub fn start(command: &mut Command) -> io::Result<Process> {
        let mut held = held();
        let child = command.process_group(0).spawn()?;
        let (key, id) = (held.next_key(), child.id());
        let child = Arc::new(Mutex::new(child));
        held.children.insert(key, Arc::clone(&child));
        Ok(Process { key, id, child })
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its piped standard input and output, once.
    pub fn pipes(&self) -> (Option<ChildStdin>, Option<ChildStdout>) {
        let mut child = lock(&self.child);
        (child.stdin.take(), child.stdout.take())
    }

    /// Waits for its end for so long, and tells whether it came.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while matches!(lock(&self.child).try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
        true
    }

    /// Waits for its end, and gives what it wrote to the pipes of its standard output and error.
    ///
    /// # Errors
    /// If a pipe cannot be read.
    pub fn output(self) -> io::Result<Output> {
        let (_, stdout) = self.pipes();
        let stderr = lock(&self.child).stderr.take();
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            let reader =
                scope.spawn(|| stderr.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut errors)));
            stdout.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut output))?;
            reader.join().expect("reading does not panic")
        })?;
        while !self.ends_within(LOOK_LIMIT) {}
        let status = lock(&self.child).wait()?;
        Ok(Output { status, stdout: output, stderr: errors })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = lock(&self.child).kill();
        _ = lock(&self.child).wait();
        held().children.remove(&self.key);
    }
}

impl Held {
    fn next_key(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

fn held() -> MutexGuard<'static, Held> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this program was started with a signal ignored.
fn is_ignored(signal: i32) -> bool {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = text.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_go_and_what_was_there_stays() {
        let around = tempfile::tempdir().unwrap();
        let parent = around.path().join("a/b");
        let one = Folder::of_stores(&parent).unwrap();
        let two = Folder::of_stores(&parent).unwrap();
        assert_ne!(one.path(), two.path());
        fs::write(one.path().join("key"), "").unwrap();
        let own = parent.join("key");
        fs::write(&own, "mine").unwrap();
        drop(two);
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 2);
        fs::remove_file(&own).unwrap();
        drop(one);
        assert!(!around.path().join("a").exists());
        drop(Folder::of_results(&parent).unwrap());
        assert!(!around.path().join("a").exists());
        let results = Folder::of_results(&parent).unwrap();
        fs::write(results.path().join("wire.md"), "").unwrap();
        drop(results);
        assert!(parent.join("wire.md").exists());
        let file = parent.join("wire.md");
        assert!(Folder::of_results(&file).is_err() && Folder::of_stores(&file.join("c")).is_err());
        assert!(file.exists());
    }

    #[test]
    fn processes_end_with_their_holder() {
        let sleeper = Process::start(Command::new("sleep").arg("600")).unwrap();
        let place = PathBuf::from(format!("/proc/{}", sleeper.id()));
        assert!(place.exists() && !sleeper.ends_within(Duration::from_millis(10)));
        drop(sleeper);
        assert!(!place.exists());
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let output = Process::start(&mut command).unwrap().output().unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(3), &b"out\n"[..]));
        assert_eq!(output.stderr, b"err\n");
    }
}
