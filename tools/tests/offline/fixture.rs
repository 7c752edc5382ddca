//! A store with something in every structure, made without a node: a volume, a map checkpoint with a segment, records
//! of two CPs in two shards, and their data.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use twinpoint_core::block_map::BlockMap;
use twinpoint_core::catalog::Catalog;
use twinpoint_core::codec::structure_checksum;
use twinpoint_core::delta::{Delta, VolumeDelta};
use twinpoint_core::directory::{self, DirectoryEntry};
use twinpoint_core::geometry::{Geometry, MapSlot};
use twinpoint_core::record::{DataRun, Record};
use twinpoint_core::segment::Slot;
use twinpoint_core::shard_header::ShardHeader;
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{
    BLOCK_BYTES, Checksum, CpNumber, DataBlock, DeviceBlock, LocalBlock, Root, ShardId, ShardSet,
    VolumeId,
};

/// Bytes of every store here.
pub const STORE_BYTES: u64 = 64 << 20;
/// The identity of every store here, unless said otherwise.
pub const STORE_ID: &str = "000102030405060708090a0b0c0d0e0f";
/// Blocks of shard 1's checkpointed segment.
pub const SEGMENT_COUNT: u32 = 20;
/// Blocks that each shard's record of CP 2 maps.
pub const RECORD_COUNT: u32 = 5;

const VOLUME: VolumeId = VolumeId(1);

/// A folder that cleans up; beside the build, where direct access works.
pub fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs the binary.
pub fn twinpoint(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_twinpoint")).args(arguments).output().unwrap()
}

/// Runs the binary, and checks that a failure is one line; gives exit code, stdout and stderr.
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = twinpoint(arguments);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let code = output.status.code().unwrap_or_else(|| panic!("{arguments:?} died: {stderr}"));
    let lines = usize::from(code != 0);
    assert_eq!(stderr.lines().count(), lines, "{arguments:?} exits with {code}: {stderr}");
    assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    (code, stdout, stderr)
}

/// A formatted, empty store.
pub fn empty(folder: &Path, name: &str, id: &str) -> PathBuf {
    let path = folder.join(name);
    let text = path.to_str().unwrap();
    let format = ["format", text, "--size", "64MiB", "--shards", "2", "--store-id", id];
    let (code, _, stderr) = run(&[&format[..], &["--prefill", "none"]].concat());
    assert_eq!(code, 0, "{stderr}");
    path
}

/// A store whose last CP is 1 or 2, with `seed` in the data of CP 2.
pub struct Fixture {
    /// Where it is.
    pub path: PathBuf,
    /// Its layout.
    pub geometry: Geometry,
}

impl Fixture {
    /// Makes it.
    pub fn new(folder: &Path, name: &str, last: u64, seed: u8) -> Fixture {
        let path = empty(folder, name, STORE_ID);
        let store = Blocks::open(&path);
        let mut superblock = superblock(&store);
        let geometry = superblock.geometry;
        let writer = Writer { store: &store, superblock: &superblock, seed };
        let (catalog, map) = (writer.catalog(), writer.checkpoint());
        let (first, sequence) = writer.first_record(&catalog);
        if last > 1 {
            let roots = [Root(catalog.root()), map.root()];
            writer.second_record(ShardId(0), BlockMap::new(64), roots[0], (first, sequence, 2));
            writer.second_record(ShardId(1), map, roots[1], (0, 0, 1));
        }
        superblock.sequence += 1;
        superblock.committed = CpNumber(last);
        write_superblock(&store, &superblock);
        Fixture { path, geometry }
    }

    /// Its path as an argument.
    pub fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Changes the superblock.
    pub fn change(&self, change: impl FnOnce(&mut Superblock)) {
        let store = Blocks::open(&self.path);
        let mut superblock = superblock(&store);
        superblock.sequence += 1;
        change(&mut superblock);
        write_superblock(&store, &superblock);
    }

    /// The device block of the first data block that CP 2 wrote in a shard.
    pub fn data(&self, shard: u16) -> u64 {
        self.geometry.data_block(ShardId(shard), DataBlock(100)).0
    }
}

/// A store's blocks, without the store's lock: a lock could leak for a moment into a process that another test starts.
pub struct Blocks(File);

impl Blocks {
    /// Opens a store.
    pub fn open(path: &Path) -> Blocks {
        Blocks(OpenOptions::new().read(true).write(true).open(path).unwrap())
    }

    /// A block's bytes.
    pub fn read(&self, block: DeviceBlock) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_BYTES];
        self.0.read_exact_at(&mut bytes, block.0 * BLOCK_BYTES as u64).unwrap();
        bytes
    }

    /// Writes whole blocks.
    pub fn write(&self, first: DeviceBlock, bytes: &[u8]) {
        self.0.write_all_at(bytes, first.0 * BLOCK_BYTES as u64).unwrap();
    }
}

/// A block's bytes.
pub fn read_block(path: &Path, block: u64) -> Vec<u8> {
    Blocks::open(path).read(DeviceBlock(block))
}

/// Writes a block.
pub fn write_block(path: &Path, block: u64, bytes: &[u8]) {
    Blocks::open(path).write(DeviceBlock(block), bytes);
}

/// CRC32C, bit by bit: by another way than the store's own.
fn crc32c(bytes: &[u8]) -> Checksum {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg());
        }
    }
    Checksum(!crc)
}

fn superblock(store: &Blocks) -> Superblock {
    Superblock::decode(&store.read(DeviceBlock(0))).unwrap()
}

fn write_superblock(store: &Blocks, superblock: &Superblock) {
    for block in Geometry::superblock_copies() {
        store.write(block, &superblock.encode());
    }
}

struct Writer<'a> {
    store: &'a Blocks,
    superblock: &'a Superblock,
    seed: u8,
}

impl Writer<'_> {
    fn catalog(&self) -> Catalog {
        let mut catalog = Catalog::default();
        catalog.create("disk", 16 << 20).unwrap();
        catalog
    }

    /// Writes a data block; gives its slot.
    fn data(&self, shard: ShardId, block: u32, byte: u8) -> Slot {
        let mut bytes = vec![byte; BLOCK_BYTES];
        bytes[..4].copy_from_slice(&block.to_le_bytes());
        let block = DataBlock(block);
        let place = self.superblock.geometry.data_block(shard, block);
        self.store.write(place, &bytes);
        Slot { block, checksum: crc32c(&bytes) }
    }

    /// Shard 1's map as of CP 1, in its directory area 1.
    fn checkpoint(&self) -> BlockMap {
        let geometry = self.superblock.geometry;
        let shard = ShardId(1);
        let mut map = BlockMap::new(geometry.segments_max());
        for index in 0..SEGMENT_COUNT {
            let slot = self.data(shard, 3 * index, 7);
            map.set(VOLUME, LocalBlock(u64::from(index)), Some(slot));
        }
        let bytes = map.segment(VOLUME, 0).unwrap().encode();
        let slot = MapSlot(9);
        self.store.write(geometry.map_slot(shard, slot), &bytes);
        let checksum = structure_checksum(&bytes);
        let entry = DirectoryEntry { volume: VOLUME, segment: 0, slot, checksum };
        let directory = directory::encode(&[entry], &Catalog::default());
        self.store.write(geometry.directory_start(shard, 1), &directory);
        let old = self.store.read(geometry.header_copies(shard)[0]);
        let header = ShardHeader {
            sequence: 2,
            checkpoint: CpNumber(1),
            root: map.root(),
            directory_area: 1,
            directory_bytes: directory.len() as u32,
            directory_checksum: structure_checksum(&directory),
            ..ShardHeader::decode(&old).unwrap()
        };
        for copy in geometry.header_copies(shard) {
            self.store.write(copy, &header.encode());
        }
        map
    }

    /// Shard 0's record of CP 1, which creates the volume; gives its checksum and length.
    fn first_record(&self, catalog: &Catalog) -> (u64, u32) {
        let record = Record {
            catalog: Some(catalog.clone()),
            root_after: Root(catalog.root()),
            ..self.record(ShardId(0), 1, Root(0))
        };
        self.write(&record, 0)
    }

    /// A shard's record of CP 2 behind (checksum of the one before, its block, sequence).
    fn second_record(
        &self,
        shard: ShardId,
        mut map: BlockMap,
        before: Root,
        (previous, start, sequence): (u64, u32, u64),
    ) {
        let rest = before.0.wrapping_sub(map.root().0);
        let mut delta = VolumeDelta::new(VOLUME);
        let mut checksums: Vec<Checksum> = Vec::new();
        for index in 0..RECORD_COUNT {
            let slot = self.data(shard, 100 + index, self.seed);
            let local = LocalBlock(u64::from(2 * index));
            delta.push_mapped(local);
            map.set(VOLUME, local, Some(slot));
            checksums.push(slot.checksum);
        }
        let record = Record {
            sequence,
            previous,
            name: Some("a name".to_owned()),
            root_after: Root(map.root().0.wrapping_add(rest)),
            delta: Delta { volumes: vec![delta] },
            runs: vec![DataRun { first: DataBlock(100), count: RECORD_COUNT }],
            checksums,
            ..self.record(shard, 2, before)
        };
        self.write(&record, start);
    }

    fn record(&self, shard: ShardId, cp: u64, root_before: Root) -> Record {
        Record {
            store: self.superblock.store,
            shard,
            term: self.superblock.term,
            cp: CpNumber(cp),
            participants: ShardSet::all(2),
            committed: CpNumber(cp - 1),
            base: CpNumber(0),
            root_before,
            root_after: root_before,
            sequence: 1,
            previous: 0,
            name: None,
            catalog: None,
            delta: Delta::default(),
            runs: Vec::new(),
            checksums: Vec::new(),
        }
    }

    fn write(&self, record: &Record, start: u32) -> (u64, u32) {
        let bytes = record.encode();
        let block = self.superblock.geometry.journal_block(record.shard, start);
        self.store.write(block, &bytes);
        (Record::checksum(&bytes), (bytes.len() / BLOCK_BYTES) as u32)
    }
}
