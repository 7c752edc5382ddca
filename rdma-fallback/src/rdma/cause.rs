//! Cause: why an RDMA connection broke, in words that say what to look at.
//!
//! Beside step 4 of the flow: what a card reports becomes one line for an operator.

use std::fmt;
use std::io;

/// Why the card or the system ended a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The device was removed, or failed for good.
    DeviceRemoved,
    /// The device's port went down.
    PortDown,
    /// The device reported a fault of the connection itself: the event's number in `ibv_event_type`.
    Connection {
        /// The number.
        event: u32,
    },
    /// A request failed: its number in `ibv_wc_status`.
    Request {
        /// The number.
        status: u32,
    },
    /// A call to the library or the kernel failed.
    System {
        /// The system's number for what it said.
        errno: i32,
    },
}

impl Cause {
    /// The peer does not hold the memory that a write went to: its key or range is wrong there.
    pub const REMOTE_ACCESS: Cause = Cause::Request { status: 10 };
    /// A completion queue of the device failed.
    pub const COMPLETIONS_LOST: Cause = Cause::Connection { event: 0 };
    /// The peer does not answer.
    pub const SILENT_PEER: Cause = Cause::Request { status: 12 };
    /// Something else has failed before: every request that was left says so.
    pub const FLUSHED: Cause = Cause::Request { status: 5 };
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::DeviceRemoved => write!(f, "the RDMA device was removed or failed"),
            Cause::PortDown => write!(f, "the RDMA device's port went down"),
            Cause::Connection { event } => {
                write!(f, "the RDMA device reports a fault of the connection (event {event})")
            }
            Cause::Request { status } => {
                write!(f, "RDMA request failed: {} (status {status})", status_text(*status))
            }
            Cause::System { errno } => {
                write!(f, "RDMA call failed: {}", io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

/// The numbers are part of the card's interface and never change.
fn status_text(status: u32) -> &'static str {
    match status {
        1 => "a message exceeds its buffer here",
        2 => "the queue pair refused it",
        4 => "memory here is not registered for it",
        5 => "the connection had failed before",
        8 => "the peer placed bytes outside of what is lent",
        9 => "the peer refused it as invalid",
        10 => "the peer does not lend the memory it went to",
        11 => "the peer's card could not do it",
        12 => "the peer does not answer",
        13 => "the peer had no receive waiting",
        19 => "the device failed",
        _ => "an error of the device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_one_line_each() {
        assert_eq!(
            Cause::SILENT_PEER.to_string(),
            "RDMA request failed: the peer does not answer (status 12)"
        );
        assert!(Cause::REMOTE_ACCESS.to_string().contains("does not lend"));
        assert!(Cause::Request { status: 99 }.to_string().ends_with("(status 99)"));
        assert!(Cause::System { errno: libc::ENOMEM }.to_string().contains("allocate memory"));
    }
}
