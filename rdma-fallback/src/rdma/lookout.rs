//! Lookout: hears that a device is removed while no connection leads over it.
//!
//! Beside the flow, from the first set-up over a device on. The connection manager's library keeps a device open that it
//! has seen once, and a device without a way to take itself from its users (SoftRoCE) waits for that. Only who has an id
//! on the device hears that it goes, and the library is made to let go of it then (`manager.rs`). Connections have such
//! ids; a node that went back to TCP has none.
//!
//! Invariant: one thread for each device that was used, which ends with the device or with the lookouts.

use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::adapter::lock;
use super::manager::{EventChannel, Id, ManagerEvent};
use super::options::probe;
use super::watch::wait_for_two;

/// How long a lookout sleeps at most: it is woken by events and by the end.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// Of all devices that were used.
#[derive(Default)]
pub(super) struct Lookouts(Mutex<Vec<Lookout>>);

struct Lookout {
    device: String,
    /// Writing ends the thread.
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Lookouts {
    /// Looks out for a device from now on. That it cannot is no reason to do without the device.
    pub(super) fn watch(&self, device: &str) {
        let mut lookouts = lock(&self.0);
        lookouts.retain(|lookout| !lookout.thread.as_ref().is_none_or(JoinHandle::is_finished));
        if lookouts.iter().all(|lookout| lookout.device != device) {
            lookouts.extend(Lookout::start(device).ok());
        }
    }
}

impl Lookout {
    fn start(device: &str) -> io::Result<Lookout> {
        let id = id_on(device)?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = thread::Builder::new().name("rdma-lookout".to_owned());
        let thread = thread.spawn(move || look_out(&id, &stopped))?;
        Ok(Lookout { device: device.to_owned(), stop, thread: Some(thread) })
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        // Refusal means that the thread has gone.
        let _ = self.stop.write(&[1]);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// An id that does nothing but belong to the device.
fn id_on(device: &str) -> io::Result<Id> {
    let devices = probe().map_err(io::Error::other)?.devices;
    let found = devices.into_iter().find(|found| found.name == device);
    for (_, address) in found.into_iter().flat_map(|device| device.addresses) {
        let id = Id::new(&EventChannel::open()?)?;
        let is_bound = id.bind(SocketAddr::new(address, 0)).is_ok();
        if is_bound && id.device().is_some_and(|(name, _)| name == device) {
            return Ok(id);
        }
    }
    Err(ErrorKind::NotFound.into())
}

/// Takes events until the device goes, or nobody needs to know any more.
fn look_out(id: &Id, stopped: &UnixStream) {
    let channel: &Arc<EventChannel> = id.channel();
    loop {
        match channel.next() {
            Ok(ManagerEvent::DeviceRemoved) => return,
            Ok(_) => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        match wait_for_two([channel.descriptor(), stopped.as_raw_fd()], SLEEP_MAX) {
            Ok([_, false]) => {}
            Ok([_, true]) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_has_no_lookout() {
        let lookouts = Lookouts::default();
        lookouts.watch("no-such-device");
        assert!(lock(&lookouts.0).is_empty());
    }
}
