//! Acceptor: serves those who call, each on a thread of its own.
//!
//! A caller proves the key, then its first word says what it is: the control connection of a new set-up, or a lane
//! of the one under way. Invariants: nobody is told anything before the key is proved; the thread that accepts waits
//! for no caller.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rdma_fallback::{Channel, Listener, Pending, Span};
use twinpoint_core::contract::{Refusal, Reply};
use twinpoint_core::message::{Hello, Role};
use twinpoint_core::units::ShardId;

use super::callers::Place;
use super::setup_message::{SessionId, SetupMessage};
use super::trouble::{Step, Trouble};
use super::{LENT_BLOCKS_MIN, Lane, Limit, Setup, Shared, blocks_of, dialler, lock};

/// A caller has this long to prove the key and to say its first word, so that idlers do not hold their places.
const STRANGER_LIMIT: Duration = Duration::from_secs(3);
/// How long to wait when the system has no more descriptors or threads.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the listener is closed.
pub(super) fn run(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        match listener.accept() {
            _ if shared.is_stopping() => return,
            Ok(pending) => admit(shared, pending),
            Err(error) if error.kind() == std::io::ErrorKind::NotConnected => return,
            Err(error) => {
                shared.log_stranger(&format!("no caller can be accepted: {error}"));
                shared.pause(EXHAUSTED_PAUSE);
            }
        }
    }
}

fn admit(shared: &Arc<Shared>, pending: Pending) {
    let address = pending.peer_address();
    let Some(place) = shared.callers.enter(address.ip()) else {
        shared.log_stranger(&format!("caller {address} turned away: too many at once"));
        return;
    };
    let serving = Arc::clone(shared);
    let thread = thread::Builder::new().name("link-call".to_owned());
    if let Err(error) = thread.spawn(move || serve(&serving, pending, &place)) {
        shared.log_stranger(&format!("caller {address} turned away: {error}"));
        shared.pause(EXHAUSTED_PAUSE);
    }
}

fn serve(shared: &Shared, pending: Pending, place: &Place) {
    let limit = Limit::after(shared.timeout);
    let address = pending.peer_address();
    let mut channel = match pending.authenticate(&shared.key, shared.timeout.min(STRANGER_LIMIT)) {
        Ok(channel) => channel,
        Err(error) => {
            shared.log_stranger(&format!("caller {address} turned away: {error}"));
            return;
        }
    };
    place.is_known();
    let first = first_word(&mut channel, limit);
    let outcome = match first {
        Ok(SetupMessage::ControlHello { session, hello }) => {
            serve_control(shared, channel, limit, session, hello)
        }
        Ok(SetupMessage::LaneHello { session, shard, lent_blocks }) => {
            serve_lane(shared, channel, limit, session, shard, lent_blocks)
        }
        Ok(_) => refuse(shared, &mut channel, limit, Trouble::Unexpected),
        Err(trouble) => refuse(shared, &mut channel, limit, trouble),
    };
    match outcome {
        Ok(()) => {}
        Err(trouble) => shared.log_refusal(address, &trouble),
    }
}

fn first_word(channel: &mut Channel, limit: Limit) -> Result<SetupMessage, Trouble> {
    channel.set_time_limit(limit.left()?.min(STRANGER_LIMIT));
    let bytes = channel.receive(super::setup_message::SETUP_BYTES_MAX);
    let bytes = bytes.map_err(|error| Trouble::Channel(Step::Greet, error))?;
    Ok(SetupMessage::decode(&bytes)?)
}

fn serve_control(
    shared: &Shared,
    mut channel: Channel,
    limit: Limit,
    session: SessionId,
    theirs: Box<Hello>,
) -> Result<(), Trouble> {
    let admitted = shared.desk.admit(session, || consent(shared, theirs.clone()));
    let (hello, gathering) = match admitted {
        Ok(admitted) => admitted,
        Err(trouble) => return refuse(shared, &mut channel, limit, trouble),
    };
    let agreed = agree(&mut channel, limit, hello).and_then(|()| gathering.wait(limit));
    let lanes = match agreed {
        Ok(lanes) => lanes,
        Err(trouble) => {
            shared.desk.remove(&gathering);
            return refuse(shared, &mut channel, limit, trouble);
        }
    };
    shared.desk.finish(&gathering, || {
        let setup = Setup { hello: theirs, control: channel, lanes };
        shared.hand_over(setup, false, |control| {
            dialler::send(control, limit, Step::Finish, &SetupMessage::Ready)
        })
    })?;
    lock(&shared.refusals).session_began();
    Ok(())
}

/// Whether the node agrees to follow who said this, and its own hello.
fn consent(shared: &Shared, theirs: Box<Hello>) -> Result<Box<Hello>, Trouble> {
    shared.hello()?;
    if theirs.role != Role::Primary {
        return Err(Trouble::CallerNotPrimary);
    }
    let reply = shared.visit(|node| {
        // A primary is not asked to follow: that would end its own session. It learns whether it was deposed.
        if node.is_primary() { node.judge(theirs) } else { node.peer_hello(theirs) }
    })?;
    match reply {
        Reply::Hello(hello) => Ok(hello),
        Reply::Refused(refusal) => Err(Trouble::Refused(refusal)),
        _ => Err(Trouble::Refused(Refusal::SameRole)),
    }
}

fn agree(channel: &mut Channel, limit: Limit, hello: Box<Hello>) -> Result<(), Trouble> {
    dialler::send(channel, limit, Step::Greet, &SetupMessage::ControlAccept { hello })?;
    match dialler::receive(channel, limit, Step::Greet)? {
        SetupMessage::Proceed => Ok(()),
        SetupMessage::Refused(told) => Err(Trouble::Told(told)),
        _ => Err(Trouble::Unexpected),
    }
}

fn serve_lane(
    shared: &Shared,
    mut channel: Channel,
    limit: Limit,
    session: SessionId,
    shard: ShardId,
    lent_blocks: u32,
) -> Result<(), Trouble> {
    let found = shared.desk.find(session).ok_or(Trouble::LaneUnknown(shard));
    let gathering = match found.and_then(|there| there.promise(shard).map(|()| there)) {
        Ok(gathering) => gathering,
        Err(trouble) => return refuse(shared, &mut channel, limit, trouble),
    };
    let lend = match accept_lane(shared, &mut channel, limit, shard) {
        Ok(lend) => lend,
        Err(trouble) => {
            gathering.fulfil(shard, None);
            return refuse(shared, &mut channel, limit, trouble);
        }
    };
    let settled = shared.settle(channel, lend, limit, None);
    let (lane, outcome) = match settled {
        Ok(settled) => (Some(Lane { wire: settled.wire, lent_blocks }), Ok(())),
        Err(trouble) => (None, Err(trouble)),
    };
    gathering.fulfil(shard, lane);
    outcome
}

/// Tells the dialler how much is lent on the lane. What it would refuse is refused here: else it would give up while
/// this side begins.
fn accept_lane(
    shared: &Shared,
    channel: &mut Channel,
    limit: Limit,
    shard: ShardId,
) -> Result<Span, Trouble> {
    let lend = shared.visit(|node| node.lane_lend(shard))?;
    let lent_blocks = blocks_of(lend);
    if lent_blocks < LENT_BLOCKS_MIN {
        return Err(Trouble::LentTooLittle { shard, lent_blocks });
    }
    let accept = SetupMessage::LaneAccept { shard, lent_blocks };
    dialler::send(channel, limit, Step::Lane, &accept)?;
    Ok(lend)
}

/// Tells the peer why, with our hello, as far as it can still be told; then the trouble is the outcome.
fn refuse(
    shared: &Shared,
    channel: &mut Channel,
    limit: Limit,
    trouble: Trouble,
) -> Result<(), Trouble> {
    if trouble.leaves_channel_whole() {
        let hello = shared.hello().ok();
        // The trouble to report is the first one, not that its report is not wanted any more.
        let _ = dialler::send_refusal(channel, limit, &trouble, hello);
    }
    Err(trouble)
}

impl Shared {
    fn log_stranger(&self, text: &str) {
        let news = lock(&self.strangers).is_news(Instant::now());
        match news {
            None => {}
            Some(0) => self.log(text.to_owned()),
            Some(left_out) => {
                self.log(format!(
                    "{text} ({left_out} others were turned away since the last line)"
                ));
            }
        }
    }

    fn log_refusal(&self, address: SocketAddr, trouble: &Trouble) {
        let is_news =
            lock(&self.refusals).is_news(trouble.key(), trouble.is_passing(), Instant::now());
        if is_news {
            self.log(format!("caller {address}: {trouble}"));
        }
    }
}
