//! Load: several connections that write, zero, trim, read and flush at random until they are stopped or cut off.
//!
//! Invariant: commands under way never touch the same block, on any connection; so a read has one right answer, and
//! each block one order of writes.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::history::{Change, Clock, Record};
use super::nbd_client::{Cookie, NbdClient};
use super::random::Random;
use super::sector::{self, BLOCK_SECTORS, SECTOR_BYTES, Sector};

/// What the load is made of.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// Connections.
    pub connections: usize,
    /// Commands under way on each.
    pub depth: usize,
    /// Flushes in 1000 commands.
    pub flushes_in_1000: u64,
    /// Most commands of all connections; they stop then.
    pub commands_max: u64,
}

impl Default for LoadPlan {
    fn default() -> LoadPlan {
        LoadPlan { connections: 3, depth: 8, flushes_in_1000: 30, commands_max: 12_000 }
    }
}

/// A load that runs.
pub struct Load {
    stop: Arc<AtomicBool>,
    left: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Record>>,
}

/// What the connections share.
struct Shared {
    clock: Clock,
    stop: Arc<AtomicBool>,
    left: Arc<AtomicU64>,
    /// Blocks that a command under way touches.
    busy: Vec<AtomicBool>,
    /// What each sector holds once no command touches it: a write's number, or 0.
    latest: Vec<AtomicU64>,
    plan: LoadPlan,
}

impl Load {
    /// Connects and begins. `image` is what the volume holds.
    ///
    /// # Panics
    /// If a connection fails.
    pub fn start(
        socket: &Path,
        export: &str,
        image: &[Sector],
        clock: &Clock,
        plan: &LoadPlan,
        random: &mut Random,
    ) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let left = Arc::new(AtomicU64::new(plan.commands_max));
        let latest = image.iter().map(|sector| match sector {
            Sector::Zero => AtomicU64::new(0),
            Sector::Written(sequence) => AtomicU64::new(*sequence),
        });
        let shared = Arc::new(Shared {
            clock: clock.clone(),
            stop: Arc::clone(&stop),
            left: Arc::clone(&left),
            busy: (0..image.len() as u64 / BLOCK_SECTORS).map(|_| AtomicBool::new(false)).collect(),
            latest: latest.collect(),
            plan: plan.clone(),
        });
        let clients: Vec<NbdClient> = (0..plan.connections)
            .map(|_| NbdClient::connect(socket, export).expect("the node takes connections"))
            .collect();
        let threads = clients.into_iter().map(|client| {
            let connection = Connection {
                client,
                shared: Arc::clone(&shared),
                random: random.fork(),
                under_way: HashMap::new(),
                record: Record::default(),
            };
            std::thread::spawn(move || connection.run())
        });
        Load { stop, left, threads: threads.collect() }
    }

    /// Waits until so many commands were sent, or the time is over.
    pub fn wait_for_commands(&self, plan: &LoadPlan, commands: u64, limit: Duration) {
        let deadline = std::time::Instant::now() + limit;
        while self.sent(plan) < commands && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Commands sent until now.
    pub fn sent(&self, plan: &LoadPlan) -> u64 {
        plan.commands_max - self.left.load(Ordering::Relaxed)
    }

    /// Sends no more, waits for the answers under way or the connections' end, and tells what was done.
    pub fn finish(self) -> Record {
        self.stop.store(true, Ordering::SeqCst);
        let mut record = Record::default();
        for thread in self.threads {
            record.merge(thread.join().expect("a connection of the load panicked"));
        }
        record
    }
}

/// Reads the volume, all that is in `sectors`, and parses it.
///
/// # Errors
/// If reading fails, or a sector is damaged.
pub fn read_image(socket: PathBuf, export: &str, sectors: u64) -> Result<Vec<Sector>, String> {
    let text = |error: io::Error| format!("reading the volume: {error}");
    let mut client = NbdClient::connect(&socket, export).map_err(text)?;
    let bytes = client.read_all(sectors * SECTOR_BYTES as u64).map_err(text)?;
    client.disconnect().map_err(text)?;
    sector::parse(0, &bytes)
}

struct Connection {
    client: NbdClient,
    shared: Arc<Shared>,
    random: Random,
    under_way: HashMap<Cookie, UnderWay>,
    record: Record,
}

enum UnderWay {
    Change(Change),
    Read { first: u64, count: u64 },
    Flush(u64),
}

impl Connection {
    fn run(mut self) -> Record {
        // The server may be killed at any moment: that ends the connection, and is no trouble.
        let _ = self.talk();
        let unanswered = std::mem::take(&mut self.under_way).into_values();
        self.record.changes.extend(unanswered.filter_map(|command| match command {
            UnderWay::Change(change) => Some(change),
            _ => None,
        }));
        self.record
    }

    fn talk(&mut self) -> io::Result<()> {
        loop {
            while self.client.under_way() < self.shared.plan.depth && self.may_send() {
                self.send_one()?;
            }
            self.client.send_out()?;
            if self.client.under_way() == 0 {
                return Ok(());
            }
            self.receive_one()?;
        }
    }

    fn may_send(&self) -> bool {
        let take = |left: u64| left.checked_sub(1);
        !self.shared.stop.load(Ordering::SeqCst)
            && self.shared.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn send_one(&mut self) -> io::Result<()> {
        if self.random.below(1000) < self.shared.plan.flushes_in_1000 {
            let sequence = self.shared.clock.send();
            let cookie = self.client.queue_flush()?;
            self.under_way.insert(cookie, UnderWay::Flush(sequence));
            return Ok(());
        }
        let (first, count) = self.choose_range();
        let offset = first * SECTOR_BYTES as u64;
        let length = count as usize * SECTOR_BYTES;
        let kind = self.random.below(100);
        if kind < 10 {
            let cookie = self.client.queue_read(offset, length)?;
            self.under_way.insert(cookie, UnderWay::Read { first, count });
            return Ok(());
        }
        let whole_blocks = first % BLOCK_SECTORS == 0 && count % BLOCK_SECTORS == 0;
        let (zero, trim) = (kind < 18, kind < 13 && whole_blocks);
        let fua = !trim && self.random.percent(2);
        let sequence = self.shared.clock.send();
        // Noted before it is sent: what was sent in part may be carried out by a server that is just being killed.
        let change = Change { sequence, first, count, zero, fua, answered: None };
        let cookie = if trim {
            self.client.queue_trim(offset, length)
        } else if zero {
            self.client.queue_zeroes(offset, length, fua)
        } else {
            self.client.queue_write(offset, &sector::fill(first, sequence, count), fua)
        };
        match cookie {
            Ok(cookie) => {
                self.under_way.insert(cookie, UnderWay::Change(change));
                Ok(())
            }
            Err(error) => {
                self.record.changes.push(change);
                Err(error)
            }
        }
    }

    /// A range whose blocks no command touches; they are marked as touched.
    fn choose_range(&mut self) -> (u64, u64) {
        let sectors = self.shared.latest.len() as u64;
        loop {
            let hot = self.random.percent(40);
            let space = if hot { 64 * BLOCK_SECTORS } else { sectors };
            let block = self.random.below(space / BLOCK_SECTORS) * BLOCK_SECTORS;
            let (first, count) = match self.random.below(100) {
                0..50 => (block, BLOCK_SECTORS),
                50..85 => (self.random.below(space), 1 + self.random.below(16)),
                85..97 => (block, BLOCK_SECTORS * (1 + self.random.below(16))),
                _ => (self.random.below(space), 1 + self.random.below(1024)),
            };
            if first + count <= sectors && self.take(first, count) {
                return (first, count);
            }
        }
    }

    fn take(&self, first: u64, count: u64) -> bool {
        let blocks = blocks(first, count);
        for block in blocks.clone() {
            if self.shared.busy[block].swap(true, Ordering::SeqCst) {
                (blocks.start..block).for_each(|block| self.release(block));
                return false;
            }
        }
        true
    }

    fn release(&self, block: usize) {
        self.shared.busy[block].store(false, Ordering::SeqCst);
    }

    fn receive_one(&mut self) -> io::Result<()> {
        let reply = self.client.receive()?;
        let command = self.under_way.remove(&reply.cookie).expect("the client matches cookies");
        let failed = reply.error != 0;
        match command {
            UnderWay::Flush(sequence) if failed => {
                self.trouble(format!("flush {sequence}: error {}", reply.error));
            }
            UnderWay::Flush(sequence) => self.record.flushes.push(sequence),
            UnderWay::Read { first, count } => {
                if failed {
                    self.trouble(format!(
                        "read of sector {first} + {count}: error {}",
                        reply.error
                    ));
                } else if let Err(text) = self.check_read(first, &reply.data) {
                    self.trouble(text);
                }
                blocks(first, count).for_each(|block| self.release(block));
            }
            UnderWay::Change(change) if failed => {
                // What it left is unknown: its blocks stay out of use.
                self.trouble(format!("{change:?}: error {}", reply.error));
                self.record.changes.push(change);
            }
            UnderWay::Change(mut change) => {
                change.answered = Some(self.shared.clock.answer());
                let holds = if change.zero { 0 } else { change.sequence };
                for sector in change.first..change.first + change.count {
                    self.shared.latest[sector as usize].store(holds, Ordering::SeqCst);
                }
                blocks(change.first, change.count).for_each(|block| self.release(block));
                self.record.changes.push(change);
            }
        }
        Ok(())
    }

    fn check_read(&mut self, first: u64, data: &[u8]) -> Result<(), String> {
        self.record.reads += 1;
        for (index, found) in sector::parse(first, data)?.into_iter().enumerate() {
            let number = first as usize + index;
            let holds = self.shared.latest[number].load(Ordering::SeqCst);
            let right = if holds == 0 { Sector::Zero } else { Sector::Written(holds) };
            if found != right {
                return Err(format!("sector {number} read as {found:?}, and holds {right:?}"));
            }
        }
        Ok(())
    }

    fn trouble(&mut self, text: String) {
        self.record.troubles.push(text);
    }
}

fn blocks(first: u64, count: u64) -> std::ops::Range<usize> {
    (first / BLOCK_SECTORS) as usize..(first + count).div_ceil(BLOCK_SECTORS) as usize
}
