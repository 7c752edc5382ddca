//! A shard's map checkpoint: its directory and its segments, as outlines.

use twinpoint_core::codec::structure_checksum;
use twinpoint_core::directory::{self, DirectoryEntry};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::request::volume_block;
use twinpoint_core::segment::Segment;
use twinpoint_core::shard_header::ShardHeader;
use twinpoint_core::units::{BLOCK_BYTES, LocalBlock, Root, ShardId};
use twinpoint_runtime::device::StoreFile;

use super::{Segments, read, structure};
use crate::outline::Outline;

/// The directory, and its entries as far as they can be believed.
pub fn directory(
    store: &StoreFile,
    geometry: &Geometry,
    header: &ShardHeader,
) -> (Outline, Vec<DirectoryEntry>) {
    let area = header.directory_area;
    let first = geometry.directory_start(header.shard, usize::from(area));
    let mut fields = vec![
        ("area", Outline::Number(area.into())),
        ("block", Outline::Number(first.0)),
        ("blocks", Outline::Number(u64::from(header.directory_bytes) / BLOCK_BYTES as u64)),
    ];
    let bytes = read(store, first, header.directory_bytes / BLOCK_BYTES as u32);
    let decoded = bytes.map_err(|error| error.to_string()).and_then(|bytes| {
        if structure_checksum(&bytes) != header.directory_checksum {
            return Err("checksum mismatch".to_owned());
        }
        directory::decode(&bytes, geometry).map_err(|error| error.to_string())
    });
    match decoded {
        Ok((entries, catalog)) => {
            fields.push(("state", Outline::text("valid")));
            fields.push(("entries", Outline::Number(entries.len() as u64)));
            if header.shard == ShardId(0) {
                fields.push(("next_volume_id", Outline::Number(catalog.next_id.0.into())));
                fields.push(("volumes", structure::volumes(&catalog)));
            }
            (Outline::Fields(fields), entries)
        }
        Err(error) => {
            fields.push(("state", Outline::text(format!("damaged: {error}"))));
            (Outline::Fields(fields), Vec::new())
        }
    }
}

/// The segments that a directory names.
pub fn segments(
    store: &StoreFile,
    geometry: &Geometry,
    shard: ShardId,
    entries: &[DirectoryEntry],
    how: Segments,
) -> Outline {
    let mut mapped_blocks = 0;
    let mut damaged = Vec::new();
    let mut lines = Vec::new();
    for entry in entries {
        let mut fields = vec![
            ("volume", Outline::Number(entry.volume.0.into())),
            ("segment", Outline::Number(entry.segment)),
            ("slot", Outline::Number(entry.slot.0.into())),
            ("block", Outline::Number(geometry.map_slot(shard, entry.slot).0)),
        ];
        match read_segment(store, geometry, shard, entry) {
            Ok(segment) => {
                mapped_blocks += u64::from(segment.mapped());
                fields.push(("state", Outline::text("valid")));
                fields.push(("mapped", Outline::Number(segment.mapped().into())));
                fields.push(("hash", Outline::text(Root(segment.hash()))));
                if how == Segments::Full {
                    fields.push(("slots", slots(geometry, shard, &segment)));
                }
            }
            Err(error) => {
                fields.push(("state", Outline::text(format!("damaged: {error}"))));
                damaged.push(Outline::Fields(fields.clone()));
            }
        }
        if how != Segments::Summary {
            lines.push(Outline::Fields(fields));
        }
    }
    let mut fields = vec![
        ("count", Outline::Number(entries.len() as u64)),
        ("mapped_blocks", Outline::Number(mapped_blocks)),
        ("damaged", Outline::List(damaged)),
    ];
    if how != Segments::Summary {
        fields.push(("list", Outline::List(lines)));
    }
    Outline::Fields(fields)
}

fn slots(geometry: &Geometry, shard: ShardId, segment: &Segment) -> Outline {
    let slot = |local: LocalBlock| volume_block(segment.volume(), shard, local, geometry.shards);
    Outline::list(segment.iter().map(|(local, found)| {
        // A pointer beyond the data zone is damage that recovery tells; it has no place on the store.
        let place = (found.block.0 < geometry.data_blocks())
            .then(|| geometry.data_block(shard, found.block).0);
        Outline::Fields(vec![
            ("volume_block", Outline::Number(slot(local).0)),
            ("block", Outline::optional(place)),
            ("checksum", Outline::text(format!("{:08x}", found.checksum.0))),
        ])
    }))
}

fn read_segment(
    store: &StoreFile,
    geometry: &Geometry,
    shard: ShardId,
    entry: &DirectoryEntry,
) -> Result<Segment, String> {
    let bytes = read(store, geometry.map_slot(shard, entry.slot), 1);
    let bytes = bytes.map_err(|error| error.to_string())?;
    if structure_checksum(&bytes) != entry.checksum {
        return Err("checksum mismatch".to_owned());
    }
    let (volume, number, segment) = Segment::decode(&bytes).map_err(|error| error.to_string())?;
    if (volume, number) != (entry.volume, entry.segment) {
        return Err(format!("it is segment {number} of volume {volume}"));
    }
    Ok(segment)
}
