//! Library: rdma-core's two libraries, found when they are first used and not when the program starts.
//!
//! It is under step 4 of the flow. A program that names libibverbs does not start on a host without it; this one has to,
//! and then speaks TCP. So the functions that rdma-sys declares are defined here, under the names that the linker looks
//! for. Each looks its namesake up in the real library at its first call and jumps there.
//!
//! Invariants:
//! - Every forwarder has the type that rdma-sys declares for its name: the compiler compares them.
//! - A library once opened is never closed, so an address once found stays good.
//! - Without the library, or without the name in it, a forwarder answers what the real one answers on failure, with
//!   `ENOSYS` in errno.
//!
//! A verb without a forwarder makes the program need the library again: `tests/without_rdma_core.rs` finds that.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::sockaddr;
use rdma_sys::{
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid,
    ibv_mr, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, rdma_cm_event, rdma_cm_id,
    rdma_conn_param, rdma_event_channel, rdma_port_space,
};

/// A library that could not be opened: which, and what the loader says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LibraryMissing {
    /// File name of the library.
    pub name: &'static str,
    /// The loader's own words.
    pub text: String,
}

impl fmt::Display for LibraryMissing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be loaded ({}): install rdma-core", self.name, self.text)
    }
}

/// Opens both libraries, or says which of them is missing.
pub(super) fn load() -> Result<(), LibraryMissing> {
    verbs().as_ref().map_err(Clone::clone)?;
    manager().as_ref().map_err(Clone::clone)?;
    Ok(())
}

type Opened = Result<Library, LibraryMissing>;

fn verbs() -> &'static Opened {
    static VERBS: OnceLock<Opened> = OnceLock::new();
    VERBS.get_or_init(|| Library::open("libibverbs.so.1", c"libibverbs.so.1"))
}

fn manager() -> &'static Opened {
    static MANAGER: OnceLock<Opened> = OnceLock::new();
    MANAGER.get_or_init(|| Library::open("librdmacm.so.1", c"librdmacm.so.1"))
}

struct Library(*mut c_void);

// SAFETY: the handle is only passed to dlsym, which may be called from any thread, and is never closed.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    fn open(name: &'static str, file: &'static CStr) -> Opened {
        // SAFETY: `file` is a C string; the library's initialisers run, as they would if it were linked.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(Library(handle));
        }
        // SAFETY: dlerror answers null or a C string that is good until this thread's next call of the loader.
        let text = unsafe {
            let text = libc::dlerror();
            if text.is_null() { c"no reason given" } else { CStr::from_ptr(text) }
        };
        Err(LibraryMissing { name, text: text.to_string_lossy().into_owned() })
    }

    fn find(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the handle came from dlopen and was never closed; `name` is a C string.
        unsafe { libc::dlsym(self.0, name.as_ptr()) }
    }
}

/// What a function answers when it cannot do anything.
trait Failure {
    fn failure() -> Self;
}

impl Failure for c_int {
    fn failure() -> c_int {
        -1
    }
}

impl Failure for u16 {
    fn failure() -> u16 {
        0
    }
}

impl Failure for () {
    fn failure() {}
}

impl<T> Failure for *mut T {
    fn failure() -> *mut T {
        ptr::null_mut()
    }
}

impl Failure for *const c_char {
    fn failure() -> *const c_char {
        c"rdma-core is not installed".as_ptr()
    }
}

/// The address of `name`, remembered in `known`; null with `ENOSYS` in errno if there is none.
fn address(known: &AtomicPtr<c_void>, library: &Opened, name: &CStr) -> *mut c_void {
    let mut found = known.load(Ordering::Relaxed);
    if found.is_null() {
        found = library.as_ref().map_or(ptr::null_mut(), |library| library.find(name));
        // Two threads may both look; both find the same.
        known.store(found, Ordering::Relaxed);
    }
    if found.is_null() {
        // SAFETY: errno of this thread is always there to be written.
        unsafe { *libc::__errno_location() = libc::ENOSYS };
    }
    found
}

macro_rules! forward {
    ($library:ident: $(fn $name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => { $(
        /// Jumps to the function of this name in the library.
        ///
        /// # Safety
        /// As the library's documentation says of it.
        // SAFETY: nothing else in the program defines the name; rdma-sys only declares it.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> $answer {
            type Function = unsafe extern "C" fn($($type),*) -> $answer;
            // The declaration that callers see has this very type, or this does not compile.
            const _: Function = rdma_sys::$name;
            static KNOWN: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
            const NAME: &CStr =
                match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name has no zero byte inside"),
                };
            let found = address(&KNOWN, $library(), NAME);
            if found.is_null() {
                return <$answer as Failure>::failure();
            }
            // SAFETY: `found` is the library's function of this name, whose type rdma-sys took from the library's
            // own header; the caller keeps what that function asks for.
            unsafe {
                let function = std::mem::transmute::<*mut c_void, Function>(found);
                function($($argument),*)
            }
        }
    )* };
}

forward! { verbs:
    fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device;
    fn ibv_free_device_list(list: *mut *mut ibv_device) -> ();
    fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
    fn ibv_close_device(context: *mut ibv_context) -> c_int;
    fn ibv_query_device(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int;
    fn ibv_query_port(
        context: *mut ibv_context, port: u8, attributes: *mut rdma_sys::_compat_ibv_port_attr
    ) -> c_int;
    fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int;
    fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
    fn ibv_ack_async_event(event: *mut ibv_async_event) -> ();
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    fn ibv_dealloc_pd(domain: *mut ibv_pd) -> c_int;
    fn ibv_reg_mr(domain: *mut ibv_pd, address: *mut c_void, bytes: usize, access: c_int) -> *mut ibv_mr;
    fn ibv_dereg_mr(memory: *mut ibv_mr) -> c_int;
    fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    fn ibv_create_cq(
        context: *mut ibv_context, entries: c_int, tag: *mut c_void, channel: *mut ibv_comp_channel, vector: c_int
    ) -> *mut ibv_cq;
    fn ibv_destroy_cq(queue: *mut ibv_cq) -> c_int;
    fn ibv_get_cq_event(
        channel: *mut ibv_comp_channel, queue: *mut *mut ibv_cq, tag: *mut *mut c_void
    ) -> c_int;
    fn ibv_ack_cq_events(queue: *mut ibv_cq, count: c_uint) -> ();
    fn ibv_create_qp(domain: *mut ibv_pd, attributes: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_modify_qp(pair: *mut ibv_qp, attributes: *mut ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_destroy_qp(pair: *mut ibv_qp) -> c_int;
}

forward! { manager:
    fn rdma_create_event_channel() -> *mut rdma_event_channel;
    fn rdma_destroy_event_channel(channel: *mut rdma_event_channel) -> ();
    fn rdma_get_cm_event(channel: *mut rdma_event_channel, event: *mut *mut rdma_cm_event) -> c_int;
    fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int;
    fn rdma_create_id(
        channel: *mut rdma_event_channel, id: *mut *mut rdma_cm_id, tag: *mut c_void, space: rdma_port_space::Type
    ) -> c_int;
    fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int;
    fn rdma_bind_addr(id: *mut rdma_cm_id, address: *mut sockaddr) -> c_int;
    fn rdma_resolve_addr(
        id: *mut rdma_cm_id, source: *mut sockaddr, target: *mut sockaddr, limit_ms: c_int
    ) -> c_int;
    fn rdma_resolve_route(id: *mut rdma_cm_id, limit_ms: c_int) -> c_int;
    fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int;
    fn rdma_get_src_port(id: *mut rdma_cm_id) -> u16;
    fn rdma_connect(id: *mut rdma_cm_id, parameters: *mut rdma_conn_param) -> c_int;
    fn rdma_accept(id: *mut rdma_cm_id, parameters: *mut rdma_conn_param) -> c_int;
    fn rdma_establish(id: *mut rdma_cm_id) -> c_int;
    fn rdma_reject(id: *mut rdma_cm_id, data: *const c_void, bytes: u8) -> c_int;
    fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int;
    fn rdma_init_qp_attr(id: *mut rdma_cm_id, attributes: *mut ibv_qp_attr, mask: *mut c_int) -> c_int;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_what_to_do() {
        let missing = Library::open("libabsent.so.1", c"libabsent-for-a-test.so.1");
        let Err(missing) = missing else { panic!("there is no such library") };
        let line = missing.to_string();
        assert!(line.starts_with("libabsent.so.1 cannot be loaded (libabsent-for-a-test.so.1:"));
        assert!(line.ends_with("install rdma-core"));
    }

    #[test]
    fn a_missing_name_is_no_address() {
        let known = AtomicPtr::new(ptr::null_mut());
        let missing = Err(LibraryMissing { name: "x", text: String::new() });
        assert!(address(&known, &missing, c"ibv_open_device").is_null());
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
    }
}
