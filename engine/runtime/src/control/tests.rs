//! The control socket by itself: a false node behind it, good clients, bad ones, and crowds.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use twinpoint_core::catalog::CatalogError;
use twinpoint_core::contract::Refusal;
use twinpoint_core::units::{CpNumber, Root, Term, VolumeId};

use super::*;
use crate::status::VolumeStatus;

#[derive(Default)]
struct Fake {
    stops: AtomicU64,
}

impl Operator for Fake {
    fn command(&self, command: Command) -> Reply {
        match command {
            Command::Checkpoint(_) => Reply::Checkpoint(CpNumber(7), Root(255)),
            Command::VolumeCreate { size_bytes: 0, .. } => {
                Reply::Refused(Refusal::Catalog(CatalogError::Full))
            }
            Command::VolumeCreate { .. } => Reply::Volume(VolumeId(3)),
            Command::Promote { force: true } => Reply::Promoted(Term(2), CpNumber(9), Root(7)),
            Command::Promote { force: false } => Reply::Refused(Refusal::PrimaryConnected),
            _ => Reply::Refused(Refusal::NotPrimary),
        }
    }

    fn status(&self) -> Option<NodeStatus> {
        if self.stops.load(Ordering::SeqCst) > 0 {
            return None;
        }
        let volume = VolumeStatus { name: "a".into(), id: 1, size_bytes: 4096, open: 0 };
        Some(NodeStatus { schema: 1, volumes: vec![volume], ..NodeStatus::default() })
    }

    fn stop(&self) {
        self.stops.fetch_add(1, Ordering::SeqCst);
    }
}

const LIMIT: Duration = Duration::from_secs(5);

fn start() -> (tempfile::TempDir, PathBuf, Arc<Fake>, ControlServer) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let fake = Arc::new(Fake::default());
    let server = ControlServer::start(&path, Arc::clone(&fake) as Arc<dyn Operator>).unwrap();
    (folder, path, fake, server)
}

fn talk(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut text = Vec::new();
    // The server closes with our bytes unread; what it said before is still there.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn requests_are_answered() {
    let (_folder, path, fake, server) = start();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let mut client = ControlClient::connect(&path).unwrap();
    let mut ask = |request| client.request(&request, LIMIT);
    assert_eq!(ask(ControlRequest::Status).unwrap().status.unwrap().schema, 1);
    assert_eq!(ask(ControlRequest::VolumeList).unwrap().volumes.unwrap().len(), 1);
    let name = "n".to_owned();
    let reply = ask(ControlRequest::Checkpoint { name: Some(name.clone()) }).unwrap();
    assert_eq!((reply.cp, reply.root), (Some(7), Some(Root(255).to_string())));
    let create = ControlRequest::VolumeCreate { name: name.clone(), size_bytes: 4096 };
    assert_eq!(ask(create).unwrap().volume, Some(3));
    let reply = ask(ControlRequest::Promote { force: true }).unwrap();
    assert_eq!((reply.term, reply.cp), (Some(2), Some(9)));
    let refused = ask(ControlRequest::Promote { force: false }).unwrap_err();
    assert!(matches!(refused, ControlError::Refused { kind, .. } if kind == "primary-connected"));
    let refused = ask(ControlRequest::VolumeDelete { name }).unwrap_err();
    assert!(matches!(refused, ControlError::Refused { kind, .. } if kind == "not-primary"));
    assert!(ask(ControlRequest::Stop).unwrap().ok);
    assert_eq!(fake.stops.load(Ordering::SeqCst), 1);
    let refused = ask(ControlRequest::Status).unwrap_err();
    assert!(matches!(refused, ControlError::Refused { kind, .. } if kind == "away"));
    let begin = Instant::now();
    server.stop();
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
    assert!(!path.exists());
    assert!(matches!(
        client.request(&ControlRequest::Status, LIMIT),
        Err(ControlError::Lost { .. })
    ));
    assert!(matches!(ControlClient::connect(&path), Err(ControlError::Connect { .. })));
}

#[test]
fn lines_are_as_documented() {
    let (_folder, path, _fake, _server) = start();
    let both = b"{\"command\":\"checkpoint\"}\n{\"command\":\"promote\"}\n";
    let text = talk(&path, both);
    let (first, second) = text.split_once('\n').unwrap();
    assert_eq!(first, format!(r#"{{"ok":true,"cp":7,"root":"{}"}}"#, Root(255)));
    assert!(second.starts_with(r#"{"ok":false,"kind":"primary-connected","error":"the primary"#));
}

#[test]
fn no_request_has_fields_of_others() {
    let (_folder, path, fake, _server) = start();
    let requests = [
        r#""command":"status""#,
        r#""command":"checkpoint""#,
        r#""command":"volume-create","name":"a","size_bytes":4096"#,
        r#""command":"volume-delete","name":"a""#,
        r#""command":"volume-list""#,
        r#""command":"promote","force":true"#,
        r#""command":"branch-drop","name":"a""#,
        r#""command":"stop""#,
    ];
    for request in requests {
        for more in [r#""more":1"#, r#""command":"status""#] {
            for line in [format!("{{{request},{more}}}\n"), format!("{{{more},{request}}}\n")] {
                let text = talk(&path, line.as_bytes());
                assert!(text.starts_with(r#"{"ok":false,"kind":"bad-request""#), "{line}{text}");
            }
        }
    }
    assert_eq!(fake.stops.load(Ordering::SeqCst), 0);
    for request in requests {
        let text = talk(&path, format!(" {{{request}}}\n").as_bytes());
        assert!(!text.contains("bad-request"), "{request}: {text}");
    }
}

#[test]
fn the_catalogs_reasons_name_the_volume_and_a_way_out() {
    let (_folder, path, _fake, _server) = start();
    let ask = |name: &str| {
        let request = ControlRequest::VolumeCreate { name: name.to_owned(), size_bytes: 0 };
        ControlClient::connect(&path).unwrap().request(&request, LIMIT).unwrap_err()
    };
    let error = ask("disk");
    assert!(matches!(&error, ControlError::Refused { kind, .. } if kind == "catalog"), "{error}");
    assert_eq!(
        error.to_string(),
        "volume disk is not created: a store has at most 256 volumes: delete one first"
    );
    assert!(ask("\u{1b}[2J").to_string().starts_with("the volume is not"), "no name is no echo");
}

#[test]
fn garbage_gets_one_line_and_is_cut_off() {
    let (_folder, path, _fake, _server) = start();
    let deep = [b"[".repeat(60_000), b"\n".to_vec()].concat();
    let cases: [&[u8]; 12] = [
        b"\n",
        b"hello\n",
        b"[\"status\"]\n",
        b"[\"promote\",true]\n",
        b"\"stop\"\n",
        b"{\"command\":\"explode\"}\n",
        b"{\"command\":\"promote\",\"force\":1}\n",
        b"{\"command\":\"volume-create\",\"name\":\"a\",\"size_bytes\":-1}\n",
        b"\xff\xfe\x00\x00\n{\"command\":\"status\"}\n",
        b"{\"command\":\"status\"",
        &deep,
        &[b'x'; 200_000],
    ];
    for case in cases {
        let text = talk(&path, case);
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        assert!(text.starts_with(r#"{"ok":false,"kind":"bad-request""#), "{text}");
    }
    assert_eq!(talk(&path, b""), "");
    assert!(talk(&path, b"{\"command\":\"status\"}\n").starts_with(r#"{"ok":true,"status""#));
}

#[test]
fn a_crowd_is_turned_away_and_may_come_back() {
    let (_folder, path, _fake, server) = start();
    let crowd: Vec<_> = (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut client = ControlClient::connect(&path).unwrap();
    let refused = client.request(&ControlRequest::Status, LIMIT).unwrap_err();
    assert!(matches!(&refused, ControlError::Refused { kind, .. } if kind == "busy"), "{refused}");
    drop(crowd);
    let served = || {
        let mut client = ControlClient::connect(&path).unwrap();
        client.request(&ControlRequest::Status, LIMIT).is_ok()
    };
    assert!((0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        served()
    }));
    let _idle: Vec<_> = (0..5).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let begin = Instant::now();
    server.stop();
    assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
}

#[test]
fn only_a_dead_socket_is_replaced() {
    let (folder, path, fake, server) = start();
    let again = ControlServer::start(&path, Arc::clone(&fake) as Arc<dyn Operator>);
    assert_eq!(again.err().map(|error| error.kind()), Some(ErrorKind::AddrInUse));
    let dead = folder.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    let second = ControlServer::start(&dead, Arc::clone(&fake) as Arc<dyn Operator>).unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "kept").unwrap();
    let third = ControlServer::start(&file, fake as Arc<dyn Operator>);
    assert_eq!(third.err().map(|error| error.kind()), Some(ErrorKind::AlreadyExists));
    assert_eq!(fs::read(&file).unwrap(), b"kept");
    // Somebody else's socket at the same place stays.
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    server.stop();
    second.stop();
    assert!(path.exists() && !dead.exists());
    drop(other);
}
