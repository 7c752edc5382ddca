//! Run: one pair through several rounds of load, kill, restart or promotion, and the judgement of each.
//!
//! Invariant: after every round both stores passed `verify`, alone and against each other, both nodes showed the same
//! root at the same CP, and no node has panicked.

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::Hasher;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use super::history::{Clock, Promise, Record, Verdict, check};
use super::load::{Load, LoadPlan};
use super::pair::{Pair, PairPlan, VOLUME};
use super::programs::twinpoint;
use super::random::Random;
use super::sector::Sector;

/// How long the secondary may take to have all again.
pub const CATCH_UP_TIME_MAX: Duration = Duration::from_secs(30);
/// Async: CPs that the secondary may be behind.
pub const LAG_POINTS: u64 = 8;
/// CPs sealed and not answered at a time, which the lag may exceed by.
pub const POINTS_IN_FLIGHT: u64 = 4;
/// Bytes before the first region of a store: the superblocks.
const SUPERBLOCK_BYTES: u64 = 64 << 10;

/// Who is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Victim {
    /// It restarts on what its store holds.
    Primary,
    /// The primary lives on.
    Secondary,
    /// At nearly the same time.
    Both,
}

/// One pair over several rounds.
pub struct Run {
    /// The nodes.
    pub pair: Pair,
    /// Choices.
    pub random: Random,
    /// Numbers of commands.
    pub clock: Clock,
    /// What the volume holds, as read after the last round.
    pub image: Vec<Sector>,
    /// What the messages begin with.
    pub label: String,
    began: Instant,
}

impl Run {
    /// A fresh pair with an empty volume.
    pub fn new(plan: PairPlan, random: Random) -> Run {
        let image = vec![Sector::Zero; plan.volume_bytes as usize / 512];
        let pair = Pair::new(plan);
        let label = String::new();
        Run { pair, random, clock: Clock::new(), image, label, began: Instant::now() }
    }

    /// Load, kill, restart, judge, settle.
    pub fn kill_round(&mut self, victim: Victim) {
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

    /// Load, one node frozen for a while, perhaps longer than the peer's timeout; nothing answered may be lost.
    pub fn freeze_round(&mut self) {
        let (load, _) = self.start_load();
        let index = self.random.below(2) as usize;
        self.pair.node(index).freeze();
        self.pause(50, 1800);
        self.pair.node(index).thaw();
        self.pause(20, 200);
        let record = load.finish();
        let verdict = self.judge(&record, Promise::Answered);
        self.tell(&record, verdict);
        self.settle();
    }

    /// Load, kill the primary for good, promote, judge; the old primary returns as secondary, and drops its branch if
    /// it has one.
    pub fn promotion_round(&mut self, replication: &str) {
        let (load, _) = self.start_load();
        let old = self.pair.primary_index();
        // A secondary that dies too loses what is only in its memory: that is all a semi-sync flush waits for.
        let both = replication != "semi-sync" && self.random.percent(50);
        if both {
            self.pair.node(1 - old).freeze();
            self.pause(20, 400);
        }
        let before = self.pair.primary().status();
        self.pause(0, 20);
        if both {
            self.pair.kill(1 - old);
        }
        self.pair.kill(old);
        let record = load.finish();
        if both {
            self.pair.start(1 - old);
        }
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
        self.old_primary_returns(old);
    }

    fn start_load(&mut self) -> (Load, LoadPlan) {
        let plan = LoadPlan {
            connections: 1 + self.random.below(4) as usize,
            depth: 1 << self.random.below(5),
            flushes_in_1000: [0, 5, 30, 150][self.random.below(4) as usize],
            ..LoadPlan::default()
        };
        let socket = self.pair.primary().files().nbd.clone();
        let load = Load::start(&socket, VOLUME, &self.image, &self.clock, &plan, &mut self.random);
        load.wait_for_commands(&plan, 20, Duration::from_secs(10));
        self.pause(5, 350);
        (load, plan)
    }

    /// The promoted node takes writes without its peer.
    fn load_on_the_promoted(&mut self) {
        let plan = LoadPlan { commands_max: 400, ..LoadPlan::default() };
        let socket = self.pair.primary().files().nbd.clone();
        let load = Load::start(&socket, VOLUME, &self.image, &self.clock, &plan, &mut self.random);
        load.wait_for_commands(&plan, 400, Duration::from_secs(10));
        let record = load.finish();
        self.judge(&record, Promise::Answered);
    }

    /// Starts the old primary as secondary. It follows, at once or after its branch was dropped.
    fn old_primary_returns(&mut self, old: usize) {
        self.verify_the_dead(old);
        let bytes = contents_hash(&self.pair.store_path(old));
        self.pair.start(old);
        let deadline = Instant::now() + CATCH_UP_TIME_MAX;
        while Instant::now() < deadline {
            if self.pair.primary().status()["peer"]["state"] == "connected" {
                self.settle();
                return;
            }
            if let Some(branch) = self.pair.node(old).status()["branch"]["name"].as_str() {
                println!("{}: the old primary has branch {branch}", self.label);
                self.drop_branch(old, branch, bytes);
                self.settle();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!(
            "{}: the old primary neither follows nor is refused; {}",
            self.label,
            self.pair.logs()
        );
    }

    /// Until it is dropped, nothing of the branch changes: `bytes` is the hash of all but the superblocks before the
    /// node started.
    fn drop_branch(&mut self, old: usize, branch: &str, bytes: u64) {
        self.pair.kill(old);
        let now = contents_hash(&self.pair.store_path(old));
        assert_eq!(bytes, now, "{}: the branched store was changed", self.label);
        self.verify_the_dead(old);
        self.pair.start(old);
        let control = self.pair.files[old].control.display().to_string();
        twinpoint(&["branch", "drop", branch, "--control", &control]).success();
    }

    /// Reads the volume on the primary, and checks it against the last image and what was done since.
    pub fn judge(&mut self, record: &Record, promise: Promise) -> Verdict {
        assert!(record.troubles.is_empty(), "{}: {:#?}", self.label, record.troubles);
        let image = self.pair.image();
        let image =
            image.unwrap_or_else(|text| panic!("{}: {text}; {}", self.label, self.pair.logs()));
        let verdict = check(&self.image, record, &image, promise);
        let verdict =
            verdict.unwrap_or_else(|text| panic!("{}: {text}\n{}", self.label, self.pair.logs()));
        self.image = image;
        verdict
    }

    /// Flushes, waits for the secondary, stops both, verifies both, starts both.
    pub fn settle(&mut self) {
        let flushed = self.pair.primary().client(VOLUME).flush();
        flushed
            .unwrap_or_else(|error| panic!("{}: flush: {error}; {}", self.label, self.pair.logs()));
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

    /// Stops and verifies what is left.
    pub fn end(mut self) {
        self.pair.stop_all();
        self.pair.verify();
        self.pair.assert_no_panic();
    }

    /// Sleeps for a random time between the two.
    pub fn pause(&mut self, least_ms: u64, most_ms: u64) {
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
