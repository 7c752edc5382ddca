//! The slots of a ring: each is free, or holds one operation from its call until its last completion.
//!
//! Invariants: what the kernel reads or writes of an operation besides the user's bytes lies in its slot and does not
//! move; a slot's name is not used again for long, so a completion is never taken for another operation's.

use std::cell::UnsafeCell;
use std::ptr::null_mut;

use io_uring::cqueue;
use io_uring::types::Timespec;

use super::commands::Progress;
use super::{Completion, UringError};

/// The slots, each free or busy with one operation.
pub(super) struct Slots {
    pub all: Box<[Slot]>,
    pub free: Vec<u32>,
    /// Busy ones that nobody here can end and that have no memory of ours.
    pub parked: usize,
}

impl Slots {
    /// The slot that the next operation will take, if more than `kept` are free.
    pub fn next(&self, kept: usize) -> Result<u32, UringError> {
        if self.free.len() <= kept {
            return Err(UringError::Full);
        }
        Ok(*self.free.last().expect("more than none are free"))
    }

    pub fn take(&mut self, index: u32, user_data: Option<u64>) {
        // The last one, unless other slots became free since it was chosen.
        let position = self.free.iter().rposition(|free| *free == index);
        self.free.swap_remove(position.expect("a chosen slot is free until it is taken"));
        let slot = &mut self.all[index as usize];
        slot.is_busy = true;
        slot.user_data = user_data;
    }

    pub fn park(&mut self, index: u32) {
        self.all[index as usize].is_parked = true;
        self.parked += 1;
    }

    /// Frees the slot of a completed operation and translates the completion; None for the ring's own operations.
    pub fn complete(&mut self, name: u64, result: i32, flags: u32) -> Option<Completion> {
        let index = name as u32;
        let slot = &mut self.all[index as usize];
        let is_current = slot.is_busy && name >> 32 == u64::from(slot.generation);
        assert!(is_current, "slot {index} completed without an operation");
        let user_data = slot.user_data;
        if !cqueue::more(flags) {
            slot.is_busy = false;
            self.parked -= usize::from(std::mem::take(&mut slot.is_parked));
            slot.generation = slot.generation.wrapping_add(1);
            self.free.push(index);
        }
        user_data.map(|user_data| Completion { user_data, result, flags })
    }

    /// The kernel's name for the operation in a slot. No other operation will have it for long after.
    pub fn tag(&self, index: u32) -> u64 {
        (u64::from(self.all[index as usize].generation) << 32) | u64::from(index)
    }
}

/// What the kernel reads or writes for one operation besides the user's bytes.
pub(super) struct Slot {
    // None for the ring's own operations, which are not reported.
    pub user_data: Option<u64>,
    generation: u32,
    pub is_busy: bool,
    is_parked: bool,
    pub progress: Progress,
    pub vectors: Vec<libc::iovec>,
    pub copied: Vec<u8>,
    pub message: libc::msghdr,
    pub time: Timespec,
    pub rings: UnsafeCell<u64>,
}

impl Default for Slot {
    fn default() -> Slot {
        Slot {
            user_data: None,
            generation: 0,
            is_busy: false,
            is_parked: false,
            progress: Progress::default(),
            vectors: Vec::new(),
            copied: Vec::new(),
            message: libc::msghdr {
                msg_name: null_mut(),
                msg_namelen: 0,
                msg_iov: null_mut(),
                msg_iovlen: 0,
                msg_control: null_mut(),
                msg_controllen: 0,
                msg_flags: 0,
            },
            time: Timespec::new(),
            rings: UnsafeCell::new(0),
        }
    }
}
