//! The coordinator at the moments where terms, branches and restarts meet: a hello, a promotion, a dropped branch, and
//! what happens when the other one comes before it is durable. The simulator plays the same with whole pairs; here each
//! moment is set by hand.

#![expect(clippy::unwrap_used, reason = "a test's failure is a panic, in its helpers too")]

use twinpoint_core::catalog::Catalog;
use twinpoint_core::contract::{
    Command, CoordinatorAction, CoordinatorEvent, IoToken, Order, PeerSession, Refusal, Reply,
    Report, Ticket,
};
use twinpoint_core::coordinator::{
    Coordinator, CoordinatorImage, CoordinatorOptions, OnPeerLoss, Replication,
};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::{Hello, PeerMessage, Role};
use twinpoint_core::request::Tag;
use twinpoint_core::superblock::{Superblock, TermStart};
use twinpoint_core::units::{BufferId, CpNumber, Instant, Root, ShardId, ShardSet, StoreId, Term};

/// A history: terms and their first CPs.
type Terms<'a> = &'a [(u64, u64)];

const OLD: Terms<'static> = &[(1, 1)];
const NEW: Terms<'static> = &[(1, 1), (2, 21)];

const PEER_TIMEOUT_NS: u64 = 5_000_000_000;

/// One node's coordinator, its device, and what it said.
struct Node {
    coordinator: Coordinator,
    /// Writes and flushes of the superblock under way.
    pending: Vec<IoToken>,
    replies: Vec<(Ticket, Reply)>,
    restart: Option<CpNumber>,
    opened_gate: bool,
    /// Whether frontends offer the volumes, as was published last.
    offers: Option<bool>,
    /// Flushes that were answered, and whether they were done.
    flushes: Vec<(Tag, bool)>,
    /// The last one that was written.
    superblock: Option<Superblock>,
    /// What the shards heard last.
    base: Option<CpNumber>,
    claimed: Option<CpNumber>,
    /// Nanoseconds.
    now: u64,
}

impl Node {
    /// A store that was opened as a secondary's: a former primary's, or one that followed.
    fn secondary(followed: bool, history: Terms<'_>, committed: u64, base: u64) -> Node {
        let superblock = Superblock {
            term: Term(history.last().unwrap().0),
            history: starts(history),
            committed: CpNumber(base),
            base: CpNumber(base),
            paired: true,
            secondary: followed,
            clean: false,
            ..Superblock::of_empty(StoreId([7; 16]), geometry())
        };
        Node::open(superblock, committed, base)
    }

    fn open(superblock: Superblock, committed: u64, base: u64) -> Node {
        Node::open_as(Role::Secondary, superblock, committed, base)
    }

    fn open_as(role: Role, superblock: Superblock, committed: u64, base: u64) -> Node {
        let paired = superblock.paired;
        let image = CoordinatorImage {
            superblock,
            catalog: Catalog::default(),
            committed: CpNumber(committed),
            base: CpNumber(base),
            roots: vec![Root(1)],
        };
        let options = CoordinatorOptions {
            paired,
            replication: Replication::Sync,
            on_peer_loss: OnPeerLoss::Stall,
            cp_interval_ns: 1_000_000,
            points_in_flight: 4,
            peer_timeout_ns: PEER_TIMEOUT_NS,
            lag_points: 10,
            lag_bytes: 1 << 20,
            lag_ns: 1 << 40,
        };
        let mut node = Node {
            coordinator: Coordinator::new(image, role, options, Instant(0)),
            pending: Vec::new(),
            replies: Vec::new(),
            restart: None,
            opened_gate: false,
            offers: None,
            flushes: Vec::new(),
            superblock: None,
            base: None,
            claimed: None,
            now: 1,
        };
        node.drain();
        node.write_all();
        node
    }

    fn drain(&mut self) {
        while let Some(action) = self.coordinator.poll_action() {
            match action {
                CoordinatorAction::WriteMetadata { io, bytes, .. } => {
                    self.superblock = Some(Superblock::decode(&bytes).unwrap());
                    self.pending.push(io);
                }
                CoordinatorAction::Flush { io } => self.pending.push(io),
                CoordinatorAction::Reply(ticket, reply) => self.replies.push((ticket, reply)),
                CoordinatorAction::Restart(cp) => self.restart = Some(cp),
                CoordinatorAction::OpenGate(_) => self.opened_gate = true,
                CoordinatorAction::Publish(_, offers) => self.offers = Some(offers),
                CoordinatorAction::AnswerFlush(tag, done) => self.flushes.push((tag, done)),
                CoordinatorAction::Order(_, Order::Committed { base, claimed, .. }) => {
                    (self.base, self.claimed) = (Some(base), Some(claimed));
                }
                _ => {}
            }
        }
    }

    fn event(&mut self, event: CoordinatorEvent) {
        self.at(self.now, event);
    }

    fn at(&mut self, now: u64, event: CoordinatorEvent) {
        self.now = now;
        self.coordinator.handle(Instant(now), true, event);
        self.drain();
    }

    fn command(&mut self, ticket: u64, command: Command) {
        self.event(CoordinatorEvent::Command(Ticket(ticket), command));
    }

    fn hello(&mut self, ticket: u64, hello: &Hello) {
        self.event(CoordinatorEvent::PeerHello(Ticket(ticket), Box::new(hello.clone())));
    }

    /// The oldest write or flush under way ends well.
    fn write_one(&mut self) {
        let io = self.pending.remove(0);
        self.event(CoordinatorEvent::Done { io, result: Ok(()) });
    }

    fn write_all(&mut self) {
        while !self.pending.is_empty() {
            self.write_one();
        }
    }

    fn reply(&self, ticket: u64) -> &Reply {
        &self.replies.iter().find(|(of, _)| *of == Ticket(ticket)).expect("it is answered").1
    }

    fn branch(&self) -> Option<String> {
        self.superblock.as_ref().unwrap().branch.map(|branch| branch.to_string())
    }

    /// Follows a primary that says how far CPs are committed there, and loses it.
    fn follow(&mut self, hello: &Hello, committed: u64, base: u64) {
        self.hello(100, hello);
        self.write_all();
        let lanes = vec![((BufferId(0), 16), 0)];
        self.event(CoordinatorEvent::PeerUp(Box::new(PeerSession { hello: hello.clone(), lanes })));
        let (committed, base) = (CpNumber(committed), CpNumber(base));
        let told = PeerMessage::Committed { term: hello.term, committed, base };
        self.event(CoordinatorEvent::PeerMessage(told.encode()));
        self.event(CoordinatorEvent::PeerDown("the cable".into()));
        self.event(CoordinatorEvent::Report(ShardId(0), Report::SessionEnded));
    }
}

fn geometry() -> Geometry {
    Geometry::plan(1 << 18, 1, None, None).unwrap()
}

fn starts(history: Terms<'_>) -> Vec<TermStart> {
    let start =
        |(term, first): &(u64, u64)| TermStart { term: Term(*term), first: CpNumber(*first) };
    history.iter().map(start).collect()
}

fn primary(history: Terms<'_>, last: u64, base: u64) -> Hello {
    Hello {
        role: Role::Primary,
        store: StoreId([7; 16]),
        geometry: geometry(),
        term: Term(history.last().unwrap().0),
        history: starts(history),
        last: CpNumber(last),
        base: CpNumber(base),
        roots: vec![Root(1)],
    }
}

#[test]
fn a_branch_is_named_and_dropped_by_that_name_only() {
    let mut node = Node::secondary(false, OLD, 23, 20);
    node.hello(1, &primary(NEW, 25, 20));
    node.write_all();
    assert!(matches!(node.reply(1), Reply::Refused(Refusal::Branch { .. })));
    assert_eq!(node.branch().as_deref(), Some("t1-cp23"));
    node.command(2, Command::BranchDrop { name: "t1-cp22".into() });
    assert_eq!(*node.reply(2), Reply::Refused(Refusal::NoSuchBranch));
    node.command(3, Command::BranchDrop { name: "t1-cp23".into() });
    assert_eq!(node.restart, None, "not before the superblock has lost it");
    node.write_all();
    assert_eq!(*node.reply(3), Reply::BranchDropped(CpNumber(20)));
    assert_eq!((node.restart, node.branch()), (Some(CpNumber(20)), None));
    // Nothing is agreed on any more: the store is about to be another one.
    node.hello(4, &primary(NEW, 25, 20));
    node.command(5, Command::Promote { force: false });
    node.write_all();
    assert_eq!(*node.reply(4), Reply::Refused(Refusal::SessionEnding));
    assert_eq!(*node.reply(5), Reply::Refused(Refusal::Stopping));
    assert_eq!(node.branch(), None);
}

#[test]
fn a_branch_of_a_secondary_outlasts_its_restart() {
    // It was told that CP 25 is committed; then its primary's store was rolled back to CP 15, in the same term.
    let mut node = Node::secondary(true, OLD, 25, 14);
    node.follow(&primary(OLD, 30, 14), 25, 14);
    let rolled_back = primary(&[(1, 1), (1, 16)], 15, 14);
    node.hello(1, &rolled_back);
    node.write_all();
    assert_eq!(node.branch().as_deref(), Some("t1-cp25"));
    let mut node = Node::open(node.superblock.unwrap(), 25, 14);
    node.hello(2, &rolled_back);
    node.write_all();
    assert_eq!(node.restart, None);
    assert!(matches!(node.reply(2), Reply::Refused(Refusal::Branch { .. })));
    assert_eq!(node.branch().as_deref(), Some("t1-cp25"));
}

#[test]
fn a_secondary_that_was_told_of_more_than_it_has_names_no_branch() {
    let mut node = Node::secondary(true, &[(1, 1), (1, 21)], 15, 10);
    node.follow(&primary(&[(1, 1), (1, 21)], 30, 10), 25, 10);
    node.hello(1, &primary(OLD, 10, 10));
    node.write_all();
    let lost = Refusal::PrimaryLostPoints { told: CpNumber(25), ours: CpNumber(10) };
    assert_eq!(*node.reply(1), Reply::Refused(lost));
    assert_eq!(node.branch(), None);
}

#[test]
fn a_base_that_was_given_up_moves_when_the_peer_is_lost_again() {
    let mut superblock = Node::secondary(false, OLD, 20, 20).superblock.unwrap();
    (superblock.secondary, superblock.base_given_up) = (false, true);
    superblock.alone_since = Some(CpNumber(16));
    let mut node = Node::open_as(Role::Primary, superblock, 20, 20);
    let hello = Hello { role: Role::Secondary, ..primary(OLD, 20, 20) };
    let lanes = vec![((BufferId(0), 16), 0)];
    node.event(CoordinatorEvent::PeerUp(Box::new(PeerSession { hello, lanes })));
    // CP 21 is committed here and not there.
    commit_next(&mut node, 21);
    node.write_all();
    assert_eq!(node.base, Some(CpNumber(20)), "the peer needs it");
    // Writers wait for the space that only CP 20 uses, so nothing else will be committed.
    node.event(CoordinatorEvent::PeerDown("the cable".into()));
    assert_eq!(node.base, Some(CpNumber(20)), "the shard's session still reads it");
    node.event(CoordinatorEvent::Report(ShardId(0), Report::SessionEnded));
    assert_eq!(node.base, Some(CpNumber(21)));
}

/// The next CP is sealed, and written but for its flush.
fn commit_next(node: &mut Node, cp: u64) {
    let (cp, shard) = (CpNumber(cp), ShardId(0));
    node.coordinator.handle(Instant(node.now), false, CoordinatorEvent::Flush(Tag(1)));
    node.drain();
    node.event(CoordinatorEvent::Quiesced { cp, participants: ShardSet::one(shard) });
    let sealed = Report::Sealed { cp, root: Root(2), data_bytes: 4096, delta_bytes: 200 };
    node.event(CoordinatorEvent::Report(shard, sealed));
    node.event(CoordinatorEvent::Report(shard, Report::Written { cp }));
}

#[test]
fn a_claim_that_is_asked_for_while_an_older_one_is_written_comes_too() {
    let mut superblock = Node::secondary(false, OLD, 20, 20).superblock.unwrap();
    (superblock.secondary, superblock.paired) = (false, false);
    let mut node = Node::open_as(Role::Primary, superblock, 20, 20);
    commit_next(&mut node, 21);
    node.write_all();
    assert_eq!(node.claimed, Some(CpNumber(20)), "CP 21's own records cannot claim it");
    node.event(CoordinatorEvent::Report(ShardId(0), Report::HeldByClaim));
    let claim = node.pending.pop().expect("the superblock is being written");
    // The next CP is committed meanwhile, and claims as much.
    commit_next(&mut node, 22);
    node.write_all();
    node.event(CoordinatorEvent::Report(ShardId(0), Report::HeldByClaim));
    node.event(CoordinatorEvent::Done { io: claim, result: Ok(()) });
    node.write_all();
    assert_eq!(node.claimed, Some(CpNumber(22)));
}

#[test]
fn an_idle_store_claims_its_last_point_and_a_busy_one_does_not() {
    let mut superblock = Node::secondary(false, OLD, 20, 20).superblock.unwrap();
    (superblock.secondary, superblock.paired) = (false, false);
    let mut node = Node::open_as(Role::Primary, superblock, 20, 20);
    commit_next(&mut node, 21);
    node.write_all();
    let late = node.now + 10_000_000_000;
    node.coordinator.handle(Instant(late), false, CoordinatorEvent::Tick);
    node.drain();
    assert!(node.pending.is_empty(), "the open CP will claim it");
    node.at(late, CoordinatorEvent::Tick);
    node.write_all();
    assert_eq!(node.claimed, Some(CpNumber(21)));
}

/// A primary that carries on alone from CP 16; CPs up to 20 are committed here, up to 15 there.
fn alone() -> Node {
    let mut superblock = Node::secondary(false, OLD, 20, 15).superblock.unwrap();
    superblock.secondary = false;
    superblock.alone_since = Some(CpNumber(16));
    let mut node = Node::open_as(Role::Primary, superblock, 20, 15);
    node.at(node.now + PEER_TIMEOUT_NS, CoordinatorEvent::Tick);
    node.write_all();
    node
}

#[test]
fn whoever_waited_for_the_base_while_the_peer_was_up_still_waits_when_it_is_lost() {
    let mut node = alone();
    let hello = Hello { role: Role::Secondary, ..primary(OLD, 15, 15) };
    let lanes = vec![((BufferId(0), 16), 0)];
    node.event(CoordinatorEvent::PeerUp(Box::new(PeerSession { hello, lanes })));
    let held = Report::HeldByBase(CpNumber(18));
    node.event(CoordinatorEvent::Report(ShardId(0), held));
    assert_eq!(node.base, Some(CpNumber(15)), "the peer is about to catch up");
    node.event(CoordinatorEvent::PeerDown("the cable".into()));
    node.event(CoordinatorEvent::Report(ShardId(0), Report::SessionEnded));
    node.write_all();
    assert_eq!(node.base, Some(CpNumber(20)), "nobody else would give the waiting writers room");
}

#[test]
fn a_former_primary_that_gave_its_base_up_has_none_when_it_is_promoted() {
    let mut superblock = Node::secondary(false, OLD, 20, 20).superblock.unwrap();
    (superblock.base_given_up, superblock.deposed_by) = (true, Some(Term(2)));
    superblock.alone_since = Some(CpNumber(16));
    let mut node = Node::open(superblock.clone(), 20, 20);
    node.command(1, Command::Promote { force: true });
    node.write_all();
    assert!(node.superblock.as_ref().unwrap().base_given_up, "the operator has to know");
    // One that follows a primary goes on with the base of both.
    superblock.deposed_by = None;
    let mut node = Node::open(superblock, 20, 20);
    node.follow(&primary(OLD, 20, 20), 20, 20);
    assert!(!node.superblock.as_ref().unwrap().base_given_up);
}

#[test]
fn a_base_that_was_waited_for_and_came_is_kept() {
    let mut node = alone();
    let hello = Hello { role: Role::Secondary, ..primary(OLD, 15, 15) };
    let lanes = vec![((BufferId(0), 16), 0)];
    node.event(CoordinatorEvent::PeerUp(Box::new(PeerSession { hello, lanes })));
    node.event(CoordinatorEvent::Report(ShardId(0), Report::HeldByBase(CpNumber(18))));
    let (received, durable) = (CpNumber(18), CpNumber(18));
    let progress = PeerMessage::Progress { term: Term(1), received, durable };
    node.event(CoordinatorEvent::PeerMessage(progress.encode()));
    node.event(CoordinatorEvent::PeerDown("the cable".into()));
    node.event(CoordinatorEvent::Report(ShardId(0), Report::SessionEnded));
    node.write_all();
    assert_eq!(node.base, Some(CpNumber(18)));
}

#[test]
fn a_late_hello_is_not_answered_while_a_later_session_leaves_points_under_way() {
    let hello = primary(&[(1, 1), (1, 21)], 20, 20);
    let mut node = Node::secondary(true, OLD, 20, 20);
    // Its history is being written when a session of an earlier hello begins, brings CP 21, and is lost.
    node.hello(1, &hello);
    let lanes = vec![((BufferId(0), 16), 0)];
    node.event(CoordinatorEvent::PeerUp(Box::new(PeerSession { hello, lanes })));
    let (cp, shard) = (CpNumber(21), ShardId(0));
    let (committed, base) = (CpNumber(20), CpNumber(20));
    let participants = ShardSet::one(shard);
    let arrived = Report::Arrived { cp, participants, committed, base, catalog: None };
    node.event(CoordinatorEvent::Report(shard, arrived));
    node.event(CoordinatorEvent::Report(shard, Report::Applied { cp, root: Root(2) }));
    node.event(CoordinatorEvent::PeerDown("the cable".into()));
    node.event(CoordinatorEvent::Report(shard, Report::SessionEnded));
    node.write_all();
    assert_eq!(*node.reply(1), Reply::Refused(Refusal::SessionEnding), "CP 21 is about to be here");
}

#[test]
fn nobody_hears_of_a_term_that_is_not_durable() {
    let mut node = Node::secondary(true, OLD, 20, 20);
    // The hello brings a new history, which is being written when the promotion comes.
    node.hello(1, &primary(&[(1, 1), (1, 21)], 20, 20));
    node.command(2, Command::Promote { force: false });
    for _ in 0..4 {
        node.write_one();
    }
    assert_eq!(*node.reply(1), Reply::Refused(Refusal::SessionEnding));
    node.command(3, Command::Promote { force: false });
    assert_eq!(*node.reply(3), Reply::Refused(Refusal::SessionEnding));
    node.write_all();
    assert!(matches!(node.reply(2), Reply::Promoted(Term(2), CpNumber(20), _)));
    assert!(node.opened_gate);
}

#[test]
fn a_store_that_goes_back_promises_nothing() {
    let mut node = Node::secondary(true, OLD, 12, 9);
    node.hello(1, &primary(&[(1, 1), (1, 11)], 10, 9));
    assert_eq!(node.restart, Some(CpNumber(10)));
    node.command(2, Command::Promote { force: false });
    node.write_all();
    assert_eq!(*node.reply(2), Reply::Refused(Refusal::Stopping));
}

#[test]
fn a_store_that_fails_while_it_is_promoted_opens_no_gate() {
    let mut node = Node::secondary(true, OLD, 20, 20);
    node.command(1, Command::Promote { force: false });
    node.event(CoordinatorEvent::Report(ShardId(0), Report::Failed));
    node.write_all();
    assert_eq!(*node.reply(1), Reply::Refused(Refusal::StoreFailed));
    assert!(!node.opened_gate);
}

#[test]
fn a_store_that_fails_while_its_branch_is_dropped_is_not_opened_anew() {
    let mut node = Node::secondary(false, OLD, 23, 20);
    node.hello(1, &primary(NEW, 25, 20));
    node.write_all();
    node.command(2, Command::BranchDrop { name: "t1-cp23".into() });
    node.event(CoordinatorEvent::Report(ShardId(0), Report::Failed));
    node.write_all();
    assert_eq!((node.reply(2), node.restart), (&Reply::Refused(Refusal::StoreFailed), None));
}

#[test]
fn who_knows_of_a_newer_term_follows_no_older_one() {
    let mut node = Node::secondary(false, OLD, 23, 20);
    node.hello(1, &primary(NEW, 25, 20));
    node.write_all();
    node.hello(2, &primary(OLD, 23, 20));
    assert_eq!(*node.reply(2), Reply::Refused(Refusal::StaleTerm { theirs: 1, ours: 2 }));
}

#[test]
fn what_a_deposed_primary_answered_is_not_what_its_peer_has() {
    let mut node = Node::secondary(false, OLD, 23, 20);
    node.command(1, Command::Promote { force: false });
    node.write_all();
    assert!(matches!(node.reply(1), Reply::Promoted(Term(2), CpNumber(23), _)));
    assert_eq!(node.coordinator.status(Instant(1)).base, CpNumber(20));
}

#[test]
fn a_hello_of_another_store_deposes_nobody() {
    let mut node = Node::secondary(true, OLD, 20, 20);
    let mut stranger = primary(&[(9, 1)], 20, 20);
    stranger.store = StoreId([8; 16]);
    node.hello(1, &stranger);
    node.write_all();
    assert!(matches!(node.reply(1), Reply::Refused(Refusal::OtherStore(..))));
    assert_eq!(node.superblock.unwrap().deposed_by, None);
}

/// A primary in step with nobody, with a flush that waits for its peer.
fn waiting_primary() -> Node {
    let mut superblock = Node::secondary(false, OLD, 20, 20).superblock.unwrap();
    superblock.secondary = false;
    let mut node = Node::open_as(Role::Primary, superblock, 20, 20);
    commit_next(&mut node, 21);
    node.write_all();
    assert_eq!((node.offers, node.flushes.len()), (Some(true), 0));
    node
}

#[test]
fn a_deposed_primary_offers_nothing() {
    let by_hello = |node: &mut Node| {
        let hello = Hello { role: Role::Secondary, ..primary(NEW, 25, 20) };
        node.command(1, Command::Judge(Box::new(hello)));
    };
    let by_primary = |node: &mut Node| node.hello(1, &primary(NEW, 25, 20));
    for depose in [by_hello, by_primary] {
        let mut node = waiting_primary();
        depose(&mut node);
        assert!(matches!(node.reply(1), Reply::Refused(_)));
        assert_eq!(node.coordinator.status(Instant(node.now)).peer, "deposed");
        assert_eq!((node.offers, &node.flushes[..]), (Some(false), &[(Tag(1), false)][..]));
        node.write_all();
        assert_eq!(node.superblock.as_ref().unwrap().deposed_by, Some(Term(2)));
        assert_eq!(node.offers, Some(false), "for good");
    }
}

#[test]
fn a_failed_store_offers_its_volumes_and_errors() {
    let mut node = waiting_primary();
    node.event(CoordinatorEvent::Report(ShardId(0), Report::Failed));
    node.write_all();
    assert_eq!((node.offers, &node.flushes[..]), (Some(true), &[(Tag(1), false)][..]));
}
