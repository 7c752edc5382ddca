//! Why a measurement could not be made. A benchmark ends at the first failure: half a table misleads.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use twinpoint_runtime::control::ControlError;
use twinpoint_runtime::local::{CommandError, SubmitError};
use twinpoint_runtime::node::NodeError;
use twinpoint_runtime::store::StoreError;

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
    /// No case has the words asked for.
    NoCase(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::File(path, error) => write!(f, "{}: {error}", path.display()),
            Failure::Program(name, output) => write!(f, "{name}: {}", output.trim()),
            Failure::Store(error) => error.fmt(f),
            Failure::Node(error) => error.fmt(f),
            Failure::NodeProcess(text) => write!(f, "a node's process: {text}"),
            Failure::Control(error) => error.fmt(f),
            Failure::Connection(error) => write!(f, "the connection to the server: {error}"),
            Failure::Protocol(what) => write!(f, "the NBD server {what}"),
            Failure::Submit(error) => write!(f, "the engine refuses a command: {error}"),
            Failure::Command(error) => write!(f, "a command failed: {error:?}"),
            Failure::Answer(error) => write!(f, "a command failed with NBD error {error}"),
            Failure::Late(what, limit) => {
                write!(f, "{what} did not happen within {} s", limit.as_secs())
            }
            Failure::NoCase(words) => {
                write!(f, "--only {words}: no case has these words in its name")
            }
        }
    }
}

impl std::error::Error for Failure {}
