//! Lives and deaths: nodes start, are killed, lose power, are promoted; what a start finds is checked.
//!
//! Invariants: the image that a primary starts from becomes what the model expects; once a store is promoted no client
//! speaks with the old primary any more.

mod damage;

use std::collections::{BTreeMap, BTreeSet};

use twinpoint_core::contract::{Command, Refusal, Reply};
use twinpoint_core::coordinator::{Coordinator, Replication};
use twinpoint_core::message::Role;
use twinpoint_core::recovery::{Recovered, RecoveryError, recover};
use twinpoint_core::request::volume_block;
use twinpoint_core::shard::{Shard, ShardImage};
use twinpoint_core::units::CpNumber;

use crate::buffers::Buffers;
use crate::clients::{Kind, blocks_of};
use crate::content::checksum;
use crate::disk::{Disk, DiskSource};
use crate::faults::Fault;
use crate::model::Image;
use crate::node::{Gate, Process};
use crate::wire::TicketUse;
use crate::world::{Event, World};

impl World {
    /// A process starts: recovery, repairs, checks, and on with it.
    pub fn start_node(&mut self, node: usize, ceiling: Option<CpNumber>) {
        if self.is_alive(node) || self.lost_node == Some(node) {
            return;
        }
        if self.start_unreadable(node, ceiling) {
            return;
        }
        self.damage_copies(node, ceiling);
        // What is read now is durable before a repair calls it committed.
        self.nodes[node].disk.flush_now();
        let mut recovered = match recover(&mut DiskSource(&self.nodes[node].disk), ceiling) {
            Ok(recovered) => recovered,
            Err(RecoveryError::BeforeCheckpoint(cp) | RecoveryError::BeforeBase(cp, _))
                if ceiling.is_some() =>
            {
                self.note(|| format!("node {node} cannot go back to CP {cp}"));
                assert!(
                    !self.nodes[node].keeps_base,
                    "node {node} cannot go back to CP {cp}, its base"
                );
                self.counts.broken_pairs += u64::from(!self.is_pair_broken);
                self.is_pair_broken = true;
                return;
            }
            Err(error) => panic!("node {node} cannot be opened: {error} ({error:?})"),
        };
        if !recovered.repairs.is_empty()
            && !self.is_calm
            && self.options.power_cuts
            && self.occasion(Fault::CrashInRepair, 60)
        {
            recovered = self.crash_while_repairing(node, &recovered);
        }
        let disk = &mut self.nodes[node].disk;
        for repair in &recovered.repairs {
            disk.write_now(repair.block.0, &repair.bytes);
            disk.flush_now();
        }
        if recovered.coordinator.superblock.deposed_by.is_some() {
            self.nodes[node].role = Role::Secondary;
        }
        let role = self.role_at_start(node, &recovered);
        self.note(|| {
            let image = &recovered.coordinator;
            format!(
                "node {node} starts as {role:?} at CP {} (base {})",
                image.committed, image.base
            )
        });
        self.nodes[node].disk.flush_now();
        let (last, base) = (recovered.coordinator.committed, recovered.coordinator.base);
        self.images.opened(node, last, base, &recovered.shards);
        self.look_at_superblock(node);
        self.check_roots(&recovered.shards);
        self.check_started(node, &recovered);
        self.probe_damage(node, &recovered);
        self.nodes[node].life += 1;
        self.nodes[node].process = Some(self.new_process(node, role, recovered));
        self.drain_coordinator(node);
    }

    /// What the operator starts a node as: an old primary that does not know of its deposition may be started as one.
    fn role_at_start(&mut self, node: usize, recovered: &Recovered) -> Role {
        let returns = std::mem::take(&mut self.nodes[node].returns_as_primary);
        let superblock = &recovered.coordinator.superblock;
        let may_lead = superblock.deposed_by.is_none() && !superblock.secondary;
        if !returns || !may_lead || self.is_calm || self.nodes[node].role == Role::Primary {
            return self.nodes[node].role;
        }
        self.soon(5_000_000, Event::StaleWork(node));
        Role::Primary
    }

    /// A deposed primary that has not heard of it makes a CP of its own.
    pub fn stale_work(&mut self, node: usize) {
        // Two primaries of one and the same term can be told apart by their roots only: no history says who is right.
        let is_stale = self.newest_term.0 > 1
            && self.is_alive(node)
            && self.nodes[node].role == Role::Secondary
            && self.is_primary(node)
            && self.process(node).leads();
        if is_stale {
            let now = self.clock(node);
            let knows = self.process(node).coordinator.status(now).peer == "deposed";
            self.ask(node, TicketUse::StaleCheckpoint { knows }, Command::Checkpoint(None));
        }
    }

    /// A CP of a deposed primary is never said to be on both sides, nor made by one that knows.
    pub fn stale_checkpoint(&mut self, node: usize, knows: bool, reply: &Reply) {
        let Reply::Checkpoint(cp, _) = reply else { return };
        self.counts.stale_points += 1;
        assert!(!knows, "node {node} made CP {cp} though it knows that it is deposed");
        let last = self.newest_term.1;
        assert!(
            self.nodes[node].role == Role::Primary || *cp <= last || !self.promises_remote(node),
            "deposed node {node} says that CP {cp}, after {last}, is on both sides"
        );
    }

    /// The operator's dropping of a branch was answered.
    pub fn branch_dropped(&mut self, node: usize, reply: &Reply) {
        match reply {
            Reply::BranchDropped(_) => self.counts.branches += 1,
            Reply::Refused(refusal @ Refusal::BranchHasNoBase { .. }) => {
                self.pair_broke(node, refusal);
            }
            Reply::Refused(
                Refusal::NoSuchBranch
                | Refusal::NotSecondary
                | Refusal::SessionEnding
                | Refusal::StoreFailed
                | Refusal::Stopping,
            ) => {}
            other => panic!("the dropping of a branch was answered {other:?}"),
        }
    }

    /// A process dies, or the host's power fails.
    pub fn kill(&mut self, node: usize, power_cut: bool) {
        if !self.is_alive(node) {
            return;
        }
        self.note(|| format!("node {node} dies, power cut: {power_cut}"));
        let serves = self.is_serving(node);
        self.counts.crashes += 1;
        self.nodes[node].process = None;
        self.nodes[node].life += 1;
        self.nodes[node].is_paused = false;
        self.nodes[node].held.clear();
        if power_cut {
            self.nodes[node].disk.power_cut(&mut self.random);
        } else {
            self.nodes[node].disk.kill(&mut self.random);
        }
        if !serves && self.options.coordinator.replication == Replication::SemiSync {
            // What was only in the secondary's memory is gone.
            self.model.flushed_remote = 0;
        }
        let is_told = !power_cut || !self.occasion(Fault::HalfOpen, 50);
        self.drop_side(node, is_told);
        self.drop_operations(node);
    }

    /// The secondary's machine is lost for good, if a primary serves beside it.
    pub fn lose_secondary(&mut self) {
        if self.lost_node.is_some() {
            return;
        }
        let Some(primary) = (0..2).find(|node| self.is_serving(*node)) else { return };
        self.note(|| format!("node {} is lost for good", 1 - primary));
        self.counts.lost_nodes += 1;
        self.lost_node = Some(1 - primary);
        self.kill(1 - primary, true);
    }

    /// A node died, or another serves: its clients hear nothing any more.
    pub fn drop_operations(&mut self, node: usize) {
        let dropped: Vec<u64> = self
            .operations
            .iter()
            .filter(|(_, operation)| operation.node == node)
            .map(|(tag, _)| *tag)
            .collect();
        for tag in dropped {
            let operation = self.operations.remove(&tag).expect("it was listed");
            if let (Kind::Read { range, buffer, .. }, Some(process)) =
                (&operation.kind, &mut self.nodes[node].process)
            {
                process.left_reads.insert(tag, (*buffer, blocks_of(*range)));
            }
            self.clients[operation.client].waits_for = None;
            self.soon(1_000_000, Event::Client(operation.client));
        }
    }

    /// The operator promotes a secondary whose primary is dead.
    pub fn promote(&mut self, node: usize, force: bool) {
        let may = force || !self.is_alive(1 - node);
        let is_fit = self.is_alive(node)
            && may
            && !self.nodes[node].is_outdated
            && !self.process(node).has_failed;
        // Once all is to be mended, only a pair without a primary gets one.
        let is_wanted = !self.is_calm || self.nodes[1 - node].role == Role::Secondary;
        if is_fit && is_wanted && !self.is_primary(node) {
            self.process(node).is_promoting = true;
            self.ask(node, TicketUse::Promote, Command::Promote { force });
        }
        if self.nodes.iter().all(|node| node.role == Role::Secondary) {
            self.soon(50_000_000, Event::Promote(node, force));
        }
    }

    pub fn promote_replied(&mut self, node: usize, reply: Reply) {
        self.process(node).is_promoting = false;
        let last = match reply {
            Reply::Promoted(term, last, _) => {
                self.newest_term = (term.0, last);
                last
            }
            Reply::Refused(
                Refusal::PrimaryConnected
                | Refusal::SessionEnding
                | Refusal::StoreFailed
                | Refusal::Stopping,
            ) => return,
            other => panic!("a promotion was answered {other:?}"),
        };
        self.counts.promotions += 1;
        if self.is_alive(1 - node) && self.random.chance(50) {
            // The old primary lives on; its clients have left, and it has yet to hear that it is deposed.
            self.drop_operations(1 - node);
            if self.faults.has(Fault::StalePrimary) {
                self.soon(1_000_000, Event::StaleWork(1 - node));
            }
        } else {
            self.kill(1 - node, true);
            self.soon(400_000_000, Event::Start(1 - node, None));
        }
        self.nodes[1 - node].role = Role::Secondary;
        self.nodes[node].role = Role::Primary;
        let recovered =
            recover(&mut DiskSource(&self.nodes[node].disk), Some(last)).expect("it is promoted");
        assert_eq!(recovered.coordinator.committed, last, "the promoted store is at its last CP");
        let image = image_of(&self.nodes[node].disk, &recovered.shards);
        self.counts.images += 1;
        let promised = self.model.flushed_remote;
        self.model.check(&image, &recovered.coordinator.catalog, promised);
        self.model.adopt(&image, &recovered.coordinator.catalog, false);
        self.model.flushed = self.model.flushed_remote;
        // CPs of the promoted node may themselves be others than those of the same numbers on the old primary.
        let common = self.nodes[node].disowned_after.take().map_or(last, |known| known.min(last));
        self.disown(1 - node, common);
        self.nodes[1 - node].is_outdated = true;
    }

    /// What a node has after `last` is no longer part of the history.
    fn disown(&mut self, node: usize, last: CpNumber) {
        let disowned = &mut self.nodes[node].disowned_after;
        *disowned = Some(disowned.map_or(last, |known| known.min(last)));
    }

    /// Both sides are primaries of one term: the operator looks, and starts the one that should not be as a secondary.
    pub fn both_lead(&mut self) {
        for node in 0..2 {
            let should_follow = self.nodes[node].role == Role::Secondary && self.is_alive(node);
            if should_follow && self.is_primary(node) && !self.process(node).is_promoting {
                self.deposed(node);
            }
        }
    }

    /// A primary learns that it is none any more: the operator starts it again as a secondary.
    pub fn deposed(&mut self, node: usize) {
        let now = self.clock(node);
        let status = self.process(node).coordinator.status(now);
        let offers = self.process(node).serves;
        assert!(
            status.peer != "deposed" || (status.failed && !offers),
            "node {node} knows that it is deposed, and goes on"
        );
        self.nodes[node].role = Role::Secondary;
        self.kill(node, false);
        self.soon(1_000_000, Event::Start(node, None));
        // The other one's promotion was cut short after its store knew of it: the operator promotes it again.
        self.soon(20_000_000, Event::Promote(1 - node, true));
    }

    /// Nobody can mend the pair: its primary has given the base up, and said so.
    pub fn pair_broke(&mut self, primary: usize, refusal: &Refusal) {
        let keeps_base = self.nodes[primary].keeps_base;
        assert!(!keeps_base, "node {primary} gave its base up without a word: {refusal:?}");
        self.note(|| format!("the pair is broken: {refusal:?}"));
        self.counts.broken_pairs += u64::from(!self.is_pair_broken);
        self.is_pair_broken = true;
    }

    /// Whether a flush answered now by a node is also kept by the other one.
    pub fn promises_remote(&mut self, node: usize) -> bool {
        let now = self.clock(node);
        let says_so = self.process(node).coordinator.status(now).alone_since.is_some();
        // And would say so again after a power cut.
        let is_alone = says_so && self.nodes[node].is_alone;
        self.options.paired
            && !is_alone
            && self.options.coordinator.replication != Replication::Async
    }

    /// Whether a secondary had a CP in its memory, said so, and has died since: a semi-synchronous answer may still come.
    pub fn forgot(&mut self, secondary: usize, cp: CpNumber) -> bool {
        let now = self.clock(secondary);
        let process = self.nodes[secondary].process.as_ref();
        self.options.coordinator.replication == Replication::SemiSync
            && process.is_none_or(|process| process.coordinator.status(now).received < cp)
    }

    /// Checks a store's whole contents against the model, and the roots against those that were sealed.
    fn check_started(&mut self, node: usize, recovered: &Recovered) {
        let catalog = &recovered.coordinator.catalog;
        let image = image_of(&self.nodes[node].disk, &recovered.shards);
        self.counts.images += 1;
        if self.nodes[node].role == Role::Primary {
            let is_known = self.model.check(&image, catalog, self.model.flushed);
            assert!(is_known, "a primary shows writes that its last crash dropped");
            self.model.adopt(&image, catalog, true);
            self.disown(1 - node, recovered.coordinator.committed);
        } else if self.nodes[node]
            .disowned_after
            .is_none_or(|last| recovered.coordinator.committed <= last)
        {
            let promised = self.promised_by_secondary();
            self.model.check(&image, catalog, promised);
        }
    }

    /// Up to when a flush was sent that a secondary's store must hold.
    fn promised_by_secondary(&self) -> u64 {
        let keeps =
            self.options.coordinator.replication == Replication::Sync && !self.is_pair_broken;
        if keeps { self.model.flushed_remote } else { 0 }
    }

    fn check_roots(&mut self, shards: &[ShardImage]) {
        for image in shards.iter().filter(|image| image.last > CpNumber(0)) {
            let root = image.map.root().0.wrapping_add(image.catalog_root);
            let sealed = self.sealed_roots.get(&(image.id, image.last));
            let is_known = sealed.is_some_and(|roots| roots.iter().any(|sealed| sealed.0 == root));
            assert!(is_known, "shard {} was never sealed like this at CP {}", image.id, image.last);
        }
    }

    /// Power fails while repairs are written: what is found next must still be good.
    fn crash_while_repairing(&mut self, node: usize, recovered: &Recovered) -> Recovered {
        let count = self.random.below(recovered.repairs.len() as u64 + 1) as usize;
        let disk = &mut self.nodes[node].disk;
        for (index, repair) in recovered.repairs.iter().take(count).enumerate() {
            disk.write_now(repair.block.0, &repair.bytes);
            if index + 1 < count {
                disk.flush_now();
            }
        }
        disk.power_cut(&mut self.random);
        self.note(|| format!("node {node}: power failed after {count} repairs"));
        let again = recover(&mut DiskSource(&self.nodes[node].disk), None);
        again.unwrap_or_else(|error| {
            panic!("node {node} cannot be opened after repairs: {error} ({error:?})")
        })
    }

    fn new_process(&mut self, node: usize, role: Role, recovered: Recovered) -> Process {
        let now = self.clock(node);
        let options = &self.options;
        let image = &recovered.coordinator;
        let (term, committed, base) = (image.superblock.term, image.committed, image.base);
        let shards = recovered
            .shards
            .into_iter()
            .map(|image| Shard::new(image, term, committed, base))
            .collect();
        let lent = options.lent_blocks as usize * usize::from(options.geometry.shards);
        let catalog = image.catalog.clone();
        let mut settings = options.coordinator.clone();
        settings.paired = options.paired;
        Process {
            shards,
            coordinator: Coordinator::new(recovered.coordinator, role, settings, now),
            buffers: Buffers::new(options.frontend_buffers, options.reserve_buffers, lent),
            gate: Gate::default(),
            catalog,
            serves: false,
            holds: false,
            is_stopped: false,
            is_promoting: false,
            is_failing: false,
            fails_at_flush: false,
            has_failed: false,
            reads_fail: 0,
            has_read_failure: false,
            sticks: false,
            is_stuck: false,
            actions_left: None,
            dies_by_power: false,
            operations: BTreeMap::new(),
            posts: BTreeSet::new(),
            arrivals: BTreeMap::new(),
            tick_at: None,
            left_reads: BTreeMap::new(),
            ahead: BTreeMap::new(),
        }
    }
}

/// All mapped blocks of a store; each must match its checksum.
pub(crate) fn image_of(disk: &Disk, shards: &[ShardImage]) -> Image {
    let mut image = Image::new();
    for shard in shards {
        for key in shard.map.segment_keys() {
            let segment = shard.map.segment(key.volume, key.segment).expect("it was listed");
            for (local, slot) in segment.iter() {
                let place = shard.geometry.data_block(shard.id, slot.block);
                let bytes = disk.sound_block(place.0);
                let block = volume_block(key.volume, shard.id, local, shard.geometry.shards);
                assert!(
                    checksum(&bytes[..]) == slot.checksum,
                    "volume {} block {block} at {place} does not match its checksum",
                    key.volume
                );
                image.insert((key.volume.0, block.0), bytes);
            }
        }
    }
    image
}
