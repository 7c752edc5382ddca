//! The contract between the core and its shell: all that goes in, all that comes out.
//!
//! Two machines make a node: one [`crate::shard::Shard`] for every shard and one
//! [`crate::coordinator::Coordinator`]. The shell (threads and io_uring, or the simulator) feeds each with
//! `handle(now, event)` and then takes actions until there is none. Orders and reports between the two machines
//! pass through the shell, in order for each pair of machines.
//!
//! Invariants: user data never enters the core, only buffer ids, lengths and checksums. Actions are carried out in
//! the order they were given; a copy or a zeroing is done at once, all other work is answered by an event that
//! carries the [`IoToken`]. A buffer named by an action stays untouched by the core until that event.

use crate::catalog::Catalog;
use crate::message::Hello;
use crate::request::{Answer, Request, Tag};
use crate::units::{
    BufferId, Checksum, CpNumber, DeviceBlock, Root, ShardId, ShardSet, StoreId, VolumeId,
};

/// Names one piece of work that the shell does for a machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct IoToken(pub u64);

/// Why a piece of device work did not succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoFailure {
    /// The device answered with an error. Sticky: nothing goes on until the store is opened again (R9).
    Device,
    /// The bytes do not match their checksum (R10).
    Checksum,
}

/// What happens to a shard.
#[derive(Debug)]
pub enum ShardEvent<'a> {
    /// A frontend's request; of a write, with the checksums of its whole blocks.
    Request {
        /// The request.
        request: Request,
        /// One for each block of a write; empty otherwise.
        checksums: &'a [Checksum],
    },
    /// The coordinator's order.
    Order(Order),
    /// A write, a flush or a check of buffers ended.
    Done {
        /// The action's token.
        io: IoToken,
        /// What came of it.
        result: Result<(), IoFailure>,
    },
    /// A data read ended: every block matched its checksum, or not.
    Read {
        /// The action's token.
        io: IoToken,
        /// What came of it.
        result: Result<(), IoFailure>,
    },
    /// A metadata read ended.
    MetadataRead {
        /// The action's token.
        io: IoToken,
        /// The bytes read.
        result: Result<Vec<u8>, IoFailure>,
    },
    /// A fill ended: the block is whole and has this checksum.
    Filled {
        /// The action's token.
        io: IoToken,
        /// The whole block's checksum.
        result: Result<Checksum, IoFailure>,
    },
    /// Consecutive buffers asked for by [`ShardAction::Borrow`]: fewer than asked when memory is short, never none.
    Borrowed {
        /// The action's token.
        io: IoToken,
        /// The first buffer, now the shard's.
        first: BufferId,
        /// How many.
        count: u32,
    },
    /// The lane's wire took all bytes of a post, or the lane is gone and no longer needs them.
    Posted {
        /// The action's token.
        io: IoToken,
    },
    /// The peer's shard sent a message; bytes placed before it lie in `placed` consecutive buffers.
    LaneMessage {
        /// The message.
        bytes: &'a [u8],
        /// First buffer and number of buffers of the placed bytes.
        placed: Option<(BufferId, u32)>,
    },
}

/// What a shard wants done.
#[derive(Debug)]
pub enum ShardAction {
    /// Answer a frontend.
    Answer(Answer),
    /// Admit the request again, with a new stamp: it waited for something that has come.
    Readmit(Request),
    /// Write buffers to consecutive blocks of the store.
    WriteData {
        /// Answered by [`ShardEvent::Done`].
        io: IoToken,
        /// First block.
        block: DeviceBlock,
        /// One buffer for each block.
        buffers: Vec<BufferId>,
    },
    /// Check buffers against their checksums.
    Verify {
        /// Answered by [`ShardEvent::Done`].
        io: IoToken,
        /// First of consecutive buffers, one for each checksum.
        buffer: BufferId,
        /// What the buffers must hold.
        checksums: Vec<Checksum>,
    },
    /// Write a structure of whole blocks.
    WriteMetadata {
        /// Answered by [`ShardEvent::Done`].
        io: IoToken,
        /// First block.
        block: DeviceBlock,
        /// A multiple of 4096 bytes.
        bytes: Vec<u8>,
    },
    /// Read blocks into consecutive buffers and check them.
    ReadData {
        /// Answered by [`ShardEvent::Read`].
        io: IoToken,
        /// First block.
        block: DeviceBlock,
        /// First of consecutive buffers, one for each checksum.
        buffer: BufferId,
        /// What the blocks must hold.
        checksums: Vec<Checksum>,
    },
    /// Read a structure of whole blocks.
    ReadMetadata {
        /// Answered by [`ShardEvent::MetadataRead`].
        io: IoToken,
        /// First block.
        block: DeviceBlock,
        /// How many blocks.
        count: u32,
    },
    /// Make every earlier answered write of this shard durable.
    Flush {
        /// Answered by [`ShardEvent::Done`].
        io: IoToken,
    },
    /// Complete a partial block: bytes outside `keep` come from `source`.
    Fill {
        /// Answered by [`ShardEvent::Filled`].
        io: IoToken,
        /// The block's buffer.
        buffer: BufferId,
        /// The bytes of the buffer that stay.
        keep: std::ops::Range<usize>,
        /// Where the others come from.
        source: FillSource,
    },
    /// Copy a whole block between buffers.
    Copy {
        /// From here.
        from: BufferId,
        /// To here.
        to: BufferId,
    },
    /// Zero a whole buffer.
    Zero {
        /// This one.
        buffer: BufferId,
    },
    /// Consecutive buffers wanted for reads of the shard's own: any number from one to `want`.
    Borrow {
        /// Answered by [`ShardEvent::Borrowed`].
        io: IoToken,
        /// How many at most.
        want: u32,
    },
    /// The shard no longer needs these buffers.
    Free(Vec<BufferId>),
    /// Send a message on the lane, after placing buffers at a block of the peer's lent memory.
    Post {
        /// Answered by [`ShardEvent::Posted`].
        io: IoToken,
        /// The message.
        message: Vec<u8>,
        /// The buffers, and where they go: a block's index in the lent memory.
        placement: Option<(Vec<BufferId>, u32)>,
    },
    /// Close the lane: the peer broke the protocol or a block did not match.
    CloseLane(LaneFault),
    /// Tell the coordinator.
    Tell(Report),
}

/// Where the missing bytes of a partial block come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FillSource {
    /// The block was unmapped.
    Zero,
    /// A newer version is still in memory.
    Buffer(BufferId),
    /// The store holds it.
    Device(DeviceBlock, Checksum),
}

/// What the peer's shard did wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LaneFault {
    /// A message that cannot be read or makes no sense now.
    Protocol(&'static str),
    /// Placed bytes do not match their checksums.
    Checksum,
}

/// What the coordinator wants of a shard.
#[derive(Clone, Debug)]
pub enum Order {
    /// Primary: take all that is staged with this number or a lower one, and write and send it.
    Seal(Box<Seal>),
    /// Secondary: the CP is whole in memory; update the map, check the root, write the record.
    Apply(CpNumber),
    /// The CP and all before it are committed here, `base` and all before it on both sides, unless it was given up.
    Committed {
        /// Committed here.
        committed: CpNumber,
        /// Blocks freed at or before this CP are free, if that is claimed.
        base: CpNumber,
        /// The newest CP that a durable structure of this store calls committed.
        claimed: CpNumber,
    },
    /// The lane is there: the peer lends `lent_blocks` of memory and has applied CP `from`, with this root.
    LaneUp {
        /// First of the buffers that we lend to the peer, and how many: empty on a primary.
        lend: (BufferId, u32),
        /// How many blocks the peer lends us: 0 on a secondary.
        lent_blocks: u32,
        /// The last CP that the peer's shard applied.
        from: CpNumber,
        /// The root of the peer's shard there.
        root: Root,
    },
    /// The peer is gone: forget what was received and not applied.
    SessionEnd,
    /// These volumes exist; blocks of any other are to be freed.
    Catalog(Vec<VolumeId>),
    /// Act as primary from now on, in this term.
    Lead(crate::units::Term),
    /// Follow a primary of this term.
    Follow(crate::units::Term),
    /// The store has failed: answer every request so.
    Fail,
    /// Write a map checkpoint as soon as it can be: the node is about to stop.
    Settle,
}

/// The order to seal one CP.
#[derive(Clone, Debug)]
pub struct Seal {
    /// Its number.
    pub cp: CpNumber,
    /// Every shard that takes part.
    pub participants: ShardSet,
    /// The name, for shard 0 and for a named CP.
    pub name: Option<String>,
    /// The catalog, for shard 0 and when it changed.
    pub catalog: Option<Catalog>,
}

/// What a shard tells the coordinator.
#[derive(Clone, Debug)]
pub enum Report {
    /// Primary: the CP's part is sealed; its root and size.
    Sealed {
        /// Which CP.
        cp: CpNumber,
        /// The shard's root after it.
        root: Root,
        /// Bytes of changed blocks.
        data_bytes: u64,
        /// Bytes of the record as sent on the wire.
        delta_bytes: u64,
    },
    /// All writes of the CP's part have been answered by the device; a flush makes them durable.
    Written {
        /// Which CP.
        cp: CpNumber,
    },
    /// Secondary: the shard's record and all its data have arrived.
    Arrived {
        /// Which CP.
        cp: CpNumber,
        /// Who takes part.
        participants: ShardSet,
        /// Committed on the primary, as the record says.
        committed: CpNumber,
        /// Committed on both sides, as the record says.
        base: CpNumber,
        /// The catalog, if it changed.
        catalog: Option<Catalog>,
    },
    /// Secondary: the map is updated and its root equals the record's.
    Applied {
        /// Which CP.
        cp: CpNumber,
        /// The shard's root after it.
        root: Root,
    },
    /// The root differs (R6).
    Diverged {
        /// Which CP.
        cp: CpNumber,
        /// Touched segments with this side's hash: volume, segment, hash.
        segments: Vec<(VolumeId, u64, Root)>,
    },
    /// Seal soon: enough is staged, or a writer waits for space that a commit frees.
    WantSeal,
    /// Seal soon, with this shard: it has blocks of deleted volumes to free.
    WantReap,
    /// Journal or free space is held by the base only, until that is at least this CP (R7).
    HeldByBase(CpNumber),
    /// Free space is held only because nothing durable calls the CPs committed that freed it.
    HeldByClaim,
    /// Secondary: CPs ordered to be applied have no room in the journal, and after the session none will come.
    Stuck,
    /// The lane reached the newest sealed CP.
    CaughtUp,
    /// The device failed.
    Failed,
    /// Nothing of the ended session is left: another may begin.
    SessionEnded,
    /// Nothing is in flight, and the map on the device is that of the last committed CP.
    Settled,
}

/// What happens to the coordinator.
#[derive(Debug)]
pub enum CoordinatorEvent {
    /// A client asks that all that was answered so far be kept.
    Flush(Tag),
    /// The gate was closed at the CP's number and no admission is under way.
    Quiesced {
        /// The number that was open.
        cp: CpNumber,
        /// Shards that have requests with this number.
        participants: ShardSet,
    },
    /// A shard's report.
    Report(ShardId, Report),
    /// A flush or a superblock write ended.
    Done {
        /// The action's token.
        io: IoToken,
        /// What came of it.
        result: Result<(), IoFailure>,
    },
    /// An operator's command.
    Command(Ticket, Command),
    /// Secondary: an authenticated primary says hello.
    PeerHello(Ticket, Box<Hello>),
    /// The control wire is there, and all lanes.
    PeerUp(Box<PeerSession>),
    /// A message of the peer's coordinator.
    PeerMessage(Vec<u8>),
    /// The control wire or a lane is gone.
    PeerDown(String),
    /// Time passed.
    Tick,
}

/// A session that both sides agreed on.
#[derive(Clone, Debug)]
pub struct PeerSession {
    /// What the peer said of itself.
    pub hello: Hello,
    /// For each shard: the buffers that we lend, and how many blocks the peer lends.
    pub lanes: Vec<((BufferId, u32), u32)>,
}

/// Names an operator's command until its reply.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ticket(pub u64);

/// What an operator can ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Seal a CP by name.
    Checkpoint(Option<String>),
    /// Create a thin volume.
    VolumeCreate {
        /// Its name.
        name: String,
        /// Its size in bytes.
        size_bytes: u64,
    },
    /// Delete a volume that nobody uses.
    VolumeDelete {
        /// Its name.
        name: String,
    },
    /// Take over as primary, in a new term.
    Promote {
        /// Even though the primary is connected.
        force: bool,
    },
    /// Secondary: drop the branch of this name, and go back to where it began.
    BranchDrop {
        /// Its name.
        name: String,
    },
    /// What this side would say to a peer now.
    Hello,
    /// Primary: may a secondary that said this follow us?
    Judge(Box<Hello>),
    /// Stop: commit what is staged, then settle.
    Stop,
}

/// What a command came to.
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// A checkpoint: the CP that holds it and the store's root.
    Checkpoint(CpNumber, Root),
    /// The volume's id.
    Volume(VolumeId),
    /// The new term, and the last CP before it with the store's root.
    Promoted(crate::units::Term, CpNumber, Root),
    /// The branch is dropped; the store goes back to this CP.
    BranchDropped(CpNumber),
    /// What this side says of itself.
    Hello(Box<Hello>),
    /// The secondary is accepted, from this CP on.
    Accepted(CpNumber),
    /// Committed and settled.
    Stopped,
    /// Not done, and why.
    Refused(Refusal),
}

/// Why a command or a peer was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The command is for a primary.
    NotPrimary,
    /// The command is for a secondary.
    NotSecondary,
    /// The catalog cannot do it.
    Catalog(crate::catalog::CatalogError),
    /// Clients use the volume.
    VolumeInUse,
    /// The primary is connected.
    PrimaryConnected,
    /// The store has failed; see the log.
    StoreFailed,
    /// The node is stopping.
    Stopping,
    /// A checkpoint's name is empty, too long, or has odd characters.
    BadName,
    /// Two stores with different identities.
    OtherStore(StoreId, StoreId),
    /// Same identity, different geometry.
    OtherGeometry,
    /// Both sides are primaries, or both secondaries.
    SameRole,
    /// The speaker's term is lower.
    StaleTerm {
        /// What the speaker said.
        theirs: u64,
        /// What this side knows.
        ours: u64,
    },
    /// The secondary has CPs of an older term that this primary does not have.
    Branch {
        /// The last common CP.
        common: CpNumber,
        /// The last CP of the secondary.
        theirs: CpNumber,
    },
    /// A promotion of a store that knows of a newer term.
    NewerTerm(crate::units::Term),
    /// The store has no branch of that name.
    NoSuchBranch,
    /// The branch cannot be dropped in place: blocks from before it are in use again, as the base was given up.
    BranchHasNoBase {
        /// Where the branch began.
        common: CpNumber,
        /// From which CP on blocks were kept.
        base: CpNumber,
    },
    /// The secondary knows of committed CPs that this primary lost.
    PrimaryLostPoints {
        /// The last CP that the secondary was told is committed.
        told: CpNumber,
        /// The last CP of the primary.
        ours: CpNumber,
    },
    /// The secondary lacks CPs that this primary no longer holds.
    TooFarBehind {
        /// The last CP of the secondary.
        theirs: CpNumber,
        /// The oldest CP from which this primary can go on.
        base: CpNumber,
    },
    /// Same CP, different root: replication stops (R6).
    RootDiffers(CpNumber),
    /// The secondary is ahead and has to go back to this CP first, by a restart of its shards.
    Rewind(CpNumber),
    /// The peers' histories have no common start.
    NoCommonHistory,
    /// The last session with the peer has not ended yet: try again.
    SessionEnding,
}

/// What the coordinator wants done.
#[derive(Debug)]
pub enum CoordinatorAction {
    /// Close the gate; answered by [`CoordinatorEvent::Quiesced`].
    CloseGate,
    /// Give a shard an order.
    Order(ShardId, Order),
    /// Make every answered write of the store durable.
    Flush {
        /// Answered by [`CoordinatorEvent::Done`].
        io: IoToken,
    },
    /// Write a superblock copy.
    WriteMetadata {
        /// Answered by [`CoordinatorEvent::Done`].
        io: IoToken,
        /// The block.
        block: DeviceBlock,
        /// 4096 bytes.
        bytes: Vec<u8>,
    },
    /// Answer a client's flush.
    AnswerFlush(Tag, bool),
    /// Reply to an operator.
    Reply(Ticket, Reply),
    /// Send a message to the peer's coordinator.
    PeerPost(Vec<u8>),
    /// End the session with the peer.
    ClosePeer(String),
    /// Writers wait from now on, or no longer.
    Hold(bool),
    /// Admit requests, with this number first.
    OpenGate(CpNumber),
    /// A CP was committed here: how long its phases took, in nanoseconds since its seal.
    Timing {
        /// Until all shards' writes were answered.
        written_ns: u64,
        /// Until the flush was answered.
        durable_ns: u64,
    },
    /// A CP was confirmed by the secondary.
    Confirmed {
        /// Nanoseconds since its seal.
        confirmed_ns: u64,
    },
    /// Open the store anew, as of this CP or an earlier one: later ones were never told to anybody.
    Restart(CpNumber),
    /// The volumes that frontends may offer: none unless this side is primary.
    Publish(Catalog, bool),
    /// Something an operator should read.
    Log(String),
}
