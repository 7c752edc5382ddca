//! The store's file or block device: opening it for one process alone, and blocking access to whole blocks for
//! what happens outside the flow: format, recovery, inspect, verify. In the flow a worker's io_uring uses the
//! descriptor.
//!
//! Invariants:
//! - The page cache is bypassed (O_DIRECT), unless a caller of [`StoreFile::open_with`] allows otherwise.
//! - Whoever may write has the store alone: flock on the file, on a block device also the kernel's exclusive claim,
//!   which a mounted file system has too.
//! - Blocks are only read and written whole, and only inside the size that was found at opening.

use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use twinpoint_core::units::{BLOCK_BYTES, DeviceBlock};

/// Blocks moved by one system call through the aligned copy: 256 KiB.
const BOUNCE_BLOCKS: usize = 64;
/// How often a lock is tried: udev locks a device shortly to look at it, and the kernel takes some tens of milliseconds
/// to free the io_uring, and with it the store, of a process that was killed. Less patience for those who only look.
const LOCK_ATTEMPTS: u32 = 120;
const LOCK_ATTEMPTS_TO_LOOK: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// What a store is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// To read and write, alone.
    Exclusive,
    /// To look at. A store in use can be opened, see [`StoreFile::is_in_use`]; otherwise nobody can take it into use
    /// meanwhile.
    ReadOnly,
}

/// Whether the page cache is acceptable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Caching {
    /// Fail if the file system knows no direct access.
    DirectOnly,
    /// Go through the page cache there. For tests: a flush then also costs what others left in the cache.
    BufferedAllowed,
}

/// What a new file contains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prefill {
    /// Nothing: space is found at the first write of each block, and may be missing then.
    None,
    /// Reserved space, unwritten: the first write of each block still changes the file system's metadata.
    Reserve,
    /// Written zeroes: later writes change only data.
    Zero,
}

/// An open store.
pub struct StoreFile {
    file: File,
    path: PathBuf,
    blocks: u64,
    is_direct: bool,
    is_block_device: bool,
    is_in_use: bool,
    bounce: Mutex<Box<[AlignedBlock]>>,
}

impl StoreFile {
    /// Opens the store at `path`, a regular file or a block device, with direct access.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn open(path: &Path, mode: OpenMode) -> Result<StoreFile, DeviceError> {
        StoreFile::open_with(path, mode, Caching::DirectOnly)
    }

    /// As [`StoreFile::open`], with a choice about the page cache.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn open_with(
        path: &Path,
        mode: OpenMode,
        caching: Caching,
    ) -> Result<StoreFile, DeviceError> {
        // Before opening, because to open a FIFO is to wait.
        let metadata = std::fs::metadata(path).map_err(|error| system(Step::Open, path, error))?;
        let is_block_device = metadata.file_type().is_block_device();
        if !is_block_device && !metadata.is_file() {
            return Err(DeviceError::WrongKind { path: path.into() });
        }
        let claim = is_block_device && mode == OpenMode::Exclusive;
        let (mut file, is_direct) = open_direct(path, mode, caching, claim)?;
        let is_in_use = lock(&file, path, mode)?;
        if is_block_device {
            check_sector(&file, path)?;
        }
        let bytes =
            file.seek(SeekFrom::End(0)).map_err(|error| system(Step::Inspect, path, error))?;
        Ok(StoreFile {
            file,
            path: path.into(),
            blocks: bytes / BLOCK_BYTES as u64,
            is_direct,
            is_block_device,
            is_in_use,
            bounce: Mutex::new(vec![AlignedBlock([0; BLOCK_BYTES]); BOUNCE_BLOCKS].into()),
        })
    }

    /// Creates a file of `bytes` for a store. The file, its size and its prefill are durable when this returns; after
    /// an error there is no file.
    ///
    /// # Errors
    /// If the file exists already, is no multiple of 4096 bytes, or the file system refuses.
    pub fn create(path: &Path, bytes: u64, prefill: Prefill) -> Result<(), DeviceError> {
        if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(DeviceError::WrongSize { bytes });
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|error| system(Step::Create, path, error))?;
        let filled = fill(&file, path, bytes, prefill);
        if filled.is_err() {
            // The error to report is the first one.
            let _ = std::fs::remove_file(path);
        }
        filled
    }

    /// Reads whole blocks from `first` on into `bytes`.
    ///
    /// # Errors
    /// If the blocks are not all in the store, or the device fails.
    ///
    /// # Panics
    /// If `bytes` is no multiple of 4096 long.
    pub fn read_blocks(&self, first: DeviceBlock, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let mut offset = self.range_start(first, bytes.len())?;
        let mut bounce = self.bounce.lock().unwrap_or_else(PoisonError::into_inner);
        for part in bytes.chunks_mut(BOUNCE_BLOCKS * BLOCK_BYTES) {
            let aligned = &mut bytes_of(&mut bounce)[..part.len()];
            let mut done = 0;
            while done < part.len() {
                match self.file.read_at(&mut aligned[done..], offset + done as u64) {
                    Ok(bytes) => done = self.advance(offset, done, bytes, part.len())?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(system(Step::Read, &self.path, error)),
                }
            }
            part.copy_from_slice(aligned);
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Writes whole blocks from `first` on. Not durable before [`StoreFile::flush`].
    ///
    /// # Errors
    /// If the blocks are not all in the store, or the device fails.
    ///
    /// # Panics
    /// If `bytes` is no multiple of 4096 long.
    pub fn write_blocks(&self, first: DeviceBlock, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut offset = self.range_start(first, bytes.len())?;
        let mut bounce = self.bounce.lock().unwrap_or_else(PoisonError::into_inner);
        for part in bytes.chunks(BOUNCE_BLOCKS * BLOCK_BYTES) {
            let aligned = &mut bytes_of(&mut bounce)[..part.len()];
            aligned.copy_from_slice(part);
            let mut done = 0;
            while done < part.len() {
                match self.file.write_at(&aligned[done..], offset + done as u64) {
                    Ok(bytes) => done = self.advance(offset, done, bytes, part.len())?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(system(Step::Write, &self.path, error)),
                }
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Makes all earlier writes durable.
    ///
    /// # Errors
    /// If the device fails: then nothing is known of any write since the last flush.
    pub fn flush(&self) -> Result<(), DeviceError> {
        self.file.sync_data().map_err(|error| system(Step::Flush, &self.path, error))
    }

    /// The store's whole blocks; bytes after the last whole block are not used.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Whether the store is a block device, and not a file.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Whether another process had the store in use when this was opened read-only: what is read may change.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.is_in_use
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor, for a worker's io_uring.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn range_start(&self, first: DeviceBlock, bytes: usize) -> Result<u64, DeviceError> {
        assert!(bytes.is_multiple_of(BLOCK_BYTES), "{bytes} bytes are not whole blocks");
        let count = (bytes / BLOCK_BYTES) as u64;
        if first.0.checked_add(count).is_none_or(|end| end > self.blocks) {
            return Err(DeviceError::OutOfRange { first, count, blocks: self.blocks });
        }
        Ok(first.0 * BLOCK_BYTES as u64)
    }

    /// Where to go on after a call at `offset + done` moved `bytes`: direct access can only go on at a block, so one
    /// that was begun is moved again. A call that did not even move one block will not do better next time.
    fn advance(
        &self,
        offset: u64,
        done: usize,
        bytes: usize,
        total: usize,
    ) -> Result<usize, DeviceError> {
        assert!(done + bytes <= total, "{bytes} bytes moved where {} were asked", total - done);
        let next = (done + bytes) / BLOCK_BYTES * BLOCK_BYTES;
        if next == done {
            let block = DeviceBlock((offset + done as u64) / BLOCK_BYTES as u64);
            return Err(DeviceError::Ended { path: self.path.clone(), block });
        }
        Ok(next)
    }
}

/// Why a store could not be opened or used.
#[derive(Debug)]
pub enum DeviceError {
    /// The system refused a step.
    System {
        /// What was tried.
        step: Step,
        /// The store.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process has the store, or a mounted file system the device.
    InUse {
        /// The store.
        path: PathBuf,
    },
    /// The file system knows no direct access.
    NoDirect {
        /// The store.
        path: PathBuf,
        /// Its file system, as far as known.
        file_system: FileSystem,
    },
    /// Neither a regular file nor a block device.
    WrongKind {
        /// What was given as the store.
        path: PathBuf,
    },
    /// The device's sectors are bigger than a block.
    WrongSector {
        /// The store.
        path: PathBuf,
        /// Its logical sector, in bytes.
        bytes: u32,
    },
    /// The size asked for a new file is 0 or no multiple of 4096.
    WrongSize {
        /// That size.
        bytes: u64,
    },
    /// The blocks asked for are not all in the store.
    OutOfRange {
        /// First block asked for.
        first: DeviceBlock,
        /// How many.
        count: u64,
        /// How many the store has.
        blocks: u64,
    },
    /// The file ended before its size at opening, or took less than a block.
    Ended {
        /// The store.
        path: PathBuf,
        /// The block that was not whole.
        block: DeviceBlock,
    },
}

/// What was tried on a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// To open it.
    Open,
    /// To learn its kind, size and sectors.
    Inspect,
    /// To lock it.
    Lock,
    /// To read blocks.
    Read,
    /// To write blocks.
    Write,
    /// To make writes durable.
    Flush,
    /// To create the file.
    Create,
    /// To reserve space for the file.
    Reserve,
}

/// A file system by the magic number that statfs gives; 0 if it gave none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSystem(pub u32);

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0x0000_EF53 => "ext4",
            0x5846_5342 => "xfs",
            0x9123_683E => "btrfs",
            0x0102_1994 => "tmpfs",
            0x794C_7630 => "overlayfs",
            0x2FC1_2FC1 => "zfs",
            0x0000_6969 => "nfs",
            0x6573_5546 => "fuse",
            0x0102_1997 => "9p",
            0 => "unknown",
            magic => return write!(f, "{magic:#x}"),
        };
        f.write_str(name)
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::System { step, path, source } => {
                let deed = match step {
                    Step::Open => "open",
                    Step::Inspect => "inspect",
                    Step::Lock => "lock",
                    Step::Read => "read",
                    Step::Write => "write",
                    Step::Flush => "flush",
                    Step::Create => "create",
                    Step::Reserve => "reserve space for",
                };
                write!(f, "cannot {deed} {}: {source}", path.display())
            }
            DeviceError::InUse { path } => {
                write!(f, "{} is in use by another process", path.display())
            }
            DeviceError::NoDirect { path, file_system } => write!(
                f,
                "{} cannot be opened with O_DIRECT: its file system ({file_system}) does not support it",
                path.display()
            ),
            DeviceError::WrongKind { path } => {
                write!(f, "{} is neither a regular file nor a block device", path.display())
            }
            DeviceError::WrongSector { path, bytes } => write!(
                f,
                "{} has logical sectors of {bytes} bytes; at most {BLOCK_BYTES} are supported",
                path.display()
            ),
            DeviceError::WrongSize { bytes } => {
                write!(f, "{bytes} bytes are not a positive multiple of {BLOCK_BYTES}")
            }
            DeviceError::OutOfRange { first, count, blocks } => {
                write!(f, "{count} blocks from block {first} on exceed a store of {blocks} blocks")
            }
            DeviceError::Ended { path, block } => {
                write!(f, "{} ended at block {block}, before its size at opening", path.display())
            }
        }
    }
}

impl std::error::Error for DeviceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DeviceError::System { source, .. } => Some(source),
            _ => None,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct AlignedBlock([u8; BLOCK_BYTES]);

const _: () = assert!(size_of::<AlignedBlock>() == BLOCK_BYTES);

fn bytes_of(blocks: &mut [AlignedBlock]) -> &mut [u8] {
    let length = size_of_val(blocks);
    // SAFETY: an aligned block is 4096 bytes without padding (asserted above), any bytes are valid in it, and the
    // borrow of `blocks` goes over into the result.
    unsafe { std::slice::from_raw_parts_mut(blocks.as_mut_ptr().cast(), length) }
}

fn system(step: Step, path: &Path, source: io::Error) -> DeviceError {
    DeviceError::System { step, path: path.into(), source }
}

fn open_direct(
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
fn lock(file: &File, path: &Path, mode: OpenMode) -> Result<bool, DeviceError> {
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

fn check_sector(file: &File, path: &Path) -> Result<(), DeviceError> {
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

fn fill(file: &File, path: &Path, bytes: u64, prefill: Prefill) -> Result<(), DeviceError> {
    file.set_len(bytes).map_err(|error| system(Step::Create, path, error))?;
    if prefill != Prefill::None {
        let length = libc::off_t::try_from(bytes).map_err(|_| DeviceError::WrongSize { bytes })?;
        // SAFETY: posix_fallocate takes no pointers.
        let answer = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) };
        if answer != 0 {
            return Err(system(Step::Reserve, path, io::Error::from_raw_os_error(answer)));
        }
    }
    if prefill == Prefill::Zero {
        let store = StoreFile::open_with(path, OpenMode::Exclusive, Caching::BufferedAllowed)?;
        let zeroes = vec![0; BOUNCE_BLOCKS * BLOCK_BYTES];
        let mut block = 0;
        while block < store.blocks() {
            let count = (BOUNCE_BLOCKS as u64).min(store.blocks() - block) as usize;
            store.write_blocks(DeviceBlock(block), &zeroes[..count * BLOCK_BYTES])?;
            block += count as u64;
        }
        store.flush()?;
    }
    file.sync_all().map_err(|error| system(Step::Flush, path, error))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let synced = File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
    synced.map_err(|error| system(Step::Flush, path, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// Beside the test's binary, because a folder for temporary files may be memory only.
    fn folder() -> TempDir {
        let binary = std::env::current_exe().unwrap();
        tempfile::tempdir_in(binary.parent().unwrap()).unwrap()
    }

    fn open(path: &Path, mode: OpenMode) -> Result<StoreFile, DeviceError> {
        StoreFile::open_with(path, mode, Caching::BufferedAllowed)
    }

    #[test]
    fn blocks_come_back() {
        let folder = folder();
        let path = folder.path().join("store");
        for prefill in [Prefill::None, Prefill::Reserve, Prefill::Zero] {
            StoreFile::create(&path, 300 * BLOCK_BYTES as u64, prefill).unwrap();
            assert!(matches!(
                StoreFile::create(&path, 4096, prefill),
                Err(DeviceError::System { step: Step::Create, .. })
            ));
            let store = open(&path, OpenMode::Exclusive).unwrap();
            assert_eq!((store.blocks(), store.is_block_device()), (300, false));
            let written: Vec<u8> =
                (0..150 * BLOCK_BYTES).map(|index| (index / 7 % 251) as u8).collect();
            store.write_blocks(DeviceBlock(9), &written).unwrap();
            store.flush().unwrap();
            let mut read = vec![1; 152 * BLOCK_BYTES];
            store.read_blocks(DeviceBlock(8), &mut read).unwrap();
            assert!(read[..BLOCK_BYTES].iter().all(|byte| *byte == 0));
            assert!(read[BLOCK_BYTES..151 * BLOCK_BYTES] == written);
            assert!(read[151 * BLOCK_BYTES..].iter().all(|byte| *byte == 0));
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_store_has_one_user() {
        let folder = folder();
        let path = folder.path().join("store");
        StoreFile::create(&path, 8 * 4096, Prefill::None).unwrap();
        let user = open(&path, OpenMode::Exclusive).unwrap();
        assert!(!user.is_in_use());
        let refused = open(&path, OpenMode::Exclusive).err().unwrap();
        assert_eq!(refused.to_string(), format!("{} is in use by another process", path.display()));
        let looker = open(&path, OpenMode::ReadOnly).unwrap();
        assert!(looker.is_in_use());
        assert!(looker.write_blocks(DeviceBlock(0), &[0; 4096]).is_err());
        drop((user, looker));
        let lookers = [(); 2].map(|()| open(&path, OpenMode::ReadOnly).unwrap());
        assert!(lookers.iter().all(|looker| !looker.is_in_use()));
        assert!(matches!(open(&path, OpenMode::Exclusive), Err(DeviceError::InUse { .. })));
    }

    #[test]
    fn edges_of_the_store() {
        let folder = folder();
        let path = folder.path().join("store");
        std::fs::write(&path, vec![5; 3 * 4096 + 100]).unwrap();
        let store = open(&path, OpenMode::Exclusive).unwrap();
        assert_eq!(store.blocks(), 3);
        let mut bytes = vec![0; 2 * 4096];
        store.read_blocks(DeviceBlock(1), &mut bytes).unwrap();
        for (first, blocks) in [(2, 2), (u64::MAX, 2), (4, 0)] {
            let result = store.read_blocks(DeviceBlock(first), &mut bytes[..blocks * 4096]);
            assert!(matches!(result, Err(DeviceError::OutOfRange { blocks: 3, .. })), "{first}");
        }
        // Somebody cuts the file in the middle of block 1.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(6000).unwrap();
        let mut bytes = vec![0; 3 * 4096];
        let ended = store.read_blocks(DeviceBlock(0), &mut bytes).err().unwrap();
        assert!(matches!(ended, DeviceError::Ended { block: DeviceBlock(1), .. }), "{ended}");
    }

    #[test]
    fn what_is_no_store() {
        let folder = folder();
        let missing = folder.path().join("missing");
        assert!(matches!(
            open(&missing, OpenMode::ReadOnly),
            Err(DeviceError::System { step: Step::Open, .. })
        ));
        for path in [folder.path(), Path::new("/dev/null")] {
            let result = open(path, OpenMode::Exclusive);
            assert!(matches!(result, Err(DeviceError::WrongKind { .. })));
        }
        assert!(matches!(
            StoreFile::create(&missing, 4097, Prefill::None),
            Err(DeviceError::WrongSize { bytes: 4097 })
        ));
        assert!(!missing.exists());
        // proc knows no direct access.
        if let Err(error) = StoreFile::open(Path::new("/proc/version"), OpenMode::ReadOnly) {
            assert!(matches!(error, DeviceError::NoDirect { .. }), "{error}");
        }
    }
}
