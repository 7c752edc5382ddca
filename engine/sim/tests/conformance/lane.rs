//! What the core relies on of a lane's wire, as bodies over any wire.
//!
//! Rules: messages come whole, once, in the order of their posts; a message's bytes lie in the lent memory before it
//! comes, and nowhere else; the buffers of a post are the sender's again at its answer, in order, or at the loss; the
//! loss comes once and last, at each side; a broken message ends the lane; nothing of a lost session is seen in the next
//! one. How long anything takes is open, and so is whether a lane is ever full: that body is for real wires only.

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
    /// Posts; false if the lane is full now, or over.
    fn post(&mut self, from: usize, token: u64, message: &[u8], placed: Option<&Placed>) -> bool;
    /// What happened at this side since it was asked last.
    fn poll(&mut self, side: usize) -> Vec<Told>;
    /// What lies in all lent blocks of a side.
    fn lent(&self, side: usize) -> Vec<u64>;
    /// A side ends the lane; the other one will learn of it.
    fn leave(&mut self, side: usize);
    /// What this side sends next arrives broken.
    fn spoil(&mut self, from: usize);
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

/// What both sides are told, so many things each.
fn told_each<L: Lane>(lane: &mut L, count: usize) -> [Vec<Told>; 2] {
    let end = Instant::now() + LIMIT;
    let mut all = [Vec::new(), Vec::new()];
    while all.iter().any(|told| told.len() < count) {
        for (side, all) in all.iter_mut().enumerate() {
            all.extend(lane.poll(side));
        }
        assert!(Instant::now() < end, "{} and {} of {count}", all[0].len(), all[1].len());
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
    let [near, far] = told_each(&mut lane, 40);
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

/// Polls both sides until both have heard of the loss, and some more: what each was told before it.
fn told_until_lost<L: Lane>(lane: &mut L) -> [Vec<Told>; 2] {
    let end = Instant::now() + LIMIT;
    let mut all = [Vec::new(), Vec::new()];
    let mut polls_left = 50;
    while polls_left > 0 {
        for (side, all) in all.iter_mut().enumerate() {
            all.extend(lane.poll(side));
        }
        if all.iter().all(|told| told.contains(&Told::Lost)) {
            polls_left -= 1;
        }
        assert!(Instant::now() < end, "no word of the loss: {all:?}");
    }
    for told in &mut all {
        assert_eq!(told.pop(), Some(Told::Lost), "something after the loss");
        assert!(!told.contains(&Told::Lost), "lost twice");
    }
    all
}

pub fn nothing_comes_after_the_loss<L: Lane>(make: Make<L>) {
    for round in 0..20 {
        let mut lane = make();
        for number in 0..10 {
            assert!(lane.post(0, number, &number.to_le_bytes(), Some(&placed(7, 2, 3))));
        }
        let _answers = told(&mut lane, 0, 10);
        let mut all = Vec::new();
        for _ in 0..round {
            all.extend(lane.poll(1));
        }
        lane.lose();
        all.append(&mut told_until_lost(&mut lane)[1]);
        // What came before the loss is a part from the start, each message with its bytes.
        let whole = |number: u64| Told::Message {
            bytes: number.to_le_bytes().to_vec(),
            placed: vec![7, 8],
        };
        let expected = (0..all.len() as u64).map(whole).collect::<Vec<_>>();
        assert_eq!(all, expected);
    }
}

pub fn posts_are_over_at_the_loss<L: Lane>(make: Make<L>) {
    for round in 0..20 {
        let mut lane = make();
        for number in 0..20 {
            assert!(lane.post(0, number, b"x", Some(&placed(number, 4, 0))));
        }
        let mut all = Vec::new();
        for _ in 0..round {
            all.extend(lane.poll(0));
        }
        lane.lose();
        all.append(&mut told_until_lost(&mut lane)[0]);
        let expected = (0..all.len() as u64).map(Told::Posted).collect::<Vec<_>>();
        assert_eq!(all, expected, "answers are in order, then the loss");
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

pub fn other_lent_blocks_stay<L: Lane>(make: Make<L>) {
    let mut lane = make();
    let mut random = Random::new(3);
    let mut lent = vec![0; LENT_BLOCKS as usize];
    for round in 1..=30 {
        let (mut target, mut expected) = (random.below(3) as u32, Vec::new());
        while target + 4 < LENT_BLOCKS {
            let count = random.between(1, 4) as u32;
            let blocks = placed(round * 1_000 + u64::from(target), u64::from(count), target);
            lent[target as usize..(target + count) as usize].copy_from_slice(&blocks.contents);
            assert!(lane.post(0, round * 100 + u64::from(target), b"x", Some(&blocks)));
            expected.push(Told::Message { bytes: b"x".to_vec(), placed: blocks.contents });
            target += count + random.below(3) as u32;
        }
        assert_eq!(told_both(&mut lane, expected.len()), expected);
        assert_eq!(lane.lent(1), lent, "in round {round}");
    }
    assert_eq!(lane.lent(0), [0; LENT_BLOCKS as usize], "the sender's memory");
}

pub fn each_side_places_in_the_other_ones_memory<L: Lane>(make: Make<L>) {
    let mut lane = make();
    for number in 0..20 {
        for side in 0..2 {
            let blocks = placed(1 + number * 10 + side * 5, 1, number as u32);
            assert!(lane.post(side as usize, number, &number.to_le_bytes(), Some(&blocks)));
        }
    }
    for (side, mut told) in (0u64..).zip(told_each(&mut lane, 40)) {
        told.retain(|told| matches!(told, Told::Message { .. }));
        let message = |number: u64| Told::Message {
            bytes: number.to_le_bytes().to_vec(),
            placed: vec![1 + number * 10 + (1 - side) * 5],
        };
        assert_eq!(told, (0..20).map(message).collect::<Vec<_>>());
    }
}

pub fn the_loss_is_told_once_at_each_side<L: Lane>(make: Make<L>) {
    for round in 0..20 {
        let mut lane = make();
        for number in 0..round {
            assert!(lane.post(0, number, b"x", Some(&placed(number, 2, 0))));
            assert!(lane.post(1, number, b"y", None));
        }
        if round % 3 == 0 {
            lane.leave(1);
        }
        lane.lose();
        told_until_lost(&mut lane);
    }
}

pub fn posts_for_a_peer_that_left_are_answered_in_order<L: Lane>(make: Make<L>) {
    let mut random = Random::new(4);
    for _ in 0..30 {
        let mut lane = make();
        let mut posted = (0..random.below(8)).collect::<Vec<_>>();
        for token in &posted {
            assert!(lane.post(0, *token, b"x", Some(&placed(*token, 2, 0))));
        }
        let mut told = if random.chance(50) { lane.poll(0) } else { Vec::new() };
        lane.leave(1);
        for token in 100..100 + random.below(8) {
            // A side that does not know yet posts on.
            if lane.post(0, token, b"y", Some(&placed(token, 2, 4))) {
                posted.push(token);
            }
        }
        told.append(&mut told_until_lost(&mut lane)[0]);
        let answers = told.len();
        let expected = posted.into_iter().take(answers).map(Told::Posted).collect::<Vec<_>>();
        assert_eq!(told, expected);
    }
}

pub fn a_broken_message_ends_the_lane<L: Lane>(make: Make<L>) {
    for sent in 0..10 {
        let mut lane = make();
        // Both sides have begun when what they were first sent has come.
        assert!(lane.post(0, 100, b"first", None) && lane.post(1, 100, b"first", None));
        let _first = told_each(&mut lane, 2);
        for number in 0..sent {
            let blocks = placed(number, 2, number as u32 * 3);
            assert!(lane.post(0, number, &number.to_le_bytes(), Some(&blocks)));
        }
        let _answers = told(&mut lane, 0, sent as usize);
        lane.spoil(0);
        for number in sent..sent + 5 {
            let _taken = lane.post(0, number, &number.to_le_bytes(), None);
        }
        let whole = |number: u64| Told::Message {
            bytes: number.to_le_bytes().to_vec(),
            placed: placed(number, 2, 0).contents,
        };
        // What was whole before it may come late, and nothing that was sent behind it comes.
        let [_, told] = told_until_lost(&mut lane);
        assert_eq!(told, (0..sent).map(whole).collect::<Vec<_>>());
    }
}
