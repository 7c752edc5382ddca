//! Failure: why a subcommand did not do what it was asked, and the exit code that says so.
//!
//! Invariant: a failure's text is one line; kinds and exit codes never change their meaning.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use twinpoint_core::codec::FormatErrorKind;
use twinpoint_core::recovery::{RecoveryError, Structure};
use twinpoint_runtime::control::ControlError;
use twinpoint_runtime::device::DeviceError;
use twinpoint_runtime::store::StoreError;

use crate::outline::Outline;

/// The end of `--help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the operation failed
  2  wrong usage
  3  the store is damaged (verify, inspect, serve, promote)
  4  the two stores differ (verify)
  5  no node can be reached at the control socket
  6  refused: wrong role, in use, holds data, ...

A failure is one line on stderr; with --json it is {\"ok\":false,\"kind\":...,\"error\":...,\"exit_code\":...}.";

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
    /// A failure; newlines in the text become spaces.
    pub fn new(exit: Exit, kind: &str, text: impl Display) -> Failure {
        let text = text.to_string().replace('\n', " ");
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

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        match &error {
            StoreError::Device(device) => device_failure(device, &error),
            StoreError::Recovery { path, error: cause, .. } => {
                let text = if holds_no_store(cause) {
                    format!(
                        "{} holds no store, or both copies of its superblock are damaged: check \
                         the path, or make a store with `twinpoint format`",
                        path.display()
                    )
                } else if matches!(
                    cause,
                    RecoveryError::BeforeCheckpoint(_) | RecoveryError::BeforeBase(..)
                ) {
                    format!("{error}: it cannot go back so far")
                } else {
                    format!("{error}: see `twinpoint inspect`, and use the other store of the pair")
                };
                Failure::new(Exit::Damaged, "damaged", text)
            }
            StoreError::HoldsData { .. } => Failure::new(Exit::Refused, "holds-data", &error),
            StoreError::NotSecondary { .. } => Failure::new(Exit::Refused, "not-secondary", &error),
            StoreError::OtherSize { .. } => Failure::new(Exit::Refused, "other-size", &error),
            StoreError::Missing { .. } => Failure::failed("missing", &error),
            StoreError::Geometry { .. } => {
                let text = format!("{error}: change --size, --shards, --journal or --segments");
                Failure::failed("geometry", text)
            }
            StoreError::Random(_) => Failure::failed("random", &error),
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Failure {
        StoreError::Device(error).into()
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Failure {
        match &error {
            ControlError::Refused { kind, text } => {
                let exit = match kind.as_str() {
                    "store-failed" | "bad-request" | "timeout" => Exit::Failed,
                    _ => Exit::Refused,
                };
                Failure::new(exit, kind, text)
            }
            ControlError::Silent { .. } => Failure::new(Exit::Unreachable, "silent", &error),
            _ => Failure::new(Exit::Unreachable, "unreachable", &error),
        }
    }
}

fn device_failure(device: &DeviceError, error: &StoreError) -> Failure {
    match device {
        DeviceError::InUse { .. } => Failure::new(Exit::Refused, "in-use", error),
        DeviceError::WrongSize { .. } => {
            Failure::failed("size", format!("{error}: choose another --size"))
        }
        DeviceError::Ended { .. } => Failure::new(Exit::Damaged, "damaged", error),
        _ => Failure::failed("device", format!("{error}: check the path and its permissions")),
    }
}

/// Whether nothing is there that was ever a superblock.
fn holds_no_store(error: &RecoveryError) -> bool {
    let RecoveryError::Damaged(Structure::Superblock, Some(cause)) = error else { return false };
    cause.kind == FormatErrorKind::Magic
}
