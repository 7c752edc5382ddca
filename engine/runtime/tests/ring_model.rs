//! The ring, the gate and the wake-up between threads: against models, and in every interleaving under loom.
//!
//! `cargo test --test ring_model` runs the first kind,
//! `RUSTFLAGS="--cfg loom" cargo test --release --test ring_model` the second.

#[cfg(not(loom))]
mod threads {
    use std::collections::VecDeque;
    use twinpoint_core::units::{CpNumber, ShardId};
    use twinpoint_runtime::gate::Gate;
    use twinpoint_runtime::ring::ring;

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
}

#[cfg(loom)]
mod interleavings {
    use loom::model::Builder;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::thread;
    use twinpoint_core::units::{CpNumber, ShardId, ShardSet};
    use twinpoint_runtime::gate::Gate;
    use twinpoint_runtime::ring::ring;
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
}
