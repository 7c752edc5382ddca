//! What a start makes of damage: bad copies, misdirected writes, unreadable blocks, power that fails at any commit.
//!
//! Where damage must be survived, and where it must only be noticed, is said at the top of `disk.rs`.
//! Invariant: a look at what would be changes nothing.

use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::Role;
use twinpoint_core::recovery::{Recovered, RecoveryError, Survey, recover, survey};
use twinpoint_core::shard_header::ShardHeader;
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{BLOCK_BYTES, CpNumber, DeviceBlock, MapSlot, ShardId};

use super::image_of;
use crate::content::{Block, zero_block};
use crate::disk::{DiskSource, UnreadableSource};
use crate::faults::Fault;
use crate::world::{Event, World};
use std::rc::Rc;

impl World {
    /// A start that the device fails. Tells whether it did.
    pub(super) fn start_unreadable(&mut self, node: usize, ceiling: Option<CpNumber>) -> bool {
        if !self.occasion(Fault::StartUnreadable, 15) {
            return false;
        }
        let reads_left = self.random.below(60);
        let disk = &self.nodes[node].disk;
        match recover(&mut UnreadableSource { disk, reads_left, block: None }, ceiling) {
            Err(RecoveryError::Read(_)) => {}
            // It reads less than that, or was refused for good: the next start finds out.
            _ => return false,
        }
        self.note(|| format!("node {node} cannot read its device"));
        self.soon(2_000_000, Event::Start(node, ceiling));
        true
    }

    /// Something that the design must survive is bad when the store is opened.
    pub(super) fn damage_copies(&mut self, node: usize, ceiling: Option<CpNumber>) {
        if !self.occasion(Fault::RotCopy, 40) {
            return;
        }
        self.nodes[node].disk.flush_now();
        let Ok(before) = recover(&mut DiskSource(&self.nodes[node].disk), ceiling) else { return };
        let Some((zone, block)) = self.survivable_block(node) else { return };
        let bad = self.bad_block(node, block.0);
        self.note(|| format!("node {node}: {zone}, block {block}, is bad"));
        let after = if zone.ends_with("copy") && self.random.chance(30) {
            let disk = &self.nodes[node].disk;
            let mut unreadable =
                UnreadableSource { disk, reads_left: u64::MAX, block: Some(block.0) };
            recover(&mut unreadable, ceiling)
        } else {
            self.nodes[node].disk.rot(block.0, bad);
            recover(&mut DiskSource(&self.nodes[node].disk), ceiling)
        };
        let after = after.unwrap_or_else(|error| {
            panic!("node {node} cannot be opened because {zone}, block {block}, is bad: {error}")
        });
        assert!(
            before.coordinator.committed == after.coordinator.committed
                && before.coordinator.roots == after.coordinator.roots,
            "node {node} opens at CP {} and not {} because {zone}, block {block}, is bad",
            after.coordinator.committed,
            before.coordinator.committed
        );
    }

    /// Tries what one bad block of those that have no copy does to a start: it is refused, or finds nothing else.
    pub(super) fn probe_damage(&mut self, node: usize, recovered: &Recovered) {
        if self.is_calm || !self.faults.has(Fault::RotCopy) || !self.random.chance(50) {
            return;
        }
        let geometry = self.options.geometry;
        let shard = ShardId(self.random.below(u64::from(geometry.shards)) as u16);
        let block = match self.random.below(4) {
            0 => DeviceBlock(geometry.region_start(shard).0 + self.random.below(8)),
            1 => {
                let slot = self.random.below(u64::from(geometry.map_slots)) as u32;
                geometry.map_slot(shard, MapSlot(slot))
            }
            _ => {
                let Ok(found) = survey(&mut DiskSource(&self.nodes[node].disk)) else { return };
                let records = &found.shards[usize::from(shard.0)].records;
                if records.is_empty() {
                    return;
                }
                let record = &records[self.random.below(records.len() as u64) as usize];
                let index = record.start + self.random.below(u64::from(record.blocks)) as u32;
                geometry.journal_block(shard, index)
            }
        };
        self.counts.damage_probes += 1;
        let bad = self.bad_block(node, block.0);
        let held = self.nodes[node].disk.swap(block.0, bad);
        let found = recover(&mut DiskSource(&self.nodes[node].disk), None);
        self.nodes[node].disk.swap(block.0, held);
        let Ok(found) = found else {
            self.counts.damage_refused += 1;
            return;
        };
        let (was, is) = (&recovered.coordinator, &found.coordinator);
        let claimed = self.images.claimed(node).min(was.committed);
        assert!(
            is.committed >= claimed,
            "node {node} opens at CP {} in silence, though CP {claimed} is known to be committed, because block {block} \
             of shard {shard} is bad",
            is.committed
        );
        self.check_roots(&found.shards);
        assert!(
            is.committed < was.committed || is.roots == was.roots,
            "node {node} opens with other roots because block {block} of shard {shard} is bad"
        );
    }

    /// What a power cut right now would leave of a store that calls `committed` committed.
    pub fn probe_power_cut(&mut self, node: usize, committed: CpNumber) {
        if self.probes_left > 0 && self.random.chance(3) && !self.process(node).has_failed {
            self.probes_left -= 1;
            self.look_after_power_cut(node, committed);
        }
    }

    /// The same while a header is written, at any time.
    pub fn probe_power_cut_at_header(&mut self, node: usize) {
        // The history goes on as if nobody had looked.
        let random = self.random.clone();
        if self.random.chance(50) && !self.process(node).has_failed {
            let now = self.clock(node);
            let committed = self.process(node).coordinator.status(now).committed;
            self.look_after_power_cut(node, committed);
        }
        self.random = random;
    }

    fn look_after_power_cut(&mut self, node: usize, committed: CpNumber) {
        self.counts.cut_probes += 1;
        let mut left = self.nodes[node].disk.clone();
        left.power_cut(&mut self.random);
        let found = recover(&mut DiskSource(&left), None).unwrap_or_else(|error| {
            panic!("node {node} could not be opened after a power cut at CP {committed}: {error}")
        });
        let last = found.coordinator.committed;
        assert!(last >= committed, "a power cut leaves node {node} CP {last} of {committed}");
        self.check_roots(&found.shards);
        let (image, catalog) = (image_of(&left, &found.shards), &found.coordinator.catalog);
        let is_led = self.nodes[node].role == Role::Primary;
        if is_led && self.is_primary(node) {
            let is_known = self.model.check(&image, catalog, self.model.flushed);
            assert!(is_known, "a primary shows writes that its last crash dropped");
        } else if !is_led && self.nodes[node].disowned_after.is_none_or(|disowned| last <= disowned)
        {
            let promised = self.promised_by_secondary();
            self.model.check(&image, catalog, promised);
        }
    }

    /// Bytes that a block may hold when it is bad: none, one wrong bit, or what was meant for another block.
    pub fn bad_block(&mut self, node: usize, block: u64) -> Block {
        let held = self.nodes[node].disk.block(block);
        let shards = u64::from(self.options.geometry.shards);
        let shard = ShardId(self.random.below(shards) as u16);
        let foreign = match self.random.below(6) {
            0 => return flip(&held, self.random.below(BLOCK_BYTES as u64 * 8)),
            1 => zero_block(),
            2 => {
                let copy = self.random.below(2) as usize;
                let copies = self.options.geometry.header_copies(shard);
                self.nodes[node].disk.block(copies[copy].0)
            }
            3 => {
                let index = self.random.below(u64::from(self.options.geometry.journal_blocks));
                let index = self.options.geometry.journal_block(shard, index as u32);
                self.nodes[node].disk.block(index.0)
            }
            _ => {
                let anywhere = self.random.below(self.nodes[node].disk.blocks());
                self.nodes[node].disk.block(anywhere)
            }
        };
        // Of its own, so that the disk knows it from the block that it was meant for.
        let foreign = Rc::new(*foreign);
        if foreign == held { flip(&held, 77) } else { foreign }
    }

    /// One of the blocks whose loss must not matter, and what it is.
    fn survivable_block(&mut self, node: usize) -> Option<(&'static str, DeviceBlock)> {
        let disk = &self.nodes[node].disk;
        let found = survey(&mut DiskSource(disk)).ok()?;
        let geometry = self.options.geometry;
        let shard = ShardId(self.random.below(u64::from(geometry.shards)) as u16);
        let index = self.random.below(2) as usize;
        let bytes = |block: DeviceBlock| disk.block(block.0);
        match self.random.below(7) {
            0 | 1 => {
                let copies = Geometry::superblock_copies();
                let good =
                    copies.iter().all(|block| Superblock::decode(&bytes(*block)[..]).is_ok());
                good.then_some(("a superblock copy", copies[index]))
            }
            2 | 3 => {
                let copies = geometry.header_copies(shard);
                let good =
                    copies.iter().all(|block| ShardHeader::decode(&bytes(*block)[..]).is_ok());
                good.then_some(("a header copy", copies[index]))
            }
            4 => {
                let blocks = self.images.unused_blocks(node, &geometry);
                (!blocks.is_empty()).then(|| ("an unused data block", self.random.pick(&blocks)))
            }
            5 => {
                let block = unused_journal_block(&found, shard, &geometry)?;
                Some(("an unused journal block", block))
            }
            _ => Some(("a block between zones", DeviceBlock(self.random.pick(&[1, 7, 9, 15])))),
        }
    }
}

/// The block right behind a shard's last record: where a stale record would be believed first.
fn unused_journal_block(
    found: &Survey,
    shard: ShardId,
    geometry: &Geometry,
) -> Option<DeviceBlock> {
    let shard_found = &found.shards[usize::from(shard.0)];
    let used: u32 = shard_found.records.iter().map(|record| record.blocks).sum();
    let index = match shard_found.records.last() {
        Some(last) => last.start + last.blocks,
        None => shard_found.header.journal.index,
    };
    // Near its end the ring may have left blocks out.
    let has_room = used + 64 < geometry.journal_blocks && index < geometry.journal_blocks;
    has_room.then(|| geometry.journal_block(shard, index))
}

fn flip(held: &Block, bit: u64) -> Block {
    let mut block = Rc::new(**held);
    Rc::make_mut(&mut block)[(bit / 8) as usize] ^= 1 << (bit % 8);
    block
}
