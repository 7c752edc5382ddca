//! What shards write and say, compared with what the world knows: records, roots, terms, and what became durable.
//!
//! Invariant: it only looks; what it learns goes to `images.rs`.

use twinpoint_core::contract::Report;
use twinpoint_core::coordinator::Replication;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::record::Record;
use twinpoint_core::shard_header::ShardHeader;
use twinpoint_core::superblock::Superblock;
use twinpoint_core::units::{CpNumber, DeviceBlock, ShardId};

use crate::node::Ahead;
use crate::world::World;

impl World {
    /// A structure written to the journal is a record; a header points to a map that nobody needs to go back before (R7).
    pub(super) fn watch_metadata(
        &mut self,
        node: usize,
        shard: ShardId,
        id: u64,
        block: DeviceBlock,
        bytes: &[u8],
    ) {
        let geometry = &self.options.geometry;
        let journal_start = geometry.journal_block(shard, 0).0;
        let journal = journal_start..journal_start + u64::from(geometry.journal_blocks);
        if journal.contains(&block.0) {
            let record = Record::decode(bytes).expect("a record comes back");
            self.images.record_begins(node, shard, id, &record);
        }
        if geometry.header_copies(shard).contains(&block) {
            let header = ShardHeader::decode(bytes).expect("a header comes back");
            let (cp, keeps_base) = (header.checkpoint, self.nodes[node].keeps_base);
            self.images.check_said(node, cp, cp, keeps_base);
        }
    }

    /// A flush that was asked for at `mark` ended.
    pub fn flushed(&mut self, node: usize, mark: u64) {
        self.nodes[node].disk.flush(mark);
        self.images.flushed(node, mark);
        self.look_at_superblock(node);
    }

    /// What a store would say of its base after a power cut.
    pub fn look_at_superblock(&mut self, node: usize) {
        let disk = &self.nodes[node].disk;
        let [first, second] =
            Geometry::superblock_copies().map(|block| disk.durable_block(block.0));
        let (superblock, _) =
            Superblock::choose([&first[..], &second[..]]).expect("one copy is good");
        self.images.told(node, superblock.committed);
        self.nodes[node].keeps_base = superblock.paired && !superblock.base_given_up;
        self.nodes[node].is_alone = superblock.alone_since.is_some();
    }

    /// A synchronous primary answers a flush that promises the other side's copy: it is there (R5).
    pub fn check_kept(&self, node: usize, wanted: CpNumber) {
        let common = self.images.common;
        assert!(
            self.options.coordinator.replication != Replication::Sync || wanted <= common,
            "node {node} answers a flush of CP {wanted}, on both sides is {common}"
        );
    }

    /// Keeps what a shard sealed, from the moment at which the coordinator knows it.
    pub fn note_ahead(&mut self, node: usize, report: &Report) {
        if let Report::Sealed { cp, data_bytes, delta_bytes, .. } = report {
            let since = self.now;
            let ahead = self.process(node).ahead.entry(*cp).or_insert(Ahead { since, bytes: 0 });
            ahead.bytes += data_bytes + delta_bytes;
        }
    }

    /// An asynchronous primary whose peer is as many CPs, bytes or seconds behind as declared takes no new write (R5).
    /// One whose store has failed answers writes with that failure.
    pub fn check_lag(&mut self, node: usize) {
        let options = self.options.coordinator.clone();
        let bounds = options.replication == Replication::Async;
        if !self.options.paired || !bounds || !self.is_well(node) || self.process(node).has_failed {
            return;
        }
        let (now, clock, confirmed) = (self.now, self.clock(node), self.images.confirmed(node));
        let process = self.process(node);
        let status = process.coordinator.status(clock);
        process.ahead = process.ahead.split_off(&confirmed.next());
        let points = status.open.previous().0.saturating_sub(confirmed.0);
        let bytes: u64 = process.ahead.values().map(|ahead| ahead.bytes).sum();
        let oldest = process.ahead.values().next();
        let age_ns = oldest.map_or(0, |ahead| now - ahead.since);
        assert!(
            status.alone_since.is_some()
                || (points < options.lag_points
                    && bytes < options.lag_bytes
                    && age_ns < options.lag_ns),
            "node {node} takes a write, though its peer is {points} CPs, {bytes} bytes and {age_ns} ns behind of {}, \
             {} and {}",
            options.lag_points,
            options.lag_bytes,
            options.lag_ns
        );
    }

    /// What a shard says is compared with what the other side said.
    pub(super) fn watch_report(&mut self, node: usize, shard: ShardId, report: &Report) {
        match report {
            Report::Sealed { cp, root, .. } => {
                let roots = self.sealed_roots.entry((shard, *cp)).or_default();
                if !roots.contains(root) {
                    roots.push(*root);
                }
            }
            Report::Applied { cp, root } => {
                self.check_term(node, *cp);
                let roots = self.sealed_roots.get(&(shard, *cp));
                assert!(
                    roots.is_some_and(|roots| roots.contains(root)),
                    "shard {shard} applied CP {cp}: unknown root"
                );
            }
            Report::Diverged { cp, .. } => {
                panic!("roots differ at CP {cp} in shard {shard} of node {node}")
            }
            Report::Failed => {
                assert!(self.process(node).has_failed, "shard {shard} of node {node} failed")
            }
            _ => {}
        }
    }

    /// A secondary follows only a primary of its own term, and of the newest one only from that one's promotion on (R8).
    fn check_term(&mut self, node: usize, cp: CpNumber) {
        let (term, last) = self.newest_term;
        let now = self.clock(node);
        let own = self.process(node).coordinator.status(now).term;
        assert!(
            own >= term || cp <= last || self.nodes[node].disowned_after.is_some(),
            "node {node} applies CP {cp} in term {own}; term {term} began after CP {last}"
        );
    }
}
