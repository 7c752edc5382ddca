//! Round trips of what the runtime says beside the core: set-up messages between nodes, and the lines of the control
//! socket.

use proptest::prelude::*;
use twinpoint_core::geometry::Geometry;
use twinpoint_core::message::{Hello, Role};
use twinpoint_core::superblock::TermStart;
use twinpoint_core::units::{CpNumber, Root, SHARDS_MAX, ShardId, StoreId, Term};
use twinpoint_runtime::control::{ControlReply, ControlRequest};
use twinpoint_runtime::link::LENT_BLOCKS_MAX;
use twinpoint_runtime::link::setup_message::{SETUP_BYTES_MAX, SessionId, SetupMessage, Told};

prop_compose! {
    /// A hello that a store could say.
    fn hellos()(
        is_primary: bool, store: [u8; 16], mib in 64u64..1 << 20, shards in 1u16..4,
        numbers in any::<[u32; 3]>(), steps in prop::collection::vec(1u64..1000, 0..128),
        roots in any::<[u128; 3]>(),
    ) -> Box<Hello> {
        let geometry = Geometry::plan(mib * 256, shards, None, None);
        let mut first = 0;
        let start = |(index, step)| {
            first += step;
            TermStart { term: Term(index as u64 + 1), first: CpNumber(first) }
        };
        Box::new(Hello {
            role: if is_primary { Role::Primary } else { Role::Secondary },
            store: StoreId(store),
            geometry: geometry.expect("64 MiB hold three shards"),
            term: Term(u64::from(numbers[0]) + 128),
            history: steps.into_iter().enumerate().map(start).collect(),
            last: CpNumber(u64::from(numbers[1])),
            base: CpNumber(u64::from(numbers[2])),
            roots: roots[..usize::from(shards)].iter().map(|root| Root(*root)).collect(),
        })
    }
}

fn setup_messages() -> impl Strategy<Value = SetupMessage> {
    let session = any::<[u8; 16]>().prop_map(SessionId);
    let lane = (0..SHARDS_MAX, 0..=LENT_BLOCKS_MAX);
    prop_oneof![
        (session.clone(), hellos())
            .prop_map(|(session, hello)| SetupMessage::ControlHello { session, hello }),
        hellos().prop_map(|hello| SetupMessage::ControlAccept { hello }),
        (any::<u16>(), "[^\\p{C}]{0,100}", prop::option::of(hellos()))
            .prop_map(|(code, text, hello)| SetupMessage::Refused(Told { code, text, hello })),
        (session, lane.clone()).prop_map(|(session, (shard, lent_blocks))| {
            SetupMessage::LaneHello { session, shard: ShardId(shard), lent_blocks }
        }),
        lane.prop_map(|(shard, lent_blocks)| {
            SetupMessage::LaneAccept { shard: ShardId(shard), lent_blocks }
        }),
        Just(SetupMessage::Proceed),
        Just(SetupMessage::Ready),
    ]
}

fn requests() -> impl Strategy<Value = ControlRequest> {
    let name = || any::<String>();
    prop_oneof![
        Just(ControlRequest::Status),
        Just(ControlRequest::VolumeList),
        Just(ControlRequest::Stop),
        prop::option::of(name()).prop_map(|name| ControlRequest::Checkpoint { name }),
        (name(), any::<u64>())
            .prop_map(|(name, size_bytes)| ControlRequest::VolumeCreate { name, size_bytes }),
        name().prop_map(|name| ControlRequest::VolumeDelete { name }),
        any::<bool>().prop_map(|force| ControlRequest::Promote { force }),
    ]
}

prop_compose! {
    fn replies()(
        ok: bool, texts in any::<[Option<String>; 3]>(), numbers in any::<[Option<u64>; 2]>(),
        volume: Option<u32>,
    ) -> ControlReply {
        let [kind, error, root] = texts;
        let [cp, term] = numbers;
        ControlReply { ok, kind, error, cp, root, term, volume, ..ControlReply::default() }
    }
}

proptest! {
    #[test]
    fn setup_messages_come_back(
        message in setup_messages(), changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..5),
    ) {
        let mut bytes = message.encode();
        prop_assert!(bytes.len() <= SETUP_BYTES_MAX);
        prop_assert_eq!(SetupMessage::decode(&bytes), Ok(message));
        changes.iter().for_each(|(index, byte)| *index.get_mut(&mut bytes) = *byte);
        if let Ok(message) = SetupMessage::decode(&bytes) {
            // Only a refusal's text is put right, so only it may be encoded otherwise.
            let again = message.encode();
            prop_assert!(again == bytes || matches!(message, SetupMessage::Refused(_)));
            prop_assert_eq!(SetupMessage::decode(&again), Ok(message));
        }
    }

    #[test]
    fn control_lines_come_back(request in requests(), reply in replies()) {
        let line = serde_json::to_string(&request).expect("a request is plain data");
        prop_assert!(!line.contains('\n'), "one line");
        prop_assert_eq!(serde_json::from_str::<ControlRequest>(&line).ok(), Some(request));
        let line = serde_json::to_string(&reply).expect("a reply is plain data");
        prop_assert!(!line.contains('\n'), "one line");
        prop_assert_eq!(serde_json::from_str::<ControlReply>(&line).ok(), Some(reply));
    }
}
