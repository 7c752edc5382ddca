//! `twinpoint inspect`: every on-disk structure of a store, as it is, with its damage.
//!
//! Reads structure by structure and goes on behind a damaged one where something still leads on. Invariant: changes
//! nothing, and says at the end what recovery makes of it all, which decides the exit code.

mod journal;
mod map;
mod structure;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use twinpoint_core::coordinator::store_root;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{BLOCK_BYTES, CpNumber, DeviceBlock, ShardId};
use twinpoint_runtime::device::{DeviceError, OpenMode, StoreFile};
use twinpoint_runtime::store::{StoreError, recover_read_only};

use crate::failure::Failure;
use crate::outline::Outline;
use crate::output::{print, print_json};
use crate::store_path::caching;

/// See the module.
#[derive(Args)]
pub struct Inspect {
    /// The store: a file or a block device. A node may be serving it; what is shown may then change meanwhile.
    store: PathBuf,
    /// How much of the map to show.
    #[arg(long, value_enum, default_value_t = Segments::Summary)]
    segments: Segments,
    /// Show the records of this consistency point (number) in full: each changed block, where it lies, its checksum.
    /// Default: one line for each record.
    #[arg(long, value_name = "CP")]
    record: Option<u64>,
    /// Accept a file system that knows no direct access: read through the page cache there. Of no effect elsewhere.
    #[arg(long)]
    buffered: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// How much of the map to show.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Segments {
    /// Counts, and the damaged segments
    Summary,
    /// One line for each segment
    List,
    /// Each mapped block of each segment
    Full,
}

impl Inspect {
    /// Prints.
    ///
    /// # Errors
    /// If the store cannot be opened, or recovery finds it damaged.
    pub fn run(self) -> Result<(), Failure> {
        let store = StoreFile::open_with(&self.store, OpenMode::ReadOnly, caching(self.buffered))?;
        let mut printer = Printer { json: self.json, parts: Vec::new() };
        printer.part("path", Outline::text(self.store.display()));
        printer.part("size_bytes", Outline::Number(store.blocks() * BLOCK_BYTES as u64));
        printer.part("in_use", Outline::Flag(store.is_in_use()));
        let copies = read_copies(&store, Geometry::superblock_copies());
        let decoded = copies.each_ref().map(|copy| {
            copy.as_ref().map(|bytes| Superblock::decode(bytes)).map_err(ToString::to_string)
        });
        printer.part("superblocks", structure::superblocks(&decoded));
        if let Some(superblock) = structure::newest(&decoded, |superblock| superblock.sequence) {
            self.shards(&store, superblock, &mut printer);
        }
        let verdict = recover_read_only(&store, None);
        printer.part("recovery", recovery(&verdict));
        printer.end();
        match verdict {
            Ok(_) => Ok(()),
            Err(error) if store.is_in_use() => {
                let mut failure = Failure::from(error);
                failure.text.push_str(" (a node is using the store: stop it and look again)");
                Err(failure)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn shards(&self, store: &StoreFile, superblock: &Superblock, printer: &mut Printer) {
        let geometry = superblock.geometry;
        if let Err(error) = geometry.check(store.blocks()) {
            printer.part("geometry", Outline::text(format!("impossible: {error}")));
            return;
        }
        printer.part("geometry", structure::geometry(&geometry));
        let shards = (0..geometry.shards).map(ShardId);
        if self.json {
            let parts = shards.map(|shard| self.shard(store, superblock, shard));
            printer.part("shards", Outline::list(parts));
        } else {
            // One after the other, for a large store's text need not be in memory at once.
            shards.for_each(|shard| print(&self.shard(store, superblock, shard).render("shard")));
        }
    }

    fn shard(&self, store: &StoreFile, superblock: &Superblock, shard: ShardId) -> Outline {
        let geometry = &superblock.geometry;
        let (headers, header) = structure::shard_headers(store, superblock, shard);
        let mut fields = vec![
            ("shard", Outline::Number(shard.0.into())),
            ("zones", structure::zones(geometry, shard)),
            ("headers", headers),
        ];
        if let Some(header) = header {
            let (directory, entries) = map::directory(store, geometry, &header);
            fields.push(("directory", directory));
            fields
                .push(("segments", map::segments(store, geometry, shard, &entries, self.segments)));
            let record = self.record.map(CpNumber);
            fields.push(("journal", journal::journal(store, superblock, &header, record)));
        }
        Outline::Fields(fields)
    }
}

/// Text at once, JSON at the end.
struct Printer {
    json: bool,
    parts: Vec<(&'static str, Outline)>,
}

impl Printer {
    fn part(&mut self, name: &'static str, part: Outline) {
        if self.json {
            self.parts.push((name, part));
        } else {
            print(&part.render(name));
        }
    }

    fn end(self) {
        if self.json {
            print_json(&Outline::Fields(self.parts));
        }
    }
}

fn recovery(verdict: &Result<twinpoint_core::recovery::Recovered, StoreError>) -> Outline {
    let recovered = match verdict {
        Ok(recovered) => recovered,
        Err(error) => {
            return Outline::Fields(vec![("state", Outline::text(format!("damaged: {error}")))]);
        }
    };
    let image = &recovered.coordinator;
    let repair = |repair: &twinpoint_core::recovery::Repair| {
        Outline::Fields(vec![
            ("block", Outline::Number(repair.block.0)),
            ("why", Outline::text(repair.why)),
        ])
    };
    Outline::Fields(vec![
        ("state", Outline::text("whole")),
        ("committed", Outline::Number(image.committed.0)),
        ("base", Outline::Number(image.base.0)),
        ("root", Outline::text(store_root(&image.roots))),
        ("shard_roots", Outline::list(image.roots.iter().map(Outline::text))),
        ("cut_off_from", Outline::optional(recovered.cut_off.map(|cp| cp.0))),
        ("volumes", structure::volumes(&image.catalog)),
        ("repairs_due", Outline::list(recovered.repairs.iter().map(repair))),
    ])
}

/// Reads consecutive blocks.
fn read(store: &StoreFile, first: DeviceBlock, count: u32) -> Result<Vec<u8>, DeviceError> {
    let mut bytes = vec![0; count as usize * BLOCK_BYTES];
    store.read_blocks(first, &mut bytes)?;
    Ok(bytes)
}

fn read_copies(store: &StoreFile, copies: [DeviceBlock; 2]) -> [Result<Vec<u8>, DeviceError>; 2] {
    copies.map(|block| read(store, block, 1))
}
