//! Trouble: why the demo did not come to its end. Invariant: its text is one line, and names what to look at.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use twinpoint_runtime::control::ControlError;

/// Why the demo ended early.
#[derive(Debug)]
pub enum Trouble {
    /// A file, a folder or a socket.
    System {
        /// What it was wanted for.
        deed: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program could not be started.
    Start {
        /// Its name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program ended with a failure.
    Failed {
        /// Its name.
        program: String,
        /// Its exit code; none if a signal ended it.
        code: Option<i32>,
        /// The end of what it said.
        said: String,
    },
    /// A program, or something that was waited for, took too long.
    Late {
        /// What.
        what: String,
        /// How long it was given.
        limit: Duration,
    },
    /// A program said something that cannot be understood.
    Garbled {
        /// Its name.
        program: String,
        /// The beginning of what it said.
        said: String,
    },
    /// A node did not answer, or refused.
    Node(ControlError),
    /// An NBD server broke the protocol, or answered a request with this error number.
    Nbd(u32),
    /// There is not enough space for the demo's files.
    Space {
        /// Where.
        path: PathBuf,
        /// Bytes wanted.
        wanted_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// What came back is not what was written.
    Differs(Difference),
    /// Somebody pressed Ctrl-C.
    Interrupted,
}

/// What the demo exists to disprove.
#[derive(Debug)]
pub enum Difference {
    /// A file, a link or a folder of the tree.
    File(PathBuf),
    /// Something in the image that is not in the tree.
    Extra(PathBuf),
    /// A page of the ledger: what a flush promised, and what is there.
    Ledger {
        /// Which page.
        page: u64,
        /// The entry that was flushed.
        flushed: u64,
        /// The entry that is there.
        found: u64,
    },
    /// The two nodes' roots of one consistency point.
    Root(u64),
    /// The nodes were never seen at the same consistency point.
    NoCommonPoint,
}

impl Trouble {
    /// Names a path's trouble; made for `map_err`.
    pub fn system(
        deed: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Trouble {
        let path = path.into();
        move |source| Trouble::System { deed, path, source }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::System { deed, path, source } => {
                write!(f, "cannot {deed} {}: {source}", path.display())
            }
            Trouble::Start { program, source } => {
                write!(f, "cannot start {program}: {source}; `make demo` installs what is missing")
            }
            Trouble::Failed { program, code: Some(code), said } => {
                write!(f, "{program} ended with exit code {code}: {said}")
            }
            Trouble::Failed { program, code: None, said } => {
                write!(f, "{program} was killed: {said}")
            }
            Trouble::Late { what, limit } => {
                write!(f, "{what}: not done within {} s", limit.as_secs())
            }
            Trouble::Garbled { program, said } => {
                write!(f, "{program} said something unexpected: {said}")
            }
            Trouble::Node(error) => error.fmt(f),
            Trouble::Nbd(0) => f.write_str("the NBD server broke the protocol"),
            Trouble::Nbd(error) => write!(f, "the NBD server answered with error {error}"),
            Trouble::Space { path, wanted_bytes, free_bytes } => write!(
                f,
                "{} has {} MiB free and the demo needs {}: choose another place with --dir",
                path.display(),
                free_bytes >> 20,
                wanted_bytes >> 20
            ),
            Trouble::Differs(difference) => difference.fmt(f),
            Trouble::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::File(path) => {
                write!(f, "{} came back different, or not at all", path.display())
            }
            Difference::Extra(path) => {
                write!(f, "{} came back and was never there", path.display())
            }
            Difference::Ledger { page, flushed, found } => {
                write!(
                    f,
                    "page {page} of the ledger: entry {flushed} was flushed, entry {found} is there"
                )
            }
            Difference::Root(cp) => write!(f, "the two nodes have different roots at CP {cp}"),
            Difference::NoCommonPoint => {
                f.write_str("the two nodes were never seen at the same CP")
            }
        }
    }
}

impl std::error::Error for Trouble {}

impl From<ControlError> for Trouble {
    fn from(error: ControlError) -> Trouble {
        Trouble::Node(error)
    }
}
