//! The matrix: every case for a fixed time, set-up after set-up, round after round, so that all cases see the same
//! noise.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::case::{Case, cases, setups};
use crate::failure::Failure;
use crate::host;
use crate::load::{Loader, Target, Timing, flush};
use crate::measurement::{Measurement, Reading};
use crate::report::{LEGEND, Report, progress, readme, summary};
use crate::rig::{Rig, RigOptions};
use crate::usage::machine_busy_ticks;

/// Flags of `run`.
#[derive(Args, Debug)]
pub struct RunOptions {
    /// A look rather than a measurement: 0.3 s for each case, one round.
    #[arg(long)]
    quick: bool,
    /// Measured time of each case, in seconds. Default: 3, with --quick 0.3. A third of it, at most 1 s, comes before
    /// as warm-up.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// How often every case is measured. Default: 3, with --quick 1.
    #[arg(long, value_name = "COUNT")]
    rounds: Option<usize>,
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

/// Where the stores lie, and how large they are.
#[derive(Args, Debug)]
pub struct StoreOptions {
    /// A folder for the stores; their files are removed at the end. Default: one in the folder for temporary files.
    #[arg(long, value_name = "FOLDER")]
    store_dir: Option<PathBuf>,
    /// Size of each store, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    store_mib: u64,
    /// Size of the volume, in MiB. It is written once before anything is measured.
    #[arg(long, value_name = "MIB", default_value_t = 960)]
    pub volume_mib: u64,
    /// Accept a file system that knows no direct access; the figures then say little.
    #[arg(long)]
    buffered: bool,
}

impl StoreOptions {
    /// Makes the folder.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn prepare(&self) -> Result<(RigOptions, StoreFolder), Failure> {
        let default =
            || std::env::temp_dir().join(format!("twinpoint-bench-{}", std::process::id()));
        let path = self.store_dir.clone().unwrap_or_else(default);
        let existed = path.exists();
        std::fs::create_dir_all(&path).map_err(|error| Failure::File(path.clone(), error))?;
        let options = RigOptions {
            folder: path.clone(),
            store_bytes: self.store_mib << 20,
            volume_bytes: self.volume_mib << 20,
            buffered: self.buffered,
            transport: "tcp".to_owned(),
            address: Ipv4Addr::LOCALHOST.into(),
        };
        Ok((options, StoreFolder { path, existed, files: Vec::new() }))
    }
}

/// Removes what a run put into the folder of stores, at its end.
pub struct StoreFolder {
    path: PathBuf,
    existed: bool,
    /// Files in it, by name.
    pub files: Vec<String>,
}

impl Drop for StoreFolder {
    fn drop(&mut self) {
        // What is not there needs no removal, and what cannot be removed is the operator's.
        for file in &self.files {
            _ = std::fs::remove_file(self.path.join(file));
        }
        if !self.existed {
            _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Measures, and writes the results.
///
/// # Errors
/// The first failure.
pub fn run(options: &RunOptions) -> Result<(), Failure> {
    let seconds = options.seconds.unwrap_or(if options.quick { 0.3 } else { 3.0 });
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 3 }).max(1);
    let measured = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3));
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
    let mut report = Report::create(&folder)?;
    let (rig_options, mut store_folder) = options.stores.prepare()?;
    store_folder.files = file_names("");
    eprintln!("seed {}, {} cases, {rounds} rounds", options.seed, results.len());
    let total = results.len() * rounds;
    let mut done = 0;
    for round in 1..=rounds {
        for (setup, cases) in &chosen {
            let rig = Rig::start("", *setup, &rig_options)?;
            let mut target = rig.target()?;
            let mut loader = Loader::new(options.seed.wrapping_add(round as u64 - 1));
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
        ("time of a case", format!("{seconds} s, after {} s", timing.warm_up.as_secs_f64())),
        ("volume", format!("{} MiB, written before", options.stores.volume_mib)),
    ];
    let title = "Engine and NBD, one store and two";
    report.write("README.md", &readme(title, &rig_options.folder, &more, LEGEND))?;
    println!("seed {}\n{text}\nwritten to {}", options.seed, folder.display());
    Ok(())
}

/// The files that a rig of this name makes.
pub fn file_names(name: &str) -> Vec<String> {
    let suffixes = [
        "primary.store",
        "secondary.store",
        "primary.control",
        "secondary.control",
        "primary.log",
        "secondary.log",
        "key",
        "nbd",
    ];
    suffixes.iter().map(|suffix| format!("{name}{suffix}")).collect()
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
