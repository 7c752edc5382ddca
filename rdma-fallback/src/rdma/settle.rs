//! Settle: how the two ends of a channel agree on RDMA or on TCP, and make their wires.
//!
//! It is the last step of set-up, for each connection by itself, so one peer may be reached over RDMA and another over
//! TCP, and a peer that fell back to TCP is asked again with its next connection.
//!
//! ```text
//!   dialler: Propose  ->            either side may say Verdict instead of its next word, with the reason;
//!            <- Invite              the other then says its own
//!            Join     ->
//!        both connect
//!         Verdict    <->  Verdict   RDMA if both are good; else TCP if it will do for both; else no wire
//! ```
//!
//! Invariant: each side says one verdict and hears one, so both know the same, and the channel can become a TCP wire.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adapters::Adapters;
use super::connect::{Calling, Connected, Ground, Listening, Proofs, RdmaFault, own_address};
use super::lookout::Lookouts;
use super::options::{Choice, OptionFault, RdmaOptions, probe};
use super::setup_frame::{Endpoint, NONCE_BYTES, SETUP_FRAME_BYTES_MAX, SetupFrame};
use super::trials::Trials;
use super::wire::RdmaWire;
use crate::handshake::Role;
use crate::{Channel, ChannelError, Region, Span, Wire};

/// Before the nonce in a proof: says which side's it is.
const DIALLER_PROOF: &[u8] = b"rdma dialler";
const LISTENER_PROOF: &[u8] = b"rdma listener";

/// Longest time for one agreement, so that no moment is beyond the clock's range.
const LIMIT_MAX: Duration = Duration::from_secs(3600);

/// Makes wires of channels, over the transport that both sides can and want. One for a node's region.
pub struct Transports {
    choice: Choice,
    options: RdmaOptions,
    region: Arc<Region>,
    adapters: Adapters,
    lookouts: Lookouts,
    trials: Trials,
}

/// A wire, and why it is not an RDMA one.
#[derive(Debug)]
pub struct Settled {
    /// Over RDMA or TCP.
    pub wire: Wire,
    /// Why TCP is used: one line for the log. None for RDMA.
    pub without_rdma: Option<String>,
}

/// Why there is no wire. The channel is gone.
#[derive(Debug)]
pub enum SettleError {
    /// The channel failed, or the peer said something else than it has to.
    Channel(ChannelError),
    /// The peer's words make no sense here.
    Unexpected,
    /// The system refused the wire.
    System(io::Error),
    /// RDMA was asked for here, and cannot be had: why.
    RdmaNeeded(String),
    /// RDMA was asked for at the peer, and cannot be had: why.
    PeerNeedsRdma(String),
}

impl fmt::Display for SettleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SettleError::Channel(error) => error.fmt(f),
            SettleError::Unexpected => write!(f, "unexpected words about RDMA"),
            SettleError::System(error) => error.fmt(f),
            SettleError::RdmaNeeded(reason) => write!(f, "no RDMA, which was asked for: {reason}"),
            SettleError::PeerNeedsRdma(reason) => {
                write!(f, "no RDMA, which the peer was asked for: {reason}")
            }
        }
    }
}

impl std::error::Error for SettleError {}

impl From<ChannelError> for SettleError {
    fn from(error: ChannelError) -> SettleError {
        SettleError::Channel(error)
    }
}

/// The last word of the other side.
struct Verdict {
    outcome: Result<(), String>,
    tcp_will_do: bool,
}

/// The near end of a connection with what the peer said of its own.
type Joined = (Connected, Endpoint);

impl Transports {
    /// For connections from and into `region`.
    ///
    /// # Errors
    /// [`OptionFault`] for options that are not possible.
    pub fn new(
        choice: Choice,
        options: RdmaOptions,
        region: Arc<Region>,
    ) -> Result<Transports, OptionFault> {
        options.check()?;
        let (adapters, lookouts, trials) =
            (Adapters::default(), Lookouts::default(), Trials::default());
        Ok(Transports { choice, options, region, adapters, lookouts, trials })
    }

    /// What of this host keeps RDMA from being used as the options say, at this moment: one line. None where TCP is
    /// wanted, and where the options name no device and could do without one.
    #[must_use]
    pub fn obstacle(&self) -> Option<String> {
        let is_asked_for = self.options.device.is_some() || self.choice == Choice::Rdma;
        if self.choice == Choice::Tcp || !is_asked_for {
            return None;
        }
        own_address(&self.options).err().map(|fault| fault.to_string())
    }

    /// Makes a wire of a channel and lends `lend` of the region to the peer. Both sides do this at the same point of
    /// their conversation. Blocks for at most about `limit`. A dialler that has seen another wire of the same set-up
    /// go over TCP says why, and has RDMA not tried again: each try may take a large part of the time.
    ///
    /// # Errors
    /// [`SettleError`]; there is no wire on either side then.
    ///
    /// # Panics
    /// If `lend` is not inside the region.
    pub fn settle(
        &self,
        channel: Channel,
        lend: Span,
        limit: Duration,
        went_over_tcp: Option<&str>,
    ) -> Result<Settled, SettleError> {
        assert!(self.region.contains(lend), "{lend:?} is not inside {:?}", self.region);
        let (now, limit) = (Instant::now(), limit.min(LIMIT_MAX));
        let mut talk = Talk { channel, until: now + limit };
        let ground = Ground {
            options: &self.options,
            adapters: &self.adapters,
            lookouts: &self.lookouts,
            region: &self.region,
            lend,
            latest: now + limit / 3 * 2,
        };
        let outcome = match talk.channel.role() {
            Role::Dialer => self.call(&mut talk, &ground, went_over_tcp)?,
            Role::Acceptor => self.answer(&mut talk, &ground)?,
        };
        match outcome {
            Ok((connected, peer)) => {
                let region = Arc::clone(&self.region);
                let wire = RdmaWire::new(connected, region, lend, peer, self.trials.begin());
                let wire = Wire::Rdma(Box::new(wire.map_err(SettleError::System)?));
                Ok(Settled { wire, without_rdma: None })
            }
            Err(reason) => {
                let wire = talk.channel.into_wire(Arc::clone(&self.region), lend);
                let wire = wire.map_err(SettleError::System)?;
                Ok(Settled { wire, without_rdma: Some(reason) })
            }
        }
    }

    /// The dialler's side. The answer is a connection, or why TCP it is.
    fn call(
        &self,
        talk: &mut Talk,
        ground: &Ground<'_>,
        went_over_tcp: Option<&str>,
    ) -> Result<Result<Joined, String>, SettleError> {
        let not_tried = |reason: &str| Err(RdmaFault::NotTried(reason.to_owned()));
        if let Err(fault) = went_over_tcp.map_or_else(|| self.is_possible(), not_tried) {
            return self.conclude(talk, Err(fault), None);
        }
        talk.say(&SetupFrame::Propose)?;
        let (at, nonce, endpoint) = match talk.hear()? {
            SetupFrame::Invite { at, nonce, endpoint } => (at, nonce, endpoint),
            other => return self.conclude_without(talk, other),
        };
        let at = scoped(at, talk.channel.peer_address().map_err(SettleError::System)?);
        let calling = match Calling::start(ground, at) {
            Ok(calling) => calling,
            Err(fault) => return self.conclude(talk, Err(fault), None),
        };
        talk.say(&SetupFrame::Join { endpoint: calling.endpoint() })?;
        let connected = calling.connect(ground, &proofs(&talk.channel, &nonce));
        self.conclude(talk, connected.map(|connected| (connected, endpoint)), None)
    }

    /// The listener's side.
    fn answer(
        &self,
        talk: &mut Talk,
        ground: &Ground<'_>,
    ) -> Result<Result<Joined, String>, SettleError> {
        match talk.hear()? {
            SetupFrame::Propose => {}
            other => return self.conclude_without(talk, other),
        }
        let reached_at = canonical(talk.channel.local_address().map_err(SettleError::System)?);
        let listening = self.is_possible().and_then(|()| Listening::start(ground, reached_at));
        let listening = match listening {
            Ok(listening) => listening,
            Err(fault) => return self.conclude(talk, Err(fault), None),
        };
        let (at, endpoint) = (listening.address(), listening.endpoint());
        let nonce = random().map_err(SettleError::System)?;
        talk.say(&SetupFrame::Invite { at, nonce, endpoint })?;
        let peer = match talk.hear()? {
            SetupFrame::Join { endpoint } => endpoint,
            other => return self.conclude_without(talk, other),
        };
        let proofs = proofs(&talk.channel, &nonce);
        // The caller's verdict may come first: a bad one ends the wait.
        let (mut verdict, mut broken) = (None, None);
        let descriptor = talk.channel.descriptor();
        let look = || match talk.hear().and_then(verdict_of) {
            Ok(heard) => {
                let bad = heard.outcome.as_ref().err().cloned();
                verdict = Some(heard);
                bad.map_or(Ok(()), |reason| Err(RdmaFault::Peer(reason)))
            }
            Err(error) => {
                broken = Some(error);
                Err(RdmaFault::Timeout)
            }
        };
        let connected = listening.accept(ground, &proofs, descriptor, look);
        match broken {
            Some(error) => Err(error),
            None => self.conclude(talk, connected.map(|connected| (connected, peer)), verdict),
        }
    }

    fn is_possible(&self) -> Result<(), RdmaFault> {
        if self.choice == Choice::Tcp {
            return Err(RdmaFault::NotWanted);
        }
        // Who needs RDMA tries it for ever.
        let obstacle = self.trials.obstacle(Instant::now());
        if let Some(obstacle) = obstacle.filter(|_| self.choice == Choice::Auto) {
            return Err(RdmaFault::NotTried(obstacle));
        }
        probe().map(|_| ()).map_err(RdmaFault::Probe)
    }

    /// The other side said a verdict before its turn, or something that makes no sense.
    fn conclude_without(
        &self,
        talk: &mut Talk,
        heard: SetupFrame,
    ) -> Result<Result<Joined, String>, SettleError> {
        let verdict = verdict_of(heard)?;
        let Err(reason) = &verdict.outcome else { return Err(SettleError::Unexpected) };
        let fault = RdmaFault::Peer(reason.clone());
        self.conclude(talk, Err(fault), Some(verdict))
    }

    /// Says this side's verdict, hears the other's unless it came already, and judges as the other side does.
    fn conclude(
        &self,
        talk: &mut Talk,
        mine: Result<Joined, RdmaFault>,
        heard: Option<Verdict>,
    ) -> Result<Result<Joined, String>, SettleError> {
        let tcp_will_do = self.choice != Choice::Rdma;
        let mine = mine.map_err(|fault| fault.to_string());
        let outcome = match &mine {
            Ok(_) => Ok(()),
            Err(reason) => Err(reason.clone()),
        };
        let said = talk.say(&SetupFrame::Verdict { outcome, tcp_will_do });
        let theirs = said.and_then(|()| match heard {
            Some(heard) => Ok(heard),
            None => talk.hear().and_then(verdict_of),
        });
        let is_agreed = theirs.as_ref().is_ok_and(|theirs| theirs.outcome.is_ok());
        let mine = match mine {
            Ok(joined) if is_agreed => return Ok(Ok(joined)),
            Ok((connected, _)) => {
                connected.part();
                None
            }
            Err(reason) => Some(reason),
        };
        let theirs = theirs?;
        let told = || RdmaFault::Peer(theirs.outcome.err().unwrap_or_default()).to_string();
        let reason = mine.unwrap_or_else(told);
        if !tcp_will_do {
            return Err(SettleError::RdmaNeeded(reason));
        }
        if !theirs.tcp_will_do {
            return Err(SettleError::PeerNeedsRdma(reason));
        }
        Ok(Err(reason))
    }
}

impl fmt::Debug for Transports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transports")
            .field("choice", &self.choice)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// The channel, until the time is up.
struct Talk {
    channel: Channel,
    until: Instant,
}

impl Talk {
    fn say(&mut self, frame: &SetupFrame) -> Result<(), SettleError> {
        self.limit();
        Ok(self.channel.send(&frame.encode())?)
    }

    fn hear(&mut self) -> Result<SetupFrame, SettleError> {
        self.limit();
        let bytes = self.channel.receive(SETUP_FRAME_BYTES_MAX)?;
        SetupFrame::decode(&bytes).ok_or(SettleError::Unexpected)
    }

    fn limit(&mut self) {
        self.channel.set_time_limit(self.until.saturating_duration_since(Instant::now()));
    }
}

/// A socket that listens for both kinds of addresses tells an IPv4 one as one of IPv6, which no device has.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        IpAddr::V6(_) => address,
    }
}

/// A link-local address says nothing without its interface: the one through which the peer was reached.
fn scoped(at: SocketAddr, peer: SocketAddr) -> SocketAddr {
    match (at, peer) {
        (SocketAddr::V6(mut at), SocketAddr::V6(peer)) if at.ip().is_unicast_link_local() => {
            at.set_scope_id(peer.scope_id());
            at.into()
        }
        _ => at,
    }
}

fn verdict_of(frame: SetupFrame) -> Result<Verdict, SettleError> {
    match frame {
        SetupFrame::Verdict { outcome, tcp_will_do } => Ok(Verdict { outcome, tcp_will_do }),
        _ => Err(SettleError::Unexpected),
    }
}

fn proofs(channel: &Channel, nonce: &[u8; NONCE_BYTES]) -> Proofs {
    let (mine, theirs) = match channel.role() {
        Role::Dialer => (DIALLER_PROOF, LISTENER_PROOF),
        Role::Acceptor => (LISTENER_PROOF, DIALLER_PROOF),
    };
    Proofs {
        mine: channel.code_of_mine(&[mine, nonce].concat()),
        theirs: channel.code_of_theirs(&[theirs, nonce].concat()),
    }
}

fn random() -> io::Result<[u8; NONCE_BYTES]> {
    let mut bytes = [0; NONCE_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
