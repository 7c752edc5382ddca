//! The only source of chance: a seed decides everything that happens in a history.
//!
//! Invariant: the same seed and the same calls give the same numbers on every machine.

/// SplitMix64: small, fast, and good enough to choose histories.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed ^ 0x7717_9017_7717_9017)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `0..bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing to choose from");
        self.next() % bound
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A delay around `typical_ns`: usually between a half and three halves of it, rarely far longer.
    pub fn delay_ns(&mut self, typical_ns: u64) -> u64 {
        let usual = typical_ns / 2 + self.below(typical_ns + 1);
        if self.chance(2) { usual * self.between(5, 40) } else { usual }
    }
}

/// A bijection of 64 bits that looks like chance.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
