//! Answer: asks the node what an operator asked, and says what it came to.
//!
//! Invariant: each refusal has a kind of its own, one word that never changes.

use twinpoint_core::catalog::{CatalogError, is_name};
use twinpoint_core::contract::{Command, Refusal, Reply};

use super::Operator;
use super::reply::ControlReply;
use super::request::ControlRequest;
use crate::link::explain;
use crate::status::NodeStatus;

/// Has a request carried out.
pub(super) fn answer(request: ControlRequest, operator: &dyn Operator) -> ControlReply {
    let done = ControlReply::done();
    let mut volume = String::new();
    let command = match request {
        ControlRequest::Status => {
            let reply = |status| ControlReply { status: Some(Box::new(status)), ..done };
            return operator.status().map_or_else(away, reply);
        }
        ControlRequest::VolumeList => {
            let reply = |status: NodeStatus| ControlReply { volumes: Some(status.volumes), ..done };
            return operator.status().map_or_else(away, reply);
        }
        ControlRequest::Stop => {
            operator.stop();
            return done;
        }
        ControlRequest::Checkpoint { name } => Command::Checkpoint(name),
        ControlRequest::VolumeCreate { name, size_bytes } => {
            volume.clone_from(&name);
            Command::VolumeCreate { name, size_bytes }
        }
        ControlRequest::VolumeDelete { name } => {
            volume.clone_from(&name);
            Command::VolumeDelete { name }
        }
        ControlRequest::Promote { force } => Command::Promote { force },
        ControlRequest::BranchDrop { name } => Command::BranchDrop { name },
    };
    match operator.command(command) {
        Reply::Checkpoint(cp, root) => {
            ControlReply { cp: Some(cp.0), root: Some(root.to_string()), ..done }
        }
        Reply::Volume(id) => ControlReply { volume: Some(id.0), ..done },
        Reply::BranchDropped(cp) => ControlReply { cp: Some(cp.0), ..done },
        Reply::Promoted(term, last, root) => ControlReply {
            term: Some(term.0),
            cp: Some(last.0),
            root: Some(root.to_string()),
            ..done
        },
        Reply::Refused(refusal) => {
            let text = match &refusal {
                Refusal::Catalog(error) => explain_catalog(*error, &volume),
                other => explain(other),
            };
            ControlReply::refused(kind(&refusal), &text)
        }
        // A node answers commands of operators with nothing else.
        Reply::Hello(_) | Reply::Accepted(_) | Reply::Stopped => done,
    }
}

/// The node has no status to tell.
fn away() -> ControlReply {
    ControlReply::refused("away", "the node is starting or stopping: try again in a moment")
}

/// What the catalog says, of which volume, and what to do.
fn explain_catalog(error: CatalogError, name: &str) -> String {
    // Only a name that can be one is told back.
    let volume = if is_name(name) { format!("volume {name}") } else { "the volume".to_owned() };
    match error {
        CatalogError::NameInvalid => format!("{error}: choose such a name"),
        CatalogError::NameTaken => format!("{volume} exists already: choose another name"),
        CatalogError::SizeInvalid => format!("{volume}: {error}: choose such a size"),
        CatalogError::Full => format!("{volume} is not created: {error}: delete one first"),
        CatalogError::NotFound => format!("{volume} does not exist: see `twinpoint volume list`"),
    }
}

/// The refusal in one word that never changes.
fn kind(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::NotPrimary => "not-primary",
        Refusal::NotSecondary => "not-secondary",
        Refusal::Catalog(_) => "catalog",
        Refusal::PrimaryConnected => "primary-connected",
        Refusal::StoreFailed => "store-failed",
        Refusal::Stopping => "stopping",
        Refusal::BadName => "bad-name",
        Refusal::OtherStore(..) => "other-store",
        Refusal::OtherGeometry => "other-geometry",
        Refusal::SameRole => "same-role",
        Refusal::StaleTerm { .. } => "stale-term",
        Refusal::Branch { .. } => "branch",
        Refusal::NewerTerm(_) => "newer-term",
        Refusal::NoSuchBranch => "no-such-branch",
        Refusal::BranchHasNoBase { .. } => "branch-has-no-base",
        Refusal::PrimaryLostPoints { .. } => "primary-lost-points",
        Refusal::TooFarBehind { .. } => "too-far-behind",
        Refusal::RootDiffers(_) => "root-differs",
        Refusal::Rewind(_) => "rewind",
        Refusal::NoCommonHistory => "no-common-history",
        Refusal::SessionEnding => "busy",
        Refusal::VolumeInUse => "volume-in-use",
    }
}
