//! Drives the coordinator on worker 0: operators' calls, the gate, timers, and the wire to the peer's coordinator.
//!
//! Invariants: the gate is closed here alone; a call is answered once, or its caller sees the channel close.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use hdrhistogram::Histogram;
use twinpoint_core::contract::{
    Command, CoordinatorAction, CoordinatorEvent, IoFailure, IoToken, Order, Refusal, Reply,
    Report, Ticket,
};
use twinpoint_core::coordinator::Coordinator;
use twinpoint_core::request::Tag;
use twinpoint_core::units::{BufferId, CpNumber, Instant, ShardId, VolumeId};

use crate::calls::{Call, Calls};
use crate::clients::worker_of;
use crate::exports::InUse;
use crate::lanes::LanePort;
use crate::mail::Mail;
use crate::uring::UringError;
use crate::worker::Worker;

/// Why the workers of a node end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// Stopped in order.
    Stopped,
    /// The store is to be opened anew, as of this CP.
    Restart(CpNumber),
}

/// The coordinator and what it needs of the world.
pub(crate) struct CoordinatorPort {
    pub(crate) coordinator: Coordinator,
    calls: Calls,
    replies: HashMap<Ticket, Sender<Reply>>,
    /// Volumes whose deletion was asked for.
    withdrawn: HashMap<Ticket, VolumeId>,
    next_ticket: u64,
    /// The gate was closed at this CP and is not quiet yet.
    closing: Option<CpNumber>,
    pub(crate) peer: Option<LanePort>,
    pub(crate) session: u64,
    /// What each shard lends.
    pub(crate) lends: Vec<(BufferId, u32)>,
    latencies: Arc<Mutex<Latencies>>,
    exit: Arc<Mutex<Option<Exit>>>,
    pub(crate) next_post: u64,
    wants_seal: bool,
}

/// How long the phases of CPs took, in nanoseconds.
pub(crate) struct Latencies {
    pub written: Histogram<u64>,
    pub durable: Histogram<u64>,
    pub confirmed: Histogram<u64>,
}

impl Latencies {
    pub fn new() -> Latencies {
        let histogram =
            || Histogram::new_with_bounds(1_000, 1_000_000_000_000, 2).expect("sound bounds");
        Latencies { written: histogram(), durable: histogram(), confirmed: histogram() }
    }
}

impl CoordinatorPort {
    pub fn new(
        coordinator: Coordinator,
        calls: Calls,
        lends: Vec<(BufferId, u32)>,
        latencies: Arc<Mutex<Latencies>>,
        exit: Arc<Mutex<Option<Exit>>>,
    ) -> CoordinatorPort {
        CoordinatorPort {
            coordinator,
            calls,
            replies: HashMap::new(),
            withdrawn: HashMap::new(),
            next_ticket: 0,
            closing: None,
            peer: None,
            session: 0,
            lends,
            latencies,
            exit,
            next_post: 0,
            wants_seal: false,
        }
    }

    /// When the coordinator wants a tick; at once while the gate is being closed.
    pub fn next_tick(&self) -> Option<Instant> {
        if self.closing.is_some() { Some(Instant(0)) } else { self.coordinator.poll_timeout() }
    }

    pub fn peer_lane(&mut self) -> Option<&mut LanePort> {
        self.peer.as_mut()
    }

    pub fn peer_is_closed(&self) -> bool {
        self.peer.is_none()
    }

    fn ticket(&mut self, reply: Sender<Reply>) -> Ticket {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.replies.insert(ticket, reply);
        ticket
    }
}

impl Worker {
    /// Whether a call waits.
    pub fn has_calls(&self) -> bool {
        self.coordinator.as_ref().is_some_and(|port| port.calls.is_waiting())
    }

    /// Calls, the gate, timers. Tells whether there was anything to do.
    pub fn run_coordinator(&mut self) -> Result<bool, UringError> {
        let Some(port) = self.coordinator.as_mut() else { return Ok(false) };
        let mut worked = false;
        if let Some(call) = port.calls.take() {
            self.call(call)?;
            worked = true;
        }
        worked |= self.watch_gate();
        let Some(port) = self.coordinator.as_ref() else { return Ok(worked) };
        let now = self.core_time(self.round_began);
        let due = port.coordinator.poll_timeout().is_some_and(|at| at <= now);
        if due {
            self.coordinator_tick();
        }
        let port = self.coordinator.as_ref().expect("worker 0 has the coordinator");
        if port.coordinator.session_is_over() && port.peer.is_none() {
            port.calls.session_over();
        }
        Ok(worked || due)
    }

    pub fn coordinator_tick(&mut self) {
        self.coordinator_event(CoordinatorEvent::Tick);
    }

    pub fn coordinator_flush(&mut self, tag: Tag) {
        self.coordinator_event(CoordinatorEvent::Flush(tag));
    }

    pub fn coordinator_report(&mut self, shard: ShardId, report: Report) {
        self.coordinator_event(CoordinatorEvent::Report(shard, report));
    }

    pub fn coordinator_done(&mut self, io: IoToken, result: Result<(), IoFailure>) {
        self.coordinator_event(CoordinatorEvent::Done { io, result });
    }

    /// A lane broke: the session is over.
    pub fn coordinator_lane_closed(&mut self, session: u64, reason: String) {
        if self.coordinator.as_ref().is_some_and(|port| port.session == session) {
            self.close_wires();
            self.coordinator_event(CoordinatorEvent::PeerDown(reason));
        }
    }

    /// Memory or enough bytes are staged. Told once until the gate closes.
    pub fn want_seal(&mut self) {
        match &mut self.coordinator {
            Some(port) => {
                if !std::mem::replace(&mut port.wants_seal, true) {
                    self.coordinator_report(ShardId(0), Report::WantSeal);
                }
            }
            None => self.mailbox.send(0, Mail::Report(ShardId(0), Report::WantSeal)),
        }
    }

    /// The first actions of a new coordinator.
    pub fn begin_coordinator(&mut self) {
        if self.coordinator.is_some() {
            self.coordinator_tick();
        }
    }

    pub fn coordinator_event(&mut self, event: CoordinatorEvent) {
        let now = self.now();
        let open_is_empty = self.shared.gate.is_open_empty();
        self.core().handle(now, open_is_empty, event);
        while let Some(action) = self.core().poll_action() {
            self.coordinator_action(action);
        }
    }

    fn core(&mut self) -> &mut Coordinator {
        &mut self.coordinator.as_mut().expect("only worker 0 is sent such mail").coordinator
    }

    pub fn coordinator_action(&mut self, action: CoordinatorAction) {
        match action {
            CoordinatorAction::CloseGate => {
                let closed = self.shared.gate.close();
                self.shared.staged_bytes.store(0, Ordering::Relaxed);
                let port = self.coordinator.as_mut().expect("it acts");
                port.closing = Some(closed);
                port.wants_seal = false;
                self.watch_gate();
            }
            CoordinatorAction::OpenGate(cp) => {
                self.shared.gate.restart(cp);
                self.coordinator.as_ref().expect("it acts").calls.set_primary(true);
            }
            CoordinatorAction::Order(shard, order) => {
                if matches!(order, Order::Fail) {
                    self.refuse_waiting();
                }
                let owner = self.shared.owner(shard);
                self.mailbox.send(owner, Mail::Order(shard, order));
            }
            CoordinatorAction::Flush { io } => self.store.flush(None, io),
            CoordinatorAction::WriteMetadata { io, block, bytes } => {
                self.shared
                    .traffic
                    .device_metadata
                    .fetch_add(bytes.len() as u64, Ordering::Relaxed);
                self.store.write_metadata(None, io, block, &bytes);
            }
            CoordinatorAction::AnswerFlush(tag, done) => {
                self.mailbox.send(worker_of(tag), Mail::Flushed(tag, done));
            }
            CoordinatorAction::Reply(ticket, reply) => self.reply(ticket, reply),
            CoordinatorAction::PeerPost(message) => self.peer_post(message),
            CoordinatorAction::ClosePeer(reason) => {
                self.close_wires();
                // The core may know already; then this tells it nothing.
                self.core_event_later(reason);
            }
            CoordinatorAction::Hold(holding) => {
                self.shared.set_holding(holding);
                if !holding {
                    self.resume_all();
                }
            }
            CoordinatorAction::Publish(catalog, serving) => {
                self.shared.exports.publish(catalog, serving)
            }
            CoordinatorAction::Log(text) => eprintln!("twinpoint: {text}"),
            CoordinatorAction::Timing { written_ns, durable_ns } => {
                let port = self.coordinator.as_ref().expect("it acts");
                let mut latencies =
                    port.latencies.lock().expect("nobody panics with the latencies");
                latencies.written.saturating_record(written_ns);
                latencies.durable.saturating_record(durable_ns);
            }
            CoordinatorAction::Confirmed { confirmed_ns } => {
                let port = self.coordinator.as_ref().expect("it acts");
                let mut latencies =
                    port.latencies.lock().expect("nobody panics with the latencies");
                latencies.confirmed.saturating_record(confirmed_ns);
            }
            CoordinatorAction::Restart(cp) => self.exit(Exit::Restart(cp)),
        }
    }

    /// Nothing is answered well any more: who waits for memory, room or the hold to end is not to wait for ever.
    fn refuse_waiting(&mut self) {
        if !self.shared.is_refusing() {
            self.shared.set_refusing();
            self.resume_all();
        }
    }

    fn resume_all(&mut self) {
        for participant in 0..self.shared.participants() {
            self.mailbox.send(participant, Mail::Resume);
        }
    }

    /// The session ends as if its wire had closed; by mail, for the coordinator is in the middle of its actions.
    fn core_event_later(&mut self, reason: String) {
        let session = self.coordinator.as_ref().map_or(0, |port| port.session);
        self.mailbox.send(self.index, Mail::LaneClosed(session, reason));
    }

    fn reply(&mut self, ticket: Ticket, reply: Reply) {
        let stopped = reply == Reply::Stopped;
        let port = self.coordinator.as_mut().expect("it replies");
        let withdrawn = port.withdrawn.remove(&ticket);
        if let Some(volume) = withdrawn.filter(|_| matches!(reply, Reply::Refused(_))) {
            self.shared.exports.offer_again(volume);
        }
        if let Some(sender) = port.replies.remove(&ticket) {
            // A caller that gave up is not told.
            _ = sender.send(reply);
        }
        if stopped {
            self.exit(Exit::Stopped);
        }
    }

    fn exit(&mut self, exit: Exit) {
        // From now on nobody is let in: a worker that has ended takes nobody's requests.
        self.ending = true;
        let port = self.coordinator.as_ref().expect("it ends");
        port.exit.lock().expect("nobody panics with the exit").get_or_insert(exit);
        self.close_wires();
        for worker in 0..self.shared.participants() {
            self.mailbox.send(worker, Mail::End);
        }
    }

    /// The gate was closed: once no admission is under way the coordinator seals.
    fn watch_gate(&mut self) -> bool {
        let port = self.coordinator.as_mut().expect("worker 0 has the gate");
        let Some(cp) = port.closing else { return false };
        if !self.shared.gate.quiesced(cp) {
            return true;
        }
        port.closing = None;
        let participants = self.shared.gate.participants(cp);
        self.coordinator_event(CoordinatorEvent::Quiesced { cp, participants });
        true
    }

    fn call(&mut self, call: Call) -> Result<(), UringError> {
        let port = self.coordinator.as_mut().expect("calls go to worker 0");
        match call {
            Call::Command(command, reply) => {
                let ticket = port.ticket(reply);
                if let Command::VolumeDelete { name } = &command {
                    match self.shared.exports.withdraw(name) {
                        Ok(None) => {}
                        Ok(Some(volume)) => drop(port.withdrawn.insert(ticket, volume)),
                        Err(InUse) => {
                            self.reply(ticket, Reply::Refused(Refusal::VolumeInUse));
                            return Ok(());
                        }
                    }
                }
                self.coordinator_event(CoordinatorEvent::Command(ticket, command));
            }
            Call::PeerHello(hello, reply) => {
                let ticket = port.ticket(reply);
                self.coordinator_event(CoordinatorEvent::PeerHello(ticket, hello));
            }
            Call::Session(session) => {
                self.begin_session(*session)?;
                let port = self.coordinator.as_ref().expect("it took the call");
                port.calls.session_taken(port.peer.is_some());
            }
            Call::Ublk(device) => {
                for queue in 0..device.queues {
                    let worker = usize::from(queue) % self.shared.workers;
                    self.mailbox.send(worker, Mail::Ublk(Arc::clone(&device), queue));
                }
            }
            Call::Status(reply) => {
                self.gauge_all();
                let now = self.now();
                let status = self.core().status(now);
                // A caller that gave up is not told.
                _ = reply.send(status);
            }
        }
        Ok(())
    }
}
