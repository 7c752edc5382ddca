//! Store path: what follows from where a store lies, and how offline subcommands open it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use twinpoint_runtime::device::{Caching, OpenMode, StoreFile};

use crate::failure::{Exit, Failure};

/// The control socket of the node that serves a store, unless `--control` says otherwise: beside a file, and for a
/// device in /run, as `twinpoint-NAME.sock`.
#[must_use]
pub fn control_socket(store: &Path) -> PathBuf {
    if let Ok(device) = store.strip_prefix("/dev") {
        let name = device.to_string_lossy().replace('/', "-");
        return Path::new("/run").join(format!("twinpoint-{name}.sock"));
    }
    let mut name = OsString::from(store);
    name.push(".sock");
    PathBuf::from(name)
}

/// The flag's meaning.
#[must_use]
pub fn caching(buffered: bool) -> Caching {
    if buffered { Caching::BufferedAllowed } else { Caching::DirectOnly }
}

/// Opens a store that no node serves, to read it.
///
/// # Errors
/// If it cannot be opened, or a node serves it.
pub fn open_stopped(path: &Path, buffered: bool) -> Result<StoreFile, Failure> {
    let store = StoreFile::open_with(path, OpenMode::ReadOnly, caching(buffered))?;
    if store.is_in_use() {
        let text = format!("{} is in use: stop its node first", path.display());
        return Err(Failure::new(Exit::Refused, "in-use", text));
    }
    Ok(store)
}

/// Whether two paths lead to one file or one device. What is not there is told by whoever opens it.
#[must_use]
pub fn is_same(first: &Path, second: &Path) -> bool {
    let identity = |path: &Path| {
        let found = fs::metadata(path).ok()?;
        let is_device = found.file_type().is_block_device();
        Some(if is_device { (0, found.rdev()) } else { (found.dev(), found.ino()) })
    };
    identity(first).is_some_and(|one| identity(second) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_lie_beside_files_and_never_in_dev() {
        assert_eq!(control_socket(Path::new("/a/b")), Path::new("/a/b.sock"));
        assert_eq!(control_socket(Path::new("b.img")), Path::new("b.img.sock"));
        let device = control_socket(Path::new("/dev/mapper/vg-a"));
        assert_eq!(device, Path::new("/run/twinpoint-mapper-vg-a.sock"));
    }
}
