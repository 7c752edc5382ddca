//! Wakes a worker that sleeps in its io_uring: who pushed something into one of its rings tells it (steps 1 and 6 of
//! the flow). Costs no system call while the worker is awake.
//!
//! ```text
//!   producer                              worker
//!   push to the ring                      sleeping = true        (prepare)
//!   fence                                 fence
//!   sleeping ? then false, ring bell      rings empty ? then sleep until the bell, else awake
//! ```
//!
//! Invariant: no wake-up is lost. Push and load of `sleeping`, store of `sleeping` and look into the rings, are
//! Dekker's pattern: with a sequentially consistent fence in the middle of both, either the worker sees the push and
//! does not sleep, or the producer sees `sleeping` and rings. If another producer took `sleeping` back before, the
//! bell it rings wakes the worker, which looks into all rings before it sleeps again. A bell may ring for nothing.
//! All changes of `sleeping` are read-modify-writes: each sees the one before, also the plain setting of a value.

use std::io;
use std::os::fd::RawFd;

use crate::ring::sync::{Arc, AtomicBool, Ordering, fence};

/// Makes both sides of a wake-up.
///
/// # Errors
/// If the system has no descriptor left.
pub fn waker() -> io::Result<(Waker, Sleeper)> {
    let shared = Arc::new(Shared { sleeping: AtomicBool::new(false), bell: Bell::new()? });
    Ok((Waker { shared: Arc::clone(&shared) }, Sleeper { shared }))
}

/// The side of those that have something for the worker.
#[derive(Clone)]
pub struct Waker {
    shared: Arc<Shared>,
}

impl Waker {
    /// Call after a push (or a batch of pushes) to one of the worker's rings. Says whether the bell had to be rung,
    /// which is a system call.
    pub fn notify(&self) -> bool {
        fence(Ordering::SeqCst);
        // The load keeps the line shared while the worker is awake; the swap lets one of several producers ring.
        let sleeps = self.shared.sleeping.load(Ordering::Relaxed)
            && self.shared.sleeping.swap(false, Ordering::AcqRel);
        if sleeps {
            self.shared.bell.ring();
        }
        sleeps
    }

    /// Wakes the worker whatever it does: always a system call.
    pub fn wake(&self) {
        self.shared.bell.ring();
    }
}

/// The worker's side.
pub struct Sleeper {
    shared: Arc<Shared>,
}

impl Sleeper {
    /// Announces sleep. Then look into every ring: if all are empty, sleep until the bell; then, or else,
    /// [`Sleeper::awake`].
    pub fn prepare(&self) {
        self.shared.sleeping.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// Takes the announcement back.
    pub fn awake(&self) {
        self.shared.sleeping.swap(false, Ordering::AcqRel);
    }

    /// The bell, an eventfd, for `read_eventfd` of the worker's io_uring. Lives as long as any side of this wake-up.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.shared.bell.descriptor()
    }

    /// Sleeps until the bell rings, for threads that have no io_uring. Returns at once if it rang before.
    pub fn wait(&self) {
        self.shared.bell.wait();
    }
}

struct Shared {
    sleeping: AtomicBool,
    bell: Bell,
}

#[cfg(not(loom))]
use eventfd::Bell;
#[cfg(loom)]
use model::Bell;

#[cfg(not(loom))]
mod eventfd {
    use std::fs::File;
    use std::io::{self, Read, Write};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

    /// An eventfd. Blocking, because io_uring then waits for a ring instead of failing with EAGAIN.
    pub(super) struct Bell(File);

    impl Bell {
        pub(super) fn new() -> io::Result<Bell> {
            // SAFETY: eventfd takes no pointers.
            let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
            if descriptor < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor was just opened and nobody else has it.
            Ok(Bell(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) })))
        }

        pub(super) fn ring(&self) {
            let written = (&self.0).write(&1_u64.to_ne_bytes());
            // It would block, not fail, at 2^64 - 2 unread rings; a signal does not interrupt it before that.
            assert!(matches!(written, Ok(8)), "an eventfd refused a write: {written:?}");
        }

        pub(super) fn wait(&self) {
            let mut rings = [0; 8];
            loop {
                match (&self.0).read(&mut rings) {
                    Ok(8) => return,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => panic!("an eventfd refused a read: {other:?}"),
                }
            }
        }

        pub(super) fn descriptor(&self) -> RawFd {
            self.0.as_raw_fd()
        }
    }
}

#[cfg(loom)]
mod model {
    use loom::sync::{Condvar, Mutex};
    use std::io;
    use std::os::fd::RawFd;

    /// What an eventfd does, in loom's world.
    pub(super) struct Bell {
        rings: Mutex<u64>,
        rung: Condvar,
    }

    impl Bell {
        pub(super) fn new() -> io::Result<Bell> {
            Ok(Bell { rings: Mutex::new(0), rung: Condvar::new() })
        }

        pub(super) fn ring(&self) {
            *self.rings.lock().expect("not poisoned") += 1;
            self.rung.notify_one();
        }

        pub(super) fn wait(&self) {
            let mut rings = self.rings.lock().expect("not poisoned");
            while *rings == 0 {
                rings = self.rung.wait(rings).expect("not poisoned");
            }
            *rings = 0;
        }

        pub(super) fn descriptor(&self) -> RawFd {
            -1
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::waker;
    use crate::ring::ring;

    #[test]
    fn every_push_is_seen() {
        const ITEMS: u64 = 50_000;
        let (mut producer, mut consumer) = ring(8);
        let (waker, sleeper) = waker().unwrap();
        let sender = std::thread::spawn(move || {
            for item in 0..ITEMS {
                while producer.push(item).is_err() {
                    std::thread::yield_now();
                }
                waker.notify();
            }
        });
        let mut expected = 0;
        while expected < ITEMS {
            while let Some(item) = consumer.pop() {
                assert_eq!(item, expected);
                expected += 1;
            }
            sleeper.prepare();
            if consumer.is_empty() && expected < ITEMS {
                sleeper.wait();
            }
            sleeper.awake();
        }
        sender.join().unwrap();
    }

    #[test]
    fn no_bell_while_awake() {
        let (waker, sleeper) = waker().unwrap();
        assert!(!waker.notify());
        sleeper.prepare();
        assert!(waker.notify());
        assert!(!waker.notify());
        sleeper.wait();
        waker.clone().wake();
        sleeper.wait();
    }
}
