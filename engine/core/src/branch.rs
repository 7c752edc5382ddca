//! A branch: CPs of an older term that this store alone has (R8).
//!
//! ```text
//!   common CP --- t1 --- tip       the branch, here
//!            \--- t2 --- ...       what the primary of the newer term has
//! ```
//!
//! Found out when an old primary returns and hears of a newer term; written in the superblock under a name, and kept
//! until an operator drops it by that name. Invariants: the tip is after the common CP; as long as the branch is
//! there, its store follows nobody and every block of the tip stays as it is.

use std::fmt;

use crate::units::{CpNumber, Root, Term};

/// CPs of an older term that this store alone has. Its `Display` form, `t<term>-cp<tip>`, is its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Branch {
    /// The term in which they were made.
    pub term: Term,
    /// The last CP that the newer primary has too.
    pub common: CpNumber,
    /// The last CP of the branch.
    pub tip: CpNumber,
    /// The store's root at the tip.
    pub root: Root,
}

impl Branch {
    /// Whether an operator means this one.
    #[must_use]
    pub fn is_named(&self, name: &str) -> bool {
        self.to_string() == name
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}-cp{}", self.term.0, self.tip.0)
    }
}
