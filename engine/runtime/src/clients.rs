//! Step 1 of the flow: the sockets of NBD clients, moved by the worker's io_uring between kernel and sessions.
//!
//! Invariants: at most one receive and one send are under way for each client; a session and its buffers live until
//! both ended and every answer it waits for came; a client that cannot go on (no memory, full ring, held writers) is
//! resumed, and dropped only when the store answers nothing well any more.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use twinpoint_core::request::{Answer, Operation, Request, Tag, locate};
use twinpoint_core::units::{BufferId, VolumeId};

use crate::buffers::Pool;
use crate::mail::{Mail, Mailbox};
use crate::nbd::{Export, Host, Input, NbdSession, OutputPart};
use crate::shared::Shared;
use crate::uring::{Amount, COPIED_BYTES_MAX, PARTS_MAX, Part, Uring, UringError};

/// Bits of a tag: worker or local client, client, and the session's own 32.
pub(crate) const WORKER_SHIFT: u32 = 56;
const CLIENT_SHIFT: u32 = 32;

/// The clients of one worker.
#[derive(Default)]
pub(crate) struct Clients {
    all: Vec<Option<Client>>,
    free: Vec<usize>,
}

struct Client {
    /// Of any kind: only its descriptor and its shutting down are used.
    socket: TcpStream,
    session: NbdSession,
    receiving: bool,
    sending: bool,
    /// The socket was shut down; what is under way ends soon.
    closing: bool,
}

/// What a session may use of its worker.
pub(crate) struct HostPort<'a> {
    pub worker: usize,
    pub shared: &'a Shared,
    pub pool: &'a mut Pool,
    pub mailbox: &'a mut Mailbox,
    /// Set when a session was refused memory: a seal would give some back.
    pub starved: &'a mut bool,
    /// Set when buffers came back: somebody may wait for them.
    pub may_resume: &'a mut bool,
    /// Set when a ring was full.
    pub ring_full: &'a mut bool,
}

/// The worker that a tag belongs to.
pub(crate) fn worker_of(tag: Tag) -> usize {
    (tag.0 >> WORKER_SHIFT) as usize
}

fn client_of(tag: Tag) -> usize {
    (tag.0 >> CLIENT_SHIFT & 0xff_ffff) as usize
}

/// How the user data of a client's operations is made: of a receive, of a send.
pub(crate) struct UserData {
    pub receive: fn(usize) -> u64,
    pub send: fn(usize) -> u64,
}

impl Clients {
    /// Takes a new client in.
    pub fn add(&mut self, socket: OwnedFd, worker: usize) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            self.all.len() - 1
        });
        let base = (worker as u64) << WORKER_SHIFT | (index as u64) << CLIENT_SHIFT;
        let session = NbdSession::new(base);
        self.all[index] = Some(Client {
            socket: TcpStream::from(socket),
            session,
            receiving: false,
            sending: false,
            closing: false,
        });
        index
    }

    /// How many clients there are.
    pub fn count(&self) -> usize {
        self.all.len() - self.free.len()
    }

    /// Bytes arrived from a client, or its socket failed.
    pub fn received(&mut self, index: usize, result: i32, host: &mut HostPort<'_>) {
        let client = self.all[index].as_mut().expect("a client lives until its receive ended");
        client.receiving = false;
        client.session.received(usize::try_from(result).unwrap_or(0), host);
    }

    /// Bytes went to a client, or its socket failed.
    pub fn sent(&mut self, index: usize, result: i32, host: &mut HostPort<'_>) {
        let client = self.all[index].as_mut().expect("a client lives until its send ended");
        client.sending = false;
        match usize::try_from(result) {
            Ok(bytes) if bytes > 0 => client.session.sent(bytes, host),
            _ => client.closing = true,
        }
    }

    /// A shard answered a request of one of these clients.
    pub fn answer(&mut self, answer: Answer, host: &mut HostPort<'_>) -> usize {
        let index = client_of(answer.tag);
        let client = self.all[index].as_mut().expect("a client lives until its answers came");
        client.session.answer(answer, host);
        index
    }

    /// A flush of one of these clients is done, or failed.
    pub fn flushed(&mut self, tag: Tag, done: bool, host: &mut HostPort<'_>) -> usize {
        let index = client_of(tag);
        let client =
            self.all[index].as_mut().expect("a client lives until its flushes were answered");
        client.session.flushed(tag, done, host);
        index
    }

    /// Lets every client go on that waited for memory, room, or the hold to end.
    pub fn resume(&mut self, host: &mut HostPort<'_>, resumed: &mut Vec<usize>) {
        for (index, client) in self.all.iter_mut().enumerate() {
            if let Some(client) = client.as_mut().filter(|client| client.session.is_starved()) {
                client.session.resume(host);
                resumed.push(index);
            }
        }
    }

    /// Whether a client waits to be resumed.
    pub fn has_starved(&self) -> bool {
        self.all.iter().flatten().any(|client| client.session.is_starved())
    }

    /// Has all clients told that the node stops.
    pub fn shutdown(&mut self) -> Vec<usize> {
        for client in self.all.iter_mut().flatten() {
            client.session.shutdown();
            client.closing = true;
        }
        (0..self.all.len()).filter(|index| self.all[*index].is_some()).collect()
    }

    /// Starts the receive and the send that a client needs; lets it go when it is over.
    pub fn drive(
        &mut self,
        index: usize,
        uring: &mut Uring,
        host: &mut HostPort<'_>,
        user_data: &UserData,
    ) -> Result<(), UringError> {
        let Some(client) = &mut self.all[index] else { return Ok(()) };
        if host.shared.is_refusing() {
            client.session.give_up();
        }
        client.closing |= client.session.is_finished();
        if !client.closing {
            client.start_send(index, uring, host.shared, user_data)?;
            return client.start_receive(index, uring, host.shared, user_data);
        }
        if client.receiving || client.sending {
            // Makes what is under way end. An error means that it is ending already.
            _ = client.socket.shutdown(Shutdown::Both);
            return Ok(());
        }
        client.session.release(host);
        if client.session.in_flight() == 0 {
            self.all[index] = None;
            self.free.push(index);
        }
        Ok(())
    }
}

impl Client {
    fn start_receive(
        &mut self,
        index: usize,
        uring: &mut Uring,
        shared: &Shared,
        user_data: &UserData,
    ) -> Result<(), UringError> {
        if self.receiving || uring.free() == 0 {
            return Ok(());
        }
        let socket = self.socket.as_raw_fd();
        let id = (user_data.receive)(index);
        match self.session.input() {
            Input::Own(space) => {
                let length = u32::try_from(space.len()).expect("a session's input buffer is small");
                // SAFETY: the session keeps the buffer at this address until `received`, which is called only when
                // this receive was reaped; the client is not dropped while `receiving` is set, and the worker
                // drains its io_uring before it drops its clients.
                unsafe { uring.receive_at(id, socket, space.as_mut_ptr(), length, Amount::Some)? };
            }
            Input::Buffers { first, offset, length } => {
                let span = shared.arena.part(first, offset, length);
                uring.receive(id, socket, span, Amount::Some)?;
            }
            Input::Wait => return Ok(()),
        }
        self.receiving = true;
        Ok(())
    }

    fn start_send(
        &mut self,
        index: usize,
        uring: &mut Uring,
        shared: &Shared,
        user_data: &UserData,
    ) -> Result<(), UringError> {
        if self.sending || uring.free() == 0 {
            return Ok(());
        }
        let mut parts = Vec::new();
        let mut copied = 0;
        for part in self.session.output().take(PARTS_MAX) {
            match part {
                OutputPart::Own(bytes) => {
                    let room = COPIED_BYTES_MAX - copied;
                    let taken = &bytes[..bytes.len().min(room)];
                    copied += taken.len();
                    if !taken.is_empty() {
                        parts.push(Part::Bytes(taken));
                    }
                    if taken.len() < bytes.len() {
                        break;
                    }
                }
                OutputPart::Buffers { first, offset, length } => {
                    parts.push(Part::Span(shared.arena.part(first, offset, length)));
                }
            }
        }
        if !parts.is_empty() {
            uring.send((user_data.send)(index), self.socket.as_raw_fd(), &parts)?;
            self.sending = true;
        }
        Ok(())
    }
}

impl Host for HostPort<'_> {
    fn allocate(&mut self, want: u32) -> Option<(BufferId, u32)> {
        let buffers = self.pool.allocate(want);
        *self.starved |= buffers.is_none();
        buffers
    }

    fn free(&mut self, first: BufferId, count: u32) {
        self.pool.free(first, count);
        *self.may_resume = true;
    }

    fn copy_in(&mut self, first: BufferId, offset: usize, bytes: &[u8]) {
        self.shared.arena.copy_in(first, offset, bytes);
        self.shared.costs(self.worker).client_bytes_copied.add(bytes.len() as u64);
    }

    fn copy_out(&self, first: BufferId, offset: usize, bytes: &mut [u8]) {
        self.shared.arena.copy_out(first, offset, bytes);
        self.shared.costs(self.worker).client_bytes_copied.add(bytes.len() as u64);
    }

    fn zero(&mut self, first: BufferId, offset: usize, length: usize) {
        self.shared.arena.zero(first, offset, length);
    }

    fn checksum(&mut self, first: BufferId, count: u32) {
        self.shared.arena.checksum_compute(first, count);
    }

    /// Admits the request: between the stamp and the ring nothing waits (R2).
    fn submit(&mut self, request: Request) -> Result<(), Request> {
        let is_write = matches!(request.operation, Operation::Write { .. } | Operation::Unmap);
        if is_write && self.shared.is_holding() {
            return Err(request);
        }
        let (shard, _) = locate(request.volume, request.first_block(), self.shared.geometry.shards);
        let owner = self.shared.owner(shard);
        if !self.mailbox.has_room(owner) {
            *self.ring_full = true;
            return Err(request);
        }
        self.shared.count_request(&request);
        self.shared.admit(self.mailbox, self.worker, shard, request);
        Ok(())
    }

    fn flush(&mut self, tag: Tag) {
        self.mailbox.send(0, Mail::Flush(tag));
    }

    fn open_export(&mut self, name: &str) -> Option<Export> {
        self.shared.exports.open(name)
    }

    fn list_exports(&self) -> Vec<String> {
        self.shared.exports.names()
    }

    fn close_export(&mut self, volume: VolumeId) {
        self.shared.exports.close(volume);
    }
}
