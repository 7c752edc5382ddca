//! How a node's arena is cut. Invariant: every buffer is of exactly one part, so that its owner is known from its number.
//!
//! ```text
//!   | pool of worker 0 | pool of worker 1 | .. | local clients | lent by lane 0 | .. | metadata of worker 0 | .. |
//! ```

use twinpoint_core::geometry::Geometry;
use twinpoint_core::units::{BLOCK_BYTES, BufferId};

use super::NodeError;
use crate::link::LENT_BLOCKS_MIN;
use crate::options::NodeOptions;
use crate::store_port::METADATA_BUFFERS;

/// How the arena is cut: pools of the workers and then of the local clients, lent memory of the lanes, metadata
/// buffers of the workers.
pub(super) struct MemoryPlan {
    pub workers: u32,
    pub local_clients: u32,
    pub pool: u32,
    shards: u32,
    lent: u32,
}

impl MemoryPlan {
    pub fn bytes(&self) -> usize {
        (self.metadata_start() + self.workers * METADATA_BUFFERS) as usize * BLOCK_BYTES
    }

    fn lent_start(&self) -> u32 {
        (self.workers + self.local_clients) * self.pool
    }

    fn metadata_start(&self) -> u32 {
        self.lent_start() + self.shards * self.lent
    }

    pub fn lends(&self) -> Vec<(BufferId, u32)> {
        (0..self.shards)
            .map(|shard| (BufferId(self.lent_start() + shard * self.lent), self.lent))
            .collect()
    }

    pub fn metadata_first(&self, worker: usize) -> BufferId {
        BufferId(self.metadata_start() + worker as u32 * METADATA_BUFFERS)
    }
}

pub(super) fn plan_memory(
    options: &NodeOptions,
    local_clients: usize,
    geometry: &Geometry,
) -> Result<MemoryPlan, NodeError> {
    let workers = options.cores.len().max(1) as u32;
    let shards = u32::from(geometry.shards);
    let blocks = |bytes: u64| u32::try_from(bytes / BLOCK_BYTES as u64).unwrap_or(u32::MAX / 4);
    // Every worker needs room for a few large requests besides its reserve.
    const POOL_MIN: u32 = 2048;
    let local_clients = u32::try_from(local_clients).unwrap_or(u32::MAX / 4);
    let pools = workers.saturating_add(local_clients);
    let pool = blocks(options.memory_bytes) / pools;
    if pool < POOL_MIN {
        let least_bytes = u64::from(POOL_MIN) * u64::from(pools) * BLOCK_BYTES as u64;
        return Err(NodeError::Memory { option: "--memory", least_bytes });
    }
    let paired = options.peer.is_some() || options.listen.is_some();
    let lent = if paired { blocks(options.lent_bytes) / shards } else { 0 };
    if paired && lent < LENT_BLOCKS_MIN {
        let least_bytes = u64::from(LENT_BLOCKS_MIN * shards) * BLOCK_BYTES as u64;
        return Err(NodeError::Memory { option: "--lent-memory", least_bytes });
    }
    Ok(MemoryPlan { workers, local_clients, pool, shards, lent })
}
