//! The wire over a TCP stream: the fallback where there is no RDMA, and step 4 of the flow on any network.
//!
//! A frame is header, message, placed bytes. Sending gathers queued frames, with their bytes straight from the region,
//! into as few calls as possible. Receiving reads through a small inbox; once it knows a frame's target, the rest of
//! the frame's bytes go straight into the region, and only what was in the inbox already is copied.
//!
//! Invariants:
//! - `sent_bytes` counts the bytes of the front post that the socket took; all other posts are untouched.
//! - While a frame is open (its header was read), the inbox starts with that header and its message; while bytes of
//!   it are still to be placed, whatever else is in the inbox belongs to the frames after it.
//! - [`Progress::Waiting`] is answered only after the socket had nothing to give and took nothing, or nothing was
//!   queued: so an edge-triggered watcher misses neither bytes nor the end of the stream.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use crate::frame::{HEADER_BYTES, Header};
use crate::region::Gather;
use crate::{
    CloseReason, Counters, Event, MESSAGE_BYTES_MAX, POLL_BYTES_MAX, POLL_MESSAGES_MAX, POSTS_MAX,
    Placement, PostError, Progress, Region, Span, check_post,
};

/// Bytes of the inbox. More would copy more of each placement; it must hold a header and the longest message twice,
/// so that there is room behind an open frame.
const INBOX_BYTES: usize = 2 * (HEADER_BYTES + MESSAGE_BYTES_MAX);

/// One connection over TCP. See the contract in the crate's documentation.
#[derive(Debug)]
pub struct TcpWire {
    stream: TcpStream,
    region: Arc<Region>,
    lend: Span,
    outbox: VecDeque<Post>,
    /// Posts whose buffers wait to be used again: no allocation per post.
    spare: Vec<Post>,
    sent_bytes: usize,
    /// The stream refused output; input may still be worth reading.
    output_lost: Option<io::ErrorKind>,
    inbox: Box<[u8]>,
    inbox_start: usize,
    inbox_end: usize,
    frame: Option<OpenFrame>,
    closed: Option<CloseReason>,
    closed_was_told: bool,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Post {
    token: u64,
    /// Header and message.
    head: Vec<u8>,
    sources: Vec<Span>,
    placed_bytes: u32,
}

/// A frame whose header was read.
#[derive(Clone, Copy, Debug)]
struct OpenFrame {
    header: Header,
    placed_bytes: u32,
}

enum Received {
    /// Frames were perhaps completed; there may be more.
    Some(usize),
    /// The socket has nothing now.
    Nothing,
    /// The peer sends no more.
    End,
}

impl TcpWire {
    /// Makes a wire of a connected stream and lends `lend` of `region` to the peer. The stream is not authenticated
    /// here: [`crate::Channel::into_wire`] is the usual way.
    ///
    /// # Errors
    /// What the system says to the socket's options.
    ///
    /// # Panics
    /// If `lend` is not inside the region.
    pub fn new(stream: TcpStream, region: Arc<Region>, lend: Span) -> io::Result<TcpWire> {
        assert!(region.contains(lend), "{lend:?} is not inside {region:?}");
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(TcpWire {
            stream,
            region,
            lend,
            outbox: VecDeque::with_capacity(POSTS_MAX),
            spare: Vec::with_capacity(POSTS_MAX),
            sent_bytes: 0,
            output_lost: None,
            inbox: vec![0; INBOX_BYTES].into_boxed_slice(),
            inbox_start: 0,
            inbox_end: 0,
            frame: None,
            closed: None,
            closed_was_told: false,
            counters: Counters::default(),
        })
    }

    /// See [`crate::Wire::post`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn post(
        &mut self,
        token: u64,
        message: &[u8],
        placement: Option<Placement<'_>>,
    ) -> Result<(), PostError> {
        if self.closed.is_some() {
            return Err(PostError::Closed);
        }
        let placed_bytes = check_post(&self.region, message, placement)?;
        if self.outbox.len() == POSTS_MAX {
            return Err(PostError::Full);
        }
        let placement = placement.filter(|_| placed_bytes > 0);
        let target = placement.map_or(0, |placement| placement.target);
        let message_bytes = u32::try_from(message.len()).expect("check_post bounds the message");
        let header = Header { message_bytes, placed: Span::new(target, placed_bytes) };
        let mut post = self.spare.pop().unwrap_or_default();
        post.token = token;
        post.placed_bytes = placed_bytes;
        post.head.clear();
        post.head.extend_from_slice(&header.encode());
        post.head.extend_from_slice(message);
        self.counters.message_bytes_copied += post.head.len() as u64;
        post.sources.clear();
        post.sources.extend_from_slice(placement.map_or(&[], |placement| placement.sources));
        self.outbox.push_back(post);
        Ok(())
    }

    /// See [`crate::Wire::poll_when`].
    pub fn poll_when(
        &mut self,
        may_be_readable: bool,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Progress {
        let mut progress = Progress::Waiting;
        if self.closed.is_none() && self.output_lost.is_none() && self.send(deliver) {
            progress = Progress::More;
        }
        // Where output failed, the input's end says why.
        let receives = may_be_readable || self.output_lost.is_some();
        if self.closed.is_none() && receives && self.receive(deliver) {
            progress = Progress::More;
        }
        let Some(reason) = self.closed else { return progress };
        if !self.closed_was_told {
            self.closed_was_told = true;
            self.outbox.clear();
            // The peer learns at once. Refusal means that the stream is gone already, which is what is wanted.
            let _ = self.stream.shutdown(Shutdown::Both);
            deliver(Event::Closed { reason });
        }
        Progress::Waiting
    }

    /// See [`crate::Wire::descriptor`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// See [`crate::Wire::wants_write`].
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.closed.is_none() && self.output_lost.is_none() && !self.outbox.is_empty()
    }

    /// See [`crate::Wire::counters`].
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// See [`crate::Wire::close`].
    pub fn close(&mut self) {
        if self.closed.is_none() {
            self.closed = Some(CloseReason::Local);
            // As in `poll`. The report waits for the next poll, the peer does not.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Sends until the socket takes no more, nothing waits, or this call did enough. Says whether it did enough.
    fn send(&mut self, deliver: &mut dyn FnMut(Event<'_>)) -> bool {
        let mut budget = POLL_BYTES_MAX;
        while !self.outbox.is_empty() {
            if budget == 0 {
                return true;
            }
            self.counters.send_calls += 1;
            match self.gather().send(self.stream.as_fd()) {
                Ok(bytes) => {
                    budget = budget.saturating_sub(bytes);
                    self.sent_bytes += bytes;
                    self.finish_posts(deliver);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.output_lost = Some(error.kind());
                    return false;
                }
            }
        }
        false
    }

    fn gather(&self) -> Gather<'_> {
        let mut gather = Gather::new(&self.region);
        let mut skip_bytes = self.sent_bytes;
        for post in &self.outbox {
            if !add_post(&mut gather, post, skip_bytes) {
                break;
            }
            skip_bytes = 0;
        }
        gather
    }

    fn finish_posts(&mut self, deliver: &mut dyn FnMut(Event<'_>)) {
        while let Some(post) = self.outbox.front() {
            let post_bytes = post.head.len() + post.placed_bytes as usize;
            if self.sent_bytes < post_bytes {
                return;
            }
            self.sent_bytes -= post_bytes;
            let post = self.outbox.pop_front().expect("there is a front");
            self.counters.count_sent(post.head.len() - HEADER_BYTES, post.placed_bytes);
            deliver(Event::Posted { token: post.token });
            self.spare.push(post);
        }
        assert!(self.sent_bytes == 0, "the socket took more than was queued");
    }

    /// Receives until the socket has nothing or this call did enough. Says whether it did enough.
    fn receive(&mut self, deliver: &mut dyn FnMut(Event<'_>)) -> bool {
        let mut budget = POLL_BYTES_MAX;
        let mut messages = POLL_MESSAGES_MAX;
        loop {
            match self.take_frames(&mut messages, deliver) {
                Ok(()) => {}
                Err(reason) => {
                    self.closed = Some(reason);
                    return false;
                }
            }
            if messages == 0 || budget == 0 {
                return true;
            }
            match self.read(budget) {
                Ok(Received::Some(bytes)) => budget = budget.saturating_sub(bytes),
                Ok(Received::Nothing) => {
                    self.closed = self.output_lost.map(|kind| CloseReason::Lost { kind });
                    return false;
                }
                Ok(Received::End) if self.inbox_start == self.inbox_end => {
                    self.closed = Some(CloseReason::Peer);
                    return false;
                }
                Ok(Received::End) => {
                    self.closed = Some(CloseReason::Lost { kind: io::ErrorKind::UnexpectedEof });
                    return false;
                }
                Err(kind) => {
                    self.closed = Some(CloseReason::Lost { kind });
                    return false;
                }
            }
        }
    }

    /// Delivers the whole frames that have arrived, at most `messages` of them.
    fn take_frames(
        &mut self,
        messages: &mut u32,
        deliver: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), CloseReason> {
        while *messages > 0 {
            let buffered = &self.inbox[self.inbox_start..self.inbox_end];
            let Some((header_bytes, rest)) = buffered.split_first_chunk() else { return Ok(()) };
            let mut frame = match self.frame {
                Some(frame) => frame,
                None => {
                    let header = Header::decode(header_bytes, self.lend.length)
                        .map_err(CloseReason::Protocol)?;
                    OpenFrame { header, placed_bytes: 0 }
                }
            };
            let message_bytes = frame.header.message_bytes as usize;
            if rest.len() < message_bytes {
                // The header stays in the inbox and is decoded again: cheaper than one more state.
                return Ok(());
            }
            if self.frame.is_none() {
                self.place_buffered(&mut frame);
            }
            self.frame = Some(frame);
            if frame.placed_bytes < frame.header.placed.length {
                return Ok(());
            }
            *messages -= 1;
            self.frame = None;
            let start = self.inbox_start + HEADER_BYTES;
            self.inbox_start = start + message_bytes;
            self.counters.count_received(message_bytes, frame.placed_bytes);
            let bytes = &self.inbox[start..self.inbox_start];
            let placed = Some(frame.header.placed).filter(|placed| placed.length > 0);
            deliver(Event::Message { bytes, placed });
        }
        Ok(())
    }

    /// Moves the bytes to place that are in the inbox already into the region, and closes the gap they leave.
    fn place_buffered(&mut self, frame: &mut OpenFrame) {
        let start = self.inbox_start + HEADER_BYTES + frame.header.message_bytes as usize;
        let placed = frame.header.placed;
        let bytes = (placed.length as usize).min(self.inbox_end - start);
        if bytes == 0 {
            return;
        }
        self.region.copy_in(self.lend.offset + placed.offset, &self.inbox[start..start + bytes]);
        frame.placed_bytes = bytes as u32;
        self.counters.placed_bytes_copied += bytes as u64;
        self.counters.message_bytes_copied += (start - self.inbox_start) as u64;
        // The head moves up to what follows: usually a short message before nothing or much.
        self.inbox.copy_within(self.inbox_start..start, self.inbox_start + bytes);
        self.inbox_start += bytes;
    }

    /// Reads once: first what the open frame still has to place, into the region, then into the inbox.
    fn read(&mut self, budget: usize) -> Result<Received, io::ErrorKind> {
        self.compact();
        let placing = self.frame.map_or(Span::default(), |frame| {
            let rest_bytes = (frame.header.placed.length - frame.placed_bytes).min(budget as u32);
            let offset = frame.header.placed.offset + u64::from(frame.placed_bytes);
            Span::new(self.lend.offset + offset, rest_bytes)
        });
        let whole = self
            .frame
            .is_none_or(|frame| frame.placed_bytes + placing.length == frame.header.placed.length);
        // A placement that the budget cuts short must not be followed by the inbox.
        let room = if whole { &mut self.inbox[self.inbox_end..] } else { &mut [] };
        self.counters.receive_calls += 1;
        let bytes = match self.region.receive(self.stream.as_fd(), placing, room) {
            Ok(0) => return Ok(Received::End),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.counters.receive_calls_empty += 1;
                return Ok(Received::Nothing);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Received::Some(0));
            }
            Err(error) => return Err(error.kind()),
        };
        let placed_bytes = bytes.min(placing.length as usize);
        if let Some(frame) = &mut self.frame {
            frame.placed_bytes += placed_bytes as u32;
        }
        self.inbox_end += bytes - placed_bytes;
        Ok(Received::Some(bytes))
    }

    /// Makes room for a header and the longest message behind what must stay.
    fn compact(&mut self) {
        if self.inbox_start == self.inbox_end {
            (self.inbox_start, self.inbox_end) = (0, 0);
        } else if INBOX_BYTES - self.inbox_end < HEADER_BYTES + MESSAGE_BYTES_MAX {
            self.inbox.copy_within(self.inbox_start..self.inbox_end, 0);
            self.inbox_end -= self.inbox_start;
            self.counters.message_bytes_copied += self.inbox_end as u64;
            self.inbox_start = 0;
        }
        assert!(self.inbox_end < INBOX_BYTES, "a frame's head is shorter than the inbox");
    }
}

/// Adds what is left of a post after its first `skip_bytes`. Says whether all of it went in.
fn add_post<'a>(gather: &mut Gather<'a>, post: &'a Post, skip_bytes: usize) -> bool {
    let head_skip = skip_bytes.min(post.head.len());
    if !gather.add_bytes(&post.head[head_skip..]) {
        return false;
    }
    let mut skip_bytes = (skip_bytes - head_skip) as u32;
    for source in &post.sources {
        let skip = skip_bytes.min(source.length);
        skip_bytes -= skip;
        let rest = Span::new(source.offset + u64::from(skip), source.length - skip);
        if !gather.add_span(rest) {
            return false;
        }
    }
    true
}
