//! The simulator: a second shell that drives the same core in virtual time, with faulty disks and networks.
//!
//! A seed chooses a history: clients, sizes, modes, crashes. Rules R1 to R7 are checked all along; see [`play()`].
#![forbid(unsafe_code)]

mod buffers;
mod changes;
mod clients;
mod content;
mod coordinator_io;
mod disk;
mod faults;
mod images;
mod lifecycle;
mod many;
mod marks;
mod model;
mod node;
mod options;
mod panics;
mod random;
pub mod report;
mod run;
mod settled;
mod shard_io;
mod shrink;
mod story;
pub mod tables;
mod time;
mod watch;
mod wire;
mod world;

pub use changes::{Changes, Kind, Size, Sizes, UnknownKind};
pub use faults::{Fault, FaultCounts, Faults};
pub use many::{Campaign, Seeds, Tally};
pub use marks::{MARKS, Marks};
pub use run::{Failure, LIVENESS, Plan, Played, play, play_and_explain, retell};
pub use shrink::{NothingToShrink, Shrunk, shrink};
pub use story::Window;
pub use time::parse_duration;
pub use watch::Transitions;
pub use world::Counts;
