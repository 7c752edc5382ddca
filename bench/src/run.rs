//! The matrix: every case for a fixed time, set-up after set-up, round after round, so that all cases see the same
//! noise.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::case::{Case, cases, setups};
use crate::failure::Failure;
use crate::flags::{ROUNDS, StoreOptions, parse_seconds};
use crate::host;
use crate::load::{Loader, Target, Timing, flush};
use crate::measurement::{Measurement, Reading};
use crate::report::{LEGEND, Report, progress, readme, summary};
use crate::rig::Rig;
use crate::usage::machine_busy_ticks;

/// Flags of `run`.
#[derive(Args, Debug)]
pub struct RunOptions {
    /// A look rather than a measurement: 0.3 s for each case, one round.
    #[arg(long)]
    quick: bool,
    /// Measured time of each case, in seconds. Default: 3, with --quick 0.3. A third of it, at most 1 s, comes before
    /// as warm-up.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// How often every case is measured. Default: 3, with --quick 1.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(ROUNDS))]
    rounds: Option<u32>,
    /// Measure only cases whose name has these words, as "nbd-sync rand4k q64 f1024".
    #[arg(long, value_name = "WORDS", default_value = "")]
    only: String,
    /// Seed of all offsets and contents.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the results go. Default: `bench/results/<date>-<kind of machine>`.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    stores: StoreOptions,
}

/// Measures, and writes the results.
///
/// # Errors
/// The first failure.
pub fn run(options: &RunOptions) -> Result<(), Failure> {
    let default = Duration::from_millis(if options.quick { 300 } else { 3000 });
    let measured = options.seconds.unwrap_or(default);
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 3 });
    let timing = Timing { warm_up: (measured / 3).min(Duration::from_secs(1)), measured };
    let chosen: Vec<_> = setups()
        .into_iter()
        .map(|setup| (setup, cases(setup, &options.only)))
        .filter(|(_, cases)| !cases.is_empty())
        .collect();
    let mut results: Vec<(Case, Vec<Measurement>)> =
        chosen.iter().flat_map(|(_, cases)| cases).map(|case| (*case, Vec::new())).collect();
    if results.is_empty() {
        return Err(Failure::NoCase(options.only.clone()));
    }
    let folder = options.out.clone().unwrap_or_else(|| {
        PathBuf::from("bench/results").join(format!("{}-{}", host::today(), host::short_name()))
    });
    let (rig_options, _store_folder) = options.stores.prepare()?;
    let mut report = Report::create(&folder)?;
    eprintln!("seed {}, {} cases, {rounds} rounds", options.seed, results.len());
    let total = results.len() * rounds as usize;
    let mut done = 0;
    for round in 1..=rounds {
        for (setup, cases) in &chosen {
            let rig = Rig::start("", *setup, &rig_options)?;
            let mut target = rig.target()?;
            let mut loader = Loader::new(options.seed.wrapping_add(u64::from(round) - 1));
            loader.fill(target.as_mut())?;
            for case in cases {
                let measurement = measure(&rig, target.as_mut(), &mut loader, *case, timing)?;
                report.add(round, *case, &measurement)?;
                done += 1;
                progress(done, total, *case, &measurement);
                let entry = results.iter_mut().find(|(other, _)| other == case);
                entry.expect("it was chosen").1.push(measurement);
            }
            drop(target);
        }
    }
    let text = summary(&results);
    report.write("summary.txt", text.trim_start())?;
    let more = [
        ("seed", options.seed.to_string()),
        ("rounds", rounds.to_string()),
        ("time of a case", time_text(timing)),
        ("volume", format!("{} MiB, written before", options.stores.volume_mib)),
    ];
    let title = "Engine and NBD, one store and two";
    report.write("README.md", &readme(title, &rig_options.folder, &more, LEGEND))?;
    println!("seed {}\n{text}\nwritten to {}", options.seed, folder.display());
    Ok(())
}

fn time_text(timing: Timing) -> String {
    let [measured, warm_up] = [timing.measured, timing.warm_up].map(|time| time.as_secs_f64());
    format!("{measured} s, after {warm_up} s")
}

fn measure(
    rig: &Rig,
    target: &mut dyn Target,
    loader: &mut Loader,
    case: Case,
    timing: Timing,
) -> Result<Measurement, Failure> {
    flush(target)?;
    let before = rig.settled_status()?;
    let mut readings = Vec::with_capacity(2);
    let figures = loader.drive(target, case.load, timing, &mut || {
        let (servers, client) = rig.usage();
        readings.push(Reading { servers, client, machine_ticks: machine_busy_ticks() });
    })?;
    flush(target)?;
    let after = rig.settled_status()?;
    assert!(readings.len() == 2, "a load has two boundaries");
    Ok(Measurement::new(&figures, [readings[0], readings[1]], [&before, &after]))
}
