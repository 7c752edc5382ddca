//! Dialler: while this node is primary and has no session, calls the peer until there is one.
//!
//! One thread decides when to try; each try runs on a thread of its own, which the first does not have to wait for
//! when the link stops. Invariants: one try at a time; pauses between tries grow from 100 ms to 2 s, and begin anew
//! after a session that lasted; the same trouble is logged once.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rdma_fallback::{CHANNEL_BYTES_MAX, Channel, dial};
use twinpoint_core::contract::{Refusal, Reply};
use twinpoint_core::message::{Hello, Role};
use twinpoint_core::units::ShardId;

use super::setup_message::{SETUP_BYTES_MAX, SessionId, SetupMessage, Told};
use super::trouble::{Step, Trouble};
use super::word_limit::Refusals;
use super::{LENT_BLOCKS_MIN, Lane, Limit, Setup, Shared, blocks_of};

/// Shortest pause between two tries; also how often an idle dialler looks whether it is wanted.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A session that ends sooner does not count as success: it would be dialled ten times a second.
const SESSION_LASTED: Duration = Duration::from_secs(2);
/// How often a running try is left to see whether the link stops.
const STOP_LOOK: Duration = Duration::from_millis(20);
/// Lanes dialled at once: a far peer with many shards is reached in time, and takes few threads.
const LANES_AT_ONCE: usize = 8;

const _: () = assert!(SETUP_BYTES_MAX <= CHANNEL_BYTES_MAX);

/// Dials `address` whenever it is needed, until the link stops.
pub(super) fn run(shared: &Arc<Shared>, address: &str) {
    let mut pause = PAUSE_MIN;
    let mut refusals = Refusals::default();
    while await_wanted(shared) {
        match try_once(shared, address) {
            Ok(()) => {
                refusals.session_began();
                let since = Instant::now();
                await_wanted(shared);
                if since.elapsed() >= SESSION_LASTED {
                    pause = PAUSE_MIN;
                }
            }
            // This node's own affair, which it logs itself.
            Err(Trouble::Stopping) => {}
            Err(trouble) => {
                if refusals.is_news(trouble.key(), trouble.is_passing(), Instant::now()) {
                    shared.log(format!("peer {address}: {trouble}"));
                }
            }
        }
        shared.pause(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Waits until a session is wanted; false if the link stops.
fn await_wanted(shared: &Shared) -> bool {
    while !shared.is_stopping() && !is_wanted(shared) {
        shared.pause(PAUSE_MIN);
    }
    !shared.is_stopping()
}

fn is_wanted(shared: &Shared) -> bool {
    let wanted = |node: &Arc<dyn super::LinkNode>| {
        node.is_primary() && !node.session_is_up() && !node.is_stopping()
    };
    shared.visit(wanted).unwrap_or(false)
}

/// Runs one try on its own thread, and leaves it alone if the link stops: it then finds no node to visit.
fn try_once(shared: &Arc<Shared>, address: &str) -> Result<(), Trouble> {
    let (sender, receiver) = mpsc::channel();
    let (trying, address) = (Arc::clone(shared), address.to_owned());
    let run = move || {
        // Nobody listens any more once the link stops.
        let _ = sender.send(set_up(&trying, &address));
    };
    let thread = thread::Builder::new().name("link-try".to_owned());
    thread.spawn(run).map_err(Trouble::System)?;
    await_outcome(shared, &receiver)
}

fn await_outcome(shared: &Shared, receiver: &Receiver<Result<(), Trouble>>) -> Result<(), Trouble> {
    loop {
        match receiver.recv_timeout(STOP_LOOK) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Timeout) if !shared.is_stopping() => {}
            // Also when the try panicked, which has been said on its thread.
            Err(_) => return Err(Trouble::Stopping),
        }
    }
}

fn set_up(shared: &Shared, address: &str) -> Result<(), Trouble> {
    let limit = Limit::after(shared.timeout);
    let ours = shared.hello()?;
    if ours.role != Role::Primary {
        return Err(Trouble::Refused(Refusal::NotPrimary));
    }
    let shards = ours.geometry.shards;
    let session = SessionId(random().map_err(Trouble::System)?);
    let mut control = connect(shared, address, limit)?;
    let first = SetupMessage::ControlHello { session, hello: ours };
    send(&mut control, limit, Step::Greet, &first)?;
    let theirs = match receive(&mut control, limit, Step::Greet)? {
        SetupMessage::ControlAccept { hello } => hello,
        SetupMessage::Refused(told) => return Err(own_view(shared, told)),
        _ => return Err(Trouble::Unexpected),
    };
    if let Err(trouble) = judge(shared, theirs.clone()) {
        // The trouble to report is why, not that the peer did not stay to hear it.
        let _ = send_refusal(&mut control, limit, &trouble, None);
        return Err(trouble);
    }
    send(&mut control, limit, Step::Greet, &SetupMessage::Proceed)?;
    // The control connection's own address: a name may stand for more than one host.
    let address = control.peer_address().map_err(Trouble::System)?.to_string();
    let lanes = dial_lanes(shared, &address, limit, session, shards)?;
    match receive(&mut control, limit, Step::Finish)? {
        SetupMessage::Ready => {}
        SetupMessage::Refused(told) => return Err(Trouble::Told(told)),
        _ => return Err(Trouble::Unexpected),
    }
    shared.hand_over(Setup { hello: theirs, control, lanes }, true, |_| Ok(()))
}

fn judge(shared: &Shared, theirs: Box<Hello>) -> Result<(), Trouble> {
    match shared.visit(|node| node.judge(theirs))? {
        Reply::Accepted(_) => Ok(()),
        Reply::Refused(refusal) => Err(Trouble::Refused(refusal)),
        _ => Err(Trouble::Stopping),
    }
}

/// A peer that refuses says what it is, so that this side judges too: a deposed primary has to learn of it, and this
/// side's operator reads this side's reason first.
fn own_view(shared: &Shared, mut told: Told) -> Trouble {
    match told.hello.take().map(|theirs| judge(shared, theirs)) {
        Some(Err(trouble @ Trouble::Refused(_))) if !trouble.is_passing() => trouble,
        _ => Trouble::Told(told),
    }
}

fn dial_lanes(
    shared: &Shared,
    address: &str,
    limit: Limit,
    session: SessionId,
    shards: u16,
) -> Result<Vec<Lane>, Trouble> {
    // The first one by itself: a try of RDMA that fails takes time, and the others need not learn the same.
    let (first, went_over_tcp) = dial_lane(shared, address, limit, session, ShardId(0), None)?;
    let went_over_tcp = went_over_tcp.as_deref();
    let mut lanes = vec![first];
    let shards = (1..shards).map(ShardId).collect::<Vec<_>>();
    for some in shards.chunks(LANES_AT_ONCE) {
        let dialled = thread::scope(|scope| {
            let dial = |shard: &ShardId| {
                let shard = *shard;
                let thread = thread::Builder::new().name("link-lane".to_owned());
                thread.spawn_scoped(scope, move || {
                    let lane = dial_lane(shared, address, limit, session, shard, went_over_tcp);
                    lane.map(|(lane, _)| lane)
                })
            };
            let threads = some.iter().map(dial).collect::<Vec<_>>();
            let joined = threads.into_iter().map(|thread| {
                let outcome = thread.map_err(Trouble::System)?.join();
                outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            joined.collect::<Result<Vec<_>, _>>()
        });
        lanes.extend(dialled?);
    }
    Ok(lanes)
}

/// A lane, and why it is not over RDMA.
fn dial_lane(
    shared: &Shared,
    address: &str,
    limit: Limit,
    session: SessionId,
    shard: ShardId,
    went_over_tcp: Option<&str>,
) -> Result<(Lane, Option<String>), Trouble> {
    let lend = shared.visit(|node| node.lane_lend(shard))?;
    let mut channel = connect(shared, address, limit)?;
    let first = SetupMessage::LaneHello { session, shard, lent_blocks: blocks_of(lend) };
    send(&mut channel, limit, Step::Lane, &first)?;
    match receive(&mut channel, limit, Step::Lane)? {
        SetupMessage::LaneAccept { shard: theirs, .. } if theirs != shard => {
            Err(Trouble::Unexpected)
        }
        SetupMessage::LaneAccept { lent_blocks, .. } if lent_blocks < LENT_BLOCKS_MIN => {
            Err(Trouble::LentTooLittle { shard, lent_blocks })
        }
        SetupMessage::LaneAccept { lent_blocks, .. } => {
            let settled = shared.settle(channel, lend, limit, went_over_tcp)?;
            Ok((Lane { wire: settled.wire, lent_blocks }, settled.without_rdma))
        }
        SetupMessage::Refused(told) => Err(Trouble::Told(told)),
        _ => Err(Trouble::Unexpected),
    }
}

fn connect(shared: &Shared, address: &str, limit: Limit) -> Result<Channel, Trouble> {
    dial(address, &shared.key, limit.left()?)
        .map_err(|error| Trouble::Channel(Step::Connect, error))
}

/// Sends one message, within the time left.
pub(super) fn send(
    channel: &mut Channel,
    limit: Limit,
    step: Step,
    message: &SetupMessage,
) -> Result<(), Trouble> {
    channel.set_time_limit(limit.left()?);
    channel.send(&message.encode()).map_err(|error| Trouble::Channel(step, error))
}

/// Receives one message, within the time left.
pub(super) fn receive(
    channel: &mut Channel,
    limit: Limit,
    step: Step,
) -> Result<SetupMessage, Trouble> {
    channel.set_time_limit(limit.left()?);
    let bytes = channel.receive(SETUP_BYTES_MAX).map_err(|error| Trouble::Channel(step, error))?;
    Ok(SetupMessage::decode(&bytes)?)
}

/// Tells the peer why there will be no session, even when the time is up.
pub(super) fn send_refusal(
    channel: &mut Channel,
    limit: Limit,
    trouble: &Trouble,
    hello: Option<Box<Hello>>,
) -> Result<(), Trouble> {
    let told = Told { code: trouble.code(), text: trouble.to_string(), hello };
    let limit = Limit(limit.0.max(Limit::after(PAUSE_MIN).0));
    send(channel, limit, Step::Greet, &SetupMessage::Refused(told))
}

fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
