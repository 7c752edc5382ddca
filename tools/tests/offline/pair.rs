//! Two stores: equal, behind, damaged, diverged, or no pair at all.

use serde_json::Value;
use twinpoint_core::superblock::TermStart;
use twinpoint_core::units::{BLOCK_BYTES, CpNumber, Term};

use crate::fixture::{self, Fixture, run, write_block};

fn compare(first: &Fixture, second: &Fixture) -> (i32, Value, String) {
    let (code, stdout, stderr) = run(&["verify", first.text(), second.text(), "--json"]);
    (code, serde_json::from_str(&stdout).unwrap(), stderr)
}

#[test]
fn equal_stores_are_equal_at_the_common_cp() {
    let folder = fixture::folder();
    let first = Fixture::new(folder.path(), "a", 2, 1);
    let second = Fixture::new(folder.path(), "b", 2, 1);
    let behind = Fixture::new(folder.path(), "c", 1, 1);
    let (code, all, _) = compare(&first, &second);
    let found = &all["comparison"];
    assert_eq!((code, &all["ok"], &found["state"]), (0, &true.into(), &"equal".into()));
    assert_eq!((&found["cp"], &found["compared_blocks"]), (&2.into(), &25.into()));
    let (code, all, _) = compare(&first, &behind);
    assert_eq!((code, &all["comparison"]["cp"]), (0, &1.into()));
    assert_eq!(compare(&behind, &first).0, 0);
    let flag = run(&["verify", first.text(), "--store", second.text()]);
    assert!(flag.0 == 0 && flag.1.contains("comparison"), "{}", flag.1);
}

#[test]
fn different_data_is_named() {
    let folder = fixture::folder();
    let first = Fixture::new(folder.path(), "a", 2, 1);
    let second = Fixture::new(folder.path(), "b", 2, 2);
    let (code, all, stderr) = compare(&first, &second);
    let found = &all["comparison"];
    assert_eq!((code, &all["ok"], &found["roots_equal"]), (4, &false.into(), &false.into()));
    assert_eq!(found["different_blocks"], 2 * fixture::RECORD_COUNT);
    assert_eq!(found["different"][0]["block"], first.data(0));
    assert_eq!(found["different"][0]["how"], "different bytes, each as its own map says");
    assert!(stderr.contains("differ at CP 2"), "{stderr}");
}

#[test]
fn damage_on_one_side_is_laid_at_its_door() {
    let folder = fixture::folder();
    let first = Fixture::new(folder.path(), "a", 2, 1);
    let second = Fixture::new(folder.path(), "b", 2, 1);
    write_block(&second.path, second.data(1) + 1, &[9; BLOCK_BYTES]);
    let (code, all, stderr) = compare(&first, &second);
    assert!(code == 3 && stderr.contains(second.text()), "{stderr}");
    assert_eq!(
        (&all["stores"][0]["state"], &all["stores"][1]["state"]),
        (&"whole".into(), &"damaged".into())
    );
    let found = &all["comparison"];
    assert_eq!((&found["different_blocks"], &found["roots_equal"]), (&1.into(), &true.into()));
    assert_eq!(found["different"][0]["how"], "the second store's bytes are damaged");
    assert_eq!(found["different"][0]["block"], second.data(1) + 1);
}

#[test]
fn what_is_no_pair_is_told() {
    let folder = fixture::folder();
    let first = Fixture::new(folder.path(), "a", 2, 1);
    let other = fixture::empty(folder.path(), "b", "ffffffffffffffffffffffffffffffff");
    let (code, _, stderr) = run(&["verify", first.text(), other.to_str().unwrap()]);
    assert!(code == 4 && stderr.contains("not a pair"), "{stderr}");
    let other = folder.path().join("c");
    let format = ["format", other.to_str().unwrap(), "--store-id", fixture::STORE_ID];
    assert_eq!(run(&[&format[..], &["--size", "64MiB", "--shards", "1"]].concat()).0, 0);
    let (code, _, stderr) = run(&["verify", first.text(), other.to_str().unwrap()]);
    assert!(code == 4 && stderr.contains("layouts"), "{stderr}");
}

#[test]
fn a_branch_is_compared_where_it_began() {
    let folder = fixture::folder();
    let first = Fixture::new(folder.path(), "a", 2, 1);
    let second = Fixture::new(folder.path(), "b", 2, 2);
    second.change(|superblock| {
        superblock.term = Term(2);
        superblock.history.push(TermStart { term: Term(2), first: CpNumber(2) });
    });
    let (code, all, stderr) = compare(&first, &second);
    let comparison = &all["comparison"];
    assert_eq!((code, &comparison["cp"]), (4, &1.into()), "{stderr}");
    assert_eq!(comparison["state"], "branched", "{stderr}");
}

#[test]
fn a_base_beyond_the_other_store_leaves_no_common_cp() {
    let folder = fixture::folder();
    let first = Fixture::new(folder.path(), "a", 2, 1);
    let behind = Fixture::new(folder.path(), "b", 1, 1);
    first.change(|superblock| superblock.base = CpNumber(2));
    let (code, _, stderr) = compare(&first, &behind);
    assert!(code == 4 && stderr.contains("come in step"), "{stderr}");
}
