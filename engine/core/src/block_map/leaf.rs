//! A leaf of the sparse map: some hundred mapped blocks of whole stripes, in as few bits as they
//! need.
//!
//! Serves steps 5 and 6 of the flow, inside [`super::BlockMap`].
//!
//! ```text
//! words:  | directory: which blocks | records: checksum, pointer, low bits of the block | ...
//! ```
//!
//! Blocks count from the leaf's `base`. Their `low_bits` lowest bits lie in the records. The rest,
//! the *high part*, is in the directory: without low bits that is a bitmap; with low bits the
//! block at index `i` has a 1 at its high part + `i` (the code of Elias and Fano), so a search
//! counts zeros. Pointers count from `pointer_base` and take `pointer_bits`.
//!
//! Invariants: records ascend by block; bits behind the last record are 0; a stripe is in one
//! leaf; between two changes of its index a leaf has fewer than [`LEAF_BLOCKS_MAX`] blocks.

use super::bits;
use super::heap_bytes;
use crate::segment::Slot;
use crate::units::{Checksum, DataBlock, LocalBlock, SEGMENT_BLOCKS};

/// A leaf with as many blocks is divided, or is one whole stripe and becomes a segment.
pub const LEAF_BLOCKS_MAX: usize = SEGMENT_BLOCKS as usize;

const CHECKSUM_BITS: usize = 32;
/// Words by which a leaf grows: few, because what is not used counts.
const GROWTH_WORDS: usize = 8;
/// Spare words that a leaf keeps when blocks leave it.
const SPARE_WORDS_MAX: usize = 16;

/// A mapped block.
pub type Entry = (LocalBlock, Slot);

/// See the module.
#[derive(Clone, Debug)]
pub struct Leaf {
    words: Vec<u64>,
    /// The first block of the first stripe.
    base: u64,
    pointer_base: u32,
    count: u16,
    directory_words: u16,
    low_bits: u8,
    pointer_bits: u8,
}

/// Where a block is, or would be put.
struct Place {
    index: usize,
    /// Its bit in the directory.
    bit: usize,
    is_mapped: bool,
}

impl Leaf {
    /// A leaf of blocks that ascend, at least one. Pointers get `pointer_bits` if that is more
    /// than they need, and less than any pointer up to the highest needs.
    pub fn new(entries: &[Entry], pointer_bits: usize) -> Leaf {
        let (first, last) = (entries[0].0.0, entries[entries.len() - 1].0.0);
        let base = first - first % SEGMENT_BLOCKS;
        let (low_bits, directory_bits) = plan_directory(entries.len(), last - base + 1);
        let pointers = entries.iter().map(|(_, slot)| slot.block.0);
        let (lowest, highest) =
            pointers.fold((u32::MAX, 0), |(low, high), p| (low.min(p), high.max(p)));
        let width_all = width(highest);
        let pointer_bits = width(highest - lowest).max(pointer_bits).min(width_all);
        let directory_words = directory_bits.div_ceil(64);
        let mut leaf = Leaf {
            words: Vec::new(),
            base,
            pointer_base: if pointer_bits == width_all { 0 } else { lowest },
            count: entries.len() as u16,
            directory_words: directory_words as u16,
            low_bits: low_bits as u8,
            pointer_bits: pointer_bits as u8,
        };
        let record_words = (entries.len() * leaf.record_bits()).div_ceil(64);
        leaf.words = vec![0; directory_words + record_words];
        for (index, (block, slot)) in entries.iter().enumerate() {
            let high = ((block.0 - base) >> low_bits) as usize;
            let bit = if low_bits == 0 { high } else { high + index };
            bits::set_field(&mut leaf.words, bit, 1, 1);
            leaf.write_record(index, *block, *slot);
        }
        leaf
    }

    /// The first block of the leaf's first stripe.
    pub fn base(&self) -> LocalBlock {
        LocalBlock(self.base)
    }

    /// How many blocks are mapped.
    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    /// Memory beside the leaf itself, in bytes.
    pub fn heap_bytes(&self) -> usize {
        heap_bytes(self.words.capacity() * size_of::<u64>())
    }

    /// Where a block lies.
    pub fn get(&self, block: LocalBlock) -> Option<Slot> {
        let place = self.find(block)?;
        place.is_mapped.then(|| self.read_slot(place.index))
    }

    /// Maps a block, and returns where it lay.
    pub fn insert(&mut self, block: LocalBlock, slot: Slot) -> Option<Slot> {
        let fits = self.pointer_fits(slot.block);
        match self.find(block) {
            Some(place) if place.is_mapped => {
                let old = self.read_slot(place.index);
                if fits {
                    self.write_record(place.index, block, slot);
                } else {
                    let mut entries = self.entries();
                    entries[place.index].1 = slot;
                    *self = Leaf::new(&entries, self.pointer_bits_next());
                }
                Some(old)
            }
            Some(place) if fits && self.has_directory_room(place.bit) => {
                self.open_record(place.index);
                self.open_directory(place.bit);
                self.write_record(place.index, block, slot);
                self.count += 1;
                None
            }
            _ => {
                let mut entries = self.entries();
                let index = entries.partition_point(|(other, _)| *other < block);
                entries.insert(index, (block, slot));
                let pointer_bits = if fits { 0 } else { self.pointer_bits_next() };
                *self = Leaf::new(&entries, pointer_bits);
                None
            }
        }
    }

    /// Unmaps a block, and returns where it lay. The leaf may be empty then.
    pub fn remove(&mut self, block: LocalBlock) -> Option<Slot> {
        let place = self.find(block).filter(|place| place.is_mapped)?;
        let old = self.read_slot(place.index);
        let (head, record_bits) = (self.directory_bits(), self.record_bits());
        let end = head + self.count() * record_bits;
        bits::close(&mut self.words, head + place.index * record_bits, record_bits, end);
        let directory = &mut self.words[..usize::from(self.directory_words)];
        if self.low_bits == 0 {
            bits::set_field(directory, place.bit, 1, 0);
        } else {
            bits::close(directory, place.bit, 1, head);
        }
        self.count -= 1;
        if self.count > 0 {
            self.give_back();
        }
        Some(old)
    }

    /// The mapped blocks from `from` on and before `end`, in order.
    pub fn range(&self, from: LocalBlock, end: LocalBlock) -> impl Iterator<Item = Entry> + '_ {
        let start = LocalBlock(from.0.max(self.base));
        let place = self.find(start);
        let (mut index, mut bit) =
            place.map_or((self.count(), 0), |place| (place.index, place.bit));
        std::iter::from_fn(move || {
            if index == self.count() {
                return None;
            }
            bit = bits::next_one(self.directory(), bit)?;
            let block = self.block_at(index, bit);
            if block >= end {
                return None;
            }
            let slot = self.read_slot(index);
            (index, bit) = (index + 1, bit + 1);
            Some((block, slot))
        })
    }

    /// All mapped blocks, with room for one more.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::with_capacity(self.count() + 1);
        entries.extend(self.range(LocalBlock(0), LocalBlock(u64::MAX)));
        entries
    }

    /// None if the block lies before the leaf, or so far behind it that the number is too large.
    fn find(&self, block: LocalBlock) -> Option<Place> {
        let offset = block.0.checked_sub(self.base)?;
        let high = usize::try_from(offset >> self.low_bits).ok()?;
        let directory = self.directory();
        let end = self.directory_bits();
        if self.low_bits == 0 {
            let index = if high < end { bits::rank(directory, high) } else { self.count() };
            let is_mapped = high < end && bits::bit(directory, high);
            return Some(Place { index, bit: high, is_mapped });
        }
        let low = offset & ((1 << self.low_bits) - 1);
        let Some(mut bit) = bits::behind_zero(directory, high) else {
            return Some(Place { index: self.count(), bit: high + self.count(), is_mapped: false });
        };
        let mut index = bit - high;
        while bit < end && bits::bit(directory, bit) {
            let found = self.read_low(index);
            if found >= low {
                return Some(Place { index, bit, is_mapped: found == low });
            }
            (index, bit) = (index + 1, bit + 1);
        }
        Some(Place { index, bit, is_mapped: false })
    }

    fn block_at(&self, index: usize, bit: usize) -> LocalBlock {
        let high = if self.low_bits == 0 { bit } else { bit - index };
        LocalBlock(self.base + ((high as u64) << self.low_bits | self.read_low(index)))
    }

    /// Sees to it that the directory can take one more block in at a bit. False if another split of
    /// the blocks' numbers would be better, so the leaf is to be built anew.
    fn has_directory_room(&mut self, bit: usize) -> bool {
        let bits = self.directory_bits();
        // With low bits a new 1 moves all behind it, and the last of them must not fall out.
        let last_moves = self.low_bits > 0 && bits::bit(self.directory(), bits - 1);
        let wanted = (bit + 1).max(bits + usize::from(last_moves));
        if wanted <= bits {
            return true;
        }
        let is_crowded = self.low_bits > 0 && 2 * wanted < 3 * self.count();
        if is_crowded || wanted > 5 * self.count() + 128 {
            return false;
        }
        let place = usize::from(self.directory_words);
        let more = wanted.div_ceil(64) - place;
        self.reserve_words(self.words.len() + more);
        self.words.splice(place..place, std::iter::repeat_n(0, more));
        self.directory_words += more as u16;
        true
    }

    /// Marks a block in the directory, which has room.
    fn open_directory(&mut self, bit: usize) {
        let end = self.directory_bits();
        let directory = &mut self.words[..usize::from(self.directory_words)];
        if self.low_bits > 0 {
            bits::open(directory, bit, 1, end - 1);
        }
        bits::set_field(directory, bit, 1, 1);
    }

    fn reserve_words(&mut self, words: usize) {
        if words > self.words.capacity() {
            let missing = words - self.words.len();
            self.words.reserve_exact(missing.next_multiple_of(GROWTH_WORDS));
        }
    }

    fn open_record(&mut self, index: usize) {
        let (head, record_bits) = (self.directory_bits(), self.record_bits());
        let end = head + self.count() * record_bits;
        let words = (end + record_bits).div_ceil(64);
        if words > self.words.len() {
            self.reserve_words(words);
            self.words.resize(words, 0);
        }
        bits::open(&mut self.words, head + index * record_bits, record_bits, end);
    }

    /// Keeps what is not used small after a block has left.
    fn give_back(&mut self) {
        if self.directory_bits() > 6 * self.count() + 128 {
            *self = Leaf::new(&self.entries(), 0);
            return;
        }
        let words = (self.directory_bits() + self.count() * self.record_bits()).div_ceil(64);
        self.words.truncate(words);
        if self.words.capacity() > words + SPARE_WORDS_MAX {
            self.words.shrink_to(words + GROWTH_WORDS);
        }
    }

    fn write_record(&mut self, index: usize, block: LocalBlock, slot: Slot) {
        let at = self.record_at(index);
        let width = CHECKSUM_BITS + usize::from(self.pointer_bits);
        let pointer = u64::from(slot.block.0 - self.pointer_base);
        let value = u64::from(slot.checksum.0) | pointer << CHECKSUM_BITS;
        bits::set_field(&mut self.words, at, width, value);
        let low = (block.0 - self.base) & ((1 << self.low_bits) - 1);
        bits::set_field(&mut self.words, at + width, usize::from(self.low_bits), low);
    }

    fn read_slot(&self, index: usize) -> Slot {
        let width = CHECKSUM_BITS + usize::from(self.pointer_bits);
        let value = bits::field(&self.words, self.record_at(index), width);
        Slot {
            block: DataBlock(self.pointer_base + (value >> CHECKSUM_BITS) as u32),
            checksum: Checksum(value as u32),
        }
    }

    fn read_low(&self, index: usize) -> u64 {
        let at = self.record_at(index) + CHECKSUM_BITS + usize::from(self.pointer_bits);
        bits::field(&self.words, at, usize::from(self.low_bits))
    }

    fn record_at(&self, index: usize) -> usize {
        self.directory_bits() + index * self.record_bits()
    }

    fn record_bits(&self) -> usize {
        CHECKSUM_BITS + usize::from(self.pointer_bits) + usize::from(self.low_bits)
    }

    fn directory(&self) -> &[u64] {
        &self.words[..usize::from(self.directory_words)]
    }

    fn directory_bits(&self) -> usize {
        usize::from(self.directory_words) * 64
    }

    fn pointer_fits(&self, block: DataBlock) -> bool {
        let offset = block.0.checked_sub(self.pointer_base);
        offset.is_some_and(|offset| width(offset) <= usize::from(self.pointer_bits))
    }

    /// A bit more at each pointer that did not fit: no leaf is built anew for that reason more
    /// than 30 times, whatever the order of the pointers.
    fn pointer_bits_next(&self) -> usize {
        usize::from(self.pointer_bits) + 1
    }
}

/// Bits that a number takes.
fn width(number: u32) -> usize {
    (u32::BITS - number.leading_zeros()) as usize
}

/// The count of low bits, and with it the bits of the directory, that cost least for `count`
/// blocks below `end`.
fn plan_directory(count: usize, end: u64) -> (usize, usize) {
    let spread = |low_bits: usize| -> u64 {
        let high = ((end - 1) >> low_bits) + 1;
        if low_bits == 0 { high } else { high + count as u64 }
    };
    let cost = |low_bits: &usize| (count * *low_bits) as u64 + spread(*low_bits);
    let low_bits = (0..=44).min_by_key(cost).expect("there are widths to choose from");
    let wanted = spread(low_bits);
    (low_bits, usize::try_from(wanted).expect("the cheapest directory is small"))
}
