//! Space: a test's folder. Removed at the end of a test that passed, kept and named if it failed.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// See the module.
pub struct Space {
    folder: TempDir,
}

impl Space {
    /// A new folder. Its path is short, for unix sockets allow about 100 bytes.
    pub fn new() -> Space {
        let parent = env!("CARGO_TARGET_TMPDIR");
        let folder = tempfile::Builder::new().prefix("t").tempdir_in(parent);
        Space { folder: folder.expect("the target folder takes a folder") }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.folder.disable_cleanup(true);
            eprintln!("kept for inspection: {}", self.folder.path().display());
        }
    }
}
