//! The volumes of a store.
//!
//! Shard 0 keeps the catalog in its directory, and writes it whole into the record of a
//! consistency point that changed it; its hash is part of shard 0's root.
//!
//! Invariants: volumes ascend by id, and ids are never given twice; names are unique; at most
//! [`VOLUMES_MAX`] volumes. There is one encoding of a catalog.

use crate::codec::{FormatError, FormatErrorKind, Reader, Writer};
use crate::limits::{CATALOG_BYTES_MAX, VOLUME_BYTES_MAX, VOLUME_NAME_BYTES_MAX, VOLUMES_MAX};
use crate::units::{BLOCK_BYTES, VolumeId};
use std::fmt;
use xxhash_rust::xxh3::xxh3_128;

/// One volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its number, never given again.
    pub id: VolumeId,
    /// Its name: 1 to 64 characters of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Its size in bytes: a multiple of 4096, at most 2^55.
    pub size_bytes: u64,
}

/// The volumes of a store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Catalog {
    /// Ascending by id.
    pub volumes: Vec<Volume>,
    /// The id of the next volume.
    pub next_id: VolumeId,
}

/// Why a catalog does not change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CatalogError {
    /// The name is empty, too long, or has other characters.
    NameInvalid,
    /// Another volume has the name.
    NameTaken,
    /// The size is 0, too large, or no multiple of 4096 bytes.
    SizeInvalid,
    /// There are [`VOLUMES_MAX`] volumes already, or all ids were given.
    Full,
    /// No volume has the name.
    NotFound,
}

impl fmt::Display for CatalogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CatalogError::NameInvalid => {
                write!(f, "a name is 1 to {VOLUME_NAME_BYTES_MAX} characters of A-Z a-z 0-9 . _ -")
            }
            CatalogError::NameTaken => f.write_str("another volume has this name"),
            CatalogError::SizeInvalid => {
                write!(f, "a size is a multiple of {BLOCK_BYTES} bytes, at most {VOLUME_BYTES_MAX}")
            }
            CatalogError::Full => write!(f, "a store has at most {VOLUMES_MAX} volumes"),
            CatalogError::NotFound => f.write_str("no volume has this name"),
        }
    }
}

impl std::error::Error for CatalogError {}

impl Default for Catalog {
    fn default() -> Catalog {
        Catalog { volumes: Vec::new(), next_id: VolumeId(1) }
    }
}

impl Catalog {
    /// The catalog of a new store.
    #[must_use]
    pub fn new() -> Catalog {
        Catalog::default()
    }

    /// Adds a volume.
    ///
    /// # Errors
    /// If name or size are impossible, the name is taken, or the catalog is full.
    pub fn create(&mut self, name: &str, size_bytes: u64) -> Result<VolumeId, CatalogError> {
        if !is_name(name) {
            return Err(CatalogError::NameInvalid);
        }
        if !is_size(size_bytes) {
            return Err(CatalogError::SizeInvalid);
        }
        if self.find(name).is_some() {
            return Err(CatalogError::NameTaken);
        }
        if self.volumes.len() >= VOLUMES_MAX || self.next_id.0 == u32::MAX {
            return Err(CatalogError::Full);
        }
        let id = self.next_id;
        self.next_id = VolumeId(id.0 + 1);
        self.volumes.push(Volume { id, name: name.to_owned(), size_bytes });
        Ok(id)
    }

    /// Removes a volume and returns it.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`].
    pub fn delete(&mut self, name: &str) -> Result<Volume, CatalogError> {
        let index = self.volumes.iter().position(|volume| volume.name == name);
        Ok(self.volumes.remove(index.ok_or(CatalogError::NotFound)?))
    }

    /// The volume of a name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// The volume of an id.
    #[must_use]
    pub fn get(&self, id: VolumeId) -> Option<&Volume> {
        let index = self.volumes.binary_search_by_key(&id, |volume| volume.id).ok()?;
        Some(&self.volumes[index])
    }

    /// A hash of the encoding; 0 for the catalog of a new store.
    #[must_use]
    pub fn root(&self) -> u128 {
        if *self == Catalog::default() { 0 } else { xxh3_128(&self.encode()) }
    }

    /// The catalog's only encoding, at most [`CATALOG_BYTES_MAX`] bytes.
    ///
    /// # Panics
    /// If the invariants of this module do not hold.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.is_valid(), "an impossible catalog: {self:?}");
        let mut writer = Writer::new();
        writer.put_u32(self.next_id.0);
        writer.put_u32(self.volumes.len() as u32);
        for volume in &self.volumes {
            writer.put_u32(volume.id.0);
            writer.put_u64(volume.size_bytes);
            writer.put_u8(volume.name.len() as u8);
            writer.put_bytes(volume.name.as_bytes());
        }
        assert!(writer.position() <= CATALOG_BYTES_MAX);
        writer.finish()
    }

    /// Reads a catalog from exactly these bytes.
    ///
    /// # Errors
    /// If they are not what [`Catalog::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Catalog, FormatError> {
        let mut reader = Reader::new(bytes);
        let next_id = VolumeId(reader.get_u32()?);
        let count = reader.get_u32()? as usize;
        if count > VOLUMES_MAX {
            return Err(FormatError::new(FormatErrorKind::Field, 4));
        }
        let mut catalog = Catalog { volumes: Vec::with_capacity(count), next_id };
        for _ in 0..count {
            let offset = reader.position();
            let id = VolumeId(reader.get_u32()?);
            let size_bytes = reader.get_u64()?;
            let length = usize::from(reader.get_u8()?);
            let name = std::str::from_utf8(reader.get_bytes(length)?)
                .map_err(|_| FormatError::new(FormatErrorKind::Field, offset))?
                .to_owned();
            catalog.volumes.push(Volume { id, name, size_bytes });
        }
        if reader.remaining() > 0 {
            return Err(FormatError::new(FormatErrorKind::Length, reader.position()));
        }
        if !catalog.is_valid() {
            return Err(FormatError::new(FormatErrorKind::Field, 0));
        }
        Ok(catalog)
    }

    fn is_valid(&self) -> bool {
        let mut before = VolumeId(0);
        for volume in &self.volumes {
            if volume.id <= before || !is_name(&volume.name) || !is_size(volume.size_bytes) {
                return false;
            }
            before = volume.id;
        }
        let mut names: Vec<&str> = self.volumes.iter().map(|volume| &*volume.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        names.len() == count && count <= VOLUMES_MAX && before < self.next_id
    }
}

/// Whether a name can name a volume.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=VOLUME_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

fn is_size(size_bytes: u64) -> bool {
    (1..=VOLUME_BYTES_MAX).contains(&size_bytes) && size_bytes.is_multiple_of(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_never_given_twice() {
        let mut catalog = Catalog::new();
        assert_eq!(catalog.root(), 0);
        assert_eq!(catalog.create("a", 4096), Ok(VolumeId(1)));
        assert_eq!(catalog.create("b", 8192), Ok(VolumeId(2)));
        assert_eq!(catalog.create("b", 8192), Err(CatalogError::NameTaken));
        assert_eq!(catalog.delete("b").map(|volume| volume.id), Ok(VolumeId(2)));
        assert_eq!(catalog.delete("b"), Err(CatalogError::NotFound));
        assert_eq!(catalog.create("b", VOLUME_BYTES_MAX), Ok(VolumeId(3)));
        assert_eq!(catalog.get(VolumeId(3)).map(|volume| &*volume.name), Some("b"));
        assert_eq!(catalog.get(VolumeId(2)), None);
        catalog.delete("a").unwrap();
        catalog.delete("b").unwrap();
        assert_ne!(catalog.root(), 0, "ids given are part of the state");
    }

    #[test]
    fn impossible_names_and_sizes_are_refused() {
        let mut catalog = Catalog::new();
        for name in ["", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert_eq!(catalog.create(name, 4096), Err(CatalogError::NameInvalid), "{name}");
        }
        for size in [0, 4095, VOLUME_BYTES_MAX + 4096, u64::MAX] {
            assert_eq!(catalog.create("a", size), Err(CatalogError::SizeInvalid), "{size}");
        }
        let name = |i: usize| format!("{i:x>64}");
        (0..VOLUMES_MAX).for_each(|i| assert!(catalog.create(&name(i), 4096).is_ok()));
        assert_eq!(catalog.create("one-more", 4096), Err(CatalogError::Full));
        let bytes = catalog.encode();
        assert_eq!(bytes.len(), CATALOG_BYTES_MAX);
        assert_eq!(Catalog::decode(&bytes), Ok(catalog));
    }
}
