//! Strangers, liars and dribblers: a clear error, never a panic, never a hang, never a byte outside the lent span.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rdma_fallback::{
    CHANNEL_BYTES_MAX, Channel, ChannelError, ChannelFault, CloseReason, Event, FrameFault, Key,
    Listener, MESSAGE_BYTES_MAX, Region, Span, TcpWire, VersionRange, dial,
};

const LIMIT: Duration = Duration::from_secs(10);
const HELLO_BYTES: usize = 48;
const LEND: Span = Span { offset: 4096, length: 4096 };

fn key() -> Key {
    Key::from_bytes(b"the right key")
}

/// Runs `stranger` against an acceptor, and gives what the acceptor says and how long it took.
fn accept_stranger(
    limit: Duration,
    stranger: impl FnOnce(TcpStream) + Send,
) -> (ChannelError, Duration) {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || stranger(TcpStream::connect(address).unwrap()));
        let start = Instant::now();
        let answer = listener.accept().unwrap().authenticate(&key(), limit);
        (answer.unwrap_err(), start.elapsed())
    })
}

/// Runs `stranger` as the acceptor, and gives what the dialer says.
fn dial_stranger(limit: Duration, stranger: impl FnOnce(TcpStream) + Send) -> ChannelError {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        scope.spawn(move || stranger(listener.accept().unwrap().0));
        dial(&address, &key(), limit).unwrap_err()
    })
}

fn hello(versions: VersionRange) -> Vec<u8> {
    let [min, max] = [versions.min.to_le_bytes(), versions.max.to_le_bytes()];
    [&b"twinwire"[..], &min, &max, &[0; 4], &[5; 32]].concat()
}

/// Everything the other side says until it closes.
fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    bytes
}

#[test]
fn garbage_is_no_hello() {
    for garbage in [vec![0xFF; 1000], b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec()] {
        let (error, _) = accept_stranger(LIMIT, |mut stream| {
            stream.write_all(&garbage).unwrap();
            read_all(&mut stream);
        });
        assert!(matches!(error, ChannelError::Protocol(ChannelFault::Magic)), "{error:?}");
        let error = dial_stranger(LIMIT, |mut stream| {
            stream.write_all(&garbage).unwrap();
            read_all(&mut stream);
        });
        assert!(matches!(error, ChannelError::Protocol(ChannelFault::Magic)), "{error:?}");
    }
}

#[test]
fn half_a_hello_is_a_closed_connection() {
    for count in [0, 1, 8, HELLO_BYTES - 1, HELLO_BYTES, HELLO_BYTES + 31] {
        let bytes = [hello(VersionRange::OURS), vec![0; 32]].concat();
        let (error, _) = accept_stranger(LIMIT, |mut stream| {
            stream.write_all(&bytes[..count]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            read_all(&mut stream);
        });
        assert!(matches!(error, ChannelError::Closed), "{count}: {error:?}");
    }
}

#[test]
fn stranger_learns_only_the_hello() {
    let (error, _) = accept_stranger(LIMIT, |mut stream| {
        stream.write_all(&hello(VersionRange::OURS)).unwrap();
        stream.write_all(&[0; 32]).unwrap();
        assert_eq!(read_all(&mut stream).len(), HELLO_BYTES);
    });
    assert!(matches!(error, ChannelError::Refused), "{error:?}");
}

#[test]
fn a_proof_cannot_be_reflected() {
    // The stranger answers the dialer with the dialer's own hello and proof.
    let error = dial_stranger(LIMIT, |mut stream| {
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut proof = [0; 32];
        stream.read_exact(&mut proof).unwrap();
        stream.write_all(&proof).unwrap();
        read_all(&mut stream);
    });
    assert!(matches!(error, ChannelError::Refused), "{error:?}");
}

#[test]
fn wrong_key_is_refused_on_both_sides() {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap().to_string();
    thread::scope(|scope| {
        let dialer = scope.spawn(|| dial(&address, &Key::from_bytes(b"another"), LIMIT));
        let accepted = listener.accept().unwrap().authenticate(&key(), LIMIT);
        assert!(matches!(accepted, Err(ChannelError::Refused)), "{accepted:?}");
        let dialed = dialer.join().unwrap();
        assert!(matches!(dialed, Err(ChannelError::Refused)), "{dialed:?}");
    });
}

#[test]
fn versions_without_overlap_are_named() {
    let later = VersionRange { min: 700, max: 800 };
    let check = |error: ChannelError| match error {
        ChannelError::Version { ours, theirs } => {
            assert_eq!((ours, theirs), (VersionRange::OURS, later));
            assert!(error.to_string().contains("700 to 800"));
        }
        error => panic!("{error:?}"),
    };
    let stranger = |mut stream: TcpStream| {
        stream.write_all(&hello(later)).unwrap();
        assert_eq!(read_all(&mut stream).len(), HELLO_BYTES, "no proof without a version");
    };
    check(accept_stranger(LIMIT, stranger).0);
    check(dial_stranger(LIMIT, stranger));
    let error = dial_stranger(LIMIT, |mut stream| {
        stream.write_all(&hello(VersionRange { min: 3, max: 2 })).unwrap();
        read_all(&mut stream);
    });
    assert!(matches!(error, ChannelError::Protocol(ChannelFault::Versions(_))), "{error:?}");
}

#[test]
fn dribbling_does_not_extend_the_time_limit() {
    let limit = Duration::from_millis(300);
    let stranger = |mut stream: TcpStream| {
        for byte in hello(VersionRange::OURS) {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    };
    let (error, took) = accept_stranger(limit, stranger);
    assert!(matches!(error, ChannelError::Timeout), "{error:?}");
    assert!(took >= limit && took < limit * 3, "{took:?}");
    let error = dial_stranger(limit, stranger);
    assert!(matches!(error, ChannelError::Timeout), "{error:?}");
}

#[test]
fn silence_ends_at_the_time_limit() {
    let limit = Duration::from_millis(100);
    let (error, took) = accept_stranger(limit, |mut stream| {
        read_all(&mut stream);
    });
    assert!(matches!(error, ChannelError::Timeout), "{error:?}");
    assert!(took < limit * 5, "{took:?}");
}

#[test]
fn nobody_there_is_an_error_of_the_system() {
    let address = Listener::bind("127.0.0.1:0").unwrap().local_address().unwrap().to_string();
    match dial(&address, &key(), LIMIT).unwrap_err() {
        ChannelError::Io(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        error => panic!("{error:?}"),
    }
    assert!(matches!(dial("no port", &key(), LIMIT), Err(ChannelError::Io(_))));
}

/// A channel whose peer's bytes go through `meddle` once the handshake is over.
fn meddled(
    meddle: impl FnOnce(&mut TcpStream, &mut TcpStream) + Send + 'static,
) -> (Channel, Channel) {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap();
    let middle = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle_address = middle.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut near, _) = middle.accept().unwrap();
        let mut far = TcpStream::connect(address).unwrap();
        let mut bytes = [0; HELLO_BYTES];
        for (count, back) in [(48, false), (48, true), (32, false), (32, true)] {
            let (from, to) = if back { (&mut far, &mut near) } else { (&mut near, &mut far) };
            from.read_exact(&mut bytes[..count]).unwrap();
            to.write_all(&bytes[..count]).unwrap();
        }
        meddle(&mut near, &mut far);
    });
    thread::scope(|scope| {
        let dialer = scope.spawn(|| dial(&middle_address, &key(), LIMIT).unwrap());
        let acceptor = listener.accept().unwrap().authenticate(&key(), LIMIT).unwrap();
        (dialer.join().unwrap(), acceptor)
    })
}

#[test]
fn channel_carries_frames_both_ways() {
    let (mut a, mut b) = meddled(|near, far| {
        let (mut near_again, mut far_again) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut far_again, &mut near_again));
        let _ = std::io::copy(near, far);
        let _ = far.shutdown(std::net::Shutdown::Write);
    });
    assert_eq!((a.version(), b.version()), (1, 1));
    thread::scope(|scope| {
        scope.spawn(|| {
            for size in [0, 1, 100, CHANNEL_BYTES_MAX] {
                a.send(&vec![size as u8; size]).unwrap();
            }
            assert_eq!(a.receive(5).unwrap(), b"reply");
            let too_long = a.send(&vec![0; CHANNEL_BYTES_MAX + 1]);
            assert!(matches!(too_long, Err(ChannelError::Protocol(ChannelFault::Length { .. }))));
            drop(a);
        });
        for size in [0, 1, 100, CHANNEL_BYTES_MAX] {
            assert_eq!(b.receive(CHANNEL_BYTES_MAX).unwrap(), vec![size as u8; size]);
        }
        b.send(b"reply").unwrap();
        assert!(matches!(b.receive(10), Err(ChannelError::Closed)));
    });
}

/// What the receiver says when `change` was done to two frames of 5 bytes, each with a header of 32 bytes.
fn receive_changed(change: impl FnOnce(&mut Vec<u8>) + Send + 'static) -> ChannelError {
    let (mut a, mut b) = meddled(move |near, far| {
        let mut frames = vec![0; 2 * 37];
        near.read_exact(&mut frames).unwrap();
        change(&mut frames);
        far.write_all(&frames).unwrap();
    });
    a.send(b"first").unwrap();
    a.send(b"other").unwrap();
    match b.receive(5).map(|bytes| assert_eq!(bytes, b"first")) {
        Ok(()) => b.receive(5).unwrap_err(),
        Err(error) => error,
    }
}

#[test]
fn changed_frames_of_a_channel_are_refused() {
    let fault = |change: fn(&mut Vec<u8>)| match receive_changed(change) {
        ChannelError::Protocol(fault) => fault,
        error => panic!("{error:?}"),
    };
    assert_eq!(fault(|frames| frames[36] ^= 1), ChannelFault::Code);
    assert_eq!(fault(|frames| frames[16] ^= 1), ChannelFault::Code);
    assert_eq!(fault(|frames| frames[8] ^= 1), ChannelFault::Sequence);
    assert_eq!(fault(|frames| frames[4] = 1), ChannelFault::Reserved);
    assert_eq!(fault(|frames| frames[0] = 4), ChannelFault::Code);
    assert_eq!(fault(|frames| frames.rotate_left(37)), ChannelFault::Sequence);
    assert_eq!(fault(|frames| frames.copy_within(0..37, 37)), ChannelFault::Sequence);
    let length = ChannelFault::Length { bytes: 6, bytes_max: 5 };
    assert_eq!(fault(|frames| frames[0] = 6), length);
    let length = ChannelFault::Length { bytes: u32::MAX as usize, bytes_max: 5 };
    assert_eq!(fault(|frames| frames[..4].fill(0xFF)), length);
    assert!(matches!(receive_changed(|frames| frames.truncate(40)), ChannelError::Closed));
}

#[test]
fn channel_receive_ends_at_the_time_limit() {
    let (a, mut b) = meddled(|near, _| {
        read_all(near);
    });
    b.set_time_limit(Duration::from_millis(50));
    assert!(matches!(b.receive(5), Err(ChannelError::Timeout)));
    drop(a);
}

/// Sends raw bytes into an established wire. Gives the messages and why the wire closed.
fn into_wire(bytes: &[u8]) -> (u64, CloseReason) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stranger = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let region = Arc::new(Region::new(3 * 4096).unwrap());
    let stream = listener.accept().unwrap().0;
    let mut wire = TcpWire::new(stream, Arc::clone(&region), LEND).unwrap();
    let messages = AtomicU64::new(0);
    let mut closed = None;
    thread::scope(|scope| {
        scope.spawn(|| {
            // The wire may close before everything is written.
            let _ = stranger.write_all(bytes);
            let _ = stranger.shutdown(std::net::Shutdown::Write);
            read_all(&mut stranger);
        });
        let end = Instant::now() + LIMIT;
        while closed.is_none() {
            assert!(Instant::now() < end, "the wire hangs");
            let _ = wire.poll_when(true, &mut |event| match event {
                Event::Message { .. } => {
                    messages.fetch_add(1, Ordering::Relaxed);
                }
                Event::Closed { reason } => closed = Some(reason),
                Event::Posted { token } => panic!("{token}"),
            });
        }
    });
    for offset in [0, LEND.end()] {
        let mut around = [1; 4096];
        region.copy_out(offset, &mut around);
        assert!(around == [0; 4096], "bytes outside the lent span");
    }
    (messages.into_inner(), closed.unwrap())
}

fn frame(message_bytes: u32, placed_bytes: u32, target: u64) -> Vec<u8> {
    let mut bytes = b"TPF1".to_vec();
    bytes.extend_from_slice(&message_bytes.to_le_bytes());
    bytes.extend_from_slice(&placed_bytes.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&target.to_le_bytes());
    let check = blake3::hash(&bytes);
    bytes.extend_from_slice(&check.as_bytes()[..8]);
    bytes
}

#[test]
fn wire_refuses_garbage() {
    let (messages, reason) = into_wire(&[0xAB; 100_000]);
    assert_eq!((messages, reason), (0, protocol(FrameFault::Magic { got: 0xABAB_ABAB })));
    let good = [frame(3, 2, 4094), b"abcde".to_vec()].concat();
    let (messages, reason) = into_wire(&[&good[..], &good, &[0; 32]].concat());
    assert_eq!((messages, reason), (2, protocol(FrameFault::Magic { got: 0 })));
    let mut bad = good.clone();
    bad[30] ^= 1;
    assert_eq!(into_wire(&[&good[..], &bad].concat()), (1, protocol(FrameFault::Check)));
}

#[test]
fn wire_refuses_wrong_lengths_and_targets() {
    let long = MESSAGE_BYTES_MAX as u32 + 1;
    let cases = [
        (frame(long, 0, 0), FrameFault::MessageTooLong { bytes: long }),
        (frame(u32::MAX, 0, 0), FrameFault::MessageTooLong { bytes: u32::MAX }),
        (frame(0, u32::MAX, 0), FrameFault::PlacementTooLong { bytes: u32::MAX }),
        (frame(0, 0, 8), FrameFault::Reserved),
        (frame(0, 4097, 0), outside(0, 4097)),
        (frame(0, 1, 4096), outside(4096, 1)),
        (frame(0, 1, u64::MAX), outside(u64::MAX, 1)),
        (frame(0, 8, u64::MAX - 3), outside(u64::MAX - 3, 8)),
    ];
    for (header, fault) in cases {
        let bytes = [header, vec![7; 20_000]].concat();
        assert_eq!(into_wire(&bytes), (0, protocol(fault)));
    }
}

#[test]
fn wire_tells_an_end_inside_a_frame_from_one_between_frames() {
    let good = [frame(3, 4096, 0), vec![7; 3 + 4096]].concat();
    let torn = CloseReason::Lost { kind: ErrorKind::UnexpectedEof };
    assert_eq!(into_wire(&[]), (0, CloseReason::Peer));
    assert_eq!(into_wire(&good), (1, CloseReason::Peer));
    for count in [1, 31, 32, 34, 35, 36, 4000, good.len() - 1] {
        assert_eq!(into_wire(&good[..count]), (0, torn), "{count}");
        assert_eq!(into_wire(&[&good, &good[..count]].concat()), (1, torn), "{count}");
    }
}

fn protocol(fault: FrameFault) -> CloseReason {
    CloseReason::Protocol(fault)
}

fn outside(offset: u64, length: u32) -> FrameFault {
    FrameFault::TargetOutside { placed: Span::new(offset, length), lent_bytes: LEND.length }
}
