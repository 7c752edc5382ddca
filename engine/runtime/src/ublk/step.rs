//! What a queue wants of the kernel: copies between a request's pages and buffers, and the ends of requests. Step 1 of the
//! flow.
//!
//! Invariant: a copy's buffers are the queue's until it was made.

use twinpoint_core::units::BufferId;

/// What the kernel is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Copy from a write's pages into buffers.
    CopyIn(Transfer),
    /// Copy from buffers into a read's pages.
    CopyOut(Transfer),
    /// End the request and fetch the next one of its tag.
    Commit { tag: u16, result: i32 },
}

/// Bytes of a request and where they lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Transfer {
    pub tag: u16,
    pub piece: u16,
    /// First byte, counted from the request's.
    pub at: u32,
    pub first: BufferId,
    pub buffer_offset: usize,
    pub length: usize,
}
