//! What goes wrong, and who mends it: kills, pauses, networks, devices, promotions.
//!
//! ```text
//!   Event::Fault -> strike(kind) -> a node, its disk, or the wire -> Event::Mend, Event::Start
//! ```
//!
//! Invariants: whoever is killed is started again later, and what breaks is mended later, at the latest when the calm
//! begins; a fault leaves the rest to the two nodes.

mod kinds;
mod network;

use twinpoint_core::message::Role;

pub use kinds::{Fault, FaultCounts, Faults};
pub(crate) use network::Corruption;

use crate::world::{Event, NodeEvent, World};

/// What stops being broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mend {
    /// The network of both.
    Network,
    /// What a node sends arrives again.
    Cut(usize),
    /// The wire is as fast as before.
    Wire,
    /// A node handles events again.
    Pause(usize),
    /// A node's device is as fast as before.
    Disk(usize),
    /// What rotted on a node's device was brought back.
    Rot(usize),
}

impl World {
    /// Something goes wrong.
    pub fn fault(&mut self) {
        if self.is_calm || self.faults_left == 0 {
            return;
        }
        self.faults_left -= 1;
        let next_ns = self.random.pick(&[1_000_000, 20_000_000, 200_000_000]);
        self.soon(next_ns, Event::Fault);
        let fits =
            |fault: &Fault| fault.strikes() && (self.options.paired || fault.strikes_alone());
        let weighted = |fault: Fault| std::iter::repeat_n(fault, fault.weight());
        let kinds: Vec<Fault> = self.faults.kinds().filter(fits).flat_map(weighted).collect();
        if !kinds.is_empty() {
            let fault = self.random.pick(&kinds);
            self.strike(fault);
        }
    }

    fn strike(&mut self, fault: Fault) {
        let power_cut = self.options.power_cuts && self.random.chance(60);
        let primary = if self.nodes[0].role == Role::Primary { 0 } else { 1 };
        let either = if self.options.paired { self.random.below(2) as usize } else { primary };
        self.note(|| format!("fault: {}", fault.name()));
        self.counts.faults.add(fault);
        match fault {
            Fault::KillPrimary => self.kill_for_a_while(primary, power_cut),
            Fault::KillSecondary => self.kill_for_a_while(1 - primary, power_cut),
            Fault::KillBoth => {
                self.kill_for_a_while(primary, power_cut);
                self.kill_for_a_while(1 - primary, power_cut);
            }
            Fault::KillAtAction => self.kill_at_action(either, power_cut),
            Fault::Pause => self.pause(either),
            Fault::ClockJump => self.jump_clock(either),
            Fault::Promotion => {
                if self.options.promotions && self.is_alive(1 - primary) {
                    self.change_over(primary, power_cut);
                }
            }
            Fault::FailWrite => self.fail_device(either, power_cut),
            Fault::FailRead => self.fail_reads(either),
            Fault::SlowDisk => {
                self.nodes[either].is_slow = true;
                self.mend_later(Mend::Disk(either));
            }
            Fault::StuckDisk => {
                if let Some(process) = &mut self.nodes[either].process {
                    process.sticks = true;
                }
            }
            Fault::RotData => self.rot_data(either),
            _ => self.strike_network(fault),
        }
    }

    /// Counts a fault that has its own occasion, if the history has it and chance wants it.
    pub fn occasion(&mut self, fault: Fault, percent: u64) -> bool {
        let strikes = !self.is_calm && self.faults.has(fault) && self.random.chance(percent);
        if strikes {
            self.counts.faults.add(fault);
        }
        strikes
    }

    pub fn kill_for_a_while(&mut self, node: usize, power_cut: bool) {
        let must_die =
            self.nodes[node].process.as_ref().is_some_and(|p| p.has_failed || p.is_stuck);
        if !self.is_alive(node) || (self.is_calm && !must_die) {
            return;
        }
        self.kill(node, power_cut);
        let dead_ns = self.random.pick(&[100_000, 5_000_000, 50_000_000, 300_000_000]);
        self.soon(dead_ns, Event::Start(node, None));
    }

    /// Something is mended after a while.
    pub fn mend_later(&mut self, what: Mend) {
        let broken_ns = self.random.pick(&[2_000_000, 30_000_000, 300_000_000]);
        self.soon(broken_ns, Event::Mend(what));
    }

    pub fn mend(&mut self, what: Mend) {
        match what {
            Mend::Network => self.network_is_up = true,
            Mend::Cut(node) => self.heal_cut(node),
            Mend::Wire => self.wire_is_slow = false,
            Mend::Pause(node) => self.resume(node),
            Mend::Disk(node) => self.nodes[node].is_slow = false,
            Mend::Rot(node) => self.nodes[node].disk.heal(),
        }
    }

    /// The calm begins: nothing is broken any more.
    pub fn mend_all(&mut self) {
        self.is_mended = true;
        self.corruption = None;
        for what in [Mend::Network, Mend::Wire] {
            self.mend(what);
        }
        for node in 0..2 {
            for what in [Mend::Cut(node), Mend::Disk(node), Mend::Rot(node), Mend::Pause(node)] {
                self.mend(what);
            }
            let Some(process) = &mut self.nodes[node].process else { continue };
            process.sticks = false;
            process.reads_fail = 0;
            process.actions_left = process.actions_left.filter(|left| *left == 0);
            if process.is_stuck {
                self.soon(100_000, Event::Kill(node, false));
            }
        }
    }

    /// The process dies after some more of its actions; the rest of them never happen.
    fn kill_at_action(&mut self, node: usize, power_cut: bool) {
        let actions = self.random.pick(&[3, 30, 300]);
        let actions = self.random.between(1, actions);
        if let Some(process) = &mut self.nodes[node].process {
            process.actions_left = Some(actions);
            process.dies_by_power = power_cut;
        }
    }

    /// Whether a process lives and none of its actions was kept from happening: else it handles nothing any more.
    pub fn is_well(&self, node: usize) -> bool {
        let process = self.nodes[node].process.as_ref();
        process.is_some_and(|process| process.actions_left != Some(0))
    }

    /// Whether an action of a process still happens.
    pub fn action_happens(&mut self, node: usize) -> bool {
        let life = self.nodes[node].life;
        let process = self.process(node);
        let Some(left) = process.actions_left else { return true };
        if left == 1 {
            let power_cut = process.dies_by_power;
            self.at(self.now, Event::Die(node, life, power_cut));
        }
        self.process(node).actions_left = Some(left.saturating_sub(1));
        left > 1
    }

    /// A process reaches the action at which it dies.
    pub fn die(&mut self, node: usize, life: u64, power_cut: bool) {
        if self.nodes[node].life == life && self.is_alive(node) {
            self.kill(node, power_cut);
            self.soon(5_000_000, Event::Start(node, None));
        }
    }

    fn pause(&mut self, node: usize) {
        if self.is_alive(node) {
            self.nodes[node].is_paused = true;
            self.mend_later(Mend::Pause(node));
        }
    }

    /// A node goes on with all that came meanwhile.
    fn resume(&mut self, node: usize) {
        self.nodes[node].is_paused = false;
        while let Some(event) = self.nodes[node].held.pop_front() {
            self.reach(event);
        }
    }

    fn jump_clock(&mut self, node: usize) {
        let jump_ns = self.random.pick(&[1_000_000, 60_000_000, 3_600_000_000_000]);
        self.nodes[node].clock_ahead_ns += jump_ns;
        let life = self.nodes[node].life;
        if let Some(process) = &mut self.nodes[node].process {
            process.tick_at = Some(self.now);
            self.at(self.now, Event::Node(node, life, NodeEvent::Tick));
        }
    }

    /// A device fails a write or a flush; later the process is started again on a mended device.
    fn fail_device(&mut self, node: usize, power_cut: bool) {
        // Most of what a device is asked are writes: by chance alone a failure hardly ever meets a flush.
        let fails_at_flush = self.faults.has(Fault::FlushLoses) && self.random.chance(50);
        if let Some(process) = &mut self.nodes[node].process {
            process.is_failing = true;
            process.fails_at_flush = fails_at_flush;
            self.soon(100_000_000, Event::Kill(node, power_cut));
        }
    }

    fn fail_reads(&mut self, node: usize) {
        let reads = self.random.between(1, 5);
        if let Some(process) = &mut self.nodes[node].process {
            process.reads_fail = reads;
        }
    }

    /// Data blocks that a record calls committed go bad. What else may rot is found bad at a start: `damage.rs`.
    fn rot_data(&mut self, node: usize) {
        let blocks = self.images.claimed_blocks(node, &self.options.geometry);
        if blocks.is_empty() {
            return;
        }
        for _ in 0..self.random.between(1, 4) {
            let block = self.random.pick(&blocks).0;
            if self.nodes[node].disk.is_quiet(block) {
                let bad = self.bad_block(node, block);
                self.nodes[node].disk.rot(block, bad);
            }
        }
        self.mend_later(Mend::Rot(node));
    }

    /// The primary dies for long, or is to be replaced; the operator promotes the other one.
    fn change_over(&mut self, primary: usize, power_cut: bool) {
        self.nodes[primary].returns_as_primary = self.occasion(Fault::StalePrimary, 60);
        if self.random.chance(40) {
            // At the worst moment: the old primary sleeps, or cannot be reached.
            if self.occasion(Fault::Pause, 40) {
                self.pause(primary);
            }
            if self.occasion(Fault::CutBothWays, 40) {
                self.cut_both_ways();
            }
            self.soon(1_000_000, Event::Promote(1 - primary, true));
            self.soon(400_000_000, Event::Start(primary, None));
            return;
        }
        self.kill(primary, power_cut);
        let force = self.random.chance(30);
        self.soon(20_000_000, Event::Promote(1 - primary, force));
        self.soon(400_000_000, Event::Start(primary, None));
    }
}
