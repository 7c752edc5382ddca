//! The session with the peer on worker 0: its wires are placed at their owners, the wire between the coordinators is
//! polled, and all of them are closed together.
//!
//! Invariant: a session's wires are in place at their owners before any order of the session reaches a shard.

use std::sync::atomic::Ordering;

use rdma_fallback::Wire;
use twinpoint_core::contract::{CoordinatorEvent, IoToken, PeerSession};
use twinpoint_core::message::Role;
use twinpoint_core::units::{BufferId, ShardId};

use crate::lanes::{LaneEvent, LanePort, deliver};
use crate::link::NewSession;
use crate::mail::Mail;
use crate::uring::UringError;
use crate::worker::{PEER_LANE, Worker, lane_number};

impl Worker {
    pub fn begin_session(&mut self, session: NewSession) -> Result<(), UringError> {
        let NewSession { hello, control, lanes, lent_blocks } = session;
        let port = self.coordinator.as_mut().expect("calls go to worker 0");
        if self.ending || !port.coordinator.session_is_over() || port.peer.is_some() {
            eprintln!(
                "twinpoint: a session came before the last one ended; the peer will dial again"
            );
            return Ok(());
        }
        port.session += 1;
        let number = port.session;
        let lends: Vec<(BufferId, u32)> = match hello.role {
            // A primary lends nothing, and is lent to.
            Role::Primary => port.lends.clone(),
            Role::Secondary => vec![(BufferId(0), 0); lanes.len()],
        };
        let descriptor = control.descriptor();
        let mut peer = LanePort::new(control, number, (BufferId(0), 0));
        peer.open();
        port.peer = Some(peer);
        for (index, wire) in lanes.into_iter().enumerate() {
            let shard = ShardId(u16::try_from(index).expect("a lane for each shard"));
            self.place_lane(shard, number, wire, lends[index])?;
        }
        self.watch_lane_input(lane_number(PEER_LANE, number), descriptor)?;
        let lanes = lends.into_iter().zip(lent_blocks).collect();
        let session = PeerSession { hello: *hello, lanes };
        self.coordinator_event(CoordinatorEvent::PeerUp(Box::new(session)));
        Ok(())
    }

    fn place_lane(
        &mut self,
        shard: ShardId,
        session: u64,
        wire: Wire,
        lend: (BufferId, u32),
    ) -> Result<(), UringError> {
        let owner = self.shared.owner(shard);
        if owner == self.index {
            return self.lane_begin(shard, session, wire, lend);
        }
        self.mailbox.send(owner, Mail::Lane(shard, session, Box::new(wire), lend));
        Ok(())
    }

    /// Closes every wire of the session under way.
    pub fn close_wires(&mut self) {
        let Some(port) = self.coordinator.as_mut() else { return };
        let session = port.session;
        if let Some(peer) = &mut port.peer {
            peer.close();
        }
        for shard in (0..self.shared.geometry.shards).map(ShardId) {
            let owner = self.shared.owner(shard);
            if owner == self.index {
                self.lane_close(shard, session);
            } else {
                self.mailbox.send(owner, Mail::CloseLane(shard, session));
            }
        }
    }

    pub fn peer_post(&mut self, message: Vec<u8>) {
        self.shared.traffic.wire_messages.fetch_add(message.len() as u64, Ordering::Relaxed);
        let arena = &self.shared.arena;
        let port = self.coordinator.as_mut().expect("it posts");
        port.next_post += 1;
        let io = IoToken(port.next_post);
        if let Some(peer) = &mut port.peer {
            peer.post(arena, io, message, None);
        }
    }

    /// Polls the wire between the coordinators.
    pub fn poll_peer(&mut self) -> Result<bool, UringError> {
        let Some(port) = self.coordinator.as_mut() else { return Ok(false) };
        if !port.peer.as_ref().is_some_and(|peer| peer.has_more) {
            return Ok(false);
        }
        let mut peer = port.peer.take().expect("it was just there");
        let Some(mut wire) = peer.begin_poll() else {
            panic!("a wire is out only while it is polled")
        };
        let mut messages: Vec<Vec<u8>> = Vec::new();
        let mut closed = None;
        let progress = wire.poll_when(peer.may_be_readable, &mut |event| {
            let reason = deliver(&mut peer, event, &mut |_, event| {
                if let LaneEvent::Message(bytes, _) = event {
                    messages.push(bytes.to_vec());
                }
            });
            closed = closed.take().or(reason);
        });
        peer.end_poll(wire, progress);
        self.costs().wire(&peer.uncounted());
        let number = lane_number(PEER_LANE, peer.session);
        let watch = peer.wants_write() && !peer.watching_output && closed.is_none();
        peer.watching_output |= watch;
        let descriptor = peer.descriptor();
        if closed.is_none() {
            let port = self.coordinator.as_mut().expect("worker 0 has the coordinator");
            port.peer = Some(peer);
        } else {
            self.forget_lane_watches(number)?;
        }
        if let Some(descriptor) = descriptor.filter(|_| watch) {
            self.watch_lane_output(number, descriptor)?;
        }
        for message in messages {
            self.coordinator_event(CoordinatorEvent::PeerMessage(message));
        }
        if let Some(reason) = closed {
            self.close_wires();
            self.coordinator_event(CoordinatorEvent::PeerDown(reason));
        }
        Ok(true)
    }
}
