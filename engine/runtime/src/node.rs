//! A node: one store, its workers, and the threads around them. Opening and ending; nothing here is on the data path.
//!
//! ```text
//!   Node::start: open store -> recover -> arena -> workers   (again after a restart that the coordinator asked for)
//!                link (dials, listens), control socket       (stay while the workers come and go)
//! ```
//!
//! Invariants: the store is held exclusively from before the first read; no worker runs before every repair that
//! recovery asked for is durable; a worker that panics takes the whole process with it, for the others would wait.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rdma_fallback::{Key, KeyError, Region, Span};
use twinpoint_core::contract::{Command, Refusal, Reply};
use twinpoint_core::coordinator::{Coordinator, CoordinatorOptions, CoordinatorStatus};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::{Hello, Role};
use twinpoint_core::recovery::Recovered;
use twinpoint_core::shard::Shard;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Instant as CoreInstant, ShardId, Term};

use crate::buffers::{Arena, Pool};
use crate::calls::Caller;
use crate::clients::Clients;
use crate::control::{ControlServer, Operator};
use crate::coordinator_port::{CoordinatorPort, Exit, Latencies};
use crate::device::{Caching, DeviceError, OpenMode, StoreFile};
use crate::gate::Gate;
use crate::link::{LENT_BLOCKS_MIN, Link, LinkNode, LinkOptions, NewSession};
use crate::local::{COMMANDS_MAX, LocalClient, LocalSeed};
use crate::mail::{Mailbox, connect};
use crate::options::{NbdAddress, NodeOptions};
use crate::shard_port::ShardPort;
use crate::shared::Shared;
use crate::sockets::NbdListener;
use crate::status::{
    CpLatencyStatus, CpStatus, DeviceTraffic, LagStatus, LatencyStatus, NodeStatus, PeerStatus,
    STATUS_SCHEMA, SpaceStatus, TrafficStatus, VolumeStatus, WireTraffic,
};
use crate::store::{StoreError, open_and_recover};
use crate::store_port::{METADATA_BUFFERS, Operations, StorePort};
use crate::uring::{Uring, UringError, UringOptions};
use crate::wake::{Sleeper, Waker, waker};
use crate::worker::Worker;

/// How long a call of an operator may take: a checkpoint waits for the peer.
const COMMAND_LIMIT: Duration = Duration::from_secs(3600);
/// How long the link waits for the coordinator.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// How long a stop may take before the node ends without settling.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Part of each pool that plain requests leave to reads of old contents and to catching up.
const RESERVE_PART: u32 = 8;

/// A running node.
pub struct Node {
    handle: NodeHandle,
    link: Option<Link>,
    control: Option<ControlServer>,
    supervisor: Option<JoinHandle<Result<(), NodeError>>>,
    nbd: Vec<NbdAddress>,
}

/// Speaks with a node from any thread.
#[derive(Clone)]
pub struct NodeHandle {
    inner: Arc<Inner>,
}

/// What stays while the workers come and go.
struct Inner {
    options: NodeOptions,
    geometry: Geometry,
    caller: Caller,
    arena: Arc<Arena>,
    lends: Vec<(BufferId, u32)>,
    latencies: Arc<Mutex<Latencies>>,
    shared: Mutex<Option<Arc<Shared>>>,
    /// Of the workers that run now, those that nobody took yet.
    locals: Mutex<Vec<LocalClient>>,
    stopping: AtomicBool,
    began: Instant,
}

/// Why a node does not start, or ended.
#[derive(Debug)]
pub enum NodeError {
    /// The store's device.
    Device(DeviceError),
    /// The store's contents.
    Store(StoreError),
    /// The store followed a primary; only a promotion makes it one.
    NotPromoted(PathBuf),
    /// Another store took over in this term.
    Deposed(PathBuf, Term),
    /// The key file.
    Key(KeyError),
    /// A peer or a listening address needs a key.
    KeyMissing,
    /// The memory given is too small: at least so many bytes.
    Memory {
        /// Which option.
        option: &'static str,
        /// The least, in bytes.
        least_bytes: u64,
    },
    /// A named core does not exist or may not be used.
    Core(usize),
    /// An address cannot be used.
    Address(String, std::io::Error),
    /// The io_uring of a worker.
    Uring(UringError),
    /// The system refused a thread or memory.
    System(std::io::Error),
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeError::Device(error) => error.fmt(f),
            NodeError::Store(error) => error.fmt(f),
            NodeError::NotPromoted(path) => write!(
                f,
                "{}: this store followed a primary: start it with --role secondary, or make it primary with \
                 `twinpoint promote`",
                path.display()
            ),
            NodeError::Deposed(path, term) => write!(
                f,
                "{}: term {term} was opened on the other store: start this one with --role secondary",
                path.display()
            ),
            NodeError::Key(error) => error.fmt(f),
            NodeError::KeyMissing => {
                f.write_str("--peer and --listen need --key-file; make one with `twinpoint key`")
            }
            NodeError::Memory { option, least_bytes } => {
                write!(
                    f,
                    "{option} is too small: give at least {} MiB",
                    least_bytes.div_ceil(1 << 20)
                )
            }
            NodeError::Core(core) => {
                write!(f, "--cores: core {core} does not exist or may not be used")
            }
            NodeError::Address(address, error) => {
                write!(f, "{address}: {error}; choose another address")
            }
            NodeError::Uring(error) => error.fmt(f),
            NodeError::System(error) => {
                write!(f, "the system refused a thread, a descriptor or memory: {error}")
            }
        }
    }
}

impl std::error::Error for NodeError {}

impl Node {
    /// Opens the store and starts to serve.
    ///
    /// # Errors
    /// Anything that keeps the node from serving.
    pub fn start(options: NodeOptions) -> Result<Node, NodeError> {
        Node::start_with_local(options, 0)
    }

    /// As [`Node::start`], with clients inside this process, each on a thread and with a part of the memory of its
    /// own: see [`NodeHandle::local_client`].
    ///
    /// # Errors
    /// Anything that keeps the node from serving.
    pub fn start_with_local(options: NodeOptions, local_clients: usize) -> Result<Node, NodeError> {
        let key = load_key(&options)?;
        let caching = if options.buffered { Caching::BufferedAllowed } else { Caching::DirectOnly };
        let store = StoreFile::open_with(&options.store, OpenMode::Exclusive, caching)
            .map_err(NodeError::Device)?;
        let recovered = open_and_recover(&store, None).map_err(NodeError::Store)?;
        check_role(&options, &recovered)?;
        let geometry = recovered.coordinator.superblock.geometry;
        let plan = plan_memory(&options, local_clients, &geometry)?;
        let arena = Arc::new(Arena::new(plan.bytes()).map_err(NodeError::System)?);
        let listeners = options.nbd.iter().map(bind).collect::<Result<Vec<_>, _>>()?;
        let nbd = listeners.iter().map(|listener| listener.address.clone()).collect();
        let inner = Arc::new(Inner {
            geometry,
            caller: Caller::default(),
            arena,
            lends: plan.lends(),
            latencies: Arc::new(Mutex::new(Latencies::new())),
            shared: Mutex::new(None),
            locals: Mutex::default(),
            stopping: AtomicBool::new(false),
            began: Instant::now(),
            options,
        });
        let handle = NodeHandle { inner: Arc::clone(&inner) };
        let (started, starting) = channel();
        let supervisor = thread::Builder::new()
            .name("supervisor".to_owned())
            .spawn(move || supervise(&inner, store, recovered, &plan, listeners, &started))
            .map_err(NodeError::System)?;
        if starting.recv().is_err() {
            return Err(join(supervisor)
                .err()
                .unwrap_or(NodeError::System(std::io::Error::other("no worker"))));
        }
        handle.wait_until_published(&supervisor);
        let mut node =
            Node { handle, link: None, control: None, supervisor: Some(supervisor), nbd };
        if let Err(error) = node.start_around(key) {
            node.handle.stop();
            // The first error is the one to tell.
            _ = node.end();
            return Err(error);
        }
        Ok(node)
    }

    /// Speaks with the node.
    #[must_use]
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// Where NBD clients connect, with the ports that the kernel chose.
    #[must_use]
    pub fn nbd_addresses(&self) -> Vec<NbdAddress> {
        self.nbd.clone()
    }

    /// Where a primary may dial, with the port that the kernel chose.
    #[must_use]
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.link.as_ref().and_then(Link::listen_address)
    }

    /// Waits until the node has stopped.
    ///
    /// # Errors
    /// Why it ended by itself.
    pub fn wait(mut self) -> Result<(), NodeError> {
        self.end()
    }

    fn start_around(&mut self, key: Option<Key>) -> Result<(), NodeError> {
        let options = &self.handle.inner.options;
        if let Some(key) = key {
            let link = LinkOptions {
                peer: options.peer.clone(),
                listen: options.listen.clone(),
                key,
                timeout: options.peer_timeout,
            };
            let name = options.listen.clone().unwrap_or_default();
            let link = Link::start(Arc::new(self.handle.clone()), link);
            self.link = Some(link.map_err(|error| NodeError::Address(name, error))?);
        }
        let control = ControlServer::start(&options.control, Arc::new(self.handle.clone()));
        let name = options.control.display().to_string();
        self.control = Some(control.map_err(|error| NodeError::Address(name, error))?);
        Ok(())
    }

    fn end(&mut self) -> Result<(), NodeError> {
        let result = self.supervisor.take().map_or(Ok(()), join);
        self.handle.inner.stopping.store(true, Ordering::SeqCst);
        if let Some(link) = self.link.take() {
            link.stop();
        }
        drop(self.control.take());
        result
    }
}

impl NodeHandle {
    /// Commits what is staged, writes the map, marks the store clean, and ends.
    pub fn stop(&self) {
        if self.inner.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        let caller = self.inner.caller.clone();
        let stopper = move || {
            if caller.command(Command::Stop, STOP_LIMIT).is_none() {
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

    /// Waits until clients are let in, or the node ended.
    fn wait_until_published(&self, supervisor: &JoinHandle<Result<(), NodeError>>) {
        let is_published = || {
            let shared = self.inner.shared.lock().expect("nobody panics with it");
            shared.as_ref().is_some_and(|shared| shared.is_published())
        };
        while !is_published() && !supervisor.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Has an operator's command carried out.
    #[must_use]
    pub fn command(&self, command: Command) -> Reply {
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

/// How the arena is cut: pools of the workers and then of the local clients, lent memory of the lanes, metadata
/// buffers of the workers.
struct MemoryPlan {
    workers: u32,
    local_clients: u32,
    pool: u32,
    shards: u32,
    lent: u32,
}

impl MemoryPlan {
    fn bytes(&self) -> usize {
        (self.metadata_start() + self.workers * METADATA_BUFFERS) as usize * BLOCK_BYTES
    }

    fn lent_start(&self) -> u32 {
        (self.workers + self.local_clients) * self.pool
    }

    fn metadata_start(&self) -> u32 {
        self.lent_start() + self.shards * self.lent
    }

    fn lends(&self) -> Vec<(BufferId, u32)> {
        (0..self.shards)
            .map(|shard| (BufferId(self.lent_start() + shard * self.lent), self.lent))
            .collect()
    }

    fn metadata_first(&self, worker: usize) -> BufferId {
        BufferId(self.metadata_start() + worker as u32 * METADATA_BUFFERS)
    }
}

fn plan_memory(
    options: &NodeOptions,
    local_clients: usize,
    geometry: &Geometry,
) -> Result<MemoryPlan, NodeError> {
    let workers = options.cores.len().max(1) as u32;
    let shards = u32::from(geometry.shards);
    let blocks = |bytes: u64| u32::try_from(bytes / BLOCK_BYTES as u64).unwrap_or(u32::MAX / 4);
    // Every worker needs room for a few large requests besides its reserve.
    const POOL_MIN: u32 = 2048;
    let local_clients = u32::try_from(local_clients).unwrap_or(u32::MAX / 4);
    let pools = workers.saturating_add(local_clients);
    let pool = blocks(options.memory_bytes) / pools;
    if pool < POOL_MIN {
        let least_bytes = u64::from(POOL_MIN) * u64::from(pools) * BLOCK_BYTES as u64;
        return Err(NodeError::Memory { option: "--memory", least_bytes });
    }
    let paired = options.peer.is_some() || options.listen.is_some();
    let lent = if paired { blocks(options.lent_bytes) / shards } else { 0 };
    if paired && lent < LENT_BLOCKS_MIN {
        let least_bytes = u64::from(LENT_BLOCKS_MIN * shards) * BLOCK_BYTES as u64;
        return Err(NodeError::Memory { option: "--lent-memory", least_bytes });
    }
    Ok(MemoryPlan { workers, local_clients, pool, shards, lent })
}

fn load_key(options: &NodeOptions) -> Result<Option<Key>, NodeError> {
    if options.peer.is_none() && options.listen.is_none() {
        return Ok(None);
    }
    let path = options.key_file.as_ref().ok_or(NodeError::KeyMissing)?;
    Key::load(path).map(Some).map_err(NodeError::Key)
}

fn check_role(options: &NodeOptions, recovered: &Recovered) -> Result<(), NodeError> {
    let superblock = &recovered.coordinator.superblock;
    if options.role == Role::Secondary {
        return Ok(());
    }
    if let Some(term) = superblock.deposed_by {
        return Err(NodeError::Deposed(options.store.clone(), term));
    }
    if superblock.secondary {
        return Err(NodeError::NotPromoted(options.store.clone()));
    }
    Ok(())
}

fn bind(address: &NbdAddress) -> Result<NbdListener, NodeError> {
    NbdListener::bind(address).map_err(|error| {
        let name = match address {
            NbdAddress::Tcp(address) => address.clone(),
            NbdAddress::Unix(path) => path.display().to_string(),
        };
        NodeError::Address(name, error)
    })
}

/// Runs the workers, again and again while the coordinator asks for a restart.
fn supervise(
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
            store: store.descriptor(),
            core: options.cores.get(index).copied(),
            poll: options.poll,
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
    if (0..workers).all(|_| readiness.recv().is_ok()) {
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
    store: std::os::fd::RawFd,
    core: Option<usize>,
    poll: Duration,
    began: Instant,
}

fn work(seed: Seed, ready: &Sender<()>, may_go: &Receiver<()>) -> Result<(), NodeError> {
    let _guard = AbortOnPanic;
    if let Some(core) = seed.core {
        pin(core)?;
    }
    let mut uring = Uring::new(UringOptions::default()).map_err(NodeError::Uring)?;
    match uring.register_arena(&seed.shared.arena) {
        Ok(()) => {}
        Err(error @ UringError::LockedMemory { .. }) => {
            eprintln!("twinpoint: {error}; going on without registered buffers, slower");
        }
        Err(error) => return Err(NodeError::Uring(error)),
    }
    uring.register_files(&[seed.store]).map_err(NodeError::Uring)?;
    let (first, count) = seed.pool;
    let mut worker = Worker {
        index: seed.index,
        shared: seed.shared,
        uring,
        sleeper: seed.sleeper,
        mailbox: seed.mailbox,
        pool: Pool::new(first, count, count / RESERVE_PART),
        store: StorePort::new(seed.metadata_first),
        operations: Operations::default(),
        clients: Clients::default(),
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
    };
    // If another worker could not be made, its reason is told, and this one ends.
    if ready.send(()).is_err() || may_go.recv().is_err() {
        return Ok(());
    }
    worker.begin_coordinator();
    worker.run().map_err(NodeError::Uring)
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

fn join(thread: JoinHandle<Result<(), NodeError>>) -> Result<(), NodeError> {
    thread
        .join()
        .unwrap_or_else(|_| Err(NodeError::System(std::io::Error::other("a thread panicked"))))
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
                transport: is_up.then(|| "tcp".to_owned()),
                address: self
                    .inner
                    .options
                    .peer
                    .clone()
                    .filter(|_| coordinator.role == Role::Primary),
            },
            alone_since: coordinator.alone_since.map(|cp| cp.0),
            base_given_up: coordinator.base_given_up,
            holding_writers: coordinator.holding,
            failed: coordinator.failed,
            space: SpaceStatus::new(
                data_blocks,
                sum(|gauges| &gauges.free_blocks),
                sum(|gauges| &gauges.map_bytes),
                sum(|gauges| &gauges.mapped_blocks),
            ),
            volumes: shared
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
            traffic: TrafficStatus {
                client_bytes_written: load(&shared.traffic.client_written),
                client_bytes_read: load(&shared.traffic.client_read),
                device_bytes_written: DeviceTraffic {
                    data: load(&shared.traffic.device_data),
                    journal_and_map: load(&shared.traffic.device_metadata),
                },
                wire_bytes_sent: WireTraffic {
                    data: load(&shared.traffic.wire_data),
                    delta: load(&shared.traffic.wire_records),
                    messages: load(&shared.traffic.wire_messages),
                },
            },
            clients: u64::from(shared.clients.load(Ordering::Relaxed)),
            uptime_seconds: self.inner.began.elapsed().as_secs(),
        }
    }
}
