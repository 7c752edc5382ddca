//! A request of the kernel, checked, and how it is cut into pieces that each lie in one shard.
//!
//! Invariants: a checked request lies inside its volume and is whole sectors; a piece is not empty, lies in one
//! stripe, and touches at most as many blocks as it has buffers.

use twinpoint_core::request::blocks_touched;
use twinpoint_core::units::{BLOCK_BYTES, REQUEST_BLOCKS_MAX, SECTOR_BYTES, SEGMENT_BLOCKS};

use super::abi::{self, Descriptor};

pub(super) const BLOCK: u64 = BLOCK_BYTES as u64;
/// Bytes of a stripe.
pub(super) const STRIPE: u64 = BLOCK * SEGMENT_BLOCKS;
/// Largest read or write that the kernel is told to send: two pieces.
pub(super) const REQUEST_BYTES_MAX: u32 = 512 << 10;
/// Largest unmap: sixteen pieces.
pub(super) const UNMAP_BYTES_MAX: u32 = 32 << 20;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    Read,
    Write,
    Flush,
    /// Whole blocks are unmapped; parts of blocks at the ends stay as they are.
    Discard,
    /// `hole`: whole blocks are unmapped; all else is written.
    Zeroes {
        hole: bool,
    },
}

/// A request that can be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Checked {
    pub work: Work,
    /// First byte and the byte after the last.
    pub range: (u64, u64),
    /// What it changes must be durable before the answer.
    pub flush_after: bool,
}

/// Checks a description against the volume's size.
///
/// # Errors
/// The errno to answer.
pub(super) fn check(descriptor: &Descriptor, size_bytes: u64) -> Result<Checked, i32> {
    let set = |flag| descriptor.kind_and_flags & flag != 0;
    let work = match descriptor.kind_and_flags & 0xff {
        abi::KIND_READ => Work::Read,
        abi::KIND_WRITE => Work::Write,
        abi::KIND_FLUSH => {
            return Ok(Checked { work: Work::Flush, range: (0, 0), flush_after: true });
        }
        abi::KIND_DISCARD => Work::Discard,
        abi::KIND_WRITE_ZEROES => Work::Zeroes { hole: !set(abi::FLAG_NO_UNMAP) },
        _ => return Err(libc::EOPNOTSUPP),
    };
    let sector = SECTOR_BYTES as u64;
    let length = u64::from(descriptor.sectors) * sector;
    let start = descriptor.first_sector.checked_mul(sector).ok_or(libc::EINVAL)?;
    let end = start.checked_add(length).filter(|end| *end <= size_bytes).ok_or(libc::EINVAL)?;
    let moves_data = matches!(work, Work::Read | Work::Write);
    if length == 0 || moves_data && length > u64::from(REQUEST_BYTES_MAX) {
        return Err(libc::EINVAL);
    }
    let range = match work {
        Work::Discard => {
            let end = block_floor(end);
            (start.next_multiple_of(BLOCK).min(end), end)
        }
        _ => (start, end),
    };
    let flush_after = set(abi::FLAG_FUA) && work != Work::Read;
    Ok(Checked { work, range, flush_after })
}

/// How many buffers the next piece of `start..end` would use at best.
pub(super) fn blocks_wanted(start: u64, end: u64) -> u32 {
    blocks_touched(start, length_within(start, end, REQUEST_BLOCKS_MAX))
}

/// The length of the next piece of `start..end` that touches at most `blocks` blocks.
pub(super) fn length_within(start: u64, end: u64, blocks: u32) -> u32 {
    assert!(start < end && blocks > 0, "nothing to cut at {start}");
    let stop = end.min(stripe_end(start)).min((start / BLOCK + u64::from(blocks)) * BLOCK);
    u32::try_from(stop - start).expect("a piece is shorter than a stripe")
}

/// Where the next piece of an unmap or a write of zeroes ends at most, and whether it can be unmapped.
pub(super) fn background_piece(work: Work, start: u64, end: u64) -> (u64, bool) {
    let whole_end = block_floor(end);
    match work {
        Work::Zeroes { hole: true } if !start.is_multiple_of(BLOCK) => {
            ((block_floor(start) + BLOCK).min(end), false)
        }
        Work::Zeroes { hole: true } if start >= whole_end => (end, false),
        Work::Zeroes { hole: false } => (end, false),
        _ => (stripe_end(start).min(whole_end), true),
    }
}

fn stripe_end(offset: u64) -> u64 {
    (offset / STRIPE + 1) * STRIPE
}

fn block_floor(offset: u64) -> u64 {
    offset - offset % BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(kind_and_flags: u32, first_sector: u64, sectors: u32) -> Result<Checked, i32> {
        check(&Descriptor { kind_and_flags, sectors, first_sector }, 1 << 20)
    }

    #[test]
    fn what_the_kernel_says_is_checked() {
        let end = (1 << 20) / 512;
        let table = [
            (abi::KIND_READ, 0, 8, None),
            (abi::KIND_WRITE, end - 1, 1, None),
            (abi::KIND_WRITE, end - 1, 2, Some(libc::EINVAL)),
            (abi::KIND_READ, 0, 0, Some(libc::EINVAL)),
            (abi::KIND_READ, 0, 1025, Some(libc::EINVAL)),
            (abi::KIND_READ, u64::MAX, 1, Some(libc::EINVAL)),
            (abi::KIND_READ, u64::MAX / 512, 1, Some(libc::EINVAL)),
            (abi::KIND_FLUSH, u64::MAX, u32::MAX, None),
            (abi::KIND_DISCARD, 0, end as u32, None),
            (4, 0, 8, Some(libc::EOPNOTSUPP)),
            (255, 0, 8, Some(libc::EOPNOTSUPP)),
        ];
        for (kind, first, sectors, errno) in table {
            assert_eq!(described(kind, first, sectors).err(), errno, "{kind} at {first}");
        }
        assert!(described(abi::KIND_WRITE | abi::FLAG_FUA, 0, 8).unwrap().flush_after);
        assert!(!described(abi::KIND_READ | abi::FLAG_FUA, 0, 8).unwrap().flush_after);
        let kept = described(abi::KIND_WRITE_ZEROES | abi::FLAG_NO_UNMAP, 0, 8).unwrap();
        assert_eq!(kept.work, Work::Zeroes { hole: false });
    }

    #[test]
    fn a_discard_keeps_only_whole_blocks() {
        assert_eq!(described(abi::KIND_DISCARD, 1, 23).unwrap().range, (4096, 12288));
        let (start, end) = described(abi::KIND_DISCARD, 1, 3).unwrap().range;
        assert_eq!(start, end);
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
        assert_eq!(blocks_wanted(3584, 4608), 2);
    }

    #[test]
    fn zeroes_unmap_whole_blocks_and_write_the_edges() {
        let hole = Work::Zeroes { hole: true };
        assert_eq!(background_piece(hole, 512, 9000 / 512 * 512), (4096, false));
        assert_eq!(background_piece(hole, 4096, 8704), (8192, true));
        assert_eq!(background_piece(hole, 8192, 8704), (8704, false));
        assert_eq!(background_piece(Work::Discard, 0, 2 * STRIPE), (STRIPE, true));
    }
}
