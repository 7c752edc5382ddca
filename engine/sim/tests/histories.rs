//! Plays histories of a pair in virtual time: a range of fresh seeds, and every seed that once broke a rule.

use std::thread;

use twinpoint_sim::run;

/// Seeds played in every test run.
const SEEDS: std::ops::Range<u64> = 1..201;
/// Events shown before a broken rule.
const EVENTS: usize = 50;

fn play(seeds: &[u64]) {
    let halves = seeds.split_at(seeds.len() / 2);
    let failures: Vec<_> = thread::scope(|scope| {
        let play = |seeds: &[u64]| seeds.iter().filter_map(|seed| run(*seed, EVENTS).err()).next();
        let other = scope.spawn(move || play(halves.0));
        let own = play(halves.1);
        other.join().expect("a broken rule is no panic here").into_iter().chain(own).collect()
    });
    if let Some(failure) = failures.first() {
        failure.events.iter().for_each(|event| eprintln!("{event}"));
        panic!("seed {}: {}", failure.seed, failure.rule);
    }
}

#[test]
fn fresh_histories_break_no_rule() {
    play(&SEEDS.collect::<Vec<u64>>());
}

#[test]
fn histories_that_once_broke_a_rule_break_none() {
    let lines =
        include_str!("../seeds.txt").lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let first_words = lines.filter_map(|line| line.split_whitespace().next());
    play(
        &first_words
            .map(|word| word.parse().expect("a line begins with a seed"))
            .collect::<Vec<u64>>(),
    );
}

#[test]
fn a_seed_plays_the_same_history_every_time() {
    let played = || format!("{:?}", run(7, 1));
    assert_eq!(played(), played());
}
