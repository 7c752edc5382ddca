//! One client connection: the calls its thread makes, and the order of things inside.
//!
//! Invariants: the tag of every request names a piece; `in_flight` pieces are exactly those that the host was
//! given and has not answered; after [`NbdSession::release`] the session holds no buffer except those of reads
//! that shards still fill, and gives these back as they are answered.

use std::collections::VecDeque;

use twinpoint_core::request::{Answer, Outcome, Request, Tag};

use super::command::{Command, Piece, PieceWork, Terms, Work};
use super::host::Host;
use super::input::{Expected, Input, InputBuffer};
use super::limits::{COMMANDS_MAX, OUTPUT_BYTES_MAX};
use super::options::Negotiation;
use super::output::{Held, Output, OutputQueue};
use super::protocol::{self, ErrorNumber, REQUEST_HEADER_BYTES, RequestHeader};
use super::reply;
use super::slab::{Key, Slab};
use super::write::Payload;

/// One client connection without its socket.
pub struct NbdSession {
    pub(super) base: u64,
    pub(super) phase: Phase,
    pub(super) negotiation: Negotiation,
    pub(super) terms: Option<Terms>,
    pub(super) input: InputBuffer,
    pub(super) output: OutputQueue,
    pub(super) payload: Option<Payload>,
    pub(super) commands: Slab<Command>,
    pub(super) pieces: Slab<Piece>,
    /// Commands with pieces to give, in order.
    pub(super) ready: VecDeque<Key>,
    /// Commands that wait for the limit on background pieces.
    pub(super) background_waiting: VecDeque<Key>,
    pub(super) background_in_flight: usize,
    /// Reads that must stream, while another one does.
    pub(super) streams_waiting: VecDeque<Key>,
    /// Requests that a full ring did not take.
    pub(super) refused: VecDeque<Request>,
    /// Buffers held by reads, up to the last sent byte.
    pub(super) read_blocks: u32,
    /// The host had no memory or no room in a ring.
    pub(super) starved: bool,
    /// A reply went wrong half-way; only a disconnect tells the client.
    pub(super) broken: bool,
    pub(super) shutting_down: bool,
    /// Input waits for something else than bytes.
    stalled: bool,
    pub(super) released: bool,
    pub(super) released_buffers: Vec<Held>,
}

/// Where a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    ClientFlags,
    Options,
    Transmission,
    /// No more input; what is under way is answered.
    Ending,
}

/// What taking input came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    Went,
    NeedsBytes,
    /// Memory, a ring, or room for commands or replies is missing.
    Stalled,
}

impl NbdSession {
    /// A session whose greeting is ready to be sent. `base` is put into the high 32 bits of every tag.
    ///
    /// # Panics
    /// If `base` has any of the low 32 bits.
    #[must_use]
    pub fn new(base: u64) -> NbdSession {
        assert_eq!(base & u64::from(u32::MAX), 0, "the low 32 bits of a tag are the session's");
        let mut session = NbdSession {
            base,
            phase: Phase::ClientFlags,
            negotiation: Negotiation::default(),
            terms: None,
            input: InputBuffer::new(),
            output: OutputQueue::default(),
            payload: None,
            commands: Slab::new(),
            pieces: Slab::new(),
            ready: VecDeque::new(),
            background_waiting: VecDeque::new(),
            background_in_flight: 0,
            streams_waiting: VecDeque::new(),
            refused: VecDeque::new(),
            read_blocks: 0,
            starved: false,
            broken: false,
            shutting_down: false,
            stalled: false,
            released: false,
            released_buffers: Vec::new(),
        };
        session.greet();
        session
    }

    /// Where the next received bytes go. Not to be called while a receive is under way; every other call may be.
    pub fn input(&mut self) -> Input<'_> {
        self.input.expected = Expected::Nothing;
        if self.stalled || self.is_closed() || self.phase == Phase::Ending {
            return Input::Wait;
        }
        let direct = self.payload.as_ref().and_then(Payload::direct);
        match direct {
            Some(Input::Buffers { first, offset, length }) if self.input.is_empty() => {
                self.input.expected = Expected::Buffers { length };
                Input::Buffers { first, offset, length }
            }
            _ => Input::Own(self.input.space()),
        }
    }

    /// `bytes` bytes arrived where [`NbdSession::input`] said; 0 when the client closed its side.
    ///
    /// # Panics
    /// If no input was prepared, or less of it than arrived.
    pub fn received(&mut self, bytes: usize, host: &mut impl Host) {
        let expected = std::mem::replace(&mut self.input.expected, Expected::Nothing);
        if self.is_closed() {
            return;
        }
        match expected {
            _ if bytes == 0 => _ = self.end(),
            Expected::Own { length } if bytes <= length => self.input.append(bytes),
            Expected::Buffers { length } if bytes <= length => {
                self.payload.as_mut().expect("a direct receive has its payload").received(bytes);
            }
            _ => panic!("{bytes} bytes arrived, {expected:?} was prepared"),
        }
        self.drive(true, host);
    }

    /// A shard answered.
    ///
    /// # Panics
    /// If no request with this tag is in flight.
    pub fn answer(&mut self, answer: Answer, host: &mut impl Host) {
        let error = match answer.outcome {
            Outcome::Done | Outcome::Mapped(_) => None,
            Outcome::NoSpace => Some(ErrorNumber::NoSpace),
            Outcome::Failed => Some(ErrorNumber::InputOutput),
        };
        let Some(Piece { command, work }) = self.take_piece(answer.tag, host) else { return };
        match work {
            PieceWork::Write => {
                let write = self.commands.get_mut(command).expect("a write waits for its pieces");
                if let Some(error) = error {
                    write.fail(error);
                }
                self.settle(command, host);
            }
            PieceWork::Background => self.finish_background(command, error, host),
            PieceWork::Read { span, part } => self.finish_read(command, span, part, error, host),
            PieceWork::Status { index } => self.finish_status(command, index, answer.outcome, host),
            PieceWork::Flush => unreachable!("a flush is answered by flushed()"),
        }
        self.drive(false, host);
    }

    /// A flush asked for by [`Host::flush`] is done, or failed.
    ///
    /// # Panics
    /// If no flush with this tag is in flight.
    pub fn flushed(&mut self, tag: Tag, done: bool, host: &mut impl Host) {
        let Some(Piece { command: key, work }) = self.take_piece(tag, host) else { return };
        assert!(matches!(work, PieceWork::Flush), "a request is answered by answer()");
        let command = self.commands.get_mut(key).expect("a command waits for its flush");
        if !done {
            command.fail(ErrorNumber::InputOutput);
        }
        self.settle(key, host);
        self.drive(false, host);
    }

    /// Memory or room in a ring came back.
    pub fn resume(&mut self, host: &mut impl Host) {
        self.drive(false, host);
    }

    /// Whether the session waits for [`NbdSession::resume`].
    #[must_use]
    pub fn is_starved(&self) -> bool {
        self.starved && !self.is_closed()
    }

    /// What a session waits for will not come: its connection ends, so that its client does not wait for ever.
    pub fn give_up(&mut self) {
        self.broken |= self.is_starved();
    }

    /// What to send next; empty when there is nothing. Not to be called while a send is under way.
    pub fn output(&mut self) -> Output<'_> {
        if self.broken {
            self.output.drain(&mut self.released_buffers);
        }
        self.output.output()
    }

    /// The first `bytes` bytes of [`NbdSession::output`] are sent, and the kernel is done with their memory.
    pub fn sent(&mut self, bytes: usize, host: &mut impl Host) {
        if self.released {
            return;
        }
        let mut released = std::mem::take(&mut self.released_buffers);
        self.output.sent(bytes, &mut released);
        for held in released.drain(..) {
            self.take_back(held, host);
        }
        self.released_buffers = released;
        self.drive(false, host);
    }

    /// From now on every new command is answered with "shutting down".
    pub fn shutdown(&mut self) {
        self.shutting_down = true;
    }

    /// Whether the connection is to be closed: all is answered and sent, or nothing sensible can be sent any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let drained =
            self.phase == Phase::Ending && self.commands.is_empty() && self.output.is_empty();
        self.is_closed() || drained
    }

    /// Requests and flushes that the host has not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pieces.len() - self.refused.len()
    }

    /// Answers a command when nothing of it is left to do.
    pub(super) fn settle(&mut self, key: Key, host: &mut impl Host) {
        let Some(command) = self.commands.get_mut(key) else { return };
        if command.in_flight > 0 || command.open {
            return;
        }
        if command.error.is_none() {
            if command.cursor < command.end {
                return;
            }
            if std::mem::take(&mut command.flush_after) {
                command.in_flight = 1;
                let piece = self.pieces.insert(Piece { command: key, work: PieceWork::Flush });
                host.flush(Tag(self.base | u64::from(piece.0)));
                return;
            }
        }
        self.complete(key, host);
    }

    /// Takes no more input; commands under way are still answered.
    pub(super) fn end(&mut self) -> Progress {
        self.phase = Phase::Ending;
        Progress::Went
    }

    fn complete(&mut self, key: Key, host: &mut impl Host) {
        let mut command = self.commands.remove(key).expect("a command is answered once");
        self.free_parts(&mut command, host);
        let structured = self.terms.is_some_and(|terms| terms.structured);
        let batch = self.output.replies();
        match (command.error, &command.work) {
            (Some(error), Work::Read(_) | Work::Status(_)) if structured => {
                reply::error_chunk(batch, command.cookie, error);
            }
            (None, Work::Status(status)) => {
                reply::block_status(batch, command.cookie, &status.extents)
            }
            (error, _) => reply::simple(batch, command.cookie, error),
        }
    }

    /// Does what has become possible.
    fn drive(&mut self, new_bytes: bool, host: &mut impl Host) {
        if self.is_closed() {
            return;
        }
        self.starved = false;
        self.next_stream(host);
        self.pump(host);
        if new_bytes || self.stalled {
            self.take_input(host);
            self.pump(host);
        }
    }

    fn take_input(&mut self, host: &mut impl Host) {
        loop {
            let progress = match self.phase {
                Phase::ClientFlags => self.take_client_flags(),
                Phase::Options => self.take_option(host),
                Phase::Transmission if self.payload.is_some() => self.take_payload(host),
                Phase::Transmission => self.take_command(host),
                Phase::Ending => {
                    self.abandon_payload(host);
                    self.stalled = false;
                    return;
                }
            };
            if progress != Progress::Went {
                self.stalled = progress == Progress::Stalled;
                return;
            }
        }
    }

    fn take_command(&mut self, host: &mut impl Host) -> Progress {
        let Some(bytes) = self.input.peek::<REQUEST_HEADER_BYTES>() else {
            return Progress::NeedsBytes;
        };
        let full =
            self.commands.len() >= COMMANDS_MAX || self.output.waiting_bytes() > OUTPUT_BYTES_MAX;
        if full || self.is_clogged() {
            return Progress::Stalled;
        }
        let Some(header) = RequestHeader::parse(bytes) else { return self.end() };
        self.input.consume(REQUEST_HEADER_BYTES);
        if header.command == protocol::COMMAND_DISCONNECT {
            return self.end();
        }
        let terms = self.terms.expect("commands come after the handshake");
        let admitted = if self.shutting_down {
            Err(ErrorNumber::Shutdown)
        } else {
            Command::admit(&header, &terms)
        };
        match admitted {
            Ok(command) if command.open => self.begin_payload(command, header.length),
            Ok(command) => {
                self.input.expect_large_writes(false);
                let idle = command.cursor == command.end;
                let key = self.commands.insert(command);
                if idle { self.settle(key, host) } else { self.ready.push_back(key) }
            }
            Err(error) if header.command == protocol::COMMAND_WRITE => {
                self.begin_payload(Command::refused(&header, error), header.length);
            }
            Err(error) if terms.answers_in_chunks(header.command) => {
                reply::error_chunk(self.output.replies(), header.cookie, error);
            }
            Err(error) => reply::simple(self.output.replies(), header.cookie, Some(error)),
        }
        Progress::Went
    }

    /// The piece an answer is for; `None` when nobody waits for it any more.
    fn take_piece(&mut self, tag: Tag, host: &mut impl Host) -> Option<Piece> {
        let low = u32::try_from(tag.0 & u64::from(u32::MAX)).expect("32 bits");
        let piece = self.pieces.remove(Key(low)).expect("an answer is for a request in flight");
        if self.is_closed() {
            if let PieceWork::Read { span, .. } = piece.work {
                self.free_read(span.first, span.count, host);
            }
            self.close_if_idle(host);
            return None;
        }
        let command = self.commands.get_mut(piece.command).expect("a command waits for its pieces");
        command.in_flight -= 1;
        Some(piece)
    }

    fn is_closed(&self) -> bool {
        self.broken || self.released
    }
}
