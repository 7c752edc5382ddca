//! Step 5 of the flow, the secondary: receives write commands and records, writes the blocks, and once the CP is whole
//! updates its map, compares the root and writes its own record.
//!
//! It never searches, never compares data, never allocates. Invariants: a block that the map or a retained CP uses is
//! never written (R1), whatever the primary says; the map moves only for a CP of which every shard has everything
//! (R3); a root that differs is never recorded (R6).

use std::collections::{HashMap, VecDeque};

use super::{Shard, Work};
use crate::contract::{IoFailure, LaneFault, Report, ShardAction};
use crate::data_run::DataRun;
use crate::hash::FastHash;
use crate::message::{DIVERGED_SEGMENTS_MAX, LaneMessage};
use crate::record::Record;
use crate::recovery::segments_exceed;
use crate::units::{BufferId, Checksum, CpNumber, DataBlock, Root, VolumeId};

/// Most messages that wait for a base: many more than a primary sends before it told the coordinator.
const HELD_MESSAGES_MAX: usize = 16_384;

/// What the secondary's half of a session holds.
#[derive(Debug, Default)]
pub(super) struct Follower {
    lend: (BufferId, u32),
    /// Placements not released yet, oldest first, and whether each is done with.
    placements: VecDeque<bool>,
    placement_first: u64,
    /// Messages that wait for the coordinator's word of a newer base.
    held: VecDeque<(LaneMessage, Option<(BufferId, u32)>)>,
    /// The CP that arrives.
    building: Option<Incoming>,
    /// Whole CPs that wait for the order to apply.
    arrived: VecDeque<Incoming>,
    /// Orders to apply that wait for room in the journal.
    pub(super) applies: VecDeque<CpNumber>,
    /// Applied CPs, with their writes under way.
    applied: HashMap<CpNumber, u32, FastHash>,
    /// A root differed: nothing is applied any more (R6).
    diverged: bool,
    /// The last CP whose record arrived, and its root.
    expected: (CpNumber, Root),
    /// The check under way: what to write if it succeeds.
    checking: Option<(CpNumber, u64, DataRun, BufferId)>,
}

/// One CP as far as it has arrived.
#[derive(Debug)]
struct Incoming {
    cp: CpNumber,
    runs: Vec<DataRun>,
    checksums: Vec<Checksum>,
    bytes: Vec<u8>,
    record: Option<Record>,
    writes: u32,
}

impl Follower {
    pub(super) fn begin(&mut self, lend: (BufferId, u32), last: CpNumber) {
        assert!(
            self.building.is_none() && self.arrived.is_empty(),
            "the last session left something"
        );
        assert!(self.placements.is_empty(), "the last session left placements");
        self.lend = lend;
        self.expected = (last, Root::default());
    }

    pub(super) fn is_idle(&self) -> bool {
        self.building.is_none()
            && self.arrived.is_empty()
            && self.applied.is_empty()
            && self.applies.is_empty()
    }
}

impl Shard {
    pub(super) fn receive_data(
        &mut self,
        cp: CpNumber,
        first: DataBlock,
        checksums: Vec<Checksum>,
        placed: Option<(BufferId, u32)>,
    ) -> Result<(), &'static str> {
        let (buffer, count) = placed.ok_or("data without bytes")?;
        if count as usize != checksums.len() {
            return Err("as many bytes as checksums are wanted");
        }
        let run = DataRun { first, count };
        if run.end() > u64::from(self.geometry.data_blocks()) {
            return Err("data outside of the shard's region");
        }
        if run.blocks().any(|block| self.free.is_used(block)) {
            return Err("a write command for a block in use");
        }
        self.incoming(cp)?;
        run.blocks().for_each(|block| self.free.mark_used(block));
        let follower = &mut self.follower;
        let placement = follower.placement_first + follower.placements.len() as u64;
        follower.placements.push_back(false);
        let incoming = follower.building.as_mut().expect("it was just looked up");
        incoming.runs.push(run);
        incoming.checksums.extend_from_slice(&checksums);
        assert!(follower.checking.is_none(), "a check is answered at once");
        follower.checking = Some((cp, placement, run, buffer));
        let io = self.start(Work::Verify);
        self.act(ShardAction::Verify { io, buffer, checksums });
        Ok(())
    }

    /// Whether a message must wait: for an earlier one, or because its blocks are free as of a base that the
    /// coordinator, which hears of it on another wire, has not told this shard yet, or has not claimed durably.
    pub(super) fn must_hold(&self, message: &LaneMessage) -> bool {
        if !self.follower.held.is_empty() {
            return true;
        }
        let LaneMessage::Data { base, first, checksums, .. } = message else { return false };
        let run = DataRun { first: *first, count: checksums.len() as u32 };
        let is_inside = run.end() <= u64::from(self.geometry.data_blocks());
        *base > self.floor() && is_inside && run.blocks().any(|block| self.free.is_used(block))
    }

    pub(super) fn hold_message(&mut self, message: LaneMessage, placed: Option<(BufferId, u32)>) {
        if self.follower.held.len() >= HELD_MESSAGES_MAX {
            self.close_lane(LaneFault::Protocol("a base that never comes"));
            return;
        }
        self.follower.held.push_back((message, placed));
        self.tell_what_holds_message();
    }

    /// The next record would claim what a message waits for, and comes after it.
    pub(super) fn tell_what_holds_message(&mut self) {
        let Some((LaneMessage::Data { base, .. }, _)) = self.follower.held.front() else { return };
        if *base <= self.base && *base > self.claimed {
            self.tell(Report::HeldByClaim);
        }
    }

    /// Acts on the oldest message that waited if it need not wait any more. Tells whether it did.
    pub(super) fn take_held_message(&mut self) -> bool {
        if self.follower.checking.is_some() || self.session_ending || self.lane_faulted {
            return false;
        }
        let Some((message, placed)) = self.follower.held.pop_front() else { return false };
        let rest = std::mem::take(&mut self.follower.held);
        let waits = self.must_hold(&message);
        self.follower.held = rest;
        if waits {
            self.follower.held.push_front((message, placed));
            return false;
        }
        self.take_lane_message(message, placed);
        true
    }

    /// The placed bytes were compared with their checksums.
    pub(super) fn verified(&mut self, result: Result<(), IoFailure>) {
        let (cp, placement, run, buffer) =
            self.follower.checking.take().expect("a check was asked for");
        if result.is_err() {
            self.close_lane(LaneFault::Checksum);
            return;
        }
        let incoming = self.follower.building.as_mut().expect("checks are answered at once");
        incoming.writes += 1;
        let buffers = (buffer.0..buffer.0 + run.count).map(BufferId).collect();
        let io = self.start(Work::FollowerWrite { cp, placement });
        let block = self.geometry.data_block(self.id, run.first);
        self.act(ShardAction::WriteData { io, block, buffers });
    }

    pub(super) fn receive_part(
        &mut self,
        cp: CpNumber,
        total: u32,
        bytes: &[u8],
    ) -> Result<(), &'static str> {
        let store = self.store;
        let (id, term) = (self.id, self.term);
        let before = self.expected_root();
        let incoming = self.incoming(cp)?;
        incoming.bytes.extend_from_slice(bytes);
        if incoming.bytes.len() > total as usize {
            return Err("a record longer than announced");
        }
        if incoming.bytes.len() < total as usize {
            return Ok(());
        }
        let mut record =
            Record::decode_wire(&incoming.bytes).map_err(|_| "an unreadable record")?;
        let blocks: u64 = incoming.runs.iter().map(|run| u64::from(run.count)).sum();
        if (record.store, record.shard, record.term.0 <= term.0) != (store, id, true)
            || record.cp != cp
        {
            return Err("a record of another shard, store, term or CP");
        }
        if record.delta.mapped_count() != blocks {
            return Err("a record that does not fit its data");
        }
        if record.root_before != before {
            return Err("a record that does not follow the last one");
        }
        incoming.bytes = Vec::new();
        record.runs = merged(&incoming.runs);
        record.checksums = std::mem::take(&mut incoming.checksums);
        let report = Report::Arrived {
            cp,
            participants: record.participants,
            committed: record.committed,
            base: record.base,
            catalog: record.catalog.clone(),
        };
        self.follower.expected = (cp, record.root_after);
        let mut incoming = self.follower.building.take().expect("it was just looked up");
        incoming.record = Some(record);
        self.follower.arrived.push_back(incoming);
        self.tell(report);
        Ok(())
    }

    /// Applies the next CP that the coordinator found whole, if the journal has room for its record.
    pub(super) fn apply_next(&mut self) -> bool {
        if self.follower.diverged {
            // What was ordered before the coordinator heard of it; nothing of it is ever applied.
            self.follower.applies.clear();
            return false;
        }
        let Some(cp) = self.follower.applies.front().copied() else { return false };
        let incoming = self.follower.arrived.front().expect("a CP is applied after it arrived");
        let record = incoming.record.as_ref().expect("it arrived");
        assert_eq!(record.cp, cp, "CPs are applied in order");
        let unmapped: u64 =
            record.delta.volumes.iter().map(|delta| delta.unmapped.len() as u64).sum();
        if !self.has_journal_room(record.checksums.len() + unmapped as usize) {
            return false;
        }
        self.follower.applies.pop_front();
        let incoming = self.follower.arrived.pop_front().expect("it was there");
        self.apply(incoming);
        true
    }

    pub(super) fn follower_written(&mut self, cp: CpNumber, placement: u64) {
        self.release_placement(placement);
        let follower = &mut self.follower;
        let waiting =
            follower.building.iter_mut().chain(&mut follower.arrived).find(|i| i.cp == cp);
        match waiting {
            Some(incoming) => incoming.writes -= 1,
            None => self.applied_written(cp),
        }
    }

    /// Data or the record of an applied CP was written.
    pub(super) fn applied_written(&mut self, cp: CpNumber) {
        let Some(writes) = self.follower.applied.get_mut(&cp) else {
            assert!(
                self.session_ending || self.follower.diverged,
                "a write of an unknown CP ended"
            );
            return;
        };
        *writes -= 1;
        if *writes == 0 {
            self.follower.applied.remove(&cp);
            self.tell(Report::Written { cp });
        }
    }

    /// What arrived and was not applied is forgotten; its blocks are free again.
    pub(super) fn forget_arrived(&mut self) {
        let follower = &mut self.follower;
        follower.applies.clear();
        follower.placements.clear();
        follower.held.clear();
        follower.checking = None;
        for incoming in follower.building.take().into_iter().chain(follower.arrived.drain(..)) {
            for block in incoming.runs.iter().flat_map(DataRun::blocks) {
                self.free.release(block);
            }
        }
    }

    /// The CP is not applied, and none after it; its blocks are free again when the session has ended.
    fn diverge(&mut self, incoming: Incoming, segments: Vec<(VolumeId, u64, Root)>) {
        let cp = incoming.cp;
        self.follower.diverged = true;
        self.follower.arrived.push_front(incoming);
        self.tell(Report::Diverged { cp, segments });
    }

    fn apply(&mut self, mut incoming: Incoming) {
        let cp = incoming.cp;
        let mut record = incoming.record.take().expect("a CP is applied after it arrived");
        assert_eq!(self.root(), record.root_before, "checked when the record arrived");
        if segments_exceed(&self.map, &record.delta) {
            self.diverge(incoming, Vec::new());
            return;
        }
        let catalog_root_before = self.catalog_root;
        let changes = self.update_map(&record.delta, &record.runs, &record.checksums);
        if let Some(catalog) = &record.catalog {
            self.catalog_root = catalog.root();
        }
        if self.root() != record.root_after {
            let segments = self.touched_segments(&record);
            self.revert_map(&changes);
            self.catalog_root = catalog_root_before;
            self.diverge(incoming, segments);
            return;
        }
        if let Some(catalog) = record.catalog.clone() {
            self.checkpoint.set_catalog(catalog);
        }
        self.retain(cp, &changes);
        self.last = cp;
        record.sequence = self.journal.sequence();
        record.previous = self.journal.previous();
        record.committed = self.committed;
        record.base = self.base;
        self.follower.applied.insert(cp, incoming.writes + 1);
        self.write_record(&record);
        self.tell(Report::Applied { cp, root: record.root_after });
    }

    fn touched_segments(&self, record: &Record) -> Vec<(VolumeId, u64, Root)> {
        let mut segments = Vec::new();
        for delta in &record.delta.volumes {
            for run in delta.mapped.iter().chain(&delta.unmapped) {
                let number = run.first.0 / crate::units::SEGMENT_BLOCKS;
                let hash =
                    self.map.segment(delta.volume, number).map_or(0, |segment| segment.hash());
                let named = (delta.volume, number, Root(hash));
                if !segments.contains(&named) && segments.len() < DIVERGED_SEGMENTS_MAX {
                    segments.push(named);
                }
            }
        }
        segments
    }

    fn expected_root(&self) -> Root {
        if self.follower.arrived.is_empty() && self.follower.expected.0 <= self.last {
            self.root()
        } else {
            self.follower.expected.1
        }
    }

    fn incoming(&mut self, cp: CpNumber) -> Result<&mut Incoming, &'static str> {
        let follower = &mut self.follower;
        if follower.building.is_none() {
            if cp <= follower.expected.0 {
                return Err("a CP that is here already");
            }
            let (runs, checksums, bytes) = (Vec::new(), Vec::new(), Vec::new());
            follower.building =
                Some(Incoming { cp, runs, checksums, bytes, record: None, writes: 0 });
        }
        follower
            .building
            .as_mut()
            .filter(|incoming| incoming.cp == cp)
            .ok_or("a CP before the last one ended")
    }

    /// Tells the primary of placements that it may use again.
    fn release_placement(&mut self, placement: u64) {
        let follower = &mut self.follower;
        let index = (placement - follower.placement_first) as usize;
        follower.placements[index] = true;
        let mut placements = 0;
        while follower.placements.front() == Some(&true) {
            follower.placements.pop_front();
            follower.placement_first += 1;
            placements += 1;
        }
        if placements > 0 && !self.session_ending {
            let term = self.term;
            self.post_message(&LaneMessage::Credit { term, placements });
        }
    }
}

/// The runs with neighbours joined, as the primary recorded them.
fn merged(runs: &[DataRun]) -> Vec<DataRun> {
    let mut merged: Vec<DataRun> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.end() == u64::from(run.first.0) => last.count += run.count,
            _ => merged.push(*run),
        }
    }
    merged
}
