//! Watching: connections, descriptors, bells and times that a worker waits for. Beside the flow; it is what wakes a worker.
//!
//! Invariant: what the kernel reads or writes for a watch lies in the operation's slot.

use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::opcode;
use io_uring::types::{Fd, Timespec};

use super::{SLOTS_RESERVED, Uring, UringError};

impl Uring {
    /// Accepts connections until cancelled or failed; completes with a new descriptor each time.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub fn accept_multishot(&mut self, user_data: u64, listener: RawFd) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let entry = opcode::AcceptMulti::new(Fd(listener)).flags(libc::SOCK_CLOEXEC).build();
        self.begin(index, Some(user_data), entry)
    }

    /// Watches a descriptor until cancelled or failed; completes with the events each time some of `mask`
    /// (`libc::POLLIN`, ...) begin. Events that lasted since an earlier completion are not told again.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub fn poll_multishot(
        &mut self,
        user_data: u64,
        descriptor: RawFd,
        mask: i16,
    ) -> Result<(), UringError> {
        self.poll(user_data, descriptor, mask, true)
    }

    /// Waits for one of the events `mask` of a descriptor; completes once, with the events.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub fn poll_once(
        &mut self,
        user_data: u64,
        descriptor: RawFd,
        mask: i16,
    ) -> Result<(), UringError> {
        self.poll(user_data, descriptor, mask, false)
    }

    fn poll(
        &mut self,
        user_data: u64,
        descriptor: RawFd,
        mask: i16,
        is_multishot: bool,
    ) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let watch = opcode::PollAdd::new(Fd(descriptor), mask as u16 as u32);
        self.begin(index, Some(user_data), watch.multi(is_multishot).build())
    }

    /// Waits until a (blocking) eventfd was rung and resets it; completes with 8.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub fn read_eventfd(&mut self, user_data: u64, eventfd: RawFd) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let rings = self.slots.all[index as usize].rings.get();
        self.begin(index, Some(user_data), opcode::Read::new(Fd(eventfd), rings.cast(), 8).build())
    }

    /// Completes with `-ETIME` after `duration`.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first.
    pub fn timeout(&mut self, user_data: u64, duration: Duration) -> Result<(), UringError> {
        let index = self.slots.next(SLOTS_RESERVED)?;
        let time = &mut self.slots.all[index as usize].time;
        *time = Timespec::from(duration);
        let entry = opcode::Timeout::new(time).build();
        self.begin(index, Some(user_data), entry)
    }
}
