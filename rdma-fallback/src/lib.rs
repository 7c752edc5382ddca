//! The wire between two hosts: one contract, several transports. It knows neither blocks nor consistency points.
//!
//! It is step 4 of the flow: the write commands and their bytes travel to the peer from the buffers that the device
//! writes too, with no copy; records and answers travel the same way.
//!
//! ```text
//!   my region                                             the peer's region
//!   .-----------------.   post(token, message,            .-----------------.
//!   | [a]  [b]    [c] |        sources = [a b c],         |  lent span      |
//!   '--|----|------|--'        target = t)                |  .-----------.  |
//!      '----'---.--'                                      |  |  [a b c]  |  |
//!               |                                         |  '--^--------'  |
//!          .----v---.   1. a b c are placed at t ---------'-----'-----------'
//!          |  Wire  |=====================================>.--------.
//!          '--------'   2. then the message is delivered   |  Wire  |
//!               |                                          '--------'
//!     Event::Posted { token }                  Event::Message { bytes, placed: t .. }
//! ```
//!
//! # The contract
//!
//! - A [`Wire`] belongs to one thread, never blocks, and needs no other thread to move data. [`Wire::post`] queues;
//!   [`Wire::poll`] sends, receives and tells. After a post, poll. While poll answers [`Progress::More`], poll again;
//!   else wait until [`Wire::descriptor`] is readable, or writable while [`Wire::wants_write`] says so. Edge-triggered
//!   watching works.
//! - Messages arrive whole, once, in the order of their posts, each after its placed bytes. Nothing else is promised
//!   about when placed bytes appear: until the message is delivered the target may hold any mix of old and new bytes.
//! - The source spans of a post belong to the wire until [`Event::Posted`] of its token, in order of the posts, or
//!   until [`Event::Closed`], which hands back the spans of all posts at once. Posted says that the spans are free,
//!   *not* that the peer has the message, let alone keeps it: only an answer of the peer says that.
//! - The peer may place bytes anywhere in the span lent to it, at any time, and nowhere else. A frame that breaks a
//!   rule closes the wire at its receiver.
//! - [`Event::Closed`] comes exactly once and last, whoever closed. A peer that is silent is not closed: heartbeats
//!   are the caller's.
//!
//! # The transports
//!
//! | contract           | TCP                                  | RDMA verbs, reliable connection                      |
//! |--------------------|--------------------------------------|------------------------------------------------------|
//! | lent span          | checked by the receiver              | memory region with remote write; key sent in set-up  |
//! | placement          | bytes after the message, read into   | RDMA WRITEs of up to 30 pieces, to lent base +       |
//! |                    | the region                           | target, the last with an immediate; checked by card  |
//! | message            | in the frame, before its bytes       | SEND, after the WRITEs: the queue pair's order       |
//! | bounded queue      | 256 posts wait for the socket        | the same 256, and credits for the peer's receives    |
//! | `Posted`           | the socket took the last byte        | completion of this SEND or of a later one            |
//! | bad target         | `Closed` at the receiver             | the same: it is not written to, and the message says |
//! |                    |                                      | so; who writes all the same meets the peer's card    |
//! | `descriptor`       | the socket                           | completions, manager, alarm; never needs writing     |
//! | `Closed`           | after the last buffered message      | after the queue pair is destroyed: no span is in use |
//! | set-up             | [`Channel`], which becomes the wire  | [`rdma::Transports`]: the channel carries keys       |
//!
//! The memory transport, for tests, follows the same contract inside one process and can be told to fail.
//!
//! # Security
//!
//! Both ends prove in set-up that they hold the same [`Key`]; set-up messages carry a keyed code. After that the TCP
//! wire, like RDMA, is neither encrypted nor keyed: it detects accidents, not an attacker in the path. Run it on a
//! network of its own.

pub mod channel;
mod counters;
mod deadline;
mod frame;
mod handshake;
pub mod key;
mod listener;
pub mod memory;
pub mod rdma;
pub mod region;
pub mod tcp;

use std::fmt;
use std::io;
use std::os::fd::RawFd;

pub use channel::{CHANNEL_BYTES_MAX, Channel, ChannelError, ChannelFault, VersionRange, dial};
pub use counters::Counters;
pub use frame::FrameFault;
pub use key::{Key, KeyError};
pub use listener::{Listener, Pending};
pub use memory::{MemoryWire, memory_pair};
pub use rdma::RdmaWire;
pub use region::{PAGE_BYTES, Region, Span};
pub use tcp::TcpWire;

/// Longest message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 8192;
/// Most bytes placed with one message.
pub const PLACEMENT_BYTES_MAX: u32 = 4 << 20;
/// Most source spans of one placement.
pub const PLACEMENT_SPANS_MAX: usize = 1024;
/// Most posts that wait for their `Posted`.
pub const POSTS_MAX: usize = 256;
/// Most messages one poll delivers.
const POLL_MESSAGES_MAX: u32 = 64;
/// About how many bytes one poll receives, and how many it sends, before it answers [`Progress::More`].
const POLL_BYTES_MAX: usize = 1 << 20;

/// One connection to a peer. See the contract in the crate's documentation.
#[derive(Debug)]
pub enum Wire {
    /// Frames on a TCP stream.
    Tcp(TcpWire),
    /// Requests of a card.
    Rdma(Box<RdmaWire>),
    /// Inside one process, for tests.
    Memory(MemoryWire),
}

impl Wire {
    /// Queues one message of at most [`MESSAGE_BYTES_MAX`] bytes, copied, and optionally bytes to be placed before it
    /// is delivered, not copied. Never blocks. `token` comes back in [`Event::Posted`]; the wire gives it no meaning.
    ///
    /// # Errors
    /// [`PostError::Full`] is ordinary: poll, then post again. Nothing is queued after an error.
    ///
    /// # Panics
    /// If a source is not inside the region.
    pub fn post(
        &mut self,
        token: u64,
        message: &[u8],
        placement: Option<Placement<'_>>,
    ) -> Result<(), PostError> {
        match self {
            Wire::Tcp(wire) => wire.post(token, message, placement),
            Wire::Rdma(wire) => wire.post(token, message, placement),
            Wire::Memory(wire) => wire.post(token, message, placement),
        }
    }

    /// Sends and receives what is possible now without blocking, and tells `deliver` what happened. The work of one
    /// call is bounded: about 1 MiB in each direction and 64 messages.
    pub fn poll(&mut self, deliver: &mut dyn FnMut(Event<'_>)) -> Progress {
        self.poll_when(true, deliver)
    }

    /// As [`Wire::poll`], for a caller that watches the descriptor. Unless it `may_be_readable`, that is, since it was
    /// told as readable the last time a poll with true has answered [`Progress::Waiting`], nobody asks the kernel for
    /// news: what is posted then costs one system call and not two. The answer is then about what was posted.
    pub fn poll_when(
        &mut self,
        may_be_readable: bool,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Progress {
        match self {
            Wire::Tcp(wire) => wire.poll_when(may_be_readable, deliver),
            Wire::Rdma(wire) => wire.poll_when(may_be_readable, deliver),
            Wire::Memory(wire) => wire.poll(deliver),
        }
    }

    /// The descriptor to watch. Valid until the wire is dropped, also after it closed.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        match self {
            Wire::Tcp(wire) => wire.descriptor(),
            Wire::Rdma(wire) => wire.descriptor(),
            Wire::Memory(wire) => wire.descriptor(),
        }
    }

    /// Whether there is output that can go on when the descriptor is writable.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        match self {
            Wire::Tcp(wire) => wire.wants_write(),
            Wire::Rdma(wire) => wire.wants_write(),
            Wire::Memory(wire) => wire.wants_write(),
        }
    }

    /// What the wire has moved since it was made, and what that took.
    #[must_use]
    pub fn counters(&self) -> Counters {
        match self {
            Wire::Tcp(wire) => wire.counters(),
            Wire::Rdma(wire) => wire.counters(),
            Wire::Memory(wire) => wire.counters(),
        }
    }

    /// Ends the connection now. What waits is not sent; the next poll reports [`CloseReason::Local`].
    pub fn close(&mut self) {
        match self {
            Wire::Tcp(wire) => wire.close(),
            Wire::Rdma(wire) => wire.close(),
            Wire::Memory(wire) => wire.close(),
        }
    }
}

/// Bytes that arrive in the peer's lent span before their message is delivered.
#[derive(Clone, Copy, Debug)]
pub struct Placement<'a> {
    /// Where the bytes are, in my region, in order; at most [`PLACEMENT_SPANS_MAX`] spans, together at most
    /// [`PLACEMENT_BYTES_MAX`] bytes. Spans of no bytes are allowed; no bytes at all is the same as no placement.
    pub sources: &'a [Span],
    /// Where they go, in one run: byte offset in the span that the peer lent.
    pub target: u64,
}

/// What a poll tells.
#[derive(Debug)]
pub enum Event<'a> {
    /// The spans of the post with this token are the caller's again.
    Posted {
        /// As given to the post.
        token: u64,
    },
    /// A message of the peer.
    Message {
        /// The message; valid during the call.
        bytes: &'a [u8],
        /// The bytes placed with it, counted from the start of my lent span; in it for sure.
        placed: Option<Span>,
    },
    /// The connection is over. The last event. All spans are the caller's again.
    Closed {
        /// Why.
        reason: CloseReason,
    },
}

/// Whether another poll now would find work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "work may be left over that no readiness of the descriptor announces"]
pub enum Progress {
    /// Perhaps: poll again before waiting.
    More,
    /// No: wait for the descriptor.
    Waiting,
}

/// Why a connection is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// Closed here.
    Local,
    /// The peer ended it, between two frames.
    Peer,
    /// It broke: a reset, or an end inside a frame (`UnexpectedEof`).
    Lost {
        /// What the system said.
        kind: io::ErrorKind,
    },
    /// The peer broke the protocol; closed here.
    Protocol(FrameFault),
    /// The card, or the way between the cards, failed.
    Rdma(rdma::Cause),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::Local => write!(f, "closed on this side"),
            CloseReason::Peer => write!(f, "closed by the peer"),
            CloseReason::Lost { kind } => write!(f, "connection lost: {kind}"),
            CloseReason::Protocol(fault) => write!(f, "the peer broke the protocol: {fault}"),
            CloseReason::Rdma(cause) => cause.fmt(f),
        }
    }
}

/// Why a post was not queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PostError {
    /// [`POSTS_MAX`] posts wait already. An ordinary state.
    Full,
    /// The connection is over.
    Closed,
    /// The post exceeds a limit of the wire.
    TooLarge {
        /// Which.
        limit: PostLimit,
        /// The post's number, in the limit's unit.
        got: u64,
    },
}

impl fmt::Display for PostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PostError::Full => write!(f, "{POSTS_MAX} posts wait already"),
            PostError::Closed => write!(f, "the wire is closed"),
            PostError::TooLarge { limit, got } => match limit {
                PostLimit::MessageBytes => write!(f, "{got} message bytes > {MESSAGE_BYTES_MAX}"),
                PostLimit::PlacementBytes => {
                    write!(f, "{got} bytes to place > {PLACEMENT_BYTES_MAX}")
                }
                PostLimit::PlacementSpans => {
                    write!(f, "{got} spans to place > {PLACEMENT_SPANS_MAX}")
                }
            },
        }
    }
}

impl std::error::Error for PostError {}

/// A limit of one post.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PostLimit {
    /// [`MESSAGE_BYTES_MAX`].
    MessageBytes,
    /// [`PLACEMENT_BYTES_MAX`].
    PlacementBytes,
    /// [`PLACEMENT_SPANS_MAX`].
    PlacementSpans,
}

/// The bytes that a post places, once its limits are checked. The same for every transport.
fn check_post(
    region: &Region,
    message: &[u8],
    placement: Option<Placement<'_>>,
) -> Result<u32, PostError> {
    let limit = |limit, got| Err(PostError::TooLarge { limit, got });
    if message.len() > MESSAGE_BYTES_MAX {
        return limit(PostLimit::MessageBytes, message.len() as u64);
    }
    let sources = placement.map_or(&[][..], |placement| placement.sources);
    if sources.len() > PLACEMENT_SPANS_MAX {
        return limit(PostLimit::PlacementSpans, sources.len() as u64);
    }
    for source in sources {
        assert!(region.contains(*source), "source {source:?} is not inside {region:?}");
    }
    let bytes = sources.iter().map(|source| u64::from(source.length)).sum::<u64>();
    match u32::try_from(bytes) {
        Ok(bytes) if bytes <= PLACEMENT_BYTES_MAX => Ok(bytes),
        _ => limit(PostLimit::PlacementBytes, bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::tests::EdgeWatch;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::thread;

    const REGION_BYTES: usize = 4 << 20;
    const LEND: Span = Span { offset: 1 << 20, length: 3 << 20 };

    fn tcp_pair() -> (Wire, Wire) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let wire = |stream| Wire::Tcp(TcpWire::new(stream, region(), LEND).unwrap());
        (wire(near), wire(far))
    }

    fn region() -> Arc<Region> {
        Arc::new(Region::new(REGION_BYTES).unwrap())
    }

    /// Posts `count` messages with 700 KB each and takes as many, looks for news only when told, and sleeps on edges only.
    fn run_on_edges(mut wire: Wire, count: u64) -> Wire {
        let watch = EdgeWatch::new(wire.descriptor());
        let sources = [Span::new(1, 400_000), Span::new(500_000, 300_000)];
        let (mut posted, mut freed, mut received) = (0, 0, 0);
        let mut may_be_readable = true;
        while freed < count || received < count {
            while posted < count {
                let placement = Placement { sources: &sources, target: posted % 1000 };
                match wire.post(posted, &posted.to_le_bytes(), Some(placement)) {
                    Ok(()) => posted += 1,
                    Err(error) => {
                        assert_eq!(error, PostError::Full);
                        break;
                    }
                }
            }
            let freed_before = freed;
            let progress = wire.poll_when(may_be_readable, &mut |event| match event {
                Event::Posted { .. } => freed += 1,
                Event::Message { bytes, .. } => {
                    assert_eq!(bytes, u64::to_le_bytes(received));
                    received += 1;
                }
                Event::Closed { reason } => panic!("{reason}"),
            });
            may_be_readable &= progress == Progress::More;
            let idle = progress == Progress::Waiting && (posted == count || freed == freed_before);
            if idle && (freed < count || received < count) {
                assert!(watch.wait(10_000), "{posted} posted, {freed} freed, {received} received");
                may_be_readable = true;
            }
        }
        wire
    }

    fn no_edge_is_missed((a, b): (Wire, Wire), count: u64) {
        let other = thread::spawn(move || run_on_edges(b, count));
        let mut a = run_on_edges(a, count);
        let b = other.join().unwrap();
        let watch = EdgeWatch::new(a.descriptor());
        while a.poll(&mut |event| panic!("{event:?}")) == Progress::More || watch.wait(0) {}
        drop(b);
        assert!(watch.wait(10_000), "the end is an edge too");
        let mut reasons = Vec::new();
        let _ = a.poll(&mut |event| match event {
            Event::Closed { reason } => reasons.push(reason),
            event => panic!("{event:?}"),
        });
        assert_eq!(reasons, [CloseReason::Peer]);
    }

    #[test]
    fn no_edge_is_missed_over_tcp() {
        no_edge_is_missed(tcp_pair(), 700);
    }

    #[test]
    fn no_edge_is_missed_in_memory() {
        no_edge_is_missed(memory_pair(region(), LEND, region(), LEND).unwrap(), 700);
    }

    #[test]
    fn no_edge_is_missed_over_rdma() {
        if let Some(pair) = rdma::tests::pair([region(), region()], LEND) {
            // Emulated cards are slow.
            no_edge_is_missed(pair, 70);
        }
    }

    #[test]
    #[should_panic(expected = "is not inside")]
    fn source_outside_the_region_is_a_bug_of_the_caller() {
        let (mut a, _b) = tcp_pair();
        let sources = [Span::new(REGION_BYTES as u64, 1)];
        let _ = a.post(1, b"", Some(Placement { sources: &sources, target: 0 }));
    }
}
