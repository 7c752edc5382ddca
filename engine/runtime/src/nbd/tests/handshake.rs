//! The handshake: every option, and garbage instead of it.

use super::client::{context_query, info_query};
use super::rig::Rig;

const ERROR: u32 = 1 << 31;

fn options(portion: u64, options: &[(u32, Vec<u8>)]) -> (Rig, Vec<(u32, u32, Vec<u8>)>) {
    let mut rig = Rig::new(5, 1 << 20, 100);
    rig.portion = portion;
    rig.client.flags(3);
    for (option, data) in options {
        rig.client.option(*option, data);
    }
    rig.settle();
    rig.client.take_greeting();
    let replies = rig.client.take_option_replies();
    (rig, replies)
}

fn kinds(replies: &[(u32, u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|reply| reply.1).collect()
}

#[test]
fn every_option_is_answered_whatever_the_portions() {
    for portion in [1, 7, 1000, 1 << 20] {
        let (mut rig, replies) = options(
            portion,
            &[
                (3, vec![]),
                (5, vec![]),
                (99, b"what".to_vec()),
                (3, b"x".to_vec()),
                (6, info_query("disk", &[1, 3])),
                (6, info_query("nobody", &[])),
                (6, b"\0\0\0".to_vec()),
                (8, vec![]),
                (2, vec![]),
            ],
        );
        let expected =
            [2, 1, ERROR + 1, ERROR + 1, ERROR + 3, 3, 3, 3, 1, ERROR + 6, ERROR + 3, 1, 1];
        assert_eq!(kinds(&replies), expected);
        assert_eq!(replies[0].2, b"\0\0\0\x04disk");
        let flags: u16 = 1 | 4 | 8 | 32 | 64 | 256 | 2048;
        let mut export = vec![0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0];
        export.extend_from_slice(&flags.to_be_bytes());
        assert_eq!(replies[5].2, export);
        assert_eq!(replies[6].2, b"\0\x01disk");
        assert_eq!(replies[7].2, [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
        assert!(rig.session.is_finished(), "abort ends the session");
        assert_eq!(rig.host.uses, 0);
        rig.close();
    }
}

#[test]
fn metadata_contexts_need_structured_replies_and_belong_to_one_export() {
    let set = |name: &str, query: &str| (10, context_query(name, &[query]));
    let list = |queries: &[&str]| (9, context_query("disk", queries));
    let (mut rig, replies) = options(
        1 << 20,
        &[
            set("disk", "base:allocation"),
            (8, vec![]),
            set("nobody", "base:allocation"),
            set("disk", "base:"),
            set("disk", "qemu:dirty-bitmap:x"),
            list(&[]),
            list(&["base:"]),
            list(&["other:"]),
            set("disk", "base:allocation"),
            (7, info_query("", &[])),
        ],
    );
    let expected = [ERROR + 3, 1, ERROR + 6, 1, 1, 4, 1, 4, 1, 1, 4, 1, 3, 3, 1];
    assert_eq!(kinds(&replies), expected);
    assert_eq!(replies[5].2, b"\0\0\0\0base:allocation");
    assert_eq!(replies[10].2, b"\0\0\0\x01base:allocation");
    assert!(!rig.session.terms.expect("transmission").status, "another name was chosen");
    assert_eq!(rig.host.uses, 1);
    rig.close();
}

#[test]
fn too_long_an_option_is_skipped() {
    let (mut rig, replies) =
        options(50_000, &[(6, vec![7; 200_000]), (3, vec![]), (6, vec![7; 65536])]);
    assert_eq!(kinds(&replies), [ERROR + 9, 2, 1, ERROR + 3]);
    rig.close();
}

#[test]
fn the_old_way_by_export_name() {
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let mut rig = Rig::new(6, 1 << 20, 10);
        rig.host.read_only = true;
        rig.client.flags(flags);
        rig.client.option(1, b"disk");
        rig.settle();
        rig.client.take_greeting();
        let answer = rig.client.take(10 + zeroes);
        assert_eq!(answer[..10], [0, 0, 0, 0, 0, 0x10, 0, 0, 1, 1 | 2 | 4 | 8]);
        rig.client.read(0, 512);
        assert_eq!(rig.run()[0].data, [0; 512]);
        rig.close();
    }
    let mut rig = Rig::new(6, 1 << 20, 10);
    rig.client.flags(3);
    rig.client.option(1, b"nobody");
    rig.settle();
    assert!(rig.session.is_finished());
    rig.close();
}

#[test]
fn a_shutdown_is_told() {
    let mut rig = Rig::new(7, 1 << 20, 10);
    rig.session.shutdown();
    rig.client.flags(3);
    rig.client.option(7, &info_query("disk", &[]));
    rig.client.option(2, &[]);
    rig.settle();
    rig.client.take_greeting();
    assert_eq!(kinds(&rig.client.take_option_replies()), [ERROR + 7, 1]);
    rig.close();
}

#[test]
fn garbage_ends_the_session_or_is_refused_but_never_panics() {
    for seed in 0..300 {
        let mut rig = Rig::new(seed, 1 << 20, 20);
        rig.portion = 1 + rig.random.below(40);
        // Garbage begins at any of the three phases, or in the middle of a valid message.
        match seed % 4 {
            0 => {}
            1 => rig.client.flags(3),
            2 => rig.client.connect(true),
            _ => {
                rig.client.connect(true);
                rig.client.read(0, 4096);
                let cut = rig.random.below(rig.client.outgoing.len() as u64) as usize;
                rig.client.outgoing.truncate(cut);
            }
        }
        for _ in 0..rig.random.below(300) {
            let byte = if rig.random.chance(50) { 0 } else { rig.random.below(256) as u8 };
            rig.client.put(&[byte]);
        }
        for _ in 0..3000 {
            rig.step();
        }
        rig.close();
    }
}

#[test]
fn a_client_may_leave_at_any_byte() {
    let mut whole = Rig::new(1, 1 << 20, 20);
    whole.client.connect(true);
    whole.client.write(512, &[1; 9000 - 9000 % 512]);
    whole.client.read(0, 8192);
    let stream = whole.client.outgoing;
    for cut in 0..stream.len() {
        if cut > 400 && cut % 97 != 0 {
            continue;
        }
        let mut rig = Rig::new(cut as u64, 1 << 20, 20);
        rig.client.put(&stream[..cut]);
        while !rig.client.outgoing.is_empty() {
            rig.step();
        }
        rig.leave();
        rig.close();
    }
}
