//! Which blocks a consistency point changed: the part of a record that is not implied by the data.
//!
//! Step 5 of the flow. The checksums travel with the write commands, and staged blocks are placed
//! in volume order, so a delta says only which blocks are mapped and which are unmapped: runs, of
//! which gaps and lengths are coded by an adaptive range coder. Random changes cost close to the
//! entropy of the choice, log2 C(N,k) / k bits each; sequential ones nearly nothing.
//!
//! Invariants: volumes ascend; in each list runs ascend, do not touch, and are not empty; no block
//! is both mapped and unmapped; there is one encoding of a delta, and nothing else decodes.

use crate::limits::{
    LOCAL_BLOCKS_MAX, RECORD_MAPPED_MAX, RECORD_RUNS_MAX, RECORD_UNMAPPED_MAX, VOLUMES_MAX,
};
use crate::range_coder::{Coder, Decoder, Encoder, NumberModel};
use crate::units::{LocalBlock, VolumeId};
use std::fmt;

/// Consecutive blocks of a volume inside one shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Run {
    /// The first block.
    pub first: LocalBlock,
    /// How many, at least 1.
    pub count: u32,
}

impl Run {
    /// The number after the last block's.
    ///
    /// # Panics
    /// If the run was not checked and exceeds 64 bits.
    #[must_use]
    pub fn end(&self) -> LocalBlock {
        LocalBlock(self.first.0 + u64::from(self.count))
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> impl Iterator<Item = LocalBlock> + use<> {
        (self.first.0..self.end().0).map(LocalBlock)
    }
}

/// What a consistency point changed of one volume inside one shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeDelta {
    /// The volume.
    pub volume: VolumeId,
    /// Blocks with new data.
    pub mapped: Vec<Run>,
    /// Blocks that read as zeroes now.
    pub unmapped: Vec<Run>,
}

impl VolumeDelta {
    /// No change of a volume.
    #[must_use]
    pub fn new(volume: VolumeId) -> VolumeDelta {
        VolumeDelta { volume, mapped: Vec::new(), unmapped: Vec::new() }
    }

    /// Adds a block with new data.
    ///
    /// # Panics
    /// If the block does not lie behind all mapped before.
    pub fn push_mapped(&mut self, block: LocalBlock) {
        push(&mut self.mapped, block);
    }

    /// Adds a block that reads as zeroes now.
    ///
    /// # Panics
    /// If the block does not lie behind all unmapped before.
    pub fn push_unmapped(&mut self, block: LocalBlock) {
        push(&mut self.unmapped, block);
    }
}

fn push(runs: &mut Vec<Run>, block: LocalBlock) {
    if let Some(last) = runs.last_mut() {
        assert!(last.end() <= block, "block {block} is not behind {:?}", last.end());
        if last.end() == block && last.count < u32::MAX {
            last.count += 1;
            return;
        }
    }
    runs.push(Run { first: block, count: 1 });
}

/// What a consistency point changed of one shard's map.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Delta {
    /// The changed volumes.
    pub volumes: Vec<VolumeDelta>,
}

/// The most that a delta may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeltaLimits {
    /// Mapped blocks of all volumes.
    pub mapped_blocks: u32,
    /// Unmapped blocks of all volumes.
    pub unmapped_blocks: u32,
    /// Runs of all lists.
    pub runs: u32,
}

impl DeltaLimits {
    /// The limits of a record's delta.
    pub const RECORD: DeltaLimits = DeltaLimits {
        mapped_blocks: RECORD_MAPPED_MAX,
        unmapped_blocks: RECORD_UNMAPPED_MAX,
        runs: RECORD_RUNS_MAX,
    };
}

/// Why bytes or lists are no delta.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeltaError {
    /// More volumes than a store has.
    Volumes,
    /// More runs than allowed.
    Runs,
    /// More blocks than allowed.
    Blocks {
        /// The volume where the limit was exceeded.
        volume: VolumeId,
    },
    /// A volume's number is 0, not ascending, or has no change.
    Volume {
        /// The number.
        volume: VolumeId,
    },
    /// A run is empty, not behind the one before it, or exceeds the largest volume.
    Run {
        /// The run's volume.
        volume: VolumeId,
        /// The run.
        run: Run,
    },
    /// A block is mapped and unmapped.
    Overlap {
        /// The run's volume.
        volume: VolumeId,
        /// The run with the block.
        run: Run,
    },
    /// The bytes are not the encoding of what they decode to.
    NotCanonical,
}

impl fmt::Display for DeltaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeltaError::Volumes => f.write_str("too many volumes"),
            DeltaError::Runs => f.write_str("too many runs"),
            DeltaError::Blocks { volume } => write!(f, "too many blocks, of volume {volume}"),
            DeltaError::Volume { volume } => write!(f, "impossible volume {volume}"),
            DeltaError::Run { volume, run } => {
                write!(f, "impossible run {}+{} of volume {volume}", run.first, run.count)
            }
            DeltaError::Overlap { volume, run } => {
                write!(f, "mapped and unmapped: {}+{} of volume {volume}", run.first, run.count)
            }
            DeltaError::NotCanonical => f.write_str("not in canonical form"),
        }
    }
}

impl std::error::Error for DeltaError {}

impl Delta {
    /// How many blocks are mapped.
    #[must_use]
    pub fn mapped_count(&self) -> u64 {
        self.mapped_blocks_of(|volume| &volume.mapped)
    }

    /// How many blocks are unmapped.
    #[must_use]
    pub fn unmapped_count(&self) -> u64 {
        self.mapped_blocks_of(|volume| &volume.unmapped)
    }

    /// How many runs all lists have.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.volumes.iter().map(|volume| volume.mapped.len() + volume.unmapped.len()).sum()
    }

    /// The mapped blocks, in the order of their data.
    pub fn mapped_blocks(&self) -> impl Iterator<Item = (VolumeId, LocalBlock)> + '_ {
        self.volumes.iter().flat_map(|volume| {
            let blocks = volume.mapped.iter().flat_map(Run::blocks);
            blocks.map(|block| (volume.volume, block))
        })
    }

    /// The unmapped blocks, in order.
    pub fn unmapped_blocks(&self) -> impl Iterator<Item = (VolumeId, LocalBlock)> + '_ {
        self.volumes.iter().flat_map(|volume| {
            let blocks = volume.unmapped.iter().flat_map(Run::blocks);
            blocks.map(|block| (volume.volume, block))
        })
    }

    /// Checks the invariants of this module.
    ///
    /// # Errors
    /// The first that does not hold.
    pub fn check(&self, limits: DeltaLimits) -> Result<(), DeltaError> {
        if self.volumes.len() > VOLUMES_MAX {
            return Err(DeltaError::Volumes);
        }
        if self.run_count() > limits.runs as usize {
            return Err(DeltaError::Runs);
        }
        let mut before = VolumeId(0);
        let (mut mapped, mut unmapped) = (0u64, 0u64);
        for VolumeDelta { volume, mapped: added, unmapped: removed } in &self.volumes {
            let volume = *volume;
            if volume <= before || added.is_empty() && removed.is_empty() {
                return Err(DeltaError::Volume { volume });
            }
            before = volume;
            mapped += check_runs(volume, added)?;
            unmapped += check_runs(volume, removed)?;
            if mapped > u64::from(limits.mapped_blocks)
                || unmapped > u64::from(limits.unmapped_blocks)
            {
                return Err(DeltaError::Blocks { volume });
            }
            check_disjoint(volume, added, removed)?;
        }
        Ok(())
    }

    /// The delta's only encoding. Its length must be kept beside it.
    ///
    /// # Panics
    /// If the invariants do not hold.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let any =
            DeltaLimits { mapped_blocks: u32::MAX, unmapped_blocks: u32::MAX, runs: u32::MAX };
        if let Err(error) = self.check(any) {
            panic!("a delta to encode has {error}");
        }
        self.encode_unchecked()
    }

    /// Reads a delta that is within the limits, and allocates no more than they allow.
    ///
    /// # Errors
    /// If the bytes are not what [`Delta::encode`] makes of a delta within the limits.
    pub fn decode(bytes: &[u8], limits: DeltaLimits) -> Result<Delta, DeltaError> {
        let mut coder = Decoder::new(bytes);
        let mut models = Models::new();
        let volumes = models.volumes.code(&mut coder, 0);
        if volumes > VOLUMES_MAX as u64 {
            return Err(DeltaError::Volumes);
        }
        let mut delta = Delta::default();
        let mut runs_left = limits.runs;
        let mut volume = 0u64;
        for _ in 0..volumes {
            volume = volume.saturating_add(models.volume.code(&mut coder, 0)).saturating_add(1);
            let id = u32::try_from(volume)
                .map_err(|_| DeltaError::Volume { volume: VolumeId(u32::MAX) })?;
            let mut found = VolumeDelta::new(VolumeId(id));
            found.mapped = models.mapped.decode(&mut coder, found.volume, &mut runs_left)?;
            found.unmapped = models.unmapped.decode(&mut coder, found.volume, &mut runs_left)?;
            delta.volumes.push(found);
        }
        delta.check(limits)?;
        if delta.encode_unchecked() != bytes {
            return Err(DeltaError::NotCanonical);
        }
        Ok(delta)
    }

    fn encode_unchecked(&self) -> Vec<u8> {
        let mut coder = Encoder::new();
        let mut models = Models::new();
        models.volumes.code(&mut coder, self.volumes.len() as u64);
        let mut before = 0;
        for volume in &self.volumes {
            models.volume.code(&mut coder, u64::from(volume.volume.0 - before - 1));
            before = volume.volume.0;
            models.mapped.encode(&mut coder, &volume.mapped);
            models.unmapped.encode(&mut coder, &volume.unmapped);
        }
        coder.finish()
    }

    fn mapped_blocks_of(&self, list: impl Fn(&VolumeDelta) -> &Vec<Run>) -> u64 {
        self.volumes.iter().flat_map(list).map(|run| u64::from(run.count)).sum()
    }
}

/// Checks that runs ascend, do not touch and end inside the largest volume; counts their blocks.
fn check_runs(volume: VolumeId, runs: &[Run]) -> Result<u64, DeltaError> {
    let mut free_from = 0;
    let mut blocks = 0;
    for run in runs {
        let end = run.first.0.saturating_add(u64::from(run.count));
        if run.count == 0 || run.first.0 < free_from || end > LOCAL_BLOCKS_MAX {
            return Err(DeltaError::Run { volume, run: *run });
        }
        free_from = end + 1;
        blocks += u64::from(run.count);
    }
    Ok(blocks)
}

fn check_disjoint(volume: VolumeId, mapped: &[Run], unmapped: &[Run]) -> Result<(), DeltaError> {
    let mut others = unmapped.iter().peekable();
    for run in mapped {
        while others.next_if(|other| other.end() <= run.first).is_some() {}
        if others.peek().is_some_and(|other| other.first < run.end()) {
            return Err(DeltaError::Overlap { volume, run: *run });
        }
    }
    Ok(())
}

/// What the coder learns while it codes one delta.
struct Models {
    volumes: NumberModel,
    volume: NumberModel,
    mapped: ListModels,
    unmapped: ListModels,
}

impl Models {
    fn new() -> Models {
        Models {
            volumes: NumberModel::small(),
            volume: NumberModel::small(),
            mapped: ListModels::new(),
            unmapped: ListModels::new(),
        }
    }
}

/// What the coder learns of the mapped runs, or of the unmapped ones.
struct ListModels {
    count: NumberModel,
    start: NumberModel,
    /// Between runs, by whether the run before was a single block: streams and scattered writes
    /// of one delta have different gaps.
    gap: [NumberModel; 2],
    /// By whether the run before was a single block.
    length: [NumberModel; 2],
}

impl ListModels {
    fn new() -> ListModels {
        let gap = [NumberModel::new(), NumberModel::new()];
        let length = [NumberModel::small(), NumberModel::small()];
        ListModels { count: NumberModel::small(), start: NumberModel::small(), gap, length }
    }

    fn encode(&mut self, coder: &mut Encoder, runs: &[Run]) {
        self.count.code(coder, runs.len() as u64);
        let mut before: Option<Run> = None;
        for run in runs {
            let free_from = before.map_or(0, |before| before.end().0 + 1);
            self.code_run(coder, before, run.first.0 - free_from, run.count - 1);
            before = Some(*run);
        }
    }

    fn decode(
        &mut self,
        coder: &mut Decoder<'_>,
        volume: VolumeId,
        runs_left: &mut u32,
    ) -> Result<Vec<Run>, DeltaError> {
        let count = u32::try_from(self.count.code(coder, 0)).map_err(|_| DeltaError::Runs)?;
        *runs_left = runs_left.checked_sub(count).ok_or(DeltaError::Runs)?;
        let mut runs = Vec::with_capacity(count as usize);
        let mut before: Option<Run> = None;
        for _ in 0..count {
            let free_from = before.map_or(0, |before| before.end().0 + 1);
            let (gap, more) = self.code_run(coder, before, 0, 0);
            let first = LocalBlock(free_from.saturating_add(gap));
            let count = u32::try_from(more.saturating_add(1)).unwrap_or(0);
            let run = Run { first, count };
            if count == 0 || first.0 >= LOCAL_BLOCKS_MAX {
                return Err(DeltaError::Run { volume, run });
            }
            runs.push(run);
            before = Some(run);
        }
        Ok(runs)
    }

    /// Codes the gap before a run and how many blocks follow its first.
    fn code_run(
        &mut self,
        coder: &mut impl Coder,
        before: Option<Run>,
        gap: u64,
        more: u32,
    ) -> (u64, u64) {
        let class = usize::from(before.is_some_and(|before| before.count > 1));
        let gaps = if before.is_some() { &mut self.gap[class] } else { &mut self.start };
        let gap = gaps.code(coder, gap);
        let more = self.length[class].code(coder, u64::from(more));
        (gap, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn volume_delta(volume: u32, mapped: &BTreeSet<u64>, unmapped: &BTreeSet<u64>) -> VolumeDelta {
        let mut delta = VolumeDelta::new(VolumeId(volume));
        mapped.iter().for_each(|block| delta.push_mapped(LocalBlock(*block)));
        let unmapped = unmapped.difference(mapped);
        unmapped.for_each(|block| delta.push_unmapped(LocalBlock(*block)));
        delta
    }

    fn blocks() -> impl Strategy<Value = BTreeSet<u64>> {
        let dense = (0u64..1 << 40, 1u64..300, 1u64..4);
        prop_oneof![
            prop::collection::btree_set(0u64..300, 0..100),
            prop::collection::btree_set(0u64..LOCAL_BLOCKS_MAX, 0..50),
            dense.prop_map(|(first, count, step)| (0..count).map(|i| first + i * step).collect()),
        ]
    }

    pub(crate) fn deltas() -> impl Strategy<Value = Delta> {
        let volume = (1u32..1000, blocks(), blocks());
        prop::collection::vec(volume, 0..6).prop_map(|volumes| {
            let mut delta = Delta::default();
            for (volume, mapped, unmapped) in volumes {
                delta.volumes.push(volume_delta(volume, &mapped, &unmapped));
            }
            delta.volumes.retain(|v| !v.mapped.is_empty() || !v.unmapped.is_empty());
            delta.volumes.sort_by_key(|volume| volume.volume);
            delta.volumes.dedup_by_key(|volume| volume.volume);
            delta
        })
    }

    proptest! {
        #[test]
        fn deltas_come_back(delta in deltas()) {
            let bytes = delta.encode();
            prop_assert_eq!(Delta::decode(&bytes, DeltaLimits::RECORD), Ok(delta.clone()));
            let mapped: BTreeSet<_> = delta.mapped_blocks().collect();
            let unmapped: BTreeSet<_> = delta.unmapped_blocks().collect();
            prop_assert_eq!(mapped.len() as u64, delta.mapped_count());
            prop_assert_eq!(unmapped.len() as u64, delta.unmapped_count());
            prop_assert!(mapped.is_disjoint(&unmapped));
        }

        #[test]
        fn only_canonical_bytes_decode(
            delta in deltas(), position: prop::sample::Index, byte: u8, more: u8,
        ) {
            let mut bytes = delta.encode();
            let mut longer = bytes.clone();
            longer.push(more);
            prop_assert!(Delta::decode(&longer, DeltaLimits::RECORD) != Ok(delta));
            if !bytes.is_empty() {
                let index = position.index(bytes.len());
                bytes[index] = byte;
            }
            if let Ok(other) = Delta::decode(&bytes, DeltaLimits::RECORD) {
                prop_assert_eq!(other.encode(), bytes);
            }
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(delta) = Delta::decode(&bytes, DeltaLimits::RECORD) {
                prop_assert_eq!(delta.encode(), bytes);
            }
        }
    }

    #[test]
    fn impossible_lists_are_refused() {
        let run = |first, count| Run { first: LocalBlock(first), count };
        let check = |mapped: &[Run], unmapped: &[Run]| {
            let (mapped, unmapped) = (mapped.to_vec(), unmapped.to_vec());
            let volume = VolumeDelta { volume: VolumeId(1), mapped, unmapped };
            Delta { volumes: vec![volume] }.check(DeltaLimits::RECORD)
        };
        let wrong = |run| Err(DeltaError::Run { volume: VolumeId(1), run });
        assert_eq!(check(&[run(0, 5), run(6, 5)], &[run(5, 1)]), Ok(()));
        assert_eq!(check(&[run(0, 5), run(5, 1)], &[]), wrong(run(5, 1)), "touching");
        assert_eq!(check(&[run(7, 5), run(2, 1)], &[]), wrong(run(2, 1)), "descending");
        assert_eq!(check(&[run(7, 0)], &[]), wrong(run(7, 0)), "empty");
        assert_eq!(check(&[run(u64::MAX, 2)], &[]), wrong(run(u64::MAX, 2)), "too far");
        let overlap = Err(DeltaError::Overlap { volume: VolumeId(1), run: run(3, 5) });
        assert_eq!(check(&[run(3, 5)], &[run(0, 2), run(7, 9)]), overlap);
        assert_eq!(check(&[], &[]), Err(DeltaError::Volume { volume: VolumeId(1) }));
        let blocks = Err(DeltaError::Blocks { volume: VolumeId(1) });
        assert_eq!(check(&[run(0, RECORD_MAPPED_MAX + 1)], &[]), blocks);
    }

    /// Numbers that look random and are the same every time (splitmix64).
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn choose(count: usize, state: &mut u64, pick: impl Fn(&mut u64) -> u64) -> BTreeSet<u64> {
        let mut chosen = BTreeSet::new();
        while chosen.len() < count {
            chosen.insert(pick(state));
        }
        chosen
    }

    /// log2 C(total, count) / count.
    fn entropy_bits(total: u64, count: usize) -> f64 {
        let ratio = |i| ((total - i) as f64 / (i + 1) as f64).log2();
        (0..count as u64).map(ratio).sum::<f64>() / count as f64
    }

    /// Bits of the delta for each changed block.
    fn bits_per_block(name: &str, blocks: &BTreeSet<u64>, entropy: f64) -> f64 {
        let delta = Delta { volumes: vec![volume_delta(1, blocks, &BTreeSet::new())] };
        let bytes = delta.encode();
        assert_eq!(Delta::decode(&bytes, DeltaLimits::RECORD), Ok(delta));
        let bits = bytes.len() as f64 * 8.0 / blocks.len() as f64;
        let count = blocks.len();
        print!("{name}: {count} blocks, {} bytes, {bits:.3} bits a block", bytes.len());
        println!(", uniform entropy {entropy:.3}, ratio {:.3}", bits / entropy);
        bits
    }

    #[test]
    fn random_changes_cost_their_entropy() {
        for (total, count) in
            [(1 << 18, 64), (1 << 18, 1024), (1 << 18, 8192), (1 << 28, 1024), (1 << 14, 8192)]
        {
            let entropy = entropy_bits(total, count);
            let mut worst = 0f64;
            for seed in 1..=5 {
                let blocks = choose(count, &mut { seed }, |state| random(state) % total);
                let name = format!("random {count} of {total}");
                worst = worst.max(bits_per_block(&name, &blocks, entropy) / entropy);
            }
            let allowed = if count < 1024 { 1.12 } else { 1.03 };
            assert!(worst <= allowed, "{count} of {total}: {worst}");
        }
    }

    #[test]
    fn sequential_changes_cost_next_to_nothing() {
        for count in [1024u64, 4096, 32_768] {
            let blocks = (77_777..77_777 + count).collect();
            let bits = bits_per_block("sequential", &blocks, 1.0);
            assert!(bits <= 0.05, "{count}: {bits}");
        }
    }

    #[test]
    fn mixed_changes_cost_less_than_random_ones() {
        let total = 1u64 << 18;
        let skewed = |state: &mut u64| {
            let unit = (random(state) >> 11) as f64 / (1u64 << 53) as f64;
            (total as f64).powf(unit) as u64 - 1
        };
        let zipf = choose(4096, &mut 5, skewed);
        let scattered = |state: &mut u64| {
            let rank = skewed(state);
            rank.wrapping_mul(0x9e37_79b1) % total
        };
        let zipf_scattered = choose(4096, &mut 6, scattered);
        let mut mixed = choose(1024, &mut 7, |state| random(state) % total);
        mixed.extend(100_000..103_000);
        let mut streams = BTreeSet::new();
        for _ in 0..64 {
            let first = random(&mut (streams.len() as u64 + 9)) % total;
            streams.extend(first..first + 64);
        }
        let pages = choose(512, &mut 8, |state| random(state) % (total / 4));
        let pages = pages.iter().flat_map(|page| page * 4..page * 4 + 4).collect();
        let cases = [
            ("zipf in order", zipf),
            ("zipf scattered", zipf_scattered),
            ("random and one stream", mixed),
            ("64 streams of 64", streams),
            ("random 16 KiB pages", pages),
        ];
        for (name, blocks) in cases {
            let entropy = entropy_bits(total, blocks.len());
            assert!(bits_per_block(name, &blocks, entropy) < entropy * 1.01, "{name}");
        }
    }

    #[test]
    fn the_worst_delta_fits_its_bound() {
        let mut worst = 0;
        for spread in [4u64, 1000, 1 << 20, LOCAL_BLOCKS_MAX / u64::from(RECORD_RUNS_MAX)] {
            let mut delta = VolumeDelta::new(VolumeId(u32::MAX));
            for index in 0..u64::from(RECORD_RUNS_MAX) {
                let first = random(&mut { index }) % (spread - 2);
                let count_max = (spread - 1 - first).min(30_000);
                let count = random(&mut { !index }) % count_max + 1;
                let first = LocalBlock(index * spread + first);
                delta.unmapped.push(Run { first, count: count as u32 });
            }
            worst = worst.max(Delta { volumes: vec![delta] }.encode().len());
        }
        println!("worst delta: {worst} bytes");
        assert!(worst <= crate::limits::DELTA_BYTES_MAX);
    }
}
