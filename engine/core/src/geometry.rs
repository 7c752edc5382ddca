//! Where everything lies on a store. Fixed when the store is formatted.
//!
//! ```text
//! store:   superblock (block 0) | superblock (block 8) | region of shard 0 | region of shard 1 ...
//! region:  header | directory 0 | header | directory 1 | map slots | journal ring | data
//! ```
//!
//! Serves every step that names a device block. Invariants: the zones of a region do not overlap,
//! regions do not overlap, and all end inside the store; all shards have the same zones; a block
//! number given by this module lies inside the zone it is named after.

pub use crate::units::MapSlot;

use crate::limits::{
    CATALOG_BYTES_MAX, DATA_BLOCKS_MIN, DATA_BLOCKS_USABLE_MAX, JOURNAL_BLOCKS_DEFAULT_MAX,
    JOURNAL_BLOCKS_MAX, JOURNAL_BLOCKS_MIN, REGIONS_START, SEGMENTS_MAX, SEGMENTS_MIN,
    SUPERBLOCK_COPIES,
};
use crate::units::{BLOCK_BYTES, DataBlock, DeviceBlock, SHARDS_MAX, ShardId};

/// Data blocks for which the default plan has one map segment: writes may touch a quarter of a
/// segment each on average before the map zone is full.
pub const DATA_BLOCKS_PER_SEGMENT: u64 = 128;
/// Bytes of a directory beside its entries: its head and the catalog.
pub const DIRECTORY_FIXED_BYTES: u64 = 32 + CATALOG_BYTES_MAX as u64;
/// Bytes of a directory's entry.
pub const DIRECTORY_ENTRY_BYTES: u64 = 32;

/// Sizes of a store's zones, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// How many shards, 1 to 64.
    pub shards: u16,
    /// Blocks of one shard's region.
    pub region_blocks: u64,
    /// Blocks of one shard's journal ring.
    pub journal_blocks: u32,
    /// Blocks of one shard's map zone, each for one segment.
    pub map_slots: u32,
    /// Blocks of each of a shard's two directories.
    pub directory_blocks: u32,
}

/// Why a store cannot have a geometry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GeometryError {
    /// No shards, or more than 64.
    Shards {
        /// How many.
        shards: u16,
    },
    /// The store is smaller than the geometry needs.
    StoreTooSmall {
        /// Blocks of the store.
        store_blocks: u64,
        /// Blocks it must have.
        store_blocks_min: u64,
    },
    /// A shard's data zone would exceed 4 TiB less one block.
    ShardsTooFew {
        /// The least number of shards for this store; more than 64 if it is too large.
        shards_min: u64,
    },
    /// The journal is too small or too large.
    Journal {
        /// Blocks of the journal.
        journal_blocks: u32,
    },
    /// The map zone is too small, too large or odd.
    MapSlots {
        /// Blocks of the map zone.
        map_slots: u32,
    },
    /// A directory is not as large as the map zone and the catalog need.
    Directory {
        /// Blocks of a directory.
        directory_blocks: u32,
        /// What it must be.
        needed: u32,
    },
}

impl std::fmt::Display for GeometryError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            GeometryError::Shards { shards } => {
                write!(f, "{shards} shards: a store has 1 to {SHARDS_MAX}")
            }
            GeometryError::StoreTooSmall { store_blocks, store_blocks_min } => write!(
                f,
                "the store has {store_blocks} blocks of 4 KiB, and needs at least {store_blocks_min}"
            ),
            GeometryError::ShardsTooFew { shards_min } => {
                write!(f, "the store is too large for so few shards: it needs {shards_min}")
            }
            GeometryError::Journal { journal_blocks } => write!(
                f,
                "a journal of {journal_blocks} blocks: {JOURNAL_BLOCKS_MIN} to \
                 {JOURNAL_BLOCKS_MAX} are possible"
            ),
            GeometryError::MapSlots { map_slots } => write!(
                f,
                "a map zone of {map_slots} slots: even numbers from {} to {} are possible",
                2 * SEGMENTS_MIN,
                2 * SEGMENTS_MAX
            ),
            GeometryError::Directory { directory_blocks, needed } => {
                write!(f, "a directory of {directory_blocks} blocks: it must have {needed}")
            }
        }
    }
}

impl std::error::Error for GeometryError {}

impl Geometry {
    /// The geometry of a new store. The journal takes 1/32 of a region unless said otherwise; the
    /// map zone holds one segment for each 128 data blocks unless `segments_max` says otherwise.
    ///
    /// # Errors
    /// If the store is too small or too large for this many shards, or a choice is impossible.
    pub fn plan(
        store_blocks: u64,
        shards: u16,
        journal_blocks: Option<u32>,
        segments_max: Option<u32>,
    ) -> Result<Geometry, GeometryError> {
        if shards == 0 || shards > SHARDS_MAX {
            return Err(GeometryError::Shards { shards });
        }
        let region_blocks = store_blocks.saturating_sub(REGIONS_START) / u64::from(shards);
        let journal_blocks = journal_blocks.unwrap_or_else(|| {
            let most = u64::from(JOURNAL_BLOCKS_DEFAULT_MAX);
            (region_blocks / 32).clamp(u64::from(JOURNAL_BLOCKS_MIN), most) as u32
        });
        let segments = segments_max.unwrap_or_else(|| {
            let rest = region_blocks.saturating_sub(u64::from(journal_blocks));
            let planned = rest / (DATA_BLOCKS_PER_SEGMENT + 2);
            planned.clamp(u64::from(SEGMENTS_MIN), u64::from(SEGMENTS_MAX)) as u32
        });
        if segments > SEGMENTS_MAX {
            return Err(GeometryError::MapSlots { map_slots: segments.saturating_mul(2) });
        }
        let directory_blocks = directory_blocks_for(segments);
        let map_slots = 2 * segments;
        let geometry =
            Geometry { shards, region_blocks, journal_blocks, map_slots, directory_blocks };
        geometry.check(store_blocks)?;
        Ok(geometry)
    }

    /// Checks a geometry read from a store of `store_blocks` blocks.
    ///
    /// # Errors
    /// If a zone has an impossible size, or the regions do not fit the store.
    pub fn check(&self, store_blocks: u64) -> Result<(), GeometryError> {
        self.check_zones()?;
        let shards = u64::from(self.shards);
        let end = self.region_blocks.checked_mul(shards).and_then(|b| b.checked_add(REGIONS_START));
        if end.is_none_or(|end| end > store_blocks) {
            let store_blocks_min = end.unwrap_or(u64::MAX);
            return Err(GeometryError::StoreTooSmall { store_blocks, store_blocks_min });
        }
        Ok(())
    }

    /// Checks everything but the store's size.
    pub(crate) fn check_zones(&self) -> Result<(), GeometryError> {
        if self.shards == 0 || self.shards > SHARDS_MAX {
            return Err(GeometryError::Shards { shards: self.shards });
        }
        if !(JOURNAL_BLOCKS_MIN..=JOURNAL_BLOCKS_MAX).contains(&self.journal_blocks) {
            return Err(GeometryError::Journal { journal_blocks: self.journal_blocks });
        }
        let segments = self.map_slots / 2;
        let possible = (SEGMENTS_MIN..=SEGMENTS_MAX).contains(&segments);
        if !possible || !self.map_slots.is_multiple_of(2) {
            return Err(GeometryError::MapSlots { map_slots: self.map_slots });
        }
        let needed = directory_blocks_for(segments);
        if self.directory_blocks != needed {
            let directory_blocks = self.directory_blocks;
            return Err(GeometryError::Directory { directory_blocks, needed });
        }
        let (shards, fixed) = (u64::from(self.shards), self.data_offset());
        if self.region_blocks < fixed + u64::from(DATA_BLOCKS_MIN) {
            let store_blocks = self.region_blocks.saturating_mul(shards) + REGIONS_START;
            let least = (fixed + u64::from(DATA_BLOCKS_MIN)) * shards + REGIONS_START;
            return Err(GeometryError::StoreTooSmall { store_blocks, store_blocks_min: least });
        }
        let data_blocks = self.region_blocks - fixed;
        if data_blocks > u64::from(DATA_BLOCKS_USABLE_MAX) {
            let region_max = fixed + u64::from(DATA_BLOCKS_USABLE_MAX);
            let shards_min = self.region_blocks.saturating_mul(shards).div_ceil(region_max);
            return Err(GeometryError::ShardsTooFew { shards_min });
        }
        Ok(())
    }

    /// Where the superblock's copies lie.
    #[must_use]
    pub fn superblock_copies() -> [DeviceBlock; 2] {
        SUPERBLOCK_COPIES.map(DeviceBlock)
    }

    /// Blocks of the store that the geometry uses.
    #[must_use]
    pub fn store_blocks(&self) -> u64 {
        REGIONS_START + u64::from(self.shards) * self.region_blocks
    }

    /// The first block of a shard's region.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn region_start(&self, shard: ShardId) -> DeviceBlock {
        assert!(shard.0 < self.shards, "shard {shard} of {}", self.shards);
        DeviceBlock(REGIONS_START + u64::from(shard.0) * self.region_blocks)
    }

    /// Where the copies of a shard's header lie.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn header_copies(&self, shard: ShardId) -> [DeviceBlock; 2] {
        let second = 1 + u64::from(self.directory_blocks);
        [self.in_region(shard, 0), self.in_region(shard, second)]
    }

    /// The first block of one of a shard's two directories.
    ///
    /// # Panics
    /// If there is no such shard, or `area` is not 0 or 1.
    #[must_use]
    pub fn directory_start(&self, shard: ShardId, area: usize) -> DeviceBlock {
        assert!(area < 2, "directory area {area}");
        let area_blocks = 1 + u64::from(self.directory_blocks);
        self.in_region(shard, 1 + area as u64 * area_blocks)
    }

    /// The block of a map slot.
    ///
    /// # Panics
    /// If there is no such shard or slot.
    #[must_use]
    pub fn map_slot(&self, shard: ShardId, slot: MapSlot) -> DeviceBlock {
        assert!(slot.0 < self.map_slots, "map slot {slot} of {}", self.map_slots);
        self.in_region(shard, self.map_offset() + u64::from(slot.0))
    }

    /// A block of a shard's journal ring.
    ///
    /// # Panics
    /// If there is no such shard or block.
    #[must_use]
    pub fn journal_block(&self, shard: ShardId, index: u32) -> DeviceBlock {
        assert!(index < self.journal_blocks, "journal block {index} of {}", self.journal_blocks);
        self.in_region(shard, self.journal_offset() + u64::from(index))
    }

    /// The first block of a shard's data zone.
    ///
    /// # Panics
    /// If there is no such shard.
    #[must_use]
    pub fn data_start(&self, shard: ShardId) -> DeviceBlock {
        self.in_region(shard, self.data_offset())
    }

    /// A block of a shard's data zone.
    ///
    /// # Panics
    /// If there is no such shard or block.
    #[must_use]
    pub fn data_block(&self, shard: ShardId, block: DataBlock) -> DeviceBlock {
        assert!(block.0 < self.data_blocks(), "data block {block} of {}", self.data_blocks());
        self.in_region(shard, self.data_offset() + u64::from(block.0))
    }

    /// How many data blocks a shard has.
    ///
    /// # Panics
    /// If the geometry was not checked.
    #[must_use]
    pub fn data_blocks(&self) -> u32 {
        let rest = self.region_blocks.checked_sub(self.data_offset());
        let blocks = rest.and_then(|blocks| u32::try_from(blocks).ok());
        blocks.expect("a checked geometry has 1024 to 2^30 - 1 data blocks a shard")
    }

    /// How many map segments a shard may hold: half of its slots, for a checkpoint may write each
    /// segment to another slot while the one before is retained.
    #[must_use]
    pub fn segments_max(&self) -> u32 {
        self.map_slots / 2
    }

    fn in_region(&self, shard: ShardId, offset: u64) -> DeviceBlock {
        assert!(offset < self.region_blocks, "offset {offset} of {}", self.region_blocks);
        DeviceBlock(self.region_start(shard).0 + offset)
    }

    fn map_offset(&self) -> u64 {
        2 * (1 + u64::from(self.directory_blocks))
    }

    fn journal_offset(&self) -> u64 {
        self.map_offset() + u64::from(self.map_slots)
    }

    fn data_offset(&self) -> u64 {
        self.journal_offset() + u64::from(self.journal_blocks)
    }
}

fn directory_blocks_for(segments: u32) -> u32 {
    let bytes = DIRECTORY_FIXED_BYTES + u64::from(segments) * DIRECTORY_ENTRY_BYTES;
    bytes.div_ceil(BLOCK_BYTES as u64) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zones(geometry: &Geometry, shard: ShardId) -> Vec<(u64, u64)> {
        let directory = u64::from(geometry.directory_blocks);
        let mut zones = vec![
            (geometry.header_copies(shard)[0].0, 1),
            (geometry.header_copies(shard)[1].0, 1),
            (geometry.directory_start(shard, 0).0, directory),
            (geometry.directory_start(shard, 1).0, directory),
            (geometry.map_slot(shard, MapSlot(0)).0, u64::from(geometry.map_slots)),
            (geometry.journal_block(shard, 0).0, u64::from(geometry.journal_blocks)),
            (geometry.data_start(shard).0, u64::from(geometry.data_blocks())),
        ];
        zones.sort_unstable();
        zones
    }

    proptest! {
        #[test]
        fn planned_zones_fill_the_store_without_overlap(
            mib in 64u64..4_000_000, shards in 1u16..=64,
        ) {
            let store_blocks = mib * 256;
            let Ok(geometry) = Geometry::plan(store_blocks, shards, None, None) else {
                prop_assert!(mib / u64::from(shards) < 20, "{mib} MiB, {shards} shards");
                return Ok(());
            };
            prop_assert_eq!(geometry.check(store_blocks), Ok(()));
            let mut end = REGIONS_START;
            for shard in 0..shards {
                prop_assert_eq!(geometry.region_start(ShardId(shard)).0, end);
                for (start, blocks) in zones(&geometry, ShardId(shard)) {
                    prop_assert_eq!(start, end);
                    end += blocks;
                }
            }
            prop_assert_eq!(end, geometry.store_blocks());
            prop_assert!(store_blocks - end < u64::from(shards));
            let share = geometry.data_blocks() as f64 / geometry.region_blocks as f64;
            prop_assert!(share > 0.93 || mib / u64::from(shards) < 64, "{share}");
        }

        #[test]
        fn untrusted_geometry_never_panics(
            shards: u16, region_blocks: u64, journal_blocks: u32, map_slots: u32,
            directory_blocks: u32, store_blocks: u64,
        ) {
            let geometry =
                Geometry { shards, region_blocks, journal_blocks, map_slots, directory_blocks };
            let _ = geometry.check(store_blocks);
            let _ = Geometry::plan(store_blocks, shards, Some(journal_blocks), Some(map_slots));
            let _ = Geometry::plan(store_blocks, shards % 65, None, None);
        }
    }

    #[test]
    fn small_and_large_stores() {
        let small = Geometry::plan(64 * 256, 2, None, None).unwrap();
        assert!(small.data_blocks() > 7000, "{small:?}");
        assert_eq!(small.segments_max(), 64);
        let Err(GeometryError::StoreTooSmall { store_blocks_min, .. }) =
            Geometry::plan(1000, 2, None, None)
        else {
            panic!("1000 blocks are too few");
        };
        assert!(Geometry::plan(store_blocks_min, 2, None, None).is_ok());
        assert!(Geometry::plan(store_blocks_min - 1, 2, None, None).is_err());
        let huge = 10 << 28;
        let few = Geometry::plan(huge, 2, None, None);
        assert_eq!(few, Err(GeometryError::ShardsTooFew { shards_min: 3 }));
        let planned = Geometry::plan(huge, 3, None, None).unwrap();
        assert!(planned.data_blocks() <= DATA_BLOCKS_USABLE_MAX);
    }
}
