//! A block status command: stripes' bitmaps become extents.
//!
//! Invariants: extents follow one another from the command's offset without a gap, neighbours differ, none is
//! empty, and together they never pass the command's end. Shards are asked in batches; the answers of a batch may
//! come in any order and are merged in the order of the volume.

use twinpoint_core::request::{Operation, Outcome};

use super::command::{Command, PieceWork, Work};
use super::host::Host;
use super::issue::Issue;
use super::limits::{EXTENTS_MAX, STATUS_BATCH};
use super::protocol::{EXTENT_DATA, EXTENT_HOLE, ErrorNumber};
use super::session::NbdSession;
use super::slab::Key;
use crate::cut::{BLOCK, STRIPE, block_ceiling, block_floor, stripe_end};

/// One bit for each block of a stripe.
type Bitmap = [u64; (STRIPE / BLOCK / 64) as usize];

/// How far a block status command is.
pub(super) struct StatusWork {
    /// Lengths in bytes and flags, in order.
    pub(super) extents: Vec<(u32, u32)>,
    /// The volume offset up to which they reach.
    merged: u64,
    /// The client wants the first extent only.
    one: bool,
    batch: [Option<Box<Bitmap>>; STATUS_BATCH],
}

impl StatusWork {
    pub(super) fn new(offset: u64, one: bool) -> StatusWork {
        StatusWork { extents: Vec::new(), merged: offset, one, batch: Default::default() }
    }

    /// Adds what the batch tells about the bytes up to `cursor`; says whether no more is wanted.
    fn merge(&mut self, cursor: u64) -> bool {
        for bitmap in std::mem::take(&mut self.batch).into_iter().flatten() {
            let end = stripe_end(self.merged).min(cursor);
            while self.merged < end {
                let (bit, step) = (self.merged % STRIPE / BLOCK, block_floor(self.merged) + BLOCK);
                let mapped = bitmap[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                self.extend(step.min(end), if mapped { EXTENT_DATA } else { EXTENT_HOLE });
                if self.extents.len() > self.extents_max() {
                    self.extents.pop();
                    return true;
                }
            }
        }
        false
    }

    fn extents_max(&self) -> usize {
        if self.one { 1 } else { EXTENTS_MAX }
    }

    fn extend(&mut self, end: u64, flags: u32) {
        let length = u32::try_from(end - self.merged).expect("a part of a stripe");
        self.merged = end;
        match self.extents.last_mut() {
            Some(last) if last.1 == flags => last.0 += length,
            _ => self.extents.push((length, flags)),
        }
    }
}

impl NbdSession {
    /// Asks for the next batch, if the last one is complete.
    pub(super) fn issue_status(&mut self, key: Key, host: &mut impl Host) -> Issue {
        for index in 0..STATUS_BATCH {
            let Some(command) = self.commands.get(key) else { return Issue::Settled };
            let in_batch = u32::try_from(index).expect("a batch is small");
            if command.error.is_some()
                || command.cursor == command.end
                || command.in_flight != in_batch
            {
                return Issue::Settled;
            }
            if self.is_clogged() {
                // A batch once begun is answered before the next begins, so a part of one may wait as well.
                return if index == 0 { Issue::Blocked } else { Issue::Settled };
            }
            let (start, stop) = (command.cursor, stripe_end(command.cursor).min(command.end));
            let (first, last) = (block_floor(start), block_ceiling(stop));
            let length = u32::try_from(last - first).expect("at most a stripe");
            self.advance_cursor(key, stop);
            let index = u8::try_from(index).expect("a batch is small");
            self.submit(key, PieceWork::Status { index }, first, length, Operation::Status, host);
        }
        Issue::Settled
    }

    /// A stripe's bitmap came, or did not.
    pub(super) fn finish_status(
        &mut self,
        key: Key,
        index: u8,
        outcome: Outcome,
        host: &mut impl Host,
    ) {
        let Some(command) = self.commands.get_mut(key) else { return };
        let Command { work: Work::Status(status), error, in_flight, cursor, end, .. } = command
        else {
            unreachable!("a status piece belongs to a status command")
        };
        match outcome {
            Outcome::Mapped(bitmap) => status.batch[usize::from(index)] = Some(bitmap),
            Outcome::NoSpace | Outcome::Failed => *error = Some(ErrorNumber::InputOutput),
            Outcome::Done => unreachable!("a status request is answered with a bitmap"),
        }
        if *in_flight > 0 {
            return;
        }
        if error.is_none() {
            let enough = status.merge(*cursor);
            if !enough && cursor < end {
                self.ready.push_back(key);
                return;
            }
            *cursor = *end;
        }
        self.settle(key, host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_clipped_to_the_command() {
        let mut work = StatusWork::new(512, false);
        let mut bitmap = Box::new(Bitmap::default());
        bitmap[0] = 0b110;
        work.batch[0] = Some(bitmap);
        assert!(!work.merge(3 * BLOCK + 1024));
        assert_eq!(work.extents, [(3584, EXTENT_HOLE), (8192, EXTENT_DATA), (1024, EXTENT_HOLE)]);
    }

    #[test]
    fn extents_grow_over_stripes_and_stop_at_the_limit() {
        let mut work = StatusWork::new(0, true);
        work.batch[0] = Some(Box::default());
        assert!(!work.merge(STRIPE));
        let mut bitmap = Box::new(Bitmap::default());
        bitmap[0] = 0b10;
        work.batch[0] = Some(bitmap);
        assert!(work.merge(2 * STRIPE));
        let length = u32::try_from(STRIPE + BLOCK).expect("two stripes");
        assert_eq!(work.extents, [(length, EXTENT_HOLE)]);
    }
}
