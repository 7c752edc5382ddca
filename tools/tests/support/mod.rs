//! What the tests over real processes share: nodes, pairs, an NBD client, a load, and the history it is judged by.
//!
//! Invariants: every process is ended by its own handle, also when a test panics or runs out of time; every wait has
//! an end; a failed test keeps its folder, with the nodes' logs, and says where it is.

#![allow(dead_code, reason = "each test file uses its own part")]

pub mod good_client;
pub mod history;
pub mod load;
pub mod nbd_client;
pub mod node;
pub mod pair;
pub mod programs;
pub mod random;
pub mod run;
pub mod sector;
pub mod space;
pub mod stranger;
pub mod time_limit;
