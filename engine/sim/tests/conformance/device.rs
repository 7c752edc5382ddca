//! What the core relies on of a device, as bodies over any device.
//!
//! Rules: a read that begins after a write was answered sees it; of one block the write that was answered last counts;
//! answered writes outlive the process, flushed ones the power; a write under way at a crash is, block by block, old
//! or new. Never asked, as in the engine: two operations on one block at a time of which one writes.

use std::collections::BTreeMap;

use crate::random::Random;

/// Blocks of every device here.
pub const BLOCKS: u64 = 256;

/// A block's contents, told apart by a number; 0 is a block of zeroes.
pub type Content = u64;

/// One operation's end.
#[derive(Debug)]
pub struct Ended {
    /// As it was given.
    pub token: u64,
    /// Of a read.
    pub contents: Vec<Content>,
}

/// A device with operations under way.
pub trait Device {
    /// Begins to write consecutive blocks.
    fn write(&mut self, token: u64, first: u64, contents: &[Content]);
    /// Begins to read consecutive blocks.
    fn read(&mut self, token: u64, first: u64, count: u64);
    /// Begins to make durable what was answered before.
    fn flush(&mut self, token: u64);
    /// Waits for any operation under way.
    fn wait(&mut self) -> Ended;
    /// The process dies now, with what is under way, and another one opens the device.
    fn kill(&mut self);
    /// The power fails now. False: this device has a power that cannot fail, and nothing happened.
    fn cut_power(&mut self) -> bool;
}

/// Makes a device of zeroes; the seed decides what is left to chance.
pub type Make<D> = fn(u64) -> D;

impl<D: Device + ?Sized> Helpers for D {}

trait Helpers: Device {
    fn write_now(&mut self, first: u64, contents: &[Content]) {
        self.write(1, first, contents);
        assert_eq!(self.wait().token, 1);
    }

    fn read_now(&mut self, first: u64, count: u64) -> Vec<Content> {
        self.read(2, first, count);
        let ended = self.wait();
        assert_eq!((ended.token, ended.contents.len() as u64), (2, count));
        ended.contents
    }

    fn flush_now(&mut self) {
        self.flush(3);
        assert_eq!(self.wait().token, 3);
    }
}

pub fn reads_see_answered_writes<D: Device>(make: Make<D>) {
    let mut device = make(1);
    for (first, content) in [(0, 5), (BLOCKS - 1, 6), (77, 7)] {
        device.write_now(first, &[content]);
        assert_eq!(device.read_now(first, 1), [content]);
    }
    device.flush_now();
    assert_eq!(device.read_now(77, 1), [7], "a flush changes nothing");
}

pub fn the_last_answered_write_wins<D: Device>(make: Make<D>) {
    let mut device = make(2);
    for content in 1..=20 {
        device.write_now(9, &[content, content + 100]);
        device.write_now(10, &[content + 200]);
        assert_eq!(device.read_now(8, 4), [0, content, content + 200, 0]);
        if content % 5 == 0 {
            device.flush_now();
        }
    }
}

pub fn buffers_land_in_order<D: Device>(make: Make<D>) {
    let mut device = make(3);
    let contents = (1..=64).map(|number| number * 3).collect::<Vec<_>>();
    device.write_now(100, &contents);
    assert_eq!(device.read_now(100, 64), contents);
    assert_eq!(device.read_now(131, 2), contents[31..33]);
}

pub fn other_blocks_stay<D: Device>(make: Make<D>) {
    let mut device = make(4);
    device.write_now(0, &[7; 32]);
    for index in 0..8 {
        device.write(index, index * 2, &[100 + index]);
    }
    for index in 0..8 {
        device.read(10 + index, index * 2 + 1, 1);
    }
    for _ in 0..16 {
        let ended = device.wait();
        assert!(ended.contents.iter().all(|content| *content == 7), "{ended:?}");
    }
    let expected = (0..16).map(|block| if block % 2 == 0 { 100 + block / 2 } else { 7 });
    assert_eq!(device.read_now(0, 16), expected.collect::<Vec<_>>());
}

pub fn a_block_never_written_reads_as_zeroes<D: Device>(make: Make<D>) {
    let mut device = make(5);
    device.write_now(20, &[1]);
    assert_eq!(device.read_now(18, 5), [0, 0, 1, 0, 0]);
}

pub fn answered_writes_outlive_the_process<D: Device>(make: Make<D>) {
    let mut device = make(6);
    for round in 1..=10 {
        device.write_now(round, &[round * 10, round * 10 + 1]);
        device.kill();
        assert_eq!(device.read_now(round, 2), [round * 10, round * 10 + 1]);
    }
}

pub fn writes_under_way_at_a_kill_are_old_or_new<D: Device>(make: Make<D>) {
    for seed in 0..10 {
        let mut device = make(seed);
        device.write_now(0, &[1; 64]);
        for index in 0..8 {
            device.write(index, index * 8, &[2; 8]);
        }
        device.kill();
        let found = device.read_now(0, 64);
        assert!(found.iter().all(|content| [1, 2].contains(content)), "{found:?}");
        // What was found once stays so: nothing of the dead process comes later.
        assert_eq!(device.read_now(0, 64), found);
    }
}

pub fn a_flush_keeps_what_was_answered_before_it<D: Device>(make: Make<D>) {
    for seed in 0..40 {
        let mut device = make(seed);
        device.write_now(0, &[1; 4]);
        device.write(7, 10, &[5]);
        device.flush(8);
        // The flush promises nothing about the write beside it, and all about the one before.
        let ended = [device.wait().token, device.wait().token];
        assert!(ended.contains(&7) && ended.contains(&8));
        device.write_now(0, &[2, 2]);
        if !device.cut_power() {
            device.kill();
        }
        let found = device.read_now(0, 4);
        assert!(found[..2].iter().all(|content| [1, 2, TORN].contains(content)), "{found:?}");
        assert_eq!(found[2..], [1, 1], "flushed, and never written again");
        assert!([0, 5, TORN].contains(&device.read_now(10, 1)[0]));
    }
}

/// What a block is called that mixes two contents.
pub const TORN: Content = u64::MAX;

/// What the model knows of one block.
#[derive(Clone, Default)]
struct Known {
    /// Contents that a read may give, in the order of their answers; the last one, if nothing crashes.
    answered: Vec<Content>,
    /// How many of them, at the front, are superseded by a flush that ended.
    flushed: usize,
}

impl Known {
    fn newest(&self) -> Content {
        self.answered.last().copied().unwrap_or(0)
    }

    /// What a power cut may leave, beside a mixture of two.
    fn remains(&self) -> Vec<Content> {
        let mut remains = self.answered[self.flushed.saturating_sub(1)..].to_vec();
        if self.flushed == 0 {
            remains.push(0);
        }
        remains
    }
}

/// What is under way.
enum Operation {
    Write { first: u64, contents: Vec<Content> },
    Read { first: u64, expected: Vec<Content> },
    Flush { marks: Vec<usize> },
}

struct History<D> {
    device: D,
    random: Random,
    blocks: Vec<Known>,
    under_way: BTreeMap<u64, Operation>,
    next: u64,
}

pub fn histories_follow_a_model<D: Device>(make: Make<D>) {
    for seed in 0..12 {
        let blocks = vec![Known::default(); BLOCKS as usize];
        let random = Random::new(seed);
        let mut history =
            History { device: make(seed), random, blocks, under_way: BTreeMap::new(), next: 100 };
        for _ in 0..5 {
            history.play(60);
            history.crash();
        }
    }
}

impl<D: Device> History<D> {
    fn play(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.under_way.len() > 12 || !self.under_way.is_empty() && self.random.chance(45) {
                self.end_one();
            } else {
                self.begin_one();
            }
        }
    }

    fn begin_one(&mut self) {
        self.next += 1;
        let token = self.next;
        let (first, count) = (self.random.below(BLOCKS - 8), self.random.between(1, 8));
        let range = first as usize..(first + count) as usize;
        let operation = match self.random.below(10) {
            0 => {
                self.device.flush(token);
                Operation::Flush { marks: self.blocks.iter().map(|it| it.answered.len()).collect() }
            }
            1..=3 if !self.clashes(first, count, false) => {
                self.device.read(token, first, count);
                let expected = self.blocks[range].iter().map(Known::newest).collect();
                Operation::Read { first, expected }
            }
            4.. if !self.clashes(first, count, true) => {
                let contents = (0..count).map(|index| token * 16 + index).collect::<Vec<_>>();
                self.device.write(token, first, &contents);
                Operation::Write { first, contents }
            }
            _ => return,
        };
        self.under_way.insert(token, operation);
    }

    /// Whether an operation under way forbids another one on these blocks.
    fn clashes(&self, first: u64, count: u64, writes: bool) -> bool {
        self.under_way.values().any(|operation| {
            let (start, length, is_write) = match operation {
                Operation::Write { first, contents } => (*first, contents.len() as u64, true),
                Operation::Read { first, expected } => (*first, expected.len() as u64, false),
                Operation::Flush { .. } => return false,
            };
            (writes || is_write) && first < start + length && start < first + count
        })
    }

    fn end_one(&mut self) {
        let Ended { token, contents: found } = self.device.wait();
        match self.under_way.remove(&token).expect("an operation ends once") {
            Operation::Write { first, contents } => {
                for (block, content) in (first..).zip(contents) {
                    self.blocks[block as usize].answered.push(content);
                }
            }
            Operation::Read { expected, first } => {
                assert_eq!(found, expected, "a read of {first}");
            }
            Operation::Flush { marks } => {
                for (block, mark) in self.blocks.iter_mut().zip(marks) {
                    block.flushed = block.flushed.max(mark);
                }
            }
        }
    }

    /// A kill or a power cut; then every block is what it may be, and the model goes on from there.
    fn crash(&mut self) {
        let power = self.random.chance(50) && self.device.cut_power();
        if !power {
            self.device.kill();
        }
        let mut allowed = self
            .blocks
            .iter()
            .map(|known| if power { known.remains() } else { vec![known.newest()] })
            .collect::<Vec<_>>();
        for operation in std::mem::take(&mut self.under_way).into_values() {
            if let Operation::Write { first, contents } = operation {
                for (block, content) in (first..).zip(contents) {
                    allowed[block as usize].push(content);
                }
            }
        }
        let found = (0..4).flat_map(|part| self.device.read_now(part * 64, 64)).collect::<Vec<_>>();
        for (block, (found, allowed)) in found.iter().zip(&allowed).enumerate() {
            let torn = power && *found == TORN && allowed.len() > 1;
            assert!(torn || allowed.contains(found), "block {block}: {found}, allowed {allowed:?}");
        }
        // A new start: torn blocks are written anew, and all of it is durable.
        for (block, found) in found.iter().enumerate() {
            let mut content = *found;
            if content == TORN {
                content = 1;
                self.device.write_now(block as u64, &[content]);
            }
            self.blocks[block] = Known { answered: vec![content], flushed: 1 };
        }
        self.device.flush_now();
    }
}
