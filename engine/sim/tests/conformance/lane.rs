//! What the core relies on of a lane's wire, as bodies over any wire.
//!
//! Rules: messages come whole, once, in the order of their posts; a message's bytes lie in the lent memory before it
//! comes; the buffers of a post are the sender's again at its answer, in order, or at the loss; the loss comes once
//! and last, at each side; nothing of a lost session is seen in the next one. How long anything takes is open.

use std::time::{Duration, Instant};

use crate::random::Random;

/// Blocks that each side lends.
pub const LENT_BLOCKS: u32 = 32;
/// Longest time for anything here to happen.
const LIMIT: Duration = Duration::from_secs(20);

/// What a side is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    /// The buffers of the post with this token are free.
    Posted(u64),
    /// A message, and what lies in the lent blocks that came with it, by their numbers.
    Message { bytes: Vec<u8>, placed: Vec<u64> },
    /// The lane is gone.
    Lost,
}

/// Blocks to place before a message: their contents as numbers, and the first lent block they go to.
#[derive(Clone, Debug)]
pub struct Placed {
    pub contents: Vec<u64>,
    pub target: u32,
}

/// Two ends of one lane, 0 and 1, each with memory of its own.
pub trait Lane {
    /// Posts; false if the lane is full now.
    fn post(&mut self, from: usize, token: u64, message: &[u8], placed: Option<&Placed>) -> bool;
    /// What happened at this side since it was asked last.
    fn poll(&mut self, side: usize) -> Vec<Told>;
    /// The connection breaks.
    fn lose(&mut self);
    /// A new session over the same memory.
    fn renew(&mut self);
}

pub type Make<L> = fn() -> L;

fn placed(content: u64, count: u64, target: u32) -> Placed {
    Placed { contents: (content..content + count).collect(), target }
}

/// Polls one side until it was told so many things.
fn told<L: Lane>(lane: &mut L, side: usize, count: usize) -> Vec<Told> {
    let end = Instant::now() + LIMIT;
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(lane.poll(side));
        // The other side has to move too, and may have nothing to tell.
        assert!(Instant::now() < end, "{all:?} and no more");
    }
    all
}

fn message(number: u64) -> Told {
    Told::Message { bytes: number.to_le_bytes().to_vec(), placed: vec![] }
}

pub fn messages_come_in_order_and_once<L: Lane>(make: Make<L>) {
    let mut lane = make();
    let mut random = Random::new(1);
    let (mut sent, mut received, mut answered) = (0u64, Vec::new(), 0);
    let end = Instant::now() + LIMIT;
    while received.len() < 1000 {
        if sent < 1000 && random.chance(60) && lane.post(0, sent, &sent.to_le_bytes(), None) {
            sent += 1;
        }
        if random.chance(30) {
            received.extend(lane.poll(1));
        }
        answered += lane.poll(0).len();
        assert!(Instant::now() < end, "messages stay away");
    }
    assert!(received.into_iter().eq((0..1000).map(message)));
    assert_eq!(answered, 1000);
    assert_eq!(lane.poll(1), []);
}

pub fn bytes_are_placed_before_their_message<L: Lane>(make: Make<L>) {
    let mut lane = make();
    let mut random = Random::new(2);
    for round in 0..50 {
        let mut expected = Vec::new();
        let mut target = 0;
        while target < LENT_BLOCKS {
            let count = random.between(1, u64::from(LENT_BLOCKS - target).min(7));
            let content = 1_000_000 * (round + 1) + u64::from(target);
            let blocks = placed(content, count, target);
            assert!(lane.post(0, content, b"data", Some(&blocks)));
            expected.push(Told::Message { bytes: b"data".to_vec(), placed: blocks.contents });
            target += count as u32;
        }
        assert_eq!(told_both(&mut lane, expected.len()), expected);
    }
}

/// What side 1 is told, while side 0 is polled too.
fn told_both<L: Lane>(lane: &mut L, count: usize) -> Vec<Told> {
    let end = Instant::now() + LIMIT;
    let (mut all, mut answers) = (Vec::new(), 0);
    while all.len() < count || answers < count {
        answers += lane.poll(0).len();
        all.extend(lane.poll(1));
        assert!(Instant::now() < end, "{} and {answers} of {count}", all.len());
    }
    all
}

pub fn posts_are_answered_once_and_in_order<L: Lane>(make: Make<L>) {
    let mut lane = make();
    for token in 0..20 {
        let blocks = placed(token, 1, token as u32);
        assert!(lane.post(0, token, b"x", (token % 3 > 0).then_some(&blocks)));
        assert!(lane.post(1, 100 + token, b"y", None));
    }
    let (mut near, mut far) = (Vec::new(), Vec::new());
    let end = Instant::now() + LIMIT;
    while near.len() < 40 || far.len() < 40 {
        near.extend(lane.poll(0));
        far.extend(lane.poll(1));
        assert!(Instant::now() < end, "{} and {} of 40", near.len(), far.len());
    }
    let posted = |told: &[Told]| {
        let token = |told: &Told| if let Told::Posted(token) = told { Some(*token) } else { None };
        told.iter().filter_map(token).collect::<Vec<_>>()
    };
    assert_eq!(posted(&near), (0..20).collect::<Vec<_>>());
    assert_eq!(posted(&far), (100..120).collect::<Vec<_>>());
}

pub fn a_full_lane_takes_more_later<L: Lane>(make: Make<L>) {
    let mut lane = make();
    let mut posted = 0u64;
    while lane.post(0, posted, &posted.to_le_bytes(), None) {
        posted += 1;
        assert!(posted < 100_000, "a lane without a bound");
    }
    let (mut received, mut refused) = (Vec::new(), true);
    let end = Instant::now() + LIMIT;
    while received.len() as u64 <= posted {
        if refused && lane.post(0, posted, &posted.to_le_bytes(), None) {
            refused = false;
        }
        let _answers = lane.poll(0);
        received.extend(lane.poll(1));
        assert!(Instant::now() < end, "{} of {posted}", received.len());
    }
    assert!(received.into_iter().eq((0..=posted).map(message)));
}

pub fn nothing_comes_after_the_loss<L: Lane>(make: Make<L>) {
    let mut lane = make();
    for number in 0..10 {
        assert!(lane.post(0, number, &number.to_le_bytes(), Some(&placed(7, 2, 3))));
    }
    let _answers = told(&mut lane, 0, 10);
    lane.lose();
    let end = Instant::now() + LIMIT;
    let mut all = Vec::new();
    while all.last() != Some(&Told::Lost) {
        all.extend(lane.poll(1));
        assert!(Instant::now() < end, "no word of the loss");
    }
    let whole = Told::Message { bytes: 0u64.to_le_bytes().to_vec(), placed: vec![7, 8] };
    // What came before the loss is a part from the start, each message with its bytes.
    assert!(all.first().is_none_or(|first| *first == whole || *first == Told::Lost), "{all:?}");
    for (number, told) in all[..all.len() - 1].iter().enumerate() {
        let bytes = (number as u64).to_le_bytes().to_vec();
        assert_eq!(*told, Told::Message { bytes, placed: vec![7, 8] });
    }
    for _ in 0..10 {
        assert_eq!(lane.poll(1), [], "something after the loss");
    }
}

pub fn posts_are_over_at_the_loss<L: Lane>(make: Make<L>) {
    let mut lane = make();
    for number in 0..20 {
        assert!(lane.post(0, number, b"x", Some(&placed(number, 4, 0))));
    }
    lane.lose();
    let end = Instant::now() + LIMIT;
    let mut all = Vec::new();
    while all.last() != Some(&Told::Lost) {
        all.extend(lane.poll(0));
        assert!(Instant::now() < end, "no word of the loss");
    }
    let expected = (0..all.len() as u64 - 1).map(Told::Posted).collect::<Vec<_>>();
    assert_eq!(all[..all.len() - 1], expected, "answers are in order, then the loss");
    for _ in 0..10 {
        assert_eq!(lane.poll(0), [], "an answer after the loss");
    }
}

pub fn a_late_message_never_enters_a_new_session<L: Lane>(make: Make<L>) {
    for round in 0..20 {
        let mut lane = make();
        for number in 0..round {
            assert!(lane.post(0, number, b"old", Some(&placed(1, 1, 0))));
        }
        if round % 2 == 0 {
            let _some = lane.poll(0);
        }
        lane.lose();
        lane.renew();
        assert!(lane.post(0, 500, b"new", Some(&placed(2, 1, 0))));
        let expected = Told::Message { bytes: b"new".to_vec(), placed: vec![2] };
        assert_eq!(told_both(&mut lane, 1), [expected]);
    }
}
