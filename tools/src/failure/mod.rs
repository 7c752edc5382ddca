//! Failure: why a subcommand did not do what it was asked, and the exit code that says so.
//!
//! Invariant: a failure's text is one line; kinds and exit codes never change their meaning.

mod node;
mod store;

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use crate::outline::Outline;

/// The end of `--help`; the operating guide has the same table.
pub const EXIT_CODES: &str = "\
Exit codes, of every command:
  0  done; serve: stopped in order
  1  the operation failed: the system or the node says why
  2  wrong usage: a flag or a value that cannot be, alone or together
  3  the store is damaged, or the file is no store (verify, inspect, serve, promote)
  4  the two stores differ (verify)
  5  no node answers at the control socket, or it broke off
  6  refused: wrong role, in use, exists, holds data, ...
  7  no answer within --timeout: the command may still be carried out

A failure is one line on stderr: what happened, to what, what to do. With --json \
it is one JSON object there, also for wrong usage: \
{\"ok\":false,\"kind\":\"...\",\"error\":\"...\",\"exit_code\":...}. Results go to stdout.";

/// What the process exits with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// The operation failed.
    Failed = 1,
    /// The flags make no sense.
    Usage = 2,
    /// A store is damaged.
    Damaged = 3,
    /// Two stores differ.
    Differ = 4,
    /// No node answers.
    Unreachable = 5,
    /// A node or this program refuses.
    Refused = 6,
    /// A node did not answer in time.
    TimedOut = 7,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a subcommand failed.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// One word for programs.
    pub kind: String,
    /// One line for people.
    pub text: String,
}

impl Failure {
    /// A failure; what would end the line, or steer a terminal, becomes a space.
    pub fn new(exit: Exit, kind: &str, text: impl Display) -> Failure {
        let text = text.to_string().replace(char::is_control, " ");
        Failure { exit, kind: kind.to_owned(), text }
    }

    /// The operation failed.
    pub fn failed(kind: &str, text: impl Display) -> Failure {
        Failure::new(Exit::Failed, kind, text)
    }

    /// The flags make no sense together.
    pub fn usage(text: impl Display) -> Failure {
        Failure::new(Exit::Usage, "usage", text)
    }

    /// Writes the one line to stderr.
    pub fn print(&self, json: bool) {
        let line = if json {
            let line = Outline::Fields(vec![
                ("ok", Outline::Flag(false)),
                ("kind", Outline::text(&self.kind)),
                ("error", Outline::text(&self.text)),
                ("exit_code", Outline::Number(self.exit as u64)),
            ]);
            serde_json::to_string(&line).expect("a failure is plain data")
        } else {
            format!("twinpoint: {}", self.text)
        };
        // Without a stderr there is the exit code.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
