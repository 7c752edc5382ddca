//! The worker's side of block devices: its queues, moved by its io_uring between kernel and shards. Step 1 of the flow.
//!
//! Invariants: a queue is served by one worker from its first fetch to its end; it holds its device, and counts as a
//! client, until every fetch ended with the device or nothing of it is under way in a node that ends; the queue of a
//! device that is kept passes on nothing that a stop answers.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use twinpoint_core::request::{Answer, Tag};

use super::abi::{self, Descriptor};
use super::device::Device;
use super::queue::{PIECES_MAX, Queue};
use super::step::Step;
use crate::clients::{HostPort, WORKER_SHIFT};
use crate::mail::Mail;
use crate::uring::UringError;
use crate::worker::{UBLK, Worker};

/// In a tag: it is of a queue, not of a client. Clients are far fewer than reach this bit.
const QUEUE_BIT: u64 = 1 << 55;
const QUEUE_SHIFT: u32 = 32;
/// Parts of an operation's number: tag, piece, what it is, place of the queue.
const PIECE_SHIFT: u32 = 12;
const WHAT_SHIFT: u32 = 22;
const PLACE_SHIFT: u32 = 24;
const FETCHED: u64 = 0;
const COPIED: u64 = 1;
/// Places in the io_uring that copies leave to others.
const PLACES_KEPT: usize = 256;

const _: () = assert!(PIECES_MAX <= 1 << (WHAT_SHIFT - PIECE_SHIFT));

/// The queues of one worker.
#[derive(Default)]
pub(crate) struct UblkPort {
    queues: Vec<Option<Attached>>,
}

struct Attached {
    queue: Queue,
    device: Arc<Device>,
    /// Its number in the device.
    number: u16,
    /// Fetches that ended with the device.
    aborted: u16,
}

/// Whether a tag is of a queue.
pub(crate) fn is_of_queue(tag: Tag) -> bool {
    tag.0 & QUEUE_BIT != 0
}

fn place_of(tag: Tag) -> usize {
    (tag.0 >> QUEUE_SHIFT & 0xff) as usize
}

fn number(place: usize, what: u64, piece: u16, tag: u16) -> u64 {
    (place as u64) << PLACE_SHIFT
        | what << WHAT_SHIFT
        | u64::from(piece) << PIECE_SHIFT
        | u64::from(tag)
}

impl Worker {
    /// A queue of a new device: from now on its requests come.
    pub fn ublk_attach(
        &mut self,
        device: Arc<Device>,
        number_of_queue: u16,
    ) -> Result<(), UringError> {
        if self.ending || device.is_given_up() {
            return Ok(());
        }
        if self.uring.free_at_best() < usize::from(device.depth) + PLACES_KEPT {
            // Its device does not start: the thread that makes it is told so by the kernel's silence.
            eprintln!("twinpoint: /dev/ublkc{}: a thread has no room for its queue", device.id);
            return Ok(());
        }
        if self.uring.free() < usize::from(device.depth) + PLACES_KEPT {
            // Later: what is under way leaves room when it ends, and the kernel waits for the queue.
            self.mailbox.send(self.index, Mail::Ublk(device, number_of_queue));
            return Ok(());
        }
        let queues = &mut self.ublk.queues;
        let free = queues.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            queues.push(None);
            queues.len() - 1
        });
        assert!(place < 1 << 8, "queues are bounded by the devices of a node");
        let base = (self.index as u64) << WORKER_SHIFT | QUEUE_BIT | (place as u64) << QUEUE_SHIFT;
        let queue = Queue::new(base, device.export, device.depth, device.writes_through);
        for tag in 0..device.depth {
            let id = UBLK | number(place, FETCHED, 0, tag);
            self.uring.ublk_fetch(id, device.file.as_raw_fd(), (number_of_queue, tag))?;
        }
        queues[place] = Some(Attached { queue, device, number: number_of_queue, aborted: 0 });
        self.shared.clients.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// An operation of a queue completed.
    pub fn ublk_completed(&mut self, number: u64, result: i32) -> Result<(), UringError> {
        let place = (number >> PLACE_SHIFT) as usize;
        let tag = (number & ((1 << PIECE_SHIFT) - 1)) as u16;
        let piece = (number >> PIECE_SHIFT & ((1 << (WHAT_SHIFT - PIECE_SHIFT)) - 1)) as u16;
        let what = number >> WHAT_SHIFT & ((1 << (PLACE_SHIFT - WHAT_SHIFT)) - 1);
        self.with_queue(place, |attached, host| match what {
            FETCHED if result == 0 => attached.fetched(tag, host),
            FETCHED => attached.fetch_failed(result),
            _ => attached.queue.copied(tag, piece, result, host),
        });
        self.ublk_drive(place)
    }

    /// A shard answered a request of a queue.
    pub fn ublk_answer(&mut self, answer: Answer) -> Result<(), UringError> {
        let place = place_of(answer.tag);
        self.with_queue(place, |attached, host| attached.queue.answer(answer, host));
        self.ublk_drive(place)
    }

    /// A flush of a queue is done, or failed.
    pub fn ublk_flushed(&mut self, tag: Tag, done: bool) -> Result<(), UringError> {
        let place = place_of(tag);
        self.with_queue(place, |attached, host| attached.queue.flushed(tag, done, host));
        self.ublk_drive(place)
    }

    /// Lets every queue go on that waited for memory, room, or the hold to end.
    pub fn ublk_resume(&mut self) -> Result<(), UringError> {
        for place in 0..self.ublk.queues.len() {
            let starved = |attached: &Attached| attached.queue.is_starved();
            if self.ublk.queues[place].as_ref().is_some_and(starved) {
                self.with_queue(place, |attached, host| attached.queue.resume(host));
                self.ublk_drive(place)?;
            }
        }
        Ok(())
    }

    /// Gives the io_uring what found no place before.
    pub fn ublk_submit(&mut self) -> Result<(), UringError> {
        for place in 0..self.ublk.queues.len() {
            if self.ublk.queues[place].as_ref().is_some_and(|attached| attached.queue.has_steps()) {
                self.ublk_drive(place)?;
            }
        }
        Ok(())
    }

    /// The node ends: what the kernel has not been answered it keeps.
    pub fn ublk_end(&mut self) -> Result<(), UringError> {
        for place in 0..self.ublk.queues.len() {
            self.with_queue(place, |attached, host| attached.queue.end(host));
            self.ublk_drive(place)?;
        }
        Ok(())
    }

    /// Starts what a queue wants of the kernel; lets it go when it is over.
    fn ublk_drive(&mut self, place: usize) -> Result<(), UringError> {
        let Some(attached) = self.ublk.queues[place].as_mut() else { return Ok(()) };
        while self.uring.free() > PLACES_KEPT {
            let Some(step) = attached.queue.next_step() else { break };
            let device = attached.device.file.as_raw_fd();
            take_step(&mut self.uring, &self.shared.arena, device, (place, attached.number), step)?;
        }
        let is_gone = attached.aborted == attached.device.depth;
        if attached.queue.is_idle() && (is_gone || self.ending) {
            self.ublk.queues[place] = None;
            self.shared.clients.fetch_sub(1, Ordering::AcqRel);
        }
        Ok(())
    }

    fn with_queue(&mut self, place: usize, work: impl FnOnce(&mut Attached, &mut HostPort<'_>)) {
        self.with_frontends(|_, ublk, host, _| {
            // Of a queue that is over, fetches may still end with the ring.
            let Some(attached) = ublk.queues[place].as_mut() else { return };
            if host.shared.is_keeping() {
                attached.queue.end(host);
            }
            work(attached, host);
            if host.shared.is_refusing() {
                attached.queue.refuse(host);
            }
        });
    }
}

fn take_step(
    uring: &mut crate::uring::Uring,
    arena: &crate::buffers::Arena,
    device: RawFd,
    (place, queue): (usize, u16),
    step: Step,
) -> Result<(), UringError> {
    match step {
        Step::Commit { tag, result } => {
            let id = UBLK | number(place, FETCHED, 0, tag);
            uring.ublk_commit(id, device, (queue, tag), result)
        }
        Step::CopyIn(copy) | Step::CopyOut(copy) => {
            let id = UBLK | number(place, COPIED, copy.piece, copy.tag);
            let position = abi::data_position(queue, copy.tag, copy.at);
            let span = arena.part(copy.first, copy.buffer_offset, copy.length);
            if matches!(step, Step::CopyIn(_)) {
                uring.ublk_copy_in(id, device, position, span)
            } else {
                uring.ublk_copy_out(id, device, position, span)
            }
        }
    }
}

impl Attached {
    fn fetched(&mut self, tag: u16, host: &mut HostPort<'_>) {
        let bytes = self.device.descriptions[usize::from(self.number)].read(tag);
        let bytes = bytes.expect("a tag that was fetched is one of the queue");
        self.queue.began(tag, &Descriptor::decode(&bytes), host);
    }

    /// The device goes, or the kernel wants no fetch of us.
    fn fetch_failed(&mut self, result: i32) {
        self.aborted += 1;
        if result != abi::ABORTED {
            let error = std::io::Error::from_raw_os_error(-result);
            let (id, queue) = (self.device.id, self.number);
            eprintln!("twinpoint: /dev/ublkc{id}: queue {queue} was refused a fetch: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
