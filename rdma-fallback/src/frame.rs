//! The header of a frame: what the two ends of a wire say about the bytes that follow.
//!
//! Part of step 4 of the flow. `docs/WIRE_FORMAT.md` draws it byte by byte.
//!
//! Invariants:
//! - A decoded header keeps every limit of the contract, and its target lies inside the lent span.
//! - One meaning has one encoding: without bytes to place, the target is 0.

use std::fmt;

use crate::{MESSAGE_BYTES_MAX, PLACEMENT_BYTES_MAX, Span};

/// First bytes of every frame: "TPF1".
const MAGIC: u32 = u32::from_le_bytes(*b"TPF1");

const MAGIC_AT: usize = 0;
const MESSAGE_BYTES_AT: usize = MAGIC_AT + 4;
const PLACED_BYTES_AT: usize = MESSAGE_BYTES_AT + 4;
const RESERVED_AT: usize = PLACED_BYTES_AT + 4;
const TARGET_AT: usize = RESERVED_AT + 4;
const CHECK_AT: usize = TARGET_AT + 8;
/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = CHECK_AT + 8;

/// A frame's header. The message follows it, then the bytes to place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// Bytes of the message.
    pub(crate) message_bytes: u32,
    /// Where the bytes after the message go in the receiver's lent span; no bytes means none follow.
    pub(crate) placed: Span,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, MAGIC_AT, &MAGIC.to_le_bytes());
        put(&mut bytes, MESSAGE_BYTES_AT, &self.message_bytes.to_le_bytes());
        put(&mut bytes, PLACED_BYTES_AT, &self.placed.length.to_le_bytes());
        put(&mut bytes, TARGET_AT, &self.placed.offset.to_le_bytes());
        let check = check(&bytes);
        put(&mut bytes, CHECK_AT, &check);
        bytes
    }

    /// Reads a header for a receiver that lent `lent_bytes`.
    pub(crate) fn decode(
        bytes: &[u8; HEADER_BYTES],
        lent_bytes: u32,
    ) -> Result<Header, FrameFault> {
        let magic = number32(bytes, MAGIC_AT);
        if magic != MAGIC {
            return Err(FrameFault::Magic { got: magic });
        }
        if check(bytes) != bytes[CHECK_AT..] {
            return Err(FrameFault::Check);
        }
        if number32(bytes, RESERVED_AT) != 0 {
            return Err(FrameFault::Reserved);
        }
        let message_bytes = number32(bytes, MESSAGE_BYTES_AT);
        if message_bytes as usize > MESSAGE_BYTES_MAX {
            return Err(FrameFault::MessageTooLong { bytes: message_bytes });
        }
        let target = u64::from_le_bytes(part(bytes, TARGET_AT));
        let placed = Span::new(target, number32(bytes, PLACED_BYTES_AT));
        check_placed(placed, lent_bytes)?;
        Ok(Header { message_bytes, placed })
    }
}

/// Whether the receiver that lent `lent_bytes` accepts bytes at `placed`: what a network card checks too.
pub(crate) fn check_placed(placed: Span, lent_bytes: u32) -> Result<(), FrameFault> {
    if placed.length == 0 {
        return if placed.offset == 0 { Ok(()) } else { Err(FrameFault::Reserved) };
    }
    if placed.length > PLACEMENT_BYTES_MAX {
        return Err(FrameFault::PlacementTooLong { bytes: placed.length });
    }
    if placed.end() > u64::from(lent_bytes) {
        return Err(FrameFault::TargetOutside { placed, lent_bytes });
    }
    Ok(())
}

/// How a peer broke the rules of the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameFault {
    /// A frame starts with other bytes.
    Magic {
        /// The four bytes, little-endian.
        got: u32,
    },
    /// The header's check is wrong.
    Check,
    /// A reserved field, or the target of no bytes, is not zero.
    Reserved,
    /// The message exceeds [`MESSAGE_BYTES_MAX`].
    MessageTooLong {
        /// Announced bytes.
        bytes: u32,
    },
    /// The bytes to place exceed [`PLACEMENT_BYTES_MAX`].
    PlacementTooLong {
        /// Announced bytes.
        bytes: u32,
    },
    /// The bytes to place would leave the lent span.
    TargetOutside {
        /// Where they would go, from the start of the lent span.
        placed: Span,
        /// Bytes lent.
        lent_bytes: u32,
    },
    /// A frame is shorter or longer than it says.
    Length {
        /// Its bytes.
        bytes: u32,
    },
    /// A placement and its message do not belong together.
    Placement {
        /// The number that came.
        got: u32,
        /// The number of the last placement that has arrived.
        arrived: u32,
    },
    /// More receives than there can be.
    Credit {
        /// The number that came.
        told: u32,
    },
}

impl fmt::Display for FrameFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameFault::Magic { got } => write!(f, "a frame starts with {got:#010x}"),
            FrameFault::Check => write!(f, "wrong check of a frame header"),
            FrameFault::Reserved => write!(f, "a reserved field of a frame header is not zero"),
            FrameFault::MessageTooLong { bytes } => {
                write!(f, "a message of {bytes} bytes > {MESSAGE_BYTES_MAX}")
            }
            FrameFault::PlacementTooLong { bytes } => {
                write!(f, "a placement of {bytes} bytes > {PLACEMENT_BYTES_MAX}")
            }
            FrameFault::TargetOutside { placed, lent_bytes } => {
                let Span { offset, length } = placed;
                write!(f, "{length} bytes to place at {offset} of {lent_bytes} lent")
            }
            FrameFault::Length { bytes } => write!(f, "a frame of {bytes} bytes says otherwise"),
            FrameFault::Placement { got, arrived } => {
                write!(f, "placement {got} is named, {arrived} is the last that has arrived")
            }
            FrameFault::Credit { told } => write!(f, "credit up to {told}, more than can be"),
        }
    }
}

/// Detects accidents only; the first bytes of a hash that the crate has anyway.
fn check(bytes: &[u8; HEADER_BYTES]) -> [u8; 8] {
    part(blake3::hash(&bytes[..CHECK_AT]).as_bytes(), 0)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn number32(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(part(bytes, at))
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENT: u32 = 1 << 20;

    #[test]
    fn layout_is_pinned() {
        let header = Header { message_bytes: 0x102, placed: Span::new(0x1122, 0x304) };
        let bytes = header.encode();
        assert_eq!(bytes[..24], *b"TPF1\x02\x01\0\0\x04\x03\0\0\0\0\0\0\x22\x11\0\0\0\0\0\0");
        assert_eq!(bytes[24..], blake3::hash(&bytes[..24]).as_bytes()[..8]);
        assert_eq!(Header::decode(&bytes, LENT), Ok(header));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let bytes = Header { message_bytes: 77, placed: Span::new(4096, 4096) }.encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&flipped, LENT).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn limits_are_exact() {
        let decode = |message_bytes, offset, length| {
            let header = Header { message_bytes, placed: Span::new(offset, length) };
            Header::decode(&header.encode(), LENT).map(|_| ())
        };
        assert_eq!(decode(8192, 0, LENT), Ok(()));
        assert_eq!(decode(0, 0, 0), Ok(()));
        assert_eq!(decode(0, u64::from(LENT) - 1, 1), Ok(()));
        assert_eq!(decode(8193, 0, 0), Err(FrameFault::MessageTooLong { bytes: 8193 }));
        assert_eq!(decode(0, 1, 0), Err(FrameFault::Reserved));
        let bytes = PLACEMENT_BYTES_MAX + 1;
        assert_eq!(decode(0, 0, bytes), Err(FrameFault::PlacementTooLong { bytes }));
        for (offset, length) in [(1, LENT), (u64::from(LENT), 1), (u64::MAX, 1), (u64::MAX - 5, 9)]
        {
            let fault =
                FrameFault::TargetOutside { placed: Span::new(offset, length), lent_bytes: LENT };
            assert_eq!(decode(0, offset, length), Err(fault));
        }
    }

    #[test]
    fn reserved_bytes_must_be_zero() {
        let mut bytes = Header { message_bytes: 1, placed: Span::default() }.encode();
        bytes[RESERVED_AT] = 1;
        let sum = check(&bytes);
        put(&mut bytes, CHECK_AT, &sum);
        assert_eq!(Header::decode(&bytes, LENT), Err(FrameFault::Reserved));
    }
}
