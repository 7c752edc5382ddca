//! Superblocks and shard headers, as outlines.

use twinpoint_core::branch::Branch;
use twinpoint_core::catalog::Catalog;
use twinpoint_core::codec::FormatError;
use twinpoint_core::geometry::{Geometry, MapSlot};
use twinpoint_core::shard_header::ShardHeader;
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{DeviceBlock, ShardId};
use twinpoint_runtime::device::StoreFile;

use super::read_copies;
use crate::outline::Outline;

/// A copy as read and decoded; the outer error is the device's.
pub type Copy<T> = Result<Result<T, FormatError>, String>;

/// Of two copies the valid one with the higher sequence number.
pub fn newest<T>(copies: &[Copy<T>; 2], sequence: impl Fn(&T) -> u64) -> Option<&T> {
    let valid = copies.iter().filter_map(|copy| copy.as_ref().ok()?.as_ref().ok());
    valid.max_by_key(|copy| sequence(copy))
}

/// Both copies of the superblock.
pub fn superblocks(copies: &[Copy<Superblock>; 2]) -> Outline {
    let newest = newest(copies, |copy| copy.sequence).map(|copy| copy.sequence);
    let blocks = Geometry::superblock_copies();
    Outline::list(copies.iter().zip(blocks).map(|(copy, block)| {
        copy_outline(copy, block, |superblock| {
            (superblock.sequence, newest, superblock_fields(superblock))
        })
    }))
}

/// Both copies of a shard's header, and the one that counts if it can be followed.
pub fn shard_headers(
    store: &StoreFile,
    superblock: &Superblock,
    shard: ShardId,
) -> (Outline, Option<ShardHeader>) {
    let geometry = &superblock.geometry;
    let blocks = geometry.header_copies(shard);
    let copies: [Copy<ShardHeader>; 2] = read_copies(store, blocks).map(|copy| {
        copy.map(|bytes| ShardHeader::decode(&bytes)).map_err(|error| error.to_string())
    });
    let header = newest(&copies, |copy| copy.sequence).cloned();
    let newest = header.as_ref().map(|header| header.sequence);
    let outline = Outline::list(copies.iter().zip(blocks).map(|(copy, block)| {
        copy_outline(copy, block, |header| (header.sequence, newest, header_fields(header)))
    }));
    let follows = |header: &ShardHeader| {
        header.store == superblock.store && header.shard == shard && header.check(geometry).is_ok()
    };
    (outline, header.filter(follows))
}

/// The store's layout.
pub fn geometry(geometry: &Geometry) -> Outline {
    Outline::Fields(vec![
        ("shards", Outline::Number(geometry.shards.into())),
        ("region_blocks", Outline::Number(geometry.region_blocks)),
        ("directory_blocks", Outline::Number(geometry.directory_blocks.into())),
        ("map_slots", Outline::Number(geometry.map_slots.into())),
        ("journal_blocks", Outline::Number(geometry.journal_blocks.into())),
        ("data_blocks", Outline::Number(geometry.data_blocks().into())),
        ("segments_max", Outline::Number(geometry.segments_max().into())),
    ])
}

/// Where a shard's zones begin, in blocks of the store.
pub fn zones(geometry: &Geometry, shard: ShardId) -> Outline {
    let [first, second] = geometry.header_copies(shard);
    let block = |block: DeviceBlock| Outline::Number(block.0);
    Outline::Fields(vec![
        ("header_0", block(first)),
        ("directory_0", block(geometry.directory_start(shard, 0))),
        ("header_1", block(second)),
        ("directory_1", block(geometry.directory_start(shard, 1))),
        ("map_slots", block(geometry.map_slot(shard, MapSlot(0)))),
        ("journal", block(geometry.journal_block(shard, 0))),
        ("data", block(geometry.data_start(shard))),
    ])
}

/// A catalog's volumes, one line each.
pub fn volumes(catalog: &Catalog) -> Outline {
    Outline::list(catalog.volumes.iter().map(|volume| {
        Outline::Fields(vec![
            ("id", Outline::Number(volume.id.0.into())),
            ("name", Outline::text(&volume.name)),
            ("size_bytes", Outline::Number(volume.size_bytes)),
        ])
    }))
}

/// One of two copies: where it lies, whether it counts, and its fields.
fn copy_outline<T>(
    copy: &Copy<T>,
    block: DeviceBlock,
    describe: impl Fn(&T) -> (u64, Option<u64>, Vec<(&'static str, Outline)>),
) -> Outline {
    let mut fields = vec![("block", Outline::Number(block.0))];
    match copy {
        Ok(Ok(valid)) => {
            let (sequence, newest, described) = describe(valid);
            let is_newest = Some(sequence) == newest;
            fields.push(("state", Outline::text(if is_newest { "valid" } else { "valid, older" })));
            fields.extend(described);
        }
        Ok(Err(error)) => fields.push(("state", Outline::text(format!("damaged: {error}")))),
        Err(error) => fields.push(("state", Outline::text(format!("unreadable: {error}")))),
    }
    Outline::Fields(fields)
}

fn superblock_fields(superblock: &Superblock) -> Vec<(&'static str, Outline)> {
    let history = superblock.history.iter().map(|start| {
        Outline::Fields(vec![
            ("term", Outline::Number(start.term.0)),
            ("first_cp", Outline::Number(start.first.0)),
        ])
    });
    vec![
        ("sequence", Outline::Number(superblock.sequence)),
        ("store", Outline::text(superblock.store)),
        ("geometry", zone_sizes(&superblock.geometry)),
        ("term", Outline::Number(superblock.term.0)),
        ("history", Outline::list(history)),
        ("committed", Outline::Number(superblock.committed.0)),
        ("base", Outline::Number(superblock.base.0)),
        ("paired", Outline::Flag(superblock.paired)),
        ("secondary", Outline::Flag(superblock.secondary)),
        ("alone_since", Outline::optional(superblock.alone_since.map(|cp| cp.0))),
        ("base_given_up", Outline::Flag(superblock.base_given_up)),
        ("deposed_by", Outline::optional(superblock.deposed_by.map(|term| term.0))),
        ("branch", superblock.branch.as_ref().map_or(Outline::Absent, branch_fields)),
        ("clean", Outline::Flag(superblock.clean)),
    ]
}

fn branch_fields(branch: &Branch) -> Outline {
    Outline::Fields(vec![
        ("name", Outline::text(branch)),
        ("term", Outline::Number(branch.term.0)),
        ("common", Outline::Number(branch.common.0)),
        ("tip", Outline::Number(branch.tip.0)),
        ("root", Outline::text(branch.root)),
    ])
}

/// The geometry as it is written, which may not fit the store.
fn zone_sizes(geometry: &Geometry) -> Outline {
    Outline::Fields(vec![
        ("shards", Outline::Number(geometry.shards.into())),
        ("region_blocks", Outline::Number(geometry.region_blocks)),
        ("directory_blocks", Outline::Number(geometry.directory_blocks.into())),
        ("map_slots", Outline::Number(geometry.map_slots.into())),
        ("journal_blocks", Outline::Number(geometry.journal_blocks.into())),
    ])
}

fn header_fields(header: &ShardHeader) -> Vec<(&'static str, Outline)> {
    vec![
        ("sequence", Outline::Number(header.sequence)),
        ("store", Outline::text(header.store)),
        ("shard", Outline::Number(header.shard.0.into())),
        ("checkpoint", Outline::Number(header.checkpoint.0)),
        ("root", Outline::text(header.root)),
        ("directory_area", Outline::Number(header.directory_area.into())),
        ("directory_bytes", Outline::Number(header.directory_bytes.into())),
        ("directory_checksum", Outline::text(format!("{:016x}", header.directory_checksum))),
        ("journal_block", Outline::Number(header.journal.index.into())),
        ("journal_sequence", Outline::Number(header.journal.sequence)),
        ("journal_previous", Outline::text(format!("{:016x}", header.journal.previous))),
    ]
}
