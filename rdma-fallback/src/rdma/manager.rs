//! Manager: every call to the connection manager, librdmacm, which finds the way to a peer and connects queue pairs.
//!
//! It comes before the flow: `connect.rs` drives it in set-up. After that an id is kept for its news, the end of the
//! connection above all. The queue pair is not made by the manager but by `verbs.rs`, so that MTU and patience are ours.
//!
//! Invariants:
//! - An id is destroyed once, before its channel, and after its queue pair has stopped (the owners see to that).
//! - Every event is acknowledged when it is taken: what it says is copied first.
//! - Nothing is made of the context that the library opens: it serves to find a device only.

use std::ffi::c_int;
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use rdma_sys::{
    ibv_context, rdma_accept, rdma_ack_cm_event, rdma_bind_addr, rdma_cm_event_type, rdma_cm_id,
    rdma_conn_param, rdma_connect, rdma_create_event_channel, rdma_create_id,
    rdma_destroy_event_channel, rdma_destroy_id, rdma_disconnect, rdma_establish,
    rdma_event_channel, rdma_get_cm_event, rdma_get_src_port, rdma_init_qp_attr, rdma_listen,
    rdma_port_space, rdma_reject, rdma_resolve_addr, rdma_resolve_route,
};

use super::card::Step;
use super::verbs::{Change, name_of_context};
use super::watch::{replace_by_nothing, set_nonblocking};

/// Bytes that each side gives the other with the request to connect, and with the answer.
pub(super) const PRIVATE_BYTES: usize = 32;

/// Calls that may wait to be looked at. One is expected; strangers shall not keep it out.
const CALLS_WAITING_MAX: c_int = 64;

/// Where the manager tells what happens.
pub(super) struct EventChannel(NonNull<rdma_event_channel>);

// SAFETY: the library's objects may be used from any thread, by several at once; it locks by itself.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

/// What happened to an id.
pub(super) enum ManagerEvent {
    /// The way's first half is known.
    AddressResolved,
    /// The way is known.
    RouteResolved,
    /// Somebody calls, and shows these bytes.
    Request(Id, [u8; PRIVATE_BYTES]),
    /// The called one answers, and shows these bytes.
    Response([u8; PRIVATE_BYTES]),
    /// Both sides are connected.
    Established,
    /// The peer ended it.
    Disconnected,
    /// The device is going.
    DeviceRemoved,
    /// It will not come about: the event's number in `rdma_cm_event_type` and its status.
    Failed(u32, i32),
    /// Nothing to act on.
    Other,
}

impl EventChannel {
    pub(super) fn open() -> io::Result<Arc<EventChannel>> {
        // SAFETY: no pointers.
        let channel = EventChannel(made(unsafe { rdma_create_event_channel() })?);
        set_nonblocking(channel.descriptor())?;
        Ok(Arc::new(channel))
    }

    pub(super) fn descriptor(&self) -> RawFd {
        // SAFETY: the channel is alive; the field is written when it is made only.
        unsafe { (*self.0.as_ptr()).fd }
    }

    /// Takes what happened, or `WouldBlock`.
    pub(super) fn next(self: &Arc<EventChannel>) -> io::Result<ManagerEvent> {
        let mut event = ptr::null_mut();
        // SAFETY: the channel is alive; `event` is alive during the call, which writes it.
        succeeded(unsafe { rdma_get_cm_event(self.0.as_ptr(), &mut event) })?;
        // SAFETY: the library gave an event, which is good until it is acknowledged below. What a connection's event
        // carries is read of such events only.
        let (kind, status, id, private) = unsafe {
            let found = &*event;
            if found.event == rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL {
                let_go((*found.id).verbs);
            }
            let private = match found.event {
                rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST
                | rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_RESPONSE => {
                    let data = &found.param.conn;
                    private_bytes(data.private_data.cast(), data.private_data_len)
                }
                _ => [0; PRIVATE_BYTES],
            };
            (found.event, found.status, found.id, private)
        };
        // SAFETY: acknowledged once, and not used after.
        let _ = unsafe { rdma_ack_cm_event(event) };
        Ok(match kind {
            rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED => ManagerEvent::AddressResolved,
            rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED => ManagerEvent::RouteResolved,
            rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST => {
                let id = Id { id: made(id)?, channel: Arc::clone(self) };
                ManagerEvent::Request(id, private)
            }
            rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_RESPONSE => ManagerEvent::Response(private),
            rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED => ManagerEvent::Established,
            rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => ManagerEvent::Disconnected,
            rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL => ManagerEvent::DeviceRemoved,
            rdma_cm_event_type::RDMA_CM_EVENT_ADDR_ERROR
            | rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_ERROR
            | rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_ERROR
            | rdma_cm_event_type::RDMA_CM_EVENT_UNREACHABLE
            | rdma_cm_event_type::RDMA_CM_EVENT_REJECTED => ManagerEvent::Failed(kind, status),
            _ => ManagerEvent::Other,
        })
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: all ids of the channel hold it, so none is left.
        unsafe { rdma_destroy_event_channel(self.0.as_ptr()) };
    }
}

/// The library keeps a device open until it sees another one, even when no id needs it, and a device without a way to
/// take itself from its users (SoftRoCE) waits for that, and cannot come back before. So the files behind the library's
/// descriptors are let go here; it closes the descriptors when it likes. Our own queue pairs are of another context.
///
/// # Safety
/// `context` is null or open, and of a device that is being removed.
unsafe fn let_go(context: *mut ibv_context) {
    if !context.is_null() {
        // SAFETY: open, as the caller promises; the fields are written when it is opened only.
        for descriptor in unsafe { [(*context).cmd_fd, (*context).async_fd] } {
            // A failure leaves things as they were.
            let _ = replace_by_nothing(descriptor);
        }
    }
}

/// # Safety
/// `data` is null or leads to `count` bytes.
unsafe fn private_bytes(data: *const u8, count: u8) -> [u8; PRIVATE_BYTES] {
    let mut bytes = [0; PRIVATE_BYTES];
    if !data.is_null() {
        let count = usize::from(count).min(PRIVATE_BYTES);
        // SAFETY: as the caller promises, and not more than there is room for.
        unsafe { ptr::copy_nonoverlapping(data, bytes.as_mut_ptr(), count) };
    }
    bytes
}

/// One end of a connection, or a listener.
pub(super) struct Id {
    id: NonNull<rdma_cm_id>,
    /// Dropped after the id.
    channel: Arc<EventChannel>,
}

// SAFETY: as for `EventChannel`.
unsafe impl Send for Id {}

impl Id {
    pub(super) fn new(channel: &Arc<EventChannel>) -> io::Result<Id> {
        let (mut id, space) = (ptr::null_mut(), rdma_port_space::RDMA_PS_TCP);
        // SAFETY: the channel is alive and kept; `id` is alive during the call, which writes it; no tag.
        let answer = unsafe { rdma_create_id(channel.0.as_ptr(), &mut id, ptr::null_mut(), space) };
        succeeded(answer)?;
        Ok(Id { id: made(id)?, channel: Arc::clone(channel) })
    }

    pub(super) fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    /// Takes an address of this host, and with it a device.
    pub(super) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let mut address = SystemAddress::new(address);
        // SAFETY: the id is alive; the address is alive during the call, which only reads it.
        succeeded(unsafe { rdma_bind_addr(self.id.as_ptr(), address.pointer()) })
    }

    pub(super) fn listen(&self) -> io::Result<()> {
        // SAFETY: the id is alive.
        succeeded(unsafe { rdma_listen(self.id.as_ptr(), CALLS_WAITING_MAX) })
    }

    pub(super) fn local_port(&self) -> u16 {
        // SAFETY: the id is alive.
        u16::from_be(unsafe { rdma_get_src_port(self.id.as_ptr()) })
    }

    /// Starts to look for the way to `target`, from `source` if given.
    pub(super) fn resolve_address(
        &self,
        source: Option<IpAddr>,
        target: SocketAddr,
        limit: Duration,
    ) -> io::Result<()> {
        let mut source = source.map(|ip| SystemAddress::new(SocketAddr::new(ip, 0)));
        let source = source.as_mut().map_or(ptr::null_mut(), SystemAddress::pointer);
        let mut target = SystemAddress::new(target);
        // SAFETY: the id is alive; the addresses are alive during the call, which only reads them.
        succeeded(unsafe {
            rdma_resolve_addr(self.id.as_ptr(), source, target.pointer(), milliseconds(limit))
        })
    }

    pub(super) fn resolve_route(&self, limit: Duration) -> io::Result<()> {
        // SAFETY: the id is alive.
        succeeded(unsafe { rdma_resolve_route(self.id.as_ptr(), milliseconds(limit)) })
    }

    /// Name and port of the device on the way, once an address is bound or resolved.
    pub(super) fn device(&self) -> Option<(String, u8)> {
        // SAFETY: the id is alive; the library writes these fields in calls for this id only, and none is under way.
        let (context, port) = unsafe { ((*self.id.as_ptr()).verbs, (*self.id.as_ptr()).port_num) };
        // SAFETY: the id keeps the context open.
        NonNull::new(context).map(|context| (unsafe { name_of_context(context) }, port))
    }

    /// Calls, showing `private`, for the queue pair of this number.
    pub(super) fn connect(&self, private: &[u8; PRIVATE_BYTES], number: u32) -> io::Result<()> {
        let mut parameters = parameters(private, number);
        // SAFETY: the id is alive; parameters and bytes are alive during the call, which only reads them.
        succeeded(unsafe { rdma_connect(self.id.as_ptr(), &mut parameters) })
    }

    /// Answers a call, showing `private`, for the queue pair of this number, which is ready to receive and send.
    pub(super) fn accept(&self, private: &[u8; PRIVATE_BYTES], number: u32) -> io::Result<()> {
        let mut parameters = parameters(private, number);
        // SAFETY: as in `connect`.
        succeeded(unsafe { rdma_accept(self.id.as_ptr(), &mut parameters) })
    }

    /// Tells the called side that the queue pair is ready here too.
    pub(super) fn establish(&self) -> io::Result<()> {
        // SAFETY: the id is alive.
        succeeded(unsafe { rdma_establish(self.id.as_ptr()) })
    }

    /// Turns a caller away.
    pub(super) fn reject(&self) {
        // SAFETY: the id is alive; no bytes are shown. A refusal means that the caller has gone.
        let _ = unsafe { rdma_reject(self.id.as_ptr(), ptr::null(), 0) };
    }

    /// Tells the peer that it is over.
    pub(super) fn disconnect(&self) {
        // SAFETY: the id is alive. A refusal means that it was over already.
        let _ = unsafe { rdma_disconnect(self.id.as_ptr()) };
    }

    /// What the queue pair has to be for a step.
    pub(super) fn change_to(&self, step: Step) -> io::Result<Change> {
        Change::to(step, |attributes, mask| {
            // SAFETY: the id is alive; both are alive during the call, which writes them.
            succeeded(unsafe { rdma_init_qp_attr(self.id.as_ptr(), attributes, mask) })
        })
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: destroyed once; every event of it was acknowledged when it was taken.
        let _ = unsafe { rdma_destroy_id(self.id.as_ptr()) };
    }
}

fn parameters(private: &[u8; PRIVATE_BYTES], number: u32) -> rdma_conn_param {
    // SAFETY: numbers and a pointer, for which zeros are valid.
    let mut parameters: rdma_conn_param = unsafe { mem::zeroed() };
    parameters.private_data = private.as_ptr().cast();
    parameters.private_data_len = PRIVATE_BYTES as u8;
    // No reads and no atomics, but some providers refuse zero.
    (parameters.responder_resources, parameters.initiator_depth) = (1, 1);
    parameters.retry_count = 7;
    // Nothing is sent without a receive that waits: once more is for the card's own hiccups.
    parameters.rnr_retry_count = 1;
    parameters.qp_num = number;
    parameters
}

fn milliseconds(limit: Duration) -> c_int {
    c_int::try_from(limit.as_millis()).unwrap_or(c_int::MAX).max(1)
}

/// An address in the system's form.
union SystemAddress {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl SystemAddress {
    fn new(address: SocketAddr) -> SystemAddress {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut made: SystemAddress = unsafe { mem::zeroed() };
        match address {
            SocketAddr::V4(address) => {
                made.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                    sin_zero: [0; 8],
                };
            }
            SocketAddr::V6(address) => {
                made.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
            }
        }
        made
    }

    fn pointer(&mut self) -> *mut libc::sockaddr {
        ptr::from_mut(self).cast()
    }
}

fn made<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

fn succeeded(answer: c_int) -> io::Result<()> {
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
