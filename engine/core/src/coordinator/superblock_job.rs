//! Writes the superblock: first copy, flush, second copy, flush. Then does what waited for it.
//!
//! Invariant: one writing at a time; what waits for a change runs only when both copies that hold it are durable, so
//! a torn or rotten copy never brings an older state back.

use super::Coordinator;
use crate::contract::{CoordinatorAction, IoToken, Refusal, Reply, Ticket};
use crate::geometry::Geometry;
use crate::units::CpNumber;

/// The writing under way, and what is still to be written.
#[derive(Debug, Default)]
pub(super) struct SuperblockJob {
    /// Waits for the next writing.
    queued: Vec<Then>,
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    io: IoToken,
    step: u8,
    bytes: Vec<u8>,
    /// The last commit that it tells of.
    committed: CpNumber,
    then: Vec<Then>,
}

/// What happens once the superblock is durable.
#[derive(Clone, Debug)]
pub(super) enum Then {
    /// The node may serve.
    Serve,
    /// The primary carries on alone.
    Alone,
    /// Blocks since the base may be reused.
    BaseGivenUp,
    /// The secondary is this side's peer; answer its hello.
    Hello(Ticket),
    /// The new term is open.
    Promoted(Ticket, CpNumber),
    /// The branch is no more; go back to where it began.
    BranchDropped(Ticket, CpNumber),
    /// Stopped cleanly.
    Stopped(Ticket),
    /// Nothing waits.
    Nothing,
}

impl SuperblockJob {
    /// A branch is being dropped: its node goes back as soon as that is durable.
    pub(super) fn drops_branch(&self) -> bool {
        self.then().any(|then| matches!(then, Then::BranchDropped(..)))
    }

    /// Whether the superblock is about to call `cp` committed.
    pub(super) fn will_claim(&self, cp: CpNumber) -> bool {
        let claims = |under_way: &UnderWay| under_way.committed >= cp;
        !self.queued.is_empty() || self.under_way.as_ref().is_some_and(claims)
    }

    /// All that waits for this writing and the next.
    fn then(&self) -> impl Iterator<Item = &Then> {
        let under_way = self.under_way.iter().flat_map(|under_way| &under_way.then);
        self.queued.iter().chain(under_way)
    }

    /// Whether the superblock on the device is the one in memory.
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_none() && self.queued.is_empty()
    }
}

impl Coordinator {
    /// Has the superblock, as it is in memory, written; then does what is given.
    pub(super) fn write_superblock(&mut self, then: Then) {
        self.superblock_job.queued.push(then);
    }

    /// Starts a writing if one is wanted and none is under way.
    pub(super) fn pump_superblock(&mut self) {
        if self.superblock_job.under_way.is_some() || self.superblock_job.queued.is_empty() {
            return;
        }
        self.superblock.sequence += 1;
        self.superblock.committed = self.committed;
        self.superblock.base = if self.has_given_up_base() { self.committed } else { self.base() };
        let bytes = self.superblock.encode();
        let then = std::mem::take(&mut self.superblock_job.queued);
        let io = self.start();
        let block = Geometry::superblock_copies()[0];
        self.act(CoordinatorAction::WriteMetadata { io, block, bytes: bytes.clone() });
        self.superblock_job.under_way =
            Some(UnderWay { io, step: 0, bytes, committed: self.committed, then });
    }

    pub(super) fn superblock_step_done(&mut self, io: IoToken) {
        let mut job =
            self.superblock_job.under_way.take().expect("only a flush and this are under way");
        assert_eq!(job.io, io, "an answer to nothing that was asked");
        job.step += 1;
        match job.step {
            1 | 3 => {
                job.io = self.start();
                self.act(CoordinatorAction::Flush { io: job.io });
            }
            2 => {
                job.io = self.start();
                let block = Geometry::superblock_copies()[1];
                self.act(CoordinatorAction::WriteMetadata {
                    io: job.io,
                    block,
                    bytes: job.bytes.clone(),
                });
            }
            _ => {
                // What it claims is announced after all that waited for it.
                let claims_more = job.committed > self.claimed;
                self.claimed = self.claimed.max(job.committed);
                for then in job.then {
                    self.superblock_written(then);
                }
                if claims_more && !self.failed {
                    self.announce_commit();
                }
                // Also when the store has failed since: a deposition has to be known at the next start.
                self.pump_superblock();
                return;
            }
        }
        self.superblock_job.under_way = Some(job);
    }

    fn superblock_written(&mut self, then: Then) {
        if self.failed {
            self.superblock_written_late(then);
            return;
        }
        match then {
            Then::Serve => self.serve(),
            // The peer may have come back meanwhile.
            Then::Alone if !self.going_alone => {}
            Then::Alone => {
                self.peer.alone = true;
                self.answer_waiters();
            }
            Then::BaseGivenUp => {
                self.giving_up_base = false;
                self.announce_commit();
            }
            Then::Hello(ticket) => self.answer_hello(ticket),
            Then::Promoted(ticket, last) => self.promoted(ticket, last),
            Then::BranchDropped(ticket, common) => {
                self.act(CoordinatorAction::Reply(ticket, Reply::BranchDropped(common)));
                self.restart(common);
            }
            Then::Stopped(ticket) => self.act(CoordinatorAction::Reply(ticket, Reply::Stopped)),
            Then::Nothing => {}
        }
    }

    /// The store failed meanwhile: nothing begins any more (R9).
    fn superblock_written_late(&mut self, then: Then) {
        match then {
            Then::Hello(ticket) | Then::Promoted(ticket, _) | Then::BranchDropped(ticket, _) => {
                self.refuse(ticket, Refusal::StoreFailed);
            }
            Then::Stopped(ticket) => self.act(CoordinatorAction::Reply(ticket, Reply::Stopped)),
            Then::Serve | Then::Alone | Then::BaseGivenUp | Then::Nothing => {}
        }
    }
}
