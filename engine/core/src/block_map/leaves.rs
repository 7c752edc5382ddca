//! The sparsely mapped stripes of one volume: leaves in the order of their blocks.
//!
//! Serves steps 5 and 6 of the flow, inside [`super::BlockMap`]. Two levels: chunks of at most
//! [`CHUNK_LEAVES_MAX`] leaves, and where each chunk begins. A leaf is found by two binary
//! searches.
//!
//! Invariants: no leaf and no chunk is empty; a stripe is in one leaf; all blocks of a leaf lie
//! before the base of the next one; leaves have fewer than
//! [`LEAF_BLOCKS_MAX`] blocks, and a leaf that shrinks is joined with a
//! neighbour if both together have at most [`MERGED_BLOCKS_MAX`], so that the index stays a small
//! share of the whole.

use super::heap_bytes;
use super::leaf::{Entry, LEAF_BLOCKS_MAX, Leaf};
use crate::segment::Slot;
use crate::units::{LocalBlock, SEGMENT_BLOCKS};

/// A chunk with as many leaves is divided.
const CHUNK_LEAVES_MAX: usize = 64;
/// Neighbours with no more blocks together become one. Far below the size of a leaf that is
/// divided, so that leaves are not divided and joined in turns.
pub const MERGED_BLOCKS_MAX: usize = 320;
/// Chunks and the list of them grow by this many places.
const GROWTH_PLACES: usize = 8;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Leaves {
    /// Where each chunk begins, at or before its first leaf.
    firsts: Vec<LocalBlock>,
    chunks: Vec<Vec<Leaf>>,
    /// Heap of the leaves and of their chunks, without the two lists of chunks.
    bytes: usize,
}

impl Leaves {
    /// Whether no block is mapped.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Memory beside the value itself, in bytes.
    pub fn heap_bytes(&self) -> usize {
        heap_bytes(self.firsts.capacity() * size_of::<LocalBlock>())
            + heap_bytes(self.chunks.capacity() * size_of::<Vec<Leaf>>())
            + self.bytes
    }

    /// Where a block lies.
    pub fn get(&self, block: LocalBlock) -> Option<Slot> {
        let (chunk, index) = self.locate(block)?;
        self.chunks[chunk][index].get(block)
    }

    /// Maps a block, and returns where it lay. If its stripe is whole now, it leaves: its blocks
    /// are given to the caller.
    pub fn insert(&mut self, block: LocalBlock, slot: Slot) -> (Option<Slot>, Option<Vec<Entry>>) {
        let Some((chunk, index)) = self.locate(block) else {
            self.insert_leaf(Leaf::new(&[(block, slot)], 0));
            return (None, None);
        };
        let leaf = &mut self.chunks[chunk][index];
        let before = leaf.heap_bytes();
        let old = leaf.insert(block, slot);
        self.bytes = self.bytes + leaf.heap_bytes() - before;
        self.firsts[chunk] = self.firsts[chunk].min(leaf.base());
        let is_full = leaf.count() >= LEAF_BLOCKS_MAX;
        (old, if is_full { self.relieve(chunk, index) } else { None })
    }

    /// Unmaps a block, and returns where it lay.
    pub fn remove(&mut self, block: LocalBlock) -> Option<Slot> {
        let (chunk, index) = self.locate(block)?;
        let leaf = &mut self.chunks[chunk][index];
        let before = leaf.heap_bytes();
        let old = leaf.remove(block)?;
        self.bytes = self.bytes + leaf.heap_bytes() - before;
        if leaf.count() == 0 {
            self.remove_leaf(chunk, index);
        } else if leaf.count() <= MERGED_BLOCKS_MAX / 2 {
            self.merge_around(chunk, index);
        }
        Some(old)
    }

    /// Takes in a stripe that has no block here.
    pub fn insert_stripe(&mut self, entries: &[Entry]) {
        let first = entries[0].0;
        if let Some((chunk, index)) = self.locate(first) {
            let mut before = self.chunks[chunk][index].entries();
            let behind = before.split_off(before.partition_point(|(block, _)| *block < first));
            if before.is_empty() {
                // Its base may still be that of a stripe that is gone, and lie before the new one.
                self.replace_leaf(chunk, index, Leaf::new(&behind, 0));
            } else if !behind.is_empty() {
                self.replace_leaf(chunk, index, Leaf::new(&before, 0));
                self.insert_leaf(Leaf::new(&behind, 0));
            }
        }
        self.insert_leaf(Leaf::new(entries, 0));
        let (chunk, index) = self.locate(first).expect("a leaf was put there");
        self.merge_around(chunk, index);
    }

    /// The mapped blocks of a stripe, in order.
    pub fn stripe(&self, segment: u64) -> impl Iterator<Item = Entry> + '_ {
        let first = LocalBlock(segment * SEGMENT_BLOCKS);
        let end = LocalBlock(first.0 + SEGMENT_BLOCKS);
        let place = self.locate(first).into_iter();
        place.flat_map(move |(chunk, index)| self.chunks[chunk][index].range(first, end))
    }

    /// The numbers of the stripes that have a mapped block, in order.
    pub fn stripes(&self) -> Vec<u64> {
        let leaves = self.chunks.iter().flatten();
        let blocks = leaves.flat_map(|leaf| leaf.range(LocalBlock(0), LocalBlock(u64::MAX)));
        let mut numbers = Vec::new();
        for number in blocks.map(|(block, _)| block.0 / SEGMENT_BLOCKS) {
            if numbers.last() != Some(&number) {
                numbers.push(number);
            }
        }
        numbers
    }

    /// The leaf that has the block, or would take it in.
    fn locate(&self, block: LocalBlock) -> Option<(usize, usize)> {
        if self.chunks.is_empty() {
            return None;
        }
        let chunk = self.firsts.partition_point(|first| *first <= block).saturating_sub(1);
        let leaves = &self.chunks[chunk];
        let index = leaves.partition_point(|leaf| leaf.base() <= block).saturating_sub(1);
        Some((chunk, index))
    }

    /// Divides a leaf that is too large, or gives the one stripe that it is.
    fn relieve(&mut self, chunk: usize, index: usize) -> Option<Vec<Entry>> {
        let entries = self.chunks[chunk][index].entries();
        let Some(cut) = choose_cut(&entries) else {
            self.remove_leaf(chunk, index);
            return Some(entries);
        };
        self.replace_leaf(chunk, index, Leaf::new(&entries[..cut], 0));
        self.insert_leaf(Leaf::new(&entries[cut..], 0));
        None
    }

    /// Joins a leaf with the one behind it and the one before it, if they are small.
    fn merge_around(&mut self, chunk: usize, index: usize) {
        let start = index.saturating_sub(1);
        for first in (start..=index).rev() {
            let leaves = &self.chunks[chunk];
            let Some(second) = leaves.get(first + 1) else { continue };
            if leaves[first].count() + second.count() <= MERGED_BLOCKS_MAX {
                let mut entries = leaves[first].entries();
                entries.extend(second.entries());
                self.replace_leaf(chunk, first, Leaf::new(&entries, 0));
                self.take_leaf(chunk, first + 1);
            }
        }
        self.merge_chunks(chunk);
    }

    fn replace_leaf(&mut self, chunk: usize, index: usize, leaf: Leaf) {
        let place = &mut self.chunks[chunk][index];
        self.bytes = self.bytes + leaf.heap_bytes() - place.heap_bytes();
        *place = leaf;
    }

    /// Puts a leaf in its place; a chunk with too many is divided.
    fn insert_leaf(&mut self, leaf: Leaf) {
        let base = leaf.base();
        self.bytes += leaf.heap_bytes();
        if self.chunks.is_empty() {
            self.insert_chunk(0, base, Vec::new());
        }
        let chunk = self.firsts.partition_point(|first| *first <= base).saturating_sub(1);
        self.firsts[chunk] = self.firsts[chunk].min(base);
        let leaves = &mut self.chunks[chunk];
        let index = leaves.partition_point(|other| other.base() < base);
        let before = chunk_bytes(leaves);
        insert_exactly(leaves, index, leaf);
        if leaves.len() < CHUNK_LEAVES_MAX {
            self.bytes = self.bytes + chunk_bytes(leaves) - before;
            return;
        }
        let behind = leaves.split_off(CHUNK_LEAVES_MAX / 2);
        leaves.shrink_to(CHUNK_LEAVES_MAX / 2);
        self.bytes = self.bytes + chunk_bytes(leaves) - before;
        let first = behind[0].base();
        self.insert_chunk(chunk + 1, first, behind);
    }

    /// Takes an empty leaf, or one that was given away, out; its neighbours may become one.
    fn remove_leaf(&mut self, chunk: usize, index: usize) {
        self.take_leaf(chunk, index);
        if self.chunks[chunk].is_empty() {
            self.bytes -= chunk_bytes(&self.chunks[chunk]);
            self.chunks.remove(chunk);
            self.firsts.remove(chunk);
            shrink_list(&mut self.chunks);
            shrink_list(&mut self.firsts);
        } else {
            self.merge_around(chunk, index.min(self.chunks[chunk].len() - 1));
        }
    }

    fn take_leaf(&mut self, chunk: usize, index: usize) {
        let leaves = &mut self.chunks[chunk];
        let before = chunk_bytes(leaves);
        let leaf = leaves.remove(index);
        shrink_list(leaves);
        self.bytes = self.bytes + chunk_bytes(leaves) - before - leaf.heap_bytes();
    }

    /// Joins a chunk with the next one if they are small.
    fn merge_chunks(&mut self, chunk: usize) {
        let Some(next) = self.chunks.get(chunk + 1) else { return };
        if self.chunks[chunk].len() + next.len() > CHUNK_LEAVES_MAX / 2 {
            return;
        }
        let next = self.chunks.remove(chunk + 1);
        self.firsts.remove(chunk + 1);
        shrink_list(&mut self.chunks);
        shrink_list(&mut self.firsts);
        let leaves = &mut self.chunks[chunk];
        let before = chunk_bytes(leaves) + chunk_bytes(&next);
        leaves.reserve_exact(next.len());
        leaves.extend(next);
        self.bytes = self.bytes + chunk_bytes(leaves) - before;
    }

    fn insert_chunk(&mut self, index: usize, first: LocalBlock, leaves: Vec<Leaf>) {
        self.bytes += chunk_bytes(&leaves);
        insert_exactly(&mut self.firsts, index, first);
        insert_exactly(&mut self.chunks, index, leaves);
    }
}

fn chunk_bytes(leaves: &Vec<Leaf>) -> usize {
    heap_bytes(leaves.capacity() * size_of::<Leaf>())
}

/// Inserts without doubling the memory: lists of this file grow by a sixteenth.
fn insert_exactly<T>(list: &mut Vec<T>, index: usize, value: T) {
    if list.len() == list.capacity() {
        list.reserve_exact(GROWTH_PLACES.max(list.len() / 16));
    }
    list.insert(index, value);
}

fn shrink_list<T>(list: &mut Vec<T>) {
    let spare = GROWTH_PLACES.max(list.len() / 16);
    if list.capacity() - list.len() > 2 * spare {
        list.shrink_to(list.len() + spare);
    }
}

/// Where to divide a leaf: between two stripes; where most blocks are missing if that is many, or
/// else next to the middle. None if all is one stripe.
fn choose_cut(entries: &[Entry]) -> Option<usize> {
    let (count, stripe) = (entries.len(), |index: usize| entries[index].0.0 / SEGMENT_BLOCKS);
    let gap = |index: usize| entries[index].0.0 - entries[index - 1].0.0;
    let cuts = || (1..count).filter(|index| stripe(*index) != stripe(index - 1));
    let span = entries[count - 1].0.0 - entries[0].0.0;
    let widest =
        cuts().filter(|cut| (count / 4..=count / 4 * 3).contains(cut)).max_by_key(|cut| gap(*cut));
    let middle = cuts().min_by_key(|cut| cut.abs_diff(count / 2));
    widest.filter(|cut| gap(*cut) > span / 8).or(middle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Checksum, DataBlock};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    impl Leaves {
        /// Everything that the module's invariants say.
        fn check(&self) {
            assert_eq!(self.firsts.len(), self.chunks.len());
            let mut bytes = 0;
            let mut last = None;
            for (first, leaves) in self.firsts.iter().zip(&self.chunks) {
                assert!(!leaves.is_empty() && leaves.len() < CHUNK_LEAVES_MAX);
                assert!(*first <= leaves[0].base());
                bytes += chunk_bytes(leaves);
                for leaf in leaves {
                    let entries = leaf.entries();
                    assert!(!entries.is_empty() && entries.len() < LEAF_BLOCKS_MAX);
                    assert_eq!(entries.len(), leaf.count());
                    assert!(entries.is_sorted_by_key(|(block, _)| *block));
                    assert!(last < Some(entries[0].0.0 / SEGMENT_BLOCKS), "a stripe in two leaves");
                    let base = leaf.base().0 / SEGMENT_BLOCKS;
                    assert!(last < Some(base), "blocks behind the next leaf's base");
                    assert!(leaf.base() <= entries[0].0);
                    last = Some(entries[entries.len() - 1].0.0 / SEGMENT_BLOCKS);
                    bytes += leaf.heap_bytes();
                }
            }
            assert!(self.firsts.is_sorted());
            assert_eq!(bytes, self.bytes);
        }
    }

    /// Blocks near each other, whole regions apart, and at the ends of what there is.
    fn blocks() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => 0u64..2000,
            2 => 0u64..400_000,
            1 => (0u64..40).prop_map(|number| number << 34 | number),
            1 => (0u64..600).prop_map(|back| (1 << 43) - 1 - back),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_tree(
            steps in prop::collection::vec(
                (blocks(), 1u64..300, 1u64..600, prop::option::weighted(0.7, 0u32..1 << 30)),
                1..60,
            )
        ) {
            let mut leaves = Leaves::default();
            let mut model = BTreeMap::new();
            for (first, count, step, pointer) in steps {
                for block in (0..count).map(|index| first + index * step) {
                    let block = LocalBlock(block % (1 << 43));
                    let Some(pointer) = pointer else {
                        prop_assert_eq!(leaves.remove(block), model.remove(&block));
                        continue;
                    };
                    let spread = (block.0 as u32).wrapping_mul(2_654_435_761) >> (pointer % 32);
                    let slot = Slot {
                        block: DataBlock((pointer ^ spread) % ((1 << 30) - 1)),
                        checksum: Checksum(spread),
                    };
                    let (old, whole) = leaves.insert(block, slot);
                    prop_assert_eq!(old, model.insert(block, slot));
                    if let Some(whole) = whole {
                        prop_assert_eq!(whole.len(), 512);
                        leaves.check();
                        prop_assert!(leaves.stripe(block.0 / SEGMENT_BLOCKS).next().is_none());
                        leaves.insert_stripe(&whole[..500]);
                        let lost = |block| whole[500..].iter().any(|(other, _)| *other == block);
                        model.retain(|block, _| !lost(*block));
                    }
                    prop_assert_eq!(leaves.get(block), model.get(&block).copied());
                }
                leaves.check();
            }
            let mut numbers: Vec<u64> = model.keys().map(|block| block.0 / 512).collect();
            numbers.dedup();
            prop_assert_eq!(leaves.stripes(), numbers.clone());
            let found: Vec<Entry> =
                numbers.iter().flat_map(|number| leaves.stripe(*number)).collect();
            prop_assert_eq!(found, model.clone().into_iter().collect::<Vec<_>>());
            for (block, slot) in model {
                prop_assert_eq!(leaves.remove(block), Some(slot));
            }
            leaves.check();
            prop_assert!(leaves.is_empty());
        }
    }
}
