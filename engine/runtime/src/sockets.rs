//! Descriptors that the kernel hands over, and the sockets that clients connect to.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::options::NbdAddress;

/// Owns the descriptor of an accept's completion.
///
/// # Safety
/// `descriptor` must be open, and nobody else may own it.
pub(crate) unsafe fn adopt(descriptor: RawFd) -> OwnedFd {
    // SAFETY: as the caller promises.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Small replies go out at once. Of no effect on a unix socket.
pub(crate) fn set_no_delay(socket: OwnedFd) -> OwnedFd {
    let stream = TcpStream::from(socket);
    // Fails on a unix socket, which has no delay to begin with.
    _ = stream.set_nodelay(true);
    OwnedFd::from(stream)
}

/// A listening socket for NBD clients; a unix socket's file goes when it is dropped.
#[derive(Debug)]
pub(crate) struct NbdListener {
    pub socket: OwnedFd,
    /// With the port that the kernel chose.
    pub address: NbdAddress,
    path: Option<PathBuf>,
}

impl NbdListener {
    /// Binds an address. A unix socket file that nobody answers on is replaced.
    ///
    /// # Errors
    /// If the address is in use or cannot be bound.
    pub fn bind(address: &NbdAddress) -> io::Result<NbdListener> {
        match address {
            NbdAddress::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                let address = NbdAddress::Tcp(listener.local_addr()?.to_string());
                Ok(NbdListener { socket: listener.into(), address, path: None })
            }
            NbdAddress::Unix(path) => {
                let listener = bind_unix(path)?;
                Ok(NbdListener {
                    socket: listener.into(),
                    address: address.clone(),
                    path: Some(path.clone()),
                })
            }
        }
    }
}

impl Drop for NbdListener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have removed it before; then there is nothing to do.
            _ = std::fs::remove_file(path);
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // Whatever else lies there is somebody's: only a dead socket is replaced.
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            if !is_socket || UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("precious");
        std::fs::write(&path, b"precious").expect("a file");
        let address = NbdAddress::Unix(path.clone());
        assert!(NbdListener::bind(&address).is_err(), "a file is not a socket");
        assert_eq!(std::fs::read(&path).expect("it is still there"), b"precious");
        std::fs::remove_file(&path).expect("it was there");
        let alive = NbdListener::bind(&address).expect("a free path");
        assert!(NbdListener::bind(&address).is_err(), "somebody answers");
        drop(alive);
        let dead = UnixListener::bind(&path).expect("a free path");
        drop(dead);
        assert!(path.exists(), "the file stays when its process dies");
        drop(NbdListener::bind(&address).expect("nobody answers"));
        assert!(!path.exists());
    }
}
