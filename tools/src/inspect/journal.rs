//! A shard's journal: its records since the map checkpoint, one line each or in full.
//!
//! Follows the chain as recovery does, and says why it ends.

use twinpoint_core::delta::Run;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::record::{Record, RecordHeader};
use twinpoint_core::recovery::FoundRecord;
use twinpoint_core::request::volume_block;
use twinpoint_core::shard_header::ShardHeader;
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{CpNumber, ShardId, VolumeId};
use twinpoint_runtime::device::StoreFile;

use super::{read, structure};
use crate::outline::Outline;

/// The journal behind a header; the record of `wanted` in full.
pub fn journal(
    store: &StoreFile,
    superblock: &Superblock,
    header: &ShardHeader,
    wanted: Option<CpNumber>,
) -> Outline {
    let geometry = &superblock.geometry;
    let (records, end) = follow(store, superblock, header);
    let used: u32 = records.iter().map(|found| found.blocks).sum();
    let mut fields = vec![
        ("blocks", Outline::Number(geometry.journal_blocks.into())),
        ("used_blocks", Outline::Number(used.into())),
        ("end", Outline::Text(end)),
        ("records", Outline::list(records.iter().map(summary))),
    ];
    if let Some(found) = records.iter().find(|found| Some(found.record.cp) == wanted) {
        fields.push(("record", full(geometry, found)));
    }
    Outline::Fields(fields)
}

/// All records that hang together, and why there is no further one.
fn follow(
    store: &StoreFile,
    superblock: &Superblock,
    header: &ShardHeader,
) -> (Vec<FoundRecord>, String) {
    let capacity = superblock.geometry.journal_blocks;
    let mut position = header.journal;
    let mut last = header.checkpoint;
    let mut records: Vec<FoundRecord> = Vec::new();
    let mut used = 0;
    loop {
        let mut end = String::new();
        let mut next = None;
        // A record that does not fit before the end of the ring begins at its start.
        let starts = if position.index == 0 { &[0][..] } else { &[position.index, 0][..] };
        for start in starts {
            let found = read_record(store, &superblock.geometry, header.shard, *start);
            let found = found.and_then(|found| {
                let record = &found.record;
                let follows = record.store == superblock.store
                    && record.shard == header.shard
                    && record.sequence == position.sequence
                    && record.previous == position.previous
                    && record.cp > last;
                if follows { Ok(found) } else { Err("an older record".to_owned()) }
            });
            match found {
                Ok(found) => {
                    next = Some(found);
                    break;
                }
                Err(why) if end.is_empty() => end = format!("block {start}: {why}"),
                Err(_) => {}
            }
        }
        let Some(found) = next else { return (records, end) };
        used += found.blocks;
        if used > capacity {
            return (records, "the ring is full".to_owned());
        }
        position.index = (found.start + found.blocks) % capacity;
        position.sequence += 1;
        position.previous = found.checksum;
        last = found.record.cp;
        records.push(found);
    }
}

fn read_record(
    store: &StoreFile,
    geometry: &Geometry,
    shard: ShardId,
    start: u32,
) -> Result<FoundRecord, String> {
    let block = geometry.journal_block(shard, start);
    let first = read(store, block, 1).map_err(|error| error.to_string())?;
    if first.iter().all(|byte| *byte == 0) {
        return Err("empty".to_owned());
    }
    let header = RecordHeader::peek(&first).map_err(|error| error.to_string())?;
    let blocks = header.blocks;
    if blocks == 0 || blocks > geometry.journal_blocks - start {
        return Err(format!("a record of {blocks} blocks, which do not fit"));
    }
    let bytes = read(store, block, blocks).map_err(|error| error.to_string())?;
    let record = Record::decode(&bytes).map_err(|error| error.to_string())?;
    if record.runs.iter().any(|run| run.end() > u64::from(geometry.data_blocks())) {
        return Err("a record that names blocks beyond the data zone".to_owned());
    }
    Ok(FoundRecord { start, blocks, checksum: header.checksum, record })
}

fn summary(found: &FoundRecord) -> Outline {
    let record = &found.record;
    let shards: Vec<String> = record.participants.iter().map(|shard| shard.to_string()).collect();
    Outline::Fields(vec![
        ("cp", Outline::Number(record.cp.0)),
        ("term", Outline::Number(record.term.0)),
        ("sequence", Outline::Number(record.sequence)),
        ("start", Outline::Number(found.start.into())),
        ("blocks", Outline::Number(found.blocks.into())),
        ("shards", Outline::Text(shards.join(","))),
        ("committed", Outline::Number(record.committed.0)),
        ("base", Outline::Number(record.base.0)),
        ("mapped", Outline::Number(record.delta.mapped_count())),
        ("unmapped", Outline::Number(record.delta.unmapped_count())),
        ("catalog", Outline::Flag(record.catalog.is_some())),
        ("name", record.name.as_ref().map_or(Outline::Absent, Outline::text)),
        ("root", Outline::text(record.root_after)),
    ])
}

fn full(geometry: &Geometry, found: &FoundRecord) -> Outline {
    let record = &found.record;
    let shard = record.shard;
    let mut fields = vec![
        ("store", Outline::text(record.store)),
        ("previous", Outline::text(format!("{:016x}", record.previous))),
        ("checksum", Outline::text(format!("{:016x}", found.checksum))),
        ("root_before", Outline::text(record.root_before)),
        ("root_after", Outline::text(record.root_after)),
        ("delta_bytes", Outline::Number(record.delta.encode().len() as u64)),
    ];
    if let Some(catalog) = &record.catalog {
        fields.push(("volumes", structure::volumes(catalog)));
    }
    let runs = record.runs.iter().flat_map(|run| run.blocks());
    let mapped = record.delta.mapped_blocks().zip(runs).zip(&record.checksums);
    let mapped = mapped.map(|(((volume, local), block), checksum)| {
        let place = volume_block(volume, shard, local, geometry.shards);
        Outline::Fields(vec![
            ("volume", Outline::Number(volume.0.into())),
            ("volume_block", Outline::Number(place.0)),
            ("block", Outline::Number(geometry.data_block(shard, block).0)),
            ("checksum", Outline::text(format!("{:08x}", checksum.0))),
        ])
    });
    fields.push(("mapped", Outline::list(mapped)));
    // A discard may cover far more blocks than there are lines worth reading: whole runs, by local blocks.
    let unmapped = |volume: VolumeId, run: &Run| {
        Outline::Fields(vec![
            ("volume", Outline::Number(volume.0.into())),
            ("first_local_block", Outline::Number(run.first.0)),
            ("count", Outline::Number(run.count.into())),
        ])
    };
    let unmapped = record
        .delta
        .volumes
        .iter()
        .flat_map(|delta| delta.unmapped.iter().map(move |run| unmapped(delta.volume, run)));
    fields.push(("unmapped", Outline::list(unmapped)));
    Outline::Fields(fields)
}
