//! One node: its disk, and while its process lives its shards, coordinator, gate and buffers.
//!
//! Invariants: a new life shares nothing with the last one but the disk; a gate's stamps come from one counter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use twinpoint_core::catalog::Catalog;
use twinpoint_core::contract::IoToken;
use twinpoint_core::coordinator::Coordinator;
use twinpoint_core::message::Role;
use twinpoint_core::shard::Shard;
use twinpoint_core::units::{BufferId, Checksum, CpNumber, ShardId, ShardSet};

use crate::buffers::Buffers;
use crate::disk::Disk;
use crate::world::Event;

/// A host with its store.
#[derive(Debug)]
pub(crate) struct Node {
    pub disk: Disk,
    /// What the operator starts it as.
    pub role: Role,
    /// Counts the process's lives; events of an earlier one are void.
    pub life: u64,
    pub process: Option<Process>,
    /// What it has after this CP was dropped elsewhere: its contents say nothing until it was sent back.
    pub disowned_after: Option<CpNumber>,
    /// The other one was promoted and this one has not followed it yet: promoting it too would open one term twice.
    pub is_outdated: bool,
    /// Its durable superblock says that the base is kept for a peer.
    pub keeps_base: bool,
    /// Its durable superblock says that it carries on alone.
    pub is_alone: bool,
    /// Its device takes long.
    pub is_slow: bool,
    /// It handles no event; those that come are held.
    pub is_paused: bool,
    pub held: VecDeque<Event>,
    /// How far its clock is ahead of virtual time.
    pub clock_ahead_ns: u64,
    /// Whoever starts it next does not know that it was deposed.
    pub returns_as_primary: bool,
}

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    pub shards: Vec<Shard>,
    pub coordinator: Coordinator,
    pub buffers: Buffers,
    pub gate: Gate,
    pub catalog: Catalog,
    /// Frontends offer the catalog's volumes.
    pub serves: bool,
    pub holds: bool,
    pub is_stopped: bool,
    /// Asked to become primary, and not answered yet.
    pub is_promoting: bool,
    /// The next write or flush fails.
    pub is_failing: bool,
    /// Not a write, a flush.
    pub fails_at_flush: bool,
    /// One did.
    pub has_failed: bool,
    /// So many reads to come fail.
    pub reads_fail: u64,
    /// One did, or found a block that does not match its checksum.
    pub has_read_failure: bool,
    /// The next device operation never ends.
    pub sticks: bool,
    /// One does not.
    pub is_stuck: bool,
    /// It dies at the last of so many more actions; from then on none happens.
    pub actions_left: Option<u64>,
    pub dies_by_power: bool,
    /// Device work under way.
    pub operations: BTreeMap<u64, Operation>,
    /// Posts not answered, by shard.
    pub posts: BTreeSet<(u16, IoToken)>,
    /// When the last item of each queue arrives: queues keep their order.
    pub arrivals: BTreeMap<Queue, u64>,
    pub tick_at: Option<u64>,
    /// Buffers of reads whose client has left, by tag: their frontend frees them once they are answered.
    pub left_reads: BTreeMap<u64, (BufferId, u32)>,
    /// Sealed by it, and not known to be on both sides: what it may be ahead by.
    pub ahead: BTreeMap<CpNumber, Ahead>,
}

/// A CP that a primary is ahead by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    /// Virtual time at which its coordinator first knew that a shard had sealed it.
    pub since: u64,
    /// Data and records that the coordinator knows of.
    pub bytes: u64,
}

/// An ordered queue inside a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Queue {
    Frontend(u64, ShardId),
    Orders(ShardId),
    Reports(ShardId),
    Control,
}

/// The counter that orders admissions.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    pub open: Option<CpNumber>,
    pub marked: ShardSet,
}

impl Gate {
    pub fn is_open_empty(&self) -> bool {
        self.marked.is_empty()
    }

    /// The newest CP that a write answered by now can be in.
    pub fn newest_written(&self) -> CpNumber {
        let open = self.open.unwrap_or_default();
        if self.is_open_empty() { open.previous() } else { open }
    }
}

/// Device work of a machine.
#[derive(Debug)]
pub(crate) struct Operation {
    /// The coordinator's if none.
    pub shard: Option<ShardId>,
    pub io: IoToken,
    pub kind: Kind,
}

/// What kind of device work.
#[derive(Debug)]
pub(crate) enum Kind {
    WriteData { buffers: Vec<BufferId> },
    WriteMetadata,
    ReadData { buffer: BufferId, checksums: Vec<Checksum> },
    ReadMetadata,
    Fill { buffer: BufferId, keep: std::ops::Range<usize>, checksum: Checksum },
    Flush { mark: u64 },
}

impl Process {
    /// Whether it began as a primary, deposed since or not.
    pub fn leads(&self) -> bool {
        self.gate.open.is_some()
    }

    /// When something put now with `delay_ns` in a queue comes out of it.
    pub fn arrival(&mut self, queue: Queue, now: u64, delay_ns: u64) -> u64 {
        let last = self.arrivals.entry(queue).or_insert(0);
        *last = (*last).max(now + delay_ns);
        *last
    }

    /// Whether an order or a report is on its way.
    pub fn has_mail(&self, now: u64) -> bool {
        let is_mail = |queue: &Queue| matches!(queue, Queue::Orders(_) | Queue::Reports(_));
        self.arrivals.iter().any(|(queue, time)| is_mail(queue) && *time > now)
    }

    /// When all that frontends have sent to a shard has arrived.
    pub fn frontends_done(&self, shard: ShardId) -> u64 {
        let of_shard = |queue: &Queue| matches!(queue, Queue::Frontend(_, to) if *to == shard);
        let times =
            self.arrivals.iter().filter(|(queue, _)| of_shard(queue)).map(|(_, time)| *time);
        times.max().unwrap_or(0)
    }
}
