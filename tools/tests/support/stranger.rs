//! Stranger: bytes that no good client sends, and connections to send them on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::pair::VOLUME;
use super::random::Random;

/// Up to `most` random bytes.
pub fn noise(random: &mut Random, most: u64) -> Vec<u8> {
    (0..1 + random.below(most)).map(|_| random.next() as u8).collect()
}

/// A beginning of the bytes, of random length.
pub fn cut_short(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    bytes[..random.below(bytes.len() as u64) as usize].to_vec()
}

/// An NBD option.
pub fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [&b"IHAVEOPT"[..], &kind.to_be_bytes(), &length, data].concat()
}

/// The data of GO for the pair's volume.
pub fn go_data() -> Vec<u8> {
    [&(VOLUME.len() as u32).to_be_bytes()[..], VOLUME.as_bytes(), &0_u16.to_be_bytes()].concat()
}

/// An NBD command without flags.
pub fn command(kind: u16, offset: u64, length: u32) -> Vec<u8> {
    let head = [&0x2560_9513_u32.to_be_bytes()[..], &0_u16.to_be_bytes(), &kind.to_be_bytes()];
    let tail = [&77_u64.to_be_bytes()[..], &offset.to_be_bytes(), &length.to_be_bytes()];
    [head.concat(), tail.concat()].concat()
}

/// A connection on which these bytes were sent.
pub fn opened(socket: &Path, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("the node takes connections");
    // The node may have cut it off already.
    let _ = stream.write_all(bytes);
    stream
}

/// Sends bytes, listens a little, and hangs up.
pub fn disturb(socket: &Path, bytes: &[u8]) {
    let mut stream = opened(socket, bytes);
    drain(&mut stream, Duration::from_millis(5));
}

/// Takes what comes until nothing comes for so long.
pub fn drain(stream: &mut UnixStream, limit: Duration) {
    stream.set_read_timeout(Some(limit)).expect("a timeout can be set");
    let mut bytes = [0; 4096];
    while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
}
