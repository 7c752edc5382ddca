//! One store: what is formatted can be inspected and verified, and nothing is destroyed unasked.

use serde_json::Value;
use twinpoint_runtime::device::{OpenMode, StoreFile};

use crate::fixture::{self, Fixture, run};

fn json(arguments: &[&str]) -> Value {
    let (code, stdout, stderr) = run(arguments);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn format_keeps_what_is_there_unless_forced() {
    let folder = fixture::folder();
    let path = fixture::empty(folder.path(), "a", fixture::STORE_ID);
    let path = path.to_str().unwrap();
    let (code, _, stderr) = run(&["format", path, "--shards", "2"]);
    assert_eq!(code, 6);
    assert!(stderr.contains(fixture::STORE_ID) && stderr.contains("--force"), "{stderr}");
    let forced = json(&["format", path, "--shards", "3", "--journal", "2MiB", "--force", "--json"]);
    assert_eq!((&forced["shards"], &forced["journal_bytes"]), (&3.into(), &(2 << 20).into()));
    assert_ne!(forced["store"], fixture::STORE_ID);
    assert_eq!(json(&["verify", path, "--json"])["stores"][0]["store"], forced["store"]);

    let image = folder.path().join("image");
    let mut bytes = vec![0; 64 << 20];
    bytes[0x438..0x43a].copy_from_slice(b"\x53\xef");
    std::fs::write(&image, &bytes).unwrap();
    let (code, _, stderr) = run(&["format", image.to_str().unwrap()]);
    assert!(code == 6 && stderr.contains("an ext file system"), "{stderr}");
    assert_eq!(std::fs::read(&image).unwrap(), bytes);
}

#[test]
fn an_impossible_store_leaves_nothing_behind() {
    let folder = fixture::folder();
    let path = folder.path().join("a");
    let text = path.to_str().unwrap();
    let cases: [(&[&str], i32, &str); 16] = [
        (&["--size", "0"], 2, "multiple of 4KiB"),
        (&["--size", "67108865"], 2, "multiple of 4KiB"),
        (&["--size", "4MiB"], 2, "it needs 23MiB"),
        (&["--size", "200TiB"], 2, "--shards 49 or more"),
        (&["--size", "1PiB"], 2, "less than 256 TiB"),
        (&["--size", "64MiB", "--shards", "65"], 2, "1..=64"),
        (&["--size", "64MiB", "--shards", "0"], 2, "1..=64"),
        (&["--size", "64MiB", "--shards", "-1"], 2, "1..=64"),
        (&["--size", "64MiB", "--shards", "x"], 2, "a whole number"),
        (&["--size", "64MiB", "--journal", "4KiB"], 2, "from 1MiB to 4GiB"),
        (&["--size", "64MiB", "--journal", "8GiB"], 2, "from 1MiB to 4GiB"),
        (&["--size", "64MiB", "--journal", "1000B"], 2, "multiple of 4KiB"),
        (&["--size", "64MiB", "--segments", "1"], 2, "64..=16777216"),
        (&["--size", "64MiB", "--segments", "1000000"], 2, "too small for so many"),
        (&["--size", "64MiB", "--store-id", &"0".repeat(32)], 2, "leave it away"),
        (&[], 1, "give --size to create it"),
    ];
    for (arguments, expected, advice) in cases {
        let (code, _, stderr) = run(&[&["format", text], arguments].concat());
        assert_eq!(code, expected, "{arguments:?}: {stderr}");
        assert!(stderr.contains(advice), "{arguments:?}: {stderr}");
        assert!(!path.exists(), "{arguments:?}");
    }
    std::fs::write(&path, [0; 100]).unwrap();
    let (code, _, stderr) = run(&["format", text, "--size", "64MiB"]);
    assert!(code == 2 && stderr.contains("leave --size away"), "{stderr}");
    assert_eq!(std::fs::read(&path).unwrap(), [0; 100]);
}

#[test]
fn what_is_no_store_is_told_alike_by_all() {
    let folder = fixture::folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("empty"), []).unwrap();
    std::fs::write(path("note"), "a few words").unwrap();
    std::fs::write(path("zeroes"), vec![0; 1 << 20]).unwrap();
    std::fs::write(path("noise"), vec![0xa5; 1 << 20]).unwrap();
    let whole = Fixture::new(folder.path(), "whole", 2, 1);
    let start = std::fs::read(&whole.path).unwrap();
    std::fs::write(path("cut"), &start[..2 << 20]).unwrap();
    for (name, advice) in [
        ("empty", "holds no store"),
        ("note", "holds no store"),
        ("zeroes", "holds no store"),
        ("noise", "holds no store"),
        ("cut", "use the other store of the pair"),
        ("none", "cannot open"),
        ("", "neither a regular file nor a block device"),
    ] {
        let (text, path) = (path(name).display().to_string(), path(name));
        let socket = folder.path().join("socket").display().to_string();
        let commands: [&[&str]; 4] = [
            &["serve", "--replication", "single", "--control", &socket, "--store", &text],
            &["promote", "--store", &text],
            &["verify", &text],
            &["inspect", &text],
        ];
        let said = commands.map(run).map(|(code, _, stderr)| (code, stderr));
        let expected = if path.is_file() { 3 } else { 1 };
        assert!(said[0].0 == expected && said[0].1.contains(advice), "{name}: {said:?}");
        assert!(said.iter().all(|other| *other == said[0]), "{name}: {said:?}");
        assert_eq!(said[0].1.contains("other store of the pair"), name == "cut", "{said:?}");
    }
}

#[test]
fn a_store_is_not_compared_with_itself() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    let link = folder.path().join("b");
    std::os::unix::fs::symlink(&store.path, &link).unwrap();
    for other in [store.text(), link.to_str().unwrap()] {
        let (code, stdout, stderr) = run(&["verify", store.text(), other]);
        assert!(code == 2 && stdout.is_empty() && stderr.contains("are one store"), "{stderr}");
    }
}

#[test]
fn inspect_shows_every_structure() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    let all = json(&["inspect", store.text(), "--json", "--segments", "full", "--record", "2"]);
    assert_eq!(all["superblocks"].as_array().unwrap().len(), 2);
    assert_eq!(all["superblocks"][1]["store"], fixture::STORE_ID);
    assert_eq!(all["recovery"]["committed"], 2);
    assert_eq!(all["recovery"]["volumes"][0]["name"], "disk");
    let shard = &all["shards"][1];
    assert_eq!(shard["headers"].as_array().unwrap().len(), 2);
    assert_eq!(
        (&shard["directory"]["area"], &shard["directory"]["entries"]),
        (&1.into(), &1.into())
    );
    assert_eq!(shard["segments"]["mapped_blocks"], fixture::SEGMENT_COUNT);
    let slots = shard["segments"]["list"][0]["slots"].as_array().unwrap();
    assert_eq!(slots.len(), fixture::SEGMENT_COUNT as usize);
    assert_eq!(shard["journal"]["records"][0]["cp"], 2);
    let mapped = shard["journal"]["record"]["mapped"].as_array().unwrap();
    assert_eq!(mapped.len(), fixture::RECORD_COUNT as usize);
    assert_eq!(mapped[0]["block"], store.data(1));
    assert_eq!(all["shards"][0]["journal"]["records"][0]["catalog"], true);

    let (code, text, _) = run(&["inspect", store.text()]);
    assert_eq!(code, 0);
    for part in ["superblocks (2)", "history (1)", "headers (2)", "records (2)", "cp=2 term=1"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    assert!(!text.contains("volume_block="), "a summary is short");
}

#[test]
fn verify_reads_every_mapped_block() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    let all = json(&["verify", store.text(), "--json"]);
    let found = &all["stores"][0];
    // Shard 1's record replaces the even ones of its first ten blocks.
    let blocks = fixture::SEGMENT_COUNT + fixture::RECORD_COUNT;
    assert_eq!((&all["ok"], &found["cp"]), (&true.into(), &2.into()));
    assert_eq!(found["checked_blocks"], blocks);
    assert_eq!((&found["damaged_blocks"], &found["state"]), (&0.into(), &"whole".into()));
    let inspected = json(&["inspect", store.text(), "--json"]);
    assert_eq!(found["root"], inspected["recovery"]["root"]);
}

#[test]
fn a_store_in_use_is_left_alone() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    let user = StoreFile::open(&store.path, OpenMode::Exclusive).unwrap();
    let cases: [&[&str]; 4] = [
        &["verify", store.text()],
        &["promote", "--store", store.text()],
        &["format", store.text(), "--force"],
        &["serve", "--replication", "single", "--store", store.text()],
    ];
    for arguments in cases {
        let (code, _, stderr) = run(arguments);
        assert!(code == 6 && stderr.contains("in use"), "{arguments:?}: {stderr}");
    }
    assert_eq!(json(&["inspect", store.text(), "--json"])["in_use"], true);
    drop(user);
    // A process that another test starts may have the lock for a moment more.
    let is_free = || run(&["verify", store.text()]).0 == 0;
    assert!((0..100).any(|_| is_free()));
}

#[test]
fn only_a_secondary_is_promoted() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    let (code, _, stderr) = run(&["promote", "--store", store.text()]);
    assert!(code == 6 && stderr.contains("--role primary"), "{stderr}");
    store.change(|superblock| superblock.secondary = true);
    let (code, _, stderr) = run(&["serve", "--replication", "single", "--store", store.text()]);
    assert!(code == 6 && stderr.contains("twinpoint promote"), "{stderr}");
    let before = json(&["verify", store.text(), "--json"]);
    let reply = json(&["promote", "--store", store.text(), "--json"]);
    assert_eq!((&reply["term"], &reply["cp"]), (&2.into(), &2.into()));
    assert_eq!(reply["root"], before["stores"][0]["root"]);
    let after = json(&["inspect", store.text(), "--json"]);
    let superblock = &after["superblocks"][0];
    assert_eq!((&superblock["term"], &superblock["alone_since"]), (&2.into(), &3.into()));
    assert_eq!(superblock["history"][1]["first_cp"], 3);
    assert_eq!(run(&["promote", "--store", store.text()]).0, 6);
}
