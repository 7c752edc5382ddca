//! The lanes of one worker's shards: their wires are polled, what arrives goes to the shard, what the shard posts goes out.
//!
//! Invariants: a lane is polled only after its shard was told of it; while its wire is polled, posts are collected; a
//! closed wire's posts are given back once it is gone.

use std::sync::atomic::Ordering;

use rdma_fallback::Wire;
use twinpoint_core::contract::{IoToken, LaneFault, ShardAction, ShardEvent};
use twinpoint_core::message::LaneMessage;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, ShardId};

use crate::lanes::{LaneEvent, LanePort, deliver};
use crate::mail::Mail;
use crate::shard_port::ShardPort;
use crate::uring::UringError;
use crate::worker::{PEER_LANE, Worker, lane_number};

impl Worker {
    pub fn lane_begin(
        &mut self,
        shard: ShardId,
        session: u64,
        wire: Wire,
        lend: (BufferId, u32),
    ) -> Result<(), UringError> {
        let descriptor = wire.descriptor();
        if let Some(last) = self.port(shard).lane.take() {
            // Closed, and not polled since: the core knows, and the session has ended.
            self.lane_ended(shard, last)?;
        }
        self.port(shard).close_lane = false;
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
        self.costs().lane_wake_ups.add(1);
        let Some(lane) = self.lane_of(number) else { return };
        lane.has_more = true;
        lane.may_be_readable = true;
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
        let lane = if lane == PEER_LANE {
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
        let progress = wire.poll_when(lane.may_be_readable, &mut |event| {
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
        self.costs().wire(&lane.uncounted());
        if std::mem::take(&mut self.port(shard).close_lane) {
            lane.close();
        }
        let number = lane_number(shard.0, session);
        if let Some(reason) = closed {
            self.lane_ended(shard, lane)?;
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

    /// A lane's wire is closed: its posts are over.
    fn lane_ended(&mut self, shard: ShardId, mut lane: LanePort) -> Result<(), UringError> {
        self.forget_lane_watches(lane_number(shard.0, lane.session))?;
        let posts = lane.abandon();
        // The wire first: until it is gone a card may still read what was posted.
        drop(lane);
        for io in posts {
            self.shard_event(shard, ShardEvent::Posted { io });
        }
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

    pub fn lane_post(
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

    pub fn lane_fault(&mut self, shard: ShardId, fault: LaneFault) {
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
