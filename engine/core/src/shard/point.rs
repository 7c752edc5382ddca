//! Step 3 of the flow: a CP is sealed. Its staged blocks get device blocks in volume order, the map and the root move,
//! and the same write commands go to the device and to the lane.
//!
//! Invariants: CPs are sealed in order; a CP's record names all participants and the roots around it (R3); buffers
//! stay untouched until the device has written them and the lane, if it took them, has sent them.

use super::map::Change;
use super::staging::{Entry, Key, Staging};
use super::{Shard, Work};
use crate::contract::{Report, Seal, ShardAction};
use crate::data_run::DataRun;
use crate::delta::{Delta, VolumeDelta};
use crate::limits::{RECORD_MAPPED_MAX, record_blocks_bound};
use crate::message::{DATA_BLOCKS_PER_MESSAGE_MAX, Role};
use crate::record::Record;
use crate::units::{BLOCK_BYTES, BufferId, Checksum, CpNumber, DataBlock, VolumeId};

/// Most blocks of deleted volumes that one CP frees.
const REAP_MAX: usize = 8192;

/// One sealed CP until its buffers are free.
#[derive(Debug)]
pub(super) struct Point {
    pub cp: CpNumber,
    /// The staged blocks, in map order, with where they go.
    pub blocks: Vec<(Key, BufferId, DataBlock)>,
    /// What the lane sends; and the data runs and checksums of `blocks`, in order.
    pub record: Record,
    /// Device writes under way.
    writes: u32,
    /// Data posts queued or under way.
    pub posts: u32,
}

/// A staged CP in map order.
struct Staged {
    mapped: Vec<(Key, BufferId, Checksum)>,
    unmapped: Vec<Key>,
}

impl Shard {
    /// Seals the next CP if nothing hinders it. Tells whether it did.
    pub(super) fn seal_next(&mut self) -> bool {
        let Some(cp) = self.seals.front().map(|seal| seal.cp) else { return false };
        let oldest = self.stagings.oldest();
        assert!(oldest.is_none_or(|staging| staging.cp >= cp), "a CP was never sealed");
        let staging = oldest.filter(|staging| staging.cp == cp);
        if staging.is_some_and(|staging| staging.fills > 0) {
            return false;
        }
        let entries = staging.map_or(0, |staging| staging.entries.len());
        let reaped = if self.doomed.is_empty() { 0 } else { REAP_MAX };
        if !self.has_journal_room((entries + reaped).min(RECORD_MAPPED_MAX as usize)) {
            return false;
        }
        let staging = self.stagings.take(cp);
        let seal = self.seals.pop_front().expect("it was there");
        let staged = self.sort_out(staging);
        self.seal_point(seal, staged);
        self.retry_parked();
        true
    }

    /// The buffer of a block that the map has at `data`, if its CP's buffers are still held. A buffer of an older CP
    /// may outlive that of a newer one, so the place decides.
    pub(super) fn buffer_in_flight(&self, key: Key, data: DataBlock) -> Option<BufferId> {
        self.points.iter().rev().find_map(|point| {
            let index = point.blocks.binary_search_by_key(&key, |(key, ..)| *key).ok()?;
            let (_, buffer, place) = point.blocks[index];
            (place == data).then_some(buffer)
        })
    }

    pub(super) fn point_written(&mut self, cp: CpNumber) {
        if self.role == Role::Secondary {
            self.applied_written(cp);
            return;
        }
        let point = self.point(cp);
        point.writes -= 1;
        if point.writes == 0 {
            self.tell(Report::Written { cp });
            self.free_points();
        }
    }

    pub(super) fn point_posted(&mut self, cp: CpNumber) {
        self.point(cp).posts -= 1;
        self.free_points();
    }

    /// Frees the buffers of points that nobody needs any more.
    pub(super) fn free_points(&mut self) {
        let mut freed = Vec::new();
        self.points.retain(|point| {
            let needed = point.writes > 0 || point.posts > 0;
            if !needed {
                freed.extend(point.blocks.iter().map(|(_, buffer, _)| *buffer));
            }
            needed
        });
        if !freed.is_empty() {
            self.act(ShardAction::Free(freed));
        }
    }

    /// Brings what is staged in map order, with blocks of deleted volumes, and leaves out what changes nothing.
    fn sort_out(&mut self, staging: Option<Staging>) -> Staged {
        let entries = staging.map(|staging| staging.entries).unwrap_or_default();
        let mut mapped = Vec::with_capacity(entries.len());
        let mut unmapped = Vec::new();
        let mut freed = Vec::new();
        for (key, entry) in entries {
            match entry {
                // The volume was deleted since: its blocks are reaped below.
                Entry::Block { buffer, .. } if !self.volumes.contains(&key.volume) => {
                    freed.push(buffer)
                }
                Entry::Unmap if !self.volumes.contains(&key.volume) => {}
                Entry::Block { buffer, checksum, filling } => {
                    assert!(!filling, "a CP is sealed when its blocks are whole");
                    mapped.push((key, buffer, checksum));
                }
                Entry::Unmap if self.map.get(key.volume, key.block).is_some() => unmapped.push(key),
                Entry::Unmap => {}
            }
        }
        if !freed.is_empty() {
            self.act(ShardAction::Free(freed));
        }
        let room = (RECORD_MAPPED_MAX as usize).saturating_sub(mapped.len() + unmapped.len());
        unmapped.extend(self.reap(room.min(REAP_MAX)));
        mapped.sort_unstable_by_key(|(key, ..)| *key);
        unmapped.sort_unstable();
        Staged { mapped, unmapped }
    }

    /// Blocks of deleted volumes, at most `room`; asks for another CP if there are more.
    fn reap(&mut self, room: usize) -> Vec<Key> {
        let mut keys = Vec::new();
        while let Some(volume) = self.doomed.last().copied() {
            for number in self.map.volume_segments(volume) {
                let segment = self.map.segment(volume, number).expect("it was listed");
                keys.extend(segment.iter().map(|(block, _)| Key { volume, block }));
                if keys.len() > room {
                    keys.truncate(room);
                    self.tell(Report::WantReap);
                    return keys;
                }
            }
            self.doomed.pop();
        }
        keys
    }

    fn seal_point(&mut self, seal: Seal, staged: Staged) {
        let cp = seal.cp;
        assert!(cp > self.last, "CP {cp} after {}", self.last);
        assert!(seal.participants.contains(self.id), "not a participant");
        let mut runs = Vec::new();
        let count = u32::try_from(staged.mapped.len()).expect("bounded by the record's limits");
        self.free
            .allocate(count, &mut runs)
            .expect("room was reserved when the blocks were staged");
        let checksums: Vec<Checksum> =
            staged.mapped.iter().map(|(.., checksum)| *checksum).collect();
        let delta =
            delta_of(staged.mapped.iter().map(|(key, ..)| *key), staged.unmapped.iter().copied());
        let root_before = self.root();
        let changes: Vec<Change> = self.update_map(&delta, &runs, &checksums);
        self.retain(cp, &changes);
        if let Some(catalog) = &seal.catalog {
            self.checkpoint.set_catalog(catalog.clone());
            self.catalog_root = catalog.root();
        }
        let record = Record {
            store: self.store,
            shard: self.id,
            term: self.term,
            cp,
            participants: seal.participants,
            committed: self.committed,
            base: self.base,
            root_before,
            root_after: self.root(),
            sequence: self.journal.sequence(),
            previous: self.journal.previous(),
            name: seal.name,
            catalog: seal.catalog,
            delta,
            runs,
            checksums,
        };
        self.recount_segments();
        self.last = cp;
        self.tell(Report::Sealed {
            cp,
            root: record.root_after,
            data_bytes: u64::from(count) * BLOCK_BYTES as u64,
            delta_bytes: record.encode_wire().len() as u64,
        });
        let places = record.runs.iter().flat_map(DataRun::blocks);
        let blocks = staged
            .mapped
            .iter()
            .zip(places)
            .map(|((key, buffer, _), place)| (*key, *buffer, place))
            .collect();
        let mut point = Point { cp, blocks, record, writes: 0, posts: 0 };
        self.write_point(&mut point);
        self.points.push_back(point);
    }

    /// Sends a point's data and record to the device.
    fn write_point(&mut self, point: &mut Point) {
        let mut buffers = point.blocks.iter().map(|(_, buffer, _)| *buffer);
        for run in chunks(&point.record.runs, DATA_BLOCKS_PER_MESSAGE_MAX) {
            let buffers: Vec<BufferId> = buffers.by_ref().take(run.count as usize).collect();
            let io = self.start(Work::PointWrite(point.cp));
            let block = self.geometry.data_block(self.id, run.first);
            self.act(ShardAction::WriteData { io, block, buffers });
            point.writes += 1;
        }
        self.write_record(&point.record);
        point.writes += 1;
    }

    /// Appends a record to the journal and writes it. Room was made sure of before.
    pub(super) fn write_record(&mut self, record: &Record) {
        let bytes = record.encode();
        let blocks =
            u32::try_from(bytes.len() / BLOCK_BYTES).expect("bounded by the record's limits");
        let start =
            self.journal.append(record.cp, blocks, Record::checksum(&bytes), record.root_after);
        let io = self.start(Work::PointWrite(record.cp));
        let block = self.geometry.journal_block(self.id, start);
        self.act(ShardAction::WriteMetadata { io, block, bytes });
    }

    /// Whether a record of so many entries surely fits the journal; if not, a map checkpoint will make room.
    pub(super) fn has_journal_room(&mut self, entries: usize) -> bool {
        let entries = u32::try_from(entries).expect("entries are bounded");
        let fits = self.journal.fits(record_blocks_bound(entries, entries));
        if !fits {
            self.checkpoint.want();
        }
        fits
    }

    fn point(&mut self, cp: CpNumber) -> &mut Point {
        self.points.iter_mut().find(|point| point.cp == cp).expect("a point stays until it is done")
    }
}

/// Cuts runs into pieces of at most `blocks_max` blocks.
pub(super) fn chunks(runs: &[DataRun], blocks_max: u32) -> impl Iterator<Item = DataRun> + '_ {
    runs.iter().flat_map(move |run| {
        (0..run.count).step_by(blocks_max as usize).map(move |skip| DataRun {
            first: DataBlock(run.first.0 + skip),
            count: (run.count - skip).min(blocks_max),
        })
    })
}

fn delta_of(mapped: impl Iterator<Item = Key>, unmapped: impl Iterator<Item = Key>) -> Delta {
    let mut volumes: Vec<VolumeDelta> = Vec::new();
    for key in mapped {
        delta_of_volume(&mut volumes, key.volume).push_mapped(key.block);
    }
    for key in unmapped {
        delta_of_volume(&mut volumes, key.volume).push_unmapped(key.block);
    }
    Delta { volumes }
}

fn delta_of_volume(volumes: &mut Vec<VolumeDelta>, volume: VolumeId) -> &mut VolumeDelta {
    let index = volumes.partition_point(|delta| delta.volume < volume);
    if volumes.get(index).is_none_or(|delta| delta.volume != volume) {
        volumes.insert(index, VolumeDelta::new(volume));
    }
    &mut volumes[index]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::Run;
    use crate::units::LocalBlock;

    fn key(volume: u32, block: u64) -> Key {
        Key { volume: VolumeId(volume), block: LocalBlock(block) }
    }

    #[test]
    fn deltas_have_maximal_runs_by_volume() {
        let mapped = [key(1, 5), key(1, 6), key(3, 7)];
        let delta = delta_of(mapped.into_iter(), [key(2, 1), key(3, 8)].into_iter());
        let volumes: Vec<u32> = delta.volumes.iter().map(|delta| delta.volume.0).collect();
        assert_eq!(volumes, [1, 2, 3]);
        assert_eq!(delta.volumes[0].mapped, [Run { first: LocalBlock(5), count: 2 }]);
        assert_eq!(delta.volumes[2].unmapped, [Run { first: LocalBlock(8), count: 1 }]);
    }

    #[test]
    fn chunks_cover_runs() {
        let runs = [DataRun { first: DataBlock(10), count: 600 }];
        let counts: Vec<u32> = chunks(&runs, 256).map(|run| run.count).collect();
        assert_eq!(counts, [256, 256, 88]);
    }
}
