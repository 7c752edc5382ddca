//! Looks at both nodes after every event, from outside: what state each CP and the session are in, and what moved.
//!
//! ```text
//!   primary    unborn -> open -> closed -> sealed -> durable -> committed           and what the peer has of it:
//!                                             \ , received    \ , received          whole in its memory
//!                                              \ , confirmed   (confirmed too: committed)
//!   secondary  absent -> received -> durable -> committed
//! ```
//!
//! Invariants: it only reads; the same history gives the same hash and the same transitions. Rule checked here: what
//! was committed on a side is there after any crash, unless it was sent back on purpose (R3, R5).

use std::collections::BTreeMap;

use twinpoint_core::message::Role;
use twinpoint_core::units::{CpNumber, Instant};

use crate::marks::Marks;
use crate::node::Process;
use crate::random::mix;
use crate::world::World;

/// What was seen to follow what, and how often.
pub type Transitions = BTreeMap<(&'static str, &'static str), u64>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    hash: u64,
    sides: [Side; 2],
    was_down: bool,
    pub marks: Marks,
    pub points: Transitions,
    pub sessions: Transitions,
}

/// What is remembered of one node.
#[derive(Clone, Copy, Debug, Default)]
struct Side {
    /// The newest view of its newest life.
    view: Option<View>,
    session: &'static str,
    /// Nodes sent back on purpose when the view was taken.
    sent_back: u64,
}

/// One node, as it shows itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct View {
    life: u64,
    is_primary: bool,
    open: CpNumber,
    /// The gate is closed: the open CP takes nothing more and the next one does.
    is_closed: bool,
    received: CpNumber,
    confirmed: CpNumber,
    committed: CpNumber,
    base: CpNumber,
    root: u128,
}

impl Watch {
    /// A hash over the times and the chances of all events, and over all that both nodes showed.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// An event happened. Tells who died of it.
    pub fn look(&mut self, world: &World) -> Vec<usize> {
        let mut fallen = Vec::new();
        self.add(world.now);
        self.add(world.random.clone().next());
        let sent_back = world.counts.rewinds + world.counts.branches;
        for node in 0..2 {
            let process = world.nodes[node].process.as_ref();
            let before = self.sides[node].session;
            let session = self.look_at_session(node, process, world.clock(node));
            let Some(process) = process else {
                if session != before && !before.is_empty() {
                    fallen.push(node);
                }
                continue;
            };
            if is_not_yet_primary(process, world.now) {
                continue;
            }
            let view = View::of(process, world.nodes[node].life, world.clock(node));
            let side = self.sides[node];
            if side.view == Some(view) {
                continue;
            }
            if let Some(before) = side.view {
                let may_go_back = sent_back != side.sent_back;
                self.follow(node, &before, &view, may_go_back);
            }
            self.sides[node] = Side { view: Some(view), session, sent_back };
            for number in [view.open, view.received, view.confirmed, view.committed, view.base] {
                self.add(number.0);
            }
            self.add(view.root as u64);
        }
        self.look_at_faults(world, !fallen.is_empty());
        fallen
    }

    fn look_at_faults(&mut self, world: &World, someone_died: bool) {
        if someone_died {
            self.marks.hit("seen: process died");
            if world.options.paired && (0..2).all(|node| !world.is_alive(node)) {
                self.marks.hit("seen: both nodes dead");
            }
        }
        let is_down = !world.network_is_up;
        if is_down && !self.was_down {
            self.marks.hit("seen: network down");
        }
        self.was_down = is_down;
    }

    fn add(&mut self, number: u64) {
        self.hash = mix(self.hash.rotate_left(7) ^ number);
    }

    /// Which CPs moved from which state to which.
    fn follow(&mut self, node: usize, before: &View, after: &View, may_go_back: bool) {
        let is_new_life = before.life != after.life;
        assert!(
            !is_new_life || may_go_back || after.committed >= before.committed,
            "node {node} had CP {} committed and starts again with {}",
            before.committed,
            after.committed
        );
        let Some((first, last)) = before.moved(after) else { return };
        for cp in (first..=last).map(CpNumber) {
            let from = before.state(cp);
            let is_lost = is_new_life && cp > after.committed && from != "unborn";
            let to = if is_lost { "lost" } else { after.state(cp) };
            if from != to {
                *self.points.entry((from, to)).or_default() += 1;
                self.marks.hit_transition(from, to);
            }
        }
    }

    fn look_at_session(
        &mut self,
        node: usize,
        process: Option<&Process>,
        now: Instant,
    ) -> &'static str {
        let before = match self.sides[node].session {
            "" => "dead",
            known => known,
        };
        let after = process.map_or("dead", |process| session_word(process, before, now));
        if before != after {
            if matches!(after, "primary ending" | "secondary ending") {
                self.marks.hit("seen: connection lost");
            }
            *self.sessions.entry((before, after)).or_default() += 1;
            self.marks.hit_transition(before, after);
            self.sides[node].session = after;
            self.add(after.len() as u64);
        }
        after
    }
}

impl View {
    fn of(process: &Process, life: u64, now: Instant) -> View {
        let status = process.coordinator.status(now);
        let is_primary = status.role == Role::Primary;
        View {
            life,
            is_primary,
            open: status.open,
            is_closed: is_primary && process.gate.open == Some(status.open.next()),
            received: status.received,
            confirmed: status.confirmed,
            committed: status.committed,
            base: status.base,
            root: status.root.0,
        }
    }

    fn state(&self, cp: CpNumber) -> &'static str {
        if !self.is_primary {
            return match cp {
                cp if cp <= self.base => "secondary committed",
                cp if cp <= self.committed => "secondary durable",
                cp if cp <= self.received => "secondary received",
                _ => "unborn",
            };
        }
        if cp >= self.open {
            let takes_writes = if self.is_closed { self.open.next() } else { self.open };
            return match cp {
                cp if cp == takes_writes => "primary open",
                cp if cp == self.open => "primary closed",
                _ => "unborn",
            };
        }
        match (cp <= self.committed, cp <= self.received, cp <= self.confirmed) {
            _ if cp <= self.base => "primary committed",
            (false, _, true) => "primary sealed, confirmed",
            (false, true, _) => "primary sealed, received",
            (false, ..) => "primary sealed",
            (true, _, true) => "primary durable, confirmed",
            (true, true, _) => "primary durable, received",
            (true, ..) => "primary durable",
        }
    }

    /// The CPs whose state may differ between two views.
    fn moved(&self, other: &View) -> Option<(u64, u64)> {
        let ends = |view: &View| {
            let next = if view.is_primary { view.open.next() } else { view.received };
            [view.base, view.committed, view.confirmed, view.received, view.open, next]
        };
        let (one, two) = (ends(self), ends(other));
        let is_other = (self.life, self.is_primary) != (other.life, other.is_primary);
        let all = one.iter().chain(&two);
        if is_other {
            let first = all.clone().min()?.0 + 1;
            return Some((first, all.max()?.0));
        }
        let pairs = one.iter().zip(&two).filter(|(a, b)| a != b);
        let first = pairs.clone().map(|(a, b)| a.min(b).0).min();
        let last = pairs.map(|(a, b)| a.max(b).0).max();
        let gate = (self.is_closed != other.is_closed).then_some(self.open.0);
        let first = first.into_iter().chain(gate).min()?;
        let last = last.into_iter().chain(gate.map(|open| open + 1)).max()?;
        Some((first.max(1), last))
    }
}

/// It is to be a primary, and its gate has never been open: what it calls the open CP is none yet.
fn is_not_yet_primary(process: &Process, now: u64) -> bool {
    process.gate.open.is_none() && process.coordinator.status(Instant(now)).role == Role::Primary
}

/// The state of a node's session with its peer, in one phrase.
fn session_word(process: &Process, before: &'static str, now: Instant) -> &'static str {
    let status = process.coordinator.status(now);
    let is_alone = status.alone_since.is_some();
    if status.failed && status.peer != "deposed" {
        return "failed";
    }
    let is_over = process.coordinator.session_is_over();
    match (status.role, status.peer) {
        (_, "deposed") => "deposed",
        (_, "diverged") => "diverged",
        (_, "none") => "unpaired",
        (_, "absent") if !is_over && matches!(before, "dead" | "starting") => "starting",
        (Role::Primary, "absent") if !is_over => "primary ending",
        (Role::Primary, "absent") if is_alone => "primary alone",
        (Role::Primary, "absent") => "primary waiting",
        (Role::Primary, "catching-up") if is_alone => "primary alone, peer catching up",
        (Role::Primary, "catching-up") => "primary, peer catching up",
        (Role::Primary, "connected") if is_alone => "primary alone, peer in step",
        (Role::Primary, "connected") => "primary, peer in step",
        (Role::Secondary, "absent") if !is_over => "secondary ending",
        (Role::Secondary, "absent") => "secondary waiting",
        (Role::Secondary, "connected") => "secondary following",
        (role, other) => panic!("a {role:?} calls its peer {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary(open: u64, committed: u64, received: u64, confirmed: u64, base: u64) -> View {
        View {
            life: 1,
            is_primary: true,
            open: CpNumber(open),
            is_closed: false,
            received: CpNumber(received),
            confirmed: CpNumber(confirmed),
            committed: CpNumber(committed),
            base: CpNumber(base),
            root: 0,
        }
    }

    #[test]
    fn a_point_has_one_state() {
        let view = primary(7, 4, 5, 3, 3);
        let states: Vec<_> = (1..9).map(|cp| view.state(CpNumber(cp))).collect();
        let names = [
            "committed",
            "committed",
            "committed",
            "durable, received",
            "sealed, received",
            "sealed",
            "open",
        ];
        for (state, name) in states.iter().zip(names) {
            assert_eq!(*state, format!("primary {name}"));
        }
        assert_eq!(states[7], "unborn");
        let closed = View { is_closed: true, ..view };
        assert_eq!(closed.state(CpNumber(7)), "primary closed");
        assert_eq!(closed.state(CpNumber(8)), "primary open");
    }

    #[test]
    fn only_points_that_moved_are_looked_at() {
        let view = primary(7, 4, 5, 3, 3);
        assert_eq!(view.moved(&view), None);
        assert_eq!(view.moved(&View { committed: CpNumber(6), ..view }), Some((4, 6)));
        assert_eq!(view.moved(&View { is_closed: true, ..view }), Some((7, 8)));
        let mut watch = Watch::default();
        watch.follow(0, &view, &View { committed: CpNumber(6), ..view }, false);
        let seen: Vec<_> = watch.points.into_iter().collect();
        assert_eq!(
            seen,
            [
                (("primary sealed", "primary durable"), 1),
                (("primary sealed, received", "primary durable, received"), 1)
            ]
        );
    }

    #[test]
    fn what_a_crash_drops_is_lost_and_what_was_committed_is_not() {
        let (view, mut watch) = (primary(7, 4, 5, 3, 3), Watch::default());
        let again = View { life: 3, ..primary(6, 5, 4, 4, 4) };
        watch.follow(0, &view, &again, false);
        assert_eq!(watch.points.get(&("primary sealed", "lost")), Some(&1));
        assert_eq!(watch.points.get(&("primary open", "lost")), Some(&1));
        let worse = View { life: 3, ..primary(4, 3, 3, 3, 3) };
        let broken = crate::panics::catch(|| watch.follow(1, &view, &worse, false));
        assert_eq!(
            broken.expect_err("a CP is missing").text,
            "node 1 had CP 4 committed and starts again with 3"
        );
        watch.follow(1, &view, &worse, true);
    }
}
