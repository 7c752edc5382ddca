//! `twinpoint`: the operator's binary. Parses flags, runs one subcommand, and turns what it came to into an exit code.
//!
//! Invariants: results go to stdout; a mistake or a failure is exactly one line on stderr that says what happened, to
//! what, and what to do, as JSON if `--json` is given; the exit codes are those of [`failure::Exit`].
#![forbid(unsafe_code)]

mod address;
mod branch;
mod checkpoint;
mod failure;
mod format;
mod inspect;
mod key;
mod node_client;
mod outline;
mod output;
mod progress;
mod promote;
mod quantity;
mod serve;
mod status;
mod stop;
mod store_path;
mod transport;
mod verify;
mod volume;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use failure::{EXIT_CODES, Exit, Failure};

/// A replicated block store: two stores, one consistency point.
#[derive(Parser)]
#[command(name = "twinpoint", version, about, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a file or block device an empty store.
    Format(format::Format),
    /// Serve a store: run a node, primary or secondary.
    Serve(Box<serve::Serve>),
    /// Show how a running node is.
    Status(status::Status),
    /// Seal a consistency point, and wait until it is committed.
    Checkpoint(checkpoint::Checkpoint),
    /// List and drop what a returned old primary alone has.
    Branch(branch::Branch),
    /// Make a secondary the primary, in a new term.
    Promote(promote::Promote),
    /// Create, list and delete the volumes of a running primary.
    Volume(volume::Volume),
    /// Stop a running node in order.
    Stop(stop::Stop),
    /// Print every on-disk structure of a store.
    Inspect(inspect::Inspect),
    /// Check a stopped store, block by block; with a second one, compare the two.
    Verify(verify::Verify),
    /// Make the key file that the two nodes of a pair share.
    Key(key::Key),
}

impl Command {
    fn run(self) -> Result<(), Failure> {
        match self {
            Command::Format(command) => command.run(),
            Command::Serve(command) => command.run(),
            Command::Status(command) => command.run(),
            Command::Checkpoint(command) => command.run(),
            Command::Branch(command) => command.run(),
            Command::Promote(command) => command.run(),
            Command::Volume(command) => command.run(),
            Command::Stop(command) => command.run(),
            Command::Inspect(command) => command.run(),
            Command::Verify(command) => command.run(),
            Command::Key(command) => command.run(),
        }
    }
}

fn main() -> ExitCode {
    // Also when the parser fails; what comes behind `--` is no flag.
    let is_json = |argument: &OsString| argument == "--json";
    let json = std::env::args_os()
        .take_while(|argument| argument != "--")
        .any(|argument| is_json(&argument));
    let result = match parse() {
        Ok(cli) => cli.command.run(),
        Err(error) if is_help(error.kind()) => error.exit(),
        Err(error) => Err(usage(&error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(json);
            failure.exit.into()
        }
    }
}

fn parse() -> Result<Cli, clap::Error> {
    let matches = with_numbers(Cli::command()).try_get_matches()?;
    Cli::from_arg_matches(&matches)
}

/// Takes `-1` for the value it is meant as, so that what is told is why that value cannot be.
fn with_numbers(command: clap::Command) -> clap::Command {
    command
        .mut_args(|arg| {
            let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
            if takes_value { arg.allow_negative_numbers(true) } else { arg }
        })
        .mut_subcommands(with_numbers)
}

fn is_help(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    )
}

/// What the standard library says of a number, and what it means to an operator.
const NUMBERS: [(&str, &str); 3] = [
    ("invalid digit found in string", "a whole number is needed, such as 4"),
    ("cannot parse integer from empty string", "a whole number is needed, such as 4"),
    ("number too large to fit in target type", "the number is too large"),
];

/// One line of what the parser says in several.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let mut said = String::new();
    for line in text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:")) {
        let is_advice = line.starts_with("tip:") || line.starts_with('[');
        if !line.is_empty() && !line.starts_with("For more") {
            said.push_str(if said.is_empty() {
                ""
            } else if is_advice {
                "; "
            } else {
                " "
            });
            said.push_str(line);
        }
    }
    let said = said.strip_prefix("error: ").unwrap_or(&said).to_owned();
    let said = NUMBERS.iter().fold(said, |said, (from, to)| said.replace(from, to));
    Failure::new(Exit::Usage, "usage", format!("{said}; see --help"))
}
