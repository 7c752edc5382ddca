//! Deadline: blocking reads and writes that end at one moment, however the peer dribbles.
//!
//! Used in set-up only, on a control thread.
//!
//! Invariant: no call lasts longer than the deadline, because the time left is set anew before every system call.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::ChannelError;

/// The moment at which an operation gives up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Deadline {
        // A limit beyond the clock's range is as good as a very long one.
        let now = Instant::now();
        Deadline(now.checked_add(limit).unwrap_or(now + Duration::from_secs(86_400)))
    }

    /// The time left, never zero.
    pub(crate) fn left(self) -> Result<Duration, ChannelError> {
        match self.0.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(ChannelError::Timeout),
            left => Ok(left),
        }
    }

    /// Fills `bytes`, or fails at the deadline.
    pub(crate) fn read(self, stream: &TcpStream, bytes: &mut [u8]) -> Result<(), ChannelError> {
        let mut done = 0;
        while done < bytes.len() {
            stream.set_read_timeout(Some(self.left()?)).map_err(ChannelError::Io)?;
            let mut reader = stream;
            match reader.read(&mut bytes[done..]) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(count) => done += count,
                Err(error) if is_retry(error.kind()) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes all of `bytes`, or fails at the deadline.
    pub(crate) fn write(self, stream: &TcpStream, bytes: &[u8]) -> Result<(), ChannelError> {
        let mut done = 0;
        while done < bytes.len() {
            stream.set_write_timeout(Some(self.left()?)).map_err(ChannelError::Io)?;
            let mut writer = stream;
            match writer.write(&bytes[done..]) {
                Ok(count) => done += count,
                Err(error) if is_retry(error.kind()) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A socket's timeout shows as `WouldBlock`; whether the deadline has come, `left` decides.
fn is_retry(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
