//! Watch: one descriptor that is readable when any of several is, and a slow clock among them.
//!
//! An RDMA connection has three sources of news: completions, the connection manager, and the device's alarm. Who
//! drives a wire watches one descriptor, so these three, and a clock that ticks a few times a second in case a card
//! forgets to say that a completion came, are gathered in an epoll.
//!
//! Invariant: what was added stays until the watch is dropped; the sources may be closed before.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

/// Sources of one watch, the clock included.
const SOURCES_MAX: usize = 8;

/// What a look at a watch found.
pub(super) struct News {
    /// The sources that are readable, as a set of bits; the clock is not among them.
    pub(super) sources: u32,
    /// The clock has ticked.
    pub(super) has_ticked: bool,
}

/// Several descriptors as one.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: OwnedFd,
    clock: OwnedFd,
}

impl Watch {
    /// With nothing but the clock, which ticks every `tick`.
    pub(super) fn new(tick: Duration) -> io::Result<Watch> {
        // SAFETY: no pointers.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: no pointers.
        let clock = owned(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(tick.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(tick.subsec_nanos()),
        };
        let time = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: `time` is alive during the call, which only reads it; the old time is not asked for.
        let answer = unsafe { libc::timerfd_settime(clock.as_raw_fd(), 0, &time, ptr::null_mut()) };
        check(answer)?;
        let watch = Watch { epoll, clock };
        watch.add(watch.clock.as_raw_fd(), CLOCK)?;
        Ok(watch)
    }

    /// Adds a descriptor; `source`, below [`CLOCK`], names it in [`Watch::look`].
    pub(super) fn add(&self, descriptor: RawFd, source: u32) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: u64::from(source) };
        let epoll = self.epoll.as_raw_fd();
        // SAFETY: `event` is alive during the call, which only reads it.
        check(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, descriptor, &mut event) })
    }

    /// What is readable now. The clock's tick is taken. One system call, and one more for a tick.
    pub(super) fn look(&self) -> io::Result<News> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; SOURCES_MAX];
        let (epoll, room) = (self.epoll.as_raw_fd(), SOURCES_MAX as libc::c_int);
        // SAFETY: `events` has room for as many as the call is told.
        let count = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), room, 0) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let mut sources = 0;
        for event in &events[..count] {
            sources |= 1 << event.u64;
        }
        let has_ticked = sources & (1 << CLOCK) != 0;
        if has_ticked {
            let mut ticks = [0u8; 8];
            // SAFETY: the buffer is as long as the call is told. Whether ticks were there does not matter.
            let _ = unsafe { libc::read(self.clock.as_raw_fd(), ticks.as_mut_ptr().cast(), 8) };
        }
        Ok(News { sources: sources & !(1 << CLOCK), has_ticked })
    }

    /// The one descriptor.
    pub(super) fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// The clock's own name among the sources.
const CLOCK: u32 = 31;

/// Waits until one of two descriptors is readable or broken, at most for `limit`. Says which are.
pub(super) fn wait_for_two(descriptors: [RawFd; 2], limit: Duration) -> io::Result<[bool; 2]> {
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut entries = descriptors.map(entry);
    let limit_ms = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the array has as many entries as the call is told.
    let answer = unsafe { libc::poll(entries.as_mut_ptr(), 2, limit_ms) };
    match check(answer) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => Ok([false; 2]),
        Ok(()) => Ok(entries.map(|entry| entry.revents != 0)),
    }
}

/// Puts nothing in the place of what a descriptor leads to: the number stays its owner's, the file behind it is let go.
pub(super) fn replace_by_nothing(descriptor: RawFd) -> io::Result<()> {
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: no pointers.
    check(unsafe { libc::dup2(nothing.as_raw_fd(), descriptor) })
}

/// Makes a descriptor that a library owns answer `WouldBlock` instead of waiting.
pub(super) fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFL) };
    check(flags)?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(descriptor, libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

fn owned(descriptor: RawFd) -> io::Result<OwnedFd> {
    check(descriptor)?;
    // SAFETY: a descriptor just made and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn sources_are_told_apart_and_the_clock_wakes() {
        let watch = Watch::new(Duration::from_millis(5)).unwrap();
        let (mut near, mut far) = UnixStream::pair().unwrap();
        watch.add(far.as_raw_fd(), 2).unwrap();
        assert_eq!(watch.look().unwrap().sources, 0);
        near.write_all(&[1]).unwrap();
        assert_eq!(watch.look().unwrap().sources, 1 << 2);
        far.read_exact(&mut [0]).unwrap();
        assert_eq!(watch.look().unwrap().sources, 0);
        let woken = wait_for_two([watch.descriptor(), far.as_raw_fd()], Duration::from_secs(10));
        assert_eq!(woken.unwrap(), [true, false], "the clock");
        drop(near);
        let woken = wait_for_two([far.as_raw_fd(); 2], Duration::from_secs(10));
        assert_eq!(woken.unwrap(), [true, true]);
    }

    #[test]
    fn what_a_descriptor_led_to_is_let_go() {
        let (mut near, far) = UnixStream::pair().unwrap();
        replace_by_nothing(far.as_raw_fd()).unwrap();
        assert_eq!(near.read(&mut [0]).unwrap(), 0, "the other end is closed");
        near.write_all(&[1]).unwrap_err();
    }
}
