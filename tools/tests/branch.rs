//! A branch (R8): a primary that carried on alone is lost, the secondary promoted, the old primary returns. What only
//! it has is named, kept through restarts, and dropped by that name alone; then it follows.

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::node::Node;
use support::pair::{Pair, PairPlan, VOLUME};
use support::programs::{Outcome, twinpoint};
use support::time_limit::TimeLimit;

const BLOCK_BYTES: usize = 4096;
const STEP_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn what_only_a_returning_primary_has_is_a_branch_until_it_is_dropped_by_name() {
    let _limit = TimeLimit::new("branch", Duration::from_secs(120));
    let mut pair = Pair::new(PairPlan { on_peer_loss: "continue", ..PairPlan::default() });
    write(pair.primary(), 0, 1);
    pair.wait_in_step(STEP_LIMIT).expect("a new pair gets in step");
    // The primary goes on alone with a 2 at 0 and a 2 at 1, and is lost.
    pair.kill(1);
    write(pair.primary(), 0, 2);
    write(pair.primary(), 1, 2);
    pair.kill(0);
    let tip = offline_superblock(&pair, 0)["committed"].as_u64().expect("a CP");
    pair.start(1);
    pair.promote();
    write(pair.primary(), 2, 3);

    pair.start(0);
    let branch = wait_for(pair.node(0), |status| !status["branch"].is_null());
    let branch = &branch["branch"];
    let name = branch["name"].as_str().expect("a name").to_owned();
    assert_eq!(branch["term"], 1);
    assert!(branch["tip"].as_u64() >= Some(tip), "{branch}");
    assert_eq!(name, format!("t1-cp{}", branch["tip"]));
    assert!(list(&pair).stdout.contains(&name));

    // It outlasts a restart, is shown of a stopped store, and blocks nothing but its own store.
    pair.kill(0);
    assert_eq!(offline_superblock(&pair, 0)["branch"]["name"], name.as_str());
    pair.verify_one(0);
    pair.start(0);
    assert!(list(&pair).stdout.contains(&name));
    let refused = drop_named(&pair, "t9-cp9").failure(6);
    assert!(refused.contains("no branch of that name"), "{refused}");

    drop_named(&pair, &name).success();
    write(pair.primary(), 3, 3);
    pair.wait_in_step(STEP_LIMIT).expect("without its branch it follows");
    assert!(list(&pair).stdout.contains("no branches"));
    let mut client = pair.primary().client(VOLUME);
    for (block, expected) in [1, 0, 3, 3].into_iter().enumerate() {
        let read = client.read((block * BLOCK_BYTES) as u64, BLOCK_BYTES).expect("it reads");
        assert_eq!(read, vec![expected; BLOCK_BYTES], "block {block}");
    }
    client.disconnect().expect("it says goodbye");
    pair.stop_all();
    pair.verify();
    pair.assert_no_panic();
}

/// Writes a block full of one byte, and has it kept.
fn write(node: &Node, block: usize, byte: u8) {
    let mut client = node.client(VOLUME);
    client
        .write((block * BLOCK_BYTES) as u64, &[byte; BLOCK_BYTES])
        .expect("the write is answered");
    client.flush().expect("the flush is answered");
    client.disconnect().expect("it says goodbye");
}

fn wait_for(node: &Node, is_so: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + STEP_LIMIT;
    loop {
        let status = node.status();
        if is_so(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "not so in time: {status}\n{}", node.files().log_end());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn offline_superblock(pair: &Pair, index: usize) -> Value {
    let text = twinpoint(&["inspect", &pair.store_path(index), "--json"]).success();
    let all: Value = serde_json::from_str(&text).expect("inspect prints JSON");
    all["superblocks"][0].clone()
}

fn list(pair: &Pair) -> Outcome {
    let control = pair.files[0].control.display().to_string();
    twinpoint(&["branch", "list", "--control", &control])
}

fn drop_named(pair: &Pair, name: &str) -> Outcome {
    let control = pair.files[0].control.display().to_string();
    twinpoint(&["branch", "drop", name, "--control", &control])
}
