//! Transition tables as stored texts: what CPs and sessions were seen to do.
//!
//! A line is `often` or `rare`, then `from -> to`. Often: in at least one of fifty histories. Invariants: every
//! transition that is seen is in the table, so that a new one is looked at by somebody; what the table calls often is
//! seen again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// One of so many histories makes a transition a frequent one.
const OFTEN: u64 = 50;

/// Transitions with how often each was seen and in how many histories.
pub type Seen = BTreeMap<(&'static str, &'static str), (u64, u64)>;

/// The table of what was seen in so many histories.
#[must_use]
pub fn table_text(title: &str, seen: &Seen, histories: u64) -> String {
    let mut text = format!("# {title}\n");
    for ((from, to), (_, in_histories)) in seen {
        let word = if in_histories * OFTEN >= histories { "often" } else { "rare " };
        let _ = writeln!(text, "{word}  {from} -> {to}");
    }
    text
}

/// What is seen and not in the stored table, and what is stored as frequent and was not seen.
#[must_use]
pub fn differences(stored: &str, seen: &Seen) -> Vec<String> {
    let seen: BTreeSet<String> = seen.keys().map(|(from, to)| format!("{from} -> {to}")).collect();
    let lines = stored.lines().filter(|line| !line.starts_with('#'));
    let stored: Vec<(&str, &str)> =
        lines.filter_map(|line| line.split_once(' ')).map(|(w, t)| (w, t.trim())).collect();
    let is_stored = |name: &str| stored.iter().any(|(_, known)| *known == name);
    let new = seen.iter().filter(|name| !is_stored(name)).map(|name| format!("new: {name}"));
    let gone = stored.iter().filter(|(word, name)| *word == "often" && !seen.contains(*name));
    new.chain(gone.map(|(_, name)| format!("not seen any more: {name}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_equals_itself_and_shows_what_changed() {
        let mut seen = Seen::from([(("a", "b"), (90, 40)), (("b", "c"), (2, 1))]);
        let stored = table_text("Title", &seen, 100);
        assert_eq!(stored, "# Title\noften  a -> b\nrare   b -> c\n");
        assert!(differences(&stored, &seen).is_empty());
        seen.remove(&("b", "c"));
        assert!(differences(&stored, &seen).is_empty(), "a rare one may be missing");
        seen.remove(&("a", "b"));
        seen.insert(("a", "c"), (1, 1));
        assert_eq!(differences(&stored, &seen), ["new: a -> c", "not seen any more: a -> b"]);
    }
}
