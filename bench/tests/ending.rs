//! How runs end before their time: refused, interrupted, or left by a node. Nothing of them stays behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(60);

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_twinpoint-bench"))
        .args(arguments)
        .output()
        .expect("the program was built with this test")
}

/// The one line of an error that the program itself tells.
fn line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// A run that would take minutes, with its stores in a folder where something else lies too.
struct Run {
    child: Child,
    folder: tempfile::TempDir,
}

impl Run {
    fn start(arguments: &[&str]) -> Run {
        let folder = tempfile::tempdir().expect("the system does it");
        let stores = folder.path().join("stores");
        fs::create_dir(&stores).expect("the system does it");
        for name in ["key", "primary.store"] {
            fs::write(stores.join(name), "not of the run").expect("the system does it");
        }
        // Whatever this test was started with ignored.
        let child = Command::new("env")
            .arg("--default-signal")
            .arg(env!("CARGO_BIN_EXE_twinpoint-bench"))
            .args(arguments)
            .args(["--seconds", "60", "--store-mib", "192", "--volume-mib", "16", "--buffered"])
            .arg("--store-dir")
            .arg(&stores)
            .arg("--out")
            .arg(folder.path().join("results/out"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the system does it");
        Run { child, folder }
    }

    /// Processes that name the run's folder, without the run itself.
    fn others(&self) -> Vec<u32> {
        let folder = self.folder.path().to_str().expect("the system does it");
        let processes = fs::read_dir("/proc").expect("the system does it").flatten();
        let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_ours = |process: &u32| {
            let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            *process != self.child.id() && String::from_utf8_lossy(&line).contains(folder)
        };
        processes.filter(is_ours).collect()
    }

    /// Waits until the client is connected, so that the load is on.
    fn wait_for_load(&self) -> Vec<u32> {
        let deadline = Instant::now() + LIMIT;
        let pattern = format!("{}/stores/twinpoint-bench-", self.folder.path().display());
        loop {
            let sockets = fs::read_to_string("/proc/net/unix").expect("the system does it");
            let connected = |line: &&str| line.contains(&pattern) && line.ends_with("nbd");
            // One listens, one is connected.
            if sockets.lines().filter(connected).count() >= 2 {
                return self.others();
            }
            assert!(Instant::now() < deadline, "the load does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How the run ended, and what it said; nothing is left.
    fn end(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + LIMIT;
        while self.child.try_wait().expect("the system does it").is_none() {
            assert!(Instant::now() < deadline, "the run does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        // One that was just being started ends by itself.
        let others = || self.others();
        while !others().is_empty() {
            assert!(Instant::now() < deadline, "processes are left behind: {:?}", others());
            std::thread::sleep(Duration::from_millis(5));
        }
        let names = |folder: &Path| -> Vec<PathBuf> {
            let mut names: Vec<_> = fs::read_dir(folder)
                .expect("the system does it")
                .map(|entry| entry.expect("the system does it").path())
                .collect();
            names.sort();
            names
        };
        let stores = self.folder.path().join("stores");
        assert_eq!(names(self.folder.path()), std::slice::from_ref(&stores), "results of nothing");
        assert_eq!(names(&stores), [stores.join("key"), stores.join("primary.store")]);
        assert_eq!(
            fs::read_to_string(stores.join("key")).expect("the system does it"),
            "not of the run"
        );
        let output = self.child.wait_with_output().expect("the system does it");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn signal(name: &str, process: u32) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(status.expect("the system does it").success());
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    for (name, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let run = Run::start(&["wire", "--only", "q64"]);
        assert_eq!(run.wait_for_load().len(), 2, "two nodes");
        signal(name, run.child.id());
        let (code, said) = run.end();
        assert_eq!(code, Some(128 + number), "{said}");
        assert!(said.contains(&format!("SIG{name}")) && said.lines().count() == 1, "{said}");
    }
    let run = Run::start(&["run", "--only", "nbd-sync rand4k q64 f0"]);
    run.wait_for_load();
    signal("INT", run.child.id());
    assert_eq!(run.end().0, Some(130));
}

#[test]
fn a_run_that_is_interrupted_while_it_begins_leaves_nothing() {
    for pause_ms in [3, 20, 60, 150] {
        let run = Run::start(&["wire"]);
        let deadline = Instant::now() + LIMIT;
        while fs::read_dir(run.folder.path().join("stores")).unwrap().count() < 3 {
            assert!(Instant::now() < deadline, "the run does not begin");
        }
        std::thread::sleep(Duration::from_millis(pause_ms));
        signal("TERM", run.child.id());
        assert_eq!(run.end().0, Some(143));
    }
}

#[test]
fn a_run_that_lost_a_node_leaves_nothing() {
    for node in [0, 1] {
        let run = Run::start(&["wire", "--only", "q64"]);
        signal("KILL", run.wait_for_load()[node]);
        let (code, said) = run.end();
        assert_eq!(code, Some(1), "{said}");
    }
}

/// Needs fio and nbdkit.
#[test]
fn programs_beside_end_too() {
    let is_there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !is_there("fio") || !is_there("nbdkit") {
        eprintln!("skipped: fio or nbdkit is missing");
        return;
    }
    let run = Run::start(&["peers", "--only", "q64"]);
    let deadline = Instant::now() + LIMIT;
    // nbdkit, three nodes, fio, which may be two.
    while run.others().len() < 5 {
        assert!(Instant::now() < deadline, "fio does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    signal("TERM", run.child.id());
    assert_eq!(run.end().0, Some(143));
}

#[test]
fn wrong_values_are_refused_and_nothing_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let made = folder.path().join("made");
    let (stores, out) = (made.join("stores"), made.join("out"));
    let places = ["--store-dir", stores.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let all = ["run", "peers", "wire"];
    let refused = |command: &str, flags: &[&str]| {
        let output = bench(&[&[command], flags, &places].concat());
        assert_eq!(output.status.code(), Some(2), "{command} {flags:?}");
        assert!(!made.exists(), "{command} {flags:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for command in all {
        for seconds in ["nan", "inf", "1e300", "0", "-1"] {
            refused(command, &["--seconds", seconds]);
        }
        for rounds in ["0", "-1", "1001"] {
            refused(command, &["--rounds", rounds]);
        }
        for sizes in [["--store-mib", "0"], ["--volume-mib", "0"], ["--volume-mib", "3072"]] {
            refused(command, &sizes);
        }
        refused(command, &["--store-mib", "99999999999999999"]);
        assert_eq!(refused(command, &["--only", "nosuch"]).lines().count(), 1);
    }
    assert!(refused("wire", &["--transports", "tcp,tcp"]).contains("named twice"));
    refused("wire", &["--transports", "tcp,ib"]);
}

#[test]
fn a_host_without_rdma_is_told_at_once() {
    let Err(error) = rdma_fallback::rdma::probe() else {
        eprintln!("skipped: this host has RDMA");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let began = Instant::now();
    let output = bench(&["wire", "--transports", "tcp,rdma", "--out", out.to_str().unwrap()]);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(output.status.code(), Some(1));
    assert!(line(&output).contains(&error.to_string()), "{}", line(&output));
    assert!(!out.exists());
}
