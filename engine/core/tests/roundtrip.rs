//! Round trips of what the wire carries: every message, every part of a record, every varint comes back, no piece of
//! one is taken for a whole, and what any bytes are accepted as is encoded as it came.
//!
//! The formats of the store have theirs in `formats.rs`.

use proptest::prelude::*;
use twinpoint_core::codec::{Reader, Writer};
use twinpoint_core::delta::{Delta, DeltaLimits, VolumeDelta};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::limits::{HISTORY_MAX, LOCAL_BLOCKS_MAX, RECORD_BLOCKS_MAX};
use twinpoint_core::message::{
    DATA_BLOCKS_PER_MESSAGE_MAX, DIVERGED_SEGMENTS_MAX, Hello, LaneMessage, PART_BYTES_MAX,
    PeerMessage, Role,
};
use twinpoint_core::superblock::TermStart;
use twinpoint_core::units::{
    BLOCK_BYTES, Checksum, CpNumber, DataBlock, LocalBlock, Root, SHARDS_MAX, ShardId, StoreId,
    Term, VolumeId,
};

prop_compose! {
    fn hellos()(
        is_primary: bool, store: [u8; 16], shards: u16, region_blocks: u64, zones: [u32; 3],
        numbers: [u64; 3],
        history in prop::collection::vec((any::<u64>(), any::<u64>()), 0..=HISTORY_MAX),
        roots in prop::collection::vec(any::<u128>(), 0..=usize::from(SHARDS_MAX)),
    ) -> Hello {
        let [journal_blocks, map_slots, directory_blocks] = zones;
        let start = |(term, first)| TermStart { term: Term(term), first: CpNumber(first) };
        Hello {
            role: if is_primary { Role::Primary } else { Role::Secondary },
            store: StoreId(store),
            geometry: Geometry { shards, region_blocks, journal_blocks, map_slots, directory_blocks },
            term: Term(numbers[0]),
            history: history.into_iter().map(start).collect(),
            last: CpNumber(numbers[1]),
            base: CpNumber(numbers[2]),
            roots: roots.into_iter().map(Root).collect(),
        }
    }
}

fn lane_messages() -> impl Strategy<Value = LaneMessage> {
    let most = DATA_BLOCKS_PER_MESSAGE_MAX as usize;
    let data = (any::<[u64; 3]>(), any::<u32>(), prop::collection::vec(any::<u32>(), 1..=most));
    let part = (any::<[u64; 2]>(), 0..=RECORD_BLOCKS_MAX * BLOCK_BYTES as u32);
    prop_oneof![
        data.prop_map(|([term, cp, base], first, checksums)| LaneMessage::Data {
            term: Term(term),
            cp: CpNumber(cp),
            base: CpNumber(base),
            first: DataBlock(first),
            checksums: checksums.into_iter().map(Checksum).collect(),
        }),
        (part, prop::collection::vec(any::<u8>(), 1..=PART_BYTES_MAX)).prop_map(
            |(([term, cp], total), bytes)| LaneMessage::Part {
                term: Term(term),
                cp: CpNumber(cp),
                total,
                bytes
            }
        ),
        any::<(u64, u32)>()
            .prop_map(|(term, placements)| LaneMessage::Credit { term: Term(term), placements }),
    ]
}

fn peer_messages() -> impl Strategy<Value = PeerMessage> {
    let numbers = any::<[u64; 3]>();
    let segment = any::<(u32, u64, u128)>();
    let segments = prop::collection::vec(segment, 0..=DIVERGED_SEGMENTS_MAX);
    prop_oneof![
        numbers.prop_map(|[term, received, durable]| PeerMessage::Progress {
            term: Term(term),
            received: CpNumber(received),
            durable: CpNumber(durable),
        }),
        numbers.prop_map(|[term, committed, base]| PeerMessage::Committed {
            term: Term(term),
            committed: CpNumber(committed),
            base: CpNumber(base),
        }),
        any::<u64>().prop_map(|term| PeerMessage::Heartbeat { term: Term(term) }),
        (any::<[u64; 2]>(), 0..SHARDS_MAX, segments).prop_map(|([term, cp], shard, segments)| {
            let named = |(volume, segment, root)| (VolumeId(volume), segment, Root(root));
            PeerMessage::Diverged {
                term: Term(term),
                cp: CpNumber(cp),
                shard: ShardId(shard),
                segments: segments.into_iter().map(named).collect(),
            }
        }),
    ]
}

/// The message comes back; with bytes missing or left over it is refused, except where `open_end` says that its last
/// field goes on to the end.
fn assert_comes_back<T: PartialEq + std::fmt::Debug>(
    message: &T,
    bytes: &[u8],
    open_end: bool,
    decode: impl Fn(&[u8]) -> Option<T>,
) -> Result<(), TestCaseError> {
    let decoded = decode(bytes);
    prop_assert_eq!(decoded.as_ref(), Some(message));
    if !open_end {
        prop_assert_eq!(decode(&[bytes, &[0]].concat()), None);
        for length in (0..bytes.len()).step_by(1 + bytes.len() / 40) {
            prop_assert_eq!(decode(&bytes[..length]), None);
        }
    }
    Ok(())
}

/// Bytes that are nearly a message: one with a few bytes changed.
fn changed(mut bytes: Vec<u8>, changes: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    changes.iter().for_each(|(index, byte)| *index.get_mut(&mut bytes) = *byte);
    bytes
}

fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..5)
}

proptest! {
    #[test]
    fn hellos_come_back(hello in hellos(), changes in changes()) {
        let bytes = hello.encode();
        assert_comes_back(&hello, &bytes, false, |bytes| Hello::decode(bytes).ok())?;
        let changed = changed(bytes, &changes);
        if let Ok(hello) = Hello::decode(&changed) {
            prop_assert_eq!(hello.encode(), changed);
        }
    }

    #[test]
    fn lane_messages_come_back(message in lane_messages(), changes in changes()) {
        let bytes = message.encode();
        let is_part = matches!(message, LaneMessage::Part { .. });
        prop_assert_eq!(LaneMessage::is_part(&bytes), is_part);
        assert_comes_back(&message, &bytes, is_part, |bytes| LaneMessage::decode(bytes).ok())?;
        let changed = changed(bytes, &changes);
        if let Ok(message) = LaneMessage::decode(&changed) {
            prop_assert_eq!(message.encode(), changed);
        }
    }

    #[test]
    fn peer_messages_come_back(message in peer_messages(), changes in changes()) {
        let bytes = message.encode();
        assert_comes_back(&message, &bytes, false, |bytes| PeerMessage::decode(bytes).ok())?;
        let changed = changed(bytes, &changes);
        if let Ok(message) = PeerMessage::decode(&changed) {
            prop_assert_eq!(message.encode(), changed);
        }
    }

    /// Any bytes: a delta has one encoding, so nothing else may be taken for it.
    #[test]
    fn accepted_deltas_are_encoded_as_they_came(
        blocks in prop::collection::btree_set(0..LOCAL_BLOCKS_MAX, 1..20), changes in changes(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut volume = VolumeDelta::new(VolumeId(1));
        blocks.iter().for_each(|block| volume.push_mapped(LocalBlock(*block)));
        let bytes = Delta { volumes: vec![volume] }.encode();
        let mut wrong = changed(bytes.clone(), &changes);
        for _ in 0..2 {
            if let Ok(delta) = Delta::decode(&wrong, DeltaLimits::RECORD) {
                prop_assert_eq!(delta.encode(), wrong.clone());
            }
            wrong = bytes[..cut.index(bytes.len())].to_vec();
        }
    }

    #[test]
    fn varints_come_back_in_one_form(value: u64, shift in 0u32..64, bytes: [u8; 11]) {
        let mut writer = Writer::new();
        writer.put_varint(value >> shift);
        let written = writer.finish();
        let mut reader = Reader::new(&written);
        prop_assert_eq!(reader.get_varint(), Ok(value >> shift));
        prop_assert_eq!(reader.remaining(), 0);
        let mut reader = Reader::new(&bytes);
        if let Ok(value) = reader.get_varint() {
            let mut writer = Writer::new();
            writer.put_varint(value);
            prop_assert_eq!(writer.finish(), &bytes[..reader.position()]);
        }
    }
}
