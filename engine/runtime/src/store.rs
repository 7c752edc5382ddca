//! The store outside the flow: formatting it, reading what it holds, and promoting it while no node serves it.
//!
//! Invariants:
//! - Formatting touches nothing that holds data unless it is forced, and makes the superblock durable last: a store
//!   that is formatted by half is no store.
//! - Only [`open_and_recover`] and [`promote`] change a formatted store: to what recovery decided, and to the new
//!   term.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use twinpoint_core::coordinator::store_root;
use twinpoint_core::geometry::{Geometry, GeometryError};
use twinpoint_core::recovery::{self, BlockSource, ReadFailed, Recovered, RecoveryError};
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{BLOCK_BYTES, Checksum, CpNumber, DeviceBlock, Root, StoreId, Term};

use crate::device::{Caching, DeviceError, OpenMode, Prefill, StoreFile};

/// Blocks at the start and at the end that must be zero in an unused store: file systems, partition tables and
/// volume managers keep their labels there.
const LABEL_BLOCKS: u64 = 256;
/// Where randomness comes from.
const RANDOM_SOURCE: &str = "/dev/urandom";

/// What a new store is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FormatOptions {
    /// Bytes of the file to create; none for a block device or a file that exists.
    pub size_bytes: Option<u64>,
    /// How many shards, 1 to 64. Never changed later.
    pub shards: u16,
    /// Blocks of each shard's journal; none for 1/32 of its region.
    pub journal_blocks: Option<u32>,
    /// Most map segments of each shard; none for one for each 128 data blocks.
    pub segments_max: Option<u32>,
    /// The identity, to be given to the second half of a pair; none for a random one.
    pub store_id: Option<StoreId>,
    /// Format even what holds data.
    pub force: bool,
    /// What a file that is created contains.
    pub prefill: Prefill,
    /// Whether the page cache is acceptable.
    pub caching: Caching,
}

/// A store as formatted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FormatReport {
    /// Its identity.
    pub store: StoreId,
    /// Its layout.
    pub geometry: Geometry,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether the file was created.
    pub created: bool,
    /// Whether the page cache is bypassed.
    pub is_direct: bool,
}

/// Makes the file or block device at `path` an empty store, and the file too if `size_bytes` is given.
///
/// # Errors
/// See [`StoreError`]. After a failure half-way there is no valid superblock, so the store cannot be opened.
pub fn format_store(path: &Path, options: &FormatOptions) -> Result<FormatReport, StoreError> {
    let store = options.store_id.map_or_else(random_store_id, Ok)?;
    let created = prepare_file(path, options)?;
    let file = StoreFile::open_with(path, OpenMode::Exclusive, options.caching)?;
    let size_bytes = file.blocks() * BLOCK_BYTES as u64;
    if let Some(wanted_bytes) = options.size_bytes.filter(|wanted| *wanted != size_bytes) {
        return Err(StoreError::OtherSize { path: path.into(), size_bytes, wanted_bytes });
    }
    let geometry = plan(file.blocks(), options)?;
    let contents = find_contents(&file)?;
    match contents {
        Some(contents) if !options.force => {
            return Err(StoreError::HoldsData { path: path.into(), contents });
        }
        Some(_) => wipe_labels(&file)?,
        None => {}
    }
    let superblock = Superblock::of_empty(store, geometry);
    let copies = Geometry::superblock_copies();
    for (block, bytes) in recovery::format(&superblock) {
        if !copies.contains(&block) {
            file.write_blocks(block, &bytes)?;
        }
    }
    file.flush()?;
    write_superblock(&file, &superblock)?;
    Ok(FormatReport { store, geometry, size_bytes, created, is_direct: file.is_direct() })
}

/// Reads a store that was opened exclusively, decides what it holds (at most up to `ceiling`), and makes that and the
/// repairs that recovery wants durable.
///
/// # Errors
/// If the store is damaged, or the device fails.
pub fn open_and_recover(
    store: &StoreFile,
    ceiling: Option<CpNumber>,
) -> Result<Recovered, StoreError> {
    // A killed process may have written and not flushed what is read now: durable before a repair calls it committed.
    store.flush()?;
    let recovered = recover_read_only(store, ceiling)?;
    for repair in &recovered.repairs {
        store.write_blocks(repair.block, &repair.bytes)?;
        store.flush()?;
    }
    Ok(recovered)
}

/// As [`open_and_recover`], but changes nothing: what recovery wants repaired is only told.
///
/// # Errors
/// If the store is damaged, or the device fails.
pub fn recover_read_only(
    store: &StoreFile,
    ceiling: Option<CpNumber>,
) -> Result<Recovered, StoreError> {
    let mut source = DeviceSource::new(store);
    let recovered = recovery::recover(&mut source, ceiling);
    recovered.map_err(|error| source.explain(error))
}

/// What a promotion came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Promotion {
    /// Which store.
    pub store: StoreId,
    /// The new term.
    pub term: Term,
    /// The last CP before it.
    pub last: CpNumber,
    /// The store's root there.
    pub root: Root,
}

/// Makes the store of a stopped secondary a primary's, in a new term that is durable at return (R8).
///
/// # Errors
/// [`StoreError::NotSecondary`], or if the store is damaged or the device fails.
pub fn promote(store: &StoreFile) -> Result<Promotion, StoreError> {
    let recovered = open_and_recover(store, None)?;
    let image = recovered.coordinator;
    let root = store_root(&image.roots);
    let mut superblock = image.superblock;
    if !superblock.secondary && superblock.deposed_by.is_none() {
        let (path, term) = (store.path().into(), superblock.term);
        return Err(StoreError::NotSecondary { path, term });
    }
    let last = image.committed;
    let term = superblock.promote(last);
    superblock.sequence += 1;
    superblock.committed = last;
    superblock.base = image.base;
    write_superblock(store, &superblock)?;
    Ok(Promotion { store: superblock.store, term, last, root })
}

/// A random identity for a store.
///
/// # Errors
/// If the kernel gives no random bytes.
pub fn random_store_id() -> Result<StoreId, StoreError> {
    random_bytes().map(StoreId)
}

/// Random bytes from the kernel.
///
/// # Errors
/// [`StoreError::Random`].
pub fn random_bytes<const N: usize>() -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    let mut source = File::open(RANDOM_SOURCE).map_err(StoreError::Random)?;
    source.read_exact(&mut bytes).map_err(StoreError::Random)?;
    Ok(bytes)
}

/// An open store as recovery reads it. Keeps the device's own error.
pub struct DeviceSource<'a> {
    store: &'a StoreFile,
    error: Option<DeviceError>,
}

impl<'a> DeviceSource<'a> {
    /// Reads from `store`.
    #[must_use]
    pub fn new(store: &'a StoreFile) -> DeviceSource<'a> {
        DeviceSource { store, error: None }
    }

    /// The error that recovery gave, with the device's reason if it could not read.
    #[must_use]
    pub fn explain(&mut self, error: RecoveryError) -> StoreError {
        let path = self.store.path().to_path_buf();
        StoreError::Recovery { path, error, device: self.error.take() }
    }
}

impl BlockSource for DeviceSource<'_> {
    fn read(&mut self, first: DeviceBlock, bytes: &mut [u8]) -> Result<(), ReadFailed> {
        self.store.read_blocks(first, bytes).map_err(|error| {
            self.error = Some(error);
            ReadFailed(first)
        })
    }

    fn checksum(&self, block: &[u8]) -> Checksum {
        Checksum(crc_fast::crc32_iscsi(block))
    }

    fn blocks(&self) -> u64 {
        self.store.blocks()
    }
}

/// Why a store was not formatted, opened or promoted.
#[derive(Debug)]
pub enum StoreError {
    /// The device or file refused.
    Device(DeviceError),
    /// What the store holds is damaged.
    Recovery {
        /// The store.
        path: PathBuf,
        /// What is damaged.
        error: RecoveryError,
        /// The device's reason, if it could not read.
        device: Option<DeviceError>,
    },
    /// The store cannot have the wanted layout.
    Geometry {
        /// Why.
        error: GeometryError,
    },
    /// There is no file, and no size to create it with.
    Missing {
        /// Where.
        path: PathBuf,
    },
    /// What exists has another size than the one asked for.
    OtherSize {
        /// The store.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The size asked for.
        wanted_bytes: u64,
    },
    /// It holds data, and formatting was not forced.
    HoldsData {
        /// The store.
        path: PathBuf,
        /// What was found there.
        contents: Contents,
    },
    /// Only a secondary's store can be promoted.
    NotSecondary {
        /// The store.
        path: PathBuf,
        /// Its term.
        term: Term,
    },
    /// The kernel gave no random bytes.
    Random(io::Error),
}

/// What lies in a store that is not empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contents {
    /// A store of ours.
    Store(StoreId),
    /// Something with a known label.
    Known(&'static str),
    /// Some byte that is not zero, in this block.
    Unknown(DeviceBlock),
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contents::Store(id) => write!(f, "the Twinpoint store {id}"),
            Contents::Known(name) => f.write_str(name),
            Contents::Unknown(block) => {
                write!(f, "data (at byte {})", block.0 * BLOCK_BYTES as u64)
            }
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Device(error @ DeviceError::InUse { .. }) => {
                write!(f, "{error}: stop the node, or unmount what uses it, first")
            }
            StoreError::Device(error @ DeviceError::NoDirect { .. }) => {
                write!(f, "{error}; put the store elsewhere, or add --buffered for a trial")
            }
            StoreError::Device(error) => error.fmt(f),
            StoreError::Recovery { path, error, device } => {
                write!(f, "{}: {error}", path.display())?;
                device.as_ref().map_or(Ok(()), |device| write!(f, " ({device})"))
            }
            StoreError::Geometry { error } => error.fmt(f),
            StoreError::Missing { path } => {
                write!(f, "{} does not exist: give --size to create it", path.display())
            }
            StoreError::OtherSize { path, size_bytes, wanted_bytes } => write!(
                f,
                "{} exists with {size_bytes} bytes, not {wanted_bytes}: leave --size away, or remove the file",
                path.display()
            ),
            StoreError::HoldsData { path, contents } => write!(
                f,
                "{} holds {contents}: give --force to destroy it, or choose another place",
                path.display()
            ),
            StoreError::NotSecondary { path, term } => write!(
                f,
                "{} is a primary's store already (term {term}): serve it with --role primary",
                path.display()
            ),
            StoreError::Random(error) => write!(f, "cannot read {RANDOM_SOURCE}: {error}"),
        }
    }
}

impl std::error::Error for StoreError {}

impl From<DeviceError> for StoreError {
    fn from(error: DeviceError) -> StoreError {
        StoreError::Device(error)
    }
}

/// Creates the file if it is not there; tells whether it did.
fn prepare_file(path: &Path, options: &FormatOptions) -> Result<bool, StoreError> {
    let exists = path.symlink_metadata().is_ok();
    match options.size_bytes {
        None if !exists => Err(StoreError::Missing { path: path.into() }),
        Some(bytes) if !exists => {
            // Before there is a file, so that an impossible wish leaves nothing behind.
            plan(bytes / BLOCK_BYTES as u64, options)?;
            StoreFile::create(path, bytes, options.prefill)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

fn plan(store_blocks: u64, options: &FormatOptions) -> Result<Geometry, StoreError> {
    Geometry::plan(store_blocks, options.shards, options.journal_blocks, options.segments_max)
        .map_err(|error| StoreError::Geometry { error })
}

fn find_contents(file: &StoreFile) -> Result<Option<Contents>, StoreError> {
    for (first, count) in label_zones(file.blocks()) {
        let bytes = read(file, first, count)?;
        if first.0 == 0
            && let Some(contents) = find_label(&bytes)
        {
            return Ok(Some(contents));
        }
        if let Some(index) = bytes.iter().position(|byte| *byte != 0) {
            return Ok(Some(Contents::Unknown(DeviceBlock(
                first.0 + (index / BLOCK_BYTES) as u64,
            ))));
        }
    }
    Ok(None)
}

/// The first and the last MiB, which may overlap.
fn label_zones(blocks: u64) -> [(DeviceBlock, u64); 2] {
    let count = LABEL_BLOCKS.min(blocks);
    [(DeviceBlock(0), count), (DeviceBlock(blocks - count), count)]
}

/// Knows what lies in the first MiB by its label.
fn find_label(bytes: &[u8]) -> Option<Contents> {
    const LABELS: [(usize, &[u8], &str); 10] = [
        (0, b"XFSB", "an xfs file system"),
        (0, b"LUKS\xba\xbe", "a LUKS container"),
        (0x218, b"LVM2", "an LVM volume"),
        (0x1018, b"LVM2", "an LVM volume"),
        (0x1040, b"_BHRfS_M", "a btrfs file system"),
        (0x10040, b"_BHRfS_M", "a btrfs file system"),
        (0x438, b"\x53\xef", "an ext file system"),
        (0xff6, b"SWAPSPACE2", "a swap area"),
        (0x200, b"EFI PART", "a partition table"),
        (0x1fe, b"\x55\xaa", "a partition table or boot sector"),
    ];
    for block in Geometry::superblock_copies() {
        let start = usize::try_from(block.0).ok()? * BLOCK_BYTES;
        let superblock = Superblock::decode(bytes.get(start..start + BLOCK_BYTES)?);
        if let Ok(superblock) = superblock {
            return Some(Contents::Store(superblock.store));
        }
    }
    let holds =
        |offset: usize, label: &[u8]| bytes.get(offset..offset + label.len()) == Some(label);
    let label = LABELS.iter().find(|(offset, label, _)| holds(*offset, label));
    label.map(|(_, _, name)| Contents::Known(name))
}

/// Zeroes what made the store something: superblocks first, so that no half of an old store is ever opened.
fn wipe_labels(file: &StoreFile) -> Result<(), StoreError> {
    for block in Geometry::superblock_copies() {
        file.write_blocks(block, &[0; BLOCK_BYTES])?;
    }
    file.flush()?;
    let zeroes = vec![0; LABEL_BLOCKS as usize * BLOCK_BYTES];
    for (first, count) in label_zones(file.blocks()) {
        file.write_blocks(first, &zeroes[..count as usize * BLOCK_BYTES])?;
    }
    Ok(file.flush()?)
}

/// One copy after the other, each durable before the next, so that one is always whole.
fn write_superblock(file: &StoreFile, superblock: &Superblock) -> Result<(), StoreError> {
    let bytes = superblock.encode();
    for block in Geometry::superblock_copies() {
        file.write_blocks(block, &bytes)?;
        file.flush()?;
    }
    Ok(())
}

fn read(file: &StoreFile, first: DeviceBlock, count: u64) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; count as usize * BLOCK_BYTES];
    file.read_blocks(first, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use twinpoint_core::superblock::TermStart;

    use super::*;

    fn options(size_bytes: Option<u64>, force: bool) -> FormatOptions {
        FormatOptions {
            size_bytes,
            shards: 2,
            journal_blocks: None,
            segments_max: None,
            store_id: None,
            force,
            prefill: Prefill::None,
            caching: Caching::BufferedAllowed,
        }
    }

    fn open(path: &Path) -> StoreFile {
        StoreFile::open_with(path, OpenMode::Exclusive, Caching::BufferedAllowed).unwrap()
    }

    #[test]
    fn what_holds_data_is_refused_and_forced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let missing = format_store(&path, &options(None, false));
        assert!(matches!(missing, Err(StoreError::Missing { .. })));
        let small = format_store(&path, &options(Some(1 << 20), false));
        assert!(matches!(small, Err(StoreError::Geometry { .. })) && !path.exists());
        let first = format_store(&path, &options(Some(64 << 20), false)).unwrap();
        assert!(first.created);
        let again = format_store(&path, &options(Some(64 << 20), false));
        let contents = Contents::Store(first.store);
        assert!(matches!(again, Err(StoreError::HoldsData { contents: c, .. }) if c == contents));
        let second = format_store(&path, &options(None, true)).unwrap();
        assert_ne!(first.store, second.store);
        let other = format_store(&path, &options(Some(65 << 20), true));
        assert!(matches!(other, Err(StoreError::OtherSize { .. })));
        let recovered = open_and_recover(&open(&path), None).unwrap();
        assert_eq!(recovered.coordinator.superblock.store, second.store);
        assert_eq!((recovered.repairs.len(), recovered.coordinator.committed), (0, CpNumber(0)));
    }

    #[test]
    fn labels_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let blocks = 64 * 256;
        let cases = [(0x438, "an ext file system"), (0x200, "a partition table"), (4096, "data")];
        for (offset, name) in cases {
            let mut bytes = vec![0; 4 * BLOCK_BYTES];
            let label: &[u8] = if offset == 0x438 { b"\x53\xef" } else { b"EFI PART" };
            bytes[offset..offset + label.len()].copy_from_slice(label);
            std::fs::write(&path, &bytes).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(blocks * 4096).unwrap();
            let error = format_store(&path, &options(None, false)).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        // A label at the very end, as of a mirror.
        std::fs::write(&path, []).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(blocks * 4096).unwrap();
        open(&path).write_blocks(DeviceBlock(blocks - 1), &[1; BLOCK_BYTES]).unwrap();
        let error = format_store(&path, &options(None, false)).unwrap_err();
        assert!(error.to_string().contains("data (at byte 67104768)"), "{error}");
    }

    #[test]
    fn a_secondary_is_promoted_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        format_store(&path, &options(Some(64 << 20), false)).unwrap();
        let store = open(&path);
        assert!(matches!(promote(&store), Err(StoreError::NotSecondary { .. })));
        let mut superblock = open_and_recover(&store, None).unwrap().coordinator.superblock;
        superblock.secondary = true;
        superblock.sequence += 1;
        write_superblock(&store, &superblock).unwrap();
        let promotion = promote(&store).unwrap();
        assert_eq!((promotion.term, promotion.last), (Term(2), CpNumber(0)));
        let after = open_and_recover(&store, None).unwrap().coordinator.superblock;
        assert_eq!(after.history.len(), 2);
        assert_eq!(after.history[1], TermStart { term: Term(2), first: CpNumber(1) });
        assert!(matches!(promote(&store), Err(StoreError::NotSecondary { term: Term(2), .. })));
    }

    #[test]
    fn a_damaged_copy_is_repaired_and_both_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        format_store(&path, &options(Some(64 << 20), false)).unwrap();
        let store = open(&path);
        store.write_blocks(DeviceBlock(0), &[7; BLOCK_BYTES]).unwrap();
        assert_eq!(recover_read_only(&store, None).unwrap().repairs.len(), 1);
        assert_eq!(open_and_recover(&store, None).unwrap().repairs.len(), 1);
        assert_eq!(open_and_recover(&store, None).unwrap().repairs.len(), 0);
        for block in Geometry::superblock_copies() {
            store.write_blocks(block, &[0; BLOCK_BYTES]).unwrap();
        }
        let error = open_and_recover(&store, None).unwrap_err();
        assert!(matches!(error, StoreError::Recovery { .. }), "{error}");
    }
}
