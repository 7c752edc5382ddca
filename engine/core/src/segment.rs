//! One map segment: where the blocks of one stripe lie, and their checksums.
//!
//! The unit of a map checkpoint and of comparing maps. In memory it takes at most 4096 bytes, so
//! the map costs 8 bytes per block of a stripe that is whole; stripes with fewer blocks are packed
//! by [`crate::block_map`]. On the store it takes one block of the shard's map zone.
//!
//! Invariants: the hash is the wrapping sum of [`entry_hash`] over the mapped slots, and `mapped`
//! their count; an unmapped slot has pointer [`POINTER_UNMAPPED`] and checksum 0. Sums make an
//! update cost two entry hashes whatever the size of the map, and any part of a map comparable
//! with the same part of another. Nobody chooses blocks against the hash, so a sum is enough.

use crate::codec::{FormatError, FormatErrorKind, Reader, Writer, check_sealed, seal};
use crate::limits::SEGMENT_NUMBERS_MAX;
use crate::units::{BLOCK_BYTES, Checksum, DataBlock, LocalBlock, SEGMENT_BLOCKS, VolumeId};
use xxhash_rust::xxh3::xxh3_128;

/// First bytes of an encoded segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"TWPTSEGM";
/// Version of the encoding.
pub const SEGMENT_VERSION: u16 = 1;
/// Where an encoded segment's checksum lies.
pub const SEGMENT_CHECKSUM_OFFSET: usize = 56;
/// Where an encoded segment's 512 block checksums begin.
pub const SEGMENT_CHECKSUMS_OFFSET: usize = 64;
/// Where an encoded segment's 512 pointers of 30 bits begin.
pub const SEGMENT_POINTERS_OFFSET: usize = SEGMENT_CHECKSUMS_OFFSET + SLOTS * 4;
/// Where an encoded segment's reserved tail begins.
pub const SEGMENT_END_OFFSET: usize = SEGMENT_POINTERS_OFFSET + POINTER_WORDS * 8;
/// The pointer of an unmapped slot.
pub const POINTER_UNMAPPED: u32 = (1 << POINTER_BITS) - 1;

const SLOTS: usize = SEGMENT_BLOCKS as usize;
const POINTER_BITS: usize = 30;
const POINTER_WORDS: usize = SLOTS * POINTER_BITS / 64;

const _: () = assert!(SLOTS * POINTER_BITS == POINTER_WORDS * 64);
const _: () = assert!(SEGMENT_CHECKSUM_OFFSET + 8 == SEGMENT_CHECKSUMS_OFFSET);
const _: () = assert!(SEGMENT_END_OFFSET <= BLOCK_BYTES);
const _: () = assert!(size_of::<Segment>() <= 4000);
const _: () = assert!(crate::limits::DATA_BLOCKS_USABLE_MAX <= POINTER_UNMAPPED);

/// Where a block of a volume lies, and what it must hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Slot {
    /// The block of the shard's data zone.
    pub block: DataBlock,
    /// CRC32C of its 4096 bytes.
    pub checksum: Checksum,
}

/// The map of 512 consecutive local blocks of one volume. A plain value: who asks the map for a
/// segment gets a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pointers: [u64; POINTER_WORDS],
    checksums: [u32; SLOTS],
    hash: u128,
    number: u64,
    volume: VolumeId,
    mapped: u16,
}

impl Segment {
    /// An empty segment.
    ///
    /// # Panics
    /// If `number` (local block / 512) exceeds [`SEGMENT_NUMBERS_MAX`].
    #[must_use]
    pub fn new(volume: VolumeId, number: u64) -> Segment {
        assert!(number < SEGMENT_NUMBERS_MAX, "segment number {number}");
        Segment {
            pointers: [u64::MAX; POINTER_WORDS],
            checksums: [0; SLOTS],
            hash: 0,
            number,
            volume,
            mapped: 0,
        }
    }

    /// The volume whose blocks are mapped here.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The segment's number in its volume and shard: local block / 512.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// How many slots are mapped.
    #[must_use]
    pub fn mapped(&self) -> u16 {
        self.mapped
    }

    /// The wrapping sum of the entries' hashes; 0 if none is mapped.
    #[must_use]
    #[inline]
    pub fn hash(self) -> u128 {
        self.hash
    }

    /// The slot's content.
    ///
    /// # Panics
    /// If `slot` is not below 512.
    #[must_use]
    pub fn get(&self, slot: usize) -> Option<Slot> {
        let pointer = self.pointer(slot);
        let checksum = Checksum(self.checksums[slot]);
        (pointer != POINTER_UNMAPPED).then_some(Slot { block: DataBlock(pointer), checksum })
    }

    /// Changes the slot's content and returns the old one.
    ///
    /// # Panics
    /// If `slot` is not below 512, or the new block's number does not fit 30 bits.
    pub fn set(&mut self, slot: usize, new: Option<Slot>) -> Option<Slot> {
        let old = self.get(slot);
        let local = LocalBlock(self.number * SEGMENT_BLOCKS + slot as u64);
        if let Some(old) = old {
            self.hash = self.hash.wrapping_sub(entry_hash(self.volume, local, old));
            self.mapped -= 1;
        }
        match new {
            Some(new) => {
                assert!(new.block.0 < POINTER_UNMAPPED, "data block {}", new.block);
                self.hash = self.hash.wrapping_add(entry_hash(self.volume, local, new));
                self.mapped += 1;
                self.set_pointer(slot, new.block.0);
                self.checksums[slot] = new.checksum.0;
            }
            None => {
                self.set_pointer(slot, POINTER_UNMAPPED);
                self.checksums[slot] = 0;
            }
        }
        old
    }

    /// Bit `i` tells whether slot `i` is mapped.
    #[must_use]
    pub fn mapped_bits(&self) -> [u64; SLOTS / 64] {
        let mut bits = [0u64; SLOTS / 64];
        if usize::from(self.mapped) == SLOTS {
            return [u64::MAX; SLOTS / 64];
        }
        for slot in 0..SLOTS {
            let mapped = self.pointer(slot) != POINTER_UNMAPPED;
            bits[slot / 64] |= u64::from(mapped) << (slot % 64);
        }
        bits
    }

    /// The mapped slots with their local blocks, in order.
    pub fn iter(self) -> impl Iterator<Item = (LocalBlock, Slot)> {
        let first = self.number * SEGMENT_BLOCKS;
        (0..SLOTS).filter_map(move |i| Some((LocalBlock(first + i as u64), self.get(i)?)))
    }

    /// The segment as one block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_capacity(BLOCK_BYTES);
        writer.put_bytes(&SEGMENT_MAGIC);
        writer.put_u16(SEGMENT_VERSION);
        writer.put_u16(self.mapped);
        writer.put_u32(self.volume.0);
        writer.put_u64(self.number);
        writer.put_u128(self.hash);
        writer.pad_to(SEGMENT_CHECKSUMS_OFFSET);
        self.checksums.iter().for_each(|checksum| writer.put_u32(*checksum));
        self.pointers.iter().for_each(|word| writer.put_u64(*word));
        writer.pad_to(BLOCK_BYTES);
        let mut bytes = writer.finish();
        seal(&mut bytes, SEGMENT_CHECKSUM_OFFSET);
        bytes
    }

    /// Reads a segment from one block, and computes its hash anew.
    ///
    /// # Errors
    /// If the block is not exactly what [`Segment::encode`] makes of a segment that is not empty.
    pub fn decode(bytes: &[u8]) -> Result<(VolumeId, u64, Segment), FormatError> {
        let magic = SEGMENT_MAGIC;
        check_sealed(bytes, BLOCK_BYTES, magic, SEGMENT_VERSION, SEGMENT_CHECKSUM_OFFSET)?;
        let mut reader = Reader::new(bytes);
        reader.get_bytes(10)?;
        let mapped = reader.get_u16()?;
        let volume = VolumeId(reader.get_u32()?);
        let number = reader.get_u64()?;
        let hash = reader.get_u128()?;
        reader.get_reserved(SEGMENT_CHECKSUM_OFFSET - reader.position())?;
        reader.get_u64()?;
        if volume.0 == 0 {
            return Err(FormatError::new(FormatErrorKind::Field, 12));
        }
        if number >= SEGMENT_NUMBERS_MAX {
            return Err(FormatError::new(FormatErrorKind::Field, 16));
        }
        let mut segment = Segment::new(volume, number);
        for checksum in &mut segment.checksums {
            *checksum = reader.get_u32()?;
        }
        for word in &mut segment.pointers {
            *word = reader.get_u64()?;
        }
        reader.get_reserved(BLOCK_BYTES - SEGMENT_END_OFFSET)?;
        segment.recount().map_err(|o| FormatError::new(FormatErrorKind::Field, o))?;
        if segment.mapped != mapped || mapped == 0 {
            return Err(FormatError::new(FormatErrorKind::Field, 10));
        }
        if segment.hash != hash {
            return Err(FormatError::new(FormatErrorKind::Field, 24));
        }
        Ok((volume, number, segment))
    }

    /// Computes hash and count from the slots. The error is the offset of an unmapped slot's
    /// checksum that is not 0.
    fn recount(&mut self) -> Result<(), usize> {
        self.hash = 0;
        self.mapped = 0;
        for slot in 0..SLOTS {
            if let Some(found) = self.get(slot) {
                let local = LocalBlock(self.number * SEGMENT_BLOCKS + slot as u64);
                self.hash = self.hash.wrapping_add(entry_hash(self.volume, local, found));
                self.mapped += 1;
            } else if self.checksums[slot] != 0 {
                return Err(SEGMENT_CHECKSUMS_OFFSET + slot * 4);
            }
        }
        Ok(())
    }

    fn pointer(&self, slot: usize) -> u32 {
        assert!(slot < SLOTS, "slot {slot}");
        let bit = slot * POINTER_BITS;
        let (word, shift) = (bit / 64, bit % 64);
        let mut value = self.pointers[word] >> shift;
        if shift + POINTER_BITS > 64 {
            value |= self.pointers[word + 1] << (64 - shift);
        }
        value as u32 & POINTER_UNMAPPED
    }

    fn set_pointer(&mut self, slot: usize, pointer: u32) {
        assert!(slot < SLOTS, "slot {slot}");
        assert!(pointer <= POINTER_UNMAPPED, "pointer {pointer}");
        let bit = slot * POINTER_BITS;
        let (word, shift) = (bit / 64, bit % 64);
        let mask = u64::from(POINTER_UNMAPPED);
        let value = u64::from(pointer);
        self.pointers[word] = self.pointers[word] & !(mask << shift) | value << shift;
        if shift + POINTER_BITS > 64 {
            let low = 64 - shift;
            self.pointers[word + 1] = self.pointers[word + 1] & !(mask >> low) | value >> low;
        }
    }
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segment")
            .field("volume", &self.volume)
            .field("number", &self.number)
            .field("mapped", &self.mapped)
            .field("hash", &format_args!("{:032x}", self.hash))
            .finish()
    }
}

/// The hash of one map entry: xxh3, 128 bits, of 24 packed bytes.
#[must_use]
pub fn entry_hash(volume: VolumeId, local: LocalBlock, slot: Slot) -> u128 {
    let mut packed = [0u8; 24];
    packed[..8].copy_from_slice(&local.0.to_le_bytes());
    packed[8..12].copy_from_slice(&volume.0.to_le_bytes());
    packed[12..16].copy_from_slice(&slot.block.0.to_le_bytes());
    packed[16..20].copy_from_slice(&slot.checksum.0.to_le_bytes());
    xxh3_128(&packed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(block: u32, checksum: u32) -> Slot {
        Slot { block: DataBlock(block), checksum: Checksum(checksum) }
    }

    proptest! {
        #[test]
        fn behaves_like_an_array(
            steps in prop::collection::vec(
                (0usize..SLOTS, prop::option::of((0u32..POINTER_UNMAPPED, any::<u32>()))),
                1..600,
            )
        ) {
            let mut segment = Segment::new(VolumeId(3), 77);
            let mut model = [None; SLOTS];
            for (index, content) in steps {
                let content = content.map(|(b, c)| slot(b, c));
                prop_assert_eq!(segment.set(index, content), model[index]);
                model[index] = content;
            }
            for (index, content) in model.iter().enumerate() {
                prop_assert_eq!(segment.get(index), *content);
                let bit = segment.mapped_bits()[index / 64] >> (index % 64) & 1;
                prop_assert_eq!(bit == 1, content.is_some());
            }
            let hash = segment.iter().fold(0u128, |sum, (local, slot)| {
                sum.wrapping_add(entry_hash(VolumeId(3), local, slot))
            });
            prop_assert_eq!(segment.hash(), hash);
            prop_assert_eq!(usize::from(segment.mapped()), model.iter().flatten().count());
        }
    }

    #[test]
    fn an_emptied_segment_is_like_new() {
        let mut segment = Segment::new(VolumeId(1), 0);
        (0..SLOTS).for_each(|i| assert_eq!(segment.set(i, Some(slot(i as u32, 9))), None));
        assert_eq!(segment.mapped(), 512);
        (0..SLOTS).for_each(|i| assert!(segment.set(i, None).is_some()));
        assert!(segment == Segment::new(VolumeId(1), 0));
    }

    #[test]
    fn a_wrong_hash_with_a_right_checksum_is_found() {
        let mut segment = Segment::new(VolumeId(1), 0);
        segment.set(5, Some(slot(8, 9)));
        let mut bytes = segment.encode();
        bytes[24] ^= 1;
        seal(&mut bytes, SEGMENT_CHECKSUM_OFFSET);
        let error = Segment::decode(&bytes).unwrap_err();
        assert_eq!(error, FormatError::new(FormatErrorKind::Field, 24));
        assert!(Segment::decode(&Segment::new(VolumeId(1), 0).encode()).is_err(), "empty");
    }
}
