//! Why a ring cannot be made or does not take an operation, for an operator to read.
//!
//! Invariant: what the kernel or the device answered is said in words, with its number.

use std::fmt;
use std::io;

use crate::device::nvme::Status;

/// Why a ring cannot be made or does not take an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UringError {
    /// As many operations are under way as the ring may have. A normal state.
    Full,
    /// The kernel has no io_uring, or not what this program builds on.
    TooOld,
    /// The administrator or a sandbox forbids io_uring.
    Forbidden,
    /// The kernel lacks an operation.
    Lacks {
        /// Its name.
        operation: &'static str,
    },
    /// The limit of locked memory leaves no room for the ring itself.
    NoMemory,
    /// The process may not lock the arena in memory.
    LockedMemory {
        /// How much is needed.
        bytes: u64,
    },
    /// Operations did not end in time.
    Undrained {
        /// How many.
        in_flight: usize,
    },
    /// The store takes no NVMe commands from this ring.
    Commands {
        /// The first one's answer: an errno below zero, a status above.
        result: i32,
    },
    /// The kernel refused a call.
    System {
        /// Its reason.
        errno: i32,
    },
}

impl fmt::Display for UringError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UringError::Full => f.write_str("the io_uring has no room for another operation"),
            UringError::TooOld => f.write_str("this kernel's io_uring is too old; Linux >= 6.1 is needed"),
            UringError::Forbidden => f.write_str(
                "io_uring is forbidden; see the sysctl kernel.io_uring_disabled and the sandbox's system call filter",
            ),
            UringError::Lacks { operation } => write!(
                f,
                "this kernel lacks io_uring operation {operation}; Linux >= 6.1 is needed"
            ),
            UringError::LockedMemory { bytes } => write!(
                f,
                "cannot lock {bytes} bytes of memory: RLIMIT_MEMLOCK is too low; raise it (`ulimit -l unlimited`, \
                 or LimitMEMLOCK=infinity in the service's unit)"
            ),
            UringError::NoMemory => f.write_str(
                "no memory can be locked for an io_uring: RLIMIT_MEMLOCK is too low; raise it (`ulimit -l unlimited`, \
                 or LimitMEMLOCK=infinity in the service's unit)"
            ),
            UringError::Undrained { in_flight } => {
                write!(f, "{in_flight} operations did not end in time")
            }
            UringError::Commands { result } => {
                write!(f, "the store takes no NVMe commands: {}", answer_text(*result))
            }
            UringError::System { errno } => {
                write!(f, "io_uring failed: {}", io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl std::error::Error for UringError {}

pub(super) fn system(error: &io::Error) -> UringError {
    UringError::System { errno: error.raw_os_error().unwrap_or(0) }
}

/// What it means that the kernel refused to make a ring.
pub(super) fn refusal(error: io::Error) -> UringError {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL) => UringError::TooOld,
        Some(libc::EPERM | libc::EACCES) => UringError::Forbidden,
        Some(libc::ENOMEM) => UringError::NoMemory,
        _ => system(&error),
    }
}

/// What became of an NVMe command that failed: an errno below zero, a status above.
pub(super) fn answer_text(result: i32) -> String {
    match u16::try_from(result) {
        Ok(status) => Status(status).to_string(),
        Err(_) => io::Error::from_raw_os_error(result.saturating_neg()).to_string(),
    }
}
