//! A request of the kernel, checked. Step 1 of the flow; [`crate::cut`] makes pieces of it.
//!
//! Invariant: a checked request lies inside its volume and is whole sectors; a discard is whole blocks.

use twinpoint_core::units::SECTOR_BYTES;

use super::abi::{self, Descriptor};
use crate::cut::{BLOCK, block_floor};

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
}
