//! What a set-up needs: formatted stores, the nodes on them, a volume that was written once, and a client.
//!
//! Invariants: both stores of a pair are formatted anew for each set-up, in files that stay, so that no case pays for
//! a file's first write; the client goes before the nodes, the primary before the secondary.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use twinpoint_core::units::StoreId;
use twinpoint_runtime::control::{ControlClient, ControlReply, ControlRequest};
use twinpoint_runtime::device::{Caching, DeviceError, Prefill};
use twinpoint_runtime::node::Node;
use twinpoint_runtime::status::NodeStatus;
use twinpoint_runtime::store::{FormatOptions, StoreError, format_store};

use crate::case::{Frontend, Pairing, Setup};
use crate::engine_target::EngineTarget;
use crate::failure::Failure;
use crate::load::Target;
use crate::nbd_target::NbdTarget;
use crate::node_process::{NodeArguments, NodeProcess};
use crate::usage::Usage;

/// The volume's name.
pub const VOLUME: &str = "bench";
/// As the tool's default.
const SHARDS: u16 = 4;
/// How long a pair may take to find each other, or to settle.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// After how long without a connection a person is told why.
const PATIENCE: Duration = Duration::from_secs(5);
const CONTROL_LIMIT: Duration = Duration::from_secs(30);

/// Sizes and places.
#[derive(Clone, Debug)]
pub struct RigOptions {
    pub folder: PathBuf,
    pub store_bytes: u64,
    pub volume_bytes: u64,
    pub buffered: bool,
    /// What the lanes of a pair run over: tcp or rdma.
    pub transport: String,
    /// Where a secondary listens.
    pub address: IpAddr,
}

/// A running set-up. Its fields are dropped in this order.
pub struct Rig {
    primary: Primary,
    secondary: Option<NodeProcess>,
    control: PathBuf,
    secondary_control: PathBuf,
    /// Where NBD clients connect.
    pub nbd: PathBuf,
}

enum Primary {
    Here(Option<Node>),
    There(NodeProcess),
}

impl Rig {
    /// Formats and starts, under names that begin with `name`.
    ///
    /// # Errors
    /// If anything does not work.
    pub fn start(name: &str, setup: Setup, options: &RigOptions) -> Result<Rig, Failure> {
        let path = |suffix: &str| options.folder.join(format!("{name}{suffix}"));
        let is_pair = setup.pairing != Pairing::Single;
        let stores = [path("primary.store"), path("secondary.store")];
        let id = format(&stores[0], None, options)?;
        let mut first =
            NodeArguments::new(stores[0].clone(), path("primary.control"), options.buffered);
        first = first.with_replication(setup.pairing.replication());
        let mut secondary = None;
        if is_pair {
            format(&stores[1], Some(id), options)?;
            let key = path("key");
            write_key(&key)?;
            let mut second =
                NodeArguments::new(stores[1].clone(), path("secondary.control"), options.buffered);
            second.secondary = true;
            second.listen = Some(SocketAddr::new(options.address, 0).to_string());
            second.transport.clone_from(&options.transport);
            first.transport.clone_from(&options.transport);
            second.key = Some(key.clone());
            let process = NodeProcess::start(&second)?;
            first.key = Some(key);
            first.peer = Some(process.address.clone());
            secondary = Some(process);
        }
        let nbd = path("nbd");
        let control = first.control.clone();
        let primary = match setup.frontend {
            Frontend::Engine => Primary::Here(Some(first.start(1)?)),
            Frontend::Nbd => {
                first.nbd = Some(nbd.clone());
                Primary::There(NodeProcess::start(&first)?)
            }
        };
        let secondary_control = path("secondary.control");
        let rig = Rig { primary, secondary, control, secondary_control, nbd };
        if is_pair {
            rig.connect()?;
        }
        let size_bytes = options.volume_bytes;
        let create = ControlRequest::VolumeCreate { name: VOLUME.to_owned(), size_bytes };
        request(&rig.control, &create)?;
        Ok(rig)
    }

    /// A client of the volume.
    ///
    /// # Errors
    /// If there is none to be had.
    pub fn target(&self) -> Result<Box<dyn Target>, Failure> {
        if let Primary::Here(Some(node)) = &self.primary {
            let missing = || Failure::NodeProcess("no local client".to_owned());
            let mut client = node.handle().local_client().ok_or_else(missing)?;
            let volume = client.open(VOLUME).ok_or_else(missing)?;
            return Ok(Box::new(EngineTarget::new(client, volume)));
        }
        Ok(Box::new(NbdTarget::connect(&self.nbd, VOLUME)?))
    }

    /// The primary's status once nothing is staged and the peer has everything. Call after a flush.
    ///
    /// # Errors
    /// If it does not settle.
    pub fn settled_status(&self) -> Result<NodeStatus, Failure> {
        let is_pair = self.secondary.is_some();
        self.wait_for("that the pair settles", SETTLE_LIMIT, |status| {
            !is_pair || status.lag.points == 0 && status.cp.secondary >= status.cp.local
        })
    }

    /// Both nodes' status, the primary's first, once nothing is staged and both have everything. Call after a flush.
    ///
    /// # Errors
    /// If it does not settle.
    pub fn settled_pair(&self) -> Result<[NodeStatus; 2], Failure> {
        let primary = self.settled_status()?;
        let secondary = request(&self.secondary_control, &ControlRequest::Status)?.status;
        let secondary = secondary.ok_or_else(|| Failure::NodeProcess("no status".to_owned()))?;
        Ok([primary, *secondary])
    }

    /// What all nodes used so far, and what the calling thread used, which is not of a node.
    pub fn usage(&self) -> (Usage, Usage) {
        let client = Usage::of_this_thread();
        let primary = match &self.primary {
            Primary::Here(_) => Usage::of_process(std::process::id()).since(client),
            Primary::There(process) => Usage::of_process(process.id()),
        };
        let secondary = self.secondary.as_ref().map(|process| Usage::of_process(process.id()));
        (primary.plus(secondary.unwrap_or_default()), client)
    }

    /// Waits until the nodes of a pair are connected.
    fn connect(&self) -> Result<(), Failure> {
        let what = "the pair's connection";
        let is_connected = |status: &NodeStatus| status.peer.state == "connected";
        match self.wait_for(what, PATIENCE, is_connected) {
            Err(Failure::Late(..)) => {}
            status => return status.map(drop),
        }
        eprintln!("twinpoint-bench: still waiting for {what}: {}", self.last_words());
        match self.wait_for(what, SETTLE_LIMIT - PATIENCE, is_connected) {
            Err(Failure::Late(..)) => Err(Failure::NoPair(SETTLE_LIMIT, self.last_words())),
            status => status.map(drop),
        }
    }

    /// What the nodes of other processes said last.
    fn last_words(&self) -> String {
        let primary = match &self.primary {
            Primary::Here(_) => None,
            Primary::There(process) => Some(process),
        };
        let nodes = [("primary", primary), ("secondary", self.secondary.as_ref())];
        let said = nodes
            .into_iter()
            .filter_map(|(name, node)| Some(format!("the {name} says \"{}\"", node?.last_words())));
        said.collect::<Vec<_>>().join(", ")
    }

    fn wait_for(
        &self,
        what: &'static str,
        limit: Duration,
        is_so: impl Fn(&NodeStatus) -> bool,
    ) -> Result<NodeStatus, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let status = request(&self.control, &ControlRequest::Status)?.status;
            let status = status.ok_or_else(|| Failure::NodeProcess("no status".to_owned()))?;
            if is_so(&status) {
                return Ok(*status);
            }
            if Instant::now() > deadline {
                return Err(Failure::Late(what, limit));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        if let Primary::Here(node) = self
            && let Some(node) = node.take()
        {
            node.handle().stop();
            if let Err(error) = node.wait() {
                eprintln!("twinpoint-bench: a node ended with an error: {error}");
            }
        }
    }
}

/// Formats a store, in the file that is there if it has the right size, and gives its identity.
fn format(
    path: &Path,
    store_id: Option<StoreId>,
    options: &RigOptions,
) -> Result<StoreId, Failure> {
    let found = std::fs::metadata(path).map(|metadata| metadata.len());
    if found.is_ok_and(|bytes| bytes != options.store_bytes) {
        std::fs::remove_file(path).map_err(|error| Failure::File(path.to_owned(), error))?;
    }
    let format = FormatOptions {
        size_bytes: Some(options.store_bytes),
        shards: SHARDS,
        journal_blocks: None,
        segments_max: None,
        store_id,
        force: true,
        prefill: Prefill::Zero,
        caching: if options.buffered { Caching::BufferedAllowed } else { Caching::DirectOnly },
    };
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        match format_store(path, &format) {
            // The kernel closes files of an io_uring some time after it is gone.
            Err(StoreError::Device(DeviceError::InUse { .. })) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            report => return Ok(report.map_err(Failure::Store)?.store),
        }
    }
}

/// A key for a pair on this machine that lives as long as the run.
fn write_key(path: &Path) -> Result<(), Failure> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |error| Failure::File(path.to_owned(), error);
    let key = twinpoint_runtime::store::random_bytes::<32>().map_err(Failure::Store)?;
    if path.exists() {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let text: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed)
}

fn request(control: &Path, request: &ControlRequest) -> Result<ControlReply, Failure> {
    let mut client = ControlClient::connect(control).map_err(Failure::Control)?;
    client.request(request, CONTROL_LIMIT).map_err(Failure::Control)
}
