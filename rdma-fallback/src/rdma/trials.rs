//! Trials: whether connections over RDMA carry data at all, and when to do without them for a while.
//!
//! It comes before the flow, in set-up, and hears of every connection's end. A network can let small packets pass and
//! lose large ones: a wrong MTU on one switch or at one node, loss without flow control. Then connections come about, and
//! break at their first placement or long message, again and again; over TCP the pair would live.
//!
//! Invariant: one placement that arrived is proof enough. A peer that dies counts against a connection only if that was
//! before its first one, with data or a long message under way; a device or port of this host that goes never does. The
//! connections of one session fail together: they count once.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::adapter::lock;
use super::cause::Cause;

/// So many failures, one after the other, are no accident.
const FAILURES_MAX: u32 = 2;
/// What failed so long ago says nothing of the next.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How long TCP is used then, if the session lasts no longer.
const PAUSE: Duration = Duration::from_secs(60);

/// A message that is so short passes where anything does, with what is around it: half of the smallest MTU.
const SHORT_BYTES: u32 = 128;

/// Of all connections to one peer.
#[derive(Default)]
pub(super) struct Trials(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Connections that began with no failure between them fail together.
    round: u64,
    failures: u32,
    last: Option<(Instant, Cause)>,
}

/// Of one connection.
pub(super) struct Trial {
    state: Arc<Mutex<State>>,
    round: u64,
    has_placed: bool,
    /// Of the messages that arrived.
    longest_bytes: u32,
}

impl Trial {
    /// A post has arrived, with so many bytes of its message and placed.
    pub(super) fn arrived(&mut self, message_bytes: u32, placed_bytes: u32) {
        self.longest_bytes = self.longest_bytes.max(message_bytes);
        if placed_bytes > 0 && !self.has_placed {
            self.has_placed = true;
            let mut state = lock(&self.state);
            (state.failures, state.last) = (0, None);
        }
    }

    /// The connection broke with these posts under way, each with the bytes of its message and placed.
    pub(super) fn broke(&self, cause: Cause, mut under_way: impl Iterator<Item = (u32, u32)>) {
        let is_of_device = matches!(cause, Cause::DeviceRemoved | Cause::PortDown);
        let is_large = |(message, placed)| placed > 0 || message > self.longest_bytes;
        if !is_of_device && !self.has_placed && under_way.any(is_large) {
            lock(&self.state).failed(self.round, cause, Instant::now());
        }
    }
}

impl State {
    fn failed(&mut self, round: u64, cause: Cause, now: Instant) {
        if round != self.round {
            return;
        }
        self.round += 1;
        if self.last.is_some_and(|(last, _)| now.duration_since(last) >= FORGOTTEN) {
            self.failures = 0;
        }
        self.failures += 1;
        self.last = Some((now, cause));
    }
}

impl Trials {
    /// A connection begins.
    pub(super) fn begin(&self) -> Trial {
        let state = Arc::clone(&self.0);
        let round = lock(&state).round;
        Trial { state, round, has_placed: false, longest_bytes: SHORT_BYTES }
    }

    /// Why RDMA should not be tried now: one line.
    pub(super) fn obstacle(&self, now: Instant) -> Option<String> {
        let state = lock(&self.0);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_failures_make_a_pause_and_one_success_none() {
        let (trials, start) = (Trials::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let failed = |trial: &Trial, seconds| {
            lock(&trials.0).failed(trial.round, Cause::SILENT_PEER, at(seconds));
        };
        let fail = |seconds| failed(&trials.begin(), seconds);
        assert_eq!(trials.obstacle(at(0)), None);
        // Two lanes of one session.
        let (one, other) = (trials.begin(), trials.begin());
        failed(&one, 0);
        failed(&other, 5);
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
        trials.begin().arrived(60, 4096);
        fail(1020);
        assert_eq!(trials.obstacle(at(1021)), None);
    }

    #[test]
    fn only_what_is_large_and_new_is_a_trial() {
        let failures = |messages: &[u32], cause, under_way: &[(u32, u32)]| {
            let trials = Trials::default();
            let mut trial = trials.begin();
            messages.iter().for_each(|bytes| trial.arrived(*bytes, 0));
            trial.broke(cause, under_way.iter().copied());
            lock(&trials.0).failures
        };
        let silent = Cause::SILENT_PEER;
        assert_eq!(failures(&[], silent, &[]), 0);
        assert_eq!(failures(&[], silent, &[(60, 0)]), 0, "a short message");
        assert_eq!(failures(&[], silent, &[(60, 0), (60, 4096)]), 1);
        assert_eq!(failures(&[], silent, &[(300, 0)]), 1, "a record");
        assert_eq!(failures(&[300], silent, &[(300, 0)]), 0, "as long a one came through");
        assert_eq!(failures(&[], Cause::PortDown, &[(60, 4096)]), 0);
        let trials = Trials::default();
        let mut trial = trials.begin();
        trial.arrived(60, 4096);
        trial.broke(silent, [(60, 8192)].into_iter());
        assert_eq!(lock(&trials.0).failures, 0, "data came through");
    }
}
