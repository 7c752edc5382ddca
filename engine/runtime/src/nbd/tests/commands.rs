//! Every command, its errors, and what happens when memory is scarce or shards fail.

use twinpoint_core::request::Outcome;
use twinpoint_core::units::BLOCK_BYTES;

use super::client::Reply;
use super::rig::Rig;
use crate::nbd::limits::BACKGROUND_PIECES_MAX;

const SIZE: u64 = (8 << 20) + 1536;

fn pattern(offset: u64, length: usize) -> Vec<u8> {
    (0..length).map(|i| ((offset as usize + i) / 512 * 7 + (offset as usize + i)) as u8).collect()
}

fn one(rig: &mut Rig) -> Reply {
    let mut replies = rig.run();
    assert_eq!(replies.len(), 1, "{:?}", replies.iter().map(|r| r.error).collect::<Vec<_>>());
    replies.remove(0)
}

#[test]
fn what_is_written_is_read_across_borders() {
    let ranges: [(u64, usize); 8] = [
        (0, 4096),
        (512, 512),
        (3584, 1024),
        (4096, 65536),
        ((2 << 20) - 512, 1024),
        ((2 << 20) - 4096, 8192),
        (1 << 20, 3 << 20),
        (SIZE - 2048, 2048),
    ];
    for structured in [false, true] {
        for (buffers, refusal) in [(4000, 0), (3, 30), (70, 30), (130, 0)] {
            let mut rig = Rig::connected(1, SIZE, buffers, structured);
            rig.host.refusal = refusal;
            for (offset, length) in ranges {
                let data = pattern(offset, length);
                rig.client.write(offset, &data);
                assert_eq!(one(&mut rig).error, 0);
                rig.client.read(offset, length as u32);
                let reply = one(&mut rig);
                assert!(reply.error == 0 && reply.data == data, "{offset}+{length}");
                if structured {
                    rig.client.command(0, 4, offset, length as u32, &[]);
                    let reply = one(&mut rig);
                    assert!(reply.data == data && reply.data_chunks == 1, "{offset}+{length}");
                }
            }
            rig.close();
        }
    }
}

#[test]
fn large_writes_go_straight_into_buffers() {
    let mut rig = Rig::connected(2, SIZE, 4000, true);
    for _ in 0..3 {
        rig.client.write(0, &pattern(0, 4 << 20));
    }
    assert_eq!(rig.run().len(), 3);
    assert!(rig.direct_bytes > 11 << 20, "{} bytes went directly", rig.direct_bytes);
    rig.close();
}

#[test]
fn many_small_commands_share_a_receive_and_a_send() {
    let mut rig = Rig::connected(3, SIZE, 200, false);
    for index in 0..64 {
        rig.client.read(index * 8192, 4096);
    }
    let input = match rig.session.input() {
        crate::nbd::Input::Own(space) => {
            space[..64 * 28].copy_from_slice(&rig.client.outgoing);
            rig.client.outgoing.clear();
            64 * 28
        }
        other => panic!("{other:?}"),
    };
    rig.session.received(input, &mut rig.host);
    assert_eq!(rig.host.pending.len(), 64);
    while rig.answer() {}
    assert_eq!(rig.session.output().len(), 1, "one part holds all replies");
    assert_eq!(rig.run().len(), 64);
    rig.close();
}

#[test]
fn headers_are_refused_with_the_right_error() {
    let mut rig = Rig::connected(4, SIZE, 100, true);
    let table: [(u16, u16, u64, u32, u32); 12] = [
        (0, 0, SIZE, 512, 22),
        (0, 0, 0, 0, 22),
        (0, 0, 0, 100, 22),
        (0, 2, 0, 512, 22),
        (0, 0, 0, (32 << 20) + 512, 75),
        (1, 0, SIZE - 512, 1024, 28),
        (1, 0, u64::MAX - 511, 512, 28),
        (1, 8, 0, 5000, 22),
        (4, 0, SIZE, 4096, 22),
        (6, 0, SIZE, 4096, 28),
        (6, 2 | 16, 0, 4096, 95),
        (17, 0, 0, 512, 22),
    ];
    for (command, flags, offset, length, error) in table {
        let payload = vec![9; if command == 1 { length as usize } else { 0 }];
        rig.client.command(command, flags, offset, length, &payload);
        assert_eq!(one(&mut rig).error, error, "{command} {flags} {offset}+{length}");
    }
    rig.client.command(1, 0, 0, 33 << 20, &vec![1; 33 << 20]);
    assert_eq!(one(&mut rig).error, 75);
    assert!(rig.host.disk.iter().all(|byte| *byte == 0));
    rig.host.read_only = true;
    rig.close();

    let mut rig = Rig::new(4, SIZE, 100);
    rig.host.read_only = true;
    rig.client.connect(true);
    rig.settle();
    rig.client.take_handshake(true);
    for command in [1, 4, 6] {
        rig.client.command(command, 0, 0, 4096, &vec![9; if command == 1 { 4096 } else { 0 }]);
        assert_eq!(one(&mut rig).error, 1);
    }
    rig.close();
}

#[test]
fn trim_keeps_edges_and_zeroes_cover_them() {
    let mut rig = Rig::connected(5, SIZE, 3000, true);
    rig.host.refusal = 10;
    let (offset, length) = (512, 5 << 20);
    for (command, flags) in [(4, 0), (6, 0), (6, 16), (6, 2), (4, 1), (6, 1)] {
        rig.client.write(0, &pattern(0, 6 << 20));
        one(&mut rig);
        rig.client.command(command, flags, offset as u64, length as u32, &[]);
        assert_eq!(one(&mut rig).error, 0);
        let edges = if command == 4 { 4096..5 << 20 } else { offset..offset + length };
        assert!(rig.host.disk[edges.clone()].iter().all(|byte| *byte == 0));
        assert_eq!(rig.host.disk[..edges.start], pattern(0, edges.start));
        assert_eq!(rig.host.disk[edges.end..6 << 20], pattern(0, 6 << 20)[edges.end..]);
        let kept = rig.host.mapped[1..1280].iter().all(|mapped| *mapped);
        assert_eq!(kept, flags == 2, "command {command} flags {flags}");
        assert_eq!(rig.host.flush_count, usize::from(flags == 1), "a flush for each FUA");
        rig.host.flush_count = 0;
    }
    // A trim inside one block has nothing to do.
    rig.client.command(4, 0, 512, 1024, &[]);
    assert_eq!(one(&mut rig).error, 0);
    rig.close();
}

#[test]
fn a_large_trim_does_not_flood_the_ring() {
    let stripes = 300;
    let mut rig = Rig::connected(6, stripes << 21, 100, true);
    rig.client.command(4, 0, 0, (stripes << 21) as u32, &[]);
    rig.client.read(0, 4096);
    let mut most = 0;
    for _ in 0..50_000 {
        rig.step();
        rig.client.take_replies();
        most = most.max(rig.host.pending.len());
    }
    assert_eq!(rig.client.waiting(), 0);
    assert_eq!(most, BACKGROUND_PIECES_MAX + 1);
    rig.close();
}

#[test]
fn flush_and_fua_wait_for_the_host() {
    let mut rig = Rig::connected(7, SIZE, 100, true);
    rig.client.command(3, 0, 0, 0, &[]);
    assert_eq!(one(&mut rig).error, 0);
    rig.client.command(1, 1, 0, 4096, &[1; 4096]);
    assert_eq!(one(&mut rig).error, 0);
    assert_eq!(rig.host.flush_count, 2);
    rig.host.fail_flush = true;
    rig.client.command(3, 0, 0, 0, &[]);
    assert_eq!(one(&mut rig).error, 5);
    rig.client.command(1, 1, 0, 4096, &[1; 4096]);
    assert_eq!(one(&mut rig).error, 5);
    rig.host.fail_at = Some((0..4096, Outcome::NoSpace));
    rig.client.command(1, 1, 0, 4096, &[1; 4096]);
    assert_eq!(one(&mut rig).error, 28);
    assert_eq!(rig.host.flush_count, 4, "a failed write is not flushed");
    rig.close();
}

#[test]
fn one_failed_piece_fails_its_command_only() {
    for (structured, buffers) in [(false, 4000), (true, 4000), (true, 100)] {
        let mut rig = Rig::connected(8, SIZE, buffers, structured);
        rig.host.fail_at = Some(((3 << 20)..(3 << 20) + 4096, Outcome::Failed));
        for command in [0, 1, 4, 6] {
            let payload = vec![1; if command == 1 { 4 << 20 } else { 0 }];
            rig.client.command(command, 0, 1 << 20, 4 << 20, &payload);
            assert_eq!(one(&mut rig).error, 5, "command {command}");
            rig.client.read(0, 4096);
            assert_eq!(one(&mut rig).error, 0);
        }
        if structured {
            rig.client.command(0, 4, 1 << 20, 4 << 20, &[]);
            let reply = one(&mut rig);
            assert_eq!(reply.error, 5);
            assert!(!reply.data.contains(&0xbd), "a failed piece's bytes are not sent");
            rig.client.command(7, 0, 1 << 20, 4 << 20, &[]);
            assert_eq!(one(&mut rig).error, 5);
        }
        assert!(!rig.session.is_finished());
        rig.close();
    }
}

#[test]
fn a_simple_reply_that_fails_after_its_head_ends_the_connection() {
    let mut rig = Rig::connected(9, SIZE, 20, false);
    rig.host.fail_at = Some(((3 << 20)..(3 << 20) + 4096, Outcome::Failed));
    rig.client.read(1 << 20, 4 << 20);
    for _ in 0..100_000 {
        rig.step();
    }
    assert!(rig.session.is_finished());
    assert!(!rig.client.rest().is_empty() && !rig.client.rest().contains(&0xbd));
    rig.close();
}

#[test]
fn block_status_tells_extents() {
    let mut rig = Rig::connected(10, SIZE, 300, true);
    for (offset, length) in [(8192, 4096), (1 << 20, 2 << 20), (SIZE - 512, 512)] {
        rig.client.write(offset, &vec![1; length]);
        one(&mut rig);
    }
    rig.client.command(7, 0, 0, SIZE as u32, &[]);
    let (first, middle) = ((1 << 20) - 12288, (5 << 20) as u32);
    let expected = [(8192, 3), (4096, 0), (first, 3), (2 << 20, 0), (middle, 3), (1536, 0)];
    assert_eq!(one(&mut rig).extents, expected);
    rig.client.command(7, 8, 9 << 10, 1024, &[]);
    assert_eq!(one(&mut rig).extents, [(1024, 0)]);
    rig.client.command(7, 8, 512, 4 << 20, &[]);
    assert_eq!(one(&mut rig).extents, [(7680, 3)]);
    rig.client.command(7, 8, 3 << 20, 5 << 20, &[]);
    assert_eq!(one(&mut rig).extents, [(5 << 20, 3)]);
    rig.close();

    // Alternating blocks: more extents than one reply takes.
    let mut rig = Rig::connected(11, 80 << 20, 10, true);
    (0..20480).step_by(2).for_each(|block| rig.host.mapped[block] = true);
    rig.client.command(7, 0, 0, 80 << 20, &[]);
    let extents = one(&mut rig).extents;
    assert_eq!(extents.len(), 1024);
    assert!(extents.iter().all(|extent| extent.0 as usize == BLOCK_BYTES));
    rig.host.mapped.fill(true);
    rig.client.command(7, 0, 0, 80 << 20, &[]);
    assert_eq!(one(&mut rig).extents, [(80 << 20, 0)]);
    rig.close();
}

#[test]
fn shutdown_and_disconnect() {
    let mut rig = Rig::connected(12, SIZE, 100, true);
    rig.session.shutdown();
    rig.client.read(0, 512);
    assert_eq!(one(&mut rig).error, 108);
    rig.client.write(0, &[1; 1024]);
    assert_eq!(one(&mut rig).error, 108);
    rig.close();

    let mut rig = Rig::connected(13, SIZE, 100, true);
    for _ in 0..10 {
        rig.client.write(0, &[1; 65536]);
    }
    rig.client.command(2, 0, 0, 0, &[]);
    rig.client.read(0, 512);
    assert_eq!(rig.run().len(), 10, "what came before is answered, what came after is not");
    assert!(rig.session.is_finished());
    rig.close();
}

#[test]
fn more_commands_than_the_limit_wait_their_turn() {
    let mut rig = Rig::connected(14, SIZE, 50, false);
    rig.host.pending_max = 20;
    for index in 0..3000 {
        rig.client.read(index % 1000 * 4096, 4096);
        rig.client.write((1 << 22) + index % 100 * 512, &[index as u8; 512]);
    }
    assert_eq!(rig.run().len(), 6000);
    rig.close();
}

#[test]
fn a_full_ring_stops_the_input() {
    let mut rig = Rig::connected(16, SIZE, 3000, true);
    rig.host.pending_max = 0;
    rig.client.write(0, &[1; 4 << 20]);
    rig.client.read(0, 4096);
    for _ in 0..2000 {
        rig.step();
    }
    assert_eq!(rig.session.refused.len(), 1);
    assert_eq!(rig.session.in_flight(), 0);
    assert!(rig.session.is_starved() && matches!(rig.session.input(), crate::nbd::Input::Wait));
    rig.host.pending_max = 1;
    assert_eq!(rig.run().len(), 2);
    assert!(!rig.session.is_starved());
    rig.close();
}

/// A store that failed gives no memory back: the client's connection ends, with all buffers, and one that waits for
/// nothing is left alone.
#[test]
fn who_waits_for_what_will_not_come_is_let_go() {
    let mut rig = Rig::connected(18, SIZE, 4, true);
    rig.session.give_up();
    assert!(!rig.session.is_finished());
    rig.client.read(0, 64 << 10);
    rig.client.write(1 << 20, &[1; 64 << 10]);
    for _ in 0..2000 {
        rig.step();
        if rig.session.is_starved() {
            break;
        }
    }
    assert!(rig.session.is_starved());
    rig.session.give_up();
    assert!(rig.session.is_finished());
    rig.close();
}

#[test]
fn a_client_that_does_not_read_is_not_served_without_end() {
    let mut rig = Rig::connected(15, SIZE, 6000, true);
    for index in 0..1000 {
        rig.client.read(index % 60 * 65536, 65536);
        rig.client.read(0, 4096);
    }
    for _ in 0..100 {
        while !matches!(rig.session.input(), crate::nbd::Input::Wait)
            && !rig.client.outgoing.is_empty()
        {
            rig.receive_only();
        }
        while rig.answer() {}
    }
    assert!(!rig.client.outgoing.is_empty(), "input stops");
    assert!(rig.host.buffers_in_use() <= 4096);
    assert_eq!(rig.run().len(), 2000);
    rig.close();
}

#[test]
fn replies_nobody_reads_are_bounded() {
    let mut rig = Rig::connected(17, SIZE, 10, true);
    for _ in 0..40_000 {
        rig.client.read(SIZE, 512);
    }
    for _ in 0..100 {
        rig.receive_only();
    }
    assert!(!rig.client.outgoing.is_empty(), "input stops");
    assert_eq!(rig.run().len(), 40_000);
    rig.close();
}
