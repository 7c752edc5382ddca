//! Opening a store's file or block device for one process alone. Outside the flow.
//!
//! Invariant: whoever else has it in use is waited for a moment, and then told, never pushed aside.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use twinpoint_core::units::BLOCK_BYTES;

use super::error::{DeviceError, FileSystem, Step};
use super::{Caching, OpenMode, system};

/// How often a lock is tried: udev locks a device shortly to look at it, and the kernel takes some tens of milliseconds
/// to free the io_uring, and with it the store, of a process that was killed. Less patience for those who only look.
const LOCK_ATTEMPTS: u32 = 120;
const LOCK_ATTEMPTS_TO_LOOK: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// Opens a store past the page cache, or through it where that is allowed and there is no other way; tells which.
pub(super) fn open_direct(
    path: &Path,
    mode: OpenMode,
    caching: Caching,
    claim: bool,
) -> Result<(File, bool), DeviceError> {
    let claim = if claim { libc::O_EXCL } else { 0 };
    let open = |flags: i32| {
        let mut options = OpenOptions::new();
        options.read(true).write(mode == OpenMode::Exclusive);
        options.custom_flags(flags | claim).open(path)
    };
    let mut direct = open(libc::O_DIRECT);
    for _ in 1..LOCK_ATTEMPTS {
        if !direct.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        direct = open(libc::O_DIRECT);
    }
    match direct {
        Ok(file) => Ok((file, true)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Err(DeviceError::InUse { path: path.into() })
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            if caching == Caching::DirectOnly {
                return Err(DeviceError::NoDirect {
                    path: path.into(),
                    file_system: file_system_of(path),
                });
            }
            let file = open(0).map_err(|error| system(Step::Open, path, error))?;
            Ok((file, false))
        }
        Err(error) => Err(system(Step::Open, path, error)),
    }
}

/// Locks the store; tells whether another process has it in use, which is an error for the exclusive mode.
pub(super) fn lock(file: &File, path: &Path, mode: OpenMode) -> Result<bool, DeviceError> {
    let kind = if mode == OpenMode::Exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    let attempts = if mode == OpenMode::Exclusive { LOCK_ATTEMPTS } else { LOCK_ATTEMPTS_TO_LOOK };
    for attempt in 0..attempts {
        if attempt > 0 {
            std::thread::sleep(LOCK_PAUSE);
        }
        // SAFETY: flock takes no pointers.
        if unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) } == 0 {
            return Ok(false);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(system(Step::Lock, path, error));
        }
    }
    match mode {
        OpenMode::Exclusive => Err(DeviceError::InUse { path: path.into() }),
        OpenMode::ReadOnly => Ok(true),
    }
}

/// Refuses a block device whose sectors are bigger than a block.
pub(super) fn check_sector(file: &File, path: &Path) -> Result<(), DeviceError> {
    let mut sector: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the given place, which lives during the call.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET as _, &mut sector) };
    if answer != 0 {
        return Err(system(Step::Inspect, path, io::Error::last_os_error()));
    }
    let bytes = u32::try_from(sector).unwrap_or(0);
    if bytes == 0 || bytes > BLOCK_BYTES as u32 {
        return Err(DeviceError::WrongSector { path: path.into(), bytes });
    }
    Ok(())
}

fn file_system_of(path: &Path) -> FileSystem {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else { return FileSystem(0) };
    let mut answer = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `name` ends in a zero byte and `answer` has room for the structure; both live during the call.
    if unsafe { libc::statfs(name.as_ptr(), answer.as_mut_ptr()) } != 0 {
        return FileSystem(0);
    }
    // SAFETY: all zero bytes are a valid value of this plain structure, and the call filled it.
    FileSystem(unsafe { answer.assume_init() }.f_type as u32)
}
