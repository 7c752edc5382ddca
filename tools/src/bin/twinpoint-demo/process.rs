//! Process: a program that the demo runs. Invariants: it dies with its handle, whatever way the demo ends; what it says
//! goes to files in the demo's folder, so that no full pipe can hold it up.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::narrator::Narrator;
use crate::trouble::Trouble;

/// How often a process is looked at.
const PAUSE: Duration = Duration::from_millis(2);
/// How often progress is told.
const TICK: Duration = Duration::from_secs(2);
/// Longest time for a program that ends by itself.
const LIMIT: Duration = Duration::from_secs(300);
/// Most bytes of an output that an error quotes.
const QUOTE_BYTES_MAX: usize = 600;

/// A running program.
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts a program. Its stdout goes to `NAME.out`, its stderr to `NAME.log`, in the current folder.
    ///
    /// # Errors
    /// If it, or one of the two files, cannot be made.
    pub fn start(name: &str, command: &mut Command) -> Result<Process, Trouble> {
        let file = |kind: &str| {
            let path = PathBuf::from(format!("{name}.{kind}"));
            File::create(&path).map(Stdio::from).map_err(Trouble::system("create", path))
        };
        // A group of its own: Ctrl-C reaches the demo alone, which then ends its processes in its own order.
        command.process_group(0).stdin(Stdio::null()).stdout(file("out")?).stderr(file("log")?);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C.UTF-8");
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|source| Trouble::Start { program, source })?;
        Ok(Process { name: name.to_owned(), child })
    }

    /// What it has written to stdout.
    pub fn output(&self) -> String {
        read(&self.name, "out")
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// If the system cannot tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, Trouble> {
        self.child.try_wait().map_err(Trouble::system("wait for", &self.name))
    }

    /// Kills it, as a power cut would: it has no time to write anything.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn kill(mut self) -> Result<(), Trouble> {
        self.child.kill().map_err(Trouble::system("kill", &self.name))?;
        self.child.wait().map(drop).map_err(Trouble::system("wait for", &self.name))
    }

    /// Waits for its end and tells `progress` meanwhile. Returns what it wrote to stdout.
    ///
    /// # Errors
    /// If it fails, takes too long, or the demo is interrupted.
    pub fn finish(
        mut self,
        narrator: &Narrator,
        mut progress: impl FnMut() -> Option<String>,
    ) -> Result<String, Trouble> {
        let began = Instant::now();
        let mut told = began;
        loop {
            if let Some(status) = self.ended()? {
                return if status.success() {
                    Ok(self.output())
                } else {
                    Err(self.failure(status))
                };
            }
            narrator.check()?;
            if began.elapsed() > LIMIT {
                return Err(Trouble::Late { what: self.name.clone(), limit: LIMIT });
            }
            if told.elapsed() >= TICK {
                told = Instant::now();
                if let Some(text) = progress() {
                    narrator.detail(&text);
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// That it ended, and what it said last.
    pub fn failure(&self, status: ExitStatus) -> Trouble {
        Trouble::Failed {
            program: self.name.clone(),
            code: status.code(),
            said: last_words(&self.name),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of what a program said, on one line.
pub fn last_words(name: &str) -> String {
    let text = [read(name, "out"), read(name, "log")].concat();
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut start = words.len().saturating_sub(QUOTE_BYTES_MAX);
    while !words.is_char_boundary(start) {
        start += 1;
    }
    words[start..].to_owned()
}

/// What a program wrote: `out` for stdout, `log` for stderr.
pub fn read(name: &str, kind: &str) -> String {
    let bytes = fs::read(format!("{name}.{kind}")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}
