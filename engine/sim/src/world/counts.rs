//! What happened in a history, in numbers.

use crate::faults::FaultCounts;

/// What happened, for the runner's summary.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Events handled.
    pub events: u64,
    /// Client commands answered.
    pub commands: u64,
    /// CPs committed on either side.
    pub points: u64,
    /// Process kills and power cuts.
    pub crashes: u64,
    /// Promotions.
    pub promotions: u64,
    /// Sessions begun.
    pub sessions: u64,
    /// Requests answered with no space.
    pub no_space: u64,
    /// Secondaries sent back to an older CP.
    pub rewinds: u64,
    /// Returning primaries whose own CPs an operator dropped.
    pub branches: u64,
    /// Bases given up, or pairs that cannot be mended otherwise.
    pub broken_pairs: u64,
    /// Secondaries lost for good.
    pub lost_nodes: u64,
    /// Shard headers written, two for each map checkpoint.
    pub headers: u64,
    /// CPs read back from a store for a peer that fell behind.
    pub catch_ups: u64,
    /// Requests that waited and were admitted again.
    pub readmissions: u64,
    /// Times that writers were held.
    pub holds: u64,
    /// Device failures.
    pub device_failures: u64,
    /// Images checked.
    pub images: u64,
    /// Looks at what a power cut would leave, at a commit.
    pub cut_probes: u64,
    /// Looks at what a start makes of a damaged block.
    pub damage_probes: u64,
    /// Of them, starts that were refused.
    pub damage_refused: u64,
    /// CPs that a deposed primary made.
    pub stale_points: u64,
    /// Client reads that failed because the device did.
    pub failed_reads: u64,
    /// Lanes closed because of a checksum.
    pub lanes_closed: u64,
    /// Looks at a shard whose free blocks are exactly those that nobody needs.
    pub leak_checks: u64,
    /// How often each kind of fault struck.
    pub faults: FaultCounts,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.events += other.events;
        self.commands += other.commands;
        self.points += other.points;
        self.crashes += other.crashes;
        self.promotions += other.promotions;
        self.sessions += other.sessions;
        self.no_space += other.no_space;
        self.rewinds += other.rewinds;
        self.branches += other.branches;
        self.broken_pairs += other.broken_pairs;
        self.lost_nodes += other.lost_nodes;
        self.headers += other.headers;
        self.catch_ups += other.catch_ups;
        self.readmissions += other.readmissions;
        self.holds += other.holds;
        self.device_failures += other.device_failures;
        self.images += other.images;
        self.cut_probes += other.cut_probes;
        self.damage_probes += other.damage_probes;
        self.damage_refused += other.damage_refused;
        self.stale_points += other.stale_points;
        self.failed_reads += other.failed_reads;
        self.lanes_closed += other.lanes_closed;
        self.leak_checks += other.leak_checks;
        self.faults += other.faults;
    }
}
