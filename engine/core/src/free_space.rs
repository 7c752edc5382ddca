//! Which data blocks of a shard no retained consistency point uses.
//!
//! Step 3 of the flow: sealing gives staged blocks their device blocks from here, in long runs.
//!
//! Invariants: a block is free or used, and changing it to what it is already is a bug (R9); only
//! a primary allocates; an allocation gives all that was asked for or nothing.
//!
//! A bit per block, 1 = free, and above it a bit per word of 64 blocks, 1 = something is free.

use crate::data_run::DataRun;
use crate::limits::DATA_BLOCKS_USABLE_MAX;
use crate::units::DataBlock;

/// There are fewer free blocks than asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoSpace {
    /// Blocks asked for.
    pub wanted: u32,
    /// Blocks that are free.
    pub free: u32,
}

impl std::fmt::Display for NoSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} blocks wanted, {} free", self.wanted, self.free)
    }
}

impl std::error::Error for NoSpace {}

/// The free blocks of one shard's data zone.
#[derive(Clone, Debug)]
pub struct FreeSpace {
    words: Vec<u64>,
    summary: Vec<u64>,
    data_blocks: u32,
    free_blocks: u32,
    /// Where the next search begins: behind the last allocation, so that writes go on
    /// sequentially and a freed block rests as long as possible.
    cursor: u32,
}

/// Runs shorter than this are passed over while space is plenty.
const RUN_BLOCKS_PREFERRED: u32 = 8;
/// Space is plenty while at least 1 / this of all blocks is free.
const PLENTY_SHARE: u32 = 8;
/// Short runs passed over by one allocation before it takes them: bounds the search.
const PATIENCE_RUNS: u32 = 1024;

impl FreeSpace {
    /// All of `data_blocks` blocks free.
    ///
    /// # Panics
    /// If there are more than [`DATA_BLOCKS_USABLE_MAX`].
    #[must_use]
    pub fn new(data_blocks: u32) -> FreeSpace {
        assert!(data_blocks <= DATA_BLOCKS_USABLE_MAX, "{data_blocks} data blocks");
        let words = ones(data_blocks as usize);
        let summary = ones(words.len());
        FreeSpace { words, summary, data_blocks, free_blocks: data_blocks, cursor: 0 }
    }

    /// How many blocks there are.
    #[must_use]
    pub fn data_blocks(&self) -> u32 {
        self.data_blocks
    }

    /// How many blocks are free.
    #[must_use]
    pub fn free_blocks(&self) -> u32 {
        self.free_blocks
    }

    /// Whether a block is used.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn is_used(&self, block: DataBlock) -> bool {
        assert!(block.0 < self.data_blocks, "block {block} of {}", self.data_blocks);
        self.words[word_of(block.0)] >> (block.0 % 64) & 1 == 0
    }

    /// Takes a free block, as recovery and a secondary do for blocks that a map names.
    ///
    /// # Panics
    /// If it is used already.
    pub fn mark_used(&mut self, block: DataBlock) {
        assert!(!self.is_used(block), "block {block} is used already");
        self.take(block.0, 1);
    }

    /// Gives a block back.
    ///
    /// # Panics
    /// If it is free already.
    pub fn release(&mut self, block: DataBlock) {
        assert!(self.is_used(block), "block {block} is free already");
        let word = word_of(block.0);
        self.words[word] |= 1 << (block.0 % 64);
        self.summary[word / 64] |= 1 << (word % 64);
        self.free_blocks += 1;
    }

    /// Takes `count` blocks and appends them to `out` in long runs, in the order they are to be
    /// filled.
    ///
    /// # Errors
    /// If fewer are free; then nothing changes.
    pub fn allocate(&mut self, count: u32, out: &mut Vec<DataRun>) -> Result<(), NoSpace> {
        if count > self.free_blocks {
            return Err(NoSpace { wanted: count, free: self.free_blocks });
        }
        let first_run = out.len();
        let mut missing = count;
        if self.free_blocks - count >= self.data_blocks / PLENTY_SHARE {
            let preferred = RUN_BLOCKS_PREFERRED.min(count);
            missing = self.sweep(missing, preferred, PATIENCE_RUNS, first_run, out);
        }
        missing = self.sweep(missing, 1, 0, first_run, out);
        assert_eq!(missing, 0, "the count of free blocks is wrong");
        Ok(())
    }

    /// Goes round once from the cursor and takes runs of at least `shortest` blocks, until
    /// nothing is missing or `patience` runs were passed over. Returns what is missing.
    fn sweep(
        &mut self,
        mut missing: u32,
        shortest: u32,
        mut patience: u32,
        first_run: usize,
        out: &mut Vec<DataRun>,
    ) -> u32 {
        let start = self.cursor;
        for (mut position, end) in [(start, self.data_blocks), (0, start)] {
            while missing > 0 {
                let Some(first) = self.next_free(position, end) else { break };
                let run_end = self.next_used(first, end.min(first.saturating_add(missing)));
                let length = run_end - first;
                if length < shortest.min(missing) {
                    if patience == 0 {
                        return missing;
                    }
                    patience -= 1;
                } else {
                    self.take(first, length);
                    append(out, first_run, DataRun { first: DataBlock(first), count: length });
                    self.cursor = if run_end == self.data_blocks { 0 } else { run_end };
                    missing -= length;
                }
                position = run_end;
            }
        }
        missing
    }

    /// The first free block in `from..end`.
    fn next_free(&self, from: u32, end: u32) -> Option<u32> {
        if from >= end {
            return None;
        }
        let mut word = word_of(from);
        let mut bits = self.words[word] & u64::MAX << (from % 64);
        if bits == 0 {
            word = self.next_word_with_free(word + 1)?;
            bits = self.words[word];
        }
        let found = word as u32 * 64 + bits.trailing_zeros();
        (found < end).then_some(found)
    }

    fn next_word_with_free(&self, from: usize) -> Option<usize> {
        let mut index = from / 64;
        let mut bits = self.summary.get(index)? & u64::MAX << (from % 64);
        while bits == 0 {
            index += 1;
            bits = *self.summary.get(index)?;
        }
        Some(index * 64 + bits.trailing_zeros() as usize)
    }

    /// The first used block in `from..end`, or `end`.
    fn next_used(&self, from: u32, end: u32) -> u32 {
        let mut word = word_of(from);
        let mut bits = !self.words[word] & u64::MAX << (from % 64);
        while bits == 0 && (word as u32 + 1) * 64 < end {
            word += 1;
            bits = !self.words[word];
        }
        if bits == 0 { end } else { end.min(word as u32 * 64 + bits.trailing_zeros()) }
    }

    /// Marks blocks that are free as used.
    fn take(&mut self, first: u32, count: u32) {
        let end = first + count;
        let mut position = first;
        while position < end {
            let word = word_of(position);
            let low = position % 64;
            let high = (end - (position - low)).min(64);
            let mask = (u64::MAX >> (64 - (high - low))) << low;
            assert_eq!(self.words[word] & mask, mask, "a block near {position} is used already");
            self.words[word] &= !mask;
            if self.words[word] == 0 {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
            position += high - low;
        }
        self.free_blocks -= count;
    }
}

/// Appends a run, as part of the run before if that ends where this begins and is of this
/// allocation.
fn append(out: &mut Vec<DataRun>, first_run: usize, run: DataRun) {
    let same_allocation = out.len() > first_run;
    match out.last_mut() {
        Some(last) if same_allocation && last.end() == u64::from(run.first.0) => {
            last.count += run.count;
        }
        _ => out.push(run),
    }
}

fn word_of(block: u32) -> usize {
    (block / 64) as usize
}

/// Words whose first `count` bits are ones.
fn ones(count: usize) -> Vec<u64> {
    let mut words = vec![u64::MAX; count.div_ceil(64)];
    if let (Some(last), rest @ 1..) = (words.last_mut(), count % 64) {
        *last = (1 << rest) - 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u32),
        Release(u32),
        MarkUsed(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (1u32..120).prop_map(Step::Allocate),
            4 => any::<u32>().prop_map(Step::Release),
            2 => any::<u32>().prop_map(Step::MarkUsed),
        ]
    }

    fn check(space: &FreeSpace, free: &BTreeSet<u32>) {
        assert_eq!(space.free_blocks() as usize, free.len());
        for block in 0..space.data_blocks() {
            assert_eq!(space.is_used(DataBlock(block)), !free.contains(&block), "{block}");
        }
        for (index, word) in space.words.iter().enumerate() {
            assert_eq!(space.summary[index / 64] >> (index % 64) & 1 == 1, *word != 0);
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(
            size in prop::sample::select(vec![1u32, 63, 64, 65, 200, 4097, 9000]),
            steps in prop::collection::vec(step(), 1..150),
        ) {
            let mut space = FreeSpace::new(size);
            let mut free: BTreeSet<u32> = (0..size).collect();
            for step in steps {
                match step {
                    Step::Allocate(count) => {
                        let mut out = Vec::new();
                        let result = space.allocate(count, &mut out);
                        prop_assert_eq!(result.is_ok(), count as usize <= free.len());
                        let total: u32 = out.iter().map(|run| run.count).sum();
                        prop_assert_eq!(total, if result.is_ok() { count } else { 0 });
                        for block in out.iter().flat_map(DataRun::blocks) {
                            prop_assert!(free.remove(&block.0), "{} was not free", block);
                        }
                    }
                    Step::Release(seed) | Step::MarkUsed(seed) => {
                        let block = seed % size;
                        if free.remove(&block) {
                            space.mark_used(DataBlock(block));
                        } else {
                            free.insert(block);
                            space.release(DataBlock(block));
                        }
                    }
                }
            }
            check(&space, &free);
        }
    }

    #[test]
    fn an_empty_zone_gives_one_run_and_goes_on_behind_it() {
        let mut space = FreeSpace::new(10_000);
        let mut out = Vec::new();
        space.allocate(1000, &mut out).unwrap();
        space.allocate(1000, &mut out).unwrap();
        let run = |first, count| DataRun { first: DataBlock(first), count };
        assert_eq!(out, [run(0, 1000), run(1000, 1000)]);
        (0..1000).for_each(|block| space.release(DataBlock(block)));
        out.clear();
        space.allocate(8500, &mut out).unwrap();
        assert_eq!(out, [run(2000, 8000), run(0, 500)]);
        assert_eq!(space.allocate(501, &mut out), Err(NoSpace { wanted: 501, free: 500 }));
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn short_runs_wait_while_space_is_plenty() {
        let mut space = FreeSpace::new(4096);
        (0..1024).for_each(|i| space.mark_used(DataBlock(i * 2)));
        let mut out = Vec::new();
        space.allocate(512, &mut out).unwrap();
        assert_eq!(out, [DataRun { first: DataBlock(2047), count: 512 }]);
        out.clear();
        space.allocate(space.free_blocks(), &mut out).unwrap();
        assert_eq!(space.free_blocks(), 0);
        assert_eq!(out.len(), 1 + 1023);
    }

    #[test]
    #[should_panic(expected = "free already")]
    fn a_block_is_not_released_twice() {
        FreeSpace::new(10).release(DataBlock(3));
    }

    #[test]
    #[should_panic(expected = "used already")]
    fn a_block_is_not_taken_twice() {
        let mut space = FreeSpace::new(10);
        space.mark_used(DataBlock(3));
        space.mark_used(DataBlock(3));
    }
}
