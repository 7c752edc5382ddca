//! The numbers of the NBD protocol and the shape of its fixed-size messages. Everything is big-endian.
//!
//! Invariants: this file knows bytes only, nothing of sessions.

pub(super) const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Server's handshake flags; the client's have the same bits.
pub(super) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const NO_ZEROES: u16 = 1 << 1;

pub(super) const OPTION_EXPORT_NAME: u32 = 1;
pub(super) const OPTION_ABORT: u32 = 2;
pub(super) const OPTION_LIST: u32 = 3;
pub(super) const OPTION_INFO: u32 = 6;
pub(super) const OPTION_GO: u32 = 7;
pub(super) const OPTION_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPTION_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPTION_SET_META_CONTEXT: u32 = 10;

pub(super) const REPLY_ACK: u32 = 1;
pub(super) const REPLY_SERVER: u32 = 2;
pub(super) const REPLY_INFO: u32 = 3;
pub(super) const REPLY_META_CONTEXT: u32 = 4;
pub(super) const REPLY_ERROR_UNSUPPORTED: u32 = (1 << 31) + 1;
pub(super) const REPLY_ERROR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REPLY_ERROR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REPLY_ERROR_SHUTDOWN: u32 = (1 << 31) + 7;
pub(super) const REPLY_ERROR_TOO_BIG: u32 = (1 << 31) + 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const HAS_FLAGS: u16 = 1 << 0;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const SEND_DF: u16 = 1 << 7;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;
pub(super) const SEND_FAST_ZERO: u16 = 1 << 11;

pub(super) const COMMAND_READ: u16 = 0;
pub(super) const COMMAND_WRITE: u16 = 1;
pub(super) const COMMAND_DISCONNECT: u16 = 2;
pub(super) const COMMAND_FLUSH: u16 = 3;
pub(super) const COMMAND_TRIM: u16 = 4;
pub(super) const COMMAND_WRITE_ZEROES: u16 = 6;
pub(super) const COMMAND_BLOCK_STATUS: u16 = 7;

pub(super) const FLAG_FUA: u16 = 1 << 0;
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const FLAG_DF: u16 = 1 << 2;
pub(super) const FLAG_REQ_ONE: u16 = 1 << 3;
pub(super) const FLAG_FAST_ZERO: u16 = 1 << 4;

pub(super) const CHUNK_DONE: u16 = 1 << 0;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = (1 << 15) + 1;

/// The one metadata context, and the name by which its chunks are known once it is selected.
pub(super) const CONTEXT_ALLOCATION: &str = "base:allocation";
pub(super) const CONTEXT_ALLOCATION_ID: u32 = 1;
/// Extent flags of an unmapped range: a hole that reads as zeroes.
pub(super) const EXTENT_HOLE: u32 = 3;
pub(super) const EXTENT_DATA: u32 = 0;

/// An error as the client sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum ErrorNumber {
    NotPermitted = 1,
    InputOutput = 5,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    NotSupported = 95,
    Shutdown = 108,
}

/// Bytes of an option's header: magic, option, length.
pub(super) const OPTION_HEADER_BYTES: usize = 16;

/// An option's header, as sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct OptionHeader {
    pub(super) option: u32,
    pub(super) length: u32,
}

impl OptionHeader {
    /// `None` when the magic is wrong.
    pub(super) fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<OptionHeader> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return None;
        }
        Some(OptionHeader { option: fields.u32()?, length: fields.u32()? })
    }
}

/// Bytes of a command's header.
pub(super) const REQUEST_HEADER_BYTES: usize = 28;

/// A command's header, as sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RequestHeader {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl RequestHeader {
    /// `None` when the magic is wrong.
    pub(super) fn parse(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Option<RequestHeader> {
        let mut fields = Fields::new(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(RequestHeader {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }
}

/// Reads fields one after the other; `None` past the end.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Fields<'a> {
        Fields { rest: bytes }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(bytes)
    }

    /// A string with its length in 32 bits before it; `None` also when it is not UTF-8.
    pub(super) fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        str::from_utf8(self.bytes(length)?).ok()
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_are_the_words_they_spell() {
        assert_eq!(&GREETING_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn fields_stop_at_the_end() {
        let mut fields = Fields::new(&[0, 0, 0, 2, b'a']);
        assert_eq!(fields.string(), None);
        let mut fields = Fields::new(&[0, 0, 0, 1, 0xff]);
        assert_eq!(fields.string(), None);
        let mut fields = Fields::new(&[0, 1, 2]);
        assert_eq!(fields.u16(), Some(1));
        assert_eq!(fields.u16(), None);
        assert!(!fields.is_empty());
    }

    #[test]
    fn a_wrong_magic_is_no_header() {
        assert_eq!(RequestHeader::parse(&[0; REQUEST_HEADER_BYTES]), None);
        assert_eq!(OptionHeader::parse(&[0; OPTION_HEADER_BYTES]), None);
    }
}
