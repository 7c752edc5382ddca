//! Step 4 of the flow, the wire's half: the primary's lane sends each CP's data and record to the same shard of the
//! secondary, in CP order, whether from memory or, for a peer that fell behind, from the store.
//!
//! Invariants: nothing is placed without room that the peer lent (credit); a CP's data is sent before its record; a
//! CP that is read back from the store is checked against its record and its checksums first (R10).

use std::collections::VecDeque;

use super::point::chunks;
use super::{Shard, Work};
use crate::contract::{IoFailure, LaneFault, Report, ShardAction};
use crate::data_run::DataRun;
use crate::message::{DATA_BLOCKS_PER_MESSAGE_MAX, LaneMessage, PART_BYTES_MAX, Role};
use crate::record::Record;
use crate::units::{BufferId, Checksum, CpNumber, DataBlock, Root};

/// Blocks queued for a slow peer; beyond that CPs are read back from the store when their turn comes.
const QUEUED_BLOCKS_MAX: u32 = 8192;

/// Blocks read back and not sent yet: a slow peer must not take the memory that clients need.
const CATCH_UP_BLOCKS_MAX: u32 = 1024;

/// The lane of one session.
#[derive(Debug)]
pub(super) struct Lane {
    /// Blocks that the peer lends, used as a ring.
    lent_blocks: u32,
    head: u32,
    used: u32,
    /// Blocks taken by each placement that the peer has not released, with those left out at the ring's end.
    placements: VecDeque<u32>,
    /// The last CP that was queued whole.
    cursor: CpNumber,
    queue: VecDeque<Outgoing>,
    queued_blocks: u32,
    catch_up: Option<CatchUp>,
    caught_up_told: bool,
}

#[derive(Debug)]
enum Outgoing {
    Data {
        cp: CpNumber,
        first: DataBlock,
        buffers: Vec<BufferId>,
        checksums: Vec<Checksum>,
        borrowed: bool,
    },
    Record {
        cp: CpNumber,
        bytes: Vec<u8>,
    },
}

/// A CP that is read back from the store.
#[derive(Debug)]
struct CatchUp {
    cp: CpNumber,
    /// Known once the record was read.
    record: Option<Record>,
    /// Data runs not read yet, next one last.
    runs: Vec<DataRun>,
    /// Blocks of the record's runs read so far.
    done: usize,
    /// Buffers of the read under way.
    reading: Vec<BufferId>,
    /// Waits until some of what it read was sent.
    paused: bool,
}

impl Shard {
    pub(super) fn lane_up(
        &mut self,
        lend: (BufferId, u32),
        lent_blocks: u32,
        from: CpNumber,
        root: Root,
    ) {
        assert!(
            !self.session_ending && self.lane.is_none(),
            "a session follows the end of the last"
        );
        if self.role == Role::Secondary {
            self.follower.begin(lend, self.last);
            return;
        }
        let ours = self.journal.root_at(from);
        if ours != root {
            self.tell(Report::Diverged { cp: from, segments: Vec::new() });
            return;
        }
        self.lane = Some(Lane {
            lent_blocks,
            head: 0,
            used: 0,
            placements: VecDeque::new(),
            cursor: from,
            queue: VecDeque::new(),
            queued_blocks: 0,
            catch_up: None,
            caught_up_told: false,
        });
    }

    /// Sends what has room, and queues the next CPs.
    pub(super) fn pump_lane(&mut self) {
        loop {
            self.post_queued();
            let Some(lane) = &mut self.lane else { return };
            if lane.queued_blocks >= QUEUED_BLOCKS_MAX {
                return;
            }
            if let Some(catch_up) = &mut lane.catch_up {
                if std::mem::take(&mut catch_up.paused) {
                    self.catch_up_next();
                }
                return;
            }
            let Some(entry) = self.journal.entry_after(lane.cursor).copied() else {
                if !std::mem::replace(&mut lane.caught_up_told, true) {
                    self.tell(Report::CaughtUp);
                }
                return;
            };
            if self.points.iter().any(|point| point.cp == entry.cp) {
                self.queue_point(entry.cp);
            } else {
                lane.catch_up = Some(CatchUp {
                    cp: entry.cp,
                    record: None,
                    runs: Vec::new(),
                    done: 0,
                    reading: Vec::new(),
                    paused: false,
                });
                let block = self.geometry.journal_block(self.id, entry.start);
                let io = self.start(Work::CatchUp);
                self.act(ShardAction::ReadMetadata { io, block, count: entry.blocks });
                return;
            }
        }
    }

    /// A message of the peer's shard.
    pub(super) fn lane_message(&mut self, bytes: &[u8], placed: Option<(BufferId, u32)>) {
        if self.session_ending || self.lane_faulted {
            return;
        }
        let Ok(message) = LaneMessage::decode(bytes) else {
            self.close_lane(LaneFault::Protocol("unreadable lane message"));
            return;
        };
        if self.role == Role::Secondary && self.must_hold(&message) {
            self.hold_message(message, placed);
            return;
        }
        self.take_lane_message(message, placed);
    }

    /// Acts on a message whose turn has come.
    pub(super) fn take_lane_message(
        &mut self,
        message: LaneMessage,
        placed: Option<(BufferId, u32)>,
    ) {
        let result = match (self.role, message) {
            (Role::Primary, LaneMessage::Credit { term, placements }) if term == self.term => {
                self.credit(placements)
            }
            (Role::Secondary, LaneMessage::Data { term, cp, base: _, first, checksums })
                if term == self.term =>
            {
                self.receive_data(cp, first, checksums, placed)
            }
            (Role::Secondary, LaneMessage::Part { term, cp, total, bytes })
                if term == self.term =>
            {
                self.receive_part(cp, total, &bytes)
            }
            _ => Err("lane message of another term or role"),
        };
        if let Err(reason) = result {
            self.close_lane(LaneFault::Protocol(reason));
        }
    }

    /// Nothing more of the peer's is believed in this session.
    pub(super) fn close_lane(&mut self, fault: LaneFault) {
        if !std::mem::replace(&mut self.lane_faulted, true) {
            self.act(ShardAction::CloseLane(fault));
        }
    }

    pub(super) fn catch_up_record(&mut self, result: Result<Vec<u8>, IoFailure>) {
        let Some(lane) = self.lane.as_mut().filter(|_| !self.session_ending) else { return };
        let catch_up = lane.catch_up.as_mut().expect("a read of it ended");
        let record = result.ok().and_then(|bytes| Record::decode(&bytes).ok());
        let Some(record) =
            record.filter(|record| record.cp == catch_up.cp && record.shard == self.id)
        else {
            self.close_lane(LaneFault::Checksum);
            return;
        };
        catch_up.runs = chunks(&record.runs, placement_max(lane.lent_blocks)).collect();
        catch_up.runs.reverse();
        catch_up.record = Some(record);
        self.catch_up_next();
    }

    pub(super) fn catch_up_borrowed(&mut self, first: BufferId, count: u32) {
        let buffers = (first.0..first.0 + count).map(BufferId);
        let Some(lane) = self.lane.as_mut().filter(|_| !self.session_ending) else {
            self.act(ShardAction::Free(buffers.collect()));
            return;
        };
        let catch_up = lane.catch_up.as_mut().expect("buffers were borrowed for it");
        let run = catch_up.runs.last_mut().expect("buffers were borrowed for it");
        assert!(count > 0 && count <= run.count, "{count} buffers for {} blocks", run.count);
        let record = catch_up.record.as_ref().expect("its record was read");
        let checksums = record.checksums[catch_up.done..catch_up.done + count as usize].to_vec();
        let block = self.geometry.data_block(self.id, run.first);
        catch_up.reading = buffers.collect();
        let io = self.start(Work::CatchUp);
        self.reads.insert(io);
        self.act(ShardAction::ReadData { io, block, buffer: first, checksums });
    }

    pub(super) fn catch_up_read(&mut self, result: Result<(), IoFailure>) {
        let Some(lane) = self.lane.as_mut() else { panic!("a session ends after its reads") };
        let catch_up = lane.catch_up.as_mut().expect("a read of it ended");
        let buffers = std::mem::take(&mut catch_up.reading);
        if self.session_ending {
            self.act(ShardAction::Free(buffers));
            return;
        }
        if result.is_err() {
            self.act(ShardAction::Free(buffers));
            self.close_lane(LaneFault::Checksum);
            return;
        }
        let record = catch_up.record.as_ref().expect("its record was read");
        let run = catch_up.runs.last_mut().expect("a read of it ended");
        let count = buffers.len();
        let checksums = record.checksums[catch_up.done..catch_up.done + count].to_vec();
        let (cp, first) = (catch_up.cp, run.first);
        catch_up.done += count;
        run.first.0 += count as u32;
        run.count -= count as u32;
        if run.count == 0 {
            catch_up.runs.pop();
        }
        lane.queued_blocks += count as u32;
        lane.queue.push_back(Outgoing::Data { cp, first, buffers, checksums, borrowed: true });
        self.catch_up_next();
    }

    /// Ends the session once nothing of it is under way.
    pub(super) fn end_session_when_idle(&mut self) {
        if !self.session_ending {
            return;
        }
        self.drop_lane_queue();
        let waits_to_apply = !self.follower.applies.is_empty();
        let busy = waits_to_apply
            || self.work.values().any(|work| {
                matches!(
                    work,
                    Work::PostPoint(_)
                        | Work::PostBorrowed(_)
                        | Work::PostMessage
                        | Work::CatchUp
                        | Work::Verify
                        | Work::FollowerWrite { .. }
                )
            });
        if waits_to_apply && self.work.is_empty() && !std::mem::replace(&mut self.stuck_told, true)
        {
            self.tell(Report::Stuck);
        }
        if !busy {
            self.lane = None;
            self.session_ending = false;
            self.lane_faulted = false;
            self.forget_arrived();
            self.tell(Report::SessionEnded);
        }
    }

    fn drop_lane_queue(&mut self) {
        let Some(lane) = &mut self.lane else { return };
        let mut freed = Vec::new();
        for outgoing in std::mem::take(&mut lane.queue) {
            match outgoing {
                Outgoing::Data { buffers, borrowed: true, .. } => freed.extend(buffers),
                Outgoing::Data { cp, .. } => {
                    let point = self.points.iter_mut().find(|point| point.cp == cp);
                    point.expect("a point stays while the lane needs it").posts -= 1;
                }
                Outgoing::Record { .. } => {}
            }
        }
        lane.queued_blocks = 0;
        if !freed.is_empty() {
            self.act(ShardAction::Free(freed));
        }
        self.free_points();
    }

    /// Queues a CP whose buffers are still held.
    fn queue_point(&mut self, cp: CpNumber) {
        let point = self.points.iter_mut().find(|point| point.cp == cp).expect("it was there");
        let lane = self.lane.as_mut().expect("the caller has a lane");
        let mut start = 0;
        for run in chunks(&point.record.runs, placement_max(lane.lent_blocks)) {
            let end = start + run.count as usize;
            lane.queue.push_back(Outgoing::Data {
                cp,
                first: run.first,
                buffers: point.blocks[start..end].iter().map(|(_, buffer, _)| *buffer).collect(),
                checksums: point.record.checksums[start..end].to_vec(),
                borrowed: false,
            });
            lane.queued_blocks += run.count;
            point.posts += 1;
            start = end;
        }
        lane.queue.push_back(Outgoing::Record { cp, bytes: point.record.encode_wire() });
        lane.cursor = cp;
    }

    fn catch_up_next(&mut self) {
        let lane = self.lane.as_mut().expect("the caller has a lane");
        let catch_up = lane.catch_up.as_mut().expect("the caller is at it");
        if lane.queued_blocks >= CATCH_UP_BLOCKS_MAX {
            catch_up.paused = true;
            return;
        }
        if let Some(run) = catch_up.runs.last() {
            let want = run.count;
            let io = self.start(Work::CatchUp);
            self.act(ShardAction::Borrow { io, want });
            return;
        }
        let record = catch_up.record.take().expect("its record was read");
        lane.queue.push_back(Outgoing::Record { cp: record.cp, bytes: record.encode_wire() });
        lane.cursor = record.cp;
        lane.catch_up = None;
    }

    fn post_queued(&mut self) {
        if self.session_ending {
            return;
        }
        while let Some(lane) = &mut self.lane {
            match lane.queue.front() {
                Some(Outgoing::Data { buffers, .. }) => {
                    let Some(target) = lane.place(buffers.len() as u32) else { return };
                    let Some(Outgoing::Data { cp, first, buffers, checksums, borrowed }) =
                        lane.queue.pop_front()
                    else {
                        unreachable!("it was the front");
                    };
                    lane.queued_blocks -= buffers.len() as u32;
                    let work = if borrowed {
                        Work::PostBorrowed(buffers.clone())
                    } else {
                        Work::PostPoint(cp)
                    };
                    let (term, base) = (self.term, self.base);
                    let message = LaneMessage::Data { term, cp, base, first, checksums }.encode();
                    let io = self.start(work);
                    self.act(ShardAction::Post { io, message, placement: Some((buffers, target)) });
                }
                Some(Outgoing::Record { .. }) => {
                    let Some(Outgoing::Record { cp, bytes }) = lane.queue.pop_front() else {
                        unreachable!("it was the front");
                    };
                    let total = u32::try_from(bytes.len()).expect("bounded by the record's limits");
                    for part in bytes.chunks(PART_BYTES_MAX) {
                        let message =
                            LaneMessage::Part { term: self.term, cp, total, bytes: part.to_vec() };
                        self.post_message(&message);
                    }
                }
                None => return,
            }
        }
    }

    pub(super) fn post_message(&mut self, message: &LaneMessage) {
        let io = self.start(Work::PostMessage);
        self.act(ShardAction::Post { io, message: message.encode(), placement: None });
    }

    fn credit(&mut self, placements: u32) -> Result<(), &'static str> {
        let lane = self.lane.as_mut().ok_or("credit without a lane")?;
        for _ in 0..placements {
            lane.used -= lane.placements.pop_front().ok_or("more credit than placements")?;
        }
        Ok(())
    }
}

/// Most blocks of one write command to a peer that lends so many: half, so that a ring with nothing in it has room.
fn placement_max(lent_blocks: u32) -> u32 {
    (lent_blocks / 2).clamp(1, DATA_BLOCKS_PER_MESSAGE_MAX)
}

impl Lane {
    /// Room for consecutive blocks in the peer's lent memory: the first block's index there.
    fn place(&mut self, count: u32) -> Option<u32> {
        assert!(count <= placement_max(self.lent_blocks), "a write command of {count} blocks");
        let room = self.lent_blocks - self.head;
        let left_out = if count <= room { 0 } else { room };
        if self.used + left_out + count > self.lent_blocks {
            return None;
        }
        let target = if left_out == 0 { self.head } else { 0 };
        self.used += left_out + count;
        self.placements.push_back(left_out + count);
        self.head = (target + count) % self.lent_blocks;
        Some(target)
    }
}
