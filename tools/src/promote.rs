//! `twinpoint promote`: makes a secondary the primary, in a new term. Of a running node over its control socket, of a
//! stopped one on its store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgGroup, Args};
use serde_json::json;
use twinpoint_runtime::control::{ControlClient, ControlRequest};
use twinpoint_runtime::device::{OpenMode, StoreFile};
use twinpoint_runtime::store;

use crate::address::parse_socket;
use crate::failure::Failure;
use crate::output::{print, print_json};
use crate::quantity::parse_duration;
use crate::store_path::caching;

/// See the module.
#[derive(Args)]
#[command(group = ArgGroup::new("which").required(true).args(["control", "store"]))]
pub struct Promote {
    /// The running secondary's control socket: what `serve --control` was given. Needed unless --store is given.
    #[arg(long, value_name = "SOCKET", value_parser = parse_socket)]
    control: Option<PathBuf>,
    /// The stopped secondary's store: recovers it and writes the new term. Serve it with --role primary then. Needed
    /// unless --control is given.
    #[arg(long, value_name = "STORE")]
    store: Option<PathBuf>,
    /// Take over even though the primary is connected: it is deposed, and refuses its clients from then on.
    #[arg(long, conflicts_with = "store")]
    force: bool,
    /// How long to wait for a running node's reply (us, ms, s, min). After that the exit code is 7, and the promotion
    /// may still be carried out.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
    /// Accept a file system that knows no direct access, for a stopped store. For trials: a power cut may take more.
    #[arg(long, conflicts_with = "control")]
    buffered: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Promote {
    /// Promotes.
    ///
    /// # Errors
    /// If it is the primary already, the primary is connected, or the store is damaged or in use.
    pub fn run(self) -> Result<(), Failure> {
        let (term, last, root) = match (&self.control, &self.store) {
            (Some(control), _) => self.running(control)?,
            (None, Some(store)) => self.stopped(store)?,
            (None, None) => unreachable!("the parser demands one of the two"),
        };
        if self.json {
            print_json(&json!({ "ok": true, "term": term, "cp": last, "root": root }));
        } else {
            print(&format!("primary of term {term}, from CP {} on\n", last + 1));
        }
        Ok(())
    }

    fn running(&self, control: &Path) -> Result<(u64, u64, Option<String>), Failure> {
        let request = ControlRequest::Promote { force: self.force };
        let reply = ControlClient::connect(control)?.request(&request, self.timeout)?;
        Ok((reply.term.unwrap_or_default(), reply.cp.unwrap_or_default(), reply.root))
    }

    fn stopped(&self, path: &Path) -> Result<(u64, u64, Option<String>), Failure> {
        let store = StoreFile::open_with(path, OpenMode::Exclusive, caching(self.buffered))?;
        let promotion = store::promote(&store)?;
        Ok((promotion.term.0, promotion.last.0, Some(promotion.root.to_string())))
    }
}
