//! What kind of history a seed plays: sizes, modes, loads and faults, all drawn from the seed.
//!
//! Invariant: tiny stores, journals and buffers are likely, so that checkpoints, wraps and shortages happen.

use twinpoint_core::coordinator::{CoordinatorOptions, OnPeerLoss, Replication};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::limits::JOURNAL_BLOCKS_MIN;

use crate::random::Random;

/// Longest virtual time of the load, in nanoseconds.
const LOAD_NS: u64 = 20_000_000_000;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub geometry: Geometry,
    pub coordinator: CoordinatorOptions,
    pub paired: bool,
    /// Client threads, each with one command at a time.
    pub clients: usize,
    /// Commands after which the load ends.
    pub commands: u64,
    /// Blocks that clients use at the start of each stripe.
    pub blocks_per_stripe: u64,
    /// Stripes of the first volume.
    pub stripes: u64,
    /// Pause of a client between commands, in nanoseconds.
    pub think_ns: u64,
    pub frontend_buffers: usize,
    pub reserve_buffers: usize,
    /// Blocks that the secondary lends each lane.
    pub lent_blocks: u32,
    pub unmap_percent: u64,
    pub flush_percent: u64,
    /// Share of commands that create or delete a volume or name a checkpoint.
    pub command_percent: u64,
    pub faults: u64,
    pub power_cuts: bool,
    pub promotions: bool,
    /// The secondary is lost for good, when a shard waits for it or in the middle of the load, and the primary has to carry
    /// on alone.
    pub loses_secondary: bool,
    pub wire_delay_ns: u64,
    pub disk_delay_ns: u64,
    /// Virtual time after which the load ends whatever is left of it, in nanoseconds.
    pub load_ns: u64,
}

impl Options {
    /// What a seed draws.
    pub fn from_seed(random: &mut Random) -> Options {
        Options::with_shards(random, None)
    }

    /// The same with at most so many shards.
    pub fn with_shards(random: &mut Random, shards_max: Option<u16>) -> Options {
        let drawn = random.between(1, 4) as u16;
        let shards = shards_max.map_or(drawn, |shards| drawn.min(shards.max(1)));
        let tight = random.chance(40);
        let data_blocks = if tight { 1024 + random.below(200) } else { 1024 + random.below(8000) };
        let paired = random.chance(75);
        let (faults, has_faults) = (random.between(1, 8), random.chance(75));
        let milliseconds = |n: u64| n * 1_000_000;
        let coordinator = CoordinatorOptions {
            paired,
            replication: random.pick(&[
                Replication::Sync,
                Replication::Sync,
                Replication::SemiSync,
                Replication::Async,
            ]),
            on_peer_loss: random.pick(&[OnPeerLoss::Stall, OnPeerLoss::Continue]),
            cp_interval_ns: milliseconds(random.pick(&[1, 5, 50])),
            points_in_flight: random.between(1, 4) as usize,
            peer_timeout_ns: milliseconds(random.between(20, 100)),
            lag_points: random.between(2, 50),
            lag_bytes: random.between(1, 16) << 20,
            lag_ns: milliseconds(random.between(5, 500)),
        };
        let continues = paired && coordinator.on_peer_loss == OnPeerLoss::Continue;
        Options {
            geometry: geometry(shards, data_blocks, random),
            coordinator,
            paired,
            clients: random.between(1, 12) as usize,
            commands: random.between(100, 900),
            // The map keeps whole stripes in another form: some histories fill them.
            blocks_per_stripe: if random.chance(20) {
                512
            } else if tight {
                random.between(100, 512)
            } else {
                random.between(4, 200)
            },
            stripes: random.between(1, 8),
            think_ns: random.pick(&[1_000, 100_000, 1_000_000]),
            frontend_buffers: random.between(80, 1000) as usize,
            reserve_buffers: random.between(1, 64) as usize,
            lent_blocks: random.pick(&[64, 128, 512, 1024]),
            unmap_percent: random.between(0, 20),
            flush_percent: random.between(1, 20),
            command_percent: random.between(0, 6),
            faults: if has_faults { faults } else { 0 },
            power_cuts: random.chance(70),
            promotions: random.chance(60),
            wire_delay_ns: random.pick(&[5_000, 50_000, 1_000_000]),
            disk_delay_ns: random.pick(&[10_000, 80_000, 500_000]),
            load_ns: LOAD_NS,
            loses_secondary: continues && random.chance(25),
        }
    }
}

fn geometry(shards: u16, data_blocks: u64, random: &mut Random) -> Geometry {
    let journal_blocks = JOURNAL_BLOCKS_MIN + random.below(40) as u32;
    let segments_max = random.chance(50).then_some(64 + random.below(30) as u32);
    let mut store_blocks = u64::from(shards) * (data_blocks + u64::from(journal_blocks));
    loop {
        match Geometry::plan(store_blocks, shards, Some(journal_blocks), segments_max) {
            Ok(geometry) if u64::from(geometry.data_blocks()) >= data_blocks => return geometry,
            _ => store_blocks += u64::from(shards) * 16,
        }
    }
}
