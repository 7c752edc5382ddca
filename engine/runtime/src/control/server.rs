//! Server: the node's side of the control socket: who may speak, for how long, and until when.
//!
//! Invariants: at most [`CONNECTIONS_MAX`] clients, each on a thread of its own that ends with it; a client that
//! dawdles or sends no request is told so and cut off; a stop waits for replies under way, but not for clients.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Operator;
use super::answer::answer;
use super::line::{LINE_BYTES_MAX, LINE_TIME_MAX, LineFault, WRITE_TIME_MAX, read_line};
use super::reply::ControlReply;
use super::request::ControlRequest;
use super::socket::{check_place, listen};

/// Most clients at a time.
pub const CONNECTIONS_MAX: usize = 32;
/// Longest time that a stop waits for commands under way.
const STOP_TIME_MAX: Duration = Duration::from_secs(1);

/// The node's side of the control socket.
pub struct ControlServer {
    path: PathBuf,
    /// Device and inode of the socket, so that another one at the same path is left alone.
    identity: (u64, u64),
    /// The listening socket once more: to shut it down ends the wait for clients.
    waker: UnixStream,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens at `path`, in the place of a socket there on which nobody answers.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody answers, [`io::ErrorKind::AlreadyExists`] if something else than a socket
    /// is there, or the system's reason.
    pub fn start(path: &Path, operator: Arc<dyn Operator>) -> io::Result<ControlServer> {
        check_place(path)?;
        let listener = listen(path)?;
        let metadata = fs::symlink_metadata(path)?;
        let waker = UnixStream::from(OwnedFd::from(listener.try_clone()?));
        let shared = Arc::new(Shared {
            operator,
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
            client_left: Condvar::new(),
        });
        let acceptor = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&listener, &acceptor))?;
        Ok(ControlServer {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            waker,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the socket, lets commands under way be answered for up to a second, and ends. Also done by dropping.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let found = fs::symlink_metadata(&self.path).map(|found| (found.dev(), found.ino()));
        if found.is_ok_and(|found| found == self.identity) {
            // Nobody can do anything about a socket that stays: the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
        let _ = self.waker.shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.shared.wait_for_clients();
    }
}

struct Shared {
    operator: Arc<dyn Operator>,
    stopping: AtomicBool,
    /// By the acceptor's count, so that each client is taken out by its own thread.
    clients: Mutex<HashMap<u64, UnixStream>>,
    client_left: Condvar,
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Ends every client's next read, and waits a little for replies under way.
    fn wait_for_clients(&self) {
        let deadline = Instant::now() + STOP_TIME_MAX;
        let mut clients = self.clients();
        clients.values().for_each(|client| drop(client.shutdown(Shutdown::Read)));
        while !clients.is_empty() {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            let waited = self.client_left.wait_timeout(clients, rest);
            clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut next = 0_u64;
    loop {
        let stream = match listener.accept() {
            _ if shared.is_stopping() => return,
            Ok((stream, _)) => stream,
            // Out of descriptors or memory: others will give some back.
            Err(_) => {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Ok(copy) = stream.try_clone() else { continue };
        let number = next;
        next += 1;
        {
            let mut clients = shared.clients();
            if clients.len() >= CONNECTIONS_MAX {
                refuse(&stream, "busy", "too many clients on the control socket: try again later");
                continue;
            }
            clients.insert(number, copy);
        }
        let its = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("control-client".to_owned());
        let spawned = thread.spawn(move || {
            let _leaving = Leaving { shared: &its, number };
            serve(stream, &its);
        });
        if spawned.is_err() {
            drop(Leaving { shared, number });
        }
    }
}

/// Takes a client out of the list, whatever ends its thread.
struct Leaving<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.shared.clients().remove(&self.number);
        self.shared.client_left.notify_all();
    }
}

/// Answers one client until it leaves, misbehaves, or the node stops.
fn serve(mut stream: UnixStream, shared: &Shared) {
    let mut buffer = Vec::new();
    if stream.set_write_timeout(Some(WRITE_TIME_MAX)).is_err() {
        return;
    }
    while !shared.is_stopping() {
        let deadline = Instant::now() + LINE_TIME_MAX;
        let line = match read_line(&mut stream, &mut buffer, LINE_BYTES_MAX, deadline) {
            Ok(line) => line,
            Err(LineFault::Ended) if buffer.is_empty() => return,
            Err(LineFault::TooLong) => {
                return refuse(&stream, "bad-request", "a request is one line of at most 64 KiB");
            }
            Err(LineFault::Late) => {
                return refuse(&stream, "timeout", "no whole request within 30 s");
            }
            Err(LineFault::Ended) => {
                return refuse(&stream, "bad-request", "a request ends with a newline");
            }
            Err(LineFault::System(_)) => return,
        };
        let request = match ControlRequest::parse(&line) {
            Ok(request) => request,
            Err(error) => return refuse(&stream, "bad-request", &error.to_string()),
        };
        if send(&stream, &answer(request, shared.operator.as_ref())).is_err() {
            return;
        }
    }
}

fn refuse(stream: &UnixStream, kind: &str, text: &str) {
    // Whoever does not take the reason has to do without.
    let _ = send(stream, &ControlReply::refused(kind, text));
    let _ = stream.shutdown(Shutdown::Write);
}

fn send(mut stream: &UnixStream, reply: &ControlReply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}
