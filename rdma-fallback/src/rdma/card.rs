//! Card: what a card can do, is asked and answers, in plain values.
//!
//! Step 4 of the flow, the words of `verbs.rs`, which speaks with the cards.

/// Completions taken with one call.
pub(super) const COMPLETIONS_AT_ONCE: usize = 16;

/// What a device can do at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceLimits {
    pub(super) requests_max: u32,
    pub(super) pieces_max: u32,
    pub(super) completions_max: u32,
}

/// The state of a port.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortState {
    pub(super) is_active: bool,
    pub(super) mtu_bytes: u32,
    pub(super) gids: u32,
}

/// What a device reports by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AsyncEvent {
    DeviceFatal,
    /// A port went down: its number.
    PortDown(u8),
    /// A completion queue failed. Which one, only its owner could tell.
    Completions,
    /// A queue pair failed: its number, and the event's.
    QueuePair(u32, u32),
    Other,
}

/// Who may use registered memory, beside this side's own sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// Receives of this side.
    Local,
    /// Writes of the peer, too.
    PeerWrites,
}

/// One request that is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Completion {
    /// As given to the request.
    pub(super) id: u64,
    /// What it was, or the number of what went wrong.
    pub(super) outcome: Result<Done, u32>,
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Done {
    /// A send or a write: the peer's card has it.
    Sent,
    /// A message of so many bytes is in the receive's slot.
    Received { bytes: u32 },
    /// The peer's write has arrived; it used the receive up, not its slot.
    Placed { immediate: u32 },
}

/// Sizes of a queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct QueueSizes {
    pub(super) sends: u32,
    pub(super) receives: u32,
    pub(super) pieces: u32,
    pub(super) inline_bytes: u32,
}

impl QueueSizes {
    /// One completion of every request.
    pub(super) fn completions(self) -> u32 {
        self.sends + self.receives
    }
}

/// The states that a queue pair passes on its way up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Receives may be posted.
    Init,
    /// The peer may send.
    Receive,
    /// This side may send.
    Send,
}
