//! The whole benchmark at the smallest size: that it runs, and that its tables are whole. The figures mean nothing.

use std::path::Path;
use std::process::Command;

fn bench(arguments: &[&str], folder: &Path) -> String {
    let sizes = ["--store-mib", "192", "--volume-mib", "16", "--buffered"];
    let output = Command::new(env!("CARGO_BIN_EXE_twinpoint-bench"))
        .args(arguments)
        .args(sizes)
        .arg("--store-dir")
        .arg(folder.join("stores"))
        .arg("--out")
        .arg(folder.join("out"))
        .output()
        .expect("the program was built with this test");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    assert!(!folder.join("stores").exists(), "the stores were left behind");
    error
}

#[test]
fn every_case_runs() {
    let folder = tempfile::tempdir().unwrap();
    // Long enough that on a busy machine too a write ends in every case.
    bench(&["run", "--seconds", "0.1", "--rounds", "1"], folder.path());
    let read = |name: &str| std::fs::read_to_string(folder.path().join("out").join(name)).unwrap();
    let raw = read("raw.csv");
    let columns: Vec<&str> = raw.lines().next().unwrap().split(',').collect();
    let column = |name: &str| columns.iter().position(|column| *column == name).unwrap();
    assert_eq!(raw.lines().count(), 1 + 120);
    for line in raw.lines().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!(fields.len(), columns.len(), "{line}");
        let number = |name: &str| fields[column(name)].parse::<f64>().unwrap();
        assert!(number("iops") > 0.0 && number("device_bytes_per_byte") > 0.0, "{line}");
        assert_eq!(number("wire_bytes_per_byte") > 0.0, fields[column("stores")] != "single");
    }
    assert!(read("summary.txt").lines().count() >= 126);
    assert!(read("README.md").contains("| seed | 1 |"));
}

#[test]
fn a_wrong_choice_is_told() {
    let output = Command::new(env!("CARGO_BIN_EXE_twinpoint-bench"))
        .args(["run", "--only", "rand5k"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
}

/// Needs fio and nbdkit; without them there is nothing to compare with.
#[test]
fn peers_are_compared() {
    let is_there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !is_there("fio") || !is_there("nbdkit") {
        eprintln!("skipped: fio or nbdkit is missing");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    bench(&["peers", "--seconds", "1", "--rounds", "1", "--only", "q64"], folder.path());
    let text = std::fs::read_to_string(folder.path().join("out/peers.txt")).unwrap();
    assert_eq!(text.lines().count(), 4, "{text}");
}
