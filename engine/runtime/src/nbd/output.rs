//! What waits to be sent: own bytes and buffers of large reads, in order.
//!
//! Invariants: the batch that is being sent does not change until all of it is sent; replies meanwhile collect in
//! the next one. While one read streams its reply piece by piece, replies of others are held back, because
//! nothing may come in between. A buffer in a batch is released exactly once: when its last byte is sent, or by
//! [`OutputQueue::drain`].

use std::collections::{VecDeque, vec_deque};

use twinpoint_core::units::BufferId;

use super::limits::{OUTPUT_BYTES_MAX, OUTPUT_PARTS_MAX};
use super::slab::Key;

/// The next bytes to send, in order: an iterator over a few parts.
#[derive(Debug)]
pub struct Output<'a> {
    bytes: &'a [u8],
    parts: std::iter::Take<vec_deque::Iter<'a, Part>>,
}

/// A part of the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OutputPart<'a> {
    /// Bytes of the session, stable until they are sent.
    Own(&'a [u8]),
    /// Bytes of consecutive buffers of the arena.
    Buffers {
        /// The first buffer.
        first: BufferId,
        /// Where the bytes begin, counted from the first buffer's start.
        offset: usize,
        /// How many bytes.
        length: usize,
    },
}

impl<'a> Iterator for Output<'a> {
    type Item = OutputPart<'a>;

    fn next(&mut self) -> Option<OutputPart<'a>> {
        let part = self.parts.next()?;
        Some(match part.source {
            Source::Own { start } => OutputPart::Own(&self.bytes[start..start + part.length]),
            Source::Buffers { held, offset } => {
                OutputPart::Buffers { first: held.first, offset, length: part.length }
            }
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.parts.size_hint()
    }
}

impl ExactSizeIterator for Output<'_> {}

/// Buffers in the output, and who gets them when they are sent: a streaming read, or the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Held {
    pub(super) first: BufferId,
    pub(super) count: u32,
    pub(super) reader: Option<Key>,
}

#[derive(Debug)]
struct Part {
    source: Source,
    length: usize,
}

#[derive(Debug)]
enum Source {
    Own { start: usize },
    Buffers { held: Held, offset: usize },
}

/// Own bytes and parts, in order.
#[derive(Default)]
pub(super) struct Batch {
    // Longer than what is used, so that room is not zeroed again for each reply.
    storage: Vec<u8>,
    used: usize,
    parts: VecDeque<Part>,
}

impl Batch {
    /// Adds `length` own bytes and gives them to be filled.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        let start = self.used;
        self.used += length;
        if self.storage.len() < self.used {
            self.storage.resize(self.used.next_power_of_two(), 0);
        }
        match self.parts.back_mut() {
            Some(Part { source: Source::Own { .. }, length: last }) => *last += length,
            _ => self.parts.push_back(Part { source: Source::Own { start }, length }),
        }
        &mut self.storage[start..self.used]
    }

    /// Adds own bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// Adds `length` bytes of buffers.
    pub(super) fn put_buffers(&mut self, held: Held, offset: usize, length: usize) {
        self.parts.push_back(Part { source: Source::Buffers { held, offset }, length });
    }

    /// How many own bytes it has.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    fn append(&mut self, other: &mut Batch) {
        if self.parts.is_empty() {
            std::mem::swap(self, other);
            return;
        }
        for part in other.parts.drain(..) {
            match part.source {
                Source::Own { start } => self.put(&other.storage[start..start + part.length]),
                Source::Buffers { held, offset } => self.put_buffers(held, offset, part.length),
            }
        }
        other.used = 0;
    }

    /// All is sent. A batch that grew large because its client was slow gives its memory back.
    fn reset(&mut self) {
        self.used = 0;
        if self.storage.len() > 2 * OUTPUT_BYTES_MAX {
            self.storage = Vec::new();
        }
    }

    fn clear(&mut self, released: &mut Vec<Held>) {
        self.reset();
        for part in self.parts.drain(..) {
            if let Source::Buffers { held, .. } = part.source {
                released.push(held);
            }
        }
    }
}

/// The batch being sent, the next one, and what a stream holds back.
#[derive(Default)]
pub(super) struct OutputQueue {
    sending: Batch,
    next: Batch,
    behind: Batch,
    streaming: Option<Key>,
}

impl OutputQueue {
    /// Where a whole reply goes.
    pub(super) fn replies(&mut self) -> &mut Batch {
        if self.streaming.is_some() { &mut self.behind } else { &mut self.next }
    }

    /// Where the streaming read's next bytes go.
    pub(super) fn stream(&mut self) -> &mut Batch {
        &mut self.next
    }

    /// Whether some read streams its reply.
    pub(super) fn is_streaming(&self) -> bool {
        self.streaming.is_some()
    }

    /// From now on only `reader` sends.
    pub(super) fn begin_stream(&mut self, reader: Key) {
        assert!(self.streaming.is_none(), "two reads stream at once");
        self.streaming = Some(reader);
    }

    /// The stream is complete: what it held back follows.
    pub(super) fn end_stream(&mut self, reader: Key) {
        assert_eq!(self.streaming, Some(reader), "a stream is ended by its reader");
        self.streaming = None;
        self.next.append(&mut self.behind);
    }

    /// Own bytes that wait behind the batch being sent.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.next.used + self.behind.used
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sending.parts.is_empty() && self.next.parts.is_empty() && self.behind.parts.is_empty()
    }

    /// What to send next.
    pub(super) fn output(&mut self) -> Output<'_> {
        if self.sending.parts.is_empty() {
            std::mem::swap(&mut self.sending, &mut self.next);
        }
        Output {
            bytes: &self.sending.storage,
            parts: self.sending.parts.iter().take(OUTPUT_PARTS_MAX),
        }
    }

    /// The first `bytes` of the output are sent; adds the buffers that are free again to `released`.
    pub(super) fn sent(&mut self, bytes: usize, released: &mut Vec<Held>) {
        let mut rest = bytes;
        while rest > 0 {
            let part = self.sending.parts.front_mut().expect("no more is sent than was given");
            let step = rest.min(part.length);
            rest -= step;
            part.length -= step;
            match &mut part.source {
                Source::Own { start } => *start += step,
                Source::Buffers { offset, .. } => *offset += step,
            }
            if part.length == 0
                && let Some(Part { source: Source::Buffers { held, .. }, .. }) =
                    self.sending.parts.pop_front()
            {
                released.push(held);
            }
        }
        if self.sending.parts.is_empty() {
            self.sending.reset();
        }
    }

    /// Throws everything away and adds all buffers to `released`.
    pub(super) fn drain(&mut self, released: &mut Vec<Held>) {
        self.streaming = None;
        self.sending.clear(released);
        self.next.clear(released);
        self.behind.clear(released);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(first: u32) -> Held {
        Held { first: BufferId(first), count: 1, reader: None }
    }

    #[test]
    fn replies_wait_behind_a_stream_and_keep_their_order() {
        let mut queue = OutputQueue::default();
        queue.replies().put(b"a");
        queue.begin_stream(Key(7));
        queue.replies().put(b"c");
        queue.replies().put_buffers(held(2), 0, 2);
        queue.stream().put(b"b");
        queue.end_stream(Key(7));
        queue.replies().put(b"d");
        let parts: Vec<_> = queue.output().collect();
        let buffers = OutputPart::Buffers { first: BufferId(2), offset: 0, length: 2 };
        assert_eq!(parts, [OutputPart::Own(b"abc"), buffers, OutputPart::Own(b"d")]);
        let mut released = Vec::new();
        queue.sent(4, &mut released);
        assert!(released.is_empty());
        queue.replies().put(b"e");
        let rest = OutputPart::Buffers { first: BufferId(2), offset: 1, length: 1 };
        assert_eq!(queue.output().collect::<Vec<_>>(), [rest, OutputPart::Own(b"d")]);
        queue.sent(2, &mut released);
        assert_eq!(released, [held(2)]);
        assert_eq!(queue.output().collect::<Vec<_>>(), [OutputPart::Own(b"e")]);
        queue.sent(1, &mut released);
        assert!(queue.is_empty());
    }
}
