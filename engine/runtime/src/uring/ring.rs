//! The kernel's ring, with entries of either size: making it, handing entries over, and what a call's end means.
//!
//! Invariant: a ring is used by one thread, runs completions only in that one's calls, and says when it should be called.

use std::io;

use io_uring::{IoUring, Probe, Submitter, cqueue, opcode, squeue};

use super::UringError;
use super::error::refusal;

/// What every ring of ours needs.
const REQUIRED: [(u8, &str); 12] = [
    (opcode::Read::CODE, "READ"),
    (opcode::ReadFixed::CODE, "READ_FIXED"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::WriteFixed::CODE, "WRITE_FIXED"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Recv::CODE, "RECV"),
    (opcode::SendMsg::CODE, "SENDMSG"),
    (opcode::Accept::CODE, "ACCEPT"),
    (opcode::PollAdd::CODE, "POLL_ADD"),
    (opcode::Timeout::CODE, "TIMEOUT"),
    (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
];

/// A ring with entries large enough for NVMe commands.
pub(super) type Wide = IoUring<squeue::Entry128, cqueue::Entry32>;

/// The kernel's ring, with entries of either size.
pub(super) enum Ring {
    Narrow(IoUring),
    Wide(Wide),
}

impl Ring {
    pub fn submitter(&self) -> Submitter<'_> {
        match self {
            Ring::Narrow(ring) => ring.submitter(),
            Ring::Wide(ring) => ring.submitter(),
        }
    }

    /// What the kernel's rings can do.
    ///
    /// # Errors
    /// If something is missing that is built on.
    pub fn probe(&self, takes_commands: bool) -> Result<Probe, UringError> {
        let params = match self {
            Ring::Narrow(ring) => ring.params(),
            Ring::Wide(ring) => ring.params(),
        };
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            return Err(UringError::TooOld);
        }
        let mut probe = Probe::new();
        self.submitter().register_probe(&mut probe).map_err(refusal)?;
        let command = (opcode::UringCmd80::CODE, "URING_CMD");
        let mut needed = REQUIRED.iter().chain(takes_commands.then_some(&command));
        match needed.find(|(code, _)| !probe.is_supported(*code)) {
            Some((_, operation)) => Err(UringError::Lacks { operation }),
            None => Ok(probe),
        }
    }

    /// Whether entries wait to be handed over, or the kernel for a call.
    pub fn wants_call(&mut self) -> bool {
        fn wants<E: squeue::EntryMarker>(queue: squeue::SubmissionQueue<'_, E>) -> bool {
            !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
        }
        match self {
            Ring::Narrow(ring) => wants(ring.submission()),
            Ring::Wide(ring) => wants(ring.submission()),
        }
    }

    /// Queues an entry; false where there is no room.
    ///
    /// # Safety
    /// What the entry points to stays valid, and is not touched, until its last completion.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        match self {
            // SAFETY: the caller's promise.
            Ring::Narrow(ring) => unsafe { ring.submission().push(entry) }.is_ok(),
            // SAFETY: the caller's promise.
            Ring::Wide(ring) => unsafe { ring.submission().push(&entry.clone().into()) }.is_ok(),
        }
    }
}

pub(super) fn build<S: squeue::EntryMarker, C: cqueue::EntryMarker>(
    entries: u32,
    completions: u32,
    is_polled: bool,
) -> Result<IoUring<S, C>, UringError> {
    let mut builder = IoUring::<S, C>::builder();
    builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
    builder.setup_submit_all().setup_clamp().dontfork().setup_cqsize(completions);
    if is_polled {
        // Not deferring: when a process dies the kernel looks for polled commands until their completions were run, and
        // those that were deferred it runs only afterwards, so never (Linux 6.12.117; decisions/0014).
        builder.setup_iopoll();
    } else {
        builder.setup_defer_taskrun();
    }
    builder.build(entries).map_err(refusal)
}

/// What it means that the kernel ended a call so.
pub(super) fn entered(result: io::Result<usize>) -> Result<(), UringError> {
    match result.map_err(|error| error.raw_os_error().unwrap_or(0)) {
        // EAGAIN and EBUSY: the kernel is short of memory or wants completions reaped; what it did not take stays in
        // the queue for the next call.
        Ok(_) | Err(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
        Err(errno) => Err(UringError::System { errno }),
    }
}
