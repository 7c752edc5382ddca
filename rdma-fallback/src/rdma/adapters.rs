//! Adapters: which devices are open, and the opening of another one. It finds the one that is there.
//!
//! Before the flow, in set-up. To open a device registers the node's whole region, which takes long where that is large;
//! a set-up has little time. So a thread opens, and who has lost patience finds the adapter at the next try.
//!
//! Invariants:
//! - A device is opened once at a time.
//! - An adapter lives as long as somebody uses it, and for a while after its opening, if nobody has come yet or if that
//!   took long: a device that is removed can only go when nobody holds it.

use std::io;
use std::sync::{
    Arc, Condvar, LockResult, Mutex, MutexGuard, PoisonError, WaitTimeoutResult, Weak,
};
use std::thread;
use std::time::{Duration, Instant};

use super::adapter::{Adapter, lock};
use crate::Region;

/// How long an adapter waits for its first user, whose patience was shorter than the registering of its memory.
const WAITING_MAX: Duration = Duration::from_secs(60);

/// An opening that takes longer keeps its adapter for that time in any case.
const SLOW: Duration = Duration::from_secs(1);
/// How often it is looked whether the device has gone meanwhile.
const LOOK: Duration = Duration::from_secs(1);

/// The adapters in use, and those that are being opened.
#[derive(Default)]
pub(super) struct Adapters(Arc<Desk>);

#[derive(Default)]
struct Desk {
    state: Mutex<DeskState>,
    changed: Condvar,
}

#[derive(Default)]
struct DeskState {
    used: Vec<Weak<Adapter>>,
    /// By name. None until it is open.
    opening: Vec<(String, Option<io::Result<Arc<Adapter>>>)>,
}

/// Why there is no adapter.
#[derive(Debug)]
pub(super) enum OpenFault {
    /// What the system says.
    System(io::Error),
    /// It is still being opened, and will be there for who asks again soon.
    Patience,
}

impl Adapters {
    /// The adapter of a device, opened if there is none. To register much memory takes long, so a thread does it, and
    /// who has not so much time may ask again.
    pub(super) fn open(
        &self,
        name: &str,
        region: &Arc<Region>,
        until: Instant,
    ) -> Result<Arc<Adapter>, OpenFault> {
        let desk = &self.0;
        let mut state = lock(&desk.state);
        loop {
            if let Some(found) = state.find(name) {
                return Ok(found);
            }
            match state.opening.iter().position(|opening| opening.0 == name) {
                Some(place) if state.opening[place].1.is_some() => {
                    let (_, opened) = state.opening.swap_remove(place);
                    let adapter = opened.expect("just seen").map_err(OpenFault::System)?;
                    if adapter.is_dead() {
                        continue;
                    }
                    state.used.push(Arc::downgrade(&adapter));
                    desk.changed.notify_all();
                    return Ok(adapter);
                }
                Some(_) => {}
                None => {
                    let (desk, region) = (Arc::clone(desk), Arc::clone(region));
                    let of = name.to_owned();
                    let thread = thread::Builder::new().name("rdma-open".to_owned());
                    let thread = thread.spawn(move || desk.open(&of, &region));
                    thread.map_err(OpenFault::System)?;
                    state.opening.push((name.to_owned(), None));
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(OpenFault::Patience);
            }
            state = wait(desk.changed.wait_timeout(state, left));
        }
    }
}

impl DeskState {
    fn find(&mut self, name: &str) -> Option<Arc<Adapter>> {
        self.used.retain(|adapter| adapter.strong_count() > 0);
        let fits = |adapter: &Arc<Adapter>| adapter.name() == name && !adapter.is_dead();
        self.used.iter().filter_map(Weak::upgrade).find(fits)
    }

    /// The place of what was opened and is wanted by nobody yet.
    fn unclaimed(&self, name: &str) -> Option<usize> {
        self.opening.iter().position(|opening| opening.0 == name && opening.1.is_some())
    }
}

impl Desk {
    /// Opens a device, and lets go of it when nobody comes for it in time; of one that took long also when somebody
    /// came: his peer may have had no patience, and both come again.
    fn open(&self, name: &str, region: &Arc<Region>) {
        let began = Instant::now();
        let opened = Adapter::open(name, region).map(Arc::new);
        let kept = opened.as_ref().ok().filter(|_| began.elapsed() >= SLOW).cloned();
        let mut state = lock(&self.state);
        let place = state.opening.iter().position(|opening| opening.0 == name);
        state.opening[place.expect("only this thread ends an opening")].1 = Some(opened);
        self.changed.notify_all();
        let end = Instant::now() + WAITING_MAX;
        loop {
            let place = state.unclaimed(name);
            let waits = place.is_some() || kept.is_some();
            let left = end.saturating_duration_since(Instant::now());
            if !waits || left.is_zero() || kept.as_ref().is_some_and(|kept| kept.is_dead()) {
                let unclaimed = place.map(|place| state.opening.swap_remove(place));
                drop(state);
                // Closed without the lock: it may take a while.
                drop((unclaimed, kept));
                return;
            }
            state = wait(self.changed.wait_timeout(state, left.min(LOOK)));
        }
    }
}

fn wait<T>(waited: LockResult<(MutexGuard<'_, T>, WaitTimeoutResult)>) -> MutexGuard<'_, T> {
    waited.unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        let region = Arc::new(Region::new(4096).unwrap());
        let adapters = Adapters::default();
        for _ in 0..2 {
            let until = Instant::now() + Duration::from_secs(20);
            let opened = adapters.open("no-such-device", &region, until);
            assert!(matches!(opened, Err(OpenFault::System(_))));
        }
        assert!(lock(&adapters.0.state).opening.is_empty());
    }

    /// Whoever has no patience is told so, and the opening goes on without him.
    #[test]
    fn an_opening_outlasts_impatience() {
        let region = Arc::new(Region::new(4096).unwrap());
        let adapters = Adapters::default();
        // The opening's thread cannot end before the lock is free, and the time is up then.
        let opened = adapters.open("no-such-device", &region, Instant::now());
        assert!(matches!(opened, Err(OpenFault::Patience)));
        let until = Instant::now() + Duration::from_secs(20);
        let opened = adapters.open("no-such-device", &region, until);
        assert!(matches!(opened, Err(OpenFault::System(_))));
    }
}
