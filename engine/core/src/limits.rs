//! Every bound of the formats, each with its reason, and the relations between them.
//!
//! Serves all steps of the flow. Invariant: no structure read from a device or the wire makes the
//! engine allocate more than a constant of this file says. Sizes of types live in
//! [`crate::units`]; offsets inside a structure live beside its coder.

use crate::units::{BLOCK_BYTES, DATA_BLOCKS_MAX, SEGMENT_BLOCKS, SHARDS_MAX};

/// Blocks before the first region: both superblocks and room between them.
pub const REGIONS_START: u64 = 16;
/// Where the superblock's two copies lie. Apart, so that one torn or misplaced write of up to 32
/// KiB cannot hit both.
pub const SUPERBLOCK_COPIES: [u64; 2] = [0, 8];

/// Data blocks one shard can use: a pointer of 30 ones means "unmapped", so the last is missing.
pub const DATA_BLOCKS_USABLE_MAX: u32 = (DATA_BLOCKS_MAX - 1) as u32;
/// Fewest data blocks of a shard: 4 MiB. Less is no store, and would need its own tests.
pub const DATA_BLOCKS_MIN: u32 = 1024;
/// Smallest journal of a shard: the largest record fits.
pub const JOURNAL_BLOCKS_MIN: u32 = 256;
/// Largest journal planned by default: 256 MiB replays within seconds.
pub const JOURNAL_BLOCKS_DEFAULT_MAX: u32 = 65_536;
/// Largest journal at all: 4 GiB.
pub const JOURNAL_BLOCKS_MAX: u32 = 1 << 20;
/// Fewest map segments of a shard: a few volumes with a file system each.
pub const SEGMENTS_MIN: u32 = 64;
/// Most map segments of a shard: one for each data block of the largest shard, divided by 64. At
/// 4 KiB each that is 64 GiB of memory, more than a shard is worth.
pub const SEGMENTS_MAX: u32 = 1 << 24;

/// Most volumes of a store. The whole catalog travels in one record.
pub const VOLUMES_MAX: usize = 256;
/// Longest volume name, in bytes.
pub const VOLUME_NAME_BYTES_MAX: usize = 64;
/// Largest volume, in bytes. Its block numbers take 43 bits.
pub const VOLUME_BYTES_MAX: u64 = 1 << 55;
/// Block numbers inside a shard end here: one shard may own all of the largest volume.
pub const LOCAL_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_BYTES as u64;
/// Segment numbers inside a shard end here.
pub const SEGMENT_NUMBERS_MAX: u64 = LOCAL_BLOCKS_MAX / SEGMENT_BLOCKS;
/// Longest encoding of a catalog, in bytes.
pub const CATALOG_BYTES_MAX: usize = 8 + VOLUMES_MAX * (4 + 8 + 1 + VOLUME_NAME_BYTES_MAX);

/// Longest list of terms in a superblock: half the block. Promotions are rare; older terms than
/// these are forgotten, and a peer that old is copied anew.
pub const HISTORY_MAX: usize = 128;
/// Longest name of a checkpoint, in bytes.
pub const CHECKPOINT_NAME_BYTES_MAX: usize = 64;

/// Most blocks one shard maps in one CP: 128 MiB. Bounds the record and the time of a CP.
pub const RECORD_MAPPED_MAX: u32 = 32_768;
/// Most runs of a record's delta, mapped and unmapped together.
pub const RECORD_RUNS_MAX: u32 = 32_768;
/// Most blocks one shard unmaps in one CP: all it can have.
pub const RECORD_UNMAPPED_MAX: u32 = RECORD_MAPPED_MAX;
/// Most bytes that one run adds to a delta's encoding: its gap and its length, each of at most
/// nine learnt decisions and 41 plain bits.
pub const DELTA_RUN_BYTES_MAX: usize = 18;
/// Most bytes of a delta's encoding beside its runs: volumes and counts.
pub const DELTA_FIXED_BYTES_MAX: usize = 16 * VOLUMES_MAX + 64;
/// Longest encoding of one delta, in bytes.
pub const DELTA_BYTES_MAX: usize =
    DELTA_FIXED_BYTES_MAX + DELTA_RUN_BYTES_MAX * RECORD_RUNS_MAX as usize;
/// Longest encoding of one data run, in bytes: two varints.
pub const DATA_RUN_BYTES_MAX: usize = 5 + 3;
/// Longest record, in blocks.
pub const RECORD_BLOCKS_MAX: u32 = record_blocks_bound(RECORD_MAPPED_MAX, RECORD_RUNS_MAX);

/// The most blocks that a record with this many mapped blocks and runs of its delta takes in the
/// journal: head, name, catalog, delta, data runs, checksums. Lets a shard reserve its journal
/// before it seals.
#[must_use]
pub const fn record_blocks_bound(mapped_blocks: u32, delta_runs: u32) -> u32 {
    let fixed = 192 + CHECKPOINT_NAME_BYTES_MAX + CATALOG_BYTES_MAX + DELTA_FIXED_BYTES_MAX;
    let delta = DELTA_RUN_BYTES_MAX * delta_runs as usize;
    let data = (DATA_RUN_BYTES_MAX + 4) * mapped_blocks as usize;
    (fixed + delta + data).div_ceil(BLOCK_BYTES) as u32
}

const _: () = assert!(SUPERBLOCK_COPIES[0] < SUPERBLOCK_COPIES[1]);
const _: () = assert!(SUPERBLOCK_COPIES[1] < REGIONS_START);
const _: () = assert!(DATA_BLOCKS_USABLE_MAX < 1 << 30);
const _: () = assert!(RECORD_BLOCKS_MAX <= JOURNAL_BLOCKS_MIN);
const _: () = assert!(RECORD_MAPPED_MAX <= RECORD_RUNS_MAX);
const _: () = assert!(JOURNAL_BLOCKS_MIN <= JOURNAL_BLOCKS_DEFAULT_MAX);
const _: () = assert!(JOURNAL_BLOCKS_DEFAULT_MAX <= JOURNAL_BLOCKS_MAX);
const _: () = assert!(SEGMENTS_MAX as u64 * 32 + (CATALOG_BYTES_MAX as u64) < u32::MAX as u64);
const _: () = assert!(SEGMENT_BLOCKS == 512);
const _: () = assert!(SHARDS_MAX as u32 == u64::BITS);
