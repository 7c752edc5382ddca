//! Connect: how two queue pairs become one connection.
//!
//! It comes before the flow; `settle.rs` says when. The listener waits at an address of the device that it gave to the
//! caller over the authenticated channel, and both show a proof that only the two ends of that channel can make: a
//! stranger who finds the port is turned away.
//!
//! ```text
//!   Listening: bind, listen          Calling: way to the address, and with it the device
//!        both: adapter, window, queue pair
//!   request  <----------- proof, queue pair's number ------------ connect
//!   INIT, receives, RTR, RTS
//!   accept   ------------ proof, queue pair's number -----------> INIT, receives, RTR, RTS
//!   established  <----------------------------------------------- establish
//! ```
//!
//! Invariant: all receives are posted before the peer can send.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::adapter::Adapter;
use super::adapters::{Adapters, OpenFault};
use super::card::Step;
use super::lookout::Lookouts;
use super::manager::{EventChannel, Id, ManagerEvent, PRIVATE_BYTES};
use super::options::{ProbeError, RdmaOptions, probe};
use super::queues::Queues;
use super::setup_frame::Endpoint;
use super::watch::wait_for_two;
use crate::{Region, Span};

/// How long one question for the peer's address may take. The kernel misses an answer of the network that comes while
/// the question is still being sent, and finds it when the question's time is over: so it asks often, and seldom waits.
const RESOLVE_AT_ONCE: Duration = Duration::from_millis(250);

/// Why RDMA was not used: one line for the log.
#[derive(Debug)]
pub enum RdmaFault {
    /// The options say TCP.
    NotWanted,
    /// It is known not to work just now, of another lane of the same set-up or of sessions before: why.
    NotTried(String),
    /// This host has none.
    Probe(ProbeError),
    /// There is no device of the name that the options give.
    DeviceUnknown(String),
    /// The device has no such address.
    GidUnusable {
        /// Name of the device.
        device: String,
        /// Index of the address.
        index: u32,
    },
    /// The way to the peer leads over another device, or over none.
    DeviceElsewhere {
        /// The device on the way.
        found: Option<String>,
    },
    /// Memory cannot be registered.
    Memory {
        /// How much.
        bytes: usize,
        /// What the system says.
        error: io::Error,
    },
    /// Memory is still being registered.
    MemorySlow {
        /// How much.
        bytes: usize,
    },
    /// The device cannot hold as many requests or completions.
    TooMany {
        /// Of what.
        what: &'static str,
        /// As many are needed.
        needed: u32,
        /// As many are possible.
        most: u32,
    },
    /// A step of connecting was refused.
    Refused {
        /// Which.
        step: &'static str,
        /// What the system says.
        error: io::Error,
    },
    /// The connection manager gave up: the event's number and its status.
    Failed {
        /// In `rdma_cm_event_type`.
        event: u32,
        /// What it says.
        status: i32,
    },
    /// It took too long.
    Timeout,
    /// The device went meanwhile.
    DeviceRemoved,
    /// The peer ended the call.
    Ended,
    /// Who answered is not the peer.
    Stranger,
    /// The peer cannot, or does not want to.
    Peer(String),
}

impl fmt::Display for RdmaFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RdmaFault::NotWanted => write!(f, "TCP was asked for"),
            RdmaFault::NotTried(reason) => f.write_str(reason),
            RdmaFault::Probe(error) => error.fmt(f),
            RdmaFault::DeviceUnknown(name) => write!(f, "there is no RDMA device {name}"),
            RdmaFault::GidUnusable { device, index } => {
                write!(f, "RDMA device {device} has no address with GID index {index}")
            }
            RdmaFault::DeviceElsewhere { found: Some(name) } => {
                write!(f, "the way to the peer leads over RDMA device {name}")
            }
            RdmaFault::DeviceElsewhere { found: None } => {
                write!(f, "no RDMA device is on the way to the peer")
            }
            RdmaFault::Memory { bytes, error } => {
                write!(f, "{bytes} bytes of memory cannot be registered for RDMA ({error})")?;
                match error.raw_os_error() {
                    Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => {
                        write!(f, ": raise the limit of locked memory, ulimit -l")
                    }
                    _ => Ok(()),
                }
            }
            RdmaFault::MemorySlow { bytes } => write!(
                f,
                "{bytes} bytes of memory are still being registered for RDMA: a session that begins within a minute \
                 finds them ready"
            ),
            RdmaFault::TooMany { what, needed, most } => {
                write!(f, "the RDMA device holds {most} {what}, {needed} are needed")
            }
            RdmaFault::Refused { step, error } => write!(f, "RDMA: cannot {step}: {error}"),
            RdmaFault::Failed { event, status } => {
                write!(f, "RDMA connection refused (event {event}, status {status})")
            }
            RdmaFault::Timeout => write!(f, "the RDMA connection took too long"),
            RdmaFault::DeviceRemoved => write!(f, "the RDMA device was removed"),
            RdmaFault::Ended => write!(f, "the peer ended the RDMA call"),
            RdmaFault::Stranger => write!(f, "a stranger answered the RDMA call"),
            RdmaFault::Peer(reason) => write!(f, "the peer: {reason}"),
        }
    }
}

impl std::error::Error for RdmaFault {}

/// Tells which step a refusal belongs to.
pub(super) fn refused(step: &'static str) -> impl Fn(io::Error) -> RdmaFault {
    move |error| RdmaFault::Refused { step, error }
}

/// What both sides need to connect.
pub(super) struct Ground<'a> {
    pub(super) options: &'a RdmaOptions,
    pub(super) adapters: &'a Adapters,
    pub(super) lookouts: &'a Lookouts,
    pub(super) region: &'a Arc<Region>,
    pub(super) lend: Span,
    /// When a try has to have ended, so that there is time left to say what became of it.
    pub(super) latest: Instant,
}

/// What only the two ends of a channel can make.
pub(super) struct Proofs {
    /// Shown by this side.
    pub(super) mine: [u8; PRIVATE_BYTES],
    /// Expected of the other.
    pub(super) theirs: [u8; PRIVATE_BYTES],
}

/// Two connected queue pairs' near end. What ends with the connection, in this order.
pub(super) struct Connected {
    pub(super) queues: Queues,
    pub(super) id: Id,
}

impl Connected {
    /// Ends the connection: after this the card touches nothing of ours.
    pub(super) fn part(self) {
        let Connected { queues, id } = self;
        let adapter = queues.end();
        // The kernel tells the peer, and waits for its own messages to be sent, which takes seconds when the port is
        // down. Nobody here waits.
        let part = move || {
            id.disconnect();
            drop((id, adapter));
        };
        // Without a thread, what was moved into it is dropped here, which tells the peer too.
        let _ = thread::Builder::new().name("rdma-part".to_owned()).spawn(part);
    }
}

/// The address of this host that the options name, if they do.
pub(super) fn own_address(options: &RdmaOptions) -> Result<Option<IpAddr>, RdmaFault> {
    let devices = probe().map_err(RdmaFault::Probe)?.devices;
    let Some(name) = &options.device else { return Ok(None) };
    let device = devices.into_iter().find(|device| device.name == *name);
    let device = device.ok_or_else(|| RdmaFault::DeviceUnknown(name.clone()))?;
    let Some(index) = options.gid_index else { return Ok(None) };
    let address = device.addresses.iter().find(|address| address.0 == index);
    let fault = || RdmaFault::GidUnusable { device: name.clone(), index };
    Ok(Some(address.ok_or_else(fault)?.1))
}

impl Ground<'_> {
    /// Opens the device that an id has found, and tells its port.
    fn open(&self, id: &Id) -> Result<(Arc<Adapter>, u8), RdmaFault> {
        let Some((found, port)) = id.device() else {
            return Err(RdmaFault::DeviceElsewhere { found: None });
        };
        self.lookouts.watch(&found);
        if self.options.device.as_ref().is_some_and(|wanted| *wanted != found) {
            return Err(RdmaFault::DeviceElsewhere { found: Some(found) });
        }
        let bytes = self.region.len();
        let adapter = self.adapters.open(&found, self.region, self.latest);
        let adapter = adapter.map_err(|fault| match fault {
            OpenFault::System(error) => match error.raw_os_error() {
                Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => {
                    RdmaFault::Memory { bytes, error }
                }
                _ => refused("open the device")(error),
            },
            OpenFault::Patience => RdmaFault::MemorySlow { bytes },
        })?;
        Ok((adapter, port))
    }

    fn queues(&self, id: &Id) -> Result<Queues, RdmaFault> {
        Queues::new(self.open(id)?, self.options, self.region, self.lend)
    }

    /// Takes the queue pair up, with all its receives.
    fn bring_up(&self, queues: &mut Queues, id: &Id) -> Result<(), RdmaFault> {
        for (step, name) in [
            (Step::Init, "set the queue pair up"),
            (Step::Receive, "make the queue pair receive"),
            (Step::Send, "make the queue pair send"),
        ] {
            let mut change = id.change_to(step).map_err(refused(name))?;
            if let Some(bytes) = self.options.mtu_bytes {
                change.limit_mtu(bytes);
            }
            change.set_patience(self.options.timeout_exponent(), self.options.retries);
            queues.change(change).map_err(refused(name))?;
            if step == Step::Init {
                queues.post_all_receives().map_err(refused("post receives"))?;
            }
        }
        Ok(())
    }

    /// The moment at which the network has had its time, beginning now. What is done on this host is not counted.
    fn patience(&self) -> Instant {
        self.latest.min(Instant::now() + self.options.connect_limit)
    }

    /// Waits for the manager's next event, or for `also` to be readable: then there is none.
    fn next(
        &self,
        channel: &Arc<EventChannel>,
        also: Option<RawFd>,
        until: Instant,
    ) -> Result<Option<ManagerEvent>, RdmaFault> {
        loop {
            match channel.next() {
                Ok(ManagerEvent::Failed(event, status)) => {
                    return Err(RdmaFault::Failed { event, status });
                }
                Ok(ManagerEvent::DeviceRemoved) => return Err(RdmaFault::DeviceRemoved),
                Ok(event) => return Ok(Some(event)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(refused("ask the connection manager")(error)),
            }
            let descriptors = [channel.descriptor(), also.unwrap_or(channel.descriptor())];
            let ready = wait_for_two(descriptors, left(until)?);
            let [_, other] = ready.map_err(refused("wait"))?;
            if also.is_some() && other {
                return Ok(None);
            }
        }
    }
}

fn left(until: Instant) -> Result<Duration, RdmaFault> {
    match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(RdmaFault::Timeout),
        left => Ok(left),
    }
}

/// The side that waits for a call.
pub(super) struct Listening {
    listener: Id,
    queues: Queues,
    at: SocketAddr,
}

impl Listening {
    /// Listens at an address of this host that the caller has reached by TCP, or at the one that the options name.
    pub(super) fn start(
        ground: &Ground<'_>,
        reached_at: SocketAddr,
    ) -> Result<Listening, RdmaFault> {
        let named = own_address(ground.options)?;
        let mut at = named.map_or(reached_at, |ip| SocketAddr::new(ip, 0));
        at.set_port(0);
        let channel = EventChannel::open().map_err(refused("open the connection manager"))?;
        let listener = Id::new(&channel).map_err(refused("make a listener"))?;
        listener.bind(at).map_err(refused("listen at the address"))?;
        let queues = ground.queues(&listener)?;
        listener.listen().map_err(refused("listen"))?;
        at.set_port(listener.local_port());
        Ok(Listening { listener, queues, at })
    }

    /// Where to call.
    pub(super) fn address(&self) -> SocketAddr {
        self.at
    }

    pub(super) fn endpoint(&self) -> Endpoint {
        self.queues.endpoint()
    }

    /// Waits for the peer's call. When `also` becomes readable, `look` says whether to go on waiting.
    pub(super) fn accept(
        self,
        ground: &Ground<'_>,
        proofs: &Proofs,
        also: RawFd,
        mut look: impl FnMut() -> Result<(), RdmaFault>,
    ) -> Result<Connected, RdmaFault> {
        let Listening { listener, queues, .. } = self;
        let channel = Arc::clone(listener.channel());
        let mut also = Some(also);
        let mut caller: Option<Id> = None;
        // Dropped before the caller's end, whatever happens.
        let mut queues = queues;
        let until = ground.patience();
        loop {
            match ground.next(&channel, also, until)? {
                None => {
                    look()?;
                    also = None;
                }
                // Compared as plain bytes: a stranger gets one try for each proof, and it fits one call only.
                Some(ManagerEvent::Request(id, proof)) => {
                    if caller.is_some() || proof != proofs.theirs {
                        id.reject();
                        continue;
                    }
                    let id = caller.insert(id);
                    ground.bring_up(&mut queues, id)?;
                    id.accept(&proofs.mine, queues.number()).map_err(refused("accept"))?;
                }
                Some(ManagerEvent::Established) => {
                    let Some(id) = caller else { return Err(RdmaFault::Stranger) };
                    return Ok(Connected { queues, id });
                }
                Some(ManagerEvent::Disconnected) => return Err(RdmaFault::Ended),
                Some(_) => {}
            }
        }
    }
}

/// The side that calls.
pub(super) struct Calling {
    id: Id,
    queues: Queues,
}

impl Calling {
    /// Finds the way to `target`.
    pub(super) fn start(ground: &Ground<'_>, target: SocketAddr) -> Result<Calling, RdmaFault> {
        let source = own_address(ground.options)?;
        let channel = EventChannel::open().map_err(refused("open the connection manager"))?;
        let id = Id::new(&channel).map_err(refused("make a caller"))?;
        let until = ground.patience();
        let next = || ground.next(&channel, None, until);
        loop {
            let wait = left(until)?.min(RESOLVE_AT_ONCE);
            id.resolve_address(source, target, wait).map_err(refused("find the peer's address"))?;
            let is_found = loop {
                match next() {
                    Ok(Some(ManagerEvent::AddressResolved)) => break true,
                    Err(RdmaFault::Failed { status, .. }) if status == -libc::ETIMEDOUT => {
                        break false;
                    }
                    other => drop(other?),
                }
            };
            if is_found {
                break;
            }
        }
        // The library has the device open by now, whatever becomes of the call.
        if let Some((device, _)) = id.device() {
            ground.lookouts.watch(&device);
        }
        id.resolve_route(left(until)?).map_err(refused("find a way to the peer"))?;
        while !matches!(next()?, Some(ManagerEvent::RouteResolved)) {}
        let queues = ground.queues(&id)?;
        Ok(Calling { id, queues })
    }

    pub(super) fn endpoint(&self) -> Endpoint {
        self.queues.endpoint()
    }

    /// Calls, and waits for the answer.
    pub(super) fn connect(
        self,
        ground: &Ground<'_>,
        proofs: &Proofs,
    ) -> Result<Connected, RdmaFault> {
        let Calling { id, mut queues } = self;
        let channel = Arc::clone(id.channel());
        id.connect(&proofs.mine, queues.number()).map_err(refused("call"))?;
        let until = ground.patience();
        loop {
            match ground.next(&channel, None, until)? {
                Some(ManagerEvent::Response(proof)) if proof == proofs.theirs => break,
                Some(ManagerEvent::Response(_)) => return Err(RdmaFault::Stranger),
                Some(ManagerEvent::Disconnected) => return Err(RdmaFault::Ended),
                _ => {}
            }
        }
        ground.bring_up(&mut queues, &id)?;
        id.establish().map_err(refused("confirm the connection"))?;
        Ok(Connected { queues, id })
    }
}
