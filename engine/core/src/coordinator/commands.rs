//! What operators ask: named checkpoints, volumes, promotion, an orderly stop.
//!
//! Invariants: a change of the catalog is part of a CP and replied when a flush of that CP would be; a promotion opens
//! a new term, durable before the first request of it is admitted (R8).

use super::superblock_job::Then;
use super::{Coordinator, Stopping};
use crate::catalog::CatalogError;
use crate::contract::{Command, CoordinatorAction, Order, Refusal, Reply, Ticket};
use crate::message::Role;
use crate::record::is_checkpoint_name;
use crate::units::{CpNumber, ShardSet};

impl Coordinator {
    pub(super) fn command(&mut self, ticket: Ticket, command: Command) {
        let result = match command {
            // Nobody may hear of a term that a crash could still take back.
            Command::Hello if !self.serving || self.promoting.is_some() || self.leaving => {
                Err(Refusal::SessionEnding)
            }
            Command::Hello => {
                self.act(CoordinatorAction::Reply(ticket, Reply::Hello(Box::new(self.hello()))));
                Ok(())
            }
            Command::Stop => self.stop(ticket),
            _ if self.failed => Err(Refusal::StoreFailed),
            _ if self.stopping.is_some() || self.leaving => Err(Refusal::Stopping),
            Command::Judge(theirs) => self.judge_peer(&theirs).map(|from| {
                self.act(CoordinatorAction::Reply(ticket, Reply::Accepted(from)));
            }),
            Command::Promote { force } => self.promote(ticket, force),
            Command::BranchDrop { name } => self.branch_drop(ticket, &name),
            _ if self.role != Role::Primary => Err(Refusal::NotPrimary),
            Command::Checkpoint(name) => self.checkpoint(ticket, name),
            Command::VolumeCreate { name, size_bytes } => {
                self.volume_create(ticket, &name, size_bytes)
            }
            Command::VolumeDelete { name } => self.volume_delete(ticket, &name),
        };
        if let Err(refusal) = result {
            self.refuse(ticket, refusal);
        }
    }

    fn checkpoint(&mut self, ticket: Ticket, name: Option<String>) -> Result<(), Refusal> {
        if name.as_deref().is_some_and(|name| !is_checkpoint_name(name)) {
            return Err(Refusal::BadName);
        }
        if self.next.name.is_some() && name.is_some() {
            // One CP has one name; the caller tries again when the CP under way has its own.
            return Err(Refusal::SessionEnding);
        }
        self.next.name = self.next.name.take().or(name);
        self.next.tickets.push((ticket, None));
        Ok(())
    }

    fn volume_create(
        &mut self,
        ticket: Ticket,
        name: &str,
        size_bytes: u64,
    ) -> Result<(), Refusal> {
        let mut catalog = self.newest_catalog();
        let id = catalog.create(name, size_bytes).map_err(Refusal::Catalog)?;
        self.next.catalog = Some(catalog);
        self.next.tickets.push((ticket, Some(id)));
        Ok(())
    }

    fn volume_delete(&mut self, ticket: Ticket, name: &str) -> Result<(), Refusal> {
        let mut catalog = self.newest_catalog();
        let volume = catalog.delete(name).map_err(Refusal::Catalog)?;
        self.next.catalog = Some(catalog);
        self.next.tickets.push((ticket, Some(volume.id)));
        Ok(())
    }

    /// The catalog with every change that is under way.
    fn newest_catalog(&self) -> crate::catalog::Catalog {
        let sealed = self.points.iter().rev().find_map(|point| point.catalog());
        self.next.catalog.as_ref().or(sealed).unwrap_or(&self.catalog).clone()
    }

    fn promote(&mut self, ticket: Ticket, force: bool) -> Result<(), Refusal> {
        // Not primary before its term is durable: who asks again meanwhile hears that it is under way.
        if self.is_changing() {
            return Err(Refusal::SessionEnding);
        }
        if self.role == Role::Primary {
            return Err(Refusal::NotSecondary);
        }
        if let Some(cp) = self.peer.diverged() {
            return Err(Refusal::RootDiffers(cp));
        }
        if let Some(newer) = self.superblock.deposed_by.filter(|_| !force) {
            return Err(Refusal::NewerTerm(newer));
        }
        if self.peer.is_up() {
            if !force {
                return Err(Refusal::PrimaryConnected);
            }
            self.close_peer("this side is promoted");
        }
        self.promoting = Some(ticket);
        Ok(())
    }

    /// Opens the new term once the last session is over and all that was applied is durable.
    pub(super) fn finish_promotion(&mut self) {
        let settled = self.session_is_over() && self.all_points_committed();
        let Some(ticket) = self.promoting.filter(|_| self.role == Role::Secondary && settled)
        else {
            return;
        };
        let last = self.committed;
        self.role = Role::Primary;
        // The old primary has this side's CPs up to what it said at least: what later ones free waits for its return.
        self.peer.durable = self.peer.told_committed.max(self.peer.told_base).min(last);
        self.superblock.promote(last);
        self.superblock.paired |= self.options.paired;
        self.write_superblock(Then::Promoted(ticket, last));
    }

    pub(super) fn promoted(&mut self, ticket: Ticket, last: CpNumber) {
        self.promoting = None;
        self.points.clear();
        self.open = last.next();
        self.peer.alone = true;
        self.going_alone = true;
        let term = self.superblock.term;
        self.order_all(&Order::Lead(term));
        self.announce_commit();
        self.act(CoordinatorAction::OpenGate(self.open));
        self.publish_catalog();
        let root = self.store_root();
        self.act(CoordinatorAction::Reply(ticket, Reply::Promoted(term, last, root)));
        self.log(format!("promoted: primary of term {term} from CP {}", last.next()));
    }

    fn stop(&mut self, ticket: Ticket) -> Result<(), Refusal> {
        if self.stopping.is_some() {
            return Err(Refusal::Stopping);
        }
        if self.failed {
            self.act(CoordinatorAction::Reply(ticket, Reply::Stopped));
            return Ok(());
        }
        let unsettled = ShardSet::all(self.superblock.geometry.shards);
        self.stopping = Some(Stopping { ticket, settling: false, unsettled });
        self.act(CoordinatorAction::Hold(true));
        if self.role == Role::Secondary {
            // Or the primary would give it CP after CP.
            self.close_peer_to_stop();
        }
        Ok(())
    }

    fn close_peer_to_stop(&mut self) {
        if self.peer.is_up() {
            self.close_peer("this node stops");
        }
    }

    /// Commits what is staged, has the shards settle, and marks the store clean.
    pub(super) fn finish_stop(&mut self) {
        let sealed = self.closing || (self.role == Role::Primary && !self.open_is_empty);
        let committed = self.points.back().is_none_or(|point| point.cp <= self.committed)
            || self.peer.diverged().is_some();
        // A peer that follows confirms within a round trip what clients wait for.
        let confirming = self.peer.is_in_step() && self.answerable() < self.committed;
        let Some(stopping) = &mut self.stopping else { return };
        if sealed || !committed || (confirming && !stopping.settling) {
            return;
        }
        if !std::mem::replace(&mut stopping.settling, true) {
            self.close_peer_to_stop();
            self.order_all(&Order::Settle);
            return;
        }
        if stopping.unsettled.is_empty() && !self.superblock.clean {
            let ticket = stopping.ticket;
            for (_, tag) in std::mem::take(&mut self.flush_waiters) {
                self.act(CoordinatorAction::AnswerFlush(tag, false));
            }
            self.superblock.clean = true;
            self.write_superblock(Then::Stopped(ticket));
        }
    }
}

impl From<CatalogError> for Refusal {
    fn from(error: CatalogError) -> Refusal {
        Refusal::Catalog(error)
    }
}
