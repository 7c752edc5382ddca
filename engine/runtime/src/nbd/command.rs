//! A client's command under way, and its pieces.
//!
//! Invariants: `cursor <= end <= size of the volume`; bytes before `cursor` are given to shards, bytes
//! after it are not; a command is answered once, when no piece of it is under way and its payload is complete.

use twinpoint_core::units::{BLOCK_BYTES, BufferId, SECTOR_BYTES};

use super::host::Export;
use super::limits::PAYLOAD_BYTES_MAX;
use super::protocol::{
    self, CAN_MULTI_CONN, ErrorNumber, FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE,
    FLAG_REQ_ONE, HAS_FLAGS, READ_ONLY, RequestHeader, SEND_DF, SEND_FAST_ZERO, SEND_FLUSH,
    SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
};
use super::read::ReadWork;
use super::slab::Key;
use super::status::StatusWork;
use crate::cut::{BLOCK, block_ceiling, block_floor};

/// What was agreed on with the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Terms {
    pub(super) export: Export,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// The client may ask for block status.
    pub(super) status: bool,
}

/// A command under way.
pub(super) struct Command {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) end: u64,
    pub(super) cursor: u64,
    pub(super) work: Work,
    /// Pieces given to shards and not answered, and a flush asked for.
    pub(super) in_flight: u32,
    /// The first error of a piece.
    pub(super) error: Option<ErrorNumber>,
    /// Everything must be durable before the answer.
    pub(super) flush_after: bool,
    /// Payload is still to come.
    pub(super) open: bool,
}

/// What a command does.
pub(super) enum Work {
    Read(ReadWork),
    Write,
    Trim,
    /// `hole`: whole blocks are unmapped; otherwise zeroes are written.
    Zeroes {
        hole: bool,
    },
    Flush,
    Status(Box<StatusWork>),
}

/// A part of a command that one shard answers.
pub(super) struct Piece {
    pub(super) command: Key,
    pub(super) work: PieceWork,
}

pub(super) enum PieceWork {
    Write,
    /// An unmap or a write of zeroes.
    Background,
    /// `part` counts the pieces of a read that is answered as a whole.
    Read {
        span: Span,
        part: u32,
    },
    /// `index` counts the requests of a batch.
    Status {
        index: u8,
    },
    Flush,
}

/// A range of a volume and the buffers for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub(super) first: BufferId,
    /// Buffers held; at least as many as the range touches.
    pub(super) count: u32,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Span {
    /// Where the range begins, counted from the first buffer's start.
    pub(super) fn buffer_offset(&self) -> usize {
        usize::try_from(self.offset % BLOCK).expect("less than a block")
    }
}

impl Terms {
    /// The transmission flags.
    pub(super) fn flags(&self) -> u16 {
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
        if self.structured {
            flags |= SEND_DF;
        }
        if self.export.read_only {
            flags | READ_ONLY
        } else {
            flags | SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO
        }
    }

    /// Whether the answer of a command is a chunk even when it is an error.
    pub(super) fn answers_in_chunks(&self, command: u16) -> bool {
        self.structured
            && matches!(command, protocol::COMMAND_READ | protocol::COMMAND_BLOCK_STATUS)
    }
}

impl Command {
    /// Checks a header against the terms and makes a command of it.
    ///
    /// # Errors
    /// What to answer instead.
    pub(super) fn admit(header: &RequestHeader, terms: &Terms) -> Result<Command, ErrorNumber> {
        let work = Work::admit(header, terms)?;
        let mut command = Command::empty(header);
        match work {
            Work::Flush => {
                command.flush_after = true;
                command.work = work;
                return Ok(command);
            }
            Work::Read(_) | Work::Write if header.length > PAYLOAD_BYTES_MAX => {
                return Err(ErrorNumber::Overflow);
            }
            _ => {}
        }
        let end = checked_end(header)?;
        if end > terms.export.size_bytes {
            return Err(match work {
                Work::Write | Work::Zeroes { .. } => ErrorNumber::NoSpace,
                _ => ErrorNumber::Invalid,
            });
        }
        (command.offset, command.cursor, command.end) = (header.offset, header.offset, end);
        if matches!(work, Work::Trim) {
            command.end = block_floor(end);
            command.cursor = block_ceiling(header.offset).min(command.end);
        }
        command.flush_after = header.flags & FLAG_FUA != 0
            && matches!(work, Work::Write | Work::Trim | Work::Zeroes { .. });
        command.open = matches!(work, Work::Write);
        command.work = work;
        Ok(command)
    }

    /// A command that was refused, and lives on while its payload is thrown away.
    pub(super) fn refused(header: &RequestHeader, error: ErrorNumber) -> Command {
        Command { error: Some(error), open: true, ..Command::empty(header) }
    }

    fn empty(header: &RequestHeader) -> Command {
        Command {
            cookie: header.cookie,
            offset: 0,
            end: 0,
            cursor: 0,
            work: Work::Write,
            in_flight: 0,
            error: None,
            flush_after: false,
            open: false,
        }
    }

    /// Notes what came of a piece; the first error stays.
    pub(super) fn fail(&mut self, error: ErrorNumber) {
        self.error.get_or_insert(error);
    }

    /// Bytes of the client's range from `offset`, as a length.
    pub(super) fn length(&self) -> u32 {
        u32::try_from(self.end - self.offset).expect("a command is shorter than 4 GiB")
    }
}

impl Work {
    fn admit(header: &RequestHeader, terms: &Terms) -> Result<Work, ErrorNumber> {
        let set = |flag| header.flags & flag != 0;
        let df = if terms.structured { FLAG_DF } else { 0 };
        let (allowed, work) = match header.command {
            protocol::COMMAND_READ => {
                (df, Work::Read(ReadWork::new(terms.structured && !set(FLAG_DF), terms.structured)))
            }
            protocol::COMMAND_WRITE => (0, Work::Write),
            protocol::COMMAND_FLUSH => (0, Work::Flush),
            protocol::COMMAND_TRIM => (0, Work::Trim),
            protocol::COMMAND_WRITE_ZEROES => {
                (FLAG_NO_HOLE | FLAG_FAST_ZERO, Work::Zeroes { hole: !set(FLAG_NO_HOLE) })
            }
            protocol::COMMAND_BLOCK_STATUS if terms.status => (
                FLAG_REQ_ONE,
                Work::Status(Box::new(StatusWork::new(header.offset, set(FLAG_REQ_ONE)))),
            ),
            _ => return Err(ErrorNumber::Invalid),
        };
        // FUA is allowed, and mostly meaningless, on every command.
        if header.flags & !(allowed | FLAG_FUA) != 0 {
            return Err(ErrorNumber::Invalid);
        }
        let changes = matches!(work, Work::Write | Work::Trim | Work::Zeroes { .. });
        if changes && terms.export.read_only {
            return Err(ErrorNumber::NotPermitted);
        }
        // Zeroes with their space kept are as slow as any write, which is what this flag asks to be told.
        if matches!(work, Work::Zeroes { hole: false }) && set(FLAG_FAST_ZERO) {
            return Err(ErrorNumber::NotSupported);
        }
        Ok(work)
    }
}

fn checked_end(header: &RequestHeader) -> Result<u64, ErrorNumber> {
    let sector = SECTOR_BYTES as u64;
    let length = u64::from(header.length);
    if length == 0 || !length.is_multiple_of(sector) || !header.offset.is_multiple_of(sector) {
        return Err(ErrorNumber::Invalid);
    }
    // Beyond any volume, and so out of range for every command.
    Ok(header.offset.saturating_add(length))
}

const _: () = assert!(BLOCK_BYTES.is_multiple_of(SECTOR_BYTES));

#[cfg(test)]
mod tests {
    use twinpoint_core::units::VolumeId;

    use super::*;

    fn terms(read_only: bool) -> Terms {
        let export = Export { volume: VolumeId(1), size_bytes: 1 << 20, read_only };
        Terms { export, structured: true, status: true }
    }

    fn admit(
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        terms: Terms,
    ) -> Option<ErrorNumber> {
        let header = RequestHeader { flags, command, cookie: 1, offset, length };
        Command::admit(&header, &terms).err()
    }

    #[test]
    fn headers_are_checked() {
        use ErrorNumber::*;
        let end = 1 << 20;
        let table = [
            (0, 0, 0, 512, None),
            (0, FLAG_DF, 0, 512, None),
            (0, FLAG_FUA, 0, 512, None),
            (0, FLAG_NO_HOLE, 0, 512, Some(Invalid)),
            (0, 0, 0, 0, Some(Invalid)),
            (0, 0, 1, 512, Some(Invalid)),
            (0, 0, 0, 100, Some(Invalid)),
            (0, 0, end - 512, 1024, Some(Invalid)),
            (0, 0, u64::MAX - 511, 512, Some(Invalid)),
            (0, 0, 0, (32 << 20) + 512, Some(Overflow)),
            (1, 0, end - 512, 512, None),
            (1, 0, end, 512, Some(NoSpace)),
            (1, FLAG_DF, 0, 512, Some(Invalid)),
            (3, 0, 0, 0, None),
            (4, FLAG_FUA, 0, 512, None),
            (4, 0, end, 512, Some(Invalid)),
            (5, 0, 0, 512, Some(Invalid)),
            (6, FLAG_FAST_ZERO, 0, 512, None),
            (6, FLAG_FAST_ZERO | FLAG_NO_HOLE, 0, 512, Some(NotSupported)),
            (6, 0, end, 512, Some(NoSpace)),
            (7, FLAG_REQ_ONE, 0, 512, None),
            (7, 0, end, 512, Some(Invalid)),
            (8, 0, 0, 512, Some(Invalid)),
        ];
        for (command, flags, offset, length, error) in table {
            let found = admit(command, flags, offset, length, terms(false));
            assert_eq!(found, error, "command {command} flags {flags} at {offset}+{length}");
        }
        for command in [1, 4, 6] {
            assert_eq!(admit(command, 0, 0, 512, terms(true)), Some(NotPermitted));
        }
        let plain = Terms { structured: false, status: false, ..terms(false) };
        assert_eq!(admit(0, FLAG_DF, 0, 512, plain), Some(Invalid));
        assert_eq!(admit(7, 0, 0, 512, plain), Some(Invalid));
    }

    #[test]
    fn a_trim_keeps_only_whole_blocks() {
        let header = RequestHeader { flags: 0, command: 4, cookie: 1, offset: 512, length: 8192 };
        let command = Command::admit(&header, &terms(false)).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!((command.cursor, command.end), (4096, 8192));
        let header = RequestHeader { length: 1024, ..header };
        let command = Command::admit(&header, &terms(false)).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(command.cursor, command.end);
    }
}
