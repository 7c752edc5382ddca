//! The comparison of transports: what the same loads cost a sync pair over TCP and over RDMA, counted, and their speed.
//!
//! Either on this host, both nodes in processes of their own on one address; or from readings that were taken elsewhere
//! (two hosts, the lab): a folder with one folder for each turn of each load, `LOAD.TRANSPORT.TURN`, and in it what
//! `twinpoint status --json` said before and after it on both nodes, and what fio said.
//!
//! Invariants: every load is put on all transports in turn in each round; a reading is taken only when the pair has
//! settled, so that all that a load cost is in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::Value;
use twinpoint_runtime::status::NodeStatus;

use crate::case::{Frontend, Load, Pairing, Pattern, Setup};
use crate::efficiency::{CALL_KINDS, Costs, Readings};
use crate::failure::Failure;
use crate::host;
use crate::load::{Loader, Timing, flush};
use crate::measurement::median;
use crate::report::{Report, readme};
use crate::rig::Rig;
use crate::run::{StoreOptions, file_names};

/// The loads, by names that sort as they are meant to be read.
const LOADS: [(&str, Load); 6] = [
    ("rand4k-q01", Load { pattern: Pattern::Random4, depth: 1, flush_every: 0 }),
    ("rand4k-q01-f1", Load { pattern: Pattern::Random4, depth: 1, flush_every: 1 }),
    ("rand4k-q16", Load { pattern: Pattern::Random4, depth: 16, flush_every: 0 }),
    ("rand4k-q64", Load { pattern: Pattern::Random4, depth: 64, flush_every: 0 }),
    ("seq1m-q04", Load { pattern: Pattern::Sequential1024, depth: 4, flush_every: 0 }),
    ("seq64k-q16", Load { pattern: Pattern::Sequential64, depth: 16, flush_every: 0 }),
];
/// Files of a turn's folder: of the primary and the secondary, before and after, and what fio said.
const STATUS_FILES: [[&str; 2]; 2] = [
    ["primary-before.json", "secondary-before.json"],
    ["primary-after.json", "secondary-after.json"],
];
const FIO_FILE: &str = "fio.json";
const LEGEND: &str = "\
Counted from both nodes' `efficiency`, not timed, but for IOPS. `copied by us` is bytes that a process copied in its own
memory, for each byte: clients' commands into buffers, data sent, data received; what kernels copy beside is in
docs/WIRE_EFFICIENCY.md. System calls are for each 4 KiB that clients wrote, of primary and secondary, without `yield`
and `clock`, which come with time and not with work. Verbs and completions are for each MiB of data on the wire;
`signalled` is the share of the requests to send that asked for a completion.
Loads are named pattern-q<commands under way>, -f1 with a flush after each write.
";

/// Flags of `wire`.
#[derive(Args, Debug)]
pub struct WireOptions {
    /// A look rather than a measurement: 0.3 s for each load, one round.
    #[arg(long)]
    short: bool,
    /// How often every load is put on each transport. Default: 3, with --short 1.
    #[arg(long, value_name = "COUNT")]
    rounds: Option<usize>,
    /// Time of each load, in seconds. Default: 3, with --short 0.3.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Which transports, in this order, divided by commas: tcp, rdma.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = ["tcp", "rdma"], default_value = "tcp")]
    transports: Vec<String>,
    /// The address of this host that the pair speaks over; for rdma, that of an RDMA device.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    address: std::net::IpAddr,
    /// Only loads whose name has this text, as q64.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Measure nothing: make the table from readings in this folder.
    #[arg(long, value_name = "FOLDER")]
    readings: Option<PathBuf>,
    /// Where the results go: wire.md and wire.csv. Default: `bench/results/<date>-<kind of machine>-wire`; with
    /// --readings, their folder.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    stores: StoreOptions,
}

/// By load and transport.
type Turns = BTreeMap<(String, String), Vec<Readings>>;

/// Measures, or reads what was measured, and writes the tables.
///
/// # Errors
/// The first failure.
pub fn run(options: &WireOptions) -> Result<(), Failure> {
    let default = || {
        let name = format!("{}-{}-wire", host::today(), host::short_name());
        options.readings.clone().unwrap_or_else(|| PathBuf::from("bench/results").join(name))
    };
    let folder = options.out.clone().unwrap_or_else(default);
    let report = Report::create_plain(&folder)?;
    let (turns, facts) = match &options.readings {
        Some(readings) => (read_turns(readings)?, None),
        None => {
            let (turns, store_folder) = measure(options)?;
            (turns, Some(store_folder))
        }
    };
    let tables = [main_table(&turns), call_table(&turns)].join("\n");
    let notes = format!("{tables}\n{LEGEND}");
    let text = match facts {
        Some(store_folder) => readme("What the transports cost", &store_folder, &[], &notes),
        None => format!("# What the transports cost\n\n{notes}"),
    };
    report.write("wire.md", &text)?;
    report.write("wire.csv", &csv(&turns))?;
    println!("{tables}\nwritten to {}", folder.display());
    Ok(())
}

fn measure(options: &WireOptions) -> Result<(Turns, PathBuf), Failure> {
    let loads: Vec<_> = LOADS.iter().filter(|(name, _)| name.contains(&options.only)).collect();
    if loads.is_empty() {
        return Err(Failure::NoCase(options.only.clone()));
    }
    let rounds = options.rounds.unwrap_or(if options.short { 1 } else { 3 }).max(1);
    let seconds = options.seconds.unwrap_or(if options.short { 0.3 } else { 3.0 });
    let measured = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3));
    let timing = Timing { warm_up: Duration::ZERO, measured };
    let (rig_options, mut store_folder) = options.stores.prepare()?;
    let mut rigs = Vec::new();
    for transport in &options.transports {
        let name = format!("{transport}-");
        store_folder.files.extend(file_names(&name));
        let mut rig_options = rig_options.clone();
        rig_options.transport.clone_from(transport);
        rig_options.address = options.address;
        let setup = Setup { frontend: Frontend::Nbd, pairing: Pairing::Sync };
        let rig = Rig::start(&name, setup, &rig_options)?;
        let mut target = rig.target()?;
        Loader::new(1).fill(target.as_mut())?;
        rigs.push((transport, rig, target));
    }
    let mut turns = Turns::new();
    let mut loader = Loader::new(1);
    for _ in 0..rounds {
        for (name, load) in &loads {
            for (transport, rig, target) in &mut rigs {
                let before = rig.settled_pair()?;
                let figures = loader.drive(target.as_mut(), *load, timing, &mut || {})?;
                flush(target.as_mut())?;
                let after = rig.settled_pair()?;
                let iops = figures.writes as f64 / figures.seconds;
                eprintln!("{name:<14} {transport:<5} {iops:>8.0} IOPS");
                let key = ((*name).to_owned(), transport.clone());
                turns.entry(key).or_default().push(Readings { before, after, iops });
            }
        }
    }
    Ok((turns, rig_options.folder))
}

fn read_turns(folder: &Path) -> Result<Turns, Failure> {
    let failed = |error| Failure::File(folder.to_owned(), error);
    let mut turns = Turns::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let mut words = name.split('.');
        let (Some(load), Some(transport), Some(_turn)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let key = (load.to_owned(), transport.to_owned());
        let turn = read_turn(&path, transport)?;
        turns.entry(key).or_default().push(turn);
    }
    if turns.is_empty() {
        let text = format!("{}: no folder LOAD.TRANSPORT.TURN of readings in it", folder.display());
        return Err(Failure::Program("readings", text));
    }
    Ok(turns)
}

fn read_turn(folder: &Path, transport: &str) -> Result<Readings, Failure> {
    let wrong = |name: &str, what: &str| {
        Failure::Program("readings", format!("{}: {what}", folder.join(name).display()))
    };
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read_to_string(&path).map_err(|error| Failure::File(path, error))
    };
    let status = |name: &str| -> Result<NodeStatus, Failure> {
        serde_json::from_str(&read(name)?).map_err(|error| wrong(name, &error.to_string()))
    };
    let [before, after] = STATUS_FILES;
    let before = [status(before[0])?, status(before[1])?];
    let after_name = after[0];
    let after = [status(after[0])?, status(after[1])?];
    if after[0].peer.transport.as_deref() != Some(transport) {
        let what = format!("the pair does not speak over {transport}");
        return Err(wrong(after_name, &what));
    }
    let fio: Value = serde_json::from_str(&read(FIO_FILE)?)
        .map_err(|error| wrong(FIO_FILE, &error.to_string()))?;
    let iops = fio["jobs"][0]["write"]["iops"].as_f64();
    let iops = iops.ok_or_else(|| wrong(FIO_FILE, "no jobs[0].write.iops"))?;
    Ok(Readings { before, after, iops })
}

fn iops_of(turns: &[Readings]) -> f64 {
    median(turns.iter().map(|turn| turn.iops))
}

fn main_table(turns: &Turns) -> String {
    let mut text = String::from(
        "| load | over | IOPS | of TCP | wire bytes per byte | copied by us: client | sent | received \
         | system calls: primary | secondary | of wires: primary | secondary | verbs: primary | secondary \
         | completions: primary | secondary | signalled |\n",
    );
    text.push_str(&format!("|---|---{}|\n", "|---:".repeat(15)));
    for ((load, transport), readings) in turns {
        let costs = Costs::new(readings);
        let iops = iops_of(readings);
        let tcp = turns.get(&(load.clone(), "tcp".to_owned())).map(|turns| iops_of(turns));
        let of_tcp =
            tcp.map_or_else(|| "-".to_owned(), |tcp| format!("{:.2}", iops / tcp.max(1.0)));
        let verbs = |node| costs.requests_per_mebibyte(node) + costs.receives_per_mebibyte(node);
        // Writing to a string cannot fail.
        _ = writeln!(
            text,
            "| {load} | {transport} | {iops:.0} | {of_tcp} | {:.2} | {:.2} | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} \
             | {:.3} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} |",
            costs.wire_bytes_per_byte(),
            costs.client_copies_per_byte(),
            costs.wire_copies_per_byte(0),
            costs.wire_copies_per_byte(1),
            costs.all_calls_per_block(0),
            costs.all_calls_per_block(1),
            costs.wire_calls_per_block(0),
            costs.wire_calls_per_block(1),
            verbs(0),
            verbs(1),
            costs.completions_per_mebibyte(0),
            costs.completions_per_mebibyte(1),
            costs.signalled_share(0),
        );
    }
    text
}

/// System calls by kind, and what the driver of an emulated card adds.
fn call_table(turns: &Turns) -> String {
    let mut text = format!("| load | over | node | {} | driver |\n", CALL_KINDS.join(" | "));
    text.push_str(&format!("|---|---|---{}|\n", "|---:".repeat(CALL_KINDS.len() + 1)));
    for ((load, transport), readings) in turns {
        let costs = Costs::new(readings);
        for (node, name) in ["primary", "secondary"].into_iter().enumerate() {
            let kinds: Vec<String> = (0..CALL_KINDS.len())
                .map(|kind| format!("{:.3}", costs.calls_per_block(node, kind)))
                .collect();
            let driver = costs.driver_calls_per_block(node);
            _ = writeln!(
                text,
                "| {load} | {transport} | {name} | {} | {driver:.3} |",
                kinds.join(" | ")
            );
        }
    }
    text
}

/// The same for a program, one line for each node.
fn csv(turns: &Turns) -> String {
    let kinds = CALL_KINDS.map(|kind| format!("calls_{}_per_4k", kind.replace(' ', "_")));
    let mut text = format!(
        "load,transport,node,iops,wire_bytes_per_byte,client_copies_per_byte,wire_copies_per_byte,\
         calls_per_4k,wire_calls_per_4k,{},driver_calls_per_4k,requests_per_mib,receives_per_mib,\
         completions_per_mib,signalled,wake_ups_per_mib\n",
        kinds.join(",")
    );
    for ((load, transport), readings) in turns {
        let costs = Costs::new(readings);
        for (node, name) in ["primary", "secondary"].into_iter().enumerate() {
            let client = if node == 0 { costs.client_copies_per_byte() } else { 0.0 };
            let mut values = vec![
                costs.wire_bytes_per_byte(),
                client,
                costs.wire_copies_per_byte(node),
                costs.all_calls_per_block(node),
                costs.wire_calls_per_block(node),
            ];
            values.extend((0..CALL_KINDS.len()).map(|kind| costs.calls_per_block(node, kind)));
            values.extend([
                costs.driver_calls_per_block(node),
                costs.requests_per_mebibyte(node),
                costs.receives_per_mebibyte(node),
                costs.completions_per_mebibyte(node),
                costs.signalled_share(node),
                costs.wake_ups_per_mebibyte(node),
            ]);
            let values: Vec<String> = values.iter().map(|value| format!("{value:.5}")).collect();
            let iops = iops_of(readings);
            _ = writeln!(text, "{load},{transport},{name},{iops:.1},{}", values.join(","));
        }
    }
    text
}
