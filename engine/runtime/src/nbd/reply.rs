//! The bytes of replies in the transmission phase.
//!
//! Invariants: a reply or chunk is written at once, except the data after [`begin_data`], which the caller owes.

use super::output::Batch;
use super::protocol::{
    CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CHUNK_MAGIC, CHUNK_NONE, CHUNK_OFFSET_DATA,
    CONTEXT_ALLOCATION_ID, ErrorNumber, SIMPLE_REPLY_MAGIC,
};

/// A reply without chunks. The data of a read without error follows.
pub(super) fn simple(batch: &mut Batch, cookie: u64, error: Option<ErrorNumber>) {
    let mut bytes = [0; 16];
    bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, |e| e as u32).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    batch.put(&bytes);
}

/// The last chunk of a failed command.
pub(super) fn error_chunk(batch: &mut Batch, cookie: u64, error: ErrorNumber) {
    chunk(batch, CHUNK_DONE, CHUNK_ERROR, cookie, 6);
    batch.put(&(error as u32).to_be_bytes());
    batch.put(&0u16.to_be_bytes());
}

/// The last chunk after data whose chunk could not say that it is the last.
pub(super) fn end_chunk(batch: &mut Batch, cookie: u64) {
    chunk(batch, CHUNK_DONE, CHUNK_NONE, cookie, 0);
}

/// The head of a data chunk. `length` bytes of data follow.
pub(super) fn begin_data(batch: &mut Batch, cookie: u64, offset: u64, length: u32, done: bool) {
    chunk(batch, if done { CHUNK_DONE } else { 0 }, CHUNK_OFFSET_DATA, cookie, length + 8);
    batch.put(&offset.to_be_bytes());
}

/// The answer to a block status command: lengths in bytes and flags.
pub(super) fn block_status(batch: &mut Batch, cookie: u64, extents: &[(u32, u32)]) {
    let payload = 4 + 8 * extents.len();
    let length = u32::try_from(payload).expect("extents are bounded");
    chunk(batch, CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, length);
    let (context, rest) = batch.room(payload).split_at_mut(4);
    context.copy_from_slice(&CONTEXT_ALLOCATION_ID.to_be_bytes());
    for (bytes, (length, flags)) in rest.chunks_exact_mut(8).zip(extents) {
        bytes[0..4].copy_from_slice(&length.to_be_bytes());
        bytes[4..8].copy_from_slice(&flags.to_be_bytes());
    }
}

fn chunk(batch: &mut Batch, flags: u16, kind: u16, cookie: u64, length: u32) {
    let mut bytes = [0; 20];
    bytes[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..20].copy_from_slice(&length.to_be_bytes());
    batch.put(&bytes);
}
