//! Tests of whole sessions: a client of the test's own, a host that is a RAM disk, and everything in between in
//! random portions.
//!
//! Invariants checked at every step: requests are well-formed, a buffer has one owner, nobody waits for ever, and in
//! the end no buffer is lost.

mod client;
mod commands;
mod handshake;
mod ram_host;
mod random;
mod rig;
