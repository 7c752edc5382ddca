//! The data blocks of one shard: which images use each, and since when.
//!
//! Invariant: of the images that use a block at most the newest is of a CP that no later one has replaced.

use std::collections::{BTreeMap, BTreeSet};

use twinpoint_core::data_run::DataRun;
use twinpoint_core::record::Record;
use twinpoint_core::units::{CpNumber, DataBlock, LocalBlock, ShardId, VolumeId};

/// The data blocks of one shard.
#[derive(Debug, Default)]
pub(super) struct Region {
    /// For each block the images that use it, oldest first.
    pub uses: Vec<Vec<Use>>,
    /// The map of the newest record.
    pub map: BTreeMap<Key, DataBlock>,
    /// Blocks written for records to come.
    pub unrecorded: BTreeSet<DataBlock>,
    /// When each block's last write ended, in the disk's order; none while it is under way.
    pub ended: BTreeMap<DataBlock, Option<u64>>,
}

type Key = (VolumeId, LocalBlock);

/// The images of CPs from `mapped` on, before `freed`, use a block for `key`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub key: Key,
    pub mapped: CpNumber,
    pub freed: Option<CpNumber>,
}

impl Region {
    /// The map follows a record.
    pub fn apply(&mut self, record: &Record, node: usize, shard: ShardId) {
        let cp = record.cp;
        let mut places = record.runs.iter().flat_map(DataRun::blocks);
        for key in record.delta.mapped_blocks() {
            let place = places.next().expect("a place for each mapped block");
            let was_written = self.unrecorded.remove(&place);
            assert!(
                was_written,
                "node {node} shard {shard} CP {cp}: block {place} was not written"
            );
            let old = self.map.insert(key, place);
            self.free(old, cp);
            let uses = &mut self.uses[place.0 as usize];
            let user = uses.last().filter(|used| used.freed.is_none());
            assert!(user.is_none(), "node {node} shard {shard} CP {cp}: {place} is mapped twice");
            uses.push(Use { key, mapped: cp, freed: None });
        }
        for key in record.delta.unmapped_blocks() {
            let old = self.map.remove(&key);
            self.free(old, cp);
        }
    }

    fn free(&mut self, old: Option<DataBlock>, cp: CpNumber) {
        if let Some(old) = old {
            let last = self.uses[old.0 as usize].last_mut().expect("a mapped block is used");
            last.freed = Some(cp);
        }
    }

    /// Only CPs up to `last` happened.
    pub fn go_back(&mut self, last: CpNumber) {
        self.unrecorded.clear();
        self.map.clear();
        for (index, uses) in self.uses.iter_mut().enumerate() {
            uses.retain(|used| used.mapped <= last);
            let Some(newest) = uses.last_mut() else { continue };
            newest.freed = newest.freed.filter(|freed| *freed <= last);
            if newest.freed.is_none() {
                let place = DataBlock(u32::try_from(index).expect("a block's number"));
                self.map.insert(newest.key, place);
            }
        }
    }

    /// Blocks that no image at or after `base` uses.
    pub fn free_after(&self, base: CpNumber) -> u32 {
        let is_free = |uses: &&Vec<Use>| {
            uses.iter().all(|used| used.freed.is_some_and(|freed| freed <= base))
        };
        self.uses.iter().filter(is_free).count() as u32
    }
}
