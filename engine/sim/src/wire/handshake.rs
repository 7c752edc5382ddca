//! How two nodes become a session: who calls whom, what each says of itself, who refuses, and what an operator does then.
//!
//! Invariants: a node that leads is never asked to follow, but learns whether it was deposed; a hello that was sent to an
//! earlier life connects nobody.

use twinpoint_core::contract::{Command, Refusal, Reply};
use twinpoint_core::message::Hello;

use super::TicketUse;
use crate::node::Queue;
use crate::world::{Event, NodeEvent, World};

impl World {
    /// A node that could be a primary looks for its peer, now and then.
    pub fn dial(&mut self, node: usize) {
        self.soon(5_000_000, Event::Dial(node));
        let has_side = self.side_of(node).is_some();
        if !self.options.paired
            || !self.network_is_up
            || !self.is_alive(node)
            || self.nodes[node].is_paused
            || has_side
            || self.is_pair_broken
        {
            return;
        }
        if self.process(node).is_stopped || !self.process(node).leads() {
            return;
        }
        self.ask(node, TicketUse::DialHello, Command::Hello);
    }

    /// A step of the handshake was answered.
    pub fn handshake_reply(&mut self, node: usize, what: TicketUse, reply: Reply) {
        let peer = 1 - node;
        if let TicketUse::OwnView = what {
            if let Reply::Refused(Refusal::StaleTerm { .. }) = reply {
                self.deposed(node);
            }
            return;
        }
        let is_stale = matches!(reply, Reply::Refused(Refusal::StaleTerm { .. }));
        if is_stale && matches!(what, TicketUse::PeerHello { .. }) && self.process(node).leads() {
            // A primary was called by another one, and judged itself, whether or not its answer gets through.
            self.deposed(node);
            return;
        }
        if !self.network_is_up || self.is_cut[node] || !self.is_alive(peer) {
            return;
        }
        let peer_life = self.nodes[peer].life;
        match (what, reply) {
            (TicketUse::DialHello, Reply::Hello(hello)) => {
                let dialer_life = self.nodes[node].life;
                let what = TicketUse::PeerHello { dialer: node, dialer_life, hello: hello.clone() };
                let ticket = self.ticket(what);
                let decoded = Hello::decode(&hello.encode()).expect("a hello comes back");
                assert_eq!(decoded, *hello, "a hello comes back");
                let delay_ns = self.options.wire_delay_ns;
                self.enqueue(
                    peer,
                    Queue::Control,
                    delay_ns,
                    NodeEvent::PeerHello(ticket, Box::new(decoded)),
                );
            }
            (TicketUse::PeerHello { dialer, dialer_life, hello }, Reply::Hello(theirs)) => {
                if self.nodes[dialer].life == dialer_life {
                    let peer_life = self.nodes[node].life;
                    let what = TicketUse::Judge { theirs: theirs.clone(), ours: hello, peer_life };
                    self.ask(dialer, what, Command::Judge(theirs));
                }
            }
            (TicketUse::PeerHello { dialer, dialer_life, .. }, Reply::Refused(refusal)) => {
                if !is_stale {
                    self.refused(dialer, node, &refusal);
                } else {
                    let what = TicketUse::RefuserHello { dialer, dialer_life };
                    self.ask(node, what, Command::Hello);
                }
            }
            (TicketUse::RefuserHello { dialer, dialer_life }, Reply::Hello(theirs)) => {
                if self.nodes[dialer].life == dialer_life {
                    self.ask(dialer, TicketUse::OwnView, Command::Judge(theirs));
                }
            }
            (TicketUse::RefuserHello { .. }, Reply::Refused(_)) => {}
            (TicketUse::Judge { theirs, ours, peer_life: life }, Reply::Accepted(from)) => {
                assert_eq!(from, theirs.last, "the secondary goes on where it is");
                let is_free = self.side_of(peer).is_none() && self.side_of(node).is_none();
                if life == peer_life && is_free && !self.is_cut[peer] {
                    self.connect(node, *ours, *theirs);
                }
            }
            (TicketUse::Judge { .. }, Reply::Refused(refusal)) => {
                self.refused(node, peer, &refusal)
            }
            (TicketUse::DialHello, Reply::Refused(_)) => {}
            (what, reply) => panic!("{what:?} was answered {reply:?}"),
        }
    }

    fn connect(&mut self, dialer: usize, dialer_hello: Hello, peer_hello: Hello) {
        let id = self.connections.connect([0, 1].map(|node| self.nodes[node].life));
        self.counts.sessions += 1;
        let hellos =
            if dialer == 0 { [peer_hello, dialer_hello] } else { [dialer_hello, peer_hello] };
        for (node, hello) in hellos.into_iter().enumerate() {
            let delay_ns = self.options.wire_delay_ns;
            self.enqueue(node, Queue::Control, delay_ns, NodeEvent::PeerUp(id, Box::new(hello)));
        }
    }

    fn refused(&mut self, primary: usize, secondary: usize, refusal: &Refusal) {
        self.note(|| format!("the pair cannot be: {refusal:?}"));
        match refusal {
            Refusal::SessionEnding
            | Refusal::StoreFailed
            | Refusal::Rewind(_)
            | Refusal::Stopping => {}
            Refusal::SameRole => self.both_lead(),
            Refusal::StaleTerm { .. } => self.deposed(primary),
            Refusal::Branch { .. } => self.drop_branch(secondary),
            Refusal::TooFarBehind { .. } => self.pair_broke(primary, refusal),
            other => panic!("the pair was refused: {other:?}"),
        }
    }

    /// The operator drops what only the returning store has.
    fn drop_branch(&mut self, node: usize) {
        let now = self.clock(node);
        if let Some(branch) = self.process(node).coordinator.status(now).branch {
            let name = branch.to_string();
            self.ask(node, TicketUse::DropBranch, Command::BranchDrop { name });
        }
    }
}
