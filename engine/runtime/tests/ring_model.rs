//! The ring, the gate, the wake-up and buffers that change hands between threads: against models, and in every
//! interleaving under loom.
//!
//! `cargo test --test ring_model` runs the first kind,
//! `RUSTFLAGS="--cfg loom" cargo test --release --test ring_model` the second.

#[cfg(not(loom))]
mod threads {
    use std::collections::VecDeque;
    use std::sync::atomic::{AtomicU8, Ordering};
    use twinpoint_core::units::{BLOCK_BYTES, BufferId, CpNumber, ShardId};
    use twinpoint_runtime::buffers::{Arena, Pool};
    use twinpoint_runtime::gate::Gate;
    use twinpoint_runtime::ring::{Consumer, Producer, ring};

    /// A fixed-seed xorshift: the same run every time.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }
    }

    #[test]
    fn ring_is_a_bounded_queue() {
        for seed in 1..=50 {
            let mut random = Random(seed * 0x9E37_79B9);
            let capacity = 1 << random.below(6);
            let (mut producer, mut consumer) = ring(capacity);
            let mut model = VecDeque::new();
            for step in 0..2_000_u64 {
                match random.below(8) {
                    0 => assert_eq!(producer.free(), capacity - model.len()),
                    1 => assert_eq!(consumer.len(), model.len()),
                    2 => assert_eq!(consumer.is_empty(), model.is_empty()),
                    3..=5 => {
                        let item = Box::new(step);
                        if model.len() == capacity {
                            assert_eq!(producer.push(item.clone()), Err(item));
                        } else {
                            model.push_back(item.clone());
                            assert_eq!(producer.push(item), Ok(()));
                        }
                    }
                    _ => assert_eq!(consumer.pop(), model.pop_front()),
                }
            }
        }
    }

    #[test]
    fn ring_keeps_order_between_threads() {
        const ITEMS: u64 = 1_000_000;
        for capacity in [2, 1024] {
            let (mut producer, mut consumer) = ring(capacity);
            let sender = std::thread::spawn(move || {
                for item in 0..ITEMS {
                    while producer.push(item).is_err() {
                        std::thread::yield_now();
                    }
                }
            });
            for expected in 0..ITEMS {
                let item = loop {
                    match consumer.pop() {
                        Some(item) => break item,
                        None => std::thread::yield_now(),
                    }
                };
                assert_eq!(item, expected);
            }
            assert!(consumer.is_empty());
            sender.join().unwrap();
        }
    }

    #[test]
    fn every_push_is_in_the_cp_of_its_stamp() {
        const PUSHES: u64 = 100_000;
        let gate = Gate::new(1, CpNumber(1));
        let (mut producer, mut consumer) = ring(256);
        let mut sealed = CpNumber(0);
        let mut popped = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut pushed = 0;
                while pushed < PUSHES {
                    let admission = gate.admit(0);
                    if producer.push(admission.stamp()).is_ok() {
                        admission.mark(ShardId(0));
                        pushed += 1;
                    }
                }
            });
            while popped < PUSHES {
                let closed = gate.close();
                while !gate.quiesced(closed) {
                    std::hint::spin_loop();
                }
                let marked = !gate.participants(closed).is_empty();
                let mut found = false;
                for _ in 0..consumer.len() {
                    let stamp = consumer.pop().unwrap();
                    assert!(stamp > sealed, "{stamp} came after {sealed} was sealed");
                    found |= stamp == closed;
                    popped += 1;
                }
                // An item of the closed CP may have been popped with the one before it.
                assert!(marked || !found);
                sealed = closed;
            }
        });
    }

    /// Who may touch each buffer, and that everybody agrees about it.
    struct Owners(Vec<AtomicU8>);

    const FREE: u8 = 0;
    const FRONTEND: u8 = 1;
    const SHARD: u8 = 2;

    impl Owners {
        fn hand(&self, first: BufferId, count: u32, from: u8, to: u8) {
            for buffer in first.0..first.0 + count {
                let before = self.0[buffer as usize].swap(to, Ordering::Relaxed);
                assert_eq!(before, from, "buffer {buffer} changes hands");
            }
        }
    }

    /// A write: consecutive buffers, and what their bytes are made of.
    type Sent = (BufferId, u32, u64);

    fn fill(arena: &Arena, first: BufferId, count: u32, content: u64) {
        for index in 0..count {
            let bytes = (content + u64::from(index)).to_le_bytes().repeat(BLOCK_BYTES / 8);
            arena.copy_in(BufferId(first.0 + index), 0, &bytes);
        }
        arena.checksum_compute(first, count);
    }

    fn check(arena: &Arena, first: BufferId, count: u32, content: u64) {
        let mut kept = Vec::new();
        arena.checksums(first, count, &mut kept);
        assert_eq!(arena.verify(first, &kept), None, "the checksums came with the bytes");
        for index in 0..count {
            let mut bytes = [0; 8];
            arena.copy_out(BufferId(first.0 + index), BLOCK_BYTES - 8, &mut bytes);
            assert_eq!(u64::from_le_bytes(bytes), content + u64::from(index));
        }
    }

    /// The frontend: takes buffers while there are any, fills and sends them, and takes back what comes home.
    fn front(
        (arena, owners, seed): (&Arena, &Owners, u64),
        pool: &mut Pool,
        requests: &mut Producer<Sent>,
        freed: &mut Consumer<(BufferId, u32)>,
    ) {
        const WRITES: u64 = 30_000;
        let mut random = Random(seed);
        let mut sent = 0;
        while sent < WRITES || pool.available() < pool.capacity() {
            while let Some((first, count)) = freed.pop() {
                owners.hand(first, count, SHARD, FREE);
                pool.free(first, count);
            }
            let found =
                if sent == WRITES { None } else { pool.allocate(1 + random.below(9) as u32) };
            let Some((first, count)) = found else {
                std::thread::yield_now();
                continue;
            };
            owners.hand(first, count, FREE, FRONTEND);
            fill(arena, first, count, sent << 8);
            owners.hand(first, count, FRONTEND, SHARD);
            while requests.push((first, count, sent << 8)).is_err() {
                std::thread::yield_now();
            }
            sent += 1;
        }
    }

    #[test]
    fn buffers_have_one_owner_on_their_way_through_a_shard() {
        const BUFFERS: u32 = 48;
        let arena = Arena::new(BUFFERS as usize * BLOCK_BYTES).unwrap();
        let owners = Owners((0..BUFFERS).map(|_| AtomicU8::new(FREE)).collect());
        let mut pool = Pool::new(BufferId(0), BUFFERS, 0);
        let (mut requests, mut taken) = ring::<Sent>(4);
        let (mut free, mut freed) = ring::<(BufferId, u32)>(64);
        std::thread::scope(|scope| {
            let (arena, owners, pool) = (&arena, &owners, &mut pool);
            let frontend =
                scope.spawn(move || front((arena, owners, 99), pool, &mut requests, &mut freed));
            let mut random = Random(7);
            let mut staged: Vec<Sent> = Vec::new();
            while !frontend.is_finished() {
                match taken.pop() {
                    Some(sent) => staged.push(sent),
                    None => std::thread::yield_now(),
                }
                // Staged writes leave in any order, whole or in two parts, as overwritten blocks do.
                while staged.len() > random.below(6) as usize {
                    let index = random.below(staged.len() as u64) as usize;
                    let (first, count, content) = staged.swap_remove(index);
                    check(arena, first, count, content);
                    fill(arena, first, count, !0 >> 9);
                    let half = random.below(u64::from(count) + 1) as u32;
                    for (first, count) in [(first.0, half), (first.0 + half, count - half)] {
                        if count > 0 {
                            assert_eq!(free.push((BufferId(first), count)), Ok(()));
                        }
                    }
                }
            }
            frontend.join().unwrap();
            assert!(staged.is_empty() && taken.is_empty());
        });
        assert_eq!(pool.available(), BUFFERS, "all came home");
    }
}

#[cfg(loom)]
mod interleavings {
    use loom::model::Builder;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::thread;
    use twinpoint_core::units::{BufferId, CpNumber, ShardId, ShardSet};
    use twinpoint_runtime::buffers::Pool;
    use twinpoint_runtime::gate::Gate;
    use twinpoint_runtime::ring::{Consumer, ring};
    use twinpoint_runtime::wake::waker;

    /// Every interleaving with at most `switches` forced thread switches.
    fn explore(switches: usize, body: impl Fn() + Send + Sync + 'static) {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(switches);
        builder.check(body);
    }

    #[test]
    fn ring_wraps_around() {
        explore(3, || {
            let (mut producer, mut consumer) = ring(2);
            let sender = thread::spawn(move || {
                for item in 0..4_u64 {
                    let mut item = Box::new(item);
                    while let Err(back) = producer.push(item) {
                        item = back;
                        thread::yield_now();
                    }
                }
                producer
            });
            for expected in 0..3_u64 {
                let item = loop {
                    match consumer.pop() {
                        Some(item) => break item,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!(*item, expected);
            }
            // One item is left for the ring's drop, with either side as the last to go.
            drop(consumer);
            drop(sender.join().unwrap());
        });
    }

    #[test]
    fn ring_full_and_empty() {
        explore(4, || {
            let (mut producer, mut consumer) = ring(1);
            let sender = thread::spawn(move || {
                (0..3_u64).filter(|item| producer.push(*item).is_ok()).collect::<Vec<_>>()
            });
            let mut popped = Vec::new();
            for _ in 0..3 {
                popped.extend(consumer.pop());
            }
            let pushed = sender.join().unwrap();
            while let Some(item) = consumer.pop() {
                popped.push(item);
            }
            assert_eq!(pushed, popped);
        });
    }

    #[test]
    fn gate_never_misses_a_push() {
        explore(4, || {
            let gate = Arc::new(Gate::new(1, CpNumber(1)));
            let (mut producer, mut consumer) = ring(2);
            let frontend = {
                let gate = Arc::clone(&gate);
                thread::spawn(move || {
                    for shard in 0..2 {
                        let admission = gate.admit(0);
                        assert!(producer.push((admission.stamp(), ShardId(shard))).is_ok());
                        admission.mark(ShardId(shard));
                    }
                })
            };
            let closed = gate.close();
            assert_eq!(closed, CpNumber(1));
            while !gate.quiesced(closed) {
                thread::yield_now();
            }
            let marked = gate.participants(closed);
            let mut found = ShardSet::default();
            while let Some((stamp, shard)) = consumer.pop() {
                if stamp == closed {
                    found.insert(shard);
                }
            }
            assert_eq!(marked, found);
            frontend.join().unwrap();
            while let Some((stamp, _)) = consumer.pop() {
                assert!(stamp > closed);
            }
            assert_eq!(gate.participants(closed), marked);
        });
    }

    #[test]
    fn gate_is_a_cut() {
        explore(3, || {
            let gate = Arc::new(Gate::new(2, CpNumber(1)));
            // The answer to A's client, and whatever made B's client write after it.
            let answered = Arc::new(AtomicU64::new(0));
            let first = {
                let (gate, answered) = (Arc::clone(&gate), Arc::clone(&answered));
                thread::spawn(move || {
                    let stamp = gate.admit(0).stamp();
                    answered.store(stamp.0, Ordering::Release);
                })
            };
            let closer = {
                let gate = Arc::clone(&gate);
                thread::spawn(move || gate.close())
            };
            let answered_stamp = answered.load(Ordering::Acquire);
            let admission = gate.admit(1);
            assert!(answered_stamp <= admission.stamp().0);
            drop(admission);
            first.join().unwrap();
            let closed = closer.join().unwrap();
            assert!(gate.quiesced(closed));
        });
    }

    #[test]
    fn wake_up_is_not_lost() {
        explore(4, || {
            let (mut producer, mut consumer) = ring(2);
            let (waker, sleeper) = waker().unwrap();
            let sender = thread::spawn(move || {
                for item in 0..2_u64 {
                    producer.push(item).unwrap();
                    waker.notify();
                }
            });
            let mut popped = 0;
            while popped < 2 {
                sleeper.prepare();
                if consumer.is_empty() {
                    // A lost wake-up is a deadlock, which loom reports.
                    sleeper.wait();
                }
                sleeper.awake();
                while consumer.pop().is_some() {
                    popped += 1;
                }
            }
            sender.join().unwrap();
        });
    }

    #[test]
    fn wake_up_of_two_producers_is_not_lost() {
        explore(2, || {
            let (mut left, mut left_out) = ring(1);
            let (mut right, mut right_out) = ring(1);
            let (waker, sleeper) = waker().unwrap();
            let other = waker.clone();
            let senders = [
                thread::spawn(move || {
                    left.push(1_u64).unwrap();
                    waker.notify();
                }),
                thread::spawn(move || {
                    right.push(1_u64).unwrap();
                    other.notify();
                }),
            ];
            let mut popped = 0;
            while popped < 2 {
                sleeper.prepare();
                if left_out.is_empty() && right_out.is_empty() {
                    sleeper.wait();
                }
                sleeper.awake();
                popped += left_out.pop().unwrap_or(0) + right_out.pop().unwrap_or(0);
            }
            for sender in senders {
                sender.join().unwrap();
            }
        });
    }

    /// Two buffers as threads see them: bytes and, beside them, a checksum. Neither has an order of its own, so loom
    /// shows an old one to whoever did not get the buffer from its last owner.
    struct Buffers {
        bytes: [AtomicU64; 2],
        checksums: [AtomicU64; 2],
        /// Whether somebody is touching it.
        inside: [AtomicU64; 2],
    }

    impl Buffers {
        fn new() -> Buffers {
            let zeroes = || [AtomicU64::new(0), AtomicU64::new(0)];
            Buffers { bytes: zeroes(), checksums: zeroes(), inside: zeroes() }
        }

        fn touch(&self, buffer: BufferId, deed: impl FnOnce(&AtomicU64, &AtomicU64)) {
            let index = buffer.0 as usize;
            assert_eq!(self.inside[index].swap(1, Ordering::Relaxed), 0, "a second owner");
            deed(&self.bytes[index], &self.checksums[index]);
            assert_eq!(self.inside[index].swap(0, Ordering::Relaxed), 1, "a second owner");
        }

        fn fill(&self, buffer: BufferId, value: u64) {
            self.touch(buffer, |bytes, checksum| {
                bytes.store(value, Ordering::Relaxed);
                checksum.store(!value, Ordering::Relaxed);
            });
        }

        fn check(&self, buffer: BufferId, value: u64) {
            self.touch(buffer, |bytes, checksum| {
                assert_eq!(bytes.load(Ordering::Relaxed), value, "not what was handed over");
                assert_eq!(checksum.load(Ordering::Relaxed), !value, "not its checksum");
            });
        }
    }

    fn wait_for<T>(consumer: &mut Consumer<T>) -> T {
        loop {
            match consumer.pop() {
                Some(item) => return item,
                None => thread::yield_now(),
            }
        }
    }

    /// A write: pool -> frontend -> ring -> shard -> ring -> pool, and the next write takes the same buffer again.
    #[test]
    fn written_buffers_have_one_owner() {
        explore(3, || {
            let buffers = Arc::new(Buffers::new());
            let mut pool = Pool::new(BufferId(0), 2, 0);
            let (mut requests, mut taken) = ring::<(BufferId, u64)>(2);
            let (mut free, mut freed) = ring::<BufferId>(2);
            let shard = {
                let buffers = Arc::clone(&buffers);
                thread::spawn(move || {
                    for _ in 0..3 {
                        let (buffer, value) = wait_for(&mut taken);
                        buffers.check(buffer, value);
                        // A shard may also write to it: partial blocks are completed in place.
                        buffers.fill(buffer, value + 100);
                        assert!(free.push(buffer).is_ok(), "a ring for all buffers is never full");
                    }
                })
            };
            for value in 1..=3 {
                let (buffer, count) = loop {
                    while let Some(buffer) = freed.pop() {
                        pool.free(buffer, 1);
                    }
                    match pool.allocate(1) {
                        Some(found) => break found,
                        None => thread::yield_now(),
                    }
                };
                assert_eq!(count, 1);
                buffers.fill(buffer, value);
                assert!(
                    requests.push((buffer, value)).is_ok(),
                    "a ring for all buffers is never full"
                );
            }
            shard.join().unwrap();
            while let Some(buffer) = freed.pop() {
                pool.free(buffer, 1);
            }
            assert_eq!(pool.available(), 2, "all came home");
        });
    }

    /// A read: the frontend's buffer is lent to the shard until the answer, which brings the bytes.
    #[test]
    fn read_buffers_come_back_filled() {
        explore(3, || {
            let buffers = Arc::new(Buffers::new());
            let mut pool = Pool::new(BufferId(0), 2, 0);
            let (mut requests, mut taken) = ring::<(BufferId, u64)>(2);
            let (mut answers, mut answered) = ring::<(BufferId, u64)>(2);
            let shard = {
                let buffers = Arc::clone(&buffers);
                thread::spawn(move || {
                    for _ in 0..2 {
                        let (buffer, value) = wait_for(&mut taken);
                        buffers.fill(buffer, value);
                        assert!(answers.push((buffer, value)).is_ok());
                    }
                })
            };
            for value in [5, 6] {
                let (buffer, _) = pool.allocate(1).unwrap();
                buffers.fill(buffer, 0);
                assert!(requests.push((buffer, value)).is_ok());
            }
            for _ in 0..2 {
                let (buffer, value) = wait_for(&mut answered);
                buffers.check(buffer, value);
                pool.free(buffer, 1);
            }
            shard.join().unwrap();
            assert_eq!(pool.available(), 2);
        });
    }
}
