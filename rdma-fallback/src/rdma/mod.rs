//! The wire over RDMA, and the choice between it and TCP.
//!
//! Step 4 of the flow. `docs/decisions/0011-rdma-sys-dlopen.md` says how a program without rdma-core still starts.
//!
//! ```text
//!   settle     which transport, said over the authenticated channel      setup_frame; trials: does it carry data
//!   connect    two queue pairs become one connection                     manager: librdmacm
//!   adapter    one open device, the region registered in it, alarms       adapters: which are open; lookout: does one go
//!   queues     slots, window, requests                                   verbs: libibverbs
//!   wire       the contract: posts, credit, completions                  credit, frame, cut, watch
//! ```
//!
//! Invariant: `unsafe` is in four files: `library.rs` (finding the functions), `verbs.rs` (every verb), `manager.rs`
//! (every call to the connection manager) and `watch.rs` (epoll).

mod adapter;
mod adapters;
mod card;
mod cause;
mod connect;
mod credit;
mod cut;
mod frame;
mod library;
mod lookout;
mod manager;
mod options;
mod queues;
mod settle;
mod setup_frame;
mod trials;
mod verbs;
mod watch;
mod wire;

#[cfg(test)]
pub(crate) mod tests;

pub use cause::Cause;
pub use connect::RdmaFault;
pub use library::LibraryMissing;
pub use options::{Choice, Device, Devices, OptionFault, ProbeError, RdmaOptions, probe};
pub use settle::{SettleError, Settled, Transports};
pub use wire::RdmaWire;
