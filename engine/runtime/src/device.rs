//! The store's file or block device: opening it for one process alone, and blocking access to whole blocks for
//! what happens outside the flow: format, recovery, inspect, verify. In the flow a worker's io_uring uses the
//! descriptor.
//!
//! Invariants:
//! - The page cache is bypassed (O_DIRECT), unless a caller of [`StoreFile::open_with`] allows otherwise.
//! - A store that is driven by NVMe commands has its block device open and claimed as any other; what was in the kernel's
//!   page cache of it was written back before, for commands go past it.
//! - Whoever may write has the store alone: flock on the file, on a block device also the kernel's exclusive claim,
//!   which a mounted file system has too.
//! - Blocks are only read and written whole, and only inside the size that was found at opening.

mod error;
mod namespace;
pub(crate) mod nvme;
mod opening;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use twinpoint_core::units::{BLOCK_BYTES, DeviceBlock};

pub use error::{DeviceError, FileSystem, PassthroughFault, Step};
use namespace::Namespace;
use opening::{check_sector, lock, open_direct};

/// Blocks moved by one system call through the aligned copy: 256 KiB.
const BOUNCE_BLOCKS: usize = 64;
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

/// How a store is driven in the flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DeviceMode {
    /// By reads and writes of the file or block device.
    #[default]
    Block,
    /// By NVMe commands of our own, past the kernel's block layer.
    Passthrough {
        /// Completions are looked for, on the device's poll queues, and nobody is interrupted.
        is_polled: bool,
    },
}

/// What a worker's io_uring needs of a store. The descriptors stay open as long as the [`StoreFile`] lives.
#[derive(Clone, Copy, Debug)]
pub struct StoreTarget {
    /// The file or block device.
    pub(crate) descriptor: RawFd,
    /// How to drive it by commands; none in block mode.
    pub(crate) commands: Option<CommandTarget>,
}

/// A namespace, for commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CommandTarget {
    /// The generic character device.
    pub generic: RawFd,
    pub namespace: u32,
    /// A logical block is 2 to the power of this many bytes; at most a block of ours.
    pub shift: u8,
    /// Most bytes of a command: whole blocks, so few that each may be a run of memory of its own.
    pub bytes_max: u32,
    /// Most commands under way that the device's queue takes at once.
    pub depth: u32,
    /// It is what several paths lead to: the kernel finds one for each command.
    pub is_head: bool,
    pub is_polled: bool,
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
    commands: Option<(File, CommandTarget)>,
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
            commands: None,
        })
    }

    /// Opens the store at `path` alone, to be driven as `device` says. For commands `path` is the block device of an NVMe
    /// namespace or its generic character device; the blocks outside the flow go through the block device either way.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn open_for(
        path: &Path,
        caching: Caching,
        device: DeviceMode,
    ) -> Result<StoreFile, DeviceError> {
        let DeviceMode::Passthrough { is_polled } = device else {
            return StoreFile::open_with(path, OpenMode::Exclusive, caching);
        };
        let namespace = Namespace::find(path)?;
        let mut store = StoreFile::open(namespace.block(), OpenMode::Exclusive)?;
        let generic = namespace.open_generic(&store.file)?;
        let described = describe(&generic, path)?;
        let bytes = store.file_bytes()?;
        let target = namespace.target(generic.as_raw_fd(), is_polled, described, bytes)?;
        write_back(&store.file, path)?;
        store.commands = Some((generic, target));
        Ok(store)
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

    /// The descriptor, for a worker's io_uring in block mode.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// What a worker's io_uring needs, in whatever mode.
    #[must_use]
    pub fn target(&self) -> StoreTarget {
        let commands = self.commands.as_ref().map(|(_, target)| *target);
        StoreTarget { descriptor: self.file.as_raw_fd(), commands }
    }

    fn file_bytes(&self) -> Result<u64, DeviceError> {
        let end = (&self.file).seek(SeekFrom::End(0));
        end.map_err(|error| system(Step::Inspect, &self.path, error))
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

/// What the device says of a namespace: its number and format.
fn describe(generic: &File, path: &Path) -> Result<(u32, nvme::Format), DeviceError> {
    let descriptor = generic.as_raw_fd();
    // SAFETY: this ioctl takes no pointer.
    let answer = unsafe { libc::ioctl(descriptor, nvme::IOCTL_ID as _) };
    let number = u32::try_from(answer)
        .map_err(|_| system(Step::Inspect, path, io::Error::last_os_error()))?;
    let mut data = AlignedBlock([0; nvme::IDENTIFY_BYTES]);
    let address = data.0.as_mut_ptr().expose_provenance() as u64;
    let mut command = nvme::identify(number, address);
    // SAFETY: the command has the size that is part of the ioctl's number, and names `data`, which has the length it
    // tells; both live during the call, which ends after the device has written.
    let answer = unsafe { libc::ioctl(descriptor, nvme::IOCTL_ADMIN as _, command.as_mut_ptr()) };
    match answer {
        0 => Ok((number, nvme::Format::decode(&data.0))),
        ..0 => Err(system(Step::Inspect, path, io::Error::last_os_error())),
        status => {
            let status = nvme::Status(u16::try_from(status).unwrap_or(u16::MAX));
            Err(system(Step::Inspect, path, io::Error::other(status.to_string())))
        }
    }
}

/// What others left in the page cache is written now, and not later over what commands wrote.
fn write_back(file: &File, path: &Path) -> Result<(), DeviceError> {
    file.sync_all().map_err(|error| system(Step::Flush, path, error))?;
    // Pages that the kernel keeps all the same are clean: they are never written.
    // SAFETY: posix_fadvise takes no pointers.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
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
