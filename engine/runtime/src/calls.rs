//! How threads off the data path speak with worker 0: operators, the link, the status.
//!
//! Invariants: a call never blocks a worker; a caller waits at most its time limit; after the workers ended every call
//! fails at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use twinpoint_core::contract::{Command, Reply};
use twinpoint_core::coordinator::CoordinatorStatus;
use twinpoint_core::message::Hello;

use crate::link::NewSession;
use crate::ublk::Device;
use crate::wake::Waker;

/// One call.
pub(crate) enum Call {
    Command(Command, Sender<Reply>),
    PeerHello(Box<Hello>, Sender<Reply>),
    Session(Box<NewSession>),
    Status(Sender<CoordinatorStatus>),
    Ublk(Arc<Device>),
}

/// The callers' side. Stays the same while the workers come and go.
#[derive(Clone, Default)]
pub(crate) struct Caller {
    to: Arc<Mutex<Option<Connection>>>,
    state: Arc<State>,
}

struct Connection {
    sender: Sender<Call>,
    waker: Waker,
}

#[derive(Default)]
struct State {
    waiting: AtomicUsize,
    session_up: AtomicBool,
    session_coming: AtomicBool,
    primary: AtomicBool,
}

/// Worker 0's side.
pub(crate) struct Calls {
    receiver: Receiver<Call>,
    state: Arc<State>,
}

impl Caller {
    /// Connects callers with new workers.
    pub fn connect(&self, waker: Waker) -> Calls {
        let (sender, receiver) = channel();
        self.state.waiting.store(0, Ordering::SeqCst);
        self.state.session_up.store(false, Ordering::SeqCst);
        self.state.session_coming.store(false, Ordering::SeqCst);
        *self.lock() = Some(Connection { sender, waker });
        Calls { receiver, state: Arc::clone(&self.state) }
    }

    /// From now on every call fails.
    pub fn disconnect(&self) {
        *self.lock() = None;
    }

    /// Has a command carried out; none if the node is not there or does not answer in time.
    pub fn command(&self, command: Command, limit: Duration) -> Option<Reply> {
        let (sender, receiver) = channel();
        self.send(Call::Command(command, sender))?;
        receiver.recv_timeout(limit).ok()
    }

    pub fn peer_hello(&self, hello: Box<Hello>, limit: Duration) -> Option<Reply> {
        let (sender, receiver) = channel();
        self.send(Call::PeerHello(hello, sender))?;
        receiver.recv_timeout(limit).ok()
    }

    pub fn status(&self, limit: Duration) -> Option<CoordinatorStatus> {
        let (sender, receiver) = channel();
        self.send(Call::Status(sender))?;
        receiver.recv_timeout(limit).ok()
    }

    pub fn begin_session(&self, session: NewSession) {
        // Until worker 0 has taken it, which it answers for itself from then on.
        self.state.session_coming.store(true, Ordering::SeqCst);
        if self.send(Call::Session(Box::new(session))).is_none() {
            self.state.session_coming.store(false, Ordering::SeqCst);
        }
    }

    /// Gives a block device's queues to the workers; false if there are none.
    pub fn attach(&self, device: &Arc<Device>) -> bool {
        self.send(Call::Ublk(Arc::clone(device))).is_some()
    }

    pub fn session_is_up(&self) -> bool {
        self.state.session_up.load(Ordering::SeqCst)
            || self.state.session_coming.load(Ordering::SeqCst)
    }

    pub fn is_primary(&self) -> bool {
        self.state.primary.load(Ordering::SeqCst)
    }

    fn send(&self, call: Call) -> Option<()> {
        let connection = self.lock();
        let connection = connection.as_ref()?;
        self.state.waiting.fetch_add(1, Ordering::SeqCst);
        connection.sender.send(call).ok()?;
        connection.waker.notify();
        Some(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.to.lock().expect("nobody panics while holding the connection")
    }
}

impl Calls {
    /// The next call.
    pub fn take(&mut self) -> Option<Call> {
        if !self.is_waiting() {
            return None;
        }
        match self.receiver.try_recv() {
            Ok(call) => {
                self.state.waiting.fetch_sub(1, Ordering::SeqCst);
                Some(call)
            }
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => None,
        }
    }

    /// Whether a call waits, or is just being sent.
    pub fn is_waiting(&self) -> bool {
        self.state.waiting.load(Ordering::Relaxed) > 0
    }

    /// Worker 0 took a session, and is at it or refused it.
    pub fn session_taken(&self, up: bool) {
        self.state.session_up.store(up, Ordering::SeqCst);
        self.state.session_coming.store(false, Ordering::SeqCst);
    }

    pub fn session_over(&self) {
        // Stored only when it changes: the line stays shared with the callers.
        if self.state.session_up.load(Ordering::Relaxed) {
            self.state.session_up.store(false, Ordering::SeqCst);
        }
    }

    pub fn set_primary(&self, primary: bool) {
        self.state.primary.store(primary, Ordering::SeqCst);
    }
}
