//! The simulator: a second shell that drives the same core in virtual time, with faulty disks and networks.
//!
//! A seed chooses a history: clients, sizes, modes, crashes. Rules R1 to R7 are checked all along; see [`run()`].
#![forbid(unsafe_code)]

mod buffers;
mod clients;
mod content;
mod coordinator_io;
mod disk;
mod faults;
mod images;
mod lifecycle;
mod model;
mod node;
mod options;
mod random;
mod run;
mod shard_io;
mod wire;
mod world;

pub use run::{Failure, run};
pub use world::Counts;
