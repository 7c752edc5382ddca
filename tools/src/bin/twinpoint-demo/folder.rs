//! Folder: where the demo's files lie. Invariant: it is removed at the end, whatever end that is, unless `--keep` was
//! given; it is the current folder meanwhile, so that the names of sockets stay short.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::trouble::Trouble;

/// See the module.
pub struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    /// Makes a new folder in `parent`, and goes there.
    ///
    /// # Errors
    /// If it cannot be made, or the file system has less than `wanted_bytes` free.
    pub fn create(parent: &Path, keep: bool, wanted_bytes: u64) -> Result<Folder, Trouble> {
        let path = parent.join(format!("demo-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(Trouble::system("create", &path))?;
        let path = path.canonicalize().map_err(Trouble::system("find", &path))?;
        let folder = Folder { path, keep };
        std::env::set_current_dir(&folder.path).map_err(Trouble::system("enter", &folder.path))?;
        match free_bytes(&folder.path)? {
            free_bytes if free_bytes < wanted_bytes => {
                Err(Trouble::Space { path: parent.to_owned(), wanted_bytes, free_bytes })
            }
            _ => Ok(folder),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.keep {
            println!("kept: {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("twinpoint-demo: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Bytes that the file system of `path` has free.
fn free_bytes(path: &Path) -> Result<u64, Trouble> {
    let program = || "df".to_owned();
    let output = Command::new("df").args(["--output=avail", "-B1"]).arg(path).output();
    let output = output.map_err(|source| Trouble::Start { program: program(), source })?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let free = said.lines().nth(1).and_then(|line| line.trim().parse().ok());
    free.ok_or(Trouble::Garbled { program: program(), said })
}
