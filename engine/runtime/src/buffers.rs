//! The node's block memory: one region, registered with the devices and the wire, cut in 4 KiB buffers that have
//! names, and the checksum of each (all steps of the flow: user data stays where it was received).
//!
//! Invariants:
//! - A buffer has one owner at a time: a pool, or whoever allocated it and those it passed the name to (through a
//!   ring, or to the kernel or the wire until they report completion). Only the owner touches bytes or checksum.
//! - Names of consecutive buffers are consecutive bytes: a run of them is one span.
//! - The checksum of a buffer is what was last computed for it; nothing keeps it in step with later changes.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rdma_fallback::{Region, Span};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Checksum};

/// The memory and the checksums, shared by all threads of the node.
pub struct Arena {
    region: Arc<Region>,
    // Relaxed everywhere: ownership of a buffer travels through rings, which order the checksum with it.
    checksums: Box<[AtomicU32]>,
}

impl Arena {
    /// Maps an arena of `bytes`, all zero.
    ///
    /// # Errors
    /// If the system refuses the memory.
    ///
    /// # Panics
    /// If `bytes` is 0, no multiple of 4096, or more than the names of buffers reach (16 TiB).
    pub fn new(bytes: usize) -> io::Result<Arena> {
        assert!(
            bytes > 0 && bytes.is_multiple_of(BLOCK_BYTES),
            "an arena of {bytes} bytes has no whole blocks"
        );
        let count = bytes / BLOCK_BYTES;
        assert!(
            u32::try_from(count).is_ok(),
            "an arena of {bytes} bytes has more blocks than names"
        );
        let region = Arc::new(Region::new(bytes)?);
        Ok(Arena { region, checksums: (0..count).map(|_| AtomicU32::new(0)).collect() })
    }

    /// The memory, to register it with a device or a wire.
    #[must_use]
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// How many buffers the arena has.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.checksums.len()).expect("checked when the arena was made")
    }

    /// Where `count` consecutive buffers lie.
    ///
    /// # Panics
    /// If they are not all in the arena, or are 4 GiB or more.
    #[must_use]
    pub fn span(&self, first: BufferId, count: u32) -> Span {
        self.part(first, 0, count as usize * BLOCK_BYTES)
    }

    /// Where `length` bytes lie, from byte `offset` of consecutive buffers on.
    ///
    /// # Panics
    /// If they are not all in the arena, or are 4 GiB or more.
    #[must_use]
    pub fn part(&self, first: BufferId, offset: usize, length: usize) -> Span {
        let start = first.0 as usize * BLOCK_BYTES + offset;
        let inside = start.checked_add(length).is_some_and(|end| end <= self.region.len());
        assert!(inside, "{length} bytes at byte {offset} of buffer {first} leave the arena");
        let length = u32::try_from(length).expect("a span is shorter than 4 GiB");
        Span { offset: start as u64, length }
    }

    /// Copies `bytes` to byte `offset` of consecutive buffers.
    pub fn copy_in(&self, first: BufferId, offset: usize, bytes: &[u8]) {
        self.region.copy_in(self.part(first, offset, bytes.len()).offset, bytes);
    }

    /// Copies from byte `offset` of consecutive buffers to `bytes`.
    pub fn copy_out(&self, first: BufferId, offset: usize, bytes: &mut [u8]) {
        self.region.copy_out(self.part(first, offset, bytes.len()).offset, bytes);
    }

    /// Zeroes `length` bytes from byte `offset` of consecutive buffers on.
    pub fn zero(&self, first: BufferId, offset: usize, length: usize) {
        self.region.fill_zero(self.part(first, offset, length));
    }

    /// Copies the bytes `range` of buffer `source` to the same place in buffer `target`.
    ///
    /// # Panics
    /// If the range leaves the block.
    pub fn copy_buffer(&self, source: BufferId, target: BufferId, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= BLOCK_BYTES, "{range:?} leaves a block");
        let from = self.part(source, range.start, range.len());
        let to = self.part(target, range.start, range.len());
        self.region.copy_to(from, &self.region, to.offset);
    }

    /// Completes a partial write: `target` keeps its bytes `written`, and gets all others from `base`.
    ///
    /// # Panics
    /// If the range leaves the block.
    pub fn merge(&self, base: BufferId, target: BufferId, written: Range<usize>) {
        self.copy_buffer(base, target, 0..written.start);
        self.copy_buffer(base, target, written.end..BLOCK_BYTES);
    }

    /// Computes the checksums of `count` consecutive whole buffers and keeps them.
    pub fn checksum_compute(&self, first: BufferId, count: u32) {
        for index in self.indices(first, count) {
            let checksum = self.checksum_of(BufferId(index));
            self.checksums[index as usize].store(checksum.0, Ordering::Relaxed);
        }
    }

    /// The kept checksum of a buffer.
    #[must_use]
    pub fn checksum(&self, buffer: BufferId) -> Checksum {
        Checksum(self.checksums[buffer.0 as usize].load(Ordering::Relaxed))
    }

    /// Appends the kept checksums of `count` consecutive buffers to `checksums`.
    pub fn checksums(&self, first: BufferId, count: u32, checksums: &mut Vec<Checksum>) {
        checksums.extend(self.indices(first, count).map(|index| self.checksum(BufferId(index))));
    }

    /// Computes the checksums of consecutive buffers, as many as `expected` has, keeps them, and returns the index of
    /// the first that differs from what was expected, if one does.
    #[must_use]
    pub fn verify(&self, first: BufferId, expected: &[Checksum]) -> Option<usize> {
        let count = u32::try_from(expected.len()).expect("fewer checksums than buffers have names");
        self.checksum_compute(first, count);
        let computed = self.indices(first, count).map(|index| self.checksum(BufferId(index)));
        computed.zip(expected).position(|(computed, expected)| computed != *expected)
    }

    fn checksum_of(&self, buffer: BufferId) -> Checksum {
        // SAFETY: the caller owns the buffer (the first invariant above), so nobody writes to it during this call,
        // and the slice does not outlive the call.
        let bytes = unsafe { self.region.slice(self.span(buffer, 1)) };
        Checksum(crc_fast::crc32_iscsi(bytes))
    }

    fn indices(&self, first: BufferId, count: u32) -> Range<u32> {
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.count());
        assert!(inside, "{count} buffers from {first} on leave the arena");
        first.0..first.0 + count
    }
}

/// How many free runs an allocation looks at before it takes the longest of them.
const RUNS_TRIED: u32 = 8;

/// The free buffers of one worker, a part of the arena. Not shared.
///
/// Plain allocations leave a reserve, so that reads and merges, which free memory, never starve behind staged
/// writes, which hold it until a consistency point.
pub struct Pool {
    first: u32,
    capacity: u32,
    reserve: u32,
    available: u32,
    cursor: u32,
    // Bit b of word w is set if buffer first + 64 w + b is free.
    free: Box<[u64]>,
}

impl Pool {
    /// A pool of `count` buffers, all free, the last `reserve` of which only [`Pool::allocate_reserved`] gives out.
    ///
    /// # Panics
    /// If the reserve is more than the pool, or the names overflow.
    #[must_use]
    pub fn new(first: BufferId, count: u32, reserve: u32) -> Pool {
        assert!(reserve <= count, "a reserve of {reserve} in a pool of {count} buffers");
        assert!(
            first.0.checked_add(count).is_some(),
            "{count} buffers from {first} on have no names"
        );
        let mut free = vec![u64::MAX; count.div_ceil(64) as usize].into_boxed_slice();
        if !count.is_multiple_of(64) {
            free[count as usize / 64] = (1 << (count % 64)) - 1;
        }
        Pool { first: first.0, capacity: count, reserve, available: count, cursor: 0, free }
    }

    /// Takes consecutive buffers: 1 to `want` of them, `want` if a short search finds so many together. None if no
    /// buffer is free besides the reserve.
    pub fn allocate(&mut self, want: u32) -> Option<(BufferId, u32)> {
        self.take(want.min(self.available.saturating_sub(self.reserve)))
    }

    /// As [`Pool::allocate`], the reserve included.
    pub fn allocate_reserved(&mut self, want: u32) -> Option<(BufferId, u32)> {
        self.take(want.min(self.available))
    }

    /// Gives `count` consecutive buffers back.
    ///
    /// # Panics
    /// If one is not of this pool, or is free already.
    pub fn free(&mut self, first: BufferId, count: u32) {
        let last = first.0.checked_add(count).map(|end| BufferId(end.saturating_sub(1)));
        let owned = count > 0 && self.owns(first) && last.is_some_and(|last| self.owns(last));
        assert!(owned, "{count} buffers from {first} on are not of this pool");
        self.set_free(first.0 - self.first, count, true);
        self.available += count;
    }

    /// How many buffers are free, the reserve included.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.available
    }

    /// How many buffers the pool has.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Whether a buffer is of this pool, free or not.
    #[must_use]
    pub fn owns(&self, buffer: BufferId) -> bool {
        buffer.0 >= self.first && buffer.0 - self.first < self.capacity
    }

    fn take(&mut self, want: u32) -> Option<(BufferId, u32)> {
        if want == 0 {
            return None;
        }
        let mut best = (0, 0);
        let mut position = self.cursor;
        let mut wrapped = false;
        for _ in 0..RUNS_TRIED {
            let Some(start) = self.next_free(position) else {
                if wrapped {
                    break;
                }
                wrapped = true;
                position = 0;
                continue;
            };
            let length = self.run_length(start, want);
            if length > best.1 {
                best = (start, length);
            }
            if length == want {
                break;
            }
            position = start + length;
        }
        let (start, length) = best;
        assert!(length > 0, "{} buffers are free, and none is found", self.available);
        self.set_free(start, length, false);
        self.available -= length;
        self.cursor = start + length;
        Some((BufferId(self.first + start), length))
    }

    /// The first free position from `position` on, without wrapping around.
    fn next_free(&self, position: u32) -> Option<u32> {
        let mut word = position as usize / 64;
        let mut bits = self.free.get(word)? & (u64::MAX << (position % 64));
        while bits == 0 {
            word += 1;
            bits = *self.free.get(word)?;
        }
        Some(word as u32 * 64 + bits.trailing_zeros())
    }

    /// How many positions from `start` on are free, at most `limit`.
    fn run_length(&self, start: u32, limit: u32) -> u32 {
        let mut length = 0;
        while length < limit {
            let position = start + length;
            let Some(word) = self.free.get(position as usize / 64) else { break };
            let free = (!(word >> (position % 64))).trailing_zeros().min(64 - position % 64);
            length += free;
            if !(position + free).is_multiple_of(64) || free == 0 {
                break;
            }
        }
        length.min(limit)
    }

    fn set_free(&mut self, start: u32, count: u32, free: bool) {
        let mut position = start;
        while position < start + count {
            let bits = (64 - position % 64).min(start + count - position);
            let mask = (u64::MAX >> (64 - bits)) << (position % 64);
            let word = &mut self.free[position as usize / 64];
            let before = if free { !*word } else { *word };
            assert!(
                before & mask == mask,
                "buffers freed or taken twice, near {}",
                self.first + position
            );
            *word ^= mask;
            position += bits;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(arena: &Arena, buffer: u32) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        arena.copy_out(BufferId(buffer), 0, &mut bytes);
        bytes
    }

    #[test]
    fn bytes_move_and_merge() {
        let arena = Arena::new(8 * BLOCK_BYTES).unwrap();
        assert_eq!(arena.count(), 8);
        arena.copy_in(BufferId(1), 4000, &[7; 200]);
        assert_eq!(bytes_of(&arena, 1)[4000..], [7; 96]);
        assert_eq!(bytes_of(&arena, 2)[..105], [[7; 104].as_slice(), &[0]].concat());
        arena.copy_in(BufferId(3), 0, &[1; BLOCK_BYTES]);
        arena.copy_in(BufferId(4), 0, &[2; BLOCK_BYTES]);
        arena.merge(BufferId(3), BufferId(4), 512..1024);
        let merged = bytes_of(&arena, 4);
        assert!(merged[..512].iter().chain(&merged[1024..]).all(|byte| *byte == 1));
        assert!(merged[512..1024].iter().all(|byte| *byte == 2));
        arena.zero(BufferId(4), 10, 600);
        assert_eq!(bytes_of(&arena, 4)[9..611], [[1].as_slice(), &[0; 600], &[2]].concat());
        assert_eq!(arena.span(BufferId(2), 3), Span { offset: 8192, length: 12288 });
    }

    #[test]
    fn checksums_are_crc32c() {
        let arena = Arena::new(4 * BLOCK_BYTES).unwrap();
        arena.checksum_compute(BufferId(0), 4);
        // CRC32C of 4096 zero bytes.
        assert_eq!(arena.checksum(BufferId(3)), Checksum(0x98F9_4189));
        arena.copy_in(BufferId(1), 0, b"123456789");
        let mut kept = Vec::new();
        arena.checksums(BufferId(0), 4, &mut kept);
        assert_eq!(kept, [Checksum(0x98F9_4189); 4]);
        assert_eq!(arena.verify(BufferId(0), &kept), Some(1));
        assert_eq!(arena.verify(BufferId(2), &kept[2..]), None);
        assert_eq!(crc_fast::crc32_iscsi(b"123456789"), 0xE306_9283);
    }

    #[test]
    #[should_panic(expected = "leave the arena")]
    fn spans_stay_inside() {
        let _ = Arena::new(BLOCK_BYTES).unwrap().span(BufferId(0), 2);
    }

    #[test]
    fn pool_keeps_its_reserve() {
        let mut pool = Pool::new(BufferId(10), 100, 20);
        assert_eq!(pool.allocate(200), Some((BufferId(10), 80)));
        assert_eq!(pool.allocate(1), None);
        assert_eq!(pool.allocate_reserved(15), Some((BufferId(90), 15)));
        assert_eq!(pool.allocate_reserved(15), Some((BufferId(105), 5)));
        assert_eq!(pool.allocate_reserved(1), None);
        pool.free(BufferId(10), 20);
        assert_eq!((pool.allocate(1), pool.available()), (None, 20));
        assert!(!pool.owns(BufferId(9)) && pool.owns(BufferId(109)) && !pool.owns(BufferId(110)));
    }

    #[test]
    #[should_panic(expected = "twice")]
    fn double_free_is_caught() {
        let mut pool = Pool::new(BufferId(0), 130, 0);
        let (first, count) = pool.allocate(130).unwrap();
        pool.free(first, count);
        pool.free(BufferId(129), 1);
    }

    #[test]
    fn pool_follows_a_model() {
        let mut state = 0x2545_F491_4F6C_DD1D_u64;
        let mut random = |limit: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as u32 % limit
        };
        for count in [1, 63, 64, 65, 200, 1000] {
            let mut pool = Pool::new(BufferId(7), count, 0);
            let mut taken = vec![false; count as usize];
            let mut held: Vec<(BufferId, u32)> = Vec::new();
            for _ in 0..4000 {
                if random(100) < 55 {
                    let limit = if random(2) == 0 { 2 } else { 90 };
                    let want = random(limit) + 1;
                    let Some((first, got)) = pool.allocate(want) else {
                        assert!(taken.iter().all(|taken| *taken));
                        continue;
                    };
                    assert!(got >= 1 && got <= want);
                    for index in first.0 - 7..first.0 - 7 + got {
                        assert!(!std::mem::replace(&mut taken[index as usize], true));
                    }
                    held.push((first, got));
                } else if !held.is_empty() {
                    let (first, got) = held.swap_remove(random(held.len() as u32) as usize);
                    // Give back in two parts, as a partly answered request does.
                    let half = random(got + 1);
                    for (first, got) in [(first.0, half), (first.0 + half, got - half)] {
                        if got > 0 {
                            pool.free(BufferId(first), got);
                            taken[first as usize - 7..(first - 7 + got) as usize].fill(false);
                        }
                    }
                }
                let free = taken.iter().filter(|taken| !**taken).count();
                assert_eq!(pool.available() as usize, free);
            }
        }
    }
}
