//! What is measured: the matrix of cases, in the order in which they run.

use std::fmt;

use twinpoint_core::coordinator::Replication;

/// How the load reaches the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frontend {
    /// A local client: a thread of the node's process, no socket.
    Engine,
    /// NBD over a unix socket, the node in a process of its own.
    Nbd,
}

/// How many stores, and when a flush is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pairing {
    /// One store.
    Single,
    /// Two; a flush waits for both.
    Sync,
    /// Two; a flush waits for the first.
    Async,
}

impl Pairing {
    /// The primary's mode.
    pub fn replication(self) -> Replication {
        if self == Pairing::Async { Replication::Async } else { Replication::Sync }
    }
}

/// What is written where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// 4 KiB, anywhere in the volume.
    Random4,
    /// 64 KiB, one after the other.
    Sequential64,
    /// 128 KiB, one after the other.
    Sequential128,
    /// 1 MiB, one after the other.
    Sequential1024,
}

impl Pattern {
    /// Bytes of one write.
    pub fn write_bytes(self) -> usize {
        match self {
            Pattern::Random4 => 4 << 10,
            Pattern::Sequential64 => 64 << 10,
            Pattern::Sequential128 => 128 << 10,
            Pattern::Sequential1024 => 1 << 20,
        }
    }
}

/// Frontend and stores: what is set up once for several loads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setup {
    pub frontend: Frontend,
    pub pairing: Pairing,
}

/// One load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Load {
    pub pattern: Pattern,
    /// Commands under way.
    pub depth: usize,
    /// A flush after so many writes; 0 for none.
    pub flush_every: u64,
}

/// One line of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Case {
    pub setup: Setup,
    pub load: Load,
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frontend = match self.frontend {
            Frontend::Engine => "engine",
            Frontend::Nbd => "nbd",
        };
        let pairing = match self.pairing {
            Pairing::Single => "single",
            Pairing::Sync => "sync",
            Pairing::Async => "async",
        };
        write!(f, "{frontend}-{pairing}")
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = match self.pattern {
            Pattern::Random4 => "rand4k",
            Pattern::Sequential64 => "seq64k",
            Pattern::Sequential128 => "seq128k",
            Pattern::Sequential1024 => "seq1m",
        };
        write!(f, "{pattern}-q{}-f{}", self.depth, self.flush_every)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.setup, self.load)
    }
}

/// All set-ups.
pub fn setups() -> Vec<Setup> {
    let frontends = [Frontend::Engine, Frontend::Nbd];
    let pairings = [Pairing::Single, Pairing::Sync, Pairing::Async];
    let pair = |frontend| pairings.map(|pairing| Setup { frontend, pairing });
    frontends.into_iter().flat_map(pair).collect()
}

/// All loads. A flush after each write is measured at depth 1 only, where it means something.
pub fn loads() -> Vec<Load> {
    let mut loads = Vec::new();
    for pattern in [Pattern::Random4, Pattern::Sequential128] {
        for depth in [1, 16, 64] {
            let flushes = [0, 1, 64, 1024].into_iter().filter(|every| *every != 1 || depth == 1);
            loads.extend(flushes.map(|flush_every| Load { pattern, depth, flush_every }));
        }
    }
    loads
}

/// The cases of a set-up whose name has every one of the words, which are divided by spaces.
pub fn cases(setup: Setup, words: &str) -> Vec<Case> {
    let cases = loads().into_iter().map(|load| Case { setup, load });
    cases.filter(|case| has_words(&case.to_string(), words)).collect()
}

/// Whether a name, whose words are divided by dashes, has every one of the words, which are divided by spaces.
pub fn has_words(name: &str, words: &str) -> bool {
    let name = format!("-{name}-");
    words.split_whitespace().all(|word| name.contains(&format!("-{word}-")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let all: Vec<String> = setups()
            .into_iter()
            .flat_map(|setup| cases(setup, ""))
            .map(|case| case.to_string())
            .collect();
        assert_eq!(all.len(), 120);
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
        let chosen: Vec<String> = setups()
            .into_iter()
            .flat_map(|setup| cases(setup, "nbd-sync rand4k q1 f1"))
            .map(|case| case.to_string())
            .collect();
        assert_eq!(chosen, ["nbd-sync-rand4k-q1-f1"]);
        assert!(has_words("rand4k-q64", "q64") && has_words("rand4k-q64-f1024", "rand4k-q64"));
        assert!(!has_words("seq64k-q16", "q64") && !has_words("seq64k-q16", "q1"));
    }
}
