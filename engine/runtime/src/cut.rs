//! Cuts a client's byte range into ranges that each fit one request. Step 1 of the flow, for every frontend.
//!
//! Invariants: a cut range is not empty, lies in one stripe, and touches at most the given number of blocks.

use twinpoint_core::request::blocks_touched;
use twinpoint_core::units::{BLOCK_BYTES, REQUEST_BLOCKS_MAX, SEGMENT_BLOCKS};

/// Bytes of a block, as a volume offset.
pub(crate) const BLOCK: u64 = BLOCK_BYTES as u64;
/// Bytes of a stripe.
pub(crate) const STRIPE: u64 = BLOCK * SEGMENT_BLOCKS;

/// How many buffers the next piece of `start..end` would use at best.
pub(crate) fn blocks_wanted(start: u64, end: u64) -> u32 {
    blocks_touched(start, length_within(start, end, REQUEST_BLOCKS_MAX))
}

/// The length of the next piece of `start..end` that touches at most `blocks` blocks.
pub(crate) fn length_within(start: u64, end: u64, blocks: u32) -> u32 {
    assert!(start < end, "nothing to cut at {start}");
    assert!(blocks > 0, "a piece has a block");
    let stop = end.min(stripe_end(start)).min((start / BLOCK + u64::from(blocks)) * BLOCK);
    u32::try_from(stop - start).expect("a piece is shorter than a stripe")
}

/// The end of the stripe that has the byte `offset`.
pub(crate) fn stripe_end(offset: u64) -> u64 {
    (offset / STRIPE + 1) * STRIPE
}

/// `offset` rounded down to a block.
pub(crate) fn block_floor(offset: u64) -> u64 {
    offset - offset % BLOCK
}

/// `offset` rounded up to a block; saturates at the last block.
pub(crate) fn block_ceiling(offset: u64) -> u64 {
    block_floor(offset.saturating_add(BLOCK - 1))
}

/// Where the next piece of a range that is cleared ends at most, and whether it can be unmapped. `hole`: whole blocks
/// are unmapped, and edges written; else all is written.
pub(crate) fn background_piece(hole: bool, start: u64, end: u64) -> (u64, bool) {
    let whole_end = block_floor(end);
    if !hole || (start.is_multiple_of(BLOCK) && start >= whole_end) {
        return (end, false);
    }
    if !start.is_multiple_of(BLOCK) {
        return ((block_floor(start) + BLOCK).min(end), false);
    }
    (stripe_end(start).min(whole_end), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_blocks_stripes_and_the_end() {
        assert_eq!(length_within(0, 10 << 20, 64), 256 << 10);
        assert_eq!(length_within(512, 10 << 20, 64), (256 << 10) - 512);
        assert_eq!(length_within(STRIPE - 512, 10 << 20, 64), 512);
        assert_eq!(length_within(512, 1024, 64), 512);
        assert_eq!(length_within(3584, 9000 - 9000 % 512, 1), 512);
        assert_eq!(blocks_wanted(3584, 4608), 2);
        assert_eq!(blocks_wanted(0, 1 << 40), 64);
    }

    #[test]
    fn pieces_cover_a_range() {
        let (mut cursor, end) = (512 * 7, 3 * STRIPE + 512);
        while cursor < end {
            let length = length_within(cursor, end, 5);
            assert!(blocks_touched(cursor, length) <= 5);
            assert!(cursor + u64::from(length) <= stripe_end(cursor));
            cursor += u64::from(length);
        }
        assert_eq!(cursor, end);
    }

    #[test]
    fn zeroes_unmap_whole_blocks_and_write_the_edges() {
        assert_eq!(background_piece(true, 512, 9000 / 512 * 512), (4096, false));
        assert_eq!(background_piece(true, 4096, 8704), (8192, true));
        assert_eq!(background_piece(true, 8192, 8704), (8704, false));
        assert_eq!(background_piece(true, 0, 2 * STRIPE), (STRIPE, true));
        assert_eq!(background_piece(false, 0, STRIPE + 512), (STRIPE + 512, false));
    }
}
