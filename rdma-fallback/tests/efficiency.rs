//! What a wire costs, counted and not timed: copies in this process, and calls to the kernel, for data that is moved.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use rdma_fallback::{
    Counters, Event, Placement, Progress, Region, Span, TcpWire, Wire, memory_pair,
};

const REGION_BYTES: usize = 8 << 20;
const LEND: Span = Span { offset: 4 << 20, length: 4 << 20 };
/// The most of a placement that the TCP wire's inbox can hold before the placement's target is known.
const INBOX_BYTES: u64 = 2 * (32 + 8192);
/// As many as wait for the card or the socket under a deep queue.
const POSTS: u64 = 64;

fn region() -> Arc<Region> {
    Arc::new(Region::new(REGION_BYTES).unwrap())
}

fn tcp_pair() -> (Wire, Wire) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let wire = |stream| Wire::Tcp(TcpWire::new(stream, region(), LEND).unwrap());
    (wire(near), wire(far))
}

/// Moves `POSTS` placements of `bytes` each, in pieces of 4 KiB that are no neighbours, and answers both sides' counters.
fn move_placements((mut a, mut b): (Wire, Wire), bytes: u32) -> (Counters, Counters) {
    let pieces = (bytes / 4096).max(1);
    let length = bytes.min(4096);
    let sources: Vec<Span> =
        (0..pieces).map(|piece| Span::new(u64::from(piece) * 8192, length)).collect();
    for token in 0..POSTS {
        let placement = Placement { sources: &sources, target: 0 };
        a.post(token, &[7; 200], Some(placement)).unwrap();
    }
    let (mut posted, mut got) = (0, 0);
    while posted < POSTS || got < POSTS {
        let mut progress = a.poll(&mut |event| posted += u64::from(is_posted(&event)));
        let far = b.poll(&mut |event| got += u64::from(matches!(event, Event::Message { .. })));
        if far == Progress::More {
            progress = far;
        }
        if progress == Progress::Waiting {
            std::thread::yield_now();
        }
    }
    (a.counters(), b.counters())
}

fn is_posted(event: &Event<'_>) -> bool {
    matches!(event, Event::Posted { .. })
}

#[test]
fn tcp_sends_data_without_a_copy() {
    for bytes in [512, 4096, 65_536] {
        let (sent, received) = move_placements(tcp_pair(), bytes);
        assert_eq!(sent.placed_bytes_sent, POSTS * u64::from(bytes));
        assert_eq!(sent.placed_bytes_copied, 0, "{sent:?}");
        assert_eq!(sent.message_bytes_copied, POSTS * (32 + 200), "once, into the frame");
        // What came with a frame's head before its target was known, and never more.
        let copied_max = POSTS * u64::from(bytes).min(INBOX_BYTES);
        assert!(received.placed_bytes_copied <= copied_max, "{received:?}");
        assert_eq!(received.placed_bytes_received, sent.placed_bytes_sent);
    }
}

#[test]
fn tcp_makes_few_system_calls() {
    let (sent, received) = move_placements(tcp_pair(), 4096);
    // 64 posts of 4 KiB at once: all that fit into one call go with it.
    assert!(sent.send_calls <= POSTS / 8, "{sent:?}");
    // Each call fills the rest of a placement and the inbox behind it: some four such frames.
    assert!(received.receive_calls - received.receive_calls_empty <= POSTS, "{received:?}");
    assert_eq!(sent.system_calls(), sent.send_calls + sent.receive_calls);
    assert_eq!((sent.requests_sent, received.completions_taken), (0, 0), "there is no card");
}

#[test]
fn a_post_costs_one_system_call_where_nothing_became_readable() {
    let (mut a, _b) = tcp_pair();
    assert_eq!(a.poll(&mut |_| {}), Progress::Waiting);
    let before = a.counters();
    for token in 0..10 {
        a.post(token, b"message", None).unwrap();
        assert_eq!(a.poll_when(false, &mut |_| {}), Progress::Waiting);
    }
    let cost = a.counters().since(&before);
    assert_eq!((cost.system_calls(), cost.messages_sent), (10, 10));
}

#[test]
fn memory_copies_what_a_card_would_move() {
    let pair = memory_pair(region(), LEND, region(), LEND).unwrap();
    let (sent, received) = move_placements(pair, 65_536);
    assert_eq!(sent.placed_bytes_copied, sent.placed_bytes_sent);
    assert_eq!(received.placed_bytes_copied, 0);
}

#[test]
fn counters_are_told_apart_by_time() {
    let before = Counters { send_calls: 3, wake_ups: 1, ..Counters::default() };
    let after = Counters { send_calls: 10, wake_ups: 1, armings: 2, ..Counters::default() };
    let since = after.since(&before);
    assert_eq!(since, Counters { send_calls: 7, armings: 2, ..Counters::default() });
}
