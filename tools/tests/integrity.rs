//! Integrity: the NBD clients of others read what they wrote, on a single store and on a pair in sync mode; then both
//! stores pass `twinpoint verify`.

mod support;

use std::fs;
use std::time::Duration;

use serde_json::Value;

use support::pair::{Pair, PairPlan, VOLUME};
use support::programs::client;
use support::random::Random;
use support::time_limit::TimeLimit;

const TIME_MAX: Duration = Duration::from_secs(240);
const STRIPE_BYTES: u64 = 2 << 20;
const REQUEST_BYTES: u64 = 256 << 10;

#[test]
fn fio_verifies_on_a_single_store() {
    on_a_pair("fio, single", false, |pair| {
        fio_random(pair);
        fio_mixed_sizes(pair);
        fio_trims(pair);
    });
}

#[test]
fn fio_verifies_on_a_pair() {
    on_a_pair("fio, pair", true, |pair| {
        fio_random(pair);
        fio_mixed_sizes(pair);
        fio_trims(pair);
    });
}

#[test]
fn qemu_io_patterns_on_a_single_store() {
    on_a_pair("qemu-io, single", false, |pair| qemu_io_patterns(pair, "qemu-io-single"));
}

#[test]
fn qemu_io_patterns_on_a_pair() {
    on_a_pair("qemu-io, pair", true, |pair| qemu_io_patterns(pair, "qemu-io-pair"));
}

#[test]
fn nbdcopy_and_nbdinfo_on_a_single_store() {
    on_a_pair("nbdcopy, single", false, |pair| copy_in_and_out(pair, "nbdcopy-single"));
}

#[test]
fn nbdcopy_and_nbdinfo_on_a_pair() {
    on_a_pair("nbdcopy, pair", true, |pair| copy_in_and_out(pair, "nbdcopy-pair"));
}

#[test]
fn connections_see_each_others_writes() {
    on_a_pair("connections", true, |pair| {
        let uri = pair.primary().uri(VOLUME);
        client("nbdinfo", "libnbd-bin", &["--can", "multi-conn", &uri], pair.space.folder())
            .success();
        let (mut one, mut other) = (pair.primary().client(VOLUME), pair.primary().client(VOLUME));
        let mut random = Random::of_test("connections");
        for round in 0..500_u64 {
            let length = 512 * (1 + random.below(64)) as usize;
            let offset = 512 * random.below((pair.plan.volume_bytes - length as u64) / 512);
            let data: Vec<u8> = (0..length).map(|at| (at as u64 * 7 + round) as u8).collect();
            one.write(offset, &data).expect("one writes");
            let seen = other.read(offset, length).expect("the other reads");
            assert!(seen == data, "round {round}: {length} bytes at {offset} differ");
            std::mem::swap(&mut one, &mut other);
        }
    });
}

/// Runs `deed` on a fresh pair, or single store, and verifies what is left.
fn on_a_pair(name: &'static str, paired: bool, deed: impl Fn(&Pair)) {
    let _limit = TimeLimit::new(name, TIME_MAX);
    let mut pair = Pair::new(PairPlan { paired, ..PairPlan::default() });
    deed(&pair);
    pair.primary().client(VOLUME).flush().expect("the node flushes");
    if paired {
        pair.wait_in_step(Duration::from_secs(30)).unwrap_or_else(|text| panic!("{name}: {text}"));
    }
    pair.stop_all();
    pair.verify();
    pair.assert_no_panic();
}

fn fio(pair: &Pair, name: &str, arguments: &[&str]) {
    let (name, uri) = (format!("--name={name}"), format!("--uri={}", pair.primary().uri(VOLUME)));
    let mut all = vec![name.as_str(), "--ioengine=nbd", uri.as_str(), "--verify=crc32c"];
    all.extend(["--verify_fatal=1", "--verify_state_save=0", "--do_verify=1", "--minimal"]);
    all.extend(arguments);
    let outcome = client("fio", "fio", &all, pair.space.folder());
    assert!(!outcome.stderr.contains("verify:"), "{outcome}");
    outcome.success();
}

fn fio_random(pair: &Pair) {
    let size = ["--rw=randwrite", "--bs=4k", "--size=24m", "--iodepth=32", "--fsync=64"];
    fio(pair, "random", &size);
    // Overwrites, half of them, verified a little later while the rest goes on.
    let again = ["--rw=randwrite", "--bs=4k", "--size=24m", "--io_size=12m", "--iodepth=16"];
    fio(pair, "overwrite", &[&again[..], &["--verify_backlog=256", "--randseed=7"]].concat());
}

fn fio_mixed_sizes(pair: &Pair) {
    let mixed = ["--rw=randwrite", "--bsrange=512-256k", "--blockalign=512"];
    fio(pair, "mixed", &[&mixed[..], &["--size=24m", "--iodepth=16", "--randseed=11"]].concat());
    let odd = ["--rw=randrw", "--bssplit=512/20:1536/20:4k/20:7k/20:64k/10:256k/10"];
    fio(pair, "odd", &[&odd[..], &["--blockalign=512", "--size=24m", "--iodepth=8"]].concat());
}

/// Trims each block and writes it anew, at random; fio keeps commands on the same block apart, for a server may carry
/// out overlapping ones in any order.
fn fio_trims(pair: &Pair) {
    let trims = ["--rw=randtrimwrite", "--size=24m", "--iodepth=16", "--serialize_overlap=1"];
    fio(pair, "trims", &[&trims[..], &["--bs=4k", "--randseed=13"]].concat());
    fio(pair, "large-trims", &[&trims[..], &["--bs=64k", "--randseed=17"]].concat());
    fio(pair, "odd-trims", &[&trims[..], &["--bs=1536", "--randseed=19"]].concat());
}

/// What the volume must hold, byte by byte; none where a discard left it open.
struct Model {
    bytes: Vec<Option<u8>>,
}

impl Model {
    fn set(&mut self, offset: u64, length: u64, value: Option<u8>) {
        self.bytes[offset as usize..(offset + length) as usize].fill(value);
    }
}

/// Random `write -P`, `write -z` and `discard` at odd offsets, many across borders of stripes and requests, each
/// followed by `read -P` of a place that has one value; in the end every byte is compared.
fn qemu_io_patterns(pair: &Pair, name: &str) {
    let mut random = Random::of_test(name);
    let mut model = Model { bytes: vec![Some(0); pair.plan.volume_bytes as usize] };
    for _ in 0..4 {
        let commands: Vec<String> =
            (0..60).flat_map(|_| qemu_io_step(&mut random, &mut model)).collect();
        qemu_io(pair, &commands);
    }
    let seen = pair.primary().client(VOLUME).read_all(pair.plan.volume_bytes);
    let seen = seen.expect("the node reads");
    let differs = |(seen, right): (&u8, &Option<u8>)| right.is_some_and(|right| right != *seen);
    let wrong = seen.iter().zip(&model.bytes).position(differs);
    assert_eq!(wrong, None, "the first byte that differs from what was written");
}

fn qemu_io_step(random: &mut Random, model: &mut Model) -> Vec<String> {
    let volume_bytes = model.bytes.len() as u64;
    let length = match random.below(4) {
        0 => 1 + random.below(512),
        1 => 1 + random.below(5000),
        2 => 1 + random.below(300 << 10),
        _ => 4096 * (1 + random.below(32)),
    };
    let border = match random.below(3) {
        0 => STRIPE_BYTES * (1 + random.below(volume_bytes / STRIPE_BYTES - 1)),
        1 => REQUEST_BYTES * (1 + random.below(volume_bytes / REQUEST_BYTES - 1)),
        _ => random.below(volume_bytes),
    };
    let kind = random.below(10);
    // A discard is not filled up to sectors by the client, so it has to have whole ones.
    let grain = if kind == 9 { 512 } else { 1 };
    let length = length.next_multiple_of(grain);
    let offset = border.saturating_sub(random.below(length + 1)).min(volume_bytes - length);
    let offset = offset / grain * grain;
    if kind < 6 {
        let pattern = 1 + random.below(255) as u8;
        model.set(offset, length, Some(pattern));
        let fua = if random.percent(10) { "-f " } else { "" };
        let write = format!("write {fua}-P {pattern} {offset} {length}");
        return vec![write, format!("read -P {pattern} {offset} {length}")];
    }
    if kind < 9 {
        model.set(offset, length, Some(0));
        let unmap = if random.percent(50) { "-u " } else { "" };
        let zero = format!("write -z {unmap}{offset} {length}");
        return vec![zero, format!("read -P 0 {offset} {length}")];
    }
    // A discard of whole blocks reads as zeroes; what it leaves of others is open.
    let whole = (offset.next_multiple_of(4096), (offset + length) / 4096 * 4096);
    model.set(offset, length, None);
    let mut commands = vec![format!("discard {offset} {length}")];
    if whole.0 < whole.1 {
        model.set(whole.0, whole.1 - whole.0, Some(0));
        commands.push(format!("read -P 0 {} {}", whole.0, whole.1 - whole.0));
    }
    commands
}

fn qemu_io(pair: &Pair, commands: &[String]) {
    let uri = pair.primary().uri(VOLUME);
    let mut arguments = vec!["-f", "raw", "-d", "unmap"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.extend(["-c", "flush", uri.as_str()]);
    let outcome = client("qemu-io", "qemu-utils", &arguments, pair.space.folder());
    let failed = outcome.stdout.contains("failed") || outcome.stdout.contains("Error");
    assert!(!failed, "{outcome}");
    outcome.success();
}

/// A file with data and holes goes in and comes out the same, and the map shows what is data.
fn copy_in_and_out(pair: &Pair, name: &str) {
    let folder = pair.space.folder();
    let uri = pair.primary().uri(VOLUME);
    assert_eq!(data_bytes(pair), 0, "a new volume is one hole");
    let mut random = Random::of_test(name);
    let mut bytes = vec![0_u8; pair.plan.volume_bytes as usize];
    let mut filled = 0;
    for piece in bytes.chunks_exact_mut(64 << 10) {
        if random.percent(40) {
            piece.iter_mut().for_each(|byte| *byte = random.next() as u8);
            filled += piece.len() as u64;
        }
    }
    let (source, target) = (pair.space.path("in.img"), pair.space.path("out.img"));
    fs::write(&source, &bytes).expect("the folder takes a file");
    let (source, target) = (source.display().to_string(), target.display().to_string());
    client("nbdcopy", "libnbd-bin", &[&source, &uri], folder).success();
    let data = data_bytes(pair);
    assert!(data >= filled, "{data} bytes are data, {filled} were written");
    let piece_holes = bytes.len() as u64 - filled;
    assert!(data < filled + piece_holes, "nbdcopy's zeroes are holes: {data} bytes are data");
    client("nbdcopy", "libnbd-bin", &[&uri, &target], folder).success();
    assert!(fs::read(&target).expect("nbdcopy made it") == bytes, "out.img differs from in.img");
    let size = client("nbdinfo", "libnbd-bin", &["--size", &uri], folder).success();
    assert_eq!(size.trim(), pair.plan.volume_bytes.to_string());
    let list = client("nbdinfo", "libnbd-bin", &["--list", &uri], folder).success();
    assert!(list.contains(VOLUME), "{list}");
}

/// Bytes of the volume that `nbdinfo --map` shows as data; checks that the map covers the volume without a gap.
fn data_bytes(pair: &Pair) -> u64 {
    let uri = pair.primary().uri(VOLUME);
    let map = client("nbdinfo", "libnbd-bin", &["--map", "--json", &uri], pair.space.folder());
    let map: Value = serde_json::from_str(&map.success()).expect("nbdinfo prints JSON");
    let (mut end, mut data) = (0, 0);
    for extent in map.as_array().expect("a list of extents") {
        let number = |name: &str| extent[name].as_u64().expect("a number");
        assert_eq!(number("offset"), end, "extents follow each other: {map}");
        end += number("length");
        data += if number("type") == 0 { number("length") } else { 0 };
    }
    assert_eq!(end, pair.plan.volume_bytes, "the map covers the volume");
    data
}
