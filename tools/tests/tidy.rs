//! Tidy: the rules of this repository that a program can check. Beside the flow.
//!
//! A ratchet is a list of what was there when its rule began, each with its size: it may shrink and never grow. What a
//! test of this file says names the file and the line, and what to do.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Longest function, in lines.
const FUNCTION_LINES_MAX: usize = 70;
/// Longest file, in lines without its tests.
const FILE_LINES_MAX: usize = 450;
/// Longest file of tests alone.
const TEST_FILE_LINES_MAX: usize = 700;
/// How far below its limit a file of a ratchet has to come to be taken off; a function, by a quarter of it.
const SLACK_LINES: usize = 40;
/// Longest line of a comment or a text; code is what rustfmt makes it.
const LINE_CHARACTERS_MAX: usize = 130;

/// Files that may hold `unsafe`: mapped memory, the ring between threads, and calls into the kernel.
const UNSAFE_FILES: &[&str] = &[
    "engine/runtime/src/buffers.rs",
    "engine/runtime/src/clients.rs",
    "engine/runtime/src/device.rs",
    "engine/runtime/src/device/opening.rs",
    "engine/runtime/src/ring.rs",
    "engine/runtime/src/sockets.rs",
    "engine/runtime/src/ublk/kernel.rs",
    "engine/runtime/src/uring.rs",
    "engine/runtime/src/uring/ring.rs",
    "engine/runtime/src/uring/sockets.rs",
    "engine/runtime/src/wake.rs",
    "engine/runtime/src/worker.rs",
    "rdma-fallback/src/rdma/library.rs",
    "rdma-fallback/src/rdma/manager.rs",
    "rdma-fallback/src/rdma/verbs.rs",
    "rdma-fallback/src/rdma/watch.rs",
    "rdma-fallback/src/region.rs",
];
/// What the core must not name: it has no clock, threads, network, files, locks, or surroundings.
const CORE_FORBIDDEN: &[&str] = &[
    "std::time",
    "std::thread",
    "std::net",
    "std::fs",
    "std::io",
    "std::env",
    "std::process",
    "std::sync",
    "std::os",
    // Tables with a random order: the same events would not give the same actions.
    "HashMap::new",
    "HashSet::new",
    "RandomState",
    "println!",
    "eprintln!",
    "todo!",
    "dbg!",
];
/// Ratchet: functions that are longer than [`FUNCTION_LINES_MAX`].
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[
    ("engine/runtime/src/link/explain.rs", "explain", 85),
    ("engine/runtime/src/node/handle.rs", "assemble", 85),
    ("engine/runtime/src/node/workers.rs", "run_workers", 110),
];
/// Ratchet: files that are longer than [`FILE_LINES_MAX`].
const LONG_FILES: &[(&str, usize)] = &[
    ("engine/core/src/contract.rs", 572),
    ("engine/core/src/coordinator/mod.rs", 500),
    ("engine/core/src/record.rs", 500),
    ("engine/core/src/recovery.rs", 780),
    ("engine/runtime/src/store.rs", 500),
    ("rdma-fallback/src/rdma/verbs.rs", 770),
];

/// A file of the repository.
struct Source {
    /// From the repository's root.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_markdown(&self) -> bool {
        self.path.ends_with(".md")
    }

    fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs")
    }

    /// The lines before the file's own tests.
    fn code_lines(&self) -> usize {
        let tests = self.text.find("\n#[cfg(test)]\nmod tests {");
        self.text[..tests.unwrap_or(self.text.len())].lines().count()
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

fn root() -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR"));
    tools.parent().expect("the crate is in the repository").to_owned()
}

/// All files of the repository that people write.
fn sources() -> Vec<Source> {
    let root = root();
    let (mut sources, mut waiting) = (Vec::new(), vec![root.clone()]);
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).expect("the repository can be read") {
            let path = entry.expect("the repository can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !matches!(name.as_str(), "target" | ".git" | "results") {
                    waiting.push(path);
                }
            } else if is_written(&name) {
                let text = fs::read_to_string(&path);
                let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let path = path.strip_prefix(&root).expect("the walk stays under the root");
                let path = path.to_string_lossy().into_owned();
                sources.push(Source { path, text });
            }
        }
    }
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    assert!(sources.len() > 50, "the walk misses files");
    sources
}

fn is_written(name: &str) -> bool {
    let endings = [".rs", ".md", ".toml", ".sh", ".txt", ".yml", ".fio"];
    let names = ["Makefile", "run", "LICENSE", "LICENSE-MIT", ".gitignore"];
    endings.iter().any(|ending| name.ends_with(ending)) || names.contains(&name)
}

/// Fails with all complaints at once.
fn report(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn characters_are_plain() {
    let mut complaints = Vec::new();
    // Written in two parts, so that this file does not name them itself.
    let machine_paths = [concat!("/wo", "rk/"), concat!("/tm", "p/"), concat!("/ro", "ot/")];
    for source in sources() {
        let mut complain = |number: usize, what: &str| {
            complaints.push(format!("{}:{number}: {what}", source.path));
        };
        for (number, line) in source.lines() {
            if line.ends_with([' ', '\t', '\r']) {
                complain(number, "white space at the end of the line");
            }
            if line.contains('\t') && source.path != "Makefile" {
                complain(number, "a tab");
            }
            if source.is_rust() && line.chars().any(|c| c.is_control() && c != '\t') {
                complain(number, "a control character");
            }
            for path in machine_paths.iter().filter(|path| line.contains(*path)) {
                complain(
                    number,
                    &format!("{path} is a path of one machine: use one that is true everywhere"),
                );
            }
            let is_table = line.starts_with('|') || line.contains("http");
            if source.is_rust() && line.chars().count() > LINE_CHARACTERS_MAX && !is_table {
                complain(number, "a line too long: break it");
            }
        }
        if !source.text.is_empty() && !source.text.ends_with('\n') {
            complain(source.text.lines().count(), "no newline at the end of the file");
        }
        if source.text.ends_with("\n\n") {
            complain(source.text.lines().count(), "empty lines at the end of the file");
        }
    }
    report(&complaints);
}

#[test]
fn every_file_says_what_it_is() {
    let missing = sources().into_iter().filter(|source| {
        let is_titled = source.text.starts_with("//! ") || source.text.starts_with("# ");
        (source.is_rust() || source.is_markdown()) && !is_titled
    });
    let complaints: Vec<_> = missing
        .map(|source| {
            format!("{}:1: begin with `//! ` or `# `, and say what the file is", source.path)
        })
        .collect();
    report(&complaints);
}

#[test]
fn core_is_pure() {
    let mut complaints = Vec::new();
    let all = sources();
    let root = all.iter().find(|source| source.path == "engine/core/src/lib.rs").unwrap();
    if !root.text.contains("#![forbid(unsafe_code)]") {
        complaints.push(format!("{}: #![forbid(unsafe_code)] is gone", root.path));
    }
    let core = all.iter().filter(|source| source.path.starts_with("engine/core/src/"));
    for source in core {
        let code = source.lines().take(source.code_lines());
        for (number, line) in code.filter(|(_, line)| !is_comment(line)) {
            for word in CORE_FORBIDDEN.iter().filter(|word| line.contains(*word)) {
                complaints.push(format!(
                    "{}:{number}: {word} in the core: that is the shell's",
                    source.path
                ));
            }
        }
    }
    let manifest = all.iter().find(|source| source.path == "engine/core/Cargo.toml").unwrap();
    for name in ["twinpoint-runtime", "rdma-fallback", "libc", "io-uring", "rand"] {
        if manifest.text.contains(name) {
            complaints.push(format!("{}: the core does not depend on {name}", manifest.path));
        }
    }
    report(&complaints);
}

#[test]
fn unsafe_stays_where_it_is() {
    let mut complaints = Vec::new();
    let mut seen = BTreeSet::new();
    for source in sources().iter().filter(|source| source.is_rust()) {
        for (number, _) in source.lines().filter(|(_, line)| is_unsafe(line)) {
            if UNSAFE_FILES.contains(&source.path.as_str()) {
                seen.insert(source.path.clone());
            } else {
                complaints.push(format!("{}:{number}: not a file of UNSAFE_FILES", source.path));
            }
        }
    }
    let idle = UNSAFE_FILES.iter().filter(|path| !seen.contains(**path));
    complaints.extend(idle.map(|path| format!("{path}: take it off UNSAFE_FILES")));
    report(&complaints);
}

#[test]
fn functions_fit_on_a_screen() {
    let mut complaints = Vec::new();
    let mut seen: BTreeSet<&(&str, &str, usize)> = BTreeSet::new();
    for source in sources().iter().filter(|source| source.is_rust()) {
        for Function { name, first, lines } in functions(&source.text) {
            let entry = LONG_FUNCTIONS.iter().find(|long| (long.0, long.1) == (&source.path, name));
            seen.extend(entry.filter(|_| lines + SLACK_LINES / 4 > FUNCTION_LINES_MAX));
            if lines > entry.map_or(FUNCTION_LINES_MAX, |(_, _, max)| *max) {
                complaints.push(format!(
                    "{}:{first}: {name} has {lines} lines, more than {FUNCTION_LINES_MAX}: divide it",
                    source.path
                ));
            }
        }
    }
    let gone = LONG_FUNCTIONS.iter().filter(|long| !seen.contains(*long));
    complaints
        .extend(gone.map(|(path, name, _)| format!("{path}: take {name} off LONG_FUNCTIONS")));
    report(&complaints);
}

#[test]
fn files_hold_one_noun() {
    let mut complaints = Vec::new();
    for source in sources().iter().filter(|source| source.is_rust()) {
        let limit = if source.is_test() { TEST_FILE_LINES_MAX } else { FILE_LINES_MAX };
        let entry = LONG_FILES.iter().find(|(path, _)| *path == source.path);
        let lines = source.code_lines();
        if lines > entry.map_or(limit, |(_, max)| *max) {
            complaints
                .push(format!("{}: {lines} lines, more than {limit}: divide it", source.path));
        }
        if entry.is_some() && lines + SLACK_LINES <= limit {
            complaints.push(format!("{}: take it off LONG_FILES", source.path));
        }
    }
    report(&complaints);
}

#[test]
fn no_file_is_dead() {
    let all = sources();
    let declared: BTreeSet<String> = all
        .iter()
        .flat_map(|source| source.text.lines())
        .filter_map(|line| line.trim().split_once("mod ")?.1.strip_suffix(';').map(str::to_owned))
        .collect();
    let is_root = |path: &str| {
        let in_tests = path.split("/tests/").nth(1).is_some_and(|name| !name.contains('/'));
        ["/main.rs", "/lib.rs", "/mod.rs", "/build.rs"].iter().any(|end| path.ends_with(end))
            || path.contains("/src/bin/")
            || in_tests
            || path.contains("/benches/")
    };
    let dead =
        all.iter().filter(|source| source.is_rust() && !is_root(&source.path)).filter(|source| {
            let stem = Path::new(&source.path).file_stem().unwrap().to_string_lossy().into_owned();
            !declared.contains(&stem)
        });
    let complaints: Vec<_> =
        dead.map(|source| format!("{}: no `mod` names it", source.path)).collect();
    report(&complaints);
}

#[test]
fn links_of_documents_resolve() {
    let mut complaints = Vec::new();
    let root = root();
    for source in sources().iter().filter(|source| source.is_markdown()) {
        for (number, target) in links(&source.text) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let folder = root.join(&source.path).parent().unwrap().to_owned();
            let climbs =
                Path::new(path).components().filter(|c| *c == Component::ParentDir).count();
            let depth = Path::new(&source.path).components().count() - 1;
            if climbs > depth || !folder.join(path).exists() {
                complaints.push(format!("{}:{number}: {target} leads nowhere", source.path));
            }
        }
    }
    report(&complaints);
}

#[test]
fn commands_of_the_readme_exist() {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    for name in ["README.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root().join(name)).unwrap();
        for target in text.split("`make ").skip(1).filter_map(|rest| rest.split(['`', ' ']).next())
        {
            assert!(
                makefile.contains(&format!("\n{target}:")),
                "{name}: there is no `make {target}`"
            );
        }
    }
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

/// Whether a line of code holds the keyword, outside of words such as `unsafe_code`.
fn is_unsafe(line: &str) -> bool {
    // Written in two parts, so that this file does not name it itself.
    let keyword = concat!("un", "safe");
    let code = line.split("//").next().unwrap_or_default();
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '"';
    code.match_indices(keyword).any(|(at, _)| {
        let after = code[at + keyword.len()..].chars().next();
        let before = code[..at].chars().next_back();
        !after.is_some_and(is_word) && !before.is_some_and(is_word)
    })
}

struct Function<'a> {
    name: &'a str,
    /// Its first line.
    first: usize,
    /// From the signature to the closing brace.
    lines: usize,
}

/// All functions with a body, as rustfmt lays them out: the closing brace stands under the first letter.
fn functions(text: &str) -> impl Iterator<Item = Function<'_>> {
    let lines: Vec<&str> = text.lines().collect();
    let starts: Vec<_> = lines
        .iter()
        .enumerate()
        .filter_map(|(at, line)| Some((at, function_name(line)?)))
        .collect();
    starts.into_iter().filter_map(move |(at, name)| {
        let indent = lines[at].len() - lines[at].trim_start().len();
        let end = format!("{}}}", &lines[at][..indent]);
        let signature_end =
            at + lines[at..].iter().position(|line| line.ends_with(['{', '}', ';']))?;
        if !lines[signature_end].ends_with('{') {
            return None;
        }
        let body = lines[signature_end..].iter().position(|line| *line == end)?;
        Some(Function { name, first: at + 1, lines: signature_end + body - at + 1 })
    })
}

fn function_name(line: &str) -> Option<&str> {
    let mut words = line.trim_start();
    let un_safe = concat!("un", "safe ");
    let qualifiers = ["pub ", "pub(crate) ", "pub(super) ", "const ", "async ", un_safe];
    while let Some(rest) = qualifiers.iter().find_map(|word| words.strip_prefix(word)) {
        words = rest;
    }
    words.strip_prefix("fn ")?.split(['(', '<']).next()
}

/// The targets of `[text](target)`, outside of code.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut is_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        }
        if is_code || line.starts_with("    ") {
            continue;
        }
        let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        found.extend(targets.map(|target| (index + 1, target.to_owned())));
    }
    found
}

#[test]
fn the_rules_see_what_they_look_for() {
    let text = "impl A {\n    pub fn one(\n        a: u8,\n    ) -> u8 {\n        a\n    }\n\n    fn two();\n}\n\
                fn three() {}\nfn four() {\n    if a {\n    }\n}\n";
    let found: Vec<_> = functions(text).map(|f| (f.name, f.first, f.lines)).collect();
    assert_eq!(found, [("one", 2, 5), ("four", 11, 4)]);
    let keyword = concat!("un", "safe");
    assert!(is_unsafe(&format!("    {keyword} {{ call() }}")));
    assert!(is_unsafe(&format!("{keyword} impl Send for A {{}}")));
    assert!(!is_unsafe(&format!("#![forbid({keyword}_code)]")));
    assert!(!is_unsafe(&format!("// {keyword} is a word")));
    assert_eq!(links("a [b](c.md#d) e\n```\n[x](y)\n```\n"), [(1, "c.md#d".to_owned())]);
}
