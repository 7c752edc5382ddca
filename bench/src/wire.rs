//! The comparison of transports: what the same loads cost a sync pair over TCP and over RDMA, counted, and their speed.
//!
//! Either on this host, both nodes in processes of their own on one address; or from readings that were taken elsewhere
//! (two hosts, the lab).
//!
//! Invariants: every load is put on all transports in turn in each round; a reading is taken only when the pair has
//! settled, so that all that a load cost is in it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::case::{Frontend, Load, Pairing, Pattern, Setup, has_words};
use crate::efficiency::{CALL_KINDS, Costs, Readings};
use crate::failure::Failure;
use crate::flags::{ROUNDS, StoreOptions, parse_seconds};
use crate::host;
use crate::load::{Loader, Timing, flush};
use crate::measurement::median;
use crate::readings::{Turns, read_turns};
use crate::report::{Report, readme};
use crate::rig::{Rig, RigOptions};

/// The loads, by names that sort as they are meant to be read.
const LOADS: [(&str, Load); 6] = [
    ("rand4k-q01", Load { pattern: Pattern::Random4, depth: 1, flush_every: 0 }),
    ("rand4k-q01-f1", Load { pattern: Pattern::Random4, depth: 1, flush_every: 1 }),
    ("rand4k-q16", Load { pattern: Pattern::Random4, depth: 16, flush_every: 0 }),
    ("rand4k-q64", Load { pattern: Pattern::Random4, depth: 64, flush_every: 0 }),
    ("seq1m-q04", Load { pattern: Pattern::Sequential1024, depth: 4, flush_every: 0 }),
    ("seq64k-q16", Load { pattern: Pattern::Sequential64, depth: 16, flush_every: 0 }),
];
const TITLE: &str = "What the transports cost";
const LEGEND: &str = "\
Counted from both nodes' `efficiency`, not timed, but for IOPS. `copied by us` is bytes that a process copied in its own
memory, for each byte: clients' commands into buffers, data sent, data received; what kernels copy beside is in
docs/WIRE_EFFICIENCY.md. System calls are for each 4 KiB that clients wrote, of primary and secondary, without `yield`
and `clock`, which come with time and not with work. Verbs and completions are for each MiB of data on the wire;
`signalled` is the share of the requests to send that asked for a completion.
Loads are named pattern-q<commands under way>, -f1 with a flush after each write.
";

/// What says how to measure.
const MEASURING: [&str; 10] = [
    "short",
    "rounds",
    "seconds",
    "transports",
    "address",
    "only",
    "store_dir",
    "store_mib",
    "volume_mib",
    "buffered",
];

/// Flags of `wire`.
#[derive(Args, Debug)]
pub struct WireOptions {
    /// A look rather than a measurement: 0.3 s for each load, one round.
    #[arg(long)]
    short: bool,
    /// How often every load is put on each transport. Default: 3, with --short 1.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(ROUNDS))]
    rounds: Option<u32>,
    /// Time of each load, in seconds. Default: 3, with --short 0.3.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    seconds: Option<Duration>,
    /// Which transports, each once, in this order, divided by commas: tcp, rdma. rdma needs a device whose port is up.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = ["tcp", "rdma"], default_value = "tcp")]
    transports: Vec<String>,
    /// The address of this host that the pair speaks over; for rdma, that of an RDMA device.
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    address: std::net::IpAddr,
    /// Only loads whose name has these words, as q64 or "rand4k f1".
    #[arg(long, value_name = "WORDS", default_value = "")]
    only: String,
    /// Measure nothing: make the table from readings in this folder. What was not said by the primary and the secondary
    /// of one pair, before and after, is refused.
    #[arg(long, value_name = "FOLDER", conflicts_with_all = MEASURING)]
    readings: Option<PathBuf>,
    /// Where the results go: wire.md and wire.csv. Default: `bench/results/<date>-<kind of machine>-wire`; with
    /// --readings, their folder.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    stores: StoreOptions,
}

/// Measures, or reads what was measured, and writes the tables.
///
/// # Errors
/// The first failure.
pub fn run(options: &WireOptions) -> Result<(), Failure> {
    let Some(readings) = &options.readings else { return measure_and_write(options) };
    let turns = read_turns(readings)?;
    let folder = options.out.as_ref().unwrap_or(readings);
    write(&Report::create(folder)?, &turns, |notes| format!("# {TITLE}\n\n{notes}"))?;
    println!("written to {}", folder.display());
    Ok(())
}

fn measure_and_write(options: &WireOptions) -> Result<(), Failure> {
    let loads: Vec<_> = LOADS.iter().filter(|(name, _)| has_words(name, &options.only)).collect();
    if loads.is_empty() {
        return Err(Failure::NoCase(options.only.clone()));
    }
    check_transports(&options.transports)?;
    let (rig_options, _store_folder) = options.stores.prepare()?;
    let folder = options.out.clone().unwrap_or_else(|| {
        let name = format!("{}-{}-wire", host::today(), host::short_name());
        PathBuf::from("bench/results").join(name)
    });
    let report = Report::create(&folder)?;
    let turns = measure(options, &loads, &rig_options)?;
    write(&report, &turns, |notes| readme(TITLE, &rig_options.folder, &[], notes))?;
    println!("written to {}", folder.display());
    Ok(())
}

/// Writes and prints the tables; `text_of` makes a page of them.
fn write(
    report: &Report,
    turns: &Turns,
    text_of: impl FnOnce(&str) -> String,
) -> Result<(), Failure> {
    let tables = [main_table(turns), call_table(turns)].join("\n");
    report.write("wire.md", &text_of(&format!("{tables}\n{LEGEND}")))?;
    report.write("wire.csv", &csv(turns))?;
    println!("{tables}");
    Ok(())
}

/// Whether each is named once, and possible here: nodes that want RDMA and have none try for ever.
fn check_transports(transports: &[String]) -> Result<(), Failure> {
    for (index, transport) in transports.iter().enumerate() {
        if transports[..index].contains(transport) {
            return Err(Failure::Usage(format!("--transports: {transport} is named twice")));
        }
    }
    if transports.iter().any(|transport| transport == "rdma") {
        rdma_fallback::rdma::probe().map_err(Failure::NoRdma)?;
    }
    Ok(())
}

fn measure(
    options: &WireOptions,
    loads: &[&(&str, Load)],
    rig_options: &RigOptions,
) -> Result<Turns, Failure> {
    let rounds = options.rounds.unwrap_or(if options.short { 1 } else { 3 });
    let default = Duration::from_millis(if options.short { 300 } else { 3000 });
    let measured = options.seconds.unwrap_or(default);
    let timing = Timing { warm_up: Duration::ZERO, measured };
    let mut rigs = Vec::new();
    for transport in &options.transports {
        let mut rig_options = rig_options.clone();
        rig_options.transport.clone_from(transport);
        rig_options.address = options.address;
        let setup = Setup { frontend: Frontend::Nbd, pairing: Pairing::Sync };
        let rig = Rig::start(&format!("{transport}-"), setup, &rig_options)?;
        let mut target = rig.target()?;
        Loader::new(1).fill(target.as_mut())?;
        rigs.push((transport, rig, target));
    }
    let mut turns = Turns::new();
    let mut loader = Loader::new(1);
    for _ in 0..rounds {
        for (name, load) in loads {
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
    Ok(turns)
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
