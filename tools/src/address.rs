//! Address: where nodes and clients find each other, as operators write it. Invariant: what no host could ever bind or
//! dial is wrong usage, and is told before anything is opened.

use std::net::{Ipv4Addr, SocketAddrV6};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use twinpoint_runtime::control::SOCKET_PATH_BYTES_MAX;
use twinpoint_runtime::options::NbdAddress;

/// Longest name of a host.
const HOST_BYTES_MAX: usize = 253;

/// An address to listen at: `HOST:PORT`, where port 0 lets the kernel choose.
///
/// # Errors
/// What an address looks like.
pub fn parse_listen(text: &str) -> Result<String, String> {
    port_of(text).map(|_| text.to_owned())
}

/// An address to dial: `HOST:PORT`.
///
/// # Errors
/// What an address looks like.
pub fn parse_peer(text: &str) -> Result<String, String> {
    match port_of(text)? {
        0 => {
            Err("nobody can be dialled at port 0: give the port of the peer's --listen".to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

/// Where NBD clients connect: `HOST:PORT` or `unix:PATH`.
///
/// # Errors
/// What an address looks like.
pub fn parse_nbd(text: &str) -> Result<NbdAddress, String> {
    let Some(path) = text.strip_prefix("unix:") else {
        let address = parse_listen(text).map(NbdAddress::Tcp);
        return address.map_err(|error| format!("{error}; or unix:PATH"));
    };
    if path.ends_with('/') || Path::new(path).file_name().is_none() {
        return Err("a unix socket is unix:PATH, such as unix:/run/disk.nbd".to_owned());
    }
    parse_socket(path).map(NbdAddress::Unix)
}

/// The path of a unix socket.
///
/// # Errors
/// That it is empty or too long.
pub fn parse_socket(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if text.is_empty() {
        return Err("a path is needed, such as /run/twinpoint/disk.sock".to_owned());
    }
    if is_too_long(&path) {
        let bytes = text.len();
        return Err(format!(
            "a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, this one {bytes}: choose a shorter one"
        ));
    }
    Ok(path)
}

/// Whether the kernel takes no socket of this path.
#[must_use]
pub fn is_too_long(path: &Path) -> bool {
    path.as_os_str().as_bytes().len() > SOCKET_PATH_BYTES_MAX
}

fn port_of(text: &str) -> Result<u16, String> {
    let wrong = || "an address is HOST:PORT, such as 10.0.0.2:7000 or [fd00::2]:7000".to_owned();
    if text.starts_with('[') {
        return text.parse::<SocketAddrV6>().map(|address| address.port()).map_err(|_| wrong());
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    if !is_host(host) || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    port.parse().map_err(|_| wrong())
}

/// A name, or an IPv4 address: what ends in a number is no name.
fn is_host(host: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    let ends_in_number = name
        .rsplit('.')
        .next()
        .is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= HOST_BYTES_MAX
        && name.split('.').all(is_label)
        && (!ends_in_number || host.parse::<Ipv4Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_bound() {
        for text in
            ["10.0.0.2:7000", "[::1]:0", "[fd00::2]:7000", "a:1", "a-b.example.org.:65535", "n1:0"]
        {
            assert_eq!(parse_listen(text).as_deref(), Ok(text));
            assert_eq!(parse_nbd(text), Ok(NbdAddress::Tcp(text.to_owned())));
        }
        for text in [
            "",
            ":",
            "a",
            "a:",
            ":1",
            "a:70000",
            "a:+80",
            "a:-1",
            "a:8x",
            "::1:80",
            "[::1]",
            "[::1:80",
            "::1]:80",
            "[zz]:1",
            "[::1]80",
            "300.1.1.1:80",
            "1.2.3:80",
            "1.2.3.4.5:80",
            "7:80",
            "a b:1",
            "a..b:1",
            "/a:1",
            "tcp://a:1",
            "a/b:1",
            "ä:1",
        ] {
            assert!(parse_listen(text).unwrap_err().contains("HOST:PORT"), "{text}");
            assert!(parse_nbd(text).unwrap_err().contains("unix:PATH"), "{text}");
        }
        assert!(parse_peer("a:0").unwrap_err().contains("--listen"));
        assert!(parse_peer("a:1").is_ok());
    }

    #[test]
    fn sockets() {
        assert_eq!(parse_nbd("unix:/a"), Ok(NbdAddress::Unix("/a".into())));
        let longest = format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX - 1));
        assert!(parse_nbd(&format!("unix:{longest}")).is_ok());
        for text in ["unix:", "unix:/", "unix:.", "unix:..", "unix:a/", &format!("unix:{longest}x")]
        {
            assert!(parse_nbd(text).is_err(), "{text}");
        }
        assert!(parse_socket("").is_err() && parse_socket(&format!("{longest}x")).is_err());
    }
}
