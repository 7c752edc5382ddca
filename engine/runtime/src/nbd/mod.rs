//! The NBD frontend, step 1 of the flow: client bytes in, [`Request`]s out; [`Answer`]s in, client bytes out.
//!
//! A [`NbdSession`] is one client connection without its socket. The thread that owns the socket moves bytes:
//!
//! ```text
//!   receive -> input() / received()      answer(), flushed(), resume()  <- shards
//!   send    <- output() / sent()         Host::submit, Host::flush      -> shards
//! ```
//!
//! Invariants: a session never blocks, never waits, and never panics on what a client sends; everything it keeps
//! is bounded by [`limits`]; a buffer it holds has one owner at any time (a filling write, a read, or the output);
//! no memory and a full ring are normal states that end with [`NbdSession::resume`].
//!
//! After every call the owner of the socket starts a receive into [`NbdSession::input`] if none is under way, and
//! a send of [`NbdSession::output`] if none is under way.
//!
//! [`Request`]: twinpoint_core::request::Request
//! [`Answer`]: twinpoint_core::request::Answer
#![forbid(unsafe_code)]

mod command;
mod host;
mod input;
mod issue;
pub mod limits;
mod options;
mod output;
mod protocol;
mod read;
mod release;
mod reply;
mod session;
mod slab;
mod status;
mod write;

pub use host::{Export, Host};
pub use input::Input;
pub use output::{Output, OutputPart};
pub use session::NbdSession;

#[cfg(test)]
mod tests;
