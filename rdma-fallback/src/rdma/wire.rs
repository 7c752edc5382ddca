//! The wire over RDMA: bytes go from this side's region into the peer's lent span with no processor in between.
//!
//! Step 4 of the flow where both hosts have cards. A post becomes WRITEs of its bytes, the last one with an immediate,
//! and a SEND of its message; a card keeps their order, and the peer's card refuses what leaves the lent span.
//!
//! ```text
//!   outbox:   [ sent .. sent | waits for credit or room .. ]
//!               ^ freed when a signalled SEND at or after it completes
//! ```
//!
//! Invariants:
//! - `sent` posts at the front of the outbox belong to the card; all others are untouched.
//! - Nothing is sent without credit for every receive that it uses, and room in the queue for every request.
//! - The last request of each call to the card is signalled, so every post is answered, and room comes back.
//! - [`Progress::Waiting`] is answered only when the completion queue was found empty after it was armed, or when all
//!   that is missing is the reason of the end.
//! - `Closed` is told after the queue pair was destroyed: no card touches the region for this wire any more.

mod news;
mod sending;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::card::{COMPLETIONS_AT_ONCE, Completion, Done};
use super::cause::Cause;
use super::connect::Connected;
use super::credit::Credit;
use super::cut;
use super::frame::{Arrivals, HEAD_BYTES, Head, Kind};
use super::queues::{Origin, Queues, origin};
use super::setup_frame::Endpoint;
use super::trials::Trial;
#[cfg(test)]
use super::verbs::Change;
use super::watch::Watch;
use crate::frame::FrameFault;
use crate::{
    CloseReason, Counters, Event, MESSAGE_BYTES_MAX, POLL_MESSAGES_MAX, POSTS_MAX, Placement,
    PostError, Progress, Region, Span, check_post,
};

/// How often a waiting wire looks by itself: some cards forget to say that a completion came.
const TICK: Duration = if cfg!(test) {
    // Tests show that nobody needs the clock.
    Duration::from_secs(3600)
} else {
    Duration::from_millis(100)
};
/// How long a wire whose requests were flushed waits for the device to report why.
const REPORT_LIMIT: Duration = Duration::from_millis(200);
/// Sources of the watch.
const COMPLETIONS: u32 = 0;
const MANAGER: u32 = 1;
const BELL: u32 = 2;

/// One connection over RDMA. See the contract in the crate's documentation.
pub struct RdmaWire {
    /// None once the connection is over.
    link: Option<Connected>,
    trial: Trial,
    watch: Watch,
    region: Arc<Region>,
    lend: Span,
    peer: Endpoint,
    outbox: VecDeque<Post>,
    /// Posts whose lists wait to be used again.
    spare: Vec<Post>,
    /// Posts at the front of the outbox that the card has.
    sent: usize,
    /// Number of the next post.
    next_post: u64,
    /// Requests that the card has.
    requests: u32,
    credit: Credit,
    credit_is_sent: bool,
    placements: u32,
    arrivals: Arrivals,
    /// Slots of receives to give back to the card.
    free_receives: Vec<u32>,
    inbox: Box<[u8]>,
    is_armed: bool,
    /// Completions were found since the queue was armed, so one should be announced.
    found_since_armed: bool,
    /// The connection has ended; what arrived before is still delivered.
    ending: Option<CloseReason>,
    ended_at: Option<Instant>,
    closed: Option<CloseReason>,
    closed_was_told: bool,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Post {
    number: u64,
    token: u64,
    message_bytes: u32,
    pieces: Vec<Span>,
    placed: Span,
    /// Once it was sent.
    requests: u32,
}

impl RdmaWire {
    pub(super) fn new(
        connected: Connected,
        region: Arc<Region>,
        lend: Span,
        peer: Endpoint,
        trial: Trial,
    ) -> io::Result<RdmaWire> {
        let Connected { queues, id } = &connected;
        let watch = Watch::new(TICK)?;
        watch.add(queues.descriptor(), COMPLETIONS)?;
        watch.add(id.channel().descriptor(), MANAGER)?;
        watch.add(queues.bell().as_raw_fd(), BELL)?;
        Ok(RdmaWire {
            credit: Credit::new(queues.sizes().receives, peer.receives),
            link: Some(connected),
            trial,
            watch,
            region,
            lend,
            peer,
            outbox: VecDeque::with_capacity(POSTS_MAX),
            spare: Vec::with_capacity(POSTS_MAX),
            sent: 0,
            next_post: 0,
            requests: 0,
            credit_is_sent: false,
            placements: 0,
            arrivals: Arrivals::default(),
            free_receives: Vec::new(),
            inbox: vec![0; HEAD_BYTES + MESSAGE_BYTES_MAX].into_boxed_slice(),
            is_armed: false,
            found_since_armed: false,
            ending: None,
            ended_at: None,
            closed: None,
            closed_was_told: false,
            counters: Counters::default(),
        })
    }

    /// Name of the device under the wire; none once it is closed.
    #[must_use]
    pub fn device_name(&self) -> Option<&str> {
        self.link.as_ref().map(|link| link.queues.device_name())
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
        let Some(link) = self.link.as_ref().filter(|_| self.closed.is_none()) else {
            return Err(PostError::Closed);
        };
        let placed_bytes = check_post(&self.region, message, placement)?;
        if self.outbox.len() == POSTS_MAX {
            return Err(PostError::Full);
        }
        let placement = placement.filter(|_| placed_bytes > 0);
        let mut post = self.spare.pop().unwrap_or_default();
        post.number = self.next_post;
        post.token = token;
        post.message_bytes = u32::try_from(message.len()).expect("check_post bounds the message");
        post.placed = Span::new(placement.map_or(0, |placement| placement.target), placed_bytes);
        post.pieces.clear();
        cut::join(placement.map_or(&[], |placement| placement.sources), &mut post.pieces);
        link.queues.write_message(post.number, message);
        self.counters.message_bytes_copied += message.len() as u64;
        self.next_post += 1;
        self.outbox.push_back(post);
        Ok(())
    }

    /// See [`crate::Wire::poll_when`]. Completions are looked for in any case: it takes no system call.
    pub fn poll_when(
        &mut self,
        may_be_readable: bool,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Progress {
        let mut progress = Progress::Waiting;
        if self.closed.is_none() {
            match self.work(may_be_readable, deliver) {
                Ok(found) => progress = found,
                Err(reason) => self.closed = Some(reason),
            }
        }
        let Some(reason) = self.closed else { return progress };
        if !self.closed_was_told {
            self.closed_was_told = true;
            self.tell_trials(reason);
            self.end_link();
            self.outbox.clear();
            deliver(Event::Closed { reason });
        }
        Progress::Waiting
    }

    /// See [`crate::Wire::descriptor`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.watch.descriptor()
    }

    /// See [`crate::Wire::wants_write`]: never. What waits goes on when a completion or credit comes, which is to read.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        false
    }

    /// See [`crate::Wire::counters`]. System calls are those of this crate; a card's driver may make more.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// See [`crate::Wire::close`].
    pub fn close(&mut self) {
        if self.closed.is_none() {
            self.closed = Some(CloseReason::Local);
            // The report waits for the next poll, the peer does not.
            self.end_link();
        }
    }

    fn tell_trials(&self, reason: CloseReason) {
        if let CloseReason::Rdma(cause) = reason {
            let with_card = self.outbox.iter().take(self.sent);
            self.trial.broke(cause, with_card.map(|post| (post.message_bytes, post.placed.length)));
        }
    }

    /// Destroys the connection: after this the card touches nothing of ours.
    fn end_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.part();
        }
    }

    /// One round: send, take completions, send what they made possible; if there were none, see whether to wait.
    fn work(
        &mut self,
        may_be_readable: bool,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Result<Progress, CloseReason> {
        let mut worked = self.send()?;
        let mut messages = POLL_MESSAGES_MAX;
        worked |= self.take(&mut messages, deliver)?;
        worked |= self.send()?;
        if worked {
            return Ok(Progress::More);
        }
        // Who was only told that something failed before asks what.
        if self.ending.map_or(may_be_readable, is_flushed) {
            self.look()?;
        }
        if let Some(reason) = self.ending {
            // What arrived before the news is delivered before the end.
            if self.take(&mut messages, deliver)? {
                return Ok(Progress::More);
            }
            let is_early = self.ended_at.is_some_and(|at| at.elapsed() < REPORT_LIMIT);
            return if is_flushed(reason) && is_early {
                Ok(Progress::Waiting)
            } else {
                Err(reason)
            };
        }
        if !self.is_armed {
            (self.is_armed, self.found_since_armed) = (true, false);
            self.counters.armings += 1;
            self.queues()?.arm().map_err(system)?;
            // What came before the arming is not told by the channel.
            worked |= self.take(&mut messages, deliver)?;
            worked |= self.send()?;
        }
        Ok(if worked { Progress::More } else { Progress::Waiting })
    }

    fn queues(&mut self) -> Result<&mut Queues, CloseReason> {
        let link = self.link.as_mut();
        Ok(&mut link.expect("the connection lasts until the wire is closed").queues)
    }

    /// Takes completions until there are none or enough messages were delivered. Says whether there were any.
    fn take(
        &mut self,
        messages: &mut u32,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool, CloseReason> {
        let mut completions = [Completion { id: 0, outcome: Err(0) }; COMPLETIONS_AT_ONCE];
        let mut worked = false;
        while *messages > 0 {
            let most = *messages as usize;
            let count = self.queues()?.take_completions(&mut completions, most).map_err(system)?;
            for completion in &completions[..count] {
                self.completed(*completion, messages, deliver)?;
            }
            self.counters.completions_taken += count as u64;
            self.counters.completion_polls += 1;
            self.counters.completion_polls_empty += u64::from(count == 0);
            worked |= count > 0;
            self.found_since_armed |= count > 0;
            if count < most.min(COMPLETIONS_AT_ONCE) {
                break;
            }
        }
        if self.ending.is_none() && !self.free_receives.is_empty() {
            let receives = std::mem::take(&mut self.free_receives);
            self.queues()?.post_receives(&receives).map_err(system)?;
            self.counters.receives_posted += receives.len() as u64;
            self.counters.receive_posts += 1;
            self.credit.posted(receives.len() as u32);
            self.free_receives = receives;
            self.free_receives.clear();
        }
        Ok(worked)
    }

    fn completed(
        &mut self,
        completion: Completion,
        messages: &mut u32,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), CloseReason> {
        match (origin(completion.id), completion.outcome) {
            (_, Err(status)) => {
                // What was received before the failure still counts.
                self.end(CloseReason::Rdma(Cause::Request { status }));
            }
            (Origin::Post(number), Ok(_)) => {
                self.counters.send_completions_taken += 1;
                self.sent_up_to(number, deliver);
            }
            (Origin::Credit, Ok(_)) => {
                self.counters.send_completions_taken += 1;
                self.credit_is_sent = false;
                self.requests -= 1;
            }
            (Origin::Receive(slot), Ok(Done::Placed { immediate })) => {
                self.free_receives.push(slot);
                self.arrivals.placement(immediate).map_err(CloseReason::Protocol)?;
            }
            (Origin::Receive(slot), Ok(Done::Received { bytes })) => {
                *messages = messages.saturating_sub(1);
                self.received(slot, bytes, deliver).map_err(CloseReason::Protocol)?;
                self.free_receives.push(slot);
            }
            (Origin::Receive(_), Ok(Done::Sent)) => {
                unreachable!("a receive completes as one")
            }
        }
        Ok(())
    }

    fn received(
        &mut self,
        slot: u32,
        bytes: u32,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), FrameFault> {
        let frame = self.inbox.get_mut(..bytes as usize);
        let frame = frame.ok_or(FrameFault::Length { bytes })?;
        let link = self.link.as_ref().expect("the connection lasts until the wire is closed");
        link.queues.read_receive(slot, frame);
        self.counters.message_bytes_copied += u64::from(bytes);
        let (head, message) =
            frame.split_first_chunk::<HEAD_BYTES>().ok_or(FrameFault::Length { bytes })?;
        let head = Head::decode(head, bytes, self.lend.length)?;
        self.arrivals.frame(&head)?;
        self.credit.heard(head.credit).map_err(|fault| FrameFault::Credit { told: fault.told })?;
        if let Kind::Message { placed, .. } = head.kind {
            self.counters.count_received(message.len(), placed.length);
            let placed = Some(placed).filter(|placed| placed.length > 0);
            deliver(Event::Message { bytes: message, placed });
        }
        Ok(())
    }
}

#[cfg(test)]
impl RdmaWire {
    /// Fault: this side uses another key than the peer gave it.
    pub(super) fn spoil_key(&mut self) {
        self.peer.key ^= 0x55aa;
    }

    /// Fault: the queue pair goes into its error state.
    pub(super) fn fail_pair(&mut self) {
        self.queues().unwrap().change(Change::to_error()).unwrap();
    }

    /// Fault: this side writes to what the peer does not lend.
    pub(super) fn believe_in_more_lent_bytes(&mut self, bytes: u32) {
        self.peer.lent_bytes = bytes;
    }
}

fn is_flushed(reason: CloseReason) -> bool {
    reason == CloseReason::Rdma(Cause::FLUSHED)
}

fn system(error: io::Error) -> CloseReason {
    // Errors of calls have a number, all of them.
    CloseReason::Rdma(Cause::System { errno: error.raw_os_error().unwrap_or(libc::EIO) })
}

impl Drop for RdmaWire {
    fn drop(&mut self) {
        self.end_link();
    }
}

impl fmt::Debug for RdmaWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaWire")
            .field("device", &self.device_name())
            .field("posts", &self.outbox.len())
            .field("sent", &self.sent)
            .field("credit", &self.credit)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}
