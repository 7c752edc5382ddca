//! What several subcommands take: times, counts, and where the stores lie.
//!
//! Invariant: what passed is possible; what is not is told before anything is made, and the program then ends with 2.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::ending::Folder;
use crate::failure::Failure;
use crate::rig::RigOptions;

/// How often something may be measured.
pub const ROUNDS: RangeInclusive<i64> = 1..=1000;
/// Longest time of one load, in seconds.
pub const SECONDS_MAX: u64 = 86_400;
/// Shortest: below it hardly a write ends.
const SECONDS_MIN: f64 = 0.01;
/// Sizes that a flag may name, in MiB: up to 1 PiB.
const MEBIBYTES: RangeInclusive<u64> = 1..=1 << 30;
/// Longest path of a unix socket.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest name of one of a rig's, with its slash.
const SOCKET_NAME_BYTES_MAX: usize = "/single-secondary.control".len();

/// Reads a time in seconds.
///
/// # Errors
/// What such a time looks like.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    let seconds = seconds.filter(|value| (SECONDS_MIN..=SECONDS_MAX as f64).contains(value));
    let wrong = || format!("a number of seconds, {SECONDS_MIN} to {SECONDS_MAX}, such as 0.3");
    seconds.map(Duration::from_secs_f64).ok_or_else(wrong)
}

/// Where the stores lie, and how large they are.
#[derive(Args, Debug)]
pub struct StoreOptions {
    /// A folder for the stores; they lie in a folder of the run's own in it, which is removed at the end. Default: the
    /// folder for temporary files.
    #[arg(long, value_name = "FOLDER")]
    store_dir: Option<PathBuf>,
    /// Size of each store, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 3072, value_parser = mebibytes())]
    store_mib: u64,
    /// Size of the volume, in MiB; less than that of a store. It is written once before anything is measured.
    #[arg(long, value_name = "MIB", default_value_t = 960, value_parser = mebibytes())]
    pub volume_mib: u64,
    /// Accept a file system that knows no direct access; the figures then say little.
    #[arg(long)]
    buffered: bool,
}

impl StoreOptions {
    /// Checks the sizes, and makes the folder. It goes when the second value is dropped.
    ///
    /// # Errors
    /// [`Failure::Usage`], [`Failure::File`].
    pub fn prepare(&self) -> Result<(RigOptions, Folder), Failure> {
        if self.volume_mib >= self.store_mib {
            let text =
                "--volume-mib is less than --store-mib: the store holds more than the volume";
            return Err(Failure::Usage(text.to_owned()));
        }
        let parent = self.store_dir.clone().unwrap_or_else(std::env::temp_dir);
        let folder = Folder::of_stores(&parent)?;
        if folder.path().as_os_str().len() + SOCKET_NAME_BYTES_MAX > SOCKET_PATH_BYTES_MAX {
            let text =
                "--store-dir: its path is too long for the nodes' sockets: give a shorter one";
            return Err(Failure::Usage(text.to_owned()));
        }
        let options = RigOptions {
            folder: folder.path().to_owned(),
            store_bytes: self.store_mib << 20,
            volume_bytes: self.volume_mib << 20,
            buffered: self.buffered,
            transport: "tcp".to_owned(),
            address: Ipv4Addr::LOCALHOST.into(),
        };
        Ok((options, folder))
    }
}

fn mebibytes() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(MEBIBYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_have_room_for_sockets() {
        let around = tempfile::tempdir().unwrap();
        let options = |name: String| StoreOptions {
            store_dir: Some(around.path().join(name)),
            store_mib: 192,
            volume_mib: 16,
            buffered: true,
        };
        assert!(options("s".to_owned()).prepare().is_ok());
        let failure = options("s".repeat(80)).prepare().err();
        assert!(matches!(failure, Some(Failure::Usage(_))), "{failure:?}");
        assert_eq!(std::fs::read_dir(around.path()).unwrap().count(), 0);
    }

    #[test]
    fn times_are_possible_ones() {
        assert_eq!(parse_seconds("0.3"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_seconds("86400"), Ok(Duration::from_secs(86_400)));
        for text in ["nan", "inf", "-inf", "1e300", "0", "-1", "0.001", "86401", "", "3s"] {
            assert!(parse_seconds(text).unwrap_err().contains("such as"), "{text}");
        }
    }
}
