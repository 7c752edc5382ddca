//! A worker's queue over a device that takes every command and answers 0: each fetch and each commit brings a request.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use twinpoint_core::contract::{CoordinatorAction, Order};
use twinpoint_core::geometry::Geometry;
use twinpoint_core::request::Outcome;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, CpNumber, ShardId, VolumeId};

use super::super::kernel::Descriptions;
use super::*;
use crate::buffers::{Arena, Pool};
use crate::clients::Clients;
use crate::gate::Gate;
use crate::mail::{Mail, Mailbox, connect};
use crate::nbd::Export;
use crate::shared::Shared;
use crate::store_port::{METADATA_BUFFERS, Operations, StorePort};
use crate::uring::{Uring, UringOptions, Wait};
use crate::wake::waker;

/// Of each of the two workers.
const BUFFERS: u32 = 8;
const NUMBER: u64 = 0xffff_ffff;

/// The second worker of two, and the mailbox of the first.
struct Rig {
    worker: Worker,
    coordinator: Mailbox,
}

impl Rig {
    /// With one queue of one tag, whose requests are all of this kind and of one block.
    fn new(kind: u32) -> Rig {
        let (wakers, mut sleepers): (Vec<_>, Vec<_>) =
            (0..2).map(|_| waker().expect("an eventfd")).unzip();
        let mut boxes = connect(&wakers, 2, 64, 64);
        let buffers = 2 * BUFFERS + METADATA_BUFFERS;
        let arena = Arc::new(Arena::new(buffers as usize * BLOCK_BYTES).expect("memory"));
        let geometry = Geometry::plan(1 << 18, 1, None, None).expect("sound");
        let gate = Gate::new(2, CpNumber(1));
        let shared = Shared::new(Arc::clone(&arena), gate, geometry, (2, 0), BUFFERS, 1 << 20);
        let mut uring = Uring::new(UringOptions::default()).expect("io_uring");
        uring.register_arena(&arena).expect("memory may be locked");
        let worker = Worker {
            index: 1,
            shared: Arc::new(shared),
            uring,
            sleeper: sleepers.pop().expect("two were made"),
            mailbox: boxes.pop().expect("two were made"),
            pool: Pool::new(BufferId(BUFFERS), BUFFERS, 0),
            store: StorePort::new(BufferId(2 * BUFFERS)),
            operations: Operations::default(),
            clients: Clients::default(),
            ublk: UblkPort::default(),
            shards: vec![None],
            coordinator: None,
            seals: VecDeque::new(),
            listeners: Vec::new(),
            accepting: false,
            next_client: 0,
            poll: Duration::ZERO,
            starved: false,
            ring_full: false,
            may_resume: false,
            ending: false,
            began: Instant::now(),
            round_began: Instant::now(),
        };
        let mut rig = Rig { worker, coordinator: boxes.remove(0) };
        rig.worker.ublk_attach(device(kind), 0).expect("there is room");
        rig
    }

    /// What the kernel was given is answered: a request comes.
    fn fetch(&mut self) {
        let mut completions = Vec::new();
        while completions.is_empty() {
            let wait = Wait::For(Duration::from_secs(5));
            self.worker.uring.submit_and_wait(wait).expect("it works");
            self.worker.uring.reap(&mut completions);
        }
        for completion in completions {
            let number = completion.user_data & NUMBER;
            self.worker.ublk_completed(number, completion.result).expect("it works");
        }
    }

    /// Commands that the kernel has, or is about to get.
    fn commands(&self) -> usize {
        self.worker.uring.in_flight()
    }

    fn clients(&self) -> u32 {
        self.worker.shared.clients.load(Ordering::Acquire)
    }
}

fn device(kind: u32) -> Arc<Device> {
    let mut description = [0; abi::DESCRIPTOR_BYTES];
    description[..4].copy_from_slice(&kind.to_le_bytes());
    description[4..8].copy_from_slice(&8_u32.to_le_bytes());
    let mut described = tempfile::tempfile().expect("a file");
    described.write_all(&description).expect("room");
    described.set_len(1 << 16).expect("room");
    let null = File::options().read(true).write(true).open("/dev/null").expect("it is there");
    Arc::new(Device {
        id: 0,
        queues: 1,
        depth: 1,
        export: Export { volume: VolumeId(1), size_bytes: 1 << 20, read_only: false },
        writes_through: true,
        descriptions: vec![Descriptions::map(&described, 0, 1).expect("it can be mapped")],
        file: null,
        is_given_up: AtomicBool::new(false),
    })
}

#[test]
fn a_queue_waits_for_room_as_long_as_its_device_may_start() {
    let mut rig = Rig::new(abi::KIND_FLUSH);
    let device = device(abi::KIND_FLUSH);
    let (room, before) = (rig.worker.uring.free(), rig.worker.ublk.queues.len());
    let ring = &mut rig.worker.uring;
    // Places that come back, and too few at the moment.
    for number in 0..room as u64 {
        ring.timeout(number, Duration::from_millis(1)).expect("there is room");
    }
    let mail = |rig: &mut Rig| rig.worker.mailbox.take(1);
    rig.worker.ublk_attach(Arc::clone(&device), 0).expect("it is put off");
    assert_eq!(rig.worker.ublk.queues.len(), before);
    assert!(matches!(mail(&mut rig), Some(Mail::Ublk(_, 0))), "it was dropped");
    device.is_given_up.store(true, Ordering::Release);
    rig.worker.ublk_attach(device, 0).expect("it is let go");
    assert!(mail(&mut rig).is_none(), "a device that was given up is waited for");
}

#[test]
fn a_device_that_is_kept_hears_nothing_of_the_stop() {
    for keeps in [false, true] {
        let mut rig = Rig::new(abi::KIND_FLUSH);
        rig.fetch();
        let Some(Mail::Flush(tag)) = rig.coordinator.take(1) else {
            panic!("a flush is asked for")
        };
        assert_eq!(rig.commands(), 0, "it waits");
        if keeps {
            rig.worker.shared.set_keeping();
        }
        rig.worker.ublk_flushed(tag, false).expect("it works");
        assert_eq!(rig.commands(), usize::from(!keeps), "committed as failed, unless it is kept");
        assert_eq!(rig.clients(), 1, "the queue is there until the node ends");
        rig.worker.ending = true;
        rig.worker.ublk_end().expect("it works");
        assert_eq!(rig.clients(), 0);
    }
}

#[test]
fn a_request_that_the_stop_refuses_is_kept_and_its_buffers_come_back() {
    for keeps in [false, true] {
        let mut rig = Rig::new(abi::KIND_READ);
        rig.fetch();
        let Some(Mail::Request(_, request)) = rig.coordinator.take(1) else { panic!("it is sent") };
        if keeps {
            rig.worker.shared.set_keeping();
        }
        let answer = Answer { tag: request.tag, outcome: Outcome::Failed };
        rig.worker.ublk_answer(answer).expect("it works");
        assert_eq!(rig.commands(), usize::from(!keeps), "committed as failed, unless it is kept");
        assert_eq!(rig.worker.pool.available(), BUFFERS);
    }
}

#[test]
fn a_flush_that_is_answered_after_the_end_lets_the_queue_go() {
    let mut rig = Rig::new(abi::KIND_FLUSH);
    rig.fetch();
    let Some(Mail::Flush(tag)) = rig.coordinator.take(1) else { panic!("a flush is asked for") };
    rig.worker.shared.set_keeping();
    rig.worker.ending = true;
    rig.worker.ublk_end().expect("it works");
    assert_eq!(rig.clients(), 1, "its answer will need the queue");
    rig.worker.ublk_flushed(tag, false).expect("it works");
    assert_eq!((rig.clients(), rig.commands()), (0, 0));
}

#[test]
fn what_waits_for_memory_fails_when_nothing_is_answered_well_any_more() {
    let mut rig = Rig::new(abi::KIND_READ);
    let taken = rig.worker.pool.allocate(BUFFERS).expect("all of it");
    rig.fetch();
    rig.worker.ublk_resume().expect("it works");
    assert_eq!(rig.commands(), 0, "it waits for memory");
    rig.worker.shared.set_holding(true);
    let failed = CoordinatorAction::Order(ShardId(0), Order::Fail);
    rig.worker.coordinator_action(failed);
    assert!(!rig.worker.shared.is_holding(), "held writers go on, to be refused");
    assert!(matches!(rig.coordinator.take(1), Some(Mail::Resume)));
    assert!(matches!(rig.worker.mailbox.take(1), Some(Mail::Resume)));
    rig.worker.ublk_resume().expect("it works");
    assert_eq!(rig.commands(), 1, "committed");
    // So is the next one, without a word from anybody.
    rig.fetch();
    assert_eq!(rig.commands(), 1);
    rig.worker.pool.free(taken.0, taken.1);
    assert_eq!(rig.worker.pool.available(), BUFFERS);
}
