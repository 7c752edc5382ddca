//! `twinpoint status`: how a running node is, once or again and again.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use twinpoint_runtime::control::ControlRequest;
use twinpoint_runtime::status::{STATUS_SCHEMA, render};

use crate::failure::Failure;
use crate::node_client::NodeArgs;
use crate::output::print;
use crate::quantity::parse_seconds;

/// See the module.
#[derive(Args)]
pub struct Status {
    #[command(flatten)]
    node: NodeArgs,
    /// Print JSON, one object a line. Its names and units stay as long as its `schema` is 1.
    #[arg(long)]
    json: bool,
    /// Show it again every so many seconds (or us, ms, s, min; at least 10ms), until interrupted. Default: once.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    watch: Option<Duration>,
}

impl Status {
    /// Asks the node and prints.
    ///
    /// # Errors
    /// If the node does not answer, or speaks another schema.
    pub fn run(self) -> Result<(), Failure> {
        loop {
            let text = self.once()?;
            let Some(pause) = self.watch else {
                print(&text);
                return Ok(());
            };
            let clears = !self.json && std::io::stdout().is_terminal();
            print(&format!("{}{text}", if clears { "\x1b[H\x1b[2J" } else { "" }));
            std::thread::sleep(pause.max(Duration::from_millis(10)));
        }
    }

    fn once(&self) -> Result<String, Failure> {
        let reply = self.node.ask(&ControlRequest::Status)?;
        let status = reply.status.filter(|status| status.schema == STATUS_SCHEMA);
        let Some(status) = status else {
            let text =
                "the node's status has another schema: use the node's own version of this program";
            return Err(Failure::failed("schema", text));
        };
        Ok(if self.json {
            let json = serde_json::to_string(&status).expect("a status is plain data");
            format!("{json}\n")
        } else {
            render(&status)
        })
    }
}
