//! Plays many histories at once, one after the other on each thread, and adds up what they showed.
//!
//! Invariants: the lowest seed that breaks a rule does not depend on the number of threads, nor do the others if the
//! campaign goes on; what is added up belongs to histories that broke no rule.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::changes::Changes;
use crate::marks::Marks;
use crate::run::{Failure, Plan, Played, play};
use crate::watch::Transitions;
use crate::world::Counts;

/// Most failures that are remembered.
const FAILURES_MAX: usize = 100;

/// Which seeds to play.
#[derive(Clone, Debug)]
pub enum Seeds {
    /// These.
    List(Vec<u64>),
    /// So many from the first one on.
    Range {
        /// The first.
        first: u64,
        /// How many.
        count: u64,
    },
    /// From the first one on for so long, in real time.
    During {
        /// The first.
        first: u64,
        /// How long.
        time: Duration,
    },
}

/// Many histories.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// Their seeds.
    pub seeds: Seeds,
    /// What is changed about all of them.
    pub changes: Changes,
    /// How many play at the same time.
    pub threads: usize,
    /// Goes on after a broken rule.
    pub keeps_going: bool,
}

/// What many histories showed.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Histories that broke no rule.
    pub played: u64,
    /// Histories that broke one.
    pub broken: u64,
    /// The broken ones with the lowest seeds, lowest first.
    pub failures: Vec<Failure>,
    /// All that happened.
    pub counts: Counts,
    /// Virtual time of all histories, in nanoseconds.
    pub virtual_ns: u64,
    /// The longest time to settle after the last fault, in virtual nanoseconds, and its seed.
    pub settled_ns_max: (u64, u64),
    /// What was reached.
    pub marks: Marks,
    /// What CPs did: how often, and in how many histories.
    pub points: BTreeMap<(&'static str, &'static str), (u64, u64)>,
    /// What sessions did, likewise.
    pub sessions: BTreeMap<(&'static str, &'static str), (u64, u64)>,
    /// A hash over all histories, whatever the order they ended in.
    pub trace_hash: u64,
    /// How long it took, in real time.
    pub real: Duration,
}

impl Campaign {
    /// Plays them all. `progress` is called now and then.
    pub fn play(&self, mut progress: impl FnMut(&Tally)) -> Tally {
        let begun = Instant::now();
        let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let (sender, ended) = channel();
        let mut tally = Tally::default();
        thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                let (sender, next, stop) = (sender.clone(), &next, &stop);
                scope.spawn(move || self.play_some(begun, next, stop, &sender));
            }
            drop(sender);
            loop {
                match ended.recv_timeout(Duration::from_millis(200)) {
                    Ok((seed, Ok(played))) => tally.add(seed, &played),
                    Ok((_, Err(failure))) => {
                        stop.fetch_or(!self.keeps_going, Ordering::Relaxed);
                        tally.add_failure(*failure);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                tally.real = begun.elapsed();
                progress(&tally);
            }
        });
        tally.real = begun.elapsed();
        tally
    }

    /// How many seeds there are, if that is known before.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        match &self.seeds {
            Seeds::List(list) => Some(list.len() as u64),
            Seeds::Range { count, .. } => Some(*count),
            Seeds::During { .. } => None,
        }
    }

    fn play_some(
        &self,
        begun: Instant,
        next: &AtomicU64,
        stop: &AtomicBool,
        ended: &Sender<Ended>,
    ) {
        while !stop.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(seed) = self.seed(index, begun) else { return };
            let plan = Plan { seed, changes: self.changes.clone(), checker: None };
            if ended.send((seed, play(&plan))).is_err() {
                return;
            }
        }
    }

    fn seed(&self, index: u64, begun: Instant) -> Option<u64> {
        match &self.seeds {
            Seeds::List(list) => list.get(usize::try_from(index).ok()?).copied(),
            Seeds::Range { first, count } => {
                (index < *count).then(|| first.checked_add(index)).flatten()
            }
            Seeds::During { first, time } => {
                (begun.elapsed() < *time).then(|| first.checked_add(index)).flatten()
            }
        }
    }
}

/// A history that ended, with its seed.
type Ended = (u64, Result<Played, Box<Failure>>);

impl Tally {
    /// Virtual seconds for each real one.
    #[must_use]
    pub fn speed(&self) -> f64 {
        self.virtual_ns as f64 / 1e9 / self.real.as_secs_f64().max(1e-9)
    }

    fn add(&mut self, seed: u64, played: &Played) {
        self.played += 1;
        self.counts += played.counts;
        self.virtual_ns += played.virtual_ns;
        self.settled_ns_max = self.settled_ns_max.max((played.settled_ns, seed));
        self.marks += &played.marks;
        self.trace_hash = self.trace_hash.wrapping_add(played.trace_hash);
        add_transitions(&mut self.points, &played.points);
        add_transitions(&mut self.sessions, &played.sessions);
    }

    fn add_failure(&mut self, failure: Failure) {
        self.broken += 1;
        let place = self.failures.partition_point(|known| known.seed < failure.seed);
        self.failures.insert(place, failure);
        self.failures.truncate(FAILURES_MAX);
    }
}

fn add_transitions(
    all: &mut BTreeMap<(&'static str, &'static str), (u64, u64)>,
    seen: &Transitions,
) {
    for (transition, times) in seen {
        let known = all.entry(*transition).or_default();
        *known = (known.0 + times, known.1 + 1);
    }
}
