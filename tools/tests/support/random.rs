//! Random numbers from a seed that is printed, and can be given again.
//!
//! Invariant: the same seed gives the same choices; only the timing of processes differs between two runs.

use std::time::Duration;

/// A stream of numbers: splitmix64.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    /// The seed of this run: `TWINPOINT_SEED`, or one from the clock. Printed, with the test's name mixed in.
    pub fn of_test(name: &str) -> Random {
        let given = std::env::var("TWINPOINT_SEED").ok();
        let seed = match given {
            Some(text) => text.parse().expect("TWINPOINT_SEED is a decimal number"),
            None => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                now.expect("the clock is past 1970").as_nanos() as u64 % 1_000_000_007
            }
        };
        println!("{name}: TWINPOINT_SEED={seed}");
        let name = name.bytes().fold(seed, |hash, byte| mix(hash ^ u64::from(byte)));
        Random::new(name)
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below 0");
        self.next() % bound
    }

    /// True in `percent` of 100 cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A time between the two.
    pub fn milliseconds(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_micros(least * 1000 + self.below((most - least) * 1000 + 1))
    }

    /// A stream that does not depend on how much is taken from this one later.
    pub fn fork(&mut self) -> Random {
        Random::new(self.next())
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
