//! A disk with a volatile cache. Writes that no flush covered may be lost, reordered and torn at a power cut.
//!
//! Invariants: a flush makes durable what had been answered when it was asked for; a write takes its bytes from the
//! buffers at its end; two writes of one block, or a read and a write of it, are never under way together: the engine
//! would not know what the block holds.

use std::collections::BTreeMap;

use twinpoint_core::recovery::{BlockSource, ReadFailed};
use twinpoint_core::units::{BLOCK_BYTES, Checksum, DeviceBlock, SECTOR_BYTES};

use crate::content::{Block, checksum, zero_block};
use crate::random::Random;

/// See the module.
#[derive(Debug)]
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

    /// A read ends.
    pub fn end_read(&mut self, operation: u64) -> Vec<Block> {
        let (first, end) = self.reading.remove(&operation).expect("it was begun");
        (first..end).map(|block| self.block(block)).collect()
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
            std::rc::Rc::make_mut(&mut block).copy_from_slice(chunk);
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
            if index > 0 && random.chance(25) {
                tear(&mut kept, &candidates[index - 1], random);
            }
            self.durable.insert(block, kept);
        }
        self.current = self.durable.clone();
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
    let bytes = std::rc::Rc::make_mut(block);
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
