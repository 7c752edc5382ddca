//! The journal ring of one shard: where records lie, and which of them are still needed.
//!
//! Step 5 of the flow. A record is written whole, never across the ring's end: one that does not fit there starts
//! at block 0, and the blocks left out count as used until it is released; in an empty ring nothing is left out.
//! Invariants: records have consecutive
//! sequence numbers and each names the checksum of the one before, so that a stale record of an earlier lap, or of
//! a point that recovery cut off, never follows a newer one; a released record's CP is in a map checkpoint.

use std::collections::VecDeque;

use crate::shard_header::JournalPosition;
use crate::units::{CpNumber, Root};

/// Where one record lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalEntry {
    /// The record's CP.
    pub cp: CpNumber,
    /// First block in the ring.
    pub start: u32,
    /// Length in blocks.
    pub blocks: u32,
    /// Length with the blocks left out before it.
    pub cost: u32,
    /// The record's sequence number.
    pub sequence: u64,
    /// The checksum of the record before.
    pub previous: u64,
    /// The shard's root after the record.
    pub root: Root,
}

/// The ring and the records in it, oldest first.
#[derive(Debug)]
pub struct Journal {
    capacity: u32,
    head: u32,
    used: u32,
    sequence: u64,
    previous: u64,
    root_before: Root,
    entries: VecDeque<JournalEntry>,
}

impl Journal {
    /// An empty ring of `capacity` blocks whose next record goes to `position`; `root` is the shard's root there.
    #[must_use]
    pub fn new(capacity: u32, position: JournalPosition, root: Root) -> Journal {
        assert!(position.index < capacity, "journal position {} of {capacity}", position.index);
        Journal {
            capacity,
            head: position.index,
            used: 0,
            sequence: position.sequence,
            previous: position.previous,
            root_before: root,
            entries: VecDeque::new(),
        }
    }

    /// The next record's sequence number.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The last record's checksum.
    #[must_use]
    pub fn previous(&self) -> u64 {
        self.previous
    }

    /// Where the next record would start if it fits before the ring's end.
    #[must_use]
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Blocks in use.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.used
    }

    /// Blocks of the ring.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The records, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = &JournalEntry> {
        self.entries.iter()
    }

    /// Whether a record of so many blocks fits now. One block always stays free.
    #[must_use]
    pub fn fits(&self, blocks: u32) -> bool {
        let (_, cost) = self.place(blocks);
        blocks <= self.capacity && self.used + cost < self.capacity
    }

    /// Appends a record; tells its first block.
    ///
    /// # Panics
    /// If it does not fit, or its CP is not newer than the last one.
    pub fn append(&mut self, cp: CpNumber, blocks: u32, checksum: u64, root: Root) -> u32 {
        assert!(self.fits(blocks), "a record of {blocks} blocks does not fit");
        let (start, cost) = self.place(blocks);
        self.push(cp, start, blocks, cost, checksum, root);
        start
    }

    /// Takes in a record that recovery found at `start`.
    ///
    /// # Panics
    /// If `start` is not where the record can lie.
    pub fn adopt(&mut self, cp: CpNumber, start: u32, blocks: u32, checksum: u64, root: Root) {
        let skipped =
            if start == self.head || self.used == 0 { 0 } else { self.capacity - self.head };
        let cost = blocks + skipped;
        assert!(start == self.head || start == 0, "record at {start}, head at {}", self.head);
        self.push(cp, start, blocks, cost, checksum, root);
    }

    /// Forgets the records up to and with `cp`.
    pub fn release(&mut self, cp: CpNumber) {
        while let Some(entry) = self.entries.front().copied().filter(|entry| entry.cp <= cp) {
            self.used -= entry.cost;
            self.root_before = entry.root;
            self.entries.pop_front();
        }
    }

    /// Where recovery must begin if the map on the device is that of `cp`.
    #[must_use]
    pub fn position_after(&self, cp: CpNumber) -> JournalPosition {
        match self.entry_after(cp) {
            Some(entry) => JournalPosition {
                index: entry.start,
                sequence: entry.sequence,
                previous: entry.previous,
            },
            None => JournalPosition {
                index: self.head,
                sequence: self.sequence,
                previous: self.previous,
            },
        }
    }

    /// The first record after `cp`.
    #[must_use]
    pub fn entry_after(&self, cp: CpNumber) -> Option<&JournalEntry> {
        let index = self.entries.partition_point(|entry| entry.cp <= cp);
        self.entries.get(index)
    }

    /// The shard's root as of `cp`, which must not be older than the last released record.
    #[must_use]
    pub fn root_at(&self, cp: CpNumber) -> Root {
        let index = self.entries.partition_point(|entry| entry.cp <= cp);
        if index == 0 { self.root_before } else { self.entries[index - 1].root }
    }

    fn place(&self, blocks: u32) -> (u32, u32) {
        let room = self.capacity - self.head;
        if blocks <= room {
            (self.head, blocks)
        } else if self.used == 0 {
            (0, blocks)
        } else {
            (0, blocks.saturating_add(room))
        }
    }

    fn push(
        &mut self,
        cp: CpNumber,
        start: u32,
        blocks: u32,
        cost: u32,
        checksum: u64,
        root: Root,
    ) {
        assert!(blocks > 0, "an empty record");
        assert!(self.entries.back().is_none_or(|last| last.cp < cp), "CP {cp} out of order");
        assert!(start + blocks <= self.capacity, "a record crosses the ring's end");
        assert!(self.used + cost <= self.capacity, "the journal overflows");
        let (sequence, previous) = (self.sequence, self.previous);
        self.entries.push_back(JournalEntry { cp, start, blocks, cost, sequence, previous, root });
        self.used += cost;
        self.head = (start + blocks) % self.capacity;
        self.sequence += 1;
        self.previous = checksum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(capacity: u32) -> Journal {
        let start = JournalPosition { index: 0, sequence: 1, previous: 0 };
        Journal::new(capacity, start, Root(0))
    }

    #[test]
    fn records_wrap_whole_and_release_what_they_left_out() {
        let mut journal = journal(10);
        assert_eq!(journal.append(CpNumber(1), 4, 11, Root(1)), 0);
        assert_eq!(journal.append(CpNumber(2), 4, 12, Root(2)), 4);
        assert!(!journal.fits(3));
        journal.release(CpNumber(1));
        assert_eq!(journal.append(CpNumber(3), 3, 13, Root(3)), 0);
        assert_eq!(journal.used(), 4 + 2 + 3);
        assert_eq!(journal.root_at(CpNumber(1)), Root(1));
        assert_eq!(journal.root_at(CpNumber(2)), Root(2));
        let position = journal.position_after(CpNumber(2));
        assert_eq!(position, JournalPosition { index: 0, sequence: 3, previous: 12 });
        journal.release(CpNumber(3));
        assert_eq!(journal.used(), 0);
        assert_eq!(journal.head(), 3);
    }

    #[test]
    fn a_full_ring_keeps_one_block_free() {
        let mut journal = journal(4);
        assert!(journal.fits(3));
        assert!(!journal.fits(4));
        journal.append(CpNumber(1), 3, 1, Root(1));
        assert!(!journal.fits(1));
    }
}
