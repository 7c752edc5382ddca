//! The wire inside one process: the same contract for tests, with failures on request.
//!
//! It stands where TCP or RDMA stands in step 4 of the flow. The two ends may live on two threads. A poll of the
//! sender places the bytes and puts the message in the peer's inbox; the inbox is bounded, so a peer that does not
//! poll makes the sender's queue fill, as a socket would.
//!
//! Invariants:
//! - All shared state is behind one lock; events are told after it is released, so a callback may use the other end.
//! - `ended` of a side is set once. From then on nothing enters its inbox; what is in it is delivered before `Closed`.
//! - A byte in the peer's half of the wake-up socket follows every change that the peer may wait for.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::frame::check_placed;
use crate::{
    CloseReason, Counters, Event, POLL_BYTES_MAX, POLL_MESSAGES_MAX, POSTS_MAX, Placement,
    PostError, Progress, Region, Span, Wire, check_post,
};

/// Most messages that wait for a peer's poll.
const INBOX_MESSAGES_MAX: usize = 64;

/// Makes two connected ends. Each lends a span of its region to the other; one region may serve both.
///
/// # Errors
/// What the system says to the wake-up sockets.
///
/// # Panics
/// If a lent span is not inside its region.
pub fn memory_pair(
    region_a: Arc<Region>,
    lend_a: Span,
    region_b: Arc<Region>,
    lend_b: Span,
) -> io::Result<(Wire, Wire)> {
    assert!(region_a.contains(lend_a), "{lend_a:?} is not inside {region_a:?}");
    assert!(region_b.contains(lend_b), "{lend_b:?} is not inside {region_b:?}");
    let (wake_a, wake_b) = UnixStream::pair()?;
    wake_a.set_nonblocking(true)?;
    wake_b.set_nonblocking(true)?;
    let side = |region, lend| Side {
        region,
        lend,
        inbox: VecDeque::with_capacity(INBOX_MESSAGES_MAX),
        ended: None,
        posts_until_cut: None,
    };
    let sides = [side(Arc::clone(&region_a), lend_a), side(Arc::clone(&region_b), lend_b)];
    let shared = Arc::new(Mutex::new(Sides(sides)));
    let a = MemoryWire::new(Arc::clone(&shared), 0, region_a, wake_a);
    let b = MemoryWire::new(shared, 1, region_b, wake_b);
    Ok((Wire::Memory(a), Wire::Memory(b)))
}

/// One end of a pair made by [`memory_pair`].
#[derive(Debug)]
pub struct MemoryWire {
    shared: Arc<Mutex<Sides>>,
    /// Index of this side in `shared`.
    me: usize,
    region: Arc<Region>,
    outbox: VecDeque<Post>,
    /// Reading takes my wake-ups, writing wakes the peer.
    wake: UnixStream,
    closed_was_told: bool,
    counters: Counters,
}

#[derive(Debug)]
struct Sides([Side; 2]);

#[derive(Debug)]
struct Side {
    region: Arc<Region>,
    lend: Span,
    inbox: VecDeque<Delivery>,
    ended: Option<CloseReason>,
    /// A requested failure: how many more of this side's posts arrive.
    posts_until_cut: Option<u64>,
}

#[derive(Debug)]
struct Post {
    token: u64,
    message: Vec<u8>,
    sources: Vec<Span>,
    placed: Span,
}

#[derive(Debug)]
struct Delivery {
    message: Vec<u8>,
    placed: Span,
}

impl MemoryWire {
    fn new(
        shared: Arc<Mutex<Sides>>,
        me: usize,
        region: Arc<Region>,
        wake: UnixStream,
    ) -> MemoryWire {
        let (outbox, counters) = (VecDeque::new(), Counters::default());
        MemoryWire { shared, me, region, outbox, wake, closed_was_told: false, counters }
    }

    /// See [`crate::Wire::post`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn post(
        &mut self,
        token: u64,
        message: &[u8],
        placement: Option<Placement<'_>>,
    ) -> Result<(), PostError> {
        if self.sides().0[self.me].ended.is_some() {
            return Err(PostError::Closed);
        }
        let placed_bytes = check_post(&self.region, message, placement)?;
        if self.outbox.len() == POSTS_MAX {
            return Err(PostError::Full);
        }
        let placement = placement.filter(|_| placed_bytes > 0);
        let target = placement.map_or(0, |placement| placement.target);
        self.counters.message_bytes_copied += message.len() as u64;
        self.outbox.push_back(Post {
            token,
            message: message.to_vec(),
            sources: placement.map_or(Vec::new(), |placement| placement.sources.to_vec()),
            placed: Span::new(target, placed_bytes),
        });
        Ok(())
    }

    /// See [`crate::Wire::poll`].
    pub fn poll(&mut self, deliver: &mut dyn FnMut(Event<'_>)) -> Progress {
        if self.closed_was_told {
            return Progress::Waiting;
        }
        self.drain_wake();
        let mut posted = Vec::new();
        let shared = Arc::clone(&self.shared);
        let mut sides = lock(&shared);
        let mut wake_peer = self.send(&mut sides, &mut posted);
        let mine = &mut sides.0[self.me];
        let count = mine.inbox.len().min(POLL_MESSAGES_MAX as usize);
        let deliveries = mine.inbox.drain(..count).collect::<Vec<_>>();
        wake_peer |= count > 0;
        let closed = mine.ended.filter(|_| mine.inbox.is_empty());
        drop(sides);
        if wake_peer {
            self.wake_peer();
        }
        for token in posted {
            deliver(Event::Posted { token });
        }
        for Delivery { message, placed } in deliveries {
            self.counters.count_received(message.len(), placed.length);
            let placed = Some(placed).filter(|placed| placed.length > 0);
            deliver(Event::Message { bytes: &message, placed });
        }
        if let Some(reason) = closed {
            self.closed_was_told = true;
            self.outbox.clear();
            deliver(Event::Closed { reason });
            return Progress::Waiting;
        }
        if self.can_go_on() { Progress::More } else { Progress::Waiting }
    }

    /// See [`crate::Wire::descriptor`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// See [`crate::Wire::wants_write`]: only while the peer's inbox has room. When it has none, the descriptor
    /// becomes readable as soon as the peer makes room.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        let sides = self.sides();
        let room = sides.0[1 - self.me].inbox.len() < INBOX_MESSAGES_MAX;
        room && sides.0[self.me].ended.is_none() && !self.outbox.is_empty()
    }

    /// See [`crate::Wire::counters`]. System calls are those of the wake-ups.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// See [`crate::Wire::close`]. What the peer's inbox holds is still delivered to the peer.
    pub fn close(&mut self) {
        let mut sides = self.sides();
        sides.0[self.me].inbox.clear();
        sides.end(self.me, CloseReason::Local);
        sides.end(1 - self.me, CloseReason::Peer);
        drop(sides);
        self.wake_peer();
    }

    /// Fault: cuts the connection now. Both sides lose what they have not polled yet and report a reset.
    pub fn cut(&mut self) {
        self.sides().cut();
        self.wake_peer();
    }

    /// Fault: after `posts` more posts of this side have been delivered, the next one is torn: the first half of its
    /// bytes is placed, its message is lost, and the connection is cut as by [`MemoryWire::cut`].
    pub fn cut_after_posts(&mut self, posts: u64) {
        let me = self.me;
        self.sides().0[me].posts_until_cut = Some(posts);
    }

    /// Moves posts to the peer while it has room. Says whether the peer should look.
    fn send(&mut self, sides: &mut Sides, posted: &mut Vec<u64>) -> bool {
        let mut budget = POLL_BYTES_MAX;
        let mut wake_peer = false;
        while let Some(post) = self.outbox.front() {
            let ended = sides.0[self.me].ended.is_some();
            let room = sides.0[1 - self.me].inbox.len() < INBOX_MESSAGES_MAX;
            if ended || !room || budget == 0 {
                break;
            }
            wake_peer = true;
            if sides.is_cut_due(self.me) {
                sides.place(self.me, post, post.placed.length / 2);
                sides.cut();
                break;
            }
            let lent_bytes = sides.0[1 - self.me].lend.length;
            if let Err(fault) = check_placed(post.placed, lent_bytes) {
                sides.end(1 - self.me, CloseReason::Protocol(fault));
                sides.end(self.me, CloseReason::Peer);
                break;
            }
            sides.place(self.me, post, post.placed.length);
            self.counters.placed_bytes_copied += u64::from(post.placed.length);
            let post = self.outbox.pop_front().expect("there is a front");
            budget = budget.saturating_sub(post.message.len() + post.placed.length as usize);
            self.counters.count_sent(post.message.len(), post.placed.length);
            posted.push(post.token);
            let Post { message, placed, .. } = post;
            sides.0[1 - self.me].inbox.push_back(Delivery { message, placed });
        }
        wake_peer
    }

    fn can_go_on(&self) -> bool {
        let waits = {
            let mine = &self.sides().0[self.me];
            !mine.inbox.is_empty() || mine.ended.is_some()
        };
        waits || self.wants_write()
    }

    fn drain_wake(&mut self) {
        let mut bytes = [0; 64];
        loop {
            self.counters.receive_calls += 1;
            // An error is "nothing more" or a dropped peer, which `ended` tells better.
            match self.wake.read(&mut bytes) {
                Ok(count) if count == bytes.len() => {}
                Ok(_) => return,
                Err(_) => {
                    self.counters.receive_calls_empty += 1;
                    return;
                }
            }
        }
    }

    fn wake_peer(&mut self) {
        self.counters.send_calls += 1;
        // Refusal means that wake-ups wait already, or that the peer is gone.
        let _ = self.wake.write(&[1]);
    }

    fn sides(&self) -> MutexGuard<'_, Sides> {
        lock(&self.shared)
    }
}

impl Drop for MemoryWire {
    fn drop(&mut self) {
        self.close();
    }
}

impl Sides {
    fn end(&mut self, side: usize, reason: CloseReason) {
        let ended = &mut self.0[side].ended;
        *ended = ended.or(Some(reason));
    }

    fn cut(&mut self) {
        for side in 0..2 {
            self.0[side].inbox.clear();
            self.end(side, CloseReason::Lost { kind: io::ErrorKind::ConnectionReset });
        }
    }

    fn is_cut_due(&mut self, side: usize) -> bool {
        match &mut self.0[side].posts_until_cut {
            None => false,
            Some(0) => true,
            Some(posts) => {
                *posts -= 1;
                false
            }
        }
    }

    /// Copies the first `bytes` of a post's sources to its target at the other side, as far as that is lent.
    fn place(&self, from: usize, post: &Post, bytes: u32) {
        let (mine, peer) = (&self.0[from], &self.0[1 - from]);
        if check_placed(post.placed, peer.lend.length).is_err() {
            return;
        }
        let mut rest_bytes = bytes;
        let mut target = peer.lend.offset + post.placed.offset;
        for source in &post.sources {
            let taken = Span::new(source.offset, source.length.min(rest_bytes));
            mine.region.copy_to(taken, &peer.region, target);
            rest_bytes -= taken.length;
            target += u64::from(taken.length);
        }
    }
}

/// The state is plain data, whole at every step, so a panic elsewhere under the lock does not spoil it.
fn lock(shared: &Mutex<Sides>) -> MutexGuard<'_, Sides> {
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::tests::EdgeWatch;

    #[test]
    fn room_in_a_full_inbox_wakes_the_sender() {
        let lend = Span::new(0, 4096);
        let region = || Arc::new(Region::new(4096).unwrap());
        let (mut a, mut b) = memory_pair(region(), lend, region(), lend).unwrap();
        for token in 0..INBOX_MESSAGES_MAX as u64 + 1 {
            a.post(token, b"", None).unwrap();
        }
        let watch = EdgeWatch::of_reading(a.descriptor());
        while a.poll(&mut |_| {}) == Progress::More {}
        assert!(!a.wants_write(), "writing does not help while the peer has no room");
        while watch.wait(0) {}
        let mut count = 0;
        let _ = b.poll(&mut |_| count += 1);
        assert_eq!(count, INBOX_MESSAGES_MAX);
        assert!(watch.wait(10_000) && a.wants_write());
        let _ = a.poll(&mut |_| {});
        let _ = b.poll(&mut |_| count += 1);
        assert_eq!(count, INBOX_MESSAGES_MAX + 1);
    }
}
