//! Tests of the choice between RDMA and TCP, and of what can go wrong between two cards.
//!
//! The first run everywhere; the others need a device of this host, and say so if there is none.

use std::io::Write;
use std::net::IpAddr;
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::{CloseReason, Event, Key, Listener, Placement, Region, Span, Wire, dial};

const LIMIT: Duration = Duration::from_secs(20);
const REGION_BYTES: usize = 1 << 20;
const LEND: Span = Span { offset: 4096, length: 1 << 19 };

/// The address of a device of this host. Without one, says so.
fn device_address() -> Option<IpAddr> {
    static SAID: Once = Once::new();
    let devices = probe().map_err(|error| {
        // Not through the macros, whose output a passing test swallows.
        let line = format!("RDMA: no device: not run ({error})\n");
        SAID.call_once(|| std::io::stderr().write_all(line.as_bytes()).unwrap());
    });
    let mut active = devices.ok()?.devices.into_iter().filter(|device| device.is_active);
    active.find_map(|device| {
        device.addresses.into_iter().map(|address| address.1).find(IpAddr::is_ipv4)
    })
}

fn region() -> Arc<Region> {
    Arc::new(Region::new(REGION_BYTES).unwrap())
}

fn transports(choice: Choice) -> Transports {
    Transports::new(choice, RdmaOptions::default(), region()).unwrap()
}

type Outcome = Result<Settled, SettleError>;

/// Settles the two ends of a new channel at `ip`: the dialler's outcome first.
fn settle_at(ip: IpAddr, ours: &Transports, theirs: &Transports, lend: Span) -> [Outcome; 2] {
    let key = Key::from_bytes(b"settle");
    let listener = Listener::bind(&format!("{ip}:0")).unwrap();
    let at = listener.local_address().unwrap().to_string();
    thread::scope(|scope| {
        let far = scope.spawn(|| {
            let channel = listener.accept().unwrap().authenticate(&key, LIMIT).unwrap();
            theirs.settle(channel, lend, LIMIT, None)
        });
        let near = ours.settle(dial(&at, &key, LIMIT).unwrap(), lend, LIMIT, None);
        [near, far.join().unwrap()]
    })
}

/// Two connected ends over RDMA; none without a device.
pub(crate) fn pair(regions: [Arc<Region>; 2], lend: Span) -> Option<(Wire, Wire)> {
    let ip = device_address()?;
    let transports =
        regions.map(|region| Transports::new(Choice::Rdma, RdmaOptions::default(), region));
    let [near, far] = transports.map(Result::unwrap);
    let [near, far] = settle_at(ip, &near, &far, lend).map(Result::unwrap);
    Some((near.wire, far.wire))
}

fn rdma_pair() -> Option<(Box<RdmaWire>, Box<RdmaWire>)> {
    match pair([region(), region()], LEND)? {
        (Wire::Rdma(a), Wire::Rdma(b)) => Some((a, b)),
        other => panic!("{other:?}"),
    }
}

/// Polls both until both are closed, and says why they are.
fn until_closed(a: &mut RdmaWire, b: &mut RdmaWire) -> [CloseReason; 2] {
    let mut reasons = [None; 2];
    let end = Instant::now() + LIMIT;
    while reasons.contains(&None) {
        assert!(Instant::now() < end, "{reasons:?} {a:?} {b:?}");
        for (wire, reason) in [&mut *a, &mut *b].into_iter().zip(&mut reasons) {
            let _ = wire.poll_when(true, &mut |event| match event {
                Event::Closed { reason: why } => *reason = Some(why),
                Event::Posted { .. } | Event::Message { .. } => {}
            });
        }
        thread::sleep(Duration::from_micros(100));
    }
    reasons.map(Option::unwrap)
}

const LOOPBACK: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

#[test]
fn tcp_is_used_where_one_side_wants_it_and_both_can() {
    for choices in [(Choice::Tcp, Choice::Auto), (Choice::Auto, Choice::Tcp)] {
        let (ours, theirs) = (transports(choices.0), transports(choices.1));
        for outcome in settle_at(LOOPBACK, &ours, &theirs, LEND) {
            let settled = outcome.unwrap();
            assert!(matches!(settled.wire, Wire::Tcp(_)));
            let reason = settled.without_rdma.unwrap();
            assert!(!reason.is_empty() && !reason.contains('\n'), "{reason}");
        }
    }
}

#[test]
fn who_needs_rdma_gets_no_wire_without() {
    let outcomes = settle_at(LOOPBACK, &transports(Choice::Rdma), &transports(Choice::Tcp), LEND);
    let [Err(ours), Err(theirs)] = outcomes else { panic!("{outcomes:?}") };
    assert!(matches!(ours, SettleError::RdmaNeeded(_)), "{ours}");
    assert!(matches!(theirs, SettleError::PeerNeedsRdma(_)), "{theirs}");
    let outcomes = settle_at(LOOPBACK, &transports(Choice::Tcp), &transports(Choice::Rdma), LEND);
    let [Err(ours), Err(theirs)] = outcomes else { panic!("{outcomes:?}") };
    assert!(matches!(ours, SettleError::PeerNeedsRdma(_)), "{ours}");
    assert!(matches!(theirs, SettleError::RdmaNeeded(_)), "{theirs}");
}

#[test]
fn a_channel_that_fell_back_is_a_whole_wire() {
    let (ours, theirs) = (transports(Choice::Auto), transports(Choice::Tcp));
    let [near, far] = settle_at(LOOPBACK, &ours, &theirs, LEND).map(Result::unwrap);
    let (mut near, mut far) = (near.wire, far.wire);
    near.post(1, b"over TCP", None).unwrap();
    let (end, mut got) = (Instant::now() + LIMIT, Vec::new());
    while got.is_empty() {
        assert!(Instant::now() < end);
        let _ = near.poll(&mut |_| {});
        let _ = far.poll(&mut |event| match event {
            Event::Message { bytes, .. } => got = bytes.to_vec(),
            event => panic!("{event:?}"),
        });
    }
    assert_eq!(got, b"over TCP");
}

#[test]
fn a_wrong_key_is_refused_by_the_card() {
    let Some((mut a, mut b)) = rdma_pair() else { return };
    a.spoil_key();
    let sources = [Span::new(0, 100)];
    a.post(1, b"never", Some(Placement { sources: &sources, target: 0 })).unwrap();
    let [ours, theirs] = until_closed(&mut a, &mut b);
    assert_eq!(ours, CloseReason::Rdma(Cause::REMOTE_ACCESS));
    assert!(matches!(theirs, CloseReason::Peer | CloseReason::Rdma(_)), "{theirs:?}");
}

#[test]
fn a_write_past_the_lent_span_is_refused_by_the_card() {
    let Some((mut a, mut b)) = rdma_pair() else { return };
    a.believe_in_more_lent_bytes(1 << 20);
    let sources = [Span::new(0, 100)];
    let target = u64::from(LEND.length) - 99;
    a.post(1, b"never", Some(Placement { sources: &sources, target })).unwrap();
    let [ours, _] = until_closed(&mut a, &mut b);
    assert_eq!(ours, CloseReason::Rdma(Cause::REMOTE_ACCESS));
}

#[test]
fn a_queue_pair_in_error_ends_the_connection_on_both_sides() {
    for has_posts in [true, false] {
        let Some((mut a, mut b)) = rdma_pair() else { return };
        a.fail_pair();
        if has_posts {
            a.post(1, b"never", None).unwrap();
        }
        b.post(2, b"never", None).unwrap();
        let [ours, theirs] = until_closed(&mut a, &mut b);
        assert!(matches!(ours, CloseReason::Rdma(_)), "{ours:?}");
        assert!(matches!(theirs, CloseReason::Peer | CloseReason::Rdma(_)), "{theirs:?}");
    }
}

#[test]
fn connections_come_and_go() {
    let Some(ip) = device_address() else { return };
    let (ours, theirs) = (transports(Choice::Auto), transports(Choice::Auto));
    let mut kept = Vec::new();
    for round in 0..12 {
        let [near, far] = settle_at(ip, &ours, &theirs, LEND).map(Result::unwrap);
        assert_eq!((near.without_rdma, far.without_rdma), (None, None));
        let (Wire::Rdma(mut a), Wire::Rdma(mut b)) = (near.wire, far.wire) else {
            panic!("round {round}")
        };
        match round % 4 {
            // Both at once, one after the other, dropped without a word, kept beside the next.
            0 => {
                a.close();
                b.close();
                assert_eq!(until_closed(&mut a, &mut b), [CloseReason::Local; 2]);
            }
            1 => {
                b.close();
                let reasons = until_closed(&mut a, &mut b);
                assert_eq!(reasons, [CloseReason::Peer, CloseReason::Local]);
            }
            2 => drop((a, b)),
            _ => kept.push((a, b)),
        }
    }
    for (mut a, mut b) in kept {
        a.close();
        assert_eq!(until_closed(&mut a, &mut b), [CloseReason::Local, CloseReason::Peer]);
    }
}

#[test]
fn idle_wires_make_no_calls_and_busy_ones_few() {
    let Some((mut a, mut b)) = rdma_pair() else { return };
    let sources = [Span::new(0, 1 << 16)];
    let mut got = 0;
    let end = Instant::now() + LIMIT;
    for token in 0..64 {
        let placement = Placement { sources: &sources, target: 0 };
        a.post(token, &[0; 40], Some(placement)).unwrap();
    }
    let mut posted = 0;
    while got < 64 || posted < 64 {
        assert!(Instant::now() < end);
        let _ = a.poll_when(true, &mut |event| {
            posted += u64::from(matches!(event, Event::Posted { .. }))
        });
        let _ = b
            .poll_when(true, &mut |event| got += u64::from(matches!(event, Event::Message { .. })));
    }
    let (sent, received) = (a.counters(), b.counters());
    // 4 MiB: a write and a send each, few of them answered; two receives each.
    assert_eq!(sent.requests_sent, 128);
    assert!(sent.completions_taken <= 64, "{sent:?}");
    assert_eq!(sent.placed_bytes_sent, 4 << 20);
    assert!(received.completions_taken >= 128, "{received:?}");
}

#[test]
fn a_device_of_another_name_is_not_used() {
    let Some(ip) = device_address() else { return };
    let options = RdmaOptions { device: Some("elsewhere".to_owned()), ..RdmaOptions::default() };
    let ours = Transports::new(Choice::Auto, options, region()).unwrap();
    let [near, far] = settle_at(ip, &ours, &transports(Choice::Auto), LEND).map(Result::unwrap);
    assert_eq!(near.without_rdma.as_deref(), Some("there is no RDMA device elsewhere"));
    assert_eq!(far.without_rdma.as_deref(), Some("the peer: there is no RDMA device elsewhere"));
}

#[test]
fn device_address_and_mtu_may_be_named() {
    let Some(ip) = device_address() else { return };
    let devices = probe().unwrap().devices;
    let found = devices.iter().find_map(|device| {
        let address = device.addresses.iter().find(|address| address.1 == ip)?;
        Some((device.name.clone(), address.0))
    });
    let (name, index) = found.unwrap();
    let options = RdmaOptions {
        device: Some(name),
        gid_index: Some(index),
        mtu_bytes: Some(512),
        inline_bytes: 0,
        receive_requests: 16,
        ..RdmaOptions::default()
    };
    let make = || Transports::new(Choice::Rdma, options.clone(), region()).unwrap();
    let [near, far] = settle_at(ip, &make(), &make(), LEND).map(Result::unwrap);
    let (Wire::Rdma(mut a), Wire::Rdma(mut b)) = (near.wire, far.wire) else { panic!("RDMA") };
    let mut got = 0;
    for token in 0..100 {
        a.post(token, &[7; 2000], None).unwrap();
    }
    let end = Instant::now() + LIMIT;
    while got < 100 {
        assert!(Instant::now() < end);
        let _ = a.poll_when(true, &mut |_| {});
        let _ = b
            .poll_when(true, &mut |event| got += u64::from(matches!(event, Event::Message { .. })));
    }
}
