//! Runs of data blocks: where the blocks of one consistency point lie in a shard's data zone.
//!
//! Step 3 of the flow makes them, in the order in which staged blocks fill them; a record keeps
//! them. Invariants of a checked list: no run is empty, all lie in a data zone, none overlap. They
//! need not ascend, for an allocation goes round the zone.

use crate::codec::{FormatError, FormatErrorKind, Reader, Writer};
use crate::limits::{DATA_BLOCKS_USABLE_MAX, RECORD_MAPPED_MAX};
use crate::units::DataBlock;

/// Consecutive data blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct DataRun {
    /// The first block.
    pub first: DataBlock,
    /// How many, at least 1.
    pub count: u32,
}

impl DataRun {
    /// The number after the last block's. Computed in 64 bits: a run may come from outside.
    #[must_use]
    pub fn end(&self) -> u64 {
        u64::from(self.first.0) + u64::from(self.count)
    }

    /// The blocks, in order.
    ///
    /// # Panics
    /// If the run exceeds 32-bit block numbers: check runs that come from outside first.
    pub fn blocks(&self) -> impl Iterator<Item = DataBlock> + use<> {
        let end = u32::try_from(self.end()).expect("a checked run ends below 2^30");
        (self.first.0..end).map(DataBlock)
    }
}

/// Each run as two varints: how far it begins from the end of the run before (zigzag), and its
/// count. Runs of one allocation mostly ascend, so the distance is short.
pub(crate) fn encode_runs(runs: &[DataRun]) -> Vec<u8> {
    let mut writer = Writer::new();
    let mut end_before = 0i64;
    for run in runs {
        let distance = i64::from(run.first.0) - end_before;
        writer.put_varint((distance << 1 ^ distance >> 63) as u64);
        writer.put_varint(u64::from(run.count));
        end_before = run.end() as i64;
    }
    writer.finish()
}

/// The inverse of [`encode_runs`]; the runs are yet to be checked.
pub(crate) fn decode_runs(bytes: &[u8], count: u32) -> Result<Vec<DataRun>, FormatError> {
    let mut reader = Reader::new(bytes);
    let mut runs = Vec::with_capacity(count.min(RECORD_MAPPED_MAX) as usize);
    let mut end_before = 0i64;
    for _ in 0..count {
        let field = FormatError::new(FormatErrorKind::Field, reader.position());
        let zigzag = reader.get_varint()?;
        let distance = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        let first = end_before.checked_add(distance).and_then(|first| u32::try_from(first).ok());
        let count = u32::try_from(reader.get_varint()?).map_err(|_| field)?;
        let run = DataRun { first: DataBlock(first.ok_or(field)?), count };
        end_before = run.end() as i64;
        runs.push(run);
    }
    if reader.remaining() > 0 {
        return Err(reader.truncated());
    }
    Ok(runs)
}

/// Checks that runs are not empty, lie in a data zone, and do not overlap. The error is a
/// run that breaks this.
pub(crate) fn check_runs(runs: &[DataRun]) -> Result<(), DataRun> {
    let wrong = |run: &&DataRun| run.count == 0 || run.end() > u64::from(DATA_BLOCKS_USABLE_MAX);
    if let Some(run) = runs.iter().find(wrong) {
        return Err(*run);
    }
    let mut sorted: Vec<DataRun> = runs.to_vec();
    sorted.sort_unstable_by_key(|run| run.first);
    match sorted.windows(2).find(|pair| pair[0].end() > u64::from(pair[1].first.0)) {
        Some(pair) => Err(pair[1]),
        None => Ok(()),
    }
}
