//! Node client: how subcommands reach a running node.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use twinpoint_runtime::control::{ControlClient, ControlReply, ControlRequest};

use crate::address::{is_too_long, parse_socket};
use crate::failure::Failure;
use crate::quantity::parse_duration;
use crate::store_path::control_socket;

/// The flags that name a node.
#[derive(Args)]
#[group(skip)]
pub struct NodeArgs {
    /// The node's control socket: what `serve --control` was given. Needed unless --store is given.
    #[arg(
        long,
        value_name = "SOCKET",
        value_parser = parse_socket,
        required_unless_present = "store",
        conflicts_with = "store"
    )]
    control: Option<PathBuf>,
    /// The store that the node serves, if the node was started without --control: then the socket is STORE.sock, for a
    /// device /run/twinpoint-NAME.sock. Needed unless --control is given.
    #[arg(long, value_name = "STORE")]
    store: Option<PathBuf>,
    /// How long to wait for the reply (us, ms, s, min). After that the exit code is 7, and the command may still be
    /// carried out.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
}

impl NodeArgs {
    /// The node's control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        let of_store = || self.store.as_deref().map(control_socket);
        self.control.clone().or_else(of_store).expect("the parser demands one of the two")
    }

    /// How long to wait for a reply.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Asks the node.
    ///
    /// # Errors
    /// If it refuses, or does not answer.
    pub fn ask(&self, request: &ControlRequest) -> Result<ControlReply, Failure> {
        let socket = self.socket();
        if is_too_long(&socket) {
            let text = "the store's path is too long for a socket beside it: serve it with --control, and give that";
            return Err(Failure::usage(text));
        }
        let mut client = ControlClient::connect(&socket)?;
        Ok(client.request(request, self.timeout)?)
    }
}
