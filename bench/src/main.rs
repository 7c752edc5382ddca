//! `twinpoint-bench`: loads the engine, measures it, reports.
//!
//! ```text
//!   run:   engine (in this process) and NBD  x  single, sync, async  x  pattern x depth x flushes
//!   peers: fio on nbdkit's single copy and on ours, in turn
//!   wire:  what the same loads cost over TCP and over RDMA, counted; here, or from readings taken elsewhere
//!   node:  one node in a process of its own, for the two above
//! ```
//!
//! Beside the flow. Invariants: every figure of a run comes from the same seed, which is printed; all nodes that a run
//! starts end with it, and the stores are removed, also when it fails or is interrupted. It exits with 1 if it failed, with
//! 2 if a flag is wrong, with 128 and the signal's number if it was interrupted.
#![forbid(unsafe_code)]

mod case;
mod efficiency;
mod ending;
mod engine_target;
mod failure;
mod flags;
mod host;
mod load;
mod measurement;
mod nbd_target;
mod node_process;
mod peers;
mod random;
mod readings;
mod report;
mod rig;
mod run;
mod usage;
mod wire;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

const ENDS: &str = "\
Its nodes end with it, and its stores are removed; only a kill (SIGKILL) leaves the stores behind.
Exits with 0, 1 if it failed, 2 if a flag is wrong, 128 and the signal's number if SIGINT, SIGTERM or SIGHUP ended it.";

#[derive(Parser)]
#[command(version, about = "Loads Twinpoint, measures it, reports.", after_help = ENDS)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure every case, in the process and through NBD, and write raw.csv, summary.txt and README.md.
    Run(run::RunOptions),
    /// Put the same fio load on nbdkit's single-copy file plugin and on Twinpoint, in turn, and compare.
    Peers(peers::PeersOptions),
    /// Count what the same loads cost a pair over TCP and over RDMA: copies, system calls, verbs, completions.
    Wire(wire::WireOptions),
    /// One node in a process of its own; ends with its standard input.
    #[command(hide = true)]
    Node(node_process::NodeArguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(options) => ending::at_signals().and_then(|()| run::run(&options)),
        Command::Peers(options) => ending::at_signals().and_then(|()| peers::run(&options)),
        Command::Wire(options) => ending::at_signals().and_then(|()| wire::run(&options)),
        // It ends when its parent does.
        Command::Node(arguments) => node_process::serve(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ending::end(&failure.to_string(), failure.exit_code()),
    }
}
