//! Set-up messages: what the two sides say on authenticated channels until these become wires.
//!
//! One message is one frame of a channel, which keeps its length and proves its sender. Little-endian; offsets and
//! lengths in bytes:
//!
//! ```text
//!   every message     0  version: 1
//!                     1  kind
//!                     2  reserved: 2 zeros
//!   1 ControlHello    4  session: 16 random bytes of the dialler
//!                    20  hello: the rest, at most 4096 (docs/WIRE_FORMAT.md)
//!   2 ControlAccept   4  hello: the rest, at most 4096
//!   3 Refused         4  code: 2, the reason's number; 1 to 99 are refusals of the core
//!                     6  text length: 2, at most 512
//!                     8  text: UTF-8, for a person
//!                     .  hello: the rest, at most 4096; may be missing
//!   4 LaneHello       4  session: 16
//!                    20  shard: 2
//!                    22  reserved: 2 zeros
//!                    24  lent blocks: 4; end at 28
//!   5 LaneAccept      4  shard: 2
//!                     6  reserved: 2 zeros
//!                     8  lent blocks: 4; end at 12
//!   6 Proceed         .  end at 4
//!   7 Ready           .  end at 4
//! ```
//!
//! Invariants: a message has one encoding; decoding never panics, allocates at most what these limits allow, and
//! refuses bytes left over. A hello that was decoded has possible numbers and one root for each shard; whether it
//! fits this store is for the core to judge.

use std::fmt;

use twinpoint_core::codec::{FormatError, Reader, Truncated, Writer};
use twinpoint_core::limits::HISTORY_MAX;
use twinpoint_core::message::Hello;
use twinpoint_core::superblock::TermStart;
use twinpoint_core::units::{CpNumber, SHARDS_MAX, ShardId};

/// What this side speaks.
const VERSION: u8 = 1;
/// Longest hello.
const HELLO_BYTES_MAX: usize = 4096;
/// Longest text of a refusal.
const TEXT_BYTES_MAX: usize = 512;
/// Longest set-up message, in bytes.
pub const SETUP_BYTES_MAX: usize = 8 + TEXT_BYTES_MAX + HELLO_BYTES_MAX;
/// A CP's or a term's number ends here: adding to it never overflows.
const NUMBER_MAX: u64 = 1 << 62;

const _: () = assert!(83 + HISTORY_MAX * 16 + SHARDS_MAX as usize * 16 <= HELLO_BYTES_MAX);

/// Names one set-up: random, so that the lanes of two are never mixed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionId(pub [u8; 16]);

/// One message.
#[derive(Clone, PartialEq, Debug)]
pub enum SetupMessage {
    /// The dialler's first word.
    ControlHello {
        /// Names the set-up.
        session: SessionId,
        /// What the dialler says of itself.
        hello: Box<Hello>,
    },
    /// The listener agrees.
    ControlAccept {
        /// What the listener says of itself.
        hello: Box<Hello>,
    },
    /// Either side refuses.
    Refused(Told),
    /// The dialler's first word on a lane.
    LaneHello {
        /// The set-up that it belongs to.
        session: SessionId,
        /// Whose lane.
        shard: ShardId,
        /// How many blocks the dialler lends.
        lent_blocks: u32,
    },
    /// The listener has a place for the lane.
    LaneAccept {
        /// Whose lane.
        shard: ShardId,
        /// How many blocks the listener lends.
        lent_blocks: u32,
    },
    /// The dialler agrees too; lanes follow.
    Proceed,
    /// The listener has every lane: after this frame all channels are wires.
    Ready,
}

/// A refusal as it travels.
#[derive(Clone, PartialEq, Debug)]
pub struct Told {
    /// The reason's number.
    pub code: u16,
    /// The reason for a person: one line.
    pub text: String,
    /// What the refusing side says of itself.
    pub hello: Option<Box<Hello>>,
}

/// Why bytes are no set-up message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetupError {
    /// Another version.
    Version(u8),
    /// Not what the format says, at this byte.
    Malformed(usize),
    /// The hello cannot be true.
    Hello(HelloFault),
}

/// What is wrong with a hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HelloFault {
    /// It cannot be read.
    Format,
    /// An impossible layout.
    Geometry,
    /// Not one root for each shard.
    Roots,
    /// Terms that do not ascend, begin at CP 0, or exceed the store's.
    History,
    /// A number no store can have reached.
    Number,
}

impl SetupMessage {
    /// The bytes of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.put_u8(VERSION);
        writer.put_u8(self.kind());
        writer.put_zeroes(2);
        match self {
            SetupMessage::ControlHello { session, hello } => {
                writer.put_bytes(&session.0);
                writer.put_bytes(&hello.encode());
            }
            SetupMessage::ControlAccept { hello } => writer.put_bytes(&hello.encode()),
            SetupMessage::Refused(told) => {
                let text = clean(&told.text);
                writer.put_u16(told.code);
                writer.put_u16(u16::try_from(text.len()).expect("the text was cut"));
                writer.put_bytes(text.as_bytes());
                if let Some(hello) = &told.hello {
                    writer.put_bytes(&hello.encode());
                }
            }
            SetupMessage::LaneHello { session, shard, lent_blocks } => {
                writer.put_bytes(&session.0);
                writer.put_u16(shard.0);
                writer.put_zeroes(2);
                writer.put_u32(*lent_blocks);
            }
            SetupMessage::LaneAccept { shard, lent_blocks } => {
                writer.put_u16(shard.0);
                writer.put_zeroes(2);
                writer.put_u32(*lent_blocks);
            }
            SetupMessage::Proceed | SetupMessage::Ready => {}
        }
        let bytes = writer.finish();
        assert!(bytes.len() <= SETUP_BYTES_MAX, "{} bytes of a set-up message", bytes.len());
        bytes
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If the bytes are not one, or its hello cannot be true.
    pub fn decode(bytes: &[u8]) -> Result<SetupMessage, SetupError> {
        let mut reader = Reader::new(bytes);
        let version = reader.get_u8()?;
        if version != VERSION {
            return Err(SetupError::Version(version));
        }
        let kind = reader.get_u8()?;
        reader.get_reserved(2)?;
        let message = match kind {
            1 => {
                let session = SessionId(reader.get_array()?);
                SetupMessage::ControlHello { session, hello: get_hello(&mut reader)? }
            }
            2 => SetupMessage::ControlAccept { hello: get_hello(&mut reader)? },
            3 => SetupMessage::Refused(get_told(&mut reader)?),
            4 => {
                let session = SessionId(reader.get_array()?);
                let (shard, lent_blocks) = get_lane(&mut reader)?;
                SetupMessage::LaneHello { session, shard, lent_blocks }
            }
            5 => {
                let (shard, lent_blocks) = get_lane(&mut reader)?;
                SetupMessage::LaneAccept { shard, lent_blocks }
            }
            6 => SetupMessage::Proceed,
            7 => SetupMessage::Ready,
            _ => return Err(SetupError::Malformed(1)),
        };
        match reader.remaining() {
            0 => Ok(message),
            _ => Err(SetupError::Malformed(reader.position())),
        }
    }

    fn kind(&self) -> u8 {
        match self {
            SetupMessage::ControlHello { .. } => 1,
            SetupMessage::ControlAccept { .. } => 2,
            SetupMessage::Refused(_) => 3,
            SetupMessage::LaneHello { .. } => 4,
            SetupMessage::LaneAccept { .. } => 5,
            SetupMessage::Proceed => 6,
            SetupMessage::Ready => 7,
        }
    }
}

fn get_hello(reader: &mut Reader<'_>) -> Result<Box<Hello>, SetupError> {
    let length = reader.remaining();
    if length > HELLO_BYTES_MAX {
        return Err(SetupError::Malformed(reader.position()));
    }
    let bytes = reader.get_bytes(length)?;
    let hello = Hello::decode(bytes).map_err(|_| SetupError::Hello(HelloFault::Format))?;
    check_hello(&hello).map_err(SetupError::Hello)?;
    Ok(Box::new(hello))
}

fn get_told(reader: &mut Reader<'_>) -> Result<Told, SetupError> {
    let code = reader.get_u16()?;
    let length = usize::from(reader.get_u16()?);
    if length > TEXT_BYTES_MAX {
        return Err(SetupError::Malformed(6));
    }
    let text = std::str::from_utf8(reader.get_bytes(length)?);
    let text = clean(text.map_err(|_| SetupError::Malformed(8))?);
    let hello = if reader.remaining() == 0 { None } else { Some(get_hello(reader)?) };
    Ok(Told { code, text, hello })
}

fn get_lane(reader: &mut Reader<'_>) -> Result<(ShardId, u32), SetupError> {
    let offset = reader.position();
    let shard = ShardId(reader.get_u16()?);
    if shard.0 >= SHARDS_MAX {
        return Err(SetupError::Malformed(offset));
    }
    reader.get_reserved(2)?;
    let lent_blocks = reader.get_u32()?;
    if lent_blocks > super::LENT_BLOCKS_MAX {
        return Err(SetupError::Malformed(offset + 4));
    }
    Ok((shard, lent_blocks))
}

/// Whether a store could say this of itself.
fn check_hello(hello: &Hello) -> Result<(), HelloFault> {
    hello.geometry.check(u64::MAX).map_err(|_| HelloFault::Geometry)?;
    if hello.roots.len() != usize::from(hello.geometry.shards) {
        return Err(HelloFault::Roots);
    }
    let ascends = |a: &TermStart, b: &TermStart| a.term <= b.term && a.first <= b.first;
    let possible = |start: &TermStart| {
        start.first > CpNumber(0) && start.first.0 <= NUMBER_MAX && start.term <= hello.term
    };
    if !hello.history.is_sorted_by(ascends) || !hello.history.iter().all(possible) {
        return Err(HelloFault::History);
    }
    if [hello.term.0, hello.last.0, hello.base.0].iter().any(|number| *number > NUMBER_MAX) {
        return Err(HelloFault::Number);
    }
    Ok(())
}

/// One line without anything that a terminal would obey, cut to its longest.
fn clean(text: &str) -> String {
    let mut line: String =
        text.chars().map(|each| if each.is_control() { ' ' } else { each }).collect();
    while line.len() > TEXT_BYTES_MAX {
        line.pop();
    }
    line
}

impl From<Truncated> for SetupError {
    fn from(_: Truncated) -> SetupError {
        SetupError::Malformed(0)
    }
}

impl From<FormatError> for SetupError {
    fn from(error: FormatError) -> SetupError {
        SetupError::Malformed(error.offset)
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetupError::Version(version) => write!(
                f,
                "the peer's set-up messages have version {version}, this side speaks {VERSION}: \
                 run the same release on both"
            ),
            SetupError::Malformed(offset) => {
                write!(f, "a set-up message of the peer is malformed at byte {offset}")
            }
            SetupError::Hello(fault) => write!(f, "the peer's hello cannot be true: {fault:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::hello;
    use super::*;
    use twinpoint_core::message::Role;
    use twinpoint_core::units::{Root, Term};

    const SESSION: SessionId = SessionId([9; 16]);

    fn messages() -> Vec<SetupMessage> {
        let hello = || Box::new(hello(Role::Primary, 3));
        let told =
            |hello| SetupMessage::Refused(Told { code: 14, text: "too far".to_owned(), hello });
        vec![
            SetupMessage::ControlHello { session: SESSION, hello: hello() },
            SetupMessage::ControlAccept { hello: hello() },
            told(None),
            told(Some(hello())),
            SetupMessage::LaneHello { session: SESSION, shard: ShardId(63), lent_blocks: 0 },
            SetupMessage::LaneAccept { shard: ShardId(2), lent_blocks: 1 << 19 },
            SetupMessage::Proceed,
            SetupMessage::Ready,
        ]
    }

    #[test]
    fn messages_come_back_and_no_part_of_one_is_a_message() {
        for message in messages() {
            let bytes = message.encode();
            assert_eq!(SetupMessage::decode(&bytes), Ok(message.clone()));
            for length in 0..bytes.len() {
                let part = SetupMessage::decode(&bytes[..length]);
                let hello_left_out =
                    matches!(&part, Ok(SetupMessage::Refused(told)) if told.hello.is_none());
                assert!(part.is_err() || hello_left_out, "{length} bytes of {message:?}");
            }
            if !matches!(&message, SetupMessage::Refused(told) if told.hello.is_none()) {
                assert!(SetupMessage::decode(&[&bytes[..], &[0]].concat()).is_err(), "{message:?}");
            }
        }
    }

    #[test]
    fn bytes_are_where_the_head_of_this_file_says() {
        let lane =
            SetupMessage::LaneHello { session: SESSION, shard: ShardId(5), lent_blocks: 0x0102 };
        let mut expected = vec![1, 4, 0, 0];
        expected.extend_from_slice(&[9; 16]);
        expected.extend_from_slice(&[5, 0, 0, 0, 2, 1, 0, 0]);
        assert_eq!(lane.encode(), expected);
        let accept = SetupMessage::LaneAccept { shard: ShardId(5), lent_blocks: 512 };
        assert_eq!(accept.encode(), [1, 5, 0, 0, 5, 0, 0, 0, 0, 2, 0, 0]);
        let told = Told { code: 18, text: "no".to_owned(), hello: None };
        assert_eq!(SetupMessage::Refused(told).encode(), [1, 3, 0, 0, 18, 0, 2, 0, b'n', b'o']);
        assert_eq!(SetupMessage::Proceed.encode(), [1, 6, 0, 0]);
        assert_eq!(SetupMessage::Ready.encode(), [1, 7, 0, 0]);
    }

    #[test]
    fn any_bytes_are_read_without_harm() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for message in messages() {
            let bytes = message.encode();
            for _ in 0..5_000 {
                let mut changed = bytes.clone();
                for _ in 0..=random() % 3 {
                    let at = random() as usize % changed.len();
                    changed[at] = random() as u8;
                }
                if let Ok(message) = SetupMessage::decode(&changed) {
                    assert!(message.encode().len() <= SETUP_BYTES_MAX);
                }
            }
        }
        assert_eq!(SetupMessage::decode(&[2, 6, 0, 0]), Err(SetupError::Version(2)));
        assert_eq!(SetupMessage::decode(&[1, 6, 0, 1]), Err(SetupError::Malformed(2)));
        assert_eq!(SetupMessage::decode(&[1, 8, 0, 0]), Err(SetupError::Malformed(1)));
    }

    #[test]
    fn a_hello_that_cannot_be_true_is_refused() {
        let fault = |change: &dyn Fn(&mut Hello)| {
            let mut hello = hello(Role::Secondary, 3);
            change(&mut hello);
            let message = SetupMessage::ControlAccept { hello: Box::new(hello) };
            SetupMessage::decode(&message.encode()).err()
        };
        let term = |term, first| TermStart { term: Term(term), first: CpNumber(first) };
        assert_eq!(fault(&|_| {}), None);
        assert_eq!(fault(&|hello| hello.history.clear()), None);
        let hello_fault = |fault| Some(SetupError::Hello(fault));
        assert_eq!(fault(&|hello| hello.roots.clear()), hello_fault(HelloFault::Roots));
        assert_eq!(fault(&|hello| hello.roots.push(Root(1))), hello_fault(HelloFault::Roots));
        assert_eq!(fault(&|hello| hello.geometry.shards = 0), hello_fault(HelloFault::Geometry));
        assert_eq!(
            fault(&|hello| hello.geometry.map_slots += 1),
            hello_fault(HelloFault::Geometry)
        );
        let history = hello_fault(HelloFault::History);
        assert_eq!(fault(&|hello| hello.history = vec![term(1, 0)]), history);
        assert_eq!(fault(&|hello| hello.history = vec![term(9, 1)]), history);
        assert_eq!(fault(&|hello| hello.history = vec![term(2, 1), term(1, 2)]), history);
        assert_eq!(fault(&|hello| hello.history = vec![term(1, u64::MAX)]), history);
        assert_eq!(
            fault(&|hello| hello.last = CpNumber(u64::MAX)),
            hello_fault(HelloFault::Number)
        );
    }

    #[test]
    fn a_refusals_text_is_one_harmless_line() {
        let text = format!("a\n\x1b[31mb{}", "é".repeat(600));
        let told = Told { code: 1, text, hello: None };
        match SetupMessage::decode(&SetupMessage::Refused(told).encode()) {
            Ok(SetupMessage::Refused(told)) => {
                assert!(told.text.starts_with("a  [31mbé") && told.text.len() <= TEXT_BYTES_MAX);
            }
            other => panic!("{other:?}"),
        }
        let mut raw =
            SetupMessage::Refused(Told { code: 1, text: "ab".to_owned(), hello: None }).encode();
        raw[8] = 7;
        match SetupMessage::decode(&raw) {
            Ok(SetupMessage::Refused(told)) => assert_eq!(told.text, " b"),
            other => panic!("{other:?}"),
        }
        raw[8] = 0xff;
        assert_eq!(SetupMessage::decode(&raw), Err(SetupError::Malformed(8)));
    }
}
