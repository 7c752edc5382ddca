//! Stores: both of them at the end, as `twinpoint verify` finds them: the first one as the kill left it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::narrator::Narrator;
use crate::process::Process;
use crate::trouble::{Difference, Trouble};

/// How long the system may take to give up the files of a process that ended.
const LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// Exit code of `twinpoint` for a store in use.
const REFUSED: i32 = 6;

/// What was found.
pub struct Stores {
    /// The first store: its newest CP and the root there.
    pub first: (u64, String),
    /// The second store.
    pub second: (u64, String),
    /// How many blocks are equal on both; none if the kill left the stores at different CPs.
    pub equal_blocks: Option<u64>,
}

impl Stores {
    /// Checks every block of both stores, and compares them.
    ///
    /// # Errors
    /// If a store is damaged, or the two differ at the same CP.
    pub fn verify(
        twinpoint: &Path,
        buffered: bool,
        narrator: &Narrator,
    ) -> Result<Stores, Trouble> {
        let began = Instant::now();
        loop {
            let mut command = Command::new(twinpoint);
            command.args(["verify", "--json", "first.store", "second.store"]);
            command.args(buffered.then_some("--buffered"));
            let progress = || Some("still checking".to_owned());
            match Process::start("verify", &mut command)?.finish(narrator, progress) {
                Ok(said) => return Stores::parse(&said),
                Err(Trouble::Failed { code: Some(REFUSED), .. }) if began.elapsed() < LIMIT => {
                    narrator.pause(PAUSE)?;
                }
                Err(trouble) => return Stores::at_different_points(trouble),
            }
        }
    }

    /// A pair cannot be compared if one store is ahead and has let go of the other's last CP. That is no failure if both
    /// are whole.
    fn at_different_points(trouble: Trouble) -> Result<Stores, Trouble> {
        match Stores::parse(&crate::process::read("verify", "out")) {
            Ok(stores) if stores.first.0 != stores.second.0 => {
                Ok(Stores { equal_blocks: None, ..stores })
            }
            _ => Err(trouble),
        }
    }

    fn parse(said: &str) -> Result<Stores, Trouble> {
        let report: Value = serde_json::from_str(said).unwrap_or_default();
        let point = |index: usize| {
            let store = &report["stores"][index];
            let is_whole = store["state"] == "whole";
            Some((store["cp"].as_u64()?, store["root"].as_str()?.to_owned())).filter(|_| is_whole)
        };
        let (Some(first), Some(second)) = (point(0), point(1)) else {
            let said = said.chars().take(300).collect();
            return Err(Trouble::Garbled { program: "twinpoint verify".to_owned(), said });
        };
        if first.0 == second.0 && first.1 != second.1 {
            return Err(Trouble::Differs(Difference::Root(first.0)));
        }
        let equal_blocks = report["comparison"]["compared_blocks"].as_u64();
        Ok(Stores { first, second, equal_blocks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(second_cp: u64, second_root: &str) -> String {
        format!(
            r#"{{"ok":true,"stores":[{{"state":"whole","cp":7,"root":"aa"}},
               {{"state":"whole","cp":{second_cp},"root":"{second_root}"}}],"comparison":{{"compared_blocks":5}}}}"#
        )
    }

    #[test]
    fn reports_are_judged() {
        let stores = Stores::parse(&report(7, "aa")).unwrap();
        assert_eq!((stores.first, stores.equal_blocks), ((7, "aa".to_owned()), Some(5)));
        assert!(Stores::parse(&report(8, "bb")).is_ok());
        let differs = Stores::parse(&report(7, "bb"));
        assert!(matches!(differs, Err(Trouble::Differs(Difference::Root(7)))));
        for said in ["", "{}", &report(7, "aa").replace("whole", "damaged")] {
            assert!(matches!(Stores::parse(said), Err(Trouble::Garbled { .. })), "{said}");
        }
    }
}
