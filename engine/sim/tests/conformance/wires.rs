//! The real wires as a [`Lane`]: memory and TCP, with a region on each side.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use rdma_fallback::{Event, Placement, PostError, Region, Span, TcpWire, Wire, memory_pair};
use twinpoint_core::units::BLOCK_BYTES;

use crate::lane::{LENT_BLOCKS, Lane, Placed, Told};
use crate::sim_device::{block, content};

/// Blocks to send from.
const SOURCE_BLOCKS: u32 = 256;
const LEND: Span = Span {
    offset: SOURCE_BLOCKS as u64 * BLOCK_BYTES as u64,
    length: LENT_BLOCKS * BLOCK_BYTES as u32,
};

pub struct Pair {
    connect: fn(&[Arc<Region>; 2]) -> [Wire; 2],
    regions: [Arc<Region>; 2],
    wires: [Wire; 2],
    /// The next block to send from, on each side.
    next: [u32; 2],
}

pub fn memory() -> Pair {
    Pair::new(|regions| {
        let [one, other] = regions.each_ref().map(Arc::clone);
        memory_pair(one, LEND, other, LEND).unwrap().into()
    })
}

pub fn tcp() -> Pair {
    Pair::new(|regions| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let wire = |stream, region| Wire::Tcp(TcpWire::new(stream, region, LEND).unwrap());
        [wire(near, Arc::clone(&regions[0])), wire(far, Arc::clone(&regions[1]))]
    })
}

impl Pair {
    fn new(connect: fn(&[Arc<Region>; 2]) -> [Wire; 2]) -> Pair {
        let bytes = LEND.end() as usize;
        let regions = [(); 2].map(|()| Arc::new(Region::new(bytes).unwrap()));
        let wires = connect(&regions);
        Pair { connect, regions, wires, next: [0; 2] }
    }

    /// Puts the contents into blocks to send from, none beside another.
    fn sources(&mut self, side: usize, contents: &[u64]) -> Vec<Span> {
        let mut sources = Vec::new();
        for content in contents {
            // Far more blocks than the bodies have under way at a time.
            let index = self.next[side] * 37 % SOURCE_BLOCKS;
            self.next[side] += 1;
            let offset = u64::from(index) * BLOCK_BYTES as u64;
            self.regions[side].copy_in(offset, &block(*content)[..]);
            sources.push(Span::new(offset, BLOCK_BYTES as u32));
        }
        sources
    }
}

impl Lane for Pair {
    fn post(&mut self, from: usize, token: u64, message: &[u8], placed: Option<&Placed>) -> bool {
        let sources = placed.map(|placed| self.sources(from, &placed.contents));
        let placement = placed.zip(sources.as_ref()).map(|(placed, sources)| Placement {
            sources,
            target: u64::from(placed.target) * BLOCK_BYTES as u64,
        });
        match self.wires[from].post(token, message, placement) {
            Ok(()) => true,
            Err(PostError::Full) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn poll(&mut self, side: usize) -> Vec<Told> {
        let region = &self.regions[side];
        let mut told = Vec::new();
        let _more = self.wires[side].poll(&mut |event| {
            told.push(match event {
                Event::Posted { token } => Told::Posted(token),
                Event::Closed { .. } => Told::Lost,
                Event::Message { bytes, placed } => {
                    let span = placed.unwrap_or_default();
                    let mut found = vec![0; span.length as usize];
                    region.copy_out(LEND.offset + span.offset, &mut found);
                    let placed = found.chunks_exact(BLOCK_BYTES).map(content).collect();
                    Told::Message { bytes: bytes.to_vec(), placed }
                }
            });
        });
        told
    }

    fn lose(&mut self) {
        match &mut self.wires[1] {
            Wire::Memory(wire) => wire.cut(),
            wire => {
                wire.close();
                self.wires[0].close();
            }
        }
    }

    fn renew(&mut self) {
        self.wires = (self.connect)(&self.regions);
    }
}
