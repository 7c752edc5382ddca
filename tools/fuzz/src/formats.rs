//! Targets over plain bytes: the structures of a store, the messages of the core, set-up messages, control requests.

use twinpoint_core::catalog::Catalog;
use twinpoint_core::codec::{seal, structure_checksum};
use twinpoint_core::delta::{Delta, DeltaLimits};
use twinpoint_core::directory;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::{Hello, LaneMessage, PeerMessage};
use twinpoint_core::record::{
    RECORD_BODY_CHECKSUM_OFFSET, RECORD_CHECKSUM_OFFSET, RECORD_HEAD_BYTES, RECORD_LENGTHS_OFFSET,
    Record, RecordHeader,
};
use twinpoint_core::segment::{SEGMENT_CHECKSUM_OFFSET, Segment, Slot};
use twinpoint_core::session::judge;
use twinpoint_core::shard_header::{SHARD_HEADER_CHECKSUM_OFFSET, ShardHeader};
use twinpoint_core::superblock::{SUPERBLOCK_CHECKSUM_OFFSET, Superblock};
use twinpoint_core::units::{BLOCK_BYTES, Checksum, DataBlock, SEGMENT_BLOCKS, VolumeId};
use twinpoint_runtime::control::{ControlReply, ControlRequest};
use twinpoint_runtime::link::setup_message::SetupMessage;

/// Where a record's head tells how many blocks it has.
const RECORD_BLOCKS_AT: usize = 12;

/// The layout that targets decode for: 64 MiB, two shards.
pub(super) fn geometry() -> Geometry {
    Geometry::plan(64 * 256, 2, None, None).expect("64 MiB hold two shards")
}

/// Whether something was accepted, which then must be encoded as it came.
fn same(encoded: Option<Vec<u8>>, bytes: &[u8]) -> bool {
    if let Some(encoded) = &encoded {
        assert!(encoded == bytes, "what was accepted is encoded otherwise");
    }
    encoded.is_some()
}

/// The input as whole blocks, at least one, with zeroes at the end.
fn whole_blocks(input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    bytes.resize(input.len().max(1).next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

/// One block as it came, then with the right checksum in the field.
fn sealed(input: &[u8], field: usize, check: impl Fn(&[u8]) -> bool) -> bool {
    let mut bytes = input.to_vec();
    bytes.resize(BLOCK_BYTES, 0);
    let raw = check(&bytes);
    seal(&mut bytes, field);
    check(&bytes) | raw
}

pub(super) fn superblock(input: &[u8]) -> bool {
    sealed(input, SUPERBLOCK_CHECKSUM_OFFSET, |bytes| {
        let decoded = Superblock::decode(bytes).ok();
        same(decoded.map(|superblock| superblock.encode()), bytes)
    })
}

pub(super) fn shard_header(input: &[u8]) -> bool {
    sealed(input, SHARD_HEADER_CHECKSUM_OFFSET, |bytes| {
        let decoded = ShardHeader::decode(bytes).ok();
        let fits = decoded.as_ref().is_some_and(|header| header.check(&geometry()).is_ok());
        same(decoded.map(|header| header.encode()), bytes) && fits
    })
}

pub(super) fn directory(input: &[u8]) -> bool {
    let bytes = whole_blocks(input);
    let decoded = directory::decode(&bytes, &geometry()).ok();
    same(decoded.map(|(entries, catalog)| directory::encode(&entries, &catalog)), &bytes)
}

/// Slots of 8 bytes each, up to the first that names none, make a segment; what is left changes its bytes.
pub(super) fn segment(input: &[u8]) -> bool {
    let check = |bytes: &[u8]| {
        let decoded = Segment::decode(bytes).ok();
        same(decoded.map(|(_, _, segment)| segment.encode()), bytes)
    };
    let raw = sealed(input, SEGMENT_CHECKSUM_OFFSET, check);
    let mut segment = Segment::new(VolumeId(7), 3);
    let (entries, rest) = input.as_chunks::<8>();
    let mut entries = entries.iter();
    for [low, high, a, b, c, sum @ ..] in entries.by_ref() {
        let slot = u16::from_le_bytes([*low, *high]);
        if u64::from(slot) >= SEGMENT_BLOCKS {
            break;
        }
        let block = DataBlock(u32::from_le_bytes([*a, *b, *c, 0]));
        let checksum = Checksum(u32::from_le_bytes([sum[0], sum[1], sum[2], 0]));
        segment.set(usize::from(slot), Some(Slot { block, checksum }));
    }
    let mut bytes = segment.encode();
    assert_eq!(Segment::decode(&bytes).is_ok(), segment.mapped() > 0, "its own bytes");
    for [low, high, value, ..] in entries {
        bytes[usize::from(u16::from_le_bytes([*low, *high])) % BLOCK_BYTES] = *value;
    }
    rest.iter().for_each(|at| bytes[usize::from(*at)] ^= 1);
    sealed(&bytes, SEGMENT_CHECKSUM_OFFSET, check) | raw
}

pub(super) fn catalog(input: &[u8]) -> bool {
    same(Catalog::decode(input).ok().map(|catalog| catalog.encode()), input)
}

pub(super) fn delta(input: &[u8]) -> bool {
    let decoded = Delta::decode(input, DeltaLimits::RECORD).ok();
    if let Some(delta) = &decoded {
        assert_eq!(delta.mapped_blocks().count() as u64, delta.mapped_count());
        assert_eq!(delta.unmapped_blocks().count() as u64, delta.unmapped_count());
    }
    same(decoded.map(|delta| delta.encode()), input)
}

/// Puts both checksums of a record right, as far as its lengths lie inside.
pub(super) fn seal_record(bytes: &mut [u8]) {
    let length = |index: usize| {
        let at = RECORD_LENGTHS_OFFSET + index * 4;
        let field: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
        u64::from(u32::from_le_bytes(field))
    };
    let body = [length(0), length(1), length(2), length(4), length(5) * 4].iter().sum::<u64>();
    let end = (RECORD_HEAD_BYTES as u64 + body).min(bytes.len() as u64) as usize;
    let checksum = structure_checksum(&bytes[RECORD_HEAD_BYTES..end]);
    bytes[RECORD_BODY_CHECKSUM_OFFSET..][..8].copy_from_slice(&checksum.to_le_bytes());
    seal(&mut bytes[..RECORD_HEAD_BYTES], RECORD_CHECKSUM_OFFSET);
}

/// A record of a journal: its head and body without the zeroes at the end.
pub(super) fn record(input: &[u8]) -> bool {
    let check = |bytes: &[u8]| {
        let header = RecordHeader::peek(&bytes[..BLOCK_BYTES.min(bytes.len())]);
        let decoded = Record::decode(bytes).ok();
        assert!(decoded.is_none() || header.is_ok(), "a record without a head");
        same(decoded.map(|record| record.encode()), bytes)
    };
    let raw = check(input);
    let mut bytes = whole_blocks(input);
    let blocks = (bytes.len() / BLOCK_BYTES) as u32;
    bytes[RECORD_BLOCKS_AT..][..4].copy_from_slice(&blocks.to_le_bytes());
    seal_record(&mut bytes);
    check(&bytes) | raw
}

pub(super) fn record_on_wire(input: &[u8]) -> bool {
    let check = |bytes: &[u8]| {
        same(Record::decode_wire(bytes).ok().map(|record| record.encode_wire()), bytes)
    };
    let raw = check(input);
    let mut bytes = input.to_vec();
    bytes.resize(input.len().max(RECORD_HEAD_BYTES), 0);
    seal_record(&mut bytes);
    check(&bytes) | raw
}

/// Every message of the core.
pub(super) fn message(input: &[u8]) -> bool {
    let lane = LaneMessage::decode(input).ok();
    assert!(
        lane.is_none()
            || LaneMessage::is_part(input) == matches!(lane, Some(LaneMessage::Part { .. }))
    );
    let mut accepted = same(lane.map(|message| message.encode()), input);
    accepted |= same(PeerMessage::decode(input).ok().map(|message| message.encode()), input);
    accepted | same(Hello::decode(input).ok().map(|hello| hello.encode()), input)
}

/// A set-up message; a hello that passes is judged as either side.
pub(super) fn setup_message(input: &[u8]) -> bool {
    let Ok(message) = SetupMessage::decode(input) else { return false };
    let again = message.encode();
    assert_eq!(SetupMessage::decode(&again), Ok(message.clone()), "it does not come back");
    let hello = match &message {
        SetupMessage::ControlHello { hello, .. } | SetupMessage::ControlAccept { hello } => {
            Some(hello)
        }
        _ => None,
    };
    // Control characters of a refusal's text are replaced.
    if !matches!(message, SetupMessage::Refused(_)) {
        assert!(again == input, "what was accepted is encoded otherwise");
    }
    if let Some(hello) = hello {
        let ours = super::seeds::hello();
        let _judged = (judge(hello, &ours), judge(&ours, hello), judge(hello, hello));
    }
    true
}

/// A line of the control socket, as a node and as a tool read it.
pub(super) fn control(input: &[u8]) -> bool {
    let request = serde_json::from_slice::<ControlRequest>(input).ok();
    if let Some(request) = &request {
        let line = serde_json::to_vec(request).expect("a request is plain data");
        assert_eq!(serde_json::from_slice::<ControlRequest>(&line).ok().as_ref(), Some(request));
    }
    let reply = serde_json::from_slice::<ControlReply>(input).ok();
    if let Some(reply) = &reply {
        let line = serde_json::to_vec(reply).expect("a reply is plain data");
        let again = serde_json::from_slice::<ControlReply>(&line).expect("a reply comes back");
        assert_eq!(serde_json::to_vec(&again).expect("a reply is plain data"), line);
    }
    request.is_some() || reply.is_some()
}
