//! `twinpoint-demo`: two stores, a real file system across them, the first node killed, the second one carries on.
//!
//! ```text
//!   /usr/share -> mke2fs -> nbdcopy -> first node ===TCP===> second node
//!                    fio, the ledger ->    X kill -9           | promote
//!   every file's checksum <- debugfs, e2fsck <- nbdcopy <------'
//! ```
//!
//! Invariants: whatever happens, no process and no file is left behind (`--keep` keeps the files); it succeeds only if
//! every file came back, every flushed write is there, and the roots agree.
#![forbid(unsafe_code)]

mod folder;
mod image;
mod ledger;
mod narrator;
mod nbd_client;
mod node;
mod process;
mod stores;
mod summary;
mod takeover;
mod tree;
mod trouble;
mod watch;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use serde_json::Value;

use folder::Folder;
use ledger::{LEDGER_BYTES, Ledger};
use narrator::Narrator;
use nbd_client::NbdClient;
use node::Node;
use process::Process;
use stores::Stores;
use summary::Summary;
use takeover::{Takeover, start_load, take_over};
use tree::{Contents, Tree};
use trouble::Trouble;
use watch::{Sightings, Watch};

/// Size of each store.
const STORE_SIZE: &str = "1GiB";
/// Bytes of the volume that is written at random.
const SCRATCH_BYTES: u64 = 64 << 20;
/// Room for the two stores, the image, its copy, and the files that come back.
const SPACE_BYTES: u64 = 5 << 30;
/// How long the load runs before the kill.
const LOAD_TIME: Duration = Duration::from_secs(6);
/// Consistency points sealed by name while the load runs.
const NAMED_POINTS: u32 = 3;
/// Name of the volume with the file system.
const VOLUME: &str = "share";

/// Shows that a file system survives the loss of the host that serves it: two nodes on this machine, the first one is
/// killed under load, the second one takes over, and every file is compared.
#[derive(Parser)]
#[command(name = "twinpoint-demo", version, about, max_term_width = 100)]
struct Options {
    /// Folder to make the demo's own folder in; it needs 5 GiB. Default: beside this program.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Keep the stores, the images and the logs.
    #[arg(long)]
    keep: bool,
    /// Accept a file system that knows no direct access.
    #[arg(long)]
    buffered: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match demo(&options) {
        Ok(summary) => {
            println!("\n{summary}\ndemo: passed");
            ExitCode::SUCCESS
        }
        Err(Trouble::Interrupted) => {
            eprintln!("twinpoint-demo: interrupted; processes ended, files removed");
            ExitCode::from(130)
        }
        Err(trouble) => {
            eprintln!("twinpoint-demo: {trouble}\ndemo: failed");
            ExitCode::FAILURE
        }
    }
}

fn demo(options: &Options) -> Result<Summary, Trouble> {
    let program = std::env::current_exe().map_err(Trouble::system("find", "this program"))?;
    let beside = program.parent().unwrap_or(Path::new("."));
    let narrator = Narrator::start().map_err(Trouble::system("catch", "signals"))?;
    let parent = options.dir.as_deref().unwrap_or(beside);
    let folder = Folder::create(parent, options.keep, SPACE_BYTES)?;
    narrator.say(&format!("working in {}", folder.path().display()));
    let stage = Stage { twinpoint: beside.join("twinpoint"), narrator, buffered: options.buffered };
    let result = stage.play();
    if let Err(trouble) = &result
        && !matches!(trouble, Trouble::Interrupted)
    {
        stage.tell_logs();
    }
    result
}

/// What every act needs.
struct Stage {
    twinpoint: PathBuf,
    narrator: Narrator,
    buffered: bool,
}

impl Stage {
    fn play(&self) -> Result<Summary, Trouble> {
        let (tree, original) = self.make_image()?;
        let (first, second) = self.start_pair()?;
        self.copy_in(&tree, &first)?;
        let (takeover, sightings, ledger) = self.lose_first(first, &second)?;
        let [primary, secondary] = &sightings;
        let common = watch::compare(primary, secondary)?;
        self.copy_out(&second, &original)?;
        self.narrator.say(&format!("reading the ledger: {ledger} entries were flushed"));
        ledger::verify(&mut NbdClient::open(second.nbd(), "ledger")?, ledger)?;
        let successor = second.status()?;
        let nothing = || Trouble::Differs(trouble::Difference::NoCommonPoint);
        let primary = primary.last.clone().ok_or_else(nothing)?;
        self.narrator.say("stopping the second node, and comparing the two stores block for block");
        second.stop(&self.narrator)?;
        let stores = Stores::verify(&self.twinpoint, self.buffered, &self.narrator)?;
        if stores.second.0 == takeover.cp && stores.second.1 != takeover.root {
            return Err(Trouble::Differs(trouble::Difference::Root(takeover.cp)));
        }
        let tree = format!("{}: {} files, {} MiB", tree.name, tree.files, tree.bytes >> 20);
        let elapsed = self.narrator.elapsed();
        Ok(Summary { tree, primary, successor, common, stores, takeover, ledger, elapsed })
    }

    /// A real tree, its checksums, and an ext4 image of it.
    fn make_image(&self) -> Result<(Tree, Contents), Trouble> {
        let tree = Tree::choose(Path::new("tree"), &self.narrator)?;
        let (files, mib) = (tree.files, tree.bytes >> 20);
        self.narrator
            .say(&format!("making an ext4 image of {}: {files} files, {mib} MiB", tree.name));
        let original = std::thread::scope(|scope| {
            let original = scope.spawn(|| tree::contents(&tree.path, &self.narrator));
            image::make(&tree, Path::new("original.img"), &self.narrator)?;
            original.join().expect("no thread panics")
        })?;
        Ok((tree, original))
    }

    /// Two stores of the same shape, a key, and a node on each.
    fn start_pair(&self) -> Result<(Node, Node), Trouble> {
        self.narrator.say(&format!("formatting two stores of {STORE_SIZE}"));
        let formatted =
            self.run("format", &["format", "first.store", "--size", STORE_SIZE, "--json"])?;
        let formatted: Value = serde_json::from_str(&formatted).unwrap_or_default();
        let id = formatted["store"].as_str().unwrap_or_default();
        self.run("format", &["format", "second.store", "--size", STORE_SIZE, "--store-id", id])?;
        self.run("key", &["key", "generate", "pair.key"])?;
        self.narrator.say("starting two nodes, each a process, joined by TCP");
        let buffered = self.buffered.then_some("--buffered");
        let mut flags = vec!["--role", "secondary", "--listen", "127.0.0.1:0"];
        flags.extend(buffered);
        let second = Node::serve(&self.twinpoint, "second", &flags, &self.narrator)?;
        let mut flags =
            vec!["--role", "primary", "--peer", second.listen(), "--replication", "sync"];
        flags.extend(buffered);
        let first = Node::serve(&self.twinpoint, "first", &flags, &self.narrator)?;
        first.await_peer(&self.narrator)?;
        Ok((first, second))
    }

    /// The file system, onto a volume of its size.
    fn copy_in(&self, tree: &Tree, first: &Node) -> Result<(), Trouble> {
        let (size, scratch) = (image::size_bytes(tree).to_string(), SCRATCH_BYTES.to_string());
        for (name, size) in
            [(VOLUME, &size), ("scratch", &scratch), ("ledger", &LEDGER_BYTES.to_string())]
        {
            self.operate(first, &["volume", "create", name, size])?;
        }
        let whole = image::allocated_mib(Path::new("original.img"));
        self.narrator.say(&format!("copying {whole} MiB onto a volume of the first node"));
        let mut command = Command::new("nbdcopy");
        command.args(["--flush", "original.img", &first.uri(VOLUME)]);
        let progress = || {
            let written = first.status().ok()?.traffic.client_bytes_written >> 20;
            Some(format!("{written} of {whole} MiB"))
        };
        Process::start("nbdcopy", &mut command)?.finish(&self.narrator, progress).map(drop)
    }

    /// Load, and the end of the first node under it.
    fn lose_first(
        &self,
        first: Node,
        second: &Node,
    ) -> Result<(Takeover, [Sightings; 2], u64), Trouble> {
        self.narrator.say("random writes with flushes, and consistency points beside them");
        let watches = [Watch::begin(first.control()), Watch::begin(second.control())];
        let ledger = Ledger::open(first.nbd().to_owned(), "ledger")?;
        let mut load = start_load(&first.uri("scratch"), SCRATCH_BYTES)?;
        for round in 1..=NAMED_POINTS {
            for _ in 0..(LOAD_TIME / NAMED_POINTS).as_millis() / 20 {
                self.narrator.pause(Duration::from_millis(20))?;
            }
            if let Some(status) = load.ended()? {
                return Err(load.failure(status));
            }
            let said = self.operate(&first, &["checkpoint", &format!("demo-{round}")])?;
            self.narrator.detail(&format!("{}; ledger entry {}", said.trim(), ledger.flushed()));
        }
        self.narrator.say("killing the first node (SIGKILL) and promoting the second one");
        let takeover = take_over(&self.twinpoint, first, second, VOLUME, &self.narrator)?;
        let (term, time) = (takeover.term, takeover.from_kill.as_secs_f64() * 1e3);
        self.narrator.say(&format!(
            "the second node is primary of term {term}; {time:.1} ms after the kill"
        ));
        drop(load);
        Ok((takeover, watches.map(Watch::end), ledger.close()))
    }

    /// The file system, back from the second node, and compared.
    fn copy_out(&self, second: &Node, original: &Contents) -> Result<(), Trouble> {
        let (copy, files) = (Path::new("copy.img"), Path::new("files"));
        self.narrator.say("reading the volume back from the second node");
        let mut command = Command::new("nbdcopy");
        command.arg(second.uri(VOLUME)).arg(copy);
        let progress = || Some(format!("{} MiB", image::allocated_mib(copy)));
        Process::start("nbdcopy-back", &mut command)?.finish(&self.narrator, progress)?;
        let said = image::check(copy, &self.narrator)?;
        self.narrator.say(&format!("e2fsck -fn is clean: {said}"));
        self.narrator.say("taking all files out, and comparing their checksums");
        image::extract(copy, files, &self.narrator)?;
        tree::compare(original, &tree::contents(files, &self.narrator)?)?;
        self.narrator.say(&format!("{} files, links and folders are as they were", original.len()));
        Ok(())
    }

    /// A subcommand that speaks with a node.
    fn operate(&self, node: &Node, arguments: &[&str]) -> Result<String, Trouble> {
        let control = node.control().to_string_lossy();
        self.run(arguments[0], &[arguments, &["--control", &control]].concat())
    }

    /// A subcommand of `twinpoint`.
    fn run(&self, name: &str, arguments: &[&str]) -> Result<String, Trouble> {
        let mut command = Command::new(&self.twinpoint);
        command.args(arguments);
        if self.buffered && name == "format" {
            command.arg("--buffered");
        }
        let progress = || Some(format!("twinpoint {name} is still at it"));
        Process::start(name, &mut command)?.finish(&self.narrator, progress)
    }

    /// What the nodes said last, to explain a failure.
    fn tell_logs(&self) {
        for name in ["first", "second"] {
            let said = process::last_words(name);
            if !said.is_empty() {
                eprintln!("the {name} node's last words: {said}");
            }
        }
    }
}
