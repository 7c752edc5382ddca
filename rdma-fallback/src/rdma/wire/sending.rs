//! Sending: posts become requests, as far as credit and room allow.
//!
//! Step 4 of the flow, the way out.
//!
//! Invariant: what a post needs is counted before anything of it is given to the card, so it goes as a whole.

use super::super::cut;
use super::super::frame::{HEAD_BYTES, Head, Kind};
use super::{RdmaWire, system};
use crate::frame::check_placed;
use crate::{CloseReason, Event, POLL_MESSAGES_MAX};

/// Every so many posts ask for a completion, so that a long queue is freed in parts.
const SIGNAL_EACH: u64 = 16;

impl RdmaWire {
    /// Sends posts while credit, room and this call last. Says whether anything was sent.
    pub(super) fn send(&mut self) -> Result<bool, CloseReason> {
        if self.ending.is_some() {
            return Ok(false);
        }
        let mut frames = POLL_MESSAGES_MAX;
        while frames > 0 && self.sent < self.outbox.len() && self.add_post()? {
            frames -= 1;
        }
        if !self.credit_is_sent && self.credit.is_telling_due() {
            // So the batch's last request, which is the one that is answered for all, is a post's where there are posts.
            assert_eq!(frames, POLL_MESSAGES_MAX, "every post tells credit");
            self.credit.used(1);
            let (credit, placements) = (self.credit.tell(), self.placements);
            let head = Head { kind: Kind::Credit, credit, placements };
            self.queues()?.add_credit(&head.encode());
            self.counters.message_bytes_copied += HEAD_BYTES as u64;
            self.credit_is_sent = true;
            self.requests += 1;
        }
        let requests = self.queues()?.submit().map_err(system)?;
        self.counters.requests_sent += requests as u64;
        self.counters.request_calls += u64::from(requests > 0);
        Ok(requests > 0)
    }

    /// Adds the first post that was not sent yet to the next call, if credit and room allow.
    fn add_post(&mut self) -> Result<bool, CloseReason> {
        let link = self.link.as_mut();
        let queues = &mut link.expect("the connection lasts until the wire is closed").queues;
        let sizes = queues.sizes();
        let pieces_max = sizes.pieces as usize;
        let post = &mut self.outbox[self.sent];
        // A target that the peer does not lend is not written to: the peer refuses the message, as it has to.
        let is_lent = check_placed(post.placed, self.peer.lent_bytes).is_ok();
        let writes = if is_lent { cut::writes(post.pieces.len(), pieces_max) } else { 0 };
        let receives = 1 + u32::from(writes > 0);
        let requests = 1 + writes as u32;
        // One request is kept for credit.
        if !self.credit.allows(receives) || self.requests + requests >= sizes.sends {
            return Ok(false);
        }
        if post.placed.length > 0 {
            self.placements = self.placements.wrapping_add(1);
        }
        let mut target = self.peer.address.wrapping_add(post.placed.offset);
        for (index, pieces) in post.pieces.chunks(pieces_max).take(writes).enumerate() {
            let immediate = (index + 1 == writes).then_some(self.placements);
            queues.add_write(post.number, pieces, (target, self.peer.key), immediate);
            target += pieces.iter().map(|piece| u64::from(piece.length)).sum::<u64>();
        }
        self.credit.used(receives);
        let kind = Kind::Message { bytes: post.message_bytes, placed: post.placed };
        let head = Head { kind, credit: self.credit.tell(), placements: self.placements };
        let is_signalled = post.number.is_multiple_of(SIGNAL_EACH);
        queues.add_frame(post.number, &head.encode(), post.message_bytes, is_signalled);
        self.counters.message_bytes_copied += HEAD_BYTES as u64;
        post.requests = requests;
        self.requests += requests;
        self.sent += 1;
        Ok(true)
    }

    /// The card is done with every post up to this one.
    pub(super) fn sent_up_to(&mut self, number: u64, deliver: &mut dyn FnMut(Event<'_>)) {
        while let Some(post) = self.outbox.front().filter(|post| post.number <= number) {
            assert!(self.sent > 0, "the card answers only what was sent");
            self.sent -= 1;
            self.requests -= post.requests;
            self.trial.arrived(post.message_bytes, post.placed.length);
            self.counters.count_sent(post.message_bytes as usize, post.placed.length);
            deliver(Event::Posted { token: post.token });
            let post = self.outbox.pop_front().expect("there is a front");
            self.spare.push(post);
        }
    }
}
