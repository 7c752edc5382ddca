//! Programs: runs `twinpoint` and the clients of others, each with a time limit, and keeps what they print.
//!
//! Invariant: a program that is missing fails the test and names the Debian package.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::time_limit::{end_child, note_child};

/// How long a program may take unless its caller says otherwise.
pub const PROGRAM_TIME_MAX: Duration = Duration::from_secs(60);

/// What a program came to.
pub struct Outcome {
    /// The command line.
    pub what: String,
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [what, stdout, stderr] =
            [&self.what, &self.stdout, &self.stderr].map(|text| clip(text));
        write!(f, "{what}\nexit code: {:?}\nstdout: {stdout}\nstderr: {stderr}", self.code)
    }
}

/// The beginning and the end of a long text.
fn clip(text: &str) -> String {
    const PART: usize = 1500;
    let characters = text.chars().count();
    if characters <= 2 * PART {
        return text.to_owned();
    }
    let start: String = text.chars().take(PART).collect();
    let end: String = text.chars().skip(characters - PART).collect();
    format!("{start}\n...\n{end}")
}

impl Outcome {
    /// Standard output of a program that did well.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{self}");
        self.stdout
    }

    /// Checks that the program failed with this code, and with one line on standard error. Gives the line.
    #[track_caller]
    pub fn failure(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self}");
        assert_eq!(self.stderr.lines().count(), 1, "one line says what to do: {self}");
        self.stderr.trim().to_owned()
    }
}

/// `twinpoint` with these arguments.
pub fn twinpoint(arguments: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twinpoint"));
    command.args(arguments);
    run(command, PROGRAM_TIME_MAX)
}

/// A client from Debian. `package` is named if it is missing.
pub fn client(program: &str, package: &str, arguments: &[&str], folder: &Path) -> Outcome {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let place = format!("{path}:/usr/sbin:/sbin");
    let found = place.split(':').any(|folder| Path::new(folder).join(program).is_file());
    assert!(found, "{program} is missing: install the Debian package {package}");
    run(command, Duration::from_secs(120))
}

/// Runs a program to its end.
///
/// # Panics
/// If it cannot be started or does not end in time; then it is ended.
pub fn run(mut command: Command, limit: Duration) -> Outcome {
    let what = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
    let stdout = collect(child.stdout.take().expect("stdout is piped"));
    let stderr = collect(child.stderr.take().expect("stderr is piped"));
    let child = note_child(child);
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(500);
    let status = loop {
        let ended = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
        if let Some(status) = ended.expect("a child can be waited for") {
            break status;
        }
        if Instant::now() > deadline {
            end_child(&child);
            let text = stderr.join().expect("the reader does not panic");
            panic!("{what}: not done within {limit:?}; stderr: {text}");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    Outcome {
        what,
        code: status.code(),
        stdout: stdout.join().expect("the reader does not panic"),
        stderr: stderr.join().expect("the reader does not panic"),
    }
}

fn collect(mut source: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read until an error is what there is to show.
        let _ = source.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
