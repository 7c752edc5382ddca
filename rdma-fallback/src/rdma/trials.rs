//! Trials: whether connections over RDMA carry data at all, and when to do without them for a while.
//!
//! It comes before the flow, in set-up, and hears of every connection's end. A network can let small packets pass and
//! lose large ones: a wrong MTU on one switch or at one node, loss without flow control. Then connections come about, and
//! break at their first placement or long message, again and again; over TCP the pair would live.
//!
//! Invariant: one placement that arrived is proof enough. A peer that dies, or a port that goes down, counts against a
//! connection only if that was before its first one. The connections of one session fail together: they count once.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::cause::Cause;

/// So many failures, one after the other, are no accident.
const FAILURES_MAX: u32 = 2;
/// What failed so long ago says nothing of the next.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How long TCP is used then, if the session lasts no longer.
const PAUSE: Duration = Duration::from_secs(60);

/// Of all connections to one peer.
#[derive(Default)]
pub(super) struct Trials(Mutex<State>);

/// Which failures are told apart: connections that were begun with none between them fail together.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Trial(u64);

#[derive(Default)]
struct State {
    trial: Trial,
    failures: u32,
    last: Option<(Instant, Cause)>,
}

impl Trials {
    /// A connection begins.
    pub(super) fn begin(&self) -> Trial {
        self.lock().trial
    }

    /// The first placement of a connection has arrived.
    pub(super) fn worked(&self) {
        let mut state = self.lock();
        (state.failures, state.last) = (0, None);
    }

    /// A connection broke before anything large came through.
    pub(super) fn failed(&self, trial: Trial, cause: Cause, now: Instant) {
        let mut state = self.lock();
        if trial != state.trial {
            return;
        }
        state.trial.0 += 1;
        if state.last.is_some_and(|(last, _)| now.duration_since(last) >= FORGOTTEN) {
            state.failures = 0;
        }
        state.failures += 1;
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
        let fail = |seconds| trials.failed(trials.begin(), Cause::SILENT_PEER, at(seconds));
        assert_eq!(trials.obstacle(at(0)), None);
        // Two lanes of one session.
        let (one, other) = (trials.begin(), trials.begin());
        trials.failed(one, Cause::SILENT_PEER, at(0));
        trials.failed(other, Cause::SILENT_PEER, at(5));
        assert_eq!(trials.obstacle(at(5)), None);
        // The next session, however soon.
        fail(5);
        let told = trials.obstacle(at(6)).unwrap();
        assert!(told.contains("2 times") && told.contains("status 12"), "{told}");
        assert_eq!(trials.obstacle(at(65)), None, "tried again after a while");
        fail(75);
        assert!(trials.obstacle(at(76)).is_some(), "and given up at once if it fails again");
        fail(1000);
        assert_eq!(trials.obstacle(at(1001)), None, "what is long ago is forgotten");
        fail(1010);
        assert!(trials.obstacle(at(1011)).is_some());
        trials.worked();
        fail(1020);
        assert_eq!(trials.obstacle(at(1021)), None);
    }
}
