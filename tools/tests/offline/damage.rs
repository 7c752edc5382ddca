//! Every structure truncated, flipped, zeroed: either its copy heals it, or it is told with exit code 3. Never a panic,
//! and never a repair by a command that only looks.

use std::fs::OpenOptions;

use twinpoint_core::geometry::{Geometry, MapSlot};
use twinpoint_core::units::{BLOCK_BYTES, ShardId};

use crate::fixture::{self, Fixture, read_block, run, write_block};

/// What becomes of a damaged structure.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fate {
    Healed,
    Damaged,
    /// Only who reads data finds it.
    DamagedData,
}

fn structures(store: &Fixture) -> Vec<(&'static str, Vec<u64>, Fate)> {
    let geometry = store.geometry;
    let superblocks = Geometry::superblock_copies().map(|block| block.0);
    let headers = |shard| geometry.header_copies(ShardId(shard)).map(|block| block.0);
    let directory = |shard, area| geometry.directory_start(ShardId(shard), area).0;
    let journal = |shard, index| geometry.journal_block(ShardId(shard), index).0;
    vec![
        ("superblock 0", vec![superblocks[0]], Fate::Healed),
        ("superblock 1", vec![superblocks[1]], Fate::Healed),
        ("superblocks", superblocks.to_vec(), Fate::Damaged),
        ("header 0", vec![headers(0)[0]], Fate::Healed),
        ("header 1", vec![headers(1)[1]], Fate::Healed),
        ("headers", headers(1).to_vec(), Fate::Damaged),
        ("directory with catalog", vec![directory(0, 0)], Fate::Damaged),
        ("directory", vec![directory(1, 1)], Fate::Damaged),
        ("segment", vec![geometry.map_slot(ShardId(1), MapSlot(9)).0], Fate::Damaged),
        ("record with catalog", vec![journal(0, 0)], Fate::Damaged),
        ("record of shard 0", vec![journal(0, 1)], Fate::Damaged),
        ("record of shard 1", vec![journal(1, 0)], Fate::Damaged),
        ("data of CP 2", vec![store.data(0)], Fate::DamagedData),
        ("data in the segment", vec![geometry.data_start(ShardId(1)).0 + 3], Fate::DamagedData),
    ]
}

fn damages(block: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut damages = vec![
        ("zeroed".to_owned(), vec![0; BLOCK_BYTES]),
        ("garbage".to_owned(), (0..BLOCK_BYTES).map(|i| (i * 151 + i / 7) as u8).collect()),
        ("half".to_owned(), [&block[..BLOCK_BYTES / 2], &[0; BLOCK_BYTES / 2]].concat()),
    ];
    for offset in [0, 8, 10, 12, 16, 40, 56, 80, 119, 127, 176, 191, 200, 2000, 4095] {
        let mut flipped = block.to_vec();
        flipped[offset] ^= 1 << (offset % 8);
        damages.push((format!("bit flipped in byte {offset}"), flipped));
    }
    damages
}

#[test]
fn every_structure_is_healed_or_told() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    for (name, blocks, fate) in structures(&store) {
        let kept: Vec<Vec<u8>> =
            blocks.iter().map(|block| read_block(&store.path, *block)).collect();
        for (index, (how, _)) in damages(&kept[0]).into_iter().enumerate() {
            let mut is_changed = false;
            for (block, kept) in blocks.iter().zip(&kept) {
                let damaged = &damages(kept)[index].1;
                is_changed |= damaged != kept;
                write_block(&store.path, *block, damaged);
            }
            if is_changed {
                expect(&store, fate, &format!("{name}, {how}"));
            }
        }
        blocks.iter().zip(&kept).for_each(|(block, kept)| write_block(&store.path, *block, kept));
        assert_eq!(run(&["verify", store.text()]).0, 0, "{name} is back");
    }
}

fn expect(store: &Fixture, fate: Fate, what: &str) {
    let (verified, report, error) = run(&["verify", store.text()]);
    let (inspected, text, _) =
        run(&["inspect", store.text(), "--segments", "full", "--record", "2"]);
    match fate {
        Fate::Healed => {
            assert_eq!((verified, inspected), (0, 0), "{what}: {error}");
            assert!(
                text.contains("state=damaged") || text.contains("damaged: "),
                "{what}:\n{text}"
            );
            assert!(report.contains("repairs_due (1)"), "{what}:\n{report}");
        }
        Fate::Damaged => assert_eq!((verified, inspected), (3, 3), "{what}: {error}"),
        Fate::DamagedData => {
            assert_eq!((verified, inspected), (3, 0), "{what}: {error}");
            assert!(error.contains("1 of 25 data blocks (4.0 KiB)"), "{what}: {error}");
        }
    }
}

#[test]
fn a_cut_store_is_told() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    let file = OpenOptions::new().write(true).open(&store.path).unwrap();
    let sizes = [fixture::STORE_BYTES - 4096 * 20, 1 << 20, 70_000, 36_864, 8192, 4096, 4095, 1, 0];
    for size in sizes {
        file.set_len(size).unwrap();
        let serve = ["serve", "--replication", "single", "--store", store.text()];
        for arguments in [&["verify", store.text()][..], &["inspect", store.text()], &serve] {
            let (code, _, stderr) = run(arguments);
            assert_eq!(code, 3, "{arguments:?} of {size} bytes: {stderr}");
        }
    }
}

#[test]
fn what_is_no_store_is_told() {
    let folder = fixture::folder();
    let path = folder.path().join("a");
    std::fs::write(&path, vec![0xA5; 1 << 20]).unwrap();
    let (code, _, stderr) = run(&["verify", path.to_str().unwrap()]);
    assert!(code == 3 && stderr.contains("holds no store"), "{stderr}");
    let (code, _, stderr) = run(&["inspect", folder.path().to_str().unwrap()]);
    assert!(code == 1 && stderr.contains("neither a regular file nor a block device"), "{stderr}");
    let missing = folder.path().join("missing");
    for command in ["verify", "inspect"] {
        let (code, _, stderr) = run(&[command, missing.to_str().unwrap()]);
        assert!(code == 1 && stderr.contains("cannot open"), "{stderr}");
    }
}

#[test]
fn a_cp_that_was_not_committed_may_be_cut_off() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "a", 2, 1);
    store.change(|superblock| superblock.committed = twinpoint_core::units::CpNumber(1));
    write_block(&store.path, store.data(1), &[0; BLOCK_BYTES]);
    let (code, report, stderr) = run(&["verify", store.text()]);
    assert_eq!(code, 0, "{stderr}");
    assert!(report.contains("cut off") && report.contains("cp                   1"), "{report}");
}
