//! The pure engine of Twinpoint: event in, action out.
#![forbid(unsafe_code)]

pub mod block_map;
pub mod branch;
pub mod catalog;
pub mod codec;
pub mod contract;
pub mod coordinator;
pub mod data_run;
pub mod delta;
pub mod directory;
pub mod free_space;
pub mod geometry;
pub mod hash;
pub mod journal;
pub mod limits;
pub mod message;
mod range_coder;
pub mod record;
pub mod recovery;
pub mod request;
pub mod segment;
pub mod session;
pub mod shard;
pub mod shard_header;
pub mod superblock;
pub mod units;
