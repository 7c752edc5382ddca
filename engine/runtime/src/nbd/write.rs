//! Writes: payload becomes pieces while it arrives.
//!
//! Invariants: at most one write receives payload, and at most one piece of it fills; a piece goes to its shard as
//! soon as it is full; payload of a failed command is thrown away, never left in the stream.

use twinpoint_core::request::{Operation, blocks_touched};
use twinpoint_core::units::BufferId;

use super::command::{Command, PieceWork, Span};
use super::host::Host;
use super::input::Input;
use super::limits::{DIRECT_BYTES_MIN, LARGE_WRITE_BYTES};
use super::protocol::ErrorNumber;
use super::session::{NbdSession, Progress};
use super::slab::Key;
use crate::cut::{blocks_wanted, length_within};

/// The write whose payload comes now.
pub(super) struct Payload {
    command: Key,
    /// Bytes still to come.
    remaining: u64,
    filling: Option<Filling>,
}

/// A piece whose buffers fill.
struct Filling {
    span: Span,
    filled: usize,
}

impl Filling {
    fn missing(&self) -> usize {
        self.span.length as usize - self.filled
    }

    fn position(&self) -> usize {
        self.span.buffer_offset() + self.filled
    }
}

impl Payload {
    /// Where the next bytes are received straight into buffers, if that pays.
    pub(super) fn direct(&self) -> Option<Input<'static>> {
        let filling = self.filling.as_ref().filter(|f| f.missing() >= DIRECT_BYTES_MIN)?;
        let (first, offset, length) = (filling.span.first, filling.position(), filling.missing());
        Some(Input::Buffers { first, offset, length })
    }

    /// `count` bytes arrived in the buffers.
    pub(super) fn received(&mut self, count: usize) {
        let filling = self.filling.as_mut().expect("a direct receive has its buffers");
        filling.filled += count;
        self.remaining -= count as u64;
    }

    /// The buffers of the piece that fills.
    pub(super) fn into_buffers(self) -> Option<(BufferId, u32)> {
        self.filling.map(|filling| (filling.span.first, filling.span.count))
    }
}

impl NbdSession {
    /// A write's header came: its payload follows, to be used or thrown away.
    pub(super) fn begin_payload(&mut self, command: Command, length: u32) {
        let remaining = u64::from(length);
        let command = self.commands.insert(command);
        self.input.expect_large_writes(remaining >= LARGE_WRITE_BYTES);
        self.payload = Some(Payload { command, remaining, filling: None });
    }

    /// Moves payload from the own input buffer to where it belongs.
    pub(super) fn take_payload(&mut self, host: &mut impl Host) -> Progress {
        let payload = self.payload.as_mut().expect("payload is taken when it is due");
        let command = self.commands.get(payload.command).expect("a write waits for its payload");
        if let Some(filling) = &mut payload.filling {
            let count = filling.missing().min(self.input.unread().len());
            if count > 0 {
                let bytes = &self.input.unread()[..count];
                host.copy_in(filling.span.first, filling.position(), bytes);
                self.input.consume(count);
                filling.filled += count;
                payload.remaining -= count as u64;
            }
            if filling.missing() > 0 {
                return Progress::NeedsBytes;
            }
            self.submit_filled(host);
            return Progress::Went;
        }
        if payload.remaining == 0 {
            self.end_payload(host);
            return Progress::Went;
        }
        if command.error.is_some() {
            let have = self.input.unread().len() as u64;
            let count = payload.remaining.min(have);
            payload.remaining -= count;
            self.input.consume(usize::try_from(count).expect("no more than was received"));
            return if count > 0 { Progress::Went } else { Progress::NeedsBytes };
        }
        if self.is_clogged() { Progress::Stalled } else { self.begin_piece(host) }
    }

    /// The client is gone or the session ends: the rest of the payload will not come.
    pub(super) fn abandon_payload(&mut self, host: &mut impl Host) {
        let Some(payload) = self.payload.take() else { return };
        let key = payload.command;
        if let Some((first, count)) = payload.into_buffers() {
            host.free(first, count);
        }
        let command = self.commands.get_mut(key).expect("a write waits for its payload");
        command.fail(ErrorNumber::InputOutput);
        command.open = false;
        self.settle(key, host);
    }

    fn begin_piece(&mut self, host: &mut impl Host) -> Progress {
        let payload = self.payload.as_mut().expect("a piece belongs to payload");
        let command = self.commands.get(payload.command).expect("a write waits for its payload");
        let (start, end) = (command.cursor, command.end);
        let want = blocks_wanted(start, end);
        let Some((first, count)) = host.allocate(want) else {
            self.starved = true;
            return Progress::Stalled;
        };
        assert!(0 < count && count <= want, "{count} buffers instead of {want}");
        let length = length_within(start, end, count);
        payload.filling =
            Some(Filling { span: Span { first, count, offset: start, length }, filled: 0 });
        Progress::Went
    }

    fn submit_filled(&mut self, host: &mut impl Host) {
        let payload = self.payload.as_mut().expect("a piece belongs to payload");
        let (key, filling) = (payload.command, payload.filling.take());
        let Span { first, count, offset, length } = filling.expect("the piece is full").span;
        assert_eq!(count, blocks_touched(offset, length), "a piece uses all its buffers");
        host.checksum(first, count);
        self.advance_cursor(key, offset + u64::from(length));
        let operation = Operation::Write { buffer: first };
        self.submit(key, PieceWork::Write, offset, length, operation, host);
    }

    fn end_payload(&mut self, host: &mut impl Host) {
        let key = self.payload.take().expect("payload ends once").command;
        let command = self.commands.get_mut(key).expect("a write waits for its payload");
        command.open = false;
        self.settle(key, host);
    }
}
