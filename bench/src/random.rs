//! Random numbers from one seed: the same load in every run.

/// Xorshift with a multiplication. Plenty for offsets and contents; no secret comes from it.
pub struct Random(u64);

impl Random {
    /// Numbers of this seed.
    pub fn new(seed: u64) -> Random {
        let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15 | 1);
        // Seeds that differ in a bit only are far apart after a few steps.
        (0..8).for_each(|_| _ = random.next());
        random
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// Random bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = (0..length.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(length).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_and_stays_below() {
        let (mut one, mut two) = (Random::new(7), Random::new(7));
        assert!((0..1000).all(|_| one.below(13) == two.below(13)));
        assert!((0..1000).all(|_| one.below(13) < 13));
        assert_ne!(Random::new(7).next(), Random::new(8).next());
        assert_eq!(one.bytes(13).len(), 13);
    }
}
