//! Between the nodes: lanes and a control wire as ordered queues, lost together at any moment, and the handshake.
//!
//! Invariants: placed bytes are in the peer's lent memory before their message; a message comes after the lane's order
//! to be up; when a connection is lost each side learns so at its own time, first its posts, then its shards, then its
//! coordinator; a session's end is told before another session begins.

mod handshake;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::rc::Rc;

use twinpoint_core::contract::{CoordinatorEvent, IoToken, PeerSession, ShardEvent};
use twinpoint_core::message::{Hello, PeerMessage};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, ShardId};

use crate::content::Block;
use crate::faults::Corruption;
use crate::node::Queue;
use crate::world::{Event, NodeEvent, World};

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
    /// When the last item of each direction's queue arrives.
    arrivals: BTreeMap<(usize, Option<ShardId>, bool), u64>,
}

#[derive(Debug)]
struct Side {
    life: u64,
    /// What the other side said of itself.
    hello: Hello,
    state: SideState,
    open_lanes: Vec<bool>,
    held_lane: Vec<VecDeque<Arrived>>,
    held_control: VecDeque<Vec<u8>>,
}

/// A lane's message and, if it has any, the placed bytes and where they go.
type Arrived = (Vec<u8>, Option<(BufferId, Vec<Block>)>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SideState {
    Coming,
    Up,
    /// Lanes are down; the coordinator does not know yet.
    Down,
    Gone,
}

/// Something on the wire.
pub(crate) enum WireEvent {
    /// The wire has taken a post's bytes.
    Sent {
        node: usize,
        shard: ShardId,
        io: IoToken,
        message: Vec<u8>,
        placement: Option<(Vec<BufferId>, u32)>,
        contents: Vec<Block>,
    },
    Lane {
        to: usize,
        shard: ShardId,
        message: Vec<u8>,
        placed: Option<(u32, Vec<Block>)>,
    },
    Control {
        to: usize,
        message: Vec<u8>,
    },
    /// A side notices that the connection is lost.
    Lost {
        node: usize,
        reason: String,
    },
    /// A side ends it, for what it found.
    Close {
        node: usize,
        reason: String,
    },
}

impl fmt::Debug for WireEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireEvent::Sent { node, shard, io, contents, .. } => {
                write!(f, "Sent by node {node} shard {shard} {io:?}, {} blocks", contents.len())
            }
            WireEvent::Lane { to, shard, message, placed } => {
                let blocks = placed.as_ref().map_or(0, |(_, blocks)| blocks.len());
                let kind = message.first();
                write!(f, "Lane to node {to} shard {shard}, kind {kind:?}, {blocks} blocks")
            }
            WireEvent::Control { to, message } => {
                write!(f, "Control to node {to}: {:?}", PeerMessage::decode(message))
            }
            WireEvent::Lost { node, reason } => write!(f, "Lost by node {node}: {reason}"),
            WireEvent::Close { node, reason } => write!(f, "Close by node {node}: {reason}"),
        }
    }
}

impl WireEvent {
    /// At whose side it happens.
    pub fn receiver(&self) -> usize {
        match self {
            WireEvent::Sent { node, .. }
            | WireEvent::Lost { node, .. }
            | WireEvent::Close { node, .. } => *node,
            WireEvent::Lane { to, .. } | WireEvent::Control { to, .. } => *to,
        }
    }

    /// Who sent what arrives; none if it happens at one side only.
    pub fn sender(&self) -> Option<usize> {
        match self {
            WireEvent::Sent { .. } | WireEvent::Close { .. } => None,
            WireEvent::Lost { node, .. } => Some(1 - node),
            WireEvent::Lane { to, .. } | WireEvent::Control { to, .. } => Some(1 - to),
        }
    }
}

/// What a ticket stands for.
#[derive(Debug)]
pub(crate) enum TicketUse {
    Client(usize, u64),
    DialHello,
    PeerHello {
        dialer: usize,
        dialer_life: u64,
        hello: Box<Hello>,
    },
    Judge {
        theirs: Box<Hello>,
        ours: Box<Hello>,
        peer_life: u64,
    },
    /// Who refuses says what it is.
    RefuserHello {
        dialer: usize,
        dialer_life: u64,
    },
    /// Who was refused judges by itself: a deposed primary has to learn of it.
    OwnView,
    Promote,
    Stop,
    /// The operator drops a branch by its name.
    DropBranch,
    /// A checkpoint that a deposed primary is asked for.
    StaleCheckpoint {
        knows: bool,
    },
}

impl World {
    /// A side may begin.
    pub fn peer_up(&mut self, node: usize, id: u64) {
        let shards = usize::from(self.options.geometry.shards);
        let lent = self.options.lent_blocks;
        let lends = !self.is_primary(node);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.sides[node].state != SideState::Coming {
            return;
        }
        connection.sides[node].state = SideState::Up;
        self.nodes[node].disowned_after = None;
        self.nodes[node].is_outdated = false;
        let hello = connection.sides[node].hello.clone();
        let buffers = &self.process(node).buffers;
        let lanes = (0..shards)
            .map(|shard| {
                if lends {
                    ((buffers.lent(shard, lent), lent), 0)
                } else {
                    ((BufferId(0), 0), lent)
                }
            })
            .collect();
        let session = PeerSession { hello, lanes };
        self.feed_coordinator(node, CoordinatorEvent::PeerUp(Box::new(session)));
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            let side = &mut connection.sides[node];
            if side.state != SideState::Up {
                return;
            }
            let Some(message) = side.held_control.pop_front() else { return };
            self.feed_coordinator(node, CoordinatorEvent::PeerMessage(message));
        }
    }

    /// A shard has its order that the lane is up: what waited comes now.
    pub fn open_lane(&mut self, node: usize, shard: ShardId) {
        let Some(id) = self.side_of(node) else { return };
        let index = usize::from(shard.0);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.sides[node].open_lanes[index] = true;
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            let side = &mut connection.sides[node];
            if side.state != SideState::Up {
                return;
            }
            let Some((message, placed)) = side.held_lane[index].pop_front() else { return };
            self.deliver_lane(node, shard, &message, placed);
        }
    }

    /// The coordinator hears that the connection is lost.
    pub fn peer_down(&mut self, node: usize, id: u64, reason: String) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.sides[node].state = SideState::Gone;
        self.forget_connection(id);
        self.feed_coordinator(node, CoordinatorEvent::PeerDown(reason));
    }

    /// The coordinator ends its session.
    pub fn close_peer(&mut self, node: usize, reason: &str) {
        if let Some(id) = self.side_of(node) {
            self.break_connection(id, node, reason);
        }
    }

    /// Sends a coordinator's message.
    pub fn peer_post(&mut self, node: usize, message: Vec<u8>) {
        let delay_ns = self.wire_delay_ns(1);
        let now = self.now;
        let Some(id) = self.side_of(node) else { return };
        let connection = self.connections.get_mut(&id).expect("a side has a connection");
        if !connection.is_broken {
            let time = connection.arrival((node, None, false), now + delay_ns);
            self.at(time, Event::Wire(id, WireEvent::Control { to: 1 - node, message }));
        }
    }

    /// The connection on which a shard's post goes out, and when the wire will have taken it.
    pub fn lane_arrival(&mut self, node: usize, shard: ShardId) -> Option<(u64, u64)> {
        let delay_ns = self.wire_delay_ns(4);
        let now = self.now;
        let id = self.side_of(node)?;
        let connection = self.connections.get_mut(&id)?;
        let is_usable = !connection.is_broken && connection.sides[node].state == SideState::Up;
        is_usable.then(|| (id, connection.arrival((node, Some(shard), true), now + delay_ns)))
    }

    /// Something happens on a connection.
    pub fn wire_event(&mut self, id: u64, event: WireEvent) {
        let now = self.now;
        let delay_ns = self.wire_delay_ns(1);
        if self.corrupts(id, &event) {
            return;
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match event {
            WireEvent::Sent { node, shard, io, message, placement, contents } => {
                if connection.sides[node].state != SideState::Up {
                    return;
                }
                let goes = !connection.is_broken;
                let time = connection.arrival((node, Some(shard), false), now + delay_ns);
                for (buffer, block) in
                    placement.iter().flat_map(|(buffers, _)| buffers).zip(&contents)
                {
                    assert!(
                        self.process(node).buffers.get(*buffer) == block,
                        "buffer {buffer} changed while it was sent"
                    );
                }
                if goes {
                    let placed = placement.map(|(_, target)| (target, contents));
                    self.at(
                        time,
                        Event::Wire(id, WireEvent::Lane { to: 1 - node, shard, message, placed }),
                    );
                }
                self.posted(node, shard, io);
            }
            WireEvent::Lane { to, shard, message, placed } => {
                self.lane_arrived(id, to, shard, message, placed)
            }
            WireEvent::Control { to, message } => match connection.sides[to].state {
                SideState::Coming => connection.sides[to].held_control.push_back(message),
                SideState::Up => self.feed_coordinator(to, CoordinatorEvent::PeerMessage(message)),
                SideState::Down | SideState::Gone => {}
            },
            WireEvent::Lost { node, reason } => self.side_down(id, node, reason),
            WireEvent::Close { node, reason } => self.break_connection(id, node, &reason),
        }
    }

    fn wire_delay_ns(&mut self, share: u64) -> u64 {
        let slowness = if self.wire_is_slow { 30 } else { 1 };
        self.random.delay_ns(self.options.wire_delay_ns * slowness / share)
    }

    /// Bytes go through no longer; each side will notice.
    pub fn break_connection(&mut self, id: u64, first: usize, reason: &str) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.is_broken = true;
        self.side_down(id, first, reason.to_owned());
        let reason = "the peer ended the connection".to_owned();
        self.soon(300_000, Event::Wire(id, WireEvent::Lost { node: 1 - first, reason }));
    }

    /// A process died: its side is gone, the other one will notice.
    pub fn drop_side(&mut self, node: usize, is_told: bool) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            let connection = self.connections.get_mut(&id).expect("it was listed");
            if connection.sides[node].state != SideState::Gone {
                connection.sides[node].state = SideState::Gone;
                connection.is_broken = true;
                if is_told {
                    let reason = "the peer died".to_owned();
                    self.soon(500_000, Event::Wire(id, WireEvent::Lost { node: 1 - node, reason }));
                }
                self.forget_connection(id);
            }
        }
    }

    /// The connection of which a node is a side.
    pub fn side_of(&self, node: usize) -> Option<u64> {
        let lives =
            |side: &Side| side.state != SideState::Gone && side.life == self.nodes[node].life;
        self.connections
            .iter()
            .find(|(_, connection)| lives(&connection.sides[node]))
            .map(|(id, _)| *id)
    }

    fn lane_arrived(
        &mut self,
        id: u64,
        to: usize,
        shard: ShardId,
        message: Vec<u8>,
        placed: Option<(u32, Vec<Block>)>,
    ) {
        let index = usize::from(shard.0);
        let lent = self.options.lent_blocks;
        let connection = self.connections.get_mut(&id).expect("the caller looked");
        if matches!(connection.sides[to].state, SideState::Down | SideState::Gone) {
            return;
        }
        let first = self.process(to).buffers.lent(index, lent);
        let corrupts = self.corruption == Some(Corruption::Block) && placed.is_some();
        let placed = placed.map(|(target, mut contents)| {
            if corrupts {
                self.corruption = None;
                let index = self.random.below(contents.len() as u64) as usize;
                let byte = self.random.below(BLOCK_BYTES as u64) as usize;
                Rc::make_mut(&mut contents[index])[byte] ^= 1 << self.random.below(8);
            }
            assert!(
                target as usize + contents.len() <= lent as usize,
                "placed outside of the lent memory"
            );
            (BufferId(first.0 + target), contents)
        });
        let connection = self.connections.get_mut(&id).expect("the caller looked");
        connection.is_corrupted |= corrupts;
        let side = &mut connection.sides[to];
        if side.state == SideState::Coming
            || !side.open_lanes[index]
            || !side.held_lane[index].is_empty()
        {
            side.held_lane[index].push_back((message, placed));
        } else {
            self.deliver_lane(to, shard, &message, placed);
        }
    }

    fn deliver_lane(
        &mut self,
        node: usize,
        shard: ShardId,
        message: &[u8],
        placed: Option<(BufferId, Vec<Block>)>,
    ) {
        let placed = placed.map(|(first, contents)| {
            let count = contents.len() as u32;
            for (index, block) in contents.into_iter().enumerate() {
                self.process(node).buffers.set(BufferId(first.0 + index as u32), block);
            }
            (first, count)
        });
        self.feed_shard(node, shard, ShardEvent::LaneMessage { bytes: message, placed });
    }

    fn side_down(&mut self, id: u64, node: usize, reason: String) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let side = &mut connection.sides[node];
        match side.state {
            SideState::Coming | SideState::Up => side.state = SideState::Down,
            SideState::Down | SideState::Gone => return,
        }
        let posts: Vec<(u16, IoToken)> = self.process(node).posts.iter().copied().collect();
        for (shard, io) in posts {
            self.posted(node, ShardId(shard), io);
        }
        for shard in 0..self.options.geometry.shards {
            self.feed_shard(node, ShardId(shard), ShardEvent::LaneDown);
        }
        self.enqueue(node, Queue::Control, 20_000, NodeEvent::PeerDown(id, reason));
    }

    fn forget_connection(&mut self, id: u64) {
        let gone = |side: &Side| side.state == SideState::Gone;
        if self.connections.get(&id).is_some_and(|connection| connection.sides.iter().all(gone)) {
            self.connections.remove(&id);
        }
    }
}

impl Connection {
    fn arrival(&mut self, queue: (usize, Option<ShardId>, bool), time: u64) -> u64 {
        let last = self.arrivals.entry(queue).or_insert(0);
        *last = (*last).max(time);
        *last
    }
}
