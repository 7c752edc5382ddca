//! The superblock: what a store is, and what it knows of its history and its peer.
//!
//! The first thing read at start. Written by the coordinator, two copies far apart, one after the
//! other; the newer valid one wins. It is not written by a consistency point (R3).
//!
//! Invariants: terms do not descend in the history and none is above the store's own; the base is not
//! newer than what is committed here; a branch ends after where it began; [`Superblock::encode`] and
//! [`Superblock::decode`] check the same.

use crate::branch::Branch;
use crate::codec::{Damage, FormatError, FormatErrorKind, Reader, Writer};
use crate::codec::{check_sealed, choose_copy, seal};
use crate::geometry::Geometry;
use crate::limits::HISTORY_MAX;
use crate::units::{BLOCK_BYTES, CpNumber, Root, StoreId, Term};

/// First bytes of a store.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"TWINPNT1";
/// Version of the store's format.
pub const SUPERBLOCK_VERSION: u16 = 1;
/// Where the checksum lies.
pub const SUPERBLOCK_CHECKSUM_OFFSET: usize = 120;
/// Where the history begins.
pub const SUPERBLOCK_HISTORY_OFFSET: usize = 128;
/// Bytes of one term in the history.
pub const TERM_START_BYTES: usize = 16;
/// Where the branch lies: behind the room of the longest history.
pub const SUPERBLOCK_BRANCH_OFFSET: usize =
    SUPERBLOCK_HISTORY_OFFSET + HISTORY_MAX * TERM_START_BYTES;
/// Bytes of a branch: term, common CP, tip, root.
pub const BRANCH_BYTES: usize = 40;

const _: () = assert!(SUPERBLOCK_CHECKSUM_OFFSET + 8 == SUPERBLOCK_HISTORY_OFFSET);
const _: () = assert!(SUPERBLOCK_BRANCH_OFFSET + BRANCH_BYTES <= BLOCK_BYTES);

const FLAG_PAIRED: u32 = 1;
const FLAG_BASE_GIVEN_UP: u32 = 2;
const FLAG_CLEAN: u32 = 4;
const FLAG_ALONE: u32 = 8;
const FLAG_DEPOSED: u32 = 16;
const FLAG_SECONDARY: u32 = 32;
const FLAG_BRANCH: u32 = 64;
const FLAGS_KNOWN: u32 = 127;

/// Where a term began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TermStart {
    /// The term.
    pub term: Term,
    /// Its first consistency point.
    pub first: CpNumber,
}

/// What a store is, and what it knows of its history and its peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The identity that both halves of a pair share.
    pub store: StoreId,
    /// Where everything lies.
    pub geometry: Geometry,
    /// Counts the writings of the superblock.
    pub sequence: u64,
    /// The newest term this store knows.
    pub term: Term,
    /// The newest terms, oldest first, at most [`HISTORY_MAX`].
    pub history: Vec<TermStart>,
    /// Known to be committed here at this writing.
    pub committed: CpNumber,
    /// Last known to be committed on both sides.
    pub base: CpNumber,
    /// A peer has been configured: blocks of the base are retained.
    pub paired: bool,
    /// The store followed a primary last: only a promotion makes it one.
    pub secondary: bool,
    /// Carried on without the peer from this consistency point.
    pub alone_since: Option<CpNumber>,
    /// The base's blocks are no longer retained.
    pub base_given_up: bool,
    /// A peer with this term took over; this store must not be primary of an older one.
    pub deposed_by: Option<Term>,
    /// CPs of an older term that this store alone has: it follows nobody until they are dropped by name.
    pub branch: Option<Branch>,
    /// The store was closed in order.
    pub clean: bool,
}

impl Superblock {
    /// The first one of an empty store.
    #[must_use]
    pub fn of_empty(store: StoreId, geometry: Geometry) -> Superblock {
        let term = Term(1);
        Superblock {
            store,
            geometry,
            sequence: 1,
            term,
            history: vec![TermStart { term, first: CpNumber(1) }],
            committed: CpNumber(0),
            base: CpNumber(0),
            paired: false,
            secondary: false,
            alone_since: None,
            base_given_up: false,
            deposed_by: None,
            branch: None,
            clean: true,
        }
    }

    /// The superblock as one block.
    ///
    /// # Panics
    /// If the invariants of this module do not hold.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        if let Err(error) = self.check() {
            panic!("a superblock to encode has an {error}: {self:?}");
        }
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(self.paired, FLAG_PAIRED)
            | flag(self.base_given_up, FLAG_BASE_GIVEN_UP)
            | flag(self.clean, FLAG_CLEAN)
            | flag(self.alone_since.is_some(), FLAG_ALONE)
            | flag(self.deposed_by.is_some(), FLAG_DEPOSED)
            | flag(self.secondary, FLAG_SECONDARY)
            | flag(self.branch.is_some(), FLAG_BRANCH);
        let mut writer = Writer::with_capacity(BLOCK_BYTES);
        writer.put_bytes(&SUPERBLOCK_MAGIC);
        writer.put_u16(SUPERBLOCK_VERSION);
        writer.put_u16(self.geometry.shards);
        writer.put_u32(flags);
        writer.put_bytes(&self.store.0);
        writer.put_u64(self.geometry.region_blocks);
        writer.put_u32(self.geometry.journal_blocks);
        writer.put_u32(self.geometry.map_slots);
        writer.put_u32(self.geometry.directory_blocks);
        writer.put_u32(self.history.len() as u32);
        writer.put_u64(self.sequence);
        writer.put_u64(self.term.0);
        writer.put_u64(self.committed.0);
        writer.put_u64(self.base.0);
        writer.put_u64(self.alone_since.unwrap_or_default().0);
        writer.put_u64(self.deposed_by.unwrap_or_default().0);
        writer.pad_to(SUPERBLOCK_HISTORY_OFFSET);
        for start in &self.history {
            writer.put_u64(start.term.0);
            writer.put_u64(start.first.0);
        }
        writer.pad_to(SUPERBLOCK_BRANCH_OFFSET);
        if let Some(branch) = self.branch {
            writer.put_u64(branch.term.0);
            writer.put_u64(branch.common.0);
            writer.put_u64(branch.tip.0);
            writer.put_u128(branch.root.0);
        }
        writer.pad_to(BLOCK_BYTES);
        let mut bytes = writer.finish();
        seal(&mut bytes, SUPERBLOCK_CHECKSUM_OFFSET);
        bytes
    }

    /// Reads a superblock from one block. Whether its geometry fits the store is for the caller to
    /// check, who knows the store's size.
    ///
    /// # Errors
    /// If the block is not exactly what [`Superblock::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Superblock, FormatError> {
        let checksum = SUPERBLOCK_CHECKSUM_OFFSET;
        check_sealed(bytes, BLOCK_BYTES, SUPERBLOCK_MAGIC, SUPERBLOCK_VERSION, checksum)?;
        let mut reader = Reader::new(bytes);
        reader.get_bytes(10)?;
        let shards = reader.get_u16()?;
        let flags = reader.get_u32()?;
        if flags & !FLAGS_KNOWN != 0 {
            return Err(FormatError::new(FormatErrorKind::Reserved, 12));
        }
        let store = StoreId(reader.get_array()?);
        let geometry = Geometry {
            shards,
            region_blocks: reader.get_u64()?,
            journal_blocks: reader.get_u32()?,
            map_slots: reader.get_u32()?,
            directory_blocks: reader.get_u32()?,
        };
        let history_count = reader.get_u32()? as usize;
        if history_count > HISTORY_MAX {
            return Err(FormatError::new(FormatErrorKind::Field, 52));
        }
        let mut superblock = Superblock {
            store,
            geometry,
            sequence: reader.get_u64()?,
            term: Term(reader.get_u64()?),
            history: Vec::with_capacity(history_count),
            committed: CpNumber(reader.get_u64()?),
            base: CpNumber(reader.get_u64()?),
            paired: flags & FLAG_PAIRED != 0,
            secondary: flags & FLAG_SECONDARY != 0,
            alone_since: None,
            base_given_up: flags & FLAG_BASE_GIVEN_UP != 0,
            deposed_by: None,
            branch: None,
            clean: flags & FLAG_CLEAN != 0,
        };
        superblock.alone_since = get_optional(&mut reader, flags & FLAG_ALONE)?.map(CpNumber);
        superblock.deposed_by = get_optional(&mut reader, flags & FLAG_DEPOSED)?.map(Term);
        reader.get_reserved(SUPERBLOCK_CHECKSUM_OFFSET - reader.position())?;
        reader.get_u64()?;
        for _ in 0..history_count {
            let (term, first) = (Term(reader.get_u64()?), CpNumber(reader.get_u64()?));
            superblock.history.push(TermStart { term, first });
        }
        reader.get_reserved(SUPERBLOCK_BRANCH_OFFSET - reader.position())?;
        if flags & FLAG_BRANCH != 0 {
            superblock.branch = Some(Branch {
                term: Term(reader.get_u64()?),
                common: CpNumber(reader.get_u64()?),
                tip: CpNumber(reader.get_u64()?),
                root: Root(reader.get_u128()?),
            });
        }
        reader.get_reserved(reader.remaining())?;
        superblock.check()?;
        Ok(superblock)
    }

    /// What comes after CP `last` is another history than what may have come after it before: in a new term, or in the
    /// same one if its primary did not stop cleanly. Starts after `last`, heard of from a primary that was further, are
    /// not this store's.
    pub fn open_history(&mut self, term: Term, last: CpNumber) {
        let first = last.next();
        self.term = term;
        self.history.retain(|start| start.first <= first);
        self.history.push(TermStart { term, first });
        if self.history.len() > HISTORY_MAX {
            self.history.remove(0);
        }
    }

    /// This store is a primary's from CP `last` on, in a term newer than any it heard of. Gives the term.
    pub fn promote(&mut self, last: CpNumber) -> Term {
        let term = Term(self.deposed_by.max(Some(self.term)).map_or(0, |term| term.0) + 1);
        self.open_history(term, last);
        self.secondary = false;
        self.deposed_by = None;
        // What only this store had is the pair's history from now on.
        self.branch = None;
        // Whether it retains a base is as it was: one that it gave up as a former primary does not come back.
        self.alone_since = Some(last.next());
        term
    }

    /// The branch is dropped: this store is a secondary's, and goes back to the common CP before it follows.
    pub fn drop_branch(&mut self) {
        self.branch = None;
        // Of a secondary nobody was told of the CPs that its primary does not have.
        self.secondary = true;
    }

    /// Of two copies takes the valid one with the higher sequence, and tells which is to be
    /// written again.
    ///
    /// # Errors
    /// The first copy's error if neither is valid; [`FormatErrorKind::Copies`] if they differ and
    /// neither is newer.
    pub fn choose(copies: [&[u8]; 2]) -> Result<(Superblock, Damage), FormatError> {
        choose_copy(copies.map(Superblock::decode), |superblock| superblock.sequence)
    }

    fn check(&self) -> Result<(), FormatError> {
        let field = |offset| Err(FormatError::new(FormatErrorKind::Field, offset));
        if self.geometry.check_zones().is_err() {
            return field(32);
        }
        if self.history.len() > HISTORY_MAX {
            return field(52);
        }
        let ascends = |a: &TermStart, b: &TermStart| a.term <= b.term && a.first <= b.first;
        if !self.history.is_sorted_by(ascends) {
            return field(SUPERBLOCK_HISTORY_OFFSET);
        }
        if self.history.last().is_some_and(|newest| newest.term > self.term) {
            return field(64);
        }
        if self.base > self.committed {
            return field(80);
        }
        if self.branch.is_some_and(|branch| branch.tip <= branch.common || branch.term > self.term)
        {
            return field(SUPERBLOCK_BRANCH_OFFSET);
        }
        Ok(())
    }
}

/// Reads a number that is 0 unless a flag is set.
fn get_optional(reader: &mut Reader<'_>, flag: u32) -> Result<Option<u64>, FormatError> {
    let offset = reader.position();
    let value = reader.get_u64()?;
    match (flag, value) {
        (0, 0) => Ok(None),
        (0, _) => Err(FormatError::new(FormatErrorKind::Reserved, offset)),
        (_, value) => Ok(Some(value)),
    }
}
