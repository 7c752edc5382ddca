//! Node: one `twinpoint serve` process, its log, its sockets.
//!
//! Invariants: killed by its own handle when dropped; standard error of all runs of one name goes to one log.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::PoisonError;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::nbd_client::NbdClient;
use super::programs::{Outcome, PROGRAM_TIME_MAX, run, twinpoint};
use super::time_limit::{SharedChild, end_child, note_child};

/// How long a node may take to be ready, or to stop.
pub const NODE_TIME_MAX: Duration = Duration::from_secs(40);

/// A running node.
pub struct Node {
    child: SharedChild,
    files: NodeFiles,
    ready: Value,
}

/// The paths of a node, running or not.
#[derive(Clone, Debug)]
pub struct NodeFiles {
    /// Short name.
    pub name: String,
    /// The store.
    pub store: PathBuf,
    /// Control socket.
    pub control: PathBuf,
    /// NBD's unix socket.
    pub nbd: PathBuf,
    /// Standard error of all its runs.
    pub log: PathBuf,
}

impl NodeFiles {
    /// Those of the node `name` in a folder.
    pub fn new(folder: &Path, name: &str) -> NodeFiles {
        let path = |end: &str| folder.join(format!("{name}.{end}"));
        NodeFiles {
            name: name.to_owned(),
            store: path("store"),
            control: path("control"),
            nbd: path("nbd"),
            log: path("log"),
        }
    }

    /// All that its runs said on standard error.
    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The end of the log, for messages.
    pub fn log_end(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        let first = lines.len().saturating_sub(30);
        format!("log of {}:\n  {}", self.name, lines[first..].join("\n  "))
    }

    /// Checks that no run panicked.
    #[track_caller]
    pub fn assert_no_panic(&self) {
        let text = self.log_text();
        let panicked = text.contains("panicked at") || text.contains("found the impossible");
        assert!(!panicked, "a node panicked; {}", self.log_end());
    }
}

impl Node {
    /// Starts `serve` with these flags besides the node's paths, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn start(files: &NodeFiles, flags: &[String]) -> Node {
        Node::try_start(files, flags).unwrap_or_else(|outcome| {
            panic!("{} does not start: {outcome}\n{}", files.name, files.log_end())
        })
    }

    /// The same, for a node that may be refused: what it came to then.
    pub fn try_start(files: &NodeFiles, flags: &[String]) -> Result<Node, Outcome> {
        let log = OpenOptions::new().create(true).append(true).open(&files.log);
        let mut log = log.expect("the log can be opened");
        let log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let mut command = Command::new(env!("CARGO_BIN_EXE_twinpoint"));
        command.arg("serve").arg("--store").arg(&files.store).arg("--control").arg(&files.control);
        command.arg("--nbd").arg(format!("unix:{}", files.nbd.display())).arg("--json").args(flags);
        let what = format!("{command:?}");
        writeln!(log, "-- start: {}", flags.join(" ")).expect("the log can be written");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        let stdout = child.stdout.take().expect("stdout is piped");
        let child = note_child(child);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            while lines.next().is_some_and(|line| sender.send(line).is_ok()) {}
        });
        match lines
            .recv_timeout(NODE_TIME_MAX)
            .ok()
            .and_then(|line| serde_json::from_str(&line).ok())
        {
            Some(ready) => {
                let ready: Value = ready;
                assert_eq!(ready["ready"], true, "{what}: {ready}");
                Ok(Node { child, files: files.clone(), ready })
            }
            None => {
                let status = wait(&child, Duration::from_secs(5));
                end_child(&child);
                let bytes = std::fs::read(&files.log).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes[log_start as usize..]);
                let said = text.lines().filter(|line| !line.starts_with("-- start"));
                let stderr = said.collect::<Vec<_>>().join("\n");
                Err(Outcome { what, code: status.flatten(), stdout: String::new(), stderr })
            }
        }
    }

    /// Its paths.
    pub fn files(&self) -> &NodeFiles {
        &self.files
    }

    /// What it said when it was ready.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// Whether the process still runs.
    pub fn is_running(&self) -> bool {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().expect("a child can be asked").is_none()
    }

    /// SIGSTOP: the process does nothing until [`Node::thaw`], and may be killed meanwhile.
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let id = self.child.lock().unwrap_or_else(PoisonError::into_inner).id();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("kill -{name} {id}")]);
        run(command, PROGRAM_TIME_MAX).success();
    }

    /// SIGKILL, and wait until it is gone.
    pub fn kill(self) {
        drop(self);
    }

    /// Stops in order, and checks that it ended well.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn stop(self) {
        let control = self.files.control.display().to_string();
        twinpoint(&["stop", "--control", &control]).success();
        let code = wait(&self.child, NODE_TIME_MAX);
        assert_eq!(code, Some(Some(0)), "a stop in order ends with 0; {}", self.files.log_end());
    }

    /// Waits for its end, and gives the exit code; none within the inner option if a signal ended it.
    pub fn wait(&self, limit: Duration) -> Option<Option<i32>> {
        wait(&self.child, limit)
    }

    /// Asks the control socket; the reply whatever it says.
    pub fn ask(&self, request: &Value) -> Result<Value, String> {
        ask(&self.files.control, request)
    }

    /// The node's status. Waits while it opens its store anew.
    ///
    /// # Panics
    /// If it does not tell.
    #[track_caller]
    pub fn status(&self) -> Value {
        let deadline = Instant::now() + NODE_TIME_MAX;
        loop {
            let reply = self.ask(&serde_json::json!({ "command": "status" }));
            let reply = reply.unwrap_or_else(|text| {
                panic!("status of {}: {text}; {}", self.files.name, self.files.log_end())
            });
            if reply["ok"] == true {
                return reply["status"].clone();
            }
            let is_away = reply["kind"] == "away" && Instant::now() < deadline;
            assert!(is_away, "status of {}: {reply}", self.files.name);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Connects to an export.
    ///
    /// # Panics
    /// If that fails.
    #[track_caller]
    pub fn client(&self, export: &str) -> NbdClient {
        NbdClient::connect(&self.files.nbd, export).unwrap_or_else(|error| {
            panic!("{}: {error}; {}", self.files.name, self.files.log_end())
        })
    }

    /// The address of an export for clients of others.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.files.nbd.display())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        end_child(&self.child);
    }
}

/// One request on a control socket.
pub fn ask(control: &Path, request: &Value) -> Result<Value, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = UnixStream::connect(control).map_err(text)?;
    stream.set_read_timeout(Some(NODE_TIME_MAX)).map_err(text)?;
    stream.write_all(format!("{request}\n").as_bytes()).map_err(text)?;
    let mut line = String::new();
    BufReader::new(stream.take(1 << 20)).read_line(&mut line).map_err(text)?;
    serde_json::from_str(&line).map_err(|error| format!("{error}: {line}"))
}

fn wait(child: &SharedChild, limit: Duration) -> Option<Option<i32>> {
    let deadline = Instant::now() + limit;
    loop {
        let ended = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
        if let Some(status) = ended.expect("a child can be waited for") {
            return Some(status.code());
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
