//! A shard's header: the last map checkpoint, and where the journal goes on behind it.
//!
//! Read at start, behind the superblock; written as the last step of a map checkpoint, two copies,
//! the newer valid one wins. A map checkpoint is a local matter of each side and each shard.
//!
//! Invariant: all that the header names was durable before it was written.

use crate::codec::{Damage, FormatError, FormatErrorKind, Reader, Writer};
use crate::codec::{check_sealed, choose_copy, seal};
use crate::geometry::Geometry;
use crate::units::{BLOCK_BYTES, CpNumber, Root, SHARDS_MAX, ShardId, StoreId};

/// First bytes of a shard's header.
pub const SHARD_HEADER_MAGIC: [u8; 8] = *b"TWPTSHRD";
/// Version of the encoding.
pub const SHARD_HEADER_VERSION: u16 = 1;
/// Where the checksum lies.
pub const SHARD_HEADER_CHECKSUM_OFFSET: usize = 120;

/// A place in a shard's journal, and what the record there must say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct JournalPosition {
    /// Block of the ring.
    pub index: u32,
    /// The record's sequence number.
    pub sequence: u64,
    /// The checksum of the record before it.
    pub previous: u64,
}

/// The last map checkpoint of a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardHeader {
    /// The store.
    pub store: StoreId,
    /// The shard.
    pub shard: ShardId,
    /// Counts the writings of the header.
    pub sequence: u64,
    /// The consistency point whose map the directory holds.
    pub checkpoint: CpNumber,
    /// The shard's root at that point.
    pub root: Root,
    /// Which of the two areas has the directory, 0 or 1.
    pub directory_area: u8,
    /// Length of the directory in bytes, a multiple of 4096.
    pub directory_bytes: u32,
    /// [`crate::codec::structure_checksum`] of the directory.
    pub directory_checksum: u64,
    /// The first record behind the checkpoint.
    pub journal: JournalPosition,
}

impl ShardHeader {
    /// The header as one block.
    ///
    /// # Panics
    /// If a field has a value that [`ShardHeader::decode`] would refuse.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        if let Err(error) = self.check_fields() {
            panic!("a shard header to encode has an {error}: {self:?}");
        }
        let mut writer = Writer::with_capacity(BLOCK_BYTES);
        writer.put_bytes(&SHARD_HEADER_MAGIC);
        writer.put_u16(SHARD_HEADER_VERSION);
        writer.put_u16(self.shard.0);
        writer.put_u32(u32::from(self.directory_area));
        writer.put_bytes(&self.store.0);
        writer.put_u64(self.sequence);
        writer.put_u64(self.checkpoint.0);
        writer.put_u128(self.root.0);
        writer.put_u64(self.directory_checksum);
        writer.put_u32(self.directory_bytes);
        writer.put_u32(self.journal.index);
        writer.put_u64(self.journal.sequence);
        writer.put_u64(self.journal.previous);
        writer.pad_to(BLOCK_BYTES);
        let mut bytes = writer.finish();
        seal(&mut bytes, SHARD_HEADER_CHECKSUM_OFFSET);
        bytes
    }

    /// Reads a header from one block.
    ///
    /// # Errors
    /// If the block is not exactly what [`ShardHeader::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<ShardHeader, FormatError> {
        let (magic, version) = (SHARD_HEADER_MAGIC, SHARD_HEADER_VERSION);
        check_sealed(bytes, BLOCK_BYTES, magic, version, SHARD_HEADER_CHECKSUM_OFFSET)?;
        let mut reader = Reader::new(bytes);
        reader.get_bytes(10)?;
        let shard = ShardId(reader.get_u16()?);
        let area = reader.get_u32()?;
        let directory_area =
            u8::try_from(area).map_err(|_| FormatError::new(FormatErrorKind::Field, 12))?;
        let store = StoreId(reader.get_array()?);
        let (sequence, checkpoint) = (reader.get_u64()?, CpNumber(reader.get_u64()?));
        let (root, directory_checksum) = (Root(reader.get_u128()?), reader.get_u64()?);
        let directory_bytes = reader.get_u32()?;
        let index = reader.get_u32()?;
        let journal =
            JournalPosition { index, sequence: reader.get_u64()?, previous: reader.get_u64()? };
        reader.get_reserved(SHARD_HEADER_CHECKSUM_OFFSET - reader.position())?;
        reader.get_u64()?;
        reader.get_reserved(reader.remaining())?;
        let header = ShardHeader {
            store,
            shard,
            sequence,
            checkpoint,
            root,
            directory_area,
            directory_bytes,
            directory_checksum,
            journal,
        };
        header.check_fields()?;
        Ok(header)
    }

    /// Of two copies takes the valid one with the higher sequence, and tells which is to be
    /// written again. A header of another store or shard, misdirected here, is not valid.
    ///
    /// # Errors
    /// The first copy's error if neither is valid; [`FormatErrorKind::Copies`] if they differ and
    /// neither is newer.
    pub fn choose(
        copies: [&[u8]; 2],
        store: StoreId,
        shard: ShardId,
    ) -> Result<(ShardHeader, Damage), FormatError> {
        let decode = |bytes: &[u8]| {
            let header = ShardHeader::decode(bytes)?;
            if header.store != store || header.shard != shard {
                return Err(FormatError::new(FormatErrorKind::Field, 10));
            }
            Ok(header)
        };
        choose_copy(copies.map(decode), |header| header.sequence)
    }

    /// Checks that what the header names lies inside its zones.
    ///
    /// # Errors
    /// [`FormatErrorKind::Field`] with the field's offset.
    pub fn check(&self, geometry: &Geometry) -> Result<(), FormatError> {
        let field = |offset| Err(FormatError::new(FormatErrorKind::Field, offset));
        if self.shard.0 >= geometry.shards {
            return field(10);
        }
        if self.directory_bytes as usize / BLOCK_BYTES > geometry.directory_blocks as usize {
            return field(72);
        }
        if self.journal.index >= geometry.journal_blocks {
            return field(76);
        }
        Ok(())
    }

    fn check_fields(&self) -> Result<(), FormatError> {
        let field = |offset| Err(FormatError::new(FormatErrorKind::Field, offset));
        if self.shard.0 >= SHARDS_MAX {
            return field(10);
        }
        if self.directory_area > 1 {
            return field(12);
        }
        let bytes = self.directory_bytes as usize;
        if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) {
            return field(72);
        }
        Ok(())
    }
}
