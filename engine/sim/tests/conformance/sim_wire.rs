//! The simulated wire as a [`Lane`]: the connections that the world uses, with times by chance. Beside the lane that is
//! looked at there are another one and a control wire, with messages of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use twinpoint_core::contract::IoToken;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, ShardId};

use crate::buffers::Buffers;
use crate::connections::{Connections, Processes};
use crate::event::{Outcome, Post, Told as WireTold, WireEvent};
use crate::lane::{LENT_BLOCKS, Lane, Placed, Told};
use crate::random::Random;
use crate::sim_device::{block, content};

/// Blocks to send from.
const SOURCE_BLOCKS: u32 = 256;
const LANES: u16 = 2;
/// The lane that the bodies see.
const SHARD: ShardId = ShardId(1);
/// The one beside it.
const OTHER: ShardId = ShardId(0);
/// Of posts on the lane beside; those of the bodies are lower.
const OTHER_TOKENS: u64 = 1 << 40;
const DELAY_NS: u64 = 10_000;

pub struct SimWire {
    wire: Connections,
    memory: Memory,
    /// Counts each side's processes.
    lives: [u64; 2],
    session: u64,
    now: u64,
    order: u64,
    queue: BTreeMap<(u64, u64), (u64, Happening)>,
    told: [Vec<Told>; 2],
    /// The buffers of the posts under way.
    sources: [BTreeMap<u64, Vec<BufferId>>; 2],
    /// The next block to send from.
    next: u32,
    /// Messages that each side posted in this session, and those of it that arrived.
    posted: [u64; 2],
    arrived: [u64; 2],
    /// Which side's message arrives broken: the one with this number.
    spoiled: Option<(usize, u64)>,
    random: Random,
}

struct Memory {
    buffers: [Buffers; 2],
    posts: [BTreeSet<(u16, IoToken)>; 2],
}

enum Happening {
    /// A side begins and opens a lane, as its coordinator and its shards do.
    Begin(usize),
    Open(usize, ShardId),
    Wire(WireEvent),
    /// The coordinator of a side has heard of the loss.
    End(usize),
}

pub fn make() -> SimWire {
    let buffers =
        || Buffers::new(SOURCE_BLOCKS as usize, 1, usize::from(LANES) * LENT_BLOCKS as usize);
    let memory = Memory { buffers: [buffers(), buffers()], posts: Default::default() };
    let mut made = SimWire {
        wire: Connections::new(LANES, LENT_BLOCKS),
        memory,
        lives: [0; 2],
        session: 0,
        now: 0,
        order: 0,
        queue: BTreeMap::new(),
        told: Default::default(),
        sources: Default::default(),
        next: 0,
        posted: [0; 2],
        arrived: [0; 2],
        spoiled: None,
        random: Random::new(77),
    };
    made.connect();
    made
}

impl Processes for Memory {
    fn buffers(&mut self, node: usize) -> &mut Buffers {
        &mut self.buffers[node]
    }

    fn posts(&mut self, node: usize) -> &mut BTreeSet<(u16, IoToken)> {
        &mut self.posts[node]
    }
}

impl SimWire {
    fn connect(&mut self) {
        self.session = self.wire.connect(self.lives);
        (self.posted, self.arrived, self.spoiled) = ([0; 2], [0; 2], None);
        for node in 0..2 {
            self.soon(DELAY_NS, self.session, Happening::Begin(node));
        }
    }

    fn soon(&mut self, delay_ns: u64, id: u64, what: Happening) {
        let time = self.now + self.random.delay_ns(delay_ns);
        self.at(time, id, what);
    }

    fn at(&mut self, time: u64, id: u64, what: Happening) {
        self.order += 1;
        self.queue.insert((time.max(self.now), self.order), (id, what));
    }

    /// The next thing happens. False if nothing is left.
    fn step(&mut self) -> bool {
        let Some(((time, _), (id, what))) = self.queue.pop_first() else { return false };
        self.now = time;
        match what {
            Happening::Begin(node) => self.begin(id, node),
            Happening::Open(node, shard) => self.open(id, node, shard),
            Happening::End(node) => self.wire.end(id, node),
            Happening::Wire(event) => self.wire_event(id, event),
        }
        true
    }

    fn begin(&mut self, id: u64, node: usize) {
        if !self.wire.begin(id, node) {
            return;
        }
        while let Some(told) = self.wire.next_control(id, node) {
            self.tell(id, node, told);
        }
        for shard in [SHARD, OTHER] {
            self.soon(DELAY_NS, id, Happening::Open(node, shard));
        }
    }

    fn open(&mut self, id: u64, node: usize, shard: ShardId) {
        self.wire.open_lane(id, node, shard);
        while let Some(told) = self.wire.next_on_lane(&mut self.memory, id, node, shard) {
            self.tell(id, node, told);
        }
    }

    fn wire_event(&mut self, id: u64, event: WireEvent) {
        let outcomes = if self.is_spoiled(id, &event) {
            let reason = "a frame does not match".to_owned();
            self.wire.break_up(&mut self.memory, id, event.receiver(), reason)
        } else {
            let time = self.now + self.random.delay_ns(DELAY_NS);
            self.wire.happen(&mut self.memory, id, time, event)
        };
        self.carry_out(id, outcomes);
    }

    fn is_spoiled(&mut self, id: u64, event: &WireEvent) -> bool {
        let WireEvent::Lane { to, shard: SHARD, .. } = event else { return false };
        if id != self.session {
            return false;
        }
        let from = 1 - to;
        self.arrived[from] += 1;
        self.spoiled == Some((from, self.arrived[from] - 1))
    }

    fn carry_out(&mut self, id: u64, outcomes: impl IntoIterator<Item = Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::At(time, event) => self.at(time, id, Happening::Wire(event)),
                Outcome::Soon(delay_ns, event) => self.soon(delay_ns, id, Happening::Wire(event)),
                Outcome::Told(node, told) => self.tell(id, node, told),
            }
        }
    }

    fn tell(&mut self, id: u64, node: usize, told: WireTold) {
        assert_eq!(id, self.session, "something of a connection that is over");
        match told {
            WireTold::Posted(OTHER, io) => self.free(node, io.0),
            WireTold::Posted(shard, io) => {
                assert_eq!(shard, SHARD);
                self.free(node, io.0);
                self.told[node].push(Told::Posted(io.0));
            }
            WireTold::Lane { shard: OTHER, message, .. } => assert_eq!(message, b"beside"),
            WireTold::Lane { shard, message: bytes, placed } => {
                assert_eq!(shard, SHARD);
                let (first, count) = placed.unwrap_or_default();
                let placed = (first.0..first.0 + count).map(|buffer| self.content(node, buffer));
                self.told[node].push(Told::Message { bytes, placed: placed.collect() });
            }
            WireTold::Control(message) => assert_eq!(message, b"control"),
            WireTold::Down(_) => {
                assert!(self.memory.posts[node].is_empty(), "posts are answered before the loss");
                self.told[node].push(Told::Lost);
                self.soon(DELAY_NS, id, Happening::End(node));
            }
        }
    }

    /// The buffers of a post are the sender's again, who does with them what it likes.
    fn free(&mut self, node: usize, token: u64) {
        for buffer in self.sources[node].remove(&token).expect("a post is answered once") {
            self.memory.buffers[node].set(buffer, Rc::new([0xdd; BLOCK_BYTES]));
        }
    }

    fn content(&self, node: usize, buffer: u32) -> u64 {
        content(&self.memory.buffers[node].get(BufferId(buffer))[..])
    }

    fn post_on(
        &mut self,
        shard: ShardId,
        from: usize,
        token: u64,
        message: &[u8],
        placed: Option<&Placed>,
    ) -> bool {
        let mut sources = Vec::new();
        for content in placed.iter().flat_map(|placed| &placed.contents) {
            // Far more blocks than the bodies have under way at a time.
            let buffer = BufferId(self.next * 37 % SOURCE_BLOCKS);
            self.next += 1;
            self.memory.buffers[from].set(buffer, block(*content));
            sources.push(buffer);
        }
        let placement = placed.map(|placed| (sources.clone(), placed.target));
        let post = Post { shard, io: IoToken(token), message: message.to_vec(), placement };
        let time = self.now + self.random.delay_ns(DELAY_NS / 4);
        let Some(id) = self.wire.side_of(from, self.lives[from]) else { return false };
        let outcome = self.wire.post(&mut self.memory, (id, from), time, post);
        let is_taken = outcome.is_some();
        assert_eq!(is_taken, self.wire.hears(id, from), "a side posts until it hears of the loss");
        if is_taken {
            self.sources[from].insert(token, sources);
        }
        self.carry_out(id, outcome);
        is_taken
    }

    /// Something beside the lane that is looked at.
    fn post_beside(&mut self, from: usize) {
        self.order += 1;
        let contents = vec![9_999_999; 3];
        let target = self.random.below(u64::from(LENT_BLOCKS) - 3) as u32;
        let placed = Placed { contents, target };
        self.post_on(OTHER, from, OTHER_TOKENS + self.order, b"beside", Some(&placed));
        let time = self.now + self.random.delay_ns(DELAY_NS);
        let outcome = self.wire.post_control(self.session, from, time, b"control".to_vec());
        self.carry_out(self.session, outcome);
    }
}

impl Lane for SimWire {
    fn post(&mut self, from: usize, token: u64, message: &[u8], placed: Option<&Placed>) -> bool {
        // A shard posts only after its side has begun.
        self.begin(self.session, from);
        if self.random.chance(10) {
            self.post_beside(from);
        }
        let is_taken = self.post_on(SHARD, from, token, message, placed);
        self.posted[from] += u64::from(is_taken);
        is_taken
    }

    fn poll(&mut self, side: usize) -> Vec<Told> {
        for _ in 0..self.random.below(5) {
            self.step();
        }
        std::mem::take(&mut self.told[side])
    }

    fn lent(&self, side: usize) -> Vec<u64> {
        let first = self.memory.buffers[side].lent(usize::from(SHARD.0), LENT_BLOCKS).0;
        (first..first + LENT_BLOCKS).map(|buffer| self.content(side, buffer)).collect()
    }

    fn leave(&mut self, side: usize) {
        let reason = "the body says so".to_owned();
        self.wire_event(self.session, WireEvent::Close { node: side, reason });
    }

    fn lose(&mut self) {
        let first = self.random.below(2) as usize;
        self.leave(first);
    }

    fn spoil(&mut self, from: usize) {
        self.spoiled = Some((from, self.posted[from]));
    }

    fn renew(&mut self) {
        if self.random.chance(50) {
            // Both processes die: posts are over with them.
            for node in 0..2 {
                let outcomes = self.wire.drop_sides(node, true);
                outcomes.into_iter().for_each(|(id, outcome)| self.carry_out(id, [outcome]));
                self.lives[node] += 1;
                self.memory.posts[node].clear();
                self.sources[node].clear();
            }
        }
        while (0..2).any(|node| self.wire.side_of(node, self.lives[node]).is_some()) {
            assert!(self.step(), "a lost connection ends at both sides");
        }
        self.told = Default::default();
        self.connect();
    }
}
