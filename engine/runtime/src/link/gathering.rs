//! Gathering: the listener's side of a set-up waits here until every lane has come.
//!
//! Invariants:
//! - The desk knows at most one gathering, the newest; the one before is over when a newer one is put there.
//! - The node is asked and a session is handed over under one lock: no hand-over falls between the node's consent to
//!   a newer set-up and the end of the older one.
//! - A lane is promised to one caller once, and only to the gathering whose session it names.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use twinpoint_core::message::Hello;
use twinpoint_core::units::ShardId;

use super::setup_message::SessionId;
use super::trouble::Trouble;
use super::{Lane, Limit, lock};

/// Where lanes find the set-up they belong to.
#[derive(Default)]
pub(super) struct Desk {
    admission: Mutex<()>,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    gathering: Option<Arc<Gathering>>,
    stopped: bool,
}

/// A set-up that waits for its lanes.
pub(super) struct Gathering {
    session: SessionId,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    places: Vec<Place>,
    over: Option<Over>,
}

enum Place {
    Empty,
    Promised,
    There(Box<Lane>),
}

#[derive(Clone, Copy)]
enum Over {
    Superseded,
    Stopped,
    LaneLost,
}

impl Desk {
    /// Asks the node, by `ask`, and on its consent opens a gathering for the lanes of this session.
    pub(super) fn admit(
        &self,
        session: SessionId,
        ask: impl FnOnce() -> Result<Box<Hello>, Trouble>,
    ) -> Result<(Box<Hello>, Arc<Gathering>), Trouble> {
        let _admission = lock(&self.admission);
        let hello = ask()?;
        let places = (0..hello.geometry.shards).map(|_| Place::Empty).collect();
        let state = Mutex::new(State { places, over: None });
        let gathering = Arc::new(Gathering { session, state, changed: Condvar::new() });
        let mut current = lock(&self.current);
        if current.stopped {
            return Err(Trouble::Stopping);
        }
        if let Some(older) = current.gathering.replace(Arc::clone(&gathering)) {
            older.end(Over::Superseded);
        }
        Ok((hello, gathering))
    }

    /// The gathering of this session, if it is the one under way.
    pub(super) fn find(&self, session: SessionId) -> Option<Arc<Gathering>> {
        let current = lock(&self.current);
        current.gathering.as_ref().filter(|gathering| gathering.session == session).cloned()
    }

    /// Ends a gathering by handing its session over, unless a newer one took its place.
    pub(super) fn finish(
        &self,
        gathering: &Arc<Gathering>,
        hand_over: impl FnOnce() -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let _admission = lock(&self.admission);
        if !self.remove(gathering) {
            return Err(Trouble::Superseded);
        }
        hand_over()
    }

    /// Takes a gathering from the desk. False if it is not there.
    pub(super) fn remove(&self, gathering: &Arc<Gathering>) -> bool {
        let mut current = lock(&self.current);
        let is_there =
            current.gathering.as_ref().is_some_and(|there| Arc::ptr_eq(there, gathering));
        if is_there {
            current.gathering = None;
        }
        is_there
    }

    /// Ends what is under way, and lets nothing begin.
    pub(super) fn stop(&self) {
        let mut current = lock(&self.current);
        current.stopped = true;
        if let Some(gathering) = current.gathering.take() {
            gathering.end(Over::Stopped);
        }
    }
}

impl Gathering {
    /// Promises a shard's lane to one caller.
    pub(super) fn promise(&self, shard: ShardId) -> Result<(), Trouble> {
        let mut state = lock(&self.state);
        match state.places.get_mut(usize::from(shard.0)) {
            Some(place @ Place::Empty) => {
                *place = Place::Promised;
                Ok(())
            }
            _ => Err(Trouble::LaneUnknown(shard)),
        }
    }

    /// The lane that was promised, or none because it was lost: then the whole set-up is over.
    pub(super) fn fulfil(&self, shard: ShardId, lane: Option<Lane>) {
        let Some(lane) = lane else {
            self.end(Over::LaneLost);
            return;
        };
        let mut state = lock(&self.state);
        let place = &mut state.places[usize::from(shard.0)];
        assert!(matches!(place, Place::Promised), "the lane of shard {shard} was not promised");
        *place = Place::There(Box::new(lane));
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for all lanes, in the order of their shards.
    pub(super) fn wait(&self, limit: Limit) -> Result<Vec<Lane>, Trouble> {
        let state = lock(&self.state);
        let wanted = state.places.len();
        let waiting = |state: &mut State| state.over.is_none() && state.there() < wanted;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, limit.left()?, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        let there = state.there();
        match state.over {
            Some(Over::Superseded) => return Err(Trouble::Superseded),
            Some(Over::Stopped) => return Err(Trouble::Stopping),
            None if there == wanted => {}
            None => return Err(Trouble::LanesMissing { there, wanted }),
            Some(Over::LaneLost) => return Err(Trouble::LaneLost),
        }
        let places = std::mem::take(&mut state.places);
        Ok(places.into_iter().filter_map(Place::into_lane).collect())
    }

    fn end(&self, over: Over) {
        lock(&self.state).over.get_or_insert(over);
        self.changed.notify_all();
    }
}

impl State {
    fn there(&self) -> usize {
        self.places.iter().filter(|place| matches!(place, Place::There(_))).count()
    }
}

impl Place {
    fn into_lane(self) -> Option<Lane> {
        match self {
            Place::There(lane) => Some(*lane),
            Place::Empty | Place::Promised => None,
        }
    }
}
