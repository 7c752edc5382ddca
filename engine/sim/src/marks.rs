//! Coverage marks: what the histories must have shown, each with a name, and how often it was seen.
//!
//! Invariant: only names of [`MARKS`] and kinds of faults are counted. A name that nobody can hit is found by the test
//! that wants them all.

use std::collections::BTreeMap;

use crate::faults::{Fault, FaultCounts};

/// Every mark and what it means. A mark with an arrow is a transition: `from -> to`.
pub const MARKS: &[(&str, &str)] = &[
    ("seen: process died", "and its disk kept what was written, or lost power"),
    ("seen: both nodes dead", "no process lived"),
    ("seen: connection lost", "a session ended and its process went on"),
    ("seen: network down", "no connection could be made for a while"),
    ("seen: device failed", "a write or a flush failed"),
    ("seen: read failed", "a client's read failed because the device did"),
    ("seen: lane closed", "a placed block did not match its checksum"),
    ("seen: promotion", "an operator promoted a secondary"),
    ("seen: no space", "a write found no space"),
    ("seen: writers held", "a primary held its writers back"),
    ("seen: old primary returned", "a store with CPs of its own came back and dropped them"),
    ("seen: base given up", "a pair could not be mended without a copy"),
    ("seen: secondary lost for good", "a primary had to carry on alone to the end"),
    ("unborn -> primary open", "a CP takes writes"),
    ("primary open -> primary closed", "the gate closed"),
    ("primary closed -> primary sealed", "all shards were ordered to seal"),
    ("primary sealed -> primary durable", "durable here first"),
    ("primary sealed -> primary committed", "nobody else is waited for"),
    ("primary sealed -> primary sealed, received", "whole in the secondary's memory first"),
    ("primary sealed, received -> primary sealed, confirmed", "durable there first"),
    ("primary sealed, received -> primary durable, received", "durable here, whole there"),
    ("primary sealed, confirmed -> primary committed", "durable here last"),
    ("primary durable -> primary durable, received", "whole there, later"),
    ("primary durable, received -> primary committed", "confirmed"),
    ("primary durable, received -> primary durable", "the secondary's memory is gone"),
    ("primary durable -> primary committed", "confirmed by a secondary that had it"),
    ("primary open -> lost", "a crash dropped what was staged"),
    ("primary sealed -> lost", "a crash dropped a CP that was not durable"),
    ("unborn -> secondary received", "all parts are there, the roots are equal"),
    ("secondary received -> secondary durable", "committed there"),
    ("secondary durable -> secondary committed", "committed on both sides, as the primary said"),
    ("secondary received -> lost", "a crash dropped what was only in the secondary's memory"),
    ("dead -> starting", "recovery, and the superblock is told"),
    ("starting -> primary waiting", "the store is in use, no peer yet"),
    ("starting -> secondary waiting", "the same on a secondary"),
    ("dead -> unpaired", "a store without a peer"),
    ("primary waiting -> primary, peer catching up", "a session begins"),
    ("primary, peer catching up -> primary, peer in step", "every lane reached the newest CP"),
    ("secondary waiting -> secondary following", "a session begins"),
    ("primary, peer in step -> primary ending", "the session is lost"),
    ("primary, peer catching up -> primary ending", "lost before it was in step"),
    ("secondary following -> secondary ending", "lost"),
    ("primary ending -> primary waiting", "every shard has let go of it"),
    ("secondary ending -> secondary waiting", "the same on the secondary"),
    ("primary waiting -> primary alone", "carrying on without the peer"),
    ("primary alone -> primary alone, peer catching up", "the peer is back"),
    ("primary alone, peer in step -> primary, peer in step", "no longer alone"),
    ("secondary waiting -> primary alone", "promoted"),
    ("recovery: clean", "the store was stopped in order"),
    ("recovery: unclean, nothing to repair", "a crash between two writes"),
    ("recovery: older copy", "one of two copies was behind"),
    ("recovery: record cut off", "a CP was not whole"),
    ("recovery: newer than the superblock", "records told of CPs that the superblock did not know"),
    ("recovery: sent back", "a store was opened as of an older CP"),
    ("recovery: refused", "a damaged store was not opened"),
];

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Marks {
    seen: BTreeMap<&'static str, u64>,
    faults: FaultCounts,
}

impl Marks {
    /// It was seen.
    pub(crate) fn hit(&mut self, name: &str) {
        self.add(name, 1);
    }

    /// It was seen so often.
    pub(crate) fn add(&mut self, name: &str, times: u64) {
        let mark = MARKS.iter().find(|(known, _)| *known == name);
        let (name, _) = mark.unwrap_or_else(|| panic!("{name:?} is no mark"));
        if times > 0 {
            *self.seen.entry(name).or_default() += times;
        }
    }

    /// A transition was seen: a mark, or not.
    pub(crate) fn hit_transition(&mut self, from: &str, to: &str) {
        let is_it = |name: &str| {
            name.strip_prefix(from).and_then(|rest| rest.strip_prefix(" -> ")) == Some(to)
        };
        if let Some((name, _)) = MARKS.iter().find(|(name, _)| is_it(name)) {
            *self.seen.entry(name).or_default() += 1;
        }
    }

    /// Faults struck.
    pub(crate) fn add_faults(&mut self, faults: &FaultCounts) {
        self.faults += *faults;
    }

    /// How often each mark was seen: the kinds of faults, then [`MARKS`]; with its meaning.
    #[must_use]
    pub fn table(&self) -> Vec<(String, &'static str, u64)> {
        let faults = Fault::ALL.iter().map(|(fault, name)| {
            (format!("fault: {name}"), "this kind of fault struck", self.faults.of(*fault))
        });
        let times = |name: &str| self.seen.get(name).copied().unwrap_or(0);
        let marks = MARKS.iter().map(|(name, what)| ((*name).to_owned(), *what, times(name)));
        faults.chain(marks).collect()
    }

    /// Marks that were never seen.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let missing = self.table().into_iter().filter(|(.., times)| *times == 0);
        missing.map(|(name, ..)| name).collect()
    }
}

impl std::ops::AddAssign<&Marks> for Marks {
    fn add_assign(&mut self, other: &Marks) {
        for (name, times) in &other.seen {
            *self.seen.entry(name).or_default() += times;
        }
        self.faults += other.faults;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mark_has_one_name() {
        let names: std::collections::BTreeSet<_> = MARKS.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), MARKS.len());
    }

    #[test]
    fn transitions_are_marks_by_both_their_ends() {
        let mut marks = Marks::default();
        marks.hit_transition("dead", "starting");
        marks.hit_transition("dead", "nowhere");
        marks.hit_transition("d", "ead -> starting");
        let seen = marks.table().into_iter().filter(|(.., times)| *times > 0);
        let names: Vec<String> = seen.map(|(name, ..)| name).collect();
        assert_eq!(names, ["dead -> starting"]);
        assert_eq!(marks.missing().len(), marks.table().len() - 1);
    }
}
