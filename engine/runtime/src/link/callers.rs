//! Callers: who is being served, so that strangers can neither fill the machine with threads nor lock the peer out.
//!
//! Invariants: at most [`CALLERS_MAX`] callers at once, and of one address at most [`STRANGERS_PER_ADDRESS_MAX`] that
//! have not proved the key; a place is given back when its guard is dropped.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use super::lock;

/// Most callers served at once.
pub(super) const CALLERS_MAX: usize = 64;
/// Most callers of one address that have proved nothing yet.
pub(super) const STRANGERS_PER_ADDRESS_MAX: usize = 32;

/// Those who are being served.
#[derive(Debug, Default)]
pub(super) struct Callers(Mutex<Served>);

#[derive(Debug, Default)]
struct Served {
    next: u64,
    /// Number, address, and whether the key was proved.
    callers: Vec<(u64, IpAddr, bool)>,
}

impl Callers {
    /// A place for a caller, if there is one.
    pub(super) fn enter(self: &Arc<Callers>, address: IpAddr) -> Option<Place> {
        let mut served = lock(&self.0);
        let strangers =
            served.callers.iter().filter(|(_, other, known)| *other == address && !known).count();
        if served.callers.len() >= CALLERS_MAX || strangers >= STRANGERS_PER_ADDRESS_MAX {
            return None;
        }
        let number = served.next;
        served.next += 1;
        served.callers.push((number, address, false));
        Some(Place { callers: Arc::clone(self), number })
    }
}

/// A caller's place.
#[derive(Debug)]
pub(super) struct Place {
    callers: Arc<Callers>,
    number: u64,
}

impl Place {
    /// The caller has proved the key.
    pub(super) fn is_known(&self) {
        let mut served = lock(&self.callers.0);
        if let Some(caller) = served.callers.iter_mut().find(|caller| caller.0 == self.number) {
            caller.2 = true;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.callers.0).callers.retain(|caller| caller.0 != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_of_one_address_leave_room_for_others() {
        let callers = Arc::new(Callers::default());
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut places: Vec<Place> =
            (0..STRANGERS_PER_ADDRESS_MAX).map(|_| callers.enter(one).unwrap()).collect();
        assert!(callers.enter(one).is_none());
        places.push(callers.enter(other).unwrap());
        places[0].is_known();
        places.push(callers.enter(one).unwrap());
        assert!(callers.enter(one).is_none());
        for place in &places {
            place.is_known();
        }
        while places.len() < CALLERS_MAX {
            let place = callers.enter(one).unwrap();
            place.is_known();
            places.push(place);
        }
        assert!(callers.enter(other).is_none());
        places.pop();
        assert!(callers.enter(other).is_some());
    }
}
