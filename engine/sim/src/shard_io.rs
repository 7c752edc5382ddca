//! The shell's side of a shard: feeds it events, carries out its actions.
//!
//! Invariants: actions are carried out in order; copies, zeroings, checks of buffers and fills from memory are done at
//! once, and what answers them is the shard's next event; buffers named by work under way do not change.

use std::collections::VecDeque;
use std::rc::Rc;

use twinpoint_core::contract::{
    CoordinatorEvent, FillSource, IoFailure, IoToken, LaneFault, Report, ShardAction, ShardEvent,
};
use twinpoint_core::data_run::DataRun;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::Role;
use twinpoint_core::record::Record;
use twinpoint_core::request::{Operation as RequestOperation, Request};
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Checksum, DataBlock, DeviceBlock, ShardId};

use crate::content::{Block, checksum, zero_block};
use crate::node::{Kind, Operation, Process, Queue};
use crate::wire::WireEvent;
use crate::world::{Event, NodeEvent, World};

/// What answers an action done at once.
enum Immediate {
    Verified(IoToken, Result<(), IoFailure>),
    Filled(IoToken, Checksum),
}

impl World {
    /// Feeds a shard an event and does all that it then wants.
    pub fn feed_shard(&mut self, node: usize, shard: ShardId, event: ShardEvent<'_>) {
        self.process(node).shards[usize::from(shard.0)].handle(event);
        let mut immediates = VecDeque::new();
        loop {
            while self.is_alive(node) {
                let Some(action) = self.process(node).shards[usize::from(shard.0)].poll_action()
                else {
                    break;
                };
                self.shard_action(node, shard, action, &mut immediates);
            }
            let Some(immediate) = immediates.pop_front() else { return };
            let event = match immediate {
                Immediate::Verified(io, result) => ShardEvent::Done { io, result },
                Immediate::Filled(io, checksum) => ShardEvent::Filled { io, result: Ok(checksum) },
            };
            self.process(node).shards[usize::from(shard.0)].handle(event);
        }
    }

    /// A frontend's request comes out of the ring.
    pub fn deliver_request(&mut self, node: usize, shard: ShardId, request: Request) {
        let process = self.process(node);
        let checksums: Vec<Checksum> = match request.operation {
            RequestOperation::Write { buffer } => {
                let buffers = (buffer.0..buffer.0 + request.blocks()).map(BufferId);
                buffers.map(|buffer| checksum(&process.buffers.get(buffer)[..])).collect()
            }
            _ => Vec::new(),
        };
        self.feed_shard(node, shard, ShardEvent::Request { request, checksums: &checksums });
    }

    /// Device work of a machine ends.
    pub fn disk_done(&mut self, node: usize, id: u64) {
        let operation =
            self.process(node).operations.remove(&id).expect("it was begun in this life");
        let Operation { shard, io, kind } = operation;
        let writes =
            !matches!(kind, Kind::ReadData { .. } | Kind::ReadMetadata | Kind::Fill { .. });
        if writes && std::mem::take(&mut self.process(node).is_failing) {
            self.fail_operation(node, id, shard, io);
            return;
        }
        let Some(shard) = shard else {
            self.coordinator_disk_done(node, id, io, &kind);
            return;
        };
        let (disk, process) = self.disk_and_process(node);
        match kind {
            Kind::WriteData { buffers } => {
                let given = disk.given(id);
                for (buffer, block) in buffers.iter().zip(given) {
                    let same = Rc::ptr_eq(process.buffers.get(*buffer), block)
                        || process.buffers.get(*buffer) == block;
                    assert!(same, "buffer {buffer} changed while it was written to the device");
                }
                disk.end_write(id);
                self.images.ended(node, id, self.nodes[node].disk.flush_mark());
                self.feed_shard(node, shard, ShardEvent::Done { io, result: Ok(()) });
            }
            Kind::WriteMetadata => {
                disk.end_write(id);
                self.images.ended(node, id, self.nodes[node].disk.flush_mark());
                self.feed_shard(node, shard, ShardEvent::Done { io, result: Ok(()) });
            }
            Kind::Flush { mark } => {
                self.flushed(node, mark);
                self.feed_shard(node, shard, ShardEvent::Done { io, result: Ok(()) });
            }
            Kind::ReadMetadata => {
                let bytes =
                    disk.end_read(id).iter().flat_map(|block| block.iter().copied()).collect();
                self.feed_shard(node, shard, ShardEvent::MetadataRead { io, result: Ok(bytes) });
            }
            Kind::ReadData { buffer, checksums } => {
                for (index, (block, sum)) in
                    disk.end_read(id).into_iter().zip(&checksums).enumerate()
                {
                    assert_eq!(
                        checksum(&block[..]),
                        *sum,
                        "a block read from the store does not match"
                    );
                    process.buffers.set(BufferId(buffer.0 + index as u32), block);
                }
                self.feed_shard(node, shard, ShardEvent::Read { io, result: Ok(()) });
            }
            Kind::Fill { buffer, keep, checksum: expected } => {
                let source = disk.end_read(id).pop().expect("one block was read");
                assert_eq!(
                    checksum(&source[..]),
                    expected,
                    "a block read from the store does not match"
                );
                let sum = fill(process, buffer, &keep, &source);
                self.feed_shard(node, shard, ShardEvent::Filled { io, result: Ok(sum) });
            }
        }
    }

    /// A write or a flush ends badly; of a write nothing is known.
    fn fail_operation(&mut self, node: usize, id: u64, shard: Option<ShardId>, io: IoToken) {
        self.counts.device_failures += 1;
        self.process(node).has_failed = true;
        self.nodes[node].disk.abandon_write(id, &mut self.random);
        let result = Err(IoFailure::Device);
        match shard {
            Some(shard) => self.feed_shard(node, shard, ShardEvent::Done { io, result }),
            None => self.feed_coordinator(node, CoordinatorEvent::Done { io, result }),
        }
    }

    /// Buffers that a shard asked for are there, or it waits on.
    pub fn borrow(&mut self, node: usize, shard: ShardId, io: IoToken, want: u32) {
        let mut random = self.random.clone();
        let borrowed = self.process(node).buffers.borrow(want, shard.0, &mut random);
        self.random = random;
        match borrowed {
            Some((first, count)) => {
                self.feed_shard(node, shard, ShardEvent::Borrowed { io, first, count })
            }
            None => {
                let life = self.nodes[node].life;
                self.soon(50_000, Event::Node(node, life, NodeEvent::Borrow(shard, io, want)));
            }
        }
    }

    /// The wire no longer needs a post's bytes.
    pub fn posted(&mut self, node: usize, shard: ShardId, io: IoToken) {
        if self.process(node).posts.remove(&(shard.0, io)) {
            self.feed_shard(node, shard, ShardEvent::Posted { io });
        }
    }

    pub fn begin_operation(&mut self, node: usize, delay_ns: u64, operation: Operation) -> u64 {
        let id = self.operation_next;
        self.operation_next += 1;
        let life = self.nodes[node].life;
        self.process(node).operations.insert(id, operation);
        self.soon(delay_ns, Event::Node(node, life, NodeEvent::Disk(id)));
        id
    }

    pub fn disk_and_process(&mut self, node: usize) -> (&mut crate::disk::Disk, &mut Process) {
        let node = &mut self.nodes[node];
        (&mut node.disk, node.process.as_mut().expect("the process lives"))
    }

    fn shard_action(
        &mut self,
        node: usize,
        shard: ShardId,
        action: ShardAction,
        now: &mut VecDeque<Immediate>,
    ) {
        match action {
            ShardAction::Answer(answer) => self.answered(node, answer),
            ShardAction::Readmit(request) => {
                self.counts.readmissions += 1;
                self.admit(node, shard, request);
            }
            ShardAction::Borrow { io, want } => {
                let life = self.nodes[node].life;
                self.soon(1_000, Event::Node(node, life, NodeEvent::Borrow(shard, io, want)));
            }
            ShardAction::Post { io, message, placement } => {
                self.post(node, shard, io, message, placement);
            }
            ShardAction::CloseLane(fault) => {
                let reason = match fault {
                    LaneFault::Protocol(reason) => reason,
                    LaneFault::Checksum => "a placed block does not match",
                };
                panic!("shard {shard} of node {node} closes its lane: {reason}");
            }
            ShardAction::Tell(report) => {
                self.watch_report(node, shard, &report);
                self.enqueue(node, Queue::Reports(shard), 2_000, NodeEvent::Report(shard, report));
            }
            ShardAction::Fill { source: FillSource::Device(..), .. }
            | ShardAction::WriteData { .. }
            | ShardAction::WriteMetadata { .. }
            | ShardAction::ReadData { .. }
            | ShardAction::ReadMetadata { .. }
            | ShardAction::Flush { .. } => self.device_action(node, shard, action),
            ShardAction::Verify { .. }
            | ShardAction::Fill { .. }
            | ShardAction::Copy { .. }
            | ShardAction::Zero { .. }
            | ShardAction::Free(_) => self.buffer_action(node, shard, action, now),
        }
    }

    /// Work for the device: answered later.
    fn device_action(&mut self, node: usize, shard: ShardId, action: ShardAction) {
        match action {
            ShardAction::WriteData { io, block, buffers } => {
                let contents =
                    buffers.iter().map(|b| self.process(node).buffers.get(*b).clone()).collect();
                let first = block.0 - self.options.geometry.data_start(shard).0;
                let first = DataBlock(u32::try_from(first).expect("a block of the shard's region"));
                let run = DataRun { first, count: buffers.len() as u32 };
                let id = self.begin_shard_operation(node, shard, io, Kind::WriteData { buffers });
                self.images.data_begins((node, shard, id), run, self.nodes[node].keeps_base);
                self.nodes[node].disk.begin_write(id, block.0, contents);
            }
            ShardAction::WriteMetadata { io, block, bytes } => {
                let is_header = self.options.geometry.header_copies(shard).contains(&block);
                self.counts.headers += u64::from(is_header);
                let id = self.begin_shard_operation(node, shard, io, Kind::WriteMetadata);
                self.watch_record(node, shard, id, block, &bytes);
                self.nodes[node].disk.begin_write(id, block.0, blocks_of(&bytes));
            }
            ShardAction::ReadData { io, block, buffer, checksums } => {
                let count = checksums.len() as u64;
                let kind = Kind::ReadData { buffer, checksums };
                let id = self.begin_shard_operation(node, shard, io, kind);
                self.nodes[node].disk.begin_read(id, block.0, count);
            }
            ShardAction::ReadMetadata { io, block, count } => {
                self.counts.catch_ups += 1;
                let id = self.begin_shard_operation(node, shard, io, Kind::ReadMetadata);
                self.nodes[node].disk.begin_read(id, block.0, u64::from(count));
            }
            ShardAction::Flush { io } => {
                let mark = self.nodes[node].disk.flush_mark();
                self.begin_shard_operation(node, shard, io, Kind::Flush { mark });
            }
            ShardAction::Fill { io, buffer, keep, source: FillSource::Device(block, checksum) } => {
                let kind = Kind::Fill { buffer, keep, checksum };
                let id = self.begin_shard_operation(node, shard, io, kind);
                self.nodes[node].disk.begin_read(id, block.0, 1);
            }
            other => panic!("{other:?} is no work for the device"),
        }
    }

    /// Work on buffers: done at once.
    fn buffer_action(
        &mut self,
        node: usize,
        shard: ShardId,
        action: ShardAction,
        now: &mut VecDeque<Immediate>,
    ) {
        let process = self.process(node);
        match action {
            ShardAction::Verify { io, buffer, checksums } => {
                let good = checksums.iter().enumerate().all(|(index, sum)| {
                    checksum(&process.buffers.get(BufferId(buffer.0 + index as u32))[..]) == *sum
                });
                let result = if good { Ok(()) } else { Err(IoFailure::Checksum) };
                now.push_back(Immediate::Verified(io, result));
            }
            ShardAction::Fill { io, buffer, keep, source } => {
                let source = match source {
                    FillSource::Buffer(from) => process.buffers.get(from).clone(),
                    FillSource::Zero => zero_block(),
                    FillSource::Device(..) => {
                        panic!("a fill from the device is no work on buffers")
                    }
                };
                now.push_back(Immediate::Filled(io, fill(process, buffer, &keep, &source)));
            }
            ShardAction::Copy { from, to } => {
                let block = process.buffers.get(from).clone();
                process.buffers.set(to, block);
            }
            ShardAction::Zero { buffer } => process.buffers.set(buffer, zero_block()),
            ShardAction::Free(buffers) => {
                buffers.into_iter().for_each(|buffer| process.buffers.free(buffer, shard.0));
            }
            other => panic!("{other:?} is no work on buffers"),
        }
    }

    /// A structure written to the journal is a record.
    fn watch_record(
        &mut self,
        node: usize,
        shard: ShardId,
        id: u64,
        block: DeviceBlock,
        bytes: &[u8],
    ) {
        let geometry = &self.options.geometry;
        let journal_start = geometry.journal_block(shard, 0).0;
        let journal = journal_start..journal_start + u64::from(geometry.journal_blocks);
        if journal.contains(&block.0) {
            let record = Record::decode(bytes).expect("a record comes back");
            self.images.record_begins(node, shard, id, &record);
        }
    }

    /// A flush that was asked for at `mark` ended.
    pub fn flushed(&mut self, node: usize, mark: u64) {
        self.nodes[node].disk.flush(mark);
        self.images.flushed(node, mark);
        self.look_at_superblock(node);
    }

    /// What a store would say of its base after a power cut.
    pub fn look_at_superblock(&mut self, node: usize) {
        let disk = &self.nodes[node].disk;
        let [first, second] =
            Geometry::superblock_copies().map(|block| disk.durable_block(block.0));
        let (superblock, _) =
            Superblock::choose([&first[..], &second[..]]).expect("one copy is good");
        self.nodes[node].keeps_base = superblock.paired && !superblock.base_given_up;
    }

    fn begin_shard_operation(
        &mut self,
        node: usize,
        shard: ShardId,
        io: IoToken,
        kind: Kind,
    ) -> u64 {
        let delay_ns = self.options.disk_delay_ns;
        self.begin_operation(node, delay_ns, Operation { shard: Some(shard), io, kind })
    }

    /// What a shard says is compared with what the other side said.
    fn watch_report(&mut self, node: usize, shard: ShardId, report: &Report) {
        match report {
            Report::Sealed { cp, root, .. } => {
                let roots = self.sealed_roots.entry((shard, *cp)).or_default();
                if !roots.contains(root) {
                    roots.push(*root);
                }
            }
            Report::Applied { cp, root } => {
                let roots = self.sealed_roots.get(&(shard, *cp));
                assert!(
                    roots.is_some_and(|roots| roots.contains(root)),
                    "shard {shard} applied CP {cp}: unknown root"
                );
            }
            Report::Diverged { cp, .. } => {
                panic!("roots differ at CP {cp} in shard {shard} of node {node}")
            }
            Report::Failed => {
                assert!(self.process(node).has_failed, "shard {shard} of node {node} failed")
            }
            _ => {}
        }
    }

    /// Has a post sent on the lane, or answered if there is no lane any more.
    fn post(
        &mut self,
        node: usize,
        shard: ShardId,
        io: IoToken,
        message: Vec<u8>,
        placement: Option<(Vec<BufferId>, u32)>,
    ) {
        self.process(node).posts.insert((shard.0, io));
        let contents: Vec<Block> = placement
            .iter()
            .flat_map(|(buffers, _)| buffers)
            .map(|buffer| self.process(node).buffers.get(*buffer).clone())
            .collect();
        match self.lane_arrival(node, shard) {
            Some((connection, time)) => {
                self.at(
                    time,
                    Event::Wire(
                        connection,
                        WireEvent::Sent { node, shard, io, message, placement, contents },
                    ),
                );
            }
            None => {
                let life = self.nodes[node].life;
                self.soon(1_000, Event::Node(node, life, NodeEvent::Posted(shard, io)));
            }
        }
    }

    /// Whether a node's own words are those of a primary.
    pub fn is_primary(&mut self, node: usize) -> bool {
        let now = twinpoint_core::units::Instant(self.now);
        self.process(node).coordinator.status(now).role == Role::Primary
    }
}

/// Completes a partial block; gives the whole block's checksum.
fn fill(
    process: &mut Process,
    buffer: BufferId,
    keep: &std::ops::Range<usize>,
    source: &Block,
) -> Checksum {
    let bytes = process.buffers.edit(buffer);
    bytes[..keep.start].copy_from_slice(&source[..keep.start]);
    bytes[keep.end..].copy_from_slice(&source[keep.end..]);
    checksum(&bytes[..])
}

fn blocks_of(bytes: &[u8]) -> Vec<Block> {
    let blocks = bytes.chunks_exact(BLOCK_BYTES);
    assert!(blocks.remainder().is_empty(), "a structure of whole blocks");
    blocks.map(|chunk| Rc::new(chunk.try_into().expect("a chunk is a block"))).collect()
}

/// For the coordinator's writes.
pub(crate) fn metadata_blocks(bytes: &[u8]) -> Vec<Block> {
    blocks_of(bytes)
}
