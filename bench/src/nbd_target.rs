//! An NBD client over a unix socket that keeps many commands under way: small ones share a send, replies are taken as
//! many as there are.
//!
//! Invariants: the server is not believed: a reply that is not one, or to no command under way, ends the run. Replies
//! are small, so a send that blocks never keeps the server from going on.

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::failure::Failure;
use crate::load::Target;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
/// Writes up to this size are copied together; the payload of larger ones is sent from where it is.
const COPY_BYTES_MAX: usize = 32 << 10;
/// Longest reply to an option that makes sense.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;
/// A server that is silent for so long while commands are under way is broken.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// See the module.
pub struct NbdTarget {
    socket: UnixStream,
    volume_bytes: u64,
    output: Vec<u8>,
    input: Vec<u8>,
    /// Bytes of `input` that are there.
    filled: usize,
    under_way: Vec<bool>,
}

impl NbdTarget {
    /// Connects and opens an export.
    ///
    /// # Errors
    /// If there is no server, or it has no such export.
    pub fn connect(path: &Path, export: &str) -> Result<NbdTarget, Failure> {
        let socket = UnixStream::connect(path).map_err(Failure::Connection)?;
        socket.set_read_timeout(Some(SILENCE_MAX)).map_err(Failure::Connection)?;
        let mut target = NbdTarget {
            socket,
            volume_bytes: 0,
            output: Vec::new(),
            input: vec![0; 64 << 10],
            filled: 0,
            under_way: Vec::new(),
        };
        let greeting = target.take::<18>()?;
        if greeting[..16] != *GREETING {
            return Err(Failure::Protocol("greets with something else"));
        }
        // Fixed newstyle, no zeroes after the option.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(&GREETING[8..]);
        hello.extend_from_slice(&OPTION_GO.to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        hello.extend_from_slice(&0_u16.to_be_bytes());
        target.socket.write_all(&hello).map_err(Failure::Connection)?;
        target.take_option_replies()?;
        Ok(target)
    }

    fn take_option_replies(&mut self) -> Result<(), Failure> {
        loop {
            let head = self.take::<20>()?;
            let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|index| head[at + index]));
            let magic = u64::from(word(0)) << 32 | u64::from(word(4));
            let (reply, length) = (word(12), word(16));
            if magic != OPTION_REPLY_MAGIC || length > OPTION_REPLY_BYTES_MAX {
                return Err(Failure::Protocol("answers an option with something else"));
            }
            let mut data = vec![0; length as usize];
            self.socket.read_exact(&mut data).map_err(Failure::Connection)?;
            match reply {
                REPLY_ACK if self.volume_bytes > 0 => return Ok(()),
                REPLY_INFO if data.len() >= 10 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    let size = [2, 3, 4, 5, 6, 7, 8, 9].map(|index: usize| data[index]);
                    self.volume_bytes = u64::from_be_bytes(size);
                }
                REPLY_INFO => {}
                _ => return Err(Failure::Protocol("refuses the export")),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).map_err(Failure::Connection)?;
        Ok(bytes)
    }

    fn begin(&mut self, command: u16, id: usize, offset: u64, length: usize) {
        self.output.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&0_u16.to_be_bytes());
        self.output.extend_from_slice(&command.to_be_bytes());
        self.output.extend_from_slice(&(id as u64).to_be_bytes());
        self.output.extend_from_slice(&offset.to_be_bytes());
        self.output.extend_from_slice(&(length as u32).to_be_bytes());
        if self.under_way.len() <= id {
            self.under_way.resize(id + 1, false);
        }
        self.under_way[id] = command != COMMAND_DISCONNECT;
    }

    fn send(&mut self, payload: &[u8]) -> Result<(), Failure> {
        let mut done = 0;
        let head = self.output.len();
        while done < head + payload.len() {
            let parts = if done < head {
                [IoSlice::new(&self.output[done..]), IoSlice::new(payload)]
            } else {
                [IoSlice::new(&payload[done - head..]), IoSlice::new(&[])]
            };
            match self.socket.write_vectored(&parts) {
                Ok(0) => return Err(Failure::Protocol("takes no more")),
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Connection(error)),
            }
        }
        self.output.clear();
        Ok(())
    }

    fn take_replies(&mut self, ended: &mut Vec<usize>) -> Result<(), Failure> {
        let whole = self.filled / 16 * 16;
        for reply in self.input[..whole].chunks_exact(16) {
            let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|index| reply[at + index]));
            if word(0) != REPLY_MAGIC {
                return Err(Failure::Protocol("sends something that is no reply"));
            }
            if word(4) != 0 {
                return Err(Failure::Answer(word(4)));
            }
            let id = word(12) as usize;
            let is_known = word(8) == 0 && self.under_way.get(id).is_some_and(|is| *is);
            if !is_known {
                return Err(Failure::Protocol("answers a command that is not under way"));
            }
            self.under_way[id] = false;
            ended.push(id);
        }
        self.input.copy_within(whole..self.filled, 0);
        self.filled -= whole;
        Ok(())
    }
}

impl Target for NbdTarget {
    fn write(&mut self, offset: u64, bytes: &[u8], id: usize) -> Result<bool, Failure> {
        self.begin(COMMAND_WRITE, id, offset, bytes.len());
        if bytes.len() <= COPY_BYTES_MAX {
            self.output.extend_from_slice(bytes);
        } else {
            self.send(bytes)?;
        }
        Ok(true)
    }

    fn flush(&mut self, id: usize) -> Result<bool, Failure> {
        self.begin(COMMAND_FLUSH, id, 0, 0);
        Ok(true)
    }

    fn wait(&mut self, ended: &mut Vec<usize>) -> Result<(), Failure> {
        self.send(&[])?;
        let before = ended.len();
        while ended.len() == before && self.under_way.contains(&true) {
            match self.socket.read(&mut self.input[self.filled..]) {
                Ok(0) => return Err(Failure::Protocol("closed the connection")),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Connection(error)),
            }
            self.take_replies(ended)?;
        }
        Ok(())
    }

    fn volume_bytes(&self) -> u64 {
        self.volume_bytes
    }
}

impl Drop for NbdTarget {
    fn drop(&mut self) {
        self.begin(COMMAND_DISCONNECT, 0, 0, 0);
        // A server that is gone needs no farewell.
        _ = self.send(&[]);
    }
}
