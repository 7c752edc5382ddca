//! The head of a frame on an RDMA wire: what a SEND says of its message and of the WRITEs before it.
//!
//! Part of step 4 of the flow. `docs/WIRE_FORMAT.md` draws it byte by byte.
//!
//! ```text
//!   WRITE .. WRITE WITH IMMEDIATE n      the bytes to place, if any; n: this connection's placements so far
//!   SEND [ head | message ]              the head repeats n: it names bytes that have arrived, or the wire ends
//! ```
//!
//! Invariants: as for [`crate::frame`]: a decoded head keeps every limit of the contract, its target lies inside the
//! lent span, and one meaning has one encoding.

use crate::frame::{FrameFault, check_placed};
use crate::{MESSAGE_BYTES_MAX, Span};

/// First bytes of a frame with a message: "TPR1".
const MAGIC_MESSAGE: u32 = u32::from_le_bytes(*b"TPR1");
/// First bytes of a frame that only tells credit: "TPC1".
const MAGIC_CREDIT: u32 = u32::from_le_bytes(*b"TPC1");

const MAGIC_AT: usize = 0;
const MESSAGE_BYTES_AT: usize = MAGIC_AT + 4;
const PLACED_BYTES_AT: usize = MESSAGE_BYTES_AT + 4;
const CREDIT_AT: usize = PLACED_BYTES_AT + 4;
const TARGET_AT: usize = CREDIT_AT + 4;
const PLACEMENTS_AT: usize = TARGET_AT + 8;
const RESERVED_AT: usize = PLACEMENTS_AT + 4;
/// Bytes of a head.
pub(super) const HEAD_BYTES: usize = RESERVED_AT + 4;

/// What a frame says before its message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Head {
    /// What the frame is for.
    pub(super) kind: Kind,
    /// Receives that the sender has posted since the start, modulo 2^32.
    pub(super) credit: u32,
    /// Placements that the sender has made since the start, modulo 2^32, this frame's included.
    pub(super) placements: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Nothing but credit.
    Credit,
    /// A message of so many bytes follows; bytes were placed before, or none.
    Message { bytes: u32, placed: Span },
}

impl Head {
    pub(super) fn encode(self) -> [u8; HEAD_BYTES] {
        let (magic, message_bytes, placed) = match self.kind {
            Kind::Credit => (MAGIC_CREDIT, 0, Span::default()),
            Kind::Message { bytes, placed } => (MAGIC_MESSAGE, bytes, placed),
        };
        let mut head = [0; HEAD_BYTES];
        put(&mut head, MAGIC_AT, &magic.to_le_bytes());
        put(&mut head, MESSAGE_BYTES_AT, &message_bytes.to_le_bytes());
        put(&mut head, PLACED_BYTES_AT, &placed.length.to_le_bytes());
        put(&mut head, CREDIT_AT, &self.credit.to_le_bytes());
        put(&mut head, TARGET_AT, &placed.offset.to_le_bytes());
        put(&mut head, PLACEMENTS_AT, &self.placements.to_le_bytes());
        head
    }

    /// Reads the head of a frame of `frame_bytes` for a receiver that lent `lent_bytes`. The card has checked every
    /// byte on its way, so there is no check of our own; what a peer may say is checked.
    pub(super) fn decode(
        head: &[u8; HEAD_BYTES],
        frame_bytes: u32,
        lent_bytes: u32,
    ) -> Result<Head, FrameFault> {
        let message_bytes = number(head, MESSAGE_BYTES_AT);
        let target = u64::from_le_bytes(part(head, TARGET_AT));
        let placed = Span::new(target, number(head, PLACED_BYTES_AT));
        let kind = match number(head, MAGIC_AT) {
            MAGIC_MESSAGE => Kind::Message { bytes: message_bytes, placed },
            MAGIC_CREDIT if message_bytes == 0 && placed == Span::default() => Kind::Credit,
            MAGIC_CREDIT => return Err(FrameFault::Reserved),
            magic => return Err(FrameFault::Magic { got: magic }),
        };
        if number(head, RESERVED_AT) != 0 {
            return Err(FrameFault::Reserved);
        }
        if message_bytes as usize > MESSAGE_BYTES_MAX {
            return Err(FrameFault::MessageTooLong { bytes: message_bytes });
        }
        if u64::from(frame_bytes) != HEAD_BYTES as u64 + u64::from(message_bytes) {
            return Err(FrameFault::Length { bytes: frame_bytes });
        }
        check_placed(placed, lent_bytes)?;
        let (credit, placements) = (number(head, CREDIT_AT), number(head, PLACEMENTS_AT));
        Ok(Head { kind, credit, placements })
    }
}

/// The placements of one direction, as its receiver counts them.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// Number of the last placement that has arrived.
    arrived: u32,
    /// Number of the last placement whose message has arrived.
    named: u32,
}

impl Arrivals {
    /// A write with this immediate has arrived: the next in order, before the message of the one before.
    pub(super) fn placement(&mut self, immediate: u32) -> Result<(), FrameFault> {
        let is_next = immediate == self.arrived.wrapping_add(1) && self.arrived == self.named;
        if !is_next {
            return Err(FrameFault::Placement { got: immediate, arrived: self.arrived });
        }
        self.arrived = immediate;
        Ok(())
    }

    /// A frame has arrived: it names the placement before it, if there is one, and no other.
    pub(super) fn frame(&mut self, head: &Head) -> Result<(), FrameFault> {
        let names = matches!(head.kind, Kind::Message { placed, .. } if placed.length > 0);
        let expected = if names { self.named.wrapping_add(1) } else { self.named };
        if head.placements != expected || expected != self.arrived {
            let (got, arrived) = (head.placements, self.arrived);
            return Err(FrameFault::Placement { got, arrived });
        }
        self.named = expected;
        Ok(())
    }
}

fn put(head: &mut [u8; HEAD_BYTES], at: usize, value: &[u8]) {
    head[at..at + value.len()].copy_from_slice(value);
}

fn number(head: &[u8; HEAD_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(part(head, at))
}

fn part<const COUNT: usize>(head: &[u8; HEAD_BYTES], at: usize) -> [u8; COUNT] {
    let mut part = [0; COUNT];
    part.copy_from_slice(&head[at..at + COUNT]);
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Head = Head {
        kind: Kind::Message { bytes: 0x0102, placed: Span { offset: 0x1020_3040, length: 0x5060 } },
        credit: 0x0a0b_0c0d,
        placements: 9,
    };
    const LENT: u32 = u32::MAX;

    #[test]
    fn layout_is_pinned() {
        let bytes = HEAD.encode();
        let expected = [
            &b"TPR1\x02\x01\0\0\x60\x50\0\0\x0d\x0c\x0b\x0a"[..],
            b"\x40\x30\x20\x10\0\0\0\0\x09\0\0\0\0\0\0\0",
        ];
        assert_eq!(bytes.as_slice(), expected.concat());
        assert_eq!(Head::decode(&bytes, 32 + 0x0102, LENT), Ok(HEAD));
        let credit = Head { kind: Kind::Credit, ..HEAD };
        assert_eq!(Head::decode(&credit.encode(), 32, LENT), Ok(credit));
    }

    #[test]
    fn faults_are_told_apart() {
        let good = HEAD.encode();
        let fault = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Head::decode(&bytes, 32 + 0x0102, LENT).unwrap_err()
        };
        assert!(matches!(fault(MAGIC_AT, 0), FrameFault::Magic { .. }));
        assert_eq!(fault(MAGIC_AT + 2, b'C'), FrameFault::Reserved);
        assert_eq!(fault(MESSAGE_BYTES_AT, 3), FrameFault::Length { bytes: 32 + 0x0102 });
        assert!(matches!(fault(MESSAGE_BYTES_AT + 2, 1), FrameFault::MessageTooLong { .. }));
        assert!(matches!(fault(PLACED_BYTES_AT + 3, 1), FrameFault::PlacementTooLong { .. }));
        assert!(matches!(fault(TARGET_AT + 7, 1), FrameFault::TargetOutside { .. }));
        assert_eq!(fault(RESERVED_AT, 1), FrameFault::Reserved);
        let mut credit = Head { kind: Kind::Credit, ..HEAD }.encode();
        credit[TARGET_AT] = 1;
        assert_eq!(Head::decode(&credit, 32, LENT), Err(FrameFault::Reserved));
    }

    #[test]
    fn a_message_names_bytes_that_have_arrived() {
        let head = |placements, length| Head {
            kind: Kind::Message { bytes: 0, placed: Span::new(0, length) },
            credit: 0,
            placements,
        };
        let mut arrivals = Arrivals::default();
        arrivals.frame(&head(0, 0)).unwrap();
        assert!(arrivals.frame(&head(1, 8)).is_err(), "no write has brought them");
        arrivals.placement(1).unwrap();
        assert!(arrivals.placement(2).is_err(), "the first one's message comes first");
        assert!(arrivals.frame(&head(0, 0)).is_err(), "the write was for this message");
        assert!(arrivals.frame(&head(2, 8)).is_err());
        arrivals.frame(&head(1, 8)).unwrap();
        assert!(arrivals.placement(3).is_err(), "a number is missing");
        arrivals.frame(&head(1, 0)).unwrap();
    }
}
