//! The control socket: how `twinpoint status` and its kin speak with a node. Beside the flow.
//!
//! A unix socket of mode 0600. Each request is one JSON object on one line, and so is each reply:
//!
//! ```text
//! {"command":"volume-create","name":"disk","size_bytes":1073741824}
//! {"ok":true,"volume":1}
//! {"command":"promote","force":false}
//! {"ok":false,"kind":"primary-connected","error":"the primary is connected: ..."}
//! ```
//!
//! Invariants: a line is at most [`LINE_BYTES_MAX`] long and has to be whole within [`LINE_TIME_MAX`]; at most
//! [`CONNECTIONS_MAX`] clients are served at a time; whoever sends something else gets one error line and is cut off;
//! a socket that somebody answers on is never taken over.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use twinpoint_core::contract::{Command, Refusal, Reply};

use crate::link::explain;
use crate::status::{NodeStatus, VolumeStatus};

/// Longest request, in bytes with its newline.
pub const LINE_BYTES_MAX: usize = 64 * 1024;
/// Longest reply that a client accepts, in bytes.
pub const REPLY_BYTES_MAX: usize = 1024 * 1024;
/// Longest time from the end of a reply to the end of the next request.
pub const LINE_TIME_MAX: Duration = Duration::from_secs(30);
/// Most clients at a time.
pub const CONNECTIONS_MAX: usize = 32;
/// Longest time that a reply may take to be taken.
const WRITE_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest time that a stop waits for commands under way.
const STOP_TIME_MAX: Duration = Duration::from_secs(1);

/// The node, as its operator sees it.
pub trait Operator: Send + Sync {
    /// Does a command and waits for what it comes to.
    fn command(&self, command: Command) -> Reply;
    /// Tells how the node is; nothing while it starts or stops.
    fn status(&self) -> Option<NodeStatus>;
    /// Begins an orderly stop, and returns before its end.
    fn stop(&self);
}

/// What an operator asks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlRequest {
    /// How is the node?
    Status,
    /// Seal a CP.
    Checkpoint {
        /// By this name.
        #[serde(default)]
        name: Option<String>,
    },
    /// Create a thin volume.
    VolumeCreate {
        /// Its name.
        name: String,
        /// Its size in bytes.
        size_bytes: u64,
    },
    /// Delete a volume.
    VolumeDelete {
        /// Its name.
        name: String,
    },
    /// Which volumes are there?
    VolumeList,
    /// Take over as primary.
    Promote {
        /// Even though the primary is connected.
        #[serde(default)]
        force: bool,
    },
    /// Drop a branch, and go back to where it began.
    BranchDrop {
        /// Its name.
        name: String,
    },
    /// Stop in order.
    Stop,
}

/// What a request came to. Fields that do not belong to the request are left out.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ControlReply {
    /// Whether it was done.
    pub ok: bool,
    /// Why not, in one word that never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Why not and what to do, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The CP: of a checkpoint the one that holds it, of a promotion the last one before it, of a dropped branch the
    /// one that the store goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cp: Option<u64>,
    /// The store's root at that CP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The new term.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    /// The volume's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<u32>,
    /// All volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<VolumeStatus>>,
    /// The node's status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Box<NodeStatus>>,
}

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
    /// [`ErrorKind::AddrInUse`] if somebody answers, [`ErrorKind::AlreadyExists`] if something else than a socket is
    /// there, or the system's reason.
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

/// The tool's side of the control socket.
pub struct ControlClient {
    stream: UnixStream,
    path: PathBuf,
    buffer: Vec<u8>,
}

impl ControlClient {
    /// Connects to a node.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect(path: &Path) -> Result<ControlClient, ControlError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ControlError::Connect { path: path.to_owned(), source })?;
        Ok(ControlClient { stream, path: path.to_owned(), buffer: Vec::new() })
    }

    /// Asks, and waits for the reply for at most `limit`.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if the node refuses, or that it could not be understood.
    pub fn request(
        &mut self,
        request: &ControlRequest,
        limit: Duration,
    ) -> Result<ControlReply, ControlError> {
        let mut line = serde_json::to_vec(request).expect("a request is plain data");
        line.push(b'\n');
        let lost = |source| ControlError::Lost { path: self.path.clone(), source };
        self.stream.set_write_timeout(Some(WRITE_TIME_MAX)).map_err(lost)?;
        // A node that refuses the connection itself has said why and closed: read that first.
        let sent = self.stream.write_all(&line);
        let deadline = Instant::now() + limit;
        let line = read_line(&mut self.stream, &mut self.buffer, REPLY_BYTES_MAX, deadline);
        let line = match (line, sent) {
            (Ok(line), _) => line,
            (Err(LineFault::Late), _) => {
                return Err(ControlError::Silent { path: self.path.clone(), limit });
            }
            (Err(LineFault::System(source)), _) | (Err(_), Err(source)) => {
                return Err(lost(source));
            }
            (Err(LineFault::Ended), Ok(())) => {
                return Err(lost(io::Error::from(ErrorKind::UnexpectedEof)));
            }
            (Err(LineFault::TooLong), Ok(())) => {
                return Err(ControlError::Garbage { path: self.path.clone() });
            }
        };
        let reply: ControlReply = serde_json::from_slice(&line)
            .map_err(|_| ControlError::Garbage { path: self.path.clone() })?;
        if reply.ok {
            return Ok(reply);
        }
        let kind = reply.kind.unwrap_or_else(|| "unknown".to_owned());
        let text = reply.error.unwrap_or_else(|| "the node refused without a reason".to_owned());
        Err(ControlError::Refused { kind, text })
    }
}

/// Why a node's answer is missing or not a good one.
#[derive(Debug)]
pub enum ControlError {
    /// Nobody listens there, or the socket is closed to this user.
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The connection broke.
    Lost {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No reply in time.
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it was waited.
        limit: Duration,
    },
    /// Something else than a node listens there.
    Garbage {
        /// The socket.
        path: PathBuf,
    },
    /// The node says no.
    Refused {
        /// In one word.
        kind: String,
        /// In one line.
        text: String,
    },
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ControlError::Connect { path, source } => write!(
                f,
                "no node answers on {}: {source}; is `twinpoint serve` running, and is this its --control?",
                path.display()
            ),
            ControlError::Lost { path, source } => write!(
                f,
                "the node at {} broke off: {source}; see its log, then try again",
                path.display()
            ),
            ControlError::Silent { path, limit } => write!(
                f,
                "no answer from {} within {} s: the command may still be carried out; see `twinpoint status`",
                path.display(),
                limit.as_secs_f32()
            ),
            ControlError::Garbage { path } => write!(
                f,
                "what answers on {} is not a Twinpoint node of this version: check --control",
                path.display()
            ),
            ControlError::Refused { text, .. } => f.write_str(text),
        }
    }
}

impl std::error::Error for ControlError {}

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

/// Refuses a place where somebody answers, or that something else than a socket has.
fn check_place(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        let text = format!("{} exists and is not a socket", path.display());
        return Err(io::Error::new(ErrorKind::AlreadyExists, text));
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let text = format!("another node answers on {}", path.display());
            Err(io::Error::new(ErrorKind::AddrInUse, text))
        }
        Err(error)
            if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Makes the socket in a closed folder and moves it to its place, so that it is never open to others.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let folder = folder.join(format!(".twinpoint-{}", std::process::id()));
    DirBuilder::new().mode(0o700).create(&folder).map_err(|error| {
        let text = format!("cannot create a socket at {}: {error}", path.display());
        io::Error::new(error.kind(), text)
    })?;
    let inside = folder.join("s");
    let listener = UnixListener::bind(&inside).and_then(|listener| {
        fs::set_permissions(&inside, Permissions::from_mode(0o600))?;
        fs::rename(&inside, path)?;
        Ok(listener)
    });
    if listener.is_err() {
        let _ = fs::remove_file(&inside);
    }
    let _ = fs::remove_dir(&folder);
    listener
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
        let request = match serde_json::from_slice::<ControlRequest>(&line) {
            Ok(request) => request,
            Err(error) => {
                let text = format!("not a request ({error}): send one JSON object a line");
                return refuse(&stream, "bad-request", &text);
            }
        };
        if send(&stream, &answer(request, shared.operator.as_ref())).is_err() {
            return;
        }
    }
}

fn answer(request: ControlRequest, operator: &dyn Operator) -> ControlReply {
    let done = ControlReply { ok: true, ..ControlReply::default() };
    let command = match request {
        ControlRequest::Status => {
            let reply = |status| ControlReply { status: Some(Box::new(status)), ..done };
            return operator.status().map_or_else(away, reply);
        }
        ControlRequest::VolumeList => {
            let reply = |status: NodeStatus| ControlReply { volumes: Some(status.volumes), ..done };
            return operator.status().map_or_else(away, reply);
        }
        ControlRequest::Stop => {
            operator.stop();
            return done;
        }
        ControlRequest::Checkpoint { name } => Command::Checkpoint(name),
        ControlRequest::VolumeCreate { name, size_bytes } => {
            Command::VolumeCreate { name, size_bytes }
        }
        ControlRequest::VolumeDelete { name } => Command::VolumeDelete { name },
        ControlRequest::Promote { force } => Command::Promote { force },
        ControlRequest::BranchDrop { name } => Command::BranchDrop { name },
    };
    match operator.command(command) {
        Reply::Checkpoint(cp, root) => {
            ControlReply { cp: Some(cp.0), root: Some(root.to_string()), ..done }
        }
        Reply::Volume(id) => ControlReply { volume: Some(id.0), ..done },
        Reply::BranchDropped(cp) => ControlReply { cp: Some(cp.0), ..done },
        Reply::Promoted(term, last) => {
            ControlReply { term: Some(term.0), cp: Some(last.0), ..done }
        }
        Reply::Refused(refusal) => refused(kind(&refusal), &explain(&refusal)),
        // A node answers commands of operators with nothing else.
        Reply::Hello(_) | Reply::Accepted(_) | Reply::Stopped => done,
    }
}

/// The node has no status to tell.
fn away() -> ControlReply {
    refused("away", "the node is starting or stopping: try again in a moment")
}

fn refused(kind: &str, text: &str) -> ControlReply {
    let (kind, error) = (Some(kind.to_owned()), Some(text.replace('\n', " ")));
    ControlReply { kind, error, ..ControlReply::default() }
}

fn refuse(stream: &UnixStream, kind: &str, text: &str) {
    // Whoever does not take the reason has to do without.
    let _ = send(stream, &refused(kind, text));
    let _ = stream.shutdown(Shutdown::Write);
}

fn send(mut stream: &UnixStream, reply: &ControlReply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[derive(Debug)]
enum LineFault {
    TooLong,
    Late,
    Ended,
    System(io::Error),
}

/// Takes the next line, without its newline, out of `buffer`, which keeps what came behind it.
fn read_line(
    stream: &mut UnixStream,
    buffer: &mut Vec<u8>,
    bytes_max: usize,
    deadline: Instant,
) -> Result<Vec<u8>, LineFault> {
    let mut searched = 0;
    loop {
        if let Some(index) = buffer[searched..].iter().position(|byte| *byte == b'\n') {
            let rest = buffer.split_off(searched + index + 1);
            let mut line = std::mem::replace(buffer, rest);
            line.pop();
            return Ok(line);
        }
        searched = buffer.len();
        if searched >= bytes_max {
            return Err(LineFault::TooLong);
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(LineFault::Late);
        }
        stream.set_read_timeout(Some(rest)).map_err(LineFault::System)?;
        let mut chunk = [0; 4096];
        let want = chunk.len().min(bytes_max - searched);
        match stream.read(&mut chunk[..want]) {
            Ok(0) => return Err(LineFault::Ended),
            Ok(bytes) => buffer.extend_from_slice(&chunk[..bytes]),
            Err(error) => match error.kind() {
                ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => {}
                _ => return Err(LineFault::System(error)),
            },
        }
    }
}

/// The refusal in one word that never changes.
fn kind(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::NotPrimary => "not-primary",
        Refusal::NotSecondary => "not-secondary",
        Refusal::Catalog(_) => "catalog",
        Refusal::PrimaryConnected => "primary-connected",
        Refusal::StoreFailed => "store-failed",
        Refusal::Stopping => "stopping",
        Refusal::BadName => "bad-name",
        Refusal::OtherStore(..) => "other-store",
        Refusal::OtherGeometry => "other-geometry",
        Refusal::SameRole => "same-role",
        Refusal::StaleTerm { .. } => "stale-term",
        Refusal::Branch { .. } => "branch",
        Refusal::NoSuchBranch => "no-such-branch",
        Refusal::BranchHasNoBase { .. } => "branch-has-no-base",
        Refusal::PrimaryLostPoints { .. } => "primary-lost-points",
        Refusal::TooFarBehind { .. } => "too-far-behind",
        Refusal::RootDiffers(_) => "root-differs",
        Refusal::Rewind(_) => "rewind",
        Refusal::NoCommonHistory => "no-common-history",
        Refusal::SessionEnding => "busy",
        Refusal::VolumeInUse => "volume-in-use",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use twinpoint_core::units::{CpNumber, Root, Term, VolumeId};

    #[derive(Default)]
    struct Fake {
        stops: AtomicU64,
    }

    impl Operator for Fake {
        fn command(&self, command: Command) -> Reply {
            match command {
                Command::Checkpoint(_) => Reply::Checkpoint(CpNumber(7), Root(255)),
                Command::VolumeCreate { .. } => Reply::Volume(VolumeId(3)),
                Command::Promote { force: true } => Reply::Promoted(Term(2), CpNumber(9)),
                Command::Promote { force: false } => Reply::Refused(Refusal::PrimaryConnected),
                _ => Reply::Refused(Refusal::NotPrimary),
            }
        }

        fn status(&self) -> Option<NodeStatus> {
            if self.stops.load(Ordering::SeqCst) > 0 {
                return None;
            }
            let volume = VolumeStatus { name: "a".into(), id: 1, size_bytes: 4096, open: 0 };
            Some(NodeStatus { schema: 1, volumes: vec![volume], ..NodeStatus::default() })
        }

        fn stop(&self) {
            self.stops.fetch_add(1, Ordering::SeqCst);
        }
    }

    const LIMIT: Duration = Duration::from_secs(5);

    fn start() -> (tempfile::TempDir, PathBuf, Arc<Fake>, ControlServer) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let fake = Arc::new(Fake::default());
        let server = ControlServer::start(&path, Arc::clone(&fake) as Arc<dyn Operator>).unwrap();
        (folder, path, fake, server)
    }

    fn talk(path: &Path, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut text = Vec::new();
        // The server closes with our bytes unread; what it said before is still there.
        let _ = stream.read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn requests_are_answered() {
        let (_folder, path, fake, server) = start();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let mut client = ControlClient::connect(&path).unwrap();
        let mut ask = |request| client.request(&request, LIMIT);
        assert_eq!(ask(ControlRequest::Status).unwrap().status.unwrap().schema, 1);
        assert_eq!(ask(ControlRequest::VolumeList).unwrap().volumes.unwrap().len(), 1);
        let name = "n".to_owned();
        let reply = ask(ControlRequest::Checkpoint { name: Some(name.clone()) }).unwrap();
        assert_eq!((reply.cp, reply.root), (Some(7), Some(Root(255).to_string())));
        let create = ControlRequest::VolumeCreate { name: name.clone(), size_bytes: 4096 };
        assert_eq!(ask(create).unwrap().volume, Some(3));
        let reply = ask(ControlRequest::Promote { force: true }).unwrap();
        assert_eq!((reply.term, reply.cp), (Some(2), Some(9)));
        let refused = ask(ControlRequest::Promote { force: false }).unwrap_err();
        assert!(
            matches!(refused, ControlError::Refused { kind, .. } if kind == "primary-connected")
        );
        let refused = ask(ControlRequest::VolumeDelete { name }).unwrap_err();
        assert!(matches!(refused, ControlError::Refused { kind, .. } if kind == "not-primary"));
        assert!(ask(ControlRequest::Stop).unwrap().ok);
        assert_eq!(fake.stops.load(Ordering::SeqCst), 1);
        let refused = ask(ControlRequest::Status).unwrap_err();
        assert!(matches!(refused, ControlError::Refused { kind, .. } if kind == "away"));
        let begin = Instant::now();
        server.stop();
        assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
        assert!(!path.exists());
        assert!(matches!(
            client.request(&ControlRequest::Status, LIMIT),
            Err(ControlError::Lost { .. })
        ));
        assert!(matches!(ControlClient::connect(&path), Err(ControlError::Connect { .. })));
    }

    #[test]
    fn lines_are_as_documented() {
        let (_folder, path, _fake, _server) = start();
        let both = b"{\"command\":\"checkpoint\"}\n{\"command\":\"promote\"}\n";
        let text = talk(&path, both);
        let (first, second) = text.split_once('\n').unwrap();
        assert_eq!(first, format!(r#"{{"ok":true,"cp":7,"root":"{}"}}"#, Root(255)));
        assert!(
            second.starts_with(r#"{"ok":false,"kind":"primary-connected","error":"the primary"#)
        );
    }

    #[test]
    fn garbage_gets_one_line_and_is_cut_off() {
        let (_folder, path, _fake, _server) = start();
        let deep = [b"[".repeat(60_000), b"\n".to_vec()].concat();
        let cases: [&[u8]; 9] = [
            b"\n",
            b"hello\n",
            b"{\"command\":\"explode\"}\n",
            b"{\"command\":\"promote\",\"force\":1}\n",
            b"{\"command\":\"volume-create\",\"name\":\"a\",\"size_bytes\":-1}\n",
            b"\xff\xfe\x00\x00\n{\"command\":\"status\"}\n",
            b"{\"command\":\"status\"",
            &deep,
            &[b'x'; 200_000],
        ];
        for case in cases {
            let text = talk(&path, case);
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            assert!(text.starts_with(r#"{"ok":false,"kind":"bad-request""#), "{text}");
        }
        assert_eq!(talk(&path, b""), "");
        assert!(talk(&path, b"{\"command\":\"status\"}\n").starts_with(r#"{"ok":true,"status""#));
    }

    #[test]
    fn a_crowd_is_turned_away_and_may_come_back() {
        let (_folder, path, _fake, server) = start();
        let crowd: Vec<_> =
            (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut client = ControlClient::connect(&path).unwrap();
        let refused = client.request(&ControlRequest::Status, LIMIT).unwrap_err();
        assert!(
            matches!(&refused, ControlError::Refused { kind, .. } if kind == "busy"),
            "{refused}"
        );
        drop(crowd);
        let served = || {
            let mut client = ControlClient::connect(&path).unwrap();
            client.request(&ControlRequest::Status, LIMIT).is_ok()
        };
        assert!((0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            served()
        }));
        let _idle: Vec<_> = (0..5).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let begin = Instant::now();
        server.stop();
        assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
    }

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let (folder, path, fake, server) = start();
        let again = ControlServer::start(&path, Arc::clone(&fake) as Arc<dyn Operator>);
        assert_eq!(again.err().map(|error| error.kind()), Some(ErrorKind::AddrInUse));
        let dead = folder.path().join("dead");
        drop(UnixListener::bind(&dead).unwrap());
        let second = ControlServer::start(&dead, Arc::clone(&fake) as Arc<dyn Operator>).unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "kept").unwrap();
        let third = ControlServer::start(&file, fake as Arc<dyn Operator>);
        assert_eq!(third.err().map(|error| error.kind()), Some(ErrorKind::AlreadyExists));
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        // Somebody else's socket at the same place stays.
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        server.stop();
        second.stop();
        assert!(path.exists() && !dead.exists());
        drop(other);
    }
}
