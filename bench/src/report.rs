//! Where figures go: raw.csv line by line while they come, summary.txt and README.md at the end.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use crate::case::{Case, Frontend, Pattern};
use crate::ending::Folder;
use crate::failure::Failure;
use crate::host;
use crate::measurement::{COLUMNS, Measurement};

/// A folder of results. If it was made for them and none came, it goes.
pub struct Report {
    folder: Folder,
    /// raw.csv, once it has a line.
    raw: Option<File>,
}

impl Report {
    /// Makes the folder.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn create(folder: &Path) -> Result<Report, Failure> {
        Ok(Report { folder: Folder::of_results(folder)?, raw: None })
    }

    /// Adds a line to raw.csv, which begins with its header.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn add(
        &mut self,
        round: u32,
        case: Case,
        measurement: &Measurement,
    ) -> Result<(), Failure> {
        let names = case.to_string().replace('-', ",").replace(",q", ",").replace(",f", ",");
        let values: Vec<String> =
            measurement.values.iter().map(|value| format!("{value:.4}")).collect();
        let line = format!("{round},{names},{}\n", values.join(","));
        let path = self.folder.path().join("raw.csv");
        let raw = match self.raw.take() {
            Some(raw) => Ok(raw),
            None => begin_raw(&path),
        };
        let written = raw.and_then(|mut raw| {
            raw.write_all(line.as_bytes())?;
            self.raw = Some(raw);
            Ok(())
        });
        written.map_err(|error| Failure::File(path, error))
    }

    /// Writes a file of the folder.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.folder.path().join(name);
        fs::write(&path, text).map_err(|error| Failure::File(path, error))
    }
}

fn begin_raw(path: &Path) -> io::Result<File> {
    let mut raw = File::create(path)?;
    let columns = COLUMNS.join(",");
    writeln!(raw, "round,frontend,stores,pattern,depth,flush_every,{columns}")?;
    Ok(raw)
}

/// The table that a person reads: medians over the rounds.
pub fn summary(results: &[(Case, Vec<Measurement>)]) -> String {
    let mut text = String::new();
    let mut last = None;
    for (case, rounds) in results {
        if last != Some(case.setup) {
            last = Some(case.setup);
            let unit = "us: write p50      p90      p99    p99.9";
            // Writing to a string cannot fail.
            _ = writeln!(
                text,
                "\n{:<22} {:>8} {:>8} {unit} {:>9} {:>8} {:>7} {:>7} {:>6} {:>6} {:>5}",
                case.setup.to_string(),
                "IOPS",
                "MiB/s",
                "flush p50",
                "p99",
                "cpu/op",
                "client",
                "device",
                "wire",
                "other"
            );
        }
        summary_line(&mut text, *case, rounds);
    }
    text
}

fn summary_line(text: &mut String, case: Case, rounds: &[Measurement]) {
    let median = Measurement::median(rounds);
    let get = |name| median.get(name);
    let flush = |name| {
        let value = if get("flushes") > 0.0 { format!("{:.0}", get(name)) } else { "-".to_owned() };
        format!("{value:>8}")
    };
    _ = writeln!(
        text,
        "{:<22} {:>8.0} {:>8.1} {:>13.1} {:>8.1} {:>8.1} {:>8.1} {:>9} {} {:>7.2} {:>7.2} {:>6.3} {:>6.3} {:>5.2}",
        case.load.to_string(),
        get("iops"),
        get("mib_per_s"),
        get("write_us_p50"),
        get("write_us_p90"),
        get("write_us_p99"),
        get("write_us_p999"),
        flush("flush_us_p50"),
        flush("flush_us_p99"),
        get("server_cpu_us_per_op"),
        get("client_cpu_us_per_op"),
        get("device_bytes_per_byte"),
        get("wire_bytes_per_byte"),
        get("other_cores_busy"),
    );
}

/// How to read the columns.
pub const LEGEND: &str = "\
Columns of summary.txt, medians over the rounds: writes per second; MiB/s of them; write latency in microseconds, from
submission to the answer (a write is answered when it is staged); flush latency; CPU microseconds of all nodes per
operation (a write or a flush; for `engine` without the calling thread) and of the client; bytes written to the
primary's device, and sent to the secondary, per byte that the client wrote (data, records, map checkpoints, commands;
below 1 where a block was overwritten before its point was sealed); cores that something else kept busy meanwhile.
Cases are named pattern-q<commands under way>-f<writes to each flush, 0 for none>. Without flushes points are sealed by
size (32 MiB) and time (1 s) alone. raw.csv has every round and more columns.
";

/// README.md: how the figures came about.
pub fn readme(title: &str, store_folder: &Path, more: &[(&str, String)], notes: &str) -> String {
    let command: Vec<String> = std::env::args().skip(1).collect();
    let mut text = format!("# {title}\n\n| | |\n|---|---|\n");
    _ = writeln!(text, "| command | `twinpoint-bench {}` |", command.join(" "));
    let more = more.iter().map(|(name, value)| (*name, value.clone()));
    for (name, value) in host::facts(store_folder).into_iter().chain(more) {
        _ = writeln!(text, "| {name} | {value} |");
    }
    _ = write!(text, "\n{notes}");
    text
}

/// A line of progress, for a person who waits.
pub fn progress(done: usize, total: usize, case: Case, measurement: &Measurement) {
    let speed = match case.load.pattern {
        Pattern::Random4 => format!("{:.0} IOPS", measurement.get("iops")),
        Pattern::Sequential64 | Pattern::Sequential128 | Pattern::Sequential1024 => {
            format!("{:.0} MiB/s", measurement.get("mib_per_s"))
        }
    };
    let width = if case.setup.frontend == Frontend::Engine { 32 } else { 30 };
    eprintln!("[{done:>3}/{total}] {:<width$} {speed}", case.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{cases, setups};

    #[test]
    fn tables_are_aligned() {
        let one = Measurement { values: [12.0; COLUMNS.len()] };
        let all = setups().into_iter().flat_map(|setup| cases(setup, "rand4k"));
        let all: Vec<_> = all.map(|case| (case, vec![one.clone(), one.clone()])).collect();
        let text = summary(&all);
        let widths: std::collections::HashSet<usize> =
            text.lines().filter(|line| !line.is_empty()).map(str::len).collect();
        assert_eq!(widths.len(), 1, "{text}");
    }
}
