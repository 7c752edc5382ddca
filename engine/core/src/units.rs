//! Numbers with a meaning. Every count, index and identifier of the engine is a type of its own.
//!
//! Invariants: a type here is plain data, is ordered like its number, and does no I/O. Conversions that could
//! lose bits are functions with a name, never `as` at the call site.

use std::fmt;

/// Bytes in one block, the unit of the map, of the device and of checksums.
pub const BLOCK_BYTES: usize = 4096;
/// Smallest alignment of a request, in bytes.
pub const SECTOR_BYTES: usize = 512;
/// Blocks in one map segment and in one stripe of a volume: a stripe belongs to one shard.
pub const SEGMENT_BLOCKS: u64 = 512;
/// Most shards a store can have; a [`ShardSet`] is one machine word.
pub const SHARDS_MAX: u16 = 64;
/// Most blocks one read or write [`crate::request::Request`] covers.
pub const REQUEST_BLOCKS_MAX: u32 = 64;
/// Data blocks of one shard are addressed by 30 bits: 4 TiB a shard.
pub const DATA_BLOCKS_MAX: u64 = 1 << 30;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A consistency point's number. Numbers have no gaps; 0 is the empty store as formatted.
    CpNumber(u64)
}
number! {
    /// The reign of one primary. Each promotion opens a new term; a lower term is refused.
    Term(u64)
}
number! {
    /// A shard of the store, from 0.
    ShardId(u16)
}
number! {
    /// A volume. Never used again after the volume's deletion; 0 is no volume.
    VolumeId(u32)
}
number! {
    /// A block of a volume: byte offset / 4096.
    VolumeBlock(u64)
}
number! {
    /// A block of a volume counted inside its shard: stripes that belong to other shards are left out.
    LocalBlock(u64)
}
number! {
    /// A block of a shard's data zone, from 0. Below [`DATA_BLOCKS_MAX`].
    DataBlock(u32)
}
number! {
    /// A block of the whole store: byte offset / 4096 on the device or file.
    DeviceBlock(u64)
}
number! {
    /// A block of a shard's map zone, from 0: it holds one map segment.
    MapSlot(u32)
}
number! {
    /// CRC32C (Castagnoli) of the 4096 bytes of a block.
    Checksum(u32)
}
number! {
    /// A 4 KiB buffer of the node's arena. The core knows buffers by this name only.
    BufferId(u32)
}
number! {
    /// Time since an arbitrary start, in nanoseconds. Only the shell has a clock.
    Instant(u64)
}

impl CpNumber {
    /// The number after this one.
    #[must_use]
    pub fn next(self) -> CpNumber {
        CpNumber(self.0 + 1)
    }

    /// The number before this one.
    ///
    /// # Panics
    /// If this is 0.
    #[must_use]
    pub fn previous(self) -> CpNumber {
        assert!(self.0 > 0, "CP 0 has no predecessor");
        CpNumber(self.0 - 1)
    }
}

impl Instant {
    /// Nanoseconds from `earlier` to this; 0 if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Instant) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This moment plus `nanoseconds`.
    #[must_use]
    pub fn after(self, nanoseconds: u64) -> Instant {
        Instant(self.0.saturating_add(nanoseconds))
    }
}

/// The identity of a store, shared by both halves of a pair. Chosen at format time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct StoreId(pub [u8; 16]);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for StoreId {
    type Err = &'static str;

    /// Parses 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<StoreId, Self::Err> {
        const WRONG: &str = "a store id is 32 hexadecimal digits";
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(WRONG);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| WRONG)?;
        Ok(StoreId(number.to_be_bytes()))
    }
}

/// A hash that decides equality (R6): of a segment, of a shard's map, or of a store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Root(pub u128);

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A set of shards, as one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct ShardSet(pub u64);

impl ShardSet {
    /// The shards 0 to `count` - 1.
    #[must_use]
    pub fn all(count: u16) -> ShardSet {
        assert!(count <= SHARDS_MAX, "{count} shards exceed {SHARDS_MAX}");
        if count == SHARDS_MAX { ShardSet(u64::MAX) } else { ShardSet((1 << count) - 1) }
    }

    /// The set of one shard.
    #[must_use]
    pub fn one(shard: ShardId) -> ShardSet {
        assert!(shard.0 < SHARDS_MAX, "shard {shard} exceeds {SHARDS_MAX}");
        ShardSet(1 << shard.0)
    }

    /// Whether the set has `shard`.
    #[must_use]
    pub fn contains(self, shard: ShardId) -> bool {
        self.0 & ShardSet::one(shard).0 != 0
    }

    /// Adds `shard`.
    pub fn insert(&mut self, shard: ShardId) {
        self.0 |= ShardSet::one(shard).0;
    }

    /// Takes `shard` out.
    pub fn remove(&mut self, shard: ShardId) {
        self.0 &= !ShardSet::one(shard).0;
    }

    /// The shards of both sets.
    #[must_use]
    pub fn union(self, other: ShardSet) -> ShardSet {
        ShardSet(self.0 | other.0)
    }

    /// Whether every shard of `self` is in `other`.
    #[must_use]
    pub fn is_subset(self, other: ShardSet) -> bool {
        self.0 & !other.0 == 0
    }

    /// Whether the set has no shard.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many shards the set has.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// The shards, lowest first.
    pub fn iter(self) -> impl Iterator<Item = ShardId> {
        (0..SHARDS_MAX).map(ShardId).filter(move |s| self.contains(*s))
    }
}
