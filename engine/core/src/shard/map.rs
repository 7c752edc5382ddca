//! Step 6 of the flow: the map follows a CP, and the blocks that it frees wait until nobody needs them.
//!
//! The same code serves both sides, so equal deltas make equal maps. Invariants: a freed block stays used until its
//! CP is committed on both sides (R1, R7), something durable calls it committed (R4), and no read that began before is
//! under way.

use super::staging::Key;
use super::{Retained, Shard};
use crate::block_map::SegmentKey;
use crate::contract::IoToken;
use crate::data_run::DataRun;
use crate::delta::Delta;
use crate::segment::Slot;
use crate::units::{Checksum, CpNumber, DataBlock};

/// What a block's slot was before a CP changed it.
pub(super) type Change = (Key, Option<Slot>);

impl Shard {
    /// Applies a CP's delta to the map. Gives the slots it replaced, in the delta's order.
    pub(super) fn update_map(
        &mut self,
        delta: &Delta,
        runs: &[DataRun],
        checksums: &[Checksum],
    ) -> Vec<Change> {
        let mut blocks = runs.iter().flat_map(DataRun::blocks);
        let mut sums = checksums.iter();
        let mut changes = Vec::with_capacity(checksums.len());
        for volume_delta in &delta.volumes {
            let volume = volume_delta.volume;
            for run in &volume_delta.mapped {
                for block in run.blocks() {
                    let slot = blocks.next().zip(sums.next().copied());
                    let (block_new, checksum) =
                        slot.expect("a block and a checksum for each mapped block");
                    let slot = Slot { block: block_new, checksum };
                    changes.push(self.change_slot(Key { volume, block }, Some(slot)));
                }
            }
            for run in &volume_delta.unmapped {
                for block in run.blocks() {
                    changes.push(self.change_slot(Key { volume, block }, None));
                }
            }
        }
        assert!(blocks.next().is_none(), "more data blocks than mapped blocks");
        changes
    }

    /// Takes the changes of [`Shard::update_map`] back.
    pub(super) fn revert_map(&mut self, changes: &[Change]) {
        for (key, old) in changes.iter().rev() {
            self.map.set(key.volume, key.block, *old);
        }
    }

    /// Keeps the blocks that a CP freed until the floor has reached it.
    pub(super) fn retain(&mut self, cp: CpNumber, changes: &[Change]) {
        let blocks: Vec<DataBlock> =
            changes.iter().filter_map(|(_, old)| old.map(|slot| slot.block)).collect();
        if !blocks.is_empty() {
            self.retained.push_back(Retained { cp, blocks });
        }
    }

    /// The newest CP whose freed blocks may be overwritten: nobody goes back before it, and recovery believes it without
    /// a look at its data.
    pub(super) fn floor(&self) -> CpNumber {
        self.base.min(self.claimed)
    }

    /// The floor moved: blocks freed at or before it are free, once no older read needs them.
    pub(super) fn release(&mut self) {
        let floor = self.floor();
        let mut released = false;
        while let Some(retained) = self.retained.pop_front_if(|retained| retained.cp <= floor) {
            self.limbo.push_back((IoToken(self.io_next), retained.blocks));
            released = true;
        }
        if released {
            self.leave_limbo();
        }
        self.retry_parked();
        self.retry_waiting_for_space(false);
        self.tell_what_holds_message();
    }

    /// Frees released blocks that no read under way can use.
    pub(super) fn leave_limbo(&mut self) {
        let oldest_read = self.reads.first().copied();
        let is_past = |mark: IoToken| oldest_read.is_none_or(|read| read >= mark);
        let mut came = false;
        while let Some((_, blocks)) = self.limbo.pop_front_if(|(mark, _)| is_past(*mark)) {
            came = true;
            for block in blocks {
                self.free.release(block);
            }
        }
        if came {
            self.retry_waiting_for_space(true);
        }
    }

    fn change_slot(&mut self, key: Key, new: Option<Slot>) -> Change {
        let segment = SegmentKey::of(key.volume, key.block);
        self.checkpoint.before_change(segment, &self.map);
        (key, self.map.set(key.volume, key.block, new))
    }
}
