//! The world of one history: virtual time, two nodes, what is between them, and what happens next.
//!
//! Invariants: events happen in the order of time, and of creation at equal times; nothing but the seed decides.
//! A broken rule is a panic; the runner reports it with the last events.

mod counts;

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::rc::Rc;

use twinpoint_core::contract::{
    Command, CoordinatorEvent, IoToken, Order, Report, ShardEvent, Ticket,
};
use twinpoint_core::message::{Hello, Role};
use twinpoint_core::recovery::format;
use twinpoint_core::request::{Request, Tag};
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{CpNumber, Instant, Root, ShardId, ShardSet, StoreId};

use crate::clients::{Client, Operation};
use crate::disk::Disk;
pub use counts::Counts;

use crate::faults::{Corruption, Fault, Faults, Mend};
use crate::images::Images;
use crate::model::Model;
use crate::node::{Node, Queue};
use crate::options::Options;
use crate::random::Random;
use crate::wire::{Connections, TicketUse, WireEvent};

/// Looks at what a power cut would leave, in one history: each costs as much as a start.
const PROBES: u64 = 6;
/// Longest line of the report.
const LINE_BYTES_MAX: usize = 400;

/// The last events and how many of them are kept, shared with the runner.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    pub events: Rc<RefCell<VecDeque<String>>>,
    pub kept: usize,
}

/// See the module.
pub(crate) struct World {
    pub now: u64,
    pub random: Random,
    pub options: Options,
    /// Which kinds of faults happen.
    pub faults: Faults,
    pub nodes: [Node; 2],
    pub connections: Connections,
    pub network_is_up: bool,
    /// Nothing that this node sends arrives for now; it is held here.
    pub is_cut: [bool; 2],
    pub held_on_wire: [VecDeque<(u64, WireEvent)>; 2],
    pub wire_is_slow: bool,
    /// Happens to the next message that it fits.
    pub corruption: Option<Corruption>,
    pub model: Model,
    pub clients: Vec<Client>,
    pub operations: BTreeMap<u64, Operation>,
    pub tag_next: u64,
    pub tickets: BTreeMap<u64, TicketUse>,
    pub operation_next: u64,
    pub commands_left: u64,
    pub faults_left: u64,
    /// The last phase: no faults, all is mended.
    pub is_calm: bool,
    /// What was broken when the calm began is mended.
    pub is_mended: bool,
    /// Nobody can mend the pair: one store has to be copied anew.
    pub is_pair_broken: bool,
    /// The node whose machine was lost for good.
    pub lost_node: Option<usize>,
    /// Roots that the primaries sealed, by shard and CP; several if a CP's number was used again.
    pub sealed_roots: BTreeMap<(ShardId, CpNumber), Vec<Root>>,
    /// Since when CPs of an older term are refused: the newest promotion's term and its last CP before.
    pub newest_term: (u64, CpNumber),
    /// Looks at what a power cut would leave that this history may still take.
    pub probes_left: u64,
    pub images: Images,
    pub counts: Counts,
    queue: BinaryHeap<Reverse<Scheduled>>,
    order_next: u64,
    trace: Trace,
}

/// Something that will happen.
#[derive(Debug)]
pub(crate) enum Event {
    Node(usize, u64, NodeEvent),
    Wire(u64, WireEvent),
    Client(usize),
    Dial(usize),
    Start(usize, Option<CpNumber>),
    Fault,
    Kill(usize, bool),
    Promote(usize, bool),
    Mend(Mend),
    Die(usize, u64, bool),
    StaleWork(usize),
}

/// Something that will happen to a process.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    Request(ShardId, Request),
    Order(ShardId, Order),
    Report(ShardId, Report),
    Disk(u64),
    Borrow(ShardId, IoToken, u32),
    Posted(ShardId, IoToken),
    Quiesced(CpNumber, ShardSet),
    Flush(Tag),
    Command(Ticket, Command),
    PeerHello(Ticket, Box<Hello>),
    PeerUp(u64, Box<Hello>),
    PeerDown(u64, String),
    Tick,
}

struct Scheduled {
    time: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.time, self.order).cmp(&(other.time, other.order))
    }
}

impl World {
    /// Two formatted stores, nobody started yet.
    pub fn new(seed: u64, trace: Trace) -> World {
        let mut random = Random::new(seed);
        let options = Options::from_seed(&mut random);
        World::with_options(options, Faults::from_seed(seed), random, trace)
    }

    /// The same with options and faults that are given: `random` is what is left of the seed's chance.
    pub fn with_options(options: Options, faults: Faults, random: Random, trace: Trace) -> World {
        let images = Images::new(options.geometry.shards, options.geometry.data_blocks());
        let mut nodes = [new_node(&options, Role::Primary), new_node(&options, Role::Secondary)];
        nodes[1].returns_as_primary = faults.has(Fault::StalePrimary);
        World {
            now: 0,
            nodes,
            connections: Connections::new(options.geometry.shards, options.lent_blocks),
            network_is_up: true,
            is_cut: [false; 2],
            held_on_wire: [VecDeque::new(), VecDeque::new()],
            wire_is_slow: false,
            corruption: None,
            model: Model::new(),
            clients: Vec::new(),
            operations: BTreeMap::new(),
            tag_next: 0,
            tickets: BTreeMap::new(),
            operation_next: 0,
            commands_left: options.commands,
            faults_left: options.faults,
            is_calm: false,
            is_mended: false,
            is_pair_broken: false,
            lost_node: None,
            sealed_roots: BTreeMap::new(),
            newest_term: (1, CpNumber(0)),
            probes_left: PROBES,
            images,
            counts: Counts::default(),
            queue: BinaryHeap::new(),
            order_next: 0,
            trace,
            random,
            options,
            faults,
        }
    }

    /// Has something happen at `time`.
    pub fn at(&mut self, time: u64, event: Event) {
        let order = self.order_next;
        self.order_next += 1;
        self.queue.push(Reverse(Scheduled { time: time.max(self.now), order, event }));
    }

    /// Has something happen around `delay_ns` from now.
    pub fn soon(&mut self, delay_ns: u64, event: Event) {
        let delay_ns = self.random.delay_ns(delay_ns);
        self.at(self.now + delay_ns, event);
    }

    /// Puts something in a node's queue; it comes out later, in order.
    pub fn enqueue(&mut self, node: usize, queue: Queue, delay_ns: u64, event: NodeEvent) {
        let delay_ns = self.random.delay_ns(delay_ns);
        let now = self.now;
        let life = self.nodes[node].life;
        let time = self.process(node).arrival(queue, now, delay_ns);
        self.at(time, Event::Node(node, life, event));
    }

    pub fn process(&mut self, node: usize) -> &mut crate::node::Process {
        self.nodes[node].process.as_mut().expect("the process lives")
    }

    pub fn is_alive(&self, node: usize) -> bool {
        self.nodes[node].process.is_some()
    }

    /// The next event happens. Tells whether there was one before `deadline`.
    pub fn step(&mut self, deadline: u64) -> bool {
        let Some(Reverse(next)) = self.queue.peek() else { return false };
        if next.time > deadline {
            return false;
        }
        let Some(Reverse(next)) = self.queue.pop() else { return false };
        self.now = next.time;
        self.counts.events += 1;
        if self.is_calm && !self.is_mended {
            self.mend_all();
        }
        if !matches!(next.event, Event::Client(_) | Event::Dial(_)) {
            self.note(|| format!("{:?}", next.event));
        }
        self.happen(next.event);
        true
    }

    /// An event happens, unless the wire keeps it.
    pub fn happen(&mut self, event: Event) {
        match event {
            Event::Wire(connection, event) => {
                if let Some(event) = self.pass(connection, event) {
                    self.reach(Event::Wire(connection, event));
                }
            }
            other => self.reach(other),
        }
    }

    /// An event that nothing keeps any more happens, unless it is for a node that is paused: then it waits there.
    pub fn reach(&mut self, event: Event) {
        let node = match &event {
            Event::Node(node, ..) => Some(*node),
            Event::Wire(_, event) => Some(event.receiver()),
            _ => None,
        };
        if let Some(node) = node.filter(|node| self.nodes[*node].is_paused) {
            self.nodes[node].held.push_back(event);
            return;
        }
        match event {
            Event::Node(node, life, event) => {
                if self.is_alive(node) && self.nodes[node].life == life {
                    self.node_event(node, event);
                }
            }
            Event::Wire(connection, event) => self.wire_event(connection, event),
            Event::Client(client) => self.client_wakes(client),
            Event::Dial(node) => self.dial(node),
            Event::Start(node, ceiling) => self.start_node(node, ceiling),
            Event::Fault => self.fault(),
            Event::Kill(node, power_cut) => self.kill_for_a_while(node, power_cut),
            Event::Promote(node, force) => self.promote(node, force),
            Event::Mend(what) => self.mend(what),
            Event::Die(node, life, power_cut) => self.die(node, life, power_cut),
            Event::StaleWork(node) => self.stale_work(node),
        }
    }

    /// What a node's clock shows.
    pub fn clock(&self, node: usize) -> Instant {
        Instant(self.now + self.nodes[node].clock_ahead_ns)
    }

    /// Remembers a line for the report.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.trace.kept == 0 {
            return;
        }
        let mut trace = self.trace.events.borrow_mut();
        if trace.len() >= self.trace.kept {
            trace.pop_front();
        }
        let mut line = line();
        if line.len() > LINE_BYTES_MAX {
            line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
            line.push_str(" ...");
        }
        trace.push_back(format!("{:>12} {line}", self.now));
    }

    /// No block is free that an image still needs, and of an idle shard none is kept that nobody needs.
    fn check_space(&mut self, node: usize, shard: ShardId, floor: CpNumber) {
        let keeps_base = self.nodes[node].keeps_base;
        let machine = &self.process(node).shards[usize::from(shard.0)];
        let (free, is_idle) = (machine.free_blocks(), machine.is_idle());
        self.images.check_free(node, shard, free, keeps_base);
        if is_idle {
            let unused = self.images.free_blocks(node, shard, floor);
            assert!(
                free == unused,
                "node {node} shard {shard} leaks: {free} blocks are free, {unused} are not used from CP {floor} on"
            );
            self.counts.leak_checks += 1;
        }
    }

    fn node_event(&mut self, node: usize, event: NodeEvent) {
        match event {
            NodeEvent::Request(shard, request) => self.deliver_request(node, shard, request),
            NodeEvent::Order(shard, order) => {
                let is_lane_up = matches!(order, Order::LaneUp { .. });
                if is_lane_up || matches!(order, Order::Lead(_)) {
                    self.images.forget_unrecorded(node, shard);
                }
                let floor = match order {
                    Order::Committed { base, claimed, .. } => Some(base.min(claimed)),
                    _ => None,
                };
                self.feed_shard(node, shard, ShardEvent::Order(order));
                if let Some(floor) = floor.filter(|_| self.is_well(node)) {
                    self.check_space(node, shard, floor);
                }
                if is_lane_up && self.is_alive(node) {
                    self.open_lane(node, shard);
                }
            }
            NodeEvent::Report(shard, report) => {
                self.note_ahead(node, &report);
                let is_base_awaited = matches!(report, Report::HeldByBase(_));
                self.feed_coordinator(node, CoordinatorEvent::Report(shard, report));
                if is_base_awaited && self.options.loses_secondary && self.random.chance(50) {
                    self.lose_secondary();
                }
            }
            NodeEvent::Disk(operation) => self.disk_done(node, operation),
            NodeEvent::Borrow(shard, io, want) => self.borrow(node, shard, io, want),
            NodeEvent::Posted(shard, io) => self.posted(node, shard, io),
            NodeEvent::Quiesced(cp, participants) => {
                self.feed_coordinator(node, CoordinatorEvent::Quiesced { cp, participants });
            }
            NodeEvent::Flush(tag) => self.feed_coordinator(node, CoordinatorEvent::Flush(tag)),
            NodeEvent::Command(ticket, command) => {
                self.feed_coordinator(node, CoordinatorEvent::Command(ticket, command));
            }
            NodeEvent::PeerHello(ticket, hello) => {
                // A primary is not asked to follow: it learns whether it was deposed.
                let event = if self.process(node).leads() {
                    CoordinatorEvent::Command(ticket, Command::Judge(hello))
                } else {
                    CoordinatorEvent::PeerHello(ticket, hello)
                };
                self.feed_coordinator(node, event);
            }
            NodeEvent::PeerUp(connection, hello) => self.peer_up(node, connection, *hello),
            NodeEvent::PeerDown(connection, reason) => self.peer_down(node, connection, reason),
            NodeEvent::Tick => {
                if self.process(node).tick_at.is_some_and(|at| at <= self.now) {
                    self.process(node).tick_at = None;
                    self.feed_coordinator(node, CoordinatorEvent::Tick);
                }
            }
        }
    }
}

fn new_node(options: &Options, role: Role) -> Node {
    let mut disk = Disk::new(options.geometry.store_blocks());
    let superblock = Superblock::of_empty(StoreId([7; 16]), options.geometry);
    for (block, bytes) in format(&superblock) {
        disk.write_now(block.0, &bytes);
    }
    disk.flush_now();
    Node {
        disk,
        role,
        life: 0,
        process: None,
        disowned_after: None,
        is_outdated: false,
        keeps_base: false,
        is_alone: false,
        is_slow: false,
        is_paused: false,
        held: VecDeque::new(),
        clock_ahead_ns: 0,
        returns_as_primary: false,
    }
}
