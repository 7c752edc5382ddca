//! Socket: the place of a control socket in the file system.
//!
//! Invariants: the socket is never open to others, not even for a moment; a socket that somebody answers on, and
//! whatever is no socket, stays.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::SystemTime;

/// Longest path of a unix socket, in bytes: the kernel's structure has room for 108 with a zero at the end.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Refuses a place where somebody answers, or that something else than a socket has.
pub(super) fn check_place(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        let text = format!("{} exists and is not a socket", path.display());
        return Err(io::Error::new(ErrorKind::AlreadyExists, text));
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let text = format!("another node answers on {}", path.display());
            Err(io::Error::new(ErrorKind::AddrInUse, text))
        }
        Err(error)
            if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Makes the socket in a closed folder and moves it to its place, so that it is never open to others.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    // A name of its own each time: a process that was killed here leaves its folder, and numbers of processes come again.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let folder = folder.join(format!(".twinpoint-{}-{}", std::process::id(), now.as_nanos()));
    DirBuilder::new().mode(0o700).create(&folder).map_err(|error| {
        let text = format!("cannot create a socket at {}: {error}", path.display());
        io::Error::new(error.kind(), text)
    })?;
    let inside = folder.join("s");
    let listener = UnixListener::bind(&inside).and_then(|listener| {
        fs::set_permissions(&inside, Permissions::from_mode(0o600))?;
        fs::rename(&inside, path)?;
        Ok(listener)
    });
    if listener.is_err() {
        let _ = fs::remove_file(&inside);
    }
    let _ = fs::remove_dir(&folder);
    listener
}
