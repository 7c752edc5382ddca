//! History: what clients sent and were answered, and whether what a store holds afterwards can be.
//!
//! Every command takes the next number of one clock just before it is sent, and its answer is noted with the number
//! that the clock shows then: if that is not above another command's number, the answer came before the other was
//! sent. Commands on one block never overlap, so each block has one order of writes.
//!
//! The rules, after a crash at any moment:
//! - flushed: a write that was answered before an answered flush was sent is there, or a later one of its sectors;
//! - cut (R2): if a write survived, then so did every write that was answered before it was sent, on any block, or a
//!   later one of the same sectors;
//! - whole: of a write to one block either all sectors are there or none;
//! - nothing else: a sector holds what it held before, or one of the writes that were sent to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::sector::{BLOCK_SECTORS, Sector};

/// Gives commands their numbers.
#[derive(Clone, Default)]
pub struct Clock {
    next: Arc<AtomicU64>,
}

impl Clock {
    /// A clock that begins with 1: 0 stands for zeroes.
    pub fn new() -> Clock {
        Clock { next: Arc::new(AtomicU64::new(1)) }
    }

    /// The number of a command that is about to be sent.
    pub fn send(&self) -> u64 {
        self.next.fetch_add(1, Ordering::SeqCst)
    }

    /// The moment of an answer that has come.
    pub fn answer(&self) -> u64 {
        self.next.load(Ordering::SeqCst)
    }
}

/// A command that changes sectors.
#[derive(Clone, Debug)]
pub struct Change {
    /// Its number, and that in the sectors it writes.
    pub sequence: u64,
    /// First sector.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Leaves zeroes.
    pub zero: bool,
    /// Was to be kept when answered.
    pub fua: bool,
    /// When it was answered.
    pub answered: Option<u64>,
}

impl Change {
    fn sectors(&self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }
}

/// What one or more connections did.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// In any order.
    pub changes: Vec<Change>,
    /// Numbers of the answered flushes.
    pub flushes: Vec<u64>,
    /// Error answers and wrong reads, for people.
    pub troubles: Vec<String>,
    /// Reads that were checked.
    pub reads: u64,
}

impl Record {
    /// Takes in another one.
    pub fn merge(&mut self, other: Record) {
        self.changes.extend(other.changes);
        self.flushes.extend(other.flushes);
        self.troubles.extend(other.troubles);
        self.reads += other.reads;
    }

    /// How many changes were answered.
    pub fn answered(&self) -> usize {
        self.changes.iter().filter(|change| change.answered.is_some()).count()
    }
}

/// What must be in an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promise {
    /// Every answered change: the server lived on.
    Answered,
    /// Every flushed change, and a cut.
    Flushed,
    /// Only a cut: an asynchronous copy.
    Cut,
}

/// What a check found out besides that all is well.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Number of the newest change that survived.
    pub newest: u64,
    /// Answered changes that did not survive.
    pub lost: usize,
    /// Their bytes.
    pub lost_bytes: u64,
}

/// Checks an image against what it held before and what was done since.
///
/// # Errors
/// The broken rules, in a few lines.
pub fn check(
    before: &[Sector],
    record: &Record,
    image: &[Sector],
    promise: Promise,
) -> Result<Verdict, String> {
    assert_eq!(before.len(), image.len(), "one volume");
    let newest = newest_survivor(before, record, image);
    let flushed = record.flushes.iter().max().copied().unwrap_or(0);
    let cut = match promise {
        Promise::Answered => u64::MAX,
        Promise::Flushed => newest.max(flushed),
        Promise::Cut => newest,
    };
    let kept_by_fua = promise == Promise::Flushed;
    let is_owed = |change: &Change| match change.answered {
        Some(answered) => answered <= cut || (change.fua && kept_by_fua),
        None => false,
    };
    let mut owed: Vec<u64> = vec![0; image.len()];
    let block_newest = newest_of_blocks(before, image);
    for change in &record.changes {
        let whole = is_owed(change);
        for sector in change.sectors() {
            let in_block = change.sequence <= block_newest[sector / BLOCK_SECTORS as usize];
            if whole || in_block {
                owed[sector] = owed[sector].max(change.sequence);
            }
        }
    }
    let faults = faults(before, record, image, &owed);
    if !faults.is_empty() {
        return Err(describe(&faults, record, newest, flushed, promise));
    }
    let lost = record.changes.iter().filter(|change| {
        let missing = |sector: usize| matches!(image[sector], Sector::Written(found) if found < change.sequence);
        change.answered.is_some() && !change.zero && change.sectors().any(missing)
    });
    let (count, bytes) =
        lost.fold((0, 0), |(n, bytes), change| (n + 1, bytes + change.count * 512));
    Ok(Verdict { newest, lost: count, lost_bytes: bytes })
}

/// The newest change that must have been applied for the image to be as it is.
fn newest_survivor(before: &[Sector], record: &Record, image: &[Sector]) -> u64 {
    let written = image.iter().zip(before).filter_map(|(now, before)| match now {
        Sector::Written(sequence) if now != before => Some(*sequence),
        _ => None,
    });
    let written = written.max().unwrap_or(0);
    // A sector that became zero was changed by one of its zeroing commands: by the oldest of them at least.
    let mut zeroed: Vec<u64> = vec![u64::MAX; image.len()];
    for change in record.changes.iter().filter(|change| change.zero) {
        for sector in change.sectors() {
            let became_zero = image[sector] == Sector::Zero && before[sector] != Sector::Zero;
            if became_zero {
                zeroed[sector] = zeroed[sector].min(change.sequence);
            }
        }
    }
    let zeroed = zeroed.into_iter().filter(|sequence| *sequence != u64::MAX).max();
    written.max(zeroed.unwrap_or(0))
}

/// For each block the number of the newest write that is visible in it.
fn newest_of_blocks(before: &[Sector], image: &[Sector]) -> Vec<u64> {
    let blocks = image.chunks(BLOCK_SECTORS as usize).zip(before.chunks(BLOCK_SECTORS as usize));
    let newest = blocks.map(|(now, before)| {
        let changed = now.iter().zip(before).filter(|(now, before)| now != before);
        let numbers = changed.map(|(now, _)| match now {
            Sector::Written(sequence) => *sequence,
            Sector::Zero => 0,
        });
        numbers.max().unwrap_or(0)
    });
    newest.collect()
}

/// A sector that holds what it must not.
#[derive(Debug)]
struct Fault {
    sector: usize,
    found: Sector,
    before: Sector,
    owed: u64,
}

fn faults(before: &[Sector], record: &Record, image: &[Sector], owed: &[u64]) -> Vec<Fault> {
    let mut possible: Vec<bool> = image
        .iter()
        .zip(before)
        .zip(owed)
        .map(|((now, before), owed)| now == before && *owed == 0)
        .collect();
    for change in &record.changes {
        let leaves = if change.zero { Sector::Zero } else { Sector::Written(change.sequence) };
        for sector in change.sectors() {
            if image[sector] == leaves && change.sequence >= owed[sector] {
                possible[sector] = true;
            }
        }
    }
    let wrong = possible.iter().enumerate().filter(|(_, possible)| !**possible);
    wrong
        .map(|(sector, _)| Fault {
            sector,
            found: image[sector],
            before: before[sector],
            owed: owed[sector],
        })
        .collect()
}

fn describe(
    faults: &[Fault],
    record: &Record,
    newest: u64,
    flushed: u64,
    promise: Promise,
) -> String {
    let mut text = format!(
        "{} sectors hold what they must not (promise {promise:?}, newest survivor {newest}, newest answered flush \
         {flushed}, {} changes, {} answered):",
        faults.len(),
        record.changes.len(),
        record.answered()
    );
    let mut blocks: Vec<u64> =
        faults.iter().map(|fault| fault.sector as u64 / BLOCK_SECTORS).collect();
    blocks.dedup();
    for fault in faults.iter().take(4) {
        let Fault { sector, found, before, owed } = fault;
        let (block, stripe) = (*sector as u64 / BLOCK_SECTORS, sector / 4096);
        text += &format!(
            "\n  sector {sector} (block {block}, stripe {stripe}): found {found:?}, before {before:?}, owed {owed}; sent to it:"
        );
        let mut sent: Vec<&Change> =
            record.changes.iter().filter(|change| change.sectors().contains(sector)).collect();
        sent.sort_by_key(|change| std::cmp::Reverse(change.sequence));
        for change in sent.iter().take(6) {
            text += &format!("\n    {change:?}");
        }
    }
    text += &format!(
        "\n  {} blocks in all: {:?}",
        blocks.len(),
        blocks.iter().take(40).collect::<Vec<_>>()
    );
    text
}
