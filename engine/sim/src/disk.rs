//! A disk with a volatile cache. Writes that no flush covered may be lost, reordered and torn at a power cut; flushes,
//! writes and reads fail, are slow, or never end; and media rot.
//!
//! Where rot and misdirected writes strike, and what the design owes there (`damage.rs` chooses the blocks):
//!
//! - One of the two superblock copies, one of the two headers of a shard: opens as before. The other copy is whole;
//!   nothing is told, and no journal space reused, before both hold the same.
//! - Data blocks, map slots and journal blocks that nothing points to, gaps between zones: no effect. They are never
//!   read, or refused by store, shard, sequence, chain and checksum.
//! - Data blocks of CPs that a record calls committed: errors of reads, never wrong bytes. The map holds each block's
//!   checksum; nothing else holds the data on this side.
//! - Live records, directories, segments: refused at the start, or the same map is found; never a shorter history than
//!   a record calls committed. They have one copy on a side, the other side is the second.
//!
//! Not struck: data and records of CPs that no durable structure calls committed yet. There a rotten block looks just
//! like a write that a power cut lost, and recovery rightly drops the CP (R4): one store alone cannot tell.
//!
//! Invariants: a flush makes durable what had been answered when it was asked for; a write takes its bytes from the
//! buffers at its end; two writes of one block, or a read and a write of it, are never under way together: the engine
//! would not know what the block holds.

use std::collections::BTreeMap;
use std::rc::Rc;

use twinpoint_core::recovery::{BlockSource, ReadFailed};
use twinpoint_core::units::{BLOCK_BYTES, Checksum, DeviceBlock, SECTOR_BYTES};

use crate::content::{Block, checksum, zero_block};
use crate::random::Random;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    blocks: u64,
    durable: BTreeMap<u64, Block>,
    current: BTreeMap<u64, Block>,
    /// Answered writes that no flush covered: for each block, versions with their place in the order.
    unflushed: BTreeMap<u64, Vec<(u64, Block)>>,
    answered: u64,
    /// Writes under way, by operation.
    writing: BTreeMap<u64, (u64, Vec<Block>)>,
    reading: BTreeMap<u64, (u64, u64)>,
    /// Blocks that rotted: what they hold now, and what they should.
    rotten: BTreeMap<u64, Rot>,
}

#[derive(Clone, Debug)]
struct Rot {
    bad: Block,
    good: Block,
}

impl Disk {
    pub fn new(blocks: u64) -> Disk {
        Disk {
            blocks,
            durable: BTreeMap::new(),
            current: BTreeMap::new(),
            unflushed: BTreeMap::new(),
            answered: 0,
            writing: BTreeMap::new(),
            reading: BTreeMap::new(),
            rotten: BTreeMap::new(),
        }
    }

    /// A write begins.
    pub fn begin_write(&mut self, operation: u64, first: u64, contents: Vec<Block>) {
        let end = first + contents.len() as u64;
        assert!(end <= self.blocks, "a write after the end of the disk");
        let clash = self
            .writing
            .values()
            .find(|(start, blocks)| first < start + blocks.len() as u64 && *start < end);
        assert!(clash.is_none(), "two writes of block {first}..{end} are under way");
        let clash = self.reading.values().find(|(start, stop)| first < *stop && *start < end);
        assert!(clash.is_none(), "a block of {first}..{end} is written while it is read");
        self.writing.insert(operation, (first, contents));
    }

    /// A write ends well.
    pub fn end_write(&mut self, operation: u64) {
        let (first, contents) = self.writing.remove(&operation).expect("it was begun");
        for (index, block) in contents.into_iter().enumerate() {
            self.put(first + index as u64, block);
        }
    }

    /// The bytes that a write under way was given.
    pub fn given(&self, operation: u64) -> &[Block] {
        &self.writing[&operation].1
    }

    /// A read begins.
    pub fn begin_read(&mut self, operation: u64, first: u64, count: u64) {
        assert!(first + count <= self.blocks, "a read after the end of the disk");
        let end = first + count;
        let clash = self
            .writing
            .values()
            .find(|(start, blocks)| first < start + blocks.len() as u64 && *start < end);
        assert!(clash.is_none(), "a block of {first}..{end} is read while it is written");
        self.reading.insert(operation, (first, end));
    }

    /// The blocks of a read under way.
    pub fn under_read(&self, operation: u64) -> std::ops::Range<u64> {
        let (first, end) = self.reading[&operation];
        first..end
    }

    /// A read ends.
    pub fn end_read(&mut self, operation: u64) -> Vec<Block> {
        let (first, end) = self.reading.remove(&operation).expect("it was begun");
        (first..end).map(|block| self.block(block)).collect()
    }

    /// A read ends badly. Tells whether it was one.
    pub fn abandon_read(&mut self, operation: u64) -> bool {
        self.reading.remove(&operation).is_some()
    }

    /// A write, if it is one, ends badly: each of its blocks may have been written.
    pub fn abandon_write(&mut self, operation: u64, random: &mut Random) {
        let Some((first, contents)) = self.writing.remove(&operation) else { return };
        for (index, block) in contents.into_iter().enumerate() {
            if random.chance(50) {
                self.put(first + index as u64, block);
            }
        }
    }

    /// What a flush asked for now will cover.
    pub fn flush_mark(&self) -> u64 {
        self.answered
    }

    /// A flush ends that was asked for at `mark`.
    pub fn flush(&mut self, mark: u64) {
        let durable = &mut self.durable;
        self.unflushed.retain(|block, versions| {
            while versions.first().is_some_and(|(order, _)| *order <= mark) {
                durable.insert(*block, versions.remove(0).1);
            }
            !versions.is_empty()
        });
    }

    /// Writes at once, outside of virtual time: recovery's repairs, formatting.
    pub fn write_now(&mut self, first: u64, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let mut block = zero_block();
            Rc::make_mut(&mut block).copy_from_slice(chunk);
            self.put(first + index as u64, block);
        }
    }

    /// Makes all that was answered durable.
    pub fn flush_now(&mut self) {
        self.flush(self.answered);
    }

    /// The process dies: what was under way may have happened, block by block.
    pub fn kill(&mut self, random: &mut Random) {
        self.reading.clear();
        for (first, contents) in std::mem::take(&mut self.writing).into_values() {
            for (index, block) in contents.into_iter().enumerate() {
                if random.chance(50) {
                    self.put(first + index as u64, block);
                }
            }
        }
    }

    /// The power fails: of each block any version since the last flush remains, or a mixture of two.
    pub fn power_cut(&mut self, random: &mut Random) {
        self.kill(random);
        let keeps_most = random.chance(50);
        for (block, versions) in std::mem::take(&mut self.unflushed) {
            let mut candidates = vec![self.durable.get(&block).cloned().unwrap_or_else(zero_block)];
            candidates.extend(versions.into_iter().map(|(_, version)| version));
            let newest = candidates.len() - 1;
            let index = if keeps_most && random.chance(80) {
                newest
            } else {
                random.below(newest as u64 + 1) as usize
            };
            let mut kept = candidates[index].clone();
            if newest > 0 && random.chance(25) {
                let other = random.below(newest as u64 + 1) as usize;
                tear(&mut kept, &candidates[other], random);
            }
            self.durable.insert(block, kept);
        }
        self.current = self.durable.clone();
    }

    /// A flush failed: of some blocks the newest writes are gone, and no later flush brings them back.
    pub fn lose_unflushed(&mut self, random: &mut Random) {
        let mut lost = std::mem::take(&mut self.unflushed);
        for (block, versions) in &mut lost {
            if random.chance(30) {
                versions.truncate(random.below(versions.len() as u64) as usize);
                let left = versions.last().map(|(_, version)| version.clone());
                let left = left.unwrap_or_else(|| self.durable_block(*block));
                self.current.insert(*block, left);
            }
        }
        lost.retain(|_, versions| !versions.is_empty());
        self.unflushed = lost;
    }

    /// A block that nobody writes or reads now goes bad.
    pub fn rot(&mut self, block: u64, bad: Block) {
        assert!(self.is_quiet(block), "block {block} rots while it is in use");
        let good = self.sound_block(block);
        self.durable.insert(block, bad.clone());
        self.current.insert(block, bad.clone());
        self.rotten.insert(block, Rot { bad, good });
    }

    /// The operator brings back what rotted and was not written since.
    pub fn heal(&mut self) {
        for (block, rot) in std::mem::take(&mut self.rotten) {
            for blocks in [&mut self.durable, &mut self.current] {
                if let Some(held) = blocks.get_mut(&block).filter(|held| Rc::ptr_eq(held, &rot.bad))
                {
                    *held = rot.good.clone();
                }
            }
        }
    }

    /// Whether a block holds what rotted.
    pub fn is_rotten(&self, block: u64) -> bool {
        let rot = self.rotten.get(&block);
        rot.is_some_and(|rot| {
            self.current.get(&block).is_some_and(|held| Rc::ptr_eq(held, &rot.bad))
        })
    }

    /// Whether a block was not written since the last flush, and no work on it is under way.
    pub fn is_quiet(&self, block: u64) -> bool {
        let is_written = self
            .writing
            .values()
            .any(|(first, blocks)| (*first..first + blocks.len() as u64).contains(&block));
        let is_read = self.reading.values().any(|(first, end)| (*first..*end).contains(&block));
        !is_written && !is_read && !self.unflushed.contains_key(&block)
    }

    /// A block as it would be had nothing rotted.
    pub fn sound_block(&self, block: u64) -> Block {
        match self.rotten.get(&block).filter(|_| self.is_rotten(block)) {
            Some(rot) => rot.good.clone(),
            None => self.block(block),
        }
    }

    /// Puts other bytes in a block for as long as the caller looks; gives those that were there.
    pub fn swap(&mut self, block: u64, contents: Block) -> Block {
        let held = self.block(block);
        self.current.insert(block, contents);
        held
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// A block as a read would see it.
    pub fn block(&self, block: u64) -> Block {
        self.current.get(&block).cloned().unwrap_or_else(zero_block)
    }

    /// A block as a power cut now would leave it at worst.
    pub fn durable_block(&self, block: u64) -> Block {
        self.durable.get(&block).cloned().unwrap_or_else(zero_block)
    }

    fn put(&mut self, block: u64, contents: Block) {
        self.answered += 1;
        self.current.insert(block, contents.clone());
        self.unflushed.entry(block).or_default().push((self.answered, contents));
    }
}

fn tear(block: &mut Block, older: &Block, random: &mut Random) {
    if Rc::ptr_eq(block, older) {
        return;
    }
    let bytes = Rc::make_mut(block);
    for sector in 0..BLOCK_BYTES / SECTOR_BYTES {
        if random.chance(50) {
            let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
            bytes[range.clone()].copy_from_slice(&older[range]);
        }
    }
}

/// The disk as recovery reads it.
pub(crate) struct DiskSource<'a>(pub &'a Disk);

impl BlockSource for DiskSource<'_> {
    fn read(&mut self, first: DeviceBlock, bytes: &mut [u8]) -> Result<(), ReadFailed> {
        for (index, chunk) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let number = first.0 + index as u64;
            if number >= self.0.blocks {
                return Err(ReadFailed(DeviceBlock(number)));
            }
            match self.0.current.get(&number) {
                Some(block) => chunk.copy_from_slice(&block[..]),
                None => chunk.fill(0),
            }
        }
        Ok(())
    }

    fn checksum(&self, block: &[u8]) -> Checksum {
        checksum(block)
    }

    fn blocks(&self) -> u64 {
        self.0.blocks
    }
}

/// A disk of which some reads fail.
pub(crate) struct UnreadableSource<'a> {
    pub disk: &'a Disk,
    /// How many more reads succeed.
    pub reads_left: u64,
    /// Or: reads of this block fail.
    pub block: Option<u64>,
}

impl BlockSource for UnreadableSource<'_> {
    fn read(&mut self, first: DeviceBlock, bytes: &mut [u8]) -> Result<(), ReadFailed> {
        let end = first.0 + (bytes.len() / BLOCK_BYTES) as u64;
        if self.block.is_some_and(|block| (first.0..end).contains(&block)) {
            return Err(ReadFailed(first));
        }
        let left = self.reads_left.checked_sub(1);
        self.reads_left = left.ok_or(ReadFailed(first))?;
        DiskSource(self.disk).read(first, bytes)
    }

    fn checksum(&self, block: &[u8]) -> Checksum {
        checksum(block)
    }

    fn blocks(&self) -> u64 {
        self.disk.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(byte: u8) -> Block {
        Rc::new([byte; BLOCK_BYTES])
    }

    fn write(disk: &mut Disk, block: u64, byte: u8) {
        disk.begin_write(7, block, vec![filled(byte)]);
        disk.end_write(7);
    }

    #[test]
    fn what_was_flushed_survives_a_power_cut_and_each_other_block_is_old_new_or_torn() {
        let mut random = Random::new(1);
        let mut torn = 0;
        for _ in 0..200 {
            let mut disk = Disk::new(4);
            write(&mut disk, 1, 1);
            disk.flush_now();
            write(&mut disk, 2, 2);
            disk.power_cut(&mut random);
            assert_eq!(disk.block(1), filled(1));
            let left = disk.block(2);
            assert!(left.chunks(SECTOR_BYTES).all(|sector| matches!(sector[0], 0 | 2)));
            torn += usize::from(left != filled(2) && left != filled(0));
        }
        assert!(torn > 5, "{torn} torn blocks");
    }

    #[test]
    fn rot_stays_until_it_is_healed_or_written() {
        let mut disk = Disk::new(4);
        for block in 1..3 {
            write(&mut disk, block, 1);
        }
        disk.flush_now();
        for block in 1..3 {
            disk.rot(block, filled(9));
            assert!(disk.is_rotten(block));
            assert_eq!((disk.block(block), disk.sound_block(block)), (filled(9), filled(1)));
        }
        disk.power_cut(&mut Random::new(1));
        assert!(disk.is_rotten(2), "a power cut mends nothing");
        write(&mut disk, 2, 3);
        disk.flush_now();
        disk.heal();
        assert_eq!((disk.block(1), disk.block(2)), (filled(1), filled(3)));
        assert!(!disk.is_rotten(1) && !disk.is_rotten(2));
    }

    #[test]
    fn a_failed_flush_loses_writes_that_no_later_flush_brings_back() {
        let mut random = Random::new(1);
        let mut lost = 0;
        for _ in 0..100 {
            let mut disk = Disk::new(4);
            write(&mut disk, 1, 1);
            disk.lose_unflushed(&mut random);
            let seen = disk.block(1);
            disk.flush_now();
            disk.power_cut(&mut random);
            assert_eq!(disk.block(1), seen, "what is read after it is what stays");
            lost += usize::from(seen == zero_block());
        }
        assert!((10..90).contains(&lost), "{lost} of 100");
    }

    #[test]
    fn reads_of_an_unreadable_block_fail() {
        let disk = Disk::new(8);
        let mut source = UnreadableSource { disk: &disk, reads_left: 2, block: Some(3) };
        let mut bytes = vec![1; 2 * BLOCK_BYTES];
        assert_eq!(source.read(DeviceBlock(2), &mut bytes), Err(ReadFailed(DeviceBlock(2))));
        assert_eq!(source.read(DeviceBlock(4), &mut bytes), Ok(()));
        assert_eq!(source.read(DeviceBlock(4), &mut bytes), Ok(()));
        assert_eq!(source.read(DeviceBlock(4), &mut bytes), Err(ReadFailed(DeviceBlock(4))));
    }
}
