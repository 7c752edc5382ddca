//! The ublk frontend, step 1 of the flow: volumes as block devices of this host's kernel.
//!
//! ```text
//!   control thread: /dev/ublk-control -> device -> its queues, one for each worker
//!   worker:         fetch -> Queue -> shards        one copy, by the kernel, between a request's pages and our buffers
//!                   commit <- Queue <- answers
//! ```
//!
//! Invariants: a queue is served by one worker, on the worker's own io_uring; what a request says is checked as if a
//! stranger had sent it; a device that outlives its server answers a change only when it is durable, for a file system
//! that is not told of a crash would never write again what it believes to be in a cache.

pub(crate) mod abi;
mod control;
mod device;
mod error;
mod kernel;
mod port;
mod queue;
mod request;
mod step;

pub(crate) use control::{Driver, Switch, UblkControl, UblkNode};
pub(crate) use device::Device;
pub use error::UblkError;
pub(crate) use port::{UblkPort, is_of_queue};
