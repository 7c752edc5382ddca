//! NBD client: as much of the protocol as the demo needs itself, to time the first read of a new primary and to keep
//! its own ledger of flushed writes. Everything else is done by other people's clients.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::trouble::Trouble;

const GREETING: [u8; 16] = *b"NBDMAGICIHAVEOPT";
const FLAGS_FIXED_NO_ZEROES: u16 = 3;
const OPTION_EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Longest silence that is borne.
const SILENCE_MAX: Duration = Duration::from_secs(20);

#[derive(Clone, Copy)]
enum Command {
    Read = 0,
    Write = 1,
    Flush = 3,
}

/// A connection to one volume, with one request under way at a time.
pub struct NbdClient {
    stream: UnixStream,
    cookie: u64,
}

impl NbdClient {
    /// Opens a volume.
    ///
    /// # Errors
    /// If nobody listens, or the node does not offer the volume.
    pub fn open(socket: &Path, volume: &str) -> Result<NbdClient, Trouble> {
        let failed = || Trouble::system("speak with", socket);
        let stream = UnixStream::connect(socket).map_err(failed())?;
        stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed())?;
        let mut client = NbdClient { stream, cookie: 0 };
        let greeting = client.take::<18>().map_err(failed())?;
        if greeting[..16] != GREETING {
            return Err(Trouble::Nbd(0));
        }
        let name_bytes = u32::try_from(volume.len()).map_err(|_| Trouble::Nbd(0))?;
        let mut option = Vec::new();
        option.extend(u32::from(FLAGS_FIXED_NO_ZEROES).to_be_bytes());
        option.extend(&GREETING[8..]);
        option.extend(OPTION_EXPORT_NAME.to_be_bytes());
        option.extend(name_bytes.to_be_bytes());
        option.extend(volume.as_bytes());
        client.stream.write_all(&option).map_err(failed())?;
        // The size and the flags; a node that does not offer the volume closes the connection.
        client.take::<10>().map_err(failed())?;
        Ok(client)
    }

    /// Reads.
    ///
    /// # Errors
    /// If the node is lost, or answers with an error.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Trouble> {
        self.request(Command::Read, offset, buffer.len(), &[])?;
        self.stream.read_exact(buffer).map_err(lost)
    }

    /// Writes.
    ///
    /// # Errors
    /// If the node is lost, or answers with an error.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Trouble> {
        self.request(Command::Write, offset, bytes.len(), bytes)
    }

    /// Makes everything that was written safe.
    ///
    /// # Errors
    /// If the node is lost, or answers with an error.
    pub fn flush(&mut self) -> Result<(), Trouble> {
        self.request(Command::Flush, 0, 0, &[])
    }

    fn request(
        &mut self,
        command: Command,
        offset: u64,
        length: usize,
        payload: &[u8],
    ) -> Result<(), Trouble> {
        self.cookie += 1;
        let length = u32::try_from(length).map_err(|_| Trouble::Nbd(0))?;
        let mut message = Vec::with_capacity(28 + payload.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(0_u16.to_be_bytes());
        message.extend((command as u16).to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(payload);
        self.stream.write_all(&message).map_err(lost)?;
        let reply = self.take::<16>().map_err(lost)?;
        let word = |at: usize| {
            u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]])
        };
        if word(0) != REPLY_MAGIC || reply[8..] != self.cookie.to_be_bytes() {
            return Err(Trouble::Nbd(0));
        }
        if word(4) == 0 { Ok(()) } else { Err(Trouble::Nbd(word(4))) }
    }

    fn take<const BYTES: usize>(&mut self) -> io::Result<[u8; BYTES]> {
        let mut bytes = [0; BYTES];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn lost(source: io::Error) -> Trouble {
    Trouble::System { deed: "speak with", path: "the node".into(), source }
}
