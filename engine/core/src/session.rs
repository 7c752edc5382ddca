//! Whether two stores may form a pair, and from which CP the secondary goes on (R8).
//!
//! Both sides judge the same two hellos with the same function, so they agree. Invariants: nothing is changed
//! by judging; a lower term never wins; CPs that only one side has are never dropped without a word.

use crate::contract::Refusal;
use crate::message::{Hello, Role};
use crate::superblock::TermStart;
use crate::units::CpNumber;

/// Judges a primary's and a secondary's hello. Gives the CP from which the secondary goes on: its last one.
///
/// # Errors
/// Why the two may not form a session.
pub fn judge(primary: &Hello, secondary: &Hello) -> Result<CpNumber, Refusal> {
    if primary.store != secondary.store {
        return Err(Refusal::OtherStore(primary.store, secondary.store));
    }
    if primary.geometry != secondary.geometry {
        return Err(Refusal::OtherGeometry);
    }
    if (primary.role, secondary.role) != (Role::Primary, Role::Secondary) {
        // Two primaries: the one with the lower term is deposed, and must hear so.
        if primary.term < secondary.term {
            return Err(Refusal::StaleTerm { theirs: primary.term.0, ours: secondary.term.0 });
        }
        return Err(Refusal::SameRole);
    }
    if primary.term < secondary.term {
        return Err(Refusal::StaleTerm { theirs: primary.term.0, ours: secondary.term.0 });
    }
    let Some(common) = common_limit(&primary.history, &secondary.history) else {
        return Err(Refusal::NoCommonHistory);
    };
    if secondary.last > common.min(primary.last) {
        if secondary.base > common && secondary.last > common {
            return Err(Refusal::Branch { common, theirs: secondary.last });
        }
        if secondary.base > primary.last {
            return Err(Refusal::PrimaryLostPoints { told: secondary.base, ours: primary.last });
        }
        // Nobody was told of them: the primary died before they were committed there.
        return Err(Refusal::Rewind(common.min(primary.last)));
    }
    if secondary.last < primary.base {
        return Err(Refusal::TooFarBehind { theirs: secondary.last, base: primary.base });
    }
    Ok(secondary.last)
}

/// The last CP number that both histories give to the same term; none if they start apart.
///
/// A history is a list of (term, first CP), oldest first: a promotion opens a term, and a primary that did not stop
/// cleanly opens its own term again, since CPs it lost may have reached its peer. Up to the first entry in which the
/// two lists differ they are one; the earlier of the two differing entries' first CP ends the common part. One list
/// may have forgotten its oldest entries.
#[must_use]
pub fn common_limit(one: &[TermStart], other: &[TermStart]) -> Option<CpNumber> {
    let start =
        |list: &[TermStart], first: &TermStart| list.iter().position(|entry| entry == first);
    let (one, other) = match (one.first(), other.first()) {
        (Some(a), Some(b)) => match (start(other, a), start(one, b)) {
            (Some(skip), _) => (one, &other[skip..]),
            (None, Some(skip)) => (&one[skip..], other),
            (None, None) => return None,
        },
        _ => return None,
    };
    let shared = one.iter().zip(other).take_while(|(a, b)| a == b).count();
    let ends = [one.get(shared), other.get(shared)];
    let first = ends.iter().flatten().map(|start| start.first).min();
    Some(first.map_or(CpNumber(u64::MAX), |first| CpNumber(first.0.saturating_sub(1))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;
    use crate::units::{StoreId, Term};

    fn hello(role: Role, history: &[(u64, u64)], last: u64, base: u64) -> Hello {
        let history: Vec<TermStart> = history
            .iter()
            .map(|(term, first)| TermStart { term: Term(*term), first: CpNumber(*first) })
            .collect();
        Hello {
            role,
            store: StoreId([7; 16]),
            geometry: Geometry::plan(1 << 18, 2, None, None).expect("1 GiB holds two shards"),
            term: history.last().expect("a term").term,
            history,
            last: CpNumber(last),
            base: CpNumber(base),
            roots: Vec::new(),
        }
    }

    fn pair(
        p: (&[(u64, u64)], u64, u64),
        s: (&[(u64, u64)], u64, u64),
    ) -> Result<CpNumber, Refusal> {
        judge(&hello(Role::Primary, p.0, p.1, p.2), &hello(Role::Secondary, s.0, s.1, s.2))
    }

    #[test]
    fn a_secondary_goes_on_where_it_is() {
        assert_eq!(pair((&[(1, 1)], 10, 5), (&[(1, 1)], 7, 6)), Ok(CpNumber(7)));
        assert_eq!(pair((&[(1, 1)], 0, 0), (&[(1, 1)], 0, 0)), Ok(CpNumber(0)));
    }

    #[test]
    fn a_secondary_behind_the_base_is_refused() {
        let refusal = pair((&[(1, 1)], 10, 8), (&[(1, 1)], 7, 6));
        assert_eq!(refusal, Err(Refusal::TooFarBehind { theirs: CpNumber(7), base: CpNumber(8) }));
    }

    #[test]
    fn unanswered_points_of_the_secondary_are_rewound_and_told_ones_never() {
        assert_eq!(
            pair((&[(1, 1)], 10, 5), (&[(1, 1)], 12, 9)),
            Err(Refusal::Rewind(CpNumber(10)))
        );
        assert_eq!(
            pair((&[(1, 1)], 10, 5), (&[(1, 1)], 12, 11)),
            Err(Refusal::PrimaryLostPoints { told: CpNumber(11), ours: CpNumber(10) })
        );
    }

    #[test]
    fn points_of_a_primary_before_its_crash_are_rewound() {
        let resumed: &[(u64, u64)] = &[(1, 1), (1, 11)];
        assert_eq!(pair((resumed, 15, 9), (&[(1, 1)], 12, 9)), Err(Refusal::Rewind(CpNumber(10))));
        assert_eq!(pair((resumed, 15, 9), (&[(1, 1)], 10, 9)), Ok(CpNumber(10)));
        let twice: &[(u64, u64)] = &[(1, 1), (1, 11), (1, 11)];
        assert_eq!(pair((twice, 15, 9), (resumed, 11, 9)), Err(Refusal::Rewind(CpNumber(10))));
    }

    #[test]
    fn a_history_that_forgot_its_oldest_terms_is_still_common() {
        let long: &[(u64, u64)] = &[(1, 1), (2, 5), (3, 9)];
        assert_eq!(pair((&long[1..], 20, 9), (long, 12, 9)), Ok(CpNumber(12)));
        assert_eq!(pair((long, 20, 9), (&long[1..2], 12, 5)), Err(Refusal::Rewind(CpNumber(8))));
    }

    #[test]
    fn a_returning_primary_follows_unless_it_has_a_branch() {
        let new: &[(u64, u64)] = &[(1, 1), (2, 21)];
        assert_eq!(pair((new, 30, 20), (&[(1, 1)], 20, 20)), Ok(CpNumber(20)));
        assert_eq!(
            pair((new, 30, 20), (&[(1, 1)], 23, 23)),
            Err(Refusal::Branch { common: CpNumber(20), theirs: CpNumber(23) })
        );
        assert_eq!(
            pair((&[(1, 1)], 30, 20), (new, 30, 20)),
            Err(Refusal::StaleTerm { theirs: 1, ours: 2 })
        );
    }
}
