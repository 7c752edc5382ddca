//! The real wires as a [`Lane`]: memory and TCP, with a region on each side.

use std::collections::BTreeMap;
use std::io::Write;
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
    connect: fn(&[Arc<Region>; 2]) -> Connected,
    regions: [Arc<Region>; 2],
    connected: Connected,
    /// The next block to send from, on each side.
    next: [u32; 2],
    /// What is lent to the wires for posts under way, by token.
    sources: [BTreeMap<u64, Vec<Span>>; 2],
}

/// Two wires and, under them, what goes over TCP.
type Connected = ([Wire; 2], Option<[TcpStream; 2]>);

pub fn memory() -> Pair {
    Pair::new(|regions| {
        let [one, other] = regions.each_ref().map(Arc::clone);
        (memory_pair(one, LEND, other, LEND).unwrap().into(), None)
    })
}

pub fn tcp() -> Pair {
    Pair::new(|regions| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let streams = [near.try_clone().unwrap(), far.try_clone().unwrap()];
        let wire = |stream, region| Wire::Tcp(TcpWire::new(stream, region, LEND).unwrap());
        let wires = [wire(near, Arc::clone(&regions[0])), wire(far, Arc::clone(&regions[1]))];
        (wires, Some(streams))
    })
}

impl Pair {
    fn new(connect: fn(&[Arc<Region>; 2]) -> Connected) -> Pair {
        let bytes = LEND.end() as usize;
        let regions = [(); 2].map(|()| Arc::new(Region::new(bytes).unwrap()));
        let connected = connect(&regions);
        Pair { connect, regions, connected, next: [0; 2], sources: Default::default() }
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

/// What lies in a part of a side's lent span.
fn lent_contents(region: &Region, span: Span) -> Vec<u64> {
    let mut found = vec![0; span.length as usize];
    region.copy_out(LEND.offset + span.offset, &mut found);
    found.chunks_exact(BLOCK_BYTES).map(content).collect()
}

/// Blocks are the sender's again, who does with them what it likes.
fn spoil_sources(region: &Region, spans: &[Span]) {
    for span in spans {
        region.copy_in(span.offset, &[0xdd; BLOCK_BYTES]);
    }
}

impl Lane for Pair {
    fn post(&mut self, from: usize, token: u64, message: &[u8], placed: Option<&Placed>) -> bool {
        let sources = placed.map_or(Vec::new(), |placed| self.sources(from, &placed.contents));
        let placement = placed.map(|placed| Placement {
            sources: &sources,
            target: u64::from(placed.target) * BLOCK_BYTES as u64,
        });
        match self.connected.0[from].post(token, message, placement) {
            Ok(()) => {
                self.sources[from].insert(token, sources);
                true
            }
            Err(PostError::Full | PostError::Closed) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn poll(&mut self, side: usize) -> Vec<Told> {
        let Pair { regions, connected: (wires, _), sources, .. } = self;
        let (region, sources) = (&regions[side], &mut sources[side]);
        let mut told = Vec::new();
        let _more = wires[side].poll(&mut |event| {
            told.push(match event {
                Event::Posted { token } => {
                    let spans = sources.remove(&token).expect("a post is answered once");
                    spoil_sources(region, &spans);
                    Told::Posted(token)
                }
                Event::Closed { .. } => {
                    std::mem::take(sources).values().for_each(|it| spoil_sources(region, it));
                    Told::Lost
                }
                Event::Message { bytes, placed } => {
                    let placed = lent_contents(region, placed.unwrap_or_default());
                    Told::Message { bytes: bytes.to_vec(), placed }
                }
            });
        });
        told
    }

    fn lent(&self, side: usize) -> Vec<u64> {
        lent_contents(&self.regions[side], Span { offset: 0, ..LEND })
    }

    fn leave(&mut self, side: usize) {
        self.connected.0[side].close();
    }

    fn spoil(&mut self, from: usize) {
        match &mut self.connected {
            // No frame begins so.
            (_, Some(streams)) => (&streams[from]).write_all(&[0x5a; 64]).unwrap(),
            // It breaks a rule at its receiver.
            (wires, None) => {
                let sources = [Span::new(0, BLOCK_BYTES as u32)];
                let placement = Placement { sources: &sources, target: LEND.length.into() };
                wires[from].post(u64::MAX, b"outside", Some(placement)).unwrap();
            }
        }
    }

    fn lose(&mut self) {
        match &mut self.connected.0 {
            [_, Wire::Memory(wire)] => wire.cut(),
            wires => wires.iter_mut().for_each(Wire::close),
        }
    }

    fn renew(&mut self) {
        self.connected = (self.connect)(&self.regions);
        self.sources = Default::default();
    }
}
