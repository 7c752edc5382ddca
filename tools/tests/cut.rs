//! The cut (R2), by its plainest test: a client writes A, waits for the answer, writes B on another connection to
//! another shard. After a SIGKILL at any moment there is never a B without its A, on the store itself or on a promoted
//! secondary.
//!
//! Each writer has slots in two stripes, 2 MiB apart, so in different shards. Its writes are numbered in the order A0,
//! B0, A1, B1, ..., each sent after the one before was answered, so what survives of them must be a prefix.

mod support;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use support::nbd_client::NbdClient;
use support::pair::{Pair, PairPlan, VOLUME, flags};
use support::random::Random;
use support::sector::{self, BLOCK_SECTORS, SECTOR_BYTES, Sector};
use support::time_limit::TimeLimit;

const ROUNDS: u64 = 10;
const WRITERS: u64 = 4;
/// Pairs of writes that a writer has room for: older ones are overwritten.
const SLOTS: u64 = 97;
const BLOCK_BYTES: u64 = BLOCK_SECTORS * SECTOR_BYTES as u64;
const STRIPE_BYTES: u64 = 2 << 20;
/// Where large writes go, apart from all slots.
const BALLAST_STRIPE: u64 = 2 * WRITERS;
/// Pairs answered before a kill, at least.
const PAIRS_MIN: u64 = 2000;
/// CPs committed meanwhile, at least.
const POINTS_MIN: u64 = 5;

#[test]
fn never_b_without_a_after_a_restart() {
    let _limit = TimeLimit::new("cut, restart", Duration::from_secs(240));
    let mut random = Random::of_test("cut");
    let mut pair = Pair::new(PairPlan { paired: false, ..plan() });
    let mut sent = Sent::default();
    for round in 0..ROUNDS {
        let written = write_until_killed(&mut pair, &mut random, &mut sent);
        pair.start(0);
        let left = check_prefixes(&pair, &sent);
        println!("round {round}: {written} pairs, {left} writes survived in the writers' order");
        sent.continue_after(&pair);
    }
    pair.stop_all();
    pair.verify();
    pair.assert_no_panic();
}

#[test]
fn never_b_without_a_after_a_promotion() {
    let _limit = TimeLimit::new("cut, promotion", Duration::from_secs(240));
    let mut random = Random::of_test("cut-promotion");
    for replication in ["async", "semi-sync", "sync"] {
        let mut pair = Pair::new(PairPlan { replication, ..plan() });
        let mut sent = Sent::default();
        let written = write_until_killed(&mut pair, &mut random, &mut sent);
        pair.promote();
        let left = check_prefixes(&pair, &sent);
        println!("{replication}: {written} pairs, {left} writes survived in the writers' order");
        pair.assert_no_panic();
    }
}

fn plan() -> PairPlan {
    let flags = flags(&["--cores", "0,1", "--cp-interval", "2ms", "--memory", "64MiB"]);
    PairPlan { flags, ..PairPlan::default() }
}

/// How far each writer is: the number of its next write.
struct Sent {
    next: [Arc<AtomicU64>; WRITERS as usize],
}

impl Default for Sent {
    fn default() -> Sent {
        // Zero stands for a slot that was never written.
        Sent { next: std::array::from_fn(|_| Arc::new(AtomicU64::new(1))) }
    }
}

impl Sent {
    /// The next round's writers begin with whole slots, on what survived: they write all of them once.
    fn continue_after(&mut self, pair: &Pair) {
        let mut client = pair.primary().client(VOLUME);
        for (writer, next) in self.next.iter().enumerate() {
            let start = next.load(Ordering::SeqCst) + 1;
            for number in start..start + 2 * SLOTS {
                let (offset, bytes) = write_of(writer as u64, number);
                client.write(offset, &bytes).expect("the node takes writes");
            }
            next.store(start + 2 * SLOTS, Ordering::SeqCst);
        }
        client.flush().expect("the node flushes");
    }
}

/// Where write `number` of a writer goes, and what it holds: odd numbers are A, even ones B.
fn write_of(writer: u64, number: u64) -> (u64, Vec<u8>) {
    let slot = (number - 1) / 2 % SLOTS;
    let stripe = 2 * writer + (number + 1) % 2;
    let offset = stripe * STRIPE_BYTES + slot * BLOCK_BYTES;
    (offset, sector::fill(offset / SECTOR_BYTES as u64, number, BLOCK_SECTORS))
}

/// Runs the writers, kills the primary once they did enough, and gives the number of pairs.
fn write_until_killed(pair: &mut Pair, random: &mut Random, sent: &mut Sent) -> u64 {
    let stop = Arc::new(AtomicBool::new(false));
    let socket = pair.primary().files().nbd.clone();
    let before: u64 = sent.next.iter().map(|next| next.load(Ordering::SeqCst)).sum();
    let start = |(writer, next): (usize, &Arc<AtomicU64>)| {
        start_writer(writer as u64, socket.clone(), Arc::clone(next), Arc::clone(&stop))
    };
    let mut writers: Vec<JoinHandle<()>> = sent.next.iter().enumerate().map(start).collect();
    writers.push(start_ballast(&socket, Arc::clone(&stop)));
    let done = || sent.next.iter().map(|next| next.load(Ordering::SeqCst)).sum::<u64>() - before;
    let deadline = Instant::now() + Duration::from_secs(30);
    let committed = |pair: &Pair| pair.primary().status()["cp"]["local"].as_u64();
    let points = committed(pair).map(|before| before + POINTS_MIN);
    while done() < 2 * PAIRS_MIN || committed(pair) < points {
        assert!(Instant::now() < deadline, "{} writes in 30 s; {}", done(), pair.logs());
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(random.milliseconds(0, 50));
    pair.kill(0);
    stop.store(true, Ordering::SeqCst);
    writers.into_iter().for_each(|writer| writer.join().expect("a writer panicked"));
    done() / 2
}

fn start_writer(
    writer: u64,
    socket: PathBuf,
    next: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> JoinHandle<()> {
    let connect = || NbdClient::connect(&socket, VOLUME).expect("the node takes connections");
    let mut connections = [connect(), connect()];
    std::thread::spawn(move || {
        let mut write = |number: u64| -> io::Result<()> {
            let (offset, bytes) = write_of(writer, number);
            connections[number as usize % 2].write(offset, &bytes)
        };
        while !stop.load(Ordering::SeqCst) {
            let number = next.load(Ordering::SeqCst);
            // The kill ends the connections; the write under way may survive, and counts as sent.
            let answered = write(number).is_ok();
            next.store(number + 1, Ordering::SeqCst);
            if !answered {
                return;
            }
        }
    })
}

/// Keeps one shard busy with large writes, so that its part of each CP is written long after those of the others: a
/// kill often finds a CP that is whole in some shards only.
fn start_ballast(socket: &Path, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    const LENGTH: u64 = 256 << 10;
    let mut client = NbdClient::connect(socket, VOLUME).expect("the node takes connections");
    std::thread::spawn(move || {
        let bytes = vec![0x5a; LENGTH as usize];
        let offsets = (0..STRIPE_BYTES / LENGTH).cycle().map(|part| part * LENGTH);
        for offset in offsets {
            let written = client.write(BALLAST_STRIPE * STRIPE_BYTES + offset, &bytes);
            if written.is_err() || stop.load(Ordering::SeqCst) {
                return;
            }
        }
    })
}

/// Checks that what each writer left is a prefix of what it sent. Gives the number of writes in them.
fn check_prefixes(pair: &Pair, sent: &Sent) -> u64 {
    let mut client = pair.primary().client(VOLUME);
    let mut survived = 0;
    for (writer, next) in sent.next.iter().enumerate() {
        let next = next.load(Ordering::SeqCst);
        let mut slots = Vec::new();
        for place in 1..=2 * SLOTS {
            let (offset, bytes) = write_of(writer as u64, place);
            let found = client.read(offset, bytes.len()).expect("the node reads");
            let found = sector::parse(offset / SECTOR_BYTES as u64, &found);
            let found = found.unwrap_or_else(|text| panic!("writer {writer}: {text}"));
            assert!(
                found.windows(2).all(|pair| pair[0] == pair[1]),
                "writer {writer}, slot {place}: a torn block: {found:?}"
            );
            slots.push(match found[0] {
                Sector::Zero => 0,
                Sector::Written(number) => number,
            });
        }
        let newest = slots.iter().max().copied().unwrap_or(0);
        assert!(newest < next, "writer {writer}: write {newest} was never sent");
        for (place, found) in slots.iter().enumerate() {
            let place = place as u64 + 1;
            // The newest write up to `newest` that went to this place.
            let rounds = newest.saturating_sub(place) / (2 * SLOTS);
            let right = if newest < place { 0 } else { place + rounds * 2 * SLOTS };
            assert_eq!(
                *found,
                right,
                "writer {writer}: write {newest} survived, and write {right} before it did not ({}); {}",
                if right % 2 == 1 { "B without A" } else { "A without the B before" },
                pair.logs()
            );
        }
        survived += newest;
    }
    survived
}
