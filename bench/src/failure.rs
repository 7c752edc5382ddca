//! Why a measurement could not be made. A benchmark ends at the first failure: half a table misleads.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rdma_fallback::rdma::ProbeError;
use twinpoint_runtime::control::ControlError;
use twinpoint_runtime::local::{CommandError, SubmitError};
use twinpoint_runtime::node::NodeError;
use twinpoint_runtime::store::StoreError;

use crate::readings::ReadingFault;

/// NBD's error of a store without room.
const NO_SPACE: u32 = 28;

/// See the module.
#[derive(Debug)]
pub enum Failure {
    /// A file or folder.
    File(PathBuf, io::Error),
    /// A program that is run beside: not there, or it failed with this output.
    Program(&'static str, String),
    /// A store could not be formatted.
    Store(StoreError),
    /// A node did not start.
    Node(NodeError),
    /// A node's process ended or said something odd.
    NodeProcess(String),
    /// A node's control socket.
    Control(ControlError),
    /// A client's connection.
    Connection(io::Error),
    /// The server broke the NBD protocol, or refused: what it did.
    Protocol(&'static str),
    /// The engine did not take a command.
    Submit(SubmitError),
    /// A command failed.
    Command(CommandError),
    /// The server answered with this NBD error.
    Answer(u32),
    /// Something did not happen in time.
    Late(&'static str, Duration),
    /// The nodes of a pair did not find each other in time: what both said last.
    NoPair(Duration, String),
    /// RDMA was asked for, and this host has none.
    NoRdma(ProbeError),
    /// No case has the words asked for.
    NoCase(String),
    /// Flags make no sense, alone or together: which, and why.
    Usage(String),
    /// A file of readings is not what it should be.
    Reading(PathBuf, ReadingFault),
    /// Signals cannot be caught.
    Signals(io::Error),
}

impl Failure {
    /// What the program exits with: 2 if the flags are to blame, else 1.
    pub fn exit_code(&self) -> i32 {
        if matches!(self, Failure::NoCase(_) | Failure::Usage(_)) { 2 } else { 1 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::File(path, error) => write!(f, "{}: {error}", path.display()),
            Failure::Program(name, output) => write!(f, "{name}: {}", output.trim()),
            Failure::Store(error) => error.fmt(f),
            Failure::Node(error) => error.fmt(f),
            Failure::NodeProcess(text) => write!(f, "a node's process: {}", text.trim()),
            Failure::Control(error) => error.fmt(f),
            Failure::Connection(error) => write!(f, "the connection to the server: {error}"),
            Failure::Protocol(what) => write!(f, "the NBD server {what}"),
            Failure::Submit(error) => write!(f, "the engine refuses a command: {error}"),
            Failure::Command(error) => write!(f, "a command failed: {error:?}"),
            Failure::Answer(NO_SPACE) => write!(f, "the store is full: give a larger --store-mib"),
            Failure::Answer(error) => write!(f, "a command failed with NBD error {error}"),
            Failure::Late(what, limit) => {
                write!(f, "{what} did not happen within {} s", limit.as_secs())
            }
            Failure::NoPair(limit, said) => {
                write!(
                    f,
                    "the pair's connection did not happen within {} s: {said}",
                    limit.as_secs()
                )
            }
            Failure::NoRdma(error) => write!(f, "--transports rdma: {error}"),
            Failure::NoCase(words) => {
                write!(f, "--only {words}: no case has these words in its name")
            }
            Failure::Usage(text) => f.write_str(text),
            Failure::Reading(path, fault) => write!(f, "{}: {fault}", path.display()),
            Failure::Signals(error) => write!(f, "signals cannot be caught: {error}"),
        }
    }
}

impl std::error::Error for Failure {}
