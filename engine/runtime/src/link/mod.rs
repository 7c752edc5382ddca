//! Link: how two nodes find each other and agree on a session, before step 4 of the flow has a wire.
//!
//! ```text
//!   primary (dials)                                         secondary (listens)
//!   control: dial, prove the key          --------------->  prove the key
//!   ControlHello { session, hello }       --------------->  LinkNode::peer_hello
//!   LinkNode::judge                       <---------------  ControlAccept { hello }
//!   Proceed                               --------------->
//!   lane s: dial, prove, LaneHello { session, s, lent }  ->  matched by session and shard
//!                                         <---------------  LaneAccept { s, lent }
//!           RDMA or TCP, each lane by itself  <---------->  which makes it a wire
//!                                         <---------------  Ready, on control, once every lane is there
//!   begin_session                                           begin_session
//! ```
//!
//! Either side may answer `Refused` with a reason instead; the bytes are in [`setup_message`]. All of this blocks and
//! runs on threads of its own, never on the data path.
//!
//! Invariants:
//! - A caller that has not proved the key costs one of a bounded number of threads for a bounded time, and nothing
//!   else: the node does not hear of it, and at most one line of the log in ten seconds does.
//! - A node has at most one set-up under way; of two, the newer wins. A set-up either hands over all its wires at
//!   once or leaves nothing behind.
//! - Threads that wait for a peer reach the node through [`Shared::visit`] only. Once [`Link::stop`] has returned
//!   nothing visits the node any more; what still waits for a silent peer holds no part of the node, and ends by its
//!   deadline. One that agrees on a transport holds the memory that it would lend until then.

mod acceptor;
mod callers;
mod dialler;
mod explain;
mod gathering;
pub mod setup_message;
mod trouble;
mod word_limit;

#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::mem;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rdma_fallback::rdma::{Choice, RdmaOptions, Settled, Transports};
use rdma_fallback::{Channel, Key, Listener, Region, Span, Wire};
use twinpoint_core::contract::Reply;
use twinpoint_core::message::{DATA_BLOCKS_PER_MESSAGE_MAX, Hello};
use twinpoint_core::units::{BLOCK_BYTES, ShardId};

use self::callers::Callers;
use self::gathering::Desk;
use self::trouble::Trouble;
use self::word_limit::{Refusals, Strangers};

pub use self::explain::explain;

/// Fewest blocks that a secondary must lend on each lane: the longest write command takes half of them at most.
pub const LENT_BLOCKS_MIN: u32 = 2 * DATA_BLOCKS_PER_MESSAGE_MAX;
/// Most blocks that can be lent on one lane: a span's length in bytes has 32 bits.
pub const LENT_BLOCKS_MAX: u32 = u32::MAX / BLOCK_BYTES as u32;

/// How the link speaks with the node. Called from several threads at once; every call must end soon also while the
/// node stops, and none may stop the link.
pub trait LinkNode: Send + Sync + 'static {
    /// What this side says of itself now; none while the node stops or restarts.
    fn hello(&self) -> Option<Box<Hello>>;
    /// On a primary: may a peer that said this follow? [`Reply::Accepted`] or [`Reply::Refused`]. Also called with the
    /// hello of another primary, so that a deposed one learns of it.
    fn judge(&self, theirs: Box<Hello>) -> Reply;
    /// On a secondary: a primary says hello. [`Reply::Hello`] or [`Reply::Refused`].
    fn peer_hello(&self, theirs: Box<Hello>) -> Reply;
    /// The memory that the wires send from and place into.
    fn region(&self) -> Arc<Region>;
    /// The part of the region that this node lends on a lane: whole blocks, [`LENT_BLOCKS_MIN`] at least; empty on a
    /// primary. Called once for each lane of a set-up, before [`LinkNode::begin_session`].
    fn lane_lend(&self, shard: ShardId) -> Span;
    /// Hands a session over.
    fn begin_session(&self, session: NewSession);
    /// Whether a session is up or still ending: true from [`LinkNode::begin_session`] on, before that returns.
    fn session_is_up(&self) -> bool;
    /// Whether this node is primary, and so dials.
    fn is_primary(&self) -> bool;
    /// Whether the node is about to stop.
    fn is_stopping(&self) -> bool;
    /// Something an operator should read: one line.
    fn log(&self, text: String);
}

/// A session that both sides agreed on, with every wire.
#[derive(Debug)]
pub struct NewSession {
    /// What the peer said of itself. Its numbers are possible ones and it has one root for each shard.
    pub hello: Box<Hello>,
    /// The wire between the coordinators. Nothing is lent on it.
    pub control: Wire,
    /// One wire for each shard, in order, with the span that [`LinkNode::lane_lend`] gave.
    pub lanes: Vec<Wire>,
    /// How many blocks the peer lends on each lane: 0 from a primary, else [`LENT_BLOCKS_MIN`] to [`LENT_BLOCKS_MAX`].
    pub lent_blocks: Vec<u32>,
}

impl NewSession {
    /// What the lanes run over, in one word: `rdma`, `tcp`, or `mixed`.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        let over_rdma = self.lanes.iter().filter(|wire| matches!(wire, Wire::Rdma(_))).count();
        match over_rdma {
            0 => "tcp",
            all if all == self.lanes.len() => "rdma",
            _ => "mixed",
        }
    }
}

/// What the link needs to know.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// The peer's address, `host:port`: dialled while the node is primary and has no session.
    pub peer: Option<String>,
    /// Where a primary may dial this node, `host:port`; port 0 is any free one.
    pub listen: Option<String>,
    /// The secret that both nodes hold.
    pub key: Key,
    /// The time for one whole set-up.
    pub timeout: Duration,
    /// What the lanes run over; the control wire is always over TCP.
    pub transport: Choice,
    /// How RDMA is used.
    pub rdma: RdmaOptions,
}

/// The threads that dial and listen for one node.
pub struct Link {
    shared: Arc<Shared>,
    listener: Option<Arc<Listener>>,
    listen_address: Option<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl Link {
    /// Listens, and begins to dial.
    ///
    /// # Errors
    /// What the system says of the address to listen at, or of a thread; RDMA options that are not possible.
    pub fn start(node: Arc<dyn LinkNode>, options: LinkOptions) -> io::Result<Link> {
        let shared = Arc::new(Shared::new(node, &options)?);
        if let Some(obstacle) = shared.transports.obstacle() {
            shared.log(format!("RDMA cannot be used now: {obstacle}"));
        }
        let mut link = Link { shared, listener: None, listen_address: None, threads: Vec::new() };
        if let Some(address) = options.listen {
            let listener = Arc::new(Listener::bind(&address)?);
            link.listen_address = Some(listener.local_address()?);
            link.listener = Some(Arc::clone(&listener));
            let shared = Arc::clone(&link.shared);
            link.spawn("link-accept", move || acceptor::run(&shared, &listener))?;
        }
        if let Some(address) = options.peer {
            let shared = Arc::clone(&link.shared);
            link.spawn("link-dial", move || dialler::run(&shared, &address))?;
        }
        Ok(link)
    }

    /// Where this node listens, with the real port.
    #[must_use]
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.listen_address
    }

    /// Ends dialling and listening, and every set-up under way. Sessions that were handed over go on. Waits for no
    /// peer, only for calls into the node that have begun.
    pub fn stop(mut self) {
        self.shut();
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name.to_owned()).spawn(run)?);
        Ok(())
    }

    fn shut(&mut self) {
        self.shared.stop();
        if let Some(listener) = self.listener.take() {
            listener.close();
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself, and has nothing left to stop.
            let _ = thread.join();
        }
        self.shared.part_from_node();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shut();
    }
}

/// What the link's threads have in common.
struct Shared {
    /// None once the link has stopped.
    node: RwLock<Option<Arc<dyn LinkNode>>>,
    key: Key,
    timeout: Duration,
    transport: Choice,
    transports: Transports,
    /// Why the last lane was made without RDMA: told when the one before was made with it.
    without_rdma: Mutex<Option<String>>,
    stopping: AtomicBool,
    stop_lock: Mutex<()>,
    stop_signal: Condvar,
    /// The set-up that waits for its lanes.
    desk: Desk,
    callers: Arc<Callers>,
    strangers: Mutex<Strangers>,
    refusals: Mutex<Refusals>,
}

impl Shared {
    fn new(node: Arc<dyn LinkNode>, options: &LinkOptions) -> io::Result<Shared> {
        let transports = Transports::new(options.transport, options.rdma.clone(), node.region());
        let transports =
            transports.map_err(|fault| io::Error::new(ErrorKind::InvalidInput, fault))?;
        Ok(Shared {
            node: RwLock::new(Some(node)),
            key: options.key.clone(),
            timeout: options.timeout,
            transport: options.transport,
            transports,
            without_rdma: Mutex::default(),
            stopping: AtomicBool::new(false),
            stop_lock: Mutex::new(()),
            stop_signal: Condvar::new(),
            desk: Desk::default(),
            callers: Arc::default(),
            strangers: Mutex::default(),
            refusals: Mutex::default(),
        })
    }

    /// Calls into the node, unless the link stops. Not to be nested: a stop between the two would wait for ever.
    fn visit<T>(&self, call: impl FnOnce(&Arc<dyn LinkNode>) -> T) -> Result<T, Trouble> {
        if self.is_stopping() {
            return Err(Trouble::Stopping);
        }
        let node = self.node.read().unwrap_or_else(PoisonError::into_inner);
        node.as_ref().map(call).ok_or(Trouble::Stopping)
    }

    /// What the node says of itself now.
    fn hello(&self) -> Result<Box<Hello>, Trouble> {
        self.visit(|node| node.hello())?.ok_or(Trouble::Stopping)
    }

    fn log(&self, text: String) {
        // Who stops needs no more lines of the link.
        let _ = self.visit(|node| node.log(text));
    }

    /// Waits for `time`, less if the link stops.
    fn pause(&self, time: Duration) {
        let guard = lock(&self.stop_lock);
        let stopping = |_: &mut ()| !self.is_stopping();
        drop(self.stop_signal.wait_timeout_while(guard, time, stopping));
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn stop(&self) {
        let guard = lock(&self.stop_lock);
        self.stopping.store(true, Ordering::SeqCst);
        drop(guard);
        self.stop_signal.notify_all();
        self.desk.stop();
    }

    /// Waits for the calls into the node that have begun; there are no others after it.
    fn part_from_node(&self) {
        let node = self.node.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(node);
    }

    /// Agrees with the peer on what a lane runs over, and makes its wire.
    fn settle(
        &self,
        channel: Channel,
        lend: Span,
        limit: Limit,
        went_over_tcp: Option<&str>,
    ) -> Result<Settled, Trouble> {
        let settled = self.transports.settle(channel, lend, limit.left()?, went_over_tcp)?;
        let reason = settled.without_rdma.clone().filter(|_| self.transport != Choice::Tcp);
        let last = mem::replace(&mut *lock(&self.without_rdma), reason.clone());
        if let (None, Some(reason)) = (last, reason) {
            self.log(format!("replicating over TCP: {reason}"));
        }
        Ok(settled)
    }

    /// Hands a whole set-up over, unless the node is no longer what it said it was.
    /// `last_word` goes to the peer before anything of the wire can.
    fn hand_over(
        &self,
        setup: Setup,
        as_primary: bool,
        last_word: impl FnOnce(&mut Channel) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        self.visit(|node| {
            let Setup { hello, mut control, lanes } = setup;
            if node.is_stopping() || node.is_primary() != as_primary {
                return Err(Trouble::Stopping);
            }
            let region = node.region();
            let mut wires = Vec::with_capacity(lanes.len());
            let mut lent_blocks = Vec::with_capacity(lanes.len());
            for lane in lanes {
                lent_blocks.push(lane.lent_blocks);
                wires.push(lane.wire);
            }
            last_word(&mut control)?;
            let control = control.into_wire(region, Span::default()).map_err(Trouble::System)?;
            node.begin_session(NewSession { hello, control, lanes: wires, lent_blocks });
            Ok(())
        })?
    }
}

/// A set-up that needs nothing more from the peer.
struct Setup {
    hello: Box<Hello>,
    control: Channel,
    lanes: Vec<Lane>,
}

/// A lane of a set-up.
struct Lane {
    wire: Wire,
    /// Lent by the peer.
    lent_blocks: u32,
}

/// How many blocks a lent span has.
fn blocks_of(lend: Span) -> u32 {
    assert!(lend.length.is_multiple_of(BLOCK_BYTES as u32), "{lend:?} is not whole blocks");
    lend.length / BLOCK_BYTES as u32
}

/// The moment at which a set-up gives up.
#[derive(Clone, Copy)]
struct Limit(Instant);

impl Limit {
    fn after(time: Duration) -> Limit {
        let now = Instant::now();
        // A time beyond the clock's range is as good as a very long one.
        Limit(now.checked_add(time).unwrap_or(now + Duration::from_secs(86_400)))
    }

    /// The time left, never zero.
    fn left(self) -> Result<Duration, Trouble> {
        match self.0.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(Trouble::Timeout),
            left => Ok(left),
        }
    }
}

/// Locks. What a panicking thread left behind is as whole as any: every change under these locks is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
