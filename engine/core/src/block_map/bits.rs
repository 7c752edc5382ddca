//! Bits packed into words: fields of any width, places opened and closed, ranks.
//!
//! Serves the map's leaves. Bit `i` is bit `i % 64` of word `i / 64`. Invariant: bits behind the
//! end of what a caller uses are 0, and stay so.

/// Words that are moved at a time.
const PIECE_WORDS: usize = 64;

/// Reads `width` bits, at most 64.
#[inline]
pub fn field(words: &[u64], at: usize, width: usize) -> u64 {
    if width == 0 {
        return 0;
    }
    let (word, shift) = (at / 64, at % 64);
    let mut value = words[word] >> shift;
    if shift + width > 64 {
        value |= words[word + 1] << (64 - shift);
    }
    value & ones(width)
}

/// Writes `width` bits, at most 64.
#[inline]
pub fn set_field(words: &mut [u64], at: usize, width: usize, value: u64) {
    if width == 0 {
        return;
    }
    let (word, shift) = (at / 64, at % 64);
    let mask = ones(width);
    words[word] = words[word] & !(mask << shift) | value << shift;
    if shift + width > 64 {
        let low = 64 - shift;
        words[word + 1] = words[word + 1] & !(mask >> low) | value >> low;
    }
}

/// Whether a bit is 1.
#[inline]
pub fn bit(words: &[u64], at: usize) -> bool {
    words[at / 64] >> (at % 64) & 1 == 1
}

/// Moves the bits from `at` up to `end` by `by` bits towards the end. The place between them is
/// not cleared.
pub fn open(words: &mut [u64], at: usize, by: usize, end: usize) {
    if at == end || by == 0 {
        return;
    }
    let (skip, shift) = (by / 64, by % 64);
    let first = (at + by) / 64;
    let last = (end + by - 1) / 64;
    let kept = ones((at + by) % 64);
    let head = words[first] & kept;
    if shift == 0 {
        words.copy_within(first - skip..=last - skip, first);
    } else {
        let mut until = last + 1;
        while until > first {
            let from = until.saturating_sub(PIECE_WORDS).max(first);
            // What is written overlaps what is read: a copy lets the compiler shift many at once.
            let mut piece = [0u64; PIECE_WORDS + 1];
            let source = from as isize - skip as isize - 1;
            let missing = usize::from(source < 0);
            let begin = (source + missing as isize) as usize;
            let count = until - from + 1;
            piece[missing..count].copy_from_slice(&words[begin..until - skip]);
            let pairs = piece.windows(2);
            for (word, pair) in words[from..until].iter_mut().zip(pairs) {
                *word = pair[1] << shift | pair[0] >> (64 - shift);
            }
            until = from;
        }
    }
    words[first] = words[first] & !kept | head;
}

/// Takes `by` bits at `at` out: what lies behind them, up to `end`, moves down, and zeros follow.
pub fn close(words: &mut [u64], at: usize, by: usize, end: usize) {
    let (skip, shift) = (by / 64, by % 64);
    let first = at / 64;
    let last = (end - 1) / 64;
    let kept = ones(at % 64);
    let head = words[first] & kept;
    let mut from = first;
    while from <= last {
        let until = (from + PIECE_WORDS).min(last + 1);
        let mut piece = [0u64; PIECE_WORDS + 1];
        let source = (from + skip).min(last + 1)..(until + skip + 1).min(last + 1);
        piece[..source.len()].copy_from_slice(&words[source]);
        let pairs = piece.windows(2);
        for (word, pair) in words[from..until].iter_mut().zip(pairs) {
            // In two steps, because a shift by 64 is none.
            *word = pair[0] >> shift | pair[1] << 1 << (63 - shift);
        }
        from = until;
    }
    words[first] = words[first] & !kept | head;
}

/// How many bits below `at` are 1.
pub fn rank(words: &[u64], at: usize) -> usize {
    let whole: u32 = words[..at / 64].iter().map(|word| word.count_ones()).sum();
    let rest = if at.is_multiple_of(64) { 0 } else { words[at / 64] & ones(at % 64) };
    (whole + rest.count_ones()) as usize
}

/// The place behind the zero number `count`, counted from 1; 0 if `count` is 0. None if there are
/// fewer.
pub fn behind_zero(words: &[u64], count: usize) -> Option<usize> {
    if count == 0 {
        return Some(0);
    }
    let mut missing = count;
    for (index, word) in words.iter().enumerate() {
        let zeros = word.count_zeros() as usize;
        if zeros >= missing {
            return Some(index * 64 + one_number(!word, missing) + 1);
        }
        missing -= zeros;
    }
    None
}

/// The first 1 at or behind `at`.
pub fn next_one(words: &[u64], at: usize) -> Option<usize> {
    let mut index = at / 64;
    let mut word = words.get(index)? & !ones(at % 64);
    while word == 0 {
        index += 1;
        word = *words.get(index)?;
    }
    Some(index * 64 + word.trailing_zeros() as usize)
}

/// The place of the 1 number `count` of a word, counted from 1.
fn one_number(mut word: u64, count: usize) -> usize {
    let (mut place, mut missing) = (0, count as u32);
    for half in [32, 16, 8] {
        let ones_below = (word & ones(half)).count_ones();
        if missing > ones_below {
            missing -= ones_below;
            word >>= half;
            place += half;
        }
    }
    for _ in 1..missing {
        word &= word - 1;
    }
    place + word.trailing_zeros() as usize
}

/// The lowest `width` bits, at most 64.
#[inline]
fn ones(width: usize) -> u64 {
    if width >= 64 { u64::MAX } else { (1 << width) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to_bits(words: &[u64]) -> Vec<bool> {
        (0..words.len() * 64).map(|at| bit(words, at)).collect()
    }

    proptest! {
        #[test]
        fn places_open_and_close_like_a_list(
            mut words in prop::collection::vec(any::<u64>(), 1..200),
            used in 1usize..9000, at in 0usize..9000, by in 1usize..140,
        ) {
            let used = used.min(words.len() * 64);
            let at = at % used;
            for index in used..words.len() * 64 {
                set_field(&mut words, index, 1, 0);
            }
            words.extend([0, 0, 0]);
            let mut model = to_bits(&words);
            open(&mut words, at, by, used);
            for index in 0..by {
                set_field(&mut words, at + index, 1, 1);
            }
            model.splice(at..at, vec![true; by]);
            model.truncate(words.len() * 64);
            prop_assert_eq!(to_bits(&words), model.clone());
            close(&mut words, at, by, used + by);
            model.drain(at..at + by);
            model.resize(words.len() * 64, false);
            prop_assert_eq!(to_bits(&words), model);
        }

        #[test]
        fn ranks_and_fields_are_those_of_a_list(
            mut words in prop::collection::vec(any::<u64>(), 1..9),
            at in 0usize..512, width in 0usize..=64, value: u64,
        ) {
            let bits = to_bits(&words);
            let at = at % (bits.len() + 1);
            prop_assert_eq!(rank(&words, at), bits[..at].iter().filter(|bit| **bit).count());
            let next = (at..bits.len()).find(|index| bits[*index]);
            prop_assert_eq!(next_one(&words, at), next);
            let zero = (0..bits.len()).filter(|index| !bits[*index]).nth(at);
            prop_assert_eq!(behind_zero(&words, at + 1), zero.map(|index| index + 1));
            prop_assume!(at + width <= bits.len());
            set_field(&mut words, at, width, value & ones(width));
            prop_assert_eq!(field(&words, at, width), value & ones(width));
            let mut model = bits;
            for index in 0..width {
                model[at + index] = value >> index & 1 == 1;
            }
            prop_assert_eq!(to_bits(&words), model);
        }
    }
}
