//! `twinpoint key`: makes the secret that the two nodes of a pair share.
//!
//! Invariant: the file is never open to others, and an existing file is never written over.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;
use twinpoint_runtime::store::random_bytes;

use crate::failure::{Exit, Failure};
use crate::output::{print, print_json};

/// Bytes of the secret.
const KEY_BYTES: usize = 32;

/// See the module.
#[derive(Args)]
pub struct Key {
    #[command(subcommand)]
    deed: Deed,
}

#[derive(Subcommand)]
enum Deed {
    /// Write 32 random bytes, as 64 hexadecimal digits, to a new file that only its owner can read (mode 0600).
    Generate {
        /// The file to create. Copy it to the other host by a safe way, and give both nodes --key-file.
        file: PathBuf,
        /// Print the result as JSON.
        #[arg(long)]
        json: bool,
    },
}

impl Key {
    /// Makes the file.
    ///
    /// # Errors
    /// If there is a file already, or it cannot be written.
    pub fn run(self) -> Result<(), Failure> {
        let Deed::Generate { file, json } = self.deed;
        let secret: [u8; KEY_BYTES] = random_bytes()?;
        let mut text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        text.push('\n');
        write_new(&file, text.as_bytes()).map_err(|error| failure(&file, &error))?;
        if json {
            print_json(&json!({ "ok": true, "file": file.display().to_string() }));
        } else {
            print(&format!("wrote a new key to {}\n", file.display()));
        }
        Ok(())
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a key is none; the error to report is the first one.
        let _ = fs::remove_file(path);
    }
    written
}

fn failure(path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    if error.kind() == ErrorKind::AlreadyExists {
        let text = format!("{path} exists: remove it first, or choose another file");
        return Failure::new(Exit::Refused, "exists", text);
    }
    Failure::failed("file", format!("cannot write {path}: {error}; choose another file"))
}
