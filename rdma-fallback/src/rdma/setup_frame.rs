//! What two sides say over their channel to agree on RDMA or on TCP.
//!
//! It comes before the flow, in set-up; `settle.rs` holds the conversation. Every frame is authenticated by the
//! channel. `docs/WIRE_FORMAT.md` draws them byte by byte.
//!
//! Invariant: a decoded frame's lengths keep the limits of the contract; one meaning has one encoding.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::credit::{RECEIVES_MAX, RECEIVES_MIN};

const VERSION: u8 = 1;
const KIND_PROPOSE: u8 = 1;
const KIND_INVITE: u8 = 2;
const KIND_JOIN: u8 = 3;
const KIND_VERDICT: u8 = 4;

const HEAD_BYTES: usize = 4;
const ENDPOINT_BYTES: usize = 20;
const ADDRESS_BYTES: usize = 20;
/// Random bytes of an invitation, so that a proof fits one connection only.
pub(super) const NONCE_BYTES: usize = 32;
/// Longest reason, in bytes.
const REASON_BYTES_MAX: usize = 300;
/// Longest frame.
pub(super) const SETUP_FRAME_BYTES_MAX: usize = HEAD_BYTES + REASON_BYTES_MAX;

/// What a side brings into the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Endpoint {
    /// Address of the first byte lent; 0 if nothing is.
    pub(super) address: u64,
    /// Bytes lent.
    pub(super) lent_bytes: u32,
    /// The key to them.
    pub(super) key: u32,
    /// Receives that wait from the start.
    pub(super) receives: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum SetupFrame {
    /// Dialler: let us use RDMA.
    Propose,
    /// Listener: call me there.
    Invite { at: SocketAddr, nonce: [u8; NONCE_BYTES], endpoint: Endpoint },
    /// Dialler: I am calling.
    Join { endpoint: Endpoint },
    /// Either side, as its last word: connected, or why not and whether it can do without.
    Verdict { outcome: Result<(), String>, tcp_will_do: bool },
}

impl SetupFrame {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            SetupFrame::Propose => vec![VERSION, KIND_PROPOSE, 0, 0],
            SetupFrame::Invite { at, nonce, endpoint } => {
                let mut bytes = vec![VERSION, KIND_INVITE, 0, 0];
                put_address(&mut bytes, *at);
                bytes.extend_from_slice(nonce);
                put_endpoint(&mut bytes, endpoint);
                bytes
            }
            SetupFrame::Join { endpoint } => {
                let mut bytes = vec![VERSION, KIND_JOIN, 0, 0];
                put_endpoint(&mut bytes, endpoint);
                bytes
            }
            SetupFrame::Verdict { outcome, tcp_will_do } => {
                let flags = [u8::from(outcome.is_ok()), u8::from(*tcp_will_do)];
                let mut bytes = vec![VERSION, KIND_VERDICT, flags[0], flags[1]];
                let reason = outcome.as_ref().err().map_or("", String::as_str);
                bytes.extend_from_slice(&reason.as_bytes()[..cut_at(reason, REASON_BYTES_MAX)]);
                bytes
            }
        }
    }

    /// Reads a frame of a peer; none if it is not one.
    pub(super) fn decode(bytes: &[u8]) -> Option<SetupFrame> {
        let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
        let [version, kind, first, second] = *head;
        if version != VERSION || (kind != KIND_VERDICT && (first, second) != (0, 0)) {
            return None;
        }
        match kind {
            KIND_PROPOSE if rest.is_empty() => Some(SetupFrame::Propose),
            KIND_INVITE => {
                let (address, rest) = rest.split_first_chunk::<ADDRESS_BYTES>()?;
                let (nonce, rest) = rest.split_first_chunk::<NONCE_BYTES>()?;
                let (at, endpoint) = (take_address(address)?, take_endpoint(rest)?);
                Some(SetupFrame::Invite { at, nonce: *nonce, endpoint })
            }
            KIND_JOIN => Some(SetupFrame::Join { endpoint: take_endpoint(rest)? }),
            KIND_VERDICT if first <= 1 && second <= 1 && rest.len() <= REASON_BYTES_MAX => {
                let reason = std::str::from_utf8(rest).ok()?;
                // It will be a part of a line for an operator.
                let is_line = !reason.chars().any(char::is_control);
                let outcome = if first == 1 { Ok(()) } else { Err(reason.to_owned()) };
                let is_one = outcome.is_err() || reason.is_empty();
                let verdict = SetupFrame::Verdict { outcome, tcp_will_do: second == 1 };
                (is_line && is_one).then_some(verdict)
            }
            _ => None,
        }
    }
}

fn cut_at(text: &str, bytes_max: usize) -> usize {
    (0..=text.len().min(bytes_max)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

fn put_endpoint(bytes: &mut Vec<u8>, endpoint: &Endpoint) {
    bytes.extend_from_slice(&endpoint.address.to_le_bytes());
    bytes.extend_from_slice(&endpoint.lent_bytes.to_le_bytes());
    bytes.extend_from_slice(&endpoint.key.to_le_bytes());
    bytes.extend_from_slice(&endpoint.receives.to_le_bytes());
}

fn take_endpoint(bytes: &[u8]) -> Option<Endpoint> {
    let bytes: &[u8; ENDPOINT_BYTES] = bytes.try_into().ok()?;
    let mut address = [0; 8];
    address.copy_from_slice(&bytes[..8]);
    let number =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let address = u64::from_le_bytes(address);
    let endpoint =
        Endpoint { address, lent_bytes: number(8), key: number(12), receives: number(16) };
    let fits = (RECEIVES_MIN..=RECEIVES_MAX).contains(&endpoint.receives)
        && address.checked_add(u64::from(endpoint.lent_bytes)).is_some()
        && (endpoint.lent_bytes > 0 || (address, endpoint.key) == (0, 0));
    fits.then_some(endpoint)
}

fn put_address(bytes: &mut Vec<u8>, at: SocketAddr) {
    let (family, octets) = match at.ip() {
        IpAddr::V4(ip) => (4u16, ip.to_ipv6_mapped().octets()),
        IpAddr::V6(ip) => (6, ip.octets()),
    };
    bytes.extend_from_slice(&family.to_le_bytes());
    bytes.extend_from_slice(&at.port().to_le_bytes());
    bytes.extend_from_slice(&octets);
}

fn take_address(bytes: &[u8; ADDRESS_BYTES]) -> Option<SocketAddr> {
    let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[4..]);
    let ip = Ipv6Addr::from(octets);
    let ip = match number(0) {
        4 => IpAddr::V4(ip.to_ipv4_mapped()?),
        6 => IpAddr::V6(ip),
        _ => return None,
    };
    Some(SocketAddr::new(ip, number(2)))
}

/// The IPv4 or IPv6 address that a card's own address stands for.
pub(super) fn ip_of_gid(gid: [u8; 16]) -> Option<IpAddr> {
    let ip = Ipv6Addr::from(gid);
    match ip.to_ipv4_mapped() {
        Some(Ipv4Addr::UNSPECIFIED) => None,
        Some(ip) => Some(IpAddr::V4(ip)),
        None if ip.is_unspecified() => None,
        None => Some(IpAddr::V6(ip)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<SetupFrame> {
        let endpoint = Endpoint { address: 1 << 40, lent_bytes: 4096, key: 7, receives: 128 };
        let at = |address: &str| address.parse::<SocketAddr>().unwrap();
        let nonce = [5; NONCE_BYTES];
        vec![
            SetupFrame::Propose,
            SetupFrame::Invite { at: at("10.0.0.1:7000"), nonce, endpoint },
            SetupFrame::Invite { at: at("[fe80::1]:65535"), nonce, endpoint },
            SetupFrame::Join { endpoint },
            SetupFrame::Verdict { outcome: Ok(()), tcp_will_do: true },
            SetupFrame::Verdict { outcome: Err("no device".to_owned()), tcp_will_do: false },
        ]
    }

    #[test]
    fn what_is_said_is_heard() {
        for frame in frames() {
            let bytes = frame.encode();
            assert!(bytes.len() <= SETUP_FRAME_BYTES_MAX);
            assert_eq!(SetupFrame::decode(&bytes), Some(frame));
        }
    }

    #[test]
    fn layout_is_pinned() {
        let bytes = frames()[1].encode();
        assert_eq!(bytes[..8], [1, 2, 0, 0, 4, 0, 0x58, 0x1b]);
        assert_eq!(bytes[8..24], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 1]);
        assert_eq!(bytes[24..56], [5; 32]);
        assert_eq!(bytes[56..], [0, 0, 0, 0, 0, 1, 0, 0, 0, 16, 0, 0, 7, 0, 0, 0, 128, 0, 0, 0]);
    }

    #[test]
    fn no_bytes_are_taken_for_more_than_they_are() {
        for frame in frames() {
            let bytes = frame.encode();
            for length in 0..bytes.len() {
                let cut = SetupFrame::decode(&bytes[..length]);
                assert!(cut.is_none() || matches!(cut, Some(SetupFrame::Verdict { .. })));
            }
            let mut long = bytes.clone();
            long.resize(bytes.len() + SETUP_FRAME_BYTES_MAX, 0);
            assert_eq!(SetupFrame::decode(&long), None);
        }
        let refused = |at: usize, value: u8| {
            let mut bytes = frames()[3].encode();
            bytes[at] = value;
            assert_eq!(SetupFrame::decode(&bytes), None, "{at}");
        };
        refused(0, 2);
        refused(1, 9);
        refused(2, 1);
        // More receives than a queue may have, none, and memory beyond the last address.
        refused(4 + 18, 1);
        refused(4 + 16, 0);
        let beyond = Endpoint { address: u64::MAX, lent_bytes: 1, key: 0, receives: 16 };
        assert_eq!(SetupFrame::decode(&SetupFrame::Join { endpoint: beyond }.encode()), None);
    }

    #[test]
    fn long_reasons_are_cut_between_letters() {
        let outcome = Err("\u{e9}".repeat(400));
        let bytes = SetupFrame::Verdict { outcome, tcp_will_do: true }.encode();
        assert_eq!(bytes.len(), SETUP_FRAME_BYTES_MAX);
        assert!(SetupFrame::decode(&bytes).is_some());
    }

    #[test]
    fn cards_addresses_are_addresses() {
        let mut gid = [0; 16];
        assert_eq!(ip_of_gid(gid), None);
        (gid[10], gid[11], gid[12], gid[15]) = (255, 255, 10, 1);
        assert_eq!(ip_of_gid(gid), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(ip_of_gid([0xfd; 16]).map(|ip| ip.is_ipv6()), Some(true));
    }
}
