//! Key: the secret that the two hosts of a pair share, read from a file.
//!
//! It decides in set-up, before step 1 of the flow, who is a peer and who is a stranger.
//!
//! Invariants:
//! - A key comes from a file that only its owner can read, or not at all.
//! - Its bytes never appear in output, nor on the wire.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Fewest bytes in a key file, without the newline at its end.
pub const KEY_FILE_BYTES_MIN: usize = 32;
/// Most bytes in a key file, without the newline at its end.
pub const KEY_FILE_BYTES_MAX: usize = 4096;
/// Separates this use of the file's bytes from any other.
const KEY_CONTEXT: &str = "twinpoint 2025 key file to pair key";

/// A shared secret of 32 bytes.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    /// Reads a key file: a regular file of the current user or of root, without any permission for group and others,
    /// holding 32 to 4096 bytes. One newline at the end is not part of the key.
    ///
    /// # Errors
    /// [`KeyError`] names the file and what to do.
    pub fn load(path: &Path) -> Result<Key, KeyError> {
        let error = |fault| KeyError { path: path.to_owned(), fault };
        read_key_file(path).map(|bytes| Key::from_bytes(&bytes)).map_err(error)
    }

    /// Makes a key of any bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Key {
        Key(blake3::derive_key(KEY_CONTEXT, bytes))
    }

    /// A code of `message` that only holders of the key can make.
    pub(crate) fn code(&self, message: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, message)
    }

    /// A key for one purpose, of this key and of `transcript`.
    pub(crate) fn derive(&self, context: &'static str, transcript: &[u8]) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(&self.0);
        hasher.update(transcript);
        Key(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

/// Why a key file was not accepted.
#[derive(Debug)]
pub struct KeyError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: KeyFault,
}

/// What is wrong with a key file.
#[derive(Debug)]
pub enum KeyFault {
    /// It cannot be opened or read.
    Io(io::Error),
    /// It is a folder, a device, a pipe.
    NotAFile,
    /// It belongs to somebody else.
    Owner {
        /// User number of the file.
        owner: u32,
        /// User number of this process.
        user: u32,
    },
    /// Group or others have permissions.
    Permissions {
        /// The permission bits.
        mode: u32,
    },
    /// Fewer than [`KEY_FILE_BYTES_MIN`] bytes.
    TooShort {
        /// Bytes without the newline.
        bytes: usize,
    },
    /// More than [`KEY_FILE_BYTES_MAX`] bytes.
    TooLong,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.fault {
            KeyFault::Io(error) => write!(f, "key file {path}: {error}"),
            KeyFault::NotAFile => write!(f, "key file {path} is not a regular file"),
            KeyFault::Owner { owner, user } => {
                write!(f, "key file {path} belongs to user {owner}; run: chown {user} {path}")
            }
            KeyFault::Permissions { mode } => {
                write!(f, "key file {path} is open to others (mode {mode:03o}); run: ")?;
                write!(f, "chmod 600 {path}")
            }
            KeyFault::TooShort { bytes } => {
                write!(
                    f,
                    "key file {path} holds {bytes} bytes, at least {KEY_FILE_BYTES_MIN} are "
                )?;
                write!(f, "needed; make one: head -c 32 /dev/urandom > {path}")
            }
            KeyFault::TooLong => {
                write!(f, "key file {path} holds more than {KEY_FILE_BYTES_MAX} bytes")
            }
        }
    }
}

impl std::error::Error for KeyError {}

fn read_key_file(path: &Path) -> Result<Vec<u8>, KeyFault> {
    // Without waiting, else a pipe in the file's place would hang the program.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(KeyFault::Io)?;
    check_file(&file)?;
    let mut bytes = Vec::new();
    let limit = KEY_FILE_BYTES_MAX as u64 + 2;
    file.take(limit).read_to_end(&mut bytes).map_err(KeyFault::Io)?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    match bytes.len() {
        count if count < KEY_FILE_BYTES_MIN => Err(KeyFault::TooShort { bytes: count }),
        count if count > KEY_FILE_BYTES_MAX => Err(KeyFault::TooLong),
        _ => Ok(bytes),
    }
}

/// Looks at the opened file, not at the path, which could be exchanged in between.
fn check_file(file: &File) -> Result<(), KeyFault> {
    let metadata = file.metadata().map_err(KeyFault::Io)?;
    if !metadata.is_file() {
        return Err(KeyFault::NotAFile);
    }
    let user = current_user().map_err(KeyFault::Io)?;
    check_owner(metadata.uid(), user)?;
    match metadata.mode() & 0o777 {
        mode if mode & 0o077 != 0 => Err(KeyFault::Permissions { mode }),
        _ => Ok(()),
    }
}

fn check_owner(owner: u32, user: u32) -> Result<(), KeyFault> {
    if owner == user || owner == 0 { Ok(()) } else { Err(KeyFault::Owner { owner, user }) }
}

/// The kernel shows a process as a folder that belongs to the process's effective user.
fn current_user() -> io::Result<u32> {
    std::fs::metadata("/proc/self").map(|metadata| metadata.uid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn load(bytes: &[u8], mode: u32) -> Result<Key, KeyError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        Key::load(&path)
    }

    #[test]
    fn one_newline_at_the_end_is_not_part_of_the_key() {
        let plain = load(&[b'k'; 32], 0o600).unwrap();
        let ended = load(&[&[b'k'; 32][..], b"\n"].concat(), 0o400).unwrap();
        let twice = load(&[&[b'k'; 32][..], b"\n\n"].concat(), 0o600).unwrap();
        assert_eq!(plain.0, ended.0);
        assert_ne!(plain.0, twice.0);
        assert_eq!(plain.0, Key::from_bytes(&[b'k'; 32]).0);
        load(&[&[b'k'; 4096][..], b"\n"].concat(), 0o600).unwrap();
    }

    #[test]
    fn open_files_are_refused_with_advice() {
        for mode in [0o640, 0o604, 0o610, 0o601, 0o620, 0o602, 0o777] {
            let error = load(&[b'k'; 32], mode).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("chmod 600 ") && text.contains("/key"), "{text}");
            assert!(matches!(error.fault, KeyFault::Permissions { mode: m } if m == mode));
        }
    }

    #[test]
    fn sizes_are_bounded() {
        let short = load(b"0123456789012345678901234567890\n", 0o600).unwrap_err();
        assert!(matches!(short.fault, KeyFault::TooShort { bytes: 31 }));
        for bytes in [4097, 4098, 100_000] {
            let long = load(&vec![b'k'; bytes], 0o600).unwrap_err();
            assert!(matches!(long.fault, KeyFault::TooLong));
        }
    }

    #[test]
    fn only_regular_files_of_the_right_owner() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Key::load(folder.path()).unwrap_err().fault, KeyFault::NotAFile));
        let device = Key::load(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(device.fault, KeyFault::NotAFile));
        let missing = Key::load(&folder.path().join("missing")).unwrap_err();
        assert!(missing.to_string().contains("missing"));
        assert!(matches!(missing.fault, KeyFault::Io(_)));
        assert!(check_owner(0, 1000).is_ok());
        assert!(check_owner(1000, 1000).is_ok());
        assert!(matches!(check_owner(7, 1000), Err(KeyFault::Owner { owner: 7, user: 1000 })));
    }

    #[test]
    fn debug_is_silent() {
        assert_eq!(format!("{:?}", Key::from_bytes(b"secret")), "Key(secret)");
    }
}
