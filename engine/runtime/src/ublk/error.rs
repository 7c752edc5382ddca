//! Why a volume is no block device now: what happened, to what, what to do.

use std::fmt;
use std::io;

use super::abi::CONTROL_PATH;

/// See the module.
#[derive(Debug)]
pub enum UblkError {
    /// The driver is not there.
    NoDriver,
    /// The driver may not be used.
    Forbidden(io::Error),
    /// The kernel lacks what this builds on.
    TooOld,
    /// The id is another's, which this process serves.
    IdInUse {
        /// Which id.
        id: u32,
        /// The process.
        process: i32,
    },
    /// A device of this volume is still held by a process that served it.
    Held {
        /// Its id.
        id: u32,
    },
    /// The kernel refused a command.
    Command {
        /// Which one.
        what: &'static str,
        /// For which device.
        id: u32,
        /// Its reason, an errno.
        errno: i32,
    },
    /// The kernel did not answer a command in time.
    Silent {
        /// Which one.
        what: &'static str,
        /// For which device.
        id: u32,
    },
    /// The character device cannot be used.
    Device {
        /// Which one.
        id: u32,
        /// Why.
        error: io::Error,
    },
    /// The node's threads ended meanwhile.
    NodeEnds,
    /// The system refused a thread, a ring or memory.
    System(io::Error),
}

impl UblkError {
    /// Whether it may pass while the node serves, as when somebody else still has the device.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, UblkError::Held { .. } | UblkError::Silent { .. })
    }
}

impl fmt::Display for UblkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UblkError::NoDriver => write!(
                f,
                "--ublk: there is no {CONTROL_PATH}: load the driver with `modprobe ublk_drv`, or leave --ublk away"
            ),
            UblkError::Forbidden(error) => {
                write!(f, "--ublk: {CONTROL_PATH}: {error}; it needs the right CAP_SYS_ADMIN")
            }
            UblkError::TooOld => {
                f.write_str("--ublk: this kernel's ublk is too old; Linux >= 6.5 is needed")
            }
            UblkError::IdInUse { id, process } => write!(
                f,
                "--ublk: id {id} is used by another device (process {process}); choose another id"
            ),
            UblkError::Held { id } => write!(
                f,
                "--ublk: /dev/ublkb{id} is still held by a process that served it before; trying again"
            ),
            UblkError::Command { what, id, errno } => {
                let error = io::Error::from_raw_os_error(*errno);
                write!(f, "--ublk: the kernel refused to {what} device {id}: {error}")
            }
            UblkError::Silent { what, id } => {
                let hint = if *what == "delete" { ": is it still mounted or open?" } else { "" };
                write!(f, "--ublk: the kernel did not {what} device {id} in time{hint}")
            }
            UblkError::Device { id, error } => write!(f, "--ublk: /dev/ublkc{id}: {error}"),
            UblkError::NodeEnds => f.write_str("--ublk: the node is ending"),
            UblkError::System(error) => {
                write!(f, "--ublk: the system refused a thread, a ring or memory: {error}")
            }
        }
    }
}

impl std::error::Error for UblkError {}
