//! Between the nodes: the world's side of the simulated wire, whose connections it gives times and chance, and whose
//! outcomes it carries to the shards and coordinators; and the handshake.
//!
//! Invariants: a side hears of the loss in this order: its posts, its shards, its coordinator; a session's end is told
//! before another session begins.

mod connections;
mod event;
mod handshake;

use std::collections::BTreeSet;
use std::rc::Rc;

use twinpoint_core::contract::{CoordinatorEvent, IoToken, PeerSession, ShardEvent};
use twinpoint_core::message::Hello;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, ShardId};

use crate::buffers::Buffers;
use crate::faults::Corruption;
use crate::node::{Node, Queue};
use crate::world::{Event, NodeEvent, World};
pub(crate) use connections::{Connections, Processes};
pub(crate) use event::{Outcome, Post, Told, WireEvent};

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

/// What the world's processes have that the wire works on.
impl Processes for [Node; 2] {
    fn buffers(&mut self, node: usize) -> &mut Buffers {
        &mut self[node].process.as_mut().expect("the process lives").buffers
    }

    fn posts(&mut self, node: usize) -> &mut BTreeSet<(u16, IoToken)> {
        &mut self[node].process.as_mut().expect("the process lives").posts
    }
}

impl World {
    /// A side may begin; the other one said this of itself.
    pub fn peer_up(&mut self, node: usize, id: u64, hello: Hello) {
        if !self.connections.begin(id, node) {
            return;
        }
        self.nodes[node].disowned_after = None;
        self.nodes[node].is_outdated = false;
        let shards = usize::from(self.options.geometry.shards);
        let lent = self.options.lent_blocks;
        let lends = !self.is_primary(node);
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
        while let Some(told) = self.connections.next_control(id, node) {
            self.told(id, node, told);
        }
    }

    /// A shard has its order that the lane is up: what waited comes now.
    pub fn open_lane(&mut self, node: usize, shard: ShardId) {
        let Some(id) = self.side_of(node) else { return };
        self.connections.open_lane(id, node, shard);
        while let Some(told) = self.connections.next_on_lane(&mut self.nodes, id, node, shard) {
            self.told(id, node, told);
        }
    }

    /// The coordinator hears that the connection is lost.
    pub fn peer_down(&mut self, node: usize, id: u64, reason: String) {
        if self.connections.get(&id).is_some() {
            self.connections.end(id, node);
            self.feed_coordinator(node, CoordinatorEvent::PeerDown(reason));
        }
    }

    /// The coordinator ends its session.
    pub fn close_peer(&mut self, node: usize, reason: &str) {
        if let Some(id) = self.side_of(node) {
            self.break_connection(id, node, reason);
        }
    }

    /// Sends a coordinator's message.
    pub fn peer_post(&mut self, node: usize, message: Vec<u8>) {
        let time = self.wire_time(1);
        let Some(id) = self.side_of(node) else { return };
        let outcome = self.connections.post_control(id, node, time, message);
        self.carry_out(id, outcome);
    }

    /// Sends a shard's post. False if there is no lane to send it on.
    pub fn lane_post(&mut self, node: usize, post: Post) -> bool {
        let time = self.wire_time(4);
        let Some(id) = self.side_of(node) else { return false };
        let outcome = self.connections.post(&mut self.nodes, (id, node), time, post);
        let is_taken = outcome.is_some();
        self.carry_out(id, outcome);
        is_taken
    }

    /// Something happens on a connection.
    pub fn wire_event(&mut self, id: u64, mut event: WireEvent) {
        let time = self.wire_time(1);
        if self.corrupts(id, &event) {
            return;
        }
        self.corrupt_block(id, &mut event);
        let outcomes = self.connections.happen(&mut self.nodes, id, time, event);
        self.carry_out(id, outcomes);
    }

    /// Bytes go through no longer; each side will notice.
    pub fn break_connection(&mut self, id: u64, first: usize, reason: &str) {
        let outcomes = self.connections.break_up(&mut self.nodes, id, first, reason.to_owned());
        self.carry_out(id, outcomes);
    }

    /// A process died: its side is gone, the other one will notice.
    pub fn drop_side(&mut self, node: usize, is_told: bool) {
        for (id, outcome) in self.connections.drop_sides(node, is_told) {
            self.carry_out(id, [outcome]);
        }
    }

    /// The connection of which a node is a side.
    pub fn side_of(&self, node: usize) -> Option<u64> {
        self.connections.side_of(node, self.nodes[node].life)
    }

    /// When something sent now arrives.
    fn wire_time(&mut self, share: u64) -> u64 {
        let slowness = if self.wire_is_slow { 30 } else { 1 };
        let typical_ns = self.options.wire_delay_ns * slowness / share;
        // One that takes far longer may pass the peer's timeout; if that goes on, nothing ever catches up.
        let delay_ns = if self.is_calm {
            self.random.between(typical_ns / 2, typical_ns * 3 / 2)
        } else {
            self.random.delay_ns(typical_ns)
        };
        self.now + delay_ns
    }

    /// A placed block changes on its way, if that is due.
    fn corrupt_block(&mut self, id: u64, event: &mut WireEvent) {
        let WireEvent::Lane { to, placed: Some((_, contents)), .. } = event else { return };
        if self.corruption != Some(Corruption::Block) || !self.connections.hears(id, *to) {
            return;
        }
        self.corruption = None;
        let index = self.random.below(contents.len() as u64) as usize;
        let byte = self.random.below(BLOCK_BYTES as u64) as usize;
        Rc::make_mut(&mut contents[index])[byte] ^= 1 << self.random.below(8);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.is_corrupted = true;
        }
    }

    fn carry_out(&mut self, id: u64, outcomes: impl IntoIterator<Item = Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::At(time, event) => self.at(time, Event::Wire(id, event)),
                Outcome::Soon(delay_ns, event) => self.soon(delay_ns, Event::Wire(id, event)),
                Outcome::Told(node, told) => self.told(id, node, told),
            }
        }
    }

    fn told(&mut self, id: u64, node: usize, told: Told) {
        match told {
            Told::Posted(shard, io) => self.feed_shard(node, shard, ShardEvent::Posted { io }),
            Told::Lane { shard, message, placed } => {
                let event = ShardEvent::LaneMessage { bytes: &message, placed };
                self.feed_shard(node, shard, event);
            }
            Told::Control(message) => {
                self.feed_coordinator(node, CoordinatorEvent::PeerMessage(message));
            }
            Told::Down(reason) => {
                self.enqueue(node, Queue::Control, 20_000, NodeEvent::PeerDown(id, reason));
            }
        }
    }
}
