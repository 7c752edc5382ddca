//! The life of a CP, from the gate's closing to the commit on both sides.
//!
//! Invariants: CPs are sealed, become durable, and are committed in order; one flush covers every CP that was written
//! whole when it was issued.

use super::{Coordinator, NextPoint, superblock_job::Then};
use crate::catalog::Catalog;
use crate::contract::{CoordinatorAction, Order, Refusal, Reply, Seal, Ticket};
use crate::message::{PeerMessage, Role};
use crate::request::Tag;
use crate::units::{CpNumber, Instant, Root, ShardId, ShardSet, VolumeId};

/// One CP that is not committed on both sides yet.
#[derive(Debug)]
pub(super) struct Point {
    pub cp: CpNumber,
    participants: ShardSet,
    /// Secondary: shards whose part has arrived.
    arrived: ShardSet,
    /// Secondary: the shards were ordered to apply it.
    ordered: bool,
    /// Shards that sealed or applied their part.
    sealed: ShardSet,
    written: ShardSet,
    roots: Vec<(ShardId, Root)>,
    catalog: Option<Catalog>,
    tickets: NextPoint,
    /// What its records call committed, at least.
    claims: CpNumber,
    pub since: Instant,
    written_at: Option<Instant>,
    pub bytes: u64,
}

impl Point {
    fn new(cp: CpNumber, participants: ShardSet, since: Instant) -> Point {
        Point {
            cp,
            participants,
            arrived: ShardSet::default(),
            ordered: false,
            sealed: ShardSet::default(),
            written: ShardSet::default(),
            roots: Vec::new(),
            catalog: None,
            tickets: NextPoint::default(),
            claims: CpNumber(0),
            since,
            written_at: None,
            bytes: 0,
        }
    }

    /// The catalog that the CP brings.
    pub(super) fn catalog(&self) -> Option<&Catalog> {
        self.catalog.as_ref()
    }

    /// Who waits for it to be committed.
    pub(super) fn take_tickets(&mut self) -> Vec<(Ticket, Option<VolumeId>)> {
        std::mem::take(&mut self.tickets.tickets)
    }

    fn is_written(&self) -> bool {
        self.participants.is_subset(self.written)
    }

    fn is_applied(&self) -> bool {
        self.participants.is_subset(self.sealed)
    }
}

impl Coordinator {
    /// A client wants what was answered so far kept. If the open CP has no write, the last sealed one will do.
    pub(super) fn flush_asked(&mut self, tag: Tag) {
        if self.failed || self.role != Role::Primary {
            self.act(CoordinatorAction::AnswerFlush(tag, false));
            return;
        }
        // While the gate is being closed it already admits to the CP after `open`, and `open_is_empty` speaks of that.
        let newest = if self.closing { self.open.next() } else { self.open };
        let wanted = if self.open_is_empty { newest.previous() } else { newest };
        if self.stopping.as_ref().is_some_and(|stopping| stopping.settling) {
            // Nobody would answer it later.
            self.act(CoordinatorAction::AnswerFlush(tag, wanted <= self.answerable()));
            return;
        }
        self.flush_waiters.push_back((wanted, tag));
        self.answer_waiters();
    }

    /// Closes the gate if anything wants the open CP sealed and there is room for another one under way.
    pub(super) fn seal_when_due(&mut self) {
        if self.role != Role::Primary || self.closing || !self.superblock_allows() {
            return;
        }
        let carries = self.next.name.is_some()
            || self.next.catalog.is_some()
            || !self.next.tickets.is_empty();
        let must = carries || !self.want_reap.is_empty();
        if self.open_is_empty && !must {
            self.want_seal = false;
            return;
        }
        let asked = self.flush_waiters.back().is_some_and(|(cp, _)| *cp == self.open);
        let old = self
            .open_since
            .is_some_and(|since| self.now.since(since) >= self.options.cp_interval_ns);
        let stopping = self.stopping.is_some();
        let due = must || asked || old || stopping || self.want_seal;
        if due && self.has_room_for_point() {
            self.closing = true;
            self.act(CoordinatorAction::CloseGate);
        }
    }

    /// Whether another CP may be under way.
    pub(super) fn has_room_for_point(&self) -> bool {
        let under_way = self.points.len() - self.points_until(self.answerable());
        // A stop commits what is staged, whoever is waited for.
        let allowed = under_way < self.options.points_in_flight || self.stopping.is_some();
        self.role == Role::Primary && allowed
    }

    /// How many of the points are of `cp` or before. There may be many: a peer that is away keeps them all.
    pub(super) fn points_until(&self, cp: CpNumber) -> usize {
        self.points.partition_point(|point| point.cp <= cp)
    }

    /// The gate is closed: the open CP is sealed, the next one is open.
    pub(super) fn quiesced(&mut self, cp: CpNumber, participants: ShardSet) {
        assert!(self.closing && cp == self.open, "CP {cp} quiesced, {} open", self.open);
        self.closing = false;
        self.want_seal = false;
        self.open = cp.next();
        self.open_since = (!self.open_is_empty).then_some(self.now);
        let mut participants = participants;
        let next = std::mem::take(&mut self.next);
        if next.name.is_some() || next.catalog.is_some() || !next.tickets.is_empty() {
            participants.insert(ShardId(0));
        }
        for shard in std::mem::take(&mut self.want_reap) {
            participants.insert(shard);
        }
        assert!(!participants.is_empty(), "an empty CP {cp}");
        for shard in participants.iter() {
            let first = shard == ShardId(0);
            let seal = Seal {
                cp,
                participants,
                name: next.name.clone().filter(|_| first),
                catalog: next.catalog.clone().filter(|_| first),
            };
            self.act(CoordinatorAction::Order(shard, Order::Seal(Box::new(seal))));
        }
        let mut point = Point::new(cp, participants, self.now);
        point.claims = self.committed;
        point.catalog.clone_from(&next.catalog);
        point.tickets = next;
        self.points.push_back(point);
    }

    pub(super) fn sealed(
        &mut self,
        shard: ShardId,
        cp: CpNumber,
        root: Root,
        data_bytes: u64,
        delta_bytes: u64,
    ) {
        let point = self.point(cp);
        point.sealed.insert(shard);
        point.roots.push((shard, root));
        point.bytes += data_bytes + delta_bytes;
    }

    pub(super) fn written(&mut self, shard: ShardId, cp: CpNumber) {
        let now = self.now;
        let point = self.point(cp);
        point.written.insert(shard);
        if point.is_written() {
            point.written_at = Some(now);
        }
        self.flush_when_written();
    }

    /// Secondary: a shard's part has arrived.
    pub(super) fn arrived(
        &mut self,
        shard: ShardId,
        cp: CpNumber,
        participants: ShardSet,
        catalog: Option<Catalog>,
    ) {
        if !self.peer.is_up() {
            return;
        }
        if cp <= self.peer.ordered {
            self.close_peer("a CP that is here already");
            return;
        }
        let now = self.now;
        let index = self.points.partition_point(|point| point.cp < cp);
        if self.points.get(index).is_none_or(|point| point.cp != cp) {
            self.points.insert(index, Point::new(cp, participants, now));
        }
        let point = &mut self.points[index];
        if point.participants != participants || point.arrived.contains(shard) {
            self.close_peer("the shards' records of one CP contradict each other");
            return;
        }
        point.arrived.insert(shard);
        if catalog.is_some() {
            point.catalog = catalog;
        }
        self.order_whole_points();
    }

    /// Secondary: a shard's map follows, and its root is equal.
    pub(super) fn applied(&mut self, shard: ShardId, cp: CpNumber, root: Root) {
        let point = self.point(cp);
        point.sealed.insert(shard);
        point.roots.push((shard, root));
        let expected = self.peer.received.next();
        let upto = self
            .points
            .iter()
            .skip_while(|p| p.cp < expected)
            .take_while(|p| p.is_applied())
            .last();
        if let Some(cp) = upto.map(|point| point.cp) {
            self.peer.received = cp;
            self.post_progress();
        }
    }

    /// The flush was answered: all that was written before it is durable.
    pub(super) fn flushed(&mut self) {
        let (_, upto) = self.flush.take().expect("a flush was under way");
        assert!(upto > self.committed, "a flush of nothing");
        let mut changed_catalog = false;
        for index in self.points_until(self.committed)..self.points_until(upto) {
            changed_catalog |= self.commit(index);
        }
        self.flush_when_written();
        if changed_catalog {
            self.publish_catalog();
        }
        self.announce_commit();
        if self.role == Role::Secondary {
            self.peer.durable = self.committed;
            self.post_progress();
        }
    }

    /// Tells all who wait for commits: shards, the peer, clients.
    pub(super) fn announce_commit(&mut self) {
        let (committed, base, claimed) = (self.committed, self.base(), self.claimed);
        self.order_all(&Order::Committed { committed, base, claimed });
        while self.points.front().is_some_and(|point| point.cp <= committed.min(base)) {
            self.points.pop_front();
        }
        if self.role == Role::Primary && self.peer.is_up() {
            let term = self.superblock.term;
            self.post(&PeerMessage::Committed { term, committed, base });
        }
        self.answer_waiters();
    }

    /// Answers the flushes and checkpoints whose CP is kept as the mode says.
    pub(super) fn answer_waiters(&mut self) {
        let kept = self.answerable();
        while let Some((_, tag)) = self.flush_waiters.pop_front_if(|(cp, _)| *cp <= kept) {
            self.act(CoordinatorAction::AnswerFlush(tag, true));
        }
        while let Some((_, ticket, reply)) = self.replies.pop_front_if(|(cp, ..)| *cp <= kept) {
            self.act(CoordinatorAction::Reply(ticket, reply));
        }
    }

    /// The last CP whose flush may be answered (R5).
    pub(super) fn answerable(&self) -> CpNumber {
        use super::Replication::{Async, SemiSync, Sync};
        if !self.options.paired || self.peer.alone {
            return self.committed;
        }
        match self.options.replication {
            Sync => self.committed.min(self.peer.durable),
            SemiSync => self.committed.min(self.peer.received),
            Async => self.committed,
        }
    }

    /// The last CP committed on both sides; all that is committed here if no peer's base is retained.
    pub(super) fn base(&self) -> CpNumber {
        match self.role {
            Role::Primary if !self.superblock.paired => self.committed,
            // Given up, and nobody is there who needs it.
            Role::Primary if self.has_given_up_base() && !self.giving_up_base => self.committed,
            Role::Primary => self.committed.min(self.peer.durable),
            Role::Secondary => self.committed.min(self.peer.told_base),
        }
    }

    /// The base is given up, and nobody is there who needs it.
    pub(super) fn has_given_up_base(&self) -> bool {
        self.role == Role::Primary && self.superblock.base_given_up && !self.peer.is_up()
    }

    /// One hash over the shards' roots at the last committed CP.
    pub(super) fn store_root(&self) -> Root {
        store_root(&self.roots)
    }

    /// Secondary: forgets CPs that were not ordered to be applied.
    pub(super) fn forget_arrived_points(&mut self) {
        let follows = self.role == Role::Secondary;
        self.points.retain(|point| point.ordered || !follows || point.cp <= self.committed);
    }

    pub(super) fn superblock_allows(&self) -> bool {
        // Before a deposed or promoted primary's superblock is durable nothing new begins.
        self.promoting.is_none()
    }

    /// Whether no CP is about to be committed.
    pub(super) fn all_points_committed(&self) -> bool {
        self.points.iter().all(|point| point.cp <= self.committed)
    }

    fn order_whole_points(&mut self) {
        let mut expected = self.peer.ordered.next();
        for index in 0..self.points.len() {
            let point = &mut self.points[index];
            if point.cp < expected {
                continue;
            }
            if point.cp != expected || point.arrived != point.participants {
                break;
            }
            point.ordered = true;
            point.claims = self.committed;
            let (cp, participants) = (point.cp, point.participants);
            self.peer.ordered = cp;
            expected = cp.next();
            for shard in participants.iter() {
                self.act(CoordinatorAction::Order(shard, Order::Apply(cp)));
            }
        }
    }

    fn flush_when_written(&mut self) {
        if self.flush.is_some() || self.failed {
            return;
        }
        let first = self.points_until(self.committed);
        let whole = self.points.range(first..).take_while(|point| point.is_written());
        let Some(upto) = whole.last().map(|point| point.cp) else { return };
        let io = self.start();
        self.flush = Some((io, upto));
        self.act(CoordinatorAction::Flush { io });
    }

    /// The point at `index` is durable and all before it are committed. Tells whether the catalog changed.
    fn commit(&mut self, index: usize) -> bool {
        let now = self.now;
        let point = &mut self.points[index];
        assert_eq!(point.cp, self.committed.next(), "CPs are committed in order");
        self.committed = point.cp;
        self.claimed = self.claimed.max(point.claims);
        self.committed_at = self.now;
        let (cp, since) = (point.cp, point.since);
        let written_ns = point.written_at.map_or(0, |at| at.since(since));
        let roots = std::mem::take(&mut point.roots);
        let catalog = point.catalog.take();
        let tickets = point.take_tickets();
        for (shard, root) in roots {
            self.roots[usize::from(shard.0)] = root;
        }
        self.act(CoordinatorAction::Timing { written_ns, durable_ns: now.since(since) });
        let root = self.store_root();
        for (ticket, volume) in tickets {
            self.replies.push_back((
                cp,
                ticket,
                volume.map_or(Reply::Checkpoint(cp, root), Reply::Volume),
            ));
        }
        let changed = catalog.is_some();
        if let Some(catalog) = catalog {
            self.catalog = catalog;
        }
        changed
    }

    fn point(&mut self, cp: CpNumber) -> &mut Point {
        let index = self.points.partition_point(|point| point.cp < cp);
        let point = self.points.get_mut(index).filter(|point| point.cp == cp);
        point.expect("a shard reports only of a CP that is under way")
    }

    /// A journal or a region is full of what only the base needs (R7): alone, the base is given up; else writers wait
    /// until the peer is back or this side is alone.
    pub(super) fn watch_base(&mut self) {
        let is_alone = self.role == Role::Primary && self.peer.alone && !self.peer.is_up();
        let is_awaited = self.base_awaited > self.base();
        if !is_alone || !is_awaited || self.superblock.base_given_up {
            return;
        }
        self.superblock.base_given_up = true;
        self.giving_up_base = true;
        self.log(format!(
            "space is short: the base CP {} is given up; the peer, which was last in step there, must be formatted \
             and copied anew",
            self.committed.min(self.peer.durable)
        ));
        self.write_superblock(Then::BaseGivenUp);
    }

    pub(super) fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        self.act(CoordinatorAction::Reply(ticket, Reply::Refused(refusal)));
    }
}

/// One hash over all shards' roots (xxh3, 128 bits, of the roots in shard order).
#[must_use]
pub fn store_root(roots: &[Root]) -> Root {
    let bytes: Vec<u8> = roots.iter().flat_map(|root| root.0.to_le_bytes()).collect();
    Root(xxhash_rust::xxh3::xxh3_128(&bytes))
}
