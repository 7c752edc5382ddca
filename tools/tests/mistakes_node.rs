//! An operator's mistakes with running nodes: what cannot be done is told in one line with its exit code, in time, and
//! changes nothing.

mod support;

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::node::{NODE_TIME_MAX, Node};
use support::pair::{Pair, PairPlan, VOLUME, flags};
use support::programs::twinpoint;
use support::time_limit::TimeLimit;

const TIME_MAX: Duration = Duration::from_secs(180);
/// Most volumes of a store.
const VOLUMES_MAX: u32 = 256;

#[test]
fn a_store_takes_256_volumes_and_refuses_one_more() {
    let _limit = TimeLimit::new("volumes", TIME_MAX);
    let mut pair = Pair::new(PairPlan::default());
    for number in 2..=VOLUMES_MAX {
        let name = format!("volume-{number}");
        let create = json!({ "command": "volume-create", "name": name, "size_bytes": 4096 });
        let reply = pair.primary().ask(&create).expect("the node answers");
        assert_eq!((&reply["ok"], &reply["volume"]), (&true.into(), &number.into()), "{reply}");
    }
    let control = control(&pair, 0);
    let create = ["volume", "create", "one-more", "4KiB", "--control", &control];
    let line = twinpoint(&create).failure(6);
    assert!(line.contains("one-more") && line.contains("at most 256 volumes"), "{line}");
    assert!(line.contains("delete one first"), "{line}");
    let error: Value =
        serde_json::from_str(&twinpoint(&[&create[..], &["--json"]].concat()).failure(6))
            .expect("an error is JSON");
    assert_eq!((&error["kind"], &error["exit_code"]), (&"catalog".into(), &6.into()));
    assert_eq!(volumes(pair.primary()).len(), VOLUMES_MAX as usize);

    // A place that is free again is taken, with a number that was never given; both sides have them all.
    twinpoint(&["volume", "delete", "volume-7", "--control", &control]).success();
    twinpoint(&create).success();
    let last = volumes(pair.primary()).pop().expect("there are volumes");
    assert_eq!((&last["name"], &last["id"]), (&"one-more".into(), &(VOLUMES_MAX + 1).into()));
    pair.wait_in_step(NODE_TIME_MAX).unwrap_or_else(|text| panic!("{text}"));
    let mut client = pair.primary().client("volume-256");
    client.write(0, &[7; 4096]).expect("the last volume takes writes");
    client.flush().expect("and keeps them");
    drop(client);
    pair.kill(0);
    pair.promote();
    assert_eq!(volumes(pair.primary()).len(), VOLUMES_MAX as usize);
    let seen = pair.primary().client("volume-256").read(0, 4096).expect("the new primary reads");
    assert!(seen == [7; 4096]);
    pair.stop(1);
    pair.verify_one(0);
    pair.verify_one(1);
    pair.assert_no_panic();
}

#[test]
fn a_command_that_waits_for_the_peer_times_out_and_is_carried_out_later() {
    let _limit = TimeLimit::new("timeout", TIME_MAX);
    let mut pair = Pair::new(PairPlan::default());
    let control = control(&pair, 0);
    pair.node(1).freeze();
    let begin = Instant::now();
    let flags = ["--control", &control, "--timeout", "1500ms"];
    let line = twinpoint(&[&["volume", "create", "late", "4KiB"], &flags[..]].concat()).failure(7);
    assert!(line.contains("may still be carried out") && line.contains("1.5 s"), "{line}");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    let error = twinpoint(&[&["checkpoint", "--json"], &flags[..]].concat()).failure(7);
    let error: Value = serde_json::from_str(&error).expect("an error is JSON");
    assert_eq!((&error["kind"], &error["exit_code"]), (&"timed-out".into(), &7.into()));
    // What waits for nobody is answered meanwhile.
    twinpoint(&[&["status"], &flags[..]].concat()).success();
    pair.node(1).thaw();
    let deadline = Instant::now() + NODE_TIME_MAX;
    while volumes(pair.primary()).iter().all(|volume| volume["name"] != "late") {
        assert!(Instant::now() < deadline, "the volume never comes; {}", pair.logs());
        std::thread::sleep(Duration::from_millis(10));
    }
    pair.wait_in_step(NODE_TIME_MAX).unwrap_or_else(|text| panic!("{text}"));
    // A node that does not answer at all is neither gone nor refusing.
    pair.node(1).freeze();
    let secondary = self::control(&pair, 1);
    let frozen = ["status", "--control", &secondary, "--timeout", "500ms"];
    twinpoint(&frozen).failure(7);
    pair.node(1).thaw();
    twinpoint(&["status", "--control", &secondary]).success();
    pair.stop_all();
    pair.verify();
    pair.assert_no_panic();
}

#[test]
fn what_cannot_be_done_has_one_exit_code_each() {
    let _limit = TimeLimit::new("exit codes", TIME_MAX);
    let mut pair = Pair::new(PairPlan::default());
    let [primary, secondary] = [0, 1].map(|index| control(&pair, index));
    let nowhere = pair.space.path("nowhere").display().to_string();
    let cases: [(&[&str], &str, i32, &str); 12] = [
        (&["volume", "create", VOLUME, "4KiB"], &primary, 6, "choose another name"),
        (&["volume", "create", "a b", "4KiB"], &primary, 2, "A-Z"),
        (&["volume", "create", "a", "4097"], &primary, 2, "4KiB"),
        (&["volume", "create", "a", "4KiB"], &secondary, 6, "not primary"),
        (&["volume", "create", "a", "4KiB"], &nowhere, 5, "twinpoint serve"),
        (&["volume", "delete", "none"], &primary, 6, "volume none does not exist"),
        (&["checkpoint"], &secondary, 6, "not primary"),
        (&["checkpoint", "a\tb"], &primary, 2, "control characters"),
        (&["promote"], &primary, 6, "nothing to do"),
        (&["promote"], &secondary, 6, "--force"),
        (&["promote"], &nowhere, 5, "twinpoint serve"),
        (&["stop"], &nowhere, 5, "twinpoint serve"),
    ];
    let names = || volumes(pair.primary()).into_iter().map(|volume| volume["name"].clone());
    let before: Vec<Value> = names().collect();
    for (command, control, code, advice) in cases {
        let line = twinpoint(&[command, &["--control", control]].concat()).failure(code);
        assert!(line.contains(advice), "{command:?}: {line}");
    }
    let mut open = pair.primary().client(VOLUME);
    let delete = ["volume", "delete", VOLUME, "--control", &primary];
    let line = twinpoint(&delete).failure(6);
    assert!(line.contains("disconnect them first"), "{line}");
    open.read(0, 4096).expect("the client goes on");
    drop(open);
    assert!(names().eq(before));

    // A second node for the same store, sockets that are taken, and a file in a socket's place.
    let second = |change: &dyn Fn(&mut support::node::NodeFiles)| {
        let mut files = pair.files[0].clone();
        files.log = pair.space.path("second.log");
        change(&mut files);
        let outcome = Node::try_start(&files, &flags(&["--replication", "single"]));
        let outcome = outcome.err().expect("the second node does not start");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
        outcome
    };
    let outcome = second(&|_| ());
    assert!(outcome.code == Some(6) && outcome.stderr.contains("in use"), "{outcome}");
    let free = pair.space.path("free.store");
    let size = ["format", free.to_str().expect("a plain path"), "--size", "64MiB"];
    twinpoint(&size).success();
    let outcome = second(&|files| files.store.clone_from(&free));
    assert!(outcome.code == Some(6) && outcome.stderr.contains("\"in-use\""), "{outcome}");
    let note = pair.space.path("note");
    fs::write(&note, "kept").expect("the folder takes files");
    let outcome = second(&|files| {
        files.store.clone_from(&free);
        files.nbd = pair.space.path("free.nbd");
        files.control.clone_from(&note);
    });
    assert_eq!(outcome.code, Some(6), "{outcome}");
    assert_eq!(fs::read(&note).expect("the file is there"), b"kept");
    pair.stop_all();
    pair.verify();
    pair.assert_no_panic();
}

fn control(pair: &Pair, index: usize) -> String {
    pair.files[index].control.display().to_string()
}

/// What `volume-list` tells.
fn volumes(node: &Node) -> Vec<Value> {
    let reply = node.ask(&json!({ "command": "volume-list" })).expect("the node answers");
    reply["volumes"].as_array().expect("a list").clone()
}
