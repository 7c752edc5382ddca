//! A host whose shards are one RAM disk that answers in random order.
//!
//! Invariants: every misuse of a buffer or a request panics.

use std::ops::Range;

use twinpoint_core::request::{Answer, Operation, Outcome, Request, Tag};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, CpNumber, SEGMENT_BLOCKS, VolumeId};

use crate::nbd::{Export, Host};

/// A small source of random numbers; the seed decides everything.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// A number below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    Free,
    Session,
    /// A shard fills it for a read.
    Filling,
    /// A shard took it with a write.
    Shard,
}

pub(super) struct RamHost {
    pub(super) random: Random,
    arena: Vec<u8>,
    owners: Vec<Owner>,
    checked: Vec<bool>,
    pub(super) disk: Vec<u8>,
    pub(super) mapped: Vec<bool>,
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) pending: Vec<Request>,
    pub(super) pending_max: usize,
    pub(super) flushes: Vec<Tag>,
    pub(super) flush_count: usize,
    /// Requests and allocations are refused this often, in percent.
    pub(super) refusal: u64,
    pub(super) fail_at: Option<(Range<u64>, Outcome)>,
    pub(super) fail_flush: bool,
    pub(super) uses: i32,
}

impl RamHost {
    pub(super) fn new(seed: u64, size: u64, buffers: usize) -> RamHost {
        let blocks = usize::try_from(size).unwrap().div_ceil(BLOCK_BYTES);
        RamHost {
            random: Random::new(seed),
            arena: vec![0; buffers * BLOCK_BYTES],
            owners: vec![Owner::Free; buffers],
            checked: vec![false; buffers],
            disk: vec![0; blocks * BLOCK_BYTES],
            mapped: vec![false; blocks],
            size,
            read_only: false,
            pending: Vec::new(),
            pending_max: 1 << 20,
            flushes: Vec::new(),
            flush_count: 0,
            refusal: 0,
            fail_at: None,
            fail_flush: false,
            uses: 0,
        }
    }

    pub(super) fn buffers_in_use(&self) -> usize {
        self.owners.iter().filter(|owner| **owner != Owner::Free).count()
    }

    pub(super) fn bytes(&mut self, first: BufferId, offset: usize, length: usize) -> &mut [u8] {
        let start = first.0 as usize * BLOCK_BYTES + offset;
        self.own(first, (offset + length).div_ceil(BLOCK_BYTES), Owner::Session, Owner::Session);
        self.checked[first.0 as usize..][..(offset + length).div_ceil(BLOCK_BYTES)].fill(false);
        &mut self.arena[start..start + length]
    }

    /// Answers one waiting request, any one.
    pub(super) fn answer_one(&mut self) -> Option<Answer> {
        if self.pending.is_empty() {
            return None;
        }
        let index = self.random.below(self.pending.len() as u64) as usize;
        let request = self.pending.swap_remove(index);
        let range = request.offset..request.offset + u64::from(request.length);
        let failure = match &self.fail_at {
            Some((at, outcome)) if at.start < range.end && range.start < at.end => {
                Some(outcome.clone())
            }
            _ => None,
        };
        let failed = failure.is_some();
        let done = self.perform(&request, range.start as usize..range.end as usize, failed);
        Some(Answer { tag: request.tag, outcome: failure.unwrap_or(done) })
    }

    fn perform(&mut self, request: &Request, range: Range<usize>, failed: bool) -> Outcome {
        let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
        let inside = range.start % BLOCK_BYTES;
        let count = request.blocks() as usize;
        match request.operation {
            Operation::Write { buffer } => {
                let start = buffer.0 as usize * BLOCK_BYTES + inside;
                self.own(buffer, count, Owner::Shard, Owner::Free);
                if !failed {
                    self.disk[range.clone()]
                        .copy_from_slice(&self.arena[start..start + range.len()]);
                    self.mapped[blocks].fill(true);
                }
            }
            Operation::Read { buffer } => {
                let start = buffer.0 as usize * BLOCK_BYTES;
                self.own(buffer, count, Owner::Filling, Owner::Session);
                let bytes = &mut self.arena[start..start + count * BLOCK_BYTES];
                let whole = blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES;
                if failed { bytes.fill(0xbd) } else { bytes.copy_from_slice(&self.disk[whole]) }
            }
            Operation::Unmap if !failed => {
                self.disk[range].fill(0);
                self.mapped[blocks].fill(false);
            }
            Operation::Unmap => {}
            Operation::Status => {
                let mut bitmap = Box::new([0; (SEGMENT_BLOCKS / 64) as usize]);
                for block in blocks.filter(|block| self.mapped[*block]) {
                    let bit = block % SEGMENT_BLOCKS as usize;
                    bitmap[bit / 64] |= 1 << (bit % 64);
                }
                return Outcome::Mapped(bitmap);
            }
        }
        Outcome::Done
    }

    fn own(&mut self, first: BufferId, count: usize, from: Owner, to: Owner) {
        for owner in &mut self.owners[first.0 as usize..][..count] {
            assert_eq!(*owner, from, "buffer of {first}+{count}");
            *owner = to;
        }
    }
}

impl Host for RamHost {
    fn allocate(&mut self, want: u32) -> Option<(BufferId, u32)> {
        assert!((1..=64).contains(&want));
        if self.random.chance(self.refusal) {
            return None;
        }
        let first = self.owners.iter().position(|owner| *owner == Owner::Free)?;
        let run = self.owners[first..]
            .iter()
            .take(want as usize)
            .take_while(|o| **o == Owner::Free)
            .count();
        let count = if self.refusal > 0 { 1 + self.random.below(run as u64) as usize } else { run };
        let buffer = BufferId(first as u32);
        self.own(buffer, count, Owner::Free, Owner::Session);
        self.arena[first * BLOCK_BYTES..][..count * BLOCK_BYTES].fill(0xa5);
        self.checked[first..][..count].fill(false);
        Some((buffer, count as u32))
    }

    fn free(&mut self, first: BufferId, count: u32) {
        assert!(count > 0);
        self.own(first, count as usize, Owner::Session, Owner::Free);
    }

    fn copy_in(&mut self, first: BufferId, offset: usize, bytes: &[u8]) {
        self.bytes(first, offset, bytes.len()).copy_from_slice(bytes);
    }

    fn copy_out(&self, first: BufferId, offset: usize, bytes: &mut [u8]) {
        let start = first.0 as usize * BLOCK_BYTES + offset;
        let blocks = (offset + bytes.len()).div_ceil(BLOCK_BYTES);
        assert!(self.owners[first.0 as usize..][..blocks].iter().all(|o| *o == Owner::Session));
        bytes.copy_from_slice(&self.arena[start..start + bytes.len()]);
    }

    fn zero(&mut self, first: BufferId, offset: usize, length: usize) {
        self.bytes(first, offset, length).fill(0);
    }

    fn checksum(&mut self, first: BufferId, count: u32) {
        self.checked[first.0 as usize..][..count as usize].fill(true);
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Request> {
        request.check();
        assert!(request.offset < self.size);
        assert!((request.offset + u64::from(request.length)) as usize <= self.disk.len());
        assert_eq!(request.tag.0 >> 32, 9, "the base is in the tag");
        if self.pending.len() >= self.pending_max || self.random.chance(self.refusal) {
            return Err(request);
        }
        let count = request.blocks() as usize;
        match request.operation {
            Operation::Write { buffer } => {
                assert!(self.checked[buffer.0 as usize..][..count].iter().all(|c| *c));
                self.own(buffer, count, Owner::Session, Owner::Shard);
            }
            Operation::Read { buffer } => self.own(buffer, count, Owner::Session, Owner::Filling),
            Operation::Unmap | Operation::Status => {}
        }
        request.stamp = CpNumber(1);
        self.pending.push(request);
        Ok(())
    }

    fn flush(&mut self, tag: Tag) {
        self.flush_count += 1;
        self.flushes.push(tag);
    }

    fn open_export(&mut self, name: &str) -> Option<Export> {
        let known = name.is_empty() || name == "disk";
        self.uses += i32::from(known);
        known.then_some(Export {
            volume: VolumeId(3),
            size_bytes: self.size,
            read_only: self.read_only,
        })
    }

    fn list_exports(&self) -> Vec<String> {
        vec!["disk".to_owned()]
    }

    fn close_export(&mut self, volume: VolumeId) {
        assert_eq!(volume, VolumeId(3));
        self.uses -= 1;
    }
}
