//! One node in a process of its own, as the secondary of a pair or behind NBD.
//!
//! Invariants: the child ends when its parent does, because its standard input ends; it says one line, `ready` and the
//! address at which it listens, when it serves; a child that ends by itself ends the run, which would wait for it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use twinpoint_core::coordinator::{OnPeerLoss, Replication};
use twinpoint_core::message::Role;
use twinpoint_runtime::device::DeviceError;
use twinpoint_runtime::node::{Node, NodeError};
use twinpoint_runtime::options::{Choice, DeviceMode, NbdAddress, NodeOptions, RdmaOptions};

use crate::ending::{Process, end};
use crate::failure::Failure;

/// How long a store may stay in use after its last user ended: the kernel closes files of an io_uring late.
const IN_USE_LIMIT: Duration = Duration::from_secs(10);
/// How long a child may take to end.
const END_LIMIT: Duration = Duration::from_secs(30);
const READY: &str = "ready";
const ASYNC: &str = "async";
const RDMA: &str = "rdma";

/// A node as a benchmark wants it; all else is the tool's default.
#[derive(Args, Clone, Debug)]
pub struct NodeArguments {
    #[arg(long)]
    pub store: PathBuf,
    #[arg(long)]
    pub control: PathBuf,
    #[arg(long)]
    pub secondary: bool,
    #[arg(long)]
    pub listen: Option<String>,
    #[arg(long)]
    pub peer: Option<String>,
    #[arg(long)]
    pub key: Option<PathBuf>,
    #[arg(long)]
    pub nbd: Option<PathBuf>,
    #[arg(long, default_value = "sync")]
    pub replication: String,
    #[arg(long)]
    pub buffered: bool,
    #[arg(long, default_value = "tcp")]
    pub transport: String,
}

impl NodeArguments {
    /// A primary without a peer.
    pub fn new(store: PathBuf, control: PathBuf, buffered: bool) -> NodeArguments {
        NodeArguments {
            store,
            control,
            secondary: false,
            listen: None,
            peer: None,
            key: None,
            nbd: None,
            replication: String::new(),
            buffered,
            transport: "tcp".to_owned(),
        }
        .with_replication(Replication::Sync)
    }

    /// With this mode.
    pub fn with_replication(mut self, replication: Replication) -> NodeArguments {
        let is_async = replication == Replication::Async;
        self.replication = if is_async { ASYNC } else { "sync" }.to_owned();
        self
    }

    /// The node's options.
    pub fn options(&self) -> NodeOptions {
        let is_async = self.replication == ASYNC;
        NodeOptions {
            transport: if self.transport == RDMA { Choice::Rdma } else { Choice::Tcp },
            rdma: RdmaOptions::default(),
            store: self.store.clone(),
            device: DeviceMode::Block,
            role: if self.secondary { Role::Secondary } else { Role::Primary },
            cores: Vec::new(),
            memory_bytes: 256 << 20,
            lent_bytes: 64 << 20,
            peer: self.peer.clone(),
            listen: self.listen.clone(),
            key_file: self.key.clone(),
            nbd: self.nbd.iter().cloned().map(NbdAddress::Unix).collect(),
            control: self.control.clone(),
            replication: if is_async { Replication::Async } else { Replication::Sync },
            on_peer_loss: OnPeerLoss::Stall,
            cp_interval: Duration::from_secs(1),
            cp_bytes: 32 << 20,
            cp_in_flight: 4,
            peer_timeout: Duration::from_secs(10),
            lag_points: 1024,
            lag_bytes: 256 << 20,
            lag_time: Duration::from_secs(10),
            poll: Duration::from_micros(50),
            ring_entries: 4096,
            buffered: self.buffered,
            ublk: twinpoint_runtime::options::UblkOptions::default(),
        }
    }

    /// Starts the node in this process.
    ///
    /// # Errors
    /// [`Failure::Node`].
    pub fn start(&self, local_clients: usize) -> Result<Node, Failure> {
        let deadline = Instant::now() + IN_USE_LIMIT;
        loop {
            match Node::start_with_local(self.options(), local_clients) {
                Err(NodeError::Device(DeviceError::InUse { .. })) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                node => return node.map_err(Failure::Node),
            }
        }
    }

    fn command_line(&self) -> Vec<String> {
        let mut line = vec!["node".to_owned()];
        let mut pair = |flag: &str, value: Option<String>| {
            line.extend(value.into_iter().flat_map(|value| [flag.to_owned(), value]));
        };
        let path = |path: &Path| Some(path.display().to_string());
        pair("--store", path(&self.store));
        pair("--control", path(&self.control));
        pair("--listen", self.listen.clone());
        pair("--peer", self.peer.clone());
        pair("--key", self.key.as_deref().and_then(path));
        pair("--nbd", self.nbd.as_deref().and_then(path));
        pair("--replication", Some(self.replication.clone()));
        pair("--transport", Some(self.transport.clone()));
        line.extend(self.secondary.then(|| "--secondary".to_owned()));
        line.extend(self.buffered.then(|| "--buffered".to_owned()));
        line
    }
}

/// The child's `main`.
///
/// # Errors
/// Why the node did not start, or ended by itself.
pub fn serve(arguments: NodeArguments) -> Result<(), Failure> {
    let node = arguments.start(0)?;
    let address = node.listen_address().map_or_else(|| "-".to_owned(), |a| a.to_string());
    println!("{READY} {address}");
    let handle = node.handle();
    std::thread::spawn(move || {
        // Nothing is ever sent: it ends with the parent.
        _ = std::io::stdin().read_to_end(&mut Vec::new());
        handle.stop();
    });
    node.wait().map_err(Failure::Node)
}

/// A child with a node, as its parent has it.
pub struct NodeProcess {
    process: Process,
    log: PathBuf,
    /// Closed to end the child.
    stdin: Option<ChildStdin>,
    /// It is meant to end.
    ending: Arc<AtomicBool>,
    /// Where it listens for a primary.
    pub address: String,
}

impl NodeProcess {
    /// Starts a child, and waits until it serves. Its log goes to a file beside its control socket.
    ///
    /// # Errors
    /// [`Failure::NodeProcess`] with what the child said last.
    pub fn start(arguments: &NodeArguments) -> Result<NodeProcess, Failure> {
        let log_path = arguments.control.with_extension("log");
        let log =
            File::create(&log_path).map_err(|error| Failure::File(log_path.clone(), error))?;
        let program =
            std::env::current_exe().map_err(|error| Failure::File("/proc".into(), error))?;
        let mut command = Command::new(program);
        command
            .args(arguments.command_line())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let process = Process::start(&mut command)
            .map_err(|error| Failure::NodeProcess(error.to_string()))?;
        let (stdin, stdout) = process.pipes();
        let stdout = stdout.expect("it was asked for");
        let mut line = String::new();
        // An error leaves the line empty, which is none that a child says.
        let mut stdout = BufReader::new(stdout);
        _ = stdout.read_line(&mut line);
        let ending = Arc::new(AtomicBool::new(false));
        let is_meant = Arc::clone(&ending);
        let log = log_path.clone();
        let mut node = NodeProcess { process, log, stdin, ending, address: String::new() };
        match line.trim_end().split_once(' ') {
            Some((READY, address)) => address.clone_into(&mut node.address),
            _ => {
                node.end();
                return Err(Failure::NodeProcess(node.words()));
            }
        }
        std::thread::spawn(move || {
            // It says nothing more; this ends when the child does.
            _ = stdout.read_to_end(&mut Vec::new());
            if !is_meant.load(Ordering::SeqCst) {
                let log = std::fs::read_to_string(&log_path).unwrap_or_default();
                let failure = Failure::NodeProcess(log);
                end(&failure.to_string(), failure.exit_code());
            }
        });
        Ok(node)
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The last line of its log.
    pub fn last_words(&self) -> String {
        let words = self.words();
        words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing").to_owned()
    }

    fn words(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn end(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        drop(self.stdin.take());
        // Beyond it, it is killed; a store recovers from anything.
        self.process.ends_within(END_LIMIT);
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        self.end();
    }
}
