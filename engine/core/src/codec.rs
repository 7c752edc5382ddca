//! Reading and writing bytes: the ground that every format of the store and of the wire stands on.
//!
//! Invariants: everything is little-endian; a [`Reader`] never reads outside its bytes and never
//! panics; a varint has one encoding, the shortest.

use std::fmt;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Bytes of a structure's checksum field.
pub const CHECKSUM_BYTES: usize = 8;
/// Most bytes of a varint.
pub const VARINT_BYTES_MAX: usize = 10;

/// The bytes end too early, or hold a varint that is not the shortest of its value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Truncated;

impl fmt::Display for Truncated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes end too early")
    }
}

impl std::error::Error for Truncated {}

/// Why bytes are not the structure they should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FormatError {
    /// What is wrong.
    pub kind: FormatErrorKind,
    /// Where, in bytes from the structure's start.
    pub offset: usize,
}

/// What is wrong with a structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FormatErrorKind {
    /// The structure is longer or shorter than it should be.
    Length,
    /// It does not begin with its magic: it is something else.
    Magic,
    /// Its format version is not one that this program knows.
    Version,
    /// Its checksum does not match.
    Checksum,
    /// Bytes that must be zero are not.
    Reserved,
    /// A field has a value it cannot have.
    Field,
    /// Two copies are valid, equally new, and differ.
    Copies,
}

impl FormatError {
    /// An error of `kind` at `offset`.
    #[must_use]
    pub const fn new(kind: FormatErrorKind, offset: usize) -> FormatError {
        FormatError { kind, offset }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FormatErrorKind::Length => "wrong length",
            FormatErrorKind::Magic => "wrong magic",
            FormatErrorKind::Version => "unknown format version",
            FormatErrorKind::Checksum => "checksum mismatch",
            FormatErrorKind::Reserved => "reserved bytes are not zero",
            FormatErrorKind::Field => "impossible value",
            FormatErrorKind::Copies => "two valid copies differ",
        };
        write!(f, "{what} at byte {}", self.offset)
    }
}

impl std::error::Error for FormatError {}

/// Which of a structure's two copies needs to be written again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Both copies are valid and equal.
    None,
    /// Copy `0` or `1` is valid but older: the write of the newer one was the last one made.
    Stale(usize),
    /// Copy `0` or `1` is not valid.
    Invalid(usize, FormatError),
}

impl Damage {
    /// In which order both copies are written anew: first the one that was not taken, so that at every moment one is good.
    #[must_use]
    pub fn order(self) -> [usize; 2] {
        match self {
            Damage::Stale(1) | Damage::Invalid(1, _) => [1, 0],
            _ => [0, 1],
        }
    }
}

/// Of two decoded copies takes the valid one with the higher sequence number.
///
/// # Errors
/// The first copy's error if neither is valid; [`FormatErrorKind::Copies`] if both are, with one
/// sequence number and different contents.
pub fn choose_copy<T: PartialEq>(
    copies: [Result<T, FormatError>; 2],
    sequence: impl Fn(&T) -> u64,
) -> Result<(T, Damage), FormatError> {
    match copies {
        [Ok(first), Ok(second)] => match sequence(&first).cmp(&sequence(&second)) {
            std::cmp::Ordering::Greater => Ok((first, Damage::Stale(1))),
            std::cmp::Ordering::Less => Ok((second, Damage::Stale(0))),
            std::cmp::Ordering::Equal if first == second => Ok((first, Damage::None)),
            std::cmp::Ordering::Equal => Err(FormatError::new(FormatErrorKind::Copies, 0)),
        },
        [Ok(first), Err(error)] => Ok((first, Damage::Invalid(1, error))),
        [Err(error), Ok(second)] => Ok((second, Damage::Invalid(0, error))),
        [Err(error), Err(_)] => Err(error),
    }
}

/// The checksum of an on-disk or wire structure (xxh3, 64 bits).
#[must_use]
pub fn structure_checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// The checksum of a structure that holds its own checksum: the 8 bytes at `field` count as zero.
///
/// # Panics
/// If the field lies outside of the bytes.
#[must_use]
pub fn checksum_around(bytes: &[u8], field: usize) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..field]);
    hasher.update(&[0; CHECKSUM_BYTES]);
    hasher.update(&bytes[field + CHECKSUM_BYTES..]);
    hasher.digest()
}

/// Writes the checksum of `bytes` into its field.
///
/// # Panics
/// If the field lies outside of the bytes.
pub fn seal(bytes: &mut [u8], field: usize) {
    let checksum = checksum_around(bytes, field);
    bytes[field..field + CHECKSUM_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// Checks length, magic, checksum and version, in this order, of a structure of exactly `length`
/// bytes that begins with its magic, then its version.
///
/// # Errors
/// The first of these that is wrong.
pub fn check_sealed(
    bytes: &[u8],
    length: usize,
    magic: [u8; 8],
    version: u16,
    field: usize,
) -> Result<(), FormatError> {
    if bytes.len() != length {
        return Err(FormatError::new(FormatErrorKind::Length, bytes.len()));
    }
    if bytes[..8] != magic {
        return Err(FormatError::new(FormatErrorKind::Magic, 0));
    }
    let stored = u64::from_le_bytes(array(&bytes[field..field + CHECKSUM_BYTES]));
    if stored != checksum_around(bytes, field) {
        return Err(FormatError::new(FormatErrorKind::Checksum, field));
    }
    if u16::from_le_bytes(array(&bytes[8..10])) != version {
        return Err(FormatError::new(FormatErrorKind::Version, 8));
    }
    Ok(())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the slice has the array's length")
}

/// Reads fields from untrusted bytes, front to back.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, position: 0 }
    }

    /// Bytes read so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// If fewer remain; then nothing is read.
    pub fn get_bytes(&mut self, count: usize) -> Result<&'a [u8], Truncated> {
        let end = self.position.checked_add(count).ok_or(Truncated)?;
        let taken = self.bytes.get(self.position..end).ok_or(Truncated)?;
        self.position = end;
        Ok(taken)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// If fewer remain.
    pub fn get_array<const N: usize>(&mut self) -> Result<[u8; N], Truncated> {
        self.get_bytes(N).map(array)
    }

    /// The next byte.
    ///
    /// # Errors
    /// If none remains.
    pub fn get_u8(&mut self) -> Result<u8, Truncated> {
        self.get_array().map(u8::from_le_bytes)
    }

    /// The next 2 bytes.
    ///
    /// # Errors
    /// If fewer remain.
    pub fn get_u16(&mut self) -> Result<u16, Truncated> {
        self.get_array().map(u16::from_le_bytes)
    }

    /// The next 4 bytes.
    ///
    /// # Errors
    /// If fewer remain.
    pub fn get_u32(&mut self) -> Result<u32, Truncated> {
        self.get_array().map(u32::from_le_bytes)
    }

    /// The next 8 bytes.
    ///
    /// # Errors
    /// If fewer remain.
    pub fn get_u64(&mut self) -> Result<u64, Truncated> {
        self.get_array().map(u64::from_le_bytes)
    }

    /// The next 16 bytes.
    ///
    /// # Errors
    /// If fewer remain.
    pub fn get_u128(&mut self) -> Result<u128, Truncated> {
        self.get_array().map(u128::from_le_bytes)
    }

    /// The next varint: 7 bits a byte, lowest first, the top bit says that more follow.
    ///
    /// # Errors
    /// If the bytes end inside it, it exceeds 64 bits, or it is not in its shortest form.
    pub fn get_varint(&mut self) -> Result<u64, Truncated> {
        let mut value = 0u64;
        for index in 0..VARINT_BYTES_MAX {
            let byte = self.get_u8()?;
            let bits = u64::from(byte & 0x7f);
            if index == VARINT_BYTES_MAX - 1 && bits > 1 {
                return Err(Truncated);
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                return if byte == 0 && index > 0 { Err(Truncated) } else { Ok(value) };
            }
        }
        Err(Truncated)
    }

    /// Whether all bytes that remain are zero. Reads them.
    pub fn only_zeroes_remain(&mut self) -> bool {
        let rest = &self.bytes[self.position..];
        self.position = self.bytes.len();
        rest.iter().all(|byte| *byte == 0)
    }

    /// Reads `count` reserved bytes.
    ///
    /// # Errors
    /// [`FormatErrorKind::Reserved`] if one is not zero, [`FormatErrorKind::Length`] if fewer remain.
    pub fn get_reserved(&mut self, count: usize) -> Result<(), FormatError> {
        let offset = self.position;
        let bytes = self.get_bytes(count).map_err(|_| self.truncated())?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Err(FormatError::new(FormatErrorKind::Reserved, offset));
        }
        Ok(())
    }

    /// The error for bytes that end here.
    #[must_use]
    pub fn truncated(&self) -> FormatError {
        FormatError::new(FormatErrorKind::Length, self.position)
    }
}

/// A byte count is lost in [`Truncated`]; readers of whole structures know it from the context.
impl From<Truncated> for FormatError {
    fn from(_: Truncated) -> FormatError {
        FormatError::new(FormatErrorKind::Length, 0)
    }
}

/// Appends fields to a byte vector.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty writer.
    #[must_use]
    pub fn new() -> Writer {
        Writer::default()
    }

    /// An empty writer with room for `capacity` bytes.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Writer {
        Writer { bytes: Vec::with_capacity(capacity) }
    }

    /// Bytes written so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.bytes.len()
    }

    /// Appends bytes.
    pub fn put_bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a byte.
    pub fn put_u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Appends 2 bytes.
    pub fn put_u16(&mut self, value: u16) {
        self.put_bytes(&value.to_le_bytes());
    }

    /// Appends 4 bytes.
    pub fn put_u32(&mut self, value: u32) {
        self.put_bytes(&value.to_le_bytes());
    }

    /// Appends 8 bytes.
    pub fn put_u64(&mut self, value: u64) {
        self.put_bytes(&value.to_le_bytes());
    }

    /// Appends 16 bytes.
    pub fn put_u128(&mut self, value: u128) {
        self.put_bytes(&value.to_le_bytes());
    }

    /// Appends a varint, at most [`VARINT_BYTES_MAX`] bytes.
    pub fn put_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.put_u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.put_u8(value as u8);
    }

    /// Appends `count` reserved bytes.
    pub fn put_zeroes(&mut self, count: usize) {
        self.bytes.resize(self.bytes.len() + count, 0);
    }

    /// Appends zeroes up to `length` bytes in all.
    ///
    /// # Panics
    /// If more than that is written already.
    pub fn pad_to(&mut self, length: usize) {
        assert!(self.bytes.len() <= length, "{} bytes exceed {length}", self.bytes.len());
        self.bytes.resize(length, 0);
    }

    /// Appends zeroes up to a multiple of `unit` bytes.
    pub fn pad_to_multiple(&mut self, unit: usize) {
        self.pad_to(self.bytes.len().next_multiple_of(unit));
    }

    /// The bytes written.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_have_one_form() {
        for value in [0, 1, 127, 128, 16_383, 16_384, u64::MAX >> 1, u64::MAX] {
            let mut writer = Writer::new();
            writer.put_varint(value);
            let bytes = writer.finish();
            let mut reader = Reader::new(&bytes);
            assert_eq!(reader.get_varint(), Ok(value));
            assert_eq!(reader.remaining(), 0);
        }
        for wrong in [&[0x80, 0x00][..], &[0xff; 10], &[0xff; 11], &[0x80], &[]] {
            assert_eq!(Reader::new(wrong).get_varint(), Err(Truncated), "{wrong:?}");
        }
    }

    #[test]
    fn a_short_read_reads_nothing() {
        let mut reader = Reader::new(&[1, 2, 3]);
        assert_eq!(reader.get_u32(), Err(Truncated));
        assert_eq!(reader.get_bytes(usize::MAX), Err(Truncated));
        assert_eq!(reader.get_u16(), Ok(0x0201));
        assert_eq!(reader.remaining(), 1);
    }

    #[test]
    fn a_checksum_counts_its_field_as_zero() {
        let mut bytes = [7u8; 64];
        seal(&mut bytes, 16);
        let mut zeroed = bytes;
        zeroed[16..24].fill(0);
        assert_eq!(u64::from_le_bytes(array(&bytes[16..24])), structure_checksum(&zeroed));
    }

    #[test]
    fn the_newer_valid_copy_is_chosen() {
        let bad = FormatError::new(FormatErrorKind::Checksum, 5);
        let pick = |copies| choose_copy(copies, |n: &u64| *n / 10);
        assert_eq!(pick([Ok(10), Ok(10)]), Ok((10, Damage::None)));
        assert_eq!(pick([Ok(20), Ok(10)]), Ok((20, Damage::Stale(1))));
        assert_eq!(pick([Ok(10), Ok(20)]), Ok((20, Damage::Stale(0))));
        assert_eq!(pick([Err(bad), Ok(20)]), Ok((20, Damage::Invalid(0, bad))));
        assert_eq!(pick([Ok(10), Err(bad)]), Ok((10, Damage::Invalid(1, bad))));
        assert_eq!(pick([Err(bad), Err(bad)]), Err(bad));
        let copies = FormatError::new(FormatErrorKind::Copies, 0);
        assert_eq!(pick([Ok(11), Ok(12)]), Err(copies));
    }
}
