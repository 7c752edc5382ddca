//! One line of raw.csv: a case in one round, as numbers with names, and the median of several.

use hdrhistogram::Histogram;
use twinpoint_runtime::status::NodeStatus;

use crate::load::Figures;
use crate::usage::{TICKS_PER_SECOND, Usage};

/// The columns, each with its unit, in the order of [`Measurement::values`].
pub const COLUMNS: [&str; 23] = [
    "seconds",
    "writes",
    "iops",
    "mib_per_s",
    "write_us_p50",
    "write_us_p90",
    "write_us_p99",
    "write_us_p999",
    "write_us_max",
    "flushes",
    "flush_us_p50",
    "flush_us_p90",
    "flush_us_p99",
    "flush_us_p999",
    "flush_us_max",
    "server_cpu_us_per_op",
    "client_cpu_us_per_op",
    "switches_per_op",
    "device_bytes_per_byte",
    "device_metadata_bytes_per_byte",
    "wire_bytes_per_byte",
    "wire_metadata_bytes_per_byte",
    "other_cores_busy",
];

/// See the module. An operation is a write or a flush.
#[derive(Clone, PartialEq, Debug)]
pub struct Measurement {
    pub values: [f64; COLUMNS.len()],
}

/// What was read at both ends of the measured time.
#[derive(Clone, Copy, Default)]
pub struct Reading {
    pub servers: Usage,
    pub client: Usage,
    pub machine_ticks: u64,
}

impl Measurement {
    /// From what the load saw, what was read at both ends, and the primary's counters before and after the whole load.
    pub fn new(
        figures: &Figures,
        readings: [Reading; 2],
        statuses: [&NodeStatus; 2],
    ) -> Measurement {
        let [before, after] = readings;
        let seconds = figures.seconds;
        let flushes = figures.flush_ns.len();
        let operations = (figures.writes + flushes).max(1) as f64;
        let servers = after.servers.since(before.servers);
        let client = after.client.since(before.client);
        let busy_ticks = after.machine_ticks.saturating_sub(before.machine_ticks) as f64;
        let own_s = (servers.cpu_ns + client.cpu_ns) as f64 / 1e9;
        let per_byte = |count: fn(&NodeStatus) -> u64| {
            let written = |status: &NodeStatus| status.traffic.client_bytes_written;
            let bytes = count(statuses[1]).saturating_sub(count(statuses[0]));
            let written = written(statuses[1]).saturating_sub(written(statuses[0]));
            bytes as f64 / written.max(1) as f64
        };
        let device_data = per_byte(|status| status.traffic.device_bytes_written.data);
        let device_metadata =
            per_byte(|status| status.traffic.device_bytes_written.journal_and_map);
        let wire_data = per_byte(|status| status.traffic.wire_bytes_sent.data);
        let wire_metadata = per_byte(|status| {
            status.traffic.wire_bytes_sent.delta + status.traffic.wire_bytes_sent.messages
        });
        let [w50, w90, w99, w999, wmax] = percentiles_us(&figures.write_ns);
        let [f50, f90, f99, f999, fmax] = percentiles_us(&figures.flush_ns);
        Measurement {
            values: [
                seconds,
                figures.writes as f64,
                figures.writes as f64 / seconds,
                figures.bytes as f64 / seconds / f64::from(1 << 20),
                w50,
                w90,
                w99,
                w999,
                wmax,
                flushes as f64,
                f50,
                f90,
                f99,
                f999,
                fmax,
                servers.cpu_ns as f64 / 1e3 / operations,
                client.cpu_ns as f64 / 1e3 / operations,
                (servers.switches + client.switches) as f64 / operations,
                device_data + device_metadata,
                device_metadata,
                wire_data + wire_metadata,
                wire_metadata,
                (busy_ticks / TICKS_PER_SECOND - own_s).max(0.0) / seconds,
            ],
        }
    }

    /// Column by column the median of several.
    ///
    /// # Panics
    /// If there is none.
    pub fn median(all: &[Measurement]) -> Measurement {
        let mut values = [0.0; COLUMNS.len()];
        for (column, value) in values.iter_mut().enumerate() {
            *value = median(all.iter().map(|measurement| measurement.values[column]));
        }
        Measurement { values }
    }

    /// A column by its name.
    ///
    /// # Panics
    /// If there is no such column.
    pub fn get(&self, name: &str) -> f64 {
        let column = COLUMNS.iter().position(|column| *column == name);
        self.values[column.expect("columns are named in this crate")]
    }
}

/// The middle one, or the mean of the middle two.
///
/// # Panics
/// If there is none.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    assert!(!values.is_empty(), "the median of nothing");
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[middle - 1], values[middle])
    } else {
        values[middle]
    }
}

fn percentiles_us(histogram: &Histogram<u64>) -> [f64; 5] {
    let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
    [at(0.5), at(0.9), at(0.99), at(0.999), histogram.max() as f64 / 1e3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_land_in_their_columns() {
        let mut figures = Figures {
            seconds: 2.0,
            writes: 1000,
            bytes: 4096 * 1000,
            write_ns: Histogram::new(3).unwrap(),
            flush_ns: Histogram::new(3).unwrap(),
        };
        figures.write_ns.record_n(10_000, 1000).unwrap();
        figures.flush_ns.record_n(50_000, 1000).unwrap();
        let mut after = Reading::default();
        after.servers.cpu_ns = 20_000_000;
        let mut end = NodeStatus::default();
        end.traffic.client_bytes_written = 1000;
        end.traffic.device_bytes_written.data = 1000;
        end.traffic.device_bytes_written.journal_and_map = 500;
        let statuses = [&NodeStatus::default(), &end];
        let one = Measurement::new(&figures, [Reading::default(), after], statuses);
        assert_eq!((one.get("iops"), one.get("flushes")), (500.0, 1000.0));
        assert_eq!((one.get("server_cpu_us_per_op"), one.get("wire_bytes_per_byte")), (10.0, 0.0));
        assert_eq!(one.get("device_bytes_per_byte"), 1.5);
        assert!((one.get("write_us_p50") - 10.0).abs() < 0.1);
        assert!((one.get("flush_us_max") - 50.0).abs() < 0.1);
        let mut two = one.clone();
        two.values[2] = 700.0;
        assert_eq!(Measurement::median(&[one.clone(), two, one]).get("iops"), 500.0);
        assert_eq!(median([4.0, 1.0].into_iter()), 2.5);
    }
}
