//! Two hosts, or two guests of the lab: the same traffic both ways for a while, every byte checked, and connected anew
//! whenever it breaks. Does nothing unless the environment says what to do:
//!
//! | variable | |
//! |---|---|
//! | `TWINPOINT_WIRE_LISTEN=host:port` | this side listens |
//! | `TWINPOINT_WIRE_DIAL=host:port` | this side dials |
//! | `TWINPOINT_WIRE_SECONDS=n` | how long to send, default 5 |
//! | `TWINPOINT_WIRE_TRANSPORT=auto\|rdma\|tcp` | default auto |
//!
//! It prints a line for each connection: the transport, why not RDMA, how much was checked, how it ended.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::env;
use std::io::Write;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rdma_fallback::rdma::{Choice, RdmaOptions, Settled, Transports};
use rdma_fallback::{
    Channel, ChannelError, Event, Key, Listener, Placement, PostError, Progress, Region, Span,
    Wire, dial,
};

const REGION_BYTES: usize = 8 << 20;
const LEND: Span = Span { offset: 4 << 20, length: 4 << 20 };
const SLOTS: u64 = 16;
const SLOT_BYTES: u64 = 1 << 17;
const LIMIT: Duration = Duration::from_secs(10);
/// A peer that says nothing for so long is given up, as a node does with its heartbeats.
const SILENCE: Duration = Duration::from_secs(6);
/// Last number of a side that ends in peace.
const FAREWELL: u64 = u64::MAX;

fn main_settings() -> Option<(bool, String, Duration, Choice)> {
    let listen = env::var("TWINPOINT_WIRE_LISTEN").ok().map(|address| (true, address));
    let dial = env::var("TWINPOINT_WIRE_DIAL").ok().map(|address| (false, address));
    let (listens, address) = listen.or(dial)?;
    let seconds = env::var("TWINPOINT_WIRE_SECONDS").map_or(5, |text| text.parse().unwrap());
    let choice = match env::var("TWINPOINT_WIRE_TRANSPORT").as_deref() {
        Ok("rdma") => Choice::Rdma,
        Ok("tcp") => Choice::Tcp,
        _ => Choice::Auto,
    };
    Some((listens, address, Duration::from_secs(seconds), choice))
}

fn say(line: &str) {
    // Not through the macros, whose output a passing test swallows.
    std::io::stderr().write_all(format!("wire: {line}\n").as_bytes()).unwrap();
}

#[test]
fn traffic_between_two_hosts_is_whole() {
    let Some((listens, address, time, choice)) = main_settings() else { return };
    let region = Arc::new(Region::new(REGION_BYTES).unwrap());
    let transports = Transports::new(choice, RdmaOptions::default(), Arc::clone(&region)).unwrap();
    let listener = listens.then(|| Listener::bind(&address).unwrap());
    let end = Instant::now() + time;
    let mut checked = 0;
    loop {
        let channel = match &listener {
            Some(listener) => accept(listener, end),
            None => dial(&address, &Key::from_bytes(b"two hosts"), LIMIT).ok(),
        };
        let settled = channel.map(|channel| transports.settle(channel, LEND, LIMIT, None));
        match settled {
            Some(Ok(settled)) => {
                let mut session = Session::new(settled, Arc::clone(&region));
                let in_peace = session.run(end);
                checked += session.checked;
                if in_peace {
                    break;
                }
            }
            Some(Err(error)) => say(&format!("no wire: {error}")),
            None => {}
        }
        assert!(Instant::now() < end + LIMIT, "the peer did not come back");
        thread::sleep(Duration::from_millis(200));
    }
    assert!(checked > 0, "nothing was checked");
}

fn accept(listener: &Listener, end: Instant) -> Option<Channel> {
    listener.set_nonblocking(true).unwrap();
    while Instant::now() < end + LIMIT {
        match listener.accept() {
            Ok(pending) => {
                let channel: Result<Channel, ChannelError> =
                    pending.authenticate(&Key::from_bytes(b"two hosts"), LIMIT);
                return channel.ok();
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
    None
}

/// One connection's traffic. A slot is written again only after the peer said that it has checked it.
struct Session {
    wire: Wire,
    region: Arc<Region>,
    posted: u64,
    /// Of mine, by the peer.
    confirmed: u64,
    /// Of the peer's, by me.
    checked: u64,
    heard_at: Instant,
    farewell_heard: bool,
    ended: Option<String>,
}

impl Session {
    fn new(settled: Settled, region: Arc<Region>) -> Session {
        let transport = match (&settled.wire, &settled.without_rdma) {
            (Wire::Rdma(wire), _) => format!("RDMA over {}", wire.device_name().unwrap_or("?")),
            (_, reason) => format!("TCP: {}", reason.as_deref().unwrap_or("asked for")),
        };
        say(&transport);
        Session {
            wire: settled.wire,
            region,
            posted: 0,
            confirmed: 0,
            checked: 0,
            heard_at: Instant::now(),
            farewell_heard: false,
            ended: None,
        }
    }

    /// Sends and checks until `end` or the end of the connection. Says whether it ended in peace.
    fn run(&mut self, end: Instant) -> bool {
        let mut farewell_said = false;
        while self.ended.is_none() {
            if Instant::now() < end {
                self.post();
            } else if !farewell_said && self.confirmed == self.posted {
                farewell_said = self.send(FAREWELL, None);
            }
            if self.poll() == Progress::Waiting {
                thread::sleep(Duration::from_micros(200));
            }
            let both_said = farewell_said && self.farewell_heard;
            if self.ended.is_some() {
                break;
            }
            if self.heard_at.elapsed() > SILENCE {
                self.ended = Some("silence".to_owned());
            } else if both_said {
                self.ended = Some("in peace".to_owned());
            }
        }
        let counters = self.wire.counters();
        let reason = self.ended.as_deref().unwrap_or_default();
        say(&format!("{} messages checked, {counters:?}, ended: {reason}", self.checked));
        if self.farewell_heard && farewell_said {
            // The farewell is on its way: it must not be cut off.
            let until = Instant::now() + Duration::from_millis(500);
            while Instant::now() < until {
                let _ = self.poll();
            }
            return true;
        }
        false
    }

    fn post(&mut self) {
        while self.posted - self.confirmed < SLOTS {
            let number = self.posted;
            let slot = number % SLOTS * SLOT_BYTES;
            let length = 1 + (number * 7919) % SLOT_BYTES;
            self.region.copy_in(slot, &pattern(number, length));
            let half = (length / 2) as u32;
            let sources =
                [Span::new(slot, half), Span::new(slot + u64::from(half), length as u32 - half)];
            let placement = Placement { sources: &sources, target: slot };
            if !self.send(number, Some(placement)) {
                return;
            }
            self.posted += 1;
        }
    }

    fn send(&mut self, number: u64, placement: Option<Placement<'_>>) -> bool {
        let message = [number.to_le_bytes(), self.checked.to_le_bytes()].concat();
        match self.wire.post(number, &message, placement) {
            Ok(()) => true,
            Err(PostError::Full | PostError::Closed) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn poll(&mut self) -> Progress {
        let before = self.checked;
        let Session { wire, region, checked, confirmed, heard_at, farewell_heard, ended, .. } =
            self;
        let progress = wire.poll(&mut |event| match event {
            Event::Posted { .. } => {}
            Event::Message { bytes, placed } => {
                *heard_at = Instant::now();
                let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                *confirmed = (*confirmed).max(u64::from_le_bytes(bytes[8..].try_into().unwrap()));
                match (number, placed) {
                    (FAREWELL, None) => *farewell_heard = true,
                    // Only to confirm.
                    (_, None) => {}
                    (_, Some(placed)) => {
                        assert_eq!(number, *checked, "each message once, in order");
                        let mut found = vec![0; placed.length as usize];
                        region.copy_out(LEND.offset + placed.offset, &mut found);
                        let expected = pattern(number, u64::from(placed.length));
                        assert!(found == expected, "the bytes of message {number}");
                        *checked += 1;
                    }
                }
            }
            Event::Closed { reason } => *ended = Some(reason.to_string()),
        });
        if self.checked != before && self.ended.is_none() {
            let number = self.posted;
            let _ = self.send(number, None);
        }
        progress
    }
}

fn pattern(number: u64, length: u64) -> Vec<u8> {
    (0..length).map(|at| (number.wrapping_mul(31) ^ at ^ (at >> 8)) as u8).collect()
}
