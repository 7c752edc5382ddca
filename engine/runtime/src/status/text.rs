//! Text: a node's status as a person reads it, in a few lines; what needs an operator is a line of its own.
//!
//! Invariant: shows nothing that is not in the status.

use std::fmt::Write as _;

use super::{
    CpLatencyStatus, LagStatus, LatencyStatus, NodeStatus, SpaceStatus, TrafficStatus, VolumeStatus,
};

/// The status as a few lines of text, each ending in a newline.
#[must_use]
pub fn render(status: &NodeStatus) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<10} {value}");
    };
    let role = status.role.name();
    line("node", format!("{role}, term {}, up {}", status.term, span(status.uptime_seconds)));
    line("store", status.store.clone());
    line("root", format!("{} at CP {}", status.root, status.cp.local));
    line("cp", points_text(status));
    line("peer", peer_text(status));
    line("lag", lag_text(&status.lag));
    warnings(status).into_iter().for_each(|warning| line("WARNING", warning));
    line("space", space_text(&status.space));
    line("clients", clients_text(status));
    line("traffic", traffic_text(&status.traffic));
    line("cost", cost_text(status));
    text.push_str(&latency_table(&status.cp_latency_us));
    text.push_str(&volume_table(&status.volumes));
    text
}

/// Bytes with a binary unit, three digits or so: `4096` is `4.0 KiB`.
#[must_use]
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn points_text(status: &NodeStatus) -> String {
    let cp = &status.cp;
    let mut text = format!("open {}, committed here {}", cp.open, cp.local);
    if status.peer.state != "none" {
        let _ = write!(
            text,
            ", in the secondary's memory {}, durable there {}, on both {}",
            cp.secondary_received, cp.secondary, status.base
        );
    }
    text
}

fn peer_text(status: &NodeStatus) -> String {
    let mut text = status.peer.state.clone();
    if let Some(address) = &status.peer.address {
        let _ = write!(text, ", {address}");
    }
    if let Some(transport) = &status.peer.transport {
        let _ = write!(text, " over {transport}");
    }
    text
}

fn lag_text(lag: &LagStatus) -> String {
    format!("{} CPs, {}, {:.1} s", lag.points, bytes_text(lag.bytes), lag.seconds)
}

fn warnings(status: &NodeStatus) -> Vec<String> {
    let mut warnings = Vec::new();
    if status.peer.state == "deposed" {
        warnings
            .push("a newer term was opened elsewhere: restart with --role secondary".to_owned());
    } else if status.failed {
        warnings.push("the store has failed; see the node's log, then run verify".to_owned());
    }
    if let Some(cp) = status.alone_since {
        warnings.push(format!("carrying on without the peer since CP {cp}"));
    }
    if status.base_given_up {
        warnings.push("the base was given up: the peer has to be formatted and copied anew".into());
    }
    if let Some(branch) = &status.branch {
        warnings.push(format!(
            "CPs {} to {} are this store's alone, branch {}: it follows nobody until `twinpoint branch drop {}`",
            branch.common + 1,
            branch.tip,
            branch.name,
            branch.name
        ));
    }
    if status.holding_writers {
        warnings.push("writers are held back until the secondary catches up".to_owned());
    }
    if status.peer.state == "diverged" {
        warnings
            .push("the roots differ: replication has stopped; run verify on both stores".into());
    }
    warnings
}

fn space_text(space: &SpaceStatus) -> String {
    let each = space.bytes_per_mapped_block.map(|bytes| format!(", {bytes:.2} B a block"));
    format!(
        "{} free of {}; map {} for {} blocks{}",
        bytes_text(space.free_bytes),
        bytes_text(space.data_bytes),
        bytes_text(space.map_bytes),
        space.mapped_blocks,
        each.unwrap_or_default()
    )
}

fn clients_text(status: &NodeStatus) -> String {
    let traffic = &status.traffic;
    format!(
        "{} connected; wrote {}, read {}",
        status.clients,
        bytes_text(traffic.client_bytes_written),
        bytes_text(traffic.client_bytes_read)
    )
}

fn traffic_text(traffic: &TrafficStatus) -> String {
    let (device, wire) = (&traffic.device_bytes_written, &traffic.wire_bytes_sent);
    format!(
        "device: data {}, journal and map {}; wire: data {}, delta {}, messages {}",
        bytes_text(device.data),
        bytes_text(device.journal_and_map),
        bytes_text(wire.data),
        bytes_text(wire.delta),
        bytes_text(wire.messages)
    )
}

/// What moving data took since the start; and for each 4 KiB, where clients wrote or read some.
fn cost_text(status: &NodeStatus) -> String {
    let (cost, traffic) = (&status.efficiency, &status.traffic);
    let calls = cost.system_calls.total();
    let moved = traffic.client_bytes_written + traffic.client_bytes_read;
    let each = match moved / 4096 {
        0 => String::new(),
        units => format!(" ({:.2} for each 4 KiB of clients)", calls as f64 / units as f64),
    };
    let copied = &cost.copied_bytes;
    let mut text = format!(
        "system calls {calls}{each}; copied: clients {}, wire data {}",
        bytes_text(copied.client),
        bytes_text(copied.wire_data)
    );
    if cost.device.commands > 0 {
        let _ = write!(text, "; NVMe commands {}", cost.device.commands);
    }
    if cost.verbs.requests > 0 {
        let _ = write!(
            text,
            "; verbs {}, completions {}",
            cost.verbs.requests + cost.verbs.receives,
            cost.verbs.completions
        );
    }
    text
}

fn latency_table(latency: &CpLatencyStatus) -> String {
    let mut text = format!(
        "{:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
        "CP phase, us", "count", "p50", "p90", "p99", "p99.9", "max"
    );
    let phases = [
        ("  written", &latency.written),
        ("  durable", &latency.durable),
        ("  confirmed", &latency.confirmed),
    ];
    for (name, phase) in phases {
        let LatencyStatus { count, p50, p90, p99, p999, max } = phase;
        let _ =
            writeln!(text, "{name:<12} {count:>9} {p50:>9} {p90:>9} {p99:>9} {p999:>9} {max:>9}");
    }
    text
}

/// A table of volumes; empty without volumes.
#[must_use]
pub fn volume_table(volumes: &[VolumeStatus]) -> String {
    let mut text = String::new();
    if volumes.is_empty() {
        return text;
    }
    let width = volumes.iter().map(|volume| volume.name.len()).max().unwrap_or(0).max(6);
    let _ = writeln!(text, "{:<width$} {:>6} {:>12} {:>6}", "volume", "id", "size", "open");
    for volume in volumes {
        let VolumeStatus { name, id, size_bytes, open } = volume;
        let size = bytes_text(*size_bytes);
        let _ = writeln!(text, "{name:<width$} {id:>6} {size:>12} {open:>6}");
    }
    text
}

pub(super) fn span(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest} s"),
        (0, 0, _) => format!("{minutes} min {rest} s"),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}
