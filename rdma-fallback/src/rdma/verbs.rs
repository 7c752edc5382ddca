//! Verbs: every call to a card, and every `unsafe` that it takes, behind types that cannot be used wrongly.
//!
//! It is the lowest part of step 4 of the flow: what the wire has decided to send becomes requests of a queue pair.
//! `library.rs` finds the functions, `manager.rs` connects, the other files of this folder only use the types here.
//!
//! ```text
//!   Context (device) <- Domain <- Memory (registered part of a region)
//!      ^                   ^        ^
//!      '--- Completions <--'-- QueuePair: owns its completions, keeps its memory alive
//! ```
//!
//! Invariants:
//! - Each type owns one object of the library, destroys it once, and keeps alive what that object was made of. A queue
//!   pair is destroyed before the memory its requests lead to can go: after that no card touches the memory.
//! - A request leads only to memory registered in the queue pair's own domain, inside what was registered.
//! - The completion queue has room for one completion of every request that the queue pair can hold, so that it cannot
//!   overrun, whatever fails.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ___ibv_query_port, ibv_access_flags, ibv_ack_async_event, ibv_ack_cq_events, ibv_alloc_pd,
    ibv_async_event, ibv_close_device, ibv_comp_channel, ibv_context, ibv_cq,
    ibv_create_comp_channel, ibv_create_cq, ibv_create_qp, ibv_dealloc_pd, ibv_dereg_mr,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_destroy_qp, ibv_device, ibv_device_attr,
    ibv_free_device_list, ibv_get_async_event, ibv_get_cq_event, ibv_get_device_list,
    ibv_get_device_name, ibv_gid, ibv_modify_qp, ibv_mr, ibv_open_device, ibv_pd, ibv_poll_cq,
    ibv_port_attr, ibv_port_state, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr,
    ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_query_device, ibv_query_gid,
    ibv_recv_wr, ibv_reg_mr, ibv_req_notify_cq, ibv_send_flags, ibv_send_wr, ibv_sge,
    ibv_transport_type, ibv_wc, ibv_wc_opcode, ibv_wc_status, ibv_wr_opcode,
};

use super::card::{
    Access, AsyncEvent, COMPLETIONS_AT_ONCE, Completion, DeviceLimits, Done, PortState, QueueSizes,
    Step,
};
use super::watch::set_nonblocking;
use crate::{Region, Span};

/// Names of the devices that know write with immediate: those of InfiniBand's transport, RoCE among them, not iWARP.
pub(super) fn device_names() -> io::Result<Vec<String>> {
    let list = DeviceList::new()?;
    // SAFETY: the devices are of the list, which is alive; the field is written when it is made only.
    let transport = |device: *mut ibv_device| unsafe { (*device).transport_type };
    let fits =
        |device: &*mut ibv_device| transport(*device) == ibv_transport_type::IBV_TRANSPORT_IB;
    Ok(list.devices().filter(fits).map(|device| name_of(device).to_owned()).collect())
}

/// The library's list of devices, freed when dropped.
struct DeviceList {
    first: NonNull<*mut ibv_device>,
    count: usize,
}

impl DeviceList {
    fn new() -> io::Result<DeviceList> {
        let mut count = 0;
        // SAFETY: `count` is alive during the call, which writes it.
        let first = made(unsafe { ibv_get_device_list(&mut count) })?;
        Ok(DeviceList { first, count: usize::try_from(count).unwrap_or(0) })
    }

    fn devices(&self) -> impl Iterator<Item = *mut ibv_device> {
        // SAFETY: the library gave an array of so many pointers, which lives until it is freed in `drop`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }.iter().copied()
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list that the library gave, freed once.
        unsafe { ibv_free_device_list(self.first.as_ptr()) };
    }
}

fn name_of<'a>(device: *mut ibv_device) -> &'a str {
    // SAFETY: `device` is of a list or an open context, both alive at the callers, who copy the name.
    let name = unsafe { CStr::from_ptr(ibv_get_device_name(device)) };
    name.to_str().unwrap_or("(a name that is not text)")
}

/// Name of the device that the connection manager has opened.
///
/// # Safety
/// The context is open.
pub(super) unsafe fn name_of_context(context: NonNull<ibv_context>) -> String {
    // SAFETY: open, as the caller promises; the field is written when it is opened only.
    name_of(unsafe { (*context.as_ptr()).device }).to_owned()
}

/// An open device.
pub(super) struct Context(NonNull<ibv_context>);

// SAFETY: the library's objects may be used from any thread, by several at once; it locks by itself.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device of this name.
    pub(super) fn open(name: &str) -> io::Result<Context> {
        let list = DeviceList::new()?;
        let device = list.devices().find(|device| name_of(*device) == name);
        let device = device.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        // SAFETY: the device is of the list, which is alive.
        let context = Context(made(unsafe { ibv_open_device(device) })?);
        set_nonblocking(context.async_descriptor())?;
        Ok(context)
    }

    pub(super) fn limits(&self) -> io::Result<DeviceLimits> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut found: ibv_device_attr = unsafe { mem::zeroed() };
        // SAFETY: an open context; `found` is alive during the call, which writes it.
        succeeded(unsafe { ibv_query_device(self.0.as_ptr(), &mut found) })?;
        let number = |number: c_int| u32::try_from(number).unwrap_or(0);
        Ok(DeviceLimits {
            requests_max: number(found.max_qp_wr),
            pieces_max: number(found.max_sge),
            completions_max: number(found.max_cqe),
        })
    }

    pub(super) fn port(&self, port: u8) -> io::Result<PortState> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut found: ibv_port_attr = unsafe { mem::zeroed() };
        // SAFETY: an open context; `found` is alive during the call, which writes it.
        succeeded(unsafe { ___ibv_query_port(self.0.as_ptr(), port, &mut found) })?;
        Ok(PortState {
            is_active: found.state == ibv_port_state::IBV_PORT_ACTIVE,
            mtu_bytes: 128 << found.active_mtu.min(5),
            gids: u32::try_from(found.gid_tbl_len).unwrap_or(0),
        })
    }

    /// An address of a port.
    pub(super) fn gid(&self, port: u8, index: u32) -> io::Result<[u8; 16]> {
        let index = c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut gid = ibv_gid { raw: [0; 16] };
        // SAFETY: an open context; `gid` is alive during the call, which writes it.
        succeeded(unsafe { ibv_query_gid(self.0.as_ptr(), port, index, &mut gid) })?;
        // SAFETY: any sixteen bytes are valid as such.
        Ok(unsafe { gid.raw })
    }

    /// What the device has reported, or `WouldBlock`.
    pub(super) fn next_async_event(&self) -> io::Result<AsyncEvent> {
        // SAFETY: numbers and pointers, for which zeros are valid; the first kind of event is 0.
        let mut event: ibv_async_event = unsafe { mem::zeroed() };
        // SAFETY: an open context; `event` is alive during the call, which writes it.
        succeeded(unsafe { ibv_get_async_event(self.0.as_ptr(), &mut event) })?;
        // SAFETY: the kind is an int in C; read as a number, because a later library may know more kinds.
        let kind = unsafe { (&raw const event.event_type).cast::<u32>().read() };
        let told = match kind {
            // IBV_EVENT_CQ_ERR
            0 => AsyncEvent::Completions,
            // IBV_EVENT_QP_FATAL, QP_REQ_ERR, QP_ACCESS_ERR. A queue pair is not freed before its events are
            // acknowledged, so it is alive here.
            // SAFETY: for these kinds the element is the queue pair, alive as said.
            1..=3 => AsyncEvent::QueuePair(unsafe { (*event.element.qp).qp_num }, kind),
            // IBV_EVENT_DEVICE_FATAL
            8 => AsyncEvent::DeviceFatal,
            // IBV_EVENT_PORT_ERR
            // SAFETY: for this kind the element is the port's number; any four bytes are one.
            10 => AsyncEvent::PortDown(unsafe { event.element.port_num } as u8),
            _ => AsyncEvent::Other,
        };
        // SAFETY: the event was just taken, and is acknowledged once.
        unsafe { ibv_ack_async_event(&mut event) };
        Ok(told)
    }

    pub(super) fn async_descriptor(&self) -> RawFd {
        // SAFETY: an open context; the field is written when it is opened only.
        unsafe { (*self.0.as_ptr()).async_fd }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made of the context holds it, so nothing is left. A refusal leaks, and breaks nothing.
        let _ = unsafe { ibv_close_device(self.0.as_ptr()) };
    }
}

/// A protection domain: requests of its queue pairs lead to its memory only.
pub(super) struct Domain {
    domain: NonNull<ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Domain {}
// SAFETY: as for `Context`.
unsafe impl Sync for Domain {}

impl Domain {
    pub(super) fn new(context: Arc<Context>) -> io::Result<Domain> {
        // SAFETY: an open context, which is kept.
        let domain = made(unsafe { ibv_alloc_pd(context.0.as_ptr()) })?;
        Ok(Domain { domain, context })
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: all memory and queue pairs of the domain hold it, so none is left.
        let _ = unsafe { ibv_dealloc_pd(self.domain.as_ptr()) };
    }
}

/// A registered part of a region.
pub(super) struct Memory {
    memory: NonNull<ibv_mr>,
    /// What is registered.
    span: Span64,
    region: Arc<Region>,
    domain: Arc<Domain>,
}

/// A part of a region that may be longer than a [`Span`].
#[derive(Clone, Copy, Debug)]
struct Span64 {
    offset: u64,
    bytes: u64,
}

// SAFETY: as for `Context`.
unsafe impl Send for Memory {}
// SAFETY: as for `Context`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Registers all of a region.
    pub(super) fn of_region(
        domain: &Arc<Domain>,
        region: &Arc<Region>,
        access: Access,
    ) -> io::Result<Memory> {
        let span = Span64 { offset: 0, bytes: region.len() as u64 };
        Memory::register(domain, region, span, access)
    }

    /// Registers a span of a region.
    ///
    /// # Panics
    /// If the span is not inside the region.
    pub(super) fn of_span(
        domain: &Arc<Domain>,
        region: &Arc<Region>,
        span: Span,
        access: Access,
    ) -> io::Result<Memory> {
        assert!(region.contains(span), "{span:?} is not inside {region:?}");
        let span = Span64 { offset: span.offset, bytes: u64::from(span.length) };
        Memory::register(domain, region, span, access)
    }

    fn register(
        domain: &Arc<Domain>,
        region: &Arc<Region>,
        span: Span64,
        access: Access,
    ) -> io::Result<Memory> {
        let mut flags = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        if access == Access::PeerWrites {
            flags |= ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
        }
        let base = region.base().wrapping_add(span.offset as usize).cast();
        // SAFETY: the span lies in the region's mapping, which lives until the registration ends, as both are held.
        // Who may touch which bytes when, the region's own rules say, as for any other writer.
        let memory = unsafe {
            ibv_reg_mr(domain.domain.as_ptr(), base, span.bytes as usize, flags as c_int)
        };
        let (region, domain) = (Arc::clone(region), Arc::clone(domain));
        Ok(Memory { memory: made(memory)?, span, region, domain })
    }

    /// Address of the first registered byte, as the peer has to name it.
    pub(super) fn address(&self) -> u64 {
        self.region.base() as u64 + self.span.offset
    }

    /// The key by which the peer names the memory.
    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: the object is alive; the field is written when it is made only.
        unsafe { (*self.memory.as_ptr()).rkey }
    }

    /// A piece for a request.
    ///
    /// # Panics
    /// If the span of the region is not inside what is registered.
    fn piece(&self, span: Span) -> ibv_sge {
        let Span64 { offset, bytes } = self.span;
        let is_inside = span.offset >= offset && span.end() <= offset + bytes;
        assert!(is_inside, "{span:?} is not inside the registered {:?}", self.span);
        let addr = self.region.base() as u64 + span.offset;
        ibv_sge { addr, length: span.length, lkey: self.local_key() }
    }

    /// The key by which this side's requests name the memory.
    fn local_key(&self) -> u32 {
        // SAFETY: the object is alive; the field is written when it is made only.
        unsafe { (*self.memory.as_ptr()).lkey }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: queue pairs that may use the memory hold it, so none is left.
        if unsafe { ibv_dereg_mr(self.memory.as_ptr()) } != 0 {
            // The card may still use it: then the mapping has to stay for good.
            mem::forget(Arc::clone(&self.region));
        }
    }
}

/// A completion queue with its channel, which is readable when a completion comes after [`QueuePair::arm`].
struct Completions {
    queue: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
    /// Events taken from the channel.
    events: u32,
    /// Keeps the device open, as the fields above are of it.
    _context: Arc<Context>,
}

// SAFETY: as for `Context`; `events` is changed through a unique borrow only.
unsafe impl Send for Completions {}

impl Completions {
    fn new(context: Arc<Context>, entries: u32) -> io::Result<Completions> {
        let device = context.0.as_ptr();
        // SAFETY: an open context, which is kept.
        let channel = made(unsafe { ibv_create_comp_channel(device) })?;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: the channel was just made of the same context; no tag; the first vector is always there.
        let queue = unsafe { ibv_create_cq(device, entries, ptr::null_mut(), channel.as_ptr(), 0) };
        match made(queue) {
            Ok(queue) => Ok(Completions { queue, channel, events: 0, _context: context }),
            Err(error) => {
                // SAFETY: the channel was just made, and nothing uses it.
                let _ = unsafe { ibv_destroy_comp_channel(channel.as_ptr()) };
                Err(error)
            }
        }
    }

    fn descriptor(&self) -> RawFd {
        // SAFETY: the channel is alive; the field is written when it is made only.
        unsafe { (*self.channel.as_ptr()).fd }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: the queue pair is destroyed before its completions; all events taken are acknowledged, once, else
        // the destruction would wait for them; the channel goes after the queue that was made with it.
        unsafe {
            ibv_ack_cq_events(self.queue.as_ptr(), self.events);
            let _ = ibv_destroy_cq(self.queue.as_ptr());
            let _ = ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

/// A reliable connection's queues, with their completions and all memory that their requests may lead to.
pub(super) struct QueuePair {
    /// Destroyed first, by `drop`.
    pair: NonNull<ibv_qp>,
    completions: Completions,
    inline_bytes: u32,
    receives: Receives,
    /// All that requests may lead to; dropped after the pair.
    memory: Vec<Arc<Memory>>,
}

/// Lists of receives that are posted together, kept for the next ones.
#[derive(Default)]
struct Receives {
    requests: Vec<ibv_recv_wr>,
    pieces: Vec<ibv_sge>,
}

// SAFETY: as for `Completions`; between two calls the lists hold no pointers that are used.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes a pair whose requests lead to `memory`, all of one domain.
    pub(super) fn new(
        domain: &Arc<Domain>,
        sizes: QueueSizes,
        memory: Vec<Arc<Memory>>,
    ) -> io::Result<QueuePair> {
        let is_of_domain = |memory: &Arc<Memory>| Arc::ptr_eq(&memory.domain, domain);
        assert!(memory.iter().all(is_of_domain), "memory of another domain");
        let completions = Completions::new(Arc::clone(&domain.context), sizes.completions())?;
        set_nonblocking(completions.descriptor())?;
        // SAFETY: numbers and pointers, for which zeros are valid: no shared receives, only asked-for completions.
        let mut wanted: ibv_qp_init_attr = unsafe { mem::zeroed() };
        wanted.send_cq = completions.queue.as_ptr();
        wanted.recv_cq = completions.queue.as_ptr();
        wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = sizes.sends;
        wanted.cap.max_recv_wr = sizes.receives;
        wanted.cap.max_send_sge = sizes.pieces;
        wanted.cap.max_recv_sge = 1;
        wanted.cap.max_inline_data = sizes.inline_bytes;
        // SAFETY: domain and completions are of one context; the completions and, through the memory, the domain are
        // kept; `wanted` is alive during the call.
        let pair = made(unsafe { ibv_create_qp(domain.domain.as_ptr(), &mut wanted) })?;
        let inline_bytes = sizes.inline_bytes.min(wanted.cap.max_inline_data);
        let receives = Receives::default();
        Ok(QueuePair { pair, completions, inline_bytes, receives, memory })
    }

    pub(super) fn number(&self) -> u32 {
        // SAFETY: the pair is alive; the field is written when it is made only.
        unsafe { (*self.pair.as_ptr()).qp_num }
    }

    /// Longest message that goes inside its request.
    pub(super) fn inline_bytes(&self) -> u32 {
        self.inline_bytes
    }

    /// Readable when a completion has come since [`QueuePair::arm`].
    pub(super) fn descriptor(&self) -> RawFd {
        self.completions.descriptor()
    }

    /// Moves to the state that the attributes name.
    pub(super) fn change(&mut self, mut change: Change) -> io::Result<()> {
        // SAFETY: the pair is alive; the attributes are plain numbers, alive during the call.
        succeeded(unsafe { ibv_modify_qp(self.pair.as_ptr(), &mut change.attributes, change.mask) })
    }

    /// Posts all sends of a batch with one call, and empties it. The last one is signalled.
    pub(super) fn post_sends(&mut self, batch: &mut Sends) -> io::Result<()> {
        let keys = batch.pieces.iter().map(|piece| piece.lkey);
        assert!(keys.into_iter().all(|key| self.keeps(key)), "a request leads to memory of others");
        let Some(last) = batch.requests.len().checked_sub(1) else { return Ok(()) };
        batch.requests[last].send_flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
        let (requests, pieces) = (batch.requests.as_mut_ptr(), batch.pieces.as_mut_ptr());
        for index in 0..=last {
            // SAFETY: `index` and the one after it, where used, are in the list; each request's first piece was put
            // into `sg_list` as an index, and lies in the other list. Neither list changes before the call below.
            unsafe {
                let request = &mut *requests.add(index);
                request.sg_list = pieces.add(request.sg_list as usize);
                request.next = if index < last { requests.add(index + 1) } else { ptr::null_mut() };
            }
        }
        let mut refused = ptr::null_mut();
        // SAFETY: the chain and its pieces are alive during the call, which copies them. They lead into registered
        // memory, as `Memory::piece` checked, which the pair keeps, as was just asserted.
        let answer = unsafe { ibv_post_send(self.pair.as_ptr(), requests, &mut refused) };
        batch.requests.clear();
        batch.pieces.clear();
        succeeded(answer)
    }

    /// Posts a receive into each span with its id, all with one call.
    pub(super) fn post_receives(
        &mut self,
        memory: &Memory,
        slots: impl Iterator<Item = (u64, Span)>,
    ) -> io::Result<()> {
        let Receives { requests, pieces } = &mut self.receives;
        requests.clear();
        pieces.clear();
        for (wr_id, span) in slots {
            pieces.push(memory.piece(span));
            let (next, sg_list) = (ptr::null_mut(), ptr::null_mut());
            requests.push(ibv_recv_wr { wr_id, next, sg_list, num_sge: 1 });
        }
        // Only now: a list that grows moves.
        let mut next = ptr::null_mut();
        for (request, piece) in requests.iter_mut().zip(pieces).rev() {
            request.next = next;
            request.sg_list = piece;
            next = request;
        }
        if next.is_null() {
            return Ok(());
        }
        assert!(self.keeps(memory.local_key()), "a receive leads to memory of others");
        let mut refused = ptr::null_mut();
        // SAFETY: the chain and its pieces are alive during the call, which copies them. They lead into registered
        // memory, as `Memory::piece` checked, which the pair keeps, as was just asserted.
        succeeded(unsafe { ibv_post_recv(self.pair.as_ptr(), next, &mut refused) })
    }

    fn keeps(&self, key: u32) -> bool {
        self.memory.iter().any(|memory| memory.local_key() == key)
    }

    /// Takes completions, as many as there are and the list has room for.
    pub(super) fn take_completions(
        &mut self,
        completions: &mut [Completion; COMPLETIONS_AT_ONCE],
        most: usize,
    ) -> io::Result<usize> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut found: [ibv_wc; COMPLETIONS_AT_ONCE] = unsafe { mem::zeroed() };
        let most = most.min(COMPLETIONS_AT_ONCE) as c_int;
        let queue = self.completions.queue.as_ptr();
        // SAFETY: the queue is alive, and the list has room for as many as the call is told.
        let count = unsafe { ibv_poll_cq(queue, most, found.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (completion, found) in completions.iter_mut().zip(&found[..count]) {
            *completion = Completion { id: found.wr_id, outcome: outcome_of(found) };
        }
        Ok(count)
    }

    /// Asks for the descriptor to become readable at the next completion.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        succeeded(unsafe { ibv_req_notify_cq(self.completions.queue.as_ptr(), 0) })
    }

    /// Takes the news that a completion came. Says whether there was any.
    pub(super) fn take_event(&mut self) -> io::Result<bool> {
        let (mut queue, mut tag) = (ptr::null_mut(), ptr::null_mut());
        let channel = self.completions.channel.as_ptr();
        // SAFETY: the channel is alive; both places are alive during the call, which writes them.
        match succeeded(unsafe { ibv_get_cq_event(channel, &mut queue, &mut tag) }) {
            Ok(()) => {
                self.completions.events += 1;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the pair is destroyed once, before the completions and the domain that it was made of.
        let _ = unsafe { ibv_destroy_qp(self.pair.as_ptr()) };
    }
}

fn outcome_of(found: &ibv_wc) -> Result<Done, u32> {
    if found.status != ibv_wc_status::IBV_WC_SUCCESS {
        return Err(found.status);
    }
    match found.opcode {
        ibv_wc_opcode::IBV_WC_RECV => Ok(Done::Received { bytes: found.byte_len }),
        ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => {
            // SAFETY: any four bytes are a number; with this opcode they are the immediate.
            let immediate = unsafe { found.imm_data_invalidated_rkey_union.imm_data };
            Ok(Done::Placed { immediate: u32::from_be(immediate) })
        }
        _ => Ok(Done::Sent),
    }
}

/// Sends and writes that are posted together.
pub(super) struct Sends {
    /// `sg_list` holds the index of the first piece until the batch is posted.
    requests: Vec<ibv_send_wr>,
    pieces: Vec<ibv_sge>,
}

// SAFETY: between two calls the lists hold no pointers that are used: they are set anew before each post.
unsafe impl Send for Sends {}

impl Sends {
    pub(super) fn new() -> Sends {
        Sends { requests: Vec::new(), pieces: Vec::new() }
    }

    /// Requests in the batch.
    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }

    /// Adds a write of `sources`, spans of the memory's region, to an address of the peer.
    pub(super) fn write(
        &mut self,
        id: u64,
        memory: &Memory,
        sources: &[Span],
        target: (u64, u32),
        immediate: Option<u32>,
    ) {
        let request = self.add(id, memory, sources);
        (request.wr.rdma.remote_addr, request.wr.rdma.rkey) = target;
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        if let Some(immediate) = immediate {
            request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
            request.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
        }
    }

    /// Adds a send of a span of the memory's region, inside the request if so wanted.
    pub(super) fn send(
        &mut self,
        id: u64,
        memory: &Memory,
        message: Span,
        is_inline: bool,
        is_signalled: bool,
    ) {
        let request = self.add(id, memory, &[message]);
        request.opcode = ibv_wr_opcode::IBV_WR_SEND;
        if is_inline {
            request.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
        }
        if is_signalled {
            request.send_flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
    }

    fn add(&mut self, id: u64, memory: &Memory, sources: &[Span]) -> &mut ibv_send_wr {
        let first = self.pieces.len();
        self.pieces.extend(sources.iter().map(|source| memory.piece(*source)));
        // SAFETY: numbers and pointers, for which zeros are valid.
        let mut request: ibv_send_wr = unsafe { mem::zeroed() };
        request.wr_id = id;
        request.sg_list = ptr::without_provenance_mut(first);
        request.num_sge = c_int::try_from(sources.len()).expect("a card takes few pieces");
        self.requests.push(request);
        self.requests.last_mut().expect("just added")
    }
}

/// A change of a queue pair's state: what `manager.rs` says of the connection, and what the options say.
pub(super) struct Change {
    attributes: ibv_qp_attr,
    mask: c_int,
}

impl Change {
    /// To be filled in by `fill`, as `rdma_init_qp_attr` does: attributes in, attributes and mask out.
    pub(super) fn to(
        step: Step,
        fill: impl FnOnce(&mut ibv_qp_attr, &mut c_int) -> io::Result<()>,
    ) -> io::Result<Change> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
        attributes.qp_state = match step {
            Step::Init => ibv_qp_state::IBV_QPS_INIT,
            Step::Receive => ibv_qp_state::IBV_QPS_RTR,
            Step::Send => ibv_qp_state::IBV_QPS_RTS,
        };
        let mut mask = 0;
        fill(&mut attributes, &mut mask)?;
        if step == Step::Init {
            // No reads, no atomics: the peer only writes.
            attributes.qp_access_flags = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
            mask |= ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS.0 as c_int;
        }
        Ok(Change { attributes, mask })
    }

    /// Fault: as if the card had found one.
    #[cfg(test)]
    pub(super) fn to_error() -> Change {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        Change { attributes, mask: ibv_qp_attr_mask::IBV_QP_STATE.0 as c_int }
    }

    /// Lowers the path's MTU, if it is set in this step.
    pub(super) fn limit_mtu(&mut self, bytes: u32) {
        if self.mask & ibv_qp_attr_mask::IBV_QP_PATH_MTU.0 as c_int != 0 {
            // 256 bytes are 1, 4096 are 5.
            let wanted = bytes.clamp(256, 4096).ilog2() - 7;
            self.attributes.path_mtu = self.attributes.path_mtu.min(wanted);
        }
    }

    /// Sets how long and how often to try, if it is set in this step: 4.096 us * 2^`timeout`.
    pub(super) fn set_patience(&mut self, timeout: u8, retries: u8) {
        if self.mask & ibv_qp_attr_mask::IBV_QP_TIMEOUT.0 as c_int != 0 {
            self.attributes.timeout = timeout;
            self.attributes.retry_cnt = retries;
        }
    }
}

/// Checks a pointer that a function made.
fn made<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// Checks an answer: 0 is good, -1 leaves the reason in errno, other numbers are the reason.
fn succeeded(answer: c_int) -> io::Result<()> {
    match answer {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        reason => Err(io::Error::from_raw_os_error(reason.abs())),
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair").field("number", &self.number()).finish()
    }
}
