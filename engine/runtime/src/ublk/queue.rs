//! One queue of a block device without the kernel: descriptions of requests in, [`Request`]s to the shards and
//! [`Step`]s for the kernel out. Step 1 of the flow.
//!
//! ```text
//!   began -> buffers -> CopyIn -> copied -> shards -> answer -> (flush) -> Commit      a write
//!   began -> buffers -> shards -> answer -> CopyOut -> copied -> Commit                a read
//! ```
//!
//! Invariants: a read or write has all of its buffers or none, so that requests never wait for one another in a circle;
//! requests get memory in the order they came; a request is committed once, when none of its pieces is under way; a
//! queue that ends commits nothing more: the kernel keeps what was not committed and sends it again.

use std::collections::VecDeque;

use twinpoint_core::request::{Answer, Operation, Outcome, Request, Tag};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, CpNumber};

use super::abi::Descriptor;
use super::request::{REQUEST_BYTES_MAX, Work, check};
use super::step::{Step, Transfer};
use crate::cut::{BLOCK, background_piece, blocks_wanted, length_within};
use crate::nbd::{Export, Host};

/// Unmaps and writes of zeroes of one request under way.
const BACKGROUND_PIECES_MAX: u32 = 16;
/// The piece's number in a tag that is for none: a flush, or part of an unmap.
const NO_PIECE: u64 = 0xffff;
/// Pieces of one read or write: one for each block at worst, and one more where the ends are parts of blocks.
pub(super) const PIECES_MAX: usize = REQUEST_BYTES_MAX as usize / BLOCK_BYTES + 1;

/// See the module.
pub(super) struct Queue {
    base: u64,
    export: Export,
    /// Changes are answered when they are durable.
    writes_through: bool,
    requests: Box<[Slot]>,
    /// Wait for memory, in order.
    ready: VecDeque<u16>,
    /// Pieces that found a full ring, or held writers; in order.
    refused: VecDeque<Request>,
    steps: VecDeque<Step>,
    starved: bool,
    ending: bool,
    /// Pieces and flushes that the shards have, copies that the kernel makes.
    under_way: usize,
}

/// The request of one tag.
struct Slot {
    work: Work,
    start: u64,
    end: u64,
    /// Of an unmap or zeroes: bytes before it were given to shards.
    cursor: u64,
    flush_after: bool,
    errno: Option<i32>,
    pieces: Vec<Piece>,
    outstanding: u32,
    is_busy: bool,
}

#[derive(Clone, Copy)]
struct Piece {
    first: BufferId,
    count: u32,
    offset: u64,
    length: u32,
}

impl Piece {
    fn transfer(&self, tag: u16, piece: u16, start: u64) -> Transfer {
        Transfer {
            tag,
            piece,
            at: u32::try_from(self.offset - start).expect("a request is short"),
            first: self.first,
            buffer_offset: usize::try_from(self.offset % BLOCK).expect("less than a block"),
            length: self.length as usize,
        }
    }
}

impl Queue {
    /// A queue of `depth` tags. `base` is put into the high 32 bits of every tag.
    pub fn new(base: u64, export: Export, depth: u16, writes_through: bool) -> Queue {
        let slot = || Slot {
            work: Work::Flush,
            start: 0,
            end: 0,
            cursor: 0,
            flush_after: false,
            errno: None,
            pieces: Vec::new(),
            outstanding: 0,
            is_busy: false,
        };
        Queue {
            base,
            export,
            writes_through,
            requests: (0..depth).map(|_| slot()).collect(),
            ready: VecDeque::new(),
            refused: VecDeque::new(),
            steps: VecDeque::new(),
            starved: false,
            ending: false,
            under_way: 0,
        }
    }

    /// The kernel sent a request.
    pub fn began(&mut self, tag: u16, descriptor: &Descriptor, host: &mut impl Host) {
        if self.ending {
            return;
        }
        let checked = match check(descriptor, self.export.size_bytes) {
            Ok(checked) => checked,
            Err(errno) => {
                self.steps.push_back(Step::Commit { tag, result: -errno });
                return;
            }
        };
        let slot = &mut self.requests[usize::from(tag)];
        assert!(!slot.is_busy, "the kernel sends a tag once");
        let changes = !matches!(checked.work, Work::Read);
        (slot.start, slot.end) = checked.range;
        slot.cursor = slot.start;
        slot.work = checked.work;
        slot.flush_after = checked.flush_after || changes && self.writes_through;
        slot.errno = None;
        slot.is_busy = true;
        self.ready.push_back(tag);
        self.pump(host);
    }

    /// A shard answered.
    pub fn answer(&mut self, answer: Answer, host: &mut impl Host) {
        let errno = match answer.outcome {
            Outcome::Done | Outcome::Mapped(_) => None,
            Outcome::NoSpace => Some(libc::ENOSPC),
            Outcome::Failed => Some(libc::EIO),
        };
        let (tag, piece) = parts_of(answer.tag);
        self.under_way -= 1;
        let is_ending = self.ending;
        let slot = &mut self.requests[usize::from(tag)];
        slot.errno = slot.errno.or(errno);
        if slot.work != Work::Read {
            return self.piece_ended(tag, host);
        }
        let read = slot.pieces[usize::from(piece)];
        if is_ending || slot.errno.is_some() {
            host.free(read.first, read.count);
            return self.piece_ended(tag, host);
        }
        let copy = read.transfer(tag, piece, slot.start);
        self.steps.push_back(Step::CopyOut(copy));
    }

    /// A flush is done, or failed.
    pub fn flushed(&mut self, tag: Tag, done: bool, host: &mut impl Host) {
        let (tag, _) = parts_of(tag);
        self.under_way -= 1;
        if !done {
            self.requests[usize::from(tag)].errno.get_or_insert(libc::EIO);
        }
        self.piece_ended(tag, host);
    }

    /// The kernel made a copy, or failed to.
    pub fn copied(&mut self, tag: u16, piece: u16, result: i32, host: &mut impl Host) {
        self.under_way -= 1;
        let is_ending = self.ending;
        let slot = &mut self.requests[usize::from(tag)];
        let copied = slot.pieces[usize::from(piece)];
        if u32::try_from(result) != Ok(copied.length) {
            slot.errno.get_or_insert(libc::EIO);
        }
        if slot.work == Work::Write && slot.errno.is_none() && !is_ending {
            host.checksum(copied.first, copied.count);
            let operation = Operation::Write { buffer: copied.first };
            let name = u64::from(piece);
            return self.submit(tag, name, copied.offset, copied.length, operation, host);
        }
        host.free(copied.first, copied.count);
        self.piece_ended(tag, host);
    }

    /// Memory or room in a ring came back.
    pub fn resume(&mut self, host: &mut impl Host) {
        self.pump(host);
    }

    /// Whether it waits for [`Queue::resume`].
    pub fn is_starved(&self) -> bool {
        self.starved
    }

    /// The next thing for the kernel to do. A copy is answered by [`Queue::copied`].
    pub fn next_step(&mut self) -> Option<Step> {
        let step = self.steps.pop_front()?;
        if !matches!(step, Step::Commit { .. }) {
            self.under_way += 1;
        }
        Some(step)
    }

    /// Whether the kernel has something to do.
    pub fn has_steps(&self) -> bool {
        !self.steps.is_empty()
    }

    /// The node ends: nothing is begun or committed any more.
    pub fn end(&mut self, host: &mut impl Host) {
        self.ending = true;
        self.starved = false;
        self.ready.clear();
        for step in self.steps.drain(..) {
            if let Step::CopyIn(copy) | Step::CopyOut(copy) = step {
                let slot = &self.requests[usize::from(copy.tag)];
                let piece = slot.pieces[usize::from(copy.piece)];
                host.free(piece.first, piece.count);
            }
        }
        for request in std::mem::take(&mut self.refused) {
            self.free_refused(&request, host);
        }
    }

    /// Nothing is answered well any more, and nothing comes back that could be waited for: what waits fails.
    pub fn refuse(&mut self, host: &mut impl Host) {
        self.starved = false;
        for request in std::mem::take(&mut self.refused) {
            self.free_refused(&request, host);
            let (tag, _) = parts_of(request.tag);
            self.requests[usize::from(tag)].errno.get_or_insert(libc::EIO);
            self.piece_ended(tag, host);
        }
        for tag in std::mem::take(&mut self.ready) {
            self.requests[usize::from(tag)].errno.get_or_insert(libc::EIO);
            self.settle(tag, host);
        }
    }

    /// Whether neither a shard nor the kernel has anything of this queue.
    pub fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    /// Frees the buffers of a piece that no shard has.
    fn free_refused(&self, request: &Request, host: &mut impl Host) {
        if let Operation::Write { buffer } | Operation::Read { buffer } = request.operation {
            let (tag, piece) = parts_of(request.tag);
            let slot = &self.requests[usize::from(tag)];
            // Zeroes have no piece, and just the buffers they need.
            let held = slot.pieces.get(usize::from(piece)).map(|piece| piece.count);
            host.free(buffer, held.unwrap_or(request.blocks()));
        }
    }

    fn pump(&mut self, host: &mut impl Host) {
        if self.ending {
            return;
        }
        self.starved = false;
        while let Some(request) = self.refused.pop_front() {
            if let Err(request) = host.submit(request) {
                self.refused.push_front(request);
                self.starved = true;
                return;
            }
            self.under_way += 1;
        }
        while let Some(tag) = self.ready.pop_front() {
            if !self.start(tag, host) {
                self.ready.push_front(tag);
                self.starved = true;
                return;
            }
        }
    }

    /// Gives a request's pieces out; false where there is no memory.
    fn start(&mut self, tag: u16, host: &mut impl Host) -> bool {
        let slot = &self.requests[usize::from(tag)];
        match slot.work {
            Work::Flush => self.settle(tag, host),
            Work::Discard | Work::Zeroes { .. } => return self.start_background(tag, host),
            Work::Read | Work::Write => {
                if !self.allocate(tag, host) {
                    return false;
                }
                self.start_pieces(tag, host);
            }
        }
        true
    }

    /// Finds all buffers of a read or write, or none.
    fn allocate(&mut self, tag: u16, host: &mut impl Host) -> bool {
        let slot = &mut self.requests[usize::from(tag)];
        slot.pieces.clear();
        let mut cursor = slot.start;
        while cursor < slot.end {
            let Some((first, count)) = host.allocate(blocks_wanted(cursor, slot.end)) else {
                slot.pieces.drain(..).for_each(|piece| host.free(piece.first, piece.count));
                return false;
            };
            let length = length_within(cursor, slot.end, count);
            slot.pieces.push(Piece { first, count, offset: cursor, length });
            cursor += u64::from(length);
        }
        true
    }

    fn start_pieces(&mut self, tag: u16, host: &mut impl Host) {
        let slot = &mut self.requests[usize::from(tag)];
        let (start, work) = (slot.start, slot.work);
        slot.outstanding = slot.pieces.len() as u32;
        for index in 0..slot.pieces.len() as u16 {
            let piece = self.requests[usize::from(tag)].pieces[usize::from(index)];
            if work == Work::Write {
                self.steps.push_back(Step::CopyIn(piece.transfer(tag, index, start)));
            } else {
                let operation = Operation::Read { buffer: piece.first };
                let name = u64::from(index);
                self.submit(tag, name, piece.offset, piece.length, operation, host);
            }
        }
    }

    /// Gives out what an unmap or a write of zeroes may have under way; false where not even one piece found memory.
    fn start_background(&mut self, tag: u16, host: &mut impl Host) -> bool {
        loop {
            let slot = &self.requests[usize::from(tag)];
            if slot.cursor >= slot.end || slot.errno.is_some() {
                if slot.outstanding == 0 {
                    self.settle(tag, host);
                }
                return true;
            }
            if slot.outstanding >= BACKGROUND_PIECES_MAX {
                return true;
            }
            let start = slot.cursor;
            let hole = !matches!(slot.work, Work::Zeroes { hole: false });
            let (end, unmap) = background_piece(hole, start, slot.end);
            let (length, operation) = if unmap {
                (u32::try_from(end - start).expect("at most a stripe"), Operation::Unmap)
            } else {
                let Some((buffer, count)) = host.allocate(blocks_wanted(start, end)) else {
                    return slot.outstanding > 0;
                };
                host.zero(buffer, 0, count as usize * BLOCK_BYTES);
                host.checksum(buffer, count);
                (length_within(start, end, count), Operation::Write { buffer })
            };
            let slot = &mut self.requests[usize::from(tag)];
            slot.outstanding += 1;
            slot.cursor = start + u64::from(length);
            self.submit(tag, NO_PIECE, start, length, operation, host);
        }
    }

    fn submit(
        &mut self,
        tag: u16,
        piece: u64,
        offset: u64,
        length: u32,
        operation: Operation,
        host: &mut impl Host,
    ) {
        let tag = Tag(self.base | piece << 16 | u64::from(tag));
        let volume = self.export.volume;
        // The host puts in the stamp when it admits the request.
        let request = Request { tag, stamp: CpNumber(0), volume, offset, length, operation };
        request.check();
        if self.refused.is_empty() {
            match host.submit(request) {
                Ok(()) => self.under_way += 1,
                Err(request) => {
                    self.refused.push_back(request);
                    self.starved = true;
                }
            }
        } else {
            self.refused.push_back(request);
        }
    }

    fn piece_ended(&mut self, tag: u16, host: &mut impl Host) {
        let slot = &mut self.requests[usize::from(tag)];
        slot.outstanding -= 1;
        if self.ending {
            return;
        }
        let is_background = matches!(slot.work, Work::Discard | Work::Zeroes { .. });
        if is_background && slot.cursor < slot.end && slot.errno.is_none() {
            if !self.start_background(tag, host) {
                self.ready.push_back(tag);
                self.starved = true;
            }
        } else if slot.outstanding == 0 {
            self.settle(tag, host);
        }
    }

    /// Flushes or commits a request of which nothing is under way.
    fn settle(&mut self, tag: u16, host: &mut impl Host) {
        let slot = &mut self.requests[usize::from(tag)];
        if slot.errno.is_none() && std::mem::take(&mut slot.flush_after) {
            slot.outstanding = 1;
            self.under_way += 1;
            host.flush(Tag(self.base | NO_PIECE << 16 | u64::from(tag)));
            return;
        }
        slot.is_busy = false;
        let length = match slot.work {
            Work::Read | Work::Write => slot.end - slot.start,
            Work::Flush | Work::Discard | Work::Zeroes { .. } => 0,
        };
        let length = i32::try_from(length).expect("a request is short");
        let result = slot.errno.map_or(length, |errno| -errno);
        self.steps.push_back(Step::Commit { tag, result });
    }
}

fn parts_of(tag: Tag) -> (u16, u16) {
    ((tag.0 & 0xffff) as u16, (tag.0 >> 16 & 0xffff) as u16)
}

#[cfg(test)]
mod tests;
