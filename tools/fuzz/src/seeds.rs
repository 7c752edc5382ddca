//! What the fuzzer begins with: for each target inputs that a decoder accepts, made by the encoders.

use twinpoint_core::catalog::Catalog;
use twinpoint_core::delta::{Delta, VolumeDelta};
use twinpoint_core::directory::{self, DirectoryEntry};
use twinpoint_core::geometry::MapSlot;
use twinpoint_core::message::{Hello, LaneMessage, PeerMessage, Role};
use twinpoint_core::record::{DataRun, Record};
use twinpoint_core::shard_header::{JournalPosition, ShardHeader};
use twinpoint_core::superblock::{Superblock, TermStart};
use twinpoint_core::units::{
    Checksum, CpNumber, DataBlock, LocalBlock, Root, ShardId, ShardSet, StoreId, Term, VolumeId,
};
use twinpoint_runtime::control::{ControlReply, ControlRequest};
use twinpoint_runtime::link::setup_message::{SessionId, SetupMessage, Told};

use super::formats::geometry;

const STORE: StoreId = StoreId(*b"0123456789abcdef");

/// The superblock of a new store of [`geometry`].
pub(super) fn superblock() -> Superblock {
    Superblock {
        store: STORE,
        geometry: geometry(),
        sequence: 1,
        term: Term(1),
        history: vec![TermStart { term: Term(1), first: CpNumber(1) }],
        committed: CpNumber(0),
        base: CpNumber(0),
        paired: false,
        alone_since: None,
        base_given_up: false,
        deposed_by: None,
        branch: None,
        secondary: false,
        clean: true,
    }
}

/// What a secondary says of itself.
pub(super) fn hello() -> Hello {
    Hello {
        role: Role::Secondary,
        store: STORE,
        geometry: geometry(),
        term: Term(3),
        history: vec![
            TermStart { term: Term(1), first: CpNumber(1) },
            TermStart { term: Term(3), first: CpNumber(40) },
        ],
        last: CpNumber(55),
        base: CpNumber(50),
        roots: vec![Root(7), Root(1 << 90)],
    }
}

/// Inputs for the target with this name. Each is accepted.
///
/// # Panics
/// If there is no such target.
#[must_use]
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "superblock" => superblocks(),
        "shard_header" => vec![trimmed(shard_header().encode())],
        "directory" => vec![trimmed(directory()), trimmed(directory::encode(&[], &Catalog::new()))],
        "segment" => segments(),
        "catalog" => vec![Catalog::new().encode(), catalog().encode()],
        "delta" => deltas().iter().map(Delta::encode).collect(),
        "record" => records().iter().map(|record| trimmed(record.encode())).collect(),
        "record_on_wire" => records().iter().map(Record::encode_wire).collect(),
        "message" => messages(),
        "setup_message" => setup_messages(),
        // No change, and one without an effect: the first byte of the data zone's first block, as it is.
        "recovery" => vec![vec![], vec![0, 0, 0, 0, 0, 6]],
        "handshake" => vec![[b"twinwire\x01\0\x01\0\0\0\0\0".as_slice(), &[9; 64]].concat()],
        "channel" => {
            vec![vec![1, 5, 0], vec![3, 0, 0, 200, 0, 0, 4], vec![2, 9, 0, 9, 0, 60, 0, 1]]
        }
        "frames" => frames(),
        "nbd_options" => nbd_options(),
        "nbd_requests" => nbd_requests(),
        "control" => controls(),
        _ => panic!("no target {target}"),
    }
}

/// Without the zeroes that fill a structure's last block.
fn trimmed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(end);
    bytes
}

fn superblocks() -> Vec<Vec<u8>> {
    let mut used = superblock();
    used.sequence = 9;
    used.term = Term(3);
    used.history = hello().history;
    used.committed = CpNumber(55);
    used.base = CpNumber(50);
    used.paired = true;
    used.alone_since = Some(CpNumber(51));
    used.clean = false;
    // Their checksums, at the block's end, are put right by the target.
    [superblock(), used].iter().map(|each| trimmed(each.encode()[..4000].to_vec())).collect()
}

fn shard_header() -> ShardHeader {
    ShardHeader {
        store: STORE,
        shard: ShardId(1),
        sequence: 9,
        checkpoint: CpNumber(44),
        root: Root(0x1234_5678),
        directory_area: 1,
        directory_bytes: 4096,
        directory_checksum: 0xfeed,
        journal: JournalPosition { index: 17, sequence: 88, previous: 0xabcd },
    }
}

fn catalog() -> Catalog {
    let mut catalog = Catalog::new();
    for (name, size_bytes) in [("boot", 1 << 30), ("gone", 4096), ("data.1", 1 << 40)] {
        catalog.create(name, size_bytes).expect("room for three volumes");
    }
    catalog.delete("gone").expect("it was created");
    catalog
}

fn directory() -> Vec<u8> {
    let entry = |index: u32| DirectoryEntry {
        volume: VolumeId(1 + index / 4),
        segment: u64::from(index),
        slot: MapSlot(index * 3),
        checksum: u64::from(index) << 40,
    };
    directory::encode(&(0..6).map(entry).collect::<Vec<_>>(), &catalog())
}

fn segments() -> Vec<Vec<u8>> {
    let slot = |slot: u16, block: u8| {
        let [low, high] = slot.to_le_bytes();
        [low, high, block, block, 0, 1, 2, 3]
    };
    let some = [slot(0, 1), slot(511, 2), slot(12, 200)].concat();
    let most = (0..512).step_by(5).map(|index| slot(index, index as u8)).collect::<Vec<_>>();
    vec![some, most.concat()]
}

fn deltas() -> Vec<Delta> {
    let mut first = VolumeDelta::new(VolumeId(1));
    (100..140).for_each(|block| first.push_mapped(LocalBlock(block)));
    [7, 200, 201, 5000].iter().for_each(|block| first.push_unmapped(LocalBlock(*block)));
    let mut second = VolumeDelta::new(VolumeId(2));
    (0..20).for_each(|index| second.push_mapped(LocalBlock(index * index * 97 + 1)));
    let one = Delta { volumes: vec![first.clone()] };
    vec![Delta::default(), one, Delta { volumes: vec![first, second] }]
}

fn records() -> Vec<Record> {
    let record = |delta: Delta| {
        let mapped = delta.mapped_count() as u32;
        Record {
            store: STORE,
            shard: ShardId(1),
            term: Term(3),
            cp: CpNumber(56),
            participants: ShardSet::all(2),
            committed: CpNumber(55),
            base: CpNumber(50),
            root_before: Root(1 << 100),
            root_after: Root(12_345),
            sequence: 89,
            previous: 0xdddd,
            name: (mapped > 0).then(|| "before upgrade".to_owned()),
            catalog: (mapped > 40).then(catalog),
            delta,
            runs: match mapped {
                0 => vec![],
                more => vec![DataRun { first: DataBlock(1000), count: more }],
            },
            checksums: (0..mapped).map(|index| Checksum(index * 7 + 1)).collect(),
        }
    };
    deltas().into_iter().map(record).collect()
}

fn messages() -> Vec<Vec<u8>> {
    let (term, cp) = (Term(3), CpNumber(9));
    let lane = [
        LaneMessage::Data {
            term,
            cp,
            base: CpNumber(7),
            first: DataBlock(77),
            checksums: vec![Checksum(1), Checksum(2)],
        },
        LaneMessage::Part { term, cp, total: 300, bytes: vec![5; 100] },
        LaneMessage::Credit { term, placements: 4 },
    ];
    let peer = [
        PeerMessage::Progress { term, received: cp, durable: CpNumber(8) },
        PeerMessage::Committed { term, committed: cp, base: CpNumber(8) },
        PeerMessage::Heartbeat { term },
        PeerMessage::Diverged {
            term,
            cp,
            shard: ShardId(1),
            segments: vec![(VolumeId(1), 4, Root(5)), (VolumeId(2), 0, Root(6))],
        },
    ];
    let mut seeds = vec![hello().encode()];
    seeds.extend(lane.iter().map(LaneMessage::encode));
    seeds.extend(peer.iter().map(PeerMessage::encode));
    seeds
}

fn setup_messages() -> Vec<Vec<u8>> {
    let session = SessionId([9; 16]);
    let hello = || Box::new(hello());
    let told = |hello| SetupMessage::Refused(Told { code: 14, text: "too far".to_owned(), hello });
    let messages = [
        SetupMessage::ControlHello { session, hello: hello() },
        SetupMessage::ControlAccept { hello: hello() },
        told(None),
        told(Some(hello())),
        SetupMessage::LaneHello { session, shard: ShardId(1), lent_blocks: 0 },
        SetupMessage::LaneAccept { shard: ShardId(1), lent_blocks: 1 << 14 },
        SetupMessage::Proceed,
        SetupMessage::Ready,
    ];
    messages.iter().map(SetupMessage::encode).collect()
}

fn frames() -> Vec<Vec<u8>> {
    let post = |message: u16, placed: u16, target: u16| {
        let [a, b] = message.to_le_bytes();
        let [c, d] = placed.to_le_bytes();
        let [e, f] = target.to_le_bytes();
        [7, a, b, c, d, e, f]
    };
    let three = [post(100, 4096, 4096), post(0, 0, 0), post(8192, 8000, 1)].concat();
    vec![
        [&[1][..], &post(5, 0, 0)].concat(),
        [&[3 + 16][..], &three].concat(),
        [&[3 + 25][..], &three, &[0xcc, 0x10, 1]].concat(),
        [&[2][..], &post(9, 100, 0), &post(9, 100, u16::MAX)].concat(),
    ]
}

fn option(number: u8, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT\0\0\0", &[number][..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn nbd_options() -> Vec<Vec<u8>> {
    let start = |how: u8| vec![how, 0, 0, 0, 3];
    let info = b"\0\0\0\x04disk\0\x03\0\0\0\x01\0\x03";
    let context = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    let whole = [
        start(2),
        option(3, b""),
        option(6, info),
        option(8, b""),
        option(9, context),
        option(10, context),
        option(77, b"?"),
        option(7, info),
        command(0, 0, 0, 512),
        command(2, 0, 0, 0),
    ];
    let old = [start(0), option(1, b"disk"), command(3, 0, 0, 0)];
    let gone = [start(1), option(7, b"\0\0\0\0\0\0"), command(2, 0, 0, 0)];
    vec![whole.concat(), old.concat(), gone.concat()]
}

fn command(number: u8, flags: u8, offset: u64, length: u32) -> Vec<u8> {
    let head = [0x25, 0x60, 0x95, 0x13, 0, flags, 0, number];
    let cookie = [number; 8];
    [&head[..], &cookie, &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

fn nbd_requests() -> Vec<Vec<u8>> {
    let few = [
        command(1, 1, 512, 600),
        vec![1; 600],
        command(0, 0, 0, 8192),
        command(3, 0, 0, 0),
        command(4, 0, 4096, 1 << 20),
        command(6, 2, 0, 1 << 20),
        command(7, 8, 0, 3 << 20),
        command(0, 4, 0, 3 << 20),
    ];
    let few = few.concat();
    let large = [command(1, 0, 4096, 20_000), vec![3; 20_000], command(0, 0, 0, 3 << 20)].concat();
    let cut = [command(0, 0, 512, 1 << 20), command(1, 0, 0, 2 << 20), vec![9; 100]].concat();
    let ways: [u8; 4] = [0, 0b0101_1110, 0b0001_0001, 0b0010_1011];
    let mut seeds = ways.iter().map(|how| [&[*how][..], &few].concat()).collect::<Vec<_>>();
    seeds.push([&[0b0000_0111][..], &large].concat());
    seeds.push([&[0b0110_0100][..], &cut].concat());
    seeds
}

fn controls() -> Vec<Vec<u8>> {
    let name = || "disk".to_owned();
    let requests = [
        ControlRequest::Status,
        ControlRequest::Checkpoint { name: Some(name()) },
        ControlRequest::VolumeCreate { name: name(), size_bytes: 1 << 30 },
        ControlRequest::VolumeDelete { name: name() },
        ControlRequest::Promote { force: true },
    ];
    let reply = ControlReply { ok: true, cp: Some(7), root: Some(name()), ..Default::default() };
    let mut seeds = requests
        .iter()
        .map(|request| serde_json::to_vec(request).expect("a request is plain data"))
        .collect::<Vec<_>>();
    seeds.push(serde_json::to_vec(&reply).expect("a reply is plain data"));
    seeds
}
