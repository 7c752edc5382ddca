//! `twinpoint stop`: has a node commit what is staged, write its map, and end.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use twinpoint_runtime::control::{ControlClient, ControlRequest};

use crate::failure::{Exit, Failure};
use crate::node_client::NodeArgs;
use crate::output::{print, print_json};

const PAUSE: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Args)]
pub struct Stop {
    #[command(flatten)]
    node: NodeArgs,
    /// Print the reply as JSON.
    #[arg(long)]
    json: bool,
}

impl Stop {
    /// Asks the node, and waits until nobody answers on its socket any more.
    ///
    /// # Errors
    /// If it does not answer, or does not end in time.
    pub fn run(self) -> Result<(), Failure> {
        let deadline = Instant::now() + self.node.timeout();
        self.node.ask(&ControlRequest::Stop)?;
        while ControlClient::connect(&self.node.socket()).is_ok() {
            if Instant::now() >= deadline {
                let text = format!(
                    "the node at {} is still stopping: it may wait for its peer; see its log, or give a longer --timeout",
                    self.node.socket().display()
                );
                return Err(Failure::new(Exit::TimedOut, "timed-out", text));
            }
            std::thread::sleep(PAUSE);
        }
        if self.json {
            print_json(&json!({ "ok": true }));
        } else {
            print("stopped\n");
        }
        Ok(())
    }
}
