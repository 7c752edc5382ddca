//! What a node's errors mean to whoever runs a command: of a running node behind its control socket, and of one that
//! does not start or ended by itself.

use std::io::{self, ErrorKind};

use rdma_fallback::key::{KeyError, KeyFault};
use twinpoint_runtime::control::ControlError;
use twinpoint_runtime::node::NodeError;
use twinpoint_runtime::uring::UringError;

use super::{Exit, Failure};

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
            ControlError::Silent { .. } => Failure::new(Exit::TimedOut, "timed-out", &error),
            _ => Failure::new(Exit::Unreachable, "unreachable", &error),
        }
    }
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Failure {
        match error {
            NodeError::Device(error) => error.into(),
            NodeError::Store(error) => error.into(),
            NodeError::Key(error) => error.into(),
            NodeError::NotPromoted(..) => Failure::new(Exit::Refused, "not-promoted", error),
            NodeError::Deposed(..) => Failure::new(Exit::Refused, "deposed", error),
            // Flags that no retry makes right.
            NodeError::Core(_) => Failure::usage(format!(
                "{error}: name others, or see `nproc` and the service's CPUAffinity"
            )),
            NodeError::Memory { .. } | NodeError::KeyMissing => Failure::usage(error),
            NodeError::Address(address, error) => address_failure(&address, &error),
            NodeError::System(source) if source.kind() == ErrorKind::OutOfMemory => {
                Failure::failed(
                    "node",
                    format!("not enough memory ({source}): give less --memory or --lent-memory"),
                )
            }
            NodeError::System(_) => {
                let text =
                    format!("{error}: raise LimitNOFILE, TasksMax or the memory of its service");
                Failure::failed("node", text)
            }
            NodeError::Ublk(_) => Failure::failed("ublk", error),
            NodeError::Uring(UringError::Commands { .. }) => {
                let text = format!("{error}: see dmesg, or leave --device-mode away");
                Failure::failed("device-mode", text)
            }
            NodeError::Uring(_) => Failure::failed("node", error),
        }
    }
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Failure {
        let advice = match &error.fault {
            KeyFault::Io(source) if source.kind() == ErrorKind::NotFound => {
                ": copy it from the other host, or make one with `twinpoint key generate FILE`"
            }
            KeyFault::Io(_) | KeyFault::NotAFile | KeyFault::TooLong => {
                ": give one made by `twinpoint key generate FILE`"
            }
            // These say it themselves.
            KeyFault::Owner { .. } | KeyFault::Permissions { .. } | KeyFault::TooShort { .. } => "",
        };
        Failure::failed("key", format!("{error}{advice}"))
    }
}

/// A socket that cannot be made or bound.
fn address_failure(address: &str, error: &io::Error) -> Failure {
    let said = error.to_string();
    let what = if said.contains(address) { said } else { format!("{address}: {said}") };
    match error.kind() {
        ErrorKind::AddrInUse => {
            let text = format!("{what}: stop what uses it, or choose another address");
            Failure::new(Exit::Refused, "in-use", text)
        }
        ErrorKind::AlreadyExists => Failure::new(
            Exit::Refused,
            "exists",
            format!("{what}: remove it, or choose another path"),
        ),
        ErrorKind::NotFound => {
            Failure::failed("address", format!("{what}: check the path: its folder is not there"))
        }
        ErrorKind::PermissionDenied => {
            Failure::failed("address", format!("{what}: this user may not: choose another address"))
        }
        ErrorKind::AddrNotAvailable => Failure::failed(
            "address",
            format!("{what}: this host does not have it: see `ip address`"),
        ),
        _ => Failure::failed("address", format!("{what}: choose another address")),
    }
}
