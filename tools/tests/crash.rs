//! Crash rounds: SIGKILL of the primary, the secondary or both at random moments under load, in every mode; then
//! restart or promotion, and the judgement of [`support::history`].
//!
//! `TWINPOINT_ROUNDS` is the number of rounds of all tests of this file together, 50 by default; `TWINPOINT_SEED`
//! repeats the choices of a run. After every round both stores pass `twinpoint verify`, alone and against each other,
//! and both nodes show the same root at the same CP.

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;

use support::history::{Clock, Promise};
use support::load::{Load, LoadPlan};
use support::nbd_client::NbdClient;
use support::node::Node;
use support::pair::{Pair, PairPlan, VOLUME, flags};
use support::random::Random;
use support::run::{CATCH_UP_TIME_MAX, LAG_POINTS, POINTS_IN_FLIGHT, Run, Victim};
use support::sector::Sector;
use support::time_limit::TimeLimit;

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
fn an_asynchronous_secondary_is_never_further_behind_than_declared() {
    let _limit = TimeLimit::new("lag", Duration::from_secs(120));
    lag_is_bounded(&["--lag-points", "8"], |status| {
        let points = status["lag"]["points"].as_u64().expect("a number");
        assert!(points <= LAG_POINTS + POINTS_IN_FLIGHT, "{points} points behind");
    });
    lag_is_bounded(&["--lag-bytes", "1MiB", "--cp-bytes", "256KiB"], |status| {
        let bytes = status["lag"]["bytes"].as_u64().expect("a number");
        assert!(bytes <= (1 << 20) + 2 * POINTS_IN_FLIGHT * (256 << 10), "{bytes} bytes behind");
    });
    // Writers are held when the time is over; what they wrote until then only grows older.
    lag_is_bounded(&["--lag-time", "300ms"], |_| ());
}

/// A frozen secondary: writers are held visibly, and go on once it is back.
fn lag_is_bounded(lag: &[&str], judge: impl Fn(&Value)) {
    let mut plan = PairPlan { replication: "async", ..PairPlan::default() };
    plan.flags = flags(&["--cp-interval", "10ms", "--peer-timeout", "30s", "--memory", "64MiB"]);
    plan.flags.extend(flags(lag));
    let mut run = Run::new(plan, Random::of_test("lag"));
    run.label = format!("{lag:?}");
    let load_plan = LoadPlan { depth: 4, commands_max: 100_000, ..LoadPlan::default() };
    let socket = run.pair.primary().files().nbd.clone();
    let load = Load::start(&socket, VOLUME, &run.image, &run.clock, &load_plan, &mut run.random);
    load.wait_for_commands(&load_plan, 100, Duration::from_secs(10));
    run.pair.node(1).freeze();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = run.pair.primary().status();
        judge(&status);
        if status["holding_writers"] == true {
            break;
        }
        assert!(Instant::now() < deadline, "{lag:?}: writers are never held: {status}");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Commands that were on their way when the hold began may still be taken.
    run.pause(300, 300);
    let sent = load.sent(&load_plan);
    run.pause(300, 300);
    assert_eq!(load.sent(&load_plan), sent, "{lag:?}: writers go on although they are held");
    let status = run.pair.primary().status();
    judge(&status);
    assert_eq!(status["holding_writers"], true, "{lag:?}: {status}");
    run.pair.node(1).thaw();
    load.wait_for_commands(&load_plan, sent + 200, Duration::from_secs(20));
    assert!(load.sent(&load_plan) > sent, "{lag:?}: writers go on once the secondary is back");
    let record = load.finish();
    run.judge(&record, Promise::Answered);
    run.settle();
    run.end();
}

#[test]
fn a_flush_waits_for_a_lost_peer_or_goes_on_alone_as_declared() {
    let _limit = TimeLimit::new("peer loss", Duration::from_secs(120));
    for replication in ["sync", "semi-sync"] {
        let plan = PairPlan { replication, ..PairPlan::default() };
        let mut pair = Pair::new(plan);
        let mut client = pair.primary().client(VOLUME);
        pair.kill(1);
        client.write(0, &[7; 4096]).expect("a write is answered from memory");
        let flush = std::thread::spawn(move || client.flush());
        std::thread::sleep(Duration::from_secs(3));
        assert!(!flush.is_finished(), "{replication}, stall: a flush is answered without the peer");
        pair.start(1);
        let flushed = flush.join().expect("the client does not panic");
        flushed.unwrap_or_else(|error| panic!("{replication}, stall: {error}; {}", pair.logs()));
        pair.stop_all();
        pair.verify();

        let plan = PairPlan { replication, on_peer_loss: "continue", ..PairPlan::default() };
        let mut pair = Pair::new(plan);
        let mut client = pair.primary().client(VOLUME);
        pair.kill(1);
        client.write(0, &[9; 4096]).expect("a write is answered from memory");
        client.flush().unwrap_or_else(|error| panic!("{replication}, continue: {error}"));
        assert!(pair.primary().status()["alone_since"].is_u64(), "carrying on alone is shown");
        pair.kill(0);
        pair.start(0);
        assert!(pair.primary().status()["alone_since"].is_u64(), "and recorded in the store");
        let mut client = pair.primary().client(VOLUME);
        assert_eq!(client.read(0, 4096).expect("a read"), [9; 4096]);
        client.write(4096, &[8; 4096]).expect("a write");
        client.flush().unwrap_or_else(|error| panic!("{replication}, continue: {error}"));
        pair.start(1);
        let step = pair.wait_in_step(CATCH_UP_TIME_MAX);
        step.unwrap_or_else(|text| panic!("{replication}, continue: {text}"));
        assert!(pair.primary().status()["alone_since"].is_null(), "in step, no longer alone");
        pair.stop_all();
        pair.verify();
        pair.assert_no_panic();
    }
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

/// The part of all rounds, in percent, that one test has.
fn rounds(percent: u64) -> u64 {
    let all = std::env::var("TWINPOINT_ROUNDS")
        .map_or(50, |text| text.parse::<u64>().expect("TWINPOINT_ROUNDS is a number"));
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
        if round % 3 == 2 {
            run.label = format!("{name}, after round {round}, a node frozen");
            run.freeze_round();
        }
    }
    run.end();
}

fn promotion_rounds(name: &'static str, replication: &'static str) {
    let rounds = rounds(8);
    let _limit = TimeLimit::new(name, limit(rounds));
    let mut run = Run::new(promotion_plan(replication), Random::of_test(name));
    for round in 0..rounds {
        run.label = format!("{name}, round {round}");
        run.promotion_round(replication);
    }
    run.end();
}

fn promotion_plan(replication: &'static str) -> PairPlan {
    let mut plan = PairPlan { replication, ..PairPlan::default() };
    plan.flags.extend(flags(&["--lag-points", &LAG_POINTS.to_string()]));
    plan
}

/// The judge itself: each rule, broken by hand, is seen.
mod judge {
    use super::support::history::{Change, Promise, Record, check};
    use super::support::sector::Sector;

    /// Writes of whole blocks, numbered from 1, each sent after the one before was answered; a flush is 100.
    fn record(blocks: &[u64]) -> Record {
        let numbered = blocks.iter().zip(1..);
        let changes = numbered.map(|(block, sequence)| Change {
            sequence,
            first: block * 8,
            count: 8,
            zero: false,
            fua: false,
            answered: Some(sequence + 1),
        });
        Record { changes: changes.collect(), ..Record::default() }
    }

    fn image(blocks: &[u64]) -> Vec<Sector> {
        let sector = |sequence: &u64| match *sequence {
            0 => Sector::Zero,
            sequence => Sector::Written(sequence),
        };
        blocks.iter().flat_map(|sequence| [sector(sequence); 8]).collect()
    }

    #[test]
    fn a_cut_passes_and_anything_else_does_not() {
        let (before, sent) = (image(&[0, 0, 0]), record(&[0, 1, 2, 0]));
        for good in [[0, 0, 0], [1, 0, 0], [1, 2, 0], [1, 2, 3], [4, 2, 3]] {
            assert!(check(&before, &sent, &image(&good), Promise::Flushed).is_ok(), "{good:?}");
        }
        for bad in [[0, 2, 0], [0, 0, 3], [1, 0, 3], [4, 0, 3], [4, 2, 0]] {
            assert!(check(&before, &sent, &image(&bad), Promise::Cut).is_err(), "{bad:?}");
        }
        assert!(check(&before, &sent, &image(&[1, 2, 9]), Promise::Cut).is_err(), "never sent");
        assert!(check(&before, &sent, &image(&[1, 1, 0]), Promise::Cut).is_err(), "sent elsewhere");
        let mut torn = image(&[1, 2, 0]);
        torn[12] = Sector::Zero;
        assert!(check(&before, &sent, &torn, Promise::Cut).is_err(), "half a block");
    }

    #[test]
    fn flushed_and_answered_changes_are_owed() {
        let (before, mut sent) = (image(&[0, 0]), record(&[0, 1]));
        assert!(check(&before, &sent, &image(&[1, 0]), Promise::Flushed).is_ok());
        assert!(check(&before, &sent, &image(&[1, 0]), Promise::Answered).is_err());
        sent.flushes.push(100);
        assert!(check(&before, &sent, &image(&[1, 0]), Promise::Flushed).is_err());
        assert!(check(&before, &sent, &image(&[1, 0]), Promise::Cut).is_ok());
        assert!(check(&before, &sent, &image(&[1, 2]), Promise::Flushed).is_ok());
        sent.flushes.clear();
        sent.changes[1].fua = true;
        assert!(check(&before, &sent, &image(&[1, 0]), Promise::Flushed).is_err(), "FUA");
    }

    #[test]
    fn commands_under_way_together_may_come_in_any_order() {
        let (before, mut sent) = (image(&[0, 0]), record(&[0, 1]));
        sent.changes[0].answered = Some(3);
        assert!(check(&before, &sent, &image(&[0, 2]), Promise::Flushed).is_ok());
        sent.changes[1].answered = None;
        sent.flushes.push(100);
        assert!(check(&before, &sent, &image(&[1, 0]), Promise::Flushed).is_ok());
        assert!(check(&before, &sent, &image(&[0, 2]), Promise::Flushed).is_err(), "flushed");
    }

    #[test]
    fn zeroes_are_judged_like_writes() {
        let (before, mut sent) = (image(&[7, 8]), record(&[0, 1]));
        sent.changes.iter_mut().for_each(|change| {
            change.zero = true;
            change.sequence += 10;
            change.answered = change.answered.map(|answered| answered + 10);
        });
        assert!(check(&before, &sent, &image(&[7, 8]), Promise::Flushed).is_ok());
        assert!(check(&before, &sent, &image(&[0, 8]), Promise::Flushed).is_ok());
        assert!(check(&before, &sent, &image(&[7, 0]), Promise::Flushed).is_err(), "not a cut");
    }
}
