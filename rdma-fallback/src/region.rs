//! Region: the memory that the device, the wire and the frontends share, so that a block is never copied between them.
//!
//! It is the ground under steps 2, 4 and 6 of the flow: staged blocks wait here, leave from here, arrive here. This is
//! the only file with `unsafe` outside of `rdma/`; it also holds the vectored socket calls, whose pointers lead here.
//!
//! Invariants:
//! - The mapping is page-aligned, zero-filled at first, never moves, and lives as long as the `Region`.
//! - A span has exactly one owner at a time, who alone reads or writes it. The arena's buffer ids see to that; a
//!   hand-over goes through a ring, the kernel or a lock, which orders memory. This file cannot check it.
//! - Every access is asserted to lie inside the region.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// The region's length is a multiple of this, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Most memory areas in one system call.
const VECTORS_MAX: usize = 256;
/// Most bytes offered to one send: bounds the work of one call, also on a socket with a huge buffer.
const GATHER_BYTES_MAX: usize = 1 << 20;

/// A run of bytes inside a region, or inside the part of it that was lent to the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Span {
    /// First byte, counted from the start of the region or of the lent span.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Span {
    /// The span of `length` bytes at `offset`.
    #[must_use]
    pub fn new(offset: u64, length: u32) -> Span {
        Span { offset, length }
    }

    /// The offset after the last byte; the largest number if it would overflow.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset.saturating_add(u64::from(self.length))
    }
}

/// Anonymous page-aligned memory, shared as `Arc<Region>`. See the file's head for who may touch what.
pub struct Region {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; the pointer is valid from any thread until drop.
unsafe impl Send for Region {}
// SAFETY: shared access goes through spans, each with one owner at a time (the file's head), so that no two threads
// touch the same bytes without an ordering hand-over between them.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes` of zeros, rounded up to whole pages; pages are given by the kernel at first touch.
    ///
    /// # Errors
    /// `InvalidInput` for 0 bytes or a number that rounding overflows; else what mmap says.
    pub fn new(bytes: usize) -> io::Result<Region> {
        Region::map(bytes, 0)
    }

    /// As [`Region::new`], with every page present at once: slower to make, no page fault later.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn new_prefaulted(bytes: usize) -> io::Result<Region> {
        Region::map(bytes, libc::MAP_POPULATE)
    }

    fn map(bytes: usize, flags: libc::c_int) -> io::Result<Region> {
        let bytes = bytes.checked_next_multiple_of(PAGE_BYTES).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap never answers address 0 unless asked to");
        Ok(Region { base, bytes })
    }

    /// Bytes in the region: what was asked for, rounded up to whole pages.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The first byte, for registration with the kernel or a network card.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Whether the whole of `span` lies inside the region.
    #[must_use]
    pub fn contains(&self, span: Span) -> bool {
        span.offset
            .checked_add(u64::from(span.length))
            .is_some_and(|end| usize::try_from(end).is_ok_and(|end| end <= self.bytes))
    }

    /// Copies `bytes` into the region at `offset`. The caller owns that span.
    ///
    /// # Panics
    /// If the span is not inside the region.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: `at` checked the target's bounds; the caller owns the span, so `bytes`, a live borrow, is elsewhere.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Copies from the region at `offset` into all of `bytes`. The caller owns that span.
    ///
    /// # Panics
    /// If the span is not inside the region.
    pub fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        let source = self.at(offset, bytes.len());
        // SAFETY: `at` checked the source's bounds; the caller owns the span, so `bytes`, a live borrow, is elsewhere.
        unsafe { ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies `source` of this region to `offset` of `target`, which may be this region too. The caller owns both.
    ///
    /// # Panics
    /// If either span is not inside its region.
    pub fn copy_to(&self, source: Span, target: &Region, offset: u64) {
        let bytes = source.length as usize;
        let from = self.at(source.offset, bytes);
        let to = target.at(offset, bytes);
        // SAFETY: both bounds were checked by `at`; `copy` allows an overlap.
        unsafe { ptr::copy(from, to, bytes) }
    }

    /// Makes `span` zeros. The caller owns it.
    ///
    /// # Panics
    /// If the span is not inside the region.
    pub fn fill_zero(&self, span: Span) {
        let target = self.at(span.offset, span.length as usize);
        // SAFETY: `at` checked the bounds; zero is a valid byte; the caller owns the span.
        unsafe { ptr::write_bytes(target, 0, span.length as usize) }
    }

    /// The bytes of `span`, in place.
    ///
    /// # Safety
    /// The caller owns the span, or shares it with readers only, for as long as the slice lives.
    ///
    /// # Panics
    /// If the span is not inside the region.
    #[must_use]
    pub unsafe fn slice(&self, span: Span) -> &[u8] {
        let base = self.at(span.offset, span.length as usize);
        // SAFETY: bounds checked by `at`; initialised, as mmap gives zeros; no writer, as the caller promises.
        unsafe { std::slice::from_raw_parts(base, span.length as usize) }
    }

    /// The bytes of `span`, in place, to be changed.
    ///
    /// # Safety
    /// The caller owns the span, and nobody else reads or writes it, for as long as the slice lives.
    ///
    /// # Panics
    /// If the span is not inside the region.
    #[must_use]
    #[expect(
        clippy::mut_from_ref,
        reason = "spans have one owner each; the region itself is shared"
    )]
    pub unsafe fn slice_mut(&self, span: Span) -> &mut [u8] {
        let base = self.at(span.offset, span.length as usize);
        // SAFETY: bounds checked by `at`; initialised, as mmap gives zeros; exclusive, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(base, span.length as usize) }
    }

    /// Reads from `socket` into `span` and, what comes after it, into `overflow`. Returns the sum; 0 is the end.
    pub(crate) fn receive(
        &self,
        socket: BorrowedFd<'_>,
        span: Span,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        let base = self.at(span.offset, span.length as usize);
        let vectors =
            [vector(base, span.length as usize), vector(overflow.as_mut_ptr(), overflow.len())];
        let skip = usize::from(span.length == 0);
        let count = (vectors.len() - skip) as libc::c_int;
        // SAFETY: the vectors are `span`, checked by `at` and owned by the caller, and `overflow`, a live unique
        // borrow; `skip` is 0 or 1, so the pointer stays in the array. The kernel writes inside them only.
        let got = unsafe { libc::readv(socket.as_raw_fd(), vectors.as_ptr().add(skip), count) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    fn at(&self, offset: u64, bytes: usize) -> *mut u8 {
        let inside = usize::try_from(offset)
            .is_ok_and(|offset| offset.checked_add(bytes).is_some_and(|end| end <= self.bytes));
        assert!(inside, "{bytes} bytes at {offset} exceed the region of {} bytes", self.bytes);
        // SAFETY: just asserted that the offset is at most the mapping's length.
        unsafe { self.base.as_ptr().add(offset as usize) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made by `map`, unmapped once; no borrow outlives the region.
        let answer = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        assert!(answer == 0, "munmap refused the region's own mapping");
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("bytes", &self.bytes).finish()
    }
}

/// The bytes of one send: parts of borrowed buffers and of one region, in order, without a copy.
pub(crate) struct Gather<'a> {
    region: &'a Region,
    vectors: [libc::iovec; VECTORS_MAX],
    count: usize,
    bytes: usize,
    borrowed: PhantomData<&'a [u8]>,
}

impl<'a> Gather<'a> {
    pub(crate) fn new(region: &'a Region) -> Gather<'a> {
        let vectors = [vector(ptr::null_mut(), 0); VECTORS_MAX];
        Gather { region, vectors, count: 0, bytes: 0, borrowed: PhantomData }
    }

    /// Adds a buffer. Says whether all of it went in: if not, the gather is full.
    pub(crate) fn add_bytes(&mut self, bytes: &'a [u8]) -> bool {
        self.add(bytes.as_ptr().cast_mut(), bytes.len())
    }

    /// Adds a span of the region. Says whether all of it went in: if not, the gather is full.
    pub(crate) fn add_span(&mut self, span: Span) -> bool {
        self.add(self.region.at(span.offset, span.length as usize), span.length as usize)
    }

    /// Sends a prefix of what was added, as long as the socket takes now. Returns its bytes.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: msghdr is plain numbers and pointers, for which zeros are valid: no address, no control data.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = self.vectors.as_ptr().cast_mut();
        header.msg_iovlen = self.count;
        // SAFETY: each vector is a borrow alive for 'a or a checked span of the region alive for 'a; the kernel
        // only reads them, and reads `header` and the array during the call only.
        let sent = unsafe {
            libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn add(&mut self, base: *mut u8, bytes: usize) -> bool {
        let taken = bytes.min(GATHER_BYTES_MAX - self.bytes);
        if taken == 0 {
            return bytes == 0;
        }
        let last = self.count.checked_sub(1).map(|last| &mut self.vectors[last]);
        match last {
            // Neighbours become one vector: a run of blocks costs the kernel one entry.
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == base.cast() => {
                last.iov_len += taken;
            }
            _ if self.count == VECTORS_MAX => return false,
            _ => {
                self.vectors[self.count] = vector(base, taken);
                self.count += 1;
            }
        }
        self.bytes += taken;
        taken == bytes
    }
}

fn vector(base: *mut u8, bytes: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: bytes }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
    use std::os::unix::net::UnixStream;

    /// Watches one descriptor edge-triggered, the strictest way: a missed edge is never told again. It is here, and
    /// not with the tests that use it, because this is the file with `unsafe`.
    pub(crate) struct EdgeWatch(OwnedFd);

    impl EdgeWatch {
        pub(crate) fn new(descriptor: RawFd) -> EdgeWatch {
            EdgeWatch::of(descriptor, libc::EPOLLIN | libc::EPOLLOUT)
        }

        pub(crate) fn of_reading(descriptor: RawFd) -> EdgeWatch {
            EdgeWatch::of(descriptor, libc::EPOLLIN)
        }

        fn of(descriptor: RawFd, interest: libc::c_int) -> EdgeWatch {
            // SAFETY: no pointers; the answer is checked before it is owned.
            let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
            assert!(epoll >= 0);
            // SAFETY: a descriptor just made and owned by nobody else.
            let watch = EdgeWatch(unsafe { OwnedFd::from_raw_fd(epoll) });
            let events = (interest | libc::EPOLLET) as u32;
            let mut event = libc::epoll_event { events, u64: 0 };
            // SAFETY: `event` is alive during the call, which only reads it.
            let answer =
                unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, descriptor, &mut event) };
            assert_eq!(answer, 0);
            watch
        }

        /// Waits for an edge. Says whether one came in time.
        pub(crate) fn wait(&self, limit_ms: i32) -> bool {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one event, which is what the call is told.
            unsafe { libc::epoll_wait(self.0.as_raw_fd(), &mut event, 1, limit_ms) == 1 }
        }
    }

    #[test]
    fn is_rounded_zeroed_and_aligned() {
        for region in [Region::new(5000).unwrap(), Region::new_prefaulted(8192).unwrap()] {
            assert_eq!(region.len(), 8192);
            assert_eq!(region.base() as usize % PAGE_BYTES, 0);
            let mut bytes = vec![1; 8192];
            region.copy_out(0, &mut bytes);
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        assert!(Region::new(0).is_err());
        assert!(Region::new(usize::MAX).is_err());
    }

    #[test]
    fn copies_reach_exactly_their_span() {
        let region = Region::new(4096).unwrap();
        region.copy_in(10, &[7; 20]);
        region.fill_zero(Span::new(15, 5));
        let other = Region::new(4096).unwrap();
        region.copy_to(Span::new(9, 22), &other, 4096 - 22);
        let mut bytes = [9; 22];
        other.copy_out(4096 - 22, &mut bytes);
        let expected = [vec![0], vec![7; 5], vec![0; 5], vec![7; 10], vec![0]].concat();
        assert_eq!(bytes.as_slice(), expected);
        // SAFETY: this test is the only owner of the region.
        let slice = unsafe { region.slice_mut(Span::new(0, 4096)) };
        slice[4095] = 3;
        // SAFETY: as above; the slice before is no longer used.
        assert_eq!(unsafe { region.slice(Span::new(4095, 1)) }, [3]);
    }

    #[test]
    fn outside_is_refused() {
        let region = Region::new(4096).unwrap();
        assert!(region.contains(Span::new(0, 4096)));
        assert!(region.contains(Span::new(4096, 0)));
        assert!(!region.contains(Span::new(1, 4096)));
        assert!(!region.contains(Span::new(u64::MAX, 2)));
        for offset in [4096, u64::MAX, u64::MAX - 1] {
            let attempt = || region.copy_in(offset, &[0, 0]);
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err());
        }
    }

    #[test]
    fn gather_keeps_order_merges_neighbours_and_stops_when_full() {
        let region = Region::new(4096).unwrap();
        region.copy_in(0, b"abcdef");
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut gather = Gather::new(&region);
        assert!(gather.add_bytes(b"<"));
        assert!(gather.add_span(Span::new(0, 2)));
        assert!(gather.add_span(Span::new(2, 1)));
        assert!(gather.add_span(Span::new(5, 1)));
        assert!(gather.add_bytes(b""));
        assert!(gather.add_bytes(b">"));
        assert_eq!(gather.count, 4);
        assert_eq!(gather.send(near.as_fd()).unwrap(), 6);
        let mut got = [0; 6];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"<abcf>");

        let mut full = Gather::new(&region);
        for index in 0..VECTORS_MAX {
            assert!(full.add_span(Span::new(index as u64 * 2, 1)));
        }
        assert!(!full.add_span(Span::new(4000, 1)));
        let big = vec![0; GATHER_BYTES_MAX + 1];
        let mut full = Gather::new(&region);
        assert!(!full.add_bytes(&big));
        assert_eq!(full.bytes, GATHER_BYTES_MAX);
    }
}
