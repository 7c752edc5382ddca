//! What the wire costs a pair over TCP, counted and not timed; and that readings taken elsewhere make the same table.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use twinpoint_runtime::status::{NodeStatus, RoleStatus, STATUS_SCHEMA};

/// Lines of wire.csv by load and node, each with its columns by name.
type Lines = HashMap<(String, String), HashMap<String, f64>>;

fn wire(arguments: &[&str], out: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_twinpoint-bench"))
        .arg("wire")
        .args(arguments)
        .arg("--out")
        .arg(out)
        .output()
        .expect("the program was built with this test");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn lines(out: &Path) -> Lines {
    let text = fs::read_to_string(out.join("wire.csv")).expect("it was written");
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let names = lines.next().expect("a line of names");
    let line = |fields: Vec<&str>| {
        assert_eq!(fields.len(), names.len(), "{fields:?}");
        let numbers = names.iter().zip(&fields).skip(3);
        let numbers =
            numbers.map(|(name, field)| ((*name).to_owned(), field.parse().expect("a number")));
        ((fields[0].to_owned(), fields[2].to_owned()), numbers.collect())
    };
    lines.map(line).collect()
}

#[test]
fn data_is_sent_without_a_copy_and_in_few_calls() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let stores = folder.path().join("stores");
    let sizes = ["--store-mib", "192", "--volume-mib", "32", "--buffered", "--seconds", "0.3"];
    let more = ["--rounds", "1", "--store-dir", stores.to_str().unwrap()];
    wire(&[&sizes[..], &more[..]].concat(), &out);
    assert!(!stores.exists(), "the stores were left behind");
    let lines = lines(&out);
    assert_eq!(lines.len(), 12, "six loads, two nodes");
    let of = |load: &str, node: &str, name: &str| {
        lines[&(load.to_owned(), node.to_owned())].get(name).copied().expect(name)
    };
    for (load, node) in lines.keys() {
        assert!(of(load, node, "iops") > 0.0 && of(load, node, "wire_bytes_per_byte") > 0.0);
        assert_eq!(of(load, node, "requests_per_mib"), 0.0, "{load}: there is no card");
    }
    for (load, _) in lines.keys().filter(|(_, node)| node == "primary") {
        assert_eq!(of(load, "primary", "wire_copies_per_byte"), 0.0, "{load}: data was copied");
    }
    // Payload of small writes is received beside their heads, and copied once; that of large ones is not copied.
    assert!(of("rand4k-q64", "primary", "client_copies_per_byte") <= 1.01);
    assert!(of("seq1m-q04", "primary", "client_copies_per_byte") <= 0.1);
    // The receiver copies what came with a head before its target was known.
    assert!(of("rand4k-q64", "secondary", "wire_copies_per_byte") <= 1.0);
    // With 64 commands under way a call of a wire carries many blocks.
    for node in ["primary", "secondary"] {
        let calls = of("rand4k-q64", node, "wire_calls_per_4k");
        assert!(calls <= 0.25, "{node}: {calls} system calls of wires for each 4 KiB");
    }
    // One write with its flush: data, record and answers, and what finds nothing after each of them.
    let calls = of("rand4k-q01-f1", "primary", "wire_calls_per_4k");
    assert!(calls <= 16.0, "{calls} system calls of wires for each write with its flush");
}

/// A turn's folder as a pair over RDMA would have left it.
fn write_turn(turn: &Path) {
    fs::create_dir(turn).expect("the system does it");
    let mut before = NodeStatus { schema: STATUS_SCHEMA, ..NodeStatus::default() };
    before.store = "5".repeat(32);
    before.peer.transport = Some("rdma".to_owned());
    let mut after = before.clone();
    after.traffic.client_bytes_written = 1 << 20;
    after.traffic.wire_bytes_sent.data = 1 << 20;
    after.efficiency.verbs.requests = 32;
    after.efficiency.verbs.completions = 5;
    after.efficiency.verbs.send_completions = 4;
    for (name, status) in [("before", &before), ("after", &after)] {
        for (node, role) in [("primary", RoleStatus::Primary), ("secondary", RoleStatus::Secondary)]
        {
            let text = serde_json::to_string(&NodeStatus { role, ..status.clone() })
                .expect("the system does it");
            fs::write(turn.join(format!("{node}-{name}.json")), text).expect("the system does it");
        }
    }
    fs::write(turn.join("fio.json"), r#"{"jobs": [{"write": {"iops": 1234.5}}]}"#)
        .expect("the system does it");
}

#[test]
fn readings_taken_elsewhere_make_the_table() {
    let folder = tempfile::tempdir().unwrap();
    write_turn(&folder.path().join("rand4k-q64.rdma.0"));
    fs::write(folder.path().join("a.b.c"), "a file beside").unwrap();
    let out = folder.path().join("out");
    let told = wire(&["--readings", folder.path().to_str().unwrap()], &out);
    assert!(told.contains("| rand4k-q64 | rdma | 1234 | - | 1.00 |"), "{told}");
    let lines = lines(&out);
    let primary = &lines[&("rand4k-q64".to_owned(), "primary".to_owned())];
    assert_eq!((primary["requests_per_mib"], primary["signalled"]), (32.0, 0.125));
}

#[test]
fn readings_that_cannot_be_are_refused() {
    let refused = |folder: &Path, more: &[&str], code| {
        let program = env!("CARGO_BIN_EXE_twinpoint-bench");
        let mut command = Command::new(program);
        let output = command.arg("wire").arg("--readings").arg(folder).args(more).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let folder = tempfile::tempdir().unwrap();
    let (missing, empty) = (folder.path().join("missing"), folder.path().join("empty"));
    fs::create_dir(&empty).unwrap();
    for place in [&missing, &empty] {
        assert_eq!(refused(place, &[], 2).lines().count(), 1);
    }
    assert!(!missing.exists() && fs::read_dir(&empty).unwrap().next().is_none());
    // Flags that measure are not for it.
    refused(&empty, &["--seconds", "1"], 2);
    refused(&empty, &["--transports", "tcp"], 2);
    let swaps = [
        ["primary-before.json", "primary-after.json"],
        ["secondary-before.json", "secondary-after.json"],
        ["primary-after.json", "secondary-after.json"],
    ];
    for (number, [one, other]) in swaps.into_iter().enumerate() {
        let readings = folder.path().join(number.to_string());
        fs::create_dir(&readings).unwrap();
        let turn = readings.join("rand4k-q64.rdma.0");
        write_turn(&turn);
        let texts = [one, other].map(|name| fs::read_to_string(turn.join(name)).unwrap());
        fs::write(turn.join(one), &texts[1]).unwrap();
        fs::write(turn.join(other), &texts[0]).unwrap();
        let said = refused(&readings, &[], 1);
        assert!(said.contains("-after.json: ") && said.lines().count() == 1, "{said}");
        assert_eq!(fs::read_dir(&readings).unwrap().count(), 1, "a table was made");
    }
}
