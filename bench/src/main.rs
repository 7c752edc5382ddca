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
//! starts end with it, also when it fails.
#![forbid(unsafe_code)]

mod case;
mod efficiency;
mod engine_target;
mod failure;
mod host;
mod load;
mod measurement;
mod nbd_target;
mod node_process;
mod peers;
mod random;
mod report;
mod rig;
mod run;
mod usage;
mod wire;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Loads Twinpoint, measures it, reports.")]
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
        Command::Run(options) => run::run(&options),
        Command::Peers(options) => peers::run(&options),
        Command::Wire(options) => wire::run(&options),
        Command::Node(arguments) => node_process::serve(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("twinpoint-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
