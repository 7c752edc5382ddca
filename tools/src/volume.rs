//! `twinpoint volume`: the volumes of a running node. A change is part of a CP and committed at return.

use clap::{Args, Subcommand};
use twinpoint_core::catalog::is_name;
use twinpoint_core::limits::{VOLUME_BYTES_MAX, VOLUMES_MAX};
use twinpoint_runtime::control::ControlRequest;
use twinpoint_runtime::status::volume_table;

use crate::failure::Failure;
use crate::node_client::NodeArgs;
use crate::output::{print, print_json};
use crate::quantity::parse_blocks;

/// See the module.
#[derive(Args)]
pub struct Volume {
    #[command(subcommand)]
    deed: Deed,
}

#[derive(Subcommand)]
enum Deed {
    /// Create a thin volume: it takes space only where it is written. A store has at most 256.
    Create {
        /// Its name: 1 to 64 characters of A-Z a-z 0-9 . _ -. NBD clients ask for it by this name.
        #[arg(value_parser = parse_name)]
        name: String,
        /// Its size in bytes (B, KiB, MiB, GiB, TiB): a multiple of 4KiB, at most 32PiB. It may exceed the store.
        #[arg(value_parser = parse_size)]
        size: u64,
        #[command(flatten)]
        node: NodeArgs,
        /// Print the reply as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the volumes.
    List {
        #[command(flatten)]
        node: NodeArgs,
        /// Print the reply as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete a volume that no client uses, and free its space.
    Delete {
        /// Its name.
        #[arg(value_parser = parse_name)]
        name: String,
        #[command(flatten)]
        node: NodeArgs,
        /// Print the reply as JSON.
        #[arg(long)]
        json: bool,
    },
}

impl Volume {
    /// Asks the node.
    ///
    /// # Errors
    /// As the node says.
    pub fn run(self) -> Result<(), Failure> {
        match self.deed {
            Deed::Create { name, size, node, json } => create(name, size, &node, json),
            Deed::List { node, json } => list(&node, json),
            Deed::Delete { name, node, json } => delete(name, &node, json),
        }
    }
}

fn create(name: String, size_bytes: u64, node: &NodeArgs, json: bool) -> Result<(), Failure> {
    let request = ControlRequest::VolumeCreate { name: name.clone(), size_bytes };
    let reply = node.ask(&request)?;
    if json {
        print_json(&reply);
    } else {
        print(&format!("created volume {name}, {size_bytes} bytes\n"));
    }
    Ok(())
}

fn list(node: &NodeArgs, json: bool) -> Result<(), Failure> {
    let reply = node.ask(&ControlRequest::VolumeList)?;
    if json {
        print_json(&reply);
    } else {
        let volumes = reply.volumes.unwrap_or_default();
        let table = volume_table(&volumes);
        print(if table.is_empty() { "no volumes\n" } else { &table });
    }
    Ok(())
}

fn delete(name: String, node: &NodeArgs, json: bool) -> Result<(), Failure> {
    let reply = node.ask(&ControlRequest::VolumeDelete { name: name.clone() })?;
    if json {
        print_json(&reply);
    } else {
        print(&format!("deleted volume {name}\n"));
    }
    Ok(())
}

fn parse_name(text: &str) -> Result<String, String> {
    if is_name(text) {
        return Ok(text.to_owned());
    }
    Err("a volume's name is 1 to 64 characters of A-Z a-z 0-9 . _ -, such as disk-1".to_owned())
}

fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = parse_blocks(text)?;
    if bytes > VOLUME_BYTES_MAX {
        return Err("a volume has at most 32PiB".to_owned());
    }
    Ok(bytes)
}

// What the help says.
const _: () = assert!(VOLUMES_MAX == 256 && VOLUME_BYTES_MAX == 32 << 50);
