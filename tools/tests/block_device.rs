//! Block devices, from end to end: `format` refuses those that hold something, a pair serves two of them, fio verifies,
//! the second one takes over, and `verify` compares them.
//!
//! The devices are loop devices over files, which takes root. Without them nothing is tested, and that is said on
//! standard error past what the test runner keeps to itself.

mod support;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use support::pair::{Pair, PairPlan, VOLUME};
use support::programs::{client, twinpoint};
use support::space::Space;
use support::time_limit::TimeLimit;

const TIME_MAX: Duration = Duration::from_secs(240);
const DEVICE_BYTES: u64 = 256 << 20;
const LOOP_CONTROL: &str = "/dev/loop-control";
/// O_EXCL: on a block device the claim that a mounted file system has too.
const EXCLUSIVE: i32 = 0o200;

/// A loop device, for as long as this process has it open: it is detached by the kernel, whatever ends the test.
struct Loop {
    path: PathBuf,
    held: File,
}

impl Loop {
    fn new(space: &Space, name: &str) -> Loop {
        let file = space.path(name);
        let made = File::create(&file).and_then(|file| file.set_len(DEVICE_BYTES));
        made.expect("the folder takes files");
        let attach = ["--find", "--show", &file.display().to_string()];
        let path = PathBuf::from(losetup(&attach, space.folder()).trim());
        let held = OpenOptions::new().read(true).write(true).open(&path);
        // While it is open, this makes the kernel detach it at the last close.
        losetup(&["--detach", &path.display().to_string()], space.folder());
        Loop { held: held.expect("the device opens"), path }
    }

    fn text(&self) -> String {
        self.path.display().to_string()
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let written = self.held.write_all_at(bytes, offset).and_then(|()| self.held.sync_all());
        written.expect("the device takes writes");
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.held.read_exact_at(&mut bytes, offset).expect("the device gives what it has");
        bytes
    }
}

fn losetup(arguments: &[&str], folder: &Path) -> String {
    client("losetup", "mount", arguments, folder).success()
}

/// Whether there are loop devices for this user; if not, says so where it is seen.
fn has_loop_devices(test: &str) -> bool {
    let opened = OpenOptions::new().read(true).write(true).open(LOOP_CONTROL);
    if let Err(error) = &opened {
        let line = format!(
            "\n*** NOT RUN: {test}: {LOOP_CONTROL}: {error}: needs root and loop devices\n"
        );
        // Not by eprintln, which the test runner keeps for failures.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    opened.is_ok()
}

#[test]
fn format_refuses_a_device_that_holds_something() {
    if !has_loop_devices("format_refuses_a_device_that_holds_something") {
        return;
    }
    let _limit = TimeLimit::new("format, block device", TIME_MAX);
    let space = Space::new();
    let device = Loop::new(&space, "disk");
    let path = device.text();
    let file_system = ["-q", "-t", "ext4", &path];
    client("mke2fs", "e2fsprogs", &file_system, space.folder()).success();
    refused(&device, "an ext file system");

    // Somebody has it, as a mounted file system would: then not even by force.
    let user = OpenOptions::new().read(true).custom_flags(EXCLUSIVE).open(&device.path);
    let user = user.expect("nobody else has it");
    let before = device.read(0, 1 << 20);
    let line = twinpoint(&["format", &path, "--force"]).failure(6);
    assert!(line.contains("in use"), "{line}");
    assert!(device.read(0, 1 << 20) == before);
    drop(user);
    // A block device of another kind takes no NVMe commands.
    let flags = ["--replication", "single", "--device-mode", "passthrough"];
    let line = twinpoint(&[&["serve", "--store", &*path], &flags[..]].concat()).failure(2);
    assert!(line.contains("no namespace") && line.contains("leave --device-mode away"), "{line}");

    device.write(0, &vec![0; 1 << 20]);
    // A partition table for a BIOS: one Linux partition from sector 2048 on.
    let mut sector = [0; 512];
    sector[446..462].copy_from_slice(&[0, 32, 33, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 4, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    device.write(0, &sector);
    refused(&device, "a partition table");
    device.write(0, &[0; 512]);
    device.write(512, b"EFI PART");
    refused(&device, "a partition table");
    device.write(512, &[0; 512]);
    // What only the end shows, as a mirror's label.
    device.write(DEVICE_BYTES - 4096, b"label");
    refused(&device, "holds data");

    let line = twinpoint(&["format", &path, "--size", "128MiB"]).failure(2);
    assert!(line.contains("leave --size away"), "{line}");
    let report = twinpoint(&["format", &path, "--force", "--json"]).success();
    let report: Value = serde_json::from_str(&report).expect("format prints JSON");
    assert_eq!(report["size_bytes"], DEVICE_BYTES, "{report}");
    assert_eq!((&report["created"], &report["direct"]), (&false.into(), &true.into()), "{report}");
    twinpoint(&["verify", &path]).success();
    let store = report["store"].as_str().expect("an id").to_owned();
    refused(&device, &store);
}

/// Checks that formatting is refused with these words, and changes nothing where labels lie.
#[track_caller]
fn refused(device: &Loop, words: &str) {
    let ends = || [device.read(0, 1 << 20), device.read(DEVICE_BYTES - (1 << 20), 1 << 20)];
    let before = ends();
    let line = twinpoint(&["format", &device.text()]).failure(6);
    assert!(line.contains(words) && line.contains("--force"), "{words}: {line}");
    assert!(ends() == before, "{words}: something was written");
}

#[test]
fn a_pair_serves_block_devices() {
    if !has_loop_devices("a_pair_serves_block_devices") {
        return;
    }
    let _limit = TimeLimit::new("pair, block devices", TIME_MAX);
    let space = Space::new();
    let devices = ["a", "b"].map(|name| Loop::new(&space, name));
    let mut pair = pair_on(&devices);
    let line = twinpoint(&["format", &devices[0].text(), "--force"]).failure(6);
    assert!(line.contains("in use"), "{line}");

    let uri = format!("--uri={}", pair.primary().uri(VOLUME));
    let common = ["--ioengine=nbd", &uri, "--verify=crc32c", "--verify_fatal=1", "--minimal"];
    let more = ["--verify_state_save=0", "--do_verify=1", "--size=24m", "--iodepth=16"];
    let jobs: [&[&str]; 3] = [
        &["--name=random", "--rw=randwrite", "--bs=4k", "--fsync=64"],
        &["--name=mixed", "--rw=randwrite", "--bsrange=512-256k", "--blockalign=512"],
        &["--name=trims", "--rw=randtrimwrite", "--bs=64k", "--serialize_overlap=1"],
    ];
    for job in jobs {
        let all = [job, &common, &more].concat();
        let outcome = client("fio", "fio", &all, pair.space.folder());
        assert!(!outcome.stderr.contains("verify:"), "{outcome}");
        outcome.success();
    }
    let mut reader = pair.primary().client(VOLUME);
    reader.flush().expect("the node flushes");
    let before = reader.read_all(pair.plan.volume_bytes).expect("the node reads");
    drop(reader);
    pair.wait_in_step(Duration::from_secs(30)).unwrap_or_else(|text| panic!("{text}"));
    pair.stop_all();
    pair.verify();

    pair.start(1);
    pair.start(0);
    pair.wait_in_step(Duration::from_secs(30)).unwrap_or_else(|text| panic!("{text}"));
    pair.kill(0);
    pair.promote();
    let after = pair.primary().client(VOLUME).read_all(pair.plan.volume_bytes);
    assert!(after.expect("the new primary reads") == before, "the volume is the same");
    pair.stop(1);
    pair.verify_one(0);
    pair.verify_one(1);
    pair.assert_no_panic();
}

/// A running pair whose stores are these devices.
fn pair_on(devices: &[Loop; 2]) -> Pair {
    let mut pair = Pair::formatted(PairPlan::default());
    for (files, device) in pair.files.iter_mut().zip(devices) {
        files.store.clone_from(&device.path);
    }
    let [first, second] = [0, 1].map(|index| pair.store_path(index));
    let report = twinpoint(&["format", &first, "--journal", "4MiB", "--json"]).success();
    let report: Value = serde_json::from_str(&report).expect("format prints JSON");
    let id = report["store"].as_str().expect("format tells the store's id");
    twinpoint(&["format", &second, "--journal", "4MiB", "--store-id", id]).success();
    pair.start(1);
    pair.start(0);
    pair.create_volume(VOLUME, pair.plan.volume_bytes);
    pair
}
