//! The tool on stores that no node serves: format, inspect, verify, promote, and what it says to mistakes.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

mod damage;
mod fixture;
mod mistakes;
mod pair;
mod single;
