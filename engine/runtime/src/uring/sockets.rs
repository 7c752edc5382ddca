//! Messages over sockets: step 1 of the flow for clients that come by NBD. Parts go out of the arena and come into it.
//!
//! Invariant: what is sent from outside the arena is copied into the operation's slot first.

use std::os::fd::RawFd;

use io_uring::opcode;
use io_uring::types::Fd;
use rdma_fallback::Span;

use super::{Amount, COPIED_BYTES_MAX, PARTS_MAX, Part, SLOTS_RESERVED, Uring, UringError};

impl Uring {
    /// Receives from a socket into a span. Completes with the bytes received; 0: the peer closed.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Panics
    /// If the span leaves the arena.
    pub fn receive(
        &mut self,
        user_data: u64,
        socket: RawFd,
        span: Span,
        amount: Amount,
    ) -> Result<(), UringError> {
        let pointer = self.pointer(span);
        // SAFETY: the span lies in the arena, which the ring keeps mapped, and belongs to this operation until its
        // completion (the second invariant above).
        unsafe { self.receive_at(user_data, socket, pointer, span.length, amount) }
    }

    /// As [`Uring::receive`], into memory of the caller.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Safety
    /// `length` bytes at `pointer` must stay valid for writes, and nothing else may access them, until the
    /// operation's completion was reaped. (Before the ring is dropped, [`Uring::drain`] brings it.)
    pub unsafe fn receive_at(
        &mut self,
        user_data: u64,
        socket: RawFd,
        pointer: *mut u8,
        length: u32,
        amount: Amount,
    ) -> Result<(), UringError> {
        let flags = if amount == Amount::All { libc::MSG_WAITALL } else { 0 };
        let index = self.slots.next(SLOTS_RESERVED)?;
        self.begin(
            index,
            Some(user_data),
            opcode::Recv::new(Fd(socket), pointer, length).flags(flags).build(),
        )
    }

    /// Sends the parts, one after the other. Completes with the bytes sent: all, unless the connection failed midway.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Panics
    /// If there are no parts, more than [`PARTS_MAX`], more than [`COPIED_BYTES_MAX`] to copy, or one leaves the
    /// arena.
    pub fn send(
        &mut self,
        user_data: u64,
        socket: RawFd,
        parts: &[Part<'_>],
    ) -> Result<(), UringError> {
        assert!(!parts.is_empty() && parts.len() <= PARTS_MAX, "{} parts in a send", parts.len());
        let index = self.slots.next(SLOTS_RESERVED)?;
        let (vectors, count) = self.gather(index, parts.iter().copied());
        let message = &mut self.slots.all[index as usize].message;
        message.msg_iov = vectors.cast_mut();
        message.msg_iovlen = count as usize;
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(Fd(socket), message).flags(flags).build();
        self.begin(index, Some(user_data), entry)
    }

    /// Fills the slot's vectors with the parts, and copies those that are bytes into the slot.
    pub(super) fn gather<'a>(
        &mut self,
        index: u32,
        parts: impl Iterator<Item = Part<'a>> + Clone,
    ) -> (*const libc::iovec, u32) {
        let slot = &mut self.slots.all[index as usize];
        let mut vectors = std::mem::take(&mut slot.vectors);
        let mut copied = std::mem::take(&mut slot.copied);
        copied.clear();
        vectors.clear();
        for part in parts.clone() {
            if let Part::Bytes(bytes) = part {
                copied.extend_from_slice(bytes);
            }
        }
        assert!(copied.len() <= COPIED_BYTES_MAX, "{} bytes to copy in one send", copied.len());
        // Only now, because the copy may have moved while it grew.
        let mut rest: &[u8] = &copied;
        for part in parts {
            let (pointer, length) = match part {
                Part::Span(span) => (self.pointer(span), span.length as usize),
                Part::Bytes(bytes) => {
                    let (head, tail) = rest.split_at(bytes.len());
                    rest = tail;
                    (head.as_ptr().cast_mut(), head.len())
                }
            };
            vectors.push(libc::iovec { iov_base: pointer.cast(), iov_len: length });
        }
        let slot = &mut self.slots.all[index as usize];
        slot.copied = copied;
        slot.vectors = vectors;
        (slot.vectors.as_ptr(), slot.vectors.len() as u32)
    }
}
