//! Targets: an NBD session that gets any bytes from its client, under scarce memory and full rings.
//!
//! Invariants: a buffer has one owner at a time; the session ends when its client does, with nothing in flight and
//! every buffer and export given back; while it lives it takes all bytes that its client sends.

use std::collections::VecDeque;

use twinpoint_core::request::{Answer, Operation, Outcome, Request, Tag};
use twinpoint_core::units::{BLOCK_BYTES, BufferId, CpNumber, VolumeId};
use twinpoint_runtime::nbd::{Export, Host, Input, NbdSession, OutputPart};

const VOLUME: VolumeId = VolumeId(3);
/// Odd, so that the last block is a part of one.
const VOLUME_BYTES: u64 = (3 << 20) + 512;
/// Fewer than the longest commands need.
const BUFFERS: usize = 96;
const BASE: u64 = 9 << 32;
/// Rounds in which nothing moves before a session counts as stuck.
const IDLE_ROUNDS_MAX: usize = 64;

/// The client's flags, and the option that opens the export with structured replies and block status.
const HANDSHAKE: &[u8] = b"\0\0\0\x03\
    IHAVEOPT\0\0\0\x08\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0";

/// From the client's first byte on.
pub(super) fn options(input: &[u8]) -> bool {
    Play::new(input, &[]).run()
}

/// From the first command on.
pub(super) fn requests(input: &[u8]) -> bool {
    let mut play = Play::new(input, HANDSHAKE);
    let opened = play.run();
    assert!(opened, "the handshake is a good one");
    play.host.answered > 0
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    Nobody,
    Session,
    Shard,
}

/// Memory and shards, and how often they refuse.
struct Ram {
    owners: Vec<Owner>,
    requests: VecDeque<Request>,
    flushes: VecDeque<Tag>,
    calls: usize,
    /// Each so-many-th call is refused; none if 0.
    refuse_each: usize,
    opened: usize,
    uses: usize,
    answered: usize,
}

impl Ram {
    fn hand(&mut self, first: BufferId, count: usize, from: Owner, to: Owner) {
        for owner in &mut self.owners[first.0 as usize..][..count] {
            assert_eq!(*owner, from, "a buffer of {first}+{count}");
            *owner = to;
        }
    }

    fn check_own(&self, first: BufferId, offset: usize, length: usize) {
        let count = (offset + length).div_ceil(BLOCK_BYTES);
        let mine = self.owners[first.0 as usize..][..count].iter();
        assert!(mine.into_iter().all(|owner| *owner == Owner::Session), "{first}+{count}");
    }

    fn refuses(&mut self) -> bool {
        self.calls += 1;
        self.refuse_each > 0 && self.calls.is_multiple_of(self.refuse_each)
    }
}

impl Host for Ram {
    fn allocate(&mut self, want: u32) -> Option<(BufferId, u32)> {
        if self.refuses() {
            return None;
        }
        let first = self.owners.iter().position(|owner| *owner == Owner::Nobody)?;
        let free = self.owners[first..].iter().take_while(|owner| **owner == Owner::Nobody);
        let count = free.take(want as usize).count();
        self.hand(BufferId(first as u32), count, Owner::Nobody, Owner::Session);
        Some((BufferId(first as u32), count as u32))
    }

    fn free(&mut self, first: BufferId, count: u32) {
        self.hand(first, count as usize, Owner::Session, Owner::Nobody);
    }

    fn copy_in(&mut self, first: BufferId, offset: usize, bytes: &[u8]) {
        self.check_own(first, offset, bytes.len());
    }

    fn copy_out(&self, first: BufferId, offset: usize, bytes: &mut [u8]) {
        self.check_own(first, offset, bytes.len());
        bytes.fill(7);
    }

    fn zero(&mut self, first: BufferId, offset: usize, length: usize) {
        self.check_own(first, offset, length);
    }

    fn checksum(&mut self, first: BufferId, count: u32) {
        self.check_own(first, 0, count as usize * BLOCK_BYTES);
    }

    fn submit(&mut self, request: Request) -> Result<(), Request> {
        request.check();
        let end = request.offset + u64::from(request.length);
        assert!(end.div_ceil(BLOCK_BYTES as u64) <= VOLUME_BYTES.div_ceil(BLOCK_BYTES as u64));
        if self.refuses() {
            return Err(request);
        }
        if let Operation::Write { buffer } | Operation::Read { buffer } = request.operation {
            self.hand(buffer, request.blocks() as usize, Owner::Session, Owner::Shard);
        }
        self.requests.push_back(Request { stamp: CpNumber(1), ..request });
        Ok(())
    }

    fn flush(&mut self, tag: Tag) {
        self.flushes.push_back(tag);
    }

    fn open_export(&mut self, name: &str) -> Option<Export> {
        if name != "disk" && !name.is_empty() {
            return None;
        }
        self.opened += 1;
        self.uses += 1;
        Some(Export { volume: VOLUME, size_bytes: VOLUME_BYTES, read_only: false })
    }

    fn list_exports(&self) -> Vec<String> {
        vec!["disk".to_owned()]
    }

    fn close_export(&mut self, volume: VolumeId) {
        assert_eq!(volume, VOLUME);
        self.uses -= 1;
    }
}

/// A session, its host, and a client that sends its bytes in portions.
struct Play {
    session: NbdSession,
    host: Ram,
    rest: VecDeque<u8>,
    portion: usize,
    /// Requests wait for this many rounds.
    slow: usize,
    fails: bool,
}

impl Play {
    /// The input's first byte says how the bytes come and how the host answers.
    fn new(input: &[u8], before: &[u8]) -> Play {
        let (how, bytes) = input.split_first().map_or((0, input), |(how, bytes)| (*how, bytes));
        let host = Ram {
            owners: vec![Owner::Nobody; BUFFERS],
            requests: VecDeque::new(),
            flushes: VecDeque::new(),
            calls: 0,
            refuse_each: [0, 2, 3, 7][usize::from(how >> 2 & 3)],
            opened: 0,
            uses: 0,
            answered: 0,
        };
        Play {
            session: NbdSession::new(BASE),
            host,
            rest: before.iter().chain(bytes).copied().collect(),
            portion: [usize::MAX, 1, 29, 5_000][usize::from(how & 3)],
            slow: usize::from(how >> 4 & 3),
            fails: how >> 6 & 1 == 1,
        }
    }

    /// Plays to the end; says whether an export was opened.
    fn run(&mut self) -> bool {
        let mut idle = 0;
        for round in 0.. {
            let mut moved = self.receive();
            if self.slow == 0 || round % (self.slow * 3) == 0 {
                moved |= self.answer();
            }
            moved |= self.send();
            if self.session.is_starved() {
                self.session.resume(&mut self.host);
            }
            let busy = self.session.in_flight() > 0 || self.session.is_starved();
            if self.session.is_finished() || !moved && self.rest.is_empty() && !busy {
                break;
            }
            idle = if moved { 0 } else { idle + 1 };
            assert!(idle < IDLE_ROUNDS_MAX, "the session waits for ever");
        }
        self.end();
        self.host.opened > 0
    }

    fn receive(&mut self) -> bool {
        if self.rest.is_empty() {
            return false;
        }
        let most = self.portion.min(self.rest.len());
        let count = match self.session.input() {
            Input::Own(space) => {
                let count = most.min(space.len());
                space.iter_mut().zip(self.rest.drain(..count)).for_each(|(to, from)| *to = from);
                count
            }
            Input::Buffers { first, offset, length } => {
                let count = most.min(length);
                self.host.check_own(first, offset, count);
                self.rest.drain(..count);
                count
            }
            Input::Wait => return false,
        };
        self.session.received(count, &mut self.host);
        true
    }

    fn answer(&mut self) -> bool {
        if let Some(tag) = self.host.flushes.pop_front() {
            self.session.flushed(tag, !self.fails, &mut self.host);
            return true;
        }
        let Some(request) = self.host.requests.pop_back() else { return false };
        let count = request.blocks() as usize;
        let outcome = match request.operation {
            _ if self.fails && self.host.calls.is_multiple_of(3) => Outcome::NoSpace,
            Operation::Status => Outcome::Mapped(Box::new([0x00ff_0f0f_3355_0001; 8])),
            _ => Outcome::Done,
        };
        match request.operation {
            Operation::Write { buffer } => {
                self.host.hand(buffer, count, Owner::Shard, Owner::Nobody)
            }
            Operation::Read { buffer } => {
                self.host.hand(buffer, count, Owner::Shard, Owner::Session)
            }
            Operation::Unmap | Operation::Status => {}
        }
        self.host.answered += 1;
        self.session.answer(Answer { tag: request.tag, outcome }, &mut self.host);
        true
    }

    fn send(&mut self) -> bool {
        let mut total = 0;
        for part in self.session.output() {
            total += match part {
                OutputPart::Own(bytes) => bytes.len(),
                OutputPart::Buffers { first, offset, length } => {
                    self.host.check_own(first, offset, length);
                    length
                }
            };
        }
        if total > 0 {
            // Long replies leave in a few portions only: a byte at a time takes too long.
            let portion = self.portion.max(total / 16);
            self.session.sent(total.min(portion), &mut self.host);
        }
        total > 0
    }

    /// The client goes away.
    fn end(&mut self) {
        self.session.release(&mut self.host);
        while self.session.in_flight() > 0 {
            assert!(self.answer(), "somebody still has a request");
        }
        assert!(self.session.is_finished(), "an end that is none");
        assert!(self.host.requests.is_empty() && self.host.flushes.is_empty());
        assert!(self.host.owners.iter().all(|owner| *owner == Owner::Nobody), "buffers were lost");
        assert_eq!(self.host.uses, 0, "the export is still open");
    }
}
