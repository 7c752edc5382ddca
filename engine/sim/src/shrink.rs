//! Makes a failing history smaller: leaves out one thing after the other, as long as the same rule breaks.
//!
//! Invariants: what it finds breaks the rule that the whole history broke; it ends, because every step that it keeps
//! leaves out a kind of fault or makes a number smaller.

use crate::changes::{Changes, Kind, Size};
use crate::run::{Failure, Plan, play};

/// Most histories that one shrinking plays.
const TRIES_MAX: u64 = 400;

/// What came of it.
#[derive(Debug)]
pub struct Shrunk {
    /// The smallest history found that breaks the same rule.
    pub failure: Failure,
    /// How many were played.
    pub tries: u64,
}

/// The seed breaks no rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NothingToShrink(pub u64);

impl std::fmt::Display for NothingToShrink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seed {} breaks no rule: there is nothing to shrink", self.0)
    }
}

impl std::error::Error for NothingToShrink {}

/// Shrinks a failing history. `tell` hears of every step that is kept.
///
/// # Errors
/// The history breaks no rule.
pub fn shrink(plan: &Plan, mut tell: impl FnMut(&Failure)) -> Result<Shrunk, NothingToShrink> {
    let Err(failure) = play(plan) else { return Err(NothingToShrink(plan.seed)) };
    let mut best = Shrunk { failure: *failure, tries: 1 };
    loop {
        let before = best.failure.changes.clone();
        for kind in Kind::all() {
            if !best.failure.changes.leaves_out(kind) {
                let mut changes = best.failure.changes.clone();
                changes.without.push(kind);
                best.try_out(plan, changes, &mut tell);
            }
        }
        for size in Size::ALL {
            best.shrink_size(plan, size, &mut tell);
        }
        if best.failure.changes == before || best.tries >= TRIES_MAX {
            return Ok(best);
        }
    }
}

impl Shrunk {
    /// Looks for the smallest number that still breaks the rule: from below in great steps, then closer.
    fn shrink_size(&mut self, plan: &Plan, size: Size, tell: &mut impl FnMut(&Failure)) {
        let mut low = size.least();
        loop {
            let high = self.failure.sizes.get(size);
            if low >= high || self.tries >= TRIES_MAX {
                return;
            }
            let value = if low == size.least() { low } else { low + (high - low) / 2 };
            let mut changes = self.failure.changes.clone();
            changes.set(size, value);
            if !self.try_out(plan, changes, tell) {
                // Near enough: a sixteenth of a large number.
                low = if value + high / 16 >= high { high } else { value.max(low) + 1 };
            }
        }
    }

    /// Plays a smaller history. Tells whether it breaks the same rule, and is the best now.
    fn try_out(&mut self, plan: &Plan, changes: Changes, tell: &mut impl FnMut(&Failure)) -> bool {
        if self.tries >= TRIES_MAX {
            return false;
        }
        self.tries += 1;
        match play(&Plan { changes, ..plan.clone() }) {
            Err(failure) if failure.rule == self.failure.rule => {
                self.failure = *failure;
                tell(&self.failure);
                true
            }
            _ => false,
        }
    }
}
