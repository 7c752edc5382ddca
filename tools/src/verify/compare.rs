//! Two stores of a pair, block for block by physical address, at the newest CP that both hold.
//!
//! A store that is ahead is recovered once more, as of that CP: the blocks it freed since are retained (R7) as long as
//! the base is not newer.

use std::path::PathBuf;

use twinpoint_core::recovery::{BlockSource, Recovered, RecoveryError};
use twinpoint_core::session::common_limit;
use twinpoint_core::shard::ShardImage;
use twinpoint_core::units::{BLOCK_BYTES, CpNumber};
use twinpoint_runtime::device::StoreFile;
use twinpoint_runtime::store::{DeviceSource, StoreError, recover_read_only};

use super::blocks::{MappedBlock, for_each_run};
use super::check::read_run;
use super::{Comparison, NAMED_MAX, differ};
use crate::failure::Failure;
use crate::outline::Outline;
use crate::progress::Progress;

/// Compares two stores that were recovered as of their newest CPs.
///
/// # Errors
/// If they are no pair, have no common CP any more, or cannot be read.
pub fn compare(
    first: (StoreFile, Recovered),
    second: (StoreFile, Recovered),
) -> Result<Comparison, Failure> {
    let (cp, branched) = common_cp(&first, &second)?;
    let first = as_of(first, cp, branched)?;
    let second = as_of(second, cp, branched)?;
    let mut found = Found::default();
    let mapped: u64 = first.1.shards.iter().map(|shard| shard.map.mapped_blocks()).sum();
    let mut progress = Progress::new("comparing".to_owned(), mapped * BLOCK_BYTES as u64);
    for (one, other) in first.1.shards.iter().zip(&second.1.shards) {
        for_each_run(&one.map, |run| {
            found.compare_run((&first.0, one), (&second.0, other), run);
            progress.add((run.len() * BLOCK_BYTES) as u64);
        });
        for_each_run(&other.map, |run| {
            for block in run.iter().filter(|b| one.map.get(b.volume, b.local).is_none()) {
                found.differs(other, block, "mapped in the second store only");
            }
        });
    }
    drop(progress);
    let roots = first.1.coordinator.roots == second.1.coordinator.roots;
    let paths = [first.0.path().into(), second.0.path().into()];
    Ok(found.into_comparison(cp, roots, branched, &paths))
}

#[derive(Default)]
struct Found {
    compared_blocks: u64,
    different_blocks: u64,
    /// The first of them.
    named: Vec<Outline>,
}

impl Found {
    fn compare_run(
        &mut self,
        (first, one): (&StoreFile, &ShardImage),
        (second, other): (&StoreFile, &ShardImage),
        run: &[MappedBlock],
    ) {
        let source = DeviceSource::new(first);
        let (bytes, other_bytes) = (read_run(first, one, run), read_run(second, other, run));
        for (index, block) in run.iter().enumerate() {
            self.compared_blocks += 1;
            let Some(slot) = other.map.get(block.volume, block.local) else {
                self.differs(one, block, "mapped in the first store only");
                continue;
            };
            if slot.block != block.slot.block {
                self.differs(one, block, "mapped elsewhere in the second store");
                continue;
            }
            match (bytes.block(index), other_bytes.block(index)) {
                (Some(bytes), Some(other_bytes)) if bytes == other_bytes => {
                    if slot.checksum != block.slot.checksum {
                        self.differs(one, block, "equal bytes, different checksums");
                    }
                }
                (Some(bytes), Some(other_bytes)) => {
                    let is_right = source.checksum(bytes) == block.slot.checksum;
                    let other_is_right = source.checksum(other_bytes) == slot.checksum;
                    self.differs(one, block, which_is_damaged(is_right, other_is_right));
                }
                (None, _) => self.differs(one, block, "unreadable in the first store"),
                (_, None) => self.differs(one, block, "unreadable in the second store"),
            }
        }
    }

    fn differs(&mut self, shard: &ShardImage, block: &MappedBlock, how: &str) {
        self.different_blocks += 1;
        if self.named.len() < NAMED_MAX {
            let mut fields = block.fields(&shard.geometry, shard.id);
            fields.push(("how", Outline::text(how)));
            self.named.push(Outline::Fields(fields));
        }
    }

    fn into_comparison(
        self,
        cp: CpNumber,
        roots_equal: bool,
        branched: bool,
        [first, second]: &[PathBuf; 2],
    ) -> Comparison {
        let is_equal = roots_equal && self.different_blocks == 0;
        let state = match (is_equal, branched) {
            (true, false) => "equal",
            (true, true) => "branched",
            (false, _) => "different",
        };
        let outline = Outline::Fields(vec![
            ("state", Outline::text(state)),
            ("cp", Outline::Number(cp.0)),
            ("roots_equal", Outline::Flag(roots_equal)),
            ("compared_blocks", Outline::Number(self.compared_blocks)),
            ("different_blocks", Outline::Number(self.different_blocks)),
            ("different", Outline::List(self.named)),
        ]);
        let failure = (!is_equal).then(|| {
            let text = format!(
                "{} and {} differ at CP {cp}: {} blocks, roots {}; keep the one that is whole and format the other \
                 anew",
                first.display(),
                second.display(),
                self.different_blocks,
                if roots_equal { "equal" } else { "different" },
            );
            differ("differ", text)
        });
        let failure = failure.or_else(|| {
            let text = format!(
                "{} and {} are equal at CP {cp} and went different ways after it: each has CPs that the other never \
                 had; see \"A branch\" in docs/OPERATING.md",
                first.display(),
                second.display(),
            );
            branched.then(|| differ("branched", text))
        });
        Comparison { outline, failure }
    }
}

fn which_is_damaged(first_is_right: bool, second_is_right: bool) -> &'static str {
    match (first_is_right, second_is_right) {
        (true, false) => "the second store's bytes are damaged",
        (false, true) => "the first store's bytes are damaged",
        (false, false) => "both stores' bytes are damaged",
        (true, true) => "different bytes, each as its own map says",
    }
}

/// The newest CP that both stores hold and that is the same one; and whether both went on from there, each its own way.
fn common_cp(
    (first, one): &(StoreFile, Recovered),
    (second, other): &(StoreFile, Recovered),
) -> Result<(CpNumber, bool), Failure> {
    let names = format!("{} and {}", first.path().display(), second.path().display());
    let (one, other) = (&one.coordinator, &other.coordinator);
    if one.superblock.store != other.superblock.store {
        let text = format!("{names} are different stores, not a pair: check the paths");
        return Err(differ("other-store", text));
    }
    if one.superblock.geometry != other.superblock.geometry {
        let text =
            format!("{names} have different layouts: format one of them anew like the other");
        return Err(differ("other-geometry", text));
    }
    let limit = common_limit(&one.superblock.history, &other.superblock.history);
    let Some(limit) = limit else {
        let text =
            format!("the histories of {names} have no common start: format one of them anew");
        return Err(differ("no-common-history", text));
    };
    let newest = one.committed.min(other.committed);
    Ok((newest.min(limit), newest > limit))
}

/// The store as it was at `cp`; `branched` says that both went on from there, each its own way.
fn as_of(
    (store, recovered): (StoreFile, Recovered),
    cp: CpNumber,
    branched: bool,
) -> Result<(StoreFile, Recovered), Failure> {
    let image = &recovered.coordinator;
    if image.committed == cp {
        return Ok((store, recovered));
    }
    let gone = || {
        let what_to_do = match (branched, image.superblock.base_given_up) {
            (true, _) => {
                "each has CPs that the other never had: format one of them anew and copy the other to it"
            }
            (false, true) => {
                "it gave that base up while alone: format the other store anew and copy this one to it"
            }
            (false, false) => {
                "start both nodes, let them come in step, stop them, then compare again"
            }
        };
        let text = format!(
            "{} is at CP {} and no longer holds CP {cp}, the newest that both had: {what_to_do}",
            store.path().display(),
            image.committed
        );
        differ("no-common-cp", text)
    };
    if image.base > cp || image.superblock.base_given_up {
        return Err(gone());
    }
    match recover_read_only(&store, Some(cp)) {
        Ok(earlier) => Ok((store, earlier)),
        Err(StoreError::Recovery {
            error: RecoveryError::BeforeCheckpoint(_) | RecoveryError::BeforeBase(..),
            ..
        }) => Err(gone()),
        Err(error) => Err(error.into()),
    }
}
