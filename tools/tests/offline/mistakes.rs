//! Mistakes get one line that says what to do; help names units and defaults.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::fixture::{self, Fixture, run, twinpoint};

/// One byte more than the kernel takes for a socket.
const LONG_PATH: &str = concat!(
    "/nowhere/0123456789012345678901234567890123456789012345678",
    "01234567890123456789012345678901234567890123456789"
);
const LONG_NBD: &str = concat!(
    "unix:/nowhere/0123456789012345678901234567890123456789012345678",
    "01234567890123456789012345678901234567890123456789"
);
const GUIDE: &str = include_str!("../../../docs/OPERATING.md");
const UNIT: &str = include_str!("../../twinpoint@.service");

#[test]
fn wrong_usage_is_one_line_and_touches_nothing() {
    // Nothing is at this path: what is told is the flags' mistake, before the store is looked for.
    let serve = |flags: &[&'static str]| [&["serve", "--store", "/nowhere/store"], flags].concat();
    let single = |flags: &[&'static str]| [&serve(&["--replication", "single"]), flags].concat();
    let (long_path, long_nbd): (&'static str, &'static str) = (LONG_PATH, LONG_NBD);
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec!["fromat"], "format"),
        (vec!["format"], "<STORE>"),
        (vec!["format", "a", "--size", "12k"], "512MiB"),
        (vec!["format", "a", "--store-id", "xyz"], "32 hexadecimal digits"),
        (vec!["status"], "--control"),
        (vec!["status", "--control", "a", "--store", "b"], "cannot be used with"),
        (vec!["promote"], "--store"),
        (vec!["promote", "--store", "a", "--force"], "cannot be used with"),
        (vec!["volume", "create", "a", "1000", "--control", "x"], "4KiB"),
        (vec!["serve"], "--store"),
        (serve(&[]), "--replication single"),
        (serve(&["--role", "secondary"]), "--listen"),
        (serve(&["--peer", "a:1"]), "--key-file"),
        (serve(&["--peer", "a"]), "HOST:PORT"),
        (serve(&["--peer", "a:0"]), "port 0"),
        (serve(&["--peer", "::1:7000"]), "[fd00::2]:7000"),
        (single(&["--listen", "300.1.1.1:7000"]), "HOST:PORT"),
        (single(&["--nbd", "127.0.0.1"]), "HOST:PORT"),
        (single(&["--nbd", "::1:10809"]), "[fd00::2]:7000"),
        (single(&["--nbd", "tcp://a:1"]), "unix:PATH"),
        (single(&["--nbd", "unix:/"]), "unix:PATH"),
        (single(&["--nbd", long_nbd]), "107 bytes"),
        (single(&["--control", long_path]), "107 bytes"),
        (vec!["serve", "--replication", "single", "--store", long_path], "--control"),
        (vec!["status", "--control", long_path], "107 bytes"),
        (vec!["status", "--store", long_path], "--control"),
        (single(&["--poll", "1h"]), "1s"),
        (single(&["--lag-points", "-1"]), "a whole number"),
        (single(&["--ring-entries", "many"]), "a whole number"),
        (vec!["volume", "create", "a b", "4KiB", "--control", "x"], "A-Z"),
        (vec!["volume", "create", long_path, "4KiB", "--control", "x"], "A-Z"),
        (vec!["volume", "create", "a", "0", "--control", "x"], "4KiB"),
        (vec!["volume", "create", "a", "-5", "--control", "x"], "512MiB"),
        (vec!["volume", "create", "a", "33PiB", "--control", "x"], "32PiB"),
        (vec!["volume", "delete", "a/b", "--control", "x"], "A-Z"),
        (vec!["checkpoint", "a\nb", "--control", "x"], "control characters"),
        (vec!["checkpoint", long_path, "--control", "x"], "64 bytes"),
        (vec!["inspect", "a", "--record", "-1"], "a whole number"),
        (single(&["--peer", "a:1", "--key-file", "k"]), "leave --peer away"),
        (single(&["--nbd", "/path"]), "unix:PATH"),
        (single(&["--cores", "0-"]), "0,2,4-7"),
        (single(&["--memory", "1MiB"]), "8MiB"),
        (single(&["--cp-bytes", "1GiB"]), "--memory"),
        (single(&["--cp-interval", "5"]), "500ms"),
        (single(&["--cp-in-flight", "0"]), "1..=64"),
        (single(&["--ring-entries", "1000"]), "power of two"),
        (single(&["--peer-timeout", "1ms"]), "100ms"),
        (single(&["--device-mode", "nvme"]), "passthrough"),
        (single(&["--device-poll"]), "--device-mode passthrough"),
        (single(&["--device-mode", "passthrough", "--buffered"]), "--buffered is for files"),
    ];
    for (arguments, advice) in cases {
        let (code, stdout, stderr) = run(&arguments);
        assert_eq!((code, &*stdout), (2, ""), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("twinpoint: ") && stderr.contains(advice), "{stderr}");
        let (code, _, stderr) = run(&[&arguments[..], &["--json"]].concat());
        let error: Value = serde_json::from_str(&stderr).unwrap();
        assert_eq!((code, &error["exit_code"], &error["ok"]), (2, &2.into(), &false.into()));
    }
}

#[test]
fn what_is_no_namespace_takes_no_commands() {
    let folder = fixture::folder();
    let store = Fixture::new(folder.path(), "store", 1, 7);
    let before = fs::read(store.text()).unwrap();
    for path in [store.text(), "/dev/null"] {
        let flags = ["--replication", "single", "--device-mode", "passthrough"];
        let (code, stdout, stderr) = run(&[&["serve", "--store", path], &flags[..]].concat());
        assert_eq!((code, &*stdout, stderr.lines().count()), (2, "", 1), "{stderr}");
        let says = stderr.contains(path) && stderr.contains("no namespace of an NVMe device");
        assert!(says && stderr.contains("leave --device-mode away"), "{stderr}");
    }
    assert!(fs::read(store.text()).unwrap() == before, "nothing was written");
}

#[test]
fn no_node_is_told() {
    let folder = fixture::folder();
    let socket = folder.path().join("none");
    let socket = socket.to_str().unwrap();
    let cases: [&[&str]; 5] =
        [&["status"], &["checkpoint", "name"], &["volume", "list"], &["stop"], &["promote"]];
    for command in cases {
        let (code, _, stderr) = run(&[command, &["--control", socket]].concat());
        assert!(code == 5 && stderr.contains("is `twinpoint serve` running"), "{stderr}");
    }
    let (code, _, stderr) = run(&["status", "--store", socket]);
    assert!(code == 5 && stderr.contains("none.sock"), "{stderr}");
}

#[test]
fn keys_are_made_once_and_checked() {
    let folder = fixture::folder();
    let path = folder.path().join("key");
    let text = path.to_str().unwrap();
    assert_eq!(run(&["key", "generate", text]).0, 0);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let key = std::fs::read(&path).unwrap();
    assert_eq!(key.len(), 65);
    assert_eq!(run(&["key", "generate", text]).0, 6);
    assert_eq!(std::fs::read(&path).unwrap(), key);
    let serve = ["serve", "--store", "/nowhere", "--role", "secondary", "--listen", "127.0.0.1:0"];
    let serve = [&serve[..], &["--key-file", text]].concat();
    let (code, _, stderr) = run(&serve);
    assert!(code == 1 && stderr.contains("/nowhere"), "a good key is no obstacle: {stderr}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, _, stderr) = run(&serve);
    assert!(code == 1 && stderr.contains("mode 644"), "{stderr}");
    assert_eq!(run(&["key", "generate", "/nowhere/key"]).0, 1);
}

#[test]
fn help_names_units_defaults_and_exit_codes() {
    let help = |arguments: &[&str]| {
        let output = twinpoint(&[arguments, &["--help"]].concat());
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let top = help(&[]);
    for code in 0..=7 {
        assert!(top.contains(&format!("\n  {code}  ")), "{top}");
    }
    assert!(!top.contains("\n  8  "), "{top}");
    let commands: [&[&str]; 13] = [
        &["format"],
        &["serve"],
        &["status"],
        &["checkpoint"],
        &["promote"],
        &["volume", "create"],
        &["volume", "list"],
        &["volume", "delete"],
        &["stop"],
        &["inspect"],
        &["verify"],
        &["key", "generate"],
        &["volume"],
    ];
    for command in commands {
        let text = help(command);
        for flag in text.split("\n      --").skip(1) {
            let has = |words: &[&str]| words.iter().any(|word| flag.contains(word));
            let name = flag.lines().next().unwrap();
            assert!(!name.contains("<SIZE>") || has(&["KiB"]), "{command:?} --{flag}");
            assert!(!name.contains("<DURATION>") || has(&["(us, ms", "(ms, s"]), "--{flag}");
            assert!(!name.contains("<COUNT>") || has(&["(count)"]), "{command:?} --{flag}");
            let is_serves_store = *command == ["serve"] && has(&["<STORE>"]);
            let needs_default = name.contains('<') && !is_serves_store;
            assert!(!needs_default || has(&["[default:", "Default:", "Needed"]), "--{flag}");
        }
    }
}

#[test]
fn the_guide_has_the_exit_codes_of_the_help() {
    let help = twinpoint(&["--help"]).stdout;
    let help = String::from_utf8(help).unwrap();
    let (_, codes) = help.split_once("Exit codes").unwrap();
    let lines: Vec<&str> = codes.lines().filter(|line| line.starts_with("  ")).collect();
    assert_eq!(lines.len(), 8, "{codes}");
    let guide = GUIDE.replace('`', "");
    for line in lines {
        let (code, meaning) = line.trim().split_once("  ").unwrap();
        assert!(guide.contains(&format!("| {code} | {meaning} |")), "| {code} | {meaning} |");
    }
}

#[test]
fn the_service_unit_and_the_guide_use_flags_that_there_are() {
    let help = String::from_utf8(twinpoint(&["serve", "--help"]).stdout).unwrap();
    let guide: String = GUIDE.lines().filter(|line| line.starts_with("TWINPOINT_FLAGS=")).collect();
    assert!(!guide.is_empty() && UNIT.contains("$TWINPOINT_FLAGS"), "{guide}");
    let is_flag = |word: &&str| word.starts_with("--");
    for flag in UNIT.split_whitespace().chain(guide.split(['"', ' '])).filter(is_flag) {
        assert!(help.contains(&format!("\n      {flag}")), "serve has no {flag}");
    }
}
