//! What all workers of a node see: the arena, the gate, who owns what, the exports, and counters.
//!
//! Invariant: nothing here is locked on the data path; the exports' lock is taken when a client connects or leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::request::{Operation, Request};
use twinpoint_core::units::{BufferId, ShardId};

use crate::buffers::Arena;
use crate::efficiency::{ThreadCosts, sum};
use crate::exports::Exports;
use crate::gate::Gate;
use crate::mail::{Mail, Mailbox};
use crate::status::{DeviceTraffic, EfficiencyStatus, TrafficStatus, WireTraffic};

/// See the module.
pub(crate) struct Shared {
    pub arena: Arc<Arena>,
    pub gate: Gate,
    pub geometry: Geometry,
    pub workers: usize,
    /// Clients on threads of their own, numbered after the workers.
    pub local_clients: usize,
    /// Buffers of each pool; worker or local client `w` has those from `w * pool_buffers` on.
    pub pool_buffers: u32,
    pub traffic: Traffic,
    pub shards: Vec<CachePadded<ShardGauges>>,
    /// Of each participant.
    costs: Vec<CachePadded<ThreadCosts>>,
    pub clients: AtomicU32,
    /// Bytes admitted since the last seal, and how many make one.
    pub staged_bytes: CachePadded<AtomicU64>,
    pub cp_bytes: u64,
    holding: AtomicBool,
    refusing: AtomicBool,
    keeping: AtomicBool,
    pub exports: Exports,
}

/// Bytes moved since the node began.
#[derive(Default)]
pub(crate) struct Traffic {
    pub client_written: CachePadded<AtomicU64>,
    pub client_read: CachePadded<AtomicU64>,
    pub device_data: CachePadded<AtomicU64>,
    pub device_metadata: CachePadded<AtomicU64>,
    pub wire_data: CachePadded<AtomicU64>,
    pub wire_records: CachePadded<AtomicU64>,
    pub wire_messages: CachePadded<AtomicU64>,
}

impl Traffic {
    pub fn status(&self) -> TrafficStatus {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TrafficStatus {
            client_bytes_written: load(&self.client_written),
            client_bytes_read: load(&self.client_read),
            device_bytes_written: DeviceTraffic {
                data: load(&self.device_data),
                journal_and_map: load(&self.device_metadata),
            },
            wire_bytes_sent: WireTraffic {
                data: load(&self.wire_data),
                delta: load(&self.wire_records),
                messages: load(&self.wire_messages),
            },
        }
    }
}

/// What a shard last said of itself.
#[derive(Default)]
pub(crate) struct ShardGauges {
    pub free_blocks: AtomicU64,
    pub mapped_blocks: AtomicU64,
    pub map_bytes: AtomicU64,
}

impl Shared {
    pub fn new(
        arena: Arc<Arena>,
        gate: Gate,
        geometry: Geometry,
        (workers, local_clients): (usize, usize),
        pool_buffers: u32,
        cp_bytes: u64,
    ) -> Shared {
        Shared {
            arena,
            gate,
            geometry,
            workers,
            local_clients,
            pool_buffers,
            traffic: Traffic::default(),
            shards: (0..geometry.shards).map(|_| CachePadded::default()).collect(),
            costs: (0..workers + local_clients).map(|_| CachePadded::default()).collect(),
            clients: AtomicU32::new(0),
            staged_bytes: CachePadded::default(),
            cp_bytes,
            holding: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            keeping: AtomicBool::new(false),
            exports: Exports::default(),
        }
    }

    /// Everyone who has a mailbox: the workers, then the local clients.
    pub fn participants(&self) -> usize {
        self.workers + self.local_clients
    }

    /// Where a participant counts what its work costs.
    pub fn costs(&self, participant: usize) -> &ThreadCosts {
        &self.costs[participant]
    }

    /// What the work of all participants cost.
    pub fn efficiency(&self) -> EfficiencyStatus {
        sum(self.costs.iter().map(|costs| &**costs))
    }

    /// The worker that owns a shard.
    pub fn owner(&self, shard: ShardId) -> usize {
        usize::from(shard.0) % self.workers
    }

    /// The worker whose pool a buffer is of.
    pub fn pool_of(&self, buffer: BufferId) -> usize {
        (buffer.0 / self.pool_buffers) as usize
    }

    /// Whether writers wait. Not for what is refused anyway.
    pub fn is_holding(&self) -> bool {
        self.holding.load(Ordering::Relaxed) && !self.is_refusing()
    }

    pub fn set_holding(&self, holding: bool) {
        self.holding.store(holding, Ordering::Relaxed);
    }

    /// The store failed or was deposed: nothing is answered well any more, and what waits waits for nothing.
    pub fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Acquire)
    }

    pub fn set_refusing(&self) {
        self.refusing.store(true, Ordering::Release);
    }

    /// The node stops, and block devices wait for its next start: the kernel is answered nothing any more.
    pub fn is_keeping(&self) -> bool {
        self.keeping.load(Ordering::Acquire)
    }

    /// Before whatever may bring queues an answer that they must not pass on: who hears of that sees this.
    pub fn set_keeping(&self) {
        self.keeping.store(true, Ordering::Release);
    }

    pub fn count_request(&self, request: &Request) {
        let length = u64::from(request.length);
        match request.operation {
            Operation::Write { .. } => {
                self.traffic.client_written.fetch_add(length, Ordering::Relaxed);
                self.staged_bytes.fetch_add(length, Ordering::Relaxed);
            }
            Operation::Read { .. } => {
                self.traffic.client_read.fetch_add(length, Ordering::Relaxed);
            }
            Operation::Unmap | Operation::Status => {}
        }
    }

    /// Admits a request: stamps it and gives it to its shard's owner, whose ring has room. Between the stamp and the
    /// ring nothing waits (R2). The first write of a CP is told to the coordinator.
    pub fn admit(
        &self,
        mailbox: &mut Mailbox,
        participant: usize,
        shard: ShardId,
        mut request: Request,
    ) {
        let is_write = matches!(request.operation, Operation::Write { .. } | Operation::Unmap);
        let admission = self.gate.admit(participant);
        let is_first = is_write && admission.mark(shard);
        request.stamp = admission.stamp();
        mailbox.send(self.owner(shard), Mail::Request(shard, request));
        drop(admission);
        if is_first {
            mailbox.send(0, Mail::FirstWrite);
        }
    }

    /// Whether enough is staged for a CP.
    pub fn is_point_due(&self) -> bool {
        self.staged_bytes.load(Ordering::Relaxed) >= self.cp_bytes
    }
}
