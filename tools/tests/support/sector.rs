//! Sector: 512 bytes that tell which sector they belong to and which write they came from.
//!
//! ```text
//!   0  sector number: 8     8  sequence number of the write: 8     16  CRC32C of all other bytes: 4
//!  20  filler, from both numbers
//! ```
//!
//! Invariant: a sector that holds anything but zeroes or such contents is damage, and said so.

use super::random::Random;

/// Bytes of a sector: the smallest unit of a request.
pub const SECTOR_BYTES: usize = 512;
/// Sectors of a block, the unit of the store.
pub const BLOCK_SECTORS: u64 = 8;

/// What a sector was found to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sector {
    /// Zeroes.
    Zero,
    /// The write of this sequence number.
    Written(u64),
}

/// Contents of consecutive sectors as one write leaves them.
pub fn fill(first_sector: u64, sequence: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; sectors as usize * SECTOR_BYTES];
    for (index, sector) in bytes.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        let number = first_sector + index as u64;
        sector[..8].copy_from_slice(&number.to_le_bytes());
        sector[8..16].copy_from_slice(&sequence.to_le_bytes());
        let mut filler = Random::new(number ^ sequence.rotate_left(32));
        for word in sector[24..].chunks_exact_mut(8) {
            word.copy_from_slice(&filler.next().to_le_bytes());
        }
        let checksum = checksum(sector);
        sector[16..20].copy_from_slice(&checksum.to_le_bytes());
    }
    bytes
}

/// Reads consecutive sectors.
///
/// # Errors
/// The first sector whose contents no write of this sector made.
pub fn parse(first_sector: u64, bytes: &[u8]) -> Result<Vec<Sector>, String> {
    let sectors = bytes.chunks_exact(SECTOR_BYTES).enumerate();
    sectors.map(|(index, sector)| parse_one(first_sector + index as u64, sector)).collect()
}

fn parse_one(number: u64, bytes: &[u8]) -> Result<Sector, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(Sector::Zero);
    }
    let word = |at: usize| {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a sector holds these bytes"))
    };
    let (found, sequence) = (word(0), word(8));
    let stored = word(16) as u32;
    if stored != checksum(bytes) {
        return Err(format!("sector {number} is damaged: {:02x?}...", &bytes[..24]));
    }
    if found != number {
        return Err(format!("sector {number} holds sector {found} of write {sequence}"));
    }
    Ok(Sector::Written(sequence))
}

/// CRC32C of a sector without the checksum's own place.
fn checksum(sector: &[u8]) -> u32 {
    let crc = crc32c(!0, &sector[..16]);
    !crc32c(crc, &sector[20..])
}

fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(crc, |crc, byte| CRC_TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

static CRC_TABLE: [u32; 256] = crc_table();

const fn crc_table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ 0x82f6_3b78 } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}
