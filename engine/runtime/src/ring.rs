//! Bounded ring between two threads: one pushes, one pops. Carries every request and answer between a frontend
//! thread and a shard's thread (step 1 of the flow).
//!
//! ```text
//!   slots:   . . [h] x x x x [t] . .     head: next to pop (written by the consumer only)
//!                 ^ pop       ^ push     tail: next to push (written by the producer only)
//! ```
//!
//! Invariants:
//! - `head <= tail <= head + capacity`; both only grow and wrap at `usize`, the slot is the index modulo the capacity.
//! - The slots from `head` to `tail` hold a value and belong to the consumer; the others hold none and belong to
//!   the producer. An index is published with release and read with acquire, so a slot's content travels with it.
//! - Each side keeps a copy of the other's index and reads the shared one only when the copy says full or empty.

use std::mem::MaybeUninit;

use crossbeam_utils::CachePadded;
use sync::{Arc, AtomicUsize, Ordering, UnsafeCell};

/// Makes a ring for `capacity` items.
///
/// # Panics
/// If `capacity` is not a power of two.
#[must_use]
pub fn ring<T>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!(capacity.is_power_of_two(), "ring capacity {capacity} is not a power of two");
    let slots = (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect();
    let shared = Arc::new(Shared {
        head: CachePadded::new(AtomicUsize::new(0)),
        tail: CachePadded::new(AtomicUsize::new(0)),
        slots,
    });
    let producer = Producer { shared: Arc::clone(&shared), tail: 0, head_seen: 0 };
    (producer, Consumer { shared, head: 0, tail_seen: 0 })
}

/// The side that pushes. There is one; it may move to another thread.
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
    tail: usize,
    head_seen: usize,
}

impl<T> Producer<T> {
    /// Appends `item`.
    ///
    /// # Errors
    /// Gives `item` back if the ring is full.
    pub fn push(&mut self, item: T) -> Result<(), T> {
        if self.room() == 0 && self.free() == 0 {
            return Err(item);
        }
        self.shared.slot(self.tail).with_mut(|slot| {
            // SAFETY: `tail - head < capacity`, so this slot holds no value and is the producer's; there is one
            // producer and `self` is borrowed mutably. The consumer reads the slot only after the store below.
            unsafe { (*slot).write(item) };
        });
        self.tail = self.tail.wrapping_add(1);
        self.shared.tail.store(self.tail, Ordering::Release);
        Ok(())
    }

    /// How many items can be pushed now, at least: the consumer only makes more room.
    pub fn free(&mut self) -> usize {
        self.head_seen = self.shared.head.load(Ordering::Acquire);
        self.room()
    }

    fn room(&self) -> usize {
        let used = self.tail.wrapping_sub(self.head_seen);
        assert!(used <= self.shared.slots.len(), "ring holds {used} items, more than it has slots");
        self.shared.slots.len() - used
    }
}

/// The side that pops. There is one; it may move to another thread.
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    head: usize,
    tail_seen: usize,
}

impl<T> Consumer<T> {
    /// Takes the oldest item, if there is one.
    pub fn pop(&mut self) -> Option<T> {
        if self.tail_seen == self.head && self.is_empty() {
            return None;
        }
        let item = self.shared.slot(self.head).with(|slot| {
            // SAFETY: `head < tail`, so the slot holds a value that the acquire load of `tail` made visible. It is
            // read once: `head` moves past it before the producer may write the slot again.
            unsafe { (*slot).assume_init_read() }
        });
        self.head = self.head.wrapping_add(1);
        self.shared.head.store(self.head, Ordering::Release);
        Some(item)
    }

    /// How many items can be popped now, at least: the producer only adds.
    pub fn len(&mut self) -> usize {
        self.tail_seen = self.shared.tail.load(Ordering::Acquire);
        let used = self.tail_seen.wrapping_sub(self.head);
        assert!(used <= self.shared.slots.len(), "ring holds {used} items, more than it has slots");
        used
    }

    /// Whether there is nothing to pop, by a fresh look at the producer's index: what a worker asks before it sleeps.
    pub fn is_empty(&mut self) -> bool {
        self.len() == 0
    }
}

struct Shared<T> {
    head: CachePadded<AtomicUsize>,
    tail: CachePadded<AtomicUsize>,
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

impl<T> Shared<T> {
    fn slot(&self, index: usize) -> &UnsafeCell<MaybeUninit<T>> {
        &self.slots[index & (self.slots.len() - 1)]
    }
}

// SAFETY: a `T` moves from the producer's thread to the consumer's, which `T: Send` allows. No slot is ever used by
// two threads at a time: the indices divide the slots between the one producer and the one consumer.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above; the shared parts are atomics, and slots are touched only by the side that owns them.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // Both sides are gone, and the drop of the last reference ordered their stores before this.
        let mut head = self.head.load(Ordering::Relaxed);
        let tail = self.tail.load(Ordering::Relaxed);
        while head != tail {
            self.slot(head).with_mut(|slot| {
                // SAFETY: slots from head to tail hold a value, and nobody else can reach them any more.
                unsafe { (*slot).assume_init_drop() };
            });
            head = head.wrapping_add(1);
        }
    }
}

/// The standard library's atomics, or loom's in its model runs.
pub(crate) mod sync {
    #[cfg(loom)]
    pub(crate) use loom::{
        cell::UnsafeCell,
        sync::Arc,
        sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    };
    #[cfg(not(loom))]
    pub(crate) use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    };

    /// The standard cell with loom's interface.
    #[cfg(not(loom))]
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    #[cfg(not(loom))]
    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> UnsafeCell<T> {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        pub(crate) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
            read(self.0.get())
        }

        pub(crate) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::ring;
    use std::rc::Rc;

    #[test]
    fn leftovers_are_dropped_once() {
        let item = Rc::new(());
        let (mut producer, mut consumer) = ring(4);
        for _ in 0..4 {
            producer.push(Rc::clone(&item)).unwrap();
        }
        assert_eq!(producer.free(), 0);
        assert!(producer.push(Rc::clone(&item)).is_err());
        drop(consumer.pop());
        assert_eq!(consumer.len(), 3);
        assert_eq!(Rc::strong_count(&item), 4);
        drop(producer);
        assert!(consumer.pop().is_some());
        drop(consumer);
        assert_eq!(Rc::strong_count(&item), 1);
    }

    #[test]
    #[should_panic(expected = "power of two")]
    fn odd_capacity_is_refused() {
        let _ = ring::<u8>(3);
    }
}
