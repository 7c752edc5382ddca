//! The simulated wire: connections with two ends, each with lanes and a control wire as ordered queues, which break together.
//!
//! It has no clock, no chance and no processes. Whoever drives it gives the times, plays the events that it wants, and
//! tells the two sides what it says: the world does in a history, the conformance tests do beside real wires.
//!
//! Invariants: placed bytes are in the peer's lent memory before their message is told; what a lane carries is told in the
//! order of its posts; a message comes after its lane was opened; at the loss a side's posts are answered first, then its
//! lanes are gone, and nothing of the connection is told to it again; an event of one connection changes no other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use twinpoint_core::contract::IoToken;
use twinpoint_core::units::{BufferId, ShardId};

use super::event::{Outcome, Post, Told, WireEvent};
use crate::buffers::Buffers;
use crate::content::Block;

/// How long the other side takes to notice that a connection was ended, about.
const NOTICE_NS: u64 = 300_000;
/// How long it takes to notice that a process died, about.
const DEATH_NOTICE_NS: u64 = 500_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Connections {
    all: BTreeMap<u64, Connection>,
    next: u64,
    /// Of every connection.
    lanes: usize,
    /// Blocks that each side lends on each lane.
    lent_blocks: u32,
}

/// One connection of the pair.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Bytes no longer go through.
    is_broken: bool,
    /// Nothing that this side sends arrives any more, and nobody is told.
    pub is_silent: [bool; 2],
    /// A placed block was changed on its way.
    pub is_corrupted: bool,
    sides: [Side; 2],
    /// When the last item of each queue arrives: the sender, its lane or the control wire, on the way out or across.
    arrivals: BTreeMap<(usize, Option<ShardId>, bool), u64>,
}

#[derive(Debug)]
struct Side {
    /// Which life of the process it belongs to.
    life: u64,
    state: SideState,
    open_lanes: Vec<bool>,
    held_lane: Vec<VecDeque<Arrived>>,
    held_control: VecDeque<Vec<u8>>,
}

/// A lane's message and, if it has any, the placed bytes and the lent block they go to.
type Arrived = (Vec<u8>, Option<(u32, Vec<Block>)>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SideState {
    Coming,
    Up,
    /// Lanes are down; the coordinator does not know yet.
    Down,
    Gone,
}

/// What the processes of the two sides have that the wire works on.
pub(crate) trait Processes {
    /// The memory of a side whose process lives.
    fn buffers(&mut self, node: usize) -> &mut Buffers;
    /// Its posts that were not answered, by shard.
    fn posts(&mut self, node: usize) -> &mut BTreeSet<(u16, IoToken)>;
}

/// Connections, and one side's way through its session.
impl Connections {
    pub fn new(lanes: u16, lent_blocks: u32) -> Connections {
        Connections { all: BTreeMap::new(), next: 0, lanes: usize::from(lanes), lent_blocks }
    }

    /// Connects these lives of the two processes; each side has to begin before it is told anything.
    pub fn connect(&mut self, lives: [u64; 2]) -> u64 {
        let side = |life| Side {
            life,
            state: SideState::Coming,
            open_lanes: vec![false; self.lanes],
            held_lane: (0..self.lanes).map(|_| VecDeque::new()).collect(),
            held_control: VecDeque::new(),
        };
        let connection = Connection {
            is_broken: false,
            is_silent: [false; 2],
            is_corrupted: false,
            sides: lives.map(side),
            arrivals: BTreeMap::new(),
        };
        let id = self.next;
        self.next += 1;
        self.all.insert(id, connection);
        id
    }

    /// A side may be told from now on. False if the connection was lost before.
    pub fn begin(&mut self, id: u64, node: usize) -> bool {
        let Some(side) = self.side(id, node) else { return false };
        let begins = side.state == SideState::Coming;
        if begins {
            side.state = SideState::Up;
        }
        begins
    }

    /// The next coordinator's message that waited for the side to begin.
    pub fn next_control(&mut self, id: u64, node: usize) -> Option<Told> {
        let side = self.side(id, node).filter(|side| side.state == SideState::Up)?;
        side.held_control.pop_front().map(Told::Control)
    }

    /// A shard wants what its lane brings.
    pub fn open_lane(&mut self, id: u64, node: usize, shard: ShardId) {
        if let Some(side) = self.side(id, node) {
            side.open_lanes[usize::from(shard.0)] = true;
        }
    }

    /// The next message that waited for its lane to be open.
    pub fn next_on_lane(
        &mut self,
        processes: &mut impl Processes,
        id: u64,
        node: usize,
        shard: ShardId,
    ) -> Option<Told> {
        let lent_blocks = self.lent_blocks;
        let side = self.side(id, node).filter(|side| side.state == SideState::Up)?;
        let arrived = side.held_lane[usize::from(shard.0)].pop_front()?;
        Some(deliver(processes.buffers(node), lent_blocks, shard, arrived))
    }

    /// The coordinator of a side that was told of the loss knows of it too.
    pub fn end(&mut self, id: u64, node: usize) {
        if let Some(side) = self.side(id, node) {
            side.state = SideState::Gone;
        }
        self.forget(id);
    }

    /// A process died: its sides are gone, and the other ones will notice, unless nobody tells them. Gives what comes of
    /// it, by connection.
    pub fn drop_sides(&mut self, node: usize, is_told: bool) -> Vec<(u64, Outcome)> {
        let mut outcomes = Vec::new();
        for (id, connection) in &mut self.all {
            if connection.sides[node].state != SideState::Gone {
                connection.sides[node].state = SideState::Gone;
                connection.is_broken = true;
                if is_told {
                    let reason = "the peer died".to_owned();
                    let event = WireEvent::Lost { node: 1 - node, reason };
                    outcomes.push((*id, Outcome::Soon(DEATH_NOTICE_NS, event)));
                }
            }
        }
        self.all.retain(|_, connection| !connection.is_over());
        outcomes
    }

    /// The connection of which this life of a node's process is a side.
    pub fn side_of(&self, node: usize, life: u64) -> Option<u64> {
        let lives = |side: &Side| side.state != SideState::Gone && side.life == life;
        self.all.iter().find(|(_, it)| lives(&it.sides[node])).map(|(id, _)| *id)
    }

    /// Whether what arrives now for a side is for somebody.
    pub fn hears(&mut self, id: u64, node: usize) -> bool {
        let hears = |side: &mut Side| matches!(side.state, SideState::Coming | SideState::Up);
        self.side(id, node).is_some_and(hears)
    }

    /// All that there are.
    pub fn keys(&self) -> impl Iterator<Item = &u64> {
        self.all.keys()
    }

    /// All that there are.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.all.values_mut()
    }

    /// One of them.
    pub fn get(&self, id: &u64) -> Option<&Connection> {
        self.all.get(id)
    }

    /// One of them.
    pub fn get_mut(&mut self, id: &u64) -> Option<&mut Connection> {
        self.all.get_mut(id)
    }

    fn side(&mut self, id: u64, node: usize) -> Option<&mut Side> {
        self.all.get_mut(&id).map(|connection| &mut connection.sides[node])
    }

    fn forget(&mut self, id: u64) {
        if self.all.get(&id).is_some_and(Connection::is_over) {
            self.all.remove(&id);
        }
    }
}

/// What goes over a connection.
impl Connections {
    /// A shard posts; the wire takes it at `time` or after what was posted before, though it goes nowhere if the other
    /// side has ended the connection. None if there is no lane to post on.
    pub fn post(
        &mut self,
        processes: &mut impl Processes,
        (id, node): (u64, usize),
        time: u64,
        post: Post,
    ) -> Option<Outcome> {
        let connection = self.all.get_mut(&id)?;
        if connection.sides[node].state != SideState::Up {
            return None;
        }
        let time = connection.arrival((node, Some(post.shard), true), time);
        let buffers = processes.buffers(node);
        let contents = post.buffers().map(|buffer| buffers.get(*buffer).clone()).collect();
        processes.posts(node).insert((post.shard.0, post.io));
        Some(Outcome::At(time, WireEvent::Sent { node, post, contents }))
    }

    /// A coordinator's message goes out; it arrives at `time` or after what was sent before.
    pub fn post_control(
        &mut self,
        id: u64,
        node: usize,
        time: u64,
        message: Vec<u8>,
    ) -> Option<Outcome> {
        let connection = self.all.get_mut(&id).filter(|connection| !connection.is_broken)?;
        let time = connection.arrival((node, None, false), time);
        Some(Outcome::At(time, WireEvent::Control { to: 1 - node, message }))
    }

    /// Something happens on a connection; what it sends arrives at `time` or after what was sent before.
    pub fn happen(
        &mut self,
        processes: &mut impl Processes,
        id: u64,
        time: u64,
        event: WireEvent,
    ) -> Vec<Outcome> {
        match event {
            WireEvent::Sent { node, post, contents } => {
                self.sent(processes, (id, node), time, post, contents)
            }
            WireEvent::Lane { to, shard, message, placed } => {
                let told = self.arrived(processes, (id, to), shard, (message, placed));
                told.map(|told| Outcome::Told(to, told)).into_iter().collect()
            }
            WireEvent::Control { to, message } => {
                let Some(side) = self.side(id, to) else { return Vec::new() };
                match side.state {
                    SideState::Coming => side.held_control.push_back(message),
                    SideState::Up => return vec![Outcome::Told(to, Told::Control(message))],
                    SideState::Down | SideState::Gone => {}
                }
                Vec::new()
            }
            WireEvent::Lost { node, reason } => self.side_down(processes, id, node, reason),
            WireEvent::Close { node, reason } => self.break_up(processes, id, node, reason),
        }
    }

    /// Bytes go through no longer: one side knows at once, the other one will notice.
    pub fn break_up(
        &mut self,
        processes: &mut impl Processes,
        id: u64,
        first: usize,
        reason: String,
    ) -> Vec<Outcome> {
        let Some(connection) = self.all.get_mut(&id) else { return Vec::new() };
        connection.is_broken = true;
        let mut outcomes = self.side_down(processes, id, first, reason);
        let reason = "the peer ended the connection".to_owned();
        outcomes.push(Outcome::Soon(NOTICE_NS, WireEvent::Lost { node: 1 - first, reason }));
        outcomes
    }

    fn sent(
        &mut self,
        processes: &mut impl Processes,
        (id, node): (u64, usize),
        time: u64,
        post: Post,
        contents: Vec<Block>,
    ) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let Some(connection) = self.all.get_mut(&id) else { return outcomes };
        if connection.sides[node].state != SideState::Up {
            return outcomes;
        }
        let time = connection.arrival((node, Some(post.shard), false), time);
        for (buffer, block) in post.buffers().zip(&contents) {
            let is_same = processes.buffers(node).get(*buffer) == block;
            assert!(is_same, "buffer {buffer} changed while it was sent");
        }
        let Post { shard, io, message, placement } = post;
        if !connection.is_broken {
            let placed = placement.map(|(_, target)| (target, contents));
            let event = WireEvent::Lane { to: 1 - node, shard, message, placed };
            outcomes.push(Outcome::At(time, event));
        }
        if processes.posts(node).remove(&(shard.0, io)) {
            outcomes.push(Outcome::Told(node, Told::Posted(shard, io)));
        }
        outcomes
    }

    fn arrived(
        &mut self,
        processes: &mut impl Processes,
        (id, to): (u64, usize),
        shard: ShardId,
        arrived: Arrived,
    ) -> Option<Told> {
        let lent_blocks = self.lent_blocks;
        let index = usize::from(shard.0);
        if let Some((target, contents)) = &arrived.1 {
            let end = *target as usize + contents.len();
            assert!(end <= lent_blocks as usize, "placed outside of the lent memory");
        }
        let side = self.side(id, to)?;
        match side.state {
            SideState::Up if side.open_lanes[index] && side.held_lane[index].is_empty() => {
                Some(deliver(processes.buffers(to), lent_blocks, shard, arrived))
            }
            SideState::Coming | SideState::Up => {
                side.held_lane[index].push_back(arrived);
                None
            }
            SideState::Down | SideState::Gone => None,
        }
    }

    fn side_down(
        &mut self,
        processes: &mut impl Processes,
        id: u64,
        node: usize,
        reason: String,
    ) -> Vec<Outcome> {
        let Some(side) = self.side(id, node) else { return Vec::new() };
        match side.state {
            SideState::Coming | SideState::Up => side.state = SideState::Down,
            SideState::Down | SideState::Gone => return Vec::new(),
        }
        let posts = std::mem::take(processes.posts(node)).into_iter();
        let posted = posts.map(|(shard, io)| Told::Posted(ShardId(shard), io));
        posted.chain([Told::Down(reason)]).map(|told| Outcome::Told(node, told)).collect()
    }
}

/// Puts a message's bytes where they belong; then it can be told.
fn deliver(
    buffers: &mut Buffers,
    lent_blocks: u32,
    shard: ShardId,
    (message, placed): Arrived,
) -> Told {
    let first = buffers.lent(usize::from(shard.0), lent_blocks);
    let placed = placed.map(|(target, contents)| {
        let first = BufferId(first.0 + target);
        let count = contents.len() as u32;
        for (buffer, block) in (first.0..).map(BufferId).zip(contents) {
            buffers.set(buffer, block);
        }
        (first, count)
    });
    Told::Lane { shard, message, placed }
}

impl Connection {
    fn arrival(&mut self, queue: (usize, Option<ShardId>, bool), time: u64) -> u64 {
        let last = self.arrivals.entry(queue).or_insert(0);
        *last = (*last).max(time);
        *last
    }

    fn is_over(&self) -> bool {
        self.sides.iter().all(|side| side.state == SideState::Gone)
    }
}
