//! Why a node does not start, or ended: what happened, to what, what to do.

use std::fmt;
use std::path::PathBuf;

use rdma_fallback::KeyError;
use twinpoint_core::units::Term;

use crate::device::DeviceError;
use crate::store::StoreError;
use crate::ublk::UblkError;
use crate::uring::UringError;

/// Why a node does not start, or ended.
#[derive(Debug)]
pub enum NodeError {
    /// The store's device.
    Device(DeviceError),
    /// The store's contents.
    Store(StoreError),
    /// The store followed a primary; only a promotion makes it one.
    NotPromoted(PathBuf),
    /// Another store took over in this term.
    Deposed(PathBuf, Term),
    /// The key file.
    Key(KeyError),
    /// A peer or a listening address needs a key.
    KeyMissing,
    /// The memory given is too small: at least so many bytes.
    Memory {
        /// Which option.
        option: &'static str,
        /// The least, in bytes.
        least_bytes: u64,
    },
    /// A named core does not exist or may not be used.
    Core(usize),
    /// An address cannot be used.
    Address(String, std::io::Error),
    /// A volume as a block device.
    Ublk(UblkError),
    /// The io_uring of a worker.
    Uring(UringError),
    /// The system refused a thread or memory.
    System(std::io::Error),
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeError::Device(error) => error.fmt(f),
            NodeError::Store(error) => error.fmt(f),
            NodeError::NotPromoted(path) => write!(
                f,
                "{}: this store followed a primary: start it with --role secondary, or make it primary with \
                 `twinpoint promote`",
                path.display()
            ),
            NodeError::Deposed(path, term) => write!(
                f,
                "{}: term {term} was opened on the other store: start this one with --role secondary",
                path.display()
            ),
            NodeError::Key(error) => error.fmt(f),
            NodeError::KeyMissing => {
                f.write_str("--peer and --listen need --key-file; make one with `twinpoint key`")
            }
            NodeError::Memory { option, least_bytes } => {
                write!(
                    f,
                    "{option} is too small: give at least {} MiB",
                    least_bytes.div_ceil(1 << 20)
                )
            }
            NodeError::Core(core) => {
                write!(f, "--cores: core {core} does not exist or may not be used")
            }
            NodeError::Address(address, error) => {
                write!(f, "{address}: {error}; choose another address")
            }
            NodeError::Ublk(error) => error.fmt(f),
            NodeError::Uring(error) => error.fmt(f),
            NodeError::System(error) => {
                write!(f, "the system refused a thread, a descriptor or memory: {error}")
            }
        }
    }
}

impl std::error::Error for NodeError {}
