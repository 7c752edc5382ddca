//! Plays one seed's history from format to a clean stop, and reports which rule broke, if any.
//!
//! ```text
//! load with faults -> calm: all is mended and answered -> both sides equal -> clean stop -> stores as left
//! ```
//!
//! Invariant: a seed plays the same history every time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use twinpoint_core::contract::Command;
use twinpoint_core::coordinator::OnPeerLoss;
use twinpoint_core::message::Role;
use twinpoint_core::recovery::{Recovered, recover};
use twinpoint_core::units::Instant;

use crate::clients::Client;
use crate::disk::DiskSource;
use crate::lifecycle::image_of;
use crate::wire::TicketUse;
use crate::world::{Counts, Event, Trace, World};

/// Longest virtual time of the load, in nanoseconds.
const LOAD_NS: u64 = 20_000_000_000;
/// Virtual time within which all is answered and in step once nothing fails any more.
const CALM_NS: u64 = 20_000_000_000;
/// Virtual time within which a clean stop ends.
const STOP_NS: u64 = 20_000_000_000;
/// More events than any history needs: somebody spins.
const EVENTS_MAX: u64 = 3_000_000;
/// Between two looks at whether a phase is over.
const LOOK_NS: u64 = 5_000_000;

/// A history in which a rule was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Play it again with this.
    pub seed: u64,
    /// Which rule, and where.
    pub rule: String,
    /// The last events.
    pub events: Vec<String>,
}

/// Plays a seed's history; keeps the last `events_kept` events for the report.
///
/// # Errors
/// The rule that was broken.
pub fn run(seed: u64, events_kept: usize) -> Result<Counts, Failure> {
    let trace = Trace { events: Rc::new(RefCell::new(VecDeque::new())), kept: events_kept.max(1) };
    let own = trace.clone();
    let played = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, own);
        world.play();
        world.counts
    }));
    played.map_err(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let rule = text.unwrap_or_else(|| "a panic without words".to_owned());
        let events = trace.events.borrow().iter().cloned().collect();
        Failure { seed, rule, events }
    })
}

impl World {
    fn play(&mut self) {
        let options = format!("{:?}", self.options);
        self.note(|| options);
        self.at(0, Event::Start(0, None));
        if self.options.paired {
            let late_ns = self.random.pick(&[0, 10_000_000, 400_000_000]);
            self.at(late_ns, Event::Start(1, None));
        }
        for client in 0..self.options.clients {
            self.clients.push(Client::default());
            self.soon(1_000_000, Event::Client(client));
        }
        self.soon(1_000_000, Event::Dial(0));
        self.soon(1_500_000, Event::Dial(1));
        self.soon(30_000_000, Event::Fault);
        let load_end = self.now + LOAD_NS;
        self.run_until(load_end, |world| world.commands_left == 0 && world.faults_left == 0);
        self.calm_down();
        self.check_equal();
        self.stop();
    }

    /// Steps until `done` or the deadline. Tells which.
    fn run_until(&mut self, deadline: u64, done: impl Fn(&mut World) -> bool) -> bool {
        let mut look = self.now;
        while self.now < deadline {
            look = (look + LOOK_NS).min(deadline);
            while self.step(look) {
                assert!(self.counts.events < EVENTS_MAX, "{EVENTS_MAX} events and no end");
            }
            self.now = look;
            if done(self) {
                return true;
            }
        }
        false
    }

    fn calm_down(&mut self) {
        self.is_calm = true;
        self.commands_left = 0;
        self.network_is_up = true;
        for node in 0..2 {
            if let Some(process) = &mut self.nodes[node].process {
                process.is_failing = false;
                if process.has_failed {
                    self.soon(100_000, Event::Kill(node, false));
                }
            }
        }
        for node in 0..if self.options.paired { 2 } else { 1 } {
            self.soon(1_000_000, Event::Start(node, None));
        }
        let deadline = self.now + CALM_NS;
        let settled = self.run_until(deadline, World::is_settled);
        let stuck =
            self.is_pair_broken && self.options.coordinator.on_peer_loss == OnPeerLoss::Stall;
        if !settled && !stuck {
            let why = self.why_unsettled();
            panic!("not settled within {CALM_NS} ns: {why}");
        }
    }

    fn is_settled(&mut self) -> bool {
        self.why_unsettled().is_empty()
    }

    /// What is still to come; empty if nothing.
    fn why_unsettled(&mut self) -> String {
        if !self.operations.is_empty() {
            return format!("unanswered: {:?}", self.operations);
        }
        let nodes = if self.options.paired { 2 } else { 1 };
        let Some(primary) = (0..nodes).find(|node| self.is_serving(*node)) else {
            return "nobody serves".to_owned();
        };
        let now = Instant(self.now);
        let ours = self.process(primary).coordinator.status(now);
        if !self.process(primary).gate.is_open_empty() || ours.committed.next() != ours.open {
            return format!("not committed: {ours:?}");
        }
        for node in 0..nodes {
            let Some(process) = &self.nodes[node].process else { continue };
            if process.has_mail(self.now) {
                return format!("orders or reports of node {node} are under way");
            }
            if process.is_promoting {
                return format!("node {node} is being promoted");
            }
            let used = process.buffers.in_use();
            if !used.is_empty() {
                return format!("buffers of node {node} in use: {used:?}");
            }
        }
        if !self.options.paired || self.is_pair_broken {
            return String::new();
        }
        if !self.is_alive(1 - primary) {
            return "the secondary is dead".to_owned();
        }
        let theirs = self.process(1 - primary).coordinator.status(now);
        let in_step = theirs.committed == ours.committed
            && theirs.base == ours.committed
            && ours.base == ours.committed
            && ours.confirmed == ours.committed
            && ours.alone_since.is_none()
            && ours.peer == "connected";
        if !in_step {
            return format!("not in step: {ours:?} and {theirs:?}");
        }
        assert_eq!(ours.root, theirs.root, "roots differ in step");
        String::new()
    }

    /// Both stores hold the same blocks at the same places; what is free is what nobody uses.
    fn check_equal(&mut self) {
        let nodes = if self.options.paired { 2 } else { 1 };
        let alive: Vec<usize> = (0..nodes).filter(|node| self.is_alive(*node)).collect();
        for node in &alive {
            let data_blocks = u64::from(self.options.geometry.data_blocks());
            let now = Instant(self.now);
            let base = self.process(*node).coordinator.status(now).base;
            let process = self.nodes[*node].process.as_ref().expect("it lives");
            for shard in &process.shards {
                let used = shard.map_cost().1 + shard.retained_blocks();
                let free = u64::from(shard.free_blocks());
                assert!(
                    free + used == data_blocks || !shard.is_idle(),
                    "{free} free, {used} used, of {data_blocks}"
                );
                let known = self.images.free_blocks(*node, shard.id(), base);
                assert!(
                    shard.free_blocks() == known || !shard.is_idle(),
                    "node {node}: {free} blocks are free, {known} are not used from the base {base} on"
                );
            }
        }
        let Some(primary) = alive.iter().copied().find(|node| self.is_serving(*node)) else {
            return;
        };
        let ours = self.look(primary);
        let image = image_of(&self.nodes[primary].disk, &ours.shards);
        let is_known = self.model.check(&image, &ours.coordinator.catalog, self.model.flushed);
        assert!(is_known, "the last image shows dropped writes");
        if alive.len() < 2 || self.is_pair_broken {
            return;
        }
        let theirs = self.look(1 - primary);
        assert_eq!(
            ours.coordinator.committed, theirs.coordinator.committed,
            "the sides are in step"
        );
        for (one, other) in ours.shards.iter().zip(&theirs.shards) {
            assert_eq!(one.map.segment_keys(), other.map.segment_keys(), "maps differ");
            for key in one.map.segment_keys() {
                let segment = |image: &twinpoint_core::shard::ShardImage| {
                    image
                        .map
                        .segment(key.volume, key.segment)
                        .expect("it was listed")
                        .iter()
                        .collect::<Vec<_>>()
                };
                assert_eq!(segment(one), segment(other), "maps differ in {key:?}");
            }
        }
        assert_eq!(image, image_of(&self.nodes[1 - primary].disk, &theirs.shards), "blocks differ");
    }

    /// A clean stop leaves a clean store with nothing to repair.
    fn stop(&mut self) {
        if self.is_pair_broken {
            return;
        }
        let nodes = if self.options.paired { 2 } else { 1 };
        let alive: Vec<usize> = (0..nodes).filter(|node| self.is_alive(*node)).collect();
        let order: Vec<usize> = {
            let (mut first, second): (Vec<usize>, Vec<usize>) =
                alive.iter().partition(|node| self.nodes[**node].role == Role::Primary);
            first.extend(second);
            first
        };
        for node in order {
            self.ask(node, TicketUse::Stop, Command::Stop);
            let deadline = self.now + STOP_NS;
            let stopped = self.run_until(deadline, |world| world.process(node).is_stopped);
            assert!(stopped, "node {node} does not stop");
            let free: Vec<u32> =
                self.process(node).shards.iter().map(|shard| shard.free_blocks()).collect();
            let left = self.look(node);
            assert!(left.coordinator.superblock.clean, "a stopped store is clean");
            assert!(left.repairs.is_empty(), "a stopped store needs repairs: {:?}", left.repairs);
            let found: Vec<u32> =
                left.shards.iter().map(|shard| shard.free.free_blocks()).collect();
            assert_eq!(free, found, "a start finds other free blocks than the stop left");
        }
    }

    fn look(&self, node: usize) -> Recovered {
        let found = recover(&mut DiskSource(&self.nodes[node].disk), None);
        found.unwrap_or_else(|error| panic!("node {node} cannot be opened: {error}"))
    }
}
