//! What something durable calls committed (R4): recovery believes CPs up to there without a look at their data, so only
//! what those freed may be overwritten. Records claim it one CP late; here the superblock does, when nobody can wait.
//!
//! Invariant: a claim is told to the shards only after the structure that makes it is durable.

use super::Coordinator;
use super::superblock_job::Then;
use crate::units::Instant;

/// How long an idle store's superblock is not told of the last commit, at least.
const CLAIM_AFTER_NS: u64 = 1_000_000_000;

impl Coordinator {
    /// A shard waits for space that CPs freed which nothing durable calls committed yet. The next CP's records would; this
    /// one may have to wait for just that space.
    pub(super) fn claim(&mut self) {
        if self.claimed < self.committed && !self.superblock_job.will_claim(self.committed) {
            self.write_superblock(Then::Nothing);
        }
    }

    /// No CP came for a while whose records would claim what is committed: the space that the last ones freed is not to
    /// wait for the next writer.
    pub(super) fn watch_claim(&mut self) {
        if self.claim_timeout().is_some_and(|at| at <= self.now) {
            self.claim();
        }
    }

    /// When the superblock is to be told, if no CP comes until then. Later than CPs follow each other under any load, for
    /// each claims the one before it without writing more.
    pub(super) fn claim_timeout(&self) -> Option<Instant> {
        let is_idle = self.open_is_empty && self.all_points_committed();
        let wanted = self.serving
            && is_idle
            && self.claimed < self.base()
            && !self.superblock_job.will_claim(self.committed);
        let after_ns = CLAIM_AFTER_NS.max(self.options.cp_interval_ns.saturating_mul(2));
        wanted.then(|| self.committed_at.after(after_ns))
    }
}
