//! Target: recovery of a whole store after any bytes of it were changed.
//!
//! The store has two shards and three CPs in its journals. Invariants: recovery ends with a store or an error, what
//! it repaired needs no second repair, and the second recovery finds the same CP and the same roots.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use twinpoint_core::block_map::BlockMap;
use twinpoint_core::catalog::Catalog;
use twinpoint_core::codec::{seal, structure_checksum};
use twinpoint_core::delta::{Delta, VolumeDelta};
use twinpoint_core::journal::Journal;
use twinpoint_core::record::{DataRun, RECORD_MAGIC, Record};
use twinpoint_core::recovery::{BlockSource, ReadFailed, Recovered, format, recover};
use twinpoint_core::segment::Slot;
use twinpoint_core::shard_header::{
    JournalPosition, SHARD_HEADER_CHECKSUM_OFFSET, SHARD_HEADER_MAGIC,
};
use twinpoint_core::superblock::{SUPERBLOCK_CHECKSUM_OFFSET, SUPERBLOCK_MAGIC, Superblock};
use twinpoint_core::units::{
    BLOCK_BYTES, Checksum, CpNumber, DataBlock, DeviceBlock, LocalBlock, Root, ShardId, ShardSet,
    Term, VolumeId,
};

use super::formats::seal_record;

/// CPs in the journals.
const POINTS: u64 = 3;
/// Bytes of one change: which block, which byte of it, the new value, how.
const CHANGE_BYTES: usize = 6;

/// A store in memory: blocks that are not here are zero.
#[derive(Clone)]
struct Image {
    blocks: BTreeMap<u64, Vec<u8>>,
    count: u64,
}

impl BlockSource for Image {
    fn read(&mut self, first: DeviceBlock, bytes: &mut [u8]) -> Result<(), ReadFailed> {
        for (index, chunk) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let number = first.0 + index as u64;
            if number >= self.count {
                return Err(ReadFailed(DeviceBlock(number)));
            }
            match self.blocks.get(&number) {
                Some(block) => chunk.copy_from_slice(block),
                None => chunk.fill(0),
            }
        }
        Ok(())
    }

    fn checksum(&self, block: &[u8]) -> Checksum {
        checksum(block)
    }

    fn blocks(&self) -> u64 {
        self.count
    }
}

/// The source chooses what a data block's checksum is.
fn checksum(block: &[u8]) -> Checksum {
    Checksum(structure_checksum(block) as u32)
}

/// A store with [`POINTS`] CPs. Each maps, in both shards, two blocks anew and changes one of before.
fn store() -> &'static Image {
    static STORE: OnceLock<Image> = OnceLock::new();
    STORE.get_or_init(|| {
        let superblock = super::seeds::superblock();
        let geometry = superblock.geometry;
        let mut image = Image { blocks: BTreeMap::new(), count: geometry.store_blocks() };
        for (block, bytes) in format(&superblock) {
            image.write(block.0, &bytes);
        }
        let mut catalog = Catalog::default();
        catalog.create("disk", 1 << 30).expect("an empty catalog has room");
        for shard in [ShardId(0), ShardId(1)] {
            image.write_points(&superblock, shard, &catalog);
        }
        image
    })
}

impl Image {
    fn write(&mut self, first: u64, bytes: &[u8]) {
        for (index, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            self.blocks.insert(first + index as u64, block.to_vec());
        }
    }

    fn write_points(&mut self, superblock: &Superblock, shard: ShardId, catalog: &Catalog) {
        let geometry = superblock.geometry;
        let mut map = BlockMap::new(geometry.segments_max());
        let no_catalog = if shard.0 == 0 { Catalog::default().root() } else { 0 };
        let mut root = Root(no_catalog);
        let position = JournalPosition { index: 0, sequence: 1, previous: 0 };
        let mut journal = Journal::new(geometry.journal_blocks, position, root);
        for point in 1..=POINTS {
            let mut changed = VolumeDelta::new(VolumeId(1));
            let (mut checksums, first) = (Vec::new(), point as u32 * 3);
            for index in 0..3 {
                let local = LocalBlock(point * 2 + index);
                changed.push_mapped(local);
                let bytes = [point as u8 * 16 + index as u8; BLOCK_BYTES];
                let block = DataBlock(first + index as u32);
                self.write(geometry.data_block(shard, block).0, &bytes);
                checksums.push(checksum(&bytes));
                map.set(VolumeId(1), local, Some(Slot { block, checksum: checksum(&bytes) }));
            }
            let root_before = root;
            let catalog_root = if shard.0 == 0 { catalog.root() } else { 0 };
            root = Root(map.root().0.wrapping_add(catalog_root));
            let record = Record {
                store: superblock.store,
                shard,
                term: Term(1),
                cp: CpNumber(point),
                participants: ShardSet::all(2),
                committed: CpNumber(point.saturating_sub(2)),
                base: CpNumber(0),
                root_before,
                root_after: root,
                sequence: journal.sequence(),
                previous: journal.previous(),
                name: (point == 2).then(|| "named".to_owned()),
                catalog: (point == 1 && shard.0 == 0).then(|| catalog.clone()),
                delta: Delta { volumes: vec![changed] },
                runs: vec![DataRun { first: DataBlock(first), count: 3 }],
                checksums,
            };
            let bytes = record.encode();
            let blocks = (bytes.len() / BLOCK_BYTES) as u32;
            let start = journal.append(record.cp, blocks, Record::checksum(&bytes), root);
            self.write(geometry.journal_block(shard, start).0, &bytes);
        }
    }

    /// Changes a byte of a block that holds something, or of the one after it.
    fn change(&mut self, change: &[u8; CHANGE_BYTES]) {
        let [block, next, low, high, value, how] = *change;
        let numbers = self.blocks.keys().copied().collect::<Vec<_>>();
        let number = numbers[usize::from(block) % numbers.len()] + u64::from(next == 1);
        let bytes = self.blocks.entry(number).or_insert_with(|| vec![0; BLOCK_BYTES]);
        match how >> 1 {
            0 => bytes[usize::from(u16::from_le_bytes([low, high])) % BLOCK_BYTES] = value,
            1 => bytes.fill(value),
            // A misdirected write.
            2 => *bytes = store().blocks[&numbers[usize::from(value) % numbers.len()]].clone(),
            _ => bytes[usize::from(u16::from_le_bytes([low, high])) % BLOCK_BYTES] ^= value,
        }
        if how & 1 == 1 {
            reseal(bytes);
        }
    }
}

/// Puts a structure's own checksum right.
fn reseal(block: &mut [u8]) {
    match block.first_chunk::<8>() {
        Some(&SUPERBLOCK_MAGIC) => seal(block, SUPERBLOCK_CHECKSUM_OFFSET),
        Some(&SHARD_HEADER_MAGIC) => seal(block, SHARD_HEADER_CHECKSUM_OFFSET),
        Some(&RECORD_MAGIC) => seal_record(block),
        _ => {}
    }
}

/// Changes of six bytes each; says whether all CPs were found.
pub(super) fn recovery(input: &[u8]) -> bool {
    let mut image = store().clone();
    input.as_chunks::<CHANGE_BYTES>().0.iter().take(64).for_each(|change| image.change(change));
    let Ok(first) = recover(&mut image, None) else { return false };
    for repair in &first.repairs {
        image.write(repair.block.0, &repair.bytes);
    }
    let second = recover(&mut image, None).expect("a repaired store is whole");
    assert!(second.repairs.is_empty(), "repaired twice: {:?}", second.repairs[0].why);
    assert_eq!(found(&second), found(&first), "the second recovery differs");
    if input.len() < CHANGE_BYTES {
        assert_eq!(first.coordinator.committed, CpNumber(POINTS), "an untouched store is whole");
    }
    first.coordinator.committed == CpNumber(POINTS)
}

fn found(recovered: &Recovered) -> (CpNumber, CpNumber, &[Root]) {
    let coordinator = &recovered.coordinator;
    (coordinator.committed, coordinator.base, &coordinator.roots)
}
