//! Conformance: the same test bodies over what is simulated and what is real, so that the simulator does not drift
//! from the world.
//!
//! | what | bodies | arms |
//! |---|---|---|
//! | the device, as `contract.rs` lets the core rely on it | `device.rs` | simulated disk; file; NVMe commands (lab) |
//! | a lane's wire, as `contract.rs` lets the core rely on it | `lane.rs` | simulated wire; memory, TCP |
//!
//! The simulated disk and wire are compiled into this test from their own files: they are private to the simulator.
#![expect(clippy::unwrap_used, reason = "a test's failure is a panic, in its helpers too")]

#[path = "../../src/buffers.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod buffers;
#[path = "../../src/wire/connections.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod connections;
#[path = "../../src/content.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod content;
#[path = "../../src/disk.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod disk;
#[path = "../../src/wire/event.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod event;
#[path = "../../src/random.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod random;

mod device;
mod lane;
mod real_device;
mod sim_device;
mod sim_wire;
mod wires;

/// Each body over each arm, as tests of their own.
macro_rules! conformance {
    ($bodies:ident over $($arm:ident: $make:path),+ => $tests:tt) => {
        $(conformance!(@arm $bodies, $arm, $make, $tests);)+
    };
    (@arm $bodies:ident, $arm:ident, $make:path, { $($test:ident)* }) => {
        mod $arm {
            $(#[test] fn $test() { crate::$bodies::$test($make); })*
        }
    };
}

conformance!(device over simulated_disk: crate::sim_device::make, file: crate::real_device::make => {
    reads_see_answered_writes
    the_last_answered_write_wins
    buffers_land_in_order
    other_blocks_stay
    a_block_never_written_reads_as_zeroes
    answered_writes_outlive_the_process
    writes_under_way_at_a_kill_are_old_or_new
    a_flush_keeps_what_was_answered_before_it
    histories_follow_a_model
});

// In a guest of the lab, one at a time: they overwrite the namespace that TWINPOINT_NVME names.
macro_rules! conformance_in_lab {
    ($($arm:ident: $make:path),+ => $tests:tt) => {
        $(conformance_in_lab!(@arm $arm, $make, $tests);)+
    };
    (@arm $arm:ident, $make:path, { $($test:ident)* }) => {
        mod $arm {
            $(
                #[test]
                #[ignore = "needs an NVMe namespace, see docs/LAB.md"]
                fn $test() { crate::device::$test($make); }
            )*
        }
    };
}

conformance_in_lab!(passthrough: crate::real_device::make_passthrough, polled: crate::real_device::make_polled => {
    reads_see_answered_writes
    the_last_answered_write_wins
    buffers_land_in_order
    other_blocks_stay
    a_block_never_written_reads_as_zeroes
    answered_writes_outlive_the_process
    writes_under_way_at_a_kill_are_old_or_new
    a_flush_keeps_what_was_answered_before_it
    histories_follow_a_model
});

conformance!(lane over
    simulated_wire: crate::sim_wire::make, memory: crate::wires::memory, tcp: crate::wires::tcp
=> {
    messages_come_in_order_and_once
    bytes_are_placed_before_their_message
    other_lent_blocks_stay
    each_side_places_in_the_other_ones_memory
    posts_are_answered_once_and_in_order
    posts_for_a_peer_that_left_are_answered_in_order
    nothing_comes_after_the_loss
    the_loss_is_told_once_at_each_side
    posts_are_over_at_the_loss
    a_broken_message_ends_the_lane
    a_late_message_never_enters_a_new_session
});

// The shell queues what a full wire does not take, so that the core and the simulated wire know of no bound.
conformance!(lane over
    bounded_memory: crate::wires::memory, bounded_tcp: crate::wires::tcp
=> {
    a_full_lane_takes_more_later
});
