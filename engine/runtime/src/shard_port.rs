//! Drives the shards of one worker: brings them events and carries their actions out, in order.
//!
//! Invariants: a copy, a fill from memory, and a check of buffers are done at once and answered before anything else
//! reaches the shard; a request that is admitted again gets its stamp and its mark through the gate.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use rdma_fallback::Wire;
use twinpoint_core::contract::{
    FillSource, IoFailure, IoToken, LaneFault, Report, ShardAction, ShardEvent,
};
use twinpoint_core::message::LaneMessage;
use twinpoint_core::request::{Operation, Request};
use twinpoint_core::shard::Shard;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Checksum, DeviceBlock, ShardId};

use crate::clients::worker_of;
use crate::lanes::{LaneEvent, LanePort, deliver, spans};
use crate::mail::Mail;
use crate::store_port::check;
use crate::uring::UringError;
use crate::worker::{Worker, lane_number};

/// A shard with its lane and with what waits for memory.
pub(crate) struct ShardPort {
    shard: Shard,
    lane: Option<LanePort>,
    /// The shard wants its lane closed.
    close_lane: bool,
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
    fn port(&mut self, shard: ShardId) -> &mut ShardPort {
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

    fn shard_action(&mut self, shard: ShardId, action: ShardAction) {
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

    // Lanes.

    pub fn lane_begin(
        &mut self,
        shard: ShardId,
        session: u64,
        wire: Wire,
        lend: (BufferId, u32),
    ) -> Result<(), UringError> {
        let descriptor = wire.descriptor();
        assert!(self.port(shard).lane.is_none(), "a lane begins after the end of the last");
        self.port(shard).lane = Some(LanePort::new(wire, session, lend));
        self.watch_lane_input(lane_number(shard.0, session), descriptor)
    }

    /// The shard is about to be told of its lane.
    pub fn lane_open(&mut self, shard: ShardId) {
        if let Some(lane) = &mut self.port(shard).lane {
            lane.open();
        }
    }

    pub fn lane_close(&mut self, shard: ShardId, session: u64) {
        if let Some(lane) = self.port(shard).lane.as_mut().filter(|lane| lane.session == session) {
            lane.close();
        }
    }

    pub fn lane_close_any(&mut self, index: usize) {
        if let Some(lane) = self.shards[index].as_mut().and_then(|port| port.lane.as_mut()) {
            lane.close();
        }
    }

    pub fn lanes_are_closed(&self) -> bool {
        self.shards.iter().flatten().all(|port| port.lane.is_none())
            && self.coordinator.as_ref().is_none_or(|port| port.peer_is_closed())
    }

    /// A lane's descriptor is readable, or its watch ended.
    pub fn lane_ready(&mut self, number: u64, has_more: bool) {
        let Some(lane) = self.lane_of(number) else { return };
        lane.has_more = true;
        if has_more {
            return;
        }
        if let Some(descriptor) = lane.descriptor() {
            // The kernel ended the watch by itself; the next round polls the wire anyway.
            _ = self.watch_lane_input(number, descriptor);
        }
    }

    pub fn lane_writable(&mut self, number: u64) {
        if let Some(lane) = self.lane_of(number) {
            lane.watching_output = false;
            lane.has_more = true;
        }
    }

    fn lane_of(&mut self, number: u64) -> Option<&mut LanePort> {
        let lane = (number & 0xffff) as u16;
        let lane = if lane == crate::worker::PEER_LANE {
            self.coordinator.as_mut()?.peer_lane()
        } else {
            self.shards.get_mut(usize::from(lane))?.as_mut()?.lane.as_mut()
        };
        lane.filter(|lane| lane.session & 0xffff == number >> 16)
    }

    /// Polls every lane that may have something.
    pub fn poll_lanes(&mut self) -> Result<bool, UringError> {
        let mut worked = false;
        for index in 0..self.shards.len() {
            let has_more = |port: &ShardPort| port.lane.as_ref().is_some_and(|lane| lane.is_due());
            if self.shards[index].as_ref().is_some_and(has_more) {
                worked = true;
                self.poll_lane(ShardId(u16::try_from(index).expect("few shards")))?;
            }
        }
        Ok(worked | self.poll_peer()?)
    }

    fn poll_lane(&mut self, shard: ShardId) -> Result<(), UringError> {
        let mut lane = self.port(shard).lane.take().expect("the caller looked");
        let Some(mut wire) = lane.begin_poll() else {
            panic!("a wire is out only while it is polled")
        };
        // The port's lane stays out during the poll; what the shard posts meanwhile is collected.
        let session = lane.session;
        let mut closed = None;
        let mut posts = Vec::new();
        let progress = wire.poll(&mut |event| {
            let reason = deliver(&mut lane, event, &mut |_, event| {
                let event = match event {
                    LaneEvent::Posted(io) => ShardEvent::Posted { io },
                    LaneEvent::Message(bytes, placed) => ShardEvent::LaneMessage { bytes, placed },
                };
                self.lane_event(shard, event, &mut posts);
            });
            closed = closed.take().or(reason);
        });
        for (io, message, placement) in posts {
            let placement = placement
                .as_ref()
                .map(|(buffers, block): &(Vec<BufferId>, u32)| (buffers.as_slice(), *block));
            lane.post(&self.shared.arena, io, message, placement);
        }
        lane.end_poll(wire, progress);
        if std::mem::take(&mut self.port(shard).close_lane) {
            lane.close();
        }
        let number = lane_number(shard.0, session);
        if let Some(reason) = closed {
            self.forget_lane_watches(number)?;
            for io in lane.abandon() {
                self.shard_event(shard, ShardEvent::Posted { io });
            }
            drop(lane);
            self.shard_event(shard, ShardEvent::LaneDown);
            self.mailbox.send(0, Mail::LaneClosed(session, format!("lane {shard}: {reason}")));
            return Ok(());
        }
        if lane.wants_write() && !lane.watching_output {
            lane.watching_output = true;
            if let Some(descriptor) = lane.descriptor() {
                self.watch_lane_output(number, descriptor)?;
            }
        }
        self.port(shard).lane = Some(lane);
        Ok(())
    }

    /// An event of a lane whose wire is out: posts are collected, all else is done.
    fn lane_event(
        &mut self,
        shard: ShardId,
        event: ShardEvent<'_>,
        posts: &mut Vec<CollectedPost>,
    ) {
        self.port(shard).shard.handle(event);
        while let Some(action) = self.port(shard).shard.poll_action() {
            match action {
                ShardAction::Post { io, message, placement } => {
                    self.count_post(&message, placement.as_ref());
                    posts.push((io, message, placement));
                }
                other => self.shard_action(shard, other),
            }
        }
    }

    fn lane_post(
        &mut self,
        shard: ShardId,
        io: IoToken,
        message: Vec<u8>,
        placement: Option<(Vec<BufferId>, u32)>,
    ) {
        self.count_post(&message, placement.as_ref());
        let arena = &self.shared.arena;
        let port = self.shards[usize::from(shard.0)].as_mut().expect("an own shard");
        match &mut port.lane {
            Some(lane) => {
                let placement =
                    placement.as_ref().map(|(buffers, block)| (buffers.as_slice(), *block));
                lane.post(arena, io, message, placement);
            }
            // The lane is gone and the core does not know yet: the post is over.
            None => port.shard.handle(ShardEvent::Posted { io }),
        }
    }

    fn count_post(&self, message: &[u8], placement: Option<&(Vec<BufferId>, u32)>) {
        let traffic = &self.shared.traffic;
        let counter = if LaneMessage::is_part(message) {
            &traffic.wire_records
        } else {
            &traffic.wire_messages
        };
        counter.fetch_add(message.len() as u64, Ordering::Relaxed);
        let blocks = placement.map_or(0, |(buffers, _)| buffers.len());
        traffic.wire_data.fetch_add((blocks * BLOCK_BYTES) as u64, Ordering::Relaxed);
    }

    fn lane_fault(&mut self, shard: ShardId, fault: LaneFault) {
        let reason = match fault {
            LaneFault::Protocol(what) => what,
            LaneFault::Checksum => "a block does not match its checksum",
        };
        eprintln!("twinpoint: lane {shard} is closed: {reason}");
        let port = self.port(shard);
        match &mut port.lane {
            Some(lane) => lane.close(),
            // Its wire is being polled.
            None => port.close_lane = true,
        }
    }
}

type CollectedPost = (IoToken, Vec<u8>, Option<(Vec<BufferId>, u32)>);
