//! The control socket: how `twinpoint status` and its kin speak with a node. Beside the flow.
//!
//! A unix socket of mode 0600. Each request is one JSON object on one line, and so is each reply:
//!
//! ```text
//! {"command":"volume-create","name":"disk","size_bytes":1073741824}
//! {"ok":true,"volume":1}
//! {"command":"promote","force":false}
//! {"ok":false,"kind":"primary-connected","error":"the primary is connected: ..."}
//! ```
//!
//! Invariants: a line is at most [`LINE_BYTES_MAX`] long and has to be whole within [`LINE_TIME_MAX`]; at most
//! [`CONNECTIONS_MAX`] clients are served at a time; whoever sends something else, or a field that its request does not
//! have, gets one error line and is cut off; a socket that somebody answers on is never taken over.

mod answer;
mod client;
mod line;
mod reply;
mod request;
mod server;
mod socket;
#[cfg(test)]
mod tests;

use twinpoint_core::contract::{Command, Reply};

pub use client::{ControlClient, ControlError};
pub use line::{LINE_BYTES_MAX, LINE_TIME_MAX, REPLY_BYTES_MAX};
pub use reply::ControlReply;
pub use request::ControlRequest;
pub use server::{CONNECTIONS_MAX, ControlServer};
pub use socket::SOCKET_PATH_BYTES_MAX;

use crate::status::NodeStatus;

/// The node, as its operator sees it.
pub trait Operator: Send + Sync {
    /// Does a command and waits for what it comes to.
    fn command(&self, command: Command) -> Reply;
    /// Tells how the node is; nothing while it starts or stops.
    fn status(&self) -> Option<NodeStatus>;
    /// Begins an orderly stop, and returns before its end.
    fn stop(&self);
}
