//! Trials: whether connections over RDMA carry data at all, and when to do without them for a while.
//!
//! It comes before the flow, in set-up, and hears of every connection's end. A network can let small packets pass and
//! lose large ones: a wrong MTU on one switch, loss without flow control. Then connections come about, and break at
//! their first placement, again and again; over TCP the pair would live.
//!
//! Invariant: one placement that arrived is proof enough. A peer that dies, or a port that goes down, counts against a
//! connection only if that was before its first one.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::cause::Cause;

/// So many failures, one after the other, are no accident.
const FAILURES_MAX: u32 = 2;
/// The lanes of one session fail together.
const TOGETHER: Duration = Duration::from_secs(1);
/// What failed so long ago says nothing of the next.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How long TCP is used then, if the session lasts no longer.
const PAUSE: Duration = Duration::from_secs(60);

/// Of all connections to one peer.
#[derive(Default)]
pub(super) struct Trials(Mutex<State>);

#[derive(Default)]
struct State {
    failures: u32,
    last: Option<(Instant, Cause)>,
}

impl Trials {
    /// The first placement of a connection has arrived.
    pub(super) fn worked(&self) {
        *self.lock() = State::default();
    }

    /// A connection broke at its first placement.
    pub(super) fn failed(&self, cause: Cause, now: Instant) {
        let mut state = self.lock();
        if state.last.is_some_and(|(last, _)| now.duration_since(last) >= FORGOTTEN) {
            *state = State::default();
        }
        if state.last.is_none_or(|(last, _)| now.duration_since(last) >= TOGETHER) {
            state.failures += 1;
        }
        state.last = Some((now, cause));
    }

    /// Why RDMA should not be tried now: one line.
    pub(super) fn obstacle(&self, now: Instant) -> Option<String> {
        let state = self.lock();
        let (last, cause) = state.last?;
        let is_over = now.duration_since(last) >= PAUSE;
        (state.failures >= FAILURES_MAX && !is_over).then(|| {
            format!(
                "no data came through, {} times one after the other ({cause}): the MTU on the way?; a session that \
                 begins in a minute tries again",
                state.failures
            )
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_failures_make_a_pause_and_one_success_none() {
        let (trials, start) = (Trials::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(trials.obstacle(at(0)), None);
        trials.failed(Cause::SILENT_PEER, at(0));
        // Another lane of the same session.
        trials.failed(Cause::SILENT_PEER, at(0));
        assert_eq!(trials.obstacle(at(1)), None);
        trials.failed(Cause::SILENT_PEER, at(10));
        let told = trials.obstacle(at(11)).unwrap();
        assert!(told.contains("2 times") && told.contains("status 12"), "{told}");
        assert_eq!(trials.obstacle(at(70)), None, "tried again after a while");
        trials.failed(Cause::SILENT_PEER, at(75));
        assert!(trials.obstacle(at(76)).is_some(), "and given up at once if it fails again");
        trials.failed(Cause::SILENT_PEER, at(1000));
        assert_eq!(trials.obstacle(at(1001)), None, "what is long ago is forgotten");
        trials.failed(Cause::SILENT_PEER, at(1010));
        assert!(trials.obstacle(at(1011)).is_some());
        trials.worked();
        trials.failed(Cause::SILENT_PEER, at(1020));
        assert_eq!(trials.obstacle(at(1021)), None);
    }
}
