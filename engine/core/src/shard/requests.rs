//! Step 2 of the flow: requests of frontends are staged, read, or unmapped.
//!
//! Invariants: a request that meets a block being filled, or finds no room, is parked whole and later admitted again
//! with a new stamp; nothing of it was done. A write is answered when all its blocks are whole in memory.

use super::staging::{Entry, Key};
use super::{Shard, Work};
use crate::block_map::SegmentKey;
use crate::contract::{FillSource, IoFailure, IoToken, Report, ShardAction};
use crate::limits::RECORD_MAPPED_MAX;
use crate::request::{Answer, Operation, Outcome, Request, Tag, locate};
use crate::segment::Slot;
use crate::units::{BLOCK_BYTES, BufferId, Checksum, LocalBlock, SEGMENT_BLOCKS};

/// Most entries staged for one CP: its record stays within its limits.
const STAGED_MAX: usize = RECORD_MAPPED_MAX as usize;
/// From here on a seal is asked for.
const STAGED_WANT_SEAL: usize = STAGED_MAX / 2;

/// A request that waits for fills or device reads.
#[derive(Debug)]
pub(super) struct Group {
    tag: Tag,
    outstanding: u32,
    failed: bool,
}

impl Shard {
    pub(super) fn request(&mut self, request: Request, checksums: &[Checksum]) {
        request.check();
        if self.failed
            || (!self.volumes.contains(&request.volume) && request.volume <= self.volume_newest)
        {
            self.refuse(request);
            return;
        }
        if request.volume > self.volume_newest {
            // The frontend knows the new volume already; the coordinator's order is on its way.
            self.parked.push(request);
            return;
        }
        match request.operation {
            Operation::Write { buffer } => self.write(request, buffer, checksums),
            Operation::Read { buffer } => self.read(request, buffer),
            Operation::Unmap => self.unmap(request),
            Operation::Status => self.status(request),
        }
    }

    pub(super) fn refuse(&mut self, request: Request) {
        self.end_request(request, Outcome::Failed);
    }

    /// Admits parked requests again.
    pub(super) fn retry_parked(&mut self) {
        for request in std::mem::take(&mut self.parked) {
            self.act(ShardAction::Readmit(request));
        }
    }

    pub(super) fn filled(&mut self, io: IoToken, result: Result<Checksum, IoFailure>) {
        let Work::Fill { cp, key, group } = self.take_work(io) else { panic!("no fill") };
        self.reads.remove(&io);
        let staging = self.stagings.of(cp).expect("a staging waits for its fills");
        if let Some(buffer) = staging.filled(key, result.ok()) {
            self.act(ShardAction::Free(vec![buffer]));
        }
        self.end_part(group, result.is_ok());
        self.leave_limbo();
        self.retry_parked();
    }

    pub(super) fn read_done(&mut self, io: IoToken, result: Result<(), IoFailure>) {
        self.reads.remove(&io);
        match self.take_work(io) {
            Work::Read { group } => self.end_part(group, result.is_ok()),
            Work::CatchUp => self.catch_up_read(result),
            other => panic!("{other:?} is no read"),
        }
        self.leave_limbo();
    }

    fn write(&mut self, request: Request, buffer: BufferId, checksums: &[Checksum]) {
        assert_eq!(checksums.len(), request.blocks() as usize, "a checksum for each block");
        let keys = self.keys(&request);
        if keys.clone().any(|key| self.stagings.is_filling(key)) {
            self.parked.push(request);
            return;
        }
        self.stagings.open(request.stamp);
        if !self.has_room(request, keys.clone()) {
            return;
        }
        let group = self.group_next;
        let mut fills = 0;
        let mut freed = Vec::new();
        let end = request.offset + u64::from(request.length);
        let first = request.first_block().0;
        for (index, key) in keys.enumerate() {
            let start_of_block = (first + index as u64) * BLOCK_BYTES as u64;
            let keep_from = request.offset.saturating_sub(start_of_block) as usize;
            let keep_to = (end - start_of_block).min(BLOCK_BYTES as u64) as usize;
            let buffer = BufferId(buffer.0 + index as u32);
            let partial = keep_to - keep_from < BLOCK_BYTES;
            let source = partial.then(|| self.source(key));
            let staging = self.stagings.newest();
            let cp = staging.cp;
            freed.extend(staging.put(key, buffer, checksums[index], partial));
            if let Some(source) = source {
                fills += 1;
                let io = self.start(Work::Fill { cp, key, group });
                if matches!(source, FillSource::Device(..)) {
                    self.reads.insert(io);
                }
                self.act(ShardAction::Fill { io, buffer, keep: keep_from..keep_to, source });
            }
        }
        if !freed.is_empty() {
            self.act(ShardAction::Free(freed));
        }
        self.begin_group(request.tag, fills);
        self.want_seal_when_full();
    }

    /// Where the old contents of a block are.
    fn source(&self, key: Key) -> FillSource {
        match self.stagings.find(key) {
            Some(Entry::Block { buffer, .. }) => return FillSource::Buffer(buffer),
            Some(Entry::Unmap) => return FillSource::Zero,
            None => {}
        }
        match self.map.get(key.volume, key.block) {
            Some(Slot { block, checksum }) => match self.buffer_in_flight(key, block) {
                Some(buffer) => FillSource::Buffer(buffer),
                None => FillSource::Device(self.geometry.data_block(self.id, block), checksum),
            },
            None => FillSource::Zero,
        }
    }

    fn read(&mut self, request: Request, buffer: BufferId) {
        let keys = self.keys(&request);
        if keys.clone().any(|key| self.stagings.is_filling(key)) {
            self.parked.push(request);
            return;
        }
        let group = self.group_next;
        let mut runs: Vec<(BufferId, u32, Vec<Checksum>)> = Vec::new();
        for (index, key) in keys.enumerate() {
            let to = BufferId(buffer.0 + index as u32);
            match self.source(key) {
                FillSource::Zero => self.act(ShardAction::Zero { buffer: to }),
                FillSource::Buffer(from) => self.act(ShardAction::Copy { from, to }),
                FillSource::Device(block, checksum) => {
                    let start = u32::try_from(block.0 - self.geometry.data_start(self.id).0)
                        .expect("data blocks have 30 bits");
                    match runs.last_mut() {
                        Some((first, data, sums))
                            if first.0 + sums.len() as u32 == to.0
                                && *data + sums.len() as u32 == start =>
                        {
                            sums.push(checksum);
                        }
                        _ => runs.push((to, start, vec![checksum])),
                    }
                }
            }
        }
        let parts = runs.len() as u32;
        for (buffer, start, checksums) in runs {
            let io = self.start(Work::Read { group });
            self.reads.insert(io);
            let block = self.geometry.data_block(self.id, crate::units::DataBlock(start));
            self.act(ShardAction::ReadData { io, block, buffer, checksums });
        }
        self.begin_group(request.tag, parts);
    }

    fn unmap(&mut self, request: Request) {
        let keys = self.keys(&request);
        // Who makes a file system unmaps the whole volume first, of which nothing may have been written yet.
        let segment = self.local(&request).0 / SEGMENT_BLOCKS;
        if self.stagings.is_empty() && !self.map.has_segment(request.volume, segment) {
            self.stagings.open(request.stamp);
            self.begin_group(request.tag, 0);
            return;
        }
        if keys.clone().any(|key| self.stagings.is_filling(key)) {
            self.parked.push(request);
            return;
        }
        self.stagings.open(request.stamp);
        let staged = self.stagings.newest().entries.len();
        if staged + request.blocks() as usize > STAGED_MAX {
            self.park_until_sealed(request);
            return;
        }
        let mut freed = Vec::new();
        for key in keys {
            let older_exists = match self.stagings.find_older(key) {
                Some(Entry::Block { .. }) => true,
                Some(Entry::Unmap) => false,
                None => self.map.get(key.volume, key.block).is_some(),
            };
            freed.extend(self.stagings.newest().unmap(key, older_exists));
        }
        if !freed.is_empty() {
            self.act(ShardAction::Free(freed));
        }
        self.begin_group(request.tag, 0);
        self.want_seal_when_full();
    }

    fn status(&mut self, request: Request) {
        let first = self.local(&request);
        let segment = first.0 / SEGMENT_BLOCKS;
        let mut bits = self.map.mapped_bits(request.volume, segment);
        for index in 0..SEGMENT_BLOCKS {
            let key =
                Key { volume: request.volume, block: LocalBlock(segment * SEGMENT_BLOCKS + index) };
            let (word, bit) = ((index / 64) as usize, 1 << (index % 64));
            match self.stagings.find(key) {
                Some(Entry::Block { .. }) => bits[word] |= bit,
                Some(Entry::Unmap) => bits[word] &= !bit,
                None => {}
            }
        }
        self.act(ShardAction::Answer(Answer {
            tag: request.tag,
            outcome: Outcome::Mapped(Box::new(bits)),
        }));
    }

    /// Whether a write's new blocks have room in the CP, the store and the map; if not, it was parked or answered.
    fn has_room(&mut self, request: Request, keys: impl Iterator<Item = Key>) -> bool {
        let newest = self.stagings.newest();
        let new = keys
            .filter(|key| !matches!(newest.entries.get(key), Some(Entry::Block { .. })))
            .collect::<Vec<_>>();
        if newest.entries.len() + new.len() > STAGED_MAX {
            self.park_until_sealed(request);
            return false;
        }
        let staged = self.stagings.blocks();
        let enough_space = self.free.free_blocks() - staged >= new.len() as u32;
        let segment = new.first().map(|key| SegmentKey::of(key.volume, key.block));
        let enough_segments = segment.is_none_or(|segment| self.has_segment_room(segment));
        if new.is_empty() || (enough_space && enough_segments) {
            self.segments_staged.extend(segment);
            return true;
        }
        let nothing_to_wait_for =
            self.stagings.is_empty() && self.points.is_empty() && self.seals.is_empty();
        if nothing_to_wait_for
            && (!enough_segments || (self.retained.is_empty() && self.limbo.is_empty()))
        {
            self.end_request(request, Outcome::NoSpace);
        } else {
            if nothing_to_wait_for {
                self.tell_what_holds_space();
            }
            self.waiting_for_space.push(request);
            self.want_seal();
        }
        false
    }

    /// After commits: requests that wait for space are admitted again when some came, or when none can come any more.
    /// Not after every commit, for each admission asks for another CP.
    pub(super) fn retry_waiting_for_space(&mut self, came: bool) {
        if self.waiting_for_space.is_empty() {
            return;
        }
        let idle = self.stagings.is_empty() && self.points.is_empty() && self.seals.is_empty();
        let none_comes = idle && self.retained.is_empty() && self.limbo.is_empty();
        if came || none_comes {
            for request in std::mem::take(&mut self.waiting_for_space) {
                self.act(ShardAction::Readmit(request));
            }
        } else if idle {
            self.tell_what_holds_space();
        }
    }

    /// What keeps committed CPs' freed blocks from being reused.
    fn tell_what_holds_space(&mut self) {
        let oldest = self.retained.front().map(|retained| retained.cp);
        let Some(oldest) = oldest.filter(|cp| *cp <= self.committed) else { return };
        if oldest > self.base {
            self.tell(Report::HeldByBase(oldest));
        } else if oldest > self.claimed {
            self.tell(Report::HeldByClaim);
        }
    }

    /// Whether the map has room for all staged blocks and one in this segment. A segment that the map has now may be
    /// gone when its staged blocks come, if an earlier CP empties it: so those that have staged blocks all count.
    fn has_segment_room(&self, segment: SegmentKey) -> bool {
        if self.segments_staged.contains(&segment)
            || !self.map.would_exceed(self.segments_staged.len() + 1)
        {
            return true;
        }
        let missing =
            |segment: &&SegmentKey| !self.map.has_segment(segment.volume, segment.segment);
        let staged = self.segments_staged.iter().filter(missing).count();
        !self.map.would_exceed(staged + usize::from(missing(&&segment)))
    }

    /// Counts anew which segments have staged blocks.
    pub(super) fn recount_segments(&mut self) {
        self.segments_staged.clear();
        self.segments_staged
            .extend(self.stagings.keys().map(|key| SegmentKey::of(key.volume, key.block)));
    }

    fn park_until_sealed(&mut self, request: Request) {
        self.parked.push(request);
        self.want_seal();
    }

    fn want_seal_when_full(&mut self) {
        if self.stagings.newest().entries.len() >= STAGED_WANT_SEAL {
            self.want_seal();
        }
    }

    fn want_seal(&mut self) {
        if !self.want_seal_told {
            self.want_seal_told = true;
            self.tell(Report::WantSeal);
        }
    }

    fn begin_group(&mut self, tag: Tag, outstanding: u32) {
        if outstanding == 0 {
            self.act(ShardAction::Answer(Answer { tag, outcome: Outcome::Done }));
            return;
        }
        self.groups.insert(self.group_next, Group { tag, outstanding, failed: false });
        self.group_next += 1;
    }

    fn end_part(&mut self, id: u64, ok: bool) {
        let group = self.groups.get_mut(&id).expect("a group lives until its last part");
        group.outstanding -= 1;
        group.failed |= !ok;
        if group.outstanding == 0 {
            let outcome = if group.failed { Outcome::Failed } else { Outcome::Done };
            let tag = group.tag;
            self.groups.remove(&id);
            self.act(ShardAction::Answer(Answer { tag, outcome }));
        }
    }

    fn end_request(&mut self, request: Request, outcome: Outcome) {
        if let Operation::Write { buffer } = request.operation {
            let buffers = (buffer.0..buffer.0 + request.blocks()).map(BufferId).collect();
            self.act(ShardAction::Free(buffers));
        }
        self.act(ShardAction::Answer(Answer { tag: request.tag, outcome }));
    }

    fn local(&self, request: &Request) -> LocalBlock {
        let (shard, local) = locate(request.volume, request.first_block(), self.geometry.shards);
        assert_eq!(shard, self.id, "a request of another shard");
        local
    }

    fn keys(&self, request: &Request) -> impl Iterator<Item = Key> + Clone + use<> {
        let first = self.local(request).0;
        let volume = request.volume;
        (first..first + u64::from(request.blocks()))
            .map(move |block| Key { volume, block: LocalBlock(block) })
    }
}
