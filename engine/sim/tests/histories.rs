//! Plays a thousand histories and every seed that once broke a rule: no rule breaks, every coverage mark is reached, and
//! CPs and sessions do what the stored tables say.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use twinpoint_sim::report::{failure_text, marks_text, progress_line, tally_text};
use twinpoint_sim::tables::{Seen, differences, table_text};
use twinpoint_sim::{Campaign, Changes, LIVENESS, Plan, Seeds, Tally, play_and_explain};

/// Seeds played in every test run.
const SEEDS: u64 = 1_000;
/// Lines of a broken history's story.
const LINES: usize = 50;
/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The thousand histories, played once for all tests.
fn thousand() -> &'static Tally {
    static TALLY: OnceLock<Tally> = OnceLock::new();
    TALLY.get_or_init(|| play(Seeds::Range { first: 1, count: SEEDS }))
}

fn play(seeds: Seeds) -> Tally {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let campaign = Campaign { seeds, changes: Changes::default(), threads, keeps_going: false };
    let mut told = Instant::now();
    let tally = campaign.play(|tally| {
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            eprintln!("{}", progress_line(tally, campaign.count()));
        }
    });
    eprintln!("{}", tally_text(&tally));
    tally
}

/// Fails with the story of the first failure.
fn expect_no_failure(tally: &Tally) {
    if let Some(failure) = tally.failures.first() {
        let plan = Plan { seed: failure.seed, ..Plan::default() };
        let explained = play_and_explain(&plan, LINES).err();
        panic!("{}", failure_text(explained.as_deref().unwrap_or(failure)));
    }
}

/// Compares with a stored table, or stores it anew.
fn expect_table(name: &str, title: &str, seen: &Seen) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("transitions").join(name);
    if std::env::var_os("TWINPOINT_BLESS").is_some_and(|value| value == "1") {
        fs::write(&path, table_text(title, seen, SEEDS)).expect("the table can be written");
    }
    let stored = fs::read_to_string(&path).expect("the table is there");
    let differences = differences(&stored, seen);
    assert!(
        differences.is_empty(),
        "{name}:\n{}\nif this is as it should be: TWINPOINT_BLESS=1 cargo test --release -p twinpoint-sim",
        differences.join("\n")
    );
}

#[test]
fn fresh_histories_break_no_rule() {
    let tally = thousand();
    expect_no_failure(tally);
    assert_eq!(tally.played, SEEDS);
    assert!(tally.settled_ns_max.0 < LIVENESS.as_nanos() as u64);
}

#[test]
fn every_coverage_mark_is_reached() {
    let marks = &thousand().marks;
    assert!(marks.missing().is_empty(), "{}", marks_text(marks));
}

#[test]
fn points_move_as_the_stored_table_says() {
    let title = "What a CP was seen to do on one node, from one event to the next.";
    expect_table("points.txt", title, &thousand().points);
}

#[test]
fn sessions_move_as_the_stored_table_says() {
    let title = "What a node's session with its peer was seen to do, from one event to the next.";
    expect_table("sessions.txt", title, &thousand().sessions);
}

#[test]
fn histories_that_once_broke_a_rule_break_none() {
    let lines =
        include_str!("../seeds.txt").lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let words = lines.filter_map(|line| line.split_whitespace().next());
    let seeds = words.map(|word| word.parse().expect("a line begins with a seed"));
    expect_no_failure(&play(Seeds::List(seeds.collect())));
}
