//! Step 4 of the flow, the device's half: the worker's reads, writes and flushes of the store through its io_uring.
//!
//! Invariants: an operation's buffers belong to the kernel until its completion; a short transfer is a failure, never
//! taken for success; metadata goes through buffers of its own, so that a full pool never holds up a record.

use std::collections::VecDeque;

use rdma_fallback::Span;
use twinpoint_core::contract::{IoFailure, IoToken};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, Checksum, DeviceBlock, ShardId};

use crate::buffers::{Arena, Pool};
use crate::uring::{Uring, UringError};

/// Buffers of each worker for metadata on its way.
pub(crate) const METADATA_BUFFERS: u32 = 512;
/// Most blocks of one metadata operation.
const METADATA_BLOCKS_MAX: u32 = 64;

/// Places in the io_uring that store operations leave to sockets, of which each worker has a bounded number: a socket's
/// operation always finds a place.
pub(crate) const SOCKET_PLACES: usize = 2048;

/// Who asked: a shard, or (none) the coordinator.
pub(crate) type Asker = Option<ShardId>;

/// How a piece of store work ended.
pub(crate) enum Ended {
    /// A write or flush.
    Done(Asker, IoToken, Result<(), IoFailure>),
    /// A data read, checked.
    Read(ShardId, IoToken, Result<(), IoFailure>),
    /// A metadata read.
    Metadata(ShardId, IoToken, Result<Vec<u8>, IoFailure>),
    /// The old contents for a fill, in this buffer, which the caller owns.
    Old(ShardId, IoToken, BufferId, Result<(), IoFailure>),
}

/// The worker's operations on the store.
pub(crate) struct StorePort {
    works: Vec<Option<Work>>,
    free: Vec<usize>,
    /// Pieces that wait for a place in the io_uring or for metadata buffers.
    waiting: VecDeque<(usize, Piece)>,
    metadata: Pool,
}

struct Work {
    kind: Kind,
    outstanding: u32,
    failed: bool,
}

enum Kind {
    Write(Asker, IoToken),
    Read { shard: ShardId, io: IoToken, buffer: BufferId, checksums: Vec<Checksum> },
    Old { shard: ShardId, io: IoToken, buffer: BufferId, checksum: Checksum },
    Metadata { shard: ShardId, io: IoToken, bytes: Vec<u8> },
}

/// One operation of the io_uring.
enum Piece {
    Write {
        offset: u64,
        spans: Vec<Span>,
    },
    Read {
        offset: u64,
        span: Span,
    },
    Flush,
    /// Metadata to write: the bytes, which are copied into buffers when there are some.
    MetadataWrite {
        block: DeviceBlock,
        bytes: Vec<u8>,
    },
    MetadataRead {
        block: DeviceBlock,
        at: usize,
        count: u32,
    },
}

/// What an operation under way needs at its end.
struct UnderWay {
    work: usize,
    length: u32,
    buffers: Option<(BufferId, u32)>,
    /// Of a metadata read: where its bytes go.
    at: Option<usize>,
}

/// Operations under way, by their number in the user data.
#[derive(Default)]
pub(crate) struct Operations {
    all: Vec<Option<UnderWay>>,
    free: Vec<usize>,
}

impl StorePort {
    /// A port whose metadata goes through these buffers.
    pub fn new(metadata_first: BufferId) -> StorePort {
        StorePort {
            works: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            metadata: Pool::new(metadata_first, METADATA_BUFFERS, 0),
        }
    }

    /// Whether nothing is asked for and unanswered.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.works.len()
    }

    pub fn write(&mut self, asker: Asker, io: IoToken, block: DeviceBlock, spans: Vec<Span>) {
        let work = self.begin(Kind::Write(asker, io));
        self.add(work, Piece::Write { offset: offset(block), spans });
    }

    pub fn write_metadata(&mut self, asker: Asker, io: IoToken, block: DeviceBlock, bytes: &[u8]) {
        assert!(bytes.len().is_multiple_of(BLOCK_BYTES), "{} bytes of metadata", bytes.len());
        let work = self.begin(Kind::Write(asker, io));
        let chunk_bytes = METADATA_BLOCKS_MAX as usize * BLOCK_BYTES;
        for (index, chunk) in bytes.chunks(chunk_bytes).enumerate() {
            let block = DeviceBlock(block.0 + index as u64 * u64::from(METADATA_BLOCKS_MAX));
            self.add(work, Piece::MetadataWrite { block, bytes: chunk.to_vec() });
        }
    }

    pub fn flush(&mut self, asker: Asker, io: IoToken) {
        let work = self.begin(Kind::Write(asker, io));
        self.add(work, Piece::Flush);
    }

    pub fn read(
        &mut self,
        arena: &Arena,
        shard: ShardId,
        io: IoToken,
        block: DeviceBlock,
        buffer: BufferId,
        checksums: Vec<Checksum>,
    ) {
        let count = u32::try_from(checksums.len()).expect("a read is short");
        let span = arena.span(buffer, count);
        let work = self.begin(Kind::Read { shard, io, buffer, checksums });
        self.add(work, Piece::Read { offset: offset(block), span });
    }

    /// Reads the old contents of a block into a buffer that the caller owns.
    pub fn read_old(
        &mut self,
        arena: &Arena,
        (shard, io): (ShardId, IoToken),
        block: DeviceBlock,
        buffer: BufferId,
        checksum: Checksum,
    ) {
        let span = arena.span(buffer, 1);
        let work = self.begin(Kind::Old { shard, io, buffer, checksum });
        self.add(work, Piece::Read { offset: offset(block), span });
    }

    pub fn read_metadata(&mut self, shard: ShardId, io: IoToken, block: DeviceBlock, count: u32) {
        let bytes = vec![0; count as usize * BLOCK_BYTES];
        let work = self.begin(Kind::Metadata { shard, io, bytes });
        for skip in (0..count).step_by(METADATA_BLOCKS_MAX as usize) {
            let piece = Piece::MetadataRead {
                block: DeviceBlock(block.0 + u64::from(skip)),
                at: skip as usize * BLOCK_BYTES,
                count: (count - skip).min(METADATA_BLOCKS_MAX),
            };
            self.add(work, piece);
        }
    }

    /// Hands waiting pieces to the io_uring as far as there is room. `user_data` makes the number of an operation
    /// recognisable.
    pub fn submit(
        &mut self,
        uring: &mut Uring,
        arena: &Arena,
        operations: &mut Operations,
        user_data: impl Fn(usize) -> u64,
    ) -> Result<(), UringError> {
        while uring.free() > SOCKET_PLACES {
            let Some((work, piece)) = self.waiting.pop_front() else { return Ok(()) };
            let Some((under_way, ready)) = self.prepare(arena, work, &piece) else {
                self.waiting.push_front((work, piece));
                return Ok(());
            };
            let id = user_data(operations.insert(under_way));
            match ready {
                Ready::Write(offset, spans) => uring.write_store(id, offset, spans)?,
                Ready::WriteOne(offset, span) => uring.write_store(id, offset, &[span])?,
                Ready::Read(offset, span) => uring.read_store(id, offset, span)?,
                Ready::Flush => uring.flush_store(id)?,
            }
        }
        Ok(())
    }

    /// An operation completed; tells if that ended the work it was part of.
    pub fn completed(
        &mut self,
        arena: &Arena,
        operations: &mut Operations,
        number: usize,
        result: i32,
    ) -> Option<Ended> {
        let under_way = operations.remove(number);
        let work =
            self.works[under_way.work].as_mut().expect("work lives until its last operation");
        let whole = u32::try_from(result).is_ok_and(|moved| moved == under_way.length);
        work.failed |= !whole;
        if let (Kind::Metadata { bytes, .. }, Some(at), Some((first, count))) =
            (&mut work.kind, under_way.at, under_way.buffers)
        {
            arena.copy_out(first, 0, &mut bytes[at..at + count as usize * BLOCK_BYTES]);
        }
        if let Some((first, count)) = under_way.buffers {
            self.metadata.free(first, count);
        }
        work.outstanding -= 1;
        if work.outstanding > 0 {
            return None;
        }
        let work = self.works[under_way.work].take().expect("it was just there");
        self.free.push(under_way.work);
        Some(end(arena, work))
    }

    fn prepare<'a>(
        &mut self,
        arena: &Arena,
        work: usize,
        piece: &'a Piece,
    ) -> Option<(UnderWay, Ready<'a>)> {
        let plain = |length| UnderWay { work, length, buffers: None, at: None };
        Some(match piece {
            Piece::Write { offset, spans } => {
                let length = spans.iter().map(|span| span.length).sum();
                (plain(length), Ready::Write(*offset, spans))
            }
            Piece::Read { offset, span } => (plain(span.length), Ready::Read(*offset, *span)),
            Piece::Flush => (plain(0), Ready::Flush),
            Piece::MetadataWrite { block, bytes } => {
                let count = u32::try_from(bytes.len() / BLOCK_BYTES).expect("a chunk is short");
                let (first, count) = self.metadata_buffers(count)?;
                arena.copy_in(first, 0, bytes);
                let span = arena.span(first, count);
                let under_way =
                    UnderWay { work, length: span.length, buffers: Some((first, count)), at: None };
                (under_way, Ready::WriteOne(offset(*block), span))
            }
            Piece::MetadataRead { block, at, count } => {
                let (first, count) = self.metadata_buffers(*count)?;
                let span = arena.span(first, count);
                let buffers = Some((first, count));
                let under_way = UnderWay { work, length: span.length, buffers, at: Some(*at) };
                (under_way, Ready::Read(offset(*block), span))
            }
        })
    }

    /// Consecutive metadata buffers, all or none.
    fn metadata_buffers(&mut self, count: u32) -> Option<(BufferId, u32)> {
        let (first, got) = self.metadata.allocate(count)?;
        if got < count {
            self.metadata.free(first, got);
            return None;
        }
        Some((first, got))
    }

    fn begin(&mut self, kind: Kind) -> usize {
        let work = Work { kind, outstanding: 0, failed: false };
        match self.free.pop() {
            Some(index) => {
                self.works[index] = Some(work);
                index
            }
            None => {
                self.works.push(Some(work));
                self.works.len() - 1
            }
        }
    }

    fn add(&mut self, work: usize, piece: Piece) {
        self.works[work].as_mut().expect("it was just begun").outstanding += 1;
        self.waiting.push_back((work, piece));
    }
}

enum Ready<'a> {
    Write(u64, &'a [Span]),
    WriteOne(u64, Span),
    Read(u64, Span),
    Flush,
}

fn end(arena: &Arena, work: Work) -> Ended {
    let result = if work.failed { Err(IoFailure::Device) } else { Ok(()) };
    match work.kind {
        Kind::Write(asker, io) => Ended::Done(asker, io, result),
        Kind::Read { shard, io, buffer, checksums } => {
            let result = result.and_then(|()| check(arena, buffer, &checksums));
            Ended::Read(shard, io, result)
        }
        Kind::Old { shard, io, buffer, checksum } => {
            let result = result.and_then(|()| check(arena, buffer, &[checksum]));
            Ended::Old(shard, io, buffer, result)
        }
        Kind::Metadata { shard, io, bytes } => Ended::Metadata(shard, io, result.map(|()| bytes)),
    }
}

/// Compares buffers with their checksums.
pub(crate) fn check(
    arena: &Arena,
    first: BufferId,
    checksums: &[Checksum],
) -> Result<(), IoFailure> {
    match arena.verify(first, checksums) {
        None => Ok(()),
        Some(_) => Err(IoFailure::Checksum),
    }
}

fn offset(block: DeviceBlock) -> u64 {
    block.0 * BLOCK_BYTES as u64
}

impl Operations {
    fn insert(&mut self, under_way: UnderWay) -> usize {
        match self.free.pop() {
            Some(index) => {
                self.all[index] = Some(under_way);
                index
            }
            None => {
                self.all.push(Some(under_way));
                self.all.len() - 1
            }
        }
    }

    fn remove(&mut self, number: usize) -> UnderWay {
        self.free.push(number);
        self.all[number].take().expect("an operation completes once")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::uring::{Completion, UringOptions, Wait};

    const BUFFERS: u32 = 64;

    struct Rig {
        arena: Arena,
        uring: Uring,
        store: StorePort,
        operations: Operations,
        _file: std::fs::File,
    }

    impl Rig {
        fn new(blocks: u64) -> Rig {
            let directory = std::env::current_exe().expect("a test runs");
            let directory = directory.parent().expect("it lies in a folder");
            let file = tempfile::NamedTempFile::new_in(directory).expect("a file beside the test");
            file.as_file().set_len(blocks * BLOCK_BYTES as u64).expect("room");
            let file =
                OpenOptions::new().read(true).write(true).open(file.path()).expect("it is there");
            let arena =
                Arena::new((BUFFERS + METADATA_BUFFERS) as usize * BLOCK_BYTES).expect("memory");
            let mut uring = Uring::new(UringOptions::default()).expect("io_uring");
            uring.register_arena(&arena).expect("memory may be locked");
            uring.register_files(&[file.as_raw_fd()]).expect("a file");
            let store = StorePort::new(BufferId(BUFFERS));
            Rig { arena, uring, store, operations: Operations::default(), _file: file }
        }

        fn next(&mut self) -> Ended {
            loop {
                self.store
                    .submit(&mut self.uring, &self.arena, &mut self.operations, |n| n as u64)
                    .expect("the ring works");
                self.uring
                    .submit_and_wait(Wait::For(std::time::Duration::from_secs(5)))
                    .expect("it works");
                let mut completions: Vec<Completion> = Vec::new();
                self.uring.reap(&mut completions);
                for completion in completions {
                    let number = completion.user_data as usize;
                    let ended = self.store.completed(
                        &self.arena,
                        &mut self.operations,
                        number,
                        completion.result,
                    );
                    if let Some(ended) = ended {
                        return ended;
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_written_is_read_and_a_wrong_checksum_is_found() {
        let mut rig = Rig::new(64);
        let shard = ShardId(0);
        for buffer in 0..4 {
            rig.arena.copy_in(BufferId(buffer), 0, &[buffer as u8 + 1; BLOCK_BYTES]);
        }
        rig.arena.checksum_compute(BufferId(0), 4);
        let checksums: Vec<Checksum> =
            (0..4).map(|buffer| rig.arena.checksum(BufferId(buffer))).collect();
        let spans = vec![rig.arena.span(BufferId(0), 4)];
        rig.store.write(Some(shard), IoToken(1), DeviceBlock(8), spans);
        assert!(matches!(rig.next(), Ended::Done(Some(_), IoToken(1), Ok(()))));
        rig.store.flush(None, IoToken(2));
        assert!(matches!(rig.next(), Ended::Done(None, IoToken(2), Ok(()))));
        rig.store.read(
            &rig.arena,
            shard,
            IoToken(3),
            DeviceBlock(8),
            BufferId(16),
            checksums.clone(),
        );
        assert!(matches!(rig.next(), Ended::Read(_, IoToken(3), Ok(()))));
        rig.store.read(&rig.arena, shard, IoToken(4), DeviceBlock(9), BufferId(16), checksums);
        assert!(matches!(rig.next(), Ended::Read(_, IoToken(4), Err(IoFailure::Checksum))));
        assert!(rig.store.is_idle());
    }

    #[test]
    fn long_metadata_goes_in_pieces_and_comes_back_whole() {
        let mut rig = Rig::new(1024);
        let bytes: Vec<u8> = (0..700 * BLOCK_BYTES).map(|index| (index / 977) as u8).collect();
        rig.store.write_metadata(Some(ShardId(1)), IoToken(1), DeviceBlock(100), &bytes);
        assert!(matches!(rig.next(), Ended::Done(Some(ShardId(1)), IoToken(1), Ok(()))));
        rig.store.read_metadata(ShardId(1), IoToken(2), DeviceBlock(100), 700);
        match rig.next() {
            Ended::Metadata(ShardId(1), IoToken(2), Ok(read)) => assert!(read == bytes),
            _ => panic!("a metadata read ends as one"),
        }
    }

    #[test]
    fn a_short_transfer_is_a_failure() {
        let mut rig = Rig::new(4);
        rig.store.read_metadata(ShardId(0), IoToken(1), DeviceBlock(3), 2);
        assert!(matches!(rig.next(), Ended::Metadata(_, IoToken(1), Err(IoFailure::Device))));
    }
}
