//! What a session asks of the thread that runs it.
//!
//! Invariants: a buffer given by [`Host::allocate`] belongs to the session until it is freed, or submitted with a
//! write (then the shard has it, whatever the answer). A read's buffers stay the session's.

use twinpoint_core::request::{Request, Tag};
use twinpoint_core::units::{BufferId, VolumeId};

/// The thread under a session: memory, rings, flushes, and the list of volumes.
pub trait Host {
    /// Gives 1 to `want` consecutive 4 KiB buffers, and how many; `None` when there is no memory now. The session
    /// then waits for [`super::NbdSession::resume`].
    fn allocate(&mut self, want: u32) -> Option<(BufferId, u32)>;

    /// Takes back `count` consecutive buffers.
    fn free(&mut self, first: BufferId, count: u32);

    /// Copies `bytes` into consecutive buffers, `offset` bytes after the start of the first.
    fn copy_in(&mut self, first: BufferId, offset: usize, bytes: &[u8]);

    /// Copies out of consecutive buffers, from `offset` bytes after the start of the first.
    fn copy_out(&self, first: BufferId, offset: usize, bytes: &mut [u8]);

    /// Zeroes `length` bytes of consecutive buffers, from `offset` bytes after the start of the first.
    fn zero(&mut self, first: BufferId, offset: usize, length: usize);

    /// Computes the checksums of whole blocks. Called once for each write request, when all its bytes are there.
    fn checksum(&mut self, first: BufferId, count: u32);

    /// Stamps the request and gives it to the shard that owns its blocks.
    ///
    /// # Errors
    /// The request itself when the shard's ring is full; the session tries again at
    /// [`super::NbdSession::resume`] or earlier.
    fn submit(&mut self, request: Request) -> Result<(), Request>;

    /// Asks that everything answered so far becomes durable (R5). Answered by [`super::NbdSession::flushed`].
    fn flush(&mut self, tag: Tag);

    /// Opens an export and counts one use of its volume. The name "" is the only volume, if there is just one.
    fn open_export(&mut self, name: &str) -> Option<Export>;

    /// The names of all exports.
    fn list_exports(&self) -> Vec<String>;

    /// Ends one use of a volume.
    fn close_export(&mut self, volume: VolumeId);
}

/// A volume as offered to clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Export {
    /// Which volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}
