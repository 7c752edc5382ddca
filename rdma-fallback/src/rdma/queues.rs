//! Queues: a queue pair with the slots that its messages pass through, and what it lends to the peer.
//!
//! It is in step 4 of the flow, between the wire, which thinks in posts, and `verbs.rs`, which knows requests.
//!
//! ```text
//!   slots, one region:   | receives: one for each that waits | posts: one for each that may wait | one for credit |
//! ```
//!
//! Invariants:
//! - A slot of a receive belongs to the card from its posting to its completion; a slot of a post from the sending to
//!   its completion.
//! - What is lent is registered for this connection alone: its key dies when the queues are dropped.
//! - The queues hold a request more than posts may use, for credit.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::adapter::{Adapter, Alarm};
use super::card::{Access, COMPLETIONS_AT_ONCE, Completion, DeviceLimits, QueueSizes};
use super::connect::{RdmaFault, refused};
use super::frame::HEAD_BYTES;
use super::options::RdmaOptions;
use super::setup_frame::Endpoint;
use super::verbs::{Change, Memory, QueuePair, Sends};
use crate::{MESSAGE_BYTES_MAX, PLACEMENT_SPANS_MAX, POSTS_MAX, Region, Span};

/// Bytes of a slot: a head and the longest message, whole cache lines.
const SLOT_BYTES: usize = (HEAD_BYTES + MESSAGE_BYTES_MAX).next_multiple_of(64);
/// Most pieces of one write that are worth asking a card for.
const PIECES_MAX: u32 = 30;
/// Set in the id of a receive; the rest is its slot.
const RECEIVE: u64 = 1 << 63;
/// The id of a frame that only tells credit.
const CREDIT: u64 = RECEIVE - 1;

/// What a completion was of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// The receive of this slot.
    Receive(u32),
    /// The post of this number.
    Post(u64),
    /// The frame that told credit.
    Credit,
}

/// One connection's queues.
pub(super) struct Queues {
    /// Dropped before everything that its requests lead to.
    pair: QueuePair,
    sends: Sends,
    sizes: QueueSizes,
    slots: Arc<Region>,
    slot_memory: Arc<Memory>,
    window: Option<Arc<Memory>>,
    lend: Span,
    alarm: Arc<Alarm>,
    bell: UnixStream,
    adapter: Arc<Adapter>,
}

impl Queues {
    pub(super) fn new(
        (adapter, port): (Arc<Adapter>, u8),
        options: &RdmaOptions,
        region: &Arc<Region>,
        lend: Span,
    ) -> Result<Queues, RdmaFault> {
        let sizes = sizes(adapter.limits(), options)?;
        let slot_count = sizes.receives as usize + POSTS_MAX + 1;
        let bytes = slot_count * SLOT_BYTES;
        let memory_fault = |bytes| move |error| RdmaFault::Memory { bytes, error };
        let slots = Arc::new(Region::new_prefaulted(bytes).map_err(memory_fault(bytes))?);
        let domain = adapter.domain();
        let slot_memory = Memory::of_region(domain, &slots, Access::Local);
        let slot_memory = Arc::new(slot_memory.map_err(memory_fault(bytes))?);
        let mut memory = vec![Arc::clone(adapter.memory()), Arc::clone(&slot_memory)];
        let mut window = None;
        if lend.length > 0 {
            let lent = Memory::of_span(domain, region, lend, Access::PeerWrites);
            let lent = Arc::new(lent.map_err(memory_fault(lend.length as usize))?);
            memory.push(Arc::clone(&lent));
            window = Some(lent);
        }
        // A card may refuse any message inside a request: then they are read from their slots.
        let pair = QueuePair::new(domain, sizes, memory.clone())
            .or_else(|_| QueuePair::new(domain, QueueSizes { inline_bytes: 0, ..sizes }, memory));
        let pair = pair.map_err(refused("make a queue pair"))?;
        let (alarm, bell) =
            adapter.alarm(pair.number(), port).map_err(refused("watch the device"))?;
        let sends = Sends::new();
        let queues =
            Queues { pair, sends, sizes, slots, slot_memory, window, lend, alarm, bell, adapter };
        Ok(queues)
    }

    /// Destroys what the card and the peer could still use of this side's memory. The device is left, to be closed
    /// where waiting does no harm.
    pub(super) fn end(self) -> Arc<Adapter> {
        let Queues { pair, window, slot_memory, adapter, .. } = self;
        drop(pair);
        drop((window, slot_memory));
        adapter
    }

    /// What the peer has to know.
    pub(super) fn endpoint(&self) -> Endpoint {
        let window = self.window.as_ref();
        Endpoint {
            address: window.map_or(0, |window| window.address()),
            lent_bytes: self.lend.length,
            key: window.map_or(0, |window| window.remote_key()),
            receives: self.sizes.receives,
        }
    }

    pub(super) fn number(&self) -> u32 {
        self.pair.number()
    }

    pub(super) fn sizes(&self) -> QueueSizes {
        self.sizes
    }

    pub(super) fn alarm(&self) -> &Alarm {
        &self.alarm
    }

    pub(super) fn bell(&self) -> &UnixStream {
        &self.bell
    }

    pub(super) fn device_name(&self) -> &str {
        self.adapter.name()
    }

    /// Readable when a completion has come since [`Queues::arm`].
    pub(super) fn descriptor(&self) -> RawFd {
        self.pair.descriptor()
    }

    pub(super) fn change(&mut self, change: Change) -> io::Result<()> {
        self.pair.change(change)
    }

    pub(super) fn post_all_receives(&mut self) -> io::Result<()> {
        let slots = (0..self.sizes.receives).collect::<Vec<_>>();
        self.post_receives(&slots)
    }

    /// Gives slots of receives to the card.
    pub(super) fn post_receives(&mut self, slots: &[u32]) -> io::Result<()> {
        let whole = |slot: &u32| {
            let offset = u64::from(*slot) * SLOT_BYTES as u64;
            (RECEIVE | u64::from(*slot), Span::new(offset, SLOT_BYTES as u32))
        };
        self.pair.post_receives(&self.slot_memory, slots.iter().map(whole))
    }

    /// Copies the start of a received frame out of its slot.
    pub(super) fn read_receive(&self, slot: u32, bytes: &mut [u8]) {
        assert!(slot < self.sizes.receives && bytes.len() <= SLOT_BYTES, "outside of a slot");
        self.slots.copy_out(u64::from(slot) * SLOT_BYTES as u64, bytes);
    }

    /// Keeps a post's message in its slot.
    pub(super) fn write_message(&self, post: u64, message: &[u8]) {
        self.slots.copy_in(self.post_slot(post) + HEAD_BYTES as u64, message);
    }

    /// Adds a write of pieces of the region to the requests that [`Queues::submit`] sends.
    pub(super) fn add_write(
        &mut self,
        post: u64,
        pieces: &[Span],
        target: (u64, u32),
        immediate: Option<u32>,
    ) {
        self.sends.write(post, self.adapter.memory(), pieces, target, immediate);
    }

    /// Adds a post's frame: its message is in its slot already.
    pub(super) fn add_frame(
        &mut self,
        post: u64,
        head: &[u8; HEAD_BYTES],
        message_bytes: u32,
        is_signalled: bool,
    ) {
        let frame = Span::new(self.post_slot(post), HEAD_BYTES as u32 + message_bytes);
        self.add_send(post, head, frame, is_signalled);
    }

    /// Adds a frame that only tells credit. There is one at a time.
    pub(super) fn add_credit(&mut self, head: &[u8; HEAD_BYTES]) {
        let slot = self.slot_offset(self.sizes.receives as usize + POSTS_MAX);
        self.add_send(CREDIT, head, Span::new(slot, HEAD_BYTES as u32), true);
    }

    fn add_send(&mut self, id: u64, head: &[u8; HEAD_BYTES], frame: Span, is_signalled: bool) {
        self.slots.copy_in(frame.offset, head);
        let is_inline = frame.length <= self.pair.inline_bytes();
        self.sends.send(id, &self.slot_memory, frame, is_inline, is_signalled);
    }

    /// Sends what was added; the last request is signalled. Says how many requests there were.
    pub(super) fn submit(&mut self) -> io::Result<usize> {
        let count = self.sends.len();
        self.pair.post_sends(&mut self.sends)?;
        Ok(count)
    }

    /// Takes at most `most` completions.
    pub(super) fn take_completions(
        &mut self,
        completions: &mut [Completion; COMPLETIONS_AT_ONCE],
        most: usize,
    ) -> io::Result<usize> {
        self.pair.take_completions(completions, most)
    }

    pub(super) fn arm(&mut self) -> io::Result<()> {
        self.pair.arm()
    }

    /// Takes the news that a completion came. Says whether there was any.
    pub(super) fn take_event(&mut self) -> io::Result<bool> {
        self.pair.take_event()
    }

    fn post_slot(&self, post: u64) -> u64 {
        self.slot_offset(self.sizes.receives as usize + (post % POSTS_MAX as u64) as usize)
    }

    fn slot_offset(&self, slot: usize) -> u64 {
        (slot * SLOT_BYTES) as u64
    }
}

/// What the id of a completion says.
pub(super) fn origin(id: u64) -> Origin {
    match id {
        CREDIT => Origin::Credit,
        id if id & RECEIVE != 0 => Origin::Receive((id & !RECEIVE) as u32),
        id => Origin::Post(id),
    }
}

/// The sizes of the queues, if the device can hold them: nothing that it could overrun is begun.
fn sizes(limits: DeviceLimits, options: &RdmaOptions) -> Result<QueueSizes, RdmaFault> {
    let pieces = limits.pieces_max.clamp(1, PIECES_MAX);
    let largest_post = (PLACEMENT_SPANS_MAX as u32).div_ceil(pieces) + 1;
    let sends = options.send_requests.max(largest_post) + 1;
    let receives = options.receive_requests;
    let sizes = QueueSizes { sends, receives, pieces, inline_bytes: options.inline_bytes };
    let checks = [
        ("requests to send", sends, limits.requests_max),
        ("receives", receives, limits.requests_max),
        ("completions", sizes.completions(), limits.completions_max),
    ];
    for (what, needed, most) in checks {
        if needed > most {
            return Err(RdmaFault::TooMany { what, needed, most });
        }
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_apart() {
        assert_eq!(origin(0), Origin::Post(0));
        assert_eq!(origin(RECEIVE | 7), Origin::Receive(7));
        assert_eq!(origin(CREDIT), Origin::Credit);
    }

    #[test]
    fn queues_that_could_overrun_are_refused() {
        let options = RdmaOptions::default();
        let limits = |requests_max, pieces_max, completions_max| {
            let limits = DeviceLimits { requests_max, pieces_max, completions_max };
            sizes(limits, &options)
        };
        let good = limits(1000, 32, 1000).unwrap();
        assert_eq!((good.sends, good.receives, good.pieces), (257, 128, 30));
        assert_eq!(good.completions(), 257 + 128);
        assert_eq!(limits(257, 32, 385).unwrap(), good);
        let refused = |answer: Result<QueueSizes, RdmaFault>| answer.unwrap_err().to_string();
        assert_eq!(
            refused(limits(256, 32, 1000)),
            "the RDMA device holds 256 requests to send, 257 are needed"
        );
        assert_eq!(
            refused(limits(1000, 32, 384)),
            "the RDMA device holds 384 completions, 385 are needed"
        );
        // A card that takes one piece with each request: the largest post still fits.
        assert_eq!(limits(2000, 1, 2000).unwrap().sends, 1024 + 1 + 1);
    }
}
