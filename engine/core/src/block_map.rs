//! The block map of one shard: which data block holds each block of each volume.
//!
//! Step 5 of the flow on the primary, step 6 on the secondary: a committed delta changes the map,
//! and its root must be equal on both sides. Reads look blocks up here.
//!
//! ```text
//! volume -> { segment number -> Segment (512 slots) }
//! ```
//!
//! Invariants: no segment is empty; the root is the wrapping sum of the segments' hashes; there
//! are at most `segments_max` segments. Lists are sorted, so a map's history does not show.

use crate::segment::{Segment, Slot};
use crate::units::{LocalBlock, Root, SEGMENT_BLOCKS, VolumeId};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// What names a segment in a shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SegmentKey {
    /// The volume.
    pub volume: VolumeId,
    /// Local block / 512.
    pub segment: u64,
}

impl SegmentKey {
    /// The key of the segment that holds `block`.
    #[must_use]
    pub fn of(volume: VolumeId, block: LocalBlock) -> SegmentKey {
        SegmentKey { volume, segment: block.0 / SEGMENT_BLOCKS }
    }
}

/// The map of one shard.
#[derive(Clone, Debug)]
pub struct BlockMap {
    /// Sorted by volume; few, so a binary search costs less than a hash.
    volumes: Vec<(VolumeId, Segments)>,
    segments: usize,
    segments_max: usize,
    mapped_blocks: u64,
    root: u128,
}

type Segments = HashMap<u64, Box<Segment>, BuildHasherDefault<SegmentHasher>>;

impl BlockMap {
    /// An empty map that may hold `segments_max` segments.
    #[must_use]
    pub fn new(segments_max: u32) -> BlockMap {
        let segments_max = segments_max as usize;
        BlockMap { volumes: Vec::new(), segments: 0, segments_max, mapped_blocks: 0, root: 0 }
    }

    /// Where a block lies; nothing if it was never written, or was unmapped.
    #[must_use]
    pub fn get(&self, volume: VolumeId, block: LocalBlock) -> Option<Slot> {
        let segment = self.segment(volume, block.0 / SEGMENT_BLOCKS)?;
        segment.get((block.0 % SEGMENT_BLOCKS) as usize)
    }

    /// Changes where a block lies and returns where it lay.
    ///
    /// # Panics
    /// If the map has `segments_max` segments and would need another: ask
    /// [`BlockMap::would_exceed`] before.
    pub fn set(&mut self, volume: VolumeId, block: LocalBlock, new: Option<Slot>) -> Option<Slot> {
        let number = block.0 / SEGMENT_BLOCKS;
        let slot = (block.0 % SEGMENT_BLOCKS) as usize;
        if new.is_none() && !self.has_segment(volume, number) {
            return None;
        }
        let segment = self.segment_or_new(volume, number);
        let hash_before = segment.hash();
        let old = segment.set(slot, new);
        let (hash_after, emptied) = (segment.hash(), segment.mapped() == 0);
        self.root = self.root.wrapping_sub(hash_before).wrapping_add(hash_after);
        self.mapped_blocks =
            self.mapped_blocks + u64::from(new.is_some()) - u64::from(old.is_some());
        if emptied {
            self.remove_segment(volume, number);
        }
        old
    }

    /// The wrapping sum of all entries' hashes; 0 for the empty map.
    #[must_use]
    pub fn root(&self) -> Root {
        Root(self.root)
    }

    /// How many blocks are mapped.
    #[must_use]
    pub fn mapped_blocks(&self) -> u64 {
        self.mapped_blocks
    }

    /// How many segments there are.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.segments
    }

    /// Whether `new_segments` more segments are too many.
    #[must_use]
    pub fn would_exceed(&self, new_segments: usize) -> bool {
        new_segments > self.segments_max - self.segments
    }

    /// Whether a segment exists.
    #[must_use]
    pub fn has_segment(&self, volume: VolumeId, segment: u64) -> bool {
        self.segment(volume, segment).is_some()
    }

    /// A segment.
    #[must_use]
    pub fn segment(&self, volume: VolumeId, segment: u64) -> Option<&Segment> {
        let index = self.volume_index(volume).ok()?;
        self.volumes[index].1.get(&segment).map(|segment| &**segment)
    }

    /// The keys of all segments, sorted.
    #[must_use]
    pub fn segment_keys(&self) -> Vec<SegmentKey> {
        let mut keys = Vec::with_capacity(self.segments);
        for (volume, segments) in &self.volumes {
            let volume = *volume;
            keys.extend(segments.keys().map(|segment| SegmentKey { volume, segment: *segment }));
        }
        keys.sort_unstable();
        keys
    }

    /// The numbers of a volume's segments, sorted.
    #[must_use]
    pub fn volume_segments(&self, volume: VolumeId) -> Vec<u64> {
        let Ok(index) = self.volume_index(volume) else { return Vec::new() };
        let mut numbers: Vec<u64> = self.volumes[index].1.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    /// The volumes that have a mapped block, sorted.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.iter().map(|(volume, _)| *volume)
    }

    /// Bit `i` tells whether block `i` of the segment is mapped.
    #[must_use]
    pub fn mapped_bits(&self, volume: VolumeId, segment: u64) -> [u64; 8] {
        self.segment(volume, segment).map_or([0; 8], Segment::mapped_bits)
    }

    /// Puts a loaded segment in its place.
    ///
    /// # Panics
    /// If the segment is empty, is not the key's, is there already, or is one too many.
    pub fn insert_segment(&mut self, key: SegmentKey, segment: Segment) {
        assert!(segment.mapped() > 0, "{key:?} is empty");
        assert_eq!((segment.volume(), segment.number()), (key.volume, key.segment));
        assert!(!self.has_segment(key.volume, key.segment), "{key:?} is there already");
        let place = self.segment_or_new(key.volume, key.segment);
        let (hash, mapped) = (segment.hash(), segment.mapped());
        *place = segment;
        self.root = self.root.wrapping_add(hash);
        self.mapped_blocks += u64::from(mapped);
    }

    /// Memory of the map, in bytes: segments with the allocator's overhead, and their index.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        /// A box of the allocator: 8 bytes of head, all rounded up to 16.
        const BOX_BYTES: usize = (size_of::<Segment>() + 8).next_multiple_of(16);
        /// A hash table's entry: number, pointer and one control byte.
        const ENTRY_BYTES: usize = size_of::<(u64, Box<Segment>)>() + 1;
        let index = self.volumes.iter().map(|(_, segments)| {
            let buckets = (segments.capacity() * 8).div_ceil(7).next_power_of_two();
            buckets * ENTRY_BYTES + 32
        });
        let list = self.volumes.capacity() * size_of::<(VolumeId, Segments)>();
        size_of::<BlockMap>() + list + index.sum::<usize>() + self.segments * BOX_BYTES
    }

    fn volume_index(&self, volume: VolumeId) -> Result<usize, usize> {
        self.volumes.binary_search_by_key(&volume, |(volume, _)| *volume)
    }

    fn segment_or_new(&mut self, volume: VolumeId, number: u64) -> &mut Segment {
        let index = self.volume_index(volume).unwrap_or_else(|index| {
            self.volumes.insert(index, (volume, Segments::default()));
            index
        });
        let (count, count_max) = (&mut self.segments, self.segments_max);
        self.volumes[index].1.entry(number).or_insert_with(|| {
            assert!(*count < count_max, "more than {count_max} segments");
            *count += 1;
            Box::new(Segment::new(volume, number))
        })
    }

    fn remove_segment(&mut self, volume: VolumeId, number: u64) {
        let index = self.volume_index(volume).expect("the segment's volume is in the map");
        let segments = &mut self.volumes[index].1;
        let removed = segments.remove(&number);
        assert!(removed.is_some_and(|segment| segment.mapped() == 0), "segment {number}");
        if segments.is_empty() {
            self.volumes.remove(index);
        }
        self.segments -= 1;
    }
}

/// Two maps are equal if they map the same blocks; their limits may differ.
impl PartialEq for BlockMap {
    fn eq(&self, other: &BlockMap) -> bool {
        self.root == other.root && self.volumes == other.volumes
    }
}

/// Multiplies by an odd constant: segment numbers are small, dense and nobody's choice.
#[derive(Clone, Copy, Default, Debug)]
struct SegmentHasher(u64);

impl Hasher for SegmentHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The table takes its control bytes from the top bits and its index from the bottom ones.
        self.0 = mixed ^ mixed >> 32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::entry_hash;
    use crate::units::{Checksum, DataBlock};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn slot(block: u32) -> Slot {
        Slot { block: DataBlock(block), checksum: Checksum(!block) }
    }

    proptest! {
        #[test]
        fn behaves_like_a_tree(
            steps in prop::collection::vec(
                (1u32..4, 0u64..4000, prop::option::weighted(0.6, 0u32..1 << 29)),
                1..400,
            )
        ) {
            let mut map = BlockMap::new(64);
            let mut model = BTreeMap::new();
            for (volume, block, content) in steps {
                let key = (VolumeId(volume), LocalBlock(block));
                let content = content.map(slot);
                let old = match content {
                    Some(content) => model.insert(key, content),
                    None => model.remove(&key),
                };
                prop_assert_eq!(map.set(key.0, key.1, content), old);
            }
            let root = model.iter().fold(0u128, |sum, ((volume, block), slot)| {
                sum.wrapping_add(entry_hash(*volume, *block, *slot))
            });
            prop_assert_eq!(map.root(), Root(root));
            prop_assert_eq!(map.mapped_blocks(), model.len() as u64);
            let mut keys: Vec<_> = model.keys().map(|(v, b)| SegmentKey::of(*v, *b)).collect();
            keys.dedup();
            prop_assert_eq!(map.segments(), keys.len());
            prop_assert_eq!(map.segment_keys(), keys.clone());
            let mut copy = BlockMap::new(64);
            for key in keys {
                let bytes = map.segment(key.volume, key.segment).unwrap().encode();
                let (volume, segment, loaded) = Segment::decode(&bytes).unwrap();
                copy.insert_segment(SegmentKey { volume, segment }, loaded);
            }
            prop_assert_eq!(copy.root(), map.root());
            prop_assert!(copy == map);
            for ((volume, block), slot) in model {
                prop_assert_eq!(map.get(volume, block), Some(slot));
                map.set(volume, block, None);
            }
            prop_assert_eq!(map.root(), Root(0));
            prop_assert_eq!(map.segments(), 0);
        }
    }

    #[test]
    fn memory_of_full_segments_is_at_most_8_bytes_a_block() {
        for segments in [57u64, 1000, 1793, 4000] {
            let mut map = BlockMap::new(segments as u32);
            for block in 0..segments * SEGMENT_BLOCKS {
                map.set(VolumeId(1), LocalBlock(block), Some(slot(block as u32)));
            }
            let per_block = map.memory_bytes() as f64 / map.mapped_blocks() as f64;
            println!("{segments} full segments: {per_block:.3} bytes of map per block written");
            assert!(per_block <= 8.0, "{per_block}");
        }
    }

    #[test]
    fn limits_are_told_before_they_bind() {
        let mut map = BlockMap::new(2);
        map.set(VolumeId(1), LocalBlock(0), Some(slot(1)));
        assert!(!map.would_exceed(1));
        assert!(map.would_exceed(2));
        map.set(VolumeId(9), LocalBlock(512), Some(slot(2)));
        assert!(map.would_exceed(1) && !map.would_exceed(0));
        assert_eq!(map.volumes().collect::<Vec<_>>(), [VolumeId(1), VolumeId(9)]);
        assert_eq!(map.volume_segments(VolumeId(9)), [1]);
        assert_eq!(map.mapped_bits(VolumeId(9), 1)[0], 1);
        assert_eq!(map.set(VolumeId(2), LocalBlock(5), None), None);
        assert_eq!(map.segments(), 2);
    }
}
