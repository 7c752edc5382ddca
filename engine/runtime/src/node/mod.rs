//! A node: one store, its workers, and the threads around them. Opening and ending; nothing here is on the data path.
//!
//! ```text
//!   Node::start: open store -> recover -> arena -> workers   (again after a restart that the coordinator asked for)
//!                link (dials, listens), control socket       (stay while the workers come and go)
//! ```
//!
//! Invariants: the store is held exclusively from before the first read; no worker runs before every repair that
//! recovery asked for is durable; a worker that panics takes the whole process with it, for the others would wait.

mod error;
mod handle;
mod memory;
mod workers;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rdma_fallback::Key;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::Role;
use twinpoint_core::recovery::Recovered;
use twinpoint_core::units::BufferId;

use crate::buffers::Arena;
use crate::calls::Caller;
use crate::control::ControlServer;
use crate::coordinator_port::Latencies;
use crate::device::{Caching, StoreFile};
use crate::link::{Link, LinkOptions};
use crate::local::LocalClient;
use crate::options::{NbdAddress, NodeOptions};
use crate::shared::Shared;
use crate::sockets::NbdListener;
use crate::store::open_and_recover;
use crate::ublk::{Driver, Switch, UblkControl};

pub use error::NodeError;
use memory::plan_memory;
use workers::supervise;

/// A running node.
pub struct Node {
    handle: NodeHandle,
    link: Option<Link>,
    control: Option<ControlServer>,
    supervisor: Option<JoinHandle<Result<(), NodeError>>>,
    nbd: Vec<NbdAddress>,
    ublk: Option<UblkControl>,
    block_devices: Vec<String>,
}

/// Speaks with a node from any thread.
#[derive(Clone)]
pub struct NodeHandle {
    inner: Arc<Inner>,
}

/// What stays while the workers come and go.
struct Inner {
    options: NodeOptions,
    geometry: Geometry,
    caller: Caller,
    arena: Arc<Arena>,
    lends: Vec<(BufferId, u32)>,
    latencies: Arc<Mutex<Latencies>>,
    shared: Mutex<Option<Arc<Shared>>>,
    /// What the lanes of the last session run over.
    transport: Mutex<&'static str>,
    /// Of the workers that run now, those that nobody took yet.
    locals: Mutex<Vec<LocalClient>>,
    stopping: AtomicBool,
    ublk: Arc<Switch>,
    began: Instant,
}

impl Node {
    /// Opens the store and starts to serve.
    ///
    /// # Errors
    /// Anything that keeps the node from serving.
    pub fn start(options: NodeOptions) -> Result<Node, NodeError> {
        Node::start_with_local(options, 0)
    }

    /// As [`Node::start`], with clients inside this process, each on a thread and with a part of the memory of its
    /// own: see [`NodeHandle::local_client`].
    ///
    /// # Errors
    /// Anything that keeps the node from serving.
    pub fn start_with_local(options: NodeOptions, local_clients: usize) -> Result<Node, NodeError> {
        let key = load_key(&options)?;
        let driver = Driver::find(&options.ublk).map_err(NodeError::Ublk)?;
        let caching = if options.buffered { Caching::BufferedAllowed } else { Caching::DirectOnly };
        let store = StoreFile::open_for(&options.store, caching, options.device)
            .map_err(NodeError::Device)?;
        let recovered = open_and_recover(&store, None).map_err(NodeError::Store)?;
        check_role(&options, &recovered)?;
        let geometry = recovered.coordinator.superblock.geometry;
        let plan = plan_memory(&options, local_clients, &geometry)?;
        let arena = Arc::new(Arena::new(plan.bytes()).map_err(NodeError::System)?);
        let listeners = options.nbd.iter().map(bind).collect::<Result<Vec<_>, _>>()?;
        let nbd = listeners.iter().map(|listener| listener.address.clone()).collect();
        let inner = Arc::new(Inner {
            geometry,
            caller: Caller::default(),
            arena,
            lends: plan.lends(),
            latencies: Arc::new(Mutex::new(Latencies::new())),
            shared: Mutex::new(None),
            transport: Mutex::default(),
            locals: Mutex::default(),
            stopping: AtomicBool::new(false),
            ublk: Arc::default(),
            began: Instant::now(),
            options,
        });
        let handle = NodeHandle { inner: Arc::clone(&inner) };
        let (started, starting) = channel();
        let supervisor = thread::Builder::new()
            .name("supervisor".to_owned())
            .spawn(move || supervise(&inner, store, recovered, &plan, listeners, &started))
            .map_err(NodeError::System)?;
        if starting.recv().is_err() {
            return Err(join(supervisor)
                .err()
                .unwrap_or(NodeError::System(std::io::Error::other("no worker"))));
        }
        handle.wait_until_published(&supervisor);
        let mut node = Node {
            handle,
            link: None,
            control: None,
            supervisor: Some(supervisor),
            nbd,
            ublk: None,
            block_devices: Vec::new(),
        };
        if let Err(error) = node.start_around(key).and_then(|()| node.start_ublk(driver)) {
            node.handle.stop();
            // The first error is the one to tell.
            _ = node.end();
            return Err(error);
        }
        Ok(node)
    }

    /// Speaks with the node.
    #[must_use]
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// Where NBD clients connect, with the ports that the kernel chose.
    #[must_use]
    pub fn nbd_addresses(&self) -> Vec<NbdAddress> {
        self.nbd.clone()
    }

    /// Where a primary may dial, with the port that the kernel chose.
    #[must_use]
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.link.as_ref().and_then(Link::listen_address)
    }

    /// The block devices that volumes are now.
    #[must_use]
    pub fn block_devices(&self) -> Vec<String> {
        self.block_devices.clone()
    }

    /// Waits until the node has stopped.
    ///
    /// # Errors
    /// Why it ended by itself.
    pub fn wait(mut self) -> Result<(), NodeError> {
        self.end()
    }

    fn start_around(&mut self, key: Option<Key>) -> Result<(), NodeError> {
        let options = &self.handle.inner.options;
        if let Some(key) = key {
            let link = LinkOptions {
                peer: options.peer.clone(),
                listen: options.listen.clone(),
                key,
                timeout: options.peer_timeout,
                transport: options.transport,
                rdma: options.rdma.clone(),
            };
            let name = options.listen.clone().unwrap_or_default();
            let link = Link::start(Arc::new(self.handle.clone()), link);
            self.link = Some(link.map_err(|error| NodeError::Address(name, error))?);
        }
        let control = ControlServer::start(&options.control, Arc::new(self.handle.clone()));
        let name = options.control.display().to_string();
        self.control = Some(control.map_err(|error| NodeError::Address(name, error))?);
        Ok(())
    }

    fn start_ublk(&mut self, driver: Option<Driver>) -> Result<(), NodeError> {
        let Some(driver) = driver else { return Ok(()) };
        let (node, inner) = (Arc::new(self.handle.clone()), &self.handle.inner);
        let workers = inner.options.cores.len().max(1);
        let switch = Arc::clone(&inner.ublk);
        let started = UblkControl::start(driver, node, &inner.options.ublk, workers, switch);
        let (control, paths) = started.map_err(NodeError::Ublk)?;
        self.ublk = Some(control);
        self.block_devices = paths;
        Ok(())
    }

    fn end(&mut self) -> Result<(), NodeError> {
        let result = self.supervisor.take().map_or(Ok(()), join);
        self.handle.inner.stopping.store(true, Ordering::SeqCst);
        if let Some(link) = self.link.take() {
            link.stop();
        }
        drop(self.control.take());
        drop(self.ublk.take());
        result
    }
}

fn load_key(options: &NodeOptions) -> Result<Option<Key>, NodeError> {
    if options.peer.is_none() && options.listen.is_none() {
        return Ok(None);
    }
    let path = options.key_file.as_ref().ok_or(NodeError::KeyMissing)?;
    Key::load(path).map(Some).map_err(NodeError::Key)
}

fn check_role(options: &NodeOptions, recovered: &Recovered) -> Result<(), NodeError> {
    let superblock = &recovered.coordinator.superblock;
    if options.role == Role::Secondary {
        return Ok(());
    }
    if let Some(term) = superblock.deposed_by {
        return Err(NodeError::Deposed(options.store.clone(), term));
    }
    if superblock.secondary {
        return Err(NodeError::NotPromoted(options.store.clone()));
    }
    Ok(())
}

fn bind(address: &NbdAddress) -> Result<NbdListener, NodeError> {
    NbdListener::bind(address).map_err(|error| {
        let name = match address {
            NbdAddress::Tcp(address) => address.clone(),
            NbdAddress::Unix(path) => path.display().to_string(),
        };
        NodeError::Address(name, error)
    })
}

fn join(thread: JoinHandle<Result<(), NodeError>>) -> Result<(), NodeError> {
    thread
        .join()
        .unwrap_or_else(|_| Err(NodeError::System(std::io::Error::other("a thread panicked"))))
}
