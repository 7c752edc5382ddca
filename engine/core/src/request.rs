//! Step 1 of the flow: what a frontend asks of a shard, and what it hears back.
//!
//! A frontend cuts a client's command into requests that each lie in one stripe ([`SEGMENT_BLOCKS`]) of one volume,
//! so that each belongs to exactly one shard. Invariants: a request's range is aligned to [`SECTOR_BYTES`]; a
//! read or write touches at most [`REQUEST_BLOCKS_MAX`] blocks, which have consecutive buffers; an unmap covers
//! whole blocks.

use crate::units::{
    BLOCK_BYTES, BufferId, CpNumber, LocalBlock, REQUEST_BLOCKS_MAX, SECTOR_BYTES, SEGMENT_BLOCKS,
    ShardId, VolumeBlock, VolumeId,
};

/// The frontend's name for a request, returned with the answer. The core never looks into it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tag(pub u64);

/// One command of a client, or a part of it, for one shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Returned with the answer.
    pub tag: Tag,
    /// The CP that was open when the request was admitted (R2).
    pub stamp: CpNumber,
    /// Which volume.
    pub volume: VolumeId,
    /// First byte in the volume.
    pub offset: u64,
    /// Length in bytes, at least [`SECTOR_BYTES`].
    pub length: u32,
    /// What to do with the range.
    pub operation: Operation,
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Stage the bytes of consecutive buffers. Byte `i` of the volume lies at byte `i % 4096` of its block's
    /// buffer; bytes of a first or last block outside the range are undefined. The shard takes the buffers.
    Write {
        /// The first block's buffer.
        buffer: BufferId,
    },
    /// Fill consecutive whole-block buffers, placed as in a write. The frontend keeps the buffers.
    Read {
        /// The first block's buffer.
        buffer: BufferId,
    },
    /// Make whole blocks read as zeroes and free their space.
    Unmap,
    /// Tell which blocks are mapped. At most one stripe.
    Status,
}

/// A shard's answer to one request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The request's tag.
    pub tag: Tag,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Write staged, read filled, or range unmapped.
    Done,
    /// Of a status request: bit `i` tells whether block `i` of the request's stripe is mapped.
    Mapped(Box<[u64; (SEGMENT_BLOCKS / 64) as usize]>),
    /// The store, or the shard's map zone, has no free block.
    NoSpace,
    /// The device failed, or a block did not match its checksum, or the volume is gone.
    Failed,
}

impl Request {
    /// The first block that the range touches.
    #[must_use]
    pub fn first_block(&self) -> VolumeBlock {
        VolumeBlock(self.offset / BLOCK_BYTES as u64)
    }

    /// How many blocks the range touches.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        blocks_touched(self.offset, self.length)
    }

    /// Checks the invariants of this module.
    ///
    /// # Panics
    /// If a frontend broke one: that is a bug of the frontend, never of a client.
    pub fn check(&self) {
        assert!(self.length > 0, "empty request");
        assert!(self.offset.is_multiple_of(SECTOR_BYTES as u64), "offset {}", self.offset);
        assert!((self.length as usize).is_multiple_of(SECTOR_BYTES), "length {}", self.length);
        let first = self.first_block().0;
        let last = first + u64::from(self.blocks()) - 1;
        assert_eq!(first / SEGMENT_BLOCKS, last / SEGMENT_BLOCKS, "request crosses a stripe");
        match self.operation {
            Operation::Write { .. } | Operation::Read { .. } => {
                assert!(self.blocks() <= REQUEST_BLOCKS_MAX, "{} blocks", self.blocks());
            }
            Operation::Unmap | Operation::Status => {
                assert!(self.offset.is_multiple_of(BLOCK_BYTES as u64), "offset {}", self.offset);
                assert!(
                    (self.length as usize).is_multiple_of(BLOCK_BYTES),
                    "length {}",
                    self.length
                );
            }
        }
    }
}

/// How many blocks a byte range touches.
#[must_use]
pub fn blocks_touched(offset: u64, length: u32) -> u32 {
    let first = offset / BLOCK_BYTES as u64;
    let end = (offset + u64::from(length)).div_ceil(BLOCK_BYTES as u64);
    u32::try_from(end - first).expect("a 32-bit length touches fewer than 2^32 blocks")
}

/// The shard that owns a block of a volume, and the block's number inside that shard.
///
/// Stripes go round the shards; each volume starts at another shard so that small volumes spread.
#[must_use]
pub fn locate(volume: VolumeId, block: VolumeBlock, shards: u16) -> (ShardId, LocalBlock) {
    let count = u64::from(shards);
    let stripe = block.0 / SEGMENT_BLOCKS;
    let shard = (stripe + u64::from(volume.0)) % count;
    let local = stripe / count * SEGMENT_BLOCKS + block.0 % SEGMENT_BLOCKS;
    (ShardId(shard as u16), LocalBlock(local))
}

/// The inverse of [`locate`].
#[must_use]
pub fn volume_block(
    volume: VolumeId,
    shard: ShardId,
    local: LocalBlock,
    shards: u16,
) -> VolumeBlock {
    let count = u64::from(shards);
    let start = u64::from(volume.0) % count;
    let phase = (u64::from(shard.0) + count - start) % count;
    let stripe = local.0 / SEGMENT_BLOCKS * count + phase;
    VolumeBlock(stripe * SEGMENT_BLOCKS + local.0 % SEGMENT_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locate_and_back() {
        for shards in [1, 2, 3, 7, 64] {
            for volume in [1, 2, 9] {
                for block in [0, 1, 511, 512, 513, 5000, 123_456_789] {
                    let (shard, local) = locate(VolumeId(volume), VolumeBlock(block), shards);
                    let back = volume_block(VolumeId(volume), shard, local, shards);
                    assert_eq!(back, VolumeBlock(block));
                }
            }
        }
    }

    #[test]
    fn touched_blocks_count_partial_ones() {
        assert_eq!(blocks_touched(0, 4096), 1);
        assert_eq!(blocks_touched(512, 4096), 2);
        assert_eq!(blocks_touched(3584, 512), 1);
        assert_eq!(blocks_touched(3584, 1024), 2);
    }
}
