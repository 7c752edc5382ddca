//! Targets over the loopback: strangers before the handshake, changed bytes of a channel, changed bytes of a wire.
//!
//! Invariants: whoever does not hold the key never gets a channel; a channel shows no byte that its peer did not
//! send; a wire delivers frames up to the first changed one as they were sent, ends once and last, and writes
//! nowhere but into the span it lent.

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rdma_fallback::{
    Channel, ChannelError, ChannelFault, Event, Key, Listener, Placement, Progress, Region, Span,
    TcpWire, Wire, dial,
};

const LIMIT: Duration = Duration::from_secs(10);
/// Bytes of each side's hello and of its proof, and of the head of a channel's frame.
const HELLO_BYTES: usize = 48;
const PROOF_BYTES: usize = 32;
const FRAME_HEAD_BYTES: usize = 32;
/// Bytes of the head of a wire's frame.
const WIRE_HEAD_BYTES: usize = 32;
const REGION_BYTES: usize = 48 << 10;
const LEND: Span = Span { offset: 8 << 10, length: 32 << 10 };

fn key() -> Key {
    Key::from_bytes(b"a key of the fuzz targets")
}

/// A loopback address of its own for each connection, so that closed ones do not use up the ports.
fn address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("127.{}.{}.{}:0", 1 + (number >> 16) % 250, (number >> 8) & 255, 1 + number % 250)
}

/// A stranger says the input, to a listening side and to a dialling one.
pub(super) fn handshake(input: &[u8]) -> bool {
    let listener = Listener::bind(&address()).expect("a free port");
    let caller = TcpStream::connect(listener.local_address().expect("it listens")).expect("a call");
    say(&caller, input);
    let answer = listener.accept().expect("the call").authenticate(&key(), LIMIT);
    let hello_was_taken = refusal(answer);
    drop(caller);

    let listener = TcpListener::bind(address()).expect("a free port");
    let target = listener.local_addr().expect("it listens").to_string();
    thread::scope(|scope| {
        let dialler = scope.spawn(|| dial(&target, &key(), LIMIT));
        let (stranger, _) = listener.accept().expect("the call");
        say(&stranger, input);
        let _same = refusal(dialler.join().expect("dialling does not panic"));
    });
    hello_was_taken
}

fn say(mut stream: &TcpStream, bytes: &[u8]) {
    // Whoever does not like the first bytes may be gone already.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
}

/// A stranger must be refused; says whether its hello was a good one.
fn refusal(answer: Result<Channel, ChannelError>) -> bool {
    match answer {
        Ok(_) => panic!("a stranger has a channel"),
        Err(ChannelError::Timeout) => panic!("a stranger who left is waited for"),
        Err(ChannelError::Refused) => true,
        Err(_) => false,
    }
}

/// Frames of a real peer: first their number and lengths, then changes of the bytes under way.
pub(super) fn channel(input: &[u8]) -> bool {
    let (count, rest) = input.split_first().map_or((0, input), |(count, rest)| (*count % 4, rest));
    let (lengths, changes) = rest.split_at(rest.len().min(usize::from(count) * 2));
    let frames = lengths.as_chunks::<2>().0.iter().enumerate().map(|(index, length)| {
        vec![index as u8 + 1; usize::from(u16::from_le_bytes(*length)) % 3000]
    });
    let frames = frames.collect::<Vec<_>>();
    let listener = Listener::bind(&address()).expect("a free port");
    let between = TcpListener::bind(address()).expect("a free port");
    let target = between.local_addr().expect("it listens").to_string();
    let received = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut channel = dial(&target, &key(), LIMIT).expect("the key is right");
            frames.iter().for_each(|frame| channel.send(frame).expect("a frame goes out"));
            channel
        });
        let receiver = scope.spawn(|| {
            let call = listener.accept().expect("the call");
            let mut channel = call.authenticate(&key(), LIMIT).expect("the key is right");
            let mut received = Vec::new();
            loop {
                match channel.receive(2048) {
                    Ok(frame) => received.push(frame),
                    Err(error) => return (received, error),
                }
            }
        });
        let (mut near, _) = between.accept().expect("the call");
        let mut far =
            TcpStream::connect(listener.local_address().expect("it listens")).expect("a call");
        forward(&mut near, &mut far, HELLO_BYTES);
        forward(&mut far, &mut near, HELLO_BYTES);
        forward(&mut near, &mut far, PROOF_BYTES);
        forward(&mut far, &mut near, PROOF_BYTES);
        let total = frames.iter().map(|frame| FRAME_HEAD_BYTES + frame.len()).sum::<usize>();
        let mut bytes = vec![0; total];
        near.read_exact(&mut bytes).expect("the frames");
        change(&mut bytes, changes);
        say(&far, &bytes);
        let received = receiver.join().expect("receiving does not panic");
        drop(sender.join().expect("sending does not panic"));
        received
    });
    let (received, error) = received;
    assert!(!matches!(error, ChannelError::Timeout), "a peer who left is waited for");
    assert!(frames.starts_with(&received), "a frame that nobody sent");
    if changes.len() < 3 && frames.iter().all(|frame| frame.len() <= 2048) {
        assert_eq!(received.len(), frames.len(), "frames that nobody changed");
        assert!(matches!(error, ChannelError::Closed), "{error}");
    }
    !matches!(error, ChannelError::Protocol(ChannelFault::Length { .. })) && !received.is_empty()
}

fn forward(from: &mut TcpStream, to: &mut TcpStream, count: usize) {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).expect("a step of the handshake");
    to.write_all(&bytes).expect("a step of the handshake");
}

/// Changes of three bytes: where, and what is to flip there. What is left over comes after the rest.
fn change(bytes: &mut Vec<u8>, changes: &[u8]) -> usize {
    let mut first = bytes.len();
    let (changes, rest) = changes.as_chunks::<3>();
    for [low, high, flip] in changes {
        let at = usize::from(u16::from_le_bytes([*low, *high]));
        if let Some(byte) = bytes.get_mut(at).filter(|_| *flip != 0) {
            *byte ^= flip;
            first = first.min(at);
        }
    }
    bytes.extend_from_slice(rest);
    first
}

/// One post of a real wire.
struct Post {
    message: Vec<u8>,
    placed_bytes: u32,
    target: u32,
}

impl Post {
    fn read(bytes: &[u8; 7]) -> Post {
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Post {
            message: vec![bytes[0]; usize::from(number(1)) % 8193],
            placed_bytes: u32::from(number(3)) % LEND.length,
            target: u32::from(number(5)),
        }
    }

    fn frame_bytes(&self) -> usize {
        WIRE_HEAD_BYTES + self.message.len() + self.placed_bytes as usize
    }

    fn fits(&self) -> bool {
        self.placed_bytes == 0 || self.target + self.placed_bytes <= LEND.length
    }
}

/// Frames of a real wire: how many posts and in which portions, the posts, then changes of the bytes under way.
pub(super) fn frames(input: &[u8]) -> bool {
    let (how, rest) = input.split_first().map_or((0, input), |(how, rest)| (*how, rest));
    let (posts, changes) = rest.split_at(rest.len().min(usize::from(how % 5) * 7));
    let posts = posts.as_chunks::<7>().0.iter().map(Post::read).collect::<Vec<_>>();
    let mut bytes = frames_of(&posts);
    let untouched = change(&mut bytes, changes);
    let portion = [usize::MAX, 1, 31, 700][usize::from(how >> 3 & 3)];
    let portion = portion.max(bytes.len() / 200 + 1);
    let told = receive(&bytes, portion);
    let mut end = 0;
    let mut good = 0;
    for post in &posts {
        end += post.frame_bytes();
        if end > untouched || !post.fits() {
            break;
        }
        let delivered = told.get(good).expect("a frame that nobody changed");
        assert!(*delivered == (post.message.clone(), post.placed_bytes), "frame {good} differs");
        good += 1;
    }
    good > 0
}

/// The bytes of the posts, as a real wire sends them.
fn frames_of(posts: &[Post]) -> Vec<u8> {
    let (near, mut far) = connection();
    let region = Arc::new(Region::new(REGION_BYTES).expect("memory"));
    region.copy_in(0, &[0x5a; LEND.length as usize]);
    let mut wire = Wire::Tcp(TcpWire::new(near, region, Span::default()).expect("a wire"));
    let mut bytes = Vec::new();
    for (token, post) in posts.iter().enumerate() {
        let sources = [Span::new(0, post.placed_bytes)];
        let target = if post.placed_bytes == 0 { 0 } else { u64::from(post.target) };
        let placement = Placement { sources: &sources, target };
        wire.post(token as u64, &post.message, Some(placement)).expect("a few posts fit");
        let mut taken = false;
        let start = bytes.len();
        bytes.resize(start + post.frame_bytes(), 0);
        while !taken {
            let _more = wire.poll(&mut |event| taken |= matches!(event, Event::Posted { .. }));
        }
        far.read_exact(&mut bytes[start..]).expect("the frame");
    }
    // Unread bytes turn the end into a reset, which leaves no port behind.
    let _ = far.write_all(&[0]);
    bytes
}

/// What a wire delivers of these bytes.
fn receive(bytes: &[u8], portion: usize) -> Vec<(Vec<u8>, u32)> {
    let (near, mut far) = connection();
    let region = Arc::new(Region::new(REGION_BYTES).expect("memory"));
    let mut wire = Wire::Tcp(TcpWire::new(near, Arc::clone(&region), LEND).expect("a wire"));
    let mut told = Vec::new();
    let closed = Cell::new(false);
    let mut deliver = |event: Event<'_>| {
        assert!(!closed.get(), "an event after the end");
        match event {
            Event::Message { bytes, placed } => {
                let placed = placed.unwrap_or_default();
                assert!(placed.end() <= u64::from(LEND.length), "placed outside");
                told.push((bytes.to_vec(), placed.length));
            }
            Event::Posted { .. } => panic!("nothing was posted"),
            Event::Closed { .. } => closed.set(true),
        }
    };
    for part in bytes.chunks(portion) {
        if far.write_all(part).is_err() {
            break;
        }
        while wire.poll(&mut deliver) == Progress::More {}
    }
    let _ = far.shutdown(Shutdown::Write);
    let begin = Instant::now();
    while !closed.get() {
        let _more = wire.poll(&mut deliver);
        assert!(begin.elapsed() < LIMIT, "the end is not told");
    }
    let _nothing = wire.poll(&mut deliver);
    let mut outside = vec![0; REGION_BYTES];
    region.copy_out(0, &mut outside);
    outside.drain(LEND.offset as usize..LEND.end() as usize);
    assert!(outside.iter().all(|byte| *byte == 0), "bytes outside of the lent span");
    told
}

fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address()).expect("a free port");
    let near = TcpStream::connect(listener.local_addr().expect("it listens")).expect("a call");
    let (far, _) = listener.accept().expect("the call");
    (near, far)
}
