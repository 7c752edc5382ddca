//! Trouble: why a set-up did not come to a session.
//!
//! Invariant: every trouble has a key, equal for two troubles that an operator would call the same, whatever numbers
//! they hold: the log is limited by it.

use std::fmt;
use std::io;

use rdma_fallback::rdma::SettleError;
use rdma_fallback::{ChannelError, ChannelFault};
use twinpoint_core::contract::Refusal;
use twinpoint_core::units::ShardId;

use super::LENT_BLOCKS_MIN;
use super::explain::{explain, refusal_code};
use super::setup_message::{SetupError, Told};

/// Why a set-up did not come to a session.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The connection, while this was done.
    Channel(Step, ChannelError),
    /// The time for the whole set-up passed.
    Timeout,
    /// The system refused something on this side.
    System(io::Error),
    /// The peer's set-up message cannot be read.
    Message(SetupError),
    /// A set-up message that makes no sense now.
    Unexpected,
    /// This side refuses.
    Refused(Refusal),
    /// The peer refuses.
    Told(Told),
    /// The peer lends too little.
    LentTooLittle {
        /// On which lane.
        shard: ShardId,
        /// How many blocks.
        lent_blocks: u32,
    },
    /// A caller that is no primary.
    CallerNotPrimary,
    /// A lane of a set-up that is not under way, or of a shard that is there already or does not exist.
    LaneUnknown(ShardId),
    /// Not all lanes came in time.
    LanesMissing {
        /// So many came.
        there: usize,
        /// Of so many.
        wanted: usize,
    },
    /// A newer set-up took this one's place.
    Superseded,
    /// One lane was lost, which tells why by itself.
    LaneLost,
    /// A lane has no transport that will do for both sides.
    Transport(SettleError),
    /// This node stops, restarts, or changed its role.
    Stopping,
}

/// What was done with a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Connecting and proving the key.
    Connect,
    /// Greeting on the control connection.
    Greet,
    /// Opening a lane.
    Lane,
    /// Waiting for the peer to have every lane.
    Finish,
}

/// Equal for equal reasons.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TroubleKey(u16, u16, Option<io::ErrorKind>);

impl Trouble {
    /// The number that goes to the peer. Refusals have 1 to 99.
    pub(super) fn code(&self) -> u16 {
        match self {
            Trouble::Refused(refusal) => refusal_code(refusal),
            Trouble::Channel(..) => 100,
            Trouble::Timeout => 101,
            Trouble::System(_) => 102,
            Trouble::Message(_) => 103,
            Trouble::Unexpected => 104,
            Trouble::Told(_) => 105,
            Trouble::LentTooLittle { .. } => 106,
            Trouble::CallerNotPrimary => 107,
            Trouble::LaneUnknown(_) => 108,
            Trouble::LanesMissing { .. } => 109,
            Trouble::Superseded => 110,
            Trouble::LaneLost => 113,
            Trouble::Stopping => 111,
            Trouble::Transport(_) => 112,
        }
    }

    pub(super) fn key(&self) -> TroubleKey {
        match self {
            Trouble::Told(told) => TroubleKey(self.code(), told.code, None),
            Trouble::System(error) => TroubleKey(self.code(), 0, Some(error.kind())),
            Trouble::Transport(error) => TroubleKey(self.code(), settle_kind(error), None),
            Trouble::Channel(step, error) => {
                let (kind, io) = channel_kind(error);
                TroubleKey(self.code(), 100 * *step as u16 + kind, io)
            }
            _ => TroubleKey(self.code(), 0, None),
        }
    }

    /// Whether it passes by itself within moments, so that a line is worth writing only if it does not.
    pub(super) fn is_passing(&self) -> bool {
        let passing = |code| {
            code == refusal_code(&Refusal::SessionEnding)
                || code == Trouble::Superseded.code()
                || code == Trouble::Stopping.code()
        };
        match self {
            Trouble::Told(told) => passing(told.code),
            _ => passing(self.code()),
        }
    }

    /// Whether the peer can still be told.
    pub(super) fn leaves_channel_whole(&self) -> bool {
        !matches!(
            self,
            Trouble::Channel(..) | Trouble::Told(_) | Trouble::System(_) | Trouble::Transport(_)
        )
    }
}

fn channel_kind(error: &ChannelError) -> (u16, Option<io::ErrorKind>) {
    match error {
        ChannelError::Refused => (1, None),
        ChannelError::Version { .. } => (2, None),
        ChannelError::Timeout => (3, None),
        ChannelError::Closed => (4, None),
        ChannelError::Io(error) => (5, Some(error.kind())),
        ChannelError::Protocol(ChannelFault::Magic) => (6, None),
        ChannelError::Protocol(_) => (7, None),
    }
}

fn settle_kind(error: &SettleError) -> u16 {
    match error {
        SettleError::Channel(_) => 1,
        SettleError::Unexpected => 2,
        SettleError::System(_) => 3,
        SettleError::RdmaNeeded(_) => 4,
        SettleError::PeerNeedsRdma(_) => 5,
    }
}

impl From<SettleError> for Trouble {
    fn from(error: SettleError) -> Trouble {
        match error {
            SettleError::Channel(error) => Trouble::Channel(Step::Lane, error),
            error => Trouble::Transport(error),
        }
    }
}

impl From<SetupError> for Trouble {
    fn from(error: SetupError) -> Trouble {
        Trouble::Message(error)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Channel(step, error) => write!(f, "{step}: {error}"),
            Trouble::Timeout => write!(f, "the set-up took too long"),
            Trouble::System(error) => write!(f, "this host: {error}"),
            Trouble::Message(error) => error.fmt(f),
            Trouble::Unexpected => write!(f, "the peer sent a set-up message out of turn"),
            Trouble::Refused(refusal) => write!(f, "refused: {}", explain(refusal)),
            Trouble::Told(told) => write!(f, "the peer answers: {}", told.text),
            Trouble::LentTooLittle { shard, lent_blocks } => write!(
                f,
                "the secondary lends {lent_blocks} blocks on the lane of shard {shard}, at least \
                 {LENT_BLOCKS_MIN} are needed: restart it with more memory to lend"
            ),
            Trouble::CallerNotPrimary => {
                write!(f, "refused: only a primary opens a session, the caller says it is not one")
            }
            Trouble::LaneUnknown(shard) => {
                write!(f, "refused: no set-up under way waits for this lane of shard {shard}")
            }
            Trouble::LanesMissing { there, wanted } => {
                write!(f, "{there} of {wanted} lanes came: check the network between the two nodes")
            }
            Trouble::LaneLost => write!(f, "a lane did not come about, for the reason told before"),
            Trouble::Superseded => write!(f, "a newer set-up took the place of this one"),
            Trouble::Transport(error) => error.fmt(f),
            Trouble::Stopping => write!(f, "the node stops, restarts or changes its role"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Connect => "connecting",
            Step::Greet => "greeting",
            Step::Lane => "opening a lane",
            Step::Finish => "waiting for the peer to begin",
        })
    }
}
