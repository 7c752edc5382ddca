//! Opening a store: from bytes that nobody vouches for to the longest whole prefix of CPs (R3, R4).
//!
//! ```text
//!  superblock -> shard headers -> directories -> segments      the map checkpoints
//!             -> journals, record by record                    what came after them
//!             -> which CPs are whole -> data of the newest     how far the history is believed
//!             -> maps, retained blocks, free space             what the node goes on with
//! ```
//!
//! Serves the node, the simulator, `inspect` and `verify` alike; the reader is lent. Invariants: nothing is believed
//! before its checksum was checked; a CP known to be committed is never dropped in silence, its loss is an error; only
//! [`Recovered::repairs`] changes the store, and only to what this reading decided.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use crate::block_map::{BlockMap, SegmentKey};
use crate::catalog::Catalog;
use crate::codec::{Damage, FormatError, structure_checksum};
use crate::coordinator::CoordinatorImage;
use crate::data_run::DataRun;
use crate::delta::Delta;
use crate::directory;
use crate::free_space::FreeSpace;
use crate::geometry::Geometry;
use crate::journal::Journal;
use crate::record::{Record, RecordHeader};
use crate::segment::{Segment, Slot};
use crate::shard::{MapCheckpoint, Retained, ShardImage};
use crate::shard_header::ShardHeader;
use crate::superblock::Superblock;
use crate::units::{
    BLOCK_BYTES, Checksum, CpNumber, DataBlock, DeviceBlock, LocalBlock, Root, ShardId, ShardSet,
};

/// Most blocks read at a time.
const READ_BLOCKS: usize = 256;

/// What recovery reads from.
pub trait BlockSource {
    /// Fills `bytes`, a multiple of 4096, from consecutive blocks.
    ///
    /// # Errors
    /// If the device does.
    fn read(&mut self, first: DeviceBlock, bytes: &mut [u8]) -> Result<(), ReadFailed>;

    /// CRC32C of one block's bytes.
    fn checksum(&self, block: &[u8]) -> Checksum;

    /// How many blocks the store has.
    fn blocks(&self) -> u64;
}

/// The device could not read a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadFailed(pub DeviceBlock);

/// Which structure is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Structure {
    /// Both superblock copies.
    Superblock,
    /// Both copies of a shard's header.
    ShardHeader(ShardId),
    /// A shard's directory.
    Directory(ShardId),
    /// A map segment.
    Segment(ShardId, SegmentKey),
    /// A shard's map as a whole: its root.
    Map(ShardId),
    /// A shard's record of a CP.
    Record(ShardId, CpNumber),
}

/// Why a store cannot be opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecoveryError {
    /// A block cannot be read.
    Read(ReadFailed),
    /// A structure is damaged in a way that its copies or successors do not make good.
    Damaged(Structure, Option<FormatError>),
    /// The store is smaller than its geometry says, or the geometry is impossible.
    Geometry,
    /// A CP known to be committed is not whole.
    Lost(CpNumber),
    /// The wanted CP is older than the map checkpoint of a shard.
    BeforeCheckpoint(CpNumber),
    /// The wanted CP is older than the base, from which on blocks were kept.
    BeforeBase(CpNumber, CpNumber),
}

impl fmt::Display for RecoveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecoveryError::Read(ReadFailed(block)) => {
                write!(f, "block {block} of the store cannot be read")
            }
            RecoveryError::Damaged(what, cause) => {
                write!(f, "{what} is damaged")?;
                cause.map_or(Ok(()), |cause| write!(f, ": {cause}"))
            }
            RecoveryError::Geometry => f.write_str("the store is smaller than its superblock says"),
            RecoveryError::Lost(cp) => write!(f, "CP {cp} was committed and is not whole any more"),
            RecoveryError::BeforeCheckpoint(cp) => {
                write!(f, "CP {cp} is older than a map checkpoint")
            }
            RecoveryError::BeforeBase(cp, base) => {
                write!(
                    f,
                    "CP {cp} is older than CP {base}, and its blocks may have been used again since"
                )
            }
        }
    }
}

impl std::error::Error for RecoveryError {}

impl From<ReadFailed> for RecoveryError {
    fn from(failed: ReadFailed) -> RecoveryError {
        RecoveryError::Read(failed)
    }
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Structure::Superblock => f.write_str("the superblock (both copies)"),
            Structure::ShardHeader(shard) => write!(f, "the header of shard {shard} (both copies)"),
            Structure::Directory(shard) => write!(f, "the map directory of shard {shard}"),
            Structure::Segment(shard, key) => {
                write!(f, "segment {} of volume {} in shard {shard}", key.segment, key.volume)
            }
            Structure::Map(shard) => write!(f, "the map of shard {shard} (its root differs)"),
            Structure::Record(shard, cp) => write!(f, "the record of CP {cp} in shard {shard}"),
        }
    }
}

/// One record as it was found.
#[derive(Clone, Debug)]
pub struct FoundRecord {
    /// First block in the ring.
    pub start: u32,
    /// Length in blocks.
    pub blocks: u32,
    /// Its checksum.
    pub checksum: u64,
    /// What it says.
    pub record: Record,
}

/// What the structures of one shard say, before it is known which CPs are whole.
#[derive(Debug)]
pub struct ShardSurvey {
    /// Which shard.
    pub id: ShardId,
    /// The newer valid header.
    pub header: ShardHeader,
    /// The state of its copies.
    pub header_damage: Damage,
    /// The directory.
    pub entries: Vec<directory::DirectoryEntry>,
    /// The catalog of the map checkpoint; empty but for shard 0.
    pub catalog: Catalog,
    /// The map of the map checkpoint.
    pub map: BlockMap,
    /// The records after it, oldest first.
    pub records: Vec<FoundRecord>,
    /// Records newer than those, behind one that is missing or damaged: what they call committed must be there.
    pub strays: Vec<FoundRecord>,
}

/// What the structures of a store say.
#[derive(Debug)]
pub struct Survey {
    /// The newer valid superblock.
    pub superblock: Superblock,
    /// The state of its copies.
    pub superblock_damage: Damage,
    /// The shards.
    pub shards: Vec<ShardSurvey>,
}

/// A store ready to go on.
#[derive(Debug)]
pub struct Recovered {
    /// For the coordinator.
    pub coordinator: CoordinatorImage,
    /// For the shards.
    pub shards: Vec<ShardImage>,
    /// Blocks to write, in this order and with a flush after each, before the store is used.
    pub repairs: Vec<Repair>,
    /// CPs after the last whole one of which something was found.
    pub cut_off: Option<CpNumber>,
}

/// A block that recovery wants written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repair {
    /// Where.
    pub block: DeviceBlock,
    /// 4096 bytes.
    pub bytes: Vec<u8>,
    /// Why, for the log.
    pub why: &'static str,
}

/// Reads every structure of a store and checks each by itself.
///
/// # Errors
/// The first damage that nothing makes good.
pub fn survey(source: &mut dyn BlockSource) -> Result<Survey, RecoveryError> {
    let [first, second] = read_copies(source, Geometry::superblock_copies())?;
    let (superblock, superblock_damage) = Superblock::choose([&first, &second])
        .map_err(|error| RecoveryError::Damaged(Structure::Superblock, Some(error)))?;
    superblock.geometry.check(source.blocks()).map_err(|_| RecoveryError::Geometry)?;
    let shards = (0..superblock.geometry.shards).map(ShardId);
    let shards =
        shards.map(|id| survey_shard(source, &superblock, id)).collect::<Result<_, _>>()?;
    Ok(Survey { superblock, superblock_damage, shards })
}

/// Reads a store and decides what it holds: the longest whole prefix of CPs, at most up to `ceiling`. What is read must
/// have been flushed: a repair may call CPs committed that were found whole.
///
/// # Errors
/// If a structure is damaged, or a CP known to be committed is not whole.
pub fn recover(
    source: &mut dyn BlockSource,
    ceiling: Option<CpNumber>,
) -> Result<Recovered, RecoveryError> {
    let survey = survey(source)?;
    let last = last_whole(source, &survey, ceiling)?;
    let base = known_base(&survey);
    if let Some(ceiling) = ceiling.filter(|ceiling| *ceiling < base) {
        // Later CPs may have taken the blocks that this one used.
        return Err(RecoveryError::BeforeBase(ceiling, base));
    }
    let base = base.min(last);
    let mut superblock = survey.superblock;
    let geometry = superblock.geometry;
    let (mut repairs, copies) = (Vec::new(), Geometry::superblock_copies());
    let loses_records = survey.shards.iter().any(|shard| {
        !shard.strays.is_empty() || shard.records.iter().any(|found| found.record.cp > last)
    });
    if superblock.committed > last || (superblock.committed < last && loses_records) {
        // Going back on purpose: what the superblock knows goes back first, or the next recovery would miss CPs. What only
        // records that go call committed, it says from now on: data that later CPs freed may be overwritten.
        superblock.committed = last;
        superblock.base = base;
        superblock.branch = superblock.branch.filter(|branch| branch.tip <= last);
        superblock.sequence += 1;
        let why = "it says from now on which CP is the last committed one";
        let order = survey.superblock_damage.order().map(|copy| copies[copy]);
        repairs.extend(order.map(|block| Repair { block, bytes: superblock.encode(), why }));
    } else {
        repair_copies(&mut repairs, survey.superblock_damage, copies, || superblock.encode());
    }
    let mut catalog = survey.shards[0].catalog.clone();
    for found in &survey.shards[0].records {
        if let Some(newer) = found.record.catalog.as_ref().filter(|_| found.record.cp <= last) {
            catalog = newer.clone();
        }
    }
    let (mut cuts, mut shards, mut roots) = (Vec::new(), Vec::new(), Vec::new());
    for shard in survey.shards {
        let copies = geometry.header_copies(shard.id);
        let header = shard.header.clone();
        repair_copies(&mut repairs, shard.header_damage, copies, || header.encode());
        let cut_off = shard.records.iter().filter(|found| found.record.cp > last);
        for found in cut_off.chain(&shard.strays) {
            cuts.push((found.record.cp, geometry.journal_block(shard.id, found.start)));
        }
        let image = replay(shard, &superblock, last, base, &catalog)?;
        roots.push(Root(image.map.root().0.wrapping_add(image.catalog_root)));
        shards.push(image);
    }
    // The newest first: a record claims that the CPs before its own are committed, so none of those may go before it.
    cuts.sort_by(|(one, _), (other, _)| other.cmp(one));
    let cut_off = cuts.last().map(|(cp, _)| *cp);
    repairs.extend(cuts.into_iter().map(|(_, block)| Repair {
        block,
        bytes: vec![0; BLOCK_BYTES],
        why: "a record of a CP that is not whole is cut off",
    }));
    let coordinator = CoordinatorImage { superblock, catalog, committed: last, base, roots };
    Ok(Recovered { coordinator, shards, repairs, cut_off })
}

fn repair_copies(
    repairs: &mut Vec<Repair>,
    damage: Damage,
    copies: [DeviceBlock; 2],
    encode: impl Fn() -> Vec<u8>,
) {
    let (index, why) = match damage {
        Damage::None => return,
        Damage::Stale(index) => (index, "the older of two copies is brought up to date"),
        Damage::Invalid(index, _) => (index, "a damaged copy is written again from the other"),
    };
    repairs.push(Repair { block: copies[index], bytes: encode(), why });
}

/// Two copies of a structure. One that cannot be read is as good as a damaged one.
fn read_copies(
    source: &mut dyn BlockSource,
    copies: [DeviceBlock; 2],
) -> Result<[Vec<u8>; 2], RecoveryError> {
    match copies.map(|block| read(source, block, 1)) {
        [Err(failed), Err(_)] => Err(failed),
        found => Ok(found.map(|bytes| bytes.unwrap_or_else(|_| vec![0; BLOCK_BYTES]))),
    }
}

fn survey_shard(
    source: &mut dyn BlockSource,
    superblock: &Superblock,
    id: ShardId,
) -> Result<ShardSurvey, RecoveryError> {
    let geometry = superblock.geometry;
    let damaged =
        |error: Option<FormatError>| RecoveryError::Damaged(Structure::ShardHeader(id), error);
    let [first, second] = read_copies(source, geometry.header_copies(id))?;
    let (header, header_damage) = ShardHeader::choose([&first, &second], superblock.store, id)
        .map_err(|e| damaged(Some(e)))?;
    header.check(&geometry).map_err(|error| damaged(Some(error)))?;
    let (entries, catalog) = read_directory(source, &geometry, id, &header)?;
    let mut map = BlockMap::new(geometry.segments_max());
    for entry in &entries {
        let segment = read_segment(source, &geometry, id, entry)?;
        map.insert_segment(entry.key(), segment);
    }
    let catalog_root = if id == ShardId(0) { catalog.root() } else { 0 };
    if Root(map.root().0.wrapping_add(catalog_root)) != header.root {
        return Err(RecoveryError::Damaged(Structure::Map(id), None));
    }
    let records = read_journal(source, superblock, id, &header)?;
    let strays = read_strays(source, superblock, id, &header, &records)?;
    Ok(ShardSurvey { id, header, header_damage, entries, catalog, map, records, strays })
}

fn read_directory(
    source: &mut dyn BlockSource,
    geometry: &Geometry,
    id: ShardId,
    header: &ShardHeader,
) -> Result<(Vec<directory::DirectoryEntry>, Catalog), RecoveryError> {
    let start = geometry.directory_start(id, usize::from(header.directory_area));
    let bytes = read(source, start, header.directory_bytes as usize / BLOCK_BYTES)?;
    if structure_checksum(&bytes) != header.directory_checksum {
        return Err(RecoveryError::Damaged(Structure::Directory(id), None));
    }
    directory::decode(&bytes, geometry)
        .map_err(|error| RecoveryError::Damaged(Structure::Directory(id), Some(error)))
}

fn read_segment(
    source: &mut dyn BlockSource,
    geometry: &Geometry,
    id: ShardId,
    entry: &directory::DirectoryEntry,
) -> Result<Segment, RecoveryError> {
    let key = entry.key();
    let damaged = |error| RecoveryError::Damaged(Structure::Segment(id, key), error);
    let bytes = read(source, geometry.map_slot(id, entry.slot), 1)?;
    if structure_checksum(&bytes) != entry.checksum {
        return Err(damaged(None));
    }
    let (volume, number, segment) =
        Segment::decode(&bytes).map_err(|error| damaged(Some(error)))?;
    if (SegmentKey { volume, segment: number }) != key {
        return Err(damaged(None));
    }
    let outside = |slot: &Slot| slot.block.0 >= geometry.data_blocks();
    if segment.iter().any(|(_, slot)| outside(&slot)) {
        return Err(damaged(None));
    }
    Ok(segment)
}

/// Follows the journal from the map checkpoint until a record is missing, torn, or not the successor.
fn read_journal(
    source: &mut dyn BlockSource,
    superblock: &Superblock,
    id: ShardId,
    header: &ShardHeader,
) -> Result<Vec<FoundRecord>, RecoveryError> {
    let geometry = superblock.geometry;
    let capacity = geometry.journal_blocks;
    let mut position = header.journal;
    let mut last = header.checkpoint;
    let mut records: Vec<FoundRecord> = Vec::new();
    let mut used = 0;
    loop {
        let mut found = None;
        for start in [position.index, 0] {
            if start == 0 && found.is_some() {
                break;
            }
            let room = capacity - start;
            if let Some(candidate) = read_record(source, &geometry, id, start, room)? {
                let record = &candidate.record;
                let fits = record.store == superblock.store
                    && record.shard == id
                    && record.sequence == position.sequence
                    && record.previous == position.previous
                    && record.cp > last;
                found = fits.then_some(candidate);
            }
        }
        let Some(candidate) = found else { return Ok(records) };
        used += candidate.blocks;
        if used > capacity {
            return Ok(records);
        }
        position.index = (candidate.start + candidate.blocks) % capacity;
        position.sequence += 1;
        position.previous = candidate.checksum;
        last = candidate.record.cp;
        records.push(candidate);
    }
}

/// Looks in the rest of the ring for records that are newer than the last one that was followed.
fn read_strays(
    source: &mut dyn BlockSource,
    superblock: &Superblock,
    id: ShardId,
    header: &ShardHeader,
    records: &[FoundRecord],
) -> Result<Vec<FoundRecord>, RecoveryError> {
    if superblock.clean {
        // It knows itself how far the history was committed.
        return Ok(Vec::new());
    }
    let geometry = superblock.geometry;
    let capacity = geometry.journal_blocks;
    let sequence = header.journal.sequence + records.len() as u64;
    let mut strays = Vec::new();
    let mut start = 0;
    while start < capacity {
        let count = (capacity - start).min(READ_BLOCKS as u32);
        let bytes = read_what_can_be(source, geometry.journal_block(id, start), count as usize);
        for (index, block) in (start..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let is_newer = RecordHeader::peek(block).is_ok_and(|head| {
                head.store == superblock.store && head.shard == id && head.sequence >= sequence
            });
            if is_newer {
                let found = read_record(source, &geometry, id, index, capacity - index);
                strays.extend(found.ok().flatten());
            }
        }
        start += count;
    }
    strays.retain(|found| found.record.sequence >= sequence);
    Ok(strays)
}

/// Blocks that may say something; those that cannot be read say nothing, and are zeroes.
fn read_what_can_be(source: &mut dyn BlockSource, first: DeviceBlock, count: usize) -> Vec<u8> {
    read(source, first, count).unwrap_or_else(|_| {
        let blocks = (first.0..).take(count);
        blocks
            .flat_map(|block| {
                read(source, DeviceBlock(block), 1).unwrap_or_else(|_| vec![0; BLOCK_BYTES])
            })
            .collect()
    })
}

fn read_record(
    source: &mut dyn BlockSource,
    geometry: &Geometry,
    id: ShardId,
    start: u32,
    room: u32,
) -> Result<Option<FoundRecord>, RecoveryError> {
    let first = read(source, geometry.journal_block(id, start), 1)?;
    let Ok(header) = RecordHeader::peek(&first) else { return Ok(None) };
    if header.blocks == 0 || header.blocks > room {
        return Ok(None);
    }
    let bytes = read(source, geometry.journal_block(id, start), header.blocks as usize)?;
    let Ok(record) = Record::decode(&bytes) else { return Ok(None) };
    if record.runs.iter().any(|run| run.end() > u64::from(geometry.data_blocks())) {
        return Ok(None);
    }
    Ok(Some(FoundRecord { start, blocks: header.blocks, checksum: header.checksum, record }))
}

/// The last CP of the longest whole prefix.
fn last_whole(
    source: &mut dyn BlockSource,
    survey: &Survey,
    ceiling: Option<CpNumber>,
) -> Result<CpNumber, RecoveryError> {
    let checkpoints = || survey.shards.iter().map(|shard| shard.header.checkpoint);
    let newest_checkpoint = checkpoints().max().unwrap_or_default();
    if let Some(ceiling) = ceiling.filter(|ceiling| *ceiling < newest_checkpoint) {
        return Err(RecoveryError::BeforeCheckpoint(ceiling));
    }
    let records =
        || survey.shards.iter().flat_map(|shard| shard.records.iter().map(|found| &found.record));
    let strays =
        survey.shards.iter().flat_map(|shard| shard.strays.iter().map(|found| &found.record));
    let claimed = records().chain(strays).map(|record| record.committed).max().unwrap_or_default();
    let known = survey.superblock.committed.max(newest_checkpoint).max(claimed);
    let mut by_cp: BTreeMap<CpNumber, Vec<(ShardId, &Record)>> = BTreeMap::new();
    for shard in &survey.shards {
        for found in &shard.records {
            by_cp.entry(found.record.cp).or_default().push((shard.id, &found.record));
        }
    }
    let mut last = newest_checkpoint;
    let mut cp = checkpoints().min().unwrap_or_default();
    loop {
        cp = cp.next();
        if ceiling.is_some_and(|ceiling| cp > ceiling) {
            return Ok(last);
        }
        let found = by_cp.get(&cp).map_or(&[][..], Vec::as_slice);
        let is_whole = is_whole(survey, cp, found)
            && (cp <= known || data_is_whole(source, &survey.superblock.geometry, found)?);
        if is_whole {
            last = last.max(cp);
        } else if cp <= known {
            return Err(RecoveryError::Lost(cp));
        } else {
            return Ok(last);
        }
    }
}

/// Whether the record of every participant was found, or is in its map checkpoint.
fn is_whole(survey: &Survey, cp: CpNumber, found: &[(ShardId, &Record)]) -> bool {
    let in_checkpoint =
        |shard: ShardId| survey.shards[usize::from(shard.0)].header.checkpoint >= cp;
    let mut present = ShardSet::default();
    found.iter().for_each(|(shard, _)| present.insert(*shard));
    match found.first() {
        Some((_, record)) => {
            let shards = survey.superblock.geometry.shards;
            record.participants.is_subset(ShardSet::all(shards))
                && found.iter().all(|(_, other)| other.participants == record.participants)
                && record
                    .participants
                    .iter()
                    .all(|shard| present.contains(shard) || in_checkpoint(shard))
        }
        // Nobody has a record: fine only if the CP went into a map checkpoint.
        None => survey.shards.iter().any(|shard| in_checkpoint(shard.id)),
    }
}

/// Whether the data of a CP that was not known to be durable is all there.
fn data_is_whole(
    source: &mut dyn BlockSource,
    geometry: &Geometry,
    found: &[(ShardId, &Record)],
) -> Result<bool, RecoveryError> {
    for (shard, record) in found {
        let mut checksums = record.checksums.iter();
        for run in &record.runs {
            if !run_is_whole(source, geometry, *shard, *run, &mut checksums)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn run_is_whole<'a>(
    source: &mut dyn BlockSource,
    geometry: &Geometry,
    shard: ShardId,
    run: DataRun,
    checksums: &mut impl Iterator<Item = &'a Checksum>,
) -> Result<bool, RecoveryError> {
    let mut skip = 0;
    while skip < run.count {
        let count = (run.count - skip).min(READ_BLOCKS as u32);
        let first = geometry.data_block(shard, DataBlock(run.first.0 + skip));
        let bytes = read(source, first, count as usize)?;
        for block in bytes.chunks_exact(BLOCK_BYTES) {
            if checksums.next() != Some(&source.checksum(block)) {
                return Ok(false);
            }
        }
        skip += count;
    }
    Ok(true)
}

/// The last CP that a structure says is committed on both sides.
fn known_base(survey: &Survey) -> CpNumber {
    let records = survey.shards.iter().flat_map(|shard| shard.records.iter().chain(&shard.strays));
    let records = records.map(|found| found.record.base);
    let checkpoints = survey.shards.iter().map(|shard| shard.header.checkpoint);
    records.chain(checkpoints).max().unwrap_or_default().max(survey.superblock.base)
}

/// Brings a shard's map from its checkpoint to `last`.
fn replay(
    shard: ShardSurvey,
    superblock: &Superblock,
    last: CpNumber,
    base: CpNumber,
    catalog: &Catalog,
) -> Result<ShardImage, RecoveryError> {
    let id = shard.id;
    let geometry = superblock.geometry;
    let mut map = shard.map;
    let is_first = id == ShardId(0);
    let mut catalog_root = if is_first { shard.catalog.root() } else { 0 };
    let mut journal =
        Journal::new(geometry.journal_blocks, shard.header.journal, shard.header.root);
    let mut retained: VecDeque<Retained> = VecDeque::new();
    let mut changed: Vec<SegmentKey> = Vec::new();
    let mut last_part = shard.header.checkpoint;
    for found in shard.records.iter().filter(|found| found.record.cp <= last) {
        let record = &found.record;
        let damaged = RecoveryError::Damaged(Structure::Record(id, record.cp), None);
        let root =
            |map: &BlockMap, catalog_root: u128| Root(map.root().0.wrapping_add(catalog_root));
        if root(&map, catalog_root) != record.root_before || segments_exceed(&map, &record.delta) {
            return Err(damaged);
        }
        let blocks = apply(&mut map, record, &mut changed);
        if let Some(catalog) = &record.catalog {
            catalog_root = catalog.root();
        }
        if root(&map, catalog_root) != record.root_after {
            return Err(damaged);
        }
        if record.cp > base && !blocks.is_empty() {
            retained.push_back(Retained { cp: record.cp, blocks });
        }
        journal.adopt(record.cp, found.start, found.blocks, found.checksum, record.root_after);
        last_part = record.cp;
    }
    let free = free_space(&map, &retained, &geometry)
        .ok_or(RecoveryError::Damaged(Structure::Map(id), None))?;
    changed.sort_unstable();
    changed.dedup();
    let own_catalog = if is_first { catalog.clone() } else { Catalog::default() };
    let checkpoint = MapCheckpoint::new(
        shard.header,
        shard.entries,
        geometry.map_slots,
        own_catalog,
        changed.into_iter(),
    );
    Ok(ShardImage {
        store: superblock.store,
        geometry,
        id,
        map,
        free,
        retained,
        journal,
        checkpoint,
        last: last_part,
        catalog_root,
    })
}

/// Applies a record's delta; gives the blocks that it freed.
fn apply(map: &mut BlockMap, record: &Record, changed: &mut Vec<SegmentKey>) -> Vec<DataBlock> {
    let mut blocks =
        record.runs.iter().flat_map(DataRun::blocks).zip(record.checksums.iter().copied());
    let mut freed = Vec::new();
    for delta in &record.delta.volumes {
        for run in &delta.mapped {
            for block in run.blocks() {
                let (data, checksum) =
                    blocks.next().expect("a decoded record has a block for each");
                changed.push(SegmentKey::of(delta.volume, block));
                let old = map.set(delta.volume, block, Some(Slot { block: data, checksum }));
                freed.extend(old.map(|slot| slot.block));
            }
        }
        for run in &delta.unmapped {
            for block in run.blocks() {
                changed.push(SegmentKey::of(delta.volume, block));
                freed.extend(map.set(delta.volume, block, None).map(|slot| slot.block));
            }
        }
    }
    changed.dedup();
    freed
}

/// Whether a delta would make more segments than a shard may have.
pub(crate) fn segments_exceed(map: &BlockMap, delta: &Delta) -> bool {
    let mut new = 0;
    for volume in &delta.volumes {
        let mut last = None;
        for run in &volume.mapped {
            let first = SegmentKey::of(volume.volume, run.first).segment;
            let last_block = LocalBlock(run.first.0 + u64::from(run.count) - 1);
            let end = SegmentKey::of(volume.volume, last_block).segment;
            for segment in first..=end {
                if last != Some(segment) && !map.has_segment(volume.volume, segment) {
                    new += 1;
                }
                last = Some(segment);
            }
        }
    }
    map.would_exceed(new)
}

/// What the map and the retained blocks leave free; none if two of them use one block.
fn free_space(
    map: &BlockMap,
    retained: &VecDeque<Retained>,
    geometry: &Geometry,
) -> Option<FreeSpace> {
    let mut free = FreeSpace::new(geometry.data_blocks());
    let mut mark = |block: DataBlock| {
        let is_free = block.0 < geometry.data_blocks() && !free.is_used(block);
        if is_free {
            free.mark_used(block);
        }
        is_free
    };
    for key in map.segment_keys() {
        let segment = map.segment(key.volume, key.segment)?;
        if !segment.iter().all(|(_, slot)| mark(slot.block)) {
            return None;
        }
    }
    let all_free = retained.iter().flat_map(|retained| &retained.blocks).all(|block| mark(*block));
    all_free.then_some(free)
}

fn read(
    source: &mut dyn BlockSource,
    first: DeviceBlock,
    count: usize,
) -> Result<Vec<u8>, RecoveryError> {
    let mut bytes = vec![0; count * BLOCK_BYTES];
    for (index, chunk) in bytes.chunks_mut(READ_BLOCKS * BLOCK_BYTES).enumerate() {
        source.read(DeviceBlock(first.0 + (index * READ_BLOCKS) as u64), chunk)?;
    }
    Ok(bytes)
}

/// The blocks of a new, empty store: every superblock and shard header, in the order to write them, the superblock
/// last. A flush belongs before the superblock's first copy and after its last.
#[must_use]
pub fn format(superblock: &Superblock) -> Vec<(DeviceBlock, Vec<u8>)> {
    let geometry = superblock.geometry;
    let mut writes = Vec::new();
    for shard in (0..geometry.shards).map(ShardId) {
        let catalog = Catalog::default();
        let bytes = directory::encode(&[], &catalog);
        let header = ShardHeader {
            store: superblock.store,
            shard,
            sequence: 1,
            checkpoint: CpNumber(0),
            root: Root(if shard == ShardId(0) { catalog.root() } else { 0 }),
            directory_area: 0,
            directory_bytes: u32::try_from(bytes.len()).expect("an empty directory is small"),
            directory_checksum: structure_checksum(&bytes),
            journal: crate::shard_header::JournalPosition { index: 0, sequence: 1, previous: 0 },
        };
        writes.push((geometry.directory_start(shard, 0), bytes));
        writes.push((geometry.journal_block(shard, 0), vec![0; BLOCK_BYTES]));
        for copy in geometry.header_copies(shard) {
            writes.push((copy, header.encode()));
        }
    }
    for copy in Geometry::superblock_copies() {
        writes.push((copy, superblock.encode()));
    }
    writes
}
