//! Adapter: one open device with the node's region registered in it, shared by all connections over that device.
//!
//! It is opened in set-up, when the first connection needs the device (see `adapters.rs`), and goes with the last one.
//!
//! Invariants:
//! - The region is registered once in an adapter, for sends only: no peer can name it. What is lent to a peer is
//!   registered beside it for one connection, and its key dies with that connection.
//! - A device's own reports reach every connection that they concern: its alarm holds the cause, and its bell rings.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::card::{Access, AsyncEvent, DeviceLimits};
use super::cause::Cause;
use super::verbs::{Context, Domain, Memory};
use super::watch::wait_for_two;
use crate::Region;

/// How long the listening thread sleeps at most: it is woken by events and by the end.
const LISTEN_LIMIT: Duration = Duration::from_secs(3600);

/// An open device.
pub(super) struct Adapter {
    name: String,
    limits: DeviceLimits,
    domain: Arc<Domain>,
    /// The whole region, for sends.
    memory: Arc<Memory>,
    alarms: Arc<Alarms>,
    /// Writing ends the listening thread.
    stop: UnixStream,
    listener: Option<JoinHandle<()>>,
}

impl Adapter {
    pub(super) fn open(name: &str, region: &Arc<Region>) -> io::Result<Adapter> {
        let context = Arc::new(Context::open(name)?);
        let limits = context.limits()?;
        let domain = Arc::new(Domain::new(Arc::clone(&context))?);
        let memory = Arc::new(Memory::of_region(&domain, region, Access::Local)?);
        let alarms = Arc::new(Alarms::default());
        let (stop, stopped) = UnixStream::pair()?;
        let listener = {
            let (context, alarms) = (Arc::clone(&context), Arc::clone(&alarms));
            let listen = move || listen(&context, &alarms, &stopped);
            thread::Builder::new().name("rdma-alarm".to_owned()).spawn(listen)?
        };
        let (name, listener) = (name.to_owned(), Some(listener));
        Ok(Adapter { name, limits, domain, memory, alarms, stop, listener })
    }

    /// Whether the device failed: nobody new should use it.
    pub(super) fn is_dead(&self) -> bool {
        self.alarms.is_dead()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn limits(&self) -> DeviceLimits {
        self.limits
    }

    pub(super) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// An alarm for the queue pair of this number, which uses this port, and the end of its bell that is readable once it rang.
    pub(super) fn alarm(&self, number: u32, port: u8) -> io::Result<(Arc<Alarm>, UnixStream)> {
        let (bell, heard) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        heard.set_nonblocking(true)?;
        let alarm = Arc::new(Alarm { number, port, bell, cause: Mutex::new(None) });
        let mut list = lock(&self.alarms.list);
        list.retain(|alarm| alarm.strong_count() > 0);
        list.push(Arc::downgrade(&alarm));
        drop(list);
        // A report between the opening of the device and now.
        if self.alarms.is_dead() {
            alarm.ring(Cause::DeviceRemoved);
        }
        Ok((alarm, heard))
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // Refusal means that the thread has gone.
        let _ = self.stop.write(&[1]);
        if let Some(listener) = self.listener.take() {
            // A thread that panicked has said so itself.
            let _ = listener.join();
        }
    }
}

/// Takes the device's reports until the adapter goes.
fn listen(context: &Context, alarms: &Alarms, stopped: &UnixStream) {
    let descriptors = [context.async_descriptor(), stopped.as_raw_fd()];
    loop {
        match wait_for_two(descriptors, LISTEN_LIMIT) {
            Ok([_, true]) => return,
            Ok([false, false]) => {}
            Ok([true, false]) => match context.next_async_event() {
                Ok(AsyncEvent::DeviceFatal) => alarms.ring_dead(),
                Ok(AsyncEvent::PortDown(port)) => {
                    alarms.ring(Cause::PortDown, |alarm| alarm.port == port);
                }
                Ok(AsyncEvent::QueuePair(number, event)) => {
                    alarms.ring(Cause::Connection { event }, |alarm| alarm.number == number);
                }
                Ok(AsyncEvent::Completions) => alarms.ring(Cause::COMPLETIONS_LOST, |_| true),
                Ok(AsyncEvent::Other) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The device is gone, and its descriptor with it.
                Err(_) => return alarms.ring_dead(),
            },
            Err(_) => return alarms.ring_dead(),
        }
    }
}

/// The alarms of one device's connections.
#[derive(Default)]
struct Alarms {
    list: Mutex<Vec<Weak<Alarm>>>,
    /// The device failed: nobody new should use it.
    dead: AtomicBool,
}

impl Alarms {
    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// The device is gone, for all.
    fn ring_dead(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.ring(Cause::DeviceRemoved, |_| true);
    }

    fn ring(&self, cause: Cause, concerns: impl Fn(&Alarm) -> bool) {
        let list = lock(&self.list);
        let alarms = list.iter().filter_map(Weak::upgrade);
        alarms.filter(|alarm| concerns(alarm)).for_each(|alarm| alarm.ring(cause));
    }
}

/// What the device reported of one connection.
pub(super) struct Alarm {
    /// Of the queue pair.
    number: u32,
    /// The device's port that it uses.
    port: u8,
    bell: UnixStream,
    cause: Mutex<Option<Cause>>,
}

impl Alarm {
    /// The first cause, once there is one.
    pub(super) fn cause(&self) -> Option<Cause> {
        *lock(&self.cause)
    }

    fn ring(&self, cause: Cause) {
        lock(&self.cause).get_or_insert(cause);
        // Refusal means that it rings already, or that nobody listens any more.
        let _ = (&self.bell).write(&[1]);
    }
}

/// What is locked is whole at every step, so a panic elsewhere does not spoil it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn alarm(alarms: &Alarms, number: u32, port: u8) -> (Arc<Alarm>, UnixStream) {
        let (bell, heard) = UnixStream::pair().unwrap();
        heard.set_nonblocking(true).unwrap();
        let alarm = Arc::new(Alarm { number, port, bell, cause: Mutex::new(None) });
        lock(&alarms.list).push(Arc::downgrade(&alarm));
        (alarm, heard)
    }

    #[test]
    fn a_report_reaches_whom_it_concerns_and_the_first_cause_stays() {
        let alarms = Alarms::default();
        let (one, mut heard_one) = alarm(&alarms, 1, 1);
        let (two, mut heard_two) = alarm(&alarms, 2, 2);
        alarms.ring(Cause::Connection { event: 3 }, |alarm| alarm.number == 2);
        assert!(heard_one.read(&mut [0]).is_err());
        assert_eq!(heard_two.read(&mut [0]).unwrap(), 1);
        alarms.ring_dead();
        assert_eq!(heard_one.read(&mut [0]).unwrap(), 1);
        assert_eq!(one.cause(), Some(Cause::DeviceRemoved));
        assert_eq!(two.cause(), Some(Cause::Connection { event: 3 }));
        assert!(alarms.is_dead());
    }
}
