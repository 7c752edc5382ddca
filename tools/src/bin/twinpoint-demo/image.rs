//! Image: a real file system in a file, made, checked and taken apart by e2fsprogs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::narrator::Narrator;
use crate::process::Process;
use crate::tree::Tree;
use crate::trouble::Trouble;

/// Bytes of an inode, of the journal, and of everything that is not counted.
const INODE_BYTES: u64 = 256;
const JOURNAL_MIB: u64 = 16;
const SLACK_BYTES: u64 = 32 << 20;
/// Where ext4 keeps its magic number, and the number.
pub const MAGIC_OFFSET: usize = 1024 + 56;
/// See [`MAGIC_OFFSET`].
pub const MAGIC: [u8; 2] = [0x53, 0xEF];

/// How large a file system has to be to hold a tree: a whole number of MiB.
pub fn size_bytes(tree: &Tree) -> u64 {
    let payload = tree.bytes + tree.bytes / 20;
    let inodes = inodes(tree) * INODE_BYTES;
    (payload + inodes + (JOURNAL_MIB << 20) + SLACK_BYTES).next_multiple_of(1 << 20)
}

/// Makes an ext4 image at `path` out of a tree.
///
/// # Errors
/// If `mke2fs` fails, or the demo is interrupted.
pub fn make(tree: &Tree, path: &Path, narrator: &Narrator) -> Result<(), Trouble> {
    let journal = format!("size={JOURNAL_MIB}");
    let inodes = inodes(tree).to_string();
    let mut command = Command::new("mke2fs");
    // Checksums of metadata make mke2fs several times slower; every file's contents are compared anyway.
    command.args(["-q", "-t", "ext4", "-O", "^metadata_csum", "-b", "4096", "-m", "0"]);
    command.args(["-J", &journal, "-N", &inodes, "-d"]).arg(&tree.path).arg(path);
    command.arg(format!("{}M", size_bytes(tree) >> 20));
    let whole = tree.bytes >> 20;
    let progress = || Some(format!("{} of about {whole} MiB", allocated_mib(path)));
    Process::start("mke2fs", &mut command)?.finish(narrator, progress).map(drop)
}

/// Checks an image without changing it.
///
/// # Errors
/// If `e2fsck` finds anything.
pub fn check(path: &Path, narrator: &Narrator) -> Result<String, Trouble> {
    let mut command = Command::new("e2fsck");
    command.arg("-fn").arg(path);
    let output = Process::start("e2fsck", &mut command)?.finish(narrator, || None)?;
    Ok(output.lines().last().unwrap_or_default().to_owned())
}

/// Takes all files out of an image.
///
/// # Errors
/// If `debugfs` fails.
pub fn extract(path: &Path, target: &Path, narrator: &Narrator) -> Result<(), Trouble> {
    fs::create_dir_all(target).map_err(Trouble::system("create", target))?;
    let mut command = Command::new("debugfs");
    command.arg("-R").arg(format!("rdump / {}", target.display())).arg(path);
    Process::start("debugfs", &mut command)?
        .finish(narrator, || Some("still taking files out".to_owned()))?;
    // mke2fs adds it to every file system.
    let found = target.join("lost+found");
    fs::remove_dir_all(&found).map_err(Trouble::system("remove", found))
}

/// How much of a sparse file is there.
pub fn allocated_mib(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| (metadata.blocks() * 512) >> 20)
}

fn inodes(tree: &Tree) -> u64 {
    (tree.entries + tree.entries / 20 + 256).next_multiple_of(64)
}
