//! The store's reads, writes and flushes: step 4 of the flow, the device's half. In block mode each is one operation of
//! the kernel; for a store that is driven by commands see [`super::commands`].
//!
//! Invariant: an operation completes once, with all of its bytes or with an error, however it was carried out.

use io_uring::opcode;
use io_uring::types::{Fixed, FsyncFlags};
use rdma_fallback::Span;

use super::{PARTS_MAX, Part, SLOTS_RESERVED, Uring, UringError};
use crate::device::nvme::Deed;

/// The store is the first registered file: the file or block device, or what takes the commands.
pub(super) const STORE: Fixed = Fixed(0);

impl Uring {
    /// Writes spans, one after the other, to the store at `offset` bytes. Completes with the bytes written.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Panics
    /// If there are no spans, more than [`PARTS_MAX`], or one leaves the arena.
    pub fn write_store(
        &mut self,
        user_data: u64,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), UringError> {
        assert!(!spans.is_empty() && spans.len() <= PARTS_MAX, "{} spans in a write", spans.len());
        if self.takes_commands() {
            return self.command_store(user_data, Deed::Write, offset, spans);
        }
        let index = self.slots.next(SLOTS_RESERVED)?;
        if let Some(span) = joined(spans) {
            let pointer = self.pointer(span);
            let entry = match self.registered(span) {
                Some(buffer) => opcode::WriteFixed::new(STORE, pointer, span.length, buffer)
                    .offset(offset)
                    .build(),
                None => opcode::Write::new(STORE, pointer, span.length).offset(offset).build(),
            };
            return self.begin(index, Some(user_data), entry);
        }
        let first = self.registered(spans[0]).filter(|_| self.has_vectored_fixed);
        let shared = first
            .filter(|first| spans[1..].iter().all(|span| self.registered(*span) == Some(*first)));
        let (vectors, count) = self.gather(index, spans.iter().map(|span| Part::Span(*span)));
        let entry = match shared {
            Some(buffer) => {
                opcode::WritevFixed::new(STORE, vectors, count, buffer).offset(offset).build()
            }
            None => opcode::Writev::new(STORE, vectors, count).offset(offset).build(),
        };
        self.begin(index, Some(user_data), entry)
    }

    /// Reads from the store at `offset` bytes into a span. Completes with the bytes read.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Panics
    /// If the span leaves the arena.
    pub fn read_store(
        &mut self,
        user_data: u64,
        offset: u64,
        span: Span,
    ) -> Result<(), UringError> {
        if self.takes_commands() {
            return self.command_store(user_data, Deed::Read, offset, &[span]);
        }
        let index = self.slots.next(SLOTS_RESERVED)?;
        let pointer = self.pointer(span);
        let entry = match self.registered(span) {
            Some(buffer) => {
                opcode::ReadFixed::new(STORE, pointer, span.length, buffer).offset(offset).build()
            }
            None => opcode::Read::new(STORE, pointer, span.length).offset(offset).build(),
        };
        self.begin(index, Some(user_data), entry)
    }

    /// Makes durable all writes that completed before this call.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub fn flush_store(&mut self, user_data: u64) -> Result<(), UringError> {
        if self.takes_commands() {
            return self.command_store(user_data, Deed::Flush, 0, &[]);
        }
        let index = self.slots.next(SLOTS_RESERVED)?;
        self.begin(
            index,
            Some(user_data),
            opcode::Fsync::new(STORE).flags(FsyncFlags::DATASYNC).build(),
        )
    }
}

/// The spans as one, if each begins where the one before ends.
pub(super) fn joined(spans: &[Span]) -> Option<Span> {
    let (first, rest) = spans.split_first()?;
    rest.iter().try_fold(*first, |all, next| {
        let follows = next.offset == all.offset.checked_add(u64::from(all.length))?;
        let length = all.length.checked_add(next.length)?;
        follows.then_some(Span { offset: all.offset, length })
    })
}
