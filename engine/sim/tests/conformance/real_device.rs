//! A file or an NVMe namespace as a [`Device`], through the runtime's store file, arena and io_uring, as a worker uses
//! them.

use std::path::PathBuf;

use rdma_fallback::Span;
use tempfile::TempDir;
use twinpoint_core::units::{BLOCK_BYTES, BufferId, DeviceBlock};
use twinpoint_runtime::buffers::{Arena, Pool};
use twinpoint_runtime::device::{Caching, DeviceMode, OpenMode, Prefill, StoreFile};
use twinpoint_runtime::uring::{Completion, Uring, UringOptions, Wait};

use crate::device::{BLOCKS, Content, Device, Ended};
use crate::random::Random;
use crate::sim_device::{block, content};

const BUFFERS: u32 = 512;

pub struct RealDevice {
    process: Option<Process>,
    path: PathBuf,
    mode: DeviceMode,
    _folder: Option<TempDir>,
    random: Random,
}

/// What a process has open.
struct Process {
    // The ring goes first: the kernel writes into the arena until it is gone.
    uring: Uring,
    completions: Vec<Completion>,
    under_way: Vec<UnderWay>,
    pool: Pool,
    arena: Arena,
    _store: StoreFile,
}

struct UnderWay {
    token: u64,
    bytes: u32,
    buffers: Vec<BufferId>,
    is_read: bool,
}

pub fn make(seed: u64) -> RealDevice {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("store");
    StoreFile::create(&path, BLOCKS * BLOCK_BYTES as u64, Prefill::Reserve).unwrap();
    begin(path, DeviceMode::Block, Some(folder), seed)
}

/// The namespace that `TWINPOINT_NVME` names, driven by commands. Its first blocks are overwritten.
pub fn make_passthrough(seed: u64) -> RealDevice {
    make_nvme(DeviceMode::Passthrough { is_polled: false }, seed)
}

/// The same, with polled completions.
pub fn make_polled(seed: u64) -> RealDevice {
    make_nvme(DeviceMode::Passthrough { is_polled: true }, seed)
}

fn make_nvme(mode: DeviceMode, seed: u64) -> RealDevice {
    let path = PathBuf::from(std::env::var_os("TWINPOINT_NVME").expect("TWINPOINT_NVME is set"));
    let store = StoreFile::open(&path, OpenMode::Exclusive).unwrap();
    store.write_blocks(DeviceBlock(0), &vec![0; BLOCKS as usize * BLOCK_BYTES]).unwrap();
    store.flush().unwrap();
    drop(store);
    begin(path, mode, None, seed)
}

fn begin(path: PathBuf, mode: DeviceMode, folder: Option<TempDir>, seed: u64) -> RealDevice {
    let random = Random::new(seed);
    let mut device = RealDevice { process: None, path, mode, _folder: folder, random };
    device.open();
    device
}

impl RealDevice {
    fn open(&mut self) {
        let store = StoreFile::open_for(&self.path, Caching::BufferedAllowed, self.mode).unwrap();
        assert!(store.blocks() >= BLOCKS);
        let arena = Arena::new(BUFFERS as usize * BLOCK_BYTES).unwrap();
        let mut uring =
            Uring::new(UringOptions { device: self.mode, ..UringOptions::default() }).unwrap();
        uring.register_arena(&arena).unwrap();
        uring.register_store(store.target()).unwrap();
        let pool = Pool::new(BufferId(0), BUFFERS, 0);
        self.process = Some(Process {
            uring,
            completions: Vec::new(),
            under_way: Vec::new(),
            pool,
            arena,
            _store: store,
        });
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }
}

impl Process {
    /// Buffers for `count` blocks, in as many runs as it takes.
    fn buffers(&mut self, count: usize) -> Vec<BufferId> {
        let mut buffers = Vec::new();
        while buffers.len() < count {
            let (first, got) = self.pool.allocate((count - buffers.len()) as u32).unwrap();
            buffers.extend((first.0..first.0 + got).map(BufferId));
        }
        buffers
    }
}

impl Device for RealDevice {
    fn write(&mut self, token: u64, first: u64, contents: &[Content]) {
        // Scattered or not: both ways of writing a run are taken.
        let scattered = self.random.chance(50);
        let process = self.process();
        let mut buffers = process.buffers(contents.len());
        if scattered {
            buffers.reverse();
        }
        let mut spans: Vec<Span> = Vec::new();
        for (buffer, content) in buffers.iter().zip(contents) {
            process.arena.copy_in(*buffer, 0, &block(*content)[..]);
            spans.push(process.arena.span(*buffer, 1));
        }
        let bytes = (contents.len() * BLOCK_BYTES) as u32;
        process.uring.write_store(token, first * BLOCK_BYTES as u64, &spans).unwrap();
        process.under_way.push(UnderWay { token, bytes, buffers, is_read: false });
        process.uring.submit_and_wait(Wait::No).unwrap();
    }

    fn read(&mut self, token: u64, first: u64, count: u64) {
        let process = self.process();
        let (buffer, got) = process.pool.allocate(count as u32).unwrap();
        assert_eq!(u64::from(got), count, "the pool is large enough for a run");
        let span = process.arena.span(buffer, got);
        process.uring.read_store(token, first * BLOCK_BYTES as u64, span).unwrap();
        let buffers = (buffer.0..buffer.0 + got).map(BufferId).collect();
        process.under_way.push(UnderWay { token, bytes: span.length, buffers, is_read: true });
        process.uring.submit_and_wait(Wait::No).unwrap();
    }

    fn flush(&mut self, token: u64) {
        let process = self.process();
        process.uring.flush_store(token).unwrap();
        process.under_way.push(UnderWay { token, bytes: 0, buffers: vec![], is_read: false });
        process.uring.submit_and_wait(Wait::No).unwrap();
    }

    fn wait(&mut self) -> Ended {
        let process = self.process();
        while process.completions.is_empty() {
            process.uring.submit_and_wait(Wait::Forever).unwrap();
            process.uring.reap(&mut process.completions);
        }
        let completion = process.completions.remove(0);
        let token = completion.user_data;
        let index = process.under_way.iter().position(|each| each.token == token).unwrap();
        let ended = process.under_way.swap_remove(index);
        assert_eq!(completion.ok().unwrap(), ended.bytes, "all of it, or an error");
        let mut contents = Vec::new();
        for buffer in ended.buffers {
            if ended.is_read {
                let mut bytes = [0; BLOCK_BYTES];
                process.arena.copy_out(buffer, 0, &mut bytes);
                contents.push(content(&bytes));
            }
            process.pool.free(buffer, 1);
        }
        Ended { token, contents }
    }

    fn kill(&mut self) {
        // Closing the ring cancels what is under way, as the kernel does for a dead process.
        self.process = None;
        self.open();
    }

    fn cut_power(&mut self) -> bool {
        false
    }
}
