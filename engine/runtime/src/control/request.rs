//! Request: what an operator asks of a node, as one JSON object.
//!
//! Invariant: a request has exactly the fields it is documented with; one field more, and it is refused, for whoever
//! sent it meant something that would not happen.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// What an operator asks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlRequest {
    /// How is the node?
    #[serde(deserialize_with = "no_more_fields")]
    Status,
    /// Seal a CP.
    Checkpoint {
        /// By this name.
        #[serde(default)]
        name: Option<String>,
    },
    /// Create a thin volume.
    VolumeCreate {
        /// Its name.
        name: String,
        /// Its size in bytes.
        size_bytes: u64,
    },
    /// Delete a volume.
    VolumeDelete {
        /// Its name.
        name: String,
    },
    /// Which volumes are there?
    #[serde(deserialize_with = "no_more_fields")]
    VolumeList,
    /// Take over as primary.
    Promote {
        /// Even though the primary is connected.
        #[serde(default)]
        force: bool,
    },
    /// Drop a branch, and go back to where it began.
    BranchDrop {
        /// Its name.
        name: String,
    },
    /// Stop in order.
    #[serde(deserialize_with = "no_more_fields")]
    Stop,
}

impl ControlRequest {
    /// Reads a line.
    ///
    /// # Errors
    /// [`BadRequest`], if it is not one JSON object with the fields of a request.
    pub(super) fn parse(line: &[u8]) -> Result<ControlRequest, BadRequest> {
        // A list would do for the parser too, with the fields in their order.
        if line.trim_ascii_start().first() != Some(&b'{') {
            return Err(BadRequest(None));
        }
        serde_json::from_slice(line).map_err(|error| BadRequest(Some(error)))
    }
}

/// Why a line is no request: not an object, or the parser's reason.
#[derive(Debug)]
pub(super) struct BadRequest(Option<serde_json::Error>);

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(error) => write!(f, "not a request ({error}): send one JSON object a line"),
            None => f.write_str("not a request: send one JSON object a line"),
        }
    }
}

/// A request without fields of its own: the derived code would take, and forget, any.
fn no_more_fields<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}
    Nothing::deserialize(deserializer).map(|Nothing {}| ())
}
