//! `twinpoint format`: makes a file or block device an empty store. What it decides stays for the store's life.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use twinpoint_core::units::{BLOCK_BYTES, StoreId};
use twinpoint_runtime::device::Prefill;
use twinpoint_runtime::status::bytes_text;
use twinpoint_runtime::store::{FormatOptions, FormatReport, format_store};

use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::quantity::{bytes_flag, parse_bytes};
use crate::store_path::caching;

/// See the module.
#[derive(Args)]
pub struct Format {
    /// The file or block device.
    store: PathBuf,
    /// Create the file, with this many bytes (KiB, MiB, GiB, TiB): a multiple of 4KiB. Default: the file or device
    /// exists, and is used whole.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    size: Option<u64>,
    /// Shards, 1 to 64. Each has its own region, journal and lane to the peer, and runs on one core; several may share
    /// a core. More shards use more cores later.
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    shards: u16,
    /// Journal of each shard (KiB, MiB, GiB): 1MiB to 4GiB. A larger one needs fewer map checkpoints and holds more
    /// for a secondary that is away. Default: 1/32 of the shard's region, 1MiB to 256MiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    journal: Option<u64>,
    /// Map segments of each shard, at least 64: how many stripes of 2MiB, of all volumes, may have written blocks.
    /// Default: one for each 512KiB of data space.
    #[arg(long, value_name = "COUNT")]
    segments: Option<u32>,
    /// The store's identity, 32 hexadecimal digits: give the second store of a pair that of the first, and the same
    /// size, shards, journal and segments. Default: random.
    #[arg(long, value_name = "ID")]
    store_id: Option<StoreId>,
    /// Destroy what the store holds. Without this, anything in the first or last MiB is kept and the command refused.
    #[arg(long)]
    force: bool,
    /// What a file that is created contains.
    #[arg(long, value_enum, default_value_t = PrefillFlag::Reserve)]
    prefill: PrefillFlag,
    /// Accept a file system that knows no direct access. For trials: slower, and a power cut may take more.
    #[arg(long)]
    buffered: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum PrefillFlag {
    /// Nothing: space is found at the first write of each block, and may be missing then
    None,
    /// Reserved space: the first write of each block still changes the file system's metadata
    Reserve,
    /// Written zeroes: slow to format, later writes are the fastest
    Zero,
}

impl Format {
    /// Formats.
    ///
    /// # Errors
    /// If the store holds data, is in use, or cannot have this layout.
    pub fn run(self) -> Result<(), Failure> {
        let journal_blocks = self.journal.map(journal_blocks).transpose()?;
        let options = FormatOptions {
            size_bytes: self.size,
            shards: self.shards,
            journal_blocks,
            segments_max: self.segments,
            store_id: self.store_id,
            force: self.force,
            prefill: match self.prefill {
                PrefillFlag::None => Prefill::None,
                PrefillFlag::Reserve => Prefill::Reserve,
                PrefillFlag::Zero => Prefill::Zero,
            },
            caching: caching(self.buffered),
        };
        let report = format_store(&self.store, &options)?;
        if self.json {
            self.print_json(&report);
        } else {
            self.print_text(&report);
        }
        Ok(())
    }

    fn print_json(&self, report: &FormatReport) {
        let geometry = report.geometry;
        print_json(&json!({
            "ok": true,
            "path": self.store.display().to_string(),
            "store": report.store.to_string(),
            "size_bytes": report.size_bytes,
            "created": report.created,
            "direct": report.is_direct,
            "shards": geometry.shards,
            "region_bytes": geometry.region_blocks * BLOCK_BYTES as u64,
            "journal_bytes": u64::from(geometry.journal_blocks) * BLOCK_BYTES as u64,
            "segments_max": geometry.segments_max(),
            "data_bytes": data_bytes(report),
        }));
    }

    fn print_text(&self, report: &FormatReport) {
        let (geometry, size) = (report.geometry, bytes_flag(report.size_bytes));
        let journal = u64::from(geometry.journal_blocks) * BLOCK_BYTES as u64;
        print(&format!(
            "formatted {}: store {}, {size}\n{} shards, each with {} of data, {} of journal, {} map segments\n\
             its peer: --size {size} --shards {} --journal {} --segments {} --store-id {}\n",
            self.store.display(),
            report.store,
            geometry.shards,
            bytes_text(data_bytes(report) / u64::from(geometry.shards)),
            bytes_text(journal),
            geometry.segments_max(),
            geometry.shards,
            bytes_flag(journal),
            geometry.segments_max(),
            report.store,
        ));
    }
}

fn data_bytes(report: &FormatReport) -> u64 {
    let blocks = u64::from(report.geometry.data_blocks()) * u64::from(report.geometry.shards);
    blocks * BLOCK_BYTES as u64
}

fn journal_blocks(bytes: u64) -> Result<u32, Failure> {
    let whole = bytes.is_multiple_of(BLOCK_BYTES as u64);
    let blocks = u32::try_from(bytes / BLOCK_BYTES as u64).ok().filter(|_| whole);
    blocks.ok_or_else(|| {
        Failure::usage("--journal is no multiple of 4KiB up to 4GiB: give such as 16MiB")
    })
}
