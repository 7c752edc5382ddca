//! What really is on both stores: which CP's image uses which data block, and which CPs are durable where.
//!
//! Built from the writes, records and flushes that the world sees, whatever the engine believes. Rules checked here:
//! - no data is written to a block that an image uses which its side still needs: that of its last committed CP, or of
//!   any CP at or after the base, the last CP that is committed on both sides (R1, R7);
//! - no data is written to a block by which recovery would prove a CP that nothing durable calls committed (R4);
//! - no block is called free that such an image uses;
//! - a record maps only blocks that were written for it, and no block twice;
//! - no CP is called committed, on one side or on both, before it is (R3);
//! - a start finds the map and the free blocks of exactly its last CP.

mod region;

use std::collections::BTreeMap;

use twinpoint_core::data_run::DataRun;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::record::Record;
use twinpoint_core::shard::ShardImage;
use twinpoint_core::units::{CpNumber, DataBlock, DeviceBlock, Root, ShardId, ShardSet};

use self::region::Region;

/// See the module.
#[derive(Debug)]
pub(crate) struct Images {
    sides: [Side; 2],
    /// The last CP that is durable and the same on both sides.
    pub common: CpNumber,
}

#[derive(Debug)]
struct Side {
    shards: Vec<Region>,
    points: BTreeMap<CpNumber, Point>,
    /// All of it and of all before it is durable.
    durable: CpNumber,
    /// Data and record writes under way, by operation: of a record also its CP.
    writes: BTreeMap<u64, (ShardId, Written)>,
    /// Of what ended up to this place in the disk's order, all is durable.
    flushed: u64,
    /// The newest CP that a durable record or superblock calls committed.
    claimed: CpNumber,
    /// The device lost writes: until the store is opened again nothing more counts as durable.
    has_failed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Written {
    Data(DataRun),
    Record(CpNumber),
}

/// One CP on one side.
#[derive(Debug)]
struct Point {
    participants: ShardSet,
    parts: BTreeMap<ShardId, Part>,
}

#[derive(Debug)]
struct Part {
    root: Root,
    runs: Vec<DataRun>,
    /// What the record calls committed.
    committed: CpNumber,
    ended: Option<u64>,
}

impl Images {
    /// Two empty stores.
    pub fn new(shards: u16, data_blocks: u32) -> Images {
        let region =
            || Region { uses: vec![Vec::new(); data_blocks as usize], ..Region::default() };
        let side = || Side {
            shards: (0..shards).map(|_| region()).collect(),
            points: BTreeMap::new(),
            durable: CpNumber(0),
            writes: BTreeMap::new(),
            flushed: 0,
            claimed: CpNumber(0),
            has_failed: false,
        };
        Images { sides: [side(), side()], common: CpNumber(0) }
    }

    /// A data write begins. `keeps_base`: the side still needs the images from the base on.
    pub fn data_begins(
        &mut self,
        (node, shard, operation): (usize, ShardId, u64),
        run: DataRun,
        keeps_base: bool,
    ) {
        let (common, floor) = (self.common, self.floor(node, keeps_base));
        let side = &mut self.sides[node];
        let (durable, claimed) = (side.durable, side.claimed);
        let region = &mut side.shards[usize::from(shard.0)];
        for block in run.blocks() {
            let uses = &region.uses[block.0 as usize];
            let user = uses.iter().find(|used| used.freed.is_none_or(|freed| freed > floor));
            assert!(
                user.is_none(),
                "node {node} writes block {block} of shard {shard}, which CPs at or after {floor} use: {user:?} \
                 (committed here {durable}, on both {common})"
            );
            // Recovery reads the data of CPs that nothing durable calls committed, those that later ones freed too.
            let proof = uses.last().filter(|used| used.mapped > claimed);
            assert!(
                proof.is_none(),
                "node {node} writes block {block} of shard {shard}, which proves a CP after {claimed}: {proof:?}"
            );
            let fresh = region.unrecorded.insert(block);
            assert!(fresh, "node {node} writes block {block} of shard {shard} for two CPs");
            region.ended.insert(block, None);
        }
        side.writes.insert(operation, (shard, Written::Data(run)));
    }

    /// A record's write begins.
    pub fn record_begins(&mut self, node: usize, shard: ShardId, operation: u64, record: &Record) {
        let side = &mut self.sides[node];
        let cp = record.cp;
        side.shards[usize::from(shard.0)].apply(record, node, shard);
        let participants = record.participants;
        let point = side.points.entry(cp).or_insert(Point { participants, parts: BTreeMap::new() });
        assert_eq!(point.participants, participants, "who takes part in CP {cp} of node {node}");
        let (root, committed) = (record.root_after, record.committed);
        let part = Part { root, runs: record.runs.clone(), committed, ended: None };
        let fresh = point.parts.insert(shard, part).is_none();
        assert!(fresh, "node {node} records CP {cp} of shard {shard} twice");
        side.writes.insert(operation, (shard, Written::Record(cp)));
    }

    /// A write ended well, as the disk's number `order`.
    pub fn ended(&mut self, node: usize, operation: u64, order: u64) {
        let side = &mut self.sides[node];
        match side.writes.remove(&operation) {
            Some((shard, Written::Data(run))) => {
                let region = &mut side.shards[usize::from(shard.0)];
                run.blocks().for_each(|block| {
                    region.ended.insert(block, Some(order));
                });
            }
            Some((shard, Written::Record(cp))) => {
                let part = side.points.get_mut(&cp).and_then(|point| point.parts.get_mut(&shard));
                part.expect("a record under way is of a known CP").ended = Some(order);
            }
            None => {}
        }
    }

    /// A flush ended: all up to `mark` in the disk's order is durable.
    pub fn flushed(&mut self, node: usize, mark: u64) {
        let side = &mut self.sides[node];
        if side.has_failed {
            return;
        }
        side.flushed = side.flushed.max(mark);
        while side.is_durable(side.durable.next()) {
            side.durable = side.durable.next();
        }
        let newest = side.points.get(&side.durable);
        let claims = newest.into_iter().flat_map(|point| point.parts.values());
        side.claimed = claims.map(|part| part.committed).fold(side.claimed, CpNumber::max);
        self.find_common();
    }

    /// The durable superblock calls CPs committed.
    pub fn told(&mut self, node: usize, committed: CpNumber) {
        let side = &mut self.sides[node];
        side.claimed = side.claimed.max(committed);
    }

    /// A failed flush lost writes: what the device holds is unknown until the store is opened again.
    pub fn device_failed(&mut self, node: usize) {
        self.sides[node].has_failed = true;
    }

    /// Data blocks of maps that something durable of this side calls committed: recovery reads none of them.
    pub fn claimed_blocks(&self, node: usize, geometry: &Geometry) -> Vec<DeviceBlock> {
        let side = &self.sides[node];
        let mut blocks = Vec::new();
        for (shard, region) in (0..).map(ShardId).zip(&side.shards) {
            for place in region.map.values() {
                let newest = region.uses[place.0 as usize].last();
                if newest.is_some_and(|used| used.mapped <= side.claimed) {
                    blocks.push(geometry.data_block(shard, *place));
                }
            }
        }
        blocks
    }

    /// The newest CP that a durable record or superblock of this side calls committed.
    pub fn claimed(&self, node: usize) -> CpNumber {
        self.sides[node].claimed
    }

    /// Data blocks that no image of any CP that this side may go back to uses.
    pub fn unused_blocks(&self, node: usize, geometry: &Geometry) -> Vec<DeviceBlock> {
        let mut blocks = Vec::new();
        for (shard, region) in (0..).map(ShardId).zip(&self.sides[node].shards) {
            for (index, uses) in region.uses.iter().enumerate() {
                let place = DataBlock(u32::try_from(index).expect("a block's number"));
                if uses.iter().all(|used| used.freed.is_some_and(|freed| freed <= self.common)) {
                    blocks.push(geometry.data_block(shard, place));
                }
            }
        }
        blocks
    }

    /// What a shard received and did not record is forgotten.
    pub fn forget_unrecorded(&mut self, node: usize, shard: ShardId) {
        self.sides[node].shards[usize::from(shard.0)].unrecorded.clear();
    }

    /// A store was opened at `last`: later CPs are gone. What it found must be what is known of it.
    pub fn opened(&mut self, node: usize, last: CpNumber, base: CpNumber, found: &[ShardImage]) {
        let side = &mut self.sides[node];
        side.writes.clear();
        side.points.split_off(&last.next());
        side.durable = last;
        // The records that said more may have been cut off.
        side.claimed = side.claimed.min(last).min(side.claimed_by_points());
        side.has_failed = false;
        assert!(side.points.keys().all(|cp| *cp <= last), "later CPs were cut off");
        self.common = self.common.min(last);
        for (region, image) in side.shards.iter_mut().zip(found) {
            region.go_back(last);
            assert_eq!(image.map.mapped_blocks(), region.map.len() as u64, "node {node} maps");
            for ((volume, block), place) in &region.map {
                let slot = image.map.get(*volume, *block).map(|slot| slot.block);
                assert_eq!(slot, Some(*place), "node {node}: volume {volume} block {block}");
            }
            let free = image.free.free_blocks();
            assert_eq!(free, region.free_after(base), "node {node} finds other free blocks");
        }
        self.find_common();
    }

    /// A coordinator says which CPs are committed here, and on both sides.
    pub fn check_said(&self, node: usize, committed: CpNumber, base: CpNumber, keeps_base: bool) {
        let durable = self.sides[node].durable;
        assert!(
            committed <= durable,
            "node {node} calls CP {committed} committed, it is {durable}"
        );
        let common = if keeps_base { self.common } else { durable };
        assert!(base <= common, "node {node} calls CP {base} the base, it is {common}");
    }

    /// A shard says how many of its blocks are free: never one that an image uses which is still needed.
    pub fn check_free(&self, node: usize, shard: ShardId, free: u32, keeps_base: bool) {
        let floor = self.floor(node, keeps_base);
        let unused = self.free_blocks(node, shard, floor);
        assert!(
            free <= unused,
            "node {node} shard {shard}: {free} blocks are free, but only {unused} are not used from CP {floor} on"
        );
    }

    /// Blocks of a shard that no image at or after `base` uses.
    pub fn free_blocks(&self, node: usize, shard: ShardId, base: CpNumber) -> u32 {
        self.sides[node].shards[usize::from(shard.0)].free_after(base)
    }

    /// The newest CP that the other side may have confirmed: one that is not durable here yet can be among them.
    pub fn confirmed(&self, node: usize) -> CpNumber {
        let [mine, other] = [self.sides[node].durable, self.sides[1 - node].durable];
        if self.common == mine { other.max(mine) } else { self.common }
    }

    /// The oldest CP whose image a side still needs.
    fn floor(&self, node: usize, keeps_base: bool) -> CpNumber {
        let durable = self.sides[node].durable;
        if keeps_base { durable.min(self.common) } else { durable }
    }

    fn find_common(&mut self) {
        let [one, other] = &self.sides;
        let end = one.durable.min(other.durable);
        while self.common < end {
            let next = self.common.next();
            let is_same = match (one.points.get(&next), other.points.get(&next)) {
                (Some(one), Some(other)) => one.is_same(other),
                _ => false,
            };
            if !is_same {
                return;
            }
            self.common = next;
        }
    }
}

impl Side {
    /// What the newest records that are left call committed.
    fn claimed_by_points(&self) -> CpNumber {
        let parts = self.points.values().flat_map(|point| point.parts.values());
        parts.map(|part| part.committed).max().unwrap_or_default()
    }

    fn is_durable(&self, cp: CpNumber) -> bool {
        let is_kept = |ended: Option<u64>| ended.is_some_and(|order| order <= self.flushed);
        self.points.get(&cp).is_some_and(|point| {
            point.participants.iter().all(|shard| {
                let region = &self.shards[usize::from(shard.0)];
                point.parts.get(&shard).is_some_and(|part| {
                    let mut blocks = part.runs.iter().flat_map(DataRun::blocks);
                    is_kept(part.ended)
                        && blocks.all(|block| is_kept(region.ended.get(&block).copied().flatten()))
                })
            })
        })
    }
}

impl Point {
    fn is_same(&self, other: &Point) -> bool {
        let roots = |point: &Point| -> Vec<(ShardId, Root)> {
            point.parts.iter().map(|(shard, part)| (*shard, part.root)).collect()
        };
        self.participants == other.participants && roots(self) == roots(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twinpoint_core::delta::{Delta, VolumeDelta};
    use twinpoint_core::units::{Checksum, LocalBlock, StoreId, Term, VolumeId};

    const SHARD: ShardId = ShardId(0);

    /// CP `cp` writes block 5 of a volume to `place`, on both sides up to `sides`, and is durable there.
    fn play(images: &mut Images, cp: u64, place: u32, sides: usize) {
        play_claiming(images, cp, place, sides, cp - 1);
    }

    /// The same; its record calls `committed` committed.
    fn play_claiming(images: &mut Images, cp: u64, place: u32, sides: usize, committed: u64) {
        let run = DataRun { first: DataBlock(place), count: 1 };
        let mut delta = VolumeDelta::new(VolumeId(1));
        delta.push_mapped(LocalBlock(5));
        let record = Record {
            store: StoreId([7; 16]),
            shard: SHARD,
            term: Term(1),
            cp: CpNumber(cp),
            participants: ShardSet::one(SHARD),
            committed: CpNumber(committed),
            base: CpNumber(0),
            root_before: Root(0),
            root_after: Root(u128::from(cp)),
            sequence: cp,
            previous: 0,
            name: None,
            catalog: None,
            delta: Delta { volumes: vec![delta] },
            runs: vec![run],
            checksums: vec![Checksum(0)],
        };
        for node in 0..sides {
            images.data_begins((node, SHARD, cp * 2), run, true);
            images.record_begins(node, SHARD, cp * 2 + 1, &record);
            images.ended(node, cp * 2, cp);
            images.ended(node, cp * 2 + 1, cp);
            images.flushed(node, cp);
        }
    }

    #[test]
    fn a_block_is_free_once_its_successor_is_durable_on_both_sides() {
        let mut images = Images::new(1, 8);
        play(&mut images, 1, 0, 2);
        play(&mut images, 2, 1, 2);
        play(&mut images, 3, 0, 2);
        assert_eq!(images.free_blocks(1, SHARD, CpNumber(3)), 7);
        images.check_said(1, CpNumber(3), CpNumber(3), true);
    }

    #[test]
    #[should_panic(expected = "node 0 writes block 0 of shard 0, which proves a CP after 0")]
    fn a_block_that_recovery_would_read_is_not_overwritten() {
        let mut images = Images::new(1, 8);
        play(&mut images, 1, 0, 2);
        play_claiming(&mut images, 2, 1, 2, 0);
        play(&mut images, 3, 0, 2);
    }

    #[test]
    #[should_panic(expected = "node 1 writes block 1 of shard 0, which CPs at or after 2 use")]
    fn the_last_image_of_a_secondary_is_not_overwritten() {
        let mut images = Images::new(1, 8);
        play(&mut images, 1, 0, 2);
        play(&mut images, 2, 1, 2);
        let run = DataRun { first: DataBlock(1), count: 1 };
        images.data_begins((1, SHARD, 9), run, true);
    }

    #[test]
    #[should_panic(expected = "node 0 writes block 0 of shard 0, which CPs at or after 1 use")]
    fn the_base_is_not_overwritten_while_one_side_is_behind() {
        let mut images = Images::new(1, 8);
        play(&mut images, 1, 0, 2);
        play(&mut images, 2, 1, 1);
        play(&mut images, 3, 0, 1);
    }

    #[test]
    #[should_panic(expected = "calls CP 2 the base, it is 1")]
    fn a_base_is_durable_on_both_sides() {
        let mut images = Images::new(1, 8);
        play(&mut images, 1, 0, 2);
        play(&mut images, 2, 1, 1);
        images.check_said(0, CpNumber(2), CpNumber(2), true);
    }
}
