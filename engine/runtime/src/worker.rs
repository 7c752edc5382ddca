//! One pinned thread: mail and completions in, core, mail and submissions out; then it polls a while, then it sleeps.
//!
//! ```text
//!   round:  mail of every ring, then seals | completions | wires | coordinator | clients | deliver, submit
//! ```
//!
//! Invariants: a seal reaches a shard only after every request that was in any ring before it (R2): seals are set
//! aside, all that waits in any ring is taken, then the seals are carried out. A worker never blocks but in its own io_uring, and
//! sleeps only when every ring was seen empty after it announced its sleep, and never while the device has to be polled.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use twinpoint_core::contract::{Order, Seal, ShardEvent};
use twinpoint_core::units::{Instant as CoreInstant, ShardId};

use crate::buffers::Pool;
use crate::clients::{Clients, HostPort, UserData};
use crate::coordinator_port::CoordinatorPort;
use crate::mail::{Mail, Mailbox};
use crate::shard_port::ShardPort;
use crate::shared::Shared;
use crate::sockets::{adopt, set_no_delay};
use crate::store_port::{Ended, Operations, StorePort};
use crate::ublk::{UblkPort, is_of_queue};
use crate::uring::{Completion, Uring, UringError, Wait};
use crate::wake::Sleeper;

/// Longest sleep: a worker looks around now and then, whatever happens.
const SLEEP_MAX: Duration = Duration::from_secs(5);

/// How long a worker that is about to end sleeps between two looks at the others.
const ENDING_SLEEP: Duration = Duration::from_millis(1);
/// Most clients of a node: each has at most two operations in the io_uring of its worker.
const CLIENTS_MAX: u32 = 900;

/// What an operation of the io_uring is for: the upper 32 bits of its user data.
const STORE: u64 = 1 << 32;
const RECEIVE: u64 = 2 << 32;
const SEND: u64 = 3 << 32;
const BELL: u64 = 4 << 32;
const LANE_INPUT: u64 = 5 << 32;
const LANE_OUTPUT: u64 = 6 << 32;
const ACCEPT: u64 = 7 << 32;
pub(crate) const UBLK: u64 = 8 << 32;
const NUMBER: u64 = 0xffff_ffff;
/// The number of the wire between coordinators, in the place of a shard's.
pub(crate) const PEER_LANE: u16 = 0xffff;

/// The number of a lane's operations: those of an older session are recognised and ignored.
pub(crate) fn lane_number(lane: u16, session: u64) -> u64 {
    u64::from(lane) | (session & 0xffff) << 16
}

const CLIENT_DATA: UserData =
    UserData { receive: |index| RECEIVE | index as u64, send: |index| SEND | index as u64 };

/// See the module.
pub(crate) struct Worker {
    pub index: usize,
    pub shared: Arc<Shared>,
    pub uring: Uring,
    pub sleeper: Sleeper,
    pub mailbox: Mailbox,
    pub pool: Pool,
    pub store: StorePort,
    pub operations: Operations,
    pub clients: Clients,
    pub ublk: UblkPort,
    /// Own shards; none at the places of others.
    pub shards: Vec<Option<ShardPort>>,
    /// Of worker 0.
    pub coordinator: Option<Box<CoordinatorPort>>,
    /// Seals set aside until what waited in all rings was taken.
    pub seals: VecDeque<(ShardId, Box<Seal>)>,
    pub listeners: Vec<OwnedFd>,
    pub accepting: bool,
    pub next_client: usize,
    pub poll: Duration,
    /// A client was refused memory; told once until the next seal.
    pub starved: bool,
    /// A client found a ring full; it tries again in the next round.
    pub ring_full: bool,
    /// Something came back that starved clients wait for.
    pub may_resume: bool,
    pub ending: bool,
    /// Where the core's time begins.
    pub began: Instant,
    /// Read once a round: the clock is not cheap everywhere.
    pub round_began: Instant,
}

impl Worker {
    /// Works until told to end.
    ///
    /// # Errors
    /// If the io_uring fails.
    pub fn run(&mut self) -> Result<(), UringError> {
        self.uring.read_eventfd(BELL, self.sleeper.descriptor())?;
        let mut completions = Vec::new();
        let mut busy_at = Instant::now();
        loop {
            let worked = self.round(&mut completions)?;
            self.count_round(worked);
            if self.ending && self.is_idle() {
                return self.finish(completions);
            }
            if worked {
                busy_at = self.round_began;
                self.uring.submit_and_wait(Wait::No)?;
                continue;
            }
            let now = self.round_began;
            if now.duration_since(busy_at) < self.poll || self.uring.must_poll() {
                self.uring.submit_and_wait(Wait::No)?;
                // Whoever else wants this core has work; polling has none.
                std::thread::yield_now();
                self.costs().yields.add(1);
                continue;
            }
            self.sleeper.prepare();
            if self.mailbox.is_idle() && self.seals.is_empty() && !self.has_calls() {
                let wait = self.sleep_time(now);
                self.costs().sleeps.add(u64::from(!wait.is_zero()));
                self.uring.submit_and_wait(if wait.is_zero() {
                    Wait::No
                } else {
                    Wait::For(wait)
                })?;
            }
            self.sleeper.awake();
        }
    }

    /// One round. Tells whether there was anything to do.
    fn round(&mut self, completions: &mut Vec<Completion>) -> Result<bool, UringError> {
        self.round_began = Instant::now();
        let mut worked = self.take_mail()?;
        self.uring.reap(completions);
        worked |= !completions.is_empty();
        for completion in completions.drain(..) {
            self.complete(completion)?;
        }
        worked |= self.poll_lanes()?;
        worked |= self.run_coordinator()?;
        self.accept_when_published()?;
        self.resume_clients()?;
        self.ublk_submit()?;
        let Worker { store, uring, shared, operations, .. } = self;
        store.submit(uring, &shared.arena, operations, |number| STORE | number as u64)?;
        let woken = self.mailbox.deliver();
        self.costs().bells_rung.add(woken);
        Ok(worked || self.ring_full)
    }

    /// Takes what waits in each ring, no more: who fills a ring as fast as it is emptied must not keep this thread from
    /// its device. Seals that were set aside before are carried out afterwards.
    fn take_mail(&mut self) -> Result<bool, UringError> {
        let mut worked = false;
        if self.index != 0 {
            // Worker 0's ring first: the seals it brings are set aside.
            worked |= self.take_mail_of(0)?;
        }
        let seals: Vec<(ShardId, Box<Seal>)> = self.seals.drain(..).collect();
        let first = usize::from(self.index != 0);
        for from in first..self.shared.participants() {
            worked |= self.take_mail_of(from)?;
        }
        for (shard, seal) in seals {
            worked = true;
            self.shard_event(shard, ShardEvent::Order(Order::Seal(seal)));
        }
        Ok(worked)
    }

    fn take_mail_of(&mut self, from: usize) -> Result<bool, UringError> {
        let waiting = self.mailbox.waiting(from);
        for _ in 0..waiting {
            let mail = self.mailbox.take(from).expect("it was counted");
            self.take_in(mail)?;
        }
        Ok(waiting > 0)
    }

    fn take_in(&mut self, mail: Mail) -> Result<(), UringError> {
        match mail {
            Mail::Request(shard, request) => self.shard_request(shard, request),
            Mail::Answer(answer) if is_of_queue(answer.tag) => self.ublk_answer(answer)?,
            Mail::Answer(answer) => {
                let client = self.with_host(|clients, host, _| clients.answer(answer, host));
                self.drive_client(client)?;
            }
            Mail::Free(first, count) => {
                self.pool.free(first, count);
                self.may_resume = true;
            }
            Mail::Flushed(tag, done) if is_of_queue(tag) => self.ublk_flushed(tag, done)?,
            Mail::Flushed(tag, done) => {
                let client = self.with_host(|clients, host, _| clients.flushed(tag, done, host));
                self.drive_client(client)?;
            }
            Mail::Order(shard, Order::Seal(seal)) => self.seals.push_back((shard, seal)),
            Mail::Order(shard, order) => {
                if matches!(order, Order::LaneUp { .. }) {
                    self.lane_open(shard);
                }
                self.shard_event(shard, ShardEvent::Order(order));
            }
            Mail::FirstWrite => self.coordinator_tick(),
            Mail::Flush(tag) => self.coordinator_flush(tag),
            Mail::Report(shard, report) => self.coordinator_report(shard, report),
            // Nobody would close it.
            Mail::Lane(..) if self.ending => {}
            Mail::Lane(shard, session, wire, lend) => {
                self.lane_begin(shard, session, *wire, lend)?
            }
            Mail::CloseLane(shard, session) => self.lane_close(shard, session),
            Mail::LaneClosed(session, reason) => self.coordinator_lane_closed(session, reason),
            Mail::Client(socket) => self.client_add(socket)?,
            Mail::Ublk(device, queue) => self.ublk_attach(device, queue)?,
            Mail::Resume => self.may_resume = true,
            Mail::End => self.end()?,
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<(), UringError> {
        let number = (completion.user_data & NUMBER) as usize;
        match completion.user_data & !NUMBER {
            STORE => {
                let ended = self.store.completed(
                    &self.shared.arena,
                    &mut self.operations,
                    number,
                    completion.result,
                );
                match ended {
                    None => {}
                    Some(Ended::Done(None, io, result)) => self.coordinator_done(io, result),
                    Some(Ended::Done(Some(shard), io, result)) => {
                        self.shard_event(shard, ShardEvent::Done { io, result });
                    }
                    Some(Ended::Read(shard, io, result)) => {
                        self.shard_event(shard, ShardEvent::Read { io, result })
                    }
                    Some(Ended::Metadata(shard, io, result)) => {
                        self.shard_event(shard, ShardEvent::MetadataRead { io, result });
                    }
                    Some(Ended::Old(shard, io, buffer, result)) => {
                        self.shard_old(shard, io, buffer, result)
                    }
                }
            }
            RECEIVE => {
                self.with_host(|clients, host, _| {
                    clients.received(number, completion.result, host)
                });
                self.drive_client(number)?;
            }
            SEND => {
                self.with_host(|clients, host, _| clients.sent(number, completion.result, host));
                self.drive_client(number)?;
            }
            BELL => self.uring.read_eventfd(BELL, self.sleeper.descriptor())?,
            LANE_INPUT => self.lane_ready(number as u64, completion.has_more()),
            LANE_OUTPUT => self.lane_writable(number as u64),
            ACCEPT => self.accepted(number, completion)?,
            UBLK => self.ublk_completed(number as u64, completion.result)?,
            other => panic!("a completion of nothing known: {other:#x}"),
        }
        Ok(())
    }

    /// Clients are let in once the exports are known, or will never be: then each is refused.
    fn accept_when_published(&mut self) -> Result<(), UringError> {
        let is_known = self.shared.exports.is_published() || self.shared.is_refusing();
        if self.accepting || !is_known {
            return Ok(());
        }
        self.accepting = true;
        for (index, listener) in self.listeners.iter().enumerate() {
            self.uring.accept_multishot(ACCEPT | index as u64, listener.as_raw_fd())?;
        }
        Ok(())
    }

    /// A client connected: clients go round the workers.
    fn accepted(&mut self, listener: usize, completion: Completion) -> Result<(), UringError> {
        if completion.result >= 0 {
            // SAFETY: the kernel made this descriptor for this completion, and nobody else has it.
            let socket = unsafe { adopt(completion.result) };
            if !self.ending && self.shared.clients.fetch_add(1, Ordering::AcqRel) < CLIENTS_MAX {
                let socket = set_no_delay(socket);
                self.next_client = (self.next_client + 1) % self.shared.workers;
                self.mailbox.send(self.next_client, Mail::Client(socket));
            } else if !self.ending {
                self.shared.clients.fetch_sub(1, Ordering::AcqRel);
            }
        }
        if !completion.has_more() && !self.ending {
            let listener_socket = self.listeners[listener].as_raw_fd();
            self.uring.accept_multishot(ACCEPT | listener as u64, listener_socket)?;
        }
        Ok(())
    }

    fn client_add(&mut self, socket: OwnedFd) -> Result<(), UringError> {
        if self.ending {
            drop(socket);
            self.shared.clients.fetch_sub(1, Ordering::AcqRel);
            return Ok(());
        }
        let index = self.clients.add(socket, self.index);
        self.drive_client(index)
    }

    pub fn drive_client(&mut self, index: usize) -> Result<(), UringError> {
        let before = self.clients.count();
        self.with_host(|clients, host, uring| clients.drive(index, uring, host, &CLIENT_DATA))?;
        if self.clients.count() < before {
            self.shared.clients.fetch_sub(1, Ordering::AcqRel);
        }
        Ok(())
    }

    fn with_host<T>(
        &mut self,
        work: impl FnOnce(&mut Clients, &mut HostPort<'_>, &mut Uring) -> T,
    ) -> T {
        self.with_frontends(|clients, _, host, uring| work(clients, host, uring))
    }

    /// What every frontend of this worker needs to speak with the shards, beside the frontends themselves.
    pub fn with_frontends<T>(
        &mut self,
        work: impl FnOnce(&mut Clients, &mut UblkPort, &mut HostPort<'_>, &mut Uring) -> T,
    ) -> T {
        let mut host = HostPort {
            worker: self.index,
            shared: &self.shared,
            pool: &mut self.pool,
            mailbox: &mut self.mailbox,
            starved: &mut self.starved,
            may_resume: &mut self.may_resume,
            ring_full: &mut self.ring_full,
        };
        work(&mut self.clients, &mut self.ublk, &mut host, &mut self.uring)
    }

    /// Clients that waited go on when something came back; one that finds no memory has a CP sealed.
    fn resume_clients(&mut self) -> Result<(), UringError> {
        let may_resume = std::mem::take(&mut self.may_resume) | std::mem::take(&mut self.ring_full);
        if may_resume {
            self.serve_all_waiting();
        }
        if may_resume && self.clients.has_starved() {
            let mut resumed = Vec::new();
            self.with_host(|clients, host, _| clients.resume(host, &mut resumed));
            for index in resumed {
                self.drive_client(index)?;
            }
        }
        if may_resume {
            self.ublk_resume()?;
        }
        if std::mem::take(&mut self.starved) || self.shared.is_point_due() {
            self.want_seal();
        }
        Ok(())
    }

    /// Closes the clients; the worker ends when all is over.
    fn end(&mut self) -> Result<(), UringError> {
        self.ending = true;
        for index in self.clients.shutdown() {
            self.drive_client(index)?;
        }
        self.ublk_end()?;
        for index in 0..self.shards.len() {
            self.lane_close_any(index);
        }
        Ok(())
    }

    fn is_idle(&mut self) -> bool {
        // Any client, of whatever worker, may still need this one's shards.
        self.shared.clients.load(Ordering::Acquire) == 0
            && self.store.is_idle()
            && self.mailbox.is_idle()
            && self.lanes_are_closed()
    }

    fn finish(&mut self, mut completions: Vec<Completion>) -> Result<(), UringError> {
        self.uring.drain(Duration::from_secs(10), &mut completions)?;
        for completion in completions {
            if completion.user_data & !NUMBER == ACCEPT && completion.result >= 0 {
                // SAFETY: the kernel made this descriptor for this completion, and nobody else has it.
                drop(unsafe { adopt(completion.result) });
            }
        }
        Ok(())
    }

    fn sleep_time(&self, now: Instant) -> Duration {
        if self.ending {
            // Nobody rings when the last client of another worker is gone.
            return ENDING_SLEEP;
        }
        let timer = self.coordinator.as_ref().and_then(|port| port.next_tick());
        let until =
            timer.map_or(SLEEP_MAX, |at| Duration::from_nanos(at.since(self.core_time(now))));
        until.min(SLEEP_MAX)
    }

    /// This moment, for the core.
    pub fn now(&self) -> CoreInstant {
        self.core_time(Instant::now())
    }

    /// A moment, for the core.
    pub fn core_time(&self, moment: Instant) -> CoreInstant {
        let elapsed = moment.duration_since(self.began).as_nanos();
        CoreInstant(u64::try_from(elapsed).unwrap_or(u64::MAX))
    }

    pub fn watch_lane_input(&mut self, number: u64, descriptor: RawFd) -> Result<(), UringError> {
        self.uring.poll_multishot(LANE_INPUT | number, descriptor, libc::POLLIN)
    }

    pub fn watch_lane_output(&mut self, number: u64, descriptor: RawFd) -> Result<(), UringError> {
        self.uring.poll_once(LANE_OUTPUT | number, descriptor, libc::POLLOUT)
    }

    pub fn forget_lane_watches(&mut self, number: u64) -> Result<(), UringError> {
        self.uring.cancel(LANE_INPUT | number)?;
        self.uring.cancel(LANE_OUTPUT | number)
    }
}
