//! The block map of one shard: which data block holds each block of each volume.
//!
//! Step 5 of the flow on the primary, step 6 on the secondary: a committed delta changes the map,
//! and its root must be equal on both sides. Reads look blocks up here.
//!
//! ```text
//! volume -> { whole stripes:  segment number -> Segment (512 slots)
//!           { other stripes:  Leaves -> Leaf (some hundred mapped blocks, packed) }
//! ```
//!
//! Invariants: no segment is empty; the root is the wrapping sum of all entries' hashes; there
//! are at most `segments_max` segments. A stripe is kept as a [`Segment`] from when all of its
//! blocks are mapped until fewer than [`WHOLE_BLOCKS_MIN`] are, and is in the leaves otherwise:
//! which of the two shows in nothing but memory and time.

mod bits;
mod leaf;
mod leaves;

use self::leaves::Leaves;
use crate::segment::{POINTER_UNMAPPED, Segment, Slot, entry_hash};
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
    volumes: Vec<(VolumeId, VolumeMap)>,
    segments: usize,
    segments_max: usize,
    mapped_blocks: u64,
    root: u128,
}

/// Fewest mapped blocks of a stripe that is kept as a segment: that many segments' slots and
/// their index cost 8 bytes for each mapped block.
const WHOLE_BLOCKS_MIN: u16 = 507;

type Segments = HashMap<u64, Box<Segment>, BuildHasherDefault<SegmentHasher>>;

#[derive(Clone, Debug, Default)]
struct VolumeMap {
    whole: Segments,
    sparse: Leaves,
}

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
        let stripes = self.volume(volume)?;
        match stripes.whole.get(&(block.0 / SEGMENT_BLOCKS)) {
            Some(segment) => segment.get((block.0 % SEGMENT_BLOCKS) as usize),
            None => stripes.sparse.get(block),
        }
    }

    /// Changes where a block lies and returns where it lay.
    ///
    /// # Panics
    /// If the map has `segments_max` segments and would need another: ask
    /// [`BlockMap::would_exceed`] before. If the new block's number does not fit 30 bits.
    pub fn set(&mut self, volume: VolumeId, block: LocalBlock, new: Option<Slot>) -> Option<Slot> {
        let index = match self.volume_index(volume) {
            Err(_) if new.is_none() => return None,
            Err(index) => self.insert_volume(index, volume),
            Ok(index) => index,
        };
        let stripes = &mut self.volumes[index].1;
        let number = block.0 / SEGMENT_BLOCKS;
        let old = if let Some(segment) = stripes.whole.get_mut(&number) {
            let hash_before = segment.hash();
            let old = segment.set((block.0 % SEGMENT_BLOCKS) as usize, new);
            self.root = self.root.wrapping_sub(hash_before).wrapping_add(segment.hash());
            if segment.mapped() < WHOLE_BLOCKS_MIN {
                stripes.leave_whole(number);
            }
            old
        } else {
            let hash = |slot: Slot| entry_hash(volume, block, slot);
            let old = match new {
                Some(new) => stripes.insert_sparse(volume, block, new),
                None => stripes.sparse.remove(block),
            };
            self.root = self.root.wrapping_sub(old.map_or(0, hash));
            self.root = self.root.wrapping_add(new.map_or(0, hash));
            if old.is_some() != new.is_some() && stripes.has_no_other(block) {
                self.count_segment(index, new.is_some());
            }
            old
        };
        self.mapped_blocks =
            self.mapped_blocks + u64::from(new.is_some()) - u64::from(old.is_some());
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
        self.volume(volume).is_some_and(|stripes| {
            stripes.whole.contains_key(&segment) || stripes.sparse.stripe(segment).next().is_some()
        })
    }

    /// A copy of a segment.
    #[must_use]
    pub fn segment(&self, volume: VolumeId, segment: u64) -> Option<Segment> {
        let stripes = self.volume(volume)?;
        if let Some(whole) = stripes.whole.get(&segment) {
            return Some(**whole);
        }
        let mut entries = stripes.sparse.stripe(segment).peekable();
        entries.peek()?;
        Some(collect_segment(volume, segment, entries))
    }

    /// The keys of all segments, sorted.
    #[must_use]
    pub fn segment_keys(&self) -> Vec<SegmentKey> {
        let mut keys = Vec::with_capacity(self.segments);
        for (volume, stripes) in &self.volumes {
            let volume = *volume;
            keys.extend(
                stripes.numbers().into_iter().map(|segment| SegmentKey { volume, segment }),
            );
        }
        keys
    }

    /// The numbers of a volume's segments, sorted.
    #[must_use]
    pub fn volume_segments(&self, volume: VolumeId) -> Vec<u64> {
        self.volume(volume).map_or_else(Vec::new, VolumeMap::numbers)
    }

    /// The volumes that have a mapped block, sorted.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.volumes.iter().map(|(volume, _)| *volume)
    }

    /// Bit `i` tells whether block `i` of the segment is mapped.
    #[must_use]
    pub fn mapped_bits(&self, volume: VolumeId, segment: u64) -> [u64; 8] {
        let mut bits = [0; 8];
        let Some(stripes) = self.volume(volume) else { return bits };
        if let Some(whole) = stripes.whole.get(&segment) {
            return whole.mapped_bits();
        }
        for (block, _) in stripes.sparse.stripe(segment) {
            let slot = (block.0 % SEGMENT_BLOCKS) as usize;
            bits[slot / 64] |= 1 << (slot % 64);
        }
        bits
    }

    /// Puts a loaded segment in its place.
    ///
    /// # Panics
    /// If the segment is empty, is not the key's, is there already, or is one too many.
    pub fn insert_segment(&mut self, key: SegmentKey, segment: Segment) {
        assert!(segment.mapped() > 0, "{key:?} is empty");
        assert_eq!((segment.volume(), segment.number()), (key.volume, key.segment));
        assert!(!self.has_segment(key.volume, key.segment), "{key:?} is there already");
        let index = self.volume_index(key.volume);
        let index = index.unwrap_or_else(|index| self.insert_volume(index, key.volume));
        self.count_segment(index, true);
        self.root = self.root.wrapping_add(segment.hash());
        self.mapped_blocks += u64::from(segment.mapped());
        let stripes = &mut self.volumes[index].1;
        if u64::from(segment.mapped()) == SEGMENT_BLOCKS {
            stripes.whole.insert(key.segment, Box::new(segment));
        } else {
            stripes.sparse.insert_stripe(&segment.iter().collect::<Vec<_>>());
        }
    }

    /// Memory of the map, in bytes: all that is allocated, used or not, and the allocator's
    /// overhead.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let list = heap_bytes(self.volumes.capacity() * size_of::<(VolumeId, VolumeMap)>());
        let volumes = self.volumes.iter().map(|(_, stripes)| stripes.heap_bytes());
        size_of::<BlockMap>() + list + volumes.sum::<usize>()
    }

    fn volume(&self, volume: VolumeId) -> Option<&VolumeMap> {
        self.volume_index(volume).ok().map(|index| &self.volumes[index].1)
    }

    fn volume_index(&self, volume: VolumeId) -> Result<usize, usize> {
        self.volumes.binary_search_by_key(&volume, |(volume, _)| *volume)
    }

    fn insert_volume(&mut self, index: usize, volume: VolumeId) -> usize {
        self.volumes.insert(index, (volume, VolumeMap::default()));
        index
    }

    /// A segment came to a volume, or left it.
    fn count_segment(&mut self, index: usize, came: bool) {
        if came {
            assert!(self.segments < self.segments_max, "more than {} segments", self.segments_max);
            self.segments += 1;
        } else {
            self.segments -= 1;
            let stripes = &self.volumes[index].1;
            if stripes.whole.is_empty() && stripes.sparse.is_empty() {
                self.volumes.remove(index);
            }
        }
    }
}

impl VolumeMap {
    /// Maps a block of a stripe that is not whole, and returns where it lay. The stripe may be
    /// whole then.
    fn insert_sparse(&mut self, volume: VolumeId, block: LocalBlock, new: Slot) -> Option<Slot> {
        assert!(new.block.0 < POINTER_UNMAPPED, "data block {}", new.block);
        let (old, entries) = self.sparse.insert(block, new);
        if let Some(entries) = entries {
            let number = block.0 / SEGMENT_BLOCKS;
            let segment = collect_segment(volume, number, entries.into_iter());
            self.whole.insert(number, Box::new(segment));
        }
        old
    }

    /// A whole stripe lost some blocks.
    fn leave_whole(&mut self, number: u64) {
        let segment = self.whole.remove(&number).expect("the stripe was whole");
        self.sparse.insert_stripe(&segment.iter().collect::<Vec<_>>());
        if self.whole.capacity() > 4 * self.whole.len() {
            self.whole.shrink_to(2 * self.whole.len());
        }
    }

    /// Whether no other block of this block's stripe is mapped.
    fn has_no_other(&self, block: LocalBlock) -> bool {
        let number = block.0 / SEGMENT_BLOCKS;
        self.sparse.stripe(number).all(|(other, _)| other == block)
            && !self.whole.contains_key(&number)
    }

    fn numbers(&self) -> Vec<u64> {
        let mut numbers = self.sparse.stripes();
        numbers.extend(self.whole.keys());
        numbers.sort_unstable();
        numbers
    }

    fn heap_bytes(&self) -> usize {
        /// A hash table's entry: number, pointer and one control byte.
        const ENTRY_BYTES: usize = size_of::<(u64, Box<Segment>)>() + 1;
        let index = match self.whole.capacity() {
            0 => 0,
            capacity => (capacity * 8).div_ceil(7).next_power_of_two() * ENTRY_BYTES + 32,
        };
        index + self.whole.len() * heap_bytes(size_of::<Segment>()) + self.sparse.heap_bytes()
    }
}

fn collect_segment(
    volume: VolumeId,
    number: u64,
    entries: impl Iterator<Item = (LocalBlock, Slot)>,
) -> Segment {
    let mut segment = Segment::new(volume, number);
    for (block, slot) in entries {
        segment.set((block.0 % SEGMENT_BLOCKS) as usize, Some(slot));
    }
    segment
}

/// What the allocator takes for so many bytes: 8 bytes of head, all rounded up to 16.
fn heap_bytes(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { (bytes + 8).next_multiple_of(16).max(32) }
}

/// Two maps are equal if they map the same blocks; their limits may differ.
impl PartialEq for BlockMap {
    fn eq(&self, other: &BlockMap) -> bool {
        let counts = |map: &BlockMap| (map.root, map.mapped_blocks, map.segments);
        counts(self) == counts(other)
            && self.segment_keys().into_iter().all(|key| {
                self.segment(key.volume, key.segment) == other.segment(key.volume, key.segment)
            })
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

    proptest! {
        #[test]
        fn stripes_that_fill_and_empty_in_runs_behave_like_a_tree(
            steps in prop::collection::vec(
                (0u64..24, 0u64..512, prop_oneof![Just(512u64), 1u64..40, 400u64..513], any::<bool>()),
                1..120,
            )
        ) {
            let volume = VolumeId(1);
            let mut map = BlockMap::new(64);
            let mut model = BTreeMap::new();
            for (number, (stripe, from, count, is_written)) in steps.into_iter().enumerate() {
                let from = if count == 512 { 0 } else { from };
                let first = stripe * SEGMENT_BLOCKS + from;
                for block in (first..first + count).map(LocalBlock) {
                    let content = is_written.then(|| slot(number as u32 * 1024 + block.0 as u32));
                    let old = match content {
                        Some(content) => model.insert(block, content),
                        None => model.remove(&block),
                    };
                    prop_assert_eq!(map.set(volume, block, content), old);
                }
                for (block, slot) in &model {
                    prop_assert_eq!(map.get(volume, *block), Some(*slot), "block {}", block);
                }
            }
            prop_assert_eq!(map.mapped_blocks(), model.len() as u64);
        }
    }

    #[test]
    fn a_stripe_that_leaves_the_whole_ones_goes_before_a_leaf_whose_first_stripe_is_gone() {
        let volume = VolumeId(1);
        let block = |stripe: u64, at: u64| LocalBlock(stripe * SEGMENT_BLOCKS + at);
        let mut map = BlockMap::new(64);
        for at in 0..SEGMENT_BLOCKS {
            map.set(volume, block(5, at), Some(slot(at as u32)));
        }
        // One leaf from stripe 0 on, then without it: nothing of stripe 0 is left but the leaf's base.
        for at in 0..4 {
            map.set(volume, block(0, at), Some(slot(600 + at as u32)));
            map.set(volume, block(9, at), Some(slot(700 + at as u32)));
        }
        for at in 0..4 {
            map.set(volume, block(0, at), None);
        }
        // Discarded from its start: the whole stripe becomes a sparse one.
        for at in 0..SEGMENT_BLOCKS {
            map.set(volume, block(5, at), None);
            assert_eq!(map.get(volume, block(9, 0)), Some(slot(700)), "after {at} blocks");
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

    /// Bytes that blocks may cost: checksum, pointer and number, packed, and `extra` bytes more.
    fn bound(mapped: u64, per_stripe: f64, pointer_bits: u32, extra: f64) -> f64 {
        const FIXED_BYTES: f64 = 4096.0;
        let bits = 34.0 + f64::from(pointer_bits) + (512.0 / per_stripe).log2();
        mapped as f64 * (bits / 8.0 + extra) + FIXED_BYTES
    }

    #[test]
    fn memory_follows_the_mapped_blocks_at_every_density() {
        let mut number = 7u64;
        let mut random = move || {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040);
            number >> 33
        };
        for pointer_bits in [18u32, 22, 26, 30] {
            for per_stripe in [1u64, 2, 4, 16, 64, 128, 256, 384, 448, 500, 511, 512] {
                let stripes = (20_000 / per_stripe).max(40);
                let places = (0..stripes * per_stripe).map(|index| {
                    let (stripe, place) = (index / per_stripe, index % per_stripe);
                    LocalBlock(stripe * 512 + (place * 205 + stripe * 77) % 512)
                });
                let mut places: Vec<LocalBlock> = places.collect();
                for index in (1..places.len()).rev() {
                    places.swap(index, random() as usize % (index + 1));
                }
                let mut map = BlockMap::new(1 << 24);
                for place in &places {
                    let pointer = random() as u32 % ((1 << pointer_bits) - 1);
                    map.set(VolumeId(1), *place, Some(slot(pointer)));
                }
                let (bytes, mapped) = (map.memory_bytes() as f64, map.mapped_blocks());
                let what = format!("{pointer_bits} bits, {per_stripe} in each stripe");
                println!("{what}: {:.2} bytes a block", bytes / mapped as f64);
                let is_packed = bytes <= bound(mapped, per_stripe as f64, pointer_bits, 0.5);
                assert!(is_packed || per_stripe == 512, "{what}: {bytes}");
                if pointer_bits == 18 || per_stripe == 512 {
                    assert!(bytes <= 8.0 * mapped as f64 + 4096.0, "{what}");
                }
                let half = places.len() / 2;
                places[half..].iter().for_each(|place| drop_block(&mut map, *place));
                let (bytes, mapped) = (map.memory_bytes() as f64, map.mapped_blocks());
                let left = per_stripe as f64 / 2.0;
                assert!(
                    bytes <= bound(mapped, left, pointer_bits, 1.25),
                    "half of {what}: {bytes}"
                );
                places[..half].iter().for_each(|place| drop_block(&mut map, *place));
                assert!(map.memory_bytes() < 1024 && map.root() == Root(0), "{what}: not empty");
            }
        }
    }

    fn drop_block(map: &mut BlockMap, block: LocalBlock) {
        assert!(map.set(VolumeId(1), block, None).is_some());
    }

    #[test]
    fn a_huge_volume_with_few_blocks_is_cheap() {
        let mut map = BlockMap::new(1 << 20);
        for index in 0..1000u64 {
            map.set(VolumeId(1), LocalBlock(index * ((1 << 34) / 1000)), Some(slot(index as u32)));
        }
        assert!(map.memory_bytes() <= 16 * 1000 + 4096, "{}", map.memory_bytes());
    }

    #[test]
    fn a_stripe_is_whole_and_not_whole_in_turns() {
        let mut map = BlockMap::new(4);
        let block = |index: u64| LocalBlock(512 + index);
        map.set(VolumeId(1), LocalBlock(3), Some(slot(3)));
        map.set(VolumeId(1), LocalBlock(1030), Some(slot(4)));
        for round in 0..3u32 {
            for index in 0..512 {
                map.set(VolumeId(1), block(index), Some(slot(round * 1000 + index as u32)));
            }
            assert_eq!(map.segment(VolumeId(1), 1).unwrap().mapped(), 512);
            assert_eq!((map.segments(), map.volumes[0].1.whole.len()), (3, 1));
            (0..5).for_each(|index| drop_block(&mut map, block(index * 100)));
            assert_eq!((map.segments(), map.volumes[0].1.whole.len()), (3, 1));
            drop_block(&mut map, block(511));
            assert_eq!((map.segments(), map.volumes[0].1.whole.len()), (3, 0));
            assert_eq!(map.segment(VolumeId(1), 1).unwrap().mapped(), 506);
            assert_eq!(map.get(VolumeId(1), block(100)), None);
            assert_eq!(map.get(VolumeId(1), block(7)), Some(slot(round * 1000 + 7)));
            let mut copy = BlockMap::new(4);
            for key in map.segment_keys() {
                copy.insert_segment(key, map.segment(key.volume, key.segment).unwrap());
            }
            assert!(copy == map);
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
