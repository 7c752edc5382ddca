//! Failover of a file system: an ext4 image goes onto the volume, the primary is killed, the secondary promoted, and
//! the image that comes out of it is clean and the same.

mod support;

use std::fs;
use std::time::Duration;

use support::pair::{Pair, PairPlan, VOLUME};
use support::programs::client;
use support::random::Random;
use support::time_limit::TimeLimit;

const FILES: usize = 400;

#[test]
fn a_file_system_survives_the_primary_in_sync_mode() {
    fail_over("failover-sync", "sync");
}

#[test]
fn a_file_system_survives_the_primary_in_semi_sync_mode() {
    fail_over("failover-semi-sync", "semi-sync");
}

fn fail_over(name: &'static str, replication: &'static str) {
    let _limit = TimeLimit::new(name, Duration::from_secs(180));
    let plan = PairPlan { replication, volume_bytes: 96 << 20, ..PairPlan::default() };
    let mut pair = Pair::new(plan);
    let source = make_file_system(&pair, &mut Random::of_test(name));
    let copy_in = ["--flush", &source, &pair.primary().uri(VOLUME)];
    client("nbdcopy", "libnbd-bin", &copy_in, pair.space.folder()).success();
    pair.kill(0);

    pair.promote();
    let target = pair.space.path("out.img").display().to_string();
    let copy_out = [pair.primary().uri(VOLUME), target.clone()];
    let copy_out = copy_out.each_ref().map(String::as_str);
    client("nbdcopy", "libnbd-bin", &copy_out, pair.space.folder()).success();
    client("e2fsck", "e2fsprogs", &["-fn", &target], pair.space.folder()).success();
    let [before, after] =
        [&source, &target].map(|path| fs::read(path).expect("the image is there"));
    assert_eq!(before.len(), after.len(), "the images' sizes");
    let differs = before.iter().zip(&after).position(|(before, after)| before != after);
    assert_eq!(differs, None, "first byte that differs");
    pair.stop(1);
    pair.verify_one(1);
    pair.verify_one(0);
    pair.assert_no_panic();
}

/// An ext4 image of a small tree, as large as the volume.
fn make_file_system(pair: &Pair, random: &mut Random) -> String {
    let tree = pair.space.path("tree");
    for number in 0..FILES {
        let folder = tree.join(format!("folder-{}", number % 20));
        fs::create_dir_all(&folder).expect("the folder takes folders");
        let length = random.below(60_000) as usize;
        let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        fs::write(folder.join(format!("file-{number}")), bytes).expect("the folder takes files");
    }
    let image = pair.space.path("in.img").display().to_string();
    let (tree, size) = (tree.display().to_string(), format!("{}k", pair.plan.volume_bytes >> 10));
    let arguments = ["-q", "-t", "ext4", "-d", &tree, &image, &size];
    client("mke2fs", "e2fsprogs", &arguments, pair.space.folder()).success();
    image
}
