//! The world of one history: virtual time, two nodes, what is between them, and what happens next.
//!
//! Invariants: events happen in the order of time, and of creation at equal times; nothing but the seed decides.
//! A broken rule is a panic; the runner reports it with the last events.

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
use twinpoint_core::superblock::{Superblock, TermStart};
use twinpoint_core::units::{CpNumber, Root, ShardId, ShardSet, StoreId, Term};

use crate::clients::{Client, Operation};
use crate::disk::Disk;
use crate::images::Images;
use crate::model::Model;
use crate::node::{Node, Queue};
use crate::options::Options;
use crate::random::Random;
use crate::wire::{Connection, TicketUse, WireEvent};

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
    pub nodes: [Node; 2],
    pub connections: BTreeMap<u64, Connection>,
    pub connection_next: u64,
    pub network_is_up: bool,
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
    /// Nobody can mend the pair: one store has to be copied anew.
    pub is_pair_broken: bool,
    /// Roots that the primaries sealed, by shard and CP; several if a CP's number was used again.
    pub sealed_roots: BTreeMap<(ShardId, CpNumber), Vec<Root>>,
    pub images: Images,
    pub counts: Counts,
    queue: BinaryHeap<Reverse<Scheduled>>,
    order_next: u64,
    trace: Trace,
}

/// What happened, for the runner's summary.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Events handled.
    pub events: u64,
    /// Client commands answered.
    pub commands: u64,
    /// CPs committed on either side.
    pub points: u64,
    /// Process kills and power cuts.
    pub crashes: u64,
    /// Promotions.
    pub promotions: u64,
    /// Sessions begun.
    pub sessions: u64,
    /// Requests answered with no space.
    pub no_space: u64,
    /// Secondaries sent back to an older CP.
    pub rewinds: u64,
    /// Returning primaries whose own CPs an operator dropped.
    pub branches: u64,
    /// Bases given up, or pairs that cannot be mended otherwise.
    pub broken_pairs: u64,
    /// Shard headers written, two for each map checkpoint.
    pub headers: u64,
    /// CPs read back from a store for a peer that fell behind.
    pub catch_ups: u64,
    /// Requests that waited and were admitted again.
    pub readmissions: u64,
    /// Times that writers were held.
    pub holds: u64,
    /// Device failures.
    pub device_failures: u64,
    /// Images checked.
    pub images: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.events += other.events;
        self.commands += other.commands;
        self.points += other.points;
        self.crashes += other.crashes;
        self.promotions += other.promotions;
        self.sessions += other.sessions;
        self.no_space += other.no_space;
        self.rewinds += other.rewinds;
        self.branches += other.branches;
        self.broken_pairs += other.broken_pairs;
        self.headers += other.headers;
        self.catch_ups += other.catch_ups;
        self.readmissions += other.readmissions;
        self.holds += other.holds;
        self.device_failures += other.device_failures;
        self.images += other.images;
    }
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
    NetworkBack,
    Kill(usize, bool),
    Promote(usize, bool),
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
    PeerUp(u64),
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
        let images = Images::new(options.geometry.shards, options.geometry.data_blocks());
        let nodes = [new_node(&options, Role::Primary), new_node(&options, Role::Secondary)];
        World {
            now: 0,
            nodes,
            connections: BTreeMap::new(),
            connection_next: 0,
            network_is_up: true,
            model: Model::new(),
            clients: Vec::new(),
            operations: BTreeMap::new(),
            tag_next: 0,
            tickets: BTreeMap::new(),
            operation_next: 0,
            commands_left: options.commands,
            faults_left: options.faults,
            is_calm: false,
            is_pair_broken: false,
            sealed_roots: BTreeMap::new(),
            images,
            counts: Counts::default(),
            queue: BinaryHeap::new(),
            order_next: 0,
            trace,
            random,
            options,
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
        self.note(|| format!("{:?}", next.event));
        match next.event {
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
            Event::NetworkBack => self.network_is_up = true,
            Event::Kill(node, power_cut) => self.kill_for_a_while(node, power_cut),
            Event::Promote(node, force) => self.promote(node, force),
        }
        true
    }

    /// Remembers a line for the report.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let mut trace = self.trace.events.borrow_mut();
        if trace.len() >= self.trace.kept {
            trace.pop_front();
        }
        let mut line = line();
        line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
        trace.push_back(format!("{:>12} {line}", self.now));
    }

    fn node_event(&mut self, node: usize, event: NodeEvent) {
        match event {
            NodeEvent::Request(shard, request) => self.deliver_request(node, shard, request),
            NodeEvent::Order(shard, order) => {
                let is_lane_up = matches!(order, Order::LaneUp { .. });
                if is_lane_up || matches!(order, Order::Lead(_)) {
                    self.images.forget_unclaimed(node, shard);
                }
                let may_free = matches!(order, Order::Committed { .. });
                self.feed_shard(node, shard, ShardEvent::Order(order));
                if may_free {
                    let free = self.process(node).shards[usize::from(shard.0)].free_blocks();
                    self.images.check_free(node, shard, free, self.nodes[node].keeps_base);
                }
                if is_lane_up {
                    self.open_lane(node, shard);
                }
            }
            NodeEvent::Report(shard, report) => {
                self.feed_coordinator(node, CoordinatorEvent::Report(shard, report))
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
                self.feed_coordinator(node, CoordinatorEvent::PeerHello(ticket, hello));
            }
            NodeEvent::PeerUp(connection) => self.peer_up(node, connection),
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
    let superblock = Superblock {
        store: StoreId([7; 16]),
        geometry: options.geometry,
        sequence: 1,
        term: Term(1),
        history: vec![TermStart { term: Term(1), first: CpNumber(1) }],
        committed: CpNumber(0),
        base: CpNumber(0),
        paired: false,
        secondary: false,
        alone_since: None,
        base_given_up: false,
        deposed_by: None,
        branch: None,
        clean: true,
    };
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
    }
}
