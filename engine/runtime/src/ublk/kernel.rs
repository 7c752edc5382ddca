//! The only place of this folder that trusts the kernel with memory: a small ring for control commands, and the
//! descriptions of requests, which the kernel writes and we read.
//!
//! Invariants: what a control command points to lives until its completion was seen, or for ever; a description is
//! read only between a fetch's completion and the commit of its request.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::abi::{self, DESCRIPTOR_BYTES};
use super::error::UblkError;

/// What a command reads or writes, at most.
const DATA_BYTES: usize = 128;
/// How long the kernel may take to end a command that is given up.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(1);
/// The name of what gives a command up; commands are counted from 1.
const GIVEN_UP: u64 = 0;
/// What a command answers that was ended so. The last is the kernel's own (ERESTARTSYS).
const INTERRUPTED: [i32; 3] = [-libc::ECANCELED, -libc::EINTR, -512];

/// Control commands, one at a time.
pub(super) struct ControlRing {
    // Closed before the memory below is freed.
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    device: File,
    data: Box<[u8; DATA_BYTES]>,
    commands: u64,
}

impl ControlRing {
    /// Opens the driver's control device.
    pub fn open() -> Result<ControlRing, UblkError> {
        let device = OpenOptions::new().read(true).write(true).open(abi::CONTROL_PATH);
        let device = device.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => UblkError::NoDriver,
            _ => UblkError::Forbidden(error),
        })?;
        let ring = IoUring::builder().dontfork().build(4).map_err(UblkError::System)?;
        Ok(ControlRing { ring, device, data: Box::new([0; DATA_BYTES]), commands: 0 })
    }

    /// Has a command carried out: with `data`, which the kernel reads and may change, and a number. Answers an errno
    /// below zero, or none within the limit.
    pub fn command(
        &mut self,
        command: u32,
        id: u32,
        data: &mut [u8],
        number: u64,
        limit: Duration,
    ) -> Result<Option<i32>, UblkError> {
        self.data[..data.len()].copy_from_slice(data);
        let address = if data.is_empty() { 0 } else { self.data.as_mut_ptr().expose_provenance() };
        let length = u16::try_from(data.len()).expect("the data of a command is short");
        let payload = abi::control(id, address as u64, length, number);
        self.commands += 1;
        let name = self.commands;
        let entry = opcode::UringCmd80::new(Fd(self.device.as_raw_fd()), command).cmd(payload);
        let entry = entry.build().user_data(name);
        // SAFETY: the payload is in the entry; what it points to is `self.data`, which is not touched before the
        // command's completion, and is left to it for ever where that does not come in time.
        unsafe { self.ring.submission().push(&entry) }.expect("one command is under way at most");
        let mut done = self.wait(name, limit);
        if matches!(done, Ok(None)) {
            done = self.give_up(name);
        }
        if matches!(done, Ok(Some(_))) {
            data.copy_from_slice(&self.data[..data.len()]);
        } else {
            std::mem::forget(std::mem::replace(&mut self.data, Box::new([0; DATA_BYTES])));
        }
        done
    }

    /// Has the kernel end a command that waits too long: it has few threads for them. Answers as `wait` does: it may
    /// have been carried out just now.
    fn give_up(&mut self, name: u64) -> Result<Option<i32>, UblkError> {
        let entry = opcode::AsyncCancel::new(name).build().user_data(GIVEN_UP);
        // SAFETY: the entry points to nothing.
        unsafe { self.ring.submission().push(&entry.into()) }.expect("one command is under way");
        let ended = self.wait(name, GIVE_UP_LIMIT)?;
        Ok(ended.filter(|result| !INTERRUPTED.contains(result)))
    }

    fn wait(&mut self, name: u64, limit: Duration) -> Result<Option<i32>, UblkError> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let time = Timespec::from(left);
            let waited =
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time));
            match waited.map_err(|error| error.raw_os_error().unwrap_or(0)) {
                Ok(_) | Err(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                Err(errno) => {
                    return Err(UblkError::System(io::Error::from_raw_os_error(errno)));
                }
            }
            // Completions of commands that were given up are passed over.
            let found = self.ring.completion().find(|entry| entry.user_data() == name);
            if let Some(entry) = found {
                return Ok(Some(entry.result()));
            }
            if left.is_zero() {
                return Ok(None);
            }
        }
    }
}

/// Opens a device's character device. Without waiting: then its copies are made at once, not by a thread of the kernel.
pub(super) fn open_character(id: u32) -> io::Result<File> {
    let path = format!("/dev/ublkc{id}");
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// The descriptions of one queue's requests, in the kernel's memory.
pub(super) struct Descriptions {
    base: *const u8,
    length: usize,
    depth: u16,
}

// SAFETY: the memory is mapped for reading until the value is dropped, whatever thread does it; it is read by volatile
// loads alone, because the kernel changes it.
unsafe impl Send for Descriptions {}
// SAFETY: as above.
unsafe impl Sync for Descriptions {}

impl Descriptions {
    /// Maps those of a queue.
    pub fn map(device: &File, queue: u16, depth: u16) -> io::Result<Descriptions> {
        let (offset, length) = abi::descriptions(queue, depth);
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let descriptor = device.as_raw_fd();
        // SAFETY: a new mapping at a place of the kernel's choice, of a descriptor that is open.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, flags, descriptor, offset)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Descriptions { base: base.cast_const().cast(), length, depth })
    }

    /// The description of a tag's request; none for a tag that there is not.
    pub fn read(&self, tag: u16) -> Option<[u8; DESCRIPTOR_BYTES]> {
        if tag >= self.depth {
            return None;
        }
        let place = self.base.wrapping_add(usize::from(tag) * DESCRIPTOR_BYTES);
        // SAFETY: `depth` descriptions lie in the mapping, as `map` computed; any bytes are a value; the kernel wrote
        // them before it completed the fetch, and changes them only after the commit.
        Some(unsafe { place.cast::<[u8; DESCRIPTOR_BYTES]>().read_volatile() })
    }
}

impl Drop for Descriptions {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped, and nobody reads it any more.
        let unmapped = unsafe { libc::munmap(self.base.cast_mut().cast(), self.length) };
        assert!(unmapped == 0, "a mapping of ours can be taken back");
    }
}
