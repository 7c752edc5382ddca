//! A client that writes the protocol byte by byte, from the specification, sharing no code with the session.

use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Client {
    pub(super) outgoing: Vec<u8>,
    pub(super) incoming: Vec<u8>,
    /// Bytes of `incoming` that were taken.
    taken: usize,
    structured: bool,
    next_cookie: u64,
    waiting: BTreeMap<u64, Waiting>,
}

struct Waiting {
    command: u16,
    offset: u64,
    data: Vec<u8>,
    seen: Vec<bool>,
    chunks: usize,
    extents: Vec<(u32, u32)>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Reply {
    pub(super) cookie: u64,
    pub(super) error: u32,
    pub(super) data: Vec<u8>,
    pub(super) data_chunks: usize,
    pub(super) extents: Vec<(u32, u32)>,
}

/// An option's reply: option, kind, data.
pub(super) type OptionReply = (u32, u32, Vec<u8>);

impl Client {
    pub(super) fn new() -> Client {
        Client { next_cookie: 1000, ..Client::default() }
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.outgoing.extend_from_slice(bytes);
    }

    pub(super) fn flags(&mut self, flags: u32) {
        self.put(&flags.to_be_bytes());
    }

    pub(super) fn option(&mut self, option: u32, data: &[u8]) {
        self.put(b"IHAVEOPT");
        self.put(&option.to_be_bytes());
        self.put(&(data.len() as u32).to_be_bytes());
        self.put(data);
    }

    /// Goes through the handshake up to GO.
    pub(super) fn connect(&mut self, structured: bool) {
        self.flags(3);
        if structured {
            self.option(8, &[]);
            self.option(10, &context_query("disk", &["base:allocation"]));
        }
        self.option(7, &info_query("disk", &[3]));
    }

    /// Checks the answers to [`Client::connect`].
    pub(super) fn take_handshake(&mut self, structured: bool) {
        self.structured = structured;
        self.take_greeting();
        let kinds: Vec<u32> = self.take_option_replies().iter().map(|reply| reply.1).collect();
        if structured {
            assert_eq!(kinds, [1, 4, 1, 3, 3, 1]);
        } else {
            assert_eq!(kinds, [3, 3, 1]);
        }
    }

    pub(super) fn take_greeting(&mut self) {
        assert_eq!(self.take(18), b"NBDMAGICIHAVEOPT\0\x03");
    }

    pub(super) fn take_option_replies(&mut self) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        while self.rest().len() >= 20 {
            assert_eq!(self.take(8), 0x3_e889_0455_65a9_u64.to_be_bytes());
            let (option, kind, length) = (self.u32(), self.u32(), self.u32());
            replies.push((option, kind, self.take(length as usize)));
        }
        assert!(self.rest().is_empty(), "{:?}", self.rest());
        replies
    }

    /// Writes a command, with payload if it is a write; gives its cookie.
    pub(super) fn command(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> u64 {
        self.next_cookie += 1;
        let cookie = self.next_cookie;
        self.put(&0x2560_9513_u32.to_be_bytes());
        self.put(&flags.to_be_bytes());
        self.put(&command.to_be_bytes());
        self.put(&cookie.to_be_bytes());
        self.put(&offset.to_be_bytes());
        self.put(&length.to_be_bytes());
        self.put(data);
        let size = if command == 0 { length as usize } else { 0 };
        let waiting = Waiting {
            command,
            offset,
            data: vec![0; size],
            seen: vec![false; size],
            chunks: 0,
            extents: Vec::new(),
        };
        if command != 2 {
            self.waiting.insert(cookie, waiting);
        }
        cookie
    }

    pub(super) fn read(&mut self, offset: u64, length: u32) -> u64 {
        self.command(0, 0, offset, length, &[])
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> u64 {
        self.command(1, 0, offset, data.len() as u32, data)
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes all complete replies out of what came in.
    pub(super) fn take_replies(&mut self) -> Vec<Reply> {
        self.incoming.drain(..std::mem::take(&mut self.taken));
        let mut replies = Vec::new();
        loop {
            match self.rest().first_chunk() {
                Some([0x67, 0x44, 0x66, 0x98]) => {
                    let Some(reply) = self.take_simple() else { return replies };
                    replies.push(reply);
                }
                Some([0x66, 0x8e, 0x33, 0xef]) => match self.take_chunk() {
                    None => return replies,
                    Some(reply) => replies.extend(reply),
                },
                Some(magic) => panic!("no reply begins with {magic:x?}"),
                None => return replies,
            }
        }
    }

    fn take_simple(&mut self) -> Option<Reply> {
        let (head, _) = self.rest().split_first_chunk::<16>()?;
        let error = u32::from_be_bytes(*head[4..].first_chunk()?);
        let cookie = u64::from_be_bytes(*head[8..].first_chunk()?);
        let waiting = self.waiting.get(&cookie).expect("a reply to a command");
        if error == 0 || !matches!(waiting.command, 0 | 7) {
            assert!(!self.structured || !matches!(waiting.command, 0 | 7), "must be a chunk");
        }
        let size = if error == 0 { waiting.data.len() } else { 0 };
        if self.rest().len() < 16 + size {
            return None;
        }
        self.take(16);
        let data = self.take(size);
        self.waiting.remove(&cookie);
        Some(Reply { cookie, error, data, data_chunks: 0, extents: Vec::new() })
    }

    /// `None` when incomplete; otherwise the reply, if this was its last chunk.
    fn take_chunk(&mut self) -> Option<Option<Reply>> {
        let (head, _) = self.rest().split_first_chunk::<20>()?;
        let flags = u16::from_be_bytes(*head[4..].first_chunk()?);
        let kind = u16::from_be_bytes(*head[6..].first_chunk()?);
        let cookie = u64::from_be_bytes(*head[8..].first_chunk()?);
        let length = u32::from_be_bytes(*head[16..].first_chunk()?) as usize;
        if self.rest().len() < 20 + length {
            return None;
        }
        assert!(self.structured);
        self.take(20);
        let payload = self.take(length);
        let waiting = self.waiting.get_mut(&cookie).expect("a chunk of a command");
        let mut error = 0;
        match kind {
            0 => assert_eq!((flags, length), (1, 0)),
            1 => {
                let start = u64::from_be_bytes(*payload.first_chunk()?) - waiting.offset;
                let range = start as usize..start as usize + length - 8;
                assert!(!waiting.seen[range.clone()].contains(&true), "data came twice");
                waiting.seen[range.clone()].fill(true);
                waiting.data[range].copy_from_slice(&payload[8..]);
                waiting.chunks += 1;
            }
            5 => {
                assert_eq!(payload[..4], 1u32.to_be_bytes());
                for pair in payload[4..].as_chunks::<8>().0 {
                    let length = u32::from_be_bytes(*pair.first_chunk()?);
                    let flags = u32::from_be_bytes(*pair[4..].first_chunk()?);
                    waiting.extents.push((length, flags));
                }
            }
            0x8001 => error = u32::from_be_bytes(*payload.first_chunk()?),
            other => panic!("chunk of kind {other}"),
        }
        if flags & 1 == 0 {
            return Some(None);
        }
        let waiting = self.waiting.remove(&cookie).expect("still there");
        assert!(error != 0 || !waiting.seen.contains(&false), "data is missing");
        let (data, data_chunks, extents) = (waiting.data, waiting.chunks, waiting.extents);
        Some(Some(Reply { cookie, error, data, data_chunks, extents }))
    }

    pub(super) fn take(&mut self, count: usize) -> Vec<u8> {
        let bytes = self.rest()[..count].to_vec();
        self.taken += count;
        bytes
    }

    pub(super) fn rest(&self) -> &[u8] {
        &self.incoming[self.taken..]
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(*self.take(4).first_chunk().expect("four bytes"))
    }
}

pub(super) fn info_query(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    data
}

pub(super) fn context_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}
