//! `twinpoint checkpoint`: seals a consistency point, by name if one is given.

use clap::Args;
use twinpoint_core::record::is_checkpoint_name;
use twinpoint_runtime::control::ControlRequest;

use crate::failure::Failure;
use crate::node_client::NodeArgs;
use crate::output::{print, print_json};

/// See the module.
#[derive(Args)]
pub struct Checkpoint {
    /// The name that the CP's record carries: 1 to 64 bytes without control characters. Default: no name.
    #[arg(value_parser = parse_name)]
    name: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
    /// Print the reply as JSON.
    #[arg(long)]
    json: bool,
}

impl Checkpoint {
    /// Asks the node.
    ///
    /// # Errors
    /// As the node says.
    pub fn run(self) -> Result<(), Failure> {
        let reply = self.node.ask(&ControlRequest::Checkpoint { name: self.name })?;
        if self.json {
            print_json(&reply);
        } else {
            let (cp, root) = (reply.cp.unwrap_or_default(), reply.root.unwrap_or_default());
            print(&format!("CP {cp} is committed, root {root}\n"));
        }
        Ok(())
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    if is_checkpoint_name(text) {
        return Ok(text.to_owned());
    }
    Err("a checkpoint's name is 1 to 64 bytes without control characters: choose another"
        .to_owned())
}
