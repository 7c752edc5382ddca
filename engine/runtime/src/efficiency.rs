//! Efficiency: what each thread's share of the data path costs, counted where it happens and summed for the status.
//!
//! Beside the flow. Invariants: each cell has one writer, the thread whose it is, so that counting is a plain addition
//! and no contended one; a reader may see one cell newer than another, and none ever goes back.

use std::sync::atomic::{AtomicU64, Ordering};

use rdma_fallback::Counters;

use crate::status::EfficiencyStatus;
use crate::uring::{CommandCounters, UringCounters};
use crate::worker::Worker;

/// A number that one thread counts up and others read.
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// By the thread whose it is.
    pub fn add(&self, more: u64) {
        self.set(self.get() + more);
    }

    /// By the thread whose it is.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counts of one worker, or of one local client.
#[derive(Default)]
pub(crate) struct ThreadCosts {
    /// Bytes copied between a client's command and buffers.
    pub client_bytes_copied: Count,
    pub rounds: Count,
    pub rounds_idle: Count,
    pub yields: Count,
    pub sleeps: Count,
    pub bells_rung: Count,
    pub lane_wake_ups: Count,
    ring_enters: Count,
    ring_operations: Count,
    ring_completions: Count,
    commands: Count,
    commands_registered: Count,
    device_polls: Count,
    wires: WireCosts,
}

/// The counts of all wires of one thread, those that ended included.
#[derive(Default)]
struct WireCosts {
    data_bytes_copied: Count,
    message_bytes_copied: Count,
    send_calls: Count,
    receive_calls: Count,
    receive_calls_empty: Count,
    watch_calls: Count,
    clock_calls: Count,
    requests: Count,
    request_calls: Count,
    receives: Count,
    receive_posts: Count,
    completions: Count,
    send_completions: Count,
    polls: Count,
    polls_empty: Count,
    armings: Count,
    wake_ups: Count,
}

impl ThreadCosts {
    /// What the thread's io_uring says of itself.
    pub fn ring(&self, counters: UringCounters, commands: CommandCounters) {
        self.ring_enters.set(counters.enters);
        self.ring_operations.set(counters.operations);
        self.ring_completions.set(counters.completions);
        self.commands.set(commands.commands);
        self.commands_registered.set(commands.registered);
        self.device_polls.set(commands.polls);
    }

    /// What a wire did since it was last asked.
    pub fn wire(&self, more: &Counters) {
        let costs = &self.wires;
        costs.data_bytes_copied.add(more.placed_bytes_copied);
        costs.message_bytes_copied.add(more.message_bytes_copied);
        costs.send_calls.add(more.send_calls);
        costs.receive_calls.add(more.receive_calls);
        costs.receive_calls_empty.add(more.receive_calls_empty);
        costs.watch_calls.add(more.watch_calls);
        costs.clock_calls.add(more.clock_calls);
        costs.requests.add(more.requests_sent);
        costs.request_calls.add(more.request_calls);
        costs.receives.add(more.receives_posted);
        costs.receive_posts.add(more.receive_posts);
        costs.completions.add(more.completions_taken);
        costs.send_completions.add(more.send_completions_taken);
        costs.polls.add(more.completion_polls);
        costs.polls_empty.add(more.completion_polls_empty);
        costs.armings.add(more.armings);
        costs.wake_ups.add(more.wake_ups);
    }

    fn add_to(&self, sum: &mut EfficiencyStatus) {
        let EfficiencyStatus { copied_bytes, system_calls, ring, device, verbs, threads } = sum;
        let wires = &self.wires;
        let add = |to: &mut u64, count: &Count| *to += count.get();
        add(&mut copied_bytes.client, &self.client_bytes_copied);
        add(&mut copied_bytes.wire_data, &wires.data_bytes_copied);
        add(&mut copied_bytes.wire_messages, &wires.message_bytes_copied);
        add(&mut system_calls.ring_enter, &self.ring_enters);
        add(&mut system_calls.yield_core, &self.yields);
        add(&mut system_calls.bell, &self.bells_rung);
        add(&mut system_calls.wire_send, &wires.send_calls);
        add(&mut system_calls.wire_receive, &wires.receive_calls);
        add(&mut system_calls.wire_receive_empty, &wires.receive_calls_empty);
        add(&mut system_calls.wire_watch, &wires.watch_calls);
        add(&mut system_calls.wire_clock, &wires.clock_calls);
        add(&mut ring.operations, &self.ring_operations);
        add(&mut ring.completions, &self.ring_completions);
        add(&mut device.commands, &self.commands);
        add(&mut device.commands_registered, &self.commands_registered);
        add(&mut device.polls, &self.device_polls);
        add(&mut verbs.requests, &wires.requests);
        add(&mut verbs.request_calls, &wires.request_calls);
        add(&mut verbs.receives, &wires.receives);
        add(&mut verbs.receive_calls, &wires.receive_posts);
        add(&mut verbs.completions, &wires.completions);
        add(&mut verbs.send_completions, &wires.send_completions);
        add(&mut verbs.polls, &wires.polls);
        add(&mut verbs.polls_empty, &wires.polls_empty);
        add(&mut verbs.armings, &wires.armings);
        add(&mut verbs.wake_ups, &wires.wake_ups);
        add(&mut threads.rounds, &self.rounds);
        add(&mut threads.rounds_idle, &self.rounds_idle);
        add(&mut threads.sleeps, &self.sleeps);
        add(&mut threads.lane_wake_ups, &self.lane_wake_ups);
    }
}

impl Worker {
    /// Where this thread counts what its work costs.
    pub fn costs(&self) -> &ThreadCosts {
        self.shared.costs(self.index)
    }

    /// A round is over; it found something to do, or not.
    pub fn count_round(&self, worked: bool) {
        let costs = self.costs();
        costs.rounds.add(1);
        costs.rounds_idle.add(u64::from(!worked));
        costs.ring(self.uring.counters(), self.uring.command_counters());
    }
}

/// The sum over all threads.
pub(crate) fn sum<'a>(threads: impl Iterator<Item = &'a ThreadCosts>) -> EfficiencyStatus {
    let mut sum = EfficiencyStatus::default();
    threads.for_each(|costs| costs.add_to(&mut sum));
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_summed() {
        let costs = [ThreadCosts::default(), ThreadCosts::default()];
        costs[0].client_bytes_copied.add(4096);
        let commands = CommandCounters { commands: 9, registered: 4, polls: 3 };
        costs[0].ring(
            UringCounters { enters: 5, operations: 7, completions: 6 },
            CommandCounters::default(),
        );
        costs[0].ring(UringCounters { enters: 6, operations: 8, completions: 7 }, commands);
        costs[1].ring(UringCounters::default(), commands);
        let wire = Counters { send_calls: 2, requests_sent: 3, ..Counters::default() };
        costs.iter().for_each(|costs| costs.wire(&wire));
        costs[1].wire(&wire);
        let sum = sum(costs.iter());
        assert_eq!((sum.copied_bytes.client, sum.system_calls.ring_enter), (4096, 6));
        assert_eq!((sum.system_calls.wire_send, sum.verbs.requests), (6, 9));
        assert_eq!((sum.ring.operations, sum.ring.completions), (8, 7));
        assert_eq!((sum.device.commands, sum.device.commands_registered), (18, 8));
        assert_eq!((sum.device.polls, sum.system_calls.total()), (6, 12));
    }
}
