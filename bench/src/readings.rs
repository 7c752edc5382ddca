//! Readings that were taken elsewhere: a folder with one folder for each turn of each load, `LOAD.TRANSPORT.TURN`, and in
//! it what `twinpoint status --json` said before and after it on both nodes, and what fio said.
//!
//! Invariants: the files are not believed: what comes out of here was said by the primary and the secondary of one pair,
//! which spoke over the transport that the folder names, and counted on from the first reading to the second.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;
use twinpoint_runtime::status::{NodeStatus, RoleStatus, STATUS_SCHEMA};

use crate::efficiency::Readings;
use crate::failure::Failure;

/// Files of a turn's folder: of the primary and the secondary, before and after, and what fio said.
const STATUS_FILES: [[&str; 2]; 2] = [
    ["primary-before.json", "secondary-before.json"],
    ["primary-after.json", "secondary-after.json"],
];
const ROLES: [RoleStatus; 2] = [RoleStatus::Primary, RoleStatus::Secondary];
const FIO_FILE: &str = "fio.json";

/// By load and transport.
pub type Turns = BTreeMap<(String, String), Vec<Readings>>;

/// Why a file is not the reading that it should be.
#[derive(Clone, PartialEq, Debug)]
pub enum ReadingFault {
    /// Not the JSON that it should be: what the parser says.
    Garbled(String),
    /// Another version of the status.
    Schema(u64),
    /// A node of this other role said it.
    Role(RoleStatus),
    /// It says no store, or another than the primary did before.
    Store,
    /// The pair does not speak over the transport that the folder names.
    Transport(String),
    /// The node was younger than before, or counted less: of another start, or before and after are exchanged.
    Backwards(String),
    /// No client wrote anything since the reading before.
    Nothing,
    /// fio did not say how fast it wrote.
    NoRate,
}

impl fmt::Display for ReadingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadingFault::Garbled(error) => write!(f, "{error}"),
            ReadingFault::Schema(schema) => {
                write!(f, "a status of schema {schema}; this program knows {STATUS_SCHEMA}")
            }
            ReadingFault::Role(role) => write!(f, "said by a {}", role.name()),
            ReadingFault::Store => write!(f, "not of the store of {}", STATUS_FILES[0][0]),
            ReadingFault::Transport(name) => write!(f, "the pair does not speak over {name}"),
            ReadingFault::Backwards(name) => write!(
                f,
                "{name} is less than before: the node was started again, or before and after are exchanged"
            ),
            ReadingFault::Nothing => write!(f, "nothing was written since {}", STATUS_FILES[0][0]),
            ReadingFault::NoRate => write!(f, "no jobs[0].write.iops above 0"),
        }
    }
}

/// All turns in a folder.
///
/// # Errors
/// [`Failure::Usage`] if it has none; [`Failure::Reading`] for the first file that is not what it should be.
pub fn read_turns(folder: &Path) -> Result<Turns, Failure> {
    let failed = |error| Failure::Usage(format!("--readings {}: {error}", folder.display()));
    let mut turns = Turns::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let words: Vec<&str> = name.split('.').collect();
        let &[load, transport, _turn] = words.as_slice() else { continue };
        if path.is_dir() {
            let key = (load.to_owned(), transport.to_owned());
            let turn = read_turn(&path, transport)?;
            turns.entry(key).or_default().push(turn);
        }
    }
    if turns.is_empty() {
        let folder = folder.display();
        let text = format!("--readings {folder}: no folder LOAD.TRANSPORT.TURN of readings in it");
        return Err(Failure::Usage(text));
    }
    Ok(turns)
}

fn read_turn(folder: &Path, transport: &str) -> Result<Readings, Failure> {
    let wrong = |name: &str, fault| Failure::Reading(folder.join(name), fault);
    let read = |name: &str| -> Result<Value, Failure> {
        let path = folder.join(name);
        let text = std::fs::read_to_string(&path).map_err(|error| Failure::File(path, error))?;
        serde_json::from_str(&text)
            .map_err(|error| wrong(name, ReadingFault::Garbled(error.to_string())))
    };
    let status = |name: &str| read_status(read(name)?).map_err(|fault| wrong(name, fault));
    let [before, after] = STATUS_FILES;
    let before = [status(before[0])?, status(before[1])?];
    let after = [status(after[0])?, status(after[1])?];
    check(&before, &after, transport)
        .map_err(|(moment, node, fault)| wrong(STATUS_FILES[moment][node], fault))?;
    let fio = read(FIO_FILE)?;
    let iops = fio["jobs"][0]["write"]["iops"].as_f64().filter(|iops| *iops > 0.0);
    let iops = iops.ok_or_else(|| wrong(FIO_FILE, ReadingFault::NoRate))?;
    Ok(Readings { before, after, iops })
}

fn read_status(value: Value) -> Result<NodeStatus, ReadingFault> {
    let schema = value["schema"].as_u64();
    if let Some(schema) = schema.filter(|schema| *schema != u64::from(STATUS_SCHEMA)) {
        return Err(ReadingFault::Schema(schema));
    }
    serde_json::from_value(value).map_err(|error| ReadingFault::Garbled(error.to_string()))
}

/// Whether both moments are of one pair, in their order. A fault comes with its moment and node.
fn check(
    before: &[NodeStatus; 2],
    after: &[NodeStatus; 2],
    transport: &str,
) -> Result<(), (usize, usize, ReadingFault)> {
    let store = &before[0].store;
    for (moment, statuses) in [before, after].into_iter().enumerate() {
        for (node, status) in statuses.iter().enumerate() {
            if status.role != ROLES[node] {
                return Err((moment, node, ReadingFault::Role(status.role)));
            }
            if status.store != *store || store.is_empty() {
                return Err((moment, node, ReadingFault::Store));
            }
        }
        if statuses[0].peer.transport.as_deref() != Some(transport) {
            return Err((moment, 0, ReadingFault::Transport(transport.to_owned())));
        }
    }
    for node in [0, 1] {
        if let Some(name) = shrunk(&before[node], &after[node]) {
            return Err((1, node, ReadingFault::Backwards(name)));
        }
    }
    let written = |status: &NodeStatus| status.traffic.client_bytes_written;
    if written(&after[0]) == written(&before[0]) {
        return Err((1, 0, ReadingFault::Nothing));
    }
    Ok(())
}

/// The first count that only grows in the life of a node, and is smaller in the later status.
fn shrunk(before: &NodeStatus, after: &NodeStatus) -> Option<String> {
    let counts = |status: &NodeStatus| {
        serde_json::json!({
            "uptime_seconds": status.uptime_seconds,
            "cp": { "local": status.cp.local },
            "traffic": status.traffic,
            "efficiency": status.efficiency,
        })
    };
    shrunk_in("", &counts(before), &counts(after))
}

fn shrunk_in(name: &str, before: &Value, after: &Value) -> Option<String> {
    if let Value::Object(fields) = before {
        let inner = |field: &String| {
            if name.is_empty() { field.clone() } else { format!("{name}.{field}") }
        };
        return fields
            .iter()
            .find_map(|(field, before)| shrunk_in(&inner(field), before, &after[field.as_str()]));
    }
    let is_less = after.as_u64() < before.as_u64();
    is_less.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sound reading of a pair.
    fn pair() -> [[NodeStatus; 2]; 2] {
        let mut before = NodeStatus { schema: STATUS_SCHEMA, ..NodeStatus::default() };
        before.store = "5".repeat(32);
        before.peer.transport = Some("tcp".to_owned());
        before.uptime_seconds = 5;
        before.traffic.client_bytes_written = 4096;
        before.efficiency.system_calls.wire_send = 7;
        let mut after = before.clone();
        after.traffic.client_bytes_written = 8192;
        after.efficiency.system_calls.wire_send = 9;
        let secondary =
            |status: &NodeStatus| NodeStatus { role: RoleStatus::Secondary, ..status.clone() };
        [[before.clone(), secondary(&before)], [after.clone(), secondary(&after)]]
    }

    #[test]
    fn what_is_not_of_one_pair_in_its_order_is_refused() {
        let fault = |change: &dyn Fn(&mut [[NodeStatus; 2]; 2])| {
            let mut pair = pair();
            change(&mut pair);
            check(&pair[0], &pair[1], "tcp").err()
        };
        assert_eq!(fault(&|_| {}), None);
        let backwards = |name: &str| ReadingFault::Backwards(name.to_owned());
        let less = "efficiency.system_calls.wire_send";
        assert_eq!(fault(&|pair| pair.swap(0, 1)), Some((1, 0, backwards(less))));
        let swap_one = |pair: &mut [[NodeStatus; 2]; 2]| {
            let [before, after] = pair;
            std::mem::swap(&mut before[1], &mut after[1]);
        };
        assert_eq!(fault(&swap_one), Some((1, 1, backwards(less))));
        let start_again = |pair: &mut [[NodeStatus; 2]; 2]| pair[1][1].uptime_seconds = 4;
        assert_eq!(fault(&start_again), Some((1, 1, backwards("uptime_seconds"))));
        let roles = |pair: &mut [[NodeStatus; 2]; 2]| pair[0].swap(0, 1);
        assert_eq!(fault(&roles), Some((0, 0, ReadingFault::Role(RoleStatus::Secondary))));
        let twice = |pair: &mut [[NodeStatus; 2]; 2]| pair[1][1] = pair[1][0].clone();
        assert_eq!(fault(&twice), Some((1, 1, ReadingFault::Role(RoleStatus::Primary))));
        let other = |pair: &mut [[NodeStatus; 2]; 2]| pair[1][0].store = "6".repeat(32);
        assert_eq!(fault(&other), Some((1, 0, ReadingFault::Store)));
        let none = |pair: &mut [[NodeStatus; 2]; 2]| {
            pair.iter_mut().flatten().for_each(|status| status.store.clear());
        };
        assert_eq!(fault(&none), Some((0, 0, ReadingFault::Store)));
        let wire = |pair: &mut [[NodeStatus; 2]; 2]| pair[0][0].peer.transport = None;
        assert_eq!(fault(&wire), Some((0, 0, ReadingFault::Transport("tcp".to_owned()))));
        let idle = |pair: &mut [[NodeStatus; 2]; 2]| pair[1] = pair[0].clone();
        assert_eq!(fault(&idle), Some((1, 0, ReadingFault::Nothing)));
    }

    #[test]
    fn a_status_of_another_schema_is_refused() {
        let fault = |text: &str| read_status(serde_json::from_str(text).unwrap()).unwrap_err();
        assert_eq!(fault(r#"{"schema": 2}"#), ReadingFault::Schema(2));
        assert!(matches!(fault("{}"), ReadingFault::Garbled(_)));
        assert!(matches!(fault("[]"), ReadingFault::Garbled(_)));
    }
}
