//! The shell's side of a shard: feeds it events, carries out its actions.
//!
//! Invariants: actions are carried out in order; copies, zeroings, checks of buffers and fills from memory are done at
//! once, and what answers them is the shard's next event; buffers named by work under way do not change.

mod checks;

use std::collections::VecDeque;
use std::rc::Rc;

use twinpoint_core::contract::{
    CoordinatorEvent, FillSource, IoFailure, IoToken, ShardAction, ShardEvent,
};
use twinpoint_core::data_run::DataRun;
use twinpoint_core::message::Role;
use twinpoint_core::request::{Operation as RequestOperation, Request};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Checksum, DataBlock, ShardId};

use crate::content::{Block, checksum, zero_block};
use crate::faults::Fault;
use crate::node::{Kind, Operation, Process, Queue};
use crate::wire::Post;
use crate::world::{Event, NodeEvent, World};

/// What answers an action done at once.
enum Immediate {
    Verified(IoToken, Result<(), IoFailure>),
    Filled(IoToken, Checksum),
}

impl World {
    /// Feeds a shard an event and does all that it then wants.
    pub fn feed_shard(&mut self, node: usize, shard: ShardId, event: ShardEvent<'_>) {
        if !self.is_well(node) {
            return;
        }
        self.process(node).shards[usize::from(shard.0)].handle(event);
        let mut immediates = VecDeque::new();
        loop {
            while self.is_alive(node) {
                let Some(action) = self.process(node).shards[usize::from(shard.0)].poll_action()
                else {
                    break;
                };
                if self.action_happens(node) {
                    self.shard_action(node, shard, action, &mut immediates);
                }
            }
            let Some(immediate) = immediates.pop_front().filter(|_| self.is_well(node)) else {
                return;
            };
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
        if writes && self.fails_now(node, &kind) {
            self.fail_operation(node, id, shard, io, &kind);
            return;
        }
        let Some(shard) = shard else {
            self.coordinator_disk_done(node, id, io, &kind);
            return;
        };
        if !writes && self.read_fails(node, id, shard, io, &kind) {
            return;
        }
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
                assert_eq!(
                    checksums.len() as u64,
                    disk.under_read(id).end - disk.under_read(id).start,
                    "a checksum for each block"
                );
                for (index, block) in disk.end_read(id).into_iter().enumerate() {
                    process.buffers.set(BufferId(buffer.0 + index as u32), block);
                }
                self.feed_shard(node, shard, ShardEvent::Read { io, result: Ok(()) });
            }
            Kind::Fill { buffer, keep, .. } => {
                let source = disk.end_read(id).pop().expect("one block was read");
                let sum = fill(process, buffer, &keep, &source);
                self.feed_shard(node, shard, ShardEvent::Filled { io, result: Ok(sum) });
            }
        }
    }

    /// A read ends badly if the device fails it, or if what it finds does not match; then something must have rotted,
    /// or been lost by a failed flush. Tells whether it did.
    fn read_fails(
        &mut self,
        node: usize,
        id: u64,
        shard: ShardId,
        io: IoToken,
        kind: &Kind,
    ) -> bool {
        let (disk, process) = self.disk_and_process(node);
        let sums: &[Checksum] = match kind {
            Kind::ReadData { checksums, .. } => checksums,
            Kind::Fill { checksum, .. } => std::slice::from_ref(checksum),
            _ => &[],
        };
        let mut failure = None;
        for (block, expected) in disk.under_read(id).zip(sums) {
            if checksum(&disk.block(block)[..]) != *expected {
                assert!(
                    disk.is_rotten(block) || process.has_failed,
                    "block {block} read from the store of node {node} does not match"
                );
                failure = Some(IoFailure::Checksum);
            }
        }
        if process.reads_fail > 0 {
            process.reads_fail -= 1;
            failure = Some(IoFailure::Device);
        }
        let Some(failure) = failure else { return false };
        process.has_read_failure = true;
        assert!(disk.abandon_read(id), "it was a read");
        let event = match kind {
            Kind::ReadMetadata => ShardEvent::MetadataRead { io, result: Err(failure) },
            Kind::Fill { .. } => ShardEvent::Filled { io, result: Err(failure) },
            _ => ShardEvent::Read { io, result: Err(failure) },
        };
        self.feed_shard(node, shard, event);
        true
    }

    /// Whether a write or a flush is the one that is to fail.
    fn fails_now(&mut self, node: usize, kind: &Kind) -> bool {
        let process = self.process(node);
        let waits = process.fails_at_flush && !matches!(kind, Kind::Flush { .. });
        !waits && std::mem::take(&mut process.is_failing)
    }

    /// A write or a flush ends badly; of a write nothing is known.
    fn fail_operation(
        &mut self,
        node: usize,
        id: u64,
        shard: Option<ShardId>,
        io: IoToken,
        kind: &Kind,
    ) {
        self.counts.device_failures += 1;
        self.process(node).has_failed = true;
        self.nodes[node].disk.abandon_write(id, &mut self.random);
        let is_flush = |kind: &Kind| matches!(kind, Kind::Flush { .. });
        // Of two flushes at a time one could succeed and mean nothing: no store can know.
        let is_only = !self.process(node).operations.values().any(|other| is_flush(&other.kind));
        if is_flush(kind) && is_only && self.occasion(Fault::FlushLoses, 70) {
            self.nodes[node].disk.lose_unflushed(&mut self.random);
            self.images.device_failed(node);
        }
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
        let process = self.process(node);
        process.operations.insert(id, operation);
        if std::mem::take(&mut process.sticks) {
            process.is_stuck = true;
            self.soon(200_000_000, Event::Kill(node, false));
            return id;
        }
        let slowness = if self.nodes[node].is_slow { 40 } else { 1 };
        self.soon(delay_ns * slowness, Event::Node(node, life, NodeEvent::Disk(id)));
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
        self.note(|| format!("node {node} shard {shard} does {action:?}"));
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
            ShardAction::CloseLane(fault) => self.lane_closed(node, shard, fault),
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
                self.watch_metadata(node, shard, id, block, &bytes);
                self.nodes[node].disk.begin_write(id, block.0, blocks_of(&bytes));
                if is_header {
                    self.probe_power_cut_at_header(node);
                }
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

    /// Has a post sent on the lane, or answered if there is no lane any more.
    fn post(
        &mut self,
        node: usize,
        shard: ShardId,
        io: IoToken,
        message: Vec<u8>,
        placement: Option<(Vec<BufferId>, u32)>,
    ) {
        if !self.lane_post(node, Post { shard, io, message, placement }) {
            self.process(node).posts.insert((shard.0, io));
            let life = self.nodes[node].life;
            self.soon(1_000, Event::Node(node, life, NodeEvent::Posted(shard, io)));
        }
    }

    /// Whether a node's own words are those of a primary.
    pub fn is_primary(&mut self, node: usize) -> bool {
        let now = self.clock(node);
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
