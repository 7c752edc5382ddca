//! Fuzz targets: what each decoder must do with any bytes. Used by the programs in `src/bin` and, without a
//! fuzzer, by `tools/tests/corpus.rs`, which replays the stored inputs.
//!
//! Invariants of every target: nothing panics, nothing waits for ever, and what is accepted is encoded as it came,
//! wherever a format has one encoding. Checksums that a fuzzer cannot guess are put right by the target, so that the
//! checks behind them are reached; the bytes as they are go through the same decoder first.

pub mod corpus;
mod formats;
mod nbd;
mod recovery;
mod seeds;
mod wires;

pub use seeds::seeds;

/// One decoder and what must hold for it.
pub struct Target {
    /// The name of the program and of the file of stored inputs.
    pub name: &'static str,
    /// Takes any bytes, and tells whether something in them was accepted. Panics if an invariant is broken.
    pub body: fn(&[u8]) -> bool,
}

/// All targets.
pub const TARGETS: [Target; 17] = [
    Target { name: "superblock", body: formats::superblock },
    Target { name: "shard_header", body: formats::shard_header },
    Target { name: "directory", body: formats::directory },
    Target { name: "segment", body: formats::segment },
    Target { name: "catalog", body: formats::catalog },
    Target { name: "delta", body: formats::delta },
    Target { name: "record", body: formats::record },
    Target { name: "record_on_wire", body: formats::record_on_wire },
    Target { name: "message", body: formats::message },
    Target { name: "setup_message", body: formats::setup_message },
    Target { name: "recovery", body: recovery::recovery },
    Target { name: "handshake", body: wires::handshake },
    Target { name: "channel", body: wires::channel },
    Target { name: "frames", body: wires::frames },
    Target { name: "nbd_options", body: nbd::options },
    Target { name: "nbd_requests", body: nbd::requests },
    Target { name: "control", body: formats::control },
];

/// Gives an input to the target with this name; tells whether something in it was accepted.
///
/// # Panics
/// If there is no such target, or the input breaks an invariant.
pub fn run(name: &str, input: &[u8]) -> bool {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target with this name").body)(input)
}
