//! The coordinator: one for each node. It opens and seals CPs, knows which are durable, confirmed and committed, answers
//! flushes as the replication mode says, and speaks with the peer's coordinator.
//!
//! ```text
//!   open -> sealed -> written -> durable (one flush) -> committed here        points.rs
//!                 \-> received -> durable on the secondary -> confirmed       peer.rs
//! ```
//!
//! Invariants: CP numbers have no gaps; a CP is committed here when all participants' writes are durable and the CP
//! before it is committed (R3); a flush is answered only as R5 says; a change of term, of being alone, or of the base
//! being given up is durable before anything is answered because of it.

mod branch;
mod claim;
mod commands;
mod hello;
mod lag;
mod peer;
mod points;
mod superblock_job;

use std::collections::VecDeque;

use crate::branch::Branch;
use crate::catalog::Catalog;
use crate::contract::{
    CoordinatorAction, CoordinatorEvent, IoFailure, IoToken, Order, Refusal, Reply, Report, Ticket,
};
use crate::message::Role;
use crate::request::Tag;
use crate::superblock::Superblock;
use crate::units::{CpNumber, Instant, Root, ShardId, ShardSet, StoreId, VolumeId};

use peer::Peer;
use points::Point;
pub use points::store_root;
use superblock_job::SuperblockJob;

/// When a flush is answered (R5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replication {
    /// Committed on both sides.
    Sync,
    /// Committed here, and whole in the secondary's memory.
    SemiSync,
    /// Committed here, and the secondary at most the lag behind.
    Async,
}

/// What to do when the peer is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnPeerLoss {
    /// Wait for it.
    Stall,
    /// Carry on alone, after saying so in the store.
    Continue,
}

/// What the operator chose.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CoordinatorOptions {
    /// A peer is configured.
    pub paired: bool,
    /// When a flush is answered.
    pub replication: Replication,
    /// What to do when the peer is lost.
    pub on_peer_loss: OnPeerLoss,
    /// Longest time that a staged write waits for its CP, in nanoseconds.
    pub cp_interval_ns: u64,
    /// Most CPs sealed and not answered at a time.
    pub points_in_flight: usize,
    /// Silence after which the peer is lost, in nanoseconds.
    pub peer_timeout_ns: u64,
    /// Async: most CPs that the secondary may be behind.
    pub lag_points: u64,
    /// Async: most bytes.
    pub lag_bytes: u64,
    /// Async: longest time, in nanoseconds.
    pub lag_ns: u64,
}

/// What recovery found, as far as the coordinator needs it.
#[derive(Clone, Debug)]
pub struct CoordinatorImage {
    /// The superblock, as it is on the device.
    pub superblock: Superblock,
    /// The catalog of the last committed CP.
    pub catalog: Catalog,
    /// The last committed CP.
    pub committed: CpNumber,
    /// The last CP known to be committed on both sides.
    pub base: CpNumber,
    /// Each shard's root at the last committed CP.
    pub roots: Vec<Root>,
}

/// See the module.
#[derive(Debug)]
pub struct Coordinator {
    options: CoordinatorOptions,
    role: Role,
    superblock: Superblock,
    superblock_job: SuperblockJob,
    catalog: Catalog,
    failed: bool,
    /// The store is about to be opened anew: nothing is agreed on any more.
    leaving: bool,
    /// The superblock says that the store is in use, and in which history.
    serving: bool,
    now: Instant,
    open_is_empty: bool,

    /// The CP that takes admissions; the gate is being closed if `closing`.
    open: CpNumber,
    open_since: Option<Instant>,
    closing: bool,
    want_seal: bool,
    want_reap: Vec<ShardId>,
    next: NextPoint,
    /// Sealed or arrived, and not yet committed on both sides.
    points: VecDeque<Point>,
    committed: CpNumber,
    /// The newest CP that a durable record, or the durable superblock, calls committed.
    claimed: CpNumber,
    /// When the last commit was.
    committed_at: Instant,
    /// Each shard's root at `committed`.
    roots: Vec<Root>,
    flush: Option<(IoToken, CpNumber)>,
    flush_waiters: VecDeque<(CpNumber, Tag)>,
    /// Commands whose CP is committed here, or not yet, with what they came to.
    replies: VecDeque<(CpNumber, Ticket, Reply)>,
    holding: bool,
    /// A shard's journal or region is full of what only the base needs, until it is at least this CP.
    base_awaited: CpNumber,
    /// The superblock is being told that the base is given up: until it knows, nothing is reused.
    giving_up_base: bool,

    peer: Peer,
    /// The superblock is being told that this side carries on alone.
    going_alone: bool,
    stopping: Option<Stopping>,
    promoting: Option<Ticket>,
    io_next: u64,
    actions: VecDeque<CoordinatorAction>,
}

/// What the next CP has to carry besides data.
#[derive(Debug, Default)]
struct NextPoint {
    name: Option<String>,
    catalog: Option<Catalog>,
    tickets: Vec<(Ticket, Option<VolumeId>)>,
}

#[derive(Debug)]
struct Stopping {
    ticket: Ticket,
    settling: bool,
    unsettled: ShardSet,
}

/// What `twinpoint status` shows of the coordinator. Versioned by the tool that prints it.
#[derive(Clone, PartialEq, Debug)]
pub struct CoordinatorStatus {
    /// Primary or secondary.
    pub role: Role,
    /// Which store.
    pub store: StoreId,
    /// The term.
    pub term: u64,
    /// The CP that takes writes now.
    pub open: CpNumber,
    /// The last CP committed here.
    pub committed: CpNumber,
    /// The last CP whole in the secondary's memory.
    pub received: CpNumber,
    /// The last CP durable on the secondary.
    pub confirmed: CpNumber,
    /// The last CP committed on both sides.
    pub base: CpNumber,
    /// The newest CP that a durable structure of this store calls committed.
    pub claimed: CpNumber,
    /// The store's root at `committed`.
    pub root: Root,
    /// CPs sealed and not confirmed by the secondary.
    pub lag_points: u64,
    /// Their bytes, as far as known: CPs sealed since this process began.
    pub lag_bytes: u64,
    /// Age of the oldest of them, in nanoseconds.
    pub lag_ns: u64,
    /// The peer, in one word: none, connected, catching-up, absent, diverged, deposed.
    pub peer: &'static str,
    /// Carrying on without the peer since this CP.
    pub alone_since: Option<CpNumber>,
    /// The base was given up: the peer has to be copied anew.
    pub base_given_up: bool,
    /// CPs of an older term that this store alone has.
    pub branch: Option<Branch>,
    /// Writers wait because of the lag.
    pub holding: bool,
    /// The store has failed.
    pub failed: bool,
}

impl Coordinator {
    /// A coordinator for a store as recovery found it. Take its actions before the first event.
    #[must_use]
    pub fn new(
        image: CoordinatorImage,
        role: Role,
        options: CoordinatorOptions,
        now: Instant,
    ) -> Coordinator {
        let mut peer = Peer::new(image.base, now);
        if !image.superblock.secondary || image.superblock.branch.is_some() {
            // What was committed here as a primary may have been answered, and a branch goes by its name only: neither
            // is dropped for anybody without a word.
            peer.answered = image.committed;
        }
        let mut coordinator = Coordinator {
            role,
            open: image.committed.next(),
            open_since: None,
            closing: false,
            want_seal: false,
            want_reap: Vec::new(),
            next: NextPoint::default(),
            points: VecDeque::new(),
            committed: image.committed,
            // The superblock says so before any data is written.
            claimed: image.committed,
            committed_at: now,
            roots: image.roots,
            flush: None,
            flush_waiters: VecDeque::new(),
            replies: VecDeque::new(),
            holding: false,
            base_awaited: CpNumber(0),
            giving_up_base: false,
            peer,
            going_alone: false,
            stopping: None,
            promoting: None,
            superblock: image.superblock,
            superblock_job: SuperblockJob::default(),
            catalog: image.catalog,
            failed: false,
            leaving: false,
            serving: false,
            now,
            open_is_empty: true,
            io_next: 0,
            actions: VecDeque::new(),
            options,
        };
        coordinator.begin();
        coordinator.pump_superblock();
        coordinator
    }

    /// Takes an event in. `open_is_empty` tells whether the gate has seen no write with the open CP's number.
    pub fn handle(&mut self, now: Instant, open_is_empty: bool, event: CoordinatorEvent) {
        self.now = now;
        self.open_is_empty = open_is_empty;
        if open_is_empty {
            self.open_since = None;
        } else if self.open_since.is_none() {
            self.open_since = Some(now);
        }
        match event {
            CoordinatorEvent::Flush(tag) => self.flush_asked(tag),
            CoordinatorEvent::Quiesced { cp, participants } => self.quiesced(cp, participants),
            CoordinatorEvent::Report(shard, report) => self.report(shard, report),
            CoordinatorEvent::Done { io, result } => self.done(io, result),
            CoordinatorEvent::Command(ticket, command) => self.command(ticket, command),
            CoordinatorEvent::PeerHello(ticket, hello) => self.peer_hello(ticket, &hello),
            CoordinatorEvent::PeerUp(session) => self.peer_up(*session),
            CoordinatorEvent::PeerMessage(bytes) => self.peer_message(&bytes),
            CoordinatorEvent::PeerDown(reason) => self.peer_down(&reason),
            CoordinatorEvent::Tick => {}
        }
        self.upkeep();
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<CoordinatorAction> {
        self.actions.pop_front()
    }

    /// When [`CoordinatorEvent::Tick`] is wanted at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.failed {
            return None;
        }
        let may_seal = !self.closing && self.superblock_allows() && self.has_room_for_point();
        let seal = may_seal.then_some(self.open_since).flatten();
        let seal = seal.map(|since| since.after(self.options.cp_interval_ns));
        seal.into_iter().chain(self.peer_timeout()).chain(self.claim_timeout()).min()
    }

    /// Whether nothing of a session with the peer is left: another may begin.
    #[must_use]
    pub fn session_is_over(&self) -> bool {
        self.serving && self.peer.is_absent()
    }

    /// What the operator sees.
    #[must_use]
    pub fn status(&self, now: Instant) -> CoordinatorStatus {
        let lag = self.lag(now);
        CoordinatorStatus {
            role: self.role,
            store: self.superblock.store,
            term: self.superblock.term.0,
            open: match self.role {
                Role::Primary => self.open,
                Role::Secondary => self.committed.next(),
            },
            committed: self.committed,
            received: self.peer.received,
            confirmed: self.peer.durable,
            base: self.base(),
            claimed: self.claimed,
            root: self.store_root(),
            lag_points: lag.points,
            lag_bytes: lag.bytes,
            lag_ns: lag.age_ns,
            peer: self.peer_word(),
            alone_since: self.superblock.alone_since.filter(|_| self.role == Role::Primary),
            base_given_up: self.superblock.base_given_up,
            branch: self.superblock.branch,
            holding: self.holding,
            failed: self.failed,
        }
    }

    fn begin(&mut self) {
        if self.role == Role::Primary {
            self.superblock.paired |= self.options.paired;
            if self.superblock.paired && !self.options.paired {
                // The peer was taken from the command line: what it needs is kept as long as there is room.
                self.superblock.alone_since.get_or_insert(self.committed.next());
                self.peer.alone = true;
                self.going_alone = true;
            }
            self.order_all(&Order::Lead(self.superblock.term));
        }
        if self.role == Role::Primary {
            if self.superblock.paired && !self.superblock.clean {
                // CPs after this one may have reached the peer and are lost here: its history ends before them.
                self.superblock.open_history(self.superblock.term, self.committed);
            }
            self.superblock.secondary = false;
        }
        // From now on the store is in use: a stop that is not clean shows.
        self.superblock.clean = false;
        self.write_superblock(superblock_job::Then::Serve);
    }

    /// The superblock says that the store is in use: open the gate.
    fn serve(&mut self) {
        self.serving = true;
        self.announce_commit();
        if self.role == Role::Primary {
            self.act(CoordinatorAction::OpenGate(self.open));
        }
        self.publish_catalog();
    }

    fn upkeep(&mut self) {
        if self.failed || self.leaving {
            return;
        }
        self.watch_peer();
        self.watch_lag();
        self.watch_base();
        self.watch_claim();
        self.seal_when_due();
        self.finish_promotion();
        self.finish_stop();
        self.pump_superblock();
    }

    fn report(&mut self, shard: ShardId, report: Report) {
        match report {
            Report::Sealed { cp, root, data_bytes, delta_bytes } => {
                self.sealed(shard, cp, root, data_bytes, delta_bytes)
            }
            Report::Written { cp } => self.written(shard, cp),
            Report::Arrived { cp, participants, committed, base, catalog } => {
                self.arrived(shard, cp, participants, catalog);
                self.told(committed, base);
            }
            Report::Applied { cp, root } => self.applied(shard, cp, root),
            Report::Diverged { cp, segments } => self.diverged(shard, cp, segments),
            Report::WantSeal => self.want_seal = true,
            Report::WantReap => {
                if !self.want_reap.contains(&shard) {
                    self.want_reap.push(shard);
                }
            }
            Report::HeldByBase(until) => self.base_awaited = self.base_awaited.max(until),
            Report::HeldByClaim => self.claim(),
            Report::Stuck => {
                self.log("the journal is full of CPs that the primary did not confirm: opening the store anew".to_owned());
                self.restart(self.committed);
            }
            Report::CaughtUp => self.peer.caught_up(shard),
            Report::Failed => {
                self.fail("the device failed a write, a read of metadata, or a flush")
            }
            Report::SessionEnded => self.session_ended(shard),
            Report::Settled => {
                if let Some(stopping) = &mut self.stopping {
                    stopping.unsettled.remove(shard);
                }
            }
        }
    }

    fn done(&mut self, io: IoToken, result: Result<(), IoFailure>) {
        if result.is_err() {
            self.fail("the device failed a flush or a superblock write");
            return;
        }
        if self.flush.is_some_and(|(token, _)| token == io) {
            // After another failure a flush that ends well proves nothing any more.
            if !self.failed {
                self.flushed();
            }
        } else {
            self.superblock_step_done(io);
        }
    }

    /// Sticky (R9): nothing is answered well any more until the store was opened again.
    fn fail(&mut self, what: &str) {
        if !self.failed {
            self.log(format!("store failed: {what}; no write is kept from now on. Check the device, then restart."));
            self.stop_serving();
        }
    }

    /// Answers every request as failed from now on.
    fn stop_serving(&mut self) {
        self.failed = true;
        for (_, tag) in std::mem::take(&mut self.flush_waiters) {
            self.act(CoordinatorAction::AnswerFlush(tag, false));
        }
        for (_, ticket, _) in std::mem::take(&mut self.replies) {
            self.refuse(ticket, Refusal::StoreFailed);
        }
        let sealed = self.points.iter_mut().flat_map(Point::take_tickets);
        let asked: Vec<_> = sealed.chain(std::mem::take(&mut self.next.tickets)).collect();
        for (ticket, _) in asked {
            self.refuse(ticket, Refusal::StoreFailed);
        }
        self.order_all(&Order::Fail);
        self.act(CoordinatorAction::ClosePeer("this node no longer serves".to_owned()));
    }

    fn order_all(&mut self, order: &Order) {
        for shard in 0..self.superblock.geometry.shards {
            self.act(CoordinatorAction::Order(ShardId(shard), order.clone()));
        }
    }

    fn publish_catalog(&mut self) {
        let volumes = self.catalog.volumes.iter().map(|volume| volume.id).collect();
        self.order_all(&Order::Catalog(volumes));
        self.act(CoordinatorAction::Publish(self.catalog.clone(), self.role == Role::Primary));
    }

    /// Has the store opened anew, as of this CP.
    fn restart(&mut self, cp: CpNumber) {
        self.leaving = true;
        self.act(CoordinatorAction::Restart(cp));
    }

    fn act(&mut self, action: CoordinatorAction) {
        self.actions.push_back(action);
    }

    fn log(&mut self, text: String) {
        self.act(CoordinatorAction::Log(text));
    }

    fn start(&mut self) -> IoToken {
        self.io_next += 1;
        IoToken(self.io_next)
    }
}
