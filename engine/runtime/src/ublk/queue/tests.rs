//! A queue against a host and a kernel made of plain memory.

use std::collections::VecDeque;

use twinpoint_core::units::VolumeId;

use super::super::abi;
use super::*;

const SIZE_BYTES: u64 = 8 << 20;
const BUFFERS: u32 = 1024;
const DEPTH: u16 = 8;

/// Shards and pool: answers wait until they are asked for.
struct Shards {
    volume: Vec<u8>,
    memory: Vec<u8>,
    free: Vec<bool>,
    answers: VecDeque<Answer>,
    flushes: VecDeque<Tag>,
    is_full: bool,
    outcome: Outcome,
    /// Longest run of buffers that an allocation gives.
    run_max: u32,
    summed: Vec<BufferId>,
}

impl Shards {
    fn new() -> Shards {
        Shards {
            volume: vec![0; SIZE_BYTES as usize],
            memory: vec![0xee; BUFFERS as usize * BLOCK_BYTES],
            free: vec![true; BUFFERS as usize],
            answers: VecDeque::new(),
            flushes: VecDeque::new(),
            is_full: false,
            outcome: Outcome::Done,
            run_max: u32::MAX,
            summed: Vec::new(),
        }
    }

    fn free_count(&self) -> usize {
        self.free.iter().filter(|free| **free).count()
    }

    fn bytes(&mut self, first: BufferId, offset: usize, length: usize) -> &mut [u8] {
        let start = first.0 as usize * BLOCK_BYTES + offset;
        &mut self.memory[start..start + length]
    }
}

impl Host for Shards {
    fn allocate(&mut self, want: u32) -> Option<(BufferId, u32)> {
        let first = self.free.iter().position(|free| *free)?;
        let run = self.free[first..].iter().take_while(|free| **free).count() as u32;
        let count = run.min(want).min(self.run_max);
        self.free[first..first + count as usize].fill(false);
        Some((BufferId(first as u32), count))
    }

    fn free(&mut self, first: BufferId, count: u32) {
        for index in first.0..first.0 + count {
            assert!(!std::mem::replace(&mut self.free[index as usize], true), "freed twice");
        }
    }

    fn copy_in(&mut self, _: BufferId, _: usize, _: &[u8]) {}

    fn copy_out(&self, _: BufferId, _: usize, _: &mut [u8]) {}

    fn zero(&mut self, first: BufferId, offset: usize, length: usize) {
        self.bytes(first, offset, length).fill(0);
    }

    fn checksum(&mut self, first: BufferId, count: u32) {
        self.summed.extend((first.0..first.0 + count).map(BufferId));
    }

    fn submit(&mut self, request: Request) -> Result<(), Request> {
        if self.is_full {
            return Err(request);
        }
        let (offset, length) = (request.offset as usize, request.length as usize);
        let within = offset % BLOCK_BYTES;
        match request.operation {
            Operation::Write { buffer } => {
                assert!(self.summed.contains(&buffer), "a write has its checksums");
                let bytes = self.bytes(buffer, within, length).to_vec();
                self.volume[offset..offset + length].copy_from_slice(&bytes);
                // The shard has them now; its CP gives them back at once.
                self.free(buffer, request.blocks());
                self.summed.retain(|summed| *summed != buffer);
            }
            Operation::Read { buffer } => {
                let bytes = self.volume[offset..offset + length].to_vec();
                self.bytes(buffer, within, length).copy_from_slice(&bytes);
            }
            Operation::Unmap => self.volume[offset..offset + length].fill(0),
            Operation::Status => unreachable!("a block device does not ask"),
        }
        self.answers.push_back(Answer { tag: request.tag, outcome: self.outcome.clone() });
        Ok(())
    }

    fn flush(&mut self, tag: Tag) {
        self.flushes.push_back(tag);
    }

    fn open_export(&mut self, _: &str) -> Option<Export> {
        None
    }

    fn list_exports(&self) -> Vec<String> {
        Vec::new()
    }

    fn close_export(&mut self, _: VolumeId) {}
}

/// The kernel: the pages of each tag's request.
struct Rig {
    queue: Queue,
    shards: Shards,
    pages: Vec<Vec<u8>>,
    committed: Vec<(u16, i32)>,
}

impl Rig {
    fn new(writes_through: bool) -> Rig {
        let export = Export { volume: VolumeId(1), size_bytes: SIZE_BYTES, read_only: false };
        Rig {
            queue: Queue::new(5 << 56 | 1 << 55, export, DEPTH, writes_through),
            shards: Shards::new(),
            pages: vec![Vec::new(); usize::from(DEPTH)],
            committed: Vec::new(),
        }
    }

    fn begin(&mut self, tag: u16, kind_and_flags: u32, offset: u64, pages: Vec<u8>) {
        let sectors = (pages.len() / 512) as u32;
        self.begin_range(tag, kind_and_flags, offset, sectors);
        self.pages[usize::from(tag)] = pages;
    }

    fn begin_range(&mut self, tag: u16, kind_and_flags: u32, offset: u64, sectors: u32) {
        let descriptor = Descriptor { kind_and_flags, sectors, first_sector: offset / 512 };
        self.queue.began(tag, &descriptor, &mut self.shards);
    }

    fn kernel(&mut self) -> bool {
        let mut worked = false;
        while let Some(step) = self.queue.next_step() {
            worked = true;
            match step {
                Step::Commit { tag, result } => self.committed.push((tag, result)),
                Step::CopyIn(part) | Step::CopyOut(part) => {
                    let range = part.at as usize..part.at as usize + part.length;
                    let pages = &mut self.pages[usize::from(part.tag)][range];
                    let bytes = self.shards.bytes(part.first, part.buffer_offset, part.length);
                    match step {
                        Step::CopyIn(_) => bytes.copy_from_slice(pages),
                        _ => pages.copy_from_slice(bytes),
                    }
                    let result = part.length as i32;
                    self.queue.copied(part.tag, part.piece, result, &mut self.shards);
                }
            }
        }
        worked
    }

    fn answer(&mut self) -> bool {
        let answer = self.shards.answers.pop_front();
        let worked = answer.is_some();
        answer.into_iter().for_each(|answer| self.queue.answer(answer, &mut self.shards));
        worked
    }

    fn flush(&mut self, done: bool) -> bool {
        let tag = self.shards.flushes.pop_front();
        let worked = tag.is_some();
        tag.into_iter().for_each(|tag| self.queue.flushed(tag, done, &mut self.shards));
        worked
    }

    fn run(&mut self) -> Vec<(u16, i32)> {
        while self.kernel() | self.answer() | self.flush(true) {}
        std::mem::take(&mut self.committed)
    }
}

fn pattern(length: usize, seed: u32) -> Vec<u8> {
    (0..length as u32).map(|index| (index.wrapping_mul(2_654_435_761) ^ seed) as u8).collect()
}

#[test]
fn what_is_written_is_read_in_any_pieces() {
    for run_max in [u32::MAX, 1, 3] {
        let mut rig = Rig::new(false);
        rig.shards.run_max = run_max;
        let stripe = 2 << 20;
        for (tag, offset, length) in [
            (0, 0, 4096),
            (1, 512 * 7, 1024),
            (2, stripe - 4096 - 512, 512 << 10),
            (3, stripe, 512),
        ] {
            let bytes = pattern(length, offset as u32);
            rig.begin(tag, abi::KIND_WRITE, offset, bytes.clone());
            assert_eq!(rig.run(), [(tag, length as i32)]);
            rig.begin(tag, abi::KIND_READ, offset, vec![0; length]);
            assert_eq!(rig.run(), [(tag, length as i32)]);
            assert_eq!(rig.pages[usize::from(tag)], bytes);
        }
        assert!(rig.queue.is_idle());
        assert_eq!(rig.shards.free_count(), BUFFERS as usize, "every buffer came back");
    }
}

#[test]
fn a_change_is_answered_when_it_is_durable() {
    for (writes_through, flags) in [(true, 0), (false, abi::FLAG_FUA)] {
        let mut rig = Rig::new(writes_through);
        rig.begin(0, abi::KIND_WRITE | flags, 0, pattern(4096, 1));
        while rig.kernel() | rig.answer() {}
        assert!(rig.committed.is_empty() && rig.shards.flushes.len() == 1);
        assert_eq!(rig.run(), [(0, 4096)]);
        // A read waits for nothing.
        rig.begin(0, abi::KIND_READ | flags, 0, vec![0; 4096]);
        while rig.kernel() | rig.answer() {}
        assert_eq!(rig.run(), [(0, 4096)]);
    }
    let mut rig = Rig::new(true);
    rig.begin_range(0, abi::KIND_DISCARD, 0, 1024);
    while rig.kernel() | rig.answer() {}
    assert!(rig.committed.is_empty());
    assert!(rig.flush(false));
    assert_eq!(rig.run(), [(0, -libc::EIO)]);
}

#[test]
fn a_flush_is_asked_for_and_answered() {
    let mut rig = Rig::new(false);
    rig.begin_range(3, abi::KIND_FLUSH, 0, 0);
    assert!(!rig.kernel() && rig.shards.flushes.len() == 1);
    assert_eq!(rig.run(), [(3, 0)]);
}

#[test]
fn zeroes_and_discards_change_only_their_range() {
    for kind in [abi::KIND_WRITE_ZEROES, abi::KIND_WRITE_ZEROES | abi::FLAG_NO_UNMAP] {
        let mut rig = Rig::new(false);
        rig.shards.volume.fill(7);
        let (start, end) = (512 * 3, (6 << 20) + 512);
        rig.begin_range(0, kind, start, ((end - start) / 512) as u32);
        assert_eq!(rig.run(), [(0, 0)]);
        let (start, end) = (start as usize, end as usize);
        assert!(rig.shards.volume[start..end].iter().all(|byte| *byte == 0));
        assert!(
            rig.shards.volume[..start].iter().chain(&rig.shards.volume[end..]).all(|b| *b == 7)
        );
        assert_eq!(rig.shards.free_count(), BUFFERS as usize);
    }
    let mut rig = Rig::new(false);
    rig.shards.volume.fill(7);
    rig.begin_range(0, abi::KIND_DISCARD, 512, 23);
    assert_eq!(rig.run(), [(0, 0)]);
    assert!(rig.shards.volume[4096..12288].iter().all(|byte| *byte == 0));
    assert_eq!((rig.shards.volume[4095], rig.shards.volume[12288]), (7, 7));
    rig.begin_range(0, abi::KIND_DISCARD, 512, 2);
    assert_eq!(rig.run(), [(0, 0)]);
}

#[test]
fn without_memory_or_room_requests_wait_in_order() {
    let mut rig = Rig::new(false);
    let held: Vec<_> = (0..BUFFERS).map(|_| rig.shards.allocate(1).unwrap().0).collect();
    for tag in 0..3 {
        rig.begin(tag, abi::KIND_WRITE, u64::from(tag) * 4096, pattern(4096, tag.into()));
    }
    rig.begin_range(3, abi::KIND_WRITE_ZEROES | abi::FLAG_NO_UNMAP, 1 << 20, 8);
    assert!(rig.run().is_empty() && rig.queue.is_starved());
    rig.shards.is_full = true;
    held.into_iter().for_each(|buffer| rig.shards.free(buffer, 1));
    rig.queue.resume(&mut rig.shards);
    assert!(rig.run().is_empty() && rig.queue.is_starved());
    rig.shards.is_full = false;
    rig.queue.resume(&mut rig.shards);
    let mut done = rig.run();
    done.sort_unstable();
    assert_eq!(done, [(0, 4096), (1, 4096), (2, 4096), (3, 0)]);
    assert!(!rig.queue.is_starved());
    assert_eq!(rig.shards.volume[4096..8192], pattern(4096, 1));
    assert_eq!(rig.shards.free_count(), BUFFERS as usize);
}

#[test]
fn errors_are_told_once_with_their_number() {
    let mut rig = Rig::new(false);
    rig.begin_range(0, 4, 0, 8);
    rig.begin_range(1, abi::KIND_READ, SIZE_BYTES, 8);
    assert_eq!(rig.run(), [(0, -libc::EOPNOTSUPP), (1, -libc::EINVAL)]);
    rig.shards.outcome = Outcome::NoSpace;
    rig.shards.run_max = 8;
    rig.begin(0, abi::KIND_WRITE, 0, pattern(64 << 10, 1));
    rig.begin(1, abi::KIND_READ, 0, vec![0; 64 << 10]);
    rig.begin_range(2, abi::KIND_DISCARD, 0, 8192);
    let mut done = rig.run();
    done.sort_unstable();
    let errno = -libc::ENOSPC;
    assert_eq!(done, [(0, errno), (1, errno), (2, errno)]);
    assert_eq!(rig.shards.free_count(), BUFFERS as usize);
    // A copy that the kernel did not make whole.
    rig.shards.outcome = Outcome::Done;
    rig.begin(0, abi::KIND_WRITE, 0, pattern(4096, 1));
    let Some(Step::CopyIn(part)) = rig.queue.next_step() else { panic!("a write is copied") };
    rig.queue.copied(part.tag, part.piece, 512, &mut rig.shards);
    assert_eq!(rig.run(), [(0, -libc::EIO)]);
    assert_eq!(rig.shards.free_count(), BUFFERS as usize);
}

#[test]
fn a_queue_that_ends_commits_nothing_and_keeps_no_buffer() {
    let mut rig = Rig::new(true);
    rig.begin(0, abi::KIND_READ, 0, vec![0; 8192]);
    rig.begin(1, abi::KIND_WRITE, 0, pattern(8192, 1));
    rig.begin_range(2, abi::KIND_FLUSH, 0, 0);
    let Some(Step::CopyIn(copying)) = rig.queue.next_step() else { panic!("a write is copied") };
    rig.begin(3, abi::KIND_WRITE, 8192, pattern(8192, 2));
    rig.shards.is_full = true;
    rig.begin(4, abi::KIND_READ, 8192, vec![0; 8192]);
    rig.begin_range(5, abi::KIND_WRITE_ZEROES | abi::FLAG_NO_UNMAP, 16384, 16);
    rig.queue.end(&mut rig.shards);
    assert!(!rig.queue.is_idle() && !rig.queue.is_starved());
    rig.queue.copied(copying.tag, copying.piece, 8192, &mut rig.shards);
    while rig.answer() | rig.flush(false) {}
    rig.begin(6, abi::KIND_WRITE, 0, pattern(4096, 3));
    assert!(rig.queue.next_step().is_none() && rig.queue.is_idle());
    assert_eq!(rig.shards.free_count(), BUFFERS as usize);
}

#[test]
fn what_waits_fails_once_nothing_is_answered_well() {
    let mut rig = Rig::new(true);
    rig.begin(0, abi::KIND_WRITE, 0, pattern(8192, 1));
    rig.begin(1, abi::KIND_WRITE, 2 << 20, pattern(8192, 2));
    // One piece of tag 2 is with the kernel when the others find a full ring.
    rig.shards.run_max = 1;
    rig.begin(2, abi::KIND_WRITE, 0, pattern(12288, 3));
    rig.shards.is_full = true;
    for _ in 0..3 {
        let Some(Step::CopyIn(copy)) = rig.queue.next_step() else { panic!("a write is copied") };
        rig.queue.copied(copy.tag, copy.piece, copy.length as i32, &mut rig.shards);
    }
    let Some(Step::CopyIn(last)) = rig.queue.next_step() else { panic!("a write is copied") };
    rig.begin(3, abi::KIND_READ, 0, vec![0; 8192]);
    rig.begin_range(4, abi::KIND_WRITE_ZEROES | abi::FLAG_NO_UNMAP, 16384, 16);
    rig.begin_range(5, abi::KIND_DISCARD, 0, 4096);
    let mut taken = Vec::new();
    while let Some(run) = rig.shards.allocate(u32::MAX) {
        taken.push(run);
    }
    rig.begin(6, abi::KIND_READ, 0, vec![0; 4096]);
    rig.begin_range(7, abi::KIND_FLUSH, 0, 0);
    assert!(rig.queue.is_starved());
    rig.queue.refuse(&mut rig.shards);
    assert!(!rig.queue.is_starved());
    rig.queue.copied(last.tag, last.piece, 4096, &mut rig.shards);
    while rig.kernel() | rig.answer() | rig.flush(false) {}
    rig.committed.sort_unstable();
    let failed: Vec<_> = (0..DEPTH).map(|tag| (tag, -libc::EIO)).collect();
    assert_eq!(rig.committed, failed, "each once");
    taken.into_iter().for_each(|(first, count)| rig.shards.free(first, count));
    assert!(rig.queue.is_idle() && rig.shards.free_count() == BUFFERS as usize);
}
