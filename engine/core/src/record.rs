//! A record: one shard's part of a consistency point.
//!
//! Step 5 of the flow. It lies in the shard's journal ring, and travels to the peer without what
//! is known there from the write commands (data runs, checksums) or is each side's own matter
//! (sequence, chain).
//!
//! ```text
//! head (192 bytes) | name | catalog | delta | data runs | checksums | zeroes to a whole block
//! ```
//!
//! Invariants: mapped blocks, blocks of the runs and checksums are equally many and in one order;
//! the runs do not overlap; the shard is one of the participants; base <= committed < cp; the
//! head has its own checksum, so a damaged length is never followed; a record has one encoding.

pub use crate::data_run::DataRun;

use crate::catalog::Catalog;
use crate::codec::{
    FormatError, FormatErrorKind, Reader, Writer, check_sealed, seal, structure_checksum,
};
use crate::data_run::{check_runs, decode_runs, encode_runs};
use crate::delta::{Delta, DeltaError, DeltaLimits};
use crate::limits::{
    CATALOG_BYTES_MAX, CHECKPOINT_NAME_BYTES_MAX, DELTA_BYTES_MAX, RECORD_BLOCKS_MAX,
    RECORD_MAPPED_MAX,
};
use crate::units::{
    BLOCK_BYTES, Checksum, CpNumber, Root, SHARDS_MAX, ShardId, ShardSet, StoreId, Term,
};
use std::fmt;

/// First bytes of a record in a journal.
pub const RECORD_MAGIC: [u8; 8] = *b"TWPTRECD";
/// First bytes of a record on the wire.
pub const RECORD_WIRE_MAGIC: [u8; 8] = *b"TWPTRECW";
/// Version of both encodings.
pub const RECORD_VERSION: u16 = 1;
/// Bytes of the head.
pub const RECORD_HEAD_BYTES: usize = 192;
/// Where the checksum of the body lies, all behind the head but the zeroes at the end.
pub const RECORD_BODY_CHECKSUM_OFFSET: usize = 176;
/// Where the head's checksum lies. It covers the body's, and so is the record's.
pub const RECORD_CHECKSUM_OFFSET: usize = 184;

const _: () = assert!(RECORD_CHECKSUM_OFFSET + 8 == RECORD_HEAD_BYTES);
const _: () = assert!(RECORD_HEAD_BYTES <= BLOCK_BYTES);

/// One shard's part of a consistency point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// The store.
    pub store: StoreId,
    /// The shard.
    pub shard: ShardId,
    /// The primary's term.
    pub term: Term,
    /// The consistency point.
    pub cp: CpNumber,
    /// The shards that have a record of this point.
    pub participants: ShardSet,
    /// Known to be committed locally when this was written.
    pub committed: CpNumber,
    /// Known to be committed on both sides when this was written.
    pub base: CpNumber,
    /// The shard's root before; of shard 0 with the catalog.
    pub root_before: Root,
    /// The shard's root after.
    pub root_after: Root,
    /// The record's number in this shard's journal, without gaps. 0 on the wire.
    pub sequence: u64,
    /// The checksum of the record before. 0 on the wire.
    pub previous: u64,
    /// The name of a checkpoint that a host asked for.
    pub name: Option<String>,
    /// The whole catalog, if it changed.
    pub catalog: Option<Catalog>,
    /// The changed blocks.
    pub delta: Delta,
    /// The i-th mapped block of the delta lies in the i-th block of the runs. Empty on the wire.
    pub runs: Vec<DataRun>,
    /// The i-th mapped block's checksum. Empty on the wire.
    pub checksums: Vec<Checksum>,
}

/// Why bytes are no record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordError {
    /// The head or a part of the body is damaged or impossible.
    Format(FormatError),
    /// The delta is impossible.
    Delta(DeltaError),
    /// A data run is empty, beyond the largest data zone, or overlaps another.
    Run(DataRun),
    /// Mapped blocks, data blocks and checksums are not equally many.
    Counts {
        /// Mapped blocks of the delta.
        mapped: u64,
        /// Blocks of the data runs.
        data: u64,
        /// Checksums.
        checksums: u64,
    },
}

impl From<FormatError> for RecordError {
    fn from(error: FormatError) -> RecordError {
        RecordError::Format(error)
    }
}

impl From<DeltaError> for RecordError {
    fn from(error: DeltaError) -> RecordError {
        RecordError::Delta(error)
    }
}

impl From<crate::codec::Truncated> for RecordError {
    fn from(error: crate::codec::Truncated) -> RecordError {
        RecordError::Format(error.into())
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordError::Format(error) => write!(f, "record: {error}"),
            RecordError::Delta(error) => write!(f, "record's delta: {error}"),
            RecordError::Run(run) => {
                write!(f, "record: impossible data run {}+{}", run.first, run.count)
            }
            RecordError::Counts { mapped, data, checksums } => write!(
                f,
                "record: {mapped} mapped blocks, {data} data blocks, {checksums} checksums"
            ),
        }
    }
}

impl std::error::Error for RecordError {}

impl Record {
    /// The record for the journal, in whole blocks.
    ///
    /// # Panics
    /// If the invariants of this module do not hold, or a limit is exceeded.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        if let Err(error) = self.check() {
            panic!("a record to encode has {error}");
        }
        self.write(Form::Journal)
    }

    /// Reads a record of the journal from exactly its blocks.
    ///
    /// # Errors
    /// If the bytes are not what [`Record::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Record, RecordError> {
        Record::read(bytes, Form::Journal)
    }

    /// The record for the peer.
    ///
    /// # Panics
    /// As [`Record::encode`].
    #[must_use]
    pub fn encode_wire(&self) -> Vec<u8> {
        if let Err(error) = self.check_head().and_then(|()| self.check_delta()) {
            panic!("a record to send has {error}");
        }
        self.write(Form::Wire)
    }

    /// Reads a record from the peer: data runs and checksums are empty, sequence and previous 0.
    ///
    /// # Errors
    /// If the bytes are not what [`Record::encode_wire`] makes.
    pub fn decode_wire(bytes: &[u8]) -> Result<Record, RecordError> {
        Record::read(bytes, Form::Wire)
    }

    /// The checksum of an encoded record: what the next record's `previous` must be.
    ///
    /// # Panics
    /// If the bytes are shorter than a head.
    #[must_use]
    pub fn checksum(encoded: &[u8]) -> u64 {
        let mut reader = Reader::new(&encoded[RECORD_CHECKSUM_OFFSET..]);
        reader.get_u64().expect("an encoded record is longer than its head")
    }

    /// Checks all invariants of a record for the journal.
    ///
    /// # Errors
    /// The first that does not hold.
    pub fn check(&self) -> Result<(), RecordError> {
        self.check_head()?;
        self.check_delta()?;
        self.check_counts()?;
        check_runs(&self.runs).map_err(RecordError::Run)
    }

    fn check_head(&self) -> Result<(), RecordError> {
        let field = |offset| Err(FormatError::new(FormatErrorKind::Field, offset).into());
        if self.shard.0 >= SHARDS_MAX || !self.participants.contains(self.shard) {
            return field(10);
        }
        if self.committed >= self.cp {
            return field(56);
        }
        if self.base > self.committed {
            return field(64);
        }
        if self.name.as_ref().is_some_and(|name| !is_checkpoint_name(name)) {
            return field(RECORD_HEAD_BYTES);
        }
        Ok(())
    }

    fn check_delta(&self) -> Result<(), RecordError> {
        Ok(self.delta.check(DeltaLimits::RECORD)?)
    }

    fn check_counts(&self) -> Result<(), RecordError> {
        let mapped = self.delta.mapped_count();
        let data = self.runs.iter().map(|run| u64::from(run.count)).sum();
        let checksums = self.checksums.len() as u64;
        if mapped != data || mapped != checksums {
            return Err(RecordError::Counts { mapped, data, checksums });
        }
        Ok(())
    }

    fn write(&self, form: Form) -> Vec<u8> {
        let name = self.name.as_deref().unwrap_or_default().as_bytes();
        let catalog = self.catalog.as_ref().map(Catalog::encode).unwrap_or_default();
        let delta = self.delta.encode();
        let local = form == Form::Journal;
        let runs = if local { encode_runs(&self.runs) } else { Vec::new() };
        let checksums: &[Checksum] = if local { &self.checksums } else { &[] };
        let lengths = Lengths {
            name: name.len() as u32,
            catalog: catalog.len() as u32,
            delta: delta.len() as u32,
            run_count: if local { self.runs.len() as u32 } else { 0 },
            runs: runs.len() as u32,
            checksum_count: checksums.len() as u32,
        };
        let total = RECORD_HEAD_BYTES + lengths.body_bytes();
        let blocks = total.div_ceil(BLOCK_BYTES) as u32;
        assert!(blocks <= RECORD_BLOCKS_MAX, "a record of {blocks} blocks");
        let mut writer = Writer::with_capacity(blocks as usize * BLOCK_BYTES);
        self.write_head(&mut writer, form, lengths, if local { blocks } else { 0 });
        writer.put_bytes(name);
        writer.put_bytes(&catalog);
        writer.put_bytes(&delta);
        writer.put_bytes(&runs);
        checksums.iter().for_each(|checksum| writer.put_u32(checksum.0));
        assert_eq!(writer.position(), total);
        if local {
            writer.pad_to_multiple(BLOCK_BYTES);
        }
        let mut bytes = writer.finish();
        let body = structure_checksum(&bytes[RECORD_HEAD_BYTES..total]);
        bytes[RECORD_BODY_CHECKSUM_OFFSET..][..8].copy_from_slice(&body.to_le_bytes());
        seal(&mut bytes[..RECORD_HEAD_BYTES], RECORD_CHECKSUM_OFFSET);
        bytes
    }

    fn write_head(&self, writer: &mut Writer, form: Form, lengths: Lengths, blocks: u32) {
        let local = form == Form::Journal;
        writer.put_bytes(&form.magic());
        writer.put_u16(RECORD_VERSION);
        writer.put_u16(self.shard.0);
        writer.put_u32(blocks);
        writer.put_bytes(&self.store.0);
        writer.put_u64(self.term.0);
        writer.put_u64(self.cp.0);
        writer.put_u64(self.participants.0);
        writer.put_u64(self.committed.0);
        writer.put_u64(self.base.0);
        writer.put_u64(if local { self.sequence } else { 0 });
        writer.put_u64(if local { self.previous } else { 0 });
        writer.put_u128(self.root_before.0);
        writer.put_u128(self.root_after.0);
        writer.put_u32(lengths.name);
        writer.put_u32(lengths.catalog);
        writer.put_u32(lengths.delta);
        writer.put_u32(lengths.run_count);
        writer.put_u32(lengths.runs);
        writer.put_u32(lengths.checksum_count);
        writer.pad_to(RECORD_HEAD_BYTES);
    }

    fn read(bytes: &[u8], form: Form) -> Result<Record, RecordError> {
        let (mut record, head) = read_head(bytes, form)?;
        let lengths = head.lengths;
        let total = RECORD_HEAD_BYTES + lengths.body_bytes();
        let expected = match form {
            Form::Journal => head.blocks as usize * BLOCK_BYTES,
            Form::Wire => total,
        };
        if bytes.len() != expected {
            return Err(FormatError::new(FormatErrorKind::Length, bytes.len()).into());
        }
        if structure_checksum(&bytes[RECORD_HEAD_BYTES..total]) != head.body_checksum {
            let offset = RECORD_BODY_CHECKSUM_OFFSET;
            return Err(FormatError::new(FormatErrorKind::Checksum, offset).into());
        }
        let mut reader = Reader::new(bytes);
        reader.get_bytes(RECORD_HEAD_BYTES)?;
        let field = |offset| FormatError::new(FormatErrorKind::Field, offset);
        if lengths.name > 0 {
            let name = reader.get_bytes(lengths.name as usize)?;
            let name = std::str::from_utf8(name).map_err(|_| field(RECORD_HEAD_BYTES))?;
            record.name = Some(name.to_owned());
        }
        if lengths.catalog > 0 {
            let catalog = reader.get_bytes(lengths.catalog as usize)?;
            record.catalog = Some(Catalog::decode(catalog)?);
        }
        let delta = reader.get_bytes(lengths.delta as usize)?;
        record.delta = Delta::decode(delta, DeltaLimits::RECORD)?;
        let runs = reader.get_bytes(lengths.runs as usize)?;
        record.runs = decode_runs(runs, lengths.run_count)?;
        let checksums = reader.get_bytes(lengths.checksum_count as usize * 4)?;
        record.checksums =
            checksums.as_chunks().0.iter().map(|c| Checksum(u32::from_le_bytes(*c))).collect();
        reader.get_reserved(reader.remaining())?;
        record.check_head()?;
        if form == Form::Journal {
            record.check_counts()?;
            check_runs(&record.runs).map_err(RecordError::Run)?;
        }
        Ok(record)
    }
}

/// What the first block of a record tells before the rest is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHeader {
    /// The store.
    pub store: StoreId,
    /// The shard.
    pub shard: ShardId,
    /// The primary's term.
    pub term: Term,
    /// The consistency point.
    pub cp: CpNumber,
    /// The record's number in the journal.
    pub sequence: u64,
    /// The checksum of the record before.
    pub previous: u64,
    /// The record's length in blocks, 1 to [`RECORD_BLOCKS_MAX`].
    pub blocks: u32,
    /// The record's checksum.
    pub checksum: u64,
}

impl RecordHeader {
    /// Reads the head in the first block of a record of the journal. The rest is not checked.
    ///
    /// # Errors
    /// If the head is damaged or impossible.
    pub fn peek(first_block: &[u8]) -> Result<RecordHeader, RecordError> {
        let (record, head) = read_head(first_block, Form::Journal)?;
        Ok(RecordHeader {
            store: record.store,
            shard: record.shard,
            term: record.term,
            cp: record.cp,
            sequence: record.sequence,
            previous: record.previous,
            blocks: head.blocks,
            checksum: Record::checksum(first_block),
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Journal,
    Wire,
}

impl Form {
    fn magic(self) -> [u8; 8] {
        match self {
            Form::Journal => RECORD_MAGIC,
            Form::Wire => RECORD_WIRE_MAGIC,
        }
    }
}

/// Lengths of the body's parts, in bytes unless they are counts.
#[derive(Clone, Copy)]
struct Lengths {
    name: u32,
    catalog: u32,
    delta: u32,
    run_count: u32,
    runs: u32,
    checksum_count: u32,
}

impl Lengths {
    fn body_bytes(&self) -> usize {
        [self.name, self.catalog, self.delta, self.runs].iter().map(|n| *n as usize).sum::<usize>()
            + self.checksum_count as usize * 4
    }

    fn are_possible(&self) -> bool {
        self.name as usize <= CHECKPOINT_NAME_BYTES_MAX
            && self.catalog as usize <= CATALOG_BYTES_MAX
            && self.delta as usize <= DELTA_BYTES_MAX
            && self.run_count <= RECORD_MAPPED_MAX
            && self.runs as usize <= self.run_count as usize * crate::limits::DATA_RUN_BYTES_MAX
            && self.checksum_count <= RECORD_MAPPED_MAX
    }
}

struct Head {
    lengths: Lengths,
    blocks: u32,
    body_checksum: u64,
}

/// Reads and checks the head; the record's body is still empty.
fn read_head(bytes: &[u8], form: Form) -> Result<(Record, Head), RecordError> {
    let length = RECORD_HEAD_BYTES;
    let head = bytes.get(..length).ok_or(FormatError::new(FormatErrorKind::Length, bytes.len()))?;
    check_sealed(head, length, form.magic(), RECORD_VERSION, RECORD_CHECKSUM_OFFSET)?;
    let mut reader = Reader::new(head);
    reader.get_bytes(10)?;
    let shard = ShardId(reader.get_u16()?);
    let blocks = reader.get_u32()?;
    let record = Record {
        store: StoreId(reader.get_array()?),
        shard,
        term: Term(reader.get_u64()?),
        cp: CpNumber(reader.get_u64()?),
        participants: ShardSet(reader.get_u64()?),
        committed: CpNumber(reader.get_u64()?),
        base: CpNumber(reader.get_u64()?),
        sequence: reader.get_u64()?,
        previous: reader.get_u64()?,
        root_before: Root(reader.get_u128()?),
        root_after: Root(reader.get_u128()?),
        name: None,
        catalog: None,
        delta: Delta::default(),
        runs: Vec::new(),
        checksums: Vec::new(),
    };
    let lengths = Lengths {
        name: reader.get_u32()?,
        catalog: reader.get_u32()?,
        delta: reader.get_u32()?,
        run_count: reader.get_u32()?,
        runs: reader.get_u32()?,
        checksum_count: reader.get_u32()?,
    };
    reader.get_reserved(RECORD_BODY_CHECKSUM_OFFSET - reader.position())?;
    let body_checksum = reader.get_u64()?;
    record.check_head()?;
    let field = |offset| Err(FormatError::new(FormatErrorKind::Field, offset).into());
    if !lengths.are_possible() {
        return field(RECORD_LENGTHS_OFFSET);
    }
    let needed = (RECORD_HEAD_BYTES + lengths.body_bytes()).div_ceil(BLOCK_BYTES) as u32;
    let local = lengths.run_count > 0 || lengths.checksum_count > 0 || record.sequence > 0;
    match form {
        Form::Journal if blocks != needed || blocks > RECORD_BLOCKS_MAX => field(12),
        Form::Wire if blocks != 0 || local || record.previous > 0 => field(12),
        _ => Ok((record, Head { lengths, blocks, body_checksum })),
    }
}

/// Where the lengths of the body's parts begin in the head.
pub const RECORD_LENGTHS_OFFSET: usize = 120;

/// Whether a host may give a checkpoint this name: 1 to 64 bytes, no control characters.
#[must_use]
pub fn is_checkpoint_name(name: &str) -> bool {
    (1..=CHECKPOINT_NAME_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}
