//! What must hold once nothing fails any more: all is answered, both sides are equal, a stopped store is clean.
//!
//! Invariant: looking changes nothing. The terminal refusal: a primary that carried on alone and ran out of space gave
//! its base up, said so, and its peer has to be copied anew; then only the primary has to be whole.

use twinpoint_core::contract::Command;
use twinpoint_core::coordinator::OnPeerLoss;
use twinpoint_core::message::Role;
use twinpoint_core::recovery::{Recovered, recover};
use twinpoint_core::units::Instant;

use crate::disk::DiskSource;
use crate::lifecycle::image_of;
use crate::wire::TicketUse;
use crate::world::World;

impl World {
    /// How many nodes the history has.
    pub fn nodes_used(&self) -> usize {
        if self.options.paired { 2 } else { 1 }
    }

    /// Nobody can mend the pair, and the operator wanted the primary to wait for it.
    pub fn is_stuck(&self) -> bool {
        self.is_pair_broken && self.options.coordinator.on_peer_loss == OnPeerLoss::Stall
    }

    /// The pair will not be in step again.
    pub fn is_pair_over(&self) -> bool {
        self.is_pair_broken || self.lost_node.is_some()
    }

    pub fn is_settled(&mut self) -> bool {
        self.why_unsettled().is_empty()
    }

    /// What is still to come; empty if nothing.
    pub fn why_unsettled(&mut self) -> String {
        if !self.operations.is_empty() {
            return format!("unanswered: {:?}", self.operations);
        }
        let nodes = self.nodes_used();
        let Some(primary) = (0..nodes).find(|node| self.is_serving(*node)) else {
            return "nobody serves".to_owned();
        };
        let now = Instant(self.now);
        let ours = self.process(primary).coordinator.status(now);
        if !self.process(primary).gate.is_open_empty() || ours.committed.next() != ours.open {
            return format!("not committed: {ours:?}");
        }
        if ours.claimed < ours.base {
            return format!("space waits for a claim: {ours:?}");
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
        if !self.options.paired || self.is_pair_over() {
            return String::new();
        }
        if !self.is_alive(1 - primary) {
            return "the secondary is dead".to_owned();
        }
        let theirs = self.process(1 - primary).coordinator.status(now);
        if theirs.claimed < theirs.base {
            return format!("space waits for a claim: {theirs:?}");
        }
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
    pub fn check_equal(&mut self) {
        let nodes = self.nodes_used();
        let alive: Vec<usize> = (0..nodes).filter(|node| self.is_alive(*node)).collect();
        for node in &alive {
            let data_blocks = u64::from(self.options.geometry.data_blocks());
            let now = Instant(self.now);
            let status = self.process(*node).coordinator.status(now);
            let floor = status.base.min(status.claimed);
            let process = self.nodes[*node].process.as_ref().expect("it lives");
            for shard in &process.shards {
                let used = shard.map_cost().1 + shard.retained_blocks();
                let free = u64::from(shard.free_blocks());
                assert!(
                    free + used == data_blocks || !shard.is_idle(),
                    "{free} free, {used} used, of {data_blocks}"
                );
                let known = self.images.free_blocks(*node, shard.id(), floor);
                assert!(
                    shard.free_blocks() == known || !shard.is_idle(),
                    "node {node}: {free} blocks are free, {known} are not used from CP {floor} on"
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

    /// Living nodes, the primary first: it commits what is staged while its peer still listens.
    pub fn stop_order(&self) -> Vec<usize> {
        let alive = (0..self.nodes_used()).filter(|node| self.is_alive(*node));
        let (mut first, second): (Vec<usize>, Vec<usize>) =
            alive.partition(|node| self.nodes[*node].role == Role::Primary);
        first.extend(second);
        first
    }

    /// The operator stops a node.
    pub fn ask_stop(&mut self, node: usize) {
        self.ask(node, TicketUse::Stop, Command::Stop);
    }

    /// A stopped store is clean, has nothing to repair, and is found as it was left.
    pub fn check_stopped(&mut self, node: usize) {
        let left = self.look(node);
        assert!(left.coordinator.superblock.clean, "a stopped store is clean");
        assert!(left.repairs.is_empty(), "a stopped store needs repairs: {:?}", left.repairs);
        // All that the base allows: the superblock of the stop calls the last CP committed.
        for shard in &left.shards {
            let unused = self.images.free_blocks(node, shard.id, left.coordinator.base);
            assert_eq!(shard.free.free_blocks(), unused, "a start after a stop finds free blocks");
        }
    }

    fn look(&self, node: usize) -> Recovered {
        let found = recover(&mut DiskSource(&self.nodes[node].disk), None);
        found.unwrap_or_else(|error| panic!("node {node} cannot be opened: {error}"))
    }
}
