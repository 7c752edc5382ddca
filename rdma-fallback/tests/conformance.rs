//! One contract: the same tests over TCP, over TCP through a proxy that forwards a few bytes at a time, in memory, and
//! over RDMA between two connections of this host, if it has a device; else one line says that this was not run.
//!
//! Checked of every transport: order, sizes, placement before its message, gathering, a full queue, `Posted` once per
//! token and in order, a target outside the lent span, an end in the middle, both directions at once.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use rdma_fallback::rdma::{Choice, RdmaOptions, Transports, probe};
use rdma_fallback::{
    CloseReason, Event, FrameFault, Key, Listener, MESSAGE_BYTES_MAX, PLACEMENT_BYTES_MAX,
    PLACEMENT_SPANS_MAX, POSTS_MAX, Placement, PostError, PostLimit, Progress, Region, Span, Wire,
    dial, memory_pair,
};

const REGION_BYTES: usize = 16 << 20;
/// Not at the region's start and not up to its end, so that a wrong base shows.
const LEND: Span = Span { offset: (8 << 20) + 4096, length: (8 << 20) - 8192 };
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Told {
    Posted(u64),
    /// Message, where its bytes were placed, and what was there at that moment.
    Message(Vec<u8>, Option<Span>, Vec<u8>),
    Closed(CloseReason),
}

struct End {
    wire: Wire,
    region: Arc<Region>,
    told: Vec<Told>,
}

impl End {
    fn poll(&mut self) -> Progress {
        let (region, told) = (&self.region, &mut self.told);
        self.wire.poll(&mut |event| {
            told.push(match event {
                Event::Posted { token } => Told::Posted(token),
                Event::Message { bytes, placed } => {
                    let span = placed.unwrap_or_default();
                    let mut found = vec![0; span.length as usize];
                    region.copy_out(LEND.offset + span.offset, &mut found);
                    Told::Message(bytes.to_vec(), placed, found)
                }
                Event::Closed { reason } => Told::Closed(reason),
            });
        })
    }

    fn messages(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.told.iter().filter_map(|told| match told {
            Told::Message(bytes, ..) => Some(bytes),
            _ => None,
        })
    }

    fn posted(&self) -> Vec<u64> {
        let token = |told: &Told| if let Told::Posted(token) = told { Some(*token) } else { None };
        self.told.iter().filter_map(token).collect()
    }

    fn closed(&self) -> Option<CloseReason> {
        let mut closed = self.told.iter().enumerate().filter_map(|(index, told)| match told {
            Told::Closed(reason) => Some((index, *reason)),
            _ => None,
        });
        let (index, reason) = closed.next()?;
        assert_eq!(index + 1, self.told.len(), "Closed is the last event, and there is one");
        Some(reason)
    }
}

struct Pair {
    a: End,
    b: End,
}

impl Pair {
    fn drive(&mut self, mut until: impl FnMut(&Pair) -> bool) {
        let end = Instant::now() + LIMIT;
        while !until(self) {
            let waiting = [self.a.poll(), self.b.poll()] == [Progress::Waiting; 2];
            if waiting {
                thread::sleep(Duration::from_micros(50));
            }
            assert!(Instant::now() < end, "nothing happens");
        }
    }
}

fn regions() -> (Arc<Region>, Arc<Region>) {
    let make = || Arc::new(Region::new(REGION_BYTES).unwrap());
    (make(), make())
}

fn memory() -> Pair {
    let (a, b) = regions();
    let (wire_a, wire_b) = memory_pair(Arc::clone(&a), LEND, Arc::clone(&b), LEND).unwrap();
    let end = |wire, region| End { wire, region, told: Vec::new() };
    Pair { a: end(wire_a, a), b: end(wire_b, b) }
}

fn tcp() -> Pair {
    tcp_through(|address| address)
}

/// None without a device.
fn rdma() -> Option<Pair> {
    rdma_with(&RdmaOptions::default())
}

/// With queues as short as can be, so that credit runs out all the time.
fn narrow_rdma() -> Option<Pair> {
    let (send_requests, receive_requests) = (64, 16);
    let options = RdmaOptions::default();
    rdma_with(&RdmaOptions { send_requests, receive_requests, inline_bytes: 0, ..options })
}

fn rdma_with(options: &RdmaOptions) -> Option<Pair> {
    static SAID: Once = Once::new();
    let devices = probe().map(|devices| devices.devices);
    let devices = devices.map_err(|error| {
        // Not through the macros, whose output a passing test swallows.
        let line = format!("RDMA: no device: not run ({error})\n");
        SAID.call_once(|| std::io::stderr().write_all(line.as_bytes()).unwrap());
    });
    let mut active = devices.ok()?.into_iter().filter(|device| device.is_active);
    let address = active.find_map(|device| {
        device.addresses.into_iter().map(|address| address.1).find(|ip| ip.is_ipv4())
    })?;
    let key = Key::from_bytes(b"conformance");
    let listener = Listener::bind(&format!("{address}:0")).unwrap();
    let at = listener.local_address().unwrap().to_string();
    let (a, b) = regions();
    let settle = |channel, region: &Arc<Region>| {
        let options = options.clone();
        let transports = Transports::new(Choice::Rdma, options, Arc::clone(region)).unwrap();
        let wire = transports.settle(channel, LEND, LIMIT, None).unwrap().wire;
        End { wire, region: Arc::clone(region), told: Vec::new() }
    };
    Some(thread::scope(|scope| {
        let far = scope
            .spawn(|| settle(listener.accept().unwrap().authenticate(&key, LIMIT).unwrap(), &b));
        let near = settle(dial(&at, &key, LIMIT).unwrap(), &a);
        Pair { a: near, b: far.join().unwrap() }
    }))
}

fn dribble() -> Pair {
    tcp_through(|address| {
        let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy_address = proxy.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let (near, _) = proxy.accept().unwrap();
            let far = TcpStream::connect(address).unwrap();
            let (near_again, far_again) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || forward(near_again, far_again, 7));
            forward(far, near, 8);
        });
        proxy_address
    })
}

/// Forwards in pieces of random small sizes, now and then a large one, until either side ends.
fn forward(mut from: TcpStream, mut to: TcpStream, seed: u64) {
    to.set_nodelay(true).unwrap();
    let mut random = Random(seed);
    let mut bytes = vec![0; 40_000];
    loop {
        let most = [3, 40, 700, 9_000, 40_000][random.below(5) as usize];
        match from.read(&mut bytes[..1 + random.below(most) as usize]) {
            Ok(count) if count > 0 && to.write_all(&bytes[..count]).is_ok() => {}
            _ => break,
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

fn tcp_through(way: impl FnOnce(String) -> String) -> Pair {
    let key = Key::from_bytes(b"conformance");
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = way(listener.local_address().unwrap().to_string());
    let (channel_a, channel_b) = thread::scope(|scope| {
        let dialer = scope.spawn(|| dial(&address, &key, LIMIT).unwrap());
        let acceptor = listener.accept().unwrap().authenticate(&key, LIMIT).unwrap();
        (dialer.join().unwrap(), acceptor)
    });
    let (a, b) = regions();
    let end = |wire, region| End { wire, region, told: Vec::new() };
    Pair {
        a: end(channel_a.into_wire(Arc::clone(&a), LEND).unwrap(), a),
        b: end(channel_b.into_wire(Arc::clone(&b), LEND).unwrap(), b),
    }
}

macro_rules! over_each_transport {
    ($($name:ident)*) => {
        mod over_tcp { $(#[test] fn $name() { super::$name(super::tcp()); })* }
        mod over_dribbling_tcp { $(#[test] fn $name() { super::$name(super::dribble()); })* }
        mod over_memory { $(#[test] fn $name() { super::$name(super::memory()); })* }
        mod over_rdma {
            $(#[test] fn $name() {
                if let Some(pair) = super::rdma() { super::$name(pair); }
            })*
        }
        mod over_narrow_rdma {
            $(#[test] fn $name() {
                if let Some(pair) = super::narrow_rdma() { super::$name(pair); }
            })*
        }
    };
}

over_each_transport! {
    messages_of_every_size_keep_their_order
    placement_comes_before_its_message
    many_spans_are_gathered_in_order
    full_queue_drains
    limits_are_told_and_queue_nothing
    target_outside_closes_the_receiver
    end_in_the_middle_is_told_once
    own_close_is_told_once
    large_placements_wait_for_a_slow_reader
    both_directions_at_once
    work_of_one_poll_is_bounded
}

fn messages_of_every_size_keep_their_order(mut pair: Pair) {
    let mut random = Random(1);
    let mut sizes = vec![0, 1, MESSAGE_BYTES_MAX, 0, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX - 1];
    sizes.extend((0..100).map(|_| random.below(MESSAGE_BYTES_MAX as u64 + 1) as usize));
    let messages = sizes.iter().map(|size| random.bytes(*size)).collect::<Vec<_>>();
    for (token, message) in messages.iter().enumerate() {
        pair.a.wire.post(token as u64, message, None).unwrap();
    }
    pair.drive(|pair| pair.b.messages().count() == sizes.len());
    pair.drive(|pair| pair.a.posted().len() == sizes.len());
    assert!(pair.b.messages().eq(messages.iter()));
    assert_eq!(pair.a.posted(), (0..sizes.len() as u64).collect::<Vec<_>>());
    assert!(pair.b.told.iter().all(|told| matches!(told, Told::Message(_, None, _))));
    let (sent, received) = (pair.a.wire.counters(), pair.b.wire.counters());
    assert_eq!(sent.messages_sent, sizes.len() as u64);
    assert_eq!(sent.message_bytes_sent, sizes.iter().sum::<usize>() as u64);
    assert_eq!(received.messages_received, sent.messages_sent);
    assert_eq!(received.message_bytes_received, sent.message_bytes_sent);
    let calls = if is_rdma(&pair) { sent.requests_sent } else { sent.system_calls() };
    assert!(calls > 0);
}

fn placement_comes_before_its_message(mut pair: Pair) {
    let mut random = Random(2);
    let sizes = [1, 2, 4095, 4096, 8191, 16_384, 16_385, 65_536, 300_000];
    let mut expected = Vec::new();
    let (mut source, mut target) = (5, 3);
    for (token, size) in sizes.into_iter().enumerate() {
        let bytes = random.bytes(size as usize);
        pair.a.region.copy_in(source, &bytes);
        let sources = [Span::new(source, size)];
        let placement = Placement { sources: &sources, target };
        pair.a.wire.post(token as u64, &[token as u8], Some(placement)).unwrap();
        expected.push(Told::Message(vec![token as u8], Some(Span::new(target, size)), bytes));
        source += u64::from(size);
        target += u64::from(size) + 1;
    }
    let nothing = Placement { sources: &[Span::new(0, 0)], target: 77 };
    pair.a.wire.post(99, b"no bytes", Some(nothing)).unwrap();
    expected.push(Told::Message(b"no bytes".to_vec(), None, Vec::new()));
    pair.drive(|pair| pair.b.told.len() == expected.len());
    assert_eq!(pair.b.told, expected);
    let mut gap = [1; 1];
    pair.b.region.copy_out(LEND.offset + 3 + 1, &mut gap);
    assert_eq!(gap, [0], "the byte between two targets is untouched");
    pair.drive(|pair| pair.a.posted().len() == expected.len());
    let placed_bytes = sizes.iter().map(|size| u64::from(*size)).sum::<u64>();
    assert_eq!(pair.a.wire.counters().placed_bytes_sent, placed_bytes);
    assert_eq!(pair.b.wire.counters().placed_bytes_received, placed_bytes);
}

fn many_spans_are_gathered_in_order(mut pair: Pair) {
    let mut random = Random(3);
    let data = random.bytes(4 << 20);
    pair.a.region.copy_in(0, &data);
    let mut expected = Vec::new();
    let sources = (0..PLACEMENT_SPANS_MAX)
        .map(|index| {
            // Backwards, now and then empty, now and then next to the one before.
            let offset = ((PLACEMENT_SPANS_MAX - 1 - index) * 4096) as u64;
            let span = Span::new(offset, [0, 1, 511, 4096][random.below(4) as usize]);
            expected.extend_from_slice(&data[offset as usize..span.end() as usize]);
            span
        })
        .collect::<Vec<_>>();
    let placement = Placement { sources: &sources, target: 12_345 };
    pair.a.wire.post(1, b"gathered", Some(placement)).unwrap();
    pair.a.wire.post(2, b"after", None).unwrap();
    pair.drive(|pair| pair.b.told.len() == 2 && pair.a.told.len() == 2);
    let placed = Some(Span::new(12_345, expected.len() as u32));
    assert!(pair.b.told[0] == Told::Message(b"gathered".to_vec(), placed, expected));
    assert_eq!(pair.b.told[1], Told::Message(b"after".to_vec(), None, Vec::new()));
    assert_eq!(pair.a.posted(), [1, 2]);
}

fn full_queue_drains(mut pair: Pair) {
    for round in 0..3 {
        for index in 0..POSTS_MAX as u64 {
            pair.a.wire.post(round * 1000 + index, &index.to_le_bytes(), None).unwrap();
        }
        assert_eq!(pair.a.wire.post(9999, b"x", None), Err(PostError::Full));
        // Where output goes on by itself, nothing is to be watched for it.
        assert_eq!(pair.a.wire.wants_write(), !is_rdma(&pair));
        let count = (round as usize + 1) * POSTS_MAX;
        pair.drive(|pair| pair.b.messages().count() == count && pair.a.posted().len() == count);
        assert!(!pair.a.wire.wants_write());
    }
    let tokens = (0..3).flat_map(|round| (0..POSTS_MAX as u64).map(move |i| round * 1000 + i));
    assert!(pair.a.posted().into_iter().eq(tokens));
}

fn limits_are_told_and_queue_nothing(mut pair: Pair) {
    let too_large = |limit, got| Err(PostError::TooLarge { limit, got });
    let wire = &mut pair.a.wire;
    let message = vec![0; MESSAGE_BYTES_MAX + 1];
    assert_eq!(wire.post(1, &message, None), too_large(PostLimit::MessageBytes, 8193));
    let spans = vec![Span::new(0, 1); PLACEMENT_SPANS_MAX + 1];
    let placement = Some(Placement { sources: &spans, target: 0 });
    assert_eq!(wire.post(2, b"", placement), too_large(PostLimit::PlacementSpans, 1025));
    let spans = [Span::new(0, PLACEMENT_BYTES_MAX), Span::new(0, 1)];
    let placement = Some(Placement { sources: &spans, target: 0 });
    let got = u64::from(PLACEMENT_BYTES_MAX) + 1;
    assert_eq!(wire.post(3, b"", placement), too_large(PostLimit::PlacementBytes, got));
    wire.post(4, b"fits", None).unwrap();
    pair.drive(|pair| pair.b.messages().count() == 1 && !pair.a.told.is_empty());
    assert_eq!(pair.a.told, [Told::Posted(4)]);
}

fn target_outside_closes_the_receiver(mut pair: Pair) {
    let length = 100;
    let target = u64::from(LEND.length) - u64::from(length) + 1;
    pair.a.region.copy_in(0, &[7; 100]);
    pair.a.wire.post(1, b"before", None).unwrap();
    let sources = [Span::new(0, length)];
    pair.a.wire.post(2, b"outside", Some(Placement { sources: &sources, target })).unwrap();
    pair.a.wire.post(3, b"after", None).unwrap();
    pair.drive(|pair| pair.a.closed().is_some() && pair.b.closed().is_some());
    let placed = Span::new(target, length);
    let fault = FrameFault::TargetOutside { placed, lent_bytes: LEND.length };
    assert_eq!(pair.b.closed(), Some(CloseReason::Protocol(fault)));
    assert_eq!(pair.b.messages().collect::<Vec<_>>(), [b"before"]);
    assert!(is_gone(pair.a.closed()), "{:?}", pair.a.closed());
    let mut found = [1; 200];
    pair.b.region.copy_out(LEND.end() - 100, &mut found);
    assert_eq!(found, [0; 200], "nothing was placed");
}

fn end_in_the_middle_is_told_once(mut pair: Pair) {
    let sources = [Span::new(0, 1 << 20)];
    for token in 0..50 {
        let placement = Placement { sources: &sources, target: token * 4096 };
        pair.a.wire.post(token, b"part", Some(placement)).unwrap();
    }
    pair.drive(|pair| pair.b.messages().count() >= 2);
    pair.b.wire.close();
    pair.drive(|pair| pair.a.closed().is_some() && pair.b.closed().is_some());
    assert_eq!(pair.b.closed(), Some(CloseReason::Local));
    assert!(is_gone(pair.a.closed()), "{:?}", pair.a.closed());
    let posted = pair.a.posted();
    assert!(posted.iter().copied().eq(0..posted.len() as u64), "each once, in order");
    assert_eq!(pair.a.wire.post(51, b"", None), Err(PostError::Closed));
    assert_eq!(pair.b.wire.post(51, b"", None), Err(PostError::Closed));
    let count = pair.a.told.len();
    assert_eq!([pair.a.poll(), pair.b.poll()], [Progress::Waiting; 2]);
    assert_eq!(pair.a.told.len(), count, "nothing after Closed");
    assert!(!pair.a.wire.wants_write());
}

fn own_close_is_told_once(mut pair: Pair) {
    pair.b.wire.post(1, b"said before the end", None).unwrap();
    pair.drive(|pair| pair.b.posted() == [1]);
    pair.b.wire.close();
    pair.b.wire.close();
    pair.drive(|pair| pair.a.closed().is_some() && pair.b.closed().is_some());
    assert_eq!(pair.a.messages().collect::<Vec<_>>(), [b"said before the end"]);
    assert_eq!(pair.a.closed(), Some(CloseReason::Peer));
    assert_eq!(pair.b.closed(), Some(CloseReason::Local));
    drop(pair.b);
    assert_eq!(pair.a.poll(), Progress::Waiting);
}

fn large_placements_wait_for_a_slow_reader(mut pair: Pair) {
    let mut random = Random(4);
    let data = random.bytes(8 << 20);
    pair.a.region.copy_in(0, &data);
    // More than any socket buffers: the sender gets stuck inside a placement and goes on later.
    let count = 12;
    for token in 0..count {
        let sources = [Span::new(token * 4099, PLACEMENT_BYTES_MAX)];
        let placement = Placement { sources: &sources, target: (token % 2) * 4_000_000 };
        pair.a.wire.post(token, &token.to_le_bytes(), Some(placement)).unwrap();
        for _ in 0..20 {
            let _ = pair.a.poll();
        }
    }
    let stuck = pair.a.wire.wants_write();
    assert_eq!(stuck, matches!(pair.a.wire, Wire::Tcp(_)));
    pair.drive(|pair| pair.b.messages().count() == count as usize);
    pair.drive(|pair| pair.a.posted().len() == count as usize);
    for (token, told) in pair.b.told.iter().enumerate() {
        let Told::Message(message, Some(placed), found) = told else { panic!("{told:?}") };
        assert_eq!(message, &(token as u64).to_le_bytes());
        assert_eq!(placed.length, PLACEMENT_BYTES_MAX);
        // In memory a later placement may overwrite the target before the message is taken, as with RDMA.
        if stuck {
            let from = token * 4099;
            assert!(found[..] == data[from..from + found.len()], "placement {token}");
        }
    }
}

fn both_directions_at_once(mut pair: Pair) {
    const COUNT: u64 = 600;
    let mut random = Random(5);
    let mut ways = [Way::new(COUNT), Way::new(COUNT)];
    let end = Instant::now() + LIMIT;
    while ways.iter().any(|way| way.checked < COUNT) {
        assert!(Instant::now() < end, "nothing happens");
        ways[0].step(&mut pair.a, &mut pair.b, &mut random);
        ways[1].step(&mut pair.b, &mut pair.a, &mut random);
        let ends = [&mut pair.a, &mut pair.b];
        if let Some(end) = ends.into_iter().nth(random.below(3) as usize) {
            let _ = end.poll();
        }
    }
    let all = COUNT as usize;
    pair.drive(|pair| pair.a.posted().len() == all && pair.b.posted().len() == all);
    assert_eq!(pair.a.posted(), (0..COUNT).collect::<Vec<_>>());
    assert_eq!(pair.b.posted(), (0..COUNT).collect::<Vec<_>>());
}

fn work_of_one_poll_is_bounded(mut pair: Pair) {
    for token in 0..POSTS_MAX as u64 {
        pair.a.wire.post(token, b"", None).unwrap();
    }
    pair.drive(|pair| pair.b.messages().count() > 0);
    while pair.b.messages().count() < POSTS_MAX {
        let before = pair.b.messages().count();
        let _ = pair.a.poll();
        let progress = pair.b.poll();
        let count = pair.b.messages().count() - before;
        assert!(count <= 64, "{count} messages in one poll");
        let more = progress == Progress::More || matches!(pair.b.wire, Wire::Memory(_));
        assert!(count < 64 || more, "a bounded poll that may have left something says so");
    }
}

/// One direction of random traffic. A slot of 64 KiB of source and target is used again only after its message came.
struct Way {
    count: u64,
    posted: u64,
    checked: u64,
    looked_at: usize,
    expected: HashMap<u64, Told>,
}

impl Way {
    const SLOTS: u64 = 64;
    const SLOT_BYTES: u64 = 1 << 16;

    fn new(count: u64) -> Way {
        Way { count, posted: 0, checked: 0, looked_at: 0, expected: HashMap::new() }
    }

    fn step(&mut self, from: &mut End, to: &mut End, random: &mut Random) {
        while self.posted < self.count && self.posted - self.checked < Way::SLOTS {
            self.post(from, random);
        }
        for told in &to.told[self.looked_at..] {
            if matches!(told, Told::Message(..)) {
                let expected = self.expected.remove(&self.checked);
                assert!(expected.as_ref() == Some(told), "message {}", self.checked);
                self.checked += 1;
            }
        }
        self.looked_at = to.told.len();
    }

    fn post(&mut self, from: &mut End, random: &mut Random) {
        let size = [0, 1, 60, 4000, MESSAGE_BYTES_MAX as u64][random.below(5) as usize];
        let message = random.bytes(size as usize);
        let base = self.posted % Way::SLOTS * Way::SLOT_BYTES;
        let mut sources = Vec::new();
        let mut bytes = Vec::new();
        let mut offset = base;
        for _ in 0..random.below(5) * random.below(4) {
            let length = 1 + random.below(5000) as u32;
            offset += random.below(2) * 100;
            if offset + u64::from(length) > base + Way::SLOT_BYTES {
                break;
            }
            let part = random.bytes(length as usize);
            from.region.copy_in(offset, &part);
            bytes.extend_from_slice(&part);
            sources.push(Span::new(offset, length));
            offset += u64::from(length);
        }
        let placement = Placement { sources: &sources, target: base };
        from.wire.post(self.posted, &message, Some(placement)).unwrap();
        let placed = (!bytes.is_empty()).then(|| Span::new(base, bytes.len() as u32));
        self.expected.insert(self.posted, Told::Message(message, placed, bytes));
        self.posted += 1;
    }
}

#[test]
fn memory_cut_loses_what_was_not_polled() {
    let mut pair = memory();
    pair.a.wire.post(1, b"taken", None).unwrap();
    pair.drive(|pair| pair.b.messages().count() == 1);
    pair.a.wire.post(2, b"lost", None).unwrap();
    let _ = pair.a.poll();
    let Wire::Memory(wire) = &mut pair.b.wire else { panic!("memory makes memory wires") };
    wire.cut();
    pair.drive(|pair| pair.a.closed().is_some() && pair.b.closed().is_some());
    let reset = Some(CloseReason::Lost { kind: ErrorKind::ConnectionReset });
    assert_eq!([pair.a.closed(), pair.b.closed()], [reset; 2]);
    assert_eq!(pair.b.messages().count(), 1);
}

#[test]
fn memory_cut_after_posts_tears_the_next_placement() {
    let mut pair = memory();
    let Wire::Memory(wire) = &mut pair.a.wire else { panic!("memory makes memory wires") };
    wire.cut_after_posts(2);
    pair.a.region.copy_in(0, &[7; 100]);
    for token in 0..4 {
        let sources = [Span::new(0, 50), Span::new(50, 50)];
        let placement = Placement { sources: &sources, target: token * 100 };
        pair.a.wire.post(token, b"", Some(placement)).unwrap();
        pair.drive(|pair| pair.a.told.len() > token as usize || pair.a.closed().is_some());
        pair.drive(|pair| pair.b.told.len() > token as usize || pair.b.closed().is_some());
        if pair.a.closed().is_some() {
            break;
        }
    }
    assert_eq!(pair.a.posted(), [0, 1]);
    assert_eq!(pair.b.messages().count(), 2);
    let mut found = [1; 100];
    pair.b.region.copy_out(LEND.offset + 200, &mut found);
    assert_eq!((&found[..50], &found[50..]), (&[7; 50][..], &[0; 50][..]));
}

#[test]
fn wires_move_between_threads() {
    fn check<T: Send>() {}
    check::<Wire>();
}

fn is_gone(reason: Option<CloseReason>) -> bool {
    use CloseReason::{Lost, Peer, Rdma};
    matches!(reason, Some(Peer | Lost { .. } | Rdma(_)))
}

fn is_rdma(pair: &Pair) -> bool {
    matches!(pair.a.wire, Wire::Rdma(_))
}

/// xorshift64*: the same numbers on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 32) as u8).collect()
    }
}
