//! Summary: what the demo came to, for people.

use std::fmt::{self, Display};
use std::time::Duration;

use twinpoint_runtime::status::NodeStatus;

use crate::stores::Stores;
use crate::takeover::Takeover;
use crate::watch::CommonPoint;

/// See the module.
pub struct Summary {
    /// What was copied.
    pub tree: String,
    /// The first node shortly before its death.
    pub primary: NodeStatus,
    /// The second node, after everything was read back.
    pub successor: NodeStatus,
    /// Where both were seen.
    pub common: CommonPoint,
    /// Both stores at the end.
    pub stores: Stores,
    /// How the second node took over.
    pub takeover: Takeover,
    /// The newest entry of the ledger whose flush was answered.
    pub ledger: u64,
    /// How long everything took.
    pub elapsed: Duration,
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, text: String| writeln!(f, "  {name:<24} {text}");
        let (traffic, takeover) = (&self.primary.traffic, &self.takeover);
        let (written, sent) = (traffic.client_bytes_written, &traffic.wire_bytes_sent);
        line("tree", self.tree.clone())?;
        line(
            "consistency points",
            format!("{} committed on both nodes before the kill", takeover.cp),
        )?;
        line("written by clients", bytes(written))?;
        line(
            "sent to the peer, data",
            format!("{} ({})", bytes(sent.data), share(sent.data, written)),
        )?;
        line("  map deltas", format!("{} ({})", bytes(sent.delta), share(sent.delta, written)))?;
        line(
            "  everything else",
            format!("{} ({})", bytes(sent.messages), share(sent.messages, written)),
        )?;
        line(
            "time to promote",
            format!(
                "{:.1} ms from the command to the first read answered, {:.1} ms from the kill",
                takeover.from_command.as_secs_f64() * 1e3,
                takeover.from_kill.as_secs_f64() * 1e3
            ),
        )?;
        line("term", format!("{} -> {}", self.primary.term, self.successor.term))?;
        self.write_roots(&mut line)?;
        line("flushed ledger entries", format!("{}, none lost", self.ledger))?;
        line("time", format!("{:.1} s", self.elapsed.as_secs_f64()))
    }
}

impl Summary {
    fn write_roots(&self, line: &mut impl FnMut(&str, String) -> fmt::Result) -> fmt::Result {
        let (common, stores) = (&self.common, &self.stores);
        let last = format!("root at CP {}", common.cp);
        line(&last, format!("{}  both nodes, running", common.root))?;
        line("", format!("equal at all {} CPs at which both were seen", common.compared))?;
        let of = |(cp, root): &(u64, String)| (format!("root at CP {cp}"), root.clone());
        let (name, root) = of(&stores.first);
        line(&name, format!("{root}  first store, as the kill left it"))?;
        let (name, root) = of(&stores.second);
        line(&name, format!("{root}  second store, promoted there"))?;
        match stores.equal_blocks {
            Some(blocks) => line("", format!("all {blocks} blocks of the two stores are equal")),
            None => line("", "both whole; the kill left one of them ahead of the other".to_owned()),
        }
    }
}

/// Bytes in the unit that fits.
fn bytes(count: u64) -> String {
    match count {
        0..=9_999 => format!("{count} B"),
        10_000..=10_239_999 => format!("{:.1} KiB", count as f64 / 1024.0),
        _ => format!("{:.1} MiB", count as f64 / f64::from(1 << 20)),
    }
}

fn share(part: u64, whole: u64) -> String {
    format!("{:.2} % of what clients wrote", part as f64 * 100.0 / whole.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_fitting_unit() {
        assert_eq!(bytes(9_999), "9999 B");
        assert_eq!(bytes(10_240), "10.0 KiB");
        assert_eq!(bytes(600 << 20), "600.0 MiB");
        assert_eq!(share(1, 0), "100.00 % of what clients wrote");
    }
}
