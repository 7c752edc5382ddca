//! Line: one JSON object of either side, as it comes out of a stream.
//!
//! Invariant: no more is kept than a line's limit, and no wait is longer than its deadline.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest request, in bytes with its newline.
pub const LINE_BYTES_MAX: usize = 64 * 1024;
/// Longest reply that a client accepts, in bytes.
pub const REPLY_BYTES_MAX: usize = 1024 * 1024;
/// Longest time from the end of a reply to the end of the next request.
pub const LINE_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest time that a line may take to be taken.
pub(super) const WRITE_TIME_MAX: Duration = Duration::from_secs(10);

/// Why there is no line.
#[derive(Debug)]
pub(super) enum LineFault {
    /// It is longer than its limit.
    TooLong,
    /// The deadline came first.
    Late,
    /// The other side left; what came before is in the buffer.
    Ended,
    /// The system's reason.
    System(io::Error),
}

/// Takes the next line, without its newline, out of `buffer`, which keeps what came behind it.
pub(super) fn read_line(
    stream: &mut UnixStream,
    buffer: &mut Vec<u8>,
    bytes_max: usize,
    deadline: Instant,
) -> Result<Vec<u8>, LineFault> {
    let mut searched = 0;
    loop {
        if let Some(index) = buffer[searched..].iter().position(|byte| *byte == b'\n') {
            let rest = buffer.split_off(searched + index + 1);
            let mut line = std::mem::replace(buffer, rest);
            line.pop();
            return Ok(line);
        }
        searched = buffer.len();
        if searched >= bytes_max {
            return Err(LineFault::TooLong);
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(LineFault::Late);
        }
        stream.set_read_timeout(Some(rest)).map_err(LineFault::System)?;
        let mut chunk = [0; 4096];
        let want = chunk.len().min(bytes_max - searched);
        match stream.read(&mut chunk[..want]) {
            Ok(0) => return Err(LineFault::Ended),
            Ok(bytes) => buffer.extend_from_slice(&chunk[..bytes]),
            Err(error) => match error.kind() {
                ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => {}
                _ => return Err(LineFault::System(error)),
            },
        }
    }
}
