//! An adaptive binary range coder, and a model for numbers of any size.
//!
//! The ground of [`crate::delta`]. Invariants: integers only, so every machine makes the same
//! bytes; a decoder reads zeroes behind the end of its bytes, never fails and never loops, so its
//! caller must bound how many numbers it asks for, and must compare what it got with its
//! encoding, which is unique.

/// A binary decision's probability, learnt from its past.
#[derive(Clone, Copy, Debug)]
pub struct Bit {
    /// Probability of 0, of 65536.
    zero: u16,
    /// Decisions seen, up to a limit: the weight of the past.
    seen: u8,
}

/// The past weighs at most this many decisions.
const SEEN_MAX: u8 = 254;
/// No decision is believed surer than this: 1/2048 of a bit for the expected outcome.
const ZERO_MIN: u16 = 24;

/// `STEPS[n]` is 65536 / (n + 1.5): how far decision n moves a probability.
const STEPS: [u32; SEEN_MAX as usize + 1] = {
    let mut steps = [0; SEEN_MAX as usize + 1];
    let mut index = 0;
    while index < steps.len() {
        steps[index] = 2 * 65_536 / (2 * index as u32 + 3);
        index += 1;
    }
    steps
};

impl Bit {
    /// A decision of which nothing is known.
    pub const UNKNOWN: Bit = Bit { zero: 1 << 15, seen: 0 };

    /// A decision that is 0 with this probability (of 65536), believed like `seen` decisions.
    pub const fn expected(zero: u16, seen: u8) -> Bit {
        Bit { zero, seen }
    }

    fn learn(&mut self, bit: bool) {
        let step = STEPS[usize::from(self.seen)];
        let zero = u32::from(self.zero);
        let moved = if bit {
            zero - ((zero * step) >> 16)
        } else {
            zero + (((65_535 - zero) * step) >> 16)
        };
        self.zero = (moved as u16).clamp(ZERO_MIN, u16::MAX - ZERO_MIN);
        self.seen = (self.seen + 1).min(SEEN_MAX);
    }
}

/// Either side of the coder: `code` writes the bit it is given, or reads one and ignores it. So
/// that one function describes both directions of a format.
pub trait Coder {
    /// Codes a decision with its learnt probability.
    fn code(&mut self, model: &mut Bit, bit: bool) -> bool;
    /// Codes the lowest `count` bits of `value`, all outcomes equally likely.
    fn code_bits(&mut self, value: u64, count: u32) -> u64;
}

const RANGE_MIN: u32 = 1 << 24;

/// Writes decisions.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    low: u64,
    range: u32,
    /// Bytes of 0xff held back behind `last`, until it is known whether a carry reaches them.
    held: usize,
    last: Option<u8>,
}

impl Encoder {
    /// An encoder that has written nothing.
    pub fn new() -> Encoder {
        Encoder { bytes: Vec::new(), low: 0, range: u32::MAX, held: 0, last: None }
    }

    /// The shortest bytes that decode to what was coded.
    pub fn finish(mut self) -> Vec<u8> {
        let end = self.low + u64::from(self.range) - 1;
        let free = (0..=32).rev().find(|bits| (end >> bits << bits) >= self.low);
        let free = free.expect("with 0 bits free the end itself is in the range");
        self.low = end >> free << free;
        (0..5).for_each(|_| self.shift());
        // Only `last` can remain, and it is the zero shifted in after the four bytes of `low`.
        while self.bytes.last() == Some(&0) {
            self.bytes.pop();
        }
        self.bytes
    }

    fn normalize(&mut self) {
        while self.range < RANGE_MIN {
            self.range <<= 8;
            self.shift();
        }
    }

    /// Moves the top byte of `low` out, and a carry into the bytes moved out before.
    fn shift(&mut self) {
        let carry = (self.low >> 32) as u8;
        if carry == 1 || self.low as u32 >> 24 != 0xff {
            if let Some(last) = self.last {
                self.bytes.push(last.wrapping_add(carry));
            }
            let held = 0xffu8.wrapping_add(carry);
            self.bytes.resize(self.bytes.len() + self.held, held);
            self.held = 0;
            self.last = Some((self.low >> 24) as u8);
        } else if self.last.is_none() {
            // The first byte of all: the interval ends below it, so no carry can reach it.
            self.last = Some(0xff);
        } else {
            self.held += 1;
        }
        self.low = u64::from(self.low as u32) << 8 & 0xffff_ffff;
    }
}

impl Coder for Encoder {
    fn code(&mut self, model: &mut Bit, bit: bool) -> bool {
        let bound = (self.range >> 16) * u32::from(model.zero);
        if bit {
            self.low += u64::from(bound);
            self.range -= bound;
        } else {
            self.range = bound;
        }
        model.learn(bit);
        self.normalize();
        bit
    }

    fn code_bits(&mut self, value: u64, count: u32) -> u64 {
        for index in (0..count).rev() {
            self.range >>= 1;
            if value >> index & 1 == 1 {
                self.low += u64::from(self.range);
            }
            self.normalize();
        }
        value
    }
}

/// Reads decisions.
#[derive(Debug)]
pub struct Decoder<'a> {
    bytes: std::slice::Iter<'a, u8>,
    code: u32,
    range: u32,
}

impl Decoder<'_> {
    /// A decoder at the start of bytes that an [`Encoder`] made, or anybody.
    pub fn new(bytes: &[u8]) -> Decoder<'_> {
        let mut decoder = Decoder { bytes: bytes.iter(), code: 0, range: u32::MAX };
        (0..4).for_each(|_| decoder.shift());
        decoder
    }

    fn shift(&mut self) {
        let byte = self.bytes.next().copied().unwrap_or(0);
        self.code = self.code << 8 | u32::from(byte);
    }

    fn normalize(&mut self) {
        while self.range < RANGE_MIN {
            self.range <<= 8;
            self.shift();
        }
    }
}

impl Coder for Decoder<'_> {
    fn code(&mut self, model: &mut Bit, _: bool) -> bool {
        let bound = (self.range >> 16) * u32::from(model.zero);
        let bit = self.code >= bound;
        if bit {
            self.code -= bound;
            self.range -= bound;
        } else {
            self.range = bound;
        }
        model.learn(bit);
        self.normalize();
        bit
    }

    fn code_bits(&mut self, _: u64, count: u32) -> u64 {
        let mut value = 0;
        for _ in 0..count {
            self.range >>= 1;
            let bit = self.code >= self.range;
            if bit {
                self.code -= self.range;
            }
            value = value << 1 | u64::from(bit);
            self.normalize();
        }
        value
    }
}

/// Learns the distribution of a number: whether it is 0, how many bits it has, and its two bits
/// behind the first. The bits below are taken as they are. So a number costs close to the
/// entropy of any smooth distribution, and hardly anything when it is nearly always 0.
#[derive(Clone, Debug)]
pub struct NumberModel {
    zero: Bit,
    length: [Bit; 64],
    second: [[Bit; 3]; 64],
}

impl NumberModel {
    /// A model that knows nothing.
    pub fn new() -> NumberModel {
        NumberModel {
            zero: Bit::UNKNOWN,
            length: [Bit::UNKNOWN; 64],
            second: [[Bit::UNKNOWN; 3]; 64],
        }
    }

    /// A model that expects small numbers: of the tree of lengths, the lower half at each fork.
    pub fn small() -> NumberModel {
        let expected = Bit::expected(49_152, 1);
        NumberModel { zero: expected, length: [expected; 64], ..NumberModel::new() }
    }

    /// Writes `value`, or reads a number.
    pub fn code(&mut self, coder: &mut impl Coder, value: u64) -> u64 {
        if !coder.code(&mut self.zero, value != 0) {
            return 0;
        }
        let wanted = 63 - (value | 1).leading_zeros();
        let length = self.code_length(coder, wanted);
        let known = length.min(2);
        let mut result = 1u64;
        for index in 0..known {
            let bit = value >> (length - 1 - index) & 1 == 1;
            let node = &mut self.second[length as usize][result as usize - 1];
            result = result << 1 | u64::from(coder.code(node, bit));
        }
        let rest = length - known;
        if rest == 0 {
            return result;
        }
        let low = coder.code_bits(value & ((1 << rest) - 1), rest);
        result << rest | low
    }

    /// Codes how many bits follow the first, 0 to 63, down a tree of six decisions.
    fn code_length(&mut self, coder: &mut impl Coder, wanted: u32) -> u32 {
        let mut node = 1u32;
        for index in (0..6).rev() {
            let bit = coder.code(&mut self.length[node as usize], wanted >> index & 1 == 1);
            node = node << 1 | u32::from(bit);
        }
        node - 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers() -> impl Strategy<Value = Vec<u64>> {
        let number = prop_oneof![
            Just(0u64),
            0u64..4,
            Just(u64::MAX),
            (0u32..64, any::<u64>()).prop_map(|(shift, n)| n >> shift),
        ];
        prop::collection::vec(number, 0..300)
    }

    fn encode(numbers: &[u64]) -> Vec<u8> {
        let (mut encoder, mut model) = (Encoder::new(), NumberModel::new());
        for number in numbers {
            model.code(&mut encoder, *number);
        }
        encoder.finish()
    }

    fn decode(bytes: &[u8], count: usize) -> Vec<u64> {
        let (mut decoder, mut model) = (Decoder::new(bytes), NumberModel::new());
        (0..count).map(|_| model.code(&mut decoder, 0)).collect()
    }

    proptest! {
        #[test]
        fn numbers_come_back(numbers in numbers()) {
            let bytes = encode(&numbers);
            prop_assert_eq!(decode(&bytes, numbers.len()), numbers);
            prop_assert!(bytes.last() != Some(&0));
        }

        #[test]
        fn any_bytes_decode_to_numbers(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            decode(&bytes, 500);
        }
    }

    #[test]
    fn runs_of_one_outcome_carry_far() {
        for count in [1usize, 100, 5000] {
            for value in [0, 1, u64::MAX] {
                let numbers = vec![value; count];
                assert_eq!(decode(&encode(&numbers), count), numbers);
            }
        }
    }
}
