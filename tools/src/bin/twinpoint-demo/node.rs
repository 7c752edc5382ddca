//! Node: one of the two, as a process of `twinpoint serve`, and how it is spoken with.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use twinpoint_runtime::control::{ControlClient, ControlRequest};
use twinpoint_runtime::status::NodeStatus;

use crate::narrator::Narrator;
use crate::process::Process;
use crate::trouble::Trouble;

/// How long a node may take to be ready, to find its peer, or to answer.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);

/// A node that serves its store.
pub struct Node {
    process: Process,
    control: PathBuf,
    nbd: PathBuf,
    listen: Option<String>,
}

impl Node {
    /// Starts the store's node with these flags and waits until it is ready.
    ///
    /// # Errors
    /// If it does not start.
    pub fn serve(
        twinpoint: &Path,
        name: &str,
        flags: &[&str],
        narrator: &Narrator,
    ) -> Result<Node, Trouble> {
        let (store, nbd) = (format!("{name}.store"), PathBuf::from(format!("{name}.nbd")));
        let mut command = Command::new(twinpoint);
        command.args(["serve", "--json", "--store", &store, "--key-file", "pair.key"]);
        command.arg("--nbd").arg(format!("unix:{}", nbd.display())).args(flags);
        let mut process = Process::start(name, &mut command)?;
        let began = Instant::now();
        loop {
            let output = process.output();
            if let Some(line) =
                output.split_inclusive('\n').next().filter(|line| line.ends_with('\n'))
            {
                let ready: Value = serde_json::from_str(line).map_err(|_| Trouble::Garbled {
                    program: name.to_owned(),
                    said: line.trim().to_owned(),
                })?;
                let text = |field: &str| ready[field].as_str().map(str::to_owned);
                let control = text("control")
                    .map_or_else(|| PathBuf::from(format!("{store}.sock")), PathBuf::from);
                return Ok(Node { process, control, nbd, listen: text("listen") });
            }
            if let Some(status) = process.ended()? {
                return Err(process.failure(status));
            }
            if began.elapsed() > LIMIT {
                return Err(Trouble::Late { what: format!("{name} is ready"), limit: LIMIT });
            }
            narrator.pause(PAUSE)?;
        }
    }

    /// Where a primary dials it.
    pub fn listen(&self) -> &str {
        self.listen.as_deref().unwrap_or_default()
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its NBD socket.
    pub fn nbd(&self) -> &Path {
        &self.nbd
    }

    /// How NBD clients name one of its volumes.
    pub fn uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.nbd.display())
    }

    /// How it is.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> Result<NodeStatus, Trouble> {
        status(&mut ControlClient::connect(&self.control)?)
    }

    /// Waits until its peer is there.
    ///
    /// # Errors
    /// If the peer does not come.
    pub fn await_peer(&self, narrator: &Narrator) -> Result<(), Trouble> {
        let began = Instant::now();
        while self.status()?.peer.state != "connected" {
            if began.elapsed() > LIMIT {
                return Err(Trouble::Late {
                    what: "the nodes find each other".to_owned(),
                    limit: LIMIT,
                });
            }
            narrator.pause(PAUSE)?;
        }
        Ok(())
    }

    /// Kills it at once.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn kill(self) -> Result<(), Trouble> {
        self.process.kill()
    }

    /// Stops it in order, and waits for its end.
    ///
    /// # Errors
    /// If it ends with a failure.
    pub fn stop(self, narrator: &Narrator) -> Result<(), Trouble> {
        ControlClient::connect(&self.control)?.request(&ControlRequest::Stop, LIMIT)?;
        self.process.finish(narrator, || Some("still stopping".to_owned())).map(drop)
    }
}

/// How the node on the other end of a control connection is.
///
/// # Errors
/// If it does not answer.
pub fn status(client: &mut ControlClient) -> Result<NodeStatus, Trouble> {
    let reply = client.request(&ControlRequest::Status, LIMIT)?;
    let missing =
        || Trouble::Garbled { program: "a node".to_owned(), said: "no status".to_owned() };
    reply.status.map(|status| *status).ok_or_else(missing)
}
