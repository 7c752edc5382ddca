//! `twinpoint-sim`: plays histories of a pair of stores, and shows those that break a rule.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::{ArgGroup, CommandFactory, Parser, value_parser};
use twinpoint_sim::report::{
    failure_text, marks_text, outcome_json, played_text, progress_line, tally_json, tally_text,
};
use twinpoint_sim::{
    Campaign, Changes, Failure, Plan, Played, Seeds, Window, parse_duration, play,
    play_and_explain, retell, shrink,
};

/// Between two lines of progress that go to a file.
const PROGRESS_LINES_EVERY: Duration = Duration::from_secs(10);
/// A rule was broken.
const EXIT_BROKEN: u8 = 1;
/// There was nothing to shrink.
const EXIT_NOTHING_TO_SHRINK: u8 = 3;
/// A coverage mark was not reached.
const EXIT_MARKS: u8 = 4;
/// What was to be said could not be written.
const EXIT_OUTPUT: u8 = 5;
/// Most histories at the same time.
const THREADS_MAX: i64 = 1024;

/// Plays histories of a pair of stores in virtual time and checks the rules of commit.
///
/// A seed decides everything: sizes, modes, clients, faults. The same seed on the same build plays the same history and
/// prints the same trace hash.
///
/// After the load all faults stop. Within 20 s of virtual time every command must be answered and the pair be in step
/// again, and then clients' next commands too; a node then stops within the same time. A primary alone has to do so in two
/// cases: it ran out of space and gave its base up, so that its peer has to be copied anew; or the seed lost its peer for
/// good.
#[derive(Parser)]
#[command(version, group(ArgGroup::new("which").args(["seed", "seeds", "minutes"])), after_help = "\
Exit codes: 0 no rule was broken; 1 a rule was broken; 2 the command line is wrong; 3 --shrink was given a seed that \
breaks no rule; 4 with --marks over several seeds, one was never reached; 5 the output could not be written.")]
struct Arguments {
    /// Play this seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// Play so many seeds [default: 100].
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Play seeds for so many minutes of real time.
    #[arg(long, value_name = "M", value_parser = parse_minutes)]
    minutes: Option<Duration>,
    /// The first of the seeds.
    #[arg(long, value_name = "SEED", default_value_t = 1, conflicts_with = "seed")]
    first: u64,
    /// How many histories to play at the same time [default: one for each core].
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=THREADS_MAX), conflicts_with = "seed")]
    threads: Option<u16>,
    /// Go on after a broken rule.
    #[arg(long, conflicts_with = "seed")]
    keep_going: bool,
    /// Show so many lines of the story before a broken rule.
    #[arg(long, value_name = "LINES", default_value_t = 50)]
    events: usize,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Print how often each coverage mark was reached.
    #[arg(long)]
    marks: bool,
    /// Tell the seed's whole story, event by event.
    #[arg(long, requires = "seed", conflicts_with_all = ["json", "shrink", "seeds", "minutes"])]
    replay: bool,
    /// Make a failing seed's history smaller, as long as the same rule breaks.
    #[arg(long, requires = "seed", conflicts_with_all = ["json", "seeds", "minutes"])]
    shrink: bool,
    /// Tell from this virtual time on, such as 1.5s or 20ms.
    #[arg(long, value_name = "TIME", requires = "replay", value_parser = parse_duration)]
    from: Option<Duration>,
    /// Tell until this virtual time.
    #[arg(long, value_name = "TIME", requires = "replay", value_parser = parse_duration)]
    to: Option<Duration>,
    /// Tell only of this node, 0 or 1, of clients, and of what is between the nodes.
    #[arg(long, value_name = "N", requires = "replay", value_parser = value_parser!(u8).range(0..=1))]
    node: Option<u8>,
    /// Tell only of this shard, and of what belongs to none.
    #[arg(long, value_name = "N", requires = "replay")]
    shard: Option<u16>,
    #[command(flatten)]
    changes: Changes,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let code = match arguments.seed {
        Some(seed) => {
            let plan = Plan { seed, changes: arguments.changes.clone(), checker: None };
            if arguments.shrink {
                shrink_one(&arguments, &plan)
            } else {
                play_one(&arguments, &plan)
            }
        }
        None => play_many(&arguments),
    };
    ExitCode::from(code)
}

/// More than nothing, and not for ever.
fn parse_minutes(text: &str) -> Result<Duration, String> {
    let minutes: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    match Duration::try_from_secs_f64(minutes * 60.0) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err("it is no length of time".to_owned()),
    }
}

/// Prints; a reader that has seen enough ends the program.
fn say(text: &str) {
    if let Err(error) = writeln!(std::io::stdout(), "{}", text.trim_end()) {
        if error.kind() != std::io::ErrorKind::BrokenPipe {
            tell(&format!("twinpoint-sim: cannot write the output: {error}\n"));
        }
        std::process::exit(i32::from(EXIT_OUTPUT));
    }
}

/// Tells of the progress; a campaign does not end because nobody can hear of it.
fn tell(text: &str) {
    let _ = write!(std::io::stderr(), "{text}");
}

fn play_one(arguments: &Arguments, plan: &Plan) -> u8 {
    let begun = Instant::now();
    let outcome: Result<Played, Box<Failure>> = if arguments.replay {
        let Arguments { from, to, node, shard, .. } = *arguments;
        let node = node.map(usize::from);
        retell(plan, &Window { from, to, node, shard }, &mut say)
    } else {
        play(plan)
    };
    let real = begun.elapsed();
    let outcome = match outcome {
        Err(_) if !arguments.replay => play_and_explain(plan, arguments.events),
        outcome => outcome,
    };
    if arguments.json {
        say(&outcome_json(plan.seed, &outcome, real.as_nanos()));
        return if outcome.is_err() { EXIT_BROKEN } else { 0 };
    }
    match outcome {
        Ok(played) => {
            say(&played_text(plan.seed, &played));
            let speed = played.virtual_ns as f64 / 1e9 / real.as_secs_f64().max(1e-9);
            say(&format!("  {speed:.1} virtual seconds a second"));
            if arguments.marks {
                say(&marks_text(&played.marks));
            }
            0
        }
        Err(failure) => {
            say(&failure_text(&failure));
            EXIT_BROKEN
        }
    }
}

fn shrink_one(arguments: &Arguments, plan: &Plan) -> u8 {
    let told = |failure: &Failure| {
        let (events, changes) = (failure.counts.events, &failure.changes);
        tell(&format!("still broken after {events} events: {changes}\n"));
    };
    match shrink(plan, told) {
        Ok(shrunk) => {
            let plan = Plan { changes: shrunk.failure.changes.clone(), ..plan.clone() };
            let failure = match play_and_explain(&plan, arguments.events) {
                Err(failure) => *failure,
                Ok(_) => shrunk.failure,
            };
            say(&failure_text(&failure));
            say(&format!("shrunk in {} histories", shrunk.tries));
            EXIT_BROKEN
        }
        Err(nothing) => {
            say(&nothing.to_string());
            EXIT_NOTHING_TO_SHRINK
        }
    }
}

fn play_many(arguments: &Arguments) -> u8 {
    let (first, count) = (arguments.first, arguments.seeds.unwrap_or(100));
    if arguments.minutes.is_none() && first.checked_add(count - 1).is_none() {
        let text = format!("there are no {count} seeds from --first {first} on");
        Arguments::command().error(ErrorKind::ValueValidation, text).exit();
    }
    let campaign = Campaign {
        seeds: match arguments.minutes {
            Some(time) => Seeds::During { first, time },
            None => Seeds::Range { first, count },
        },
        changes: arguments.changes.clone(),
        threads: arguments
            .threads
            .map(usize::from)
            .unwrap_or_else(|| available_parallelism().map_or(1, std::num::NonZero::get)),
        keeps_going: arguments.keep_going,
    };
    let is_terminal = std::io::stderr().is_terminal();
    let every = if is_terminal { Duration::from_millis(200) } else { PROGRESS_LINES_EVERY };
    let (mut told, mut broken) = (Instant::now(), 0);
    let mut tally = campaign.play(|tally| {
        if tally.broken > broken {
            broken = tally.broken;
            let seeds: Vec<String> = tally.failures.iter().map(|f| f.seed.to_string()).collect();
            let begin = if is_terminal { "\r\x1b[K" } else { "" };
            tell(&format!("{begin}broken: {}\n", seeds.join(" ")));
        }
        if told.elapsed() >= every {
            told = Instant::now();
            let (begin, end) = if is_terminal { ("\r\x1b[K", "") } else { ("", "\n") };
            tell(&format!("{begin}{}{end}", progress_line(tally, campaign.count())));
        }
    });
    if is_terminal {
        tell("\r\x1b[K");
    }
    if let Some(failure) = tally.failures.first_mut() {
        let plan = Plan { seed: failure.seed, changes: failure.changes.clone(), checker: None };
        if let Err(explained) = play_and_explain(&plan, arguments.events) {
            *failure = *explained;
        }
    }
    if arguments.json {
        say(&tally_json(&tally));
    } else {
        for (index, failure) in tally.failures.iter().enumerate() {
            let short = format!("seed {}: BROKEN: {}", failure.seed, failure.text);
            say(&if index == 0 { failure_text(failure) } else { short });
        }
        if arguments.marks {
            say(&marks_text(&tally.marks));
        }
        say(&tally_text(&tally));
    }
    match (tally.broken, arguments.marks && !tally.marks.missing().is_empty()) {
        (0, false) => 0,
        (0, true) => EXIT_MARKS,
        _ => EXIT_BROKEN,
    }
}
