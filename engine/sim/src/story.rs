//! A history in readable lines: when, which node, which shard, what.
//!
//! Invariant: a line of the world's notes that has another shape is shown as it is.

use std::fmt;
use std::time::Duration;

use crate::time::seconds_text;

/// Types whose numbers speak for themselves.
const NUMBERS: &[&str] = &[
    "CpNumber",
    "ShardId",
    "BufferId",
    "VolumeId",
    "DeviceBlock",
    "DataBlock",
    "LocalBlock",
    "VolumeBlock",
    "IoToken",
    "Tag",
    "Ticket",
    "Term",
    "Checksum",
    "Root",
    "Instant",
    "StoreId",
];
/// Longest list of numbers that is shown.
const LIST_MAX: usize = 8;

/// Which lines are shown.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Window {
    /// From this virtual time on.
    pub from: Option<Duration>,
    /// Until this virtual time.
    pub to: Option<Duration>,
    /// Of this node, and of none.
    pub node: Option<usize>,
    /// Of this shard, and of none.
    pub shard: Option<u16>,
}

impl Window {
    pub(crate) fn shows(&self, line: &Line) -> bool {
        let time = Duration::from_nanos(line.time_ns);
        self.from.is_none_or(|from| time >= from)
            && self.to.is_none_or(|to| time <= to)
            && (self.node.is_none() || line.node.is_none() || line.node == self.node)
            && (self.shard.is_none() || line.shard.is_none() || line.shard == self.shard)
    }
}

/// One event, action or remark.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Line {
    pub time_ns: u64,
    pub node: Option<usize>,
    pub shard: Option<u16>,
    pub text: String,
}

impl Line {
    /// Reads a line of the world's notes.
    pub fn read(note: &str) -> Line {
        let note = note.trim_start();
        let (time, text) = note.split_once(' ').unwrap_or((note, ""));
        let time_ns = time.parse().unwrap_or(0);
        let (node, text) = take_node(text);
        let (shard, text) = take_shard(&text);
        Line { time_ns, node, shard, text: plain(&text) }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = |name: &str, number: Option<u64>| {
            number.map_or_else(String::new, |number| format!("{name} {number}"))
        };
        let node = place("node", self.node.map(|node| node as u64));
        let shard = place("shard", self.shard.map(u64::from));
        write!(f, "{:>14}  {node:<6}  {shard:<8}  {}", seconds_text(self.time_ns), self.text)
    }
}

/// `Node(1, 3, Event)`, `node 1 does so` and `node 1: so it is`.
fn take_node(text: &str) -> (Option<usize>, String) {
    if let Some(rest) = text.strip_prefix("Node(") {
        let parts: Vec<&str> = rest.splitn(3, ", ").collect();
        if let [node, _, event] = parts[..] {
            let event = event.strip_suffix(')').unwrap_or(event);
            return (node.parse().ok(), event.to_owned());
        }
    }
    let after = text.strip_prefix("node ").and_then(|rest| rest.split_once(' '));
    match after.map(|(node, rest)| (node.trim_end_matches(':').parse().ok(), rest)) {
        Some((node @ Some(_), rest)) => (node, rest.to_owned()),
        _ => (None, text.to_owned()),
    }
}

/// `Request(ShardId(2), ...)` and `shard 2 does so`.
fn take_shard(text: &str) -> (Option<u16>, String) {
    if let Some((name, rest)) = text.split_once("(ShardId(")
        && name.chars().all(|c| c.is_ascii_alphabetic())
        && let Some((shard, rest)) = rest.split_once(')')
    {
        let rest = rest.strip_prefix(", ").unwrap_or(rest);
        return (shard.parse().ok(), format!("{name} {}", rest.strip_suffix(')').unwrap_or(rest)));
    }
    let after = text.strip_prefix("shard ").and_then(|rest| rest.split_once(' '));
    match after.map(|(shard, rest)| (shard.parse().ok(), rest)) {
        Some((shard @ Some(_), rest)) => (shard, rest.to_owned()),
        _ => (None, text.to_owned()),
    }
}

/// `CpNumber(5)` becomes `5`; a long list of numbers its length.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find(['(', '[']) {
        let (before, inner) = (&rest[..open], &rest[open + 1..]);
        let is_list = rest.as_bytes()[open] == b'[';
        let close = inner.find(if is_list { ']' } else { ')' });
        let content = close.map_or(inner, |close| &inner[..close]);
        let is_number =
            |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        let count = content.split(", ").count();
        let numbers = content.split(", ").take_while(|text| is_number(text)).count();
        let name = NUMBERS.iter().find(|name| !is_list && before.ends_with(*name));
        let skip = match (name, close) {
            (Some(name), Some(close)) if is_number(content) => {
                out.push_str(&before[..before.len() - name.len()]);
                out.push_str(content);
                close + 1
            }
            _ if is_list && numbers + 1 >= count && count > LIST_MAX => {
                out.push_str(before);
                out.push_str(&format!(
                    "[{}{count} numbers]",
                    if close.is_none() { "more than " } else { "" }
                ));
                close.map_or(inner.len(), |close| close + 1)
            }
            _ => {
                out.push_str(&rest[..=open]);
                0
            }
        };
        rest = &inner[skip..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_become_plain_words() {
        let line = Line::read(
            "     1500000 Node(1, 3, Order(ShardId(2), Committed { committed: CpNumber(5), base: CpNumber(4) }))",
        );
        assert_eq!((line.time_ns, line.node, line.shard), (1_500_000, Some(1), Some(2)));
        assert_eq!(
            line.to_string(),
            "   0.001500000  node 1  shard 2   Order Committed { committed: 5, base: 4 }"
        );
        let line = Line::read(
            "12 node 0 shard 1 does WriteData { io: IoToken(7), block: DeviceBlock(9) }",
        );
        assert_eq!((line.node, line.shard), (Some(0), Some(1)));
        assert_eq!(line.text, "does WriteData { io: 7, block: 9 }");
    }

    #[test]
    fn long_lists_are_counted() {
        assert_eq!(
            plain("a: [1, 2], b: [1, 2, 3, 4, 5, 6, 7, 8, 9], c"),
            "a: [1, 2], b: [9 numbers], c"
        );
        assert_eq!(plain("[1, 2, 3, 4, 5, 6, 7, 8, 9, 1"), "[more than 10 numbers]");
        assert_eq!(plain("f(x) [(1)] ("), "f(x) [(1)] (");
    }

    #[test]
    fn a_window_hides_other_times_and_nodes() {
        let window = Window {
            from: Some(Duration::from_nanos(10)),
            to: Some(Duration::from_nanos(20)),
            node: Some(1),
            shard: None,
        };
        let line = |text: &str| window.shows(&Line::read(text));
        assert!(line("10 node 1 dies") && line("20 the network is back"));
        assert!(!line("9 node 1 dies") && !line("21 node 1 dies") && !line("15 node 0 dies"));
    }
}
