//! Explain: what a refusal means to an operator, and what to do about it.
//!
//! Used where refusals are told: the log of both sides, the tool's error line. Invariant: one line, and every
//! refusal has one.

use twinpoint_core::contract::Refusal;

/// One line that says why, and what to do.
#[must_use]
pub fn explain(refusal: &Refusal) -> String {
    match refusal {
        Refusal::NotPrimary => {
            "this node is not primary: ask the primary, or promote this node first".to_owned()
        }
        Refusal::NotSecondary => "this node is primary already: nothing to do".to_owned(),
        Refusal::Catalog(error) => error.to_string(),
        Refusal::VolumeInUse => {
            "clients use the volume: disconnect them first (`twinpoint status` counts them)"
                .to_owned()
        }
        Refusal::PrimaryConnected => {
            "the primary is connected: stop it first, or take over from it with --force".to_owned()
        }
        Refusal::StoreFailed => {
            "the store has failed: read the log for the first error, mend its cause, then restart \
             the node"
                .to_owned()
        }
        Refusal::Stopping => "the node is stopping: try again once it is back".to_owned(),
        Refusal::BadName => {
            "a checkpoint's name is 1 to 64 bytes without control characters: choose another"
                .to_owned()
        }
        Refusal::NewerTerm(term) => format!(
            "term {term} was opened on the other store: that one is the primary; only if it is lost for \
             good, promote this one with --force"
        ),
        Refusal::NoSuchBranch => {
            "this store has no branch of that name: `twinpoint branch list` shows the one it has"
                .to_owned()
        }
        Refusal::BranchHasNoBase { common, base } => format!(
            "the branch began at CP {common}, and blocks from before CP {base} are in use again: it \
             cannot be dropped in place; format the store anew and pair it again"
        ),
        Refusal::SessionEnding => {
            "the one before is still under way or ending: try again in a moment".to_owned()
        }
        Refusal::OtherStore(primary, secondary) => format!(
            "two different stores: the primary's is {primary}, the secondary's {secondary}: check \
             --peer and --listen, or format the secondary with the primary's store id"
        ),
        Refusal::OtherGeometry => {
            "same store id, different layout: format the secondary anew with the primary's size, \
             shards, journal and segments"
                .to_owned()
        }
        Refusal::SameRole => {
            "both nodes have the same role: restart one of them with the other role".to_owned()
        }
        Refusal::StaleTerm { theirs, ours } => format!(
            "the primary of term {theirs} was deposed, term {ours} was opened elsewhere: restart \
             the old primary with --role secondary"
        ),
        Refusal::Branch { common, theirs } => format!(
            "the secondary has CPs {} to {theirs} of an older term that this primary never had, kept \
             there as a branch: save what you need of them, then drop it with `twinpoint branch drop`",
            u128::from(common.0) + 1
        ),
        Refusal::PrimaryLostPoints { told, ours } => format!(
            "the secondary holds committed CPs up to {told}, this primary lost those after \
             {ours}: promote the secondary, and follow it with this store formatted anew"
        ),
        Refusal::TooFarBehind { theirs, base } => format!(
            "the secondary is at CP {theirs}, this primary holds CPs from {base} on only: format \
             the secondary anew and pair it again"
        ),
        Refusal::RootDiffers(cp) => format!(
            "the two stores differ at CP {cp}: replication stays stopped until `twinpoint verify` \
             on both says which is right and the other is formatted anew"
        ),
        Refusal::Rewind(cp) => format!(
            "the secondary goes back to CP {cp} first, later ones were never answered: nothing to \
             do, it connects by itself"
        ),
        Refusal::NoCommonHistory => {
            "the two stores' histories have no common start: format the secondary anew and pair it \
             again"
                .to_owned()
        }
    }
}

/// The number that a refusal has on the wire and by which the log tells one from another. Never changed, only added to.
pub(super) fn refusal_code(refusal: &Refusal) -> u16 {
    match refusal {
        Refusal::NotPrimary => 1,
        Refusal::NotSecondary => 2,
        Refusal::Catalog(_) => 3,
        Refusal::PrimaryConnected => 4,
        Refusal::StoreFailed => 5,
        Refusal::Stopping => 6,
        Refusal::BadName => 7,
        Refusal::OtherStore(..) => 8,
        Refusal::OtherGeometry => 9,
        Refusal::SameRole => 10,
        Refusal::StaleTerm { .. } => 11,
        Refusal::Branch { .. } => 12,
        Refusal::PrimaryLostPoints { .. } => 13,
        Refusal::TooFarBehind { .. } => 14,
        Refusal::RootDiffers(_) => 15,
        Refusal::Rewind(_) => 16,
        Refusal::NoCommonHistory => 17,
        Refusal::SessionEnding => 18,
        Refusal::VolumeInUse => 19,
        Refusal::NoSuchBranch => 20,
        Refusal::BranchHasNoBase { .. } => 21,
        Refusal::NewerTerm(_) => 22,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use twinpoint_core::catalog::CatalogError;
    use twinpoint_core::units::{CpNumber, StoreId, Term};

    #[test]
    fn every_refusal_has_one_line_and_a_number_of_its_own() {
        let (a, b) = (CpNumber(41), CpNumber(u64::MAX));
        let all = [
            Refusal::NotPrimary,
            Refusal::NotSecondary,
            Refusal::Catalog(CatalogError::NameTaken),
            Refusal::PrimaryConnected,
            Refusal::StoreFailed,
            Refusal::Stopping,
            Refusal::BadName,
            Refusal::OtherStore(StoreId([1; 16]), StoreId([2; 16])),
            Refusal::OtherGeometry,
            Refusal::SameRole,
            Refusal::StaleTerm { theirs: 1, ours: 2 },
            Refusal::Branch { common: b, theirs: a },
            Refusal::NewerTerm(Term(7)),
            Refusal::NoSuchBranch,
            Refusal::BranchHasNoBase { common: a, base: b },
            Refusal::PrimaryLostPoints { told: a, ours: b },
            Refusal::TooFarBehind { theirs: a, base: b },
            Refusal::RootDiffers(a),
            Refusal::Rewind(a),
            Refusal::NoCommonHistory,
            Refusal::SessionEnding,
            Refusal::VolumeInUse,
        ];
        let mut codes = BTreeSet::new();
        for refusal in &all {
            let text = explain(refusal);
            assert!(!text.is_empty() && text.len() < 300, "{text}");
            assert!(!text.contains('\n') && !text.contains("  "), "{text}");
            assert!(codes.insert(refusal_code(refusal)), "{text}");
        }
        assert_eq!(codes, (1..=all.len() as u16).collect());
        let behind = Refusal::TooFarBehind { theirs: a, base: b };
        assert!(explain(&behind).contains("at CP 41"));
    }
}
