//! `twinpoint-sim`: plays seeds and stops at the first history that breaks a rule.

use std::process::ExitCode;

use clap::Parser;
use twinpoint_sim::{Counts, run};

/// Plays histories of a pair of stores in virtual time and checks the rules of commit.
#[derive(Parser)]
struct Arguments {
    /// Play this seed only.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Play so many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Show so many events before a broken rule.
    #[arg(long, default_value_t = 50)]
    events: usize,
    /// Go on after a broken rule.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    std::panic::set_hook(Box::new(|info| {
        if let Some(place) = info.location() {
            eprintln!("broken at {place}");
        }
    }));
    let seeds = match arguments.seed {
        Some(seed) => seed..=seed,
        None => arguments.first..=arguments.first + arguments.seeds.saturating_sub(1),
    };
    let mut failed = 0;
    let mut all = Counts::default();
    for seed in seeds {
        match run(seed, arguments.events) {
            Ok(counts) => {
                println!("seed {seed}: {counts:?}");
                all += counts;
            }
            Err(failure) => {
                println!("seed {seed}: BROKEN: {}", failure.rule);
                failed += 1;
                if !arguments.keep_going {
                    failure.events.iter().for_each(|event| println!("{event}"));
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    println!("all: {all:?}");
    if failed > 0 {
        println!("{failed} seeds failed");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
