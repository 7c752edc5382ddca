//! Pair: two stores and the nodes that serve them, of which either may be primary, secondary, or dead.
//!
//! Invariants: the two nodes' addresses stay the same for the pair's life, so that either finds the other after a
//! change of roles; each pair has loopback addresses of its own, so pairs of different tests never meet.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::load;
use super::node::{NODE_TIME_MAX, Node, NodeFiles};
use super::programs::twinpoint;
use super::sector::{SECTOR_BYTES, Sector};
use super::space::Space;

/// The volume of the pair.
pub const VOLUME: &str = "disk";

/// How the pair is made and served.
#[derive(Clone, Debug)]
pub struct PairPlan {
    /// One store without a peer, if false.
    pub paired: bool,
    /// `sync`, `semi-sync` or `async`.
    pub replication: &'static str,
    /// `stall` or `continue`.
    pub on_peer_loss: &'static str,
    /// Flags of `serve` besides, for both nodes.
    pub flags: Vec<String>,
    /// Size of each store, as `format` takes it.
    pub store_size: &'static str,
    /// Journal of each shard.
    pub journal: &'static str,
    /// Shards.
    pub shards: u16,
    /// Size of the volume in bytes.
    pub volume_bytes: u64,
}

impl Default for PairPlan {
    fn default() -> PairPlan {
        PairPlan {
            paired: true,
            replication: "sync",
            on_peer_loss: "stall",
            flags: flags(&["--cp-interval", "20ms", "--peer-timeout", "1s", "--memory", "64MiB"]),
            store_size: "512MiB",
            journal: "4MiB",
            shards: 4,
            volume_bytes: 32 << 20,
        }
    }
}

/// Flags as owned text.
pub fn flags(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

/// See the module.
pub struct Pair {
    /// Where everything lies.
    pub space: Space,
    /// How it was made.
    pub plan: PairPlan,
    /// Paths of both nodes.
    pub files: [NodeFiles; 2],
    addresses: [SocketAddrV4; 2],
    nodes: [Option<Node>; 2],
    /// Which of the two is primary.
    primary: usize,
}

impl Pair {
    /// Formats the stores, starts the nodes, creates the volume.
    pub fn new(plan: PairPlan) -> Pair {
        let mut pair = Pair::formatted(plan);
        if pair.plan.paired {
            pair.start(1);
        }
        pair.start(0);
        pair.create_volume(VOLUME, pair.plan.volume_bytes);
        pair
    }

    /// Formats the stores only.
    pub fn formatted(plan: PairPlan) -> Pair {
        let space = Space::new();
        let files = ["a", "b"].map(|name| NodeFiles::new(space.folder(), name));
        let [first, second] = own_addresses();
        let pair = Pair {
            space,
            plan,
            files,
            addresses: [first, second],
            nodes: [None, None],
            primary: 0,
        };
        let report = pair.format(0, None);
        let id = report["store"].as_str().expect("format tells the store's id").to_owned();
        if pair.plan.paired {
            pair.format(1, Some(&id));
            let key = pair.key_path();
            twinpoint(&["key", "generate", &key]).success();
        }
        pair
    }

    fn format(&self, index: usize, store_id: Option<&str>) -> Value {
        let path = self.store_path(index);
        let shards = self.plan.shards.to_string();
        // Alone, a primary keeps all that the peer misses, or gives up the base: each shard's journal has to hold a whole
        // load's CPs and each shard's space its data, 12,000 commands of 13 KiB, though half go to one hot shard.
        let (size, journal) = match self.plan.on_peer_loss {
            "continue" => ("1536MiB", "64MiB"),
            _ => (self.plan.store_size, self.plan.journal),
        };
        let mut arguments = vec!["format", &path, "--size", size, "--shards", &shards];
        arguments.extend(["--journal", journal, "--prefill", "none", "--json"]);
        arguments.extend(store_id.iter().flat_map(|id| ["--store-id", id]));
        serde_json::from_str(&twinpoint(&arguments).success()).expect("format prints JSON")
    }

    /// Starts a node in the role it has.
    pub fn start(&mut self, index: usize) {
        assert!(self.nodes[index].is_none(), "{} runs already", self.files[index].name);
        let role = if index == self.primary { "primary" } else { "secondary" };
        self.nodes[index] = Some(Node::start(&self.files[index], &self.serve_flags(index, role)));
    }

    /// The flags of `serve` for a node in a role, besides its paths.
    pub fn serve_flags(&self, index: usize, role: &str) -> Vec<String> {
        let mut all = flags(&["--role", role]);
        if self.plan.paired {
            let (listen, peer) = (self.addresses[index], self.addresses[1 - index]);
            all.extend(["--listen".to_owned(), listen.to_string()]);
            all.extend(["--peer".to_owned(), peer.to_string()]);
            all.extend(["--key-file".to_owned(), self.key_path()]);
            all.extend(flags(&["--replication", self.plan.replication]));
            all.extend(flags(&["--on-peer-loss", self.plan.on_peer_loss]));
        } else {
            all.extend(flags(&["--replication", "single"]));
        }
        all.extend(self.plan.flags.iter().cloned());
        all
    }

    /// Where the shared key lies.
    pub fn key_path(&self) -> String {
        self.space.path("key").display().to_string()
    }

    /// Where a store lies.
    pub fn store_path(&self, index: usize) -> String {
        self.files[index].store.display().to_string()
    }

    /// The index of the node that is primary.
    pub fn primary_index(&self) -> usize {
        self.primary
    }

    /// Says who is primary from now on; for roles that change while a node is down.
    pub fn set_primary(&mut self, index: usize) {
        self.primary = index;
    }

    /// A running node.
    #[track_caller]
    pub fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().unwrap_or_else(|| panic!("{} runs", self.files[index].name))
    }

    /// The running primary.
    #[track_caller]
    pub fn primary(&self) -> &Node {
        self.node(self.primary)
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) {
        self.nodes[index].take().expect("the node runs").kill();
    }

    /// Stops one node in order.
    #[track_caller]
    pub fn stop(&mut self, index: usize) {
        self.nodes[index].take().expect("the node runs").stop();
    }

    /// Stops both in order, the primary first.
    #[track_caller]
    pub fn stop_all(&mut self) {
        for index in [self.primary, 1 - self.primary] {
            if self.nodes[index].is_some() {
                self.stop(index);
            }
        }
    }

    /// Creates a volume on the primary.
    #[track_caller]
    pub fn create_volume(&self, name: &str, bytes: u64) {
        let control = self.files[self.primary].control.display().to_string();
        let size = format!("{bytes}B");
        twinpoint(&["volume", "create", name, &size, "--control", &control]).success();
    }

    /// Promotes the secondary, as soon as it knows that its primary is gone; gives the reply of the tool.
    #[track_caller]
    pub fn promote(&mut self) -> Value {
        let index = 1 - self.primary;
        let control = self.files[index].control.display().to_string();
        let deadline = Instant::now() + NODE_TIME_MAX;
        let reply = loop {
            let outcome = twinpoint(&["promote", "--control", &control, "--json"]);
            let is_early = outcome.stderr.contains("primary-connected");
            if !is_early || Instant::now() > deadline {
                break outcome.success();
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.primary = index;
        let reply: Value = serde_json::from_str(&reply).expect("promote prints JSON");
        assert_eq!(reply["root"].as_str().map(str::len), Some(32), "{reply}");
        reply
    }

    /// Reads and parses the whole volume on the primary.
    ///
    /// # Errors
    /// If that fails, or a sector is damaged.
    pub fn image(&self) -> Result<Vec<Sector>, String> {
        let sectors = self.plan.volume_bytes / SECTOR_BYTES as u64;
        load::read_image(self.primary().files().nbd.clone(), VOLUME, sectors)
    }

    /// Waits until both nodes have committed the same CP, and checks that their roots are equal. Gives the CP.
    ///
    /// # Errors
    /// If they are not in step in time.
    pub fn wait_in_step(&self, limit: Duration) -> Result<u64, String> {
        let deadline = Instant::now() + limit;
        loop {
            let (primary, secondary) =
                (self.primary().status(), self.node(1 - self.primary).status());
            let cp = |status: &Value| status["cp"]["local"].as_u64().expect("a CP's number");
            let connected = primary["peer"]["state"] == "connected";
            let idle = primary["cp"]["open"].as_u64() == Some(cp(&primary) + 1);
            if connected && idle && cp(&primary) == cp(&secondary) {
                assert_eq!(
                    primary["root"],
                    secondary["root"],
                    "roots at CP {}: {primary}\n{secondary}",
                    cp(&primary)
                );
                return Ok(cp(&primary));
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "not in step within {limit:?}:\nprimary {primary}\nsecondary {secondary}\n{}\n{}",
                    self.files[0].log_end(),
                    self.files[1].log_end()
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs `verify` on the stores of stopped nodes, and compares them.
    #[track_caller]
    pub fn verify(&self) {
        self.verify_one(0);
        if self.plan.paired {
            self.verify_one(1);
            twinpoint(&["verify", &self.store_path(0), &self.store_path(1)]).success();
        }
    }

    /// Runs `verify` on the store of a stopped or killed node.
    #[track_caller]
    pub fn verify_one(&self, index: usize) {
        let path = self.store_path(index);
        twinpoint(&["verify", &path]).success();
    }

    /// Both logs, for messages.
    pub fn logs(&self) -> String {
        format!("{}\n{}", self.files[0].log_end(), self.files[1].log_end())
    }

    /// Checks that no node panicked in any of its runs.
    #[track_caller]
    pub fn assert_no_panic(&self) {
        self.files.iter().for_each(NodeFiles::assert_no_panic);
    }
}

/// Two addresses with ports that the kernel chose. The port is free again when this returns; nobody else takes it, for
/// nobody else uses this loopback address.
fn own_addresses() -> [SocketAddrV4; 2] {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id();
    let part = |shift: u32| (process >> shift) as u8;
    let last = NEXT.fetch_add(1, Ordering::SeqCst);
    let address = Ipv4Addr::new(127, part(8) | 1, part(0), last);
    let reserve = || {
        let listener = TcpListener::bind((address, 0)).expect("loopback has a free port");
        let port = listener.local_addr().expect("it is bound").port();
        (listener, SocketAddrV4::new(address, port))
    };
    let (one, other) = (reserve(), reserve());
    [one.1, other.1]
}
