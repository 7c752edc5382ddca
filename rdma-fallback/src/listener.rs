//! Listener: where a peer's calls arrive, before anything is known about the caller.
//!
//! It comes before the flow, on a control thread. A call is a [`Pending`] until its caller has proved the key.
//!
//! Invariants:
//! - Accepting neither reads from nor writes to the caller, so a caller cannot hold the listener up.
//! - After [`Listener::close`] no accept blocks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::deadline::Deadline;
use crate::handshake::Role;
use crate::{Channel, ChannelError, Key};

/// How long `close` tries to wake a thread in `accept`.
const WAKE_LIMIT: Duration = Duration::from_secs(1);

/// A listening TCP socket. Shared by reference: one thread accepts, another may close.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    closed: AtomicBool,
}

impl Listener {
    /// Listens on `address` ("host:port"; port 0 is any free one).
    ///
    /// # Errors
    /// What the system says, for instance that the port is in use.
    pub fn bind(address: &str) -> io::Result<Listener> {
        let socket = TcpListener::bind(address)?;
        Ok(Listener { socket, closed: AtomicBool::new(false) })
    }

    /// The address with the real port.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Whether `accept` waits (the default) or answers `WouldBlock` when nobody calls.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket.set_nonblocking(nonblocking)
    }

    /// Takes the next call.
    ///
    /// # Errors
    /// `NotConnected` once the listener is closed; `WouldBlock` if so set; else what the system says, for instance
    /// that there are too many open files: wait a little, then accept again.
    pub fn accept(&self) -> io::Result<Pending> {
        loop {
            self.check_open()?;
            let answer = self.socket.accept();
            self.check_open()?;
            match answer {
                Ok((stream, address)) => return Ok(Pending { stream, address }),
                // A caller that gave up, or a signal.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends accepting, for good; the thread that waits in `accept` returns.
    pub fn close(&self) {
        if self.closed.swap(true, Ordering::SeqCst) {
            return;
        }
        // A call of our own wakes the thread. If it does not get through, the queue of calls is full, which wakes too.
        if let Ok(address) = self.local_address() {
            let _ = TcpStream::connect_timeout(&reachable(address), WAKE_LIMIT);
        }
    }

    fn check_open(&self) -> io::Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the listener is closed"));
        }
        Ok(())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A caller who has proved nothing yet.
#[derive(Debug)]
pub struct Pending {
    stream: TcpStream,
    address: SocketAddr,
}

impl Pending {
    /// The caller's address.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.address
    }

    /// Runs the whole handshake within `limit`, which then is the limit of each send and receive. Blocks: a caller
    /// that dribbles costs this thread up to `limit`, so let not only one thread do this on an open network.
    ///
    /// # Errors
    /// [`ChannelError`]; the connection is closed then.
    pub fn authenticate(self, key: &Key, limit: Duration) -> Result<Channel, ChannelError> {
        Channel::establish(self.stream, key, Role::Acceptor, Deadline::after(limit), limit)
    }
}

/// An address under which this host reaches its own listener.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_wakes_a_waiting_accept() {
        for address in ["127.0.0.1:0", "0.0.0.0:0"] {
            let listener = Listener::bind(address).unwrap();
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| listener.accept().map(|_| ()).unwrap_err().kind());
                std::thread::sleep(Duration::from_millis(20));
                listener.close();
                assert_eq!(waiting.join().unwrap(), io::ErrorKind::NotConnected);
            });
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::NotConnected);
        }
    }

    #[test]
    fn nonblocking_accept_does_not_wait() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        listener.close();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
