//! Drives the shards of one worker: brings them events and carries their actions out, in order.
//!
//! Invariants: a copy, a fill from memory, and a check of buffers are done at once and answered before anything else
//! reaches the shard; a request that is admitted again gets its stamp and its mark through the gate.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use twinpoint_core::contract::{FillSource, IoFailure, IoToken, Report, ShardAction, ShardEvent};
use twinpoint_core::request::{Operation, Request};
use twinpoint_core::shard::Shard;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Checksum, DeviceBlock, ShardId};

use crate::clients::worker_of;
use crate::lanes::{LanePort, spans};
use crate::mail::Mail;
use crate::store_port::check;
use crate::worker::Worker;

/// A shard with its lane and with what waits for memory.
pub(crate) struct ShardPort {
    pub(crate) shard: Shard,
    pub(crate) lane: Option<LanePort>,
    /// The shard wants its lane closed.
    pub(crate) close_lane: bool,
    /// Fills under way: which bytes of which buffer stay.
    fills: Vec<(IoToken, BufferId, std::ops::Range<usize>)>,
    /// Fills that wait for a scratch buffer.
    fills_waiting: VecDeque<(IoToken, DeviceBlock, Checksum)>,
    borrows_waiting: VecDeque<(IoToken, u32)>,
    checksums: Vec<Checksum>,
}

impl ShardPort {
    pub fn new(shard: Shard) -> ShardPort {
        ShardPort {
            shard,
            lane: None,
            close_lane: false,
            fills: Vec::new(),
            fills_waiting: VecDeque::new(),
            borrows_waiting: VecDeque::new(),
            checksums: Vec::new(),
        }
    }
}

impl Worker {
    pub fn port(&mut self, shard: ShardId) -> &mut ShardPort {
        self.shards[usize::from(shard.0)].as_mut().expect("mail for a shard goes to its owner")
    }

    /// A request for one of this worker's shards.
    pub fn shard_request(&mut self, shard: ShardId, request: Request) {
        let mut checksums = std::mem::take(&mut self.port(shard).checksums);
        checksums.clear();
        if let Operation::Write { buffer } = request.operation {
            self.shared.arena.checksums(buffer, request.blocks(), &mut checksums);
        }
        self.shard_event(shard, ShardEvent::Request { request, checksums: &checksums });
        self.port(shard).checksums = checksums;
    }

    /// Brings a shard an event and does what it wants.
    pub fn shard_event(&mut self, shard: ShardId, event: ShardEvent<'_>) {
        self.port(shard).shard.handle(event);
        while let Some(action) = self.port(shard).shard.poll_action() {
            self.shard_action(shard, action);
        }
    }

    /// The old contents of a block that is being filled were read.
    pub fn shard_old(
        &mut self,
        shard: ShardId,
        io: IoToken,
        scratch: BufferId,
        result: Result<(), IoFailure>,
    ) {
        let result = match result {
            Ok(()) => Ok(self.finish_fill(shard, io, |worker, buffer, keep| {
                worker.shared.arena.merge(scratch, buffer, keep);
            })),
            Err(failure) => {
                self.port(shard).fills.retain(|(fill, ..)| *fill != io);
                Err(failure)
            }
        };
        self.give_back(&[scratch]);
        self.shard_event(shard, ShardEvent::Filled { io, result });
    }

    pub fn shard_action(&mut self, shard: ShardId, action: ShardAction) {
        match action {
            ShardAction::Answer(answer) => {
                let worker = worker_of(answer.tag);
                self.mailbox.send(worker, Mail::Answer(answer));
            }
            ShardAction::Readmit(request) => {
                self.shared.admit(&mut self.mailbox, self.index, shard, request);
            }
            ShardAction::WriteData { io, block, buffers } => {
                let spans = spans(&self.shared.arena, &buffers);
                self.shared
                    .traffic
                    .device_data
                    .fetch_add((buffers.len() * BLOCK_BYTES) as u64, Ordering::Relaxed);
                self.store.write(Some(shard), io, block, spans);
            }
            ShardAction::Verify { io, buffer, checksums } => {
                let result = check(&self.shared.arena, buffer, &checksums);
                self.port(shard).shard.handle(ShardEvent::Done { io, result });
            }
            ShardAction::WriteMetadata { io, block, bytes } => {
                self.shared
                    .traffic
                    .device_metadata
                    .fetch_add(bytes.len() as u64, Ordering::Relaxed);
                self.store.write_metadata(Some(shard), io, block, &bytes);
            }
            ShardAction::ReadData { io, block, buffer, checksums } => {
                self.store.read(&self.shared.arena, shard, io, block, buffer, checksums);
            }
            ShardAction::ReadMetadata { io, block, count } => {
                self.store.read_metadata(shard, io, block, count)
            }
            ShardAction::Flush { io } => self.store.flush(Some(shard), io),
            ShardAction::Fill { io, buffer, keep, source } => {
                self.fill(shard, io, buffer, keep, source)
            }
            ShardAction::Copy { from, to } => {
                self.shared.arena.copy_buffer(from, to, 0..BLOCK_BYTES)
            }
            ShardAction::Zero { buffer } => self.shared.arena.zero(buffer, 0, BLOCK_BYTES),
            ShardAction::Borrow { io, want } => {
                self.port(shard).borrows_waiting.push_back((io, want));
                self.serve_waiting(shard);
            }
            ShardAction::Free(buffers) => self.give_back(&buffers),
            ShardAction::Post { io, message, placement } => {
                self.lane_post(shard, io, message, placement)
            }
            ShardAction::CloseLane(fault) => self.lane_fault(shard, fault),
            ShardAction::Tell(report) => {
                if matches!(
                    report,
                    Report::Sealed { .. } | Report::Applied { .. } | Report::Settled
                ) {
                    self.gauge(shard);
                }
                self.mailbox.send(0, Mail::Report(shard, report));
            }
        }
    }

    fn fill(
        &mut self,
        shard: ShardId,
        io: IoToken,
        buffer: BufferId,
        keep: std::ops::Range<usize>,
        source: FillSource,
    ) {
        self.port(shard).fills.push((io, buffer, keep));
        match source {
            FillSource::Device(block, checksum) => {
                self.port(shard).fills_waiting.push_back((io, block, checksum));
                self.serve_waiting(shard);
            }
            FillSource::Zero => {
                let checksum = self.finish_fill(shard, io, |worker, buffer, keep| {
                    worker.shared.arena.zero(buffer, 0, keep.start);
                    worker.shared.arena.zero(buffer, keep.end, BLOCK_BYTES - keep.end);
                });
                self.port(shard).shard.handle(ShardEvent::Filled { io, result: Ok(checksum) });
            }
            FillSource::Buffer(old) => {
                let checksum = self.finish_fill(shard, io, |worker, buffer, keep| {
                    worker.shared.arena.merge(old, buffer, keep);
                });
                self.port(shard).shard.handle(ShardEvent::Filled { io, result: Ok(checksum) });
            }
        }
    }

    fn finish_fill(
        &mut self,
        shard: ShardId,
        io: IoToken,
        complete: impl FnOnce(&mut Worker, BufferId, std::ops::Range<usize>),
    ) -> Checksum {
        let fills = &mut self.port(shard).fills;
        let index = fills.iter().position(|(fill, ..)| *fill == io).expect("a fill ends once");
        let (_, buffer, keep) = fills.swap_remove(index);
        complete(self, buffer, keep);
        self.shared.arena.checksum_compute(buffer, 1);
        self.shared.arena.checksum(buffer)
    }

    /// Gives what waits for memory its buffers, from the reserve if need be.
    fn serve_waiting(&mut self, shard: ShardId) {
        while let Some((io, block, checksum)) = self.port(shard).fills_waiting.pop_front() {
            let Some((scratch, _)) = self.pool.allocate_reserved(1) else {
                self.port(shard).fills_waiting.push_front((io, block, checksum));
                return;
            };
            self.store.read_old(&self.shared.arena, (shard, io), block, scratch, checksum);
        }
        while let Some((io, want)) = self.port(shard).borrows_waiting.pop_front() {
            let Some((first, count)) = self.pool.allocate_reserved(want) else {
                self.port(shard).borrows_waiting.push_front((io, want));
                return;
            };
            self.port(shard).shard.handle(ShardEvent::Borrowed { io, first, count });
        }
    }

    /// Buffers go back to the pools they are of.
    fn give_back(&mut self, buffers: &[BufferId]) {
        let mut rest = buffers;
        while let Some(first) = rest.first().copied() {
            let pool = self.shared.pool_of(first);
            let joins = |(index, buffer): &(usize, &BufferId)| {
                buffer.0 == first.0 + *index as u32 && self.shared.pool_of(**buffer) == pool
            };
            let count = rest.iter().enumerate().take_while(joins).count();
            rest = &rest[count..];
            let count = u32::try_from(count).expect("buffers are counted by 32 bits");
            if pool == self.index {
                self.pool.free(first, count);
                self.may_resume = true;
            } else {
                self.mailbox.send(pool, Mail::Free(first, count));
            }
        }
    }

    /// After memory came back: fills and borrows of all shards, then clients.
    pub fn serve_all_waiting(&mut self) {
        for index in 0..self.shards.len() {
            let waits = self.shards[index].as_ref().is_some_and(|port| {
                !port.fills_waiting.is_empty() || !port.borrows_waiting.is_empty()
            });
            if waits {
                let shard = ShardId(u16::try_from(index).expect("few shards"));
                self.serve_waiting(shard);
                while let Some(action) = self.port(shard).shard.poll_action() {
                    self.shard_action(shard, action);
                }
            }
        }
    }

    fn gauge(&mut self, shard: ShardId) {
        let port = self.shards[usize::from(shard.0)].as_ref().expect("an own shard");
        let (map_bytes, mapped_blocks) = port.shard.map_cost();
        let gauges = &self.shared.shards[usize::from(shard.0)];
        gauges.free_blocks.store(u64::from(port.shard.free_blocks()), Ordering::Relaxed);
        gauges.map_bytes.store(map_bytes as u64, Ordering::Relaxed);
        gauges.mapped_blocks.store(mapped_blocks, Ordering::Relaxed);
    }

    pub fn gauge_all(&mut self) {
        for index in 0..self.shards.len() {
            if self.shards[index].is_some() {
                self.gauge(ShardId(u16::try_from(index).expect("few shards")));
            }
        }
    }
}
