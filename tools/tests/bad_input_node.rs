//! Bad input to running nodes: garbage, half messages, oversize and dawdling on the NBD, wire and control sockets
//! while a good client works; wrong keys, wrong stores. The nodes keep serving, say why in few lines, and never panic.

mod support;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::good_client::GoodClient;
use support::node::{Node, NodeFiles, ask};
use support::pair::{Pair, PairPlan, VOLUME, flags};
use support::programs::{client, twinpoint};
use support::random::Random;
use support::stranger::{command, cut_short, disturb, drain, go_data, noise, opened, option};
use support::time_limit::TimeLimit;

const TIME_MAX: Duration = Duration::from_secs(180);

#[test]
fn garbage_on_the_nbd_socket() {
    let _limit = TimeLimit::new("garbage, nbd", TIME_MAX);
    let mut random = Random::of_test("garbage-nbd");
    let pair = Pair::new(PairPlan::default());
    let good = GoodClient::start(pair.primary());
    let socket = pair.primary().files().nbd.clone();
    let greeted = |tail: &[u8]| [&3_u32.to_be_bytes()[..], tail].concat();
    for _ in 0..30 {
        disturb(&socket, &noise(&mut random, 3000));
        disturb(&socket, &greeted(&noise(&mut random, 3000)));
        disturb(&socket, &greeted(&option(random.below(20) as u32, &noise(&mut random, 300))));
        disturb(&socket, &greeted(&cut_short(&mut random, &option(7, &go_data()))));
        disturb(
            &socket,
            &greeted(&[&option(7, &go_data())[..], &noise(&mut random, 3000)].concat()),
        );
    }
    let oversize = [&b"IHAVEOPT"[..], &7_u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    disturb(&socket, &greeted(&oversize));
    good.assert_works();
    bad_commands(&pair, &mut random);
    good.assert_works();
    // Dawdlers: connections that stop in the middle, and stay.
    let whole = greeted(&[&option(7, &go_data())[..], &command(1, 0, 4096)].concat());
    let dawdlers: Vec<UnixStream> =
        (0..whole.len()).step_by(3).map(|length| opened(&socket, &whole[..length])).collect();
    good.assert_works();
    assert_eq!(pair.primary().status()["peer"]["state"], "connected");
    drop(dawdlers);
    good.assert_works();
    good.end();
    end(pair);
}

/// Commands that no client should send get an error or a cut, and never touch the volume or other clients.
fn bad_commands(pair: &Pair, random: &mut Random) {
    let socket = pair.primary().files().nbd.clone();
    let size = pair.plan.volume_bytes;
    let begin = || {
        let mut stream = opened(&socket, &3_u32.to_be_bytes());
        stream.write_all(&option(7, &go_data())).expect("the node takes options");
        stream
    };
    let ranges = [
        (0, u32::MAX),
        (u64::MAX, 512),
        (u64::MAX - 511, 1024),
        (size, 512),
        (size - 512, 1024),
        (0, 0),
        (1, 3),
    ];
    for kind in [0, 1, 3, 4, 6, 7, 99, 0xffff] {
        for (offset, length) in ranges {
            let mut stream = begin();
            let mut bytes = command(kind, offset, length);
            bytes[4..6].copy_from_slice(&(random.next() as u16).to_be_bytes());
            if kind == 1 && length < 1 << 16 {
                bytes.extend(vec![0xaa; length as usize]);
            }
            // The node may cut the connection while we still talk.
            let _ = stream.write_all(&bytes);
            drain(&mut stream, Duration::from_millis(10));
        }
    }
    for _ in 0..20 {
        let mut stream = begin();
        let half = cut_short(random, &[&command(1, 4096, 8192)[..], &[0x55; 8192]].concat());
        stream.write_all(&half).expect("half a write is taken");
    }
    let mut client = pair.primary().client(VOLUME);
    for (offset, length) in [(size, 512), (size - 512, 1024), (u64::MAX - 511, 512)] {
        assert!(client.read(offset, length).is_err(), "a read past the end fails");
    }
    client.read(0, 512).expect("and the connection goes on");
}

#[test]
fn garbage_on_the_control_socket() {
    let _limit = TimeLimit::new("garbage, control", TIME_MAX);
    let mut random = Random::of_test("garbage-control");
    let pair = Pair::new(PairPlan::default());
    let good = GoodClient::start(pair.primary());
    for index in [0, 1] {
        let control = pair.files[index].control.clone();
        let mode = fs::metadata(&control).expect("the socket is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "the control socket is the owner's alone");
        for _ in 0..30 {
            disturb(&control, &noise(&mut random, 3000));
            disturb(&control, &[&noise(&mut random, 300)[..], b"\n"].concat());
        }
        disturb(&control, &vec![b'a'; 200_000]);
        disturb(&control, &vec![b'['; 60_000]);
        disturb(&control, b"{\"command\":\"status\"");
        disturb(&control, b"{\"command\":\"status\"}");
        let wrong = [
            json!({}),
            json!({ "command": "explode" }),
            json!({ "command": 7 }),
            json!({ "command": "status", "more": 1 }),
            json!({ "command": "volume-list", "more": 1 }),
            json!({ "command": "stop", "more": 1 }),
            json!({ "command": "checkpoint", "force": true }),
            json!({ "command": "promote", "more": 1 }),
            json!(["status"]),
            json!("status"),
            json!({ "command": "volume-create" }),
            json!({ "command": "volume-create", "name": "x", "size_bytes": -1 }),
            json!({ "command": "volume-create", "name": "", "size_bytes": 4096 }),
            json!({ "command": "volume-create", "name": "a b", "size_bytes": 4096 }),
            json!({ "command": "volume-create", "name": "x", "size_bytes": 4097 }),
            json!({ "command": "volume-create", "name": "x", "size_bytes": u64::MAX }),
            json!({ "command": "volume-create", "name": "x".repeat(65), "size_bytes": 4096 }),
            json!({ "command": "volume-delete", "name": "none" }),
            json!({ "command": "volume-delete", "name": VOLUME }),
            json!({ "command": "checkpoint", "name": "\u{0}" }),
            json!([["status"]]),
        ];
        for request in wrong {
            let reply = ask(&control, &request);
            let reply = reply.unwrap_or_else(|text| panic!("{request}: {text}"));
            assert_eq!(reply["ok"], false, "{request}: {reply}");
            let line = reply["error"].as_str().unwrap_or_default();
            assert!(!line.is_empty() && !line.contains('\n'), "{request}: {reply}");
        }
        let dawdlers: Vec<UnixStream> =
            (0..16).map(|length| opened(&control, &b"{\"command\":\"stat"[..length])).collect();
        assert_eq!(pair.node(index).status()["schema"], 1);
        drop(dawdlers);
        let crowd: Vec<UnixStream> = (0..100).map(|_| opened(&control, b"{")).collect();
        drop(crowd);
        let deadline = Instant::now() + Duration::from_secs(5);
        while ask(&control, &json!({ "command": "status" })).is_err() {
            assert!(Instant::now() < deadline, "no status after a crowd has left");
            std::thread::sleep(Duration::from_millis(5));
        }
        good.assert_works();
    }
    let volumes = pair.primary().ask(&json!({ "command": "volume-list" })).expect("a list");
    assert_eq!(volumes["volumes"].as_array().map(Vec::len), Some(1), "{volumes}");
    good.end();
    end(pair);
}

#[test]
fn garbage_on_the_wire_socket() {
    let _limit = TimeLimit::new("garbage, wire", TIME_MAX);
    let mut random = Random::of_test("garbage-wire");
    let pair = Pair::new(PairPlan::default());
    let good = GoodClient::start(pair.primary());
    let connected = |pair: &Pair| pair.files[0].log_text().matches("peer connected").count();
    let sessions = connected(&pair);
    for index in [0, 1] {
        let listen = pair.node(index).ready()["listen"].as_str().expect("an address").to_owned();
        for _ in 0..40 {
            let bytes = match random.below(4) {
                0 => noise(&mut random, 5000),
                1 => vec![0; random.below(5000) as usize],
                2 => vec![0xff; random.below(5000) as usize],
                _ => {
                    [&(random.below(64) as u32).to_le_bytes()[..], &noise(&mut random, 64)].concat()
                }
            };
            let mut stream = TcpStream::connect(&listen).expect("the node listens");
            // The node may hang up while we still talk.
            let _ = stream.write_all(&bytes);
            if random.percent(50) {
                stream.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
                let _ = stream.read(&mut [0; 256]);
            }
        }
        let dawdlers: Vec<TcpStream> =
            (0..60).map(|_| TcpStream::connect(&listen).expect("the node listens")).collect();
        good.assert_works();
        assert_eq!(pair.primary().status()["peer"]["state"], "connected");
        drop(dawdlers);
    }
    good.assert_works();
    assert_eq!(connected(&pair), sessions, "strangers do not end the session; {}", pair.logs());
    for files in &pair.files {
        let lines = files.log_text().lines().count();
        assert!(lines < 30, "strangers fill the log with {lines} lines; {}", files.log_end());
    }
    good.end();
    end(pair);
}

#[test]
fn a_key_that_cannot_be_used_is_refused_with_one_line() {
    let _limit = TimeLimit::new("keys", TIME_MAX);
    let pair = Pair::formatted(PairPlan::default());
    let key = pair.key_path();
    let good = fs::read(&key).expect("the key is there");
    let write = |bytes: &[u8], mode: u32| {
        fs::write(&key, bytes).expect("the key can be written");
        fs::set_permissions(&key, Permissions::from_mode(mode)).expect("the mode can be set");
    };
    let cases = [
        (good.clone(), 0o644, "600"),
        (good.clone(), 0o640, "600"),
        (Vec::new(), 0o600, "key"),
        (good[..10].to_vec(), 0o600, "key"),
        (vec![0xff; 100_000], 0o600, "key"),
    ];
    for (bytes, mode, word) in cases {
        write(&bytes, mode);
        assert_refused(&pair, word);
    }
    fs::remove_file(&key).expect("the key can be removed");
    assert_refused(&pair, "key");
    fs::create_dir(&key).expect("a folder in its place");
    assert_refused(&pair, "key");
}

fn assert_refused(pair: &Pair, word: &str) {
    for (index, role) in [(0, "primary"), (1, "secondary")] {
        let node = Node::try_start(&pair.files[index], &pair.serve_flags(index, role));
        let outcome = node.err().expect("a bad key keeps the node from starting");
        assert_ne!(outcome.code, Some(0), "{outcome}");
        assert_eq!(outcome.stderr.lines().count(), 1, "one line: {outcome}");
        let says = outcome.stderr.contains(&pair.key_path()) && outcome.stderr.contains(word);
        assert!(says, "the line names the file, and {word:?}: {outcome}");
    }
}

#[test]
fn a_peer_with_another_key_is_refused_and_changes_nothing() {
    let _limit = TimeLimit::new("other key", TIME_MAX);
    let plan = PairPlan { on_peer_loss: "continue", ..PairPlan::default() };
    let mut pair = Pair::new(plan);
    pair.stop_all();
    let other = pair.space.path("other-key").display().to_string();
    twinpoint(&["key", "generate", &other]).success();
    let mut flags = pair.serve_flags(1, "secondary");
    let at = flags.iter().position(|flag| flag == "--key-file").expect("a pair has a key") + 1;
    flags[at].clone_from(&other);
    let stranger = Node::start(&pair.files[1], &flags);
    let before = stranger.status();
    let lines = pair.files[0].log_text().lines().count();
    pair.start(0);
    let good = GoodClient::start(pair.primary());
    std::thread::sleep(Duration::from_secs(4));
    good.assert_works();
    assert_eq!(pair.primary().status()["peer"]["state"], "absent");
    let after = stranger.status();
    for field in ["role", "term", "cp", "root", "base"] {
        assert_eq!(before[field], after[field], "the stranger changed nothing");
    }
    assert_eq!(stranger.status()["peer"]["state"], "absent");
    let text = pair.files[0].log_text();
    let said: Vec<&str> = text.lines().skip(lines).filter(|line| line.contains("key")).collect();
    let said = said.iter().filter(|line| !line.starts_with("-- start")).count();
    assert_eq!(said, 1, "the primary says once that the keys differ; {}", pair.logs());
    stranger.stop();
    good.end();
    pair.start(1);
    pair.wait_in_step(Duration::from_secs(30)).unwrap_or_else(|text| panic!("{text}"));
    end(pair);
}

#[test]
fn another_store_is_refused_and_told_once() {
    refused_store("other store", "two different stores", |format| {
        let at = format.iter().position(|flag| flag == "--store-id").expect("an id");
        format.drain(at..at + 2);
    });
}

#[test]
fn another_layout_is_refused_and_told_once() {
    refused_store("other shards", "different layout", |format| {
        let at = format.iter().position(|flag| flag == "--shards").expect("a number");
        format[at + 1] = "2".to_owned();
    });
    refused_store("other journal", "different layout", |format| {
        let at = format.iter().position(|flag| flag == "--journal").expect("a size");
        format[at + 1] = "8MiB".to_owned();
    });
}

/// A primary whose secondary's store was formatted in another way, which `change` makes of the right one.
fn refused_store(name: &'static str, words: &str, change: impl Fn(&mut Vec<String>)) {
    let _limit = TimeLimit::new(name, TIME_MAX);
    let plan = PairPlan { on_peer_loss: "continue", ..PairPlan::default() };
    let mut pair = Pair::formatted(plan);
    let store = pair.store_path(1);
    let inspected = twinpoint(&["inspect", &pair.store_path(0), "--json"]).success();
    let id = store_id(&inspected);
    let mut format = flags(&["format", &store, "--force", "--shards", "4", "--journal", "4MiB"]);
    format.extend(flags(&["--store-id", &id, "--prefill", "none"]));
    change(&mut format);
    let format: Vec<&str> = format.iter().map(String::as_str).collect();
    twinpoint(&format).success();
    pair.start(1);
    pair.start(0);
    pair.create_volume(VOLUME, pair.plan.volume_bytes);
    let good = GoodClient::start(pair.primary());
    std::thread::sleep(Duration::from_secs(6));
    good.assert_works();
    for index in [0, 1] {
        let told = pair.files[index].log_text().matches(words).count();
        assert_eq!(told, 1, "{name}: told once on both sides; {}", pair.logs());
        assert_eq!(pair.node(index).status()["peer"]["state"], "absent", "{name}");
    }
    assert_eq!(pair.node(1).status()["cp"]["local"], 0, "{name}: the other store is untouched");
    good.end();
    pair.stop_all();
    pair.verify_one(0);
    pair.verify_one(1);
    pair.assert_no_panic();
}

fn store_id(inspected: &str) -> String {
    let at = inspected.find("\"store\":").expect("inspect tells the store's id") + 8;
    inspected[at..].trim_start().trim_start_matches('"').chars().take(32).collect()
}

#[test]
fn the_ready_line_tells_the_ports_that_the_kernel_chose() {
    let _limit = TimeLimit::new("ready line", TIME_MAX);
    let pair = Pair::formatted(PairPlan { paired: false, ..PairPlan::default() });
    let key = pair.key_path();
    twinpoint(&["key", "generate", &key]).success();
    let given = ["--replication", "single", "--nbd", "127.0.0.1:0", "--listen", "127.0.0.1:0"];
    let flags = flags(&[&given[..], &["--key-file", &key]].concat());
    let files = NodeFiles::clone(&pair.files[0]);
    let node = Node::start(&files, &flags);
    let control = files.control.display().to_string();
    twinpoint(&["volume", "create", VOLUME, "8MiB", "--control", &control]).success();
    let ready = node.ready().clone();
    let listen = ready["listen"].as_str().expect("an address").to_owned();
    TcpStream::connect(&listen).unwrap_or_else(|error| panic!("{listen}: {error}"));
    let nbd: Vec<&str> =
        ready["nbd"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    let tcp = nbd.iter().find(|address| !address.starts_with("unix:")).expect("a TCP address");
    let uri = format!("nbd://{tcp}/{VOLUME}");
    let size = client("nbdinfo", "libnbd-bin", &["--size", &uri], pair.space.folder()).success();
    assert_eq!(size.trim(), (8 << 20).to_string());
    node.stop();
    assert!(!files.control.exists() && !files.nbd.exists(), "a stop removes the sockets");
}

/// Both nodes still run, are in step, stop in order, and did not panic.
#[track_caller]
fn end(mut pair: Pair) {
    assert!(pair.node(0).is_running() && pair.node(1).is_running(), "both run; {}", pair.logs());
    pair.primary().client(VOLUME).flush().expect("the node flushes");
    pair.wait_in_step(Duration::from_secs(30)).unwrap_or_else(|text| panic!("{text}"));
    pair.stop_all();
    pair.verify();
    pair.assert_no_panic();
}
