//! A local client on a single node over a store in a file.

use std::path::Path;
use std::time::Duration;

use twinpoint_core::contract::{Command, Reply};
use twinpoint_core::coordinator::{OnPeerLoss, Replication};
use twinpoint_core::message::Role;

use super::*;
use crate::device::{Caching, DeviceError, Prefill};
use crate::node::{Node, NodeError};
use crate::options::{Choice, DeviceMode, NodeOptions, RdmaOptions};
use crate::store::{FormatOptions, format_store};

fn start(folder: &Path) -> Node {
    let options = NodeOptions {
        transport: Choice::Tcp,
        rdma: RdmaOptions::default(),
        store: folder.join("store"),
        device: DeviceMode::Block,
        role: Role::Primary,
        cores: Vec::new(),
        memory_bytes: 32 << 20,
        lent_bytes: 0,
        peer: None,
        listen: None,
        key_file: None,
        nbd: Vec::new(),
        control: folder.join("control"),
        replication: Replication::Sync,
        on_peer_loss: OnPeerLoss::Stall,
        cp_interval: Duration::from_secs(1),
        cp_bytes: 4 << 20,
        cp_in_flight: 4,
        peer_timeout: Duration::from_secs(5),
        lag_points: 1024,
        lag_bytes: 1 << 28,
        lag_time: Duration::from_secs(10),
        poll: Duration::from_micros(50),
        ring_entries: 64,
        buffered: true,
        ublk: crate::options::UblkOptions::default(),
    };
    // The kernel closes a store that an io_uring knew only some time after the ring is gone.
    for _ in 0..500 {
        match Node::start_with_local(options.clone(), 1) {
            Err(NodeError::Device(DeviceError::InUse { .. })) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            node => return node.unwrap(),
        }
    }
    panic!("the store stays in use");
}

fn format(folder: &Path) {
    let options = FormatOptions {
        size_bytes: Some(128 << 20),
        shards: 2,
        journal_blocks: None,
        segments_max: None,
        store_id: None,
        force: false,
        prefill: Prefill::None,
        caching: Caching::BufferedAllowed,
    };
    format_store(&folder.join("store"), &options).unwrap();
}

/// A node that has just started serves its volumes a moment later.
fn open(client: &mut LocalClient) -> LocalVolume {
    loop {
        if let Some(volume) = client.open("disk") {
            return volume;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn settle(client: &mut LocalClient) -> Vec<Completion> {
    let mut completions = Vec::new();
    loop {
        client.poll(&mut completions);
        if client.in_flight() == 0 {
            return completions;
        }
        client.wait();
    }
}

fn stop(node: Node) {
    node.handle().stop();
    node.wait().unwrap();
}

#[test]
fn writes_flushes_and_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    format(folder.path());
    let node = start(folder.path());
    let size_bytes = 16 << 20;
    let create = Command::VolumeCreate { name: "disk".to_owned(), size_bytes };
    assert!(matches!(node.handle().command(create), Reply::Volume(_)));
    let mut client = node.handle().local_client().unwrap();
    assert!(node.handle().local_client().is_none());
    assert!(client.open("other").is_none());
    let volume = open(&mut client);
    assert_eq!(volume.size_bytes, size_bytes);
    let length = COMMAND_BYTES_MAX;
    // Across a stripe's end, so that two shards take part.
    let offset = SEGMENT_BLOCKS * BLOCK_BYTES as u64 - 8192;
    let bytes: Vec<u8> = (0..length).map(|index| (index / 512) as u8).collect();
    client.write(volume, offset, &bytes, 1).unwrap();
    client.write(volume, 0, &[7; BLOCK_BYTES], 2).unwrap();
    assert!(settle(&mut client).iter().all(|done| done.result == Ok(Vec::new())));
    client.flush(3).unwrap();
    assert_eq!(settle(&mut client), [Completion { user_data: 3, result: Ok(Vec::new()) }]);
    client.read(volume, offset, length, 4).unwrap();
    assert_eq!(settle(&mut client), [Completion { user_data: 4, result: Ok(bytes.clone()) }]);
    drop(client);
    stop(node);
    let node = start(folder.path());
    let mut client = node.handle().local_client().unwrap();
    let volume = open(&mut client);
    client.read(volume, offset, length, 5).unwrap();
    assert_eq!(settle(&mut client), [Completion { user_data: 5, result: Ok(bytes) }]);
    client.read(volume, 0, 2 * BLOCK_BYTES, 6).unwrap();
    let first = [[7; BLOCK_BYTES], [0; BLOCK_BYTES]].concat();
    assert_eq!(settle(&mut client), [Completion { user_data: 6, result: Ok(first) }]);
    node.handle().stop();
    while !client.is_over() {
        client.wait();
        client.poll(&mut Vec::new());
    }
    assert_eq!(client.flush(7), Err(SubmitError::Over));
    node.wait().unwrap();
}

#[test]
fn goes_on_when_memory_and_rings_are_full() {
    let folder = tempfile::tempdir().unwrap();
    format(folder.path());
    let node = start(folder.path());
    let create = Command::VolumeCreate { name: "disk".to_owned(), size_bytes: 64 << 20 };
    assert!(matches!(node.handle().command(create), Reply::Volume(_)));
    let mut client = node.handle().local_client().unwrap();
    let volume = open(&mut client);
    for range in [(0, 0), (512, 4096), (0, 512), (64 << 20, 4096), (0, COMMAND_BYTES_MAX + 4096)] {
        let (offset, length) = range;
        let error = client.write(volume, offset, &vec![0; length], 0);
        assert_eq!(error, Err(SubmitError::Range { offset, length }));
    }
    let mut completions = Vec::new();
    let (mut refused, total) = (0, 20_000_u64);
    for number in 0..total {
        let block = number * 7919 % (64 << 8);
        let bytes = [(number % 251) as u8; BLOCK_BYTES];
        while let Err(error) = client.write(volume, block * 4096, &bytes, number) {
            assert!(matches!(error, SubmitError::NoMemory | SubmitError::TooMany), "{error}");
            refused += 1;
            client.wait();
            client.poll(&mut completions);
        }
    }
    completions.extend(settle(&mut client));
    assert!(refused > 0 && completions.len() as u64 == total);
    assert!(completions.iter().all(|done| done.result == Ok(Vec::new())));
    drop(client);
    stop(node);
}
