//! How far the secondary is behind, and what an asynchronous primary does about it (R5): it holds its writers back.
//!
//! Invariant: while the lag is as declared or more, writers wait, and the status says so.

use super::{Coordinator, Replication};
use crate::contract::CoordinatorAction;
use crate::message::Role;
use crate::units::Instant;

/// How far the secondary is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Lag {
    pub points: u64,
    pub bytes: u64,
    pub age_ns: u64,
}

impl Coordinator {
    /// Writers wait while an asynchronous secondary is further behind than declared.
    pub(super) fn watch_lag(&mut self) {
        let hold = self.stopping.is_some() || (self.bounds_lag() && self.is_too_far_ahead());
        if hold != self.holding {
            self.holding = hold;
            self.act(CoordinatorAction::Hold(hold));
        }
    }

    fn is_too_far_ahead(&self) -> bool {
        let lag = self.lag(self.now);
        lag.points >= self.options.lag_points
            || lag.bytes >= self.options.lag_bytes
            || lag.age_ns >= self.options.lag_ns
    }

    pub(super) fn lag(&self, now: Instant) -> Lag {
        if self.role != Role::Primary || !self.superblock.paired {
            return Lag::default();
        }
        let behind = self.points.range(self.points_until(self.peer.durable)..);
        let oldest = behind.clone().next().map(|point| point.since);
        Lag {
            points: self.open.previous().0 - self.peer.durable.0.min(self.open.previous().0),
            bytes: behind.map(|point| point.bytes).sum(),
            age_ns: oldest.map_or(0, |since| now.since(since)),
        }
    }

    /// When the secondary's lag becomes too old, if nothing is confirmed until then.
    pub(super) fn lag_timeout(&self) -> Option<Instant> {
        let bounded = self.bounds_lag() && !self.holding;
        let oldest = self.points.get(self.points_until(self.peer.durable)).filter(|_| bounded)?;
        Some(oldest.since.after(self.options.lag_ns))
    }

    fn bounds_lag(&self) -> bool {
        self.role == Role::Primary
            && self.options.paired
            && self.options.replication == Replication::Async
            && !self.peer.alone
    }
}
