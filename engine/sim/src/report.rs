//! What is printed of histories: the progress line, the summary, a failure; as text or as JSON.
//!
//! Invariant: JSON is one object on one line; numbers larger than 2^53 and hashes are strings.

use std::fmt::Write;

use crate::many::Tally;
use crate::marks::Marks;
use crate::run::{Failure, Played};
use crate::time::seconds_text;
use crate::world::Counts;

/// One line of progress. `of`: how many seeds there are.
#[must_use]
pub fn progress_line(tally: &Tally, of: Option<u64>) -> String {
    let done = tally.played + tally.broken;
    let of = of.map_or_else(String::new, |of| format!(" of {of}"));
    format!(
        "{done}{of} seeds in {:.0} s, {:.1} virtual seconds a second, {} failed",
        tally.real.as_secs_f64(),
        tally.speed(),
        tally.broken
    )
}

/// A failure in full: seed, rule, story, and how to see it again.
#[must_use]
pub fn failure_text(failure: &Failure) -> String {
    let mut text = format!("seed {}: BROKEN: {}\n", failure.seed, failure.text);
    let seconds = seconds_text(failure.virtual_ns);
    let hash = failure.trace_hash;
    let _ = writeln!(text, "  checked at {}, after {seconds} virtual seconds", failure.place);
    let _ = writeln!(text, "  trace {hash:016x}");
    if !failure.story.is_empty() {
        let _ = writeln!(text, "  the last {} lines of its story:", failure.story.len());
    }
    for line in &failure.story {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(text, "again: {}", failure.replay_command());
    text
}

/// One history that broke no rule.
#[must_use]
pub fn played_text(seed: u64, played: &Played) -> String {
    format!(
        "seed {seed}: trace {:016x}, {} virtual seconds, settled {} s after the last fault\n  {}",
        played.trace_hash,
        seconds_text(played.virtual_ns),
        seconds_text(played.settled_ns),
        counts_text(&played.counts)
    )
}

/// Many histories.
#[must_use]
pub fn tally_text(tally: &Tally) -> String {
    let (settled_ns, slowest) = tally.settled_ns_max;
    let count = tally.played + tally.broken;
    format!(
        "{count} seed{}: {} broke no rule, {} failed\n  {}\n  {} virtual seconds in {:.1} s: {:.1} a second\n  \
         settled at most {} s after the last fault (seed {slowest})\n  all traces {:016x}",
        if count == 1 { "" } else { "s" },
        tally.played,
        tally.broken,
        counts_text(&tally.counts),
        seconds_text(tally.virtual_ns),
        tally.real.as_secs_f64(),
        tally.speed(),
        seconds_text(settled_ns),
        tally.trace_hash
    )
}

/// The coverage marks, the missing ones last.
#[must_use]
pub fn marks_text(marks: &Marks) -> String {
    let mut text = String::new();
    for (name, meaning, times) in marks.table() {
        let _ = writeln!(text, "{times:>10}  {name:<60}  {meaning}");
    }
    let missing = marks.missing();
    if !missing.is_empty() {
        let _ = writeln!(text, "never seen: {}", missing.join("; "));
    }
    text
}

/// One history as JSON.
#[must_use]
pub fn outcome_json(seed: u64, outcome: &Result<Played, Box<Failure>>, real_ns: u128) -> String {
    let (hash, virtual_ns, counts) = match outcome {
        Ok(played) => (played.trace_hash, played.virtual_ns, &played.counts),
        Err(failure) => (failure.trace_hash, failure.virtual_ns, &failure.counts),
    };
    let mut json = format!(
        "{{\"seed\":\"{seed}\",\"broken\":{},\"trace_hash\":\"{hash:016x}\",\"virtual_ns\":{virtual_ns},\
         \"real_ns\":{real_ns},\"virtual_per_real\":{:.3},\"counts\":{}",
        outcome.is_err(),
        virtual_ns as f64 / (real_ns as f64).max(1.0),
        counts_json(counts)
    );
    match outcome {
        Ok(played) => {
            let marks = marks_json(&played.marks);
            let _ = write!(json, ",\"settled_ns\":{},\"marks\":{marks}", played.settled_ns);
        }
        Err(failure) => {
            let _ = write!(json, ",\"failure\":{}", failure_json(failure));
        }
    }
    json + "}"
}

/// Many histories as JSON.
#[must_use]
pub fn tally_json(tally: &Tally) -> String {
    let failures: Vec<String> = tally.failures.iter().map(failure_json).collect();
    let (settled_ns, slowest) = tally.settled_ns_max;
    format!(
        "{{\"seeds\":{},\"failed\":{},\"trace_hash\":\"{:016x}\",\"virtual_ns\":{},\"real_ns\":{},\
         \"virtual_per_real\":{:.3},\"settled_ns_max\":{settled_ns},\"settled_slowest_seed\":\"{slowest}\",\
         \"counts\":{},\"marks\":{},\"failures\":[{}]}}",
        tally.played + tally.broken,
        tally.broken,
        tally.trace_hash,
        tally.virtual_ns,
        tally.real.as_nanos(),
        tally.speed(),
        counts_json(&tally.counts),
        marks_json(&tally.marks),
        failures.join(",")
    )
}

fn failure_json(failure: &Failure) -> String {
    let story: Vec<String> = failure.story.iter().map(|line| json_string(line)).collect();
    format!(
        "{{\"seed\":\"{}\",\"changes\":{},\"text\":{},\"place\":{},\"rule\":{},\"virtual_ns\":{},\
         \"trace_hash\":\"{:016x}\",\"replay\":{},\"story\":[{}]}}",
        failure.seed,
        json_string(&failure.changes.to_string()),
        json_string(&failure.text),
        json_string(&failure.place),
        json_string(&failure.rule),
        failure.virtual_ns,
        failure.trace_hash,
        json_string(&failure.replay_command()),
        story.join(",")
    )
}

fn marks_json(marks: &Marks) -> String {
    let marks: Vec<String> =
        marks.table().iter().map(|(name, _, n)| format!("{}:{n}", json_string(name))).collect();
    format!("{{{}}}", marks.join(","))
}

/// What was counted, by name: whatever the world counts.
fn counted(counts: &Counts) -> Vec<(String, u64)> {
    let text = format!("{counts:?}");
    let inner = text.split_once('{').map_or("", |(_, inner)| inner);
    let pairs = inner
        .split(',')
        .filter_map(|pair| pair.trim().trim_end_matches([' ', '}']).rsplit_once(": "));
    let pairs = pairs.filter_map(|(name, value)| {
        // Counts inside of counts are told by their own names.
        let name = name.rsplit('{').next().unwrap_or(name).trim_matches('"');
        Some((name.to_owned(), value.parse().ok()?))
    });
    pairs.collect()
}

fn counts_text(counts: &Counts) -> String {
    let counted = counted(counts);
    let words: Vec<String> = counted
        .iter()
        .filter(|(_, times)| *times > 0)
        .map(|(name, times)| format!("{times} {}", name.replace('_', " ")))
        .collect();
    words.join(", ")
}

fn counts_json(counts: &Counts) -> String {
    let counted = counted(counts);
    let pairs: Vec<String> =
        counted.iter().map(|(name, times)| format!("{}:{times}", json_string(name))).collect();
    format!("{{{}}}", pairs.join(","))
}

fn json_string(text: &str) -> String {
    let mut json = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => json.extend(['\\', character]),
            '\n' => json.push_str("\\n"),
            c if c.is_control() => {
                let _ = write!(json, "\\u{:04x}", u32::from(c));
            }
            c => json.push(c),
        }
    }
    json + "\""
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::Fault;

    #[test]
    fn counts_are_told_by_name() {
        let counts = Counts { events: 12, no_space: 3, ..Counts::default() };
        assert_eq!(counts_text(&counts), "12 events, 3 no space");
        assert!(counts_json(&counts).starts_with("{\"events\":12,\"commands\":0,"));
    }

    #[test]
    fn every_fault_that_struck_is_counted() {
        let mut counts = Counts::default();
        counts.faults.add(Fault::KillPrimary);
        counts.faults.add(Fault::RotCopy);
        assert_eq!(counts_text(&counts), "1 kill-primary, 1 rot-copy");
        assert!(counts_json(&counts).ends_with(",\"kill-primary\":1,\"rot-copy\":1}"));
    }

    #[test]
    fn strings_survive_json() {
        assert_eq!(json_string("a \"b\"\\\n\u{1}é"), "\"a \\\"b\\\"\\\\\\n\\u0001é\"");
    }
}
