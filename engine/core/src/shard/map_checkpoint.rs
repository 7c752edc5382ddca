//! The map goes to the device now and then, so that the journal can be reused: touched segments copy-on-write, then the
//! directory of all segments, then the shard header in two copies.
//!
//! A local matter of each side. Invariants: the map written is exactly that of one CP, although later CPs change the
//! map in memory meanwhile (a segment is encoded before its first change); the header points to it only when that CP
//! is at or before the base and everything it points to is durable; until then nothing of the old one is overwritten.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Shard, Work};
use crate::block_map::{BlockMap, SegmentKey};
use crate::catalog::Catalog;
use crate::codec::structure_checksum;
use crate::contract::{Report, ShardAction};
use crate::directory::{self, DirectoryEntry};
use crate::free_space::FreeSpace;
use crate::geometry::MapSlot;
use crate::hash::FastHash;
use crate::shard_header::ShardHeader;
use crate::units::{BLOCK_BYTES, CpNumber, DataBlock, DeviceBlock, Root};

/// Segment writes under way at the same time.
const WRITES_MAX: u32 = 8;
/// Segments of one write, at most.
const SEGMENTS_PER_WRITE: usize = 16;

/// The map on the device, and the writing of a newer one.
#[derive(Debug)]
pub struct MapCheckpoint {
    header: ShardHeader,
    directory: BTreeMap<SegmentKey, DirectoryEntry>,
    slots: FreeSpace,
    dirty: HashSet<SegmentKey, FastHash>,
    /// The segment that was marked last: runs of changes mark it once.
    dirty_last: Option<SegmentKey>,
    catalog: Catalog,
    wanted: bool,
    job: Option<Job>,
}

#[derive(Debug)]
struct Job {
    cp: CpNumber,
    root: Root,
    catalog: Catalog,
    pending: Vec<SegmentKey>,
    pending_set: HashSet<SegmentKey, FastHash>,
    /// Segments encoded before a later CP changed them; none for one that was empty.
    saved: HashMap<SegmentKey, Option<Vec<u8>>, FastHash>,
    replaced: Vec<MapSlot>,
    outstanding: u32,
    step: Step,
    held_told: bool,
    header: ShardHeader,
}

/// What a job does now, or waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Segments,
    Base,
    Directory,
    FlushMap,
    HeaderFirst,
    FlushHeader,
    HeaderSecond,
    FlushLast,
}

impl MapCheckpoint {
    /// The checkpoint that recovery found: its header, its directory, and the catalog as of the last committed CP.
    /// `changed` are the segments that CPs since then changed.
    ///
    /// # Panics
    /// If two entries use one slot: the directory's decoder refuses that.
    #[must_use]
    pub fn new(
        header: ShardHeader,
        entries: Vec<DirectoryEntry>,
        map_slots: u32,
        catalog: Catalog,
        changed: impl Iterator<Item = SegmentKey>,
    ) -> MapCheckpoint {
        let mut slots = FreeSpace::new(map_slots);
        for entry in &entries {
            slots.mark_used(DataBlock(entry.slot.0));
        }
        MapCheckpoint {
            header,
            directory: entries.into_iter().map(|entry| (entry.key(), entry)).collect(),
            slots,
            dirty: changed.collect(),
            dirty_last: None,
            catalog,
            wanted: false,
            job: None,
        }
    }

    /// The CP whose map is on the device.
    #[must_use]
    pub fn cp(&self) -> CpNumber {
        self.header.checkpoint
    }

    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    pub(super) fn set_catalog(&mut self, catalog: Catalog) {
        self.catalog = catalog;
    }

    /// A CP is about to change a segment.
    pub(super) fn before_change(&mut self, key: SegmentKey, map: &BlockMap) {
        if self.dirty_last == Some(key) {
            return;
        }
        self.dirty_last = Some(key);
        self.dirty.insert(key);
        if let Some(job) = self.job.as_mut().filter(|job| job.pending_set.contains(&key)) {
            job.pending_set.remove(&key);
            job.saved.insert(key, encode(map, key));
        }
    }

    fn begin(&mut self, cp: CpNumber, root: Root) {
        let pending_set = std::mem::take(&mut self.dirty);
        self.dirty_last = None;
        self.wanted = false;
        let mut pending: Vec<SegmentKey> = pending_set.iter().copied().collect();
        pending.sort_unstable_by(|a, b| b.cmp(a));
        self.job = Some(Job {
            cp,
            root,
            catalog: self.catalog.clone(),
            pending,
            pending_set,
            saved: HashMap::with_hasher(FastHash),
            replaced: Vec::new(),
            outstanding: 0,
            step: Step::Segments,
            held_told: false,
            header: self.header.clone(),
        });
    }

    /// The next batch of segments: consecutive slots and their bytes. None when all are written.
    fn next_batch(&mut self, map: &BlockMap) -> Option<(MapSlot, Vec<u8>)> {
        let job = self.job.as_mut()?;
        let mut batch: Vec<(SegmentKey, Vec<u8>)> = Vec::new();
        while batch.len() < SEGMENTS_PER_WRITE {
            let Some(key) = job.pending.pop() else { break };
            let bytes = match job.saved.remove(&key) {
                Some(saved) => saved,
                None => {
                    job.pending_set.remove(&key);
                    encode(map, key)
                }
            };
            match bytes {
                Some(bytes) => batch.push((key, bytes)),
                None => job.replaced.extend(self.directory.remove(&key).map(|entry| entry.slot)),
            }
        }
        if batch.is_empty() {
            return None;
        }
        let mut runs = Vec::new();
        let wanted = u32::try_from(batch.len()).expect("a batch is small");
        self.slots
            .allocate(wanted, &mut runs)
            .expect("slots are twice the segments a shard may have");
        let run = *runs.first().expect("something was allocated");
        // Only the first run is taken; the rest goes back and gets slots of its own.
        for rest in &runs[1..] {
            rest.blocks().for_each(|slot| self.slots.release(slot));
        }
        for (key, bytes) in batch.drain(run.count as usize..).rev() {
            job.pending.push(key);
            job.saved.insert(key, Some(bytes));
        }
        let mut all = Vec::with_capacity(batch.len() * BLOCK_BYTES);
        for ((key, bytes), slot) in batch.into_iter().zip(run.blocks()) {
            let entry = DirectoryEntry {
                volume: key.volume,
                segment: key.segment,
                slot: MapSlot(slot.0),
                checksum: structure_checksum(&bytes),
            };
            job.replaced.extend(self.directory.insert(key, entry).map(|old| old.slot));
            all.extend_from_slice(&bytes);
        }
        Some((MapSlot(run.first.0), all))
    }
}

impl Shard {
    /// Begins a checkpoint when one is due, and takes the next step of one under way.
    pub(super) fn pump_checkpoint(&mut self) {
        let half_full = self.journal.used() > self.journal.capacity() / 2;
        let due = self.checkpoint.wanted || half_full || self.settling;
        if self.checkpoint.job.is_none() && due && self.last > self.checkpoint.cp() {
            let (cp, root) = (self.last, self.root());
            self.checkpoint.begin(cp, root);
        }
        match self.checkpoint.job.as_ref().map(|job| job.step) {
            Some(Step::Segments) => self.write_segments(),
            Some(Step::Base) => self.write_directory_when_based(),
            _ => {}
        }
    }

    /// One write or flush of the checkpoint under way ended well.
    pub(super) fn checkpoint_step_done(&mut self) {
        let job = self.checkpoint.job.as_mut().expect("its work was under way");
        job.outstanding -= 1;
        if job.outstanding > 0 {
            return;
        }
        match job.step {
            Step::Segments | Step::Base => {}
            Step::Directory => self.checkpoint_flush(Step::FlushMap),
            Step::FlushMap => self.write_header(0, Step::HeaderFirst),
            Step::HeaderFirst => self.checkpoint_flush(Step::FlushHeader),
            Step::FlushHeader => self.write_header(1, Step::HeaderSecond),
            Step::HeaderSecond => self.checkpoint_flush(Step::FlushLast),
            Step::FlushLast => self.finish_checkpoint(),
        }
    }

    fn write_segments(&mut self) {
        loop {
            let job = self.checkpoint.job.as_ref().expect("the caller is at it");
            if job.outstanding >= WRITES_MAX {
                return;
            }
            let Some((slot, bytes)) = self.checkpoint.next_batch(&self.map) else { break };
            let block = self.geometry.map_slot(self.id, slot);
            self.checkpoint_write(block, bytes);
        }
        let job = self.checkpoint.job.as_mut().expect("the caller is at it");
        if job.outstanding == 0 && job.pending.is_empty() {
            job.step = Step::Base;
            self.write_directory_when_based();
        }
    }

    /// The header may move only to a CP that nobody needs to go back before.
    fn write_directory_when_based(&mut self) {
        let job = self.checkpoint.job.as_mut().expect("the caller is at it");
        if self.base < job.cp {
            let room_is_short = self.checkpoint.wanted && self.committed >= job.cp;
            if room_is_short && !std::mem::replace(&mut job.held_told, true) {
                let awaited = job.cp;
                self.tell(Report::HeldByBase(awaited));
            }
            return;
        }
        job.step = Step::Directory;
        let entries: Vec<DirectoryEntry> = self.checkpoint.directory.values().cloned().collect();
        let bytes = directory::encode(&entries, &job.catalog);
        let area = 1 - job.header.directory_area;
        job.header = ShardHeader {
            sequence: job.header.sequence + 1,
            checkpoint: job.cp,
            root: job.root,
            directory_area: area,
            directory_bytes: u32::try_from(bytes.len()).expect("bounded by the geometry"),
            directory_checksum: structure_checksum(&bytes),
            journal: self.journal.position_after(job.cp),
            ..job.header.clone()
        };
        let block = self.geometry.directory_start(self.id, usize::from(area));
        self.checkpoint_write(block, bytes);
    }

    fn write_header(&mut self, copy: usize, step: Step) {
        let job = self.checkpoint.job.as_mut().expect("its step ended");
        job.step = step;
        let bytes = job.header.encode();
        let block = self.geometry.header_copies(self.id)[copy];
        self.checkpoint_write(block, bytes);
    }

    fn checkpoint_flush(&mut self, step: Step) {
        let job = self.checkpoint.job.as_mut().expect("its step ended");
        job.step = step;
        job.outstanding += 1;
        let io = self.start(Work::Checkpoint);
        self.act(ShardAction::Flush { io });
    }

    fn checkpoint_write(&mut self, block: DeviceBlock, bytes: Vec<u8>) {
        self.checkpoint.job.as_mut().expect("the caller is at it").outstanding += 1;
        let io = self.start(Work::Checkpoint);
        self.act(ShardAction::WriteMetadata { io, block, bytes });
    }

    fn finish_checkpoint(&mut self) {
        let job = self.checkpoint.job.take().expect("its last step ended");
        for slot in job.replaced {
            self.checkpoint.slots.release(DataBlock(slot.0));
        }
        self.checkpoint.header = job.header;
        self.journal.release(job.cp);
    }
}

fn encode(map: &BlockMap, key: SegmentKey) -> Option<Vec<u8>> {
    map.segment(key.volume, key.segment).map(|segment| segment.encode())
}
