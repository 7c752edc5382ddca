//! Step 1 of the flow without a socket: a frontend inside this process, on the caller's own thread. It is one more
//! participant of the mail mesh, with its own slot of the gate and its own part of the arena.
//!
//! ```text
//!   write(bytes) -> own buffers, checksum -> stamp -> ring of the shard's worker
//!   poll()       <- answers, flushes, buffers that come back
//! ```
//!
//! Invariants: between the stamp and the ring nothing waits (R2); a command that found no room waits here, with its
//! buffers, and gets its stamp when it goes; a command is answered once, when all its pieces were; a client whose
//! workers ended says so and never waits again.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use twinpoint_core::contract::Report;
use twinpoint_core::request::{Answer, Operation, Outcome, Request, Tag, locate};
use twinpoint_core::units::{
    BLOCK_BYTES, BufferId, CpNumber, REQUEST_BLOCKS_MAX, SEGMENT_BLOCKS, ShardId, VolumeId,
};

use crate::buffers::Pool;
use crate::clients::WORKER_SHIFT;
use crate::mail::{Mail, Mailbox};
use crate::shared::Shared;
use crate::wake::Sleeper;

/// Commands of one client under way: as many as of an NBD client.
pub const COMMANDS_MAX: usize = 1024;
/// Largest read or write, in bytes.
pub const COMMAND_BYTES_MAX: usize = REQUEST_BLOCKS_MAX as usize * BLOCK_BYTES;

/// A frontend inside this process. Made by the node, used by one thread.
pub struct LocalClient {
    index: usize,
    shared: Arc<Shared>,
    mailbox: Mailbox,
    sleeper: Sleeper,
    pool: Pool,
    commands: Vec<Option<Command>>,
    unused: Vec<u32>,
    /// Pieces that found a full ring, or held writers; in order.
    waiting: VecDeque<Request>,
    opened: Vec<VolumeId>,
    /// For this CP a seal was asked for, because no memory was left.
    seal_asked: CpNumber,
    is_over: bool,
}

/// A volume that a client opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalVolume {
    id: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A command that is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Completion {
    /// As it was given with the command.
    pub user_data: u64,
    /// What a read found; nothing for writes and flushes.
    pub result: Result<Vec<u8>, CommandError>,
}

/// Why a command failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CommandError {
    /// The store has no free block.
    NoSpace,
    /// The store failed, or a block did not match its checksum.
    Failed,
}

/// Why a command was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubmitError {
    /// No buffer is free: poll, then try again.
    NoMemory,
    /// [`COMMANDS_MAX`] are under way: poll, then try again.
    TooMany,
    /// The range is empty, not whole blocks, longer than [`COMMAND_BYTES_MAX`], or leaves the volume.
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: usize,
    },
    /// The workers ended: ask the node for a new client.
    Over,
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubmitError::NoMemory => f.write_str("no buffer is free"),
            SubmitError::TooMany => write!(f, "{COMMANDS_MAX} commands are under way"),
            SubmitError::Range { offset, length } => {
                write!(f, "{length} bytes at byte {offset} cannot be one command")
            }
            SubmitError::Over => f.write_str("the node's workers have ended"),
        }
    }
}

impl std::error::Error for SubmitError {}

/// What the node makes a client of.
pub(crate) struct LocalSeed {
    pub index: usize,
    pub shared: Arc<Shared>,
    pub mailbox: Mailbox,
    pub sleeper: Sleeper,
    pub pool: (BufferId, u32),
}

struct Command {
    user_data: u64,
    pieces: u32,
    error: Option<CommandError>,
    /// A read's buffers, in order.
    runs: Vec<(BufferId, u32)>,
}

impl LocalClient {
    pub(crate) fn new(seed: LocalSeed) -> LocalClient {
        let (first, count) = seed.pool;
        LocalClient {
            index: seed.index,
            shared: seed.shared,
            mailbox: seed.mailbox,
            sleeper: seed.sleeper,
            pool: Pool::new(first, count, 0),
            commands: Vec::new(),
            unused: Vec::new(),
            waiting: VecDeque::new(),
            opened: Vec::new(),
            seal_asked: CpNumber(0),
            is_over: false,
        }
    }

    /// Opens a volume by its name; none if there is no such volume, or the node serves none now. It stays in use
    /// until the client is dropped.
    pub fn open(&mut self, name: &str) -> Option<LocalVolume> {
        let export = self.shared.exports.open(name)?;
        self.opened.push(export.volume);
        Some(LocalVolume { id: export.volume, size_bytes: export.size_bytes })
    }

    /// Writes whole blocks; the bytes are copied before this returns.
    ///
    /// # Errors
    /// [`SubmitError`]; then nothing was done.
    pub fn write(
        &mut self,
        volume: LocalVolume,
        offset: u64,
        bytes: &[u8],
        user_data: u64,
    ) -> Result<(), SubmitError> {
        let runs = self.prepare(volume, offset, bytes.len())?;
        let mut rest = bytes;
        for (first, count) in &runs {
            let (part, after) = rest.split_at(*count as usize * BLOCK_BYTES);
            self.shared.arena.copy_in(*first, 0, part);
            self.shared.costs(self.index).client_bytes_copied.add(part.len() as u64);
            self.shared.arena.checksum_compute(*first, *count);
            rest = after;
        }
        let command = self.begin(user_data, runs.len(), Vec::new());
        self.submit_runs(command, volume, offset, &runs, |buffer| Operation::Write { buffer });
        Ok(())
    }

    /// Reads whole blocks; the completion has the bytes.
    ///
    /// # Errors
    /// [`SubmitError`]; then nothing was done.
    pub fn read(
        &mut self,
        volume: LocalVolume,
        offset: u64,
        length: usize,
        user_data: u64,
    ) -> Result<(), SubmitError> {
        let runs = self.prepare(volume, offset, length)?;
        let command = self.begin(user_data, runs.len(), runs.clone());
        self.submit_runs(command, volume, offset, &runs, |buffer| Operation::Read { buffer });
        Ok(())
    }

    /// Asks that every write answered so far becomes durable (R5).
    ///
    /// # Errors
    /// [`SubmitError::TooMany`] or [`SubmitError::Over`].
    pub fn flush(&mut self, user_data: u64) -> Result<(), SubmitError> {
        self.check_room()?;
        let command = self.begin(user_data, 1, Vec::new());
        let tag = self.tag(command);
        self.mailbox.send(0, Mail::Flush(tag));
        Ok(())
    }

    /// Takes what has come and gives what waited; appends the commands that are over. Never waits.
    pub fn poll(&mut self, completions: &mut Vec<Completion>) {
        for worker in 0..self.shared.workers {
            while let Some(mail) = self.mailbox.take(worker) {
                self.take_in(mail, completions);
            }
        }
        while let Some(request) = self.waiting.pop_front() {
            if let Err(request) = self.admit(request) {
                self.waiting.push_front(request);
                break;
            }
        }
        self.deliver();
    }

    /// Sleeps until something comes: an answer, memory, or the end. Then poll.
    pub fn wait(&mut self) {
        self.deliver();
        self.sleeper.prepare();
        // Held writers are resumed by mail; a full ring is not told when it has room.
        let can_sleep = self.waiting.is_empty() || self.shared.is_holding();
        if can_sleep && self.mailbox.is_idle() && !self.is_over {
            self.sleeper.wait();
        }
        self.sleeper.awake();
    }

    /// How many commands are under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.commands.len() - self.unused.len()
    }

    /// Whether the workers ended: commands under way are never answered.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    fn check_room(&self) -> Result<(), SubmitError> {
        if self.is_over {
            return Err(SubmitError::Over);
        }
        if self.in_flight() >= COMMANDS_MAX { Err(SubmitError::TooMany) } else { Ok(()) }
    }

    /// Checks a command's range and finds buffers for it: runs of blocks that each lie in one stripe.
    fn prepare(
        &mut self,
        volume: LocalVolume,
        offset: u64,
        length: usize,
    ) -> Result<Vec<(BufferId, u32)>, SubmitError> {
        self.check_room()?;
        let end = offset.checked_add(length as u64).filter(|end| *end <= volume.size_bytes);
        let is_whole =
            offset.is_multiple_of(BLOCK_BYTES as u64) && length.is_multiple_of(BLOCK_BYTES);
        if length == 0 || length > COMMAND_BYTES_MAX || !is_whole || end.is_none() {
            return Err(SubmitError::Range { offset, length });
        }
        let mut runs = Vec::with_capacity(1);
        let mut block = offset / BLOCK_BYTES as u64;
        let end = block + (length / BLOCK_BYTES) as u64;
        while block < end {
            let stripe_end = (block / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS;
            let want = u32::try_from(end.min(stripe_end) - block).expect("at most one command");
            let Some((first, count)) = self.pool.allocate(want) else {
                runs.iter().for_each(|(first, count)| self.pool.free(*first, *count));
                self.ask_for_seal();
                return Err(SubmitError::NoMemory);
            };
            runs.push((first, count));
            block += u64::from(count);
        }
        Ok(runs)
    }

    /// Staged writes hold the memory; a CP gives it back.
    fn ask_for_seal(&mut self) {
        let open = self.shared.gate.open();
        if self.seal_asked != open {
            self.seal_asked = open;
            self.mailbox.send(0, Mail::Report(ShardId(0), Report::WantSeal));
            self.deliver();
        }
    }

    fn begin(&mut self, user_data: u64, pieces: usize, runs: Vec<(BufferId, u32)>) -> u32 {
        let pieces = u32::try_from(pieces).expect("a piece has a block at least");
        let command = Command { user_data, pieces, error: None, runs };
        if let Some(index) = self.unused.pop() {
            self.commands[index as usize] = Some(command);
            return index;
        }
        self.commands.push(Some(command));
        u32::try_from(self.commands.len() - 1).expect("commands are bounded")
    }

    fn tag(&self, command: u32) -> Tag {
        Tag((self.index as u64) << WORKER_SHIFT | u64::from(command))
    }

    fn submit_runs(
        &mut self,
        command: u32,
        volume: LocalVolume,
        mut offset: u64,
        runs: &[(BufferId, u32)],
        operation: fn(BufferId) -> Operation,
    ) {
        let tag = self.tag(command);
        for (first, count) in runs {
            let length = *count * BLOCK_BYTES as u32;
            let operation = operation(*first);
            let (volume, stamp) = (volume.id, CpNumber(0));
            let request = Request { tag, stamp, volume, offset, length, operation };
            request.check();
            offset += u64::from(length);
            if !self.waiting.is_empty() {
                self.waiting.push_back(request);
            } else if let Err(request) = self.admit(request) {
                self.waiting.push_back(request);
            }
        }
    }

    /// Stamps a request and gives it to its worker, or gives it back.
    fn admit(&mut self, request: Request) -> Result<(), Request> {
        let is_write = matches!(request.operation, Operation::Write { .. });
        if is_write && self.shared.is_holding() {
            return Err(request);
        }
        let shards = self.shared.geometry.shards;
        let (shard, _) = locate(request.volume, request.first_block(), shards);
        let owner = self.shared.owner(shard);
        if !self.mailbox.has_room(owner) {
            return Err(request);
        }
        self.shared.count_request(&request);
        self.shared.admit(&mut self.mailbox, self.index, shard, request);
        Ok(())
    }

    fn deliver(&mut self) {
        let woken = self.mailbox.deliver();
        self.shared.costs(self.index).bells_rung.add(woken);
    }

    fn take_in(&mut self, mail: Mail, completions: &mut Vec<Completion>) {
        match mail {
            Mail::Answer(Answer { tag, outcome }) => {
                let error = match outcome {
                    Outcome::Done | Outcome::Mapped(_) => None,
                    Outcome::NoSpace => Some(CommandError::NoSpace),
                    Outcome::Failed => Some(CommandError::Failed),
                };
                self.piece_ended(tag, error, completions);
            }
            Mail::Flushed(tag, done) => {
                let error = (!done).then_some(CommandError::Failed);
                self.piece_ended(tag, error, completions);
            }
            Mail::Free(first, count) => self.pool.free(first, count),
            Mail::End => self.is_over = true,
            // The next poll offers again what was held.
            Mail::Resume => {}
            _ => panic!("a local client got mail for a worker"),
        }
    }

    fn piece_ended(
        &mut self,
        tag: Tag,
        error: Option<CommandError>,
        completions: &mut Vec<Completion>,
    ) {
        let index = (tag.0 & u64::from(u32::MAX)) as u32;
        let slot = &mut self.commands[index as usize];
        let command = slot.as_mut().expect("an answer is for a command under way");
        command.error = command.error.or(error);
        command.pieces -= 1;
        if command.pieces > 0 {
            return;
        }
        let Command { user_data, error, runs, .. } = slot.take().expect("it was just there");
        self.unused.push(index);
        let blocks = runs.iter().map(|(_, count)| *count as usize).sum::<usize>();
        let mut bytes = vec![0; blocks * BLOCK_BYTES];
        let mut start = 0;
        for (first, count) in runs {
            let end = start + count as usize * BLOCK_BYTES;
            self.shared.arena.copy_out(first, 0, &mut bytes[start..end]);
            let copied = (end - start) as u64;
            self.shared.costs(self.index).client_bytes_copied.add(copied);
            self.pool.free(first, count);
            start = end;
        }
        completions.push(Completion { user_data, result: error.map_or(Ok(bytes), Err) });
    }
}

impl Drop for LocalClient {
    fn drop(&mut self) {
        for volume in self.opened.drain(..) {
            self.shared.exports.close(volume);
        }
    }
}

#[cfg(test)]
mod tests;
