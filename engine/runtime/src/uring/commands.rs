//! The store driven by NVMe commands: an operation is cut into as many commands as the device needs, and completes once.
//!
//! ```text
//!   operation -> commands -> place -> the ring's entry (IORING_OP_URING_CMD) -> status; the last one ends the operation
//! ```
//!
//! Invariants:
//! - A command holds a place from its entry until its completion; a list of memory that the kernel reads lies in it.
//! - At most as many commands are under way as the device's queue takes: beyond that the kernel would hand them to
//!   threads of its own. The others wait here, in their order.
//! - An entry of the queue is not written anew before its command has ended: see `entries.rs`.
//! - A device's status other than 0 is an error of the operation, but for those that may pass, as while a controller is
//!   reset: then the command is sent again, for a while or a few times. There are no short transfers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue};
use rdma_fallback::Span;
use twinpoint_core::units::BLOCK_BYTES;

use super::cuts::Cuts;
use super::entries::Entries;
use super::error::answer_text;
use super::ring::{Ring, entered};
use super::store::STORE;
use super::{Completion, SLOTS_RESERVED, Slots, Uring, UringError, Wait};
use crate::device::CommandTarget;
use crate::device::nvme::{Command, Deed, Outlook, Status, URING_IO, URING_IO_LIST};

/// Marks the kernel's name for a command, beside those of operations.
pub(super) const COMMAND: u64 = 1 << 31;
/// How long the first command may take.
const FIRST_COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How long a command whose failure may pass is sent again, and the pause between two times. A reset of a controller
/// takes seconds; the kernel fails what comes meanwhile.
const RESEND_LIMIT: Duration = Duration::from_secs(30);
const RESEND_PAUSE: Duration = Duration::from_millis(100);
/// How often a command is sent again whose failure the device leaves open: as often as the kernel's driver does (its
/// parameter `max_retries`).
const RETRIES_MAX: u32 = 5;
/// For how long after a line about commands that are sent again there is no other one.
const RESENDS_UNTOLD: Duration = Duration::from_secs(10);
/// How many failed commands are told in the log: a device that is gone fails them all.
const COMPLAINTS_MAX: u32 = 16;

/// See the module.
pub(super) struct Commands {
    target: CommandTarget,
    /// Of the queue that commands are handed over in.
    pub(super) entries: Entries,
    places: Box<[Place]>,
    free: Vec<u32>,
    waiting: VecDeque<Prepared>,
    /// To be sent again, each at its time.
    again: VecDeque<(Instant, Prepared)>,
    /// Where operations are cut; empty between them.
    runs: Vec<Span>,
    /// Empty lists of commands that completed, for the next ones.
    spare_lists: Vec<Vec<libc::iovec>>,
    complaints_left: u32,
    /// When it was told last that commands are sent again.
    resends_told: Option<Instant>,
    /// What the last failed one was answered.
    last_failure: i32,
}

/// A command under way.
#[derive(Default)]
struct Place {
    generation: u32,
    /// Its command's entry in the queue.
    entry: u64,
    command: Option<Prepared>,
}

/// A command that is complete but for its place.
struct Prepared {
    /// The slot of its operation.
    operation: u32,
    deed: Deed,
    /// Where on the store, in bytes.
    offset: u64,
    bytes: u32,
    memory: Memory,
    /// When to give up. None before the first failure.
    until: Option<Instant>,
    /// Failures that may last.
    failures: u32,
}

enum Memory {
    /// One run; with the number of the registered buffer that it lies in.
    Run(u64, Option<u16>),
    /// Several.
    List(Vec<libc::iovec>),
}

/// An operation's commands that have not completed.
#[derive(Clone, Copy, Default)]
pub(super) struct Progress {
    outstanding: u32,
    bytes: i32,
    /// The first failure; 0 for none.
    failure: i32,
}

impl Uring {
    /// Whether the store is driven by commands.
    pub(super) fn takes_commands(&self) -> bool {
        self.commands.is_some()
    }

    /// From now on the store is driven by commands: tries one, a flush, which changes nothing.
    pub(super) fn begin_commands(&mut self, target: CommandTarget) -> Result<(), UringError> {
        let entries = Entries::new(self.command_entries());
        self.commands = Some(Box::new(Commands::new(target, entries)));
        let begin = Instant::now();
        self.command_store(0, Deed::Flush, 0, &[])?;
        let mut found = Vec::new();
        while found.is_empty() {
            if begin.elapsed() > FIRST_COMMAND_LIMIT {
                let told = self.commands.as_ref().map_or(0, |commands| commands.last_failure);
                let result = if told == 0 { -libc::ETIME } else { told };
                return Err(UringError::Commands { result });
            }
            self.submit_and_wait(Wait::For(Duration::from_millis(100)))?;
            self.reap(&mut found);
        }
        let commands = self.commands.as_mut().expect("it was just made");
        commands.complaints_left = COMPLAINTS_MAX;
        if found[0].result == 0 {
            return Ok(());
        }
        Err(UringError::Commands { result: commands.last_failure })
    }

    /// Begins an operation on whole blocks of the store, from `offset` bytes on.
    pub(super) fn command_store(
        &mut self,
        user_data: u64,
        deed: Deed,
        offset: u64,
        spans: &[Span],
    ) -> Result<(), UringError> {
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK_BYTES as u64);
        let is_whole = spans.iter().all(|span| whole(span.length.into()) && span.length > 0);
        assert!(whole(offset) && is_whole, "a {deed} of parts of blocks at {offset}");
        let operation = self.slots.next(SLOTS_RESERVED)?;
        let mut commands = self.commands.take().expect("it takes commands");
        let mut runs = std::mem::take(&mut commands.runs);
        let mut cuts = Cuts::new(spans, commands.target.bytes_max);
        let (mut outstanding, mut total) = (0, 0);
        while let Some(bytes) = cuts.next(&mut runs) {
            let memory = self.memory(&runs, &mut commands.spare_lists);
            let offset = offset + u64::from(total);
            commands.waiting.push_back(Prepared::new(operation, deed, (offset, bytes), memory));
            outstanding += 1;
            total += bytes;
        }
        if deed == Deed::Flush {
            let memory = Memory::Run(0, None);
            commands.waiting.push_back(Prepared::new(operation, deed, (offset, 0), memory));
            outstanding = 1;
        }
        commands.runs = runs;
        self.commands = Some(commands);
        self.slots.take(operation, Some(user_data));
        let bytes = i32::try_from(total).expect("an operation is shorter than its arena's chunk");
        self.slots.all[operation as usize].progress = Progress { outstanding, bytes, failure: 0 };
        self.counters.operations += 1;
        self.issue_commands()
    }

    /// Hands waiting commands to the kernel as far as there are places.
    pub(super) fn issue_commands(&mut self) -> Result<(), UringError> {
        if let Some(commands) = &mut self.commands {
            commands.take_due();
        }
        while let Some(commands) = &mut self.commands {
            let Some((entry, is_registered)) = commands.next_entry() else { break };
            self.command_counters.commands += 1;
            self.command_counters.registered += u64::from(is_registered);
            self.begin_command(&entry)?;
        }
        Ok(())
    }

    /// Entries of the queue that commands are handed over in.
    pub(super) fn command_entries(&mut self) -> u32 {
        match (&mut self.polled, &mut self.ring) {
            (Some(ring), _) | (None, Ring::Wide(ring)) => ring.params().sq_entries(),
            (None, Ring::Narrow(_)) => panic!("commands for a ring that takes none"),
        }
    }

    /// Hands over collected polled commands and looks once for completions. Tells whether the caller must not sleep.
    pub(super) fn poll_device(&mut self, would_wait: bool) -> Result<bool, UringError> {
        if !self.must_poll() {
            return Ok(false);
        }
        let polled = self.polled.as_mut().expect("it must be polled");
        self.counters.enters += 1;
        self.command_counters.polls += 1;
        entered(polled.submitter().submit())?;
        if would_wait && polled.completion().is_empty() {
            // Whoever else wants this core has work; polling has none.
            std::thread::yield_now();
        }
        Ok(true)
    }

    /// A wait that ends when a command is to be sent again.
    pub(super) fn wait_for_due(&self, wait: Wait) -> Wait {
        let next = self.commands.as_ref().and_then(|commands| commands.again.front());
        let Some((due, _)) = next else { return wait };
        let pause = due.saturating_duration_since(Instant::now());
        match wait {
            Wait::No => Wait::No,
            Wait::Forever => Wait::For(pause),
            Wait::For(time) => Wait::For(time.min(pause)),
        }
    }

    fn memory(&self, runs: &[Span], spare_lists: &mut Vec<Vec<libc::iovec>>) -> Memory {
        if let [run] = runs {
            let address = self.pointer(*run).expose_provenance() as u64;
            return Memory::Run(address, self.registered(*run));
        }
        let vector = |run: &Span| libc::iovec {
            iov_base: self.pointer(*run).cast(),
            iov_len: run.length as usize,
        };
        let mut list = spare_lists.pop().unwrap_or_default();
        list.extend(runs.iter().map(vector));
        Memory::List(list)
    }
}

impl Prepared {
    fn new(operation: u32, deed: Deed, (offset, bytes): (u64, u32), memory: Memory) -> Prepared {
        Prepared { operation, deed, offset, bytes, memory, until: None, failures: 0 }
    }
}

impl Commands {
    fn new(target: CommandTarget, entries: Entries) -> Commands {
        Commands {
            target,
            entries,
            places: (0..target.depth).map(|_| Place::default()).collect(),
            free: (0..target.depth).rev().collect(),
            waiting: VecDeque::new(),
            again: VecDeque::new(),
            runs: Vec::new(),
            spare_lists: Vec::new(),
            complaints_left: 0,
            resends_told: None,
            last_failure: 0,
        }
    }

    /// Whether no command is under way or waits.
    pub(super) fn is_idle(&self) -> bool {
        let is_under_way = self.free.len() < self.places.len();
        self.waiting.is_empty() && self.again.is_empty() && !is_under_way
    }

    /// What is to be sent again by now goes before what waits.
    fn take_due(&mut self) {
        if self.again.is_empty() {
            return;
        }
        let now = Instant::now();
        let due = self.again.partition_point(|(due, _)| *due <= now);
        for (_, command) in self.again.drain(..due).rev() {
            self.waiting.push_front(command);
        }
    }

    /// Gives the next waiting command a place; answers its entry, and whether it is from registered memory.
    fn next_entry(&mut self) -> Option<(squeue::Entry128, bool)> {
        let index = *self.free.last().filter(|_| self.entries.is_free_for_command())?;
        let prepared = self.waiting.pop_front()?;
        self.free.pop();
        let CommandTarget { namespace, shift, .. } = self.target;
        let count = prepared.bytes >> shift;
        let (command, address, length, buffer) = match &prepared.memory {
            Memory::Run(address, buffer) => (URING_IO, *address, prepared.bytes, *buffer),
            Memory::List(list) => {
                (URING_IO_LIST, list.as_ptr().expose_provenance() as u64, list.len() as u32, None)
            }
        };
        let first = prepared.offset >> shift;
        let deed = prepared.deed;
        let bytes = Command { deed, namespace, first, count, address, length }.encode();
        let place = &mut self.places[index as usize];
        place.command = Some(prepared);
        place.entry = self.entries.command();
        let name = u64::from(place.generation) << 32 | COMMAND | u64::from(index);
        let entry = opcode::UringCmd80::new(STORE, command).cmd(bytes).buf_index(buffer);
        Some((entry.build().user_data(name), buffer.is_some()))
    }

    /// Frees the place of a completed command; the last one of an operation completes it.
    pub(super) fn complete(
        &mut self,
        slots: &mut Slots,
        name: u64,
        result: i32,
    ) -> Option<Completion> {
        let index = (name & (COMMAND - 1)) as usize;
        let place = &mut self.places[index];
        let is_current = name >> 32 == u64::from(place.generation);
        let command = place.command.take().filter(|_| is_current);
        let command = command.expect("a command completes once");
        place.generation = place.generation.wrapping_add(1);
        self.entries.ended(place.entry);
        self.free.push(index as u32);
        let command = self.unless_again(command, result)?;
        if result != 0 {
            self.complain(&command, result);
        }
        self.ended(slots, command, result)
    }

    /// Ends what was not handed over: it is not begun any more.
    pub(super) fn cancel_waiting(&mut self, slots: &mut Slots, found: &mut Vec<Completion>) {
        let again = std::mem::take(&mut self.again).into_iter().map(|(_, command)| command);
        for command in std::mem::take(&mut self.waiting).into_iter().chain(again) {
            found.extend(self.ended(slots, command, -libc::ECANCELED));
        }
    }

    /// A command of an operation ended; the last one completes it.
    fn ended(
        &mut self,
        slots: &mut Slots,
        mut command: Prepared,
        result: i32,
    ) -> Option<Completion> {
        if let Memory::List(list) = &mut command.memory {
            list.clear();
            self.spare_lists.push(std::mem::take(list));
        }
        let progress = &mut slots.all[command.operation as usize].progress;
        if progress.failure == 0 && result != 0 {
            // To whoever waits a status is an error of input or output.
            progress.failure = if result < 0 { result } else { -libc::EIO };
        }
        progress.outstanding -= 1;
        let Progress { outstanding, bytes, failure } = *progress;
        if outstanding > 0 {
            return None;
        }
        let result = if failure == 0 { bytes } else { failure };
        slots.complete(slots.tag(command.operation), result, 0)
    }

    /// Keeps a command whose failure may pass, and gives back every other one.
    fn unless_again(&mut self, mut command: Prepared, result: i32) -> Option<Prepared> {
        if result == 0 {
            return Some(command);
        }
        let may_pass = match (u16::try_from(result).map(|code| Status(code).outlook()), -result) {
            (Ok(Outlook::Unknown), _) => {
                command.failures += 1;
                command.failures <= RETRIES_MAX
            }
            (Ok(outlook), _) => outlook == Outlook::Passes,
            // What a reset ends before the device has answered, the kernel calls interrupted.
            (_, libc::EINTR) => true,
            // Memory that a thread of the kernel could not find: decisions/0014.
            (_, libc::EFAULT) => !matches!(command.memory, Memory::Run(_, Some(_))),
            // No path leads to the device now.
            (_, libc::EINVAL) => self.target.is_head,
            _ => false,
        };
        if !may_pass {
            return Some(command);
        }
        let now = Instant::now();
        // Of all that one reset ends, the first.
        if command.until.is_none() && self.resends_told.is_none_or(|at| now > at + RESENDS_UNTOLD) {
            self.resends_told = Some(now);
            self.last_failure = result;
            let limit = match command.failures {
                0 => format!("for up to {} s", RESEND_LIMIT.as_secs()),
                _ => format!("up to {RETRIES_MAX} times"),
            };
            tell(&command, result, &format!(": sent again {limit}"));
        }
        if now >= *command.until.get_or_insert(now + RESEND_LIMIT) {
            return Some(command);
        }
        self.again.push_back((now + RESEND_PAUSE, command));
        None
    }

    fn complain(&mut self, command: &Prepared, result: i32) {
        self.last_failure = result;
        if self.complaints_left > 0 {
            self.complaints_left -= 1;
            let more = if self.complaints_left == 0 { "; more are not told" } else { "" };
            tell(command, result, more);
        }
    }
}

fn tell(command: &Prepared, result: i32, more: &str) {
    let Prepared { deed, bytes, offset, .. } = command;
    let answer = answer_text(result);
    eprintln!("twinpoint: the device failed to {deed} {bytes} bytes at {offset}: {answer}{more}");
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use twinpoint_core::units::BufferId;

    use super::*;
    use crate::buffers::Arena;
    use crate::device::{DeviceMode, StoreTarget};
    use crate::uring::UringOptions;

    const PAGE: u32 = 4096;

    fn target(generic: &File, is_polled: bool) -> StoreTarget {
        let commands = CommandTarget {
            generic: generic.as_raw_fd(),
            namespace: 1,
            shift: 9,
            bytes_max: 4 * PAGE,
            depth: 3,
            is_head: false,
            is_polled,
        };
        StoreTarget { descriptor: generic.as_raw_fd(), commands: Some(commands) }
    }

    fn ring(is_polled: bool) -> (Uring, Arena) {
        let device = DeviceMode::Passthrough { is_polled };
        let sizes = UringOptions { entries: 64, in_flight_max: 8, ..UringOptions::default() };
        let mut uring = Uring::new(UringOptions { device, ..sizes }).expect("io_uring");
        let arena = Arena::new(64 * PAGE as usize).expect("memory");
        uring.register_arena(&arena).expect("memory may be locked");
        (uring, arena)
    }

    /// A ring that takes commands, and an operation of so many of them that are under way as far as the ring knows.
    fn ring_with_operation(is_polled: bool, outstanding: u32) -> (Uring, u32) {
        let (mut uring, _arena) = ring(is_polled);
        let nobody = File::open("/dev/null").expect("it is there");
        let target = target(&nobody, is_polled).commands.expect("it has some");
        uring.commands = Some(Box::new(Commands::new(target, Entries::new(64))));
        let operation = uring.slots.next(SLOTS_RESERVED).expect("room");
        uring.slots.take(operation, Some(5));
        uring.slots.all[operation as usize].progress =
            Progress { outstanding, ..Progress::default() };
        (uring, operation)
    }

    fn flush(operation: u32, memory: Memory) -> Prepared {
        Prepared::new(operation, Deed::Flush, (0, 0), memory)
    }

    /// The null device answers 0 to every command.
    #[test]
    fn operations_complete_once_with_all_their_bytes() {
        let (mut uring, arena) = ring(false);
        let device = File::options().read(true).write(true).open("/dev/null").expect("it is there");
        uring.register_store(target(&device, false)).expect("it takes commands");
        let before = uring.command_counters();
        let even: Vec<Span> = (0..9).map(|index| arena.span(BufferId(index * 2), 1)).collect();
        for user_data in 0..8 {
            match user_data % 3 {
                0 => uring.write_store(user_data, 4096 * user_data, &even).expect("room"),
                1 => uring.read_store(user_data, 0, arena.span(BufferId(20), 17)).expect("room"),
                _ => uring.flush_store(user_data).expect("room"),
            }
        }
        assert_eq!(uring.flush_store(9), Err(UringError::Full));
        assert!(!uring.commands.as_ref().expect("set").is_idle());
        let mut found = Vec::new();
        while found.len() < 8 {
            uring.submit_and_wait(Wait::For(Duration::from_secs(5))).expect("it works");
            uring.reap(&mut found);
        }
        found.sort_by_key(|completion| completion.user_data);
        for (user_data, completion) in found.iter().enumerate() {
            let bytes = [9 * 4096, 17 * 4096, 0][user_data % 3];
            assert_eq!((completion.user_data, completion.result), (user_data as u64, bytes));
        }
        assert!(uring.commands.as_ref().expect("set").is_idle());
        let after = uring.command_counters();
        // 3 writes of 3 commands, 3 reads of 5, 2 flushes; of the reads all are from registered memory.
        assert_eq!(after.commands - before.commands, 3 * 3 + 3 * 5 + 2);
        assert_eq!(after.registered - before.registered, 3 * 5 + 3);
        assert_eq!((uring.in_flight(), uring.free()), (0, 8));
    }

    #[test]
    fn a_device_without_commands_is_found_at_once() {
        let nobody = File::options().read(true).write(true).open("/dev/zero").expect("there");
        let result = -libc::EOPNOTSUPP;
        let (mut uring, _arena) = ring(false);
        let refused = uring.register_store(target(&nobody, false));
        assert_eq!(refused, Err(UringError::Commands { result }));
        // The null device takes commands and cannot be polled.
        let device = File::options().read(true).write(true).open("/dev/null").expect("it is there");
        let (mut uring, _arena) = ring(true);
        let refused = uring.register_store(target(&device, true));
        assert_eq!(refused, Err(UringError::Commands { result }));
    }

    /// Nothing would end a sleep: a polled command completes only when somebody asks.
    #[test]
    fn nobody_sleeps_while_a_polled_command_is_under_way() {
        let (mut uring, operation) = ring_with_operation(true, 1);
        assert!(!uring.must_poll());
        // The kernel never hears of it.
        let commands = uring.commands.as_mut().expect("set");
        commands.waiting.push_back(flush(operation, Memory::Run(0, None)));
        commands.next_entry().expect("it waits, and there is a place");
        assert!(uring.must_poll());
        for looks in 1..4 {
            uring.submit_and_wait(Wait::Forever).expect("it works");
            assert_eq!(uring.command_counters().polls, looks);
        }
        let Uring { commands, slots, .. } = &mut uring;
        let commands = commands.as_mut().expect("set");
        let ended = commands.complete(slots, COMMAND, 0).expect("it was the only command");
        assert_eq!((ended.user_data, ended.result), (5, 0));
        assert!(!uring.must_poll());
        let begin = Instant::now();
        uring.submit_and_wait(Wait::For(Duration::from_millis(20))).expect("it works");
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(uring.command_counters().polls, 3);
    }

    /// Who waits for room must hand polled commands over, also when other completions wait to be reaped: until they
    /// are handed over there is none.
    #[test]
    fn polled_commands_are_handed_over_while_completions_wait() {
        let (mut uring, operation) = ring_with_operation(true, 1);
        let device = File::options().read(true).write(true).open("/dev/null").expect("it is there");
        uring.register_files(&[device.as_raw_fd()]).expect("it is a file");
        uring.overflow.push_back(Completion { user_data: 7, result: 0, flags: 0 });
        let flush = flush(operation, Memory::Run(0, None));
        uring.commands.as_mut().expect("set").waiting.push_back(flush);
        uring.issue_commands().expect("there is room for one");
        uring.make_room().expect("it works");
        let polled = uring.polled.as_mut().expect("it is a ring of that kind");
        assert!(polled.submission().is_empty(), "the command was not handed over");
        // The null device cannot be polled, and says so.
        let mut found = Vec::new();
        while found.len() < 2 {
            uring.submit_and_wait(Wait::No).expect("it works");
            uring.reap(&mut found);
        }
        assert_eq!((found[0].user_data, found[1].user_data), (7, 5));
        assert_eq!(found[1].result, -libc::EOPNOTSUPP);
    }

    #[test]
    fn what_may_pass_is_sent_again_for_a_while() {
        let (mut uring, operation) = ring_with_operation(false, 1);
        let Uring { commands, slots, .. } = &mut uring;
        let commands = commands.as_mut().expect("set");
        commands.waiting.push_back(flush(operation, Memory::List(Vec::new())));
        commands.next_entry().expect("it waits, and there is a place");
        // As while the controller is reset.
        assert_eq!(commands.complete(slots, COMMAND, -libc::EFAULT), None);
        assert!(!commands.is_idle() && commands.waiting.is_empty());
        let begin = Instant::now();
        uring.enter(uring.wait_for_due(Wait::Forever)).expect("the wait ends when it is due");
        assert!(begin.elapsed() >= RESEND_PAUSE / 2);
        let Uring { commands, slots, .. } = &mut uring;
        let commands = commands.as_mut().expect("set");
        std::thread::sleep(RESEND_PAUSE / 10);
        commands.take_due();
        let again = commands.waiting.front_mut().expect("it is sent again");
        assert!(again.until.is_some_and(|until| until > begin));
        // For ever it is not.
        again.until = Some(begin);
        commands.next_entry().expect("it waits, and there is a place");
        let ended = commands.complete(slots, 1 << 32 | COMMAND, 0x0370).expect("it is given up");
        assert_eq!((ended.user_data, ended.result), (5, -libc::EIO));
        assert!(commands.is_idle() && commands.spare_lists.len() == 1);
    }

    #[test]
    fn of_the_kernels_errors_those_that_pass_are_sent_again() {
        let registered = || Memory::Run(0, Some(0));
        let cases = [
            (-libc::EINTR, registered(), false, true),
            (-libc::EFAULT, Memory::List(Vec::new()), false, true),
            (-libc::EFAULT, Memory::Run(0, None), false, true),
            (-libc::EFAULT, registered(), false, false),
            (-libc::EINVAL, registered(), true, true),
            (-libc::EINVAL, registered(), false, false),
            (-libc::EIO, registered(), true, false),
        ];
        for (result, memory, is_head, is_again) in cases {
            let (mut uring, operation) = ring_with_operation(false, 1);
            let Uring { commands, slots, .. } = &mut uring;
            let commands = commands.as_mut().expect("set");
            commands.target.is_head = is_head;
            commands.waiting.push_back(flush(operation, memory));
            commands.next_entry().expect("it waits, and there is a place");
            let ended = commands.complete(slots, COMMAND, result);
            assert_eq!(ended.is_none(), is_again, "{result}, {is_head}");
            commands.cancel_waiting(slots, &mut Vec::new());
        }
    }

    #[test]
    fn what_the_device_leaves_open_is_sent_again_a_few_times() {
        let (mut uring, operation) = ring_with_operation(false, 1);
        let Uring { commands, slots, .. } = &mut uring;
        let commands = commands.as_mut().expect("set");
        commands.waiting.push_back(flush(operation, Memory::Run(0, None)));
        for failure in 0..RETRIES_MAX {
            commands.next_entry().expect("it waits, and there is a place");
            let name = u64::from(failure) << 32 | COMMAND;
            assert_eq!(commands.complete(slots, name, 0x0280), None, "failure {failure}");
            std::thread::sleep(RESEND_PAUSE);
            commands.take_due();
        }
        commands.next_entry().expect("it waits, and there is a place");
        let name = u64::from(RETRIES_MAX) << 32 | COMMAND;
        let ended = commands.complete(slots, name, 0x0280).expect("it is given up");
        assert_eq!((ended.user_data, ended.result), (5, -libc::EIO));
    }

    #[test]
    fn a_status_is_an_error_of_the_operation() {
        // The kernel never hears of the three.
        let (mut uring, operation) = ring_with_operation(false, 3);
        let Uring { commands, slots, .. } = &mut uring;
        let commands = commands.as_mut().expect("set");
        for _ in 0..3 {
            commands.waiting.push_back(flush(operation, Memory::Run(0, None)));
            commands.next_entry().expect("it waits, and there is a place");
        }
        // As if the kernel had answered: two of the three commands fail.
        let names: Vec<u64> = (0..3).map(|index| COMMAND | index).collect();
        assert_eq!(commands.complete(slots, names[1], 0x4281), None);
        assert_eq!(commands.complete(slots, names[0], -libc::EINVAL), None);
        let ended = commands.complete(slots, names[2], 0).expect("it was the last one");
        assert_eq!((ended.user_data, ended.result), (5, -libc::EIO));
        assert_eq!(commands.last_failure, -libc::EINVAL);
    }
}
