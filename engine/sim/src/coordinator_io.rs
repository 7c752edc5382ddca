//! The shell's side of a coordinator: feeds it events, carries out its actions, keeps the gate.
//!
//! Invariants: a seal order reaches a shard after every request of that CP or an earlier one; reports and orders keep
//! their order; a tick comes when the coordinator asked for it.

use twinpoint_core::contract::{
    Command, CoordinatorAction, CoordinatorEvent, IoToken, Order, Reply, Ticket,
};
use twinpoint_core::units::{CpNumber, ShardId, ShardSet};

use crate::node::{Kind, Operation, Queue};
use crate::shard_io::metadata_blocks;
use crate::wire::TicketUse;
use crate::world::{Event, NodeEvent, World};

impl World {
    /// Feeds a coordinator an event and does all that it then wants.
    pub fn feed_coordinator(&mut self, node: usize, event: CoordinatorEvent) {
        if !self.is_well(node) {
            return;
        }
        let now = self.clock(node);
        let process = self.process(node);
        let open_is_empty = process.gate.is_open_empty();
        process.coordinator.handle(now, open_is_empty, event);
        self.drain_coordinator(node);
    }

    /// Carries out what a coordinator wants, and sets its next tick.
    pub fn drain_coordinator(&mut self, node: usize) {
        let life = self.nodes[node].life;
        while self.is_alive(node) && self.nodes[node].life == life {
            let Some(action) = self.process(node).coordinator.poll_action() else { break };
            if self.action_happens(node) {
                self.coordinator_action(node, action);
            }
        }
        if !self.is_alive(node) || self.nodes[node].life != life {
            return;
        }
        let Some(wanted) = self.process(node).coordinator.poll_timeout() else { return };
        let at = wanted.0.saturating_sub(self.nodes[node].clock_ahead_ns).max(self.now + 1);
        let process = self.process(node);
        if process.tick_at.is_none_or(|known| known > at) {
            process.tick_at = Some(at);
            self.at(at, Event::Node(node, life, NodeEvent::Tick));
        }
    }

    /// Asks something of a coordinator on an operator's or the shell's behalf.
    pub fn ask(&mut self, node: usize, what: TicketUse, command: Command) {
        let ticket = self.ticket(what);
        self.enqueue(node, Queue::Control, 2_000, NodeEvent::Command(ticket, command));
    }

    pub fn ticket(&mut self, what: TicketUse) -> Ticket {
        let id = self.tag_next;
        self.tag_next += 1;
        self.tickets.insert(id, what);
        Ticket(id)
    }

    /// A coordinator's device work ends.
    pub fn coordinator_disk_done(&mut self, node: usize, id: u64, io: IoToken, kind: &Kind) {
        match kind {
            Kind::WriteMetadata => self.nodes[node].disk.end_write(id),
            Kind::Flush { mark } => self.flushed(node, *mark),
            other => panic!("{other:?} is no work of a coordinator"),
        }
        self.feed_coordinator(node, CoordinatorEvent::Done { io, result: Ok(()) });
    }

    fn coordinator_action(&mut self, node: usize, action: CoordinatorAction) {
        self.note(|| format!("node {node} does {action:?}"));
        let delay_ns = self.options.disk_delay_ns;
        match action {
            CoordinatorAction::CloseGate => self.close_gate(node),
            CoordinatorAction::OpenGate(cp) => {
                let gate = &mut self.process(node).gate;
                gate.open = Some(cp);
                gate.marked = ShardSet::default();
            }
            CoordinatorAction::Order(shard, order) => self.send_order(node, shard, order),
            CoordinatorAction::Flush { io } => {
                let mark = self.nodes[node].disk.flush_mark();
                self.begin_operation(
                    node,
                    delay_ns,
                    Operation { shard: None, io, kind: Kind::Flush { mark } },
                );
            }
            CoordinatorAction::WriteMetadata { io, block, bytes } => {
                let operation = Operation { shard: None, io, kind: Kind::WriteMetadata };
                let id = self.begin_operation(node, delay_ns, operation);
                self.nodes[node].disk.begin_write(id, block.0, metadata_blocks(&bytes));
            }
            CoordinatorAction::AnswerFlush(tag, kept) => self.flush_answered(node, tag, kept),
            CoordinatorAction::Reply(ticket, reply) => self.reply(node, ticket, reply),
            CoordinatorAction::PeerPost(message) => self.peer_post(node, message),
            CoordinatorAction::ClosePeer(reason) => self.close_peer(node, &reason),
            CoordinatorAction::Hold(hold) => {
                self.counts.holds += u64::from(hold);
                self.process(node).holds = hold;
            }
            CoordinatorAction::Timing { .. } => self.counts.points += 1,
            CoordinatorAction::Confirmed { .. } => {}
            CoordinatorAction::Restart(cp) => self.go_back(node, cp),
            CoordinatorAction::Publish(catalog, serves) => {
                let process = self.process(node);
                process.catalog = catalog;
                process.serves = serves;
            }
            CoordinatorAction::Log(text) => {
                assert!(!text.contains("ROOTS DIFFER"), "{text}");
                self.note(|| format!("node {node} says: {text}"));
            }
        }
    }

    fn close_gate(&mut self, node: usize) {
        let process = self.process(node);
        let cp = process.gate.open.expect("an open gate is closed");
        let participants = std::mem::take(&mut process.gate.marked);
        process.gate.open = Some(cp.next());
        self.enqueue(node, Queue::Control, 3_000, NodeEvent::Quiesced(cp, participants));
    }

    fn send_order(&mut self, node: usize, shard: ShardId, order: Order) {
        let now = self.now;
        if let Order::Committed { committed, base, .. } = order {
            self.images.check_said(node, committed, base, self.nodes[node].keeps_base);
            self.probe_power_cut(node, committed);
        }
        let process = self.process(node);
        if matches!(order, Order::Seal(_)) {
            let done = process.frontends_done(shard);
            process.arrival(Queue::Orders(shard), done.max(now), 0);
        }
        self.enqueue(node, Queue::Orders(shard), 2_000, NodeEvent::Order(shard, order));
    }

    fn go_back(&mut self, node: usize, cp: CpNumber) {
        self.counts.rewinds += 1;
        self.note(|| format!("node {node} goes back to CP {cp}"));
        self.kill(node, false);
        self.soon(20_000, Event::Start(node, Some(cp)));
    }

    fn reply(&mut self, node: usize, ticket: Ticket, reply: Reply) {
        let what = self.tickets.remove(&ticket.0).expect("a ticket is answered once");
        self.note(|| format!("node {node} replies to {what:?}: {reply:?}"));
        match what {
            TicketUse::Client(client, operation) => {
                self.command_answered(node, client, operation, reply)
            }
            TicketUse::DialHello
            | TicketUse::PeerHello { .. }
            | TicketUse::Judge { .. }
            | TicketUse::RefuserHello { .. }
            | TicketUse::OwnView => self.handshake_reply(node, what, reply),
            TicketUse::Promote => self.promote_replied(node, reply),
            TicketUse::DropBranch => self.branch_dropped(node, &reply),
            TicketUse::StaleCheckpoint { knows } => self.stale_checkpoint(node, knows, &reply),
            TicketUse::Stop => match reply {
                Reply::Stopped => self.process(node).is_stopped = true,
                other => panic!("a stop was answered {other:?}"),
            },
        }
    }
}
