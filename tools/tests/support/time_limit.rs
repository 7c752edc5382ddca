//! Time limit: ends a test that hangs, and every process it started.
//!
//! Invariant: children are ended through their own handles, which are noted here when they start.

use std::process::Child;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// A child that may be ended from another thread.
pub type SharedChild = Arc<Mutex<Child>>;

static CHILDREN: Mutex<Vec<Weak<Mutex<Child>>>> = Mutex::new(Vec::new());

/// Notes a child, so that it is ended when time runs out.
pub fn note_child(child: Child) -> SharedChild {
    let child = Arc::new(Mutex::new(child));
    let mut children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    children.retain(|known| known.strong_count() > 0);
    children.push(Arc::downgrade(&child));
    child
}

/// Ends a child with SIGKILL and takes its exit status. Harmless if it ended before.
pub fn end_child(child: &SharedChild) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    // A child that is gone already is what is wanted.
    let _ = child.kill();
    let _ = child.wait();
}

/// Ends the whole run, loudly, unless it is dropped in time.
pub struct TimeLimit {
    _done: Sender<()>,
}

impl TimeLimit {
    /// The test `name` may take so long; `TWINPOINT_ROUNDS` stretches it where `rounds` scale.
    pub fn new(name: &'static str, limit: Duration) -> TimeLimit {
        let (done, waiting) = channel();
        let wait = move || {
            use std::sync::mpsc::RecvTimeoutError;
            if waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{name}: not done within {limit:?}; ending all its processes");
                end_all();
                std::process::exit(101);
            }
        };
        std::thread::Builder::new()
            .name("time limit".to_owned())
            .spawn(wait)
            .expect("a thread for the time limit");
        TimeLimit { _done: done }
    }
}

fn end_all() {
    let children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    children.iter().filter_map(Weak::upgrade).for_each(|child| end_child(&child));
}
