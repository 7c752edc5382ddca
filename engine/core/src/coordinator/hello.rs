//! The hello of each side: what it says of itself, and whether two that met may have a session.
//!
//! Invariants: what a side says holds until the session begins, or the session is refused; the primary's term and history
//! are durable on the secondary before it answers (R8); who hears of a newer term serves nobody any more.

use super::Coordinator;
use super::superblock_job::Then;
use crate::contract::{CoordinatorAction, Refusal, Reply, Ticket};
use crate::message::{Hello, Role};
use crate::session::judge;
use crate::units::{CpNumber, Term};

impl Coordinator {
    /// What this side says of itself.
    pub(super) fn hello(&self) -> Hello {
        // A living primary holds on to all that it sealed: a secondary that committed it sooner need not go back.
        let (last, base) = match self.role {
            Role::Primary => (self.open.previous().max(self.committed), self.base()),
            Role::Secondary => {
                let told = self.peer.told_base.max(self.peer.told_committed);
                (self.committed, told.max(self.peer.answered))
            }
        };
        Hello {
            role: self.role,
            store: self.superblock.store,
            geometry: self.superblock.geometry,
            // Who knows of a newer term follows no older one.
            term: self
                .superblock
                .deposed_by
                .map_or(self.superblock.term, |by| by.max(self.superblock.term)),
            history: self.superblock.history.clone(),
            last,
            base,
            roots: self.roots.clone(),
        }
    }

    /// Secondary: a primary says hello. Agreed, its term and history become ours before it hears so.
    pub(super) fn peer_hello(&mut self, ticket: Ticket, theirs: &Hello) {
        if let Some(cp) = self.peer.diverged() {
            self.refuse(ticket, Refusal::RootDiffers(cp));
            return;
        }
        if self.peer.is_up() {
            self.close_peer("the primary opened another session");
        }
        if !self.may_say_hello() {
            self.refuse(ticket, Refusal::SessionEnding);
            return;
        }
        match judge(theirs, &self.hello()) {
            Ok(_) => {}
            Err(Refusal::Rewind(cp)) => {
                self.log(format!(
                    "CPs after {cp} were never answered on the primary: going back to CP {cp}"
                ));
                self.refuse(ticket, Refusal::Rewind(cp));
                self.restart(cp);
                return;
            }
            Err(refusal) => {
                self.note_newer_term(theirs);
                if let Refusal::Branch { common, .. } = refusal {
                    self.name_branch(common);
                }
                self.refuse(ticket, refusal);
                return;
            }
        }
        let is_news =
            theirs.term > self.superblock.term || theirs.history != self.superblock.history;
        // What an earlier hello brought may still be on its way to the device: it is answered only from there.
        let is_durable = self.superblock_job.is_idle();
        let superblock = &self.superblock;
        let follows = superblock.paired && superblock.secondary && !superblock.base_given_up;
        if is_news || !is_durable || !follows {
            self.superblock.term = theirs.term;
            self.superblock.history.clone_from(&theirs.history);
            self.superblock.paired = true;
            self.superblock.secondary = true;
            // From here on it goes back to nothing older than what its primary has too.
            self.superblock.base_given_up = false;
            self.superblock.deposed_by = None;
            self.superblock.branch = None;
            self.write_superblock(Then::Hello(ticket));
        } else {
            self.answer_hello(ticket);
        }
    }

    /// What this side would say of itself may not hold for long.
    pub(super) fn is_changing(&self) -> bool {
        self.promoting.is_some() || self.superblock_job.drops_branch() || self.leaving
    }

    /// The pair's other store leads in a newer term, and this one cannot follow it: a promotion here has to know, and a
    /// primary must not go on (R8).
    fn note_newer_term(&mut self, theirs: &Hello) {
        let is_ours = theirs.store == self.superblock.store;
        let is_news =
            theirs.term > self.superblock.term && Some(theirs.term) > self.superblock.deposed_by;
        if !is_ours || !is_news {
            return;
        }
        match self.role {
            Role::Primary => self.deposed(theirs.term),
            Role::Secondary => {
                self.superblock.deposed_by = Some(theirs.term);
                self.write_superblock(Then::Nothing);
            }
        }
    }

    /// Another store was made primary in a newer term: this one serves nobody any more.
    fn deposed(&mut self, by: Term) {
        self.superblock.deposed_by = Some(by);
        self.log(format!(
            "term {by} was opened elsewhere: this store was deposed as primary of term {}; restart it with \
             --role secondary",
            self.superblock.term
        ));
        self.write_superblock(Then::Nothing);
        self.pump_superblock();
        self.stop_serving();
        // A store that failed offers its volumes still, and errors; this one's are offered elsewhere now.
        self.act(CoordinatorAction::Publish(self.catalog.clone(), false));
    }

    /// Whether what this side would say of itself holds until a session begins.
    fn may_say_hello(&self) -> bool {
        self.session_is_over() && self.all_points_committed() && !self.is_changing() && !self.failed
    }

    /// Secondary: says hello to a primary that was found good. A session of another hello may have come and gone meanwhile.
    pub(super) fn answer_hello(&mut self, ticket: Ticket) {
        let reply = if self.may_say_hello() {
            Reply::Hello(Box::new(self.hello()))
        } else {
            Reply::Refused(Refusal::SessionEnding)
        };
        self.act(CoordinatorAction::Reply(ticket, reply));
    }

    /// Primary: may a secondary that said this follow?
    pub(super) fn judge_peer(&mut self, theirs: &Hello) -> Result<CpNumber, Refusal> {
        if let Some(cp) = self.peer.diverged() {
            return Err(Refusal::RootDiffers(cp));
        }
        if !self.session_is_over() || self.failed {
            return Err(Refusal::SessionEnding);
        }
        let verdict = judge(&self.hello(), theirs);
        if let Err(Refusal::StaleTerm { ours, .. }) = verdict {
            self.deposed(Term(ours));
        }
        verdict
    }

    /// Whether the session that the handshake agreed on may begin now: time has passed since.
    pub(super) fn still_fits(&self, theirs: &Hello) -> bool {
        match self.role {
            Role::Primary => judge(&self.hello(), theirs).is_ok(),
            Role::Secondary => {
                let is_quiet = self.all_points_committed() && self.promoting.is_none();
                is_quiet && judge(theirs, &self.hello()).is_ok()
            }
        }
    }
}
