//! Clients: each sends one command at a time to the node that serves, and checks what it hears against the model.
//!
//! Invariants: writes under way never share a sector, so each sector has one order of writes; reads overlap freely;
//! partial blocks hold bytes outside of their range that must never be seen again.

use twinpoint_core::catalog::CatalogError;
use twinpoint_core::contract::{Command, Refusal, Reply};
use twinpoint_core::message::Role;
use twinpoint_core::request::{
    Answer, Operation as RequestOperation, Outcome, Request, Tag, locate,
};
use twinpoint_core::units::{
    BLOCK_BYTES, BufferId, CpNumber, REQUEST_BLOCKS_MAX, SECTOR_BYTES, SEGMENT_BLOCKS, ShardId,
    VolumeBlock, VolumeId,
};

use crate::buffers::Owner;
use crate::content::fill_sector;
use crate::faults::Fault;
use crate::model::SECTORS;
use crate::node::Queue;
use crate::wire::TicketUse;
use crate::world::{Event, NodeEvent, World};

/// Frontends: each has a ring of its own to every shard.
const FRONTENDS: u64 = 3;

/// A client's state: what it waits for.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Client {
    pub waits_for: Option<u64>,
}

/// A command under way.
#[derive(Debug)]
pub(crate) struct Operation {
    pub client: usize,
    pub node: usize,
    pub kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Kind {
    Write { id: u64, range: Range },
    Unmap { id: u64, range: Range },
    Read { range: Range, from: Vec<usize>, buffer: BufferId },
    Status { range: Range, from: Vec<usize> },
    Flush { sent: u64, wanted: CpNumber },
    Create { name: String, blocks: u64 },
    Delete { volume: u32 },
    Checkpoint,
}

/// Sectors of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    volume: u32,
    first: u64,
    count: u64,
}

impl Range {
    fn overlaps(&self, other: &Range) -> bool {
        self.volume == other.volume
            && self.first < other.first + other.count
            && other.first < self.first + self.count
    }
}

impl World {
    /// A client thinks of something to do.
    pub fn client_wakes(&mut self, client: usize) {
        if self.clients[client].waits_for.is_some() || self.commands_left == 0 {
            return;
        }
        let serving = (0..2).find(|node| self.is_serving(*node) && !self.nodes[*node].is_paused);
        let sent = serving.is_some_and(|node| self.send_something(client, node));
        if sent {
            self.commands_left -= 1;
        } else {
            self.soon(400_000, Event::Client(client));
        }
    }

    /// Whether clients may send to a node.
    pub fn is_serving(&mut self, node: usize) -> bool {
        self.nodes[node]
            .process
            .as_ref()
            .is_some_and(|p| p.serves && p.gate.open.is_some() && !p.is_stopped)
            && self.nodes[node].role == Role::Primary
    }

    /// Gives a request the open CP's number and puts it in its shard's ring.
    pub fn admit(&mut self, node: usize, shard: ShardId, request: Request) {
        let frontend = self
            .operations
            .get(&request.tag.0)
            .map_or(0, |operation| operation.client as u64 % FRONTENDS);
        let gate = &mut self.process(node).gate;
        let stamp = gate.open.expect("requests are admitted when the gate is open");
        let is_write =
            matches!(request.operation, RequestOperation::Write { .. } | RequestOperation::Unmap);
        let was_empty = gate.is_open_empty();
        if is_write {
            gate.marked.insert(shard);
        }
        if is_write && was_empty {
            let life = self.nodes[node].life;
            let at = self.now + 1 + self.random.below(1_000);
            self.process(node).tick_at = Some(at);
            self.at(at, Event::Node(node, life, NodeEvent::Tick));
        }
        let request = Request { stamp, ..request };
        self.enqueue(
            node,
            Queue::Frontend(frontend, shard),
            3_000,
            NodeEvent::Request(shard, request),
        );
    }

    /// A shard answers.
    pub fn answered(&mut self, node: usize, answer: Answer) {
        let Some(operation) = self.take_operation(node, answer.tag.0) else {
            let process = self.process(node);
            if let Some((buffer, count)) = process.left_reads.remove(&answer.tag.0) {
                process.buffers.hand(buffer, count, Owner::Frontend, Owner::Nobody);
            }
            return;
        };
        let may_fail = self.process(node).has_failed;
        let reads_may_fail = may_fail || self.process(node).has_read_failure;
        match operation.kind {
            Kind::Write { id, range } | Kind::Unmap { id, range } => match answer.outcome {
                Outcome::Done => self.model.answered(id),
                Outcome::NoSpace => {
                    self.counts.no_space += 1;
                    if self.faults.has(Fault::FullStore) {
                        self.counts.faults.add(Fault::FullStore);
                    }
                    self.model.not_done(id);
                }
                Outcome::Failed => {
                    assert!(
                        reads_may_fail || self.model.is_deleting(range.volume),
                        "a write failed"
                    )
                }
                Outcome::Mapped(_) => panic!("a write is answered with a map"),
            },
            Kind::Status { .. } if may_fail && answer.outcome == Outcome::Failed => {}
            Kind::Read { range, from, buffer } => {
                if reads_may_fail && answer.outcome == Outcome::Failed {
                    self.counts.failed_reads += 1;
                } else {
                    self.check_read(node, range, &from, buffer, &answer.outcome);
                }
                let count = blocks_of(range);
                self.process(node).buffers.hand(buffer, count, Owner::Frontend, Owner::Nobody);
            }
            Kind::Status { range, from } => self.check_status(range, &from, &answer.outcome),
            other => panic!("a shard answers {other:?}"),
        }
        self.command_done(operation.client);
    }

    /// The coordinator answers a flush.
    pub fn flush_answered(&mut self, node: usize, tag: Tag, kept: bool) {
        let Some(operation) = self.take_operation(node, tag.0) else { return };
        let Kind::Flush { sent, wanted } = operation.kind else { panic!("no flush was asked for") };
        if kept {
            self.model.flushed = self.model.flushed.max(sent);
            if self.promises_remote(node) && !self.forgot(1 - node, wanted) {
                self.model.flushed_remote = self.model.flushed_remote.max(sent);
                self.check_kept(node, wanted);
            }
        }
        self.command_done(operation.client);
    }

    /// The coordinator answers a client's command.
    pub fn command_answered(&mut self, node: usize, client: usize, tag: u64, reply: Reply) {
        let Some(operation) = self.take_operation(node, tag) else { return };
        match (operation.kind, reply) {
            (Kind::Create { name, blocks }, Reply::Volume(id)) => {
                self.model.created(id.0, &name, blocks)
            }
            (Kind::Delete { volume }, Reply::Volume(id)) => {
                assert_eq!(volume, id.0, "another volume was deleted");
                self.model.deleted(volume);
            }
            (Kind::Checkpoint, Reply::Checkpoint(..)) => {}
            (Kind::Delete { .. }, Reply::Refused(Refusal::Catalog(CatalogError::NotFound))) => {}
            (
                _,
                Reply::Refused(
                    Refusal::Catalog(CatalogError::Full)
                    | Refusal::SessionEnding
                    | Refusal::StoreFailed,
                ),
            ) => {}
            (kind, reply) => panic!("{kind:?} was answered {reply:?}"),
        }
        self.command_done(client);
    }

    /// The command that is answered; none if its client has left a deposed primary.
    fn take_operation(&mut self, node: usize, tag: u64) -> Option<Operation> {
        let operation = self.operations.remove(&tag);
        match &operation {
            Some(operation) => assert_eq!(operation.node, node, "another node answers"),
            None => {
                assert_eq!(self.nodes[node].role, Role::Secondary, "a command is answered once")
            }
        }
        operation
    }

    fn command_done(&mut self, client: usize) {
        self.counts.commands += 1;
        self.clients[client].waits_for = None;
        let think_ns = self.options.think_ns;
        self.soon(think_ns, Event::Client(client));
    }

    fn send_something(&mut self, client: usize, node: usize) -> bool {
        let tag = self.tag_next;
        self.tag_next += 1;
        let volume = self.pick_volume(node);
        let chance = self.random.below(100);
        let (command, flush) = (self.options.command_percent, self.options.flush_percent);
        let kind = match volume {
            None => self.send_create(client, node, tag),
            Some(_) if chance < command => self.send_command(client, node, tag),
            Some(_) if chance < command + flush => {
                self.enqueue(node, Queue::Control, 2_000, NodeEvent::Flush(Tag(tag)));
                let wanted = self.process(node).gate.newest_written();
                Some(Kind::Flush { sent: self.model.tick(), wanted })
            }
            Some(volume) => self.send_request(client, node, tag, volume),
        };
        let Some(kind) = kind else { return false };
        self.note(|| format!("client {client} sends {tag}: {kind:?}"));
        self.operations.entry(tag).or_insert(Operation { client, node, kind });
        self.clients[client].waits_for = Some(tag);
        true
    }

    fn pick_volume(&mut self, node: usize) -> Option<u32> {
        let known =
            self.nodes[node].process.as_ref()?.catalog.volumes.iter().map(|volume| volume.id.0);
        let usable: Vec<u32> = known
            .filter(|id| self.model.volumes.contains_key(id) && !self.model.is_deleting(*id))
            .collect();
        (!usable.is_empty()).then(|| self.random.pick(&usable))
    }

    fn send_create(&mut self, client: usize, node: usize, tag: u64) -> Option<Kind> {
        let name = format!("v{tag}");
        let blocks = self.options.stripes * SEGMENT_BLOCKS - self.random.below(SEGMENT_BLOCKS / 2);
        self.model.creating(&name);
        let command =
            Command::VolumeCreate { name: name.clone(), size_bytes: blocks * BLOCK_BYTES as u64 };
        self.ask(node, TicketUse::Client(client, tag), command);
        Some(Kind::Create { name, blocks })
    }

    fn send_command(&mut self, client: usize, node: usize, tag: u64) -> Option<Kind> {
        match self.random.below(4) {
            0 if self.model.volumes.len() < 5 => self.send_create(client, node, tag),
            1 if self.model.volumes.len() > 1 => {
                let volume = self.pick_volume(node)?;
                let name = self.model.volumes[&volume].name.clone();
                self.model.deleting(&name);
                self.ask(node, TicketUse::Client(client, tag), Command::VolumeDelete { name });
                Some(Kind::Delete { volume })
            }
            _ => {
                let name = self.random.chance(70).then(|| format!("point-{tag}"));
                self.ask(node, TicketUse::Client(client, tag), Command::Checkpoint(name));
                Some(Kind::Checkpoint)
            }
        }
    }

    fn send_request(&mut self, client: usize, node: usize, tag: u64, volume: u32) -> Option<Kind> {
        let chance = self.random.below(100);
        let unmaps = chance < self.options.unmap_percent;
        let writes = !unmaps && chance < 60;
        let range = self.pick_range(volume, unmaps);
        let holds = self.process(node).holds;
        if (unmaps || writes) && (holds || self.is_busy(&range)) {
            return None;
        }
        if unmaps || writes {
            self.check_lag(node);
        }
        let blocks = blocks_of(range);
        let (kind, operation) = if unmaps {
            let id = self.model.sent(volume, range.first, range.count, true);
            (Kind::Unmap { id, range }, RequestOperation::Unmap)
        } else if writes {
            let buffer = self.take_buffers(node, blocks)?;
            let id = self.model.sent(volume, range.first, range.count, false);
            self.fill_buffers(node, buffer, range, id);
            (Kind::Write { id, range }, RequestOperation::Write { buffer })
        } else if chance > 95 {
            let first = range.first / SECTORS * SECTORS;
            let range = Range { first, count: u64::from(blocks) * SECTORS, volume };
            let from = self.model.read_sent(volume, range.first, range.count);
            (Kind::Status { range, from }, RequestOperation::Status)
        } else {
            let buffer = self.take_buffers(node, blocks)?;
            let from = self.model.read_sent(volume, range.first, range.count);
            (Kind::Read { range, from, buffer }, RequestOperation::Read { buffer })
        };
        let range = match &kind {
            Kind::Status { range, .. } => *range,
            _ => range,
        };
        let block = VolumeBlock(range.first / SECTORS);
        let (shard, _) = locate(VolumeId(volume), block, self.options.geometry.shards);
        if let RequestOperation::Write { buffer } = operation {
            self.process(node).buffers.hand(buffer, blocks, Owner::Frontend, Owner::Shard(shard.0));
        }
        let request = Request {
            tag: Tag(tag),
            stamp: CpNumber(0),
            volume: VolumeId(volume),
            offset: range.first * SECTOR_BYTES as u64,
            length: (range.count * SECTOR_BYTES as u64) as u32,
            operation,
        };
        self.operations.insert(tag, Operation { client, node, kind: Kind::Checkpoint });
        self.admit(node, shard, request);
        self.operations.remove(&tag);
        Some(kind)
    }

    fn pick_range(&mut self, volume: u32, whole_blocks: bool) -> Range {
        let volume_blocks = self.model.volumes[&volume].blocks;
        let stripe = self.random.below(volume_blocks.div_ceil(SEGMENT_BLOCKS));
        let start = stripe * SEGMENT_BLOCKS;
        let fills = self.faults.has(Fault::FullStore);
        let blocks = if fills { SEGMENT_BLOCKS } else { self.options.blocks_per_stripe };
        let end = (start + blocks.min(SEGMENT_BLOCKS)).min(volume_blocks);
        let first = start + self.random.below(end - start);
        let most = (end - first).min(u64::from(REQUEST_BLOCKS_MAX));
        let long = if fills { 60 } else { 15 };
        let longest = if self.random.chance(long) { most } else { most.min(6) };
        let blocks = self.random.between(1, longest);
        let range = Range { volume, first: first * SECTORS, count: blocks * SECTORS };
        if whole_blocks || self.random.chance(50) {
            return range;
        }
        let skip = self.random.below(SECTORS);
        let count = self.random.between(1, range.count - skip);
        Range { volume, first: range.first + skip, count }
    }

    fn is_busy(&self, range: &Range) -> bool {
        self.operations.values().any(|operation| match &operation.kind {
            Kind::Write { range: other, .. } | Kind::Unmap { range: other, .. } => {
                range.overlaps(other)
            }
            _ => false,
        })
    }

    fn take_buffers(&mut self, node: usize, count: u32) -> Option<BufferId> {
        let mut random = self.random.clone();
        let buffer = self.process(node).buffers.take(count, Owner::Frontend, &mut random);
        self.random = random;
        buffer
    }

    fn fill_buffers(&mut self, node: usize, buffer: BufferId, range: Range, value: u64) {
        let first_block = range.first / SECTORS;
        for index in 0..blocks_of(range) {
            let bytes = self.process(node).buffers.edit(BufferId(buffer.0 + index));
            bytes.fill(0xee);
            for slot in 0..SECTORS {
                let sector = (first_block + u64::from(index)) * SECTORS + slot;
                if (range.first..range.first + range.count).contains(&sector) {
                    let start = slot as usize * SECTOR_BYTES;
                    fill_sector(
                        &mut bytes[start..start + SECTOR_BYTES],
                        range.volume,
                        sector,
                        value,
                    );
                }
            }
        }
    }

    fn check_read(
        &mut self,
        node: usize,
        range: Range,
        from: &[usize],
        buffer: BufferId,
        outcome: &Outcome,
    ) {
        if *outcome == Outcome::Failed {
            assert!(self.model.is_deleting(range.volume), "a read failed");
            return;
        }
        assert_eq!(*outcome, Outcome::Done, "a read is done or fails");
        let process = self.nodes[node].process.as_ref().expect("it answered");
        for (index, from) in from.iter().enumerate() {
            let sector = range.first + index as u64;
            let block = sector / SECTORS - range.first / SECTORS;
            let bytes = process.buffers.get(BufferId(buffer.0 + block as u32));
            let start = (sector % SECTORS) as usize * SECTOR_BYTES;
            self.model.check_read(range.volume, sector, *from, &bytes[start..start + SECTOR_BYTES]);
        }
    }

    fn check_status(&mut self, range: Range, from: &[usize], outcome: &Outcome) {
        let Outcome::Mapped(bits) = outcome else {
            assert!(self.model.is_deleting(range.volume), "a status request failed");
            return;
        };
        for (index, from) in from.iter().enumerate() {
            let sector = range.first + index as u64;
            let slot = sector / SECTORS % SEGMENT_BLOCKS;
            if bits[(slot / 64) as usize] >> (slot % 64) & 1 == 0 {
                self.model.check_unmapped(range.volume, sector, *from);
            }
        }
    }
}

pub(crate) fn blocks_of(range: Range) -> u32 {
    let end = (range.first + range.count).div_ceil(SECTORS);
    (end - range.first / SECTORS) as u32
}
