//! Step 4 of the flow, the wire's half: one wire for each lane, and one between the coordinators.
//!
//! Invariants: what a post names belongs to the wire until it is posted, or until the wire is closed; when it closes
//! every outstanding post is answered first, so that the core knows its buffers are free.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use rdma_fallback::{CloseReason, Counters, Event, Placement, PostError, Progress, Span, Wire};
use twinpoint_core::contract::IoToken;
use twinpoint_core::units::{BLOCK_BYTES, BufferId};

use crate::buffers::Arena;

/// A wire with what waits for it.
pub(crate) struct LanePort {
    /// Out while it is polled: what is posted meanwhile waits.
    wire: Option<Wire>,
    /// Which session it is of.
    pub session: u64,
    lend: (BufferId, u32),
    waiting: VecDeque<Post>,
    outstanding: VecDeque<IoToken>,
    /// The shard was told of the lane, or it is closing: it may be polled.
    is_open: bool,
    /// A watch for output is armed.
    pub watching_output: bool,
    /// The last poll left work.
    pub has_more: bool,
    /// The wire may have input: it was told as readable, and was not found empty since.
    pub may_be_readable: bool,
    /// What of the wire's counters was taken.
    counted: Counters,
}

struct Post {
    io: IoToken,
    message: Vec<u8>,
    sources: Vec<Span>,
    target: u64,
}

/// What a poll of a lane brings.
pub(crate) enum LaneEvent<'a> {
    /// A post's buffers are free.
    Posted(IoToken),
    /// A message, and the buffers that were filled before.
    Message(&'a [u8], Option<(BufferId, u32)>),
}

impl LanePort {
    pub fn new(wire: Wire, session: u64, lend: (BufferId, u32)) -> LanePort {
        LanePort {
            wire: Some(wire),
            session,
            lend,
            waiting: VecDeque::new(),
            outstanding: VecDeque::new(),
            is_open: false,
            watching_output: false,
            has_more: true,
            may_be_readable: true,
            counted: Counters::default(),
        }
    }

    /// Queues a post. Buffers that follow each other make one span.
    pub fn post(
        &mut self,
        arena: &Arena,
        io: IoToken,
        message: Vec<u8>,
        placement: Option<(&[BufferId], u32)>,
    ) {
        let (sources, target) = match placement {
            None => (Vec::new(), 0),
            Some((buffers, block)) => {
                (spans(arena, buffers), u64::from(block) * BLOCK_BYTES as u64)
            }
        };
        self.waiting.push_back(Post { io, message, sources, target });
        self.has_more = true;
    }

    pub fn descriptor(&self) -> Option<RawFd> {
        self.wire.as_ref().map(Wire::descriptor)
    }

    pub fn wants_write(&self) -> bool {
        self.wire.as_ref().is_some_and(Wire::wants_write)
    }

    /// What the peer sends is wanted from now on.
    pub fn open(&mut self) {
        self.is_open = true;
    }

    /// Whether a poll may find something.
    pub fn is_due(&self) -> bool {
        self.is_open && self.has_more
    }

    pub fn close(&mut self) {
        self.is_open = true;
        if let Some(wire) = &mut self.wire {
            wire.close();
        }
        self.has_more = true;
    }

    /// Takes the wire out for a poll, after handing it what waits.
    pub fn begin_poll(&mut self) -> Option<Wire> {
        self.hand_over();
        self.has_more = false;
        self.wire.take()
    }

    /// Brings the wire back after a poll, which looked for input if it may have had some.
    pub fn end_poll(&mut self, wire: Wire, progress: Progress) {
        self.wire = Some(wire);
        self.may_be_readable &= progress == Progress::More;
        self.has_more |= progress == Progress::More;
        self.hand_over();
    }

    /// What the wire did since this was last asked; nothing while it is out.
    pub fn uncounted(&mut self) -> Counters {
        let Some(wire) = &self.wire else { return Counters::default() };
        let counters = wire.counters();
        counters.since(&std::mem::replace(&mut self.counted, counters))
    }

    /// A wire's `Posted` names the oldest outstanding post.
    pub fn posted(&mut self, token: u64) -> IoToken {
        let oldest = self.outstanding.pop_front().expect("a wire answers only what was posted");
        assert_eq!(oldest.0, token, "posts are answered in order");
        oldest
    }

    /// The buffers that a placement filled.
    pub fn placed(&self, span: Span) -> (BufferId, u32) {
        let (first, count) = self.lend;
        let index = u32::try_from(span.offset / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
        let length = span.length.div_ceil(BLOCK_BYTES as u32);
        assert!(
            index < count && length <= count - index,
            "the wire placed outside of the lent span"
        );
        (BufferId(first.0 + index), length)
    }

    /// Whether a placement has whole blocks only.
    pub fn is_aligned(span: Span) -> bool {
        span.offset.is_multiple_of(BLOCK_BYTES as u64)
            && span.length.is_multiple_of(BLOCK_BYTES as u32)
    }

    /// The wire is closed: every post that was not answered.
    pub fn abandon(&mut self) -> Vec<IoToken> {
        let waiting = self.waiting.drain(..).map(|post| post.io);
        self.outstanding.drain(..).chain(waiting).collect()
    }

    fn hand_over(&mut self) {
        let Some(wire) = &mut self.wire else { return };
        while let Some(post) = self.waiting.front() {
            let placement = Placement { sources: &post.sources, target: post.target };
            let placement = (!post.sources.is_empty()).then_some(placement);
            match wire.post(post.io.0, &post.message, placement) {
                Ok(()) => {
                    self.outstanding.push_back(post.io);
                    self.waiting.pop_front();
                    self.has_more = true;
                }
                Err(PostError::Full | PostError::Closed) => return,
                Err(error @ PostError::TooLarge { .. }) => {
                    panic!("the core keeps within the wire's limits: {error}")
                }
            }
        }
    }
}

/// Turns what a wire tells into lane events; tells why it closed, if it did.
pub(crate) fn deliver(
    port: &mut LanePort,
    event: Event<'_>,
    handle: &mut dyn FnMut(&mut LanePort, LaneEvent<'_>),
) -> Option<String> {
    match event {
        Event::Posted { token } => {
            let io = port.posted(token);
            handle(port, LaneEvent::Posted(io));
            None
        }
        Event::Message { bytes, placed } => {
            if placed.is_some_and(|span| !LanePort::is_aligned(span)) {
                return Some("the peer placed part of a block".to_owned());
            }
            let placed = placed.filter(|span| span.length > 0).map(|span| port.placed(span));
            handle(port, LaneEvent::Message(bytes, placed));
            None
        }
        Event::Closed { reason: CloseReason::Local } => Some("closed".to_owned()),
        Event::Closed { reason } => Some(reason.to_string()),
    }
}

/// Spans of buffers, neighbours joined.
pub(crate) fn spans(arena: &Arena, buffers: &[BufferId]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for buffer in buffers {
        let next = arena.span(*buffer, 1);
        match spans.last_mut() {
            Some(last) if last.end() == next.offset => last.length += next.length,
            _ => spans.push(next),
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rdma_fallback::memory_pair;

    use super::*;

    const BLOCKS: u32 = 32;

    fn poll(port: &mut LanePort, seen: &mut Vec<String>) -> Option<String> {
        let mut wire = port.begin_poll().expect("the wire is in");
        let mut closed = None;
        let progress = wire.poll(&mut |event| {
            let reason = deliver(port, event, &mut |_, event| match event {
                LaneEvent::Posted(io) => seen.push(format!("posted {}", io.0)),
                LaneEvent::Message(bytes, placed) => {
                    seen.push(format!("message {bytes:?} {placed:?}"))
                }
            });
            closed = closed.take().or(reason);
        });
        port.end_poll(wire, progress);
        closed
    }

    fn ports() -> (Arena, Arena, LanePort, LanePort) {
        let arena = || Arena::new(BLOCKS as usize * BLOCK_BYTES).expect("memory");
        let (one, other) = (arena(), arena());
        let lend = (BufferId(8), 16);
        let (a, b) = memory_pair(
            Arc::clone(one.region()),
            Span::new(0, 0),
            Arc::clone(other.region()),
            other.span(lend.0, lend.1),
        )
        .expect("a pair");
        (one, other, LanePort::new(a, 1, (BufferId(0), 0)), LanePort::new(b, 1, lend))
    }

    #[test]
    fn placements_arrive_in_lent_buffers_before_their_message() {
        let (one, other, mut a, mut b) = ports();
        for buffer in [3, 4, 9] {
            one.copy_in(BufferId(buffer), 0, &[buffer as u8; BLOCK_BYTES]);
        }
        a.post(&one, IoToken(7), vec![1, 2], Some((&[BufferId(3), BufferId(4), BufferId(9)], 5)));
        let mut sent = Vec::new();
        let mut received = Vec::new();
        for _ in 0..3 {
            assert_eq!(poll(&mut a, &mut sent), None);
            assert_eq!(poll(&mut b, &mut received), None);
        }
        assert_eq!(sent, ["posted 7"]);
        assert_eq!(received, ["message [1, 2] Some((BufferId(13), 3))"]);
        let mut block = [0; BLOCK_BYTES];
        other.copy_out(BufferId(15), 0, &mut block);
        assert_eq!(block, [9; BLOCK_BYTES]);
    }

    #[test]
    fn a_closed_wire_gives_every_post_back() {
        let (one, _other, mut a, _b) = ports();
        for io in 0..400 {
            a.post(&one, IoToken(io), vec![0; 8], None);
        }
        a.close();
        let mut seen = Vec::new();
        assert!(poll(&mut a, &mut seen).is_some());
        let abandoned = a.abandon().len() + seen.len();
        assert_eq!(abandoned, 400, "{} posted", seen.len());
    }
}
