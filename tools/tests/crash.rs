//! Crash rounds: SIGKILL of the primary, the secondary or both at random moments under load, in every mode; then
//! restart or promotion, and the judgement of [`support::history`].
//!
//! `TWINPOINT_ROUNDS` is the number of rounds of all tests of this file together, 50 by default; `TWINPOINT_SEED`
//! repeats the choices of a run. After every round both stores pass `twinpoint verify`, alone and against each other,
//! and both nodes show the same root at the same CP.

mod support;

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::Hasher;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use support::history::{Clock, Promise, Record, Verdict, check};
use support::load::{Load, LoadPlan};
use support::nbd_client::NbdClient;
use support::node::Node;
use support::pair::{Pair, PairPlan, VOLUME, flags};
use support::random::Random;
use support::sector::Sector;
use support::time_limit::TimeLimit;

/// How long the secondary may take to have all again.
const CATCH_UP_TIME_MAX: Duration = Duration::from_secs(30);
/// Async: CPs that the secondary may be behind.
const LAG_POINTS: u64 = 8;
/// CPs sealed and not answered at a time, which the lag may exceed by.
const POINTS_IN_FLIGHT: u64 = 4;
/// Bytes before the first region of a store: the superblocks.
const SUPERBLOCK_BYTES: u64 = 64 << 10;

#[test]
fn kills_in_sync_mode_that_stalls() {
    kill_rounds("sync-stall", "sync", "stall", 12);
}

#[test]
fn kills_in_sync_mode_that_continues() {
    kill_rounds("sync-continue", "sync", "continue", 12);
}

#[test]
fn kills_in_semi_sync_mode_that_stalls() {
    kill_rounds("semi-sync-stall", "semi-sync", "stall", 12);
}

#[test]
fn kills_in_semi_sync_mode_that_continues() {
    kill_rounds("semi-sync-continue", "semi-sync", "continue", 12);
}

#[test]
fn kills_in_async_mode_that_stalls() {
    kill_rounds("async-stall", "async", "stall", 12);
}

#[test]
fn kills_in_async_mode_that_continues() {
    kill_rounds("async-continue", "async", "continue", 12);
}

#[test]
fn kills_without_a_peer() {
    let rounds = rounds(4);
    let _limit = TimeLimit::new("kills without a peer", limit(rounds));
    let random = Random::of_test("single");
    let mut run = Run::new(PairPlan { paired: false, ..PairPlan::default() }, random);
    for round in 0..rounds {
        run.label = format!("single, round {round}");
        run.kill_round(Victim::Primary);
    }
    run.end();
}

#[test]
fn promotions_in_sync_mode() {
    promotion_rounds("promotion-sync", "sync");
}

#[test]
fn promotions_in_semi_sync_mode() {
    promotion_rounds("promotion-semi-sync", "semi-sync");
}

#[test]
fn promotions_in_async_mode() {
    promotion_rounds("promotion-async", "async");
}

#[test]
fn a_killed_node_restarts_at_once() {
    let _limit = TimeLimit::new("restart at once", Duration::from_secs(120));
    let mut random = Random::of_test("restart at once");
    let mut pair = Pair::new(PairPlan { paired: false, ..PairPlan::default() });
    let image = vec![Sector::Zero; pair.plan.volume_bytes as usize / 512];
    let plan = LoadPlan { connections: 4, depth: 16, ..LoadPlan::default() };
    let socket = pair.primary().files().nbd.clone();
    let load = Load::start(&socket, VOLUME, &image, &Clock::new(), &plan, &mut random);
    load.wait_for_commands(&plan, 2000, Duration::from_secs(10));
    pair.kill(0);
    load.finish();
    let node = Node::try_start(&pair.files[0], &pair.serve_flags(0, "primary"));
    assert!(node.is_ok(), "refused: {}", node.err().expect("just seen"));
}

#[test]
fn ready_means_that_volumes_can_be_opened() {
    let _limit = TimeLimit::new("ready", Duration::from_secs(120));
    let mut pair = Pair::new(PairPlan { paired: false, ..PairPlan::default() });
    for round in 0..10 {
        pair.stop(0);
        pair.start(0);
        let opened = NbdClient::connect(&pair.primary().files().nbd, VOLUME);
        assert!(opened.is_ok(), "start {round}: {}", opened.err().expect("just seen"));
    }
}

/// Who is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Primary,
    Secondary,
    Both,
}

/// The part of all rounds, in percent, that one test has.
fn rounds(percent: u64) -> u64 {
    let all = std::env::var("TWINPOINT_ROUNDS").map_or(50, |text| {
        text.parse::<u64>().expect("TWINPOINT_ROUNDS is a number")
    });
    (all * percent).div_ceil(100).max(1)
}

fn limit(rounds: u64) -> Duration {
    Duration::from_secs(120) + Duration::from_secs(60) * rounds as u32
}

fn kill_rounds(name: &'static str, replication: &'static str, loss: &'static str, percent: u64) {
    let rounds = rounds(percent);
    let _limit = TimeLimit::new(name, limit(rounds));
    let random = Random::of_test(name);
    let plan = PairPlan { replication, on_peer_loss: loss, ..PairPlan::default() };
    let mut run = Run::new(plan, random);
    for round in 0..rounds {
        let victim = match round % 3 {
            0 => Victim::Primary,
            1 => Victim::Secondary,
            _ => Victim::Both,
        };
        run.label = format!("{name}, round {round}, {victim:?} killed");
        run.kill_round(victim);
    }
    run.end();
}

fn promotion_rounds(name: &'static str, replication: &'static str) {
    let rounds = rounds(8);
    let _limit = TimeLimit::new(name, limit(rounds));
    let mut random = Random::of_test(name);
    let mut run = Run::new(promotion_plan(replication), random.fork());
    for round in 0..rounds {
        run.label = format!("{name}, round {round}");
        if !run.promotion_round(replication) {
            run.pair.assert_no_panic();
            run = Run::new(promotion_plan(replication), random.fork());
        }
    }
    run.end();
}

fn promotion_plan(replication: &'static str) -> PairPlan {
    let mut plan = PairPlan { replication, ..PairPlan::default() };
    plan.flags.extend(flags(&["--lag-points", &LAG_POINTS.to_string()]));
    plan
}

/// One pair over several rounds.
struct Run {
    pair: Pair,
    random: Random,
    clock: Clock,
    /// What the volume holds, as read after the last round.
    image: Vec<Sector>,
    label: String,
    began: Instant,
}

impl Run {
    fn new(plan: PairPlan, random: Random) -> Run {
        let image = vec![Sector::Zero; plan.volume_bytes as usize / 512];
        let pair = Pair::new(plan);
        let label = String::new();
        Run { pair, random, clock: Clock::new(), image, label, began: Instant::now() }
    }

    /// Load, kill, restart, judge, settle.
    fn kill_round(&mut self, victim: Victim) {
        let (load, _) = self.start_load();
        let (primary, secondary) = (self.pair.primary_index(), 1 - self.pair.primary_index());
        let (record, promise) = match victim {
            Victim::Primary => {
                self.pair.kill(primary);
                let record = load.finish();
                self.verify_the_dead(primary);
                self.pause(0, 100);
                self.pair.start(primary);
                (record, Promise::Flushed)
            }
            Victim::Secondary => {
                self.pair.kill(secondary);
                // Sometimes longer than the peer's timeout: a primary that may then carries on alone.
                let most = if self.random.percent(50) { 200 } else { 1600 };
                self.pause(0, most);
                self.pair.start(secondary);
                self.pause(20, 200);
                (load.finish(), Promise::Answered)
            }
            Victim::Both => {
                let first = if self.random.percent(50) { primary } else { secondary };
                self.pair.kill(first);
                self.pause(0, 40);
                self.pair.kill(1 - first);
                let record = load.finish();
                self.verify_the_dead(secondary);
                let first = if self.random.percent(50) { primary } else { secondary };
                self.pair.start(first);
                self.pause(0, 200);
                self.pair.start(1 - first);
                (record, Promise::Flushed)
            }
        };
        let verdict = self.judge(&record, promise);
        self.tell(&record, verdict);
        self.settle();
    }

    /// Load, kill the primary for good, promote, judge; the old primary returns as secondary. False if it has CPs that
    /// the new one never had, and is refused: then this pair is of no more use.
    fn promotion_round(&mut self, replication: &str) -> bool {
        let (load, _) = self.start_load();
        let old = self.pair.primary_index();
        let before = self.pair.primary().status();
        self.pause(0, 20);
        self.pair.kill(old);
        let record = load.finish();
        let promotion = self.pair.promote();
        let promise = if replication == "async" { Promise::Cut } else { Promise::Flushed };
        let verdict = self.judge(&record, promise);
        self.tell(&record, verdict);
        if replication == "async" {
            let had = before["cp"]["local"].as_u64().expect("a CP's number");
            let has = promotion["cp"].as_u64().expect("a CP's number");
            assert!(
                has + LAG_POINTS + POINTS_IN_FLIGHT >= had,
                "{}: the secondary was at CP {has}, the primary at {had}, the lag is bounded by {LAG_POINTS}",
                self.label
            );
        }
        self.load_on_the_promoted();
        self.old_primary_returns(old)
    }

    fn start_load(&mut self) -> (Load, LoadPlan) {
        let plan = LoadPlan {
            connections: 1 + self.random.below(4) as usize,
            depth: 1 << self.random.below(5),
            flushes_in_1000: [0, 5, 30, 150][self.random.below(4) as usize],
            ..LoadPlan::default()
        };
        let socket = self.pair.primary().files().nbd.clone();
        let load =
            Load::start(&socket, VOLUME, &self.image, &self.clock, &plan, &mut self.random);
        load.wait_for_commands(&plan, 20, Duration::from_secs(10));
        self.pause(5, 350);
        (load, plan)
    }

    /// The promoted node takes writes without its peer.
    fn load_on_the_promoted(&mut self) {
        let plan = LoadPlan { commands_max: 400, ..LoadPlan::default() };
        let socket = self.pair.primary().files().nbd.clone();
        let load =
            Load::start(&socket, VOLUME, &self.image, &self.clock, &plan, &mut self.random);
        load.wait_for_commands(&plan, 400, Duration::from_secs(10));
        let record = load.finish();
        self.judge(&record, Promise::Answered);
    }

    /// Starts the old primary as secondary. True if it follows.
    fn old_primary_returns(&mut self, old: usize) -> bool {
        self.verify_the_dead(old);
        let bytes = contents_hash(&self.pair.store_path(old));
        self.pair.start(old);
        let refused = "of an older term that this primary never had";
        let deadline = Instant::now() + CATCH_UP_TIME_MAX;
        while Instant::now() < deadline {
            if self.pair.primary().status()["peer"]["state"] == "connected" {
                self.settle();
                return true;
            }
            if self.pair.logs().contains(refused) {
                println!("{}: the old primary has a branch, and is refused", self.label);
                self.pair.kill(old);
                let now = contents_hash(&self.pair.store_path(old));
                assert_eq!(bytes, now, "{}: the refused store was changed", self.label);
                self.verify_the_dead(old);
                let new = self.pair.primary_index();
                self.pair.stop(new);
                self.pair.verify_one(new);
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{}: the old primary neither follows nor is refused; {}", self.label, self.pair.logs());
    }

    /// Reads the volume on the primary, and checks it against the last image and what was done since.
    fn judge(&mut self, record: &Record, promise: Promise) -> Verdict {
        assert!(record.troubles.is_empty(), "{}: {:#?}", self.label, record.troubles);
        let image = self.pair.image();
        let image = image.unwrap_or_else(|text| panic!("{}: {text}; {}", self.label, self.pair.logs()));
        let verdict = check(&self.image, record, &image, promise);
        let verdict =
            verdict.unwrap_or_else(|text| panic!("{}: {text}\n{}", self.label, self.pair.logs()));
        self.image = image;
        verdict
    }

    /// Flushes, waits for the secondary, stops both, verifies both, starts both.
    fn settle(&mut self) {
        let flushed = self.pair.primary().client(VOLUME).flush();
        flushed.unwrap_or_else(|error| panic!("{}: flush: {error}; {}", self.label, self.pair.logs()));
        if self.pair.plan.paired {
            let step = self.pair.wait_in_step(CATCH_UP_TIME_MAX);
            step.unwrap_or_else(|text| panic!("{}: {text}", self.label));
        }
        self.pair.stop_all();
        self.pair.verify();
        self.pair.assert_no_panic();
        let (primary, paired) = (self.pair.primary_index(), self.pair.plan.paired);
        if paired {
            self.pair.start(1 - primary);
        }
        self.pair.start(primary);
        let image = self.pair.image().unwrap_or_else(|text| panic!("{}: {text}", self.label));
        assert!(image == self.image, "{}: the volume changed over a stop in order", self.label);
    }

    /// A store as the kill left it passes `verify` too, and is not changed by it.
    fn verify_the_dead(&mut self, index: usize) {
        if self.random.percent(30) && (index == 0 || self.pair.plan.paired) {
            self.pair.verify_one(index);
        }
    }

    fn end(mut self) {
        self.pair.stop_all();
        self.pair.verify();
        self.pair.assert_no_panic();
    }

    fn pause(&mut self, least_ms: u64, most_ms: u64) {
        std::thread::sleep(self.random.milliseconds(least_ms, most_ms));
    }

    fn tell(&self, record: &Record, verdict: Verdict) {
        println!(
            "{}: {} changes, {} answered, {} flushes, {} reads checked; {} answered changes lost; {:.1} s",
            self.label,
            record.changes.len(),
            record.answered(),
            record.flushes.len(),
            record.reads,
            verdict.lost,
            self.began.elapsed().as_secs_f64()
        );
    }
}

/// A hash of all of a store but its superblocks.
fn contents_hash(path: &str) -> u64 {
    let mut file = File::open(path).expect("the store is there");
    file.seek(SeekFrom::Start(SUPERBLOCK_BYTES)).expect("the store is larger than that");
    let mut hasher = DefaultHasher::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut piece).expect("the store can be read");
        if count == 0 {
            return hasher.finish();
        }
        hasher.write(&piece[..count]);
    }
}
