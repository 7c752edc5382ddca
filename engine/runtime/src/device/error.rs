//! Why a store could not be opened or used: what was tried, on what, and what kept it from being done.
//!
//! Invariant: an error names its store; what to do about it is said by whoever talks to the operator.

use std::fmt;
use std::io;
use std::path::PathBuf;

use twinpoint_core::units::{BLOCK_BYTES, DeviceBlock};

/// Why a store could not be opened or used.
#[derive(Debug)]
pub enum DeviceError {
    /// The system refused a step.
    System {
        /// What was tried.
        step: Step,
        /// The store.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process has the store, or a mounted file system the device.
    InUse {
        /// The store.
        path: PathBuf,
    },
    /// The file system knows no direct access.
    NoDirect {
        /// The store.
        path: PathBuf,
        /// Its file system, as far as known.
        file_system: FileSystem,
    },
    /// Neither a regular file nor a block device.
    WrongKind {
        /// What was given as the store.
        path: PathBuf,
    },
    /// The device's sectors are bigger than a block.
    WrongSector {
        /// The store.
        path: PathBuf,
        /// Its logical sector, in bytes.
        bytes: u32,
    },
    /// The size asked for a new file is 0 or no multiple of 4096.
    WrongSize {
        /// That size.
        bytes: u64,
    },
    /// The blocks asked for are not all in the store.
    OutOfRange {
        /// First block asked for.
        first: DeviceBlock,
        /// How many.
        count: u64,
        /// How many the store has.
        blocks: u64,
    },
    /// The file ended before its size at opening, or took less than a block.
    Ended {
        /// The store.
        path: PathBuf,
        /// The block that was not whole.
        block: DeviceBlock,
    },
    /// The store cannot be driven by NVMe commands.
    Passthrough {
        /// The store.
        path: PathBuf,
        /// Why not.
        fault: PassthroughFault,
    },
}

/// Why a store cannot be driven by NVMe commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PassthroughFault {
    /// It is no namespace of an NVMe device.
    NotNvme,
    /// It is a part of one.
    Partition,
    /// The kernel has no generic character device for it, or `/dev` has not.
    NoGeneric,
    /// What stands in `/dev` under the name of its block device or generic device is another device.
    OtherNode,
    /// What the device says of the namespace and what the kernel says of it differ.
    OtherSize,
    /// Its blocks have metadata beside them.
    Metadata {
        /// That many bytes each.
        bytes: u16,
    },
    /// Not even one block fits in a command.
    TooShort,
    /// The device has no queues for polling.
    NoPollQueues,
}

impl fmt::Display for PassthroughFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PassthroughFault::NotNvme => "it is no namespace of an NVMe device",
            PassthroughFault::Partition => "it is a partition, not a whole namespace",
            PassthroughFault::NoGeneric => "it has no generic character device, such as /dev/ng0n1",
            PassthroughFault::OtherNode => "its device nodes in /dev belong to different devices",
            PassthroughFault::OtherSize => "the kernel and the device do not agree on its size",
            PassthroughFault::Metadata { bytes } => {
                return write!(f, "its blocks have {bytes} bytes of metadata each");
            }
            PassthroughFault::TooShort => "its commands do not hold a block of 4096 bytes",
            PassthroughFault::NoPollQueues => "the device has no poll queues",
        })
    }
}

/// What was tried on a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// To open it.
    Open,
    /// To learn its kind, size and sectors.
    Inspect,
    /// To lock it.
    Lock,
    /// To read blocks.
    Read,
    /// To write blocks.
    Write,
    /// To make writes durable.
    Flush,
    /// To create the file.
    Create,
    /// To reserve space for the file.
    Reserve,
}

/// A file system by the magic number that statfs gives; 0 if it gave none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSystem(pub u32);

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0x0000_EF53 => "ext4",
            0x5846_5342 => "xfs",
            0x9123_683E => "btrfs",
            0x0102_1994 => "tmpfs",
            0x794C_7630 => "overlayfs",
            0x2FC1_2FC1 => "zfs",
            0x0000_6969 => "nfs",
            0x6573_5546 => "fuse",
            0x0102_1997 => "9p",
            0 => "unknown",
            magic => return write!(f, "{magic:#x}"),
        };
        f.write_str(name)
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::System { step, path, source } => {
                let deed = match step {
                    Step::Open => "open",
                    Step::Inspect => "inspect",
                    Step::Lock => "lock",
                    Step::Read => "read",
                    Step::Write => "write",
                    Step::Flush => "flush",
                    Step::Create => "create",
                    Step::Reserve => "reserve space for",
                };
                write!(f, "cannot {deed} {}: {source}", path.display())
            }
            DeviceError::InUse { path } => {
                write!(f, "{} is in use by another process", path.display())
            }
            DeviceError::NoDirect { path, file_system } => write!(
                f,
                "{} cannot be opened with O_DIRECT: its file system ({file_system}) does not support it",
                path.display()
            ),
            DeviceError::WrongKind { path } => {
                write!(
                    f,
                    "{} is neither a regular file nor a block device (of an NVMe namespace take /dev/nvme0n1, not \
                     /dev/ng0n1)",
                    path.display()
                )
            }
            DeviceError::WrongSector { path, bytes } => write!(
                f,
                "{} has logical sectors of {bytes} bytes; at most {BLOCK_BYTES} are supported",
                path.display()
            ),
            DeviceError::WrongSize { bytes } => {
                write!(f, "{bytes} bytes are not a positive multiple of {BLOCK_BYTES}")
            }
            DeviceError::OutOfRange { first, count, blocks } => {
                write!(f, "{count} blocks from block {first} on exceed a store of {blocks} blocks")
            }
            DeviceError::Passthrough { path, fault } => {
                write!(f, "{} cannot be driven by NVMe commands: {fault}", path.display())
            }
            DeviceError::Ended { path, block } => {
                write!(f, "{} ended at block {block}, before its size at opening", path.display())
            }
        }
    }
}

impl std::error::Error for DeviceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DeviceError::System { source, .. } => Some(source),
            _ => None,
        }
    }
}
