//! What a node says of itself: the text of `twinpoint status`, and the same as JSON.
//!
//! Beside the flow. Invariants: field names and units never change within one [`STATUS_SCHEMA`]; fields may be added;
//! a field that has nothing to say is null, and not left out.

mod efficiency;
mod text;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use twinpoint_core::branch::Branch;
use twinpoint_core::message::Role;

pub use efficiency::{
    CopiedBytes, DeviceCounts, EfficiencyStatus, RingCounts, SystemCallCounts, ThreadCounts,
    VerbCounts,
};
pub use text::{bytes_text, render, volume_table};

/// Version of the field names and their meanings.
pub const STATUS_SCHEMA: u32 = 1;

/// A node at one moment. All counters begin with the node's start.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct NodeStatus {
    /// [`STATUS_SCHEMA`].
    pub schema: u32,
    /// What the node is.
    pub role: RoleStatus,
    /// Its term.
    pub term: u64,
    /// The store's identity: 32 hexadecimal digits.
    pub store: String,
    /// The newest consistency points.
    pub cp: CpStatus,
    /// The last CP committed on both sides.
    pub base: u64,
    /// The store's root at `cp.local`: 32 hexadecimal digits.
    pub root: String,
    /// How far the secondary is behind.
    pub lag: LagStatus,
    /// The other side.
    pub peer: PeerStatus,
    /// Carrying on without the peer since this CP.
    pub alone_since: Option<u64>,
    /// The base's blocks are no longer kept: the peer has to be copied anew.
    pub base_given_up: bool,
    /// CPs of an older term that this store alone has; null if there are none.
    pub branch: Option<BranchStatus>,
    /// Writers wait because the secondary is too far behind.
    pub holding_writers: bool,
    /// The store has failed, and the node answers no requests.
    pub failed: bool,
    /// What is used and free.
    pub space: SpaceStatus,
    /// The volumes, in order of their ids.
    pub volumes: Vec<VolumeStatus>,
    /// How long the phases of a CP take, from its seal, in microseconds.
    pub cp_latency_us: CpLatencyStatus,
    /// Bytes moved.
    pub traffic: TrafficStatus,
    /// What moving them took.
    #[serde(default)]
    pub efficiency: EfficiencyStatus,
    /// Connected NBD clients, and queues of ublk devices.
    pub clients: u64,
    /// Seconds since the node started.
    pub uptime_seconds: u64,
}

/// A node's role.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoleStatus {
    /// Takes writes.
    #[default]
    Primary,
    /// Follows a primary.
    Secondary,
}

impl From<Role> for RoleStatus {
    fn from(role: Role) -> RoleStatus {
        match role {
            Role::Primary => RoleStatus::Primary,
            Role::Secondary => RoleStatus::Secondary,
        }
    }
}

impl RoleStatus {
    /// As it is written in flags and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            RoleStatus::Primary => "primary",
            RoleStatus::Secondary => "secondary",
        }
    }
}

/// The newest CPs.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CpStatus {
    /// Takes writes now.
    pub open: u64,
    /// Committed here.
    pub local: u64,
    /// Whole in the secondary's memory.
    pub secondary_received: u64,
    /// Durable on the secondary.
    pub secondary: u64,
}

/// How far the secondary is behind.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct LagStatus {
    /// CPs sealed and not confirmed.
    pub points: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Age of the oldest.
    pub seconds: f64,
}

/// The other side.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PeerStatus {
    /// `none`, `connected`, `catching-up`, `absent` or `diverged`.
    pub state: String,
    /// What the lanes run over: `rdma`, `tcp` or `mixed`; null without a session.
    pub transport: Option<String>,
    /// Its address, if known.
    pub address: Option<String>,
}

/// CPs of an older term that the store alone has. It follows nobody until they are dropped by this name.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BranchStatus {
    /// What `twinpoint branch drop` takes.
    pub name: String,
    /// The term in which they were made.
    pub term: u64,
    /// The last CP that the newer primary has too.
    pub common: u64,
    /// The last CP of the branch.
    pub tip: u64,
    /// The store's root there: 32 hexadecimal digits.
    pub root: String,
}

impl From<Branch> for BranchStatus {
    fn from(branch: Branch) -> BranchStatus {
        BranchStatus {
            name: branch.to_string(),
            term: branch.term.0,
            common: branch.common.0,
            tip: branch.tip.0,
            root: branch.root.to_string(),
        }
    }
}

/// What is used and free.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// Bytes of all data zones.
    pub data_bytes: u64,
    /// Bytes of them that are free.
    pub free_bytes: u64,
    /// Memory that the maps take, in bytes.
    pub map_bytes: u64,
    /// Blocks of volumes that were written and not unmapped.
    pub mapped_blocks: u64,
    /// Map memory for each of them, in bytes; null while there are none.
    pub bytes_per_mapped_block: Option<f64>,
}

impl SpaceStatus {
    /// From counts of blocks and the maps' memory.
    #[must_use]
    pub fn new(
        data_blocks: u64,
        free_blocks: u64,
        map_bytes: u64,
        mapped_blocks: u64,
    ) -> SpaceStatus {
        let block = twinpoint_core::units::BLOCK_BYTES as u64;
        SpaceStatus {
            data_bytes: data_blocks * block,
            free_bytes: free_blocks * block,
            map_bytes,
            mapped_blocks,
            bytes_per_mapped_block: (mapped_blocks > 0)
                .then(|| map_bytes as f64 / mapped_blocks as f64),
        }
    }
}

/// One volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u32,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// How many clients have it open.
    pub open: u64,
}

/// How long the phases of a CP take, all counted from its seal.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CpLatencyStatus {
    /// Until the device answered all writes.
    pub written: LatencyStatus,
    /// Until the device's flush was answered.
    pub durable: LatencyStatus,
    /// Until the secondary confirmed.
    pub confirmed: LatencyStatus,
}

/// A latency's distribution, in microseconds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LatencyStatus {
    /// How many were measured.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 90 in 100 are not longer.
    pub p90: u64,
    /// 99 in 100 are not longer.
    pub p99: u64,
    /// 999 in 1000 are not longer.
    pub p999: u64,
    /// The longest.
    pub max: u64,
}

impl LatencyStatus {
    /// From a histogram of nanoseconds. Parts of a microsecond count as a whole one.
    #[must_use]
    pub fn from_nanoseconds(histogram: &Histogram<u64>) -> LatencyStatus {
        let at = |quantile: f64| histogram.value_at_quantile(quantile).div_ceil(1000);
        LatencyStatus {
            count: histogram.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max().div_ceil(1000),
        }
    }
}

/// Bytes moved since the node's start.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TrafficStatus {
    /// Bytes that clients wrote.
    pub client_bytes_written: u64,
    /// Bytes that clients read.
    pub client_bytes_read: u64,
    /// Bytes written to the store.
    pub device_bytes_written: DeviceTraffic,
    /// Bytes sent to the peer.
    pub wire_bytes_sent: WireTraffic,
}

/// Bytes written to the store.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DeviceTraffic {
    /// Volumes' blocks.
    pub data: u64,
    /// Records, map checkpoints and superblocks.
    pub journal_and_map: u64,
}

/// Bytes sent to the peer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct WireTraffic {
    /// Volumes' blocks.
    pub data: u64,
    /// Records: the map's deltas.
    pub delta: u64,
    /// All other messages: write commands with checksums, credit, heartbeats.
    pub messages: u64,
}

#[cfg(test)]
mod tests {
    use super::text::span;
    use super::*;

    fn example() -> NodeStatus {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        (1..=1000).for_each(|value| histogram.record(value * 1000).unwrap());
        NodeStatus {
            schema: STATUS_SCHEMA,
            term: 3,
            store: "00112233445566778899aabbccddeeff".to_owned(),
            root: "ff".repeat(16),
            cp: CpStatus { open: 12, local: 11, secondary_received: 11, secondary: 10 },
            peer: PeerStatus {
                state: "connected".into(),
                transport: Some("tcp".into()),
                address: None,
            },
            space: SpaceStatus::new(1 << 18, 1 << 17, 800, 100),
            volumes: vec![VolumeStatus {
                name: "disk".into(),
                id: 1,
                size_bytes: 1 << 30,
                open: 2,
            }],
            cp_latency_us: CpLatencyStatus {
                written: LatencyStatus::from_nanoseconds(&histogram),
                ..CpLatencyStatus::default()
            },
            ..NodeStatus::default()
        }
    }

    #[test]
    fn json_has_stable_names_and_comes_back() {
        let status = example();
        let text = serde_json::to_string(&status).unwrap();
        assert!(
            text.starts_with(r#"{"schema":1,"role":"primary","term":3,"store":"0011"#),
            "{text}"
        );
        for name in [
            r#""cp":{"open":12,"local":11,"secondary_received":11,"secondary":10}"#,
            r#""lag":{"points":0,"bytes":0,"seconds":0.0}"#,
            r#""peer":{"state":"connected","transport":"tcp","address":null}"#,
            r#""alone_since":null,"base_given_up":false,"branch":null,"holding_writers":false,"failed":false"#,
            r#""map_bytes":800,"mapped_blocks":100,"bytes_per_mapped_block":8.0}"#,
            r#""volumes":[{"name":"disk","id":1,"size_bytes":1073741824,"open":2}]"#,
            r#""cp_latency_us":{"written":{"count":1000,"p50":50"#,
            r#""device_bytes_written":{"data":0,"journal_and_map":0}"#,
            r#""wire_bytes_sent":{"data":0,"delta":0,"messages":0}}"#,
            r#""efficiency":{"copied_bytes":{"client":0,"wire_data":0,"wire_messages":0}"#,
            r#""system_calls":{"ring_enter":0,"yield_core":0,"bell":0,"wire_send":0,"wire_receive":0"#,
            r#""ring":{"operations":0,"completions":0},"device":{"commands":0,"commands_registered":0"#,
            r#""polls":0},"verbs":{"requests":0,"request_calls":0"#,
            r#""threads":{"rounds":0,"rounds_idle":0,"sleeps":0,"lane_wake_ups":0}}"#,
            r#""clients":0,"uptime_seconds":0}"#,
        ] {
            assert!(text.contains(name), "{name} is not in {text}");
        }
        assert_eq!(serde_json::from_str::<NodeStatus>(&text).unwrap(), status);
    }

    #[test]
    fn text_is_short_and_warns() {
        let mut status = example();
        let text = render(&status);
        assert!(text.lines().count() <= 16, "{text}");
        assert!(text.contains("512.0 MiB free of 1.0 GiB") && !text.contains("WARNING"), "{text}");
        status.failed = true;
        status.alone_since = Some(9);
        assert_eq!(render(&status).matches("WARNING").count(), 2);
        assert_eq!((bytes_text(1023), bytes_text(1536)), ("1023 B".into(), "1.5 KiB".into()));
        assert_eq!(bytes_text(u64::MAX), "16.0 EiB");
        assert_eq!((span(59), span(3700)), ("59 s".into(), "1 h 1 min".into()));
    }
}
