//! The mapped blocks of a shard, in an order in which a device reads them fast.

use twinpoint_core::block_map::{BlockMap, SegmentKey};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::request::volume_block;
use twinpoint_core::segment::Slot;
use twinpoint_core::units::{LocalBlock, ShardId, VolumeId};

use crate::outline::Outline;

/// Segments sorted together: bounds the memory that sorting takes.
const SEGMENTS_PER_BATCH: usize = 64;
/// Most blocks read at a time.
const RUN_BLOCKS_MAX: usize = 256;

/// One mapped block.
#[derive(Clone, Copy)]
pub struct MappedBlock {
    /// The volume that it belongs to.
    pub volume: VolumeId,
    /// Its number in the volume, inside the shard.
    pub local: LocalBlock,
    /// Where it lies, and its checksum.
    pub slot: Slot,
}

impl MappedBlock {
    /// What a report says of the block.
    pub fn fields(&self, geometry: &Geometry, shard: ShardId) -> Vec<(&'static str, Outline)> {
        let place = volume_block(self.volume, shard, self.local, geometry.shards);
        vec![
            ("shard", Outline::Number(shard.0.into())),
            ("volume", Outline::Number(self.volume.0.into())),
            ("volume_block", Outline::Number(place.0)),
            ("block", Outline::Number(geometry.data_block(shard, self.slot.block).0)),
        ]
    }
}

/// Calls `visit` with runs of blocks that lie one behind the other on the store: all mapped blocks, each once.
pub fn for_each_run(map: &BlockMap, mut visit: impl FnMut(&[MappedBlock])) {
    for keys in map.segment_keys().chunks(SEGMENTS_PER_BATCH) {
        let mut batch: Vec<MappedBlock> =
            keys.iter().flat_map(|key| segment_blocks(map, *key)).collect();
        batch.sort_unstable_by_key(|block| block.slot.block);
        let runs = batch.chunk_by(|one, next| one.slot.block.0 + 1 == next.slot.block.0);
        runs.flat_map(|run| run.chunks(RUN_BLOCKS_MAX)).for_each(&mut visit);
    }
}

fn segment_blocks(map: &BlockMap, key: SegmentKey) -> impl Iterator<Item = MappedBlock> + '_ {
    let segment = map.segment(key.volume, key.segment).into_iter();
    segment.flat_map(|segment| segment.iter()).map(move |(local, slot)| MappedBlock {
        volume: key.volume,
        local,
        slot,
    })
}
