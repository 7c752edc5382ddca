//! What happens on the simulated wire, and what comes of it. Step 4 of the flow, for the simulator.
//!
//! Invariant: an event says at whose side it happens and who sent it, so that a fault can hold or swallow it on its way.

use std::fmt;

use twinpoint_core::contract::IoToken;
use twinpoint_core::message::PeerMessage;
use twinpoint_core::units::{BufferId, ShardId};

use crate::content::Block;

/// A shard's post.
#[derive(Clone)]
pub(crate) struct Post {
    pub shard: ShardId,
    pub io: IoToken,
    pub message: Vec<u8>,
    /// The buffers, and the lent block of the peer where they go.
    pub placement: Option<(Vec<BufferId>, u32)>,
}

/// Something on the wire.
#[derive(Clone)]
pub(crate) enum WireEvent {
    /// The wire has taken a post's bytes.
    Sent {
        node: usize,
        post: Post,
        contents: Vec<Block>,
    },
    Lane {
        to: usize,
        shard: ShardId,
        message: Vec<u8>,
        placed: Option<(u32, Vec<Block>)>,
    },
    Control {
        to: usize,
        message: Vec<u8>,
    },
    /// A side notices that the connection is lost.
    Lost {
        node: usize,
        reason: String,
    },
    /// A side ends it, for what it found.
    Close {
        node: usize,
        reason: String,
    },
}

/// What comes of something that happened, in order.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// This happens on the connection at this time.
    At(u64, WireEvent),
    /// This happens on it about so many nanoseconds from when it is carried out.
    Soon(u64, WireEvent),
    /// A side is told.
    Told(usize, Told),
}

/// What a side is told.
#[derive(Debug)]
pub(crate) enum Told {
    /// The wire no longer needs a post's bytes.
    Posted(ShardId, IoToken),
    /// A message, and the buffers that were filled before.
    Lane { shard: ShardId, message: Vec<u8>, placed: Option<(BufferId, u32)> },
    /// A coordinator's message.
    Control(Vec<u8>),
    /// All lanes are gone, and soon the coordinator has to know why.
    Down(String),
}

impl Post {
    /// The buffers that are sent, in order.
    pub fn buffers(&self) -> impl Iterator<Item = &BufferId> {
        self.placement.iter().flat_map(|(buffers, _)| buffers)
    }
}

impl fmt::Debug for WireEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireEvent::Sent { node, post: Post { shard, io, .. }, contents } => {
                write!(f, "Sent by node {node} shard {shard} {io:?}, {} blocks", contents.len())
            }
            WireEvent::Lane { to, shard, message, placed } => {
                let blocks = placed.as_ref().map_or(0, |(_, blocks)| blocks.len());
                let kind = message.first();
                write!(f, "Lane to node {to} shard {shard}, kind {kind:?}, {blocks} blocks")
            }
            WireEvent::Control { to, message } => {
                write!(f, "Control to node {to}: {:?}", PeerMessage::decode(message))
            }
            WireEvent::Lost { node, reason } => write!(f, "Lost by node {node}: {reason}"),
            WireEvent::Close { node, reason } => write!(f, "Close by node {node}: {reason}"),
        }
    }
}

impl WireEvent {
    /// At whose side it happens.
    pub fn receiver(&self) -> usize {
        match self {
            WireEvent::Sent { node, .. }
            | WireEvent::Lost { node, .. }
            | WireEvent::Close { node, .. } => *node,
            WireEvent::Lane { to, .. } | WireEvent::Control { to, .. } => *to,
        }
    }

    /// Who sent what arrives; none if it happens at one side only.
    pub fn sender(&self) -> Option<usize> {
        match self {
            WireEvent::Sent { .. } | WireEvent::Close { .. } => None,
            WireEvent::Lost { node, .. } => Some(1 - node),
            WireEvent::Lane { to, .. } | WireEvent::Control { to, .. } => Some(1 - to),
        }
    }
}
