//! Conformance: the same test bodies over what is simulated and what is real, so that the simulator does not drift
//! from the world.
//!
//! | what | bodies | arms |
//! |---|---|---|
//! | the device, as `contract.rs` lets the core rely on it | `device.rs` | simulated disk; file through io_uring |
//! | a lane's wire, as `contract.rs` lets the core rely on it | `lane.rs` | memory, TCP |
//!
//! The simulated disk is compiled into this test from its own files: it is private to the simulator.
#![expect(clippy::unwrap_used, reason = "a test's failure is a panic, in its helpers too")]

#[path = "../../src/content.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod content;
#[path = "../../src/disk.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod disk;
#[path = "../../src/random.rs"]
#[allow(dead_code, reason = "the simulator uses the rest")]
mod random;

mod device;
mod lane;
mod real_device;
mod sim_device;
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

conformance!(lane over memory: crate::wires::memory, tcp: crate::wires::tcp => {
    messages_come_in_order_and_once
    bytes_are_placed_before_their_message
    posts_are_answered_once_and_in_order
    a_full_lane_takes_more_later
    nothing_comes_after_the_loss
    posts_are_over_at_the_loss
    a_late_message_never_enters_a_new_session
});
