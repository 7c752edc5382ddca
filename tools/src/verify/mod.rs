//! `twinpoint verify`: checks a stopped store from the superblock down to the last data block; with a second store,
//! compares the two block for block.
//!
//! Invariant: changes nothing; what recovery would repair is told and no damage.

mod blocks;
mod check;
mod compare;

use std::path::{Path, PathBuf};

use clap::Args;
use twinpoint_runtime::store::recover_read_only;

use crate::failure::{Exit, Failure};
use crate::outline::Outline;
use crate::output::{print, print_json};
use crate::store_path::{is_same, open_stopped};
use check::Check;

/// Most blocks named one by one in a report.
const NAMED_MAX: usize = 16;

/// See the module.
#[derive(Args)]
pub struct Verify {
    /// The store: a file or a block device that no node serves.
    store: PathBuf,
    /// The other store of the pair: compared with the first by physical address, at the newest consistency point that
    /// both hold.
    other: Option<PathBuf>,
    /// The other store, as a flag. Default: the one store is checked by itself.
    #[arg(long = "store", value_name = "STORE", conflicts_with = "other")]
    second: Option<PathBuf>,
    /// Accept a file system that knows no direct access: read through the page cache there. Of no effect elsewhere.
    #[arg(long)]
    buffered: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Verify {
    /// Checks, and compares.
    ///
    /// # Errors
    /// If a store is damaged or in use, or the two differ.
    pub fn run(self) -> Result<(), Failure> {
        let mut reports = Vec::new();
        let result = self.check(&mut reports);
        if self.json {
            let fields = vec![
                ("ok", Outline::Flag(result.is_ok())),
                ("stores", Outline::List(reports.iter().map(|report| report.1.clone()).collect())),
            ];
            let (fields, result) = with_comparison(fields, result);
            print_json(&Outline::Fields(fields));
            return result;
        }
        reports.iter().for_each(|(name, report)| print(&report.render(name)));
        if let Ok(Some(comparison)) = &result {
            print(&comparison.outline.render("comparison"));
        }
        result.and_then(verdict)
    }

    /// Gives what the comparison found, if there is one.
    fn check(&self, reports: &mut Vec<(String, Outline)>) -> Result<Option<Comparison>, Failure> {
        let paths: Vec<&Path> = [Some(&self.store), self.other.as_ref(), self.second.as_ref()]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
            .collect();
        if let [first, second] = paths[..]
            && is_same(first, second)
        {
            let text = format!(
                "{} and {} are one store: give the other store of the pair",
                first.display(),
                second.display()
            );
            return Err(Failure::usage(text));
        }
        let mut checked = Vec::new();
        let mut damage = None;
        for path in paths {
            let store = open_stopped(path, self.buffered)?;
            let recovered = recover_read_only(&store, None)?;
            let check = Check::run(&store, &recovered);
            reports.push((path.display().to_string(), check.outline(path, &recovered)));
            damage = damage.or(check.damage(path));
            checked.push((store, recovered));
        }
        let Ok([first, second]) = <[_; 2]>::try_from(checked) else {
            return damage.map_or(Ok(None), Err);
        };
        let comparison = compare::compare(first, second);
        match (damage, comparison) {
            (Some(damage), Ok(comparison)) => {
                Ok(Some(Comparison { failure: Some(damage), ..comparison }))
            }
            (Some(damage), Err(_)) => Err(damage),
            (None, comparison) => comparison.map(Some),
        }
    }
}

/// What a comparison of two stores found.
struct Comparison {
    outline: Outline,
    failure: Option<Failure>,
}

fn with_comparison(
    mut fields: Vec<(&'static str, Outline)>,
    result: Result<Option<Comparison>, Failure>,
) -> (Vec<(&'static str, Outline)>, Result<(), Failure>) {
    match result {
        Ok(comparison) => {
            let ok = comparison.as_ref().is_none_or(|comparison| comparison.failure.is_none());
            fields[0].1 = Outline::Flag(ok);
            if let Some(comparison) = &comparison {
                fields.push(("comparison", comparison.outline.clone()));
            }
            (fields, verdict(comparison))
        }
        Err(failure) => (fields, Err(failure)),
    }
}

fn verdict(comparison: Option<Comparison>) -> Result<(), Failure> {
    comparison.and_then(|comparison| comparison.failure).map_or(Ok(()), Err)
}

fn differ(kind: &str, text: String) -> Failure {
    Failure::new(Exit::Differ, kind, text)
}
