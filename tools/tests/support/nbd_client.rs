//! NBD client: fixed newstyle handshake with GO, and pipelined commands with simple replies, over a unix socket.
//!
//! Invariants: replies are matched by cookie, in any order; a reply to nothing, a wrong magic or an end of the stream
//! is an error; no call waits longer than [`REPLY_TIME_MAX`].

use std::collections::HashMap;
use std::io::{self, BufReader, BufWriter, Error, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longest wait for bytes from the server.
pub const REPLY_TIME_MAX: Duration = Duration::from_secs(40);

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const FLAG_FUA: u16 = 1;

/// A command's name, for its reply.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cookie(pub u64);

/// An answer.
#[derive(Debug)]
pub struct NbdReply {
    /// Of this command.
    pub cookie: Cookie,
    /// 0, or the error number.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// What to do with a range, besides reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
enum Deed {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// One connection.
pub struct NbdClient {
    reader: BufReader<UnixStream>,
    writer: BufWriter<UnixStream>,
    size_bytes: u64,
    cookie_next: u64,
    under_way: HashMap<u64, usize>,
}

impl NbdClient {
    /// Connects to the export.
    ///
    /// # Errors
    /// If the server cannot be reached, has no such export, or breaks the protocol.
    pub fn connect(socket: &Path, export: &str) -> io::Result<NbdClient> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(REPLY_TIME_MAX))?;
        stream.set_write_timeout(Some(REPLY_TIME_MAX))?;
        let mut client = NbdClient {
            reader: BufReader::with_capacity(1 << 16, stream.try_clone()?),
            writer: BufWriter::with_capacity(1 << 16, stream),
            size_bytes: 0,
            cookie_next: 1,
            under_way: HashMap::new(),
        };
        client.shake_hands(export)?;
        Ok(client)
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Commands sent and not answered.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Queues a write; [`NbdClient::send_out`] sends what is queued.
    pub fn queue_write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<Cookie> {
        let cookie = self.queue(Deed::Write, fua, offset, data.len(), 0)?;
        self.writer.write_all(data)?;
        Ok(cookie)
    }

    /// Queues a read.
    pub fn queue_read(&mut self, offset: u64, length: usize) -> io::Result<Cookie> {
        self.queue(Deed::Read, false, offset, length, length)
    }

    /// Queues a write of zeroes.
    pub fn queue_zeroes(&mut self, offset: u64, length: usize, fua: bool) -> io::Result<Cookie> {
        self.queue(Deed::WriteZeroes, fua, offset, length, 0)
    }

    /// Queues a trim.
    pub fn queue_trim(&mut self, offset: u64, length: usize) -> io::Result<Cookie> {
        self.queue(Deed::Trim, false, offset, length, 0)
    }

    /// Queues a flush.
    pub fn queue_flush(&mut self) -> io::Result<Cookie> {
        self.queue(Deed::Flush, false, 0, 0, 0)
    }

    /// Sends what is queued.
    pub fn send_out(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Waits for any answer.
    pub fn receive(&mut self) -> io::Result<NbdReply> {
        let mut head = [0; 16];
        self.reader.read_exact(&mut head)?;
        let magic = be_u32(&head[0..4]);
        let error = be_u32(&head[4..8]);
        let cookie = be_u64(&head[8..16]);
        if magic != REPLY_MAGIC {
            return Err(broken(&format!("reply magic {magic:#x}")));
        }
        let length = self.under_way.remove(&cookie);
        let length = length.ok_or_else(|| broken(&format!("a reply to nothing: {cookie}")))?;
        let mut data = vec![0; if error == 0 { length } else { 0 }];
        self.reader.read_exact(&mut data)?;
        Ok(NbdReply { cookie: Cookie(cookie), error, data })
    }

    /// Writes and waits.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let cookie = self.queue_write(offset, data, false)?;
        self.finish(cookie).map(drop)
    }

    /// Reads and waits.
    pub fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let cookie = self.queue_read(offset, length)?;
        self.finish(cookie)
    }

    /// Flushes and waits.
    pub fn flush(&mut self) -> io::Result<()> {
        let cookie = self.queue_flush()?;
        self.finish(cookie).map(drop)
    }

    /// Reads from 0 to the end of the export, or `length`.
    pub fn read_all(&mut self, length: u64) -> io::Result<Vec<u8>> {
        const PIECE: u64 = 1 << 20;
        let mut bytes = Vec::with_capacity(length as usize);
        while (bytes.len() as u64) < length {
            let offset = bytes.len() as u64;
            bytes.extend(self.read(offset, PIECE.min(length - offset) as usize)?);
        }
        Ok(bytes)
    }

    /// Says goodbye.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.queue(Deed::Disconnect, false, 0, 0, 0)?;
        self.send_out()
    }

    fn finish(&mut self, cookie: Cookie) -> io::Result<Vec<u8>> {
        assert_eq!(self.under_way.len(), 1, "waiting calls are for idle connections");
        self.send_out()?;
        let reply = self.receive()?;
        assert_eq!(reply.cookie, cookie, "the only command under way");
        match reply.error {
            0 => Ok(reply.data),
            error => Err(Error::from_raw_os_error(error as i32)),
        }
    }

    fn queue(
        &mut self,
        deed: Deed,
        fua: bool,
        offset: u64,
        length: usize,
        read_length: usize,
    ) -> io::Result<Cookie> {
        let cookie = self.cookie_next;
        self.cookie_next += 1;
        let mut head = [0; 28];
        head[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&(if fua { FLAG_FUA } else { 0 }).to_be_bytes());
        head[6..8].copy_from_slice(&(deed as u16).to_be_bytes());
        head[8..16].copy_from_slice(&cookie.to_be_bytes());
        head[16..24].copy_from_slice(&offset.to_be_bytes());
        head[24..28].copy_from_slice(&(length as u32).to_be_bytes());
        self.writer.write_all(&head)?;
        if deed != Deed::Disconnect {
            self.under_way.insert(cookie, read_length);
        }
        Ok(Cookie(cookie))
    }

    fn shake_hands(&mut self, export: &str) -> io::Result<()> {
        let mut greeting = [0; 18];
        self.reader.read_exact(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(broken("the greeting"));
        }
        let fixed_newstyle_without_zeroes: u32 = 3;
        self.writer.write_all(&fixed_newstyle_without_zeroes.to_be_bytes())?;
        self.writer.write_all(&OPTION_MAGIC.to_be_bytes())?;
        self.writer.write_all(&OPTION_GO.to_be_bytes())?;
        self.writer.write_all(&(4 + export.len() as u32 + 2).to_be_bytes())?;
        self.writer.write_all(&(export.len() as u32).to_be_bytes())?;
        self.writer.write_all(export.as_bytes())?;
        self.writer.write_all(&0_u16.to_be_bytes())?;
        self.writer.flush()?;
        loop {
            let mut head = [0; 20];
            self.reader.read_exact(&mut head)?;
            if be_u64(&head[0..8]) != OPTION_REPLY_MAGIC || be_u32(&head[8..12]) != OPTION_GO {
                return Err(broken("an option's reply"));
            }
            let kind = be_u32(&head[12..16]);
            let mut data = vec![0; be_u32(&head[16..20]).min(1 << 16) as usize];
            self.reader.read_exact(&mut data)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                    self.size_bytes = be_u64(&data[2..10]);
                }
                REPLY_INFO => {}
                _ => {
                    let text = String::from_utf8_lossy(&data);
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("{export} refused ({kind:#x}): {text}"),
                    ));
                }
            }
        }
    }
}

fn be_u32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}

fn be_u64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
}

fn broken(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the server broke the protocol: {what}"))
}
