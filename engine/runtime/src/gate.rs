//! The admission gate: gives every write the number of the open consistency point, and tells when no admission
//! with an older number is under way (step 1 of the flow, rule R2).
//!
//! ```text
//!   frontend t                            coordinator
//!   slot[t] = n   (n = open)              open = n + 1
//!   fence                                 fence
//!   open == n ?   else again              slot[t] > n for all t ?   else ask again later
//! ```
//!
//! Invariants:
//! - A cut: if admission A ended before B began, A's stamp <= B's. `open` only grows and has one order for all.
//! - Once `quiesced(n)` was true, no admission with a stamp <= n is under way or can begin, and all that such
//!   admissions did (marks, pushes to rings) is visible to the coordinator.
//!
//! Why: the slot's store and the load of `open` on one side, the store of `open` and the loads of the slots on the
//! other, are Dekker's pattern; acquire and release let both sides read the old value. With a sequentially
//! consistent fence between store and load on both sides at least one of them sees the other's store: either the
//! frontend sees n + 1 and stamps again, or the coordinator sees n in the slot and waits. All slot stores are
//! releases and the coordinator's loads acquires, so what it sees as over it also sees done. A participants word
//! is cleared before the release of the `open` number that uses it again, which the frontend's load acquires.

use crossbeam_utils::CachePadded;
use twinpoint_core::units::{CpNumber, SHARDS_MAX, ShardId, ShardSet};

use crate::ring::sync::{AtomicU64, Ordering, fence};

/// How many CPs, the open one included, the gate remembers participants of.
pub const PARTICIPANTS_KEPT: u64 = 64;

/// A slot's value while its thread admits nothing: later than any CP.
const IDLE: u64 = u64::MAX;

/// The gate. Any number of frontend threads, each with its own slot; one coordinator closes CPs.
pub struct Gate {
    open: CachePadded<AtomicU64>,
    quiesced_through: CachePadded<AtomicU64>,
    participants: Box<[CachePadded<AtomicU64>]>,
    slots: Box<[CachePadded<AtomicU64>]>,
}

impl Gate {
    /// A gate for frontend threads 0 to `threads` - 1, with CP `first_open` open.
    #[must_use]
    pub fn new(threads: usize, first_open: CpNumber) -> Gate {
        let words = |count: usize, value: u64| {
            (0..count).map(|_| CachePadded::new(AtomicU64::new(value))).collect::<Box<[_]>>()
        };
        assert!(first_open.0 > 0, "CP 0 is the formatted store and is never open");
        Gate {
            open: CachePadded::new(AtomicU64::new(first_open.0)),
            quiesced_through: CachePadded::new(AtomicU64::new(first_open.0 - 1)),
            participants: words(PARTICIPANTS_KEPT as usize, 0),
            slots: words(threads, IDLE),
        }
    }

    /// Frontend: begins an admission of `thread`. While it lives, its CP cannot be sealed: push the items that carry
    /// its stamp to their rings, then drop it. Never wait for anything in between.
    ///
    /// # Panics
    /// If the thread already has an admission.
    pub fn admit(&self, thread: usize) -> Admission<'_> {
        let slot = &self.slots[thread];
        assert!(slot.load(Ordering::Relaxed) == IDLE, "thread {thread} is already admitting");
        let mut stamp = self.open.load(Ordering::Acquire);
        loop {
            slot.store(stamp, Ordering::Release);
            fence(Ordering::SeqCst);
            let open = self.open.load(Ordering::Acquire);
            if open == stamp {
                return Admission { gate: self, thread, stamp: CpNumber(stamp) };
            }
            assert!(open > stamp, "the open CP went back from {stamp} to {open}");
            stamp = open;
        }
    }

    /// Coordinator: opens the gate at `cp`, before the first admission of a reign.
    ///
    /// # Panics
    /// If an admission is under way, or the number goes back.
    pub fn restart(&self, cp: CpNumber) {
        let idle = self.slots.iter().all(|slot| slot.load(Ordering::Acquire) == IDLE);
        assert!(idle && cp >= self.open(), "the gate restarts at CP {cp} while it is in use");
        for word in &self.participants {
            word.store(0, Ordering::Relaxed);
        }
        self.quiesced_through.store(cp.0 - 1, Ordering::Relaxed);
        self.open.store(cp.0, Ordering::Release);
    }

    /// The open CP.
    #[must_use]
    pub fn open(&self) -> CpNumber {
        CpNumber(self.open.load(Ordering::Acquire))
    }

    /// Whether no shard was marked in the open CP yet. A hint: an admission may be under way.
    #[must_use]
    pub fn is_open_empty(&self) -> bool {
        self.word(self.open()).load(Ordering::Relaxed) == 0
    }

    /// Coordinator: closes the open CP n, opens n + 1 and returns n.
    ///
    /// # Panics
    /// If the CP whose participants word n + 1 takes over was not yet seen quiesced, or if two threads close.
    pub fn close(&self) -> CpNumber {
        let closed = self.open();
        let opened = closed.next();
        if let Some(forgotten) = opened.0.checked_sub(PARTICIPANTS_KEPT) {
            let quiesced = self.quiesced_through.load(Ordering::Relaxed);
            assert!(
                forgotten <= quiesced,
                "CP {forgotten} is overrun; quiesced through {quiesced}"
            );
        }
        self.word(opened).store(0, Ordering::Relaxed);
        let swapped =
            self.open.compare_exchange(closed.0, opened.0, Ordering::Release, Ordering::Relaxed);
        assert!(swapped.is_ok(), "two threads close CP {closed}");
        closed
    }

    /// Coordinator: whether every admission with a stamp <= `cp` is over. Stays true once it is.
    ///
    /// # Panics
    /// If `cp` is not closed.
    #[must_use]
    pub fn quiesced(&self, cp: CpNumber) -> bool {
        let open = self.open.load(Ordering::Relaxed);
        assert!(cp.0 < open, "CP {cp} is not closed; {open} is open");
        if cp.0 <= self.quiesced_through.load(Ordering::Relaxed) {
            return true;
        }
        fence(Ordering::SeqCst);
        if self.slots.iter().any(|slot| slot.load(Ordering::Acquire) <= cp.0) {
            return false;
        }
        self.quiesced_through.store(cp.0, Ordering::Relaxed);
        true
    }

    /// Coordinator: the shards that were marked in `cp`.
    ///
    /// # Panics
    /// If `cp` was not seen quiesced, or is [`PARTICIPANTS_KEPT`] or more CPs before the open one.
    #[must_use]
    pub fn participants(&self, cp: CpNumber) -> ShardSet {
        let quiesced = self.quiesced_through.load(Ordering::Relaxed);
        assert!(cp.0 <= quiesced, "participants of CP {cp} may still change");
        let open = self.open.load(Ordering::Relaxed);
        assert!(open - cp.0 < PARTICIPANTS_KEPT, "participants of CP {cp} are forgotten at {open}");
        ShardSet(self.word(cp).load(Ordering::Relaxed))
    }

    fn word(&self, cp: CpNumber) -> &AtomicU64 {
        &self.participants[(cp.0 % PARTICIPANTS_KEPT) as usize]
    }
}

/// An admission under way: its CP stays unsealed until this is dropped.
pub struct Admission<'gate> {
    gate: &'gate Gate,
    thread: usize,
    stamp: CpNumber,
}

impl Admission<'_> {
    /// The CP that this admission's items belong to.
    #[must_use]
    pub fn stamp(&self) -> CpNumber {
        self.stamp
    }

    /// Notes that `shard` takes part in the stamp's CP. Tells whether it is the first: then the coordinator, whose timer
    /// begins with a CP's first write, wants to know.
    pub fn mark(&self, shard: ShardId) -> bool {
        assert!(shard.0 < SHARDS_MAX, "shard {shard} exceeds {SHARDS_MAX}");
        let word = self.gate.word(self.stamp);
        let bit = 1_u64 << shard.0;
        // Bits are only added while a CP can be stamped, so a set bit needs no second write of a shared line.
        word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) == 0
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.gate.slots[self.thread].store(IDLE, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_cp_is_quiesced_when_its_admissions_are_over() {
        let gate = Gate::new(2, CpNumber(1));
        assert!(gate.is_open_empty());
        let early = gate.admit(0);
        assert!(early.mark(ShardId(3)));
        assert!(!gate.is_open_empty());
        assert_eq!(gate.close(), CpNumber(1));
        let late = gate.admit(1);
        assert!(late.mark(ShardId(63)));
        assert_eq!((early.stamp(), late.stamp()), (CpNumber(1), CpNumber(2)));
        assert!(!gate.quiesced(CpNumber(1)));
        drop(early);
        assert!(gate.quiesced(CpNumber(1)));
        assert_eq!(gate.participants(CpNumber(1)), ShardSet::one(ShardId(3)));
        assert_eq!(gate.close(), CpNumber(2));
        assert!(!gate.quiesced(CpNumber(2)));
        drop(late);
        assert!(gate.quiesced(CpNumber(2)));
        assert_eq!(gate.participants(CpNumber(2)), ShardSet::one(ShardId(63)));
        assert!(gate.is_open_empty());
        assert_eq!(gate.open(), CpNumber(3));
    }

    #[test]
    fn words_are_clean_when_they_are_used_again() {
        let gate = Gate::new(1, CpNumber(7));
        for number in 7..7 + 3 * PARTICIPANTS_KEPT {
            assert!(gate.is_open_empty());
            let shard = ShardId((number % 5) as u16);
            gate.admit(0).mark(shard);
            let closed = gate.close();
            assert_eq!(closed, CpNumber(number));
            assert!(gate.quiesced(closed));
            assert_eq!(gate.participants(closed), ShardSet::one(shard));
        }
    }

    #[test]
    #[should_panic(expected = "overrun")]
    fn closing_too_far_ahead_is_refused() {
        let gate = Gate::new(1, CpNumber(1));
        let _held = gate.admit(0);
        for _ in 0..PARTICIPANTS_KEPT {
            gate.close();
        }
    }

    #[test]
    #[should_panic(expected = "already admitting")]
    fn one_admission_a_thread() {
        let gate = Gate::new(1, CpNumber(1));
        let _first = gate.admit(0);
        let _second = gate.admit(0);
    }

    #[test]
    #[should_panic(expected = "may still change")]
    fn participants_need_quiet() {
        let gate = Gate::new(1, CpNumber(1));
        gate.close();
        let _ = gate.participants(CpNumber(1));
    }
}
