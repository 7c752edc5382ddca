//! Every format of the store and the wire: its constants against a stored text, its round trips,
//! and what damage does to it.
//!
//! A change of `formats.txt` is a change of the format: stores and peers of before cannot be read.
//! Set `TWINPOINT_BLESS=1` to write it anew.

#![expect(clippy::unwrap_used, reason = "a test's failure is a panic, in its helpers too")]

use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fmt::Write;
use twinpoint_core::block_map::{BlockMap, SegmentKey};
use twinpoint_core::branch::Branch;
use twinpoint_core::catalog::Catalog;
use twinpoint_core::codec::{Damage, FormatErrorKind, structure_checksum};
use twinpoint_core::delta::{Delta, DeltaLimits, VolumeDelta};
use twinpoint_core::directory::{self, DirectoryEntry};
use twinpoint_core::geometry::{Geometry, MapSlot};
use twinpoint_core::record::{DataRun, Record, RecordError, RecordHeader};
use twinpoint_core::segment::{Segment, Slot};
use twinpoint_core::shard_header::{JournalPosition, ShardHeader};
use twinpoint_core::superblock::{Superblock, TermStart};
use twinpoint_core::units::{
    BLOCK_BYTES, Checksum, CpNumber, DataBlock, LocalBlock, Root, ShardId, ShardSet, StoreId, Term,
    VolumeId,
};
use twinpoint_core::{catalog, codec, limits, record, segment, shard_header, superblock, units};

fn geometry() -> Geometry {
    Geometry::plan(64 * 256, 2, None, None).unwrap()
}

fn sample_catalog() -> Catalog {
    let mut catalog = Catalog::new();
    catalog.create("boot", 1 << 30).unwrap();
    catalog.create("data.1", 1 << 40).unwrap();
    catalog
}

fn sample_superblock() -> Superblock {
    Superblock {
        store: StoreId(*b"0123456789abcdef"),
        geometry: geometry(),
        sequence: 7,
        term: Term(3),
        history: vec![
            TermStart { term: Term(1), first: CpNumber(1) },
            TermStart { term: Term(3), first: CpNumber(40) },
        ],
        committed: CpNumber(55),
        base: CpNumber(50),
        paired: true,
        alone_since: Some(CpNumber(51)),
        base_given_up: false,
        deposed_by: None,
        branch: None,
        secondary: false,
        clean: true,
    }
}

fn sample_header() -> ShardHeader {
    ShardHeader {
        store: StoreId(*b"0123456789abcdef"),
        shard: ShardId(1),
        sequence: 9,
        checkpoint: CpNumber(44),
        root: Root(0x1234_5678_9abc_def0_0fed_cba9_8765_4321),
        directory_area: 1,
        directory_bytes: 8192,
        directory_checksum: 0xfeed,
        journal: JournalPosition { index: 17, sequence: 88, previous: 0xabcd },
    }
}

fn sample_segment() -> Segment {
    let mut segment = Segment::new(VolumeId(2), 5);
    for index in (0..512u32).step_by(3) {
        let slot = Slot { block: DataBlock(index * 7919), checksum: Checksum(index * 31) };
        segment.set(index as usize, Some(slot));
    }
    segment
}

fn sample_delta() -> Delta {
    let mut first = VolumeDelta::new(VolumeId(1));
    (100..140).for_each(|block| first.push_mapped(LocalBlock(block)));
    [7, 200, 201, 5000].iter().for_each(|block| first.push_unmapped(LocalBlock(*block)));
    let mut second = VolumeDelta::new(VolumeId(2));
    (0..20).for_each(|index| second.push_mapped(LocalBlock(index * index * 97 + 1)));
    Delta { volumes: vec![first, second] }
}

fn record_of(delta: Delta, catalog: Option<Catalog>, name: Option<String>) -> Record {
    let mapped = delta.mapped_count() as u32;
    let run = |first, count| DataRun { first: DataBlock(first), count };
    let runs = match mapped {
        0 => vec![],
        1 => vec![run(3, 1)],
        more => vec![run(1000, more - 1), run(3, 1)],
    };
    Record {
        store: StoreId(*b"0123456789abcdef"),
        shard: ShardId(1),
        term: Term(3),
        cp: CpNumber(56),
        participants: ShardSet::all(2),
        committed: CpNumber(55),
        base: CpNumber(50),
        root_before: Root(1 << 100),
        root_after: Root(12_345),
        sequence: 89,
        previous: 0xdddd,
        name,
        catalog,
        delta,
        runs,
        checksums: (0..mapped).map(|index| Checksum(index.wrapping_mul(0x9e37_79b1))).collect(),
    }
}

fn sample_record() -> Record {
    record_of(sample_delta(), Some(sample_catalog()), Some("before upgrade".to_owned()))
}

fn sample_directory() -> Vec<DirectoryEntry> {
    let entry = |index: u32| DirectoryEntry {
        volume: VolumeId(1 + index / 4),
        segment: u64::from(index),
        slot: MapSlot(index * 3),
        checksum: u64::from(index) << 40,
    };
    (0..10).map(entry).collect()
}

/// All that must not change by accident.
fn describe() -> String {
    let mut text = String::new();
    macro_rules! constants {
        ($($module:ident: $($name:ident),+;)+) => {
            $($(
                let _ = writeln!(
                    text,
                    "{}::{} = {:?}",
                    stringify!($module), stringify!($name), $module::$name
                );
            )+)+
        };
    }
    constants! {
        units: BLOCK_BYTES, SECTOR_BYTES, SEGMENT_BLOCKS, SHARDS_MAX, DATA_BLOCKS_MAX;
        limits: REGIONS_START, SUPERBLOCK_COPIES, DATA_BLOCKS_USABLE_MAX, DATA_BLOCKS_MIN,
            JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_DEFAULT_MAX, JOURNAL_BLOCKS_MAX, SEGMENTS_MIN,
            SEGMENTS_MAX, VOLUMES_MAX, VOLUME_NAME_BYTES_MAX, VOLUME_BYTES_MAX, LOCAL_BLOCKS_MAX,
            SEGMENT_NUMBERS_MAX, CATALOG_BYTES_MAX, HISTORY_MAX, CHECKPOINT_NAME_BYTES_MAX,
            RECORD_MAPPED_MAX, RECORD_RUNS_MAX, RECORD_UNMAPPED_MAX, DELTA_BYTES_MAX,
            DATA_RUN_BYTES_MAX, RECORD_BLOCKS_MAX;
        codec: CHECKSUM_BYTES, VARINT_BYTES_MAX;
        superblock: SUPERBLOCK_VERSION, SUPERBLOCK_CHECKSUM_OFFSET, SUPERBLOCK_HISTORY_OFFSET,
            TERM_START_BYTES, SUPERBLOCK_BRANCH_OFFSET, BRANCH_BYTES;
        shard_header: SHARD_HEADER_VERSION, SHARD_HEADER_CHECKSUM_OFFSET;
        directory: DIRECTORY_VERSION, DIRECTORY_HEAD_BYTES;
        segment: SEGMENT_VERSION, SEGMENT_CHECKSUM_OFFSET, SEGMENT_CHECKSUMS_OFFSET,
            SEGMENT_POINTERS_OFFSET, SEGMENT_END_OFFSET, POINTER_UNMAPPED;
        record: RECORD_VERSION, RECORD_HEAD_BYTES, RECORD_LENGTHS_OFFSET,
            RECORD_BODY_CHECKSUM_OFFSET, RECORD_CHECKSUM_OFFSET;
    }
    let magics = [
        superblock::SUPERBLOCK_MAGIC,
        shard_header::SHARD_HEADER_MAGIC,
        directory::DIRECTORY_MAGIC,
        segment::SEGMENT_MAGIC,
        record::RECORD_MAGIC,
        record::RECORD_WIRE_MAGIC,
    ];
    for magic in magics {
        let _ = writeln!(text, "magic {}", magic.escape_ascii());
    }
    let _ = writeln!(text, "plan of 64 MiB, 2 shards: {:?}", geometry());
    let samples = [
        ("superblock", sample_superblock().encode()),
        ("shard header", sample_header().encode()),
        ("directory", directory::encode(&sample_directory(), &sample_catalog())),
        ("segment", sample_segment().encode()),
        ("catalog", sample_catalog().encode()),
        ("delta", sample_delta().encode()),
        ("record", sample_record().encode()),
        ("record on the wire", sample_record().encode_wire()),
    ];
    for (name, bytes) in samples {
        let checksum = structure_checksum(&bytes);
        let _ = writeln!(text, "sample {name}: {} bytes, xxh3 {checksum:016x}", bytes.len());
    }
    let _ = writeln!(text, "sample segment's hash {:032x}", sample_segment().hash());
    let _ =
        writeln!(text, "sample catalog's root {:032x}", catalog::Catalog::root(&sample_catalog()));
    text
}

#[test]
fn constants_are_as_stored() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/formats.txt");
    let text = describe();
    print!("{text}");
    if std::env::var_os("TWINPOINT_BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(path).unwrap();
    assert!(stored == text, "a format changed: see formats.txt");
}

fn flip(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut flipped = bytes.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    flipped
}

/// Every single flipped bit, every truncation and every longer form is refused.
fn assert_damage_is_found<T>(bytes: &[u8], decode: impl Fn(&[u8]) -> Option<T>) {
    assert!(decode(bytes).is_some());
    for bit in 0..bytes.len() * 8 {
        assert!(decode(&flip(bytes, bit)).is_none(), "bit {} of byte {}", bit % 8, bit / 8);
    }
    for length in (0..bytes.len()).step_by(if bytes.len() > 1000 { 13 } else { 1 }) {
        assert!(decode(&bytes[..length]).is_none(), "{length} bytes");
    }
    for more in [1, 4096] {
        let longer = [bytes, &vec![0; more]].concat();
        assert!(decode(&longer).is_none(), "{more} more bytes");
    }
}

#[test]
fn damage_of_a_superblock_is_found() {
    assert_damage_is_found(&sample_superblock().encode(), |b| Superblock::decode(b).ok());
}

#[test]
fn damage_of_a_shard_header_is_found() {
    assert_damage_is_found(&sample_header().encode(), |b| ShardHeader::decode(b).ok());
}

#[test]
fn damage_of_a_segment_is_found() {
    assert_damage_is_found(&sample_segment().encode(), |b| Segment::decode(b).ok());
}

#[test]
fn damage_of_a_record_is_found() {
    assert_damage_is_found(&sample_record().encode(), |b| Record::decode(b).ok());
    assert_damage_is_found(&sample_record().encode_wire(), |b| Record::decode_wire(b).ok());
}

#[test]
fn damage_of_a_directory_is_found_by_its_checksum() {
    let bytes = directory::encode(&sample_directory(), &sample_catalog());
    let checksum = structure_checksum(&bytes);
    assert_damage_is_found(&bytes, |bytes| {
        let decoded = directory::decode(bytes, &geometry()).ok()?;
        (structure_checksum(bytes) == checksum).then_some(decoded)
    });
}

#[test]
fn a_damaged_head_hides_the_length_of_a_record() {
    let record = sample_record();
    let bytes = record.encode();
    let header = RecordHeader::peek(&bytes[..BLOCK_BYTES]).unwrap();
    assert_eq!(header.blocks as usize * BLOCK_BYTES, bytes.len());
    assert_eq!((header.cp, header.sequence, header.previous), (record.cp, 89, 0xdddd));
    assert_eq!(header.checksum, Record::checksum(&bytes));
    for bit in 0..record::RECORD_HEAD_BYTES * 8 {
        assert!(RecordHeader::peek(&flip(&bytes, bit)).is_err(), "bit {bit}");
    }
    assert!(RecordHeader::peek(&record.encode_wire()).is_err());
}

#[test]
fn the_newer_superblock_is_chosen() {
    let old = sample_superblock();
    let new = Superblock { sequence: 8, clean: false, ..old.clone() };
    let (old_bytes, new_bytes) = (old.encode(), new.encode());
    let choose = |a: &[u8], b: &[u8]| Superblock::choose([a, b]);
    assert_eq!(choose(&old_bytes, &new_bytes), Ok((new.clone(), Damage::Stale(0))));
    assert_eq!(choose(&new_bytes, &new_bytes), Ok((new, Damage::None)));
    let (chosen, damage) = choose(&old_bytes, &flip(&new_bytes, 1000)).unwrap();
    assert_eq!(chosen, old);
    assert!(matches!(damage, Damage::Invalid(1, _)));
    let other = Superblock { clean: false, ..old.clone() }.encode();
    assert_eq!(choose(&old_bytes, &other).unwrap_err().kind, FormatErrorKind::Copies);
    let zeroes = vec![0; BLOCK_BYTES];
    assert_eq!(choose(&zeroes, &zeroes).unwrap_err().kind, FormatErrorKind::Magic);
}

#[test]
fn impossible_records_are_refused_even_with_right_checksums() {
    let run = |first, count| DataRun { first: DataBlock(first), count };
    let good = sample_record();
    let check = |change: &dyn Fn(&mut Record)| {
        let mut record = good.clone();
        change(&mut record);
        record.check()
    };
    assert_eq!(check(&|_| ()), Ok(()));
    assert!(check(&|r| r.participants = ShardSet(1)).is_err());
    assert!(check(&|r| r.committed = r.cp).is_err());
    assert!(check(&|r| r.base = CpNumber(56)).is_err());
    assert!(check(&|r| r.name = Some(String::new())).is_err());
    assert!(check(&|r| r.name = Some("x".repeat(65))).is_err());
    assert!(check(&|r| r.shard = ShardId(64)).is_err());
    assert!(matches!(check(&|r| r.checksums.truncate(1)), Err(RecordError::Counts { .. })));
    let overlapping = [run(10, 40), run(100, 10), run(49, 10)];
    let result = check(&|r| r.runs = overlapping.to_vec());
    assert_eq!(result, Err(RecordError::Run(run(49, 10))));
    let beyond = [run(limits::DATA_BLOCKS_USABLE_MAX - 59, 60)];
    assert_eq!(check(&|r| r.runs = beyond.to_vec()), Err(RecordError::Run(beyond[0])));
    let last = [run(limits::DATA_BLOCKS_USABLE_MAX - 60, 60)];
    assert_eq!(check(&|r| r.runs = last.to_vec()), Ok(()));
}

#[test]
fn the_largest_records_fit_their_bound() {
    let mut volume = VolumeDelta::new(VolumeId(u32::MAX));
    for index in 0..u64::from(limits::RECORD_MAPPED_MAX) {
        let gap = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 37;
        volume.push_mapped(LocalBlock((index << 28) + gap));
    }
    let mut record = record_of(Delta { volumes: vec![volume] }, Some(sample_catalog()), None);
    let count = limits::RECORD_MAPPED_MAX;
    let place = |index: u32| (index.wrapping_mul(40_503) % count) * 32_000;
    let run = |index| DataRun { first: DataBlock(place(index)), count: 1 };
    record.runs = (0..count).map(run).collect();
    let bytes = record.encode();
    println!("record of {count} scattered blocks: {} bytes", bytes.len());
    assert!(bytes.len() <= limits::RECORD_BLOCKS_MAX as usize * BLOCK_BYTES);
    assert_eq!(Record::decode(&bytes), Ok(record));
}

fn blocks() -> impl Strategy<Value = BTreeSet<u64>> {
    prop_oneof![
        prop::collection::btree_set(0u64..200, 0..60),
        prop::collection::btree_set(0..limits::LOCAL_BLOCKS_MAX, 0..20),
        (0u64..1 << 30, 1u64..200).prop_map(|(first, count)| (first..first + count).collect()),
    ]
}

fn deltas() -> impl Strategy<Value = Delta> {
    let volumes = prop::collection::btree_map(1u32..50, (blocks(), blocks()), 0..4);
    volumes.prop_map(|volumes| {
        let mut delta = Delta::default();
        for (id, (mapped, unmapped)) in volumes {
            let mut volume = VolumeDelta::new(VolumeId(id));
            mapped.iter().for_each(|block| volume.push_mapped(LocalBlock(*block)));
            let unmapped = unmapped.difference(&mapped);
            unmapped.for_each(|block| volume.push_unmapped(LocalBlock(*block)));
            if !volume.mapped.is_empty() || !volume.unmapped.is_empty() {
                delta.volumes.push(volume);
            }
        }
        delta
    })
}

fn catalogs() -> impl Strategy<Value = Catalog> {
    let volumes =
        prop::collection::vec(("[A-Za-z0-9._-]{1,64}", 1u64..1 << 43, any::<bool>()), 0..9);
    volumes.prop_map(|volumes| {
        let mut catalog = Catalog::new();
        for (name, blocks, deleted) in volumes {
            if catalog.create(&name, blocks * 4096).is_ok() && deleted {
                catalog.delete(&name).unwrap();
            }
        }
        catalog
    })
}

fn histories() -> impl Strategy<Value = Vec<TermStart>> {
    let terms = prop::collection::btree_map(0u64..1 << 60, 0u64..1 << 40, 0..limits::HISTORY_MAX);
    terms.prop_map(|terms| {
        let mut first = 0;
        let start = |(term, step)| {
            first += step;
            TermStart { term: Term(term), first: CpNumber(first) }
        };
        terms.into_iter().map(start).collect()
    })
}

prop_compose! {
    fn superblocks()(
        store: [u8; 16], sequence: u64, term in 1u64 << 60.., history in histories(),
        committed: u64, behind: u64, flags: [bool; 3],
        alone_since in prop::option::of(any::<u64>()),
        deposed_by in prop::option::of(any::<u64>()),
        branch in prop::option::of((1u64..1 << 60, any::<u32>(), 1u64..1 << 32, any::<u128>())),
        mib in 64u64..100_000, shards in 1u16..4,
    ) -> Superblock {
        Superblock {
            store: StoreId(store),
            geometry: Geometry::plan(mib * 256, shards, None, None).unwrap(),
            sequence,
            term: Term(term),
            history,
            committed: CpNumber(committed),
            base: CpNumber(committed.saturating_sub(behind)),
            paired: flags[0],
            alone_since: alone_since.map(CpNumber),
            base_given_up: flags[1],
            deposed_by: deposed_by.map(Term),
            branch: branch.map(|(term, common, length, root)| Branch {
                term: Term(term),
                common: CpNumber(common.into()),
                tip: CpNumber(u64::from(common) + length),
                root: Root(root),
            }),
            secondary: flags[0],
            clean: flags[2],
        }
    }
}

proptest! {
    #[test]
    fn superblocks_come_back(superblock in superblocks()) {
        let bytes = superblock.encode();
        prop_assert_eq!(bytes.len(), BLOCK_BYTES);
        prop_assert_eq!(Superblock::decode(&bytes), Ok(superblock));
    }

    #[test]
    fn shard_headers_come_back(
        shard in 0u16..64, sequence: u64, checkpoint: u64, root: u128, area in 0u8..2,
        blocks in 1u32..1 << 19, checksum: u64, index: u32, previous: u64,
    ) {
        let header = ShardHeader {
            store: StoreId(root.to_le_bytes()),
            shard: ShardId(shard),
            sequence,
            checkpoint: CpNumber(checkpoint),
            root: Root(root),
            directory_area: area,
            directory_bytes: blocks * 4096,
            directory_checksum: checksum,
            journal: JournalPosition { index, sequence: !sequence, previous },
        };
        prop_assert_eq!(ShardHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn segments_come_back(
        volume in 1u32.., number in 0..limits::SEGMENT_NUMBERS_MAX,
        slots in prop::collection::btree_map(
            0usize..512, (0..limits::DATA_BLOCKS_USABLE_MAX, any::<u32>()), 1..512,
        ),
    ) {
        let mut segment = Segment::new(VolumeId(volume), number);
        for (index, (block, checksum)) in slots {
            let slot = Slot { block: DataBlock(block), checksum: Checksum(checksum) };
            segment.set(index, Some(slot));
        }
        let bytes = segment.encode();
        prop_assert_eq!(Segment::decode(&bytes), Ok((VolumeId(volume), number, segment)));
    }

    #[test]
    fn records_come_back(
        delta in deltas(),
        catalog in prop::option::of(catalogs()),
        name in prop::option::of("[^\\p{C}]{1,16}"),
    ) {
        let record = record_of(delta, catalog, name);
        let bytes = record.encode();
        prop_assert!(bytes.len().is_multiple_of(BLOCK_BYTES));
        let bound = limits::record_blocks_bound(
            record.delta.mapped_count() as u32,
            record.delta.run_count() as u32,
        );
        prop_assert!(bytes.len() <= bound as usize * BLOCK_BYTES);
        let decoded = Record::decode(&bytes).unwrap();
        prop_assert_eq!(decoded.encode(), bytes);
        prop_assert_eq!(&decoded, &record);

        let wire = record.encode_wire();
        let received = Record::decode_wire(&wire).unwrap();
        prop_assert_eq!(received.encode_wire(), wire);
        let sent = Record { sequence: 0, previous: 0, runs: vec![], checksums: vec![], ..record };
        prop_assert_eq!(received, sent);
    }

    #[test]
    fn directories_and_catalogs_come_back(
        keys in prop::collection::btree_set((1u32..9, 0..limits::SEGMENT_NUMBERS_MAX), 0..64),
        catalog in catalogs(),
    ) {
        let mut entries = Vec::new();
        for (volume, segment) in keys {
            let slot = MapSlot(entries.len() as u32);
            entries.push(DirectoryEntry { volume: VolumeId(volume), segment, slot, checksum: !segment });
        }
        prop_assert_eq!(Catalog::decode(&catalog.encode()), Ok(catalog.clone()));
        let bytes = directory::encode(&entries, &catalog);
        prop_assert_eq!(directory::decode(&bytes, &geometry()), Ok((entries, catalog)));
    }

    /// Bytes with a right checksum but wrong contents: nothing panics, and what is accepted is
    /// encoded as it came.
    #[test]
    fn forged_structures_never_panic(
        kind in 0usize..4, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (mut bytes, field) = match kind {
            0 => (sample_superblock().encode(), superblock::SUPERBLOCK_CHECKSUM_OFFSET),
            1 => (sample_header().encode(), shard_header::SHARD_HEADER_CHECKSUM_OFFSET),
            2 => (sample_segment().encode(), segment::SEGMENT_CHECKSUM_OFFSET),
            _ => (sample_record().encode(), record::RECORD_CHECKSUM_OFFSET),
        };
        let span = if kind == 2 { BLOCK_BYTES } else { 800 };
        changes.iter().for_each(|(index, byte)| bytes[index.index(span)] = *byte);
        if kind == 3 {
            let lengths: Vec<usize> = bytes[record::RECORD_LENGTHS_OFFSET..][..24]
                .chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap()) as usize).collect();
            let body = lengths[0] + lengths[1] + lengths[2] + lengths[4] + lengths[5] * 4;
            let end = (record::RECORD_HEAD_BYTES + body).min(bytes.len());
            let checksum = structure_checksum(&bytes[record::RECORD_HEAD_BYTES..end]);
            bytes[record::RECORD_BODY_CHECKSUM_OFFSET..][..8].copy_from_slice(&checksum.to_le_bytes());
            codec::seal(&mut bytes[..record::RECORD_HEAD_BYTES], field);
        } else {
            codec::seal(&mut bytes, field);
        }
        let again = match kind {
            0 => Superblock::decode(&bytes).ok().map(|s| s.encode()),
            1 => ShardHeader::decode(&bytes).ok().map(|s| s.encode()),
            2 => Segment::decode(&bytes).ok().map(|(_, _, s)| s.encode()),
            _ => Record::decode(&bytes).ok().map(|s| s.encode()),
        };
        if let Some(again) = again {
            prop_assert_eq!(again, bytes);
        }
    }

    #[test]
    fn garbage_never_panics(
        bytes in prop::collection::vec(any::<u8>(), 0..600), block: bool, magic in 0usize..8,
    ) {
        let mut bytes = bytes;
        if block {
            bytes.resize(BLOCK_BYTES, 0);
        }
        let magics = [
            superblock::SUPERBLOCK_MAGIC, shard_header::SHARD_HEADER_MAGIC, segment::SEGMENT_MAGIC,
            directory::DIRECTORY_MAGIC, record::RECORD_MAGIC, record::RECORD_WIRE_MAGIC,
        ];
        if let (Some(magic), true) = (magics.get(magic), bytes.len() >= 10) {
            bytes[..8].copy_from_slice(magic);
            bytes[8..10].copy_from_slice(&[1, 0]);
        }
        prop_assert!(Superblock::decode(&bytes).is_err());
        prop_assert!(ShardHeader::decode(&bytes).is_err());
        prop_assert!(Segment::decode(&bytes).is_err());
        prop_assert!(Record::decode(&bytes).is_err());
        prop_assert!(Record::decode_wire(&bytes).is_err());
        prop_assert!(RecordHeader::peek(&bytes).is_err());
        let _ = directory::decode(&bytes, &geometry());
        let _ = Catalog::decode(&bytes);
        let _ = Delta::decode(&bytes, DeltaLimits::RECORD);
    }
}

/// The secondary's way: a delta from the wire, applied with placed blocks, gives the same root.
#[test]
fn a_record_applied_on_the_other_side_gives_the_same_root() {
    let record = sample_record();
    let mut primary = BlockMap::new(64);
    for (volume, block) in record.delta.unmapped_blocks() {
        let slot = Slot { block: DataBlock(block.0 as u32 + 9), checksum: Checksum(1) };
        primary.set(volume, block, Some(slot));
    }
    let mut secondary = primary.clone();
    let received = Record::decode_wire(&record.encode_wire()).unwrap();
    for (map, record_delta) in [(&mut primary, &record.delta), (&mut secondary, &received.delta)] {
        let places = record.runs.iter().flat_map(DataRun::blocks);
        let slots = places.zip(&record.checksums);
        for ((volume, local), (block, checksum)) in record_delta.mapped_blocks().zip(slots) {
            map.set(volume, local, Some(Slot { block, checksum: *checksum }));
        }
        for (volume, local) in record_delta.unmapped_blocks() {
            assert!(map.set(volume, local, None).is_some());
        }
    }
    assert_eq!(primary.root(), secondary.root());
    assert_eq!(primary.mapped_blocks(), record.delta.mapped_count());
    let key = SegmentKey::of(VolumeId(1), LocalBlock(100));
    let hash = |map: &BlockMap| map.segment(key.volume, key.segment).map(Segment::hash);
    assert_eq!(hash(&primary), hash(&secondary));
}
