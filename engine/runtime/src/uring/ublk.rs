//! Operations of a ublk device's queue: its commands, and copies between a request's pages and the arena.
//!
//! Invariant: a command points to no memory of ours and may wait for ever for a request. Nobody can cancel it but the
//! kernel, when the ring is closed or the device goes, so a ring that drains does not wait for it.

use std::os::fd::RawFd;

use io_uring::opcode;
use io_uring::types::Fd;
use rdma_fallback::Span;

use super::{SLOTS_RESERVED, Uring, UringError};
use crate::ublk::abi;

impl Uring {
    /// How many could be begun if all had ended that end by themselves.
    #[must_use]
    pub fn free_at_best(&self) -> usize {
        (self.slots.all.len() - self.slots.parked).saturating_sub(SLOTS_RESERVED)
    }

    /// Fetches the first request of a tag; completes when there is one.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub(crate) fn ublk_fetch(
        &mut self,
        user_data: u64,
        device: RawFd,
        (queue, tag): (u16, u16),
    ) -> Result<(), UringError> {
        self.ublk_command(user_data, device, abi::FETCH, abi::fetch(queue, tag, 0))
    }

    /// Ends the request of a tag with a count of bytes, or an errno below zero, and fetches the next one.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub(crate) fn ublk_commit(
        &mut self,
        user_data: u64,
        device: RawFd,
        (queue, tag): (u16, u16),
        result: i32,
    ) -> Result<(), UringError> {
        self.ublk_command(user_data, device, abi::COMMIT_AND_FETCH, abi::fetch(queue, tag, result))
    }

    fn ublk_command(
        &mut self,
        user_data: u64,
        device: RawFd,
        command: u32,
        payload: [u8; 16],
    ) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let entry = opcode::UringCmd16::new(Fd(device), command).cmd(payload).build();
        self.begin(index, Some(user_data), entry)?;
        self.slots.park(index);
        Ok(())
    }

    /// Copies a write's bytes from `position` of the device into a span. The kernel takes no registered buffer here.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Panics
    /// If the span leaves the arena.
    pub(crate) fn ublk_copy_in(
        &mut self,
        user_data: u64,
        device: RawFd,
        position: u64,
        span: Span,
    ) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let pointer = self.pointer(span);
        let entry = opcode::Read::new(Fd(device), pointer, span.length).offset(position).build();
        self.begin(index, Some(user_data), entry)
    }

    /// Copies a span into a read's pages, at `position` of the device.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    ///
    /// # Panics
    /// If the span leaves the arena.
    pub(crate) fn ublk_copy_out(
        &mut self,
        user_data: u64,
        device: RawFd,
        position: u64,
        span: Span,
    ) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let pointer = self.pointer(span);
        let entry = opcode::Write::new(Fd(device), pointer, span.length).offset(position).build();
        self.begin(index, Some(user_data), entry)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    use crate::uring::{Uring, UringOptions, Wait};

    #[test]
    fn a_parked_operation_gives_its_place_back() {
        let mut uring = Uring::new(UringOptions::default()).expect("io_uring");
        let free = uring.free();
        // It takes any command and answers 0.
        let device = std::fs::File::open("/dev/null").expect("it is there");
        uring.ublk_fetch(7, device.as_raw_fd(), (0, 1)).expect("there is room");
        assert_eq!((uring.free(), uring.slots.parked), (free - 1, 1));
        let mut completions = Vec::new();
        while completions.is_empty() {
            uring.submit_and_wait(Wait::For(Duration::from_secs(5))).expect("it works");
            uring.reap(&mut completions);
        }
        assert_eq!(completions[0].user_data, 7);
        assert_eq!((uring.free(), uring.slots.parked, uring.in_flight()), (free, 0, 0));
    }
}
