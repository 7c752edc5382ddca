//! Puts one load on a target for a fixed time, and records how long its commands took.
//!
//! Invariants: as many commands as the load says are under way, less only while the target has no room; a flush takes
//! the place of a write and does not wait for the writes before it; what began before the warm-up was over is in no
//! histogram; when a load ends nothing is under way.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::case::{Load, Pattern};
use crate::failure::Failure;
use crate::random::Random;

/// Random bytes that writes are cut from: longer than the largest write by many times, so that contents differ.
const CONTENT_BYTES: usize = 8 << 20;

/// Whatever takes writes and flushes.
pub trait Target {
    /// Begins a write of whole blocks. False: no room now, nothing was begun.
    ///
    /// # Errors
    /// If the target failed.
    fn write(&mut self, offset: u64, bytes: &[u8], id: usize) -> Result<bool, Failure>;

    /// Begins a flush of all that was answered. False as for a write.
    ///
    /// # Errors
    /// If the target failed.
    fn flush(&mut self, id: usize) -> Result<bool, Failure>;

    /// Waits until something ended, or there may be room again, and appends the commands that ended.
    ///
    /// # Errors
    /// If the target failed, or one of the commands.
    fn wait(&mut self, ended: &mut Vec<usize>) -> Result<(), Failure>;

    /// The volume's size.
    fn volume_bytes(&self) -> u64;
}

/// How long.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Timing {
    pub warm_up: Duration,
    pub measured: Duration,
}

/// What came of a load.
pub struct Figures {
    /// From the end of the warm-up to the last command in it.
    pub seconds: f64,
    /// Writes that ended in that time.
    pub writes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// In nanoseconds.
    pub write_ns: Histogram<u64>,
    /// In nanoseconds.
    pub flush_ns: Histogram<u64>,
}

/// Where the next commands go, and what they hold.
pub struct Loader {
    random: Random,
    content: Vec<u8>,
    cursor: u64,
}

struct Slot {
    began: Instant,
    is_flush: bool,
}

impl Loader {
    /// Everything from one seed.
    pub fn new(seed: u64) -> Loader {
        let mut random = Random::new(seed);
        let content = random.bytes(CONTENT_BYTES);
        Loader { random, content, cursor: 0 }
    }

    /// Writes the whole volume once, and flushes: no later write is the first of its block.
    ///
    /// # Errors
    /// Of the target.
    pub fn fill(&mut self, target: &mut dyn Target) -> Result<(), Failure> {
        const BYTES: usize = 256 << 10;
        const DEPTH: usize = 16;
        let mut unused: Vec<usize> = (0..DEPTH).collect();
        let mut ended = Vec::new();
        let mut offset = 0;
        while offset < target.volume_bytes() || unused.len() < DEPTH {
            while let Some(id) = unused.last().copied().filter(|_| offset < target.volume_bytes()) {
                let bytes = BYTES.min((target.volume_bytes() - offset) as usize);
                let start = self.content_start(BYTES);
                if !target.write(offset, &self.content[start..start + bytes], id)? {
                    break;
                }
                unused.pop();
                offset += bytes as u64;
            }
            target.wait(&mut ended)?;
            unused.append(&mut ended);
        }
        flush(target)
    }

    /// Puts a load on the target. `boundary` is called when the measured time begins, and when it ends.
    ///
    /// # Errors
    /// Of the target.
    pub fn drive(
        &mut self,
        target: &mut dyn Target,
        load: Load,
        timing: Timing,
        boundary: &mut dyn FnMut(),
    ) -> Result<Figures, Failure> {
        let histogram = || Histogram::new(3).expect("three digits are possible");
        let (write_ns, flush_ns) = (histogram(), histogram());
        let mut figures = Figures { seconds: 0.0, writes: 0, bytes: 0, write_ns, flush_ns };
        let mut slots: Vec<Option<Slot>> = (0..load.depth).map(|_| None).collect();
        let mut unused: Vec<usize> = (0..load.depth).collect();
        let mut ended = Vec::new();
        let mut writes_since_flush = 0;
        let warm = Instant::now() + timing.warm_up;
        let mut measured_from = None;
        loop {
            let now = Instant::now();
            if measured_from.is_none() && now >= warm {
                boundary();
                measured_from = Some(Instant::now());
            }
            if let Some(from) = measured_from.filter(|from| now >= *from + timing.measured) {
                boundary();
                figures.seconds = now.duration_since(from).as_secs_f64();
                break;
            }
            while let Some(id) = unused.last().copied() {
                let is_flush = load.flush_every > 0 && writes_since_flush == load.flush_every;
                let began = Instant::now();
                if !self.begin(target, load.pattern, is_flush, id)? {
                    break;
                }
                unused.pop();
                slots[id] = Some(Slot { began, is_flush });
                writes_since_flush = if is_flush { 0 } else { writes_since_flush + 1 };
            }
            target.wait(&mut ended)?;
            let now = Instant::now();
            for id in ended.drain(..) {
                let slot = slots[id].take().expect("a command ends once");
                unused.push(id);
                figures.count(&slot, now, measured_from, load.pattern);
            }
        }
        while unused.len() < load.depth {
            target.wait(&mut ended)?;
            unused.append(&mut ended);
        }
        Ok(figures)
    }

    fn begin(
        &mut self,
        target: &mut dyn Target,
        pattern: Pattern,
        is_flush: bool,
        id: usize,
    ) -> Result<bool, Failure> {
        if is_flush {
            return target.flush(id);
        }
        let length = pattern.write_bytes();
        let places = target.volume_bytes() / length as u64;
        let place = match pattern {
            Pattern::Random4 => self.random.below(places),
            Pattern::Sequential64 | Pattern::Sequential128 | Pattern::Sequential1024 => {
                self.cursor % places
            }
        };
        let start = self.content_start(length);
        let bytes = &self.content[start..start + length];
        let taken = target.write(place * length as u64, bytes, id)?;
        self.cursor += u64::from(taken);
        Ok(taken)
    }

    fn content_start(&mut self, length: usize) -> usize {
        self.random.below((CONTENT_BYTES - length) as u64 / 512) as usize * 512
    }
}

impl Figures {
    fn count(&mut self, slot: &Slot, now: Instant, from: Option<Instant>, pattern: Pattern) {
        let Some(from) = from else { return };
        if !slot.is_flush {
            self.writes += 1;
            self.bytes += pattern.write_bytes() as u64;
        }
        if slot.began >= from {
            let histogram = if slot.is_flush { &mut self.flush_ns } else { &mut self.write_ns };
            let elapsed = now.duration_since(slot.began).as_nanos();
            let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
            histogram.record(elapsed).expect("the histogram grows as it must");
        }
    }
}

/// One flush, with nothing else under way.
///
/// # Errors
/// Of the target.
pub fn flush(target: &mut dyn Target) -> Result<(), Failure> {
    let mut ended = Vec::new();
    while !target.flush(0)? {
        target.wait(&mut ended)?;
    }
    while ended.is_empty() {
        target.wait(&mut ended)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ends commands in the order in which they came, some at a time.
    #[derive(Default)]
    struct Ideal {
        under_way: Vec<usize>,
        log: Vec<Option<u64>>,
        most: usize,
    }

    impl Target for Ideal {
        fn write(&mut self, offset: u64, bytes: &[u8], id: usize) -> Result<bool, Failure> {
            assert!(offset + bytes.len() as u64 <= self.volume_bytes());
            self.under_way.push(id);
            self.most = self.most.max(self.under_way.len());
            self.log.push(Some(offset));
            Ok(true)
        }

        fn flush(&mut self, id: usize) -> Result<bool, Failure> {
            self.under_way.push(id);
            self.most = self.most.max(self.under_way.len());
            self.log.push(None);
            Ok(true)
        }

        fn wait(&mut self, ended: &mut Vec<usize>) -> Result<(), Failure> {
            let count = self.under_way.len().div_ceil(2);
            ended.extend(self.under_way.drain(..count));
            Ok(())
        }

        fn volume_bytes(&self) -> u64 {
            (1 << 20) + 4096
        }
    }

    #[test]
    fn loads_are_as_they_say() {
        let millisecond = Duration::from_millis(1);
        let timing = Timing { warm_up: millisecond, measured: 5 * millisecond };
        let mut loader = Loader::new(1);
        let mut filled = Ideal::default();
        loader.fill(&mut filled).unwrap();
        assert_eq!(filled.log.iter().flatten().count(), 5);
        for pattern in [Pattern::Random4, Pattern::Sequential128] {
            let load = Load { pattern, depth: 16, flush_every: 3 };
            let mut target = Ideal::default();
            let mut boundaries = 0;
            let figures = loader.drive(&mut target, load, timing, &mut || boundaries += 1).unwrap();
            assert_eq!((target.most, boundaries, target.under_way.len()), (16, 2, 0));
            assert!(target.log.iter().enumerate().all(|(n, c)| c.is_none() == (n % 4 == 3)));
            assert!(figures.writes > 0 && figures.write_ns.len() <= figures.writes);
            assert!(figures.seconds >= 0.005 && !figures.flush_ns.is_empty());
        }
    }
}
