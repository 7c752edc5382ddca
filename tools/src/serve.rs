//! `twinpoint serve`: runs a node in the foreground until SIGTERM or SIGINT.
//!
//! Invariant: every mistake that can be seen without the store is told before the store is opened.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use twinpoint_core::catalog::is_name;
use twinpoint_core::coordinator::{OnPeerLoss, Replication};
use twinpoint_core::message::Role;
use twinpoint_runtime::node::{Node, NodeHandle};
use twinpoint_runtime::options::{DeviceMode, NbdAddress, NodeOptions, UblkOptions, UblkVolume};

use crate::address::{is_too_long, parse_listen, parse_nbd, parse_peer, parse_socket};
use crate::failure::{Exit, Failure};
use crate::output::{print, print_json};
use crate::quantity::{parse_bytes, parse_duration};
use crate::store_path::control_socket;
use crate::transport::TransportArgs;

/// Most bytes of a CP unless `--cp-bytes` says otherwise.
const CP_BYTES_DEFAULT: u64 = 32 << 20;
/// Least memory for requests.
const MEMORY_BYTES_MIN: u64 = 8 << 20;
/// Most block devices: each has places in the io_uring of every thread.
const UBLK_MAX: usize = 8;
/// The greatest number of a ublk device.
const UBLK_ID_MAX: u32 = (1 << 20) - 1;
/// Longest time of polling: beyond it a thread sleeps in no load at all.
const POLL_MAX: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Args)]
pub struct Serve {
    /// The store, made by `twinpoint format`: a file or a block device. One node alone can serve it.
    #[arg(long, value_name = "STORE")]
    store: PathBuf,
    /// How the store is driven: by reads and writes, or by NVMe commands of our own, past the kernel's block layer. Those
    /// need a whole NVMe namespace, by its block device or its generic one, such as /dev/nvme0n1 or /dev/ng0n1.
    #[arg(long, value_enum, default_value_t = DeviceFlag::Block)]
    device_mode: DeviceFlag,
    /// With --device-mode passthrough: look for completions instead of being interrupted. Each thread is then busy while it
    /// has commands under way. Needs poll queues: the kernel's parameter nvme.poll_queues.
    #[arg(long)]
    device_poll: bool,
    /// What the node starts as. A primary offers the volumes; a secondary follows a primary. A store that followed a
    /// primary becomes one only by `twinpoint promote`.
    #[arg(long, value_enum, default_value_t = RoleFlag::Primary)]
    role: RoleFlag,
    /// Cores to pin threads to, such as 0,2,4-7: one thread each, the shards go round them. Default: one thread, not
    /// pinned.
    #[arg(long, value_name = "LIST", value_parser = parse_cores, default_value = "", hide_default_value = true)]
    cores: Cores,
    /// Memory for staged writes and reads under way (KiB, MiB, GiB). Writers wait when it is full.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_bytes)]
    memory: u64,
    /// Memory lent to the peer to place its writes in, all shards together (KiB, MiB, GiB). More keeps a long or fast
    /// wire busy. Used with --peer or --listen only.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_bytes)]
    lent_memory: u64,
    /// The other node's --listen address: dialled while this node is primary. Default: no peer.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_peer)]
    peer: Option<String>,
    /// Where a primary may dial this node; port 0 lets the kernel choose. Default: nowhere; a secondary needs it.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_listen)]
    listen: Option<String>,
    /// The key that both nodes share, made by `twinpoint key generate`; mode 0600. Needed with --peer or --listen.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    transport: TransportArgs,
    /// Where NBD clients find the volumes, by name: HOST:PORT, with an IPv6 address in brackets, or unix:PATH; port 0 lets
    /// the kernel choose. May be given several times. Default: nowhere.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_nbd)]
    nbd: Vec<NbdAddress>,
    /// Make a volume a block device of this host, /dev/ublkbID, while this node is primary; needs the driver ublk_drv and
    /// root. Without =ID the kernel chooses one. May be given several times. The device outlives a crash: its users wait
    /// until this node is started again. Default: none.
    #[arg(long, value_name = "VOLUME[=ID]", value_parser = parse_ublk)]
    ublk: Vec<UblkVolume>,
    /// With --ublk: leave the devices waiting at an orderly stop too, for the next start. Otherwise they are deleted:
    /// unmount them first.
    #[arg(long, requires = "ublk")]
    ublk_keep: bool,
    /// With --ublk: answer writes before they are safe, as a disk with a volatile cache does. Faster without flushes; the
    /// devices end with this process, for what was answered and not flushed is lost in a crash.
    #[arg(long, requires = "ublk", conflicts_with = "ublk_keep")]
    ublk_volatile: bool,
    /// The unix socket for `twinpoint status` and its kin, open to this user only. Default: STORE.sock, for a device
    /// /run/twinpoint-NAME.sock.
    #[arg(long, value_name = "SOCKET", value_parser = parse_socket)]
    control: Option<PathBuf>,
    /// When a flush is answered, which is when written data is safe. All but single need --peer on a primary.
    #[arg(long, value_enum, default_value_t = ReplicationFlag::Sync)]
    replication: ReplicationFlag,
    /// What a primary does when its peer is lost for --peer-timeout.
    #[arg(long, value_enum, default_value_t = PeerLossFlag::Stall)]
    on_peer_loss: PeerLossFlag,
    /// Longest time that a write waits for its consistency point when nobody flushes (us, ms, s). Shorter loses less in a
    /// crash, longer joins more overwrites.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    cp_interval: Duration,
    /// Staged bytes that seal a consistency point (KiB, MiB, GiB). Default: 32MiB, but at most a quarter of --memory.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    cp_bytes: Option<u64>,
    /// Most consistency points sealed and not answered at a time, 1 to 64 (count). More hide the latency of device and
    /// wire.
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    cp_in_flight: u8,
    /// Silence after which the peer is lost (ms, s), at least 100ms.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    peer_timeout: Duration,
    /// With async: most consistency points that the secondary may be behind (count); writers are held back there.
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    lag_points: u64,
    /// With async: most bytes that the secondary may be behind (KiB, MiB, GiB); writers are held back there.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_bytes)]
    lag_bytes: u64,
    /// With async: longest time that the secondary may be behind (ms, s); writers are held back there.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    lag_time: Duration,
    /// How long an idle thread polls before it sleeps (us, ms). Longer answers faster and uses more CPU; 0us never
    /// polls, 1s is the longest.
    #[arg(long, value_name = "DURATION", default_value = "50us", value_parser = parse_duration)]
    poll: Duration,
    /// Entries of each ring between threads (count): a power of two, 64 to 65536. A full ring makes its sender wait.
    #[arg(long, value_name = "COUNT", default_value_t = 4096)]
    ring_entries: usize,
    /// Accept a file system that knows no direct access. For trials: slower, and a power cut may take more.
    #[arg(long)]
    buffered: bool,
    /// Print the line that says the node is ready as JSON.
    #[arg(long)]
    json: bool,
}

/// Which cores; a type of its own, so that the flag takes one list.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Cores(Vec<usize>);

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceFlag {
    /// Reads and writes of a file or block device
    Block,
    /// NVMe commands
    Passthrough,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RoleFlag {
    /// Takes writes
    Primary,
    /// Follows a primary
    Secondary,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReplicationFlag {
    /// Committed on this store; there is no other
    Single,
    /// Committed on both stores
    Sync,
    /// Committed on this store, and whole in the secondary's memory
    SemiSync,
    /// Committed on this store, and the secondary at most --lag-points, --lag-bytes and --lag-time behind
    Async,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PeerLossFlag {
    /// Flushes wait for it: nothing is ever answered that one store alone has
    Stall,
    /// Carry on alone, after writing so into the store
    Continue,
}

impl Serve {
    /// Serves until a signal or a command stops the node.
    ///
    /// # Errors
    /// If the flags make no sense, or the node does not start or ends by itself.
    pub fn run(self) -> Result<(), Failure> {
        let json = self.json;
        let options = self.options()?;
        let signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| {
            Failure::failed("signals", format!("cannot catch signals: {error}"))
        })?;
        let (store, control) = (options.store.clone(), options.control.clone());
        let role = if options.role == Role::Primary { "primary" } else { "secondary" };
        let node = Node::start(options)?;
        stop_at_signal(signals, node.handle())?;
        let nbd: Vec<String> = node.nbd_addresses().iter().map(address_text).collect();
        let listen = node.listen_address().map(|address| address.to_string());
        let ublk = node.block_devices();
        if json {
            print_json(&json!({
                "ready": true,
                "role": role,
                "store": store.display().to_string(),
                "nbd": nbd,
                "ublk": ublk,
                "listen": listen,
                "control": control.display().to_string(),
            }));
        } else {
            let nbd: String = nbd.iter().map(|address| format!(" nbd={address}")).collect();
            let ublk: String = ublk.iter().map(|path| format!(" ublk={path}")).collect();
            let listen = listen.map(|address| format!(" listen={address}")).unwrap_or_default();
            print(&format!("ready role={role}{nbd}{ublk}{listen} control={}\n", control.display()));
        }
        Ok(node.wait()?)
    }

    /// Checks the flags, and gives them the form that the node takes.
    fn options(self) -> Result<NodeOptions, Failure> {
        self.check_device()?;
        self.check_pair()?;
        self.check_numbers()?;
        check_ublk(&self.ublk)?;
        let cp_bytes = self.cp_bytes.unwrap_or(CP_BYTES_DEFAULT.min(self.memory / 4));
        let control = self.control.unwrap_or_else(|| control_socket(&self.store));
        if is_too_long(&control) {
            let text = "the store's path is too long for a socket beside it: give a shorter one as --control";
            return Err(Failure::usage(text));
        }
        if let Some(file) = &self.key_file {
            rdma_fallback::Key::load(file)?;
        }
        let (transport, rdma) = self.transport.options()?;
        Ok(NodeOptions {
            transport,
            rdma,
            device: match self.device_mode {
                DeviceFlag::Block => DeviceMode::Block,
                DeviceFlag::Passthrough => DeviceMode::Passthrough { is_polled: self.device_poll },
            },
            store: self.store,
            role: match self.role {
                RoleFlag::Primary => Role::Primary,
                RoleFlag::Secondary => Role::Secondary,
            },
            cores: self.cores.0,
            memory_bytes: self.memory,
            lent_bytes: self.lent_memory,
            peer: self.peer,
            listen: self.listen,
            key_file: self.key_file,
            nbd: self.nbd,
            ublk: UblkOptions {
                volumes: self.ublk,
                keep: self.ublk_keep,
                volatile: self.ublk_volatile,
            },
            control,
            replication: match self.replication {
                // Without a peer the modes are one.
                ReplicationFlag::Single | ReplicationFlag::Sync => Replication::Sync,
                ReplicationFlag::SemiSync => Replication::SemiSync,
                ReplicationFlag::Async => Replication::Async,
            },
            on_peer_loss: match self.on_peer_loss {
                PeerLossFlag::Stall => OnPeerLoss::Stall,
                PeerLossFlag::Continue => OnPeerLoss::Continue,
            },
            cp_interval: self.cp_interval,
            cp_bytes,
            cp_in_flight: usize::from(self.cp_in_flight),
            peer_timeout: self.peer_timeout,
            lag_points: self.lag_points,
            lag_bytes: self.lag_bytes,
            lag_time: self.lag_time,
            poll: self.poll,
            ring_entries: self.ring_entries,
            buffered: self.buffered,
        })
    }

    /// Whether the ways to drive the store go together.
    fn check_device(&self) -> Result<(), Failure> {
        let is_passthrough = self.device_mode == DeviceFlag::Passthrough;
        if self.device_poll && !is_passthrough {
            return Err(Failure::usage(
                "--device-poll is for NVMe commands: give --device-mode passthrough too, or leave it away",
            ));
        }
        if self.buffered && is_passthrough {
            return Err(Failure::usage(
                "--buffered is for files: leave it or --device-mode passthrough away",
            ));
        }
        Ok(())
    }

    /// Whether role, peer, key and mode go together.
    fn check_pair(&self) -> Result<(), Failure> {
        let single = self.replication == ReplicationFlag::Single;
        if single && self.peer.is_some() {
            return Err(Failure::usage(
                "--replication single has no peer: leave --peer away, or choose sync",
            ));
        }
        if self.role == RoleFlag::Secondary && self.listen.is_none() {
            return Err(Failure::usage(
                "a secondary needs --listen HOST:PORT, where its primary dials it",
            ));
        }
        if self.role == RoleFlag::Primary && self.peer.is_none() && !single {
            return Err(Failure::usage(
                "a replicated primary needs --peer HOST:PORT: give it, or --replication single",
            ));
        }
        if (self.peer.is_some() || self.listen.is_some()) && self.key_file.is_none() {
            return Err(Failure::usage(
                "--peer and --listen need --key-file: make one with `twinpoint key generate FILE`",
            ));
        }
        Ok(())
    }

    /// Whether every number can be.
    fn check_numbers(&self) -> Result<(), Failure> {
        if self.memory < MEMORY_BYTES_MIN {
            return Err(Failure::usage("--memory is too small: give at least 8MiB"));
        }
        if self.cp_bytes.is_some_and(|bytes| bytes == 0 || bytes > self.memory / 2) {
            return Err(Failure::usage(
                "--cp-bytes is 0 or more than half of --memory: change one of them",
            ));
        }
        if self.cp_interval.is_zero() {
            return Err(Failure::usage("--cp-interval is 0: give at least 1us, such as 100ms"));
        }
        if self.poll > POLL_MAX {
            return Err(Failure::usage("--poll is longer than 1s: give less, such as 50us"));
        }
        if self.peer_timeout < Duration::from_millis(100) {
            return Err(Failure::usage("--peer-timeout is too short: give at least 100ms"));
        }
        if !(64..=65536).contains(&self.ring_entries) || !self.ring_entries.is_power_of_two() {
            return Err(Failure::usage(
                "--ring-entries is no power of two from 64 to 65536: give such as 4096",
            ));
        }
        if self.replication == ReplicationFlag::Async
            && (self.lag_points == 0 || self.lag_bytes == 0 || self.lag_time.is_zero())
        {
            return Err(Failure::usage(
                "a lag of 0 holds every writer: give --lag-points, --lag-bytes and --lag-time, or choose sync",
            ));
        }
        Ok(())
    }
}

/// The first signal stops the node in order, the second one at once.
fn stop_at_signal(mut signals: Signals, node: NodeHandle) -> Result<(), Failure> {
    let wait = move || {
        let mut arrived = signals.forever();
        if arrived.next().is_some() {
            node.stop();
        }
        if arrived.next().is_some() {
            std::process::exit(Exit::Failed as i32);
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(wait);
    thread
        .map(drop)
        .map_err(|error| Failure::failed("signals", format!("cannot start a thread: {error}")))
}

fn address_text(address: &NbdAddress) -> String {
    match address {
        NbdAddress::Tcp(address) => address.clone(),
        NbdAddress::Unix(path) => format!("unix:{}", path.display()),
    }
}

/// Whether volumes and ids are each there once, and not too many.
fn check_ublk(volumes: &[UblkVolume]) -> Result<(), Failure> {
    if volumes.len() > UBLK_MAX {
        return Err(Failure::usage("--ublk is given more than 8 times: serve the others by --nbd"));
    }
    for (index, volume) in volumes.iter().enumerate() {
        let same = |other: &UblkVolume| {
            other.name == volume.name || other.id.is_some() && other.id == volume.id
        };
        if volumes[..index].iter().any(same) {
            return Err(Failure::usage("--ublk names a volume or an id twice: give each once"));
        }
    }
    Ok(())
}

fn parse_ublk(text: &str) -> Result<UblkVolume, String> {
    let (name, id) = match text.rsplit_once('=') {
        None => (text, None),
        Some((name, id)) => {
            let id = id.parse::<u32>().ok().filter(|id| *id <= UBLK_ID_MAX);
            let id = id.ok_or("after = comes the device's number, such as disk=0")?;
            (name, Some(id))
        }
    };
    if name.is_empty() {
        return Err("the name of a volume is missing, such as disk or disk=0".to_owned());
    }
    if !is_name(name) {
        return Err(
            "no volume has such a name: letters, digits, dots, dashes and underscores".to_owned()
        );
    }
    Ok(UblkVolume { name: name.to_owned(), id })
}

fn parse_cores(text: &str) -> Result<Cores, String> {
    let wrong = || "cores are numbers and ranges, each once, such as 0,2,4-7".to_owned();
    let mut cores = Vec::new();
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: u16 = first.parse().map_err(|_| wrong())?;
        let last: u16 = last.parse().map_err(|_| wrong())?;
        if first > last {
            return Err(wrong());
        }
        cores.extend((first..=last).map(usize::from));
    }
    let mut sorted = cores.clone();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) { Err(wrong()) } else { Ok(Cores(cores)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_devices_have_a_volume_and_perhaps_a_number() {
        let volume = |name: &str, id| UblkVolume { name: name.to_owned(), id };
        assert_eq!(parse_ublk("disk").unwrap(), volume("disk", None));
        assert_eq!(parse_ublk("a.b-c=7").unwrap(), volume("a.b-c", Some(7)));
        for text in [
            "",
            "=1",
            "a=b=7",
            "a/b",
            "disk=",
            "disk=x",
            "disk=-1",
            "disk=4294967296",
            "disk=1048576",
        ] {
            assert!(parse_ublk(text).is_err(), "{text}");
        }
        assert!(
            check_ublk(&[volume("a", Some(1)), volume("b", Some(2)), volume("c", None)]).is_ok()
        );
        assert!(check_ublk(&[volume("a", Some(1)), volume("b", Some(1))]).is_err());
        assert!(check_ublk(&[volume("a", None), volume("a", Some(1))]).is_err());
    }

    #[test]
    fn lists_of_cores() {
        assert_eq!(parse_cores("").unwrap().0, [0_usize; 0]);
        assert_eq!(parse_cores("3,0-2").unwrap().0, [3, 0, 1, 2]);
        for text in ["a", "1,", "1-", "2-1", "1,1", "0-2,1", "-1", "70000"] {
            assert!(parse_cores(text).is_err(), "{text}");
        }
    }
}
