//! Between the stored text files and the folders of files that a fuzzer works on.
//!
//! `corpus unpack DIR` writes `DIR/<target>/<number>` from the stored inputs and the seeds; `corpus pack DIR` stores
//! what is in `DIR`, of each target the shortest inputs up to a limit.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use twinpoint_fuzz::{TARGETS, corpus, seeds};

/// Most bytes of one target's stored inputs.
const STORED_BYTES_MAX: usize = 8_000;

fn main() -> ExitCode {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["unpack", folder] => unpack(Path::new(folder)),
        ["pack", folder] => pack(Path::new(folder)),
        _ => Err(io::Error::other("usage: corpus unpack|pack DIR")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("corpus: {error}");
            ExitCode::FAILURE
        }
    }
}

fn stored(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target).with_extension("hex")
}

fn unpack(folder: &Path) -> io::Result<()> {
    for target in TARGETS {
        let place = folder.join(target.name);
        fs::create_dir_all(&place)?;
        let text = fs::read_to_string(stored(target.name)).unwrap_or_default();
        let inputs = corpus::parse(&text).ok_or_else(|| io::Error::other(target.name))?;
        for (number, input) in inputs.into_iter().chain(seeds(target.name)).enumerate() {
            fs::write(place.join(number.to_string()), input)?;
        }
    }
    Ok(())
}

fn pack(folder: &Path) -> io::Result<()> {
    for target in TARGETS {
        let mut inputs = Vec::new();
        for entry in fs::read_dir(folder.join(target.name))? {
            inputs.push(fs::read(entry?.path())?);
        }
        inputs.sort_by_key(Vec::len);
        let mut left = STORED_BYTES_MAX;
        inputs.retain(|input| {
            let fits = input.len() < left;
            left -= if fits { input.len() + 1 } else { 0 };
            fits
        });
        fs::write(stored(target.name), corpus::render(inputs))?;
    }
    Ok(())
}
