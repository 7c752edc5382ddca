//! Reads: from pieces answered in any order to replies in the protocol's order.
//!
//! A read is answered in one of three ways:
//! - *single*: one piece covers it, the common case;
//! - *in chunks*: with structured replies each piece is a chunk of its own, sent as soon as it is there;
//! - *whole*: a simple reply, or a chunk that must not be split. Pieces are *gathered* and the reply is sent when
//!   all are there, so that any error can still be told. When memory runs out before that, the reply *streams*:
//!   pieces go out in order, and their buffers are used again for the next ones.
//!
//! Invariants: a read that waits for memory holds none, and a stream needs no more than it holds, so reads never
//! wait for one another in a circle; the buffers of a piece are the shard's to fill until it answers; a failed
//! piece's bytes are never sent.

use std::collections::VecDeque;

use twinpoint_core::request::Operation;
use twinpoint_core::units::BufferId;

use super::command::{Command, PieceWork, Span, Work};
use super::host::Host;
use super::issue::Issue;
use super::limits::{COPY_BYTES_MAX, GATHER_BLOCKS_MAX, OUTPUT_BYTES_MAX, READ_BLOCKS_MAX};
use super::output::{Batch, Held};
use super::protocol::ErrorNumber;
use super::reply;
use super::session::NbdSession;
use super::slab::Key;
use crate::cut::{blocks_wanted, length_within};

/// How a read is answered.
pub(super) struct ReadWork {
    /// Pieces may be chunks of their own.
    in_chunks: bool,
    /// The reply is made of chunks, be it one.
    structured: bool,
    /// Set once a second piece is needed.
    whole: Option<Box<Whole>>,
}

/// A reply that is sent in one run.
#[derive(Default)]
struct Whole {
    /// Pieces not yet sent, in order.
    parts: VecDeque<(Span, PartState)>,
    /// The number of the first of them.
    first_part: u32,
    /// Buffers held, sent ones not included.
    blocks: u32,
    streaming: bool,
    begun: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PartState {
    AtShard,
    Filled,
    Failed,
}

impl ReadWork {
    pub(super) fn new(in_chunks: bool, structured: bool) -> ReadWork {
        ReadWork { in_chunks, structured, whole: None }
    }
}

impl NbdSession {
    /// Gives pieces of a read to shards.
    pub(super) fn issue_read(&mut self, key: Key, host: &mut impl Host) -> Issue {
        loop {
            let Some(command) = self.commands.get(key) else { return Issue::Settled };
            let Work::Read(read) = &command.work else {
                unreachable!("only reads are issued here")
            };
            let (start, end) = (command.cursor, command.end);
            if command.error.is_some()
                || start == end
                || read.whole.as_ref().is_some_and(|w| w.streaming)
            {
                return Issue::Settled;
            }
            if self.is_clogged() {
                return Issue::Blocked;
            }
            let gathered = read.whole.as_ref().map_or(0, |w| w.blocks);
            let room = (READ_BLOCKS_MAX - self.read_blocks).min(GATHER_BLOCKS_MAX - gathered);
            let Some((first, count)) =
                self.allocate_read(blocks_wanted(start, end).min(room), host)
            else {
                if gathered == 0 {
                    return Issue::Blocked;
                }
                self.start_stream(key, host);
                return Issue::Settled;
            };
            let length = length_within(start, end, count);
            self.give_read(key, Span { first, count, offset: start, length }, host);
        }
    }

    /// A piece of a read is answered.
    pub(super) fn finish_read(
        &mut self,
        key: Key,
        span: Span,
        part: u32,
        error: Option<ErrorNumber>,
        host: &mut impl Host,
    ) {
        let command = self.commands.get_mut(key).expect("a read waits for its pieces");
        if let Some(error) = error {
            command.fail(error);
        }
        let Command { work: Work::Read(read), .. } = command else {
            unreachable!("a read piece belongs to a read")
        };
        if let Some(whole) = &mut read.whole {
            let index = (part - whole.first_part) as usize;
            let state = if error.is_some() { PartState::Failed } else { PartState::Filled };
            assert_eq!(whole.parts[index], (span, PartState::AtShard), "a part is answered once");
            whole.parts[index].1 = state;
            self.advance_whole(key, host);
        } else if error.is_some() {
            self.free_read(span.first, span.count, host);
            self.settle(key, host);
        } else {
            self.send_piece(key, span, host);
        }
    }

    /// A sent piece's buffers come back: to their streaming read, or to the host.
    pub(super) fn take_back(&mut self, held: Held, host: &mut impl Host) {
        let command = held.reader.and_then(|key| self.commands.get(key));
        match (held.reader, command) {
            (Some(key), Some(command)) if command.cursor < command.end && !self.broken => {
                let length = length_within(command.cursor, command.end, held.count);
                let span =
                    Span { first: held.first, count: held.count, offset: command.cursor, length };
                self.give_read(key, span, host);
            }
            _ => self.free_read(held.first, held.count, host),
        }
    }

    /// Lets the next stream begin, when none sends now.
    pub(super) fn next_stream(&mut self, host: &mut impl Host) {
        while !self.output.is_streaming() && !self.broken {
            let Some(key) = self.streams_waiting.pop_front() else { return };
            if self.commands.get(key).is_some() {
                self.advance_whole(key, host);
            }
        }
    }

    /// Gives back a read's buffers.
    pub(super) fn free_read(&mut self, first: BufferId, count: u32, host: &mut impl Host) {
        assert!(self.read_blocks >= count, "reads hold {} buffers, not {count}", self.read_blocks);
        self.read_blocks -= count;
        host.free(first, count);
    }

    /// Gives back the buffers of parts that wait for others.
    pub(super) fn free_parts(&mut self, command: &mut Command, host: &mut impl Host) {
        let Work::Read(ReadWork { whole: Some(whole), .. }) = &mut command.work else { return };
        for (span, state) in whole.parts.drain(..) {
            // A shard still fills the others; they come back with its answer.
            if state != PartState::AtShard {
                self.free_read(span.first, span.count, host);
            }
        }
    }

    fn allocate_read(&mut self, want: u32, host: &mut impl Host) -> Option<(BufferId, u32)> {
        if want == 0 {
            return None;
        }
        let given = host.allocate(want);
        match given {
            Some((_, count)) => {
                assert!(0 < count && count <= want, "{count} buffers instead of {want}");
                self.read_blocks += count;
            }
            None => self.starved = true,
        }
        given
    }

    fn give_read(&mut self, key: Key, span: Span, host: &mut impl Host) {
        let command = self.advance_cursor(key, span.offset + u64::from(span.length));
        let covered = span.offset == command.offset && command.cursor == command.end;
        let Command { work: Work::Read(read), .. } = command else {
            unreachable!("only reads are given here")
        };
        let mut part = 0;
        if !read.in_chunks && !covered {
            let whole = read.whole.get_or_insert_default();
            part =
                whole.first_part.wrapping_add(u32::try_from(whole.parts.len()).expect("few parts"));
            whole.parts.push_back((span, PartState::AtShard));
            whole.blocks += span.count;
        }
        let operation = Operation::Read { buffer: span.first };
        self.submit(key, PieceWork::Read { span, part }, span.offset, span.length, operation, host);
    }

    /// Sends a piece that needs no other: the only one, or a chunk.
    fn send_piece(&mut self, key: Key, span: Span, host: &mut impl Host) {
        let command = self.commands.get(key).expect("a read waits for its pieces");
        let Command { cookie, work: Work::Read(read), .. } = command else {
            unreachable!("a read piece")
        };
        let last = command.cursor == command.end && command.in_flight == 0;
        let batch = self.output.replies();
        if read.structured {
            let done = last && command.error.is_none();
            reply::begin_data(batch, *cookie, span.offset, span.length, done);
        } else {
            reply::simple(batch, *cookie, None);
        }
        let failed = command.error.is_some();
        if put_span(batch, span, None, host) {
            self.free_read(span.first, span.count, host);
        }
        if failed {
            self.settle(key, host);
        } else if last {
            self.commands.remove(key);
        }
    }

    fn start_stream(&mut self, key: Key, host: &mut impl Host) {
        self.whole(key).streaming = true;
        self.advance_whole(key, host);
    }

    /// Sends what can be sent of a whole reply.
    fn advance_whole(&mut self, key: Key, host: &mut impl Host) {
        let command = self.commands.get(key).expect("a whole read exists until it is sent");
        let (error, pending) = (command.error, command.in_flight > 0);
        let complete = command.cursor == command.end && !pending;
        let Work::Read(ReadWork { whole: Some(whole), .. }) = &command.work else {
            unreachable!("only whole reads are advanced")
        };
        let front_filled = whole.parts.front().is_some_and(|part| part.1 == PartState::Filled);
        match (whole.begun, error) {
            (true, _) => self.send_stream(key, host),
            (false, Some(_)) => self.settle(key, host),
            (false, None) if whole.streaming && front_filled => {
                if !self.output.is_streaming() {
                    self.begin_stream(key);
                    self.send_stream(key, host);
                } else if !self.streams_waiting.contains(&key) {
                    self.streams_waiting.push_back(key);
                }
            }
            (false, None) if complete && !whole.streaming => self.send_gathered(key, host),
            (false, None) => {}
        }
    }

    fn send_gathered(&mut self, key: Key, host: &mut impl Host) {
        let mut command = self.commands.remove(key).expect("a gathered read exists");
        let (cookie, offset, length) = (command.cookie, command.offset, command.length());
        let Work::Read(read) = &mut command.work else { unreachable!("a read was gathered") };
        let parts = std::mem::take(&mut read.whole).expect("a read was gathered").parts;
        let batch = self.output.replies();
        if read.structured {
            reply::begin_data(batch, cookie, offset, length, true);
        } else {
            reply::simple(batch, cookie, None);
        }
        for (span, _) in parts {
            if put_span(self.output.replies(), span, None, host) {
                self.free_read(span.first, span.count, host);
            }
        }
    }

    fn begin_stream(&mut self, key: Key) {
        let command = self.commands.get_mut(key).expect("a stream has a command");
        let (cookie, offset, length) = (command.cookie, command.offset, command.length());
        let Work::Read(read) = &mut command.work else { unreachable!("only reads stream") };
        read.whole.as_mut().expect("a stream is whole").begun = true;
        self.output.begin_stream(key);
        if read.structured {
            // An error may still come, so this chunk cannot say that it is the last.
            reply::begin_data(self.output.stream(), cookie, offset, length, false);
        } else {
            reply::simple(self.output.stream(), cookie, None);
        }
    }

    fn send_stream(&mut self, key: Key, host: &mut impl Host) {
        while let Some(&(span, state)) = self.whole(key).parts.front() {
            match state {
                PartState::AtShard => return,
                PartState::Filled => {}
                PartState::Failed => {
                    let structured = self.read_work(key).structured;
                    if !structured {
                        // Success was already told, and there is no other way to take it back.
                        self.broken = true;
                        return;
                    }
                    host.zero(span.first, span.buffer_offset(), span.length as usize);
                }
            }
            let whole = self.whole(key);
            whole.parts.pop_front();
            whole.first_part = whole.first_part.wrapping_add(1);
            whole.blocks -= span.count;
            if put_span(self.output.stream(), span, Some(key), host) {
                self.take_back(
                    Held { first: span.first, count: span.count, reader: Some(key) },
                    host,
                );
            }
        }
        let command = self.commands.get(key).expect("a stream has a command");
        if command.cursor < command.end {
            return;
        }
        let command = self.commands.remove(key).expect("a stream has a command");
        let Work::Read(read) = &command.work else { unreachable!("only reads stream") };
        match command.error {
            Some(error) => reply::error_chunk(self.output.stream(), command.cookie, error),
            None if read.structured => reply::end_chunk(self.output.stream(), command.cookie),
            None => {}
        }
        self.output.end_stream(key);
    }

    fn read_work(&mut self, key: Key) -> &mut ReadWork {
        match self.commands.get_mut(key).map(|command| &mut command.work) {
            Some(Work::Read(read)) => read,
            _ => unreachable!("a read exists until it is sent"),
        }
    }

    fn whole(&mut self, key: Key) -> &mut Whole {
        self.read_work(key).whole.as_mut().expect("a read of several pieces")
    }
}

/// Adds a piece's bytes: small ones are copied, so that replies share a send. Says whether the buffers are free.
fn put_span(batch: &mut Batch, span: Span, reader: Option<Key>, host: &impl Host) -> bool {
    let length = span.length as usize;
    if length <= COPY_BYTES_MAX && batch.used() + length <= OUTPUT_BYTES_MAX {
        host.copy_out(span.first, span.buffer_offset(), batch.room(length));
        return true;
    }
    let held = Held { first: span.first, count: span.count, reader };
    batch.put_buffers(held, span.buffer_offset(), length);
    false
}
