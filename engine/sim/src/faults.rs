//! What goes wrong, and who mends it: kills, power cuts, lost connections, a network that is down, failed devices,
//! promotions.
//!
//! Invariant: whoever is killed is started again later; a fault leaves the rest to the two nodes.

use twinpoint_core::message::Role;

use crate::world::{Event, World};

impl World {
    /// Something goes wrong.
    pub fn fault(&mut self) {
        if self.is_calm || self.faults_left == 0 {
            return;
        }
        self.faults_left -= 1;
        let next_ns = self.random.pick(&[1_000_000, 20_000_000, 200_000_000]);
        self.soon(next_ns, Event::Fault);
        let power_cut = self.options.power_cuts && self.random.chance(60);
        let primary = if self.nodes[0].role == Role::Primary { 0 } else { 1 };
        if !self.options.paired {
            self.kill_for_a_while(primary, power_cut);
            return;
        }
        match self.random.below(12) {
            0..=1 => self.kill_for_a_while(primary, power_cut),
            2..=3 => self.kill_for_a_while(1 - primary, power_cut),
            4 => {
                self.kill_for_a_while(primary, power_cut);
                self.kill_for_a_while(1 - primary, power_cut);
            }
            5..=6 => self.lose_connection(),
            7 => {
                self.network_is_up = false;
                self.lose_connection();
                let down_ns = self.random.pick(&[2_000_000, 30_000_000, 300_000_000]);
                self.soon(down_ns, Event::NetworkBack);
            }
            8 => self.fail_device(power_cut),
            _ if self.options.promotions && self.is_alive(1 - primary) => {
                self.change_over(primary, power_cut)
            }
            _ => self.lose_connection(),
        }
    }

    pub fn kill_for_a_while(&mut self, node: usize, power_cut: bool) {
        let failed = self.nodes[node].process.as_ref().is_some_and(|process| process.has_failed);
        if !self.is_alive(node) || (self.is_calm && !failed) {
            return;
        }
        self.kill(node, power_cut);
        let dead_ns = self.random.pick(&[100_000, 5_000_000, 50_000_000, 300_000_000]);
        self.soon(dead_ns, Event::Start(node, None));
    }

    fn lose_connection(&mut self) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            let first = self.random.below(2) as usize;
            if self.is_alive(first) {
                self.break_connection(id, first, "the network failed");
            }
        }
    }

    /// A device fails a write or a flush; later the process is started again on a mended device.
    fn fail_device(&mut self, power_cut: bool) {
        let node = self.random.below(2) as usize;
        if let Some(process) = &mut self.nodes[node].process {
            process.is_failing = true;
            self.soon(100_000_000, Event::Kill(node, power_cut));
        }
    }

    /// The primary dies for long, or is to be replaced; the operator promotes the other one.
    fn change_over(&mut self, primary: usize, power_cut: bool) {
        if self.random.chance(40) {
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
