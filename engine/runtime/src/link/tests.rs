//! Two nodes that only know how to say hello, over loopback.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::AtomicUsize;

use rdma_fallback::{ChannelError, Event, Pending, Placement, Progress, dial};
use twinpoint_core::contract::Refusal;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::Role;
use twinpoint_core::session::judge;
use twinpoint_core::superblock::TermStart;
use twinpoint_core::units::{CpNumber, Root, StoreId, Term};

use super::callers::STRANGERS_PER_ADDRESS_MAX;
use super::setup_message::{SETUP_BYTES_MAX, SessionId, SetupMessage, Told};
use super::*;

const TIMEOUT: Duration = Duration::from_secs(10);
const LENT: u32 = LENT_BLOCKS_MIN;

/// What a store with this many shards says of itself.
pub(super) fn hello(role: Role, shards: u16) -> Hello {
    Hello {
        role,
        store: StoreId([7; 16]),
        geometry: Geometry::plan(1 << 18, shards, None, None).unwrap(),
        term: Term(1),
        history: vec![TermStart { term: Term(1), first: CpNumber(1) }],
        last: CpNumber(5),
        base: CpNumber(5),
        roots: (0..shards).map(|shard| Root(u128::from(shard))).collect(),
    }
}

struct TestNode {
    hello: Mutex<Option<Hello>>,
    region: Arc<Region>,
    lent_blocks: u32,
    sessions: Mutex<Vec<NewSession>>,
    up: AtomicBool,
    stopping: AtomicBool,
    judged: AtomicUsize,
    asked: AtomicUsize,
    lines: Mutex<Vec<String>>,
}

impl TestNode {
    fn new(role: Role, shards: u16) -> Arc<TestNode> {
        TestNode::of(hello(role, shards))
    }

    fn of(hello: Hello) -> Arc<TestNode> {
        let lent_blocks = if hello.role == Role::Secondary { LENT } else { 0 };
        TestNode::lending(hello, lent_blocks)
    }

    fn lending(hello: Hello, lent_blocks: u32) -> Arc<TestNode> {
        let blocks = (u32::from(hello.geometry.shards) + 1) * LENT;
        Arc::new(TestNode {
            hello: Mutex::new(Some(hello)),
            region: Arc::new(Region::new(blocks as usize * BLOCK_BYTES).unwrap()),
            lent_blocks,
            sessions: Mutex::default(),
            up: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            judged: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            lines: Mutex::default(),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Hello)) {
        change(lock(&self.hello).as_mut().unwrap());
    }

    fn lines(&self) -> Vec<String> {
        lock(&self.lines).clone()
    }

    fn lines_with(&self, text: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(text)).count()
    }

    fn session(&self) -> NewSession {
        wait_until("a session begins", || !lock(&self.sessions).is_empty());
        let mut sessions = lock(&self.sessions);
        assert_eq!(sessions.len(), 1);
        sessions.remove(0)
    }

    fn lose_session(&self) {
        lock(&self.sessions).clear();
        self.up.store(false, Ordering::SeqCst);
    }
}

impl LinkNode for TestNode {
    fn hello(&self) -> Option<Box<Hello>> {
        lock(&self.hello).clone().map(Box::new)
    }

    fn judge(&self, theirs: Box<Hello>) -> Reply {
        self.judged.fetch_add(1, Ordering::SeqCst);
        match lock(&self.hello).as_ref().map(|ours| judge(ours, &theirs)) {
            Some(Ok(from)) => Reply::Accepted(from),
            Some(Err(refusal)) => Reply::Refused(refusal),
            None => Reply::Refused(Refusal::Stopping),
        }
    }

    fn peer_hello(&self, theirs: Box<Hello>) -> Reply {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let ours = lock(&self.hello).clone().unwrap();
        if self.up.load(Ordering::SeqCst) {
            self.lose_session();
            return Reply::Refused(Refusal::SessionEnding);
        }
        match judge(&theirs, &ours) {
            Ok(_) => Reply::Hello(Box::new(ours)),
            Err(refusal) => Reply::Refused(refusal),
        }
    }

    fn region(&self) -> Arc<Region> {
        Arc::clone(&self.region)
    }

    fn lane_lend(&self, shard: ShardId) -> Span {
        let length = self.lent_blocks * BLOCK_BYTES as u32;
        Span::new(u64::from(shard.0) * u64::from(length), length)
    }

    fn begin_session(&self, session: NewSession) {
        assert!(!self.up.swap(true, Ordering::SeqCst), "one session at a time");
        lock(&self.sessions).push(session);
    }

    fn session_is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    fn is_primary(&self) -> bool {
        lock(&self.hello).as_ref().is_some_and(|hello| hello.role == Role::Primary)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn log(&self, text: String) {
        lock(&self.lines).push(text);
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn key() -> Key {
    Key::from_bytes(b"the pair's key")
}

fn options(
    peer: Option<String>,
    listen: Option<String>,
    key: Key,
    timeout: Duration,
) -> LinkOptions {
    let (transport, rdma) = (Choice::Tcp, RdmaOptions::default());
    LinkOptions { peer, listen, key, timeout, transport, rdma }
}

fn listening(node: &Arc<TestNode>, timeout: Duration) -> (Link, String) {
    let listen = Some("127.0.0.1:0".to_owned());
    let options = options(None, listen, key(), timeout);
    let link = Link::start(Arc::clone(node) as Arc<dyn LinkNode>, options).unwrap();
    let address = link.listen_address().unwrap().to_string();
    (link, address)
}

fn dialling(node: &Arc<TestNode>, address: &str, key: Key) -> Link {
    let options = options(Some(address.to_owned()), None, key, TIMEOUT);
    Link::start(Arc::clone(node) as Arc<dyn LinkNode>, options).unwrap()
}

fn stop_promptly(link: Link) {
    let start = Instant::now();
    link.stop();
    assert!(start.elapsed() < Duration::from_secs(1), "stopped after {:?}", start.elapsed());
}

/// Posts one message, with placed bytes if the peer lends, and takes it on the other side.
fn carry(from: &mut Wire, to: &mut Wire, message: &[u8], placement: Option<Placement<'_>>) {
    from.post(1, message, placement).unwrap();
    let mut got = None;
    wait_until("a message arrives", || {
        let _ = from.poll(&mut |event| assert!(matches!(event, Event::Posted { .. }), "{event:?}"));
        let _: Progress = to.poll(&mut |event| match event {
            Event::Message { bytes, placed } => got = Some((bytes.to_vec(), placed)),
            Event::Posted { .. } => {}
            event @ Event::Closed { .. } => panic!("{event:?}"),
        });
        got.is_some()
    });
    let placed = placement.map(|p| Span::new(p.target, p.sources.iter().map(|s| s.length).sum()));
    assert_eq!(got, Some((message.to_vec(), placed)));
}

/// Speaks as a primary until its lanes are wanted.
fn greet(address: &str, hello: Hello) -> Result<(Channel, SessionId), Told> {
    let mut control = dial(address, &key(), TIMEOUT).unwrap();
    let session = SessionId([3; 16]);
    say(&mut control, &SetupMessage::ControlHello { session, hello: Box::new(hello) });
    match hear(&mut control) {
        SetupMessage::ControlAccept { .. } => {
            say(&mut control, &SetupMessage::Proceed);
            Ok((control, session))
        }
        SetupMessage::Refused(told) => Err(told),
        other => panic!("{other:?}"),
    }
}

/// Calls as a lane; one that is accepted becomes a wire.
fn open_lane(address: &str, session: SessionId, shard: u16) -> (Option<Wire>, SetupMessage) {
    let mut lane = dial(address, &key(), TIMEOUT).unwrap();
    say(&mut lane, &SetupMessage::LaneHello { session, shard: ShardId(shard), lent_blocks: 0 });
    let answer = hear(&mut lane);
    let is_accepted = matches!(answer, SetupMessage::LaneAccept { .. });
    (is_accepted.then(|| settle(lane)), answer)
}

/// What a lane whose peer accepted it becomes.
fn settle(lane: Channel) -> Wire {
    let region = Arc::new(Region::new(rdma_fallback::PAGE_BYTES).unwrap());
    let transports = Transports::new(Choice::Tcp, RdmaOptions::default(), region).unwrap();
    transports.settle(lane, Span::default(), TIMEOUT, None).unwrap().wire
}

fn say(channel: &mut Channel, message: &SetupMessage) {
    channel.send(&message.encode()).unwrap();
}

fn hear(channel: &mut Channel) -> SetupMessage {
    SetupMessage::decode(&channel.receive(SETUP_BYTES_MAX).unwrap()).unwrap()
}

fn is_refused(answer: &SetupMessage, trouble: &Trouble) -> bool {
    matches!(answer, SetupMessage::Refused(told) if told.code == trouble.code())
}

#[test]
fn a_session_forms_and_every_wire_carries_both_ways() {
    for shards in [1, 3, 20] {
        let (primary, secondary) =
            (TestNode::new(Role::Primary, shards), TestNode::new(Role::Secondary, shards));
        let (acceptor, address) = listening(&secondary, TIMEOUT);
        let dialler = dialling(&primary, &address, key());
        let (mut near, mut far) = (primary.session(), secondary.session());
        assert_eq!(*near.hello, hello(Role::Secondary, shards));
        assert_eq!(*far.hello, hello(Role::Primary, shards));
        assert_eq!(near.lent_blocks, vec![LENT; usize::from(shards)]);
        assert_eq!(far.lent_blocks, vec![0; usize::from(shards)]);
        carry(&mut near.control, &mut far.control, b"committed", None);
        carry(&mut far.control, &mut near.control, b"progress", None);
        for shard in 0..shards {
            // Each lane places its own number at the end of what is lent on it.
            let (lane, bytes) = (usize::from(shard), [shard as u8 + 1; 16]);
            primary.region.copy_in(0, &bytes);
            let target = u64::from(LENT) * BLOCK_BYTES as u64 - 16;
            let sources = [Span::new(0, 16)];
            let placement = Some(Placement { sources: &sources, target });
            carry(&mut near.lanes[lane], &mut far.lanes[lane], b"data", placement);
            let mut got = [0; 16];
            let lend = secondary.lane_lend(ShardId(shard));
            secondary.region.copy_out(lend.offset + target, &mut got);
            assert_eq!(got, bytes);
            carry(&mut far.lanes[lane], &mut near.lanes[lane], b"credit", None);
        }
        assert_eq!((primary.lines(), secondary.lines()), (Vec::new(), Vec::new()));
        stop_promptly(dialler);
        stop_promptly(acceptor);
        // What was handed over outlives the link.
        carry(&mut near.control, &mut far.control, b"still here", None);
    }
}

#[test]
fn the_largest_number_of_shards_forms_a_session() {
    let plan = Geometry::plan(1 << 20, 64, None, None).unwrap();
    let of = |role| {
        let mut hello = hello(role, 1);
        hello.geometry = plan;
        hello.roots = vec![Root(1); 64];
        TestNode::of(hello)
    };
    let (primary, secondary) = (of(Role::Primary), of(Role::Secondary));
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let _dialler = dialling(&primary, &address, key());
    assert_eq!(primary.session().lanes.len(), 64);
    assert_eq!(secondary.session().lanes.len(), 64);
}

#[test]
fn a_lost_session_is_followed_by_another() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 2), TestNode::new(Role::Secondary, 2));
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let _dialler = dialling(&primary, &address, key());
    for _ in 0..3 {
        drop((primary.session(), secondary.session()));
        // The secondary still believes in the old session: its refusal is not worth a line.
        primary.lose_session();
    }
    drop((primary.session(), secondary.session()));
    assert_eq!((primary.lines(), secondary.lines()), (Vec::new(), Vec::new()));
}

#[test]
fn a_wrong_key_is_told_once_on_both_sides_and_reaches_no_node() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 1), TestNode::new(Role::Secondary, 1));
    let (acceptor, address) = listening(&secondary, TIMEOUT);
    let dialler = dialling(&primary, &address, Key::from_bytes(b"another key"));
    wait_until("it is told", || primary.lines_with("same key") > 0);
    thread::sleep(Duration::from_millis(800));
    assert_eq!(primary.lines().len(), 1, "{:?}", primary.lines());
    assert_eq!(secondary.lines().len(), 1, "{:?}", secondary.lines());
    assert_eq!(secondary.asked.load(Ordering::SeqCst), 0);
    stop_promptly(dialler);
    let right = dialling(&primary, &address, key());
    drop((primary.session(), secondary.session()));
    stop_promptly(right);
    stop_promptly(acceptor);
}

#[test]
fn another_store_is_refused_and_told_once() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 1), TestNode::new(Role::Secondary, 1));
    secondary.change(|hello| hello.store = StoreId([8; 16]));
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let _dialler = dialling(&primary, &address, key());
    wait_until("several tries", || secondary.asked.load(Ordering::SeqCst) >= 4);
    for node in [&primary, &secondary] {
        assert_eq!(node.lines_with("two different stores"), 1, "{:?}", node.lines());
        assert_eq!(node.lines().len(), 1, "{:?}", node.lines());
        assert!(lock(&node.sessions).is_empty());
    }
    // Another reason is another line, and the numbers in it are none.
    secondary.change(|hello| (hello.store, hello.last) = (StoreId([7; 16]), CpNumber(1)));
    let tries = secondary.asked.load(Ordering::SeqCst);
    wait_until("other tries", || {
        primary.change(|hello| hello.last = hello.last.next());
        primary.change(|hello| hello.base = hello.last);
        secondary.asked.load(Ordering::SeqCst) >= tries + 2
    });
    for node in [&primary, &secondary] {
        assert_eq!(node.lines_with("format the secondary anew"), 1, "{:?}", node.lines());
        assert_eq!(node.lines().len(), 2, "{:?}", node.lines());
    }
    secondary.change(|hello| hello.last = CpNumber(1));
    primary.change(|hello| hello.base = CpNumber(1));
    drop((primary.session(), secondary.session()));
}

#[test]
fn a_refusal_of_the_primary_alone_is_told_on_both_sides() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 1), TestNode::new(Role::Secondary, 1));
    // The secondary judges the hello it gets; the primary's own base moved on since.
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let mut control = dial(&address, &key(), TIMEOUT).unwrap();
    let (session, hello) = (SessionId([1; 16]), Box::new(hello(Role::Primary, 1)));
    say(&mut control, &SetupMessage::ControlHello { session, hello });
    assert!(matches!(hear(&mut control), SetupMessage::ControlAccept { .. }));
    let told = Told { code: 15, text: "the two stores differ".to_owned(), hello: None };
    say(&mut control, &SetupMessage::Refused(told));
    wait_until("it is told", || secondary.lines_with("the two stores differ") == 1);
    let (_, answer) = open_lane(&address, session, 0);
    assert!(is_refused(&answer, &Trouble::LaneUnknown(ShardId(0))));
    let _dialler = dialling(&primary, &address, key());
    drop((primary.session(), secondary.session()));
}

#[test]
fn two_primaries_learn_who_was_deposed() {
    let (old, new) = (TestNode::new(Role::Primary, 1), TestNode::new(Role::Primary, 1));
    new.change(|hello| {
        hello.term = Term(2);
        hello.history.push(TermStart { term: Term(2), first: CpNumber(6) });
    });
    // The deposed one dials: it judges the hello that comes with the refusal.
    let (acceptor, address) = listening(&new, TIMEOUT);
    let dialler = dialling(&old, &address, key());
    wait_until("the old one judges", || old.judged.load(Ordering::SeqCst) > 0);
    wait_until("it is told", || old.lines_with("was deposed") == 1);
    stop_promptly(dialler);
    stop_promptly(acceptor);
    // The deposed one listens: it judges the hello of the caller.
    let judged = old.judged.load(Ordering::SeqCst);
    let (_acceptor, address) = listening(&old, TIMEOUT);
    let _dialler = dialling(&new, &address, key());
    wait_until("the old one judges", || old.judged.load(Ordering::SeqCst) > judged);
    wait_until("it is told", || old.lines_with("was deposed") >= 1);
    assert_eq!(old.asked.load(Ordering::SeqCst) + new.asked.load(Ordering::SeqCst), 0);
}

#[test]
fn a_caller_that_is_no_primary_is_told_so() {
    let secondary = TestNode::new(Role::Secondary, 1);
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let told = greet(&address, hello(Role::Secondary, 1)).map(|_| ()).unwrap_err();
    assert_eq!(told.code, Trouble::CallerNotPrimary.code());
    assert_eq!(told.hello.as_deref(), Some(&hello(Role::Secondary, 1)));
    assert_eq!(secondary.asked.load(Ordering::SeqCst), 0);
    wait_until("it is told", || secondary.lines_with("only a primary opens a session") == 1);
}

#[test]
fn a_node_that_restarts_says_so_and_is_reached_later() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 1), TestNode::new(Role::Secondary, 1));
    let away = lock(&secondary.hello).take();
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let told = greet(&address, hello(Role::Primary, 1)).map(|_| ()).unwrap_err();
    assert_eq!((told.code, told.hello), (Trouble::Stopping.code(), None));
    let _dialler = dialling(&primary, &address, key());
    thread::sleep(Duration::from_millis(300));
    *lock(&secondary.hello) = away;
    drop((primary.session(), secondary.session()));
    assert_eq!((primary.lines(), secondary.lines()), (Vec::new(), Vec::new()));
}

#[test]
fn a_missing_lane_ends_the_set_up_and_the_next_one_is_clean() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 2), TestNode::new(Role::Secondary, 2));
    let (_acceptor, address) = listening(&secondary, Duration::from_millis(400));
    let (mut control, session) = greet(&address, hello(Role::Primary, 2)).unwrap();
    let (_lane, answer) = open_lane(&address, session, 0);
    let accept = SetupMessage::LaneAccept { shard: ShardId(0), lent_blocks: LENT };
    assert_eq!(answer, accept);
    let last = hear(&mut control);
    assert!(is_refused(&last, &Trouble::LanesMissing { there: 1, wanted: 2 }), "{last:?}");
    wait_until("it is told", || secondary.lines_with("1 of 2 lanes") == 1);
    let (_, answer) = open_lane(&address, session, 1);
    assert!(is_refused(&answer, &Trouble::LaneUnknown(ShardId(1))));
    assert!(lock(&secondary.sessions).is_empty());
    let _dialler = dialling(&primary, &address, key());
    drop((primary.session(), secondary.session()));
}

#[test]
fn lanes_are_matched_by_session_and_shard_and_given_once() {
    let secondary = TestNode::new(Role::Secondary, 2);
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let (mut control, session) = greet(&address, hello(Role::Primary, 2)).unwrap();
    for (other, shard) in [(SessionId([4; 16]), 0), (session, 2), (session, 63)] {
        let (_, answer) = open_lane(&address, other, shard);
        assert!(is_refused(&answer, &Trouble::LaneUnknown(ShardId(shard))), "{answer:?}");
    }
    let accept = |shard| SetupMessage::LaneAccept { shard: ShardId(shard), lent_blocks: LENT };
    let (_one, answer) = open_lane(&address, session, 1);
    assert_eq!(answer, accept(1));
    let (_, answer) = open_lane(&address, session, 1);
    assert!(is_refused(&answer, &Trouble::LaneUnknown(ShardId(1))), "a second lane of a shard");
    assert!(lock(&secondary.sessions).is_empty());
    let (_zero, answer) = open_lane(&address, session, 0);
    assert_eq!(answer, accept(0));
    assert_eq!(hear(&mut control), SetupMessage::Ready);
    assert_eq!(secondary.session().lanes.len(), 2);
}

#[test]
fn a_newer_set_up_takes_the_place_of_the_older() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 2), TestNode::new(Role::Secondary, 2));
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    // Half-way, then silent for ever.
    let (mut control, session) = greet(&address, hello(Role::Primary, 2)).unwrap();
    let (_lane, _) = open_lane(&address, session, 0);
    let _dialler = dialling(&primary, &address, key());
    drop((primary.session(), secondary.session()));
    assert!(is_refused(&hear(&mut control), &Trouble::Superseded));
    let (_, answer) = open_lane(&address, session, 1);
    assert!(is_refused(&answer, &Trouble::LaneUnknown(ShardId(1))));
    assert_eq!(lock(&secondary.sessions).len(), 0, "the older one was not handed over as well");
}

#[test]
fn a_secondary_that_lends_too_little_is_refused() {
    let primary = TestNode::new(Role::Primary, 1);
    let secondary = TestNode::lending(hello(Role::Secondary, 1), LENT - 1);
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let _dialler = dialling(&primary, &address, key());
    wait_until("it is told", || primary.lines_with("lends 511 blocks") == 1);
    wait_until("it is told", || secondary.lines_with("lends 511 blocks") == 1);
    assert!(lock(&primary.sessions).is_empty() && lock(&secondary.sessions).is_empty());
}

#[test]
fn strangers_and_idlers_do_not_keep_a_peer_out() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 2), TestNode::new(Role::Secondary, 2));
    let (acceptor, address) = listening(&secondary, TIMEOUT);
    // Half-open, garbage, an end at once, a handshake that stops half-way.
    let _silent: Vec<TcpStream> = (0..STRANGERS_PER_ADDRESS_MAX - 12)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    for count in [1, 8, 100, 5000] {
        let mut garbage = TcpStream::connect(&address).unwrap();
        let _ = garbage.write_all(&vec![0xa5; count]);
        let _ = garbage.shutdown(Shutdown::Write);
        // It hears the listener's first word at most, never more.
        let mut heard = Vec::new();
        let _ = garbage.read_to_end(&mut heard);
        assert!(heard.len() <= 48, "{} bytes", heard.len());
    }
    // Those who hold the key, and then say nothing, nonsense, or something out of turn.
    let _idle = dial(&address, &key(), TIMEOUT).unwrap();
    let mut nonsense = dial(&address, &key(), TIMEOUT).unwrap();
    nonsense.send(&[9; 100]).unwrap();
    assert!(matches!(hear(&mut nonsense), SetupMessage::Refused(told) if told.code == 103));
    let mut early = dial(&address, &key(), TIMEOUT).unwrap();
    say(&mut early, &SetupMessage::Ready);
    assert!(is_refused(&hear(&mut early), &Trouble::Unexpected));
    let dialler = dialling(&primary, &address, key());
    drop((primary.session(), secondary.session()));
    assert!(secondary.lines().len() <= 3, "{:?}", secondary.lines());
    assert_eq!(secondary.lines_with("turned away"), 1, "{:?}", secondary.lines());
    stop_promptly(dialler);
    stop_promptly(acceptor);
}

#[test]
fn too_many_callers_are_turned_away_and_places_come_back() {
    let (primary, secondary) = (TestNode::new(Role::Primary, 1), TestNode::new(Role::Secondary, 1));
    let (_acceptor, address) = listening(&secondary, Duration::from_millis(500));
    let silent: Vec<TcpStream> =
        (0..STRANGERS_PER_ADDRESS_MAX + 8).map(|_| TcpStream::connect(&address).unwrap()).collect();
    // The last ones are closed without a byte, the first ones when their time is up.
    let mut last = &silent[silent.len() - 1];
    let mut byte = [0];
    assert!(matches!(last.read(&mut byte), Ok(0) | Err(_)));
    let _dialler = dialling(&primary, &address, key());
    drop((primary.session(), secondary.session()));
    assert!(secondary.lines().len() <= 1, "{:?}", secondary.lines());
}

#[test]
fn stop_waits_for_no_peer() {
    // A peer that accepts and is silent, on the dialler's side.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let primary = TestNode::new(Role::Primary, 1);
    let link = dialling(&primary, &silent.local_addr().unwrap().to_string(), key());
    let _call = silent.accept().unwrap();
    stop_promptly(link);
    // An address that does not answer at all: its queue of calls is full.
    let full = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = full.local_addr().unwrap();
    let _calls: Vec<TcpStream> = (0..5000)
        .map_while(|_| TcpStream::connect_timeout(&address, Duration::from_millis(100)).ok())
        .collect();
    let link = dialling(&primary, &address.to_string(), key());
    thread::sleep(Duration::from_millis(100));
    stop_promptly(link);
    // A set-up that waits for its lanes, a caller that proved the key, and one that proves nothing.
    let secondary = TestNode::new(Role::Secondary, 1);
    let (link, address) = listening(&secondary, TIMEOUT);
    let (control, _) = greet(&address, hello(Role::Primary, 1)).unwrap();
    let idle = dial(&address, &key(), TIMEOUT).unwrap();
    let stranger = TcpStream::connect(&address).unwrap();
    thread::sleep(Duration::from_millis(50));
    stop_promptly(link);
    assert_eq!(Arc::strong_count(&primary), 1, "nothing of the node is held");
    assert_eq!(Arc::strong_count(&secondary), 1, "nothing of the node is held");
    assert!(secondary.lines().is_empty(), "{:?}", secondary.lines());
    TcpListener::bind(&address).expect("the address is free again");
    drop((control, idle, stranger));
}

#[test]
fn a_dialler_waits_while_it_is_not_wanted() {
    let (node, secondary) = (TestNode::new(Role::Secondary, 1), TestNode::new(Role::Secondary, 1));
    let (_acceptor, address) = listening(&secondary, TIMEOUT);
    let link = dialling(&node, &address, key());
    thread::sleep(Duration::from_millis(300));
    assert_eq!(secondary.asked.load(Ordering::SeqCst), 0);
    node.stopping.store(true, Ordering::SeqCst);
    node.change(|hello| hello.role = Role::Primary);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(secondary.asked.load(Ordering::SeqCst), 0);
    node.stopping.store(false, Ordering::SeqCst);
    // Promoted: a test node that was secondary lends, which does no harm.
    drop((node.session(), secondary.session()));
    stop_promptly(link);
}

#[test]
fn a_peer_that_breaks_off_anywhere_is_tried_again() {
    // The listener of this test drops the dialler after one more step each time.
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap().to_string();
    let primary = TestNode::new(Role::Primary, 1);
    let link = dialling(&primary, &address, key());
    let take = |pending: Pending| -> Result<Channel, ChannelError> {
        pending.authenticate(&key(), TIMEOUT)
    };
    let secondary = || Box::new(hello(Role::Secondary, 1));
    for step in 0..5 {
        let pending = listener.accept().unwrap();
        if step == 0 {
            continue;
        }
        let mut control = take(pending).unwrap();
        let SetupMessage::ControlHello { session, .. } = hear(&mut control) else { panic!() };
        if step == 1 {
            continue;
        }
        say(&mut control, &SetupMessage::ControlAccept { hello: secondary() });
        assert_eq!(hear(&mut control), SetupMessage::Proceed);
        if step == 2 {
            // Also the lane's call finds nobody.
            drop(control);
            drop(listener.accept().unwrap());
            continue;
        }
        let mut lane = take(listener.accept().unwrap()).unwrap();
        let first = hear(&mut lane);
        let shard = ShardId(0);
        assert_eq!(first, SetupMessage::LaneHello { session, shard, lent_blocks: 0 });
        if step == 3 {
            say(&mut lane, &SetupMessage::LaneAccept { shard: ShardId(1), lent_blocks: LENT });
            continue;
        }
        say(&mut lane, &SetupMessage::LaneAccept { shard, lent_blocks: LENT });
        let _lane = settle(lane);
        assert!(lock(&primary.sessions).is_empty());
        say(&mut control, &SetupMessage::Ready);
        assert_eq!(primary.session().lanes.len(), 1);
    }
    stop_promptly(link);
    assert!(primary.lines().len() <= 4, "{:?}", primary.lines());
}
