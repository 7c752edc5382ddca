//! An operation as callers see it: what it is given, how long they wait, what became of it, and counts of all. Beside the
//! flow; the words of [`super::Uring`].
//!
//! Invariant: plain values, which borrow at most the bytes of a message's head.

use std::io;
use std::time::Duration;

use io_uring::cqueue;
use rdma_fallback::Span;

/// Most parts of one vectored operation; the kernel's own limit (UIO_MAXIOV).
pub const PARTS_MAX: usize = 1024;
/// Most bytes of [`Part::Bytes`] in one send: they are copied.
pub const COPIED_BYTES_MAX: usize = 64 << 10;

/// How long to wait for a completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until one is there, or this time is over.
    For(Duration),
    /// Until one is there.
    Forever,
}

/// How much a receive waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Amount {
    /// What is there, at least one byte.
    Some,
    /// All that was asked for, unless the connection ends.
    All,
}

/// A part of a message to send.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// Copied at the call; for headers.
    Bytes(&'a [u8]),
    /// Sent from the arena; must stay unchanged until the completion.
    Span(Span),
}

/// What became of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// As given with the operation.
    pub user_data: u64,
    /// A count of bytes, a descriptor or an event mask; negative: an errno.
    pub result: i32,
    /// The kernel's flags; see [`Completion::has_more`].
    pub flags: u32,
}

impl Completion {
    /// Whether more completions of the same (multishot) operation follow.
    #[must_use]
    pub fn has_more(&self) -> bool {
        cqueue::more(self.flags)
    }

    /// The result, or the operation's error.
    ///
    /// # Errors
    /// The errno that the kernel reported.
    pub fn ok(&self) -> Result<u32, io::Error> {
        u32::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }
}

/// What a ring did since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UringCounters {
    /// System calls.
    pub enters: u64,
    /// Operations begun.
    pub operations: u64,
    /// Completions reported.
    pub completions: u64,
}

/// What a ring did with NVMe commands since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CommandCounters {
    /// Given to the kernel.
    pub commands: u64,
    /// Of these: from one piece of registered memory, which the kernel need not look up.
    pub registered: u64,
    /// System calls that looked at the device's poll queues; [`UringCounters::enters`] has them too.
    pub polls: u64,
}
