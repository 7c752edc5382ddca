//! The comparison by which sync replication is accepted: fio's NBD engine, over unix sockets, on nbdkit's file plugin
//! with one copy, on one store, and on a pair in sync mode, in turn.
//!
//! Invariants: all servers run all the time and each sees every round's noise; what nbdkit left in the page cache is
//! written out before the next server is measured.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;

use crate::case::{Frontend, Pairing, Setup, has_words};
use crate::ending::Process;
use crate::failure::Failure;
use crate::flags::{ROUNDS, SECONDS_MAX, StoreOptions};
use crate::host;
use crate::load::Loader;
use crate::measurement::median;
use crate::report::{Report, readme};
use crate::rig::{Rig, RigOptions, VOLUME};
use crate::usage::{TICKS_PER_SECOND, Usage, machine_busy_ticks};

const NBDKIT_IMAGE: &str = "nbdkit.img";
const NBDKIT_SOCKET: &str = "nbdkit.sock";
const START_LIMIT: Duration = Duration::from_secs(10);

/// What fio is told, besides engine and time. The first is the one that counts.
const LOADS: [(&str, &[&str]); 4] = [
    ("rand4k-q64-f1024", &["--rw=randwrite", "--bs=4k", "--iodepth=64", "--fsync=1024"]),
    ("rand4k-q1-f0", &["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    ("rand4k-q16-f64", &["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=64"]),
    ("rand4k-q1-f1", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"]),
];
const LEGEND: &str = "\
fio's nbd engine over unix sockets, random 4 KiB writes, q commands under way, a flush after f writes (0: none); the
servers in turn in every round, medians over the rounds. `nbdkit` is its file plugin: one copy, written to the page
cache and made durable by each flush. `single` is one Twinpoint store, `sync` two in two processes, a flush answered
when both have the point durable. CPU is of all the server's processes per write. `other` is cores that something else
kept busy. The mark is sync at 0.5 of nbdkit or more in the first case.
";

/// Flags of `peers`.
#[derive(Args, Debug)]
pub struct PeersOptions {
    /// How often every case is measured.
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(ROUNDS))]
    rounds: u32,
    /// Measured time of each case, in whole seconds: fio knows no parts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    seconds: u64,
    /// Measure only loads whose name has these words, as q64.
    #[arg(long, value_name = "WORDS", default_value = "")]
    only: String,
    /// Where the results go: peers.txt, peers.csv, and peers.md. Default: `bench/results/<date>-<kind of machine>-peers`.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    stores: StoreOptions,
}

struct Server {
    name: &'static str,
    uri: String,
    kind: Kind,
}

enum Kind {
    Nbdkit(Process),
    Ours(Box<Rig>),
}

#[derive(Clone, Debug)]
struct Outcome {
    iops: f64,
    write_us: [f64; 2],
    flush_us: Option<[f64; 2]>,
    cpu_us_per_op: f64,
    other_cores: f64,
}

impl Server {
    fn usage(&self) -> Usage {
        match &self.kind {
            Kind::Nbdkit(process) => Usage::of_process(process.id()),
            Kind::Ours(rig) => rig.usage().0,
        }
    }
}

/// Measures, and writes the results.
///
/// # Errors
/// The first failure.
pub fn run(options: &PeersOptions) -> Result<(), Failure> {
    let loads: Vec<_> = LOADS.iter().filter(|(name, _)| has_words(name, &options.only)).collect();
    if loads.is_empty() {
        return Err(Failure::NoCase(options.only.clone()));
    }
    let folder = options.out.clone().unwrap_or_else(|| {
        let name = format!("{}-{}-peers", host::today(), host::short_name());
        PathBuf::from("bench/results").join(name)
    });
    let (rig_options, _store_folder) = options.stores.prepare()?;
    let report = Report::create(&folder)?;
    let servers = start_servers(&rig_options)?;
    let mut results: Vec<Vec<Vec<Outcome>>> = vec![vec![Vec::new(); servers.len()]; loads.len()];
    for round in 1..=options.rounds {
        for (load, (name, flags)) in loads.iter().enumerate() {
            for (index, server) in servers.iter().enumerate() {
                settle(&rig_options.folder);
                let outcome = fio(server, flags, options)?;
                eprintln!("round {round} {name:<18} {:<7} {:>8.0} IOPS", server.name, outcome.iops);
                results[load][index].push(outcome);
            }
        }
    }
    let names: Vec<&str> = servers.iter().map(|server| server.name).collect();
    let (text, table) = tables(&loads, &names, &results);
    report.write("peers.txt", &text)?;
    report.write("peers.csv", &table)?;
    let versions =
        [("fio", version("fio", "--version")), ("nbdkit", version("nbdkit", "--version"))];
    let title = "Beside nbdkit's single copy";
    report.write("peers.md", &readme(title, &rig_options.folder, &versions, LEGEND))?;
    println!("{text}\nwritten to {}", folder.display());
    Ok(())
}

fn start_servers(options: &RigOptions) -> Result<Vec<Server>, Failure> {
    let mut servers = vec![start_nbdkit(options)?];
    for (name, prefix, pairing) in
        [("single", "single-", Pairing::Single), ("sync", "sync-", Pairing::Sync)]
    {
        let rig = Rig::start(prefix, Setup { frontend: Frontend::Nbd, pairing }, options)?;
        Loader::new(1).fill(rig.target()?.as_mut())?;
        let uri = format!("nbd+unix:///{VOLUME}?socket={}", rig.nbd.display());
        servers.push(Server { name, uri, kind: Kind::Ours(Box::new(rig)) });
    }
    Ok(servers)
}

/// A fully written file behind nbdkit.
fn start_nbdkit(options: &RigOptions) -> Result<Server, Failure> {
    let (image, socket) = (options.folder.join(NBDKIT_IMAGE), options.folder.join(NBDKIT_SOCKET));
    let failed = |error| Failure::File(image.clone(), error);
    let file = File::create(&image).map_err(failed)?;
    let zeroes = vec![0; 1 << 20];
    for _ in 0..options.volume_bytes >> 20 {
        std::io::Write::write_all(&mut &file, &zeroes).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    let log = options.folder.join("nbdkit.log");
    let log = File::create(&log).map_err(|error| Failure::File(log, error))?;
    let mut command = Command::new("nbdkit");
    command
        .arg("-f")
        .arg("-U")
        .arg(&socket)
        .arg("file")
        .arg(&image)
        .stdin(Stdio::null())
        .stderr(log);
    let process = Process::start(&mut command)
        .map_err(|error| Failure::Program("nbdkit", error.to_string()))?;
    let kind = Kind::Nbdkit(process);
    let deadline = Instant::now() + START_LIMIT;
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err(Failure::Late("nbdkit's start", START_LIMIT));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    Ok(Server { name: "nbdkit", uri, kind })
}

/// Writes out what the last server left behind, and gives the device a moment.
fn settle(folder: &Path) {
    // Without the program the next figures are worse for whoever is next, and the rounds even that out.
    _ = Command::new("sync").arg("-f").arg(folder).status();
    std::thread::sleep(Duration::from_millis(200));
}

fn fio(server: &Server, flags: &[&str], options: &PeersOptions) -> Result<Outcome, Failure> {
    let (before, ticks) = (server.usage(), machine_busy_ticks());
    let mut command = Command::new("fio");
    command
        // A thread, for a process of fio's would outlive it if it is killed.
        .args([
            "--thread",
            "--name=bench",
            "--ioengine=nbd",
            "--output-format=json",
            "--time_based",
        ])
        .args(["--randrepeat=0", "--norandommap", "--percentile_list=50:99"])
        .arg(format!("--uri={}", server.uri))
        .arg(format!("--runtime={}", options.seconds))
        .arg(format!("--size={}m", options.stores.volume_mib))
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = Process::start(&mut command)
        .and_then(Process::output)
        .map_err(|error| Failure::Program("fio", error.to_string()))?;
    let (used, ticks) = (server.usage().since(before), machine_busy_ticks() - ticks);
    let text = String::from_utf8_lossy(&output.stdout);
    let wrong = || {
        let said = [text.as_ref(), &String::from_utf8_lossy(&output.stderr)].concat();
        Failure::Program("fio", said.chars().take(2000).collect())
    };
    let json = text.find('{').and_then(|start| serde_json::from_str::<Value>(&text[start..]).ok());
    let json = json.filter(|_| output.status.success()).ok_or_else(wrong)?;
    let job = &json["jobs"][0];
    let write = &job["write"];
    let count = write["total_ios"].as_f64().filter(|count| *count > 0.0).ok_or_else(wrong)?;
    let percentiles = |place: &Value| {
        let at = |name: &str| place["percentile"][name].as_f64().map(|value| value / 1e3);
        Some([at("50.000000")?, at("99.000000")?])
    };
    let client_cores =
        (job["usr_cpu"].as_f64().unwrap_or(0.0) + job["sys_cpu"].as_f64().unwrap_or(0.0)) / 100.0;
    let seconds = options.seconds as f64;
    let busy_cores = ticks as f64 / TICKS_PER_SECOND / seconds;
    Ok(Outcome {
        iops: write["iops"].as_f64().ok_or_else(wrong)?,
        write_us: percentiles(&write["clat_ns"]).ok_or_else(wrong)?,
        flush_us: percentiles(&job["sync"]["lat_ns"]),
        cpu_us_per_op: used.cpu_ns as f64 / 1e3 / count,
        other_cores: (busy_cores - used.cpu_ns as f64 / 1e9 / seconds - client_cores).max(0.0),
    })
}

/// The table for a person, and the same for a program, which has every round.
fn tables(
    loads: &[&(&str, &[&str])],
    names: &[&str],
    results: &[Vec<Vec<Outcome>>],
) -> (String, String) {
    let mut text = format!(
        "{:<18} {:<7} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>6}  {}\n",
        "load",
        "server",
        "IOPS",
        "of nbdkit",
        "write p50",
        "p99, us",
        "flush p50",
        "p99, us",
        "cpu/op",
        "other",
        "IOPS of every round"
    );
    let mut table = "load,server,round,iops,write_us_p50,write_us_p99,flush_us_p50,flush_us_p99,\
                     server_cpu_us_per_op,other_cores_busy\n"
        .to_owned();
    for (load, (load_name, _)) in loads.iter().enumerate() {
        let middle =
            |index: usize, get: fn(&Outcome) -> f64| median(results[load][index].iter().map(get));
        for (index, name) in names.iter().enumerate() {
            let rounds = &results[load][index];
            let iops = middle(index, |outcome| outcome.iops);
            let ratio = iops / middle(0, |outcome| outcome.iops);
            let flush = |place: usize| {
                let values: Vec<f64> =
                    rounds.iter().filter_map(|outcome| Some(outcome.flush_us?[place])).collect();
                if values.is_empty() {
                    "-".to_owned()
                } else {
                    format!("{:.0}", median(values.into_iter()))
                }
            };
            let every: Vec<String> =
                rounds.iter().map(|outcome| format!("{:.0}", outcome.iops)).collect();
            // Writing to a string cannot fail.
            _ = writeln!(
                text,
                "{load_name:<18} {name:<7} {iops:>8.0} {ratio:>9.2} {:>9.1} {:>9.1} {:>9} {:>9} {:>7.1} {:>6.2}  {}",
                middle(index, |outcome| outcome.write_us[0]),
                middle(index, |outcome| outcome.write_us[1]),
                flush(0),
                flush(1),
                middle(index, |outcome| outcome.cpu_us_per_op),
                middle(index, |outcome| outcome.other_cores),
                every.join(" ")
            );
            for (round, outcome) in rounds.iter().enumerate() {
                let [p50, p99] = outcome.write_us;
                let [flush_p50, flush_p99] = outcome.flush_us.unwrap_or([0.0; 2]);
                _ = writeln!(
                    table,
                    "{load_name},{name},{},{:.1},{p50:.1},{p99:.1},{flush_p50:.1},{flush_p99:.1},{:.2},{:.2}",
                    round + 1,
                    outcome.iops,
                    outcome.cpu_us_per_op,
                    outcome.other_cores
                );
            }
        }
    }
    (text, table)
}

fn version(program: &'static str, flag: &str) -> String {
    let output = Command::new(program).arg(flag).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}
