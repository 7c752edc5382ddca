//! Random commands under scarce memory and full rings, against a model of the volume.

use std::ops::Range;

use super::ram_host::Random;
use super::rig::Rig;

const SIZE: u64 = (6 << 20) + 512;

/// A command under way, and what it must answer.
struct Expected {
    cookie: u64,
    range: Range<u64>,
    data: Option<Vec<u8>>,
}

fn random_range(random: &mut Random) -> Range<u64> {
    let sectors = SIZE / 512;
    let length = match random.below(10) {
        0 => 1 + random.below(4000),
        1..=4 => 1 + random.below(300),
        _ => 8,
    };
    let start = random.below(sectors);
    start * 512..(start + length).min(sectors) * 512
}

fn issue(rig: &mut Rig, model: &mut [u8], range: Range<u64>, structured: bool) -> Expected {
    let (offset, length) = (range.start, (range.end - range.start) as u32);
    let slice = range.start as usize..range.end as usize;
    let mut data = None;
    let cookie = match rig.random.below(10) {
        0..=3 => {
            let df = if structured && rig.random.chance(30) { 4 } else { 0 };
            data = Some(model[slice].to_vec());
            rig.client.command(0, df, offset, length, &[])
        }
        4..=7 => {
            let seed = rig.random.below(256) as usize;
            let bytes: Vec<u8> = (0..length as usize).map(|i| (seed + i / 64 + i) as u8).collect();
            model[slice].copy_from_slice(&bytes);
            let fua = u16::from(rig.random.chance(10));
            rig.client.command(1, fua, offset, length, &bytes)
        }
        8 => {
            let (start, end) = (slice.start.next_multiple_of(4096), slice.end / 4096 * 4096);
            if start < end {
                model[start..end].fill(0);
            }
            rig.client.command(4, 0, offset, length, &[])
        }
        _ => {
            model[slice].fill(0);
            let flags = [0, 1, 2, 16][rig.random.below(4) as usize];
            rig.client.command(6, flags, offset, length, &[])
        }
    };
    Expected { cookie, range, data }
}

fn run_seed(seed: u64, commands: usize) {
    let structured = seed.is_multiple_of(2);
    let mut random = Random::new(seed);
    let buffers = [1, 2, 7, 65, 200, 3000][random.below(6) as usize];
    let mut rig = Rig::connected(seed, SIZE, buffers, structured);
    rig.host.refusal = [0, 5, 50][random.below(3) as usize];
    rig.host.pending_max = [1, 3, 1000][random.below(3) as usize];
    rig.portion = [600, 20_000, 1 << 20][random.below(3) as usize];
    let mut model = vec![0; SIZE as usize];
    let mut under_way: Vec<Expected> = Vec::new();
    let (mut left, mut idle) = (commands, 0);
    while left > 0 || !under_way.is_empty() {
        let range = random_range(&mut random);
        // Commands that overlap may be done in any order, so the model only has those that do not.
        let free =
            under_way.iter().all(|e| e.range.end <= range.start || range.end <= e.range.start);
        if left > 0 && free && under_way.len() < 40 {
            under_way.push(issue(&mut rig, &mut model, range, structured));
            left -= 1;
        }
        for _ in 0..20 {
            rig.step();
        }
        idle += 1;
        assert!(idle < 20_000, "seed {seed}: the session waits for ever");
        for reply in rig.client.take_replies() {
            idle = 0;
            assert_eq!(reply.error, 0, "seed {seed}");
            let index = under_way.iter().position(|e| e.cookie == reply.cookie);
            let expected = under_way.swap_remove(index.expect("a reply to a command under way"));
            if let Some(data) = expected.data {
                assert!(data == reply.data, "seed {seed}: read of {:?}", expected.range);
            }
        }
    }
    rig.run();
    assert!(rig.host.disk[..SIZE as usize] == model, "seed {seed}: the volume differs");
    rig.close();
}

#[test]
fn random_commands_agree_with_a_model() {
    for seed in 0..60 {
        run_seed(seed, 150);
    }
}

#[test]
fn a_connection_may_break_at_any_time() {
    for seed in 0..300 {
        let structured = seed % 2 == 0;
        let mut rig = Rig::connected(seed, SIZE, 10 + (seed as usize % 5) * 40, structured);
        rig.host.refusal = seed % 3 * 20;
        let mut model = vec![0; SIZE as usize];
        for _ in 0..20 {
            let range = random_range(&mut rig.random);
            issue(&mut rig, &mut model, range, structured);
        }
        for _ in 0..rig.random.below(400) {
            rig.step();
        }
        rig.close();
        rig.session.resume(&mut rig.host);
        rig.session.release(&mut rig.host);
        assert_eq!(rig.session.in_flight(), 0);
    }
}
