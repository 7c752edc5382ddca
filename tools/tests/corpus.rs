//! The stored inputs of every fuzz target, played again without a fuzzer, and the seeds that fuzzing begins with.
//!
//! `tools/fuzz` holds the targets; docs/TESTING.md says how to fuzz. A failure names the target and the input.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::panic;
use std::path::Path;

use fuzz::{TARGETS, Target, corpus, seeds};

/// Most bytes of all stored inputs, as text.
const STORED_BYTES_MAX: u64 = 300 << 10;

fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let path = folder.join(target.name).with_extension("hex");
    let text = std::fs::read_to_string(&path).expect("each target has a file of stored inputs");
    let inputs = corpus::parse(&text).expect("lines of hexadecimal digits");
    assert!(!inputs.is_empty(), "{} is empty", path.display());
    assert!(corpus::render(inputs.clone()) == text, "{} is out of order", path.display());
    inputs
}

fn play(target: &Target, input: &[u8]) -> bool {
    let digits = || input.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let outcome = panic::catch_unwind(|| fuzz::run(target.name, input));
    outcome.unwrap_or_else(|_| panic!("{} breaks on {}", target.name, digits()))
}

#[test]
fn stored_inputs_break_nothing() {
    for target in &TARGETS {
        let inputs = inputs(target);
        let accepted = inputs.iter().filter(|input| play(target, input)).count();
        println!("{}: {} inputs, {accepted} accepted", target.name, inputs.len());
        assert!(accepted > 0, "{} accepts nothing: does it still reach its decoder?", target.name);
    }
}

#[test]
fn seeds_are_accepted() {
    for target in &TARGETS {
        for (number, seed) in seeds(target.name).iter().enumerate() {
            assert!(play(target, seed), "seed {number} of {}", target.name);
        }
    }
}

#[test]
fn stored_inputs_are_few() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let files = folder.read_dir().expect("the folder is there").map(|file| file.expect("it is"));
    let sizes = files.map(|file| file.metadata().expect("it can be read").len());
    let total = sizes.sum::<u64>();
    assert!(total <= STORED_BYTES_MAX, "{total} bytes: pack them again");
}
