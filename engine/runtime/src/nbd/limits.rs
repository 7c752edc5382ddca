//! Every bound of a session, with its reason.

use twinpoint_core::units::{BLOCK_BYTES, REQUEST_BLOCKS_MAX};

/// Commands of one client under way. The common clients keep at most 128.
pub const COMMANDS_MAX: usize = 1024;
/// Pieces of commands under way: enough that 1024 small commands never wait for a few large ones.
pub const PIECES_MAX: usize = 4096;
/// Largest payload of a read or write, as advertised: what the common clients assume at most.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Largest data of one option; a longer one is skipped unread.
pub const OPTION_BYTES_MAX: usize = 64 << 10;
/// Longest name of an export, from the protocol.
pub const NAME_BYTES_MAX: usize = 4096;
/// The own input buffer: one receive brings 60 writes of 4 KiB, or one whole option.
pub const INPUT_BYTES: usize = 256 << 10;
/// How much the own input buffer takes while large writes come, so that their payload is not copied.
pub const INPUT_BYTES_LARGE: usize = 4 << 10;
/// A write of this many bytes or more is a large one.
pub const LARGE_WRITE_BYTES: u64 = 64 << 10;
/// Payload still to come from which it is received straight into buffers: below, one more receive costs more than
/// the copy.
pub const DIRECT_BYTES_MIN: usize = 8 << 10;
/// Own output bytes that may wait to be sent before no more commands are taken: 64 reads of 4 KiB with room to spare.
pub const OUTPUT_BYTES_MAX: usize = 512 << 10;
/// Largest read piece that is copied to the own output, so that replies share a send.
pub const COPY_BYTES_MAX: usize = 16 << 10;
/// Most parts of one send; the kernel takes 1024.
pub const OUTPUT_PARTS_MAX: usize = 64;
/// Buffers that the reads of one session may hold (16 MiB), so that one client cannot take the arena.
pub const READ_BLOCKS_MAX: u32 = 4096;
/// Buffers that one read gathers before its reply must begin (8 MiB).
pub const GATHER_BLOCKS_MAX: u32 = 2048;
/// Unmaps and writes of zeroes under way in one session, so that a large trim never floods the rings.
pub const BACKGROUND_PIECES_MAX: usize = 64;
/// Status requests under way for one command.
pub const STATUS_BATCH: usize = 16;
/// Most extents of one block status reply; the client asks again for the rest.
pub const EXTENTS_MAX: usize = 1024;

const _: () = assert!(INPUT_BYTES >= 2 * OPTION_BYTES_MAX);
const _: () = assert!(INPUT_BYTES_LARGE <= DIRECT_BYTES_MIN);
const _: () = assert!(COPY_BYTES_MAX <= OUTPUT_BYTES_MAX);
const _: () =
    assert!(GATHER_BLOCKS_MAX >= REQUEST_BLOCKS_MAX && GATHER_BLOCKS_MAX <= READ_BLOCKS_MAX);
const _: () = assert!((PAYLOAD_BYTES_MAX as usize).is_multiple_of(BLOCK_BYTES));
// A slab has 16-bit indices; a stream recycles at most one piece for each buffer beyond PIECES_MAX.
const _: () = assert!(PIECES_MAX + READ_BLOCKS_MAX as usize + COMMANDS_MAX < 1 << 16);
