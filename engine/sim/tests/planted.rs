//! The simulator is itself checked: every planted bug still applies to the sources, and those that are found at once are
//! found. `make planted` plants them all.

use std::path::Path;
use std::process::Command;

/// Runs `tools/planted.sh`, which does the work in a folder of its own beside what cargo builds.
fn planted(word: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let script = root.join("tools/planted.sh");
    let output = Command::new(script).arg(word).output().expect("the script starts");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&output.stdout), said(&output.stderr));
    eprintln!("{out}");
    assert!(output.status.success(), "tools/planted.sh {word}:\n{out}{err}");
}

#[test]
fn every_planted_bug_applies_and_is_in_the_table() {
    planted("--check");
}

#[test]
fn the_quickest_planted_bugs_are_found() {
    planted("--quick");
}
