//! Efficiency: what the data path cost this node, counted. `docs/WIRE_EFFICIENCY.md` says what the numbers mean.
//!
//! Invariant: raw counts since the workers began, never rates or ratios: whoever reads twice can make those.

use serde::{Deserialize, Serialize};

/// What moving data took of this node's processors, kernel and card.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EfficiencyStatus {
    /// Bytes that this process copied in its own memory.
    pub copied_bytes: CopiedBytes,
    /// Calls to the kernel on the data path, by kind.
    pub system_calls: SystemCallCounts,
    /// What went through the io_urings.
    pub ring: RingCounts,
    /// How the store was driven by NVMe commands; all 0 in block mode.
    pub device: DeviceCounts,
    /// What a card was asked for; all 0 over TCP.
    pub verbs: VerbCounts,
    /// How the threads of the data path spent their rounds.
    pub threads: ThreadCounts,
}

/// Bytes that this process copied in its own memory. What the kernel copies is not in them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CopiedBytes {
    /// Between clients' commands and block buffers.
    pub client: u64,
    /// Volumes' blocks, while they were sent or received by a wire.
    pub wire_data: u64,
    /// Messages and heads of frames, while they were sent or received by a wire.
    pub wire_messages: u64,
}

/// Calls to the kernel by the threads of the data path.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SystemCallCounts {
    /// `io_uring_enter`.
    pub ring_enter: u64,
    /// `sched_yield`, between two looks of a thread that polls.
    pub yield_core: u64,
    /// Writes to the eventfd of a thread that slept.
    pub bell: u64,
    /// Wires: `sendmsg`.
    pub wire_send: u64,
    /// Wires: `readv`.
    pub wire_receive: u64,
    /// How many of `wire_receive` found nothing.
    pub wire_receive_empty: u64,
    /// Wires: `epoll_wait`, and reading what it told of.
    pub wire_watch: u64,
    /// Wires over RDMA: the same, only because their clock ticked, ten times a second.
    pub wire_clock: u64,
}

impl SystemCallCounts {
    /// All but `yield_core` and `wire_clock`, which come with time and not with work.
    #[must_use]
    pub fn total(&self) -> u64 {
        // Those that found nothing are in `wire_receive`.
        self.ring_enter + self.bell + self.wire_send + self.wire_receive + self.wire_watch
    }
}

/// What went through the io_urings: the store, clients' sockets, watches.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RingCounts {
    /// Operations begun.
    pub operations: u64,
    /// Completions taken.
    pub completions: u64,
}

/// How the store was driven by NVMe commands.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceCounts {
    /// Commands given to the kernel.
    pub commands: u64,
    /// How many of them were from one piece of registered memory, which the kernel need not look up.
    pub commands_registered: u64,
    /// System calls that looked for polled completions; they are in `ring_enter` too.
    pub polls: u64,
}

/// What a card was asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VerbCounts {
    /// Work requests to send: writes into the peer's memory, and messages.
    pub requests: u64,
    /// Calls that posted them, many with each.
    pub request_calls: u64,
    /// Work requests to receive.
    pub receives: u64,
    /// Calls that posted them, many with each.
    pub receive_calls: u64,
    /// Completions taken, of both.
    pub completions: u64,
    /// How many of them were of requests to send.
    pub send_completions: u64,
    /// How often the completion queue was looked at.
    pub polls: u64,
    /// How many of these looks found nothing.
    pub polls_empty: u64,
    /// How often the queue was told to announce its next completion.
    pub armings: u64,
    /// How often it did.
    pub wake_ups: u64,
}

/// How the threads of the data path spent their rounds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ThreadCounts {
    /// Rounds.
    pub rounds: u64,
    /// How many of them found nothing to do.
    pub rounds_idle: u64,
    /// How often a thread slept.
    pub sleeps: u64,
    /// How often a lane's descriptor was announced as readable.
    pub lane_wake_ups: u64,
}
