//! The threads of a node: made when the store was recovered, joined when they end, made again after a restart.
//!
//! Invariants: an io_uring stays with the thread that made it; no worker runs before all could be made; a worker that
//! panics takes the whole process with it, for the others would wait.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use twinpoint_core::coordinator::{Coordinator, CoordinatorOptions};
use twinpoint_core::recovery::Recovered;
use twinpoint_core::shard::Shard;
use twinpoint_core::units::{BufferId, Instant as CoreInstant};

use super::memory::MemoryPlan;
use super::{Inner, NodeError, join};
use crate::buffers::Pool;
use crate::clients::Clients;
use crate::coordinator_port::{CoordinatorPort, Exit};
use crate::device::{DeviceMode, StoreFile, StoreTarget};
use crate::gate::Gate;
use crate::local::{COMMANDS_MAX, LocalClient, LocalSeed};
use crate::mail::{Mailbox, connect};
use crate::options::NodeOptions;
use crate::shard_port::ShardPort;
use crate::shared::Shared;
use crate::sockets::NbdListener;
use crate::store::open_and_recover;
use crate::store_port::{Operations, StorePort};
use crate::ublk::UblkPort;
use crate::uring::{Uring, UringError, UringOptions};
use crate::wake::{Sleeper, Waker, waker};
use crate::worker::Worker;

/// Part of each pool that plain requests leave to reads of old contents and to catching up.
const RESERVE_PART: u32 = 8;

/// Places in each io_uring for block devices.
const UBLK_PLACES: u32 = 4096;

/// Runs the workers, again and again while the coordinator asks for a restart.
pub(super) fn supervise(
    inner: &Arc<Inner>,
    store: StoreFile,
    recovered: Recovered,
    plan: &MemoryPlan,
    listeners: Vec<NbdListener>,
    started: &Sender<()>,
) -> Result<(), NodeError> {
    let mut recovered = Some(recovered);
    let mut ceiling = None;
    loop {
        let recovered = match recovered.take() {
            Some(recovered) => recovered,
            None => open_and_recover(&store, ceiling).map_err(NodeError::Store)?,
        };
        match run_workers(inner, &store, recovered, plan, &listeners, started)? {
            Exit::Stopped => return Ok(()),
            Exit::Restart(cp) => ceiling = Some(cp),
        }
    }
}

/// Starts the workers and waits for them.
fn run_workers(
    inner: &Arc<Inner>,
    store: &StoreFile,
    recovered: Recovered,
    plan: &MemoryPlan,
    listeners: &[NbdListener],
    started: &Sender<()>,
) -> Result<Exit, NodeError> {
    let workers = plan.workers as usize;
    let local_clients = plan.local_clients as usize;
    let options = &inner.options;
    let committed = recovered.coordinator.committed;
    let base = recovered.coordinator.base;
    let term = recovered.coordinator.superblock.term;
    let gate = Gate::new(workers + local_clients, committed.next());
    let arena = Arc::clone(&inner.arena);
    let counts = (workers, local_clients);
    let shared =
        Arc::new(Shared::new(arena, gate, inner.geometry, counts, plan.pool, options.cp_bytes));
    *inner.shared.lock().expect("nobody panics with it") = Some(Arc::clone(&shared));
    let ends = (0..workers + local_clients)
        .map(|_| waker())
        .collect::<Result<Vec<_>, _>>()
        .map_err(NodeError::System)?;
    let (wakers, sleepers): (Vec<Waker>, Vec<Sleeper>) = ends.into_iter().unzip();
    let calls = inner.caller.connect(wakers[0].clone());
    let exit = Arc::new(Mutex::new(None));
    let mut shards: Vec<Option<Shard>> = recovered
        .shards
        .into_iter()
        .map(|image| Some(Shard::new(image, term, committed, base)))
        .collect();
    let coordinator = Coordinator::new(
        recovered.coordinator,
        options.role,
        coordinator_options(options),
        CoreInstant(0),
    );
    let port = CoordinatorPort::new(
        coordinator,
        calls,
        inner.lends.clone(),
        Arc::clone(&inner.latencies),
        Arc::clone(&exit),
    );
    let mut port = Some(Box::new(port));
    let began = Instant::now();
    let (ready, readiness) = channel();
    let mut threads = Vec::new();
    let mut go = Vec::new();
    // A local client is sent at most one mail for each of its buffers and one for each of its requests.
    let local_entries =
        (2 * plan.pool as usize + COMMANDS_MAX).next_power_of_two().max(options.ring_entries);
    let mut mailboxes = connect(&wakers, workers, options.ring_entries, local_entries);
    let mut sleepers = sleepers;
    let locals = mailboxes.drain(workers..).zip(sleepers.drain(workers..)).enumerate();
    let locals = locals.map(|(local, (mailbox, sleeper))| {
        let index = workers + local;
        let pool = (BufferId(index as u32 * plan.pool), plan.pool);
        LocalClient::new(LocalSeed { index, shared: Arc::clone(&shared), mailbox, sleeper, pool })
    });
    *inner.locals.lock().expect("nobody panics with them") = locals.collect();
    for (index, (mailbox, sleeper)) in mailboxes.into_iter().zip(sleepers).enumerate() {
        let owned =
            (0..shards.len()).map(|s| shards[s].take_if(|_| s % workers == index)).collect();
        let seed = Seed {
            index,
            shared: Arc::clone(&shared),
            mailbox,
            sleeper,
            shards: owned,
            coordinator: port.take(),
            listeners: if index == 0 { duplicate(listeners)? } else { Vec::new() },
            metadata_first: plan.metadata_first(index),
            pool: (BufferId(index as u32 * plan.pool), plan.pool),
            store: store.target(),
            device: options.device,
            core: options.cores.get(index).copied(),
            poll: options.poll,
            ublk_places: if options.ublk.volumes.is_empty() { 0 } else { UBLK_PLACES },
            began,
        };
        let ready = ready.clone();
        let (sender, may_go) = channel();
        go.push(sender);
        let thread = thread::Builder::new().name(format!("shard-{index}"));
        let thread = thread.spawn(move || work(seed, &ready, &may_go));
        threads.push(thread.map_err(NodeError::System)?);
    }
    drop(ready);
    if (0..workers).all(|_| readiness.recv() == Ok(true)) {
        // A worker that ended since tells why when it is joined.
        go.iter().for_each(|go| _ = go.send(()));
        // Nobody waits for it after a restart.
        _ = started.send(());
    }
    drop(go);
    let mut result = Ok(());
    for thread in threads {
        result = result.and(join(thread));
    }
    inner.caller.disconnect();
    inner.locals.lock().expect("nobody panics with them").clear();
    result?;
    let exit = exit.lock().expect("nobody panics with it").take();
    Ok(exit.unwrap_or(Exit::Stopped))
}

/// What a worker's thread is made of; the rest it makes itself, for an io_uring stays with its thread.
struct Seed {
    index: usize,
    shared: Arc<Shared>,
    mailbox: Mailbox,
    sleeper: Sleeper,
    shards: Vec<Option<Shard>>,
    coordinator: Option<Box<CoordinatorPort>>,
    listeners: Vec<OwnedFd>,
    metadata_first: BufferId,
    pool: (BufferId, u32),
    store: StoreTarget,
    device: DeviceMode,
    core: Option<usize>,
    poll: Duration,
    ublk_places: u32,
    began: Instant,
}

/// Makes a worker and, when all could be made, runs it. `ready` hears in any case whether this one could.
fn work(seed: Seed, ready: &Sender<bool>, may_go: &Receiver<()>) -> Result<(), NodeError> {
    let _guard = AbortOnPanic;
    let worker = make_worker(seed);
    // If another worker could not be made, its reason is told, and this one ends.
    _ = ready.send(worker.is_ok());
    let mut worker = worker?;
    if may_go.recv().is_err() {
        return Ok(());
    }
    worker.begin_coordinator();
    if let Err(error) = worker.run() {
        // The other workers would wait for this one for ever.
        eprintln!(
            "twinpoint: a worker cannot go on: {error}; the process ends, recovery will do the rest"
        );
        std::process::exit(1);
    }
    Ok(())
}

fn make_worker(seed: Seed) -> Result<Worker, NodeError> {
    if let Some(core) = seed.core {
        pin(core)?;
    }
    let mut sizes = UringOptions { device: seed.device, ..UringOptions::default() };
    // The fetches of block devices hold their places for good.
    sizes.in_flight_max += seed.ublk_places;
    let mut uring = Uring::new(sizes).map_err(NodeError::Uring)?;
    match uring.register_arena(&seed.shared.arena) {
        Ok(()) => {}
        Err(error @ UringError::LockedMemory { .. }) => {
            eprintln!("twinpoint: {error}; going on without registered buffers, slower");
        }
        Err(error) => return Err(NodeError::Uring(error)),
    }
    uring.register_store(seed.store).map_err(NodeError::Uring)?;
    let (first, count) = seed.pool;
    Ok(Worker {
        index: seed.index,
        shared: seed.shared,
        uring,
        sleeper: seed.sleeper,
        mailbox: seed.mailbox,
        pool: Pool::new(first, count, count / RESERVE_PART),
        store: StorePort::new(seed.metadata_first),
        operations: Operations::default(),
        clients: Clients::default(),
        ublk: UblkPort::default(),
        shards: seed.shards.into_iter().map(|shard| shard.map(ShardPort::new)).collect(),
        coordinator: seed.coordinator,
        seals: std::collections::VecDeque::new(),
        listeners: seed.listeners,
        accepting: false,
        next_client: 0,
        poll: seed.poll,
        starved: false,
        ring_full: false,
        may_resume: false,
        ending: false,
        began: seed.began,
        round_began: seed.began,
    })
}

/// A thread that unwinds would leave the others waiting for it.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "twinpoint: a worker found the impossible; the process ends, recovery will do the rest"
            );
            std::process::abort();
        }
    }
}

fn pin(core: usize) -> Result<(), NodeError> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let id = cores.into_iter().find(|id| id.id == core).ok_or(NodeError::Core(core))?;
    if core_affinity::set_for_current(id) { Ok(()) } else { Err(NodeError::Core(core)) }
}

fn duplicate(listeners: &[NbdListener]) -> Result<Vec<OwnedFd>, NodeError> {
    listeners
        .iter()
        .map(|listener| listener.socket.try_clone().map_err(NodeError::System))
        .collect()
}

fn coordinator_options(options: &NodeOptions) -> CoordinatorOptions {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    CoordinatorOptions {
        paired: options.peer.is_some(),
        replication: options.replication,
        on_peer_loss: options.on_peer_loss,
        cp_interval_ns: nanoseconds(options.cp_interval),
        points_in_flight: options.cp_in_flight.max(1),
        peer_timeout_ns: nanoseconds(options.peer_timeout),
        lag_points: options.lag_points,
        lag_bytes: options.lag_bytes,
        lag_ns: nanoseconds(options.lag_time),
    }
}
