//! Where received bytes go: the session's own buffer, or straight into the buffers of a large write.
//!
//! Invariants: the own buffer never moves; unread bytes are moved inside it only when a new receive is prepared,
//! never while one is under way; taking bytes out while a receive is under way does not touch the free part.

use twinpoint_core::units::BufferId;

use super::limits::{INPUT_BYTES, INPUT_BYTES_LARGE};

/// Where the next received bytes go.
#[derive(Debug)]
pub enum Input<'a> {
    /// The session's own buffer. Its address stays valid until [`super::NbdSession::received`].
    Own(&'a mut [u8]),
    /// Payload of a large write: consecutive buffers of the arena.
    Buffers {
        /// The first buffer.
        first: BufferId,
        /// Where the bytes go, counted from the first buffer's start.
        offset: usize,
        /// At most this many bytes.
        length: usize,
    },
    /// The session can take nothing now; ask again after the next call.
    Wait,
}

/// What the last prepared receive fills.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Expected {
    Nothing,
    Own { length: usize },
    Buffers { length: usize },
}

/// The session's own input buffer.
pub(super) struct InputBuffer {
    storage: Box<[u8]>,
    start: usize,
    end: usize,
    window: usize,
    pub(super) expected: Expected,
}

impl InputBuffer {
    pub(super) fn new() -> InputBuffer {
        InputBuffer {
            storage: vec![0; INPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            window: INPUT_BYTES,
            expected: Expected::Nothing,
        }
    }

    /// The bytes received and not yet taken.
    pub(super) fn unread(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes `count` bytes.
    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "{count} bytes were not received");
        self.start += count;
    }

    /// The next `N` bytes, not taken; `None` while there are fewer.
    pub(super) fn peek<const N: usize>(&self) -> Option<&[u8; N]> {
        self.unread().first_chunk()
    }

    /// Makes room at the end and gives it.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.storage.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let stop = self.storage.len().min(self.end + self.window);
        assert!(self.end < stop, "the own buffer holds any message that is not payload");
        self.expected = Expected::Own { length: stop - self.end };
        &mut self.storage[self.end..stop]
    }

    /// `count` bytes arrived at the end.
    pub(super) fn append(&mut self, count: usize) {
        self.end += count;
    }

    /// Whether large writes come, whose payload should not land here.
    pub(super) fn expect_large_writes(&mut self, large: bool) {
        self.window = if large { INPUT_BYTES_LARGE } else { INPUT_BYTES };
    }
}
