//! Handshake: two hosts agree on a version and prove to each other that they hold the same key.
//!
//! It comes before everything in the flow. `docs/WIRE_FORMAT.md` draws it byte by byte.
//!
//! Invariants:
//! - The dialer proves first. A stranger learns magic, versions and a random number, and changes nothing.
//! - A proof covers its maker's role and both hellos, so it can be neither reflected, nor replayed, nor used to hide
//!   that the versions were tampered with.
//! - Each direction has a session key of its own, never used for another connection.

use std::fs::File;
use std::io::Read;
use std::net::TcpStream;

use crate::deadline::Deadline;
use crate::{ChannelError, ChannelFault, Key, VersionRange};

const MAGIC: [u8; 8] = *b"twinwire";

const MAGIC_AT: usize = 0;
const VERSION_MIN_AT: usize = MAGIC_AT + 8;
const VERSION_MAX_AT: usize = VERSION_MIN_AT + 2;
const RESERVED_AT: usize = VERSION_MAX_AT + 2;
const NONCE_AT: usize = RESERVED_AT + 4;
const NONCE_BYTES: usize = 32;
/// Bytes of a hello.
pub(crate) const HELLO_BYTES: usize = NONCE_AT + NONCE_BYTES;
/// Bytes of a proof.
const PROOF_BYTES: usize = 32;

const DIALER_KEY_CONTEXT: &str = "twinpoint 2025 wire session dialer to acceptor";
const ACCEPTOR_KEY_CONTEXT: &str = "twinpoint 2025 wire session acceptor to dialer";

/// Who opened the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Role {
    /// The side that called.
    Dialer = 1,
    /// The side that was called.
    Acceptor = 2,
}

/// What a handshake yields.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) version: u16,
    pub(crate) send_key: Key,
    pub(crate) receive_key: Key,
}

/// Runs one side of the handshake on a connected stream.
pub(crate) fn shake_hands(
    stream: &TcpStream,
    key: &Key,
    role: Role,
    deadline: Deadline,
) -> Result<Session, ChannelError> {
    let mine = Hello { versions: VersionRange::OURS, nonce: random_nonce()? }.encode();
    deadline.write(stream, &mine)?;
    let mut theirs = [0; HELLO_BYTES];
    // The magic alone first: a caller that speaks something else, and little of it, is told at once.
    deadline.read(stream, &mut theirs[..VERSION_MIN_AT])?;
    check_magic(&theirs)?;
    deadline.read(stream, &mut theirs[VERSION_MIN_AT..])?;
    let hello = Hello::decode(&theirs)?;
    let version = VersionRange::OURS
        .common(hello.versions)
        .ok_or(ChannelError::Version { ours: VersionRange::OURS, theirs: hello.versions })?;
    let transcript = match role {
        Role::Dialer => [mine, theirs].concat(),
        Role::Acceptor => [theirs, mine].concat(),
    };
    match role {
        Role::Dialer => {
            deadline.write(stream, proof(key, Role::Dialer, &transcript).as_bytes())?;
            // An acceptor that does not like the proof just closes.
            check_proof(stream, key, Role::Acceptor, &transcript, deadline).map_err(|error| {
                if matches!(error, ChannelError::Closed) { ChannelError::Refused } else { error }
            })?;
        }
        Role::Acceptor => {
            check_proof(stream, key, Role::Dialer, &transcript, deadline)?;
            deadline.write(stream, proof(key, Role::Acceptor, &transcript).as_bytes())?;
        }
    }
    let dialer_key = key.derive(DIALER_KEY_CONTEXT, &transcript);
    let acceptor_key = key.derive(ACCEPTOR_KEY_CONTEXT, &transcript);
    let (send_key, receive_key) = match role {
        Role::Dialer => (dialer_key, acceptor_key),
        Role::Acceptor => (acceptor_key, dialer_key),
    };
    Ok(Session { version, send_key, receive_key })
}

fn proof(key: &Key, role: Role, transcript: &[u8]) -> blake3::Hash {
    key.code(&[&[role as u8], transcript].concat())
}

fn check_proof(
    stream: &TcpStream,
    key: &Key,
    role: Role,
    transcript: &[u8],
    deadline: Deadline,
) -> Result<(), ChannelError> {
    let mut bytes = [0; PROOF_BYTES];
    deadline.read(stream, &mut bytes)?;
    // Hashes are compared in constant time.
    let equal = blake3::Hash::from_bytes(bytes) == proof(key, role, transcript);
    if equal { Ok(()) } else { Err(ChannelError::Refused) }
}

struct Hello {
    versions: VersionRange,
    nonce: [u8; NONCE_BYTES],
}

impl Hello {
    fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[MAGIC_AT..VERSION_MIN_AT].copy_from_slice(&MAGIC);
        bytes[VERSION_MIN_AT..VERSION_MAX_AT].copy_from_slice(&self.versions.min.to_le_bytes());
        bytes[VERSION_MAX_AT..RESERVED_AT].copy_from_slice(&self.versions.max.to_le_bytes());
        bytes[NONCE_AT..].copy_from_slice(&self.nonce);
        bytes
    }

    fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, ChannelError> {
        let fault = |fault| Err(ChannelError::Protocol(fault));
        check_magic(bytes)?;
        let number = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let versions = VersionRange { min: number(VERSION_MIN_AT), max: number(VERSION_MAX_AT) };
        if versions.min > versions.max {
            return fault(ChannelFault::Versions(versions));
        }
        // Later versions may use the reserved bytes: they are held against a peer of today only.
        let is_known = versions.max <= VersionRange::OURS.max;
        if is_known && bytes[RESERVED_AT..NONCE_AT] != [0; NONCE_AT - RESERVED_AT] {
            return fault(ChannelFault::Reserved);
        }
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&bytes[NONCE_AT..]);
        Ok(Hello { versions, nonce })
    }
}

fn check_magic(bytes: &[u8; HELLO_BYTES]) -> Result<(), ChannelError> {
    let equal = bytes[MAGIC_AT..VERSION_MIN_AT] == MAGIC;
    if equal { Ok(()) } else { Err(ChannelError::Protocol(ChannelFault::Magic)) }
}

fn random_nonce() -> Result<[u8; NONCE_BYTES], ChannelError> {
    let mut nonce = [0; NONCE_BYTES];
    let mut source = File::open("/dev/urandom").map_err(ChannelError::Io)?;
    source.read_exact(&mut nonce).map_err(ChannelError::Io)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_layout_is_pinned() {
        let versions = VersionRange { min: 0x102, max: 0x304 };
        let bytes = Hello { versions, nonce: [9; NONCE_BYTES] }.encode();
        assert_eq!(bytes[..16], *b"twinwire\x02\x01\x04\x03\0\0\0\0");
        assert_eq!(bytes[16..], [9; 32]);
        let hello = Hello::decode(&bytes).unwrap();
        assert_eq!((hello.versions, hello.nonce), (versions, [9; 32]));
    }

    #[test]
    fn hello_faults_are_told_apart() {
        let good = Hello { versions: VersionRange::OURS, nonce: [0; NONCE_BYTES] }.encode();
        let fault = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            match Hello::decode(&bytes) {
                Err(ChannelError::Protocol(fault)) => Some(fault),
                _ => None,
            }
        };
        assert_eq!(fault(0, b'x'), Some(ChannelFault::Magic));
        assert_eq!(fault(RESERVED_AT, 1), Some(ChannelFault::Reserved));
        let versions = VersionRange { min: 9, max: 1 };
        assert_eq!(fault(VERSION_MIN_AT, 9), Some(ChannelFault::Versions(versions)));
        assert_eq!(fault(VERSION_MAX_AT, 9), None);
    }

    #[test]
    fn proofs_depend_on_key_role_and_every_byte() {
        let key = Key::from_bytes(b"a");
        let right = proof(&key, Role::Dialer, &[0; 96]);
        assert_ne!(right, proof(&key, Role::Acceptor, &[0; 96]));
        assert_ne!(right, proof(&Key::from_bytes(b"b"), Role::Dialer, &[0; 96]));
        for at in 0..96 {
            let mut transcript = [0; 96];
            transcript[at] = 1;
            assert_ne!(right, proof(&key, Role::Dialer, &transcript));
        }
    }
}
