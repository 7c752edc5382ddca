//! Between the nodes: lanes and a control wire as ordered queues, lost together at any moment, and the handshake.
//!
//! Invariants: placed bytes are in the peer's lent memory before their message; a message comes after the lane's order
//! to be up; when a connection is lost each side learns so at its own time, first its posts, then its shards, then its
//! coordinator; a session's end is told before another session begins.

use std::collections::{BTreeMap, VecDeque};

use twinpoint_core::contract::{
    Command, CoordinatorEvent, IoToken, PeerSession, Refusal, Reply, ShardEvent,
};
use twinpoint_core::message::Hello;
use twinpoint_core::units::{BufferId, CpNumber, ShardId};

use crate::content::Block;
use crate::node::Queue;
use crate::world::{Event, NodeEvent, World};

/// One connection of the pair.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Bytes no longer go through.
    is_broken: bool,
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
#[derive(Debug)]
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
}

/// What a ticket stands for.
#[derive(Debug)]
pub(crate) enum TicketUse {
    Client(usize, u64),
    DialHello,
    PeerHello { dialer: usize, dialer_life: u64, hello: Box<Hello> },
    Judge { theirs: Box<Hello>, ours: Box<Hello>, peer_life: u64 },
    Promote,
    Stop,
}

impl World {
    /// A node that could be a primary looks for its peer, now and then.
    pub fn dial(&mut self, node: usize) {
        self.soon(5_000_000, Event::Dial(node));
        let has_side = self.side_of(node).is_some();
        if !self.options.paired
            || !self.network_is_up
            || !self.is_alive(node)
            || has_side
            || self.is_pair_broken
        {
            return;
        }
        if self.process(node).is_stopped || !self.is_primary(node) {
            return;
        }
        self.ask(node, TicketUse::DialHello, Command::Hello);
    }

    /// A step of the handshake was answered.
    pub fn handshake_reply(&mut self, node: usize, what: TicketUse, reply: Reply) {
        let peer = 1 - node;
        if !self.network_is_up || !self.is_alive(peer) {
            return;
        }
        let peer_life = self.nodes[peer].life;
        match (what, reply) {
            (TicketUse::DialHello, Reply::Hello(hello)) => {
                let dialer_life = self.nodes[node].life;
                let what = TicketUse::PeerHello { dialer: node, dialer_life, hello: hello.clone() };
                let ticket = self.ticket(what);
                let decoded = Hello::decode(&hello.encode()).expect("a hello comes back");
                assert_eq!(decoded, *hello, "a hello comes back");
                let delay_ns = self.options.wire_delay_ns;
                self.enqueue(
                    peer,
                    Queue::Control,
                    delay_ns,
                    NodeEvent::PeerHello(ticket, Box::new(decoded)),
                );
            }
            (TicketUse::PeerHello { dialer, dialer_life, hello }, Reply::Hello(theirs)) => {
                if self.nodes[dialer].life == dialer_life {
                    let peer_life = self.nodes[node].life;
                    let what = TicketUse::Judge { theirs: theirs.clone(), ours: hello, peer_life };
                    self.ask(dialer, what, Command::Judge(theirs));
                }
            }
            (TicketUse::PeerHello { dialer, .. }, Reply::Refused(refusal)) => {
                self.refused(dialer, node, &refusal)
            }
            (TicketUse::Judge { theirs, ours, peer_life: life }, Reply::Accepted(from)) => {
                assert_eq!(from, theirs.last, "the secondary goes on where it is");
                if life == peer_life && self.side_of(peer).is_none() && self.side_of(node).is_none()
                {
                    self.connect(node, *ours, *theirs);
                }
            }
            (TicketUse::Judge { .. }, Reply::Refused(refusal)) => {
                self.refused(node, peer, &refusal)
            }
            (TicketUse::DialHello, Reply::Refused(_)) => {}
            (what, reply) => panic!("{what:?} was answered {reply:?}"),
        }
    }

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
        let delay_ns = self.random.delay_ns(self.options.wire_delay_ns);
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
        let delay_ns = self.random.delay_ns(self.options.wire_delay_ns / 4);
        let now = self.now;
        let id = self.side_of(node)?;
        let connection = self.connections.get_mut(&id)?;
        let is_usable = !connection.is_broken && connection.sides[node].state == SideState::Up;
        is_usable.then(|| (id, connection.arrival((node, Some(shard), true), now + delay_ns)))
    }

    /// Something happens on a connection.
    pub fn wire_event(&mut self, id: u64, event: WireEvent) {
        let now = self.now;
        let delay_ns = self.random.delay_ns(self.options.wire_delay_ns);
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
        }
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
    pub fn drop_side(&mut self, node: usize) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            let connection = self.connections.get_mut(&id).expect("it was listed");
            if connection.sides[node].state != SideState::Gone {
                connection.sides[node].state = SideState::Gone;
                connection.is_broken = true;
                let reason = "the peer died".to_owned();
                self.soon(500_000, Event::Wire(id, WireEvent::Lost { node: 1 - node, reason }));
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

    fn connect(&mut self, dialer: usize, dialer_hello: Hello, peer_hello: Hello) {
        let shards = usize::from(self.options.geometry.shards);
        let side = |node: usize| Side {
            life: self.nodes[node].life,
            hello: if node == dialer { peer_hello.clone() } else { dialer_hello.clone() },
            state: SideState::Coming,
            open_lanes: vec![false; shards],
            held_lane: (0..shards).map(|_| VecDeque::new()).collect(),
            held_control: VecDeque::new(),
        };
        let connection =
            Connection { is_broken: false, sides: [side(0), side(1)], arrivals: BTreeMap::new() };
        let id = self.connection_next;
        self.connection_next += 1;
        self.connections.insert(id, connection);
        self.counts.sessions += 1;
        for node in 0..2 {
            let delay_ns = self.options.wire_delay_ns;
            self.enqueue(node, Queue::Control, delay_ns, NodeEvent::PeerUp(id));
        }
    }

    fn refused(&mut self, primary: usize, secondary: usize, refusal: &Refusal) {
        self.note(|| format!("the pair cannot be: {refusal:?}"));
        match refusal {
            Refusal::SessionEnding
            | Refusal::StoreFailed
            | Refusal::Rewind(_)
            | Refusal::Stopping
            | Refusal::SameRole => {}
            Refusal::StaleTerm { .. } => self.deposed(primary),
            Refusal::Branch { common, .. } => self.drop_branch(secondary, *common),
            Refusal::TooFarBehind { .. } => self.pair_broke(primary, refusal),
            other => panic!("the pair was refused: {other:?}"),
        }
    }

    /// The operator drops what only the returning store has.
    fn drop_branch(&mut self, node: usize, common: CpNumber) {
        self.counts.branches += 1;
        self.kill(node, false);
        self.soon(100_000, Event::Start(node, Some(common)));
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
        let placed = placed.map(|(target, contents)| {
            assert!(
                target as usize + contents.len() <= lent as usize,
                "placed outside of the lent memory"
            );
            (BufferId(first.0 + target), contents)
        });
        let side = &mut self.connections.get_mut(&id).expect("the caller looked").sides[to];
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
