//! Tree: real files, and what has to be true of their copy.
//!
//! Invariant: checksums are made by `sha256sum`, so that the proof rests on nothing of ours.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::narrator::Narrator;
use crate::trouble::{Difference, Trouble};

/// Least bytes and files for a tree to count as a real one.
pub const BYTES_MIN: u64 = 200 << 20;
const FILES_MIN: u64 = 2000;
/// Most bytes: the image has to fit in a store of 1 GiB beside the other volumes.
const BYTES_MAX: u64 = 640 << 20;
/// Where real files are, on any machine.
const SOURCES: [&str; 3] = ["/usr/share", "/usr/lib", "/usr/bin"];
/// Files that one `sha256sum` is given.
const BATCH_FILES: usize = 400;
const FILE_SYSTEM_BLOCK: u64 = 4096;

/// A folder, and how much is in it.
pub struct Tree {
    /// Where it is.
    pub path: PathBuf,
    /// What it is, for people.
    pub name: String,
    /// Files, links and folders.
    pub entries: u64,
    /// Files.
    pub files: u64,
    /// Their bytes, each in whole blocks of a file system.
    pub bytes: u64,
}

/// What an entry of a tree is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A folder.
    Folder,
    /// A symbolic link, and where it points.
    Link(PathBuf),
    /// A file, and its SHA-256 in hexadecimal digits.
    File(String),
}

/// Everything in a tree, by path.
pub type Contents = BTreeMap<PathBuf, Entry>;

impl Tree {
    /// `/usr/share` as it is; where it is too small or too large for the demo, a copy at `copy` of what is enough.
    ///
    /// # Errors
    /// If a file cannot be read or copied.
    pub fn choose(copy: &Path, narrator: &Narrator) -> Result<Tree, Trouble> {
        let first = Path::new(SOURCES[0]);
        let mut tree = Tree::empty(first.to_owned(), SOURCES[0].to_owned());
        walk(first, &mut |_, metadata| {
            tree.count(metadata);
            narrator.check().map(|()| true)
        })?;
        if tree.is_enough() && tree.bytes <= BYTES_MAX {
            return Ok(tree);
        }
        Tree::copy(copy, narrator)
    }

    /// Copies files until there are enough.
    fn copy(target: &Path, narrator: &Narrator) -> Result<Tree, Trouble> {
        narrator.detail("/usr/share has not the right size: copying a part of /usr");
        let mut tree = Tree::empty(target.to_owned(), "a part of /usr".to_owned());
        for source in SOURCES.map(Path::new) {
            let under = target.join(source.file_name().expect("every source has a name"));
            walk(source, &mut |path, metadata| {
                narrator.check()?;
                if tree.is_enough() && tree.bytes > BYTES_MIN + (BYTES_MIN / 4) {
                    return Ok(false);
                }
                if tree.bytes + blocks_bytes(metadata) <= BYTES_MAX {
                    let relative = path.strip_prefix(source).expect("a walk stays under its root");
                    copy_entry(path, metadata, &under.join(relative))?;
                    tree.count(metadata);
                }
                Ok(true)
            })?;
        }
        Ok(tree)
    }

    fn empty(path: PathBuf, name: String) -> Tree {
        Tree { path, name, entries: 0, files: 0, bytes: 0 }
    }

    fn count(&mut self, metadata: &Metadata) {
        self.entries += 1;
        self.files += u64::from(metadata.is_file());
        self.bytes += blocks_bytes(metadata);
    }

    fn is_enough(&self) -> bool {
        self.bytes >= BYTES_MIN && self.files >= FILES_MIN
    }
}

/// Lists a tree, with the checksum of every file. Files of other kinds, such as sockets, are left out.
///
/// # Errors
/// If something cannot be read, or the demo is interrupted.
pub fn contents(root: &Path, narrator: &Narrator) -> Result<Contents, Trouble> {
    let mut contents = Contents::new();
    let mut files = Vec::new();
    walk(root, &mut |path, metadata| {
        let relative = path.strip_prefix(root).expect("a walk stays under its root").to_owned();
        if metadata.is_dir() {
            contents.insert(relative, Entry::Folder);
        } else if metadata.is_symlink() {
            let target = fs::read_link(path).map_err(Trouble::system("read", path))?;
            contents.insert(relative, Entry::Link(target));
        } else if metadata.is_file() {
            files.push(relative);
        }
        narrator.check().map(|()| true)
    })?;
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let part = files.len().div_ceil(workers).max(1);
    thread::scope(|scope| {
        let threads: Vec<_> = files
            .chunks(part)
            .map(|files| scope.spawn(|| checksums(root, files, narrator)))
            .collect();
        for thread in threads {
            contents.extend(thread.join().expect("no thread panics")?);
        }
        Ok(contents)
    })
}

/// Whether the copy holds what the original holds, and nothing else.
///
/// # Errors
/// The first difference.
pub fn compare(original: &Contents, copy: &Contents) -> Result<(), Trouble> {
    let different = original.iter().find(|(path, entry)| copy.get(*path) != Some(*entry));
    if let Some((path, _)) = different {
        return Err(Trouble::Differs(Difference::File(path.clone())));
    }
    match copy.keys().find(|path| !original.contains_key(*path)) {
        Some(path) => Err(Trouble::Differs(Difference::Extra(path.clone()))),
        None => Ok(()),
    }
}

fn checksums(
    root: &Path,
    files: &[PathBuf],
    narrator: &Narrator,
) -> Result<Vec<(PathBuf, Entry)>, Trouble> {
    let program = || "sha256sum".to_owned();
    let mut all = Vec::with_capacity(files.len());
    for batch in files.chunks(BATCH_FILES) {
        narrator.check()?;
        let mut command = Command::new("sha256sum");
        command.current_dir(root).args(["--zero", "--"]).args(batch);
        let output =
            command.output().map_err(|source| Trouble::Start { program: program(), source })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
            return Err(Trouble::Failed { program: program(), code: output.status.code(), said });
        }
        let lines = output.stdout.split(|byte| *byte == 0).filter(|line| !line.is_empty());
        all.extend(lines.filter_map(parse_checksum));
    }
    if all.len() == files.len() {
        Ok(all)
    } else {
        Err(Trouble::Garbled {
            program: program(),
            said: format!("{} of {} sums", all.len(), files.len()),
        })
    }
}

/// Reads `SUM  PATH`.
fn parse_checksum(line: &[u8]) -> Option<(PathBuf, Entry)> {
    let (sum, path) = line.split_at_checked(64)?;
    let path = path.strip_prefix(b"  ").or_else(|| path.strip_prefix(b" *"))?;
    let sum = std::str::from_utf8(sum).ok()?;
    Some((PathBuf::from(OsStr::from_bytes(path)), Entry::File(sum.to_owned())))
}

/// Visits all entries under a root in order of their names, folders before what is in them; ends if `visit` says so.
fn walk(
    root: &Path,
    visit: &mut impl FnMut(&Path, &Metadata) -> Result<bool, Trouble>,
) -> Result<(), Trouble> {
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).map_err(Trouble::system("read", &path))?;
        if path != root && !visit(&path, &metadata)? {
            return Ok(());
        }
        if metadata.is_dir() {
            let list = fs::read_dir(&path).map_err(Trouble::system("list", &path))?;
            let names: Result<Vec<_>, _> =
                list.map(|entry| entry.map(|entry| entry.path())).collect();
            let mut names = names.map_err(Trouble::system("list", &path))?;
            names.sort_unstable_by(|one, other| other.cmp(one));
            waiting.extend(names);
        }
    }
    Ok(())
}

fn copy_entry(source: &Path, metadata: &Metadata, target: &Path) -> Result<(), Trouble> {
    let failed = Trouble::system("copy", source);
    if metadata.is_dir() {
        return fs::create_dir_all(target).map_err(failed);
    }
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).map_err(Trouble::system("create", folder))?;
    }
    if metadata.is_symlink() {
        let link = fs::read_link(source).map_err(Trouble::system("read", source))?;
        std::os::unix::fs::symlink(link, target).map_err(failed)
    } else if metadata.is_file() {
        fs::copy(source, target).map(drop).map_err(failed)
    } else {
        Ok(())
    }
}

/// What an entry takes in a file system with blocks of 4 KiB.
fn blocks_bytes(metadata: &Metadata) -> u64 {
    metadata.len().div_ceil(FILE_SYSTEM_BLOCK) * FILE_SYSTEM_BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents_of(entries: &[(&str, Entry)]) -> Contents {
        entries.iter().map(|(path, entry)| (PathBuf::from(path), entry.clone())).collect()
    }

    #[test]
    fn every_difference_is_found() {
        let file = |sum: &str| Entry::File(sum.to_owned());
        let original = contents_of(&[
            ("a", Entry::Folder),
            ("a/b", file("1")),
            ("c", Entry::Link("a".into())),
        ]);
        assert!(compare(&original, &original).is_ok());
        let mut copies = vec![original.clone(); 4];
        copies[0].insert("a/b".into(), file("2"));
        copies[1].remove(Path::new("c"));
        copies[2].insert("c".into(), Entry::Link("b".into()));
        copies[3].insert("d".into(), Entry::Folder);
        for copy in copies {
            assert!(matches!(compare(&original, &copy), Err(Trouble::Differs(_))), "{copy:?}");
        }
    }

    #[test]
    fn sums_are_parsed() {
        let sum = "0123456789abcdef".repeat(4);
        let parsed = parse_checksum(format!("{sum}  a b").as_bytes());
        assert_eq!(parsed, Some(("a b".into(), Entry::File(sum.clone()))));
        assert_eq!(parse_checksum(sum.as_bytes()), None);
        assert_eq!(parse_checksum(b"short"), None);
    }
}
