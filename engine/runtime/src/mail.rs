//! What workers send each other: one bounded ring for every ordered pair of workers, and a queue to oneself.
//!
//! Invariants: mail of one pair arrives in order; nothing is lost when a ring is full, it waits in the sender's
//! outbox, which is bounded by what is in flight; a receiver that sleeps is woken once per batch.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rdma_fallback::Wire;
use twinpoint_core::contract::{Order, Report};
use twinpoint_core::request::{Answer, Request, Tag};
use twinpoint_core::units::{BufferId, ShardId};

use crate::ring::{Consumer, Producer, ring};
use crate::ublk::Device;
use crate::wake::Waker;

/// One piece of mail.
pub(crate) enum Mail {
    /// A frontend's request, for the owner of its shard.
    Request(ShardId, Request),
    /// A shard's answer, for the worker that has the client.
    Answer(Answer),
    /// Buffers go back to the worker whose pool they are of.
    Free(BufferId, u32),
    /// The open CP has its first write; for worker 0.
    FirstWrite,
    /// A client wants a flush; for worker 0.
    Flush(Tag),
    /// The flush is done, or failed.
    Flushed(Tag, bool),
    /// The coordinator's order.
    Order(ShardId, Order),
    /// A shard's report; for worker 0.
    Report(ShardId, Report),
    /// The lane of a new session: number of the session, the wire, and the buffers lent.
    Lane(ShardId, u64, Box<Wire>, (BufferId, u32)),
    /// Close the lane of this session.
    CloseLane(ShardId, u64),
    /// The lane of this session is gone; for worker 0.
    LaneClosed(u64, String),
    /// A new client.
    Client(OwnedFd),
    /// A queue of a new block device, by its number.
    Ublk(Arc<Device>, u16),
    /// Writers may go on.
    Resume,
    /// Close all clients and end.
    End,
}

/// A worker's end of all its rings.
pub(crate) struct Mailbox {
    worker: usize,
    outgoing: Vec<Outgoing>,
    incoming: Vec<Option<Consumer<Mail>>>,
    local: VecDeque<Mail>,
}

struct Outgoing {
    producer: Option<Producer<Mail>>,
    outbox: VecDeque<Mail>,
    waker: Waker,
    notify: bool,
}

/// Connects workers and, after them, local clients, each with the waker given for it. The rings to local clients have
/// room for all that they can be sent, so that no worker ever waits for one. Local clients send each other nothing.
pub(crate) fn connect(
    wakers: &[Waker],
    workers: usize,
    ring_entries: usize,
    local_entries: usize,
) -> Vec<Mailbox> {
    let count = wakers.len();
    let mut boxes: Vec<Mailbox> = (0..count)
        .map(|worker| Mailbox {
            worker,
            outgoing: wakers
                .iter()
                .map(|waker| Outgoing {
                    producer: None,
                    outbox: VecDeque::new(),
                    waker: waker.clone(),
                    notify: false,
                })
                .collect(),
            incoming: (0..count).map(|_| None).collect(),
            local: VecDeque::new(),
        })
        .collect();
    for from in 0..count {
        for to in (0..count).filter(|to| *to != from && (*to < workers || from < workers)) {
            let (producer, consumer) =
                ring(if to < workers { ring_entries } else { local_entries });
            boxes[from].outgoing[to].producer = Some(producer);
            boxes[to].incoming[from] = Some(consumer);
        }
    }
    boxes
}

impl Mailbox {
    /// Sends mail; it waits in the outbox if the ring is full.
    pub fn send(&mut self, to: usize, mail: Mail) {
        if to == self.worker {
            self.local.push_back(mail);
            return;
        }
        let outgoing = &mut self.outgoing[to];
        outgoing.notify = true;
        if !outgoing.outbox.is_empty() {
            outgoing.outbox.push_back(mail);
            return;
        }
        let producer = outgoing.producer.as_mut().expect("every other worker has a ring");
        if let Err(mail) = producer.push(mail) {
            outgoing.outbox.push_back(mail);
        }
    }

    /// Whether a request to a worker finds room in its ring now.
    pub fn has_room(&mut self, to: usize) -> bool {
        if to == self.worker {
            return true;
        }
        let outgoing = &mut self.outgoing[to];
        let producer = outgoing.producer.as_mut().expect("every other worker has a ring");
        outgoing.outbox.is_empty() && producer.free() > 0
    }

    /// Takes the next mail from a worker's ring.
    pub fn take(&mut self, from: usize) -> Option<Mail> {
        if from == self.worker {
            return self.local.pop_front();
        }
        self.incoming[from].as_mut().expect("every other worker has a ring").pop()
    }

    /// How many pieces of mail wait in a participant's ring.
    pub fn waiting(&mut self, from: usize) -> usize {
        if from == self.worker {
            return self.local.len();
        }
        self.incoming[from].as_mut().map_or(0, Consumer::len)
    }

    /// Moves outboxes into rings and wakes those who got mail; tells how many slept. Call before sleeping and once a round.
    pub fn deliver(&mut self) -> u64 {
        let mut woken = 0;
        for outgoing in &mut self.outgoing {
            if let Some(producer) = &mut outgoing.producer {
                while let Some(mail) = outgoing.outbox.pop_front() {
                    outgoing.notify = true;
                    if let Err(mail) = producer.push(mail) {
                        outgoing.outbox.push_front(mail);
                        break;
                    }
                }
            }
            if std::mem::take(&mut outgoing.notify) {
                woken += u64::from(outgoing.waker.notify());
            }
        }
        woken
    }

    /// Whether no mail waits, in either direction.
    pub fn is_idle(&mut self) -> bool {
        self.local.is_empty()
            && self.outgoing.iter().all(|outgoing| outgoing.outbox.is_empty())
            && self.incoming.iter_mut().flatten().all(|consumer| consumer.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wake::{Sleeper, waker};

    fn pair(ring_entries: usize) -> (Vec<Mailbox>, Vec<Sleeper>) {
        let (wakers, sleepers): (Vec<_>, Vec<_>) =
            (0..2).map(|_| waker().expect("an eventfd")).unzip();
        (connect(&wakers, 2, ring_entries, ring_entries), sleepers)
    }

    fn number(mail: &Mail) -> u64 {
        match mail {
            Mail::Flush(tag) => tag.0,
            _ => panic!("only flushes were sent"),
        }
    }

    #[test]
    fn a_full_ring_keeps_the_order_and_loses_nothing() {
        let (mut boxes, _sleepers) = pair(4);
        for tag in 0..20 {
            boxes[0].send(1, Mail::Flush(Tag(tag)));
        }
        assert!(!boxes[0].has_room(1), "the outbox is in use");
        assert!(!boxes[0].is_idle());
        let mut seen = Vec::new();
        while seen.len() < 20 {
            while let Some(mail) = boxes[1].take(0) {
                seen.push(number(&mail));
            }
            boxes[0].deliver();
        }
        assert_eq!(seen, (0..20).collect::<Vec<_>>());
        assert!(boxes[0].has_room(1) && boxes[0].is_idle() && boxes[1].is_idle());
    }

    #[test]
    fn mail_to_oneself_needs_no_ring() {
        let (mut boxes, _sleepers) = pair(4);
        for tag in 0..100 {
            boxes[1].send(1, Mail::Flush(Tag(tag)));
        }
        assert!(boxes[1].has_room(1));
        let taken: Vec<u64> =
            std::iter::from_fn(|| boxes[1].take(1)).map(|mail| number(&mail)).collect();
        assert_eq!(taken, (0..100).collect::<Vec<_>>());
    }
}
