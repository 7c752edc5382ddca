//! A session between a client's byte stream and a RAM disk, driven in random portions.

use twinpoint_core::request::Answer;

use super::client::{Client, Reply};
use super::ram_host::{RamHost, Random};
use crate::nbd::limits::{COMMANDS_MAX, OUTPUT_BYTES_MAX, READ_BLOCKS_MAX};
use crate::nbd::session::Phase;
use crate::nbd::{Host, Input, NbdSession, OutputPart};

pub(super) struct Rig {
    pub(super) session: NbdSession,
    pub(super) host: RamHost,
    pub(super) random: Random,
    pub(super) client: Client,
    /// Most bytes moved by one receive or send.
    pub(super) portion: u64,
    /// Bytes received straight into buffers.
    pub(super) direct_bytes: usize,
    /// The receive under way: where it goes was asked, the bytes are there, the session does not know yet.
    receiving: Option<usize>,
    sending: Vec<u8>,
}

impl Rig {
    pub(super) fn new(seed: u64, size: u64, buffers: usize) -> Rig {
        Rig {
            session: NbdSession::new(9 << 32),
            host: RamHost::new(seed, size, buffers),
            random: Random::new(seed + 1),
            client: Client::new(),
            portion: 1 << 20,
            direct_bytes: 0,
            receiving: None,
            sending: Vec::new(),
        }
    }

    /// A rig after the handshake.
    pub(super) fn connected(seed: u64, size: u64, buffers: usize, structured: bool) -> Rig {
        let mut rig = Rig::new(seed, size, buffers);
        rig.client.connect(structured);
        rig.settle();
        rig.client.take_handshake(structured);
        rig
    }

    /// Moves everything until nothing moves any more, and gives the replies.
    pub(super) fn run(&mut self) -> Vec<Reply> {
        self.settle();
        self.client.take_replies()
    }

    /// Moves everything until nothing moves any more.
    pub(super) fn settle(&mut self) {
        let mut idle = 0;
        while idle < 2000 {
            if self.step() {
                idle = 0
            } else {
                idle += 1
            }
            if self.is_idle() {
                break;
            }
        }
        assert!(
            self.is_idle(),
            "the session waits for ever: {} to feed",
            self.client.outgoing.len()
        );
    }

    pub(super) fn is_idle(&mut self) -> bool {
        self.receiving.is_none()
            && (self.client.outgoing.is_empty() || self.session.is_finished())
            && self.host.pending.is_empty()
            && self.host.flushes.is_empty()
            && self.sending.is_empty()
            && self.session.output().len() == 0
            && !self.session.is_starved()
    }

    /// One random deed; says whether anything moved.
    pub(super) fn step(&mut self) -> bool {
        let moved = match self.random.below(6) {
            0 => self.begin_receive(),
            1 => self.end_receive(),
            2 => self.begin_send(),
            3 => self.end_send(),
            4 => self.answer(),
            _ => {
                self.session.resume(&mut self.host);
                false
            }
        };
        assert!(self.session.read_blocks <= READ_BLOCKS_MAX);
        assert!(self.session.commands.len() <= COMMANDS_MAX);
        assert!(self.session.output.waiting_bytes() <= OUTPUT_BYTES_MAX + 64 * COMMANDS_MAX);
        moved
    }

    pub(super) fn answer(&mut self) -> bool {
        if let Some(tag) = self.host.flushes.pop() {
            let done = !self.host.fail_flush;
            self.session.flushed(tag, done, &mut self.host);
            return true;
        }
        let Some(Answer { tag, outcome }) = self.host.answer_one() else { return false };
        self.session.answer(Answer { tag, outcome }, &mut self.host);
        true
    }

    fn portion(&mut self, most: usize) -> usize {
        let most = (most as u64).min(self.portion);
        if self.portion == 1 { 1 } else { 1 + self.random.below(most) as usize }
    }

    fn begin_receive(&mut self) -> bool {
        if self.receiving.is_some() || self.client.outgoing.is_empty() {
            return false;
        }
        let have = self.client.outgoing.len();
        let count = self.portion(have);
        let count = match self.session.input() {
            Input::Own(space) => {
                let count = count.min(space.len());
                space[..count].copy_from_slice(&self.client.outgoing[..count]);
                count
            }
            Input::Buffers { first, offset, length } => {
                let count = count.min(length);
                let bytes = &self.client.outgoing[..count];
                self.host.bytes(first, offset, count).copy_from_slice(bytes);
                self.direct_bytes += count;
                count
            }
            Input::Wait => return false,
        };
        self.client.outgoing.drain(..count);
        self.receiving = Some(count);
        true
    }

    fn end_receive(&mut self) -> bool {
        let Some(count) = self.receiving.take() else { return false };
        self.session.received(count, &mut self.host);
        true
    }

    /// Receives something, and nothing else happens.
    pub(super) fn receive_only(&mut self) {
        self.begin_receive();
        self.end_receive();
    }

    fn output_bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in self.session.output() {
            match part {
                OutputPart::Own(own) => bytes.extend_from_slice(own),
                OutputPart::Buffers { first, offset, length } => {
                    let start = bytes.len();
                    bytes.resize(start + length, 0);
                    self.host.copy_out(first, offset, &mut bytes[start..]);
                }
            }
        }
        bytes
    }

    fn begin_send(&mut self) -> bool {
        if self.sending.is_empty() {
            self.sending = self.output_bytes();
            return !self.sending.is_empty();
        }
        false
    }

    fn end_send(&mut self) -> bool {
        if self.sending.is_empty() {
            return false;
        }
        let bytes = std::mem::take(&mut self.sending);
        if !self.session.is_finished() {
            assert_eq!(self.output_bytes(), bytes, "bytes under way do not change");
        }
        let count = self.portion(bytes.len());
        self.client.incoming.extend_from_slice(&bytes[..count]);
        self.session.sent(count, &mut self.host);
        true
    }

    /// The client closes its side; what is under way is still answered.
    pub(super) fn leave(&mut self) {
        while self.receiving.is_some() || matches!(self.session.input(), Input::Wait) {
            if self.session.is_finished() || self.session.phase == Phase::Ending {
                return;
            }
            self.step();
        }
        self.session.received(0, &mut self.host);
        for _ in 0..100_000 {
            if self.session.is_finished() {
                return;
            }
            self.step();
        }
        panic!("a session without client does not end");
    }

    /// The client closes; everything must come back.
    pub(super) fn close(&mut self) {
        self.receiving = None;
        self.sending.clear();
        self.session.release(&mut self.host);
        while self.session.in_flight() > 0 {
            assert!(self.answer(), "somebody still has a request");
        }
        assert!(self.session.is_finished());
        assert!(self.host.pending.is_empty() && self.host.flushes.is_empty());
        assert_eq!(self.host.buffers_in_use(), 0, "buffers were lost");
        assert_eq!(self.host.uses, 0, "the export is closed");
    }
}
