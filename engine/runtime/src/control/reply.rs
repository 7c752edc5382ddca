//! Reply: what a request came to, as one JSON object.
//!
//! Invariants: `ok` is always there; a refusal has a `kind`, one word that never changes, and an `error`, one line for
//! people.

use serde::{Deserialize, Serialize};

use crate::status::{NodeStatus, VolumeStatus};

/// What a request came to. Fields that do not belong to the request are left out.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ControlReply {
    /// Whether it was done.
    pub ok: bool,
    /// Why not, in one word that never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Why not and what to do, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The CP: of a checkpoint the one that holds it, of a promotion the last one before it, of a dropped branch the
    /// one that the store goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cp: Option<u64>,
    /// The store's root at that CP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The new term.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    /// The volume's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<u32>,
    /// All volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<VolumeStatus>>,
    /// The node's status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Box<NodeStatus>>,
}

impl ControlReply {
    /// Done, with nothing more to say.
    pub(super) fn done() -> ControlReply {
        ControlReply { ok: true, ..ControlReply::default() }
    }

    /// Not done: why, in one word and in one line.
    pub(super) fn refused(kind: &str, text: &str) -> ControlReply {
        let (kind, error) = (Some(kind.to_owned()), Some(text.replace('\n', " ")));
        ControlReply { kind, error, ..ControlReply::default() }
    }
}
