//! A shard's list of map segments: which slot of the map zone holds each, and its checksum.
//!
//! A map checkpoint writes changed segments to free slots, then the directory to the area that is
//! not in use, then the [`crate::shard_header`] that names the area and the directory's checksum.
//! So the old map stays whole until the header is written. Shard 0's directory also has the
//! catalog.
//!
//! Invariants: entries ascend by volume and segment; no slot is named twice; the directory fits
//! the area that the geometry gives it.

use crate::block_map::SegmentKey;
use crate::catalog::Catalog;
use crate::codec::{FormatError, FormatErrorKind, Reader, Writer};
use crate::geometry::{DIRECTORY_ENTRY_BYTES, Geometry, MapSlot};
use crate::limits::{CATALOG_BYTES_MAX, SEGMENT_NUMBERS_MAX, SEGMENTS_MAX};
use crate::units::{BLOCK_BYTES, VolumeId};

/// First bytes of a directory.
pub const DIRECTORY_MAGIC: [u8; 8] = *b"TWPTDIRY";
/// Version of the encoding.
pub const DIRECTORY_VERSION: u16 = 1;
/// Bytes before the first entry.
pub const DIRECTORY_HEAD_BYTES: usize = 32;

/// Where one map segment lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirectoryEntry {
    /// The segment's volume.
    pub volume: VolumeId,
    /// The segment's number: local block / 512.
    pub segment: u64,
    /// The slot that holds it.
    pub slot: MapSlot,
    /// [`crate::codec::structure_checksum`] of the slot's 4096 bytes.
    pub checksum: u64,
}

impl DirectoryEntry {
    /// What names the segment.
    #[must_use]
    pub fn key(&self) -> SegmentKey {
        SegmentKey { volume: self.volume, segment: self.segment }
    }
}

/// The directory's only encoding, padded to whole blocks. The shard's header keeps its length and
/// its [`crate::codec::structure_checksum`].
///
/// # Panics
/// If the entries do not ascend, or are too many for any geometry.
#[must_use]
pub fn encode(entries: &[DirectoryEntry], catalog: &Catalog) -> Vec<u8> {
    assert!(entries.len() <= SEGMENTS_MAX as usize, "{} entries", entries.len());
    assert!(entries.is_sorted_by(|a, b| a.key() < b.key()), "directory entries do not ascend");
    let catalog = catalog.encode();
    let entries_bytes = entries.len() * DIRECTORY_ENTRY_BYTES as usize;
    let mut writer =
        Writer::with_capacity(DIRECTORY_HEAD_BYTES + entries_bytes + catalog.len() + BLOCK_BYTES);
    writer.put_bytes(&DIRECTORY_MAGIC);
    writer.put_u16(DIRECTORY_VERSION);
    writer.put_u16(0);
    writer.put_u32(entries.len() as u32);
    writer.put_u32(catalog.len() as u32);
    writer.pad_to(DIRECTORY_HEAD_BYTES);
    for entry in entries {
        writer.put_u32(entry.volume.0);
        writer.put_u32(entry.slot.0);
        writer.put_u64(entry.segment);
        writer.put_u64(entry.checksum);
        writer.put_u64(0);
    }
    writer.put_bytes(&catalog);
    writer.pad_to_multiple(BLOCK_BYTES);
    writer.finish()
}

/// Reads a directory of a shard with this geometry. The caller has compared its checksum with the
/// header's.
///
/// # Errors
/// If the bytes are not what [`encode`] makes, or exceed the geometry.
pub fn decode(
    bytes: &[u8],
    geometry: &Geometry,
) -> Result<(Vec<DirectoryEntry>, Catalog), FormatError> {
    let field = |offset| FormatError::new(FormatErrorKind::Field, offset);
    let mut reader = Reader::new(bytes);
    if reader.get_bytes(8)? != DIRECTORY_MAGIC {
        return Err(FormatError::new(FormatErrorKind::Magic, 0));
    }
    if reader.get_u16()? != DIRECTORY_VERSION {
        return Err(FormatError::new(FormatErrorKind::Version, 8));
    }
    reader.get_reserved(2)?;
    let count = reader.get_u32()?;
    let catalog_bytes = reader.get_u32()? as usize;
    reader.get_reserved(DIRECTORY_HEAD_BYTES - reader.position())?;
    if count > geometry.segments_max() {
        return Err(field(12));
    }
    if catalog_bytes > CATALOG_BYTES_MAX {
        return Err(field(16));
    }
    let used =
        DIRECTORY_HEAD_BYTES + count as usize * DIRECTORY_ENTRY_BYTES as usize + catalog_bytes;
    if bytes.len() != used.next_multiple_of(BLOCK_BYTES) {
        return Err(FormatError::new(FormatErrorKind::Length, bytes.len()));
    }
    let entries = decode_entries(&mut reader, count, geometry)?;
    let offset = reader.position();
    let catalog = Catalog::decode(reader.get_bytes(catalog_bytes)?)
        .map_err(|error| FormatError::new(error.kind, offset + error.offset))?;
    reader.get_reserved(reader.remaining())?;
    Ok((entries, catalog))
}

fn decode_entries(
    reader: &mut Reader<'_>,
    count: u32,
    geometry: &Geometry,
) -> Result<Vec<DirectoryEntry>, FormatError> {
    let mut entries: Vec<DirectoryEntry> = Vec::with_capacity(count as usize);
    let mut slots_named = vec![0u64; geometry.map_slots.div_ceil(64) as usize];
    for _ in 0..count {
        let field = FormatError::new(FormatErrorKind::Field, reader.position());
        let entry = DirectoryEntry {
            volume: VolumeId(reader.get_u32()?),
            slot: MapSlot(reader.get_u32()?),
            segment: reader.get_u64()?,
            checksum: reader.get_u64()?,
        };
        reader.get_reserved(8)?;
        let in_order = entries.last().is_none_or(|before| before.key() < entry.key());
        let possible = entry.volume.0 > 0 && entry.segment < SEGMENT_NUMBERS_MAX;
        if !in_order || !possible || entry.slot.0 >= geometry.map_slots {
            return Err(field);
        }
        let (word, bit) = (entry.slot.0 as usize / 64, 1 << (entry.slot.0 % 64));
        if slots_named[word] & bit != 0 {
            return Err(field);
        }
        slots_named[word] |= bit;
        entries.push(entry);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_directory_fits_its_area() {
        let geometry = Geometry::plan(64 * 256, 2, None, None).unwrap();
        let mut catalog = Catalog::new();
        for index in 0..crate::limits::VOLUMES_MAX {
            catalog.create(&format!("{index:_>64}"), 4096).unwrap();
        }
        let entry = |index| DirectoryEntry {
            volume: VolumeId(1),
            segment: u64::from(index),
            slot: MapSlot(index * 2),
            checksum: 77,
        };
        let entries: Vec<_> = (0..geometry.segments_max()).map(entry).collect();
        let bytes = encode(&entries, &catalog);
        assert_eq!(bytes.len(), geometry.directory_blocks as usize * BLOCK_BYTES);
        assert_eq!(decode(&bytes, &geometry), Ok((entries.clone(), catalog)));

        let mut twice = entries.clone();
        twice[5].slot = twice[4].slot;
        assert!(decode(&encode(&twice, &Catalog::new()), &geometry).is_err());
        let one_more: Vec<_> = (0..=geometry.segments_max()).map(entry).collect();
        assert!(decode(&encode(&one_more, &Catalog::new()), &geometry).is_err());
    }
}
