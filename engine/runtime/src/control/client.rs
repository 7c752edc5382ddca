//! Client: the tool's side of the control socket, and what may come in place of an answer.
//!
//! Invariant: whatever listens there, a request ends within its limit, with an answer or a reason of one line.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::line::{LineFault, REPLY_BYTES_MAX, WRITE_TIME_MAX, read_line};
use super::reply::ControlReply;
use super::request::ControlRequest;

/// The tool's side of the control socket.
pub struct ControlClient {
    stream: UnixStream,
    path: PathBuf,
    buffer: Vec<u8>,
}

impl ControlClient {
    /// Connects to a node.
    ///
    /// # Errors
    /// [`ControlError::Connect`].
    pub fn connect(path: &Path) -> Result<ControlClient, ControlError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ControlError::Connect { path: path.to_owned(), source })?;
        Ok(ControlClient { stream, path: path.to_owned(), buffer: Vec::new() })
    }

    /// Asks, and waits for the reply for at most `limit`.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if the node refuses, or that it could not be understood.
    pub fn request(
        &mut self,
        request: &ControlRequest,
        limit: Duration,
    ) -> Result<ControlReply, ControlError> {
        let mut line = serde_json::to_vec(request).expect("a request is plain data");
        line.push(b'\n');
        let lost = |source| ControlError::Lost { path: self.path.clone(), source };
        self.stream.set_write_timeout(Some(WRITE_TIME_MAX)).map_err(lost)?;
        // A node that refuses the connection itself has said why and closed: read that first.
        let sent = self.stream.write_all(&line);
        let deadline = Instant::now() + limit;
        let line = read_line(&mut self.stream, &mut self.buffer, REPLY_BYTES_MAX, deadline);
        let line = match (line, sent) {
            (Ok(line), _) => line,
            (Err(LineFault::Late), _) => {
                return Err(ControlError::Silent { path: self.path.clone(), limit });
            }
            (Err(LineFault::System(source)), _) | (Err(_), Err(source)) => {
                return Err(lost(source));
            }
            (Err(LineFault::Ended), Ok(())) => {
                return Err(lost(io::Error::from(ErrorKind::UnexpectedEof)));
            }
            (Err(LineFault::TooLong), Ok(())) => {
                return Err(ControlError::Garbage { path: self.path.clone() });
            }
        };
        let reply: ControlReply = serde_json::from_slice(&line)
            .map_err(|_| ControlError::Garbage { path: self.path.clone() })?;
        if reply.ok {
            return Ok(reply);
        }
        let kind = reply.kind.unwrap_or_else(|| "unknown".to_owned());
        let text = reply.error.unwrap_or_else(|| "the node refused without a reason".to_owned());
        Err(ControlError::Refused { kind, text })
    }
}

/// Why a node's answer is missing or not a good one.
#[derive(Debug)]
pub enum ControlError {
    /// Nobody listens there, or the socket is closed to this user.
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The connection broke.
    Lost {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No reply in time.
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it was waited.
        limit: Duration,
    },
    /// Something else than a node listens there.
    Garbage {
        /// The socket.
        path: PathBuf,
    },
    /// The node says no.
    Refused {
        /// In one word.
        kind: String,
        /// In one line.
        text: String,
    },
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ControlError::Connect { path, source } => write!(
                f,
                "no node answers on {}: {source}; is `twinpoint serve` running, and is this its --control?",
                path.display()
            ),
            ControlError::Lost { path, source } => write!(
                f,
                "the node at {} broke off: {source}; see its log, then try again",
                path.display()
            ),
            ControlError::Silent { path, limit } => write!(
                f,
                "no answer from {} within {} s: the command may still be carried out; see `twinpoint status`",
                path.display(),
                limit.as_secs_f32()
            ),
            ControlError::Garbage { path } => write!(
                f,
                "what answers on {} is not a Twinpoint node of this version: check --control",
                path.display()
            ),
            ControlError::Refused { text, .. } => f.write_str(text),
        }
    }
}

impl std::error::Error for ControlError {}
