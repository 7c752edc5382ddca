//! The simulated disk as a [`Device`]: operations end in any order.

use std::rc::Rc;

use twinpoint_core::units::BLOCK_BYTES;

use crate::content::Block;
use crate::device::{BLOCKS, Content, Device, Ended, TORN};
use crate::disk::Disk;
use crate::random::Random;

pub struct SimDevice {
    disk: Disk,
    random: Random,
    under_way: Vec<(u64, Kind)>,
}

enum Kind {
    Write,
    Read,
    Flush { mark: u64 },
}

pub fn make(seed: u64) -> SimDevice {
    SimDevice { disk: Disk::new(BLOCKS), random: Random::new(seed), under_way: Vec::new() }
}

pub fn block(content: Content) -> Block {
    let words = content.to_le_bytes().repeat(BLOCK_BYTES / 8);
    Rc::new(words.try_into().expect("a block of words"))
}

/// The number that a block is made of.
pub fn content(bytes: &[u8]) -> Content {
    let words = bytes.as_chunks::<8>().0;
    if words.iter().all(|word| *word == words[0]) { Content::from_le_bytes(words[0]) } else { TORN }
}

impl Device for SimDevice {
    fn write(&mut self, token: u64, first: u64, contents: &[Content]) {
        self.disk.begin_write(token, first, contents.iter().map(|each| block(*each)).collect());
        self.under_way.push((token, Kind::Write));
    }

    fn read(&mut self, token: u64, first: u64, count: u64) {
        self.disk.begin_read(token, first, count);
        self.under_way.push((token, Kind::Read));
    }

    fn flush(&mut self, token: u64) {
        self.under_way.push((token, Kind::Flush { mark: self.disk.flush_mark() }));
    }

    fn wait(&mut self) -> Ended {
        let index = self.random.below(self.under_way.len() as u64) as usize;
        let (token, kind) = self.under_way.swap_remove(index);
        let mut contents = Vec::new();
        match kind {
            Kind::Write => self.disk.end_write(token),
            Kind::Read => {
                contents =
                    self.disk.end_read(token).iter().map(|block| content(&block[..])).collect();
            }
            Kind::Flush { mark } => self.disk.flush(mark),
        }
        Ended { token, contents }
    }

    fn kill(&mut self) {
        self.under_way.clear();
        self.disk.kill(&mut self.random);
    }

    fn cut_power(&mut self) -> bool {
        self.under_way.clear();
        self.disk.power_cut(&mut self.random);
        true
    }
}
