//! Takeover: from the first node's death to the first read that the second one answers.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::image::{MAGIC, MAGIC_OFFSET};
use crate::narrator::Narrator;
use crate::nbd_client::NbdClient;
use crate::node::Node;
use crate::process::Process;
use crate::trouble::Trouble;

/// How long the secondary may take to learn that its primary is gone, and then to take over.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(1);
/// Exit code of `twinpoint` when a node refuses.
const REFUSED: i32 = 6;

/// What it took.
pub struct Takeover {
    /// The new term.
    pub term: u64,
    /// The last CP before it.
    pub cp: u64,
    /// The root there, as the running node tells it.
    pub root: String,
    /// From the kill to the first answered read.
    pub from_kill: Duration,
    /// From the start of `twinpoint promote` to the first answered read.
    pub from_command: Duration,
}

/// Kills the first node, promotes the second one, and reads a file system's superblock from it.
///
/// # Errors
/// If the second node does not take over in time.
pub fn take_over(
    twinpoint: &Path,
    first: Node,
    second: &Node,
    volume: &str,
    narrator: &Narrator,
) -> Result<Takeover, Trouble> {
    let killed = Instant::now();
    first.kill()?;
    let (commanded, reply) = promote(twinpoint, second, killed, narrator)?;
    first_read(second.nbd(), volume, killed, narrator)?;
    let (from_kill, from_command) = (killed.elapsed(), commanded.elapsed());
    let status = second.status()?;
    let cp = reply["cp"].as_u64().unwrap_or_default();
    // Nobody has written since, so this is still the newest.
    if status.cp.local != cp || Some(status.term) != reply["term"].as_u64() {
        let said = format!("{reply}, then CP {} in term {}", status.cp.local, status.term);
        return Err(Trouble::Garbled { program: "the new primary".to_owned(), said });
    }
    Ok(Takeover { term: status.term, cp, root: status.root, from_kill, from_command })
}

/// Promotes; a secondary that has not yet seen its primary's end refuses, and is asked again.
fn promote(
    twinpoint: &Path,
    second: &Node,
    killed: Instant,
    narrator: &Narrator,
) -> Result<(Instant, Value), Trouble> {
    loop {
        let began = Instant::now();
        let mut command = Command::new(twinpoint);
        command.args(["promote", "--json", "--control"]).arg(second.control());
        let program = || "twinpoint promote".to_owned();
        let Output { status, stdout, stderr } =
            command.output().map_err(|source| Trouble::Start { program: program(), source })?;
        if status.success() {
            let said = || String::from_utf8_lossy(&stdout).into_owned();
            let reply = serde_json::from_slice(&stdout)
                .map_err(|_| Trouble::Garbled { program: program(), said: said() })?;
            return Ok((began, reply));
        }
        if status.code() != Some(REFUSED) || killed.elapsed() > LIMIT {
            let said = String::from_utf8_lossy(&stderr).trim().to_owned();
            return Err(Trouble::Failed { program: program(), code: status.code(), said });
        }
        narrator.pause(PAUSE)?;
    }
}

fn first_read(
    socket: &Path,
    volume: &str,
    killed: Instant,
    narrator: &Narrator,
) -> Result<(), Trouble> {
    let mut block = [0; 4096];
    loop {
        let read =
            NbdClient::open(socket, volume).and_then(|mut client| client.read(0, &mut block));
        if read.is_ok() && block[MAGIC_OFFSET..][..2] == MAGIC {
            return Ok(());
        }
        if killed.elapsed() > LIMIT {
            read?;
            return Err(Trouble::Garbled {
                program: "the new primary".to_owned(),
                said: "no ext4 superblock".to_owned(),
            });
        }
        narrator.pause(PAUSE)?;
    }
}

/// Runs random writes with flushes until the node dies under them.
///
/// # Errors
/// If fio does not start.
pub fn start_load(uri: &str, size_bytes: u64) -> Result<Process, Trouble> {
    let mut command = Command::new("fio");
    // One process, so that its handle is all there is to end.
    command.args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bs=4k"]);
    command.args(["--iodepth=16", "--fsync=64", "--time_based", "--runtime=300", "--randseed=1"]);
    command.args([format!("--uri={uri}"), format!("--size={size_bytes}")]);
    Process::start("fio", &mut command)
}
