//! Counters: what a wire moved, and what it cost to move it.
//!
//! Beside step 4 of the flow. Counted where it happens, by the thread that owns the wire, in plain numbers; whoever shows
//! them publishes them. What the kernel and a card do on their side is not in them: `docs/WIRE_EFFICIENCY.md` says what
//! that is by design.
//!
//! Invariant: every number only grows while the wire lives.

/// What a wire has moved since it was made, and how often it asked the kernel or a card for something. What headers hold
/// is not counted as moved; copying them is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Messages whose `Posted` was told.
    pub messages_sent: u64,
    /// Messages delivered.
    pub messages_received: u64,
    /// Bytes of the messages sent.
    pub message_bytes_sent: u64,
    /// Bytes of the messages delivered.
    pub message_bytes_received: u64,
    /// Bytes placed with the messages sent.
    pub placed_bytes_sent: u64,
    /// Bytes placed with the messages delivered.
    pub placed_bytes_received: u64,
    /// Placed bytes that this side copied from one place of its memory to another, sending or receiving.
    pub placed_bytes_copied: u64,
    /// Bytes of messages and their heads that this side copied, sending or receiving.
    pub message_bytes_copied: u64,
    /// System calls that send.
    pub send_calls: u64,
    /// System calls that receive.
    pub receive_calls: u64,
    /// Of these, how many found nothing.
    pub receive_calls_empty: u64,
    /// System calls that ask what is new: of a watch, and of what it told.
    pub watch_calls: u64,
    /// System calls that only a wire's own clock made: some a second, whether there is work or none.
    pub clock_calls: u64,
    /// Requests to send that a card was given.
    pub requests_sent: u64,
    /// Calls that gave a card requests to send, many with each.
    pub request_calls: u64,
    /// Receives that a card was given.
    pub receives_posted: u64,
    /// Calls that gave a card receives, many with each.
    pub receive_posts: u64,
    /// Completions that a card gave, of sends and receives.
    pub completions_taken: u64,
    /// Of these, how many were of requests to send.
    pub send_completions_taken: u64,
    /// How often a card was asked for completions.
    pub completion_polls: u64,
    /// Of these, how often it had none.
    pub completion_polls_empty: u64,
    /// How often a card was asked to tell of the next completion.
    pub armings: u64,
    /// How often it told.
    pub wake_ups: u64,
}

impl Counters {
    /// System calls of this crate. A card's driver may make more: at most one for each of `request_calls`,
    /// `receive_posts` and `armings`, and none of the three on cards that are rung from the process.
    #[must_use]
    pub fn system_calls(&self) -> u64 {
        self.send_calls + self.receive_calls + self.watch_calls + self.clock_calls
    }

    /// What was counted since `before`, which the same wire said earlier.
    #[must_use]
    pub fn since(&self, before: &Counters) -> Counters {
        Counters {
            messages_sent: self.messages_sent - before.messages_sent,
            messages_received: self.messages_received - before.messages_received,
            message_bytes_sent: self.message_bytes_sent - before.message_bytes_sent,
            message_bytes_received: self.message_bytes_received - before.message_bytes_received,
            placed_bytes_sent: self.placed_bytes_sent - before.placed_bytes_sent,
            placed_bytes_received: self.placed_bytes_received - before.placed_bytes_received,
            placed_bytes_copied: self.placed_bytes_copied - before.placed_bytes_copied,
            message_bytes_copied: self.message_bytes_copied - before.message_bytes_copied,
            send_calls: self.send_calls - before.send_calls,
            receive_calls: self.receive_calls - before.receive_calls,
            receive_calls_empty: self.receive_calls_empty - before.receive_calls_empty,
            watch_calls: self.watch_calls - before.watch_calls,
            clock_calls: self.clock_calls - before.clock_calls,
            requests_sent: self.requests_sent - before.requests_sent,
            request_calls: self.request_calls - before.request_calls,
            receives_posted: self.receives_posted - before.receives_posted,
            receive_posts: self.receive_posts - before.receive_posts,
            completions_taken: self.completions_taken - before.completions_taken,
            send_completions_taken: self.send_completions_taken - before.send_completions_taken,
            completion_polls: self.completion_polls - before.completion_polls,
            completion_polls_empty: self.completion_polls_empty - before.completion_polls_empty,
            armings: self.armings - before.armings,
            wake_ups: self.wake_ups - before.wake_ups,
        }
    }

    pub(crate) fn count_sent(&mut self, message_bytes: usize, placed_bytes: u32) {
        self.messages_sent += 1;
        self.message_bytes_sent += message_bytes as u64;
        self.placed_bytes_sent += u64::from(placed_bytes);
    }

    pub(crate) fn count_received(&mut self, message_bytes: usize, placed_bytes: u32) {
        self.messages_received += 1;
        self.message_bytes_received += message_bytes as u64;
        self.placed_bytes_received += u64::from(placed_bytes);
    }
}
