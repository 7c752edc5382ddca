//! Step 2 of the flow: what waits in memory for the next CP.
//!
//! Invariants: a block has at most one entry in one staging, the newest; stagings are ordered by CP number and only
//! the last one takes requests, so that of two writes of one block the later one is always in the later CP; an entry
//! that is being filled is touched by nobody until the fill ends.

use std::collections::{HashMap, VecDeque};

use crate::hash::FastHash;
use crate::units::{BufferId, Checksum, CpNumber, LocalBlock, VolumeId};

/// A block of a volume inside this shard. Orders as the map does: by volume, then by block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Key {
    pub volume: VolumeId,
    pub block: LocalBlock,
}

/// What the next CP does to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    Block { buffer: BufferId, checksum: Checksum, filling: bool },
    Unmap,
}

/// What is staged for one CP.
#[derive(Debug)]
pub(crate) struct Staging {
    pub cp: CpNumber,
    pub entries: HashMap<Key, Entry, FastHash>,
    /// Entries that need a data block.
    pub blocks: u32,
    /// Fills under way; the CP cannot be sealed before they end.
    pub fills: u32,
}

/// All that is staged, oldest CP first.
#[derive(Debug, Default)]
pub(crate) struct Stagings {
    list: VecDeque<Staging>,
}

impl Stagings {
    /// Makes sure that the newest staging is that of `stamp` or of a later CP. A request whose stamp is older than
    /// the newest one seen joins the newest: it was not answered yet, so it may be in any later CP that is open.
    pub fn open(&mut self, stamp: CpNumber) {
        if self.list.back().is_none_or(|newest| newest.cp < stamp) {
            self.list.push_back(Staging {
                cp: stamp,
                entries: HashMap::with_hasher(FastHash),
                blocks: 0,
                fills: 0,
            });
        }
    }

    /// The staging that takes requests.
    ///
    /// # Panics
    /// If none was opened.
    pub fn newest(&mut self) -> &mut Staging {
        self.list.back_mut().expect("a staging was opened")
    }

    /// The oldest staging.
    pub fn oldest(&self) -> Option<&Staging> {
        self.list.front()
    }

    /// Takes the staging of `cp` out, if there is one.
    ///
    /// # Panics
    /// If an older one is still there: its CP would be lost.
    pub fn take(&mut self, cp: CpNumber) -> Option<Staging> {
        let oldest = self.list.front()?;
        assert!(oldest.cp >= cp, "CP {} was never sealed", oldest.cp);
        if oldest.cp == cp { self.list.pop_front() } else { None }
    }

    /// The newest entry of a block.
    pub fn find(&self, key: Key) -> Option<Entry> {
        self.list.iter().rev().find_map(|staging| staging.entries.get(&key).copied())
    }

    /// The newest entry of a block in a CP before the newest.
    pub fn find_older(&self, key: Key) -> Option<Entry> {
        self.list.iter().rev().skip(1).find_map(|staging| staging.entries.get(&key).copied())
    }

    /// Whether the block's newest entry waits for a fill.
    pub fn is_filling(&self, key: Key) -> bool {
        matches!(self.find(key), Some(Entry::Block { filling: true, .. }))
    }

    /// The staging of `cp`.
    pub fn of(&mut self, cp: CpNumber) -> Option<&mut Staging> {
        self.list.iter_mut().find(|staging| staging.cp == cp)
    }

    /// Data blocks that all stagings together need.
    pub fn blocks(&self) -> u32 {
        self.list.iter().map(|staging| staging.blocks).sum()
    }

    /// The blocks of all entries that need a data block.
    pub fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        let entries = self.list.iter().flat_map(|staging| &staging.entries);
        entries.filter(|(_, entry)| matches!(entry, Entry::Block { .. })).map(|(key, _)| *key)
    }

    /// Whether nothing is staged.
    pub fn is_empty(&self) -> bool {
        self.list.iter().all(|staging| staging.entries.is_empty())
    }
}

impl Staging {
    /// Puts a block's new contents; returns the buffer that they replace.
    pub fn put(
        &mut self,
        key: Key,
        buffer: BufferId,
        checksum: Checksum,
        filling: bool,
    ) -> Option<BufferId> {
        let old = self.entries.insert(key, Entry::Block { buffer, checksum, filling });
        if filling {
            self.fills += 1;
        }
        match old {
            Some(Entry::Block { buffer, filling, .. }) => {
                assert!(!filling, "a block was replaced while it was filled");
                Some(buffer)
            }
            Some(Entry::Unmap) | None => {
                self.blocks += 1;
                None
            }
        }
    }

    /// Drops a block's entry, or turns it to an unmap; returns the buffer that it had.
    pub fn unmap(&mut self, key: Key, older_exists: bool) -> Option<BufferId> {
        let old = if older_exists {
            self.entries.insert(key, Entry::Unmap)
        } else {
            self.entries.remove(&key)
        };
        match old {
            Some(Entry::Block { buffer, filling, .. }) => {
                assert!(!filling, "a block was unmapped while it was filled");
                self.blocks -= 1;
                Some(buffer)
            }
            Some(Entry::Unmap) | None => None,
        }
    }

    /// Ends a fill: the entry is whole, or is dropped if the old contents could not be read.
    pub fn filled(&mut self, key: Key, checksum: Option<Checksum>) -> Option<BufferId> {
        self.fills -= 1;
        let Some(Entry::Block { buffer, filling: true, .. }) = self.entries.get(&key).copied()
        else {
            panic!("a fill ended for a block that is not filling");
        };
        match checksum {
            Some(checksum) => {
                self.entries.insert(key, Entry::Block { buffer, checksum, filling: false });
                None
            }
            None => {
                self.entries.remove(&key);
                self.blocks -= 1;
                Some(buffer)
            }
        }
    }
}
