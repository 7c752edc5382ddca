//! What is changed about a seed's history by the command line: faults left out, fewer clients, less time.
//!
//! The shrinker writes them, the command line reads them back: [`Changes`] prints itself as the flags that make it.
//! Invariant: what a seed draws does not depend on the changes; they are made to the finished options.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use crate::faults::{Fault, Faults};
use crate::options::Options;
use crate::time::{duration_text, parse_duration};

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default, Args)]
#[command(next_help_heading = "Changes to what the seeds draw")]
pub struct Changes {
    /// Leave these out: pair, lost-secondary, power-cut, volumes, unmap, or a kind of fault.
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub without: Vec<Kind>,
    /// At most so many faults.
    #[arg(long, value_name = "N")]
    pub faults: Option<u64>,
    /// At most so many clients.
    #[arg(long, value_name = "N")]
    pub clients: Option<usize>,
    /// At most so many commands of clients.
    #[arg(long, value_name = "N")]
    pub commands: Option<u64>,
    /// At most so many shards.
    #[arg(long, value_name = "N")]
    pub shards: Option<u16>,
    /// Volumes of at most so many stripes of 2 MiB.
    #[arg(long, value_name = "N")]
    pub stripes: Option<u64>,
    /// The load and the faults last at most so long in virtual time, such as 300ms.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub load: Option<Duration>,
}

/// What may be left out of a history.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// The second store.
    Pair,
    /// The loss of the secondary for good.
    LostSecondary,
    /// Power cuts: a crash loses nothing that was written.
    PowerCut,
    /// Volumes that come and go, checkpoints by name.
    Volumes,
    /// Unmaps.
    Unmap,
    /// Faults of one kind.
    Fault(Fault),
}

/// A word that names no [`Kind`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownKind;

/// A number that says how large a history is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// Most faults.
    Faults,
    /// Clients.
    Clients,
    /// Commands of clients, without those at the end.
    Commands,
    /// Shards.
    Shards,
    /// Stripes of a volume.
    Stripes,
    /// Longest time of load and faults, in virtual microseconds.
    Load,
}

/// How large a history is, in each [`Size`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sizes([u64; Size::ALL.len()]);

impl Changes {
    /// Whether this is left out.
    #[must_use]
    pub fn leaves_out(&self, kind: Kind) -> bool {
        self.without.contains(&kind)
    }

    /// Makes a size at most this.
    pub(crate) fn set(&mut self, size: Size, value: u64) {
        match size {
            Size::Faults => self.faults = Some(value),
            Size::Clients => self.clients = usize::try_from(value).ok(),
            Size::Commands => self.commands = Some(value),
            Size::Shards => self.shards = u16::try_from(value).ok(),
            Size::Stripes => self.stripes = Some(value),
            Size::Load => self.load = Some(Duration::from_micros(value)),
        }
    }

    /// Makes the changes.
    pub(crate) fn apply(&self, options: &mut Options, faults: &mut Faults) {
        let most =
            |value: &mut u64, bound: Option<u64>| *value = bound.unwrap_or(*value).min(*value);
        most(&mut options.faults, self.faults);
        most(&mut options.commands, self.commands);
        most(&mut options.stripes, self.stripes.map(|stripes| stripes.max(1)));
        let load_ns = self.load.map(|load| u64::try_from(load.as_nanos()).unwrap_or(u64::MAX));
        most(&mut options.load_ns, load_ns);
        if let Some(clients) = self.clients {
            options.clients = options.clients.min(clients.max(1));
        }
        for kind in &self.without {
            match kind {
                Kind::Pair => {
                    (options.paired, options.coordinator.paired) = (false, false);
                    options.loses_secondary = false;
                }
                Kind::LostSecondary => options.loses_secondary = false,
                Kind::PowerCut => options.power_cuts = false,
                Kind::Volumes => options.command_percent = 0,
                Kind::Unmap => options.unmap_percent = 0,
                Kind::Fault(fault) => faults.leave_out(*fault),
            }
        }
    }
}

impl Kind {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Kind> {
        let faults = Fault::ALL.iter().map(|(fault, _)| Kind::Fault(*fault));
        let others = [Kind::Pair, Kind::LostSecondary, Kind::PowerCut, Kind::Volumes, Kind::Unmap];
        others.into_iter().chain(faults)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Pair => "pair",
            Kind::LostSecondary => "lost-secondary",
            Kind::PowerCut => "power-cut",
            Kind::Volumes => "volumes",
            Kind::Unmap => "unmap",
            Kind::Fault(fault) => fault.name(),
        })
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(word: &str) -> Result<Kind, UnknownKind> {
        Kind::all().find(|kind| kind.to_string() == word).ok_or(UnknownKind)
    }
}

impl fmt::Display for UnknownKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known: Vec<String> = Kind::all().map(|kind| kind.to_string()).collect();
        write!(f, "give one of: {}", known.join(", "))
    }
}

impl std::error::Error for UnknownKind {}

impl Size {
    /// All of them, those that make a story simpler first.
    pub const ALL: [Size; 6] =
        [Size::Load, Size::Faults, Size::Clients, Size::Shards, Size::Stripes, Size::Commands];

    /// The least that a history needs.
    #[must_use]
    pub fn least(self) -> u64 {
        match self {
            Size::Faults | Size::Commands | Size::Load => 0,
            Size::Clients | Size::Shards | Size::Stripes => 1,
        }
    }
}

impl Sizes {
    /// Of options as they are played.
    pub(crate) fn of(options: &Options) -> Sizes {
        Sizes(Size::ALL.map(|size| match size {
            Size::Faults => options.faults,
            Size::Clients => options.clients as u64,
            Size::Commands => options.commands,
            Size::Shards => u64::from(options.geometry.shards),
            Size::Stripes => options.stripes,
            Size::Load => options.load_ns.div_ceil(1_000),
        }))
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, size: Size) -> u64 {
        let sizes = Size::ALL.iter().zip(self.0);
        sizes.filter(|(known, _)| **known == size).map(|(_, value)| value).sum()
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut flags = Vec::new();
        for kind in &self.without {
            flags.push(format!("--without {kind}"));
        }
        let mut flag = |name: &str, value: Option<String>| {
            flags.extend(value.map(|value| format!("--{name} {value}")));
        };
        flag("faults", self.faults.map(|n| n.to_string()));
        flag("clients", self.clients.map(|n| n.to_string()));
        flag("commands", self.commands.map(|n| n.to_string()));
        flag("shards", self.shards.map(|n| n.to_string()));
        flag("stripes", self.stripes.map(|n| n.to_string()));
        flag("load", self.load.map(duration_text));
        f.write_str(&flags.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        changes: Changes,
    }

    #[test]
    fn changes_print_the_flags_that_make_them() {
        let changes = Changes {
            without: vec![Kind::PowerCut, Kind::Fault(Fault::RotCopy)],
            faults: Some(2),
            clients: Some(1),
            commands: Some(17),
            shards: Some(3),
            stripes: Some(4),
            load: Some(Duration::from_micros(1_500)),
        };
        let text = changes.to_string();
        assert_eq!(
            text,
            "--without power-cut --without rot-copy --faults 2 --clients 1 --commands 17 --shards 3 --stripes 4 \
             --load 1500us"
        );
        let words = std::iter::once("sim").chain(text.split(' '));
        assert_eq!(Line::parse_from(words).changes, changes);
        assert_eq!(Changes::default().to_string(), "");
    }
}
