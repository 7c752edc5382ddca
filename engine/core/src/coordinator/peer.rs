//! The session with the peer's coordinator: how far it is, and what happens when it is lost.
//!
//! Invariants: a session begins only when nothing of the last one is left in any shard; a message of another term is
//! refused (R8); carrying on alone begins when the superblock says so; a root that differs ends replication until an
//! operator acts (R6).

use super::superblock_job::Then;
use super::{Coordinator, OnPeerLoss};
use crate::contract::{CoordinatorAction, Order, PeerSession};
use crate::message::{PeerMessage, Role};
use crate::units::{CpNumber, Instant, Root, ShardId, ShardSet, VolumeId};

/// What is known of the peer.
#[derive(Debug)]
pub(super) struct Peer {
    state: State,
    /// Primary: whole in the peer's memory. Secondary: applied here.
    pub received: CpNumber,
    /// Durable on the secondary.
    pub durable: CpNumber,
    /// Secondary: ordered to be applied.
    pub ordered: CpNumber,
    /// Secondary: what the primary said is committed on both sides.
    pub told_base: CpNumber,
    /// Secondary: what the primary said is committed there.
    pub told_committed: CpNumber,
    /// Secondary that was a primary: what may have been answered. Nothing of it is dropped without a word, and the
    /// peer need not have it.
    pub answered: CpNumber,
    /// Primary: carrying on without it.
    pub alone: bool,
    /// Primary: answers wait for the peer again; it was alone until this CP.
    rejoin: Option<CpNumber>,
    heard: Instant,
    spoke: Instant,
    lanes_behind: ShardSet,
    diverged: Option<CpNumber>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Absent,
    Up,
    /// Shards that have not ended the session yet.
    Ending(ShardSet),
}

impl Peer {
    pub(super) fn new(base: CpNumber, now: Instant) -> Peer {
        Peer {
            state: State::Absent,
            received: base,
            durable: base,
            ordered: base,
            told_base: base,
            told_committed: base,
            answered: base,
            alone: false,
            rejoin: None,
            heard: now,
            spoke: now,
            lanes_behind: ShardSet::default(),
            diverged: None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Primary: it is there and has no CPs to catch up with.
    pub(super) fn is_in_step(&self) -> bool {
        self.is_up() && self.lanes_behind.is_empty()
    }

    pub(super) fn is_absent(&self) -> bool {
        self.state == State::Absent
    }

    /// The CP at which the roots differ.
    pub(super) fn diverged(&self) -> Option<CpNumber> {
        self.diverged
    }

    pub(super) fn caught_up(&mut self, shard: ShardId) {
        self.lanes_behind.remove(shard);
    }
}

impl Coordinator {
    pub(super) fn peer_up(&mut self, session: PeerSession) {
        if !self.peer.is_absent() || self.failed {
            self.act(CoordinatorAction::ClosePeer("a session is there already".to_owned()));
            return;
        }
        if !self.still_fits(&session.hello) {
            self.act(CoordinatorAction::ClosePeer(
                "something changed since the handshake".to_owned(),
            ));
            return;
        }
        let shards = self.superblock.geometry.shards;
        let from = match self.role {
            Role::Primary => session.hello.last,
            Role::Secondary => self.committed,
        };
        self.peer.state = State::Up;
        (self.peer.heard, self.peer.spoke) = (self.now, self.now);
        self.peer.lanes_behind = ShardSet::all(shards);
        self.peer.received = from;
        self.peer.ordered = from;
        self.peer.durable = match self.role {
            Role::Primary => self.peer.durable.max(from),
            Role::Secondary => from,
        };
        if self.role == Role::Secondary {
            self.order_all(&Order::Follow(self.superblock.term));
        }
        for (index, (lend, lent_blocks)) in session.lanes.into_iter().enumerate() {
            let root = match self.role {
                Role::Primary => session.hello.roots[index],
                Role::Secondary => self.roots[index],
            };
            let shard = ShardId(u16::try_from(index).expect("a lane for each shard"));
            self.act(CoordinatorAction::Order(
                shard,
                Order::LaneUp { lend, lent_blocks, from, root },
            ));
        }
        self.log(format!("peer connected, going on from CP {from}"));
        match self.role {
            Role::Primary => self.announce_commit(),
            Role::Secondary => self.post_progress(),
        }
    }

    pub(super) fn peer_message(&mut self, bytes: &[u8]) {
        if !self.peer.is_up() {
            return;
        }
        self.peer.heard = self.now;
        let ours = self.superblock.term;
        match (self.role, PeerMessage::decode(bytes)) {
            (Role::Primary, Ok(PeerMessage::Progress { term, received, durable }))
                if term == ours =>
            {
                self.progress(received, durable);
            }
            (Role::Primary, Ok(PeerMessage::Diverged { term, cp, shard, segments }))
                if term == ours =>
            {
                self.diverged(shard, cp, segments);
            }
            (Role::Secondary, Ok(PeerMessage::Committed { term, committed, base }))
                if term == ours =>
            {
                if base > committed {
                    self.close_peer("a base after the last commit");
                    return;
                }
                self.told(committed, base);
            }
            (_, Ok(PeerMessage::Heartbeat { term })) if term == ours => {}
            _ => self.close_peer("a message that cannot be read, or of another term"),
        }
    }

    /// Secondary: the primary says how far CPs are committed.
    pub(super) fn told(&mut self, committed: CpNumber, base: CpNumber) {
        if !self.peer.is_up() {
            return;
        }
        let before = self.base();
        self.peer.told_committed = self.peer.told_committed.max(committed);
        self.peer.told_base = self.peer.told_base.max(base);
        if self.base() > before {
            self.announce_commit();
        }
    }

    pub(super) fn peer_down(&mut self, reason: &str) {
        if !self.peer.is_up() {
            return;
        }
        self.log(format!("peer lost: {reason}"));
        self.peer.rejoin = None;
        if self.role == Role::Primary {
            // What was only in its memory may be gone with it.
            self.peer.received = self.peer.durable;
        }
        self.peer.state = State::Ending(ShardSet::all(self.superblock.geometry.shards));
        self.forget_arrived_points();
        self.order_all(&Order::SessionEnd);
    }

    pub(super) fn session_ended(&mut self, shard: ShardId) {
        let State::Ending(mut waiting) = self.peer.state else { panic!("no session ends") };
        waiting.remove(shard);
        self.peer.state = if waiting.is_empty() { State::Absent } else { State::Ending(waiting) };
        if self.peer.is_absent() && self.has_given_up_base() {
            // What only the lost peer needed is free. Writers may wait for just that, and no CP will end before they go on.
            self.announce_commit();
        }
    }

    /// Ends the session; the shell answers with [`crate::contract::CoordinatorEvent::PeerDown`].
    pub(super) fn close_peer(&mut self, reason: &str) {
        self.act(CoordinatorAction::ClosePeer(reason.to_owned()));
        self.peer_down(reason);
    }

    /// The roots differ: named loudly, and replication stops (R6).
    pub(super) fn diverged(
        &mut self,
        shard: ShardId,
        cp: CpNumber,
        segments: Vec<(VolumeId, u64, Root)>,
    ) {
        self.peer.diverged = Some(cp);
        let named: Vec<String> = segments
            .iter()
            .map(|(volume, segment, root)| format!("volume {volume} segment {segment} ({root})"))
            .collect();
        let named =
            if named.is_empty() { "the map as it was there".to_owned() } else { named.join(", ") };
        self.log(format!(
            "ROOTS DIFFER at CP {cp} in shard {shard}: {named}. Replication stops; run `twinpoint verify` on both stores"
        ));
        if self.role == Role::Secondary {
            let term = self.superblock.term;
            self.post(&PeerMessage::Diverged { term, cp, shard, segments });
        }
        self.close_peer("the roots differ");
    }

    /// Heartbeats, loss by silence, and carrying on alone.
    pub(super) fn watch_peer(&mut self) {
        if self.peer.is_up() {
            if self.now.since(self.peer.heard) >= self.options.peer_timeout_ns {
                self.close_peer("no word within --peer-timeout");
                return;
            }
            if self.now.since(self.peer.spoke) >= self.heartbeat_ns() {
                let term = self.superblock.term;
                self.post(&PeerMessage::Heartbeat { term });
            }
            self.watch_rejoin();
        } else if self.may_go_alone()
            && self.now.since(self.peer.heard) >= self.options.peer_timeout_ns
        {
            self.superblock.alone_since.get_or_insert(self.committed.next());
            self.log(format!("carrying on alone from CP {}", self.committed.next()));
            // Marked now so that it is written once; flushes wait until it is durable.
            self.peer.lanes_behind = ShardSet::default();
            self.going_alone = true;
            self.write_superblock(Then::Alone);
        }
    }

    pub(super) fn peer_timeout(&self) -> Option<Instant> {
        if self.failed {
            return None;
        }
        let lost = self.peer.heard.after(self.options.peer_timeout_ns);
        let next = if self.peer.is_up() {
            Some(lost.min(self.peer.spoke.after(self.heartbeat_ns())))
        } else {
            self.may_go_alone().then_some(lost)
        };
        next.into_iter().chain(self.lag_timeout()).min()
    }

    /// What the operator sees of the peer.
    pub(super) fn peer_word(&self) -> &'static str {
        if self.superblock.deposed_by.is_some() && self.role == Role::Primary {
            return "deposed";
        }
        match (self.peer.diverged, self.peer.state) {
            (Some(_), _) => "diverged",
            _ if !self.options.paired && self.role == Role::Primary => "none",
            (_, State::Up) if self.role == Role::Primary && !self.peer.lanes_behind.is_empty() => {
                "catching-up"
            }
            (_, State::Up) => "connected",
            _ => "absent",
        }
    }

    pub(super) fn post(&mut self, message: &PeerMessage) {
        self.peer.spoke = self.now;
        self.act(CoordinatorAction::PeerPost(message.encode()));
    }

    pub(super) fn post_progress(&mut self) {
        if self.peer.is_up() && self.role == Role::Secondary {
            let (term, received, durable) =
                (self.superblock.term, self.peer.received, self.peer.durable);
            self.post(&PeerMessage::Progress { term, received, durable });
        }
    }

    fn progress(&mut self, received: CpNumber, durable: CpNumber) {
        let newest = self.open.previous();
        if durable > received || received > newest {
            self.close_peer("progress that cannot be");
            return;
        }
        let (now, before) = (self.now, self.peer.durable);
        self.peer.received = self.peer.received.max(received);
        self.peer.durable = self.peer.durable.max(durable);
        let (first, end) = (self.points_until(before), self.points_until(self.peer.durable));
        let confirmed = self.points.range(first..end.max(first));
        let times: Vec<u64> = confirmed.map(|point| now.since(point.since)).collect();
        for confirmed_ns in times {
            self.act(CoordinatorAction::Confirmed { confirmed_ns });
        }
        if self.peer.durable > before {
            self.announce_commit();
        } else {
            self.answer_waiters();
        }
    }

    /// The peer follows closely again: from now on flushes wait for it as the mode says, and once it has every CP that
    /// was answered without it, this side is no longer alone. Under load there need be no moment without any lag.
    fn watch_rejoin(&mut self) {
        if self.role != Role::Primary || self.superblock.alone_since.is_none() {
            return;
        }
        let newest = self.open.previous();
        if self.peer.rejoin.is_none() {
            let close = newest.0.saturating_sub(self.peer.durable.0)
                <= 2 * self.options.points_in_flight as u64 + 2;
            if !close || !self.peer.lanes_behind.is_empty() {
                return;
            }
            self.peer.rejoin = Some(newest);
            self.peer.alone = false;
            self.going_alone = false;
        }
        if self.peer.rejoin.is_some_and(|cp| self.peer.durable >= cp) {
            self.peer.rejoin = None;
            self.superblock.alone_since = None;
            self.superblock.base_given_up = false;
            self.log(format!("the peer is in step again at CP {}", self.peer.durable));
            self.write_superblock(Then::Nothing);
        }
    }

    fn may_go_alone(&self) -> bool {
        self.role == Role::Primary
            && self.options.paired
            // Or it is alone already, as the superblock says: by a promotion, or before a restart.
            && (self.options.on_peer_loss == OnPeerLoss::Continue
                || self.superblock.alone_since.is_some())
            && !self.peer.is_up()
            && !self.peer.alone
            && !self.going_alone
            && self.stopping.is_none()
    }

    fn heartbeat_ns(&self) -> u64 {
        self.options.peer_timeout_ns / 4
    }
}
