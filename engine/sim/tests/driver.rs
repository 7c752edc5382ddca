//! The driver itself: the same seed is the same history on any thread, a failure is explained and shrunk, and what it
//! prints can be played again.

use std::process::{Command, Output};
use std::time::Duration;

use twinpoint_sim::{
    Campaign, Changes, Counts, Kind, Plan, Seeds, Size, Window, play, play_and_explain, retell,
    shrink,
};

/// A history with crashes of both kinds, promotions and returns.
const RICH_SEED: u64 = 28;

/// A rule that is no rule: a planted failure.
fn planted(counts: &Counts) -> Option<String> {
    (counts.crashes >= 2 && counts.points >= 20)
        .then(|| format!("planted: {} crashes and {} points", counts.crashes, counts.points))
}

fn planted_plan() -> Plan {
    Plan { seed: RICH_SEED, checker: Some(planted), ..Plan::default() }
}

fn simulator(words: &str) -> Output {
    let program = env!("CARGO_BIN_EXE_twinpoint-sim");
    Command::new(program).args(words.split_whitespace()).output().expect("the program starts")
}

fn printed(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("plain text")
}

#[test]
fn a_seed_plays_the_same_history_on_any_thread() {
    let hash = || {
        let played = play(&Plan { seed: RICH_SEED, ..Plan::default() }).expect("no rule breaks");
        (played.trace_hash, played.virtual_ns, format!("{:?}", played.counts))
    };
    let here = hash();
    let there: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(hash)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
    });
    assert!(there.iter().all(|other| *other == here), "{here:?} and {there:?}");
    let all = |threads| {
        let seeds = Seeds::Range { first: 1, count: 12 };
        let changes = Changes::default();
        Campaign { seeds, changes, threads, keeps_going: true }.play(|_| {}).trace_hash
    };
    assert_eq!(all(1), all(3));
}

#[test]
fn other_seeds_and_changes_give_other_histories() {
    let hash = |seed, changes| play(&Plan { seed, changes, checker: None }).map(|p| p.trace_hash);
    let none = Changes::default();
    let fewer = Changes { clients: Some(1), ..Changes::default() };
    let first = hash(1, none.clone()).expect("no rule breaks");
    assert_ne!(first, hash(2, none).expect("no rule breaks"));
    assert_ne!(first, hash(1, fewer).expect("no rule breaks"));
}

#[test]
fn telling_the_story_changes_nothing() {
    let plan = Plan { seed: RICH_SEED, ..Plan::default() };
    let (mut lines, mut last) = (0, String::new());
    let told = retell(&plan, &Window::default(), &mut |line| {
        lines += 1;
        last = line.to_owned();
    });
    assert_eq!(told.expect("no rule breaks").trace_hash, play(&plan).expect("nor here").trace_hash);
    assert!(lines > 1_000, "{lines} lines");
    let window = Window { from: Some(Duration::from_secs(3_600)), ..Window::default() };
    retell(&plan, &window, &mut |line| panic!("{line} is outside of the window"))
        .expect("the same");
}

#[test]
fn a_planted_failure_is_explained_and_shrunk() {
    let whole = play_and_explain(&planted_plan(), 20).expect_err("the planted rule breaks");
    assert_eq!(whole.story.len(), 20);
    assert!(whole.text.starts_with("planted: "), "{}", whole.text);
    let mut steps = 0;
    let shrunk = shrink(&planted_plan(), |_| steps += 1).expect("it is broken");
    let small = &shrunk.failure;
    assert!(steps > 0 && shrunk.tries > steps, "{steps} of {}", shrunk.tries);
    assert_eq!(small.rule, whole.rule);
    assert!(small.sizes.get(Size::Commands) < whole.sizes.get(Size::Commands));
    assert!(small.changes.leaves_out(Kind::Unmap), "unmaps have no part in it: {}", small.changes);
    let again = Plan { changes: small.changes.clone(), ..planted_plan() };
    let again = play(&again).expect_err("it breaks again");
    assert!(again.is_same(small));
    assert!(small.replay_command().starts_with("twinpoint-sim --seed 28 --without "));
}

#[test]
fn a_whole_history_cannot_be_shrunk() {
    let output = simulator("--seed 1 --shrink");
    assert_eq!(output.status.code(), Some(3));
    assert!(printed(&output).contains("seed 1 breaks no rule"));
}

#[test]
fn the_command_line_plays_prints_and_tells() {
    let first = simulator("--seed 3");
    assert_eq!(first.status.code(), Some(0));
    let text = printed(&first);
    let hash = text.split_once("trace ").expect("the hash is printed").1;
    let hash = hash.get(..16).expect("sixteen digits");
    let told = printed(&simulator("--seed 3 --replay --from 0ms --to 20ms"));
    assert!(told.contains(hash), "replayed it has the same hash");
    assert!(told.contains("  node 0            starts as Primary at CP 0"), "{told}");
    let json = printed(&simulator("--seed 3 --json"));
    assert!(json.starts_with("{\"seed\":\"3\",\"broken\":false,"), "{json}");
    assert!(json.contains(hash) && json.trim_end().ends_with('}') && json.lines().count() == 1);
    let many = printed(&simulator("--seeds 4 --first 3 --threads 2 --without power-cut --json"));
    assert!(many.starts_with("{\"seeds\":4,\"failed\":0,"), "{many}");
}

#[test]
fn a_wrong_command_line_is_refused() {
    for words in ["--seed x", "--seed 1 --seeds 2", "--from 1s", "--without nothing", "--load 5"] {
        assert_eq!(simulator(words).status.code(), Some(2), "{words}");
    }
}
