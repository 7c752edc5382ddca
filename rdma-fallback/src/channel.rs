//! Channel: the authenticated conversation in which two hosts set a wire up.
//!
//! It comes before the flow: store identity, geometry, term and history are compared here, then the channel becomes a
//! wire. It blocks, with a time limit on everything, and is meant for a control thread.
//!
//! Invariants:
//! - A channel exists only after both sides have proved that they hold the key.
//! - Every frame carries a keyed code over its length, number and bytes: nothing can be changed, repeated, left out
//!   or reordered unnoticed. No byte of a frame is shown before its code was checked.
//! - No frame is read beyond its end, so the stream can pass to the wire between two frames.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use crate::deadline::Deadline;
use crate::handshake::{Role, Session, shake_hands};
use crate::{Key, Region, Span, TcpWire, Wire};

/// Longest frame of a channel, in bytes.
pub const CHANNEL_BYTES_MAX: usize = 1 << 20;

const LENGTH_AT: usize = 0;
const RESERVED_AT: usize = LENGTH_AT + 4;
const SEQUENCE_AT: usize = RESERVED_AT + 4;
const CODE_AT: usize = SEQUENCE_AT + 8;
const CODE_BYTES: usize = 16;
const HEADER_BYTES: usize = CODE_AT + CODE_BYTES;

/// Connects to `address` ("host:port") and proves to each other who is there, all within `limit`, which then is the
/// limit of each send and receive. Name resolution is the system's and keeps its own time.
///
/// # Errors
/// [`ChannelError`]; of several addresses, the last one's.
pub fn dial(address: &str, key: &Key, limit: Duration) -> Result<Channel, ChannelError> {
    let deadline = Deadline::after(limit);
    let addresses = address.to_socket_addrs().map_err(ChannelError::Io)?.collect::<Vec<_>>();
    let stream = connect(&addresses, deadline)?;
    Channel::establish(stream, key, Role::Dialer, deadline, limit)
}

/// An authenticated conversation with a peer. After an error other than on set-up, drop it.
#[derive(Debug)]
pub struct Channel {
    stream: TcpStream,
    role: Role,
    session: Session,
    sent_frames: u64,
    received_frames: u64,
    limit: Duration,
}

impl Channel {
    pub(crate) fn establish(
        stream: TcpStream,
        key: &Key,
        role: Role,
        deadline: Deadline,
        limit: Duration,
    ) -> Result<Channel, ChannelError> {
        stream.set_nonblocking(false).map_err(ChannelError::Io)?;
        stream.set_nodelay(true).map_err(ChannelError::Io)?;
        let session = shake_hands(&stream, key, role, deadline)?;
        Ok(Channel { stream, role, session, sent_frames: 0, received_frames: 0, limit })
    }

    /// The protocol version that both sides speak: the highest common one.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.session.version
    }

    /// The peer's address.
    ///
    /// # Errors
    /// What the system says, for instance when the connection is gone.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// This host's address, as the peer reached it or as it was called from.
    pub(crate) fn local_address(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// Who opened the connection.
    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// Readable when the peer has said something.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// A code of `message` that only this side of this channel makes. No frame of the channel has the same input,
    /// as long as the message begins with text: a frame begins with its length and zeros.
    pub(crate) fn code_of_mine(&self, message: &[u8]) -> [u8; 32] {
        *self.session.send_key.code(message).as_bytes()
    }

    /// The code of `message` that the other side makes.
    pub(crate) fn code_of_theirs(&self, message: &[u8]) -> [u8; 32] {
        *self.session.receive_key.code(message).as_bytes()
    }

    /// Sets the time limit of each later send and receive.
    pub fn set_time_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Sends one frame of at most [`CHANNEL_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// `Protocol(Length)` for too many bytes, with nothing sent; `Timeout`, `Closed`, `Io`.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        check_length(bytes.len(), CHANNEL_BYTES_MAX)?;
        let mut frame = Vec::with_capacity(HEADER_BYTES + bytes.len());
        frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        frame.extend_from_slice(&[0; SEQUENCE_AT - RESERVED_AT]);
        frame.extend_from_slice(&self.sent_frames.to_le_bytes());
        let code = frame_code(&self.session.send_key, &frame, bytes);
        frame.extend_from_slice(&code.as_bytes()[..CODE_BYTES]);
        frame.extend_from_slice(bytes);
        Deadline::after(self.limit).write(&self.stream, &frame)?;
        self.sent_frames += 1;
        Ok(())
    }

    /// Receives one frame of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// `Protocol` when the frame is too long, out of order, or not the peer's; `Timeout`, `Closed`, `Io`.
    pub fn receive(&mut self, bytes_max: usize) -> Result<Vec<u8>, ChannelError> {
        let deadline = Deadline::after(self.limit);
        let mut header = [0; HEADER_BYTES];
        deadline.read(&self.stream, &mut header)?;
        let mut length = [0; RESERVED_AT - LENGTH_AT];
        length.copy_from_slice(&header[LENGTH_AT..RESERVED_AT]);
        let length = u32::from_le_bytes(length) as usize;
        check_length(length, bytes_max.min(CHANNEL_BYTES_MAX))?;
        if header[RESERVED_AT..SEQUENCE_AT] != [0; SEQUENCE_AT - RESERVED_AT] {
            return Err(ChannelError::Protocol(ChannelFault::Reserved));
        }
        if header[SEQUENCE_AT..CODE_AT] != self.received_frames.to_le_bytes() {
            return Err(ChannelError::Protocol(ChannelFault::Sequence));
        }
        let mut bytes = vec![0; length];
        deadline.read(&self.stream, &mut bytes)?;
        let expected = frame_code(&self.session.receive_key, &header[..CODE_AT], &bytes);
        // Only 16 bytes of the code travel. With the rest filled in, the constant-time comparison of hashes serves.
        let mut got = *expected.as_bytes();
        got[..CODE_BYTES].copy_from_slice(&header[CODE_AT..]);
        if blake3::Hash::from_bytes(got) != expected {
            return Err(ChannelError::Protocol(ChannelFault::Code));
        }
        self.received_frames += 1;
        Ok(bytes)
    }

    /// Turns the channel into a TCP wire and lends `lend` of `region` to the peer. Both sides must agree in their
    /// conversation when they do this: what a wire sends is no frame of a channel.
    ///
    /// # Errors
    /// What the system says to the socket's options.
    ///
    /// # Panics
    /// If `lend` is not inside the region.
    pub fn into_wire(self, region: Arc<Region>, lend: Span) -> io::Result<Wire> {
        TcpWire::new(self.stream, region, lend).map(Wire::Tcp)
    }
}

fn connect(addresses: &[SocketAddr], deadline: Deadline) -> Result<TcpStream, ChannelError> {
    let mut outcome = Err(ChannelError::Io(io::ErrorKind::AddrNotAvailable.into()));
    for (index, address) in addresses.iter().enumerate() {
        // A silent address must not use up the time of those after it.
        let share = deadline.left()? / (addresses.len() - index) as u32;
        let share = share.max(Duration::from_millis(1));
        outcome = TcpStream::connect_timeout(address, share).map_err(ChannelError::from);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn check_length(bytes: usize, bytes_max: usize) -> Result<(), ChannelError> {
    if bytes <= bytes_max {
        return Ok(());
    }
    Err(ChannelError::Protocol(ChannelFault::Length { bytes, bytes_max }))
}

fn frame_code(key: &Key, header: &[u8], bytes: &[u8]) -> blake3::Hash {
    key.code(&[header, bytes].concat())
}

/// The protocol versions that a side speaks, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VersionRange {
    /// Lowest.
    pub min: u16,
    /// Highest.
    pub max: u16,
}

impl VersionRange {
    /// What this crate speaks.
    pub const OURS: VersionRange = VersionRange { min: 1, max: 1 };

    /// The highest version in both ranges.
    #[must_use]
    pub fn common(self, other: VersionRange) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// Why a channel did not come about, or ended.
#[derive(Debug)]
pub enum ChannelError {
    /// One side's proof is wrong: the keys differ. The side that was called closes without a word then, so the
    /// caller also reports this when the peer goes away at that moment.
    Refused,
    /// No common version.
    Version {
        /// Spoken here.
        ours: VersionRange,
        /// Spoken there.
        theirs: VersionRange,
    },
    /// The time limit passed.
    Timeout,
    /// The peer closed the connection, or it was reset.
    Closed,
    /// The system refused something.
    Io(io::Error),
    /// The peer broke the protocol, or is something else.
    Protocol(ChannelFault),
}

/// How a peer broke the rules of the channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelFault {
    /// The hello does not start as one.
    Magic,
    /// A version range without a version.
    Versions(VersionRange),
    /// Reserved bytes are not zero.
    Reserved,
    /// A frame longer than accepted.
    Length {
        /// Its bytes.
        bytes: usize,
        /// Most bytes accepted.
        bytes_max: usize,
    },
    /// A frame out of order.
    Sequence,
    /// A frame's code is wrong: somebody or something changed it.
    Code,
}

impl From<io::Error> for ChannelError {
    fn from(error: io::Error) -> ChannelError {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => ChannelError::Timeout,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => ChannelError::Closed,
            _ => ChannelError::Io(error),
        }
    }
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChannelError::Refused => {
                write!(f, "refused: the two sides do not have the same key file content")
            }
            ChannelError::Version { ours, theirs } => {
                write!(f, "no common protocol version: {ours} here, {theirs} there")
            }
            ChannelError::Timeout => write!(f, "time limit passed"),
            ChannelError::Closed => write!(f, "the peer closed the connection"),
            ChannelError::Io(error) => error.fmt(f),
            ChannelError::Protocol(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for ChannelError {}

impl fmt::Display for ChannelFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChannelFault::Magic => write!(f, "the peer is not a twinpoint wire"),
            ChannelFault::Versions(versions) => write!(f, "the peer speaks versions {versions}"),
            ChannelFault::Reserved => write!(f, "reserved bytes of the peer are not zero"),
            ChannelFault::Length { bytes, bytes_max } => {
                write!(f, "a frame of {bytes} bytes > {bytes_max}")
            }
            ChannelFault::Sequence => write!(f, "a frame is out of order"),
            ChannelFault::Code => write!(f, "a frame's code is wrong"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_common_version_wins() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 5).common(range(3, 9)), Some(5));
        assert_eq!(range(3, 9).common(range(1, 5)), Some(5));
        assert_eq!(range(1, 1).common(range(1, 1)), Some(1));
        assert_eq!(range(1, 2).common(range(3, 4)), None);
        assert_eq!(range(3, 4).common(range(1, 2)), None);
    }

    #[test]
    fn frame_header_has_no_gaps() {
        assert_eq!((SEQUENCE_AT, CODE_AT, HEADER_BYTES), (8, 16, 32));
    }
}
