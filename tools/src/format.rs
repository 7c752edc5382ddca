//! `twinpoint format`: makes a file or block device an empty store. What it decides stays for the store's life.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use twinpoint_core::limits::{JOURNAL_BLOCKS_MAX, JOURNAL_BLOCKS_MIN, SEGMENTS_MAX, SEGMENTS_MIN};
use twinpoint_core::units::{BLOCK_BYTES, SHARDS_MAX, StoreId};
use twinpoint_runtime::device::Prefill;
use twinpoint_runtime::status::bytes_text;
use twinpoint_runtime::store::{FormatOptions, FormatReport, StoreError, format_store};

use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::quantity::{bytes_flag, parse_blocks, parse_bytes};
use crate::store_path::caching;

/// See the module.
#[derive(Args)]
pub struct Format {
    /// The file or block device.
    store: PathBuf,
    /// Create the file, with this many bytes (B, KiB, MiB, GiB, TiB): a multiple of 4KiB, and at least 6MiB for each
    /// shard. Default: the file or device exists, and is used whole.
    #[arg(long, value_name = "SIZE", value_parser = parse_blocks)]
    size: Option<u64>,
    /// Shards, 1 to 64 (count). Each has its own region, journal and lane to the peer, and runs on one core; several may
    /// share a core. More shards use more cores later.
    #[arg(long, value_name = "COUNT", default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(SHARDS_MAX)))]
    shards: u16,
    /// Journal of each shard (KiB, MiB, GiB): a multiple of 4KiB, 1MiB to 4GiB. A larger one needs fewer map checkpoints
    /// and holds more for a secondary that is away. Default: 1/32 of the shard's region, 1MiB to 256MiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_journal)]
    journal: Option<u32>,
    /// Map segments of each shard, 64 to 16777216 (count): how many stripes of 2MiB, of all volumes, may have written
    /// blocks. Default: one for each 512KiB of data space.
    #[arg(long, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(i64::from(SEGMENTS_MIN)..=i64::from(SEGMENTS_MAX)))]
    segments: Option<u32>,
    /// The store's identity, 32 hexadecimal digits, not all 0: give the second store of a pair that of the first, and
    /// the same size, shards, journal and segments. Default: random.
    #[arg(long, value_name = "ID", value_parser = parse_store_id)]
    store_id: Option<StoreId>,
    /// Destroy what the store holds. Without this, anything in the first or last MiB is kept and the command refused.
    #[arg(long)]
    force: bool,
    /// What a file that is created contains; of no effect on what exists.
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
        let options = FormatOptions {
            size_bytes: self.size,
            shards: self.shards,
            journal_blocks: self.journal,
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
        let report = format_store(&self.store, &options).map_err(|error| self.failure(error))?;
        if self.json {
            self.print_json(&report);
        } else {
            self.print_text(&report);
        }
        Ok(())
    }

    fn failure(&self, error: StoreError) -> Failure {
        let is_layout = matches!(error, StoreError::Geometry { .. });
        let mut failure = Failure::from(error);
        if is_layout {
            failure.text = format!("{}: {}", self.store.display(), failure.text);
        }
        failure
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

/// A journal's size, in blocks.
fn parse_journal(text: &str) -> Result<u32, String> {
    let bytes = parse_bytes(text)?;
    let blocks = u32::try_from(bytes / BLOCK_BYTES as u64).ok();
    blocks
        .filter(|_| bytes.is_multiple_of(BLOCK_BYTES as u64))
        .filter(|blocks| (JOURNAL_BLOCKS_MIN..=JOURNAL_BLOCKS_MAX).contains(blocks))
        .ok_or_else(|| {
            "a journal is a multiple of 4KiB from 1MiB to 4GiB, such as 16MiB".to_owned()
        })
}

fn parse_store_id(text: &str) -> Result<StoreId, String> {
    let id: StoreId = text.parse().map_err(str::to_owned)?;
    if id.0 == [0; 16] {
        return Err(
            "all digits are 0, which names no store: leave it away for a random one".to_owned()
        );
    }
    Ok(id)
}
