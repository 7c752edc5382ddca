//! Progress: how far a long check is, on stderr and only for a person: nothing is shown if stderr is no terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use twinpoint_runtime::status::bytes_text;

const PAUSE: Duration = Duration::from_millis(200);

/// A line that is written over again.
pub struct Progress {
    what: String,
    total_bytes: u64,
    done_bytes: u64,
    shown: Option<Instant>,
    is_shown: bool,
}

impl Progress {
    /// Work of so many bytes begins.
    #[must_use]
    pub fn new(what: String, total_bytes: u64) -> Progress {
        let is_shown = std::io::stderr().is_terminal();
        Progress { what, total_bytes, done_bytes: 0, shown: None, is_shown }
    }

    /// So many bytes more are done.
    pub fn add(&mut self, bytes: u64) {
        self.done_bytes += bytes;
        let is_due = self.shown.is_none_or(|shown| shown.elapsed() >= PAUSE);
        if self.is_shown && is_due {
            self.shown = Some(Instant::now());
            let percent = (self.done_bytes * 100).checked_div(self.total_bytes).unwrap_or(100);
            let (done, total) = (bytes_text(self.done_bytes), bytes_text(self.total_bytes));
            write_stderr(&format!("\r{}: {percent} % ({done} of {total})\x1b[K", self.what));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            write_stderr("\r\x1b[K");
        }
    }
}

fn write_stderr(text: &str) {
    let mut stderr = std::io::stderr();
    // Progress that nobody can see is not worth an error.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
