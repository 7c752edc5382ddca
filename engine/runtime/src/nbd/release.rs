//! The end of a session: everything is given back.
//!
//! Invariants: every buffer has one owner also here: a filling write, the output, a part that waits for others, a
//! refused request, or a shard. The last gives its buffers back with its answer.

use twinpoint_core::request::Operation;

use super::command::PieceWork;
use super::host::Host;
use super::session::{NbdSession, Phase};
use super::slab::Key;
use super::write::Payload;

impl NbdSession {
    /// The connection is gone, and no receive or send is under way any more. Gives back every buffer that no shard
    /// has. Answers must still be brought until [`NbdSession::in_flight`] is 0; then the export is closed.
    pub fn release(&mut self, host: &mut impl Host) {
        if self.released {
            return;
        }
        self.released = true;
        self.phase = Phase::Ending;
        if let Some((first, count)) = self.payload.take().and_then(Payload::into_buffers) {
            host.free(first, count);
        }
        let mut held = std::mem::take(&mut self.released_buffers);
        self.output.drain(&mut held);
        for held in held {
            self.free_read(held.first, held.count, host);
        }
        self.drop_refused(host);
        for mut command in self.commands.take_all() {
            self.free_parts(&mut command, host);
        }
        self.ready.clear();
        self.background_waiting.clear();
        self.streams_waiting.clear();
        self.close_if_idle(host);
    }

    fn drop_refused(&mut self, host: &mut impl Host) {
        while let Some(request) = self.refused.pop_front() {
            let low = u32::try_from(request.tag.0 & u64::from(u32::MAX)).expect("32 bits");
            let piece = self.pieces.remove(Key(low)).expect("a refused request is a piece");
            match (piece.work, request.operation) {
                (PieceWork::Read { span, .. }, _) => self.free_read(span.first, span.count, host),
                (_, Operation::Write { buffer }) => host.free(buffer, request.blocks()),
                _ => {}
            }
        }
    }

    /// Ends the use of the export, when the session is released and nobody has a request of it.
    pub(super) fn close_if_idle(&mut self, host: &mut impl Host) {
        if self.released && self.in_flight() == 0 {
            assert_eq!(self.read_blocks, 0, "a released session holds no buffer");
            if let Some(terms) = self.terms.take() {
                host.close_export(terms.export.volume);
            }
        }
    }
}
