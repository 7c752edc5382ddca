//! Speaks with a node from any thread: operators' commands, the link's questions, the status.
//!
//! Invariant: nothing here waits longer than its limit, and nothing here is on the data path.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rdma_fallback::{Region, Span};
use twinpoint_core::contract::{Command, Refusal, Reply};
use twinpoint_core::coordinator::CoordinatorStatus;
use twinpoint_core::message::{Hello, Role};
use twinpoint_core::units::{ShardId, StoreId};

use super::{NodeError, NodeHandle};
use crate::control::Operator;
use crate::link::{LinkNode, NewSession};
use crate::local::LocalClient;
use crate::shared::Shared;
use crate::status::{
    BranchStatus, CpLatencyStatus, CpStatus, LagStatus, LatencyStatus, NodeStatus, PeerStatus,
    STATUS_SCHEMA, SpaceStatus, VolumeStatus,
};

use crate::ublk::{Device, UblkNode};

/// How long a call of an operator may take: a checkpoint waits for the peer.
const COMMAND_LIMIT: Duration = Duration::from_secs(3600);
/// How long the link waits for the coordinator.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long a promotion waits for the end of a primary that was just killed, and between two looks.
const PROMOTE_PATIENCE: Duration = Duration::from_secs(2);
const PROMOTE_PAUSE: Duration = Duration::from_millis(20);
/// How long a stop may take before the node ends without settling.
const STOP_LIMIT: Duration = Duration::from_secs(20);

impl NodeHandle {
    /// Commits what is staged, writes the map, marks the store clean, and ends.
    pub fn stop(&self) {
        if self.inner.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let stopper = move || {
            // First, while flushes are still answered.
            inner.ublk.end_and_wait();
            if inner.options.ublk.keep {
                // The stop fails what waits for an absent peer, or for room: devices that are kept are not to hear it.
                let shared = inner.shared.lock().expect("nobody panics with it");
                shared.iter().for_each(|shared| shared.set_keeping());
            }
            if inner.caller.command(Command::Stop, STOP_LIMIT).is_none() {
                eprintln!(
                    "twinpoint: the node does not settle; ending as it is, recovery will do the rest"
                );
                std::process::exit(1);
            }
        };
        if thread::Builder::new().name("stopper".to_owned()).spawn(stopper).is_err() {
            // Without a thread there is no waiting: recovery does the rest.
            std::process::exit(1);
        }
    }

    /// Waits until clients are let in, the store failed, or the node ended.
    pub(super) fn wait_until_published(&self, supervisor: &JoinHandle<Result<(), NodeError>>) {
        let is_published = || {
            let shared = self.inner.shared.lock().expect("nobody panics with it");
            shared
                .as_ref()
                .is_some_and(|shared| shared.exports.is_published() || shared.is_refusing())
        };
        while !is_published() && !supervisor.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Has an operator's command carried out.
    #[must_use]
    pub fn command(&self, command: Command) -> Reply {
        let began = std::time::Instant::now();
        loop {
            let reply = self.command_once(command.clone());
            // A primary that was just killed is connected until the kernel has told: that is no reason to refuse.
            let connected = reply == Reply::Refused(Refusal::PrimaryConnected);
            if !connected || began.elapsed() >= PROMOTE_PATIENCE {
                return reply;
            }
            thread::sleep(PROMOTE_PAUSE);
        }
    }

    fn command_once(&self, command: Command) -> Reply {
        let reply = self.inner.caller.command(command, COMMAND_LIMIT);
        reply.unwrap_or(Reply::Refused(Refusal::Stopping))
    }

    /// A client inside this process; none when all that it was started with were taken. After a restart of the
    /// workers those taken before are over, and there are new ones.
    #[must_use]
    pub fn local_client(&self) -> Option<LocalClient> {
        self.inner.locals.lock().expect("nobody panics with them").pop()
    }

    /// The node's state now; none while it starts or stops.
    #[must_use]
    pub fn status(&self) -> Option<NodeStatus> {
        let coordinator = self.inner.caller.status(HELLO_LIMIT)?;
        let shared = self.inner.shared.lock().expect("nobody panics with it").clone()?;
        Some(self.assemble(&coordinator, &shared))
    }
}

impl LinkNode for NodeHandle {
    fn hello(&self) -> Option<Box<Hello>> {
        match self.inner.caller.command(Command::Hello, HELLO_LIMIT)? {
            Reply::Hello(hello) => Some(hello),
            _ => None,
        }
    }

    fn judge(&self, theirs: Box<Hello>) -> Reply {
        let reply = self.inner.caller.command(Command::Judge(theirs), HELLO_LIMIT);
        reply.unwrap_or(Reply::Refused(Refusal::Stopping))
    }

    fn peer_hello(&self, theirs: Box<Hello>) -> Reply {
        let reply = self.inner.caller.peer_hello(theirs, HELLO_LIMIT);
        reply.unwrap_or(Reply::Refused(Refusal::Stopping))
    }

    fn region(&self) -> Arc<Region> {
        Arc::clone(self.inner.arena.region())
    }

    fn lane_lend(&self, shard: ShardId) -> Span {
        if self.is_primary() {
            return Span::new(0, 0);
        }
        let (first, count) = self.inner.lends[usize::from(shard.0)];
        self.inner.arena.span(first, count)
    }

    fn begin_session(&self, session: NewSession) {
        *self.inner.transport.lock().expect("nobody panics with it") = session.transport();
        self.inner.caller.begin_session(session);
    }

    fn session_is_up(&self) -> bool {
        self.inner.caller.session_is_up()
    }

    fn is_primary(&self) -> bool {
        self.inner.caller.is_primary()
    }

    fn is_stopping(&self) -> bool {
        self.inner.stopping.load(Ordering::SeqCst)
    }

    fn log(&self, text: String) {
        eprintln!("twinpoint: {text}");
    }
}

impl UblkNode for NodeHandle {
    fn shared(&self) -> Option<Arc<Shared>> {
        self.inner.shared.lock().expect("nobody panics with it").clone()
    }

    fn identity(&self) -> Option<(StoreId, u64)> {
        let status = self.inner.caller.status(HELLO_LIMIT)?;
        Some((status.store, status.term))
    }

    fn attach(&self, device: &Arc<Device>) -> bool {
        self.inner.caller.attach(device)
    }

    fn log(&self, text: String) {
        eprintln!("twinpoint: {text}");
    }
}

impl Operator for NodeHandle {
    fn command(&self, command: Command) -> Reply {
        NodeHandle::command(self, command)
    }

    fn status(&self) -> Option<NodeStatus> {
        NodeHandle::status(self)
    }

    fn stop(&self) {
        NodeHandle::stop(self);
    }
}

impl NodeHandle {
    fn assemble(&self, coordinator: &CoordinatorStatus, shared: &Shared) -> NodeStatus {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let sum = |gauge: fn(&crate::shared::ShardGauges) -> &std::sync::atomic::AtomicU64| {
            shared.shards.iter().map(|gauges| load(gauge(gauges))).sum::<u64>()
        };
        let geometry = self.inner.geometry;
        let data_blocks = u64::from(geometry.data_blocks()) * u64::from(geometry.shards);
        let latencies = self.inner.latencies.lock().expect("nobody panics with the latencies");
        let is_up = self.inner.caller.session_is_up();
        let transport = self.inner.transport.lock().expect("nobody panics with it");
        NodeStatus {
            schema: STATUS_SCHEMA,
            role: coordinator.role.into(),
            term: coordinator.term,
            store: coordinator.store.to_string(),
            cp: CpStatus {
                open: coordinator.open.0,
                local: coordinator.committed.0,
                secondary_received: coordinator.received.0,
                secondary: coordinator.confirmed.0,
            },
            base: coordinator.base.0,
            root: coordinator.root.to_string(),
            lag: LagStatus {
                points: coordinator.lag_points,
                bytes: coordinator.lag_bytes,
                seconds: coordinator.lag_ns as f64 / 1e9,
            },
            peer: PeerStatus {
                state: coordinator.peer.to_owned(),
                transport: is_up.then(|| (*transport).to_owned()),
                address: self
                    .inner
                    .options
                    .peer
                    .clone()
                    .filter(|_| coordinator.role == Role::Primary),
            },
            alone_since: coordinator.alone_since.map(|cp| cp.0),
            base_given_up: coordinator.base_given_up,
            branch: coordinator.branch.map(BranchStatus::from),
            holding_writers: coordinator.holding,
            failed: coordinator.failed,
            space: SpaceStatus::new(
                data_blocks,
                sum(|gauges| &gauges.free_blocks),
                sum(|gauges| &gauges.map_bytes),
                sum(|gauges| &gauges.mapped_blocks),
            ),
            volumes: shared
                .exports
                .volumes()
                .into_iter()
                .map(|(volume, uses)| VolumeStatus {
                    name: volume.name,
                    id: volume.id.0,
                    size_bytes: volume.size_bytes,
                    open: u64::from(uses),
                })
                .collect(),
            cp_latency_us: CpLatencyStatus {
                written: LatencyStatus::from_nanoseconds(&latencies.written),
                durable: LatencyStatus::from_nanoseconds(&latencies.durable),
                confirmed: LatencyStatus::from_nanoseconds(&latencies.confirmed),
            },
            traffic: shared.traffic.status(),
            efficiency: shared.efficiency(),
            clients: u64::from(shared.clients.load(Ordering::Relaxed)),
            uptime_seconds: self.inner.began.elapsed().as_secs(),
        }
    }
}
