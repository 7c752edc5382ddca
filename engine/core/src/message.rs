//! What the two sides say to each other: hello, lane messages between equal shards, peer messages between coordinators.
//!
//! Formats are in `docs/WIRE_FORMAT.md`. Invariants: every message carries the sender's term (R8); decoding never
//! panics, allocates at most what the limits allow, and refuses bytes left over.

use crate::codec::{Reader, Truncated, Writer};
use crate::geometry::Geometry;
use crate::limits::{HISTORY_MAX, RECORD_BLOCKS_MAX};
use crate::superblock::TermStart;
use crate::units::{
    BLOCK_BYTES, Checksum, CpNumber, DataBlock, Root, SHARDS_MAX, ShardId, StoreId, Term, VolumeId,
};

/// Most blocks of one data message.
pub const DATA_BLOCKS_PER_MESSAGE_MAX: u32 = 256;
/// Most bytes of a record carried by one part message.
pub const PART_BYTES_MAX: usize = 4096;
/// Most segments named when roots differ.
pub const DIVERGED_SEGMENTS_MAX: usize = 100;

/// A message that cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageError;

impl std::fmt::Display for MessageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a message of the peer cannot be read")
    }
}

impl std::error::Error for MessageError {}

impl From<Truncated> for MessageError {
    fn from(_: Truncated) -> MessageError {
        MessageError
    }
}

/// What a side is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Takes writes.
    Primary,
    /// Follows a primary.
    Secondary,
}

/// What a side says of itself when a session begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// What it is.
    pub role: Role,
    /// Which store.
    pub store: StoreId,
    /// The store's layout.
    pub geometry: Geometry,
    /// Its term.
    pub term: Term,
    /// When each term began.
    pub history: Vec<TermStart>,
    /// Of a secondary: the last CP committed there. Of a primary: the last one sealed in this run, or recovered.
    pub last: CpNumber,
    /// Of a primary: the oldest CP from which a secondary can go on. Of a secondary: the last CP it was told is
    /// committed on the primary.
    pub base: CpNumber,
    /// Each shard's root at the last CP committed there.
    pub roots: Vec<Root>,
}

/// A message between equal shards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LaneMessage {
    /// A write command: these blocks, placed before this message.
    Data {
        /// The sender's term.
        term: Term,
        /// The CP it belongs to.
        cp: CpNumber,
        /// Committed on both sides: blocks freed until then may be written.
        base: CpNumber,
        /// First block in the shard's data zone.
        first: DataBlock,
        /// One for each block.
        checksums: Vec<Checksum>,
    },
    /// A piece of a CP's record, in order; the CP's data came before.
    Part {
        /// The sender's term.
        term: Term,
        /// Which CP.
        cp: CpNumber,
        /// Bytes of the whole record.
        total: u32,
        /// This piece.
        bytes: Vec<u8>,
    },
    /// From the secondary: so many placements, oldest first, are free again.
    Credit {
        /// The sender's term.
        term: Term,
        /// How many.
        placements: u32,
    },
}

/// A message between coordinators.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerMessage {
    /// From the secondary: how far it is.
    Progress {
        /// The sender's term.
        term: Term,
        /// Whole in memory and proved equal, up to here.
        received: CpNumber,
        /// Durable, up to here.
        durable: CpNumber,
    },
    /// From the primary: how far CPs are committed.
    Committed {
        /// The sender's term.
        term: Term,
        /// On the primary.
        committed: CpNumber,
        /// On both sides.
        base: CpNumber,
    },
    /// Nothing to say, and alive.
    Heartbeat {
        /// The sender's term.
        term: Term,
    },
    /// From the secondary: its root differs.
    Diverged {
        /// The sender's term.
        term: Term,
        /// Which CP.
        cp: CpNumber,
        /// Which shard.
        shard: ShardId,
        /// Touched segments with the secondary's hash.
        segments: Vec<(VolumeId, u64, Root)>,
    },
}

impl Hello {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.put_u8(match self.role {
            Role::Primary => 1,
            Role::Secondary => 2,
        });
        writer.put_bytes(&self.store.0);
        writer.put_u16(self.geometry.shards);
        writer.put_u64(self.geometry.region_blocks);
        writer.put_u32(self.geometry.journal_blocks);
        writer.put_u32(self.geometry.map_slots);
        writer.put_u32(self.geometry.directory_blocks);
        writer.put_u64(self.term.0);
        writer.put_u64(self.last.0);
        writer.put_u64(self.base.0);
        writer.put_u16(self.history.len() as u16);
        for start in &self.history {
            writer.put_u64(start.term.0);
            writer.put_u64(start.first.0);
        }
        writer.put_u16(self.roots.len() as u16);
        for root in &self.roots {
            writer.put_u128(root.0);
        }
        writer.finish()
    }

    /// Reads a hello. Says nothing about whether it fits this store: see [`crate::session::judge`].
    ///
    /// # Errors
    /// If the bytes are not a hello.
    pub fn decode(bytes: &[u8]) -> Result<Hello, MessageError> {
        let mut reader = Reader::new(bytes);
        let role = match reader.get_u8()? {
            1 => Role::Primary,
            2 => Role::Secondary,
            _ => return Err(MessageError),
        };
        let store = StoreId(reader.get_bytes(16)?.try_into().map_err(|_| MessageError)?);
        let geometry = Geometry {
            shards: reader.get_u16()?,
            region_blocks: reader.get_u64()?,
            journal_blocks: reader.get_u32()?,
            map_slots: reader.get_u32()?,
            directory_blocks: reader.get_u32()?,
        };
        let term = Term(reader.get_u64()?);
        let last = CpNumber(reader.get_u64()?);
        let base = CpNumber(reader.get_u64()?);
        let terms = usize::from(reader.get_u16()?);
        if terms > HISTORY_MAX {
            return Err(MessageError);
        }
        let mut history = Vec::with_capacity(terms);
        for _ in 0..terms {
            history.push(TermStart {
                term: Term(reader.get_u64()?),
                first: CpNumber(reader.get_u64()?),
            });
        }
        let count = usize::from(reader.get_u16()?);
        if count > usize::from(SHARDS_MAX) {
            return Err(MessageError);
        }
        let mut roots = Vec::with_capacity(count);
        for _ in 0..count {
            roots.push(Root(reader.get_u128()?));
        }
        end(&reader)?;
        Ok(Hello { role, store, geometry, term, history, last, base, roots })
    }
}

impl LaneMessage {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        match self {
            LaneMessage::Data { term, cp, base, first, checksums } => {
                writer.put_u8(1);
                writer.put_u64(term.0);
                writer.put_u64(cp.0);
                writer.put_u64(base.0);
                writer.put_u32(first.0);
                writer.put_u16(checksums.len() as u16);
                for checksum in checksums {
                    writer.put_u32(checksum.0);
                }
            }
            LaneMessage::Part { term, cp, total, bytes } => {
                writer.put_u8(2);
                writer.put_u64(term.0);
                writer.put_u64(cp.0);
                writer.put_u32(*total);
                writer.put_bytes(bytes);
            }
            LaneMessage::Credit { term, placements } => {
                writer.put_u8(3);
                writer.put_u64(term.0);
                writer.put_u32(*placements);
            }
        }
        writer.finish()
    }

    /// Whether encoded bytes are a piece of a record.
    #[must_use]
    pub fn is_part(bytes: &[u8]) -> bool {
        bytes.first() == Some(&2)
    }

    /// Reads a lane message.
    ///
    /// # Errors
    /// If the bytes are not one.
    pub fn decode(bytes: &[u8]) -> Result<LaneMessage, MessageError> {
        let mut reader = Reader::new(bytes);
        let kind = reader.get_u8()?;
        let term = Term(reader.get_u64()?);
        let message = match kind {
            1 => {
                let cp = CpNumber(reader.get_u64()?);
                let base = CpNumber(reader.get_u64()?);
                let first = DataBlock(reader.get_u32()?);
                let count = reader.get_u16()?;
                if count == 0 || u32::from(count) > DATA_BLOCKS_PER_MESSAGE_MAX {
                    return Err(MessageError);
                }
                let mut checksums = Vec::with_capacity(usize::from(count));
                for _ in 0..count {
                    checksums.push(Checksum(reader.get_u32()?));
                }
                LaneMessage::Data { term, cp, base, first, checksums }
            }
            2 => {
                let cp = CpNumber(reader.get_u64()?);
                let total = reader.get_u32()?;
                let length = reader.remaining();
                if length == 0
                    || length > PART_BYTES_MAX
                    || total as usize > RECORD_BLOCKS_MAX as usize * BLOCK_BYTES
                {
                    return Err(MessageError);
                }
                LaneMessage::Part { term, cp, total, bytes: reader.get_bytes(length)?.to_vec() }
            }
            3 => LaneMessage::Credit { term, placements: reader.get_u32()? },
            _ => return Err(MessageError),
        };
        end(&reader)?;
        Ok(message)
    }
}

impl PeerMessage {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        match self {
            PeerMessage::Progress { term, received, durable } => {
                writer.put_u8(1);
                writer.put_u64(term.0);
                writer.put_u64(received.0);
                writer.put_u64(durable.0);
            }
            PeerMessage::Committed { term, committed, base } => {
                writer.put_u8(2);
                writer.put_u64(term.0);
                writer.put_u64(committed.0);
                writer.put_u64(base.0);
            }
            PeerMessage::Heartbeat { term } => {
                writer.put_u8(3);
                writer.put_u64(term.0);
            }
            PeerMessage::Diverged { term, cp, shard, segments } => {
                writer.put_u8(4);
                writer.put_u64(term.0);
                writer.put_u64(cp.0);
                writer.put_u16(shard.0);
                writer.put_u16(segments.len() as u16);
                for (volume, segment, root) in segments {
                    writer.put_u32(volume.0);
                    writer.put_u64(*segment);
                    writer.put_u128(root.0);
                }
            }
        }
        writer.finish()
    }

    /// Reads a coordinator's message.
    ///
    /// # Errors
    /// If the bytes are not one.
    pub fn decode(bytes: &[u8]) -> Result<PeerMessage, MessageError> {
        let mut reader = Reader::new(bytes);
        let kind = reader.get_u8()?;
        let term = Term(reader.get_u64()?);
        let message = match kind {
            1 => {
                let received = CpNumber(reader.get_u64()?);
                PeerMessage::Progress { term, received, durable: CpNumber(reader.get_u64()?) }
            }
            2 => {
                let committed = CpNumber(reader.get_u64()?);
                PeerMessage::Committed { term, committed, base: CpNumber(reader.get_u64()?) }
            }
            3 => PeerMessage::Heartbeat { term },
            4 => {
                let cp = CpNumber(reader.get_u64()?);
                let shard = ShardId(reader.get_u16()?);
                let count = usize::from(reader.get_u16()?);
                if count > DIVERGED_SEGMENTS_MAX || shard.0 >= SHARDS_MAX {
                    return Err(MessageError);
                }
                let mut segments = Vec::with_capacity(count);
                for _ in 0..count {
                    let volume = VolumeId(reader.get_u32()?);
                    let segment = reader.get_u64()?;
                    segments.push((volume, segment, Root(reader.get_u128()?)));
                }
                PeerMessage::Diverged { term, cp, shard, segments }
            }
            _ => return Err(MessageError),
        };
        end(&reader)?;
        Ok(message)
    }
}

fn end(reader: &Reader<'_>) -> Result<(), MessageError> {
    if reader.remaining() == 0 { Ok(()) } else { Err(MessageError) }
}
