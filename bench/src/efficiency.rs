//! What a load cost a pair, counted: ratios of two readings of both nodes' status, one before and one after it.
//!
//! Beside the flow. Invariants: only counters are used, never a clock; several turns of one load are added up before
//! anything is divided. `docs/WIRE_EFFICIENCY.md` says what the numbers mean.

use twinpoint_runtime::status::{EfficiencyStatus, NodeStatus};

/// The unit that system calls are told for, in bytes.
const BLOCK: f64 = 4096.0;
/// The unit that verbs are told for, in bytes.
const MEBIBYTE: f64 = (1 << 20) as f64;

/// Kinds of system calls, in the order of [`Side::calls`].
pub const CALL_KINDS: [&str; 8] =
    ["enter", "yield", "bell", "wire send", "wire receive", "found nothing", "wire watch", "clock"];
/// Not among all calls: what comes with time and not with work, and what is a part of "wire receive".
const LEFT_OUT: [usize; 3] = [1, 5, 7];
/// Of these, the first that is of the wire.
const FIRST_WIRE_KIND: usize = 3;

/// Both nodes before and after a load, and what the load's own program measured. The primary first.
#[derive(Clone, Debug)]
pub struct Readings {
    pub before: [NodeStatus; 2],
    pub after: [NodeStatus; 2],
    pub iops: f64,
}

/// What one node did.
#[derive(Clone, Debug, Default)]
pub struct Side {
    calls: [f64; CALL_KINDS.len()],
    copied_client: f64,
    copied_data: f64,
    requests: f64,
    receives: f64,
    completions: f64,
    send_completions: f64,
    driver_calls: f64,
    wake_ups: f64,
}

/// What a load cost. Sums over all turns.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    client_bytes: f64,
    wire_bytes: f64,
    sides: [Side; 2],
}

impl Costs {
    /// Of one turn, or of several.
    pub fn new(turns: &[Readings]) -> Costs {
        let mut costs = Costs::default();
        for turn in turns {
            let grown = |count: fn(&NodeStatus) -> u64| {
                count(&turn.after[0]).saturating_sub(count(&turn.before[0])) as f64
            };
            costs.client_bytes += grown(|status| status.traffic.client_bytes_written);
            costs.wire_bytes += grown(|status| status.traffic.wire_bytes_sent.data);
            for (index, side) in costs.sides.iter_mut().enumerate() {
                side.add(&turn.before[index].efficiency, &turn.after[index].efficiency);
            }
        }
        costs
    }

    /// Data sent to the peer for each byte that clients wrote: below 1 where a block was written twice before its point.
    pub fn wire_bytes_per_byte(&self) -> f64 {
        ratio(self.wire_bytes, self.client_bytes)
    }

    /// Bytes that the primary copied from clients' commands into buffers, for each byte written.
    pub fn client_copies_per_byte(&self) -> f64 {
        ratio(self.sides[0].copied_client, self.client_bytes)
    }

    /// Data bytes that a node's wires copied, for each data byte on the wire. Node 0 sends, node 1 receives.
    pub fn wire_copies_per_byte(&self, node: usize) -> f64 {
        ratio(self.sides[node].copied_data, self.wire_bytes)
    }

    /// System calls of one kind, for each 4 KiB that clients wrote.
    pub fn calls_per_block(&self, node: usize, kind: usize) -> f64 {
        ratio(self.sides[node].calls[kind], self.client_bytes / BLOCK)
    }

    /// All system calls of a node that come with work, for each 4 KiB that clients wrote.
    pub fn all_calls_per_block(&self, node: usize) -> f64 {
        self.calls_from(node, 0)
    }

    /// System calls of a node's wires, for each 4 KiB that clients wrote.
    pub fn wire_calls_per_block(&self, node: usize) -> f64 {
        self.calls_from(node, FIRST_WIRE_KIND)
    }

    /// Calls into the card's driver that enter the kernel where the card is emulated, for each 4 KiB.
    pub fn driver_calls_per_block(&self, node: usize) -> f64 {
        ratio(self.sides[node].driver_calls, self.client_bytes / BLOCK)
    }

    /// Work requests to send, for each MiB of data on the wire.
    pub fn requests_per_mebibyte(&self, node: usize) -> f64 {
        ratio(self.sides[node].requests, self.wire_bytes / MEBIBYTE)
    }

    /// Work requests to receive, for each MiB of data on the wire.
    pub fn receives_per_mebibyte(&self, node: usize) -> f64 {
        ratio(self.sides[node].receives, self.wire_bytes / MEBIBYTE)
    }

    /// Completions of both kinds, for each MiB of data on the wire.
    pub fn completions_per_mebibyte(&self, node: usize) -> f64 {
        ratio(self.sides[node].completions, self.wire_bytes / MEBIBYTE)
    }

    /// How many of the requests to send asked for a completion.
    pub fn signalled_share(&self, node: usize) -> f64 {
        ratio(self.sides[node].send_completions, self.sides[node].requests)
    }

    /// Announcements of completions, for each MiB of data on the wire.
    pub fn wake_ups_per_mebibyte(&self, node: usize) -> f64 {
        ratio(self.sides[node].wake_ups, self.wire_bytes / MEBIBYTE)
    }

    fn calls_from(&self, node: usize, first: usize) -> f64 {
        let kinds = (first..CALL_KINDS.len()).filter(|kind| !LEFT_OUT.contains(kind));
        kinds.map(|kind| self.calls_per_block(node, kind)).sum()
    }
}

impl Side {
    fn add(&mut self, before: &EfficiencyStatus, after: &EfficiencyStatus) {
        let grown =
            |count: fn(&EfficiencyStatus) -> u64| count(after).saturating_sub(count(before)) as f64;
        let calls: [fn(&EfficiencyStatus) -> u64; CALL_KINDS.len()] = [
            |cost| cost.system_calls.ring_enter,
            |cost| cost.system_calls.yield_core,
            |cost| cost.system_calls.bell,
            |cost| cost.system_calls.wire_send,
            |cost| cost.system_calls.wire_receive,
            |cost| cost.system_calls.wire_receive_empty,
            |cost| cost.system_calls.wire_watch,
            |cost| cost.system_calls.wire_clock,
        ];
        for (sum, count) in self.calls.iter_mut().zip(calls) {
            *sum += grown(count);
        }
        self.copied_client += grown(|cost| cost.copied_bytes.client);
        self.copied_data += grown(|cost| cost.copied_bytes.wire_data);
        self.requests += grown(|cost| cost.verbs.requests);
        self.receives += grown(|cost| cost.verbs.receives);
        self.completions += grown(|cost| cost.verbs.completions);
        self.send_completions += grown(|cost| cost.verbs.send_completions);
        self.driver_calls += grown(|cost| cost.verbs.request_calls + cost.verbs.armings);
        self.wake_ups += grown(|cost| cost.verbs.wake_ups);
    }
}

fn ratio(count: f64, of: f64) -> f64 {
    if of > 0.0 { count / of } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_added_before_they_are_divided() {
        let mut after = NodeStatus::default();
        after.traffic.client_bytes_written = 2 << 20;
        after.traffic.wire_bytes_sent.data = 1 << 20;
        after.efficiency.system_calls.ring_enter = 100;
        after.efficiency.system_calls.wire_send = 28;
        after.efficiency.system_calls.wire_receive = 20;
        after.efficiency.system_calls.wire_receive_empty = 20;
        after.efficiency.verbs.requests = 32;
        after.efficiency.verbs.send_completions = 4;
        after.efficiency.copied_bytes.wire_data = 1 << 19;
        let turn = |after: &NodeStatus| Readings {
            before: [NodeStatus::default(), NodeStatus::default()],
            after: [after.clone(), after.clone()],
            iops: 1.0,
        };
        let mut more = after.clone();
        more.traffic.client_bytes_written = 0;
        more.efficiency.system_calls.ring_enter = 108;
        let costs = Costs::new(&[turn(&after), turn(&more)]);
        // 208 + 56 + 40 calls for 512 blocks; what found nothing is in the receives.
        assert_eq!(costs.all_calls_per_block(0), 304.0 / 512.0);
        assert_eq!(costs.wire_calls_per_block(1), 96.0 / 512.0);
        assert_eq!((costs.requests_per_mebibyte(0), costs.signalled_share(1)), (32.0, 0.125));
        assert_eq!((costs.wire_copies_per_byte(0), costs.wire_bytes_per_byte()), (0.5, 1.0));
        assert_eq!(Costs::default().all_calls_per_block(0), 0.0);
    }
}
