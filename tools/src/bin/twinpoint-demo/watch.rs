//! Watch: asks both nodes again and again how they are, while the load runs.
//!
//! Invariant: a root is kept with the CP that its node had then committed, so that roots of the same CP can be compared
//! although the nodes are never asked at the same instant.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use twinpoint_runtime::control::ControlClient;
use twinpoint_runtime::status::NodeStatus;

use crate::node::status;
use crate::trouble::{Difference, Trouble};

/// Between two questions to a node.
const PAUSE: Duration = Duration::from_millis(2);

/// Watches one node until it is gone or the watch is ended.
pub struct Watch {
    is_ended: Arc<AtomicBool>,
    watcher: Option<JoinHandle<Sightings>>,
}

/// What was seen of a node.
#[derive(Default)]
pub struct Sightings {
    /// Its roots by CP.
    pub roots: HashMap<u64, String>,
    /// The last answer.
    pub last: Option<NodeStatus>,
}

/// A CP at which both nodes were seen.
#[derive(Debug, PartialEq, Eq)]
pub struct CommonPoint {
    /// Its number.
    pub cp: u64,
    /// The root of both.
    pub root: String,
    /// At how many CPs both were seen.
    pub compared: usize,
}

impl Watch {
    /// Begins to watch the node with this control socket.
    pub fn begin(control: &Path) -> Watch {
        let is_ended = Arc::new(AtomicBool::new(false));
        let (end, control) = (Arc::clone(&is_ended), PathBuf::from(control));
        let watcher = thread::spawn(move || {
            let mut sightings = Sightings::default();
            let Ok(mut client) = ControlClient::connect(&control) else { return sightings };
            while !end.load(Ordering::Relaxed) {
                let Ok(seen) = status(&mut client) else { break };
                sightings.roots.insert(seen.cp.local, seen.root.clone());
                sightings.last = Some(seen);
                thread::sleep(PAUSE);
            }
            sightings
        });
        Watch { is_ended, watcher: Some(watcher) }
    }

    /// Ends the watch.
    pub fn end(mut self) -> Sightings {
        self.is_ended.store(true, Ordering::Relaxed);
        let watcher = self.watcher.take().expect("only the end takes it");
        watcher.join().expect("the watcher does not panic")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_ended.store(true, Ordering::Relaxed);
    }
}

/// Compares the roots at all CPs at which both nodes were seen. Returns the newest of them.
///
/// # Errors
/// If two roots differ, or there is nothing to compare.
pub fn compare(one: &Sightings, other: &Sightings) -> Result<CommonPoint, Trouble> {
    let mut common: Vec<_> =
        one.roots.keys().filter(|cp| other.roots.contains_key(*cp)).copied().collect();
    common.sort_unstable();
    if let Some(cp) = common.iter().find(|cp| one.roots[*cp] != other.roots[*cp]) {
        return Err(Trouble::Differs(Difference::Root(*cp)));
    }
    let newest = common.last().ok_or(Trouble::Differs(Difference::NoCommonPoint))?;
    Ok(CommonPoint { cp: *newest, root: one.roots[newest].clone(), compared: common.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sightings(roots: &[(u64, &str)]) -> Sightings {
        let roots = roots.iter().map(|(cp, root)| (*cp, (*root).to_owned())).collect();
        Sightings { roots, last: None }
    }

    #[test]
    fn roots_are_compared_at_common_points() {
        let primary = sightings(&[(1, "a"), (2, "b"), (4, "d")]);
        let secondary = sightings(&[(1, "a"), (2, "b"), (3, "c")]);
        let found = compare(&primary, &secondary).unwrap();
        assert_eq!(found, CommonPoint { cp: 2, root: "b".to_owned(), compared: 2 });
        let other = compare(&primary, &sightings(&[(2, "x")]));
        assert!(matches!(other, Err(Trouble::Differs(Difference::Root(2)))));
        let nothing = compare(&primary, &sightings(&[(9, "a")]));
        assert!(matches!(nothing, Err(Trouble::Differs(Difference::NoCommonPoint))));
    }
}
