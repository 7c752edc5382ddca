//! A worker's one io_uring: the store's reads, writes and flushes, sockets, wake-ups and timeouts (steps 1, 4 and 6
//! of the flow).
//!
//! ```text
//!   operation(user_data, ..) -> slot -> submission queue -> kernel -> completion queue -> reap: user_data, result
//! ```
//!
//! Invariants:
//! - Every operation holds a slot from its call until its last completion was reaped. What the kernel reads besides
//!   the user's data (iovecs, message headers, times) lies in the slot and does not move.
//! - The bytes of an operation belong to the kernel until its last completion: their owner neither touches nor
//!   frees them. The arena itself cannot go away: the ring holds it.
//! - The ring is used by the thread that made it (it is not `Send`), so completions are run only in its calls.
//! - Operations and slots are bounded by `in_flight_max`; at the bound an operation is [`UringError::Full`].
//! - While a polled command is under way nobody sleeps here: there is no interrupt that would end it.
//!
//! Dropping the ring cancels what is in flight and waits for it, because the kernel writes into memory until then.
//! If that fails, slots and arena are leaked rather than freed under the kernel's hands.

mod commands;
mod cuts;
mod entries;
mod error;
mod operation;
mod ring;
mod slots;
mod sockets;
mod store;
mod ublk;
mod watch;

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{Submitter, opcode, squeue};
use rdma_fallback::{Region, Span};

use crate::buffers::Arena;
use crate::device::{DeviceMode, StoreTarget};
use commands::{COMMAND, Commands};
pub use error::UringError;
use error::system;
pub use operation::{
    Amount, COPIED_BYTES_MAX, CommandCounters, Completion, PARTS_MAX, Part, UringCounters, Wait,
};
use ring::{Ring, Wide, build, entered};
use slots::{Slot, Slots};

/// The kernel's limit for one registered buffer.
const REGISTERED_BYTES_MAX: usize = 1 << 30;
/// The kernel's limit for a submission queue; the completion queue's is twice that.
const SIZE_MAX: u32 = 32768;
/// Fewest entries of a queue for commands, 128 bytes each: one that waits long for its device keeps its entry, and all
/// that comes goes round to it.
const COMMAND_ENTRIES_MIN: u32 = 4096;
/// Slots beyond `in_flight_max` for the ring's own operations, so that a full ring can be cancelled.
const SLOTS_RESERVED: usize = 64;
/// How long a drop waits for what it cancelled.
const DRAIN_ON_DROP: Duration = Duration::from_secs(10);

/// Sizes of a ring.
#[derive(Clone, Copy, Debug)]
pub struct UringOptions {
    /// Operations collected for one system call, 1 to 32768; rounded up to a power of two.
    pub entries: u32,
    /// Most operations under way, 1 to 32768.
    pub in_flight_max: u32,
    /// Most bytes in one registered buffer, at most 1 GiB, a multiple of 4096. Smaller only in tests.
    pub registered_bytes_max: usize,
    /// How the store is driven: commands need larger entries, polled ones a ring of their own.
    pub device: DeviceMode,
}

impl Default for UringOptions {
    fn default() -> UringOptions {
        UringOptions {
            entries: 256,
            in_flight_max: 4096,
            registered_bytes_max: REGISTERED_BYTES_MAX,
            device: DeviceMode::Block,
        }
    }
}

/// A ring with its slots.
pub struct Uring {
    // Closed before the slots and the arena below are freed; `drop` has emptied it by then.
    ring: Ring,
    polled: Option<Wide>,
    commands: Option<Box<Commands>>,
    slots: Slots,
    overflow: VecDeque<Completion>,
    arena: Option<Arc<Region>>,
    is_registered: bool,
    registered_bytes_max: u64,
    has_vectored_fixed: bool,
    counters: UringCounters,
    command_counters: CommandCounters,
    _this_thread_only: PhantomData<*const ()>,
}

impl Uring {
    /// Makes a ring for the calling thread.
    ///
    /// # Errors
    /// If the kernel forbids io_uring or lacks something of it.
    ///
    /// # Panics
    /// If an option is outside its limits.
    pub fn new(options: UringOptions) -> Result<Uring, UringError> {
        let chunk = options.registered_bytes_max;
        assert!(chunk > 0 && chunk <= REGISTERED_BYTES_MAX && chunk.is_multiple_of(4096));
        let sizes = [options.entries, options.in_flight_max];
        assert!(sizes.iter().all(|size| (1..=SIZE_MAX).contains(size)), "a ring of {sizes:?}");
        let slot_count = options.in_flight_max + SLOTS_RESERVED as u32;
        let entries = options.entries.max(COMMAND_ENTRIES_MIN);
        let wide = slot_count.max(2 * entries).next_power_of_two();
        let completions = slot_count.max(2 * options.entries).next_power_of_two();
        let is_polled = options.device == DeviceMode::Passthrough { is_polled: true };
        let ring = if options.device == (DeviceMode::Passthrough { is_polled: false }) {
            Ring::Wide(build(entries, wide, false)?)
        } else {
            Ring::Narrow(build(options.entries, completions, false)?)
        };
        let polled = is_polled.then(|| build(entries, wide, true)).transpose()?;
        let probe = ring.probe(options.device != DeviceMode::Block)?;
        Ok(Uring {
            ring,
            polled,
            commands: None,
            slots: Slots {
                all: (0..slot_count).map(|_| Slot::default()).collect(),
                free: (0..slot_count).rev().collect(),
                parked: 0,
            },
            overflow: VecDeque::new(),
            arena: None,
            is_registered: false,
            registered_bytes_max: chunk as u64,
            has_vectored_fixed: probe.is_supported(opcode::WritevFixed::CODE),
            counters: UringCounters::default(),
            command_counters: CommandCounters::default(),
            _this_thread_only: PhantomData,
        })
    }

    /// Gives the ring its arena, and registers it: the kernel then pins its memory once, not at each operation.
    ///
    /// # Errors
    /// [`UringError::LockedMemory`] if the process may not pin so much; then operations on spans work too, slower.
    pub fn register_arena(&mut self, arena: &Arena) -> Result<(), UringError> {
        assert!(self.arena.is_none(), "a ring has one arena");
        let region = Arc::clone(arena.region());
        let chunk = self.registered_bytes_max as usize;
        let buffers: Vec<libc::iovec> = (0..region.len())
            .step_by(chunk)
            .map(|offset| libc::iovec {
                iov_base: region.base().wrapping_add(offset).cast(),
                iov_len: chunk.min(region.len() - offset),
            })
            .collect();
        let bytes = region.len() as u64;
        self.arena = Some(region);
        // SAFETY: the buffers lie in the region, which `self.arena` keeps mapped until the ring is closed.
        match unsafe { self.store_submitter().register_buffers(&buffers) } {
            Ok(()) => {
                self.is_registered = true;
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                Err(UringError::LockedMemory { bytes })
            }
            Err(error) => Err(system(&error)),
        }
    }

    /// Registers descriptors; the first is the store, in block mode. The ring keeps their files open.
    ///
    /// # Errors
    /// If the kernel refuses them.
    pub fn register_files(&mut self, descriptors: &[RawFd]) -> Result<(), UringError> {
        self.store_submitter().register_files(descriptors).map_err(|error| system(&error))
    }

    /// Registers the store, and tries whether it takes commands if it is driven by them. The ring keeps its files open,
    /// and with them the claim on the store, until the last operation has ended: also when the process is killed.
    ///
    /// # Errors
    /// If the kernel refuses, or the first command fails.
    ///
    /// # Panics
    /// If the ring was made for another mode.
    pub fn register_store(&mut self, store: StoreTarget) -> Result<(), UringError> {
        let Some(target) = store.commands else {
            assert!(self.polled.is_none(), "a ring for commands and a store without");
            return self.register_files(&[store.descriptor]);
        };
        assert_eq!(self.polled.is_some(), target.is_polled, "ring and store differ in mode");
        self.register_files(&[target.generic, store.descriptor])?;
        self.begin_commands(target)
    }

    /// Of the ring that drives the store.
    fn store_submitter(&self) -> Submitter<'_> {
        match &self.polled {
            Some(polled) => polled.submitter(),
            None => self.ring.submitter(),
        }
    }

    /// Asks the kernel to give up every operation with this user data: they complete with `-ECANCELED`, or as usual
    /// if it was too late. The request itself is not reported.
    ///
    /// # Errors
    /// [`UringError::Full`]: reap first; some may be cancelled by then.
    pub fn cancel(&mut self, user_data: u64) -> Result<(), UringError> {
        for target in 0..self.slots.all.len() as u32 {
            let slot = &self.slots.all[target as usize];
            if slot.is_busy && slot.user_data == Some(user_data) {
                let index = self.slots.next(0)?;
                self.begin(index, None, opcode::AsyncCancel::new(self.slots.tag(target)).build())?;
            }
        }
        Ok(())
    }

    /// How many operations can be begun now.
    #[must_use]
    pub fn free(&self) -> usize {
        self.slots.free.len().saturating_sub(SLOTS_RESERVED)
    }

    /// How many operations are not reaped yet; see [`ublk`] for those that may never be.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.all.len() - self.slots.free.len()
    }

    /// Counts since the ring was made.
    #[must_use]
    pub fn counters(&self) -> UringCounters {
        self.counters
    }

    /// Counts of NVMe commands since the ring was made.
    #[must_use]
    pub fn command_counters(&self) -> CommandCounters {
        self.command_counters
    }

    /// Whether a polled command is under way: it completes only when somebody asks, and no interrupt ends a wait for it.
    #[must_use]
    pub fn must_poll(&self) -> bool {
        let is_idle = self.commands.as_ref().is_none_or(|commands| commands.is_idle());
        self.polled.is_some() && !is_idle
    }

    /// Hands collected operations to the kernel and waits for a completion as told; a signal ends the wait early, and
    /// while [`Uring::must_poll`] there is one look and no wait. Makes no system call if there is nothing to hand over
    /// and nothing to wait for.
    ///
    /// # Errors
    /// [`UringError::System`] if the kernel refuses the call itself.
    pub fn submit_and_wait(&mut self, wait: Wait) -> Result<(), UringError> {
        self.issue_commands()?;
        self.enter(self.wait_for_due(wait))
    }

    fn enter(&mut self, wait: Wait) -> Result<(), UringError> {
        // Also while completions wait to be reaped: whoever makes room needs the polled ring's.
        let must_poll = self.poll_device(wait != Wait::No)?;
        let may_wait = self.overflow.is_empty() && !must_poll;
        let wait = if may_wait { wait } else { Wait::No };
        if wait == Wait::No && !self.ring.wants_call() {
            return Ok(());
        }
        self.counters.enters += 1;
        let result = match wait {
            Wait::No => self.ring.submitter().submit(),
            Wait::Forever => self.ring.submitter().submit_and_wait(1),
            Wait::For(duration) => {
                let time = Timespec::from(duration);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        entered(result)
    }

    /// Appends the completions that are there to `completions`; returns how many.
    pub fn reap(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        completions.extend(self.overflow.drain(..));
        self.take(completions);
        let count = completions.len() - before;
        self.counters.completions += count as u64;
        count
    }

    /// Takes what the kernel has completed.
    fn take(&mut self, found: &mut impl Extend<Completion>) {
        let Uring { ring, polled, commands, slots, .. } = self;
        let mut ended = |name: u64, result: i32, flags: u32| {
            if name & COMMAND == 0 {
                found.extend(slots.complete(name, result, flags));
            } else {
                let commands = commands.as_mut().expect("a command is of the store's");
                found.extend(commands.complete(slots, name, result));
            }
        };
        match ring {
            Ring::Narrow(ring) => ring
                .completion()
                .for_each(|entry| ended(entry.user_data(), entry.result(), entry.flags())),
            Ring::Wide(ring) => ring
                .completion()
                .for_each(|entry| ended(entry.user_data(), entry.result(), entry.flags())),
        }
        if let Some(polled) = polled {
            polled.completion().for_each(|entry| ended(entry.user_data(), entry.result(), 0));
        }
    }

    /// Cancels everything and waits until nothing is in flight; the completions are appended to `completions`.
    ///
    /// # Errors
    /// [`UringError::Undrained`] if something is still in flight after `limit`.
    pub fn drain(
        &mut self,
        limit: Duration,
        completions: &mut Vec<Completion>,
    ) -> Result<(), UringError> {
        let begin = Instant::now();
        let mut cancelled = None;
        if let Some(commands) = &mut self.commands {
            commands.cancel_waiting(&mut self.slots, completions);
        }
        loop {
            self.submit_and_wait(Wait::No)?;
            self.reap(completions);
            let in_flight = self.in_flight() - self.slots.parked;
            if in_flight == 0 {
                return Ok(());
            }
            let Some(left) = limit.checked_sub(begin.elapsed()) else {
                return Err(UringError::Undrained { in_flight });
            };
            let is_due = |then: Instant| then.elapsed() > Duration::from_secs(1);
            if cancelled.is_none_or(is_due) && self.may_write_entry() {
                cancelled = Some(Instant::now());
                let index = self.slots.next(0)?;
                let all = CancelBuilder::any();
                self.begin(index, None, opcode::AsyncCancel2::new(all).build())?;
            }
            self.submit_and_wait(Wait::For(left.min(Duration::from_millis(100))))?;
        }
    }

    /// Queues an entry whose pointers lead into slot `index` or to bytes that are now the kernel's.
    fn begin(
        &mut self,
        index: u32,
        user_data: Option<u64>,
        entry: squeue::Entry,
    ) -> Result<(), UringError> {
        let entry = entry.user_data(self.slots.tag(index));
        // SAFETY: what the entry points to is valid until its completion: it lies in the slot, which is taken below
        // and does not move; in the arena, which the ring holds; or is vouched for by the caller of `receive_at`.
        while !(self.may_write_entry() && unsafe { self.ring.push(&entry) }) {
            self.make_room()?;
            if !self.may_write_entry() {
                // Until a command ends there is nothing to do.
                std::thread::yield_now();
            }
        }
        if let (Ring::Wide(_), Some(commands)) = (&self.ring, &mut self.commands) {
            commands.entries.written();
        }
        self.slots.take(index, user_data);
        self.counters.operations += 1;
        Ok(())
    }

    /// Whether no command may still lie where the ring's next entry does.
    fn may_write_entry(&self) -> bool {
        match (&self.ring, &self.commands) {
            (Ring::Wide(_), Some(commands)) => commands.entries.is_free(),
            _ => true,
        }
    }

    /// Queues a command whose pointers lead into its place, which is taken, or to bytes that are now the kernel's.
    fn begin_command(&mut self, entry: &squeue::Entry128) -> Result<(), UringError> {
        loop {
            let ring = match (&mut self.polled, &mut self.ring) {
                (Some(ring), _) | (None, Ring::Wide(ring)) => ring,
                (None, Ring::Narrow(_)) => panic!("a command for a ring that takes none"),
            };
            // SAFETY: the command names memory of the arena, which the ring holds, or a list of such memory in the
            // command's place, which is taken and does not move before the completion.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.make_room()?;
        }
    }

    /// Hands over what is collected. Where the kernel refuses new work until completions are taken, takes them.
    fn make_room(&mut self) -> Result<(), UringError> {
        self.enter(Wait::No)?;
        let mut found = std::mem::take(&mut self.overflow);
        self.take(&mut found);
        self.overflow = found;
        Ok(())
    }

    fn pointer(&self, span: Span) -> *mut u8 {
        let region = self.arena.as_ref().expect("spans are of the arena, which is given first");
        let end = span.offset.checked_add(u64::from(span.length));
        let inside = end.is_some_and(|end| end <= region.len() as u64);
        assert!(inside, "{span:?} leaves the arena");
        region.base().wrapping_add(span.offset as usize)
    }

    /// The registered buffer that a span lies in. None if it lies in two, or the arena is not registered.
    fn registered(&self, span: Span) -> Option<u16> {
        let chunk = self.registered_bytes_max;
        let last = span.offset + u64::from(span.length.saturating_sub(1));
        let buffer = u16::try_from(span.offset / chunk).ok()?;
        (self.is_registered && last / chunk == u64::from(buffer)).then_some(buffer)
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.drain(DRAIN_ON_DROP, &mut Vec::new()).is_err() {
            std::mem::forget(std::mem::take(&mut self.slots.all));
            std::mem::forget(self.commands.take());
            std::mem::forget(self.arena.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::os::unix::net::{UnixListener, UnixStream};

    use twinpoint_core::units::BufferId;

    use super::store::joined;
    use crate::device::{Caching, OpenMode, Prefill, StoreFile};
    use crate::wake::waker;

    const BUFFERS: u32 = 64;

    fn small(entries: u32, in_flight_max: u32) -> Uring {
        let options = UringOptions { entries, in_flight_max, ..UringOptions::default() };
        Uring::new(UringOptions { registered_bytes_max: 16 << 12, ..options }).unwrap()
    }

    /// A ring whose arena is registered in four parts.
    fn ring_with_arena() -> (Uring, Arena) {
        let mut ring = small(8, 32);
        let arena = Arena::new(BUFFERS as usize * 4096).unwrap();
        ring.register_arena(&arena).unwrap();
        assert!(ring.is_registered);
        (ring, arena)
    }

    fn completions(ring: &mut Uring, count: usize) -> Vec<Completion> {
        let mut found = Vec::new();
        while found.len() < count {
            ring.submit_and_wait(Wait::For(Duration::from_secs(10))).unwrap();
            assert!(ring.reap(&mut found) > 0, "{} of {count} completions in 10 s", found.len());
        }
        assert_eq!(found.len(), count);
        found.sort_by_key(|completion| completion.user_data);
        found
    }

    fn result(ring: &mut Uring) -> i32 {
        completions(ring, 1)[0].result
    }

    /// Beside the test's binary, because a folder for temporary files may be memory only.
    fn store_folder() -> tempfile::TempDir {
        let binary = std::env::current_exe().unwrap();
        tempfile::tempdir_in(binary.parent().unwrap()).unwrap()
    }

    #[test]
    fn store_reads_what_was_written() {
        let folder = store_folder();
        let path = folder.path().join("store");
        StoreFile::create(&path, 1 << 20, Prefill::Zero).unwrap();
        let store =
            StoreFile::open_with(&path, OpenMode::Exclusive, Caching::BufferedAllowed).unwrap();
        for has_vectored_fixed in [true, false] {
            let (mut ring, arena) = ring_with_arena();
            ring.has_vectored_fixed &= has_vectored_fixed;
            ring.register_files(&[store.descriptor()]).unwrap();
            for buffer in 0..BUFFERS {
                arena.copy_in(BufferId(buffer), 0, &[buffer as u8 + 1; 4096]);
            }
            let lists: [&[(u32, u32)]; 5] = [
                &[(3, 2)],                         // in one registered buffer
                &[(14, 4)],                        // over a border
                &[(0, 1), (9, 2), (5, 1), (8, 1)], // a list in one registered buffer
                &[(20, 1), (40, 3), (2, 1)],       // a list over several
                &[(30, 1), (31, 1), (32, 2)],      // a list that is one run, over a border
            ];
            for (index, list) in lists.iter().enumerate() {
                let spans: Vec<Span> =
                    list.iter().map(|part| arena.span(BufferId(part.0), part.1)).collect();
                ring.write_store(index as u64, index as u64 * 65536, &spans).unwrap();
            }
            let written = completions(&mut ring, lists.len());
            for (list, completion) in lists.iter().zip(written) {
                let count: u32 = list.iter().map(|part| part.1).sum();
                assert_eq!(completion.ok().unwrap(), count * 4096);
            }
            ring.flush_store(99).unwrap();
            assert_eq!(result(&mut ring), 0);
            for (index, list) in lists.iter().enumerate() {
                let blocks: Vec<u32> =
                    list.iter().flat_map(|part| part.0..part.0 + part.1).collect();
                // Buffers 47 and 48 lie on two sides of a border.
                let target = BufferId(if index % 2 == 0 { 50 } else { 46 });
                let span = arena.span(target, blocks.len() as u32);
                ring.read_store(index as u64, index as u64 * 65536, span).unwrap();
                assert_eq!(result(&mut ring), blocks.len() as i32 * 4096);
                for (place, block) in blocks.iter().enumerate() {
                    let mut bytes = [0; 4096];
                    arena.copy_out(BufferId(target.0 + place as u32), 0, &mut bytes);
                    assert_eq!(bytes, [*block as u8 + 1; 4096]);
                }
            }
        }
    }

    #[test]
    fn store_errors_are_results() {
        let (mut ring, arena) = ring_with_arena();
        let span = arena.span(BufferId(0), 1);
        ring.write_store(1, 0, &[span]).unwrap();
        assert_eq!(result(&mut ring), -libc::EBADF);
        let full = File::options().write(true).open("/dev/full").unwrap();
        ring.register_files(&[full.as_raw_fd()]).unwrap();
        ring.write_store(2, 0, &[span, span]).unwrap();
        let completion = completions(&mut ring, 1)[0];
        assert_eq!(completion.ok().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    #[should_panic(expected = "leaves the arena")]
    fn spans_outside_are_refused() {
        let (mut ring, _arena) = ring_with_arena();
        let _ = ring.read_store(1, 0, Span { offset: u64::MAX - 10, length: 4096 });
    }

    #[test]
    fn sockets_carry_bytes_and_spans() {
        let (mut ring, arena) = ring_with_arena();
        let (near, far) = UnixStream::pair().unwrap();
        arena.copy_in(BufferId(0), 0, &[7; 3 * 4096]);
        let spans = [arena.part(BufferId(0), 100, 5000), arena.part(BufferId(2), 0, 10)];
        let header = [1; 20];
        let parts = [
            Part::Bytes(&header),
            Part::Span(spans[0]),
            Part::Bytes(b"next"),
            Part::Span(spans[1]),
        ];
        ring.send(1, near.as_raw_fd(), &parts).unwrap();
        ring.receive(2, far.as_raw_fd(), arena.part(BufferId(10), 3, 5034), Amount::All).unwrap();
        let done = completions(&mut ring, 2);
        assert_eq!((done[0].result, done[1].result), (5034, 5034));
        let mut bytes = [0; 5034];
        arena.copy_out(BufferId(10), 3, &mut bytes);
        let sent = [&header[..], &[7; 5000], b"next", &[7; 10]].concat();
        assert!(bytes[..] == sent[..]);

        let mut own = vec![0; 100].into_boxed_slice();
        // SAFETY: the box outlives the operation, which is reaped below, and is not touched before.
        unsafe { ring.receive_at(3, near.as_raw_fd(), own.as_mut_ptr(), 100, Amount::Some) }
            .unwrap();
        ring.submit_and_wait(Wait::No).unwrap();
        (&far).write_all(b"short").unwrap();
        assert_eq!(result(&mut ring), 5);
        assert_eq!(&own[..5], b"short");
        drop(far);
        ring.receive(4, near.as_raw_fd(), spans[0], Amount::All).unwrap();
        assert_eq!(result(&mut ring), 0);
        ring.send(5, near.as_raw_fd(), &parts).unwrap();
        assert_eq!(result(&mut ring), -libc::EPIPE);
    }

    #[test]
    fn a_send_bigger_than_the_socket_is_one_completion() {
        let mut ring = Uring::new(UringOptions::default()).unwrap();
        let arena = Arena::new(8 << 20).unwrap();
        ring.register_arena(&arena).unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        ring.send(1, near.as_raw_fd(), &[Part::Span(arena.span(BufferId(0), 2048))]).unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![1; 8 << 20];
            far.read_exact(&mut bytes).map(|()| bytes.iter().all(|byte| *byte == 0))
        });
        assert_eq!(result(&mut ring), 8 << 20);
        assert!(reader.join().unwrap().unwrap());
    }

    #[test]
    fn accept_gives_descriptor_after_descriptor() {
        let folder = store_folder();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut ring = small(8, 8);
        ring.accept_multishot(5, listener.as_raw_fd()).unwrap();
        for round in 0..3 {
            let mut client = UnixStream::connect(&path).unwrap();
            let accepted = completions(&mut ring, 1)[0];
            assert!(accepted.has_more() && accepted.user_data == 5 && ring.in_flight() == 1);
            // SAFETY: the kernel just made this descriptor for us.
            let mut server = File::from(unsafe { OwnedFd::from_raw_fd(accepted.result) });
            server.write_all(&[round]).unwrap();
            let mut byte = [9];
            client.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [round]);
        }
        ring.cancel(5).unwrap();
        let cancelled = completions(&mut ring, 1)[0];
        assert_eq!((cancelled.result, cancelled.has_more()), (-libc::ECANCELED, false));
    }

    #[test]
    fn polls_and_bells() {
        let mut ring = small(8, 8);
        let (near, mut far) = UnixStream::pair().unwrap();
        ring.poll_once(1, near.as_raw_fd(), libc::POLLIN).unwrap();
        ring.poll_multishot(2, near.as_raw_fd(), libc::POLLIN).unwrap();
        ring.submit_and_wait(Wait::No).unwrap();
        far.write_all(b"1").unwrap();
        let events = completions(&mut ring, 2);
        assert_eq!((events[0].has_more(), events[1].has_more()), (false, true));
        assert!(events.iter().all(|event| event.result & i32::from(libc::POLLIN) != 0));
        far.write_all(b"2").unwrap();
        assert_eq!(completions(&mut ring, 1)[0].user_data, 2);

        let (waker, sleeper) = waker().unwrap();
        for _ in 0..2 {
            ring.read_eventfd(3, sleeper.descriptor()).unwrap();
            sleeper.prepare();
            let waker = waker.clone();
            let bell = std::thread::spawn(move || waker.notify());
            assert_eq!(result(&mut ring), 8);
            sleeper.awake();
            bell.join().unwrap();
        }
    }

    #[test]
    fn waits_end_in_time() {
        let mut ring = small(8, 8);
        let begin = Instant::now();
        ring.submit_and_wait(Wait::For(Duration::from_millis(20))).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(ring.reap(&mut Vec::new()), 0);
        ring.timeout(1, Duration::from_millis(10)).unwrap();
        ring.timeout(2, Duration::from_secs(1000)).unwrap();
        ring.submit_and_wait(Wait::Forever).unwrap();
        let mut found = Vec::new();
        ring.reap(&mut found);
        assert_eq!(found, [Completion { user_data: 1, result: -libc::ETIME, flags: 0 }]);
        ring.cancel(2).unwrap();
        assert_eq!(result(&mut ring), -libc::ECANCELED);
        // Nothing to do costs nothing.
        ring.submit_and_wait(Wait::No).unwrap();
        let enters = ring.counters().enters;
        ring.submit_and_wait(Wait::No).unwrap();
        assert_eq!((ring.counters().enters, ring.in_flight()), (enters, 0));
    }

    #[test]
    fn a_full_ring_says_so_and_can_be_cancelled() {
        let mut ring = small(4, 100);
        let (near, _far) = UnixStream::pair().unwrap();
        for user_data in 0..100 {
            assert_eq!(ring.free(), 100 - user_data);
            ring.poll_once(user_data as u64, near.as_raw_fd(), libc::POLLIN).unwrap();
        }
        assert_eq!(ring.timeout(7, Duration::ZERO), Err(UringError::Full));
        ring.cancel(42).unwrap();
        let cancelled = completions(&mut ring, 1)[0];
        assert_eq!((cancelled.user_data, cancelled.result), (42, -libc::ECANCELED));
        let mut found = Vec::new();
        ring.drain(Duration::from_secs(10), &mut found).unwrap();
        assert_eq!((found.len(), ring.in_flight(), ring.free()), (99, 0, 100));
        assert!(found.iter().all(|completion| completion.result == -libc::ECANCELED));
        assert_eq!(ring.counters().completions, 100);
    }

    #[test]
    fn dropping_takes_memory_back_from_the_kernel() {
        let (mut ring, arena) = ring_with_arena();
        let (near, far) = UnixStream::pair().unwrap();
        ring.receive(1, near.as_raw_fd(), arena.span(BufferId(0), 1), Amount::All).unwrap();
        ring.submit_and_wait(Wait::No).unwrap();
        drop(ring);
        (&far).write_all(&[1; 4096]).unwrap();
        let mut bytes = [9; 4096];
        arena.copy_out(BufferId(0), 0, &mut bytes);
        assert_eq!((bytes, Arc::strong_count(arena.region())), ([0; 4096], 1));
        // The cancelled receive took none of them.
        let mut received = vec![0; 4096];
        (&near).read_exact(&mut received).unwrap();
        assert_eq!(received, [1; 4096]);
    }

    #[test]
    fn operations_outnumber_the_queue() {
        let mut ring = small(4, 1000);
        for round in 0..5_u64 {
            for user_data in 0..1000 {
                ring.timeout(round * 1000 + user_data, Duration::ZERO).unwrap();
            }
            assert!(completions(&mut ring, 1000).iter().all(|done| done.result == -libc::ETIME));
        }
    }

    #[test]
    fn joined_spans() {
        let span = |offset, length| Span { offset, length };
        assert_eq!(joined(&[]), None);
        assert_eq!(joined(&[span(5, 6)]), Some(span(5, 6)));
        assert_eq!(joined(&[span(5, 6), span(11, 1)]), Some(span(5, 7)));
        assert_eq!(joined(&[span(5, 6), span(12, 1)]), None);
        assert_eq!(joined(&[span(0, u32::MAX), span(u64::from(u32::MAX), 1)]), None);
    }
}
