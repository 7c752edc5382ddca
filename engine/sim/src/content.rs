//! What clients write: each sector tells which write it came from and where it belongs.
//!
//! Invariants: value 0 is a sector of zeroes; a sector that is torn, misplaced or made of other bytes has no value.

use std::rc::Rc;

use twinpoint_core::units::{BLOCK_BYTES, Checksum, SECTOR_BYTES};

use crate::random::mix;

/// The bytes of one block, shared by all who hold them.
pub(crate) type Block = Rc<[u8; BLOCK_BYTES]>;

/// A block of zeroes.
pub(crate) fn zero_block() -> Block {
    Rc::new([0; BLOCK_BYTES])
}

/// CRC32C of a block.
pub(crate) fn checksum(block: &[u8]) -> Checksum {
    Checksum(crc_fast::crc32_iscsi(block))
}

/// Fills a sector with what write `value` puts at `sector` of `volume`.
pub(crate) fn fill_sector(bytes: &mut [u8], volume: u32, sector: u64, value: u64) {
    let key = mix(value ^ mix(u64::from(volume) << 40 ^ sector));
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let number = if index == 0 { value } else { key.wrapping_add(index as u64) };
        word.copy_from_slice(&number.to_le_bytes());
    }
}

/// Which write a sector came from; none if no write put these bytes there.
pub(crate) fn sector_value(bytes: &[u8], volume: u32, sector: u64) -> Option<u64> {
    let first: [u8; 8] = bytes[..8].try_into().expect("a sector has eight bytes");
    let value = u64::from_le_bytes(first);
    if value == 0 {
        return bytes.iter().all(|byte| *byte == 0).then_some(0);
    }
    let mut expected = [0; SECTOR_BYTES];
    fill_sector(&mut expected, volume, sector, value);
    (bytes == expected).then_some(value)
}
