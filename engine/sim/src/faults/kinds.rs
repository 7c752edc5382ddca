//! The kinds of faults, and which of them a history has: each seed enables a fifth, a half or four fifths of them by
//! chance, so that some histories are quiet enough for rare sequences of a few kinds (swarm style).

use crate::random::Random;

/// One kind of fault. Its name is how options and marks call it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// The primary's process dies, or its host's power fails.
    KillPrimary,
    /// The same for the secondary.
    KillSecondary,
    /// Both at once.
    KillBoth,
    /// A process dies between two actions that it asked for.
    KillAtAction,
    /// A process handles no event for a while.
    Pause,
    /// A node's clock jumps forward.
    ClockJump,
    /// The operator promotes the secondary, by force or after the primary died.
    Promotion,
    /// The old primary is started as a primary again, and makes CPs of its own; or both are started as primaries.
    StalePrimary,
    /// A connection is lost; both sides hear of it.
    LoseConnection,
    /// The network is down for both, and both hear of it.
    NetworkDown,
    /// Nothing of what one node sends arrives for a while; then it does, late.
    CutOneWay,
    /// The same for both.
    CutBothWays,
    /// A connection swallows all that one side, or both, sends; nobody is told.
    SilentConnection,
    /// A host loses power and its peer is not told that the connection is gone.
    HalfOpen,
    /// A frame's bytes change: the transport notices and ends the connection.
    CorruptFrame,
    /// A placed block changes after the transport's checks.
    CorruptBlock,
    /// The wire is slow for a while.
    SlowWire,
    /// A write or a flush fails.
    FailWrite,
    /// A failed flush also loses writes.
    FlushLoses,
    /// Reads of data or records fail.
    FailRead,
    /// The device is slow for a while.
    SlowDisk,
    /// A device operation never ends; the process is killed for it.
    StuckDisk,
    /// A data block goes bad.
    RotData,
    /// One of two copies, or a block that nothing points to, is found bad or overwritten by a misdirected write.
    RotCopy,
    /// The device cannot be read at a start.
    StartUnreadable,
    /// Power fails while recovery's repairs are written.
    CrashInRepair,
    /// Clients fill the store.
    FullStore,
}

/// How many kinds there are.
pub const FAULT_KINDS: usize = 27;

impl Fault {
    /// All of them, with their names.
    pub const ALL: [(Fault, &'static str); FAULT_KINDS] = [
        (Fault::KillPrimary, "kill-primary"),
        (Fault::KillSecondary, "kill-secondary"),
        (Fault::KillBoth, "kill-both"),
        (Fault::KillAtAction, "kill-at-action"),
        (Fault::Pause, "pause"),
        (Fault::ClockJump, "clock-jump"),
        (Fault::Promotion, "promotion"),
        (Fault::StalePrimary, "stale-primary"),
        (Fault::LoseConnection, "lose-connection"),
        (Fault::NetworkDown, "network-down"),
        (Fault::CutOneWay, "cut-one-way"),
        (Fault::CutBothWays, "cut-both-ways"),
        (Fault::SilentConnection, "silent-connection"),
        (Fault::HalfOpen, "half-open"),
        (Fault::CorruptFrame, "corrupt-frame"),
        (Fault::CorruptBlock, "corrupt-block"),
        (Fault::SlowWire, "slow-wire"),
        (Fault::FailWrite, "fail-write"),
        (Fault::FlushLoses, "flush-loses"),
        (Fault::FailRead, "fail-read"),
        (Fault::SlowDisk, "slow-disk"),
        (Fault::StuckDisk, "stuck-disk"),
        (Fault::RotData, "rot-data"),
        (Fault::RotCopy, "rot-copy"),
        (Fault::StartUnreadable, "start-unreadable"),
        (Fault::CrashInRepair, "crash-in-repair"),
        (Fault::FullStore, "full-store"),
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Fault::ALL[self as usize].1
    }

    /// Strikes at a moment, not at an occasion.
    pub(crate) fn strikes(self) -> bool {
        !matches!(
            self,
            Fault::StalePrimary
                | Fault::HalfOpen
                | Fault::FlushLoses
                | Fault::RotCopy
                | Fault::StartUnreadable
                | Fault::CrashInRepair
                | Fault::FullStore
        )
    }

    /// How likely it is, compared with others.
    pub(crate) fn weight(self) -> usize {
        match self {
            Fault::Promotion => 5,
            Fault::KillPrimary | Fault::KillSecondary | Fault::KillAtAction => 3,
            Fault::LoseConnection | Fault::CutOneWay | Fault::Pause => 2,
            _ => 1,
        }
    }

    /// Can strike a node that has no peer.
    pub(crate) fn strikes_alone(self) -> bool {
        matches!(
            self,
            Fault::KillPrimary
                | Fault::KillAtAction
                | Fault::Pause
                | Fault::ClockJump
                | Fault::FailWrite
                | Fault::FailRead
                | Fault::SlowDisk
                | Fault::StuckDisk
                | Fault::RotData
        )
    }
}

/// Which kinds a history has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Faults([bool; FAULT_KINDS]);

impl Faults {
    /// A random half of all kinds, drawn from a stream of its own: leaving kinds out later moves nothing else.
    #[must_use]
    pub fn from_seed(seed: u64) -> Faults {
        let mut random = Random::new(seed.rotate_left(17) ^ 0x6661_756c_7473);
        let percent = random.pick(&[20, 50, 50, 80]);
        Faults(std::array::from_fn(|_| random.chance(percent)))
    }

    /// Whether the history has this kind.
    #[must_use]
    pub fn has(&self, fault: Fault) -> bool {
        self.0[fault as usize]
    }

    /// Leaves a kind out.
    pub(crate) fn leave_out(&mut self, fault: Fault) {
        self.0[fault as usize] = false;
    }

    /// The kinds that a history has.
    pub fn kinds(&self) -> impl Iterator<Item = Fault> + '_ {
        Fault::ALL.iter().map(|(fault, _)| *fault).filter(|fault| self.has(*fault))
    }
}

/// How often each kind struck.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FaultCounts(pub [u64; FAULT_KINDS]);

impl Default for FaultCounts {
    fn default() -> FaultCounts {
        FaultCounts([0; FAULT_KINDS])
    }
}

impl FaultCounts {
    /// One more.
    pub(crate) fn add(&mut self, fault: Fault) {
        self.0[fault as usize] += 1;
    }

    /// How often a kind struck.
    #[must_use]
    pub fn of(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }
}

impl std::ops::AddAssign for FaultCounts {
    fn add_assign(&mut self, other: FaultCounts) {
        self.0.iter_mut().zip(other.0).for_each(|(own, more)| *own += more);
    }
}

impl std::fmt::Debug for FaultCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let struck = Fault::ALL.iter().filter(|(fault, _)| self.of(*fault) > 0);
        f.debug_map().entries(struck.map(|(fault, name)| (name, self.of(*fault)))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_at_its_own_place() {
        for (index, (fault, name)) in Fault::ALL.iter().enumerate() {
            assert_eq!(*fault as usize, index);
            assert_eq!(fault.name(), *name);
        }
    }

    #[test]
    fn some_seed_has_each_kind_and_some_seed_does_not() {
        for (fault, name) in Fault::ALL {
            let having = (0..100).filter(|seed| Faults::from_seed(*seed).has(fault)).count();
            assert!((10..90).contains(&having), "{name}: {having} of 100 seeds");
        }
    }
}
