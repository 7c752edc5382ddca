//! One shard: the owner of a slice of every volume, of a region of the store, and of one lane to the peer.
//!
//! ```text
//!  request -> staging -> point -> { device, lane }     primary    requests.rs, point.rs, lane.rs
//!                        lane -> follower -> device     secondary  follower.rs
//!                                   map + root + record both       map.rs, map_checkpoint.rs
//! ```
//!
//! Invariants: the map in memory is that of `last`, the newest CP that this shard sealed or applied; no block that
//! the map or a retained CP uses is written (R1); every answer of the device is checked before the next step.

mod follower;
mod lane;
mod map;
mod map_checkpoint;
mod point;
mod requests;
mod staging;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use crate::block_map::{BlockMap, SegmentKey};
use crate::contract::{IoFailure, IoToken, Order, Report, Seal, ShardAction, ShardEvent};
use crate::free_space::FreeSpace;
use crate::geometry::Geometry;
use crate::hash::FastHash;
use crate::journal::Journal;
use crate::message::Role;
use crate::request::Request;
use crate::units::{BufferId, CpNumber, DataBlock, Root, ShardId, StoreId, Term, VolumeId};

use follower::Follower;
use lane::Lane;
pub use map_checkpoint::MapCheckpoint;
use point::Point;
use requests::Group;
use staging::{Key, Stagings};

/// What recovery found of a shard, and all it needs to go on.
#[derive(Debug)]
pub struct ShardImage {
    /// Which store.
    pub store: StoreId,
    /// The store's layout.
    pub geometry: Geometry,
    /// Which shard.
    pub id: ShardId,
    /// The map as of the last committed CP.
    pub map: BlockMap,
    /// What the map and the retained blocks leave free.
    pub free: FreeSpace,
    /// Blocks freed since the base, by CP.
    pub retained: VecDeque<Retained>,
    /// The records since the map checkpoint.
    pub journal: Journal,
    /// The map on the device.
    pub checkpoint: MapCheckpoint,
    /// The last CP in which the shard took part.
    pub last: CpNumber,
    /// What the catalog adds to the root: 0 but for shard 0.
    pub catalog_root: u128,
}

/// Blocks that a CP freed and that an older, still needed CP uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retained {
    /// The CP that freed them.
    pub cp: CpNumber,
    /// The blocks.
    pub blocks: Vec<DataBlock>,
}

/// See the module.
#[derive(Debug)]
pub struct Shard {
    store: StoreId,
    geometry: Geometry,
    id: ShardId,
    term: Term,
    role: Role,
    failed: bool,
    /// The newest CP sealed or applied.
    last: CpNumber,
    committed: CpNumber,
    base: CpNumber,
    /// See [`Order::Committed`].
    claimed: CpNumber,

    map: BlockMap,
    catalog_root: u128,
    free: FreeSpace,
    retained: VecDeque<Retained>,
    /// Released blocks that a read under way may still use, with the token of the first read that cannot.
    limbo: VecDeque<(IoToken, Vec<DataBlock>)>,
    reads: BTreeSet<IoToken>,
    journal: Journal,
    checkpoint: MapCheckpoint,
    volumes: Vec<VolumeId>,
    /// The newest volume ever heard of: ids only grow.
    volume_newest: VolumeId,
    doomed: Vec<VolumeId>,

    stagings: Stagings,
    /// Segments in which blocks are staged.
    segments_staged: HashSet<SegmentKey, FastHash>,
    parked: Vec<Request>,
    /// Writes that found no free block or no room in the map.
    waiting_for_space: Vec<Request>,
    groups: HashMap<u64, Group, FastHash>,
    group_next: u64,
    seals: VecDeque<Seal>,
    points: VecDeque<Point>,
    want_seal_told: bool,

    follower: Follower,
    lane: Option<Lane>,
    session_ending: bool,
    /// The peer broke the protocol: what else it sent is not looked at.
    lane_faulted: bool,
    stuck_told: bool,

    work: HashMap<IoToken, Work, FastHash>,
    io_next: u64,
    settling: bool,
    actions: VecDeque<ShardAction>,
}

/// What an outstanding token is for.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Work {
    /// Data or the record of a sealed or applied CP.
    PointWrite(CpNumber),
    Fill {
        cp: CpNumber,
        key: Key,
        group: u64,
    },
    Read {
        group: u64,
    },
    PostPoint(CpNumber),
    PostBorrowed(Vec<BufferId>),
    PostMessage,
    Verify,
    FollowerWrite {
        cp: CpNumber,
        placement: u64,
    },
    CatchUp,
    Checkpoint,
}

impl Shard {
    /// A shard as recovery found it, a secondary until ordered to lead.
    #[must_use]
    pub fn new(image: ShardImage, term: Term, committed: CpNumber, base: CpNumber) -> Shard {
        Shard {
            store: image.store,
            geometry: image.geometry,
            id: image.id,
            term,
            role: Role::Secondary,
            failed: false,
            last: image.last,
            committed,
            base,
            claimed: committed,
            map: image.map,
            catalog_root: image.catalog_root,
            free: image.free,
            retained: image.retained,
            limbo: VecDeque::new(),
            reads: BTreeSet::new(),
            journal: image.journal,
            checkpoint: image.checkpoint,
            volumes: Vec::new(),
            volume_newest: VolumeId::default(),
            doomed: Vec::new(),
            stagings: Stagings::default(),
            segments_staged: HashSet::with_hasher(FastHash),
            parked: Vec::new(),
            waiting_for_space: Vec::new(),
            groups: HashMap::with_hasher(FastHash),
            group_next: 0,
            seals: VecDeque::new(),
            points: VecDeque::new(),
            want_seal_told: false,
            follower: Follower::default(),
            lane: None,
            session_ending: false,
            lane_faulted: false,
            stuck_told: false,
            work: HashMap::with_hasher(FastHash),
            io_next: 0,
            settling: false,
            actions: VecDeque::new(),
        }
    }

    /// Which shard.
    #[must_use]
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// The root of the map of the newest CP, with the catalog's for shard 0.
    #[must_use]
    pub fn root(&self) -> Root {
        Root(self.map.root().0.wrapping_add(self.catalog_root))
    }

    /// Data blocks that are free now.
    #[must_use]
    pub fn free_blocks(&self) -> u32 {
        self.free.free_blocks()
    }

    /// Data blocks that only older CPs, or reads of them, use.
    #[must_use]
    pub fn retained_blocks(&self) -> u64 {
        let retained = self.retained.iter().map(|retained| retained.blocks.len());
        let limbo = self.limbo.iter().map(|(_, blocks)| blocks.len());
        retained.chain(limbo).sum::<usize>() as u64
    }

    /// Whether nothing is staged, sealed and not written, received and not applied, or otherwise under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let empty = self.stagings.is_empty()
            && self.parked.is_empty()
            && self.waiting_for_space.is_empty()
            && self.seals.is_empty();
        empty && self.points.is_empty() && self.work.is_empty() && self.follower.is_idle()
    }

    /// Bytes of memory that the map takes, and blocks that it maps.
    #[must_use]
    pub fn map_cost(&self) -> (usize, u64) {
        (self.map.memory_bytes(), self.map.mapped_blocks())
    }

    /// Takes an event in. Take actions until there is none afterwards.
    pub fn handle(&mut self, event: ShardEvent<'_>) {
        match event {
            ShardEvent::Request { request, checksums } => self.request(request, checksums),
            ShardEvent::Order(order) => self.order(order),
            ShardEvent::Done { io, result } => self.done(io, result),
            ShardEvent::Read { io, result } => self.read_done(io, result),
            ShardEvent::MetadataRead { io, result } => {
                self.take_work(io);
                self.catch_up_record(result);
            }
            ShardEvent::Filled { io, result } => self.filled(io, result),
            ShardEvent::Borrowed { io, first, count } => {
                self.take_work(io);
                self.catch_up_borrowed(first, count);
            }
            ShardEvent::Posted { io } => self.posted(io),
            ShardEvent::LaneMessage { bytes, placed } => self.lane_message(bytes, placed),
        }
        self.upkeep();
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<ShardAction> {
        self.actions.pop_front()
    }

    /// Cheap and the same after every event: what waited goes on if it can.
    fn upkeep(&mut self) {
        if self.failed {
            return;
        }
        while self.seal_next() {}
        while self.take_held_message() {}
        while self.apply_next() {}
        self.pump_lane();
        self.pump_checkpoint();
        self.end_session_when_idle();
        if self.settling && self.is_settled() {
            self.settling = false;
            self.tell(Report::Settled);
        }
    }

    fn order(&mut self, order: Order) {
        match order {
            Order::Seal(seal) => {
                assert_eq!(self.role, Role::Primary, "only a primary seals");
                self.want_seal_told = false;
                self.seals.push_back(*seal);
            }
            Order::Apply(cp) => self.follower.applies.push_back(cp),
            Order::Committed { committed, base, claimed } => {
                assert!(committed >= self.committed, "commits go forward");
                assert!(base >= self.base && base <= committed, "base {base} of {committed}");
                assert!(claimed >= self.claimed && claimed <= committed, "claims go forward");
                (self.committed, self.base, self.claimed) = (committed, base, claimed);
                self.release();
            }
            Order::LaneUp { lend, lent_blocks, from, root } => {
                self.lane_up(lend, lent_blocks, from, root);
            }
            Order::SessionEnd => self.session_ending = true,
            Order::Catalog(volumes) => {
                self.doomed = self.map.volumes().filter(|v| !volumes.contains(v)).collect();
                self.doomed.sort_unstable();
                self.volume_newest =
                    self.volume_newest.max(volumes.iter().copied().max().unwrap_or_default());
                self.volumes = volumes;
                self.retry_parked();
                if !self.doomed.is_empty() && self.role == Role::Primary {
                    self.tell(Report::WantReap);
                }
            }
            Order::Lead(term) => {
                assert!(self.follower.is_idle(), "a session is still ending");
                (self.role, self.term) = (Role::Primary, term);
            }
            Order::Follow(term) => {
                assert!(self.stagings.is_empty(), "a primary with staged writes cannot follow");
                (self.role, self.term) = (Role::Secondary, term);
            }
            Order::Fail => self.fail(),
            Order::Settle => {
                self.settling = true;
                for request in self.take_parked() {
                    self.refuse(request);
                }
            }
        }
    }

    fn done(&mut self, io: IoToken, result: Result<(), IoFailure>) {
        let work = self.take_work(io);
        if result == Err(IoFailure::Device) {
            self.fail();
            return;
        }
        match work {
            Work::PointWrite(cp) => self.point_written(cp),
            Work::FollowerWrite { cp, placement } => self.follower_written(cp, placement),
            Work::Verify => self.verified(result),
            Work::Checkpoint => self.checkpoint_step_done(),
            other => panic!("{other:?} does not end like this"),
        }
    }

    fn posted(&mut self, io: IoToken) {
        match self.take_work(io) {
            Work::PostPoint(cp) => self.point_posted(cp),
            Work::PostBorrowed(buffers) => self.act(ShardAction::Free(buffers)),
            Work::PostMessage => {}
            other => panic!("{other:?} is no post"),
        }
    }

    /// A failed write or flush is sticky (R9): what the device holds is unknown until recovery has looked.
    fn fail(&mut self) {
        if !self.failed {
            self.failed = true;
            self.tell(Report::Failed);
            for request in self.take_parked() {
                self.refuse(request);
            }
        }
    }

    /// Every request that waits for something.
    fn take_parked(&mut self) -> Vec<Request> {
        let mut requests = std::mem::take(&mut self.parked);
        requests.append(&mut self.waiting_for_space);
        requests
    }

    fn act(&mut self, action: ShardAction) {
        self.actions.push_back(action);
    }

    fn tell(&mut self, report: Report) {
        self.act(ShardAction::Tell(report));
    }

    fn start(&mut self, work: Work) -> IoToken {
        let io = IoToken(self.io_next);
        self.io_next += 1;
        self.work.insert(io, work);
        io
    }

    fn take_work(&mut self, io: IoToken) -> Work {
        self.work.remove(&io).expect("the shell answers only what it was asked, once")
    }

    /// Nothing of the store is in flight, and the map on the device is current if the base allows.
    fn is_settled(&self) -> bool {
        let idle = self.work.is_empty() && self.seals.is_empty() && self.points.is_empty();
        let current = self.checkpoint.cp() == self.last || self.base < self.last;
        idle && current && self.follower.is_idle()
    }
}
