//! What the operator chose, as the node takes it. The tool parses flags into this; nothing here reads a file.

use std::path::PathBuf;
use std::time::Duration;

pub use rdma_fallback::rdma::{Choice, RdmaOptions};
use twinpoint_core::coordinator::{OnPeerLoss, Replication};
use twinpoint_core::message::Role;

pub use crate::device::DeviceMode;

/// Where an NBD frontend listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// `host:port`; port 0 lets the kernel choose.
    Tcp(String),
    /// A unix socket, made anew at start and removed at the end.
    Unix(PathBuf),
}

/// A volume as a block device of this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UblkVolume {
    /// Its name.
    pub name: String,
    /// The device's number, as in `/dev/ublkb7`; none: the kernel chooses.
    pub id: Option<u32>,
}

/// Which volumes are block devices of this host, and how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct UblkOptions {
    /// Which ones.
    pub volumes: Vec<UblkVolume>,
    /// An orderly stop leaves the devices waiting for the next start.
    pub keep: bool,
    /// Writes are answered before they are durable, and the devices end with the process.
    pub volatile: bool,
}

/// Everything a node needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeOptions {
    /// The store: a file or a block device, formatted before.
    pub store: PathBuf,
    /// How the store is driven.
    pub device: DeviceMode,
    /// What the node starts as.
    pub role: Role,
    /// One pinned thread for each; empty: one thread, not pinned.
    pub cores: Vec<usize>,
    /// Buffers for staged writes and reads, in bytes.
    pub memory_bytes: u64,
    /// Memory lent to the peer, all lanes together, in bytes.
    pub lent_bytes: u64,
    /// The peer's address, `host:port`: dialled while this node is primary.
    pub peer: Option<String>,
    /// Where a primary may dial this node, `host:port`.
    pub listen: Option<String>,
    /// What the lanes to the peer run over.
    pub transport: Choice,
    /// How RDMA is used.
    pub rdma: RdmaOptions,
    /// The shared key; needed with `peer` or `listen`.
    pub key_file: Option<PathBuf>,
    /// Where NBD clients find the volumes.
    pub nbd: Vec<NbdAddress>,
    /// Volumes as block devices.
    pub ublk: UblkOptions,
    /// The unix socket for `twinpoint status` and its kin.
    pub control: PathBuf,
    /// When a flush is answered.
    pub replication: Replication,
    /// What to do without the peer.
    pub on_peer_loss: OnPeerLoss,
    /// Longest time that a write waits for its CP.
    pub cp_interval: Duration,
    /// Staged bytes that seal a CP.
    pub cp_bytes: u64,
    /// Most CPs sealed and not answered at a time.
    pub cp_in_flight: usize,
    /// Silence after which the peer is lost.
    pub peer_timeout: Duration,
    /// Async: most CPs that the secondary may be behind.
    pub lag_points: u64,
    /// Async: most bytes.
    pub lag_bytes: u64,
    /// Async: longest time.
    pub lag_time: Duration,
    /// How long an idle thread polls before it sleeps.
    pub poll: Duration,
    /// Entries of each ring between threads, a power of two.
    pub ring_entries: usize,
    /// Work on a file system that refuses O_DIRECT. Slower, and a power cut may take more.
    pub buffered: bool,
}
