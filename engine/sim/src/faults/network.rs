//! What goes wrong between the nodes. A cut holds what is sent, as a transport that sends it again and again does, and
//! delivers it late; a silent connection delivers nothing more and tells nobody.
//!
//! Invariant: bytes of a connection reach only that connection's sides, however late.

use twinpoint_core::contract::LaneFault;
use twinpoint_core::units::ShardId;

use super::{Fault, Mend};
use crate::wire::WireEvent;
use crate::world::{Event, World};

/// What happens to a message on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Corruption {
    /// The transport's own checks fail.
    Frame,
    /// A placed block changes after them.
    Block,
}

impl World {
    pub(super) fn strike_network(&mut self, fault: Fault) {
        match fault {
            Fault::LoseConnection => self.lose_connection(),
            Fault::NetworkDown => {
                self.network_is_up = false;
                self.lose_connection();
                self.mend_later(Mend::Network);
            }
            Fault::CutOneWay => {
                let node = self.random.below(2) as usize;
                self.cut(node);
            }
            Fault::CutBothWays => self.cut_both_ways(),
            Fault::SilentConnection => self.silence_connection(),
            Fault::CorruptFrame => self.corruption = Some(Corruption::Frame),
            Fault::CorruptBlock => self.corruption = Some(Corruption::Block),
            Fault::SlowWire => {
                self.wire_is_slow = true;
                self.mend_later(Mend::Wire);
            }
            other => panic!("{other:?} is no fault of the network"),
        }
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

    pub(super) fn cut_both_ways(&mut self) {
        self.cut(0);
        self.cut(1);
    }

    fn cut(&mut self, node: usize) {
        self.is_cut[node] = true;
        self.mend_later(Mend::Cut(node));
    }

    /// What was held on its way arrives now, in order, and before all that comes later.
    pub(super) fn heal_cut(&mut self, node: usize) {
        self.is_cut[node] = false;
        for (id, event) in std::mem::take(&mut self.held_on_wire[node]) {
            let event = Event::Wire(id, event);
            self.note(|| format!("{event:?}"));
            self.happen(event);
        }
    }

    /// For good: what was swallowed is never sent again, so a side that spoke again would leave a gap.
    fn silence_connection(&mut self) {
        let sides = self.random.pick(&[[true, true], [true, false], [false, true]]);
        for connection in self.connections.values_mut() {
            for (is_silent, silenced) in connection.is_silent.iter_mut().zip(sides) {
                *is_silent |= silenced;
            }
        }
    }

    /// Holds or swallows what a cut or a silent connection keeps from arriving. Gives back what arrives.
    pub fn pass(&mut self, id: u64, event: WireEvent) -> Option<WireEvent> {
        let Some(from) = event.sender() else { return Some(event) };
        if self.connections.get(&id).is_some_and(|connection| connection.is_silent[from]) {
            return None;
        }
        if self.is_cut[from] || !self.held_on_wire[from].is_empty() {
            self.held_on_wire[from].push_back((id, event));
            return None;
        }
        Some(event)
    }

    /// A shard found that its peer, a device or the wire gave it wrong bytes, and ends its lane.
    pub fn lane_closed(&mut self, node: usize, shard: ShardId, fault: LaneFault) {
        let id = self.side_of(node);
        let connection = id.and_then(|id| self.connections.get_mut(&id));
        let is_corrupted = connection.is_some_and(|connection| connection.is_corrupted);
        match fault {
            LaneFault::Protocol(reason) => {
                panic!("shard {shard} of node {node} closes its lane: {reason}")
            }
            LaneFault::Checksum => assert!(
                is_corrupted || self.process(node).has_read_failure,
                "shard {shard} of node {node} closes its lane: a block does not match"
            ),
        }
        self.counts.lanes_closed += 1;
        if let Some(id) = id {
            let reason = "a block does not match".to_owned();
            self.soon(2_000, Event::Wire(id, WireEvent::Close { node, reason }));
        }
    }

    /// Whether the transport's checks end the connection at this message.
    pub fn corrupts(&mut self, id: u64, event: &WireEvent) -> bool {
        let is_message = matches!(event, WireEvent::Lane { .. } | WireEvent::Control { .. });
        if self.corruption != Some(Corruption::Frame) || !is_message {
            return false;
        }
        self.corruption = None;
        self.break_connection(id, event.receiver(), "a frame does not match");
        true
    }
}
