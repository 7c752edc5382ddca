//! A branch: named when an old primary returns with CPs that nobody else has, dropped when an operator says its name (R8).
//!
//! Invariants: the branch is in the superblock until it is dropped by name or becomes the history of a promotion; the
//! store goes back only when the superblock no longer has it.

use super::Coordinator;
use super::superblock_job::Then;
use crate::branch::Branch;
use crate::contract::{Refusal, Ticket};
use crate::message::Role;
use crate::superblock::TermStart;
use crate::units::CpNumber;

impl Coordinator {
    /// The CPs after `common` are this store's alone: they get a name, by which an operator can drop them (R8).
    pub(super) fn name_branch(&mut self, common: CpNumber) {
        let older = |start: &&TermStart| start.first <= self.committed;
        let term = self.superblock.history.iter().rev().find(older);
        let branch = Branch {
            term: term.map_or(self.superblock.term, |start| start.term),
            common,
            tip: self.committed,
            root: self.store_root(),
        };
        if self.superblock.branch == Some(branch) {
            return;
        }
        self.superblock.branch = Some(branch);
        self.log(format!(
            "CPs {} to {} are this store's alone: kept as branch {branch}, until `twinpoint branch drop {branch}`",
            common.next(),
            branch.tip
        ));
        self.write_superblock(Then::Nothing);
    }

    /// Back to where the branch began, as soon as the superblock has lost it.
    pub(super) fn branch_drop(&mut self, ticket: Ticket, name: &str) -> Result<(), Refusal> {
        let branch = self.superblock.branch.filter(|branch| branch.is_named(name));
        let branch = branch.ok_or(Refusal::NoSuchBranch)?;
        let (common, base) = (branch.common, self.base());
        if self.role != Role::Secondary || self.promoting.is_some() {
            return Err(Refusal::NotSecondary);
        }
        if common < base {
            return Err(Refusal::BranchHasNoBase { common, base });
        }
        self.superblock.drop_branch();
        self.log(format!("branch {branch} dropped: going back to CP {common}"));
        self.write_superblock(Then::BranchDropped(ticket, common));
        Ok(())
    }
}
