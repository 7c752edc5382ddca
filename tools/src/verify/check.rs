//! One store by itself: every mapped block against its checksum, each shard's root computed anew, free space against
//! the map. That superblock, headers, directories, segments and records are whole, recovery has checked before.

use std::path::Path;

use twinpoint_core::coordinator::store_root;
use twinpoint_core::recovery::{BlockSource, Recovered};
use twinpoint_core::segment::entry_hash;
use twinpoint_core::shard::ShardImage;
use twinpoint_core::units::{BLOCK_BYTES, Checksum, Root};
use twinpoint_runtime::device::StoreFile;
use twinpoint_runtime::status::bytes_text;
use twinpoint_runtime::store::DeviceSource;

use super::NAMED_MAX;
use super::blocks::{MappedBlock, for_each_run};
use crate::failure::{Exit, Failure};
use crate::outline::Outline;
use crate::progress::Progress;

/// What was found.
pub struct Check {
    blocks: u64,
    damaged_blocks: u64,
    /// The first of them.
    named: Vec<Outline>,
    /// Roots and free space that do not fit.
    faults: Vec<String>,
}

impl Check {
    /// Reads all mapped blocks.
    pub fn run(store: &StoreFile, recovered: &Recovered) -> Check {
        let mut check =
            Check { blocks: 0, damaged_blocks: 0, named: Vec::new(), faults: Vec::new() };
        let mapped: u64 = recovered.shards.iter().map(|shard| shard.map.mapped_blocks()).sum();
        let what = format!("checking {}", store.path().display());
        let mut progress = Progress::new(what, mapped * BLOCK_BYTES as u64);
        for (shard, root) in recovered.shards.iter().zip(&recovered.coordinator.roots) {
            check.root(shard, *root);
            check.space(shard);
            check.data(store, shard, &mut progress);
        }
        check
    }

    /// What a report says of the store.
    pub fn outline(&self, path: &Path, recovered: &Recovered) -> Outline {
        let image = &recovered.coordinator;
        let repairs = recovered.repairs.iter().map(|repair| Outline::text(repair.why));
        let is_whole = self.damaged_blocks == 0 && self.faults.is_empty();
        Outline::Fields(vec![
            ("path", Outline::text(path.display())),
            ("state", Outline::text(if is_whole { "whole" } else { "damaged" })),
            ("store", Outline::text(image.superblock.store)),
            ("term", Outline::Number(image.superblock.term.0)),
            ("cp", Outline::Number(image.committed.0)),
            ("base", Outline::Number(image.base.0)),
            ("root", Outline::text(store_root(&image.roots))),
            ("shard_roots", Outline::list(image.roots.iter().map(Outline::text))),
            ("volumes", Outline::Number(image.catalog.volumes.len() as u64)),
            ("checked_blocks", Outline::Number(self.blocks)),
            ("checked_bytes", Outline::Number(self.blocks * BLOCK_BYTES as u64)),
            ("damaged_blocks", Outline::Number(self.damaged_blocks)),
            ("damaged", Outline::List(self.named.clone())),
            ("faults", Outline::list(self.faults.iter().map(Outline::text))),
            ("repairs_due", Outline::list(repairs)),
        ])
    }

    /// The failure that the damage amounts to.
    pub fn damage(&self, path: &Path) -> Option<Failure> {
        if let Some(fault) = self.faults.first() {
            let text = format!("{}: {fault}: use the other store of the pair", path.display());
            return Some(Failure::new(Exit::Damaged, "damaged", text));
        }
        if self.damaged_blocks == 0 {
            return None;
        }
        let text = format!(
            "{}: {} of {} data blocks ({}) are damaged: use the other store of the pair",
            path.display(),
            self.damaged_blocks,
            self.blocks,
            bytes_text(self.damaged_blocks * BLOCK_BYTES as u64),
        );
        Some(Failure::new(Exit::Damaged, "damaged", text))
    }

    /// Sums the map up anew.
    fn root(&mut self, shard: &ShardImage, expected: Root) {
        let mut sum = shard.catalog_root;
        for_each_run(&shard.map, |run| {
            for block in run {
                sum = sum.wrapping_add(entry_hash(block.volume, block.local, block.slot));
            }
        });
        if Root(sum) != expected {
            self.faults.push(format!(
                "the root of shard {} is {}, not {expected}",
                shard.id,
                Root(sum)
            ));
        }
    }

    /// Used is what the map and retained CPs name, and nothing else.
    fn space(&mut self, shard: &ShardImage) {
        let mut unmarked = 0_u64;
        for_each_run(&shard.map, |run| {
            unmarked +=
                run.iter().filter(|block| !shard.free.is_used(block.slot.block)).count() as u64;
        });
        let retained =
            shard.retained.iter().map(|retained| retained.blocks.len() as u64).sum::<u64>();
        let used = u64::from(shard.free.data_blocks() - shard.free.free_blocks());
        let named = shard.map.mapped_blocks() + retained;
        if unmarked > 0 || used != named {
            let id = shard.id;
            self.faults.push(format!(
                "free space of shard {id}: {used} blocks used, {named} named, {unmarked} of them free"
            ));
        }
    }

    fn data(&mut self, store: &StoreFile, shard: &ShardImage, progress: &mut Progress) {
        let source = DeviceSource::new(store);
        for_each_run(&shard.map, |run| {
            let read = read_run(store, shard, run);
            for (index, block) in run.iter().enumerate() {
                let found = read.block(index).map(|bytes| source.checksum(bytes));
                if found != Some(block.slot.checksum) {
                    self.damaged(shard, block, found);
                }
            }
            self.blocks += run.len() as u64;
            progress.add((run.len() * BLOCK_BYTES) as u64);
        });
    }

    fn damaged(&mut self, shard: &ShardImage, block: &MappedBlock, found: Option<Checksum>) {
        self.damaged_blocks += 1;
        if self.named.len() < NAMED_MAX {
            let mut fields = block.fields(&shard.geometry, shard.id);
            fields.push(("checksum", Outline::text(format!("{:08x}", block.slot.checksum.0))));
            let found = found.map(|found| Outline::text(format!("{:08x}", found.0)));
            fields.push(("found", found.unwrap_or(Outline::text("unreadable"))));
            self.named.push(Outline::Fields(fields));
        }
    }
}

/// Bytes of a run; blocks that cannot be read are missing.
pub struct RunBytes {
    bytes: Vec<u8>,
    unreadable: Vec<usize>,
}

impl RunBytes {
    /// A block's bytes, if it can be read.
    pub fn block(&self, index: usize) -> Option<&[u8]> {
        let readable = !self.unreadable.contains(&index);
        readable.then(|| &self.bytes[index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES])
    }
}

/// Reads a run at once, and block by block where that fails.
pub fn read_run(store: &StoreFile, shard: &ShardImage, run: &[MappedBlock]) -> RunBytes {
    let place = |block: &MappedBlock| shard.geometry.data_block(shard.id, block.slot.block);
    let mut bytes = vec![0; run.len() * BLOCK_BYTES];
    let mut unreadable = Vec::new();
    if store.read_blocks(place(&run[0]), &mut bytes).is_err() {
        for (index, part) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            if store.read_blocks(place(&run[index]), part).is_err() {
                unreadable.push(index);
            }
        }
    }
    RunBytes { bytes, unreadable }
}
