//! `twinpoint branch`: the CPs of an older term that a returned old primary alone has. They are kept, and keep their
//! node from following the new primary, until they are dropped here by name.

use clap::{Args, Subcommand};
use serde_json::json;
use twinpoint_runtime::control::ControlRequest;
use twinpoint_runtime::status::BranchStatus;

use crate::failure::Failure;
use crate::node_client::NodeArgs;
use crate::output::{print, print_json};

/// See the module.
#[derive(Args)]
pub struct Branch {
    #[command(subcommand)]
    deed: Deed,
}

#[derive(Subcommand)]
enum Deed {
    /// Show the branch, if the store has one.
    List {
        #[command(flatten)]
        node: NodeArgs,
        /// Print the branches as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Drop the branch for good: the store goes back to the last CP it has in common with the new primary, and
    /// follows it. What only the branch holds is lost: copy it out first.
    Drop {
        /// Its name, as `branch list` and `status` show it.
        name: String,
        #[command(flatten)]
        node: NodeArgs,
        /// Print the reply as JSON.
        #[arg(long)]
        json: bool,
    },
}

impl Branch {
    /// Asks the node.
    ///
    /// # Errors
    /// As the node says.
    pub fn run(self) -> Result<(), Failure> {
        match self.deed {
            Deed::List { node, json } => list(&node, json),
            Deed::Drop { name, node, json } => drop_named(&name, &node, json),
        }
    }
}

fn list(node: &NodeArgs, json: bool) -> Result<(), Failure> {
    let status = node.ask(&ControlRequest::Status)?.status;
    let branch = status.and_then(|status| status.branch);
    if json {
        print_json(&json!({ "ok": true, "branches": branch.as_slice() }));
    } else {
        print(&branch.map_or_else(|| "no branches\n".to_owned(), |branch| line(&branch)));
    }
    Ok(())
}

fn line(branch: &BranchStatus) -> String {
    let BranchStatus { name, term, common, tip, root } = branch;
    format!("{name}: CPs {} to {tip} of term {term}, root {root}\n", common + 1)
}

fn drop_named(name: &str, node: &NodeArgs, json: bool) -> Result<(), Failure> {
    let reply = node.ask(&ControlRequest::BranchDrop { name: name.to_owned() })?;
    if json {
        print_json(&reply);
    } else {
        let cp = reply.cp.unwrap_or_default();
        print(&format!("dropped branch {name}: the store goes back to CP {cp} and follows\n"));
    }
    Ok(())
}
