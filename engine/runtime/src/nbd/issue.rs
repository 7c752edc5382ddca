//! Gives pieces of commands to shards, as far as memory, rings and limits allow.
//!
//! Invariants: a command that has more pieces to give is in `ready`, in `background_waiting`, or waits for its own
//! answers; the first of `ready` keeps its place while it is blocked, so nobody starves; a request that a full ring
//! refused is kept, with its buffers, and offered again first.

use twinpoint_core::request::{Operation, Request, Tag};
use twinpoint_core::units::{BLOCK_BYTES, CpNumber};

use super::command::{Command, Piece, PieceWork, Work};
use super::host::Host;
use super::limits::{BACKGROUND_PIECES_MAX, PIECES_MAX};
use super::protocol::ErrorNumber;
use super::session::NbdSession;
use super::slab::Key;
use crate::cut::{background_piece, blocks_wanted, length_within};

/// Whether a command may leave the front of the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Issue {
    /// It has nothing more to give now; something else brings it back.
    Settled,
    /// It waits for memory, a ring, or room in a table.
    Blocked,
}

impl NbdSession {
    /// Gives as many pieces as possible.
    pub(super) fn pump(&mut self, host: &mut impl Host) {
        while let Some(request) = self.refused.pop_front() {
            if let Err(request) = host.submit(request) {
                self.refused.push_front(request);
                self.starved = true;
                return;
            }
        }
        while let Some(key) = self.next_ready() {
            if self.issue(key, host) == Issue::Blocked {
                self.ready.push_front(key);
                return;
            }
        }
    }

    /// Gives one request to the host, or keeps it when the ring is full.
    pub(super) fn submit(
        &mut self,
        key: Key,
        work: PieceWork,
        offset: u64,
        length: u32,
        operation: Operation,
        host: &mut impl Host,
    ) {
        let command = self.commands.get_mut(key).expect("a piece has a command");
        command.in_flight += 1;
        let piece = self.pieces.insert(Piece { command: key, work });
        let tag = Tag(self.base | u64::from(piece.0));
        let volume = self.terms.expect("commands come after the handshake").export.volume;
        // The host puts in the stamp when it admits the request.
        let request = Request { tag, stamp: CpNumber(0), volume, offset, length, operation };
        request.check();
        if !self.refused.is_empty() {
            self.refused.push_back(request);
        } else if let Err(request) = host.submit(request) {
            self.refused.push_back(request);
            self.starved = true;
        }
    }

    /// Whether no more pieces can be given before an answer or a free ring.
    pub(super) fn is_clogged(&self) -> bool {
        !self.refused.is_empty() || self.pieces.len() >= PIECES_MAX
    }

    /// Moves a command's cursor, and gives the command.
    pub(super) fn advance_cursor(&mut self, key: Key, cursor: u64) -> &mut Command {
        let command = self.commands.get_mut(key).expect("an issuing command exists");
        assert!(command.cursor < cursor && cursor <= command.end, "cursor {cursor}");
        command.cursor = cursor;
        command
    }

    /// A piece of an unmap or a write of zeroes is answered.
    pub(super) fn finish_background(
        &mut self,
        key: Key,
        error: Option<ErrorNumber>,
        host: &mut impl Host,
    ) {
        self.background_in_flight -= 1;
        if let (Some(command), Some(error)) = (self.commands.get_mut(key), error) {
            command.fail(error);
        }
        self.settle(key, host);
    }

    fn next_ready(&mut self) -> Option<Key> {
        self.ready.pop_front().or_else(|| {
            let room = self.background_in_flight < BACKGROUND_PIECES_MAX;
            if room { self.background_waiting.pop_front() } else { None }
        })
    }

    fn issue(&mut self, key: Key, host: &mut impl Host) -> Issue {
        match self.commands.get(key).map(|command| &command.work) {
            Some(Work::Read(_)) => self.issue_read(key, host),
            Some(Work::Trim | Work::Zeroes { .. }) => self.issue_background(key, host),
            Some(Work::Status(_)) => self.issue_status(key, host),
            // A failed command may be gone before its turn comes.
            Some(Work::Write | Work::Flush) | None => Issue::Settled,
        }
    }

    fn issue_background(&mut self, key: Key, host: &mut impl Host) -> Issue {
        loop {
            let Some(command) = self.commands.get(key) else { return Issue::Settled };
            if command.error.is_some() || command.cursor == command.end {
                return Issue::Settled;
            }
            if self.background_in_flight >= BACKGROUND_PIECES_MAX {
                self.background_waiting.push_back(key);
                return Issue::Settled;
            }
            if self.is_clogged() {
                return Issue::Blocked;
            }
            let start = command.cursor;
            let hole = !matches!(command.work, Work::Zeroes { hole: false });
            let (end, unmap) = background_piece(hole, start, command.end);
            let (length, operation) = if unmap {
                (u32::try_from(end - start).expect("at most a stripe"), Operation::Unmap)
            } else {
                let Some((length, operation)) = self.zeroes(start, end, host) else {
                    return Issue::Blocked;
                };
                (length, operation)
            };
            self.background_in_flight += 1;
            self.advance_cursor(key, start + u64::from(length));
            self.submit(key, PieceWork::Background, start, length, operation, host);
        }
    }

    /// Buffers of zeroes for the first part of a range; `None` without memory.
    fn zeroes(&mut self, start: u64, end: u64, host: &mut impl Host) -> Option<(u32, Operation)> {
        let Some((buffer, count)) = host.allocate(blocks_wanted(start, end)) else {
            self.starved = true;
            return None;
        };
        host.zero(buffer, 0, count as usize * BLOCK_BYTES);
        host.checksum(buffer, count);
        Some((length_within(start, end, count), Operation::Write { buffer }))
    }
}
