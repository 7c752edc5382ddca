"""A Twinpoint node in a guest, and the steps that scenarios share: format, serve, attach, promote."""

import json
import time

from labkit.guest import Failed

SHARED_KEY = "/lab/key"
KEY = "/run/key"
DEVICE = "/dev/disk0"
PORT = 7000
VOLUME = "disk"
NBD_SOCKET = "/run/nbd.sock"
CONTROL = "/run/twinpoint.sock"
READY_SECONDS = 60


class Node:
    """One node. `flags` are added to those of every `serve`; `before` are the words that run it."""

    def __init__(self, guest, peer_address, flags="", device=DEVICE):
        self.guest = guest
        self.peer_address = peer_address
        self.flags = flags
        self.device = device
        self.before = ""
        self.serving = None

    def give_key(self):
        """Puts the pair's key where its owner and mode are the guest's, not the host's."""
        self.guest.run(f"cp {SHARED_KEY} {KEY}; chmod 600 {KEY}")

    def format(self, like=None, more="--shards 2 --journal 8MiB"):
        """Formats the device; the second store of a pair is made like the first one's answer."""
        if like is not None:
            more = f"--shards {like['shards']} --journal {like['journal_bytes'] >> 10}KiB"
            more += f" --segments {like['segments_max']} --store-id {like['store']}"
        return _json(self.guest.run(f"twinpoint format {self.device} --force --json {more}"))

    def serve(self, role, more=""):
        """Starts the node and waits until it is ready."""
        self.serving = self.guest.start(
            f"RUST_BACKTRACE=1 {self.before} twinpoint serve --store {self.device} --role {role} --listen {self.guest.address}:{PORT} "
            f"--peer {self.peer_address}:{PORT} --key-file {KEY} --nbd unix:{NBD_SOCKET} --control {CONTROL} "
            f"--memory 64MiB --lent-memory 16MiB --peer-timeout 10s {self.flags} {more}",
            seconds=3600,
        )
        self.serving.wait_for("ready", READY_SECONDS)

    def status(self):
        return _json(self.guest.run(f"twinpoint status --control {CONTROL} --json"))

    def wait_status(self, holds, what, seconds=60):
        """Waits until the status has a property, and answers it."""
        limit = time.monotonic() + seconds
        while True:
            status = self.status()
            if holds(status):
                return status
            if time.monotonic() > limit:
                raise Failed(f"{self.guest.name}: after {seconds} s not so: {what}: {json.dumps(status)[:600]}")
            time.sleep(0.5)

    def wait_in_step_or_refused(self, seconds=60):
        """Whether the peer was taken back. False when one of the two refused the other, which their logs explain."""
        known = self.serving.output.count("refused:")
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.status()["peer"]["state"] == "connected":
                return True
            if self.serving.output.count("refused:") > known or "branch" in self.serving.output:
                return False
            time.sleep(0.5)
        raise Failed(f"{self.guest.name}: after {seconds} s the peer is neither in step nor refused")

    def wait_connected(self):
        return self.wait_status(lambda status: status["peer"]["state"] == "connected", "the peer is connected")

    def wait_transport(self, wanted):
        """Waits until the peer is connected, over this transport."""
        return self.wait_status(
            lambda status: status["peer"]["state"] == "connected" and status["peer"]["transport"] == wanted,
            f"the peer is connected over {wanted}", seconds=90,
        )

    def create_volume(self, size="200MiB"):
        self.guest.run(f"twinpoint volume create {VOLUME} {size} --control {CONTROL}")

    def attach(self, nbd="/dev/nbd0"):
        """The volume as a block device, by the kernel's own NBD client."""
        self.guest.run(
            f"modprobe nbd; nbd-client -unix {NBD_SOCKET} {nbd} -name {VOLUME} -timeout 120; "
            f"for try in $(seq 100); do [[ $(<{nbd.replace('/dev', '/sys/block')}/size) -gt 0 ]] && exit; sleep 0.1; done; exit 1"
        )

    def detach(self, nbd="/dev/nbd0"):
        self.guest.run(f"nbd-client -d {nbd}")

    def promote(self, more=""):
        return self.guest.run(f"twinpoint promote --control {CONTROL} {more}")

    def restart(self, role):
        """Ends the process, whatever its state, and starts it again."""
        self.serving.end_and_wait()
        self.serve(role)

    def stop(self):
        """Stops in order: what is staged is committed, and the store is marked clean."""
        self.guest.run(f"twinpoint stop --control {CONTROL}")
        self.serving.wait()


def make_pair(lab, guests, flags="", volume="200MiB", device=DEVICE):
    """Two formatted stores of one id, a primary on guest a and a secondary on guest b, in step, with one volume."""
    a, b = guests
    flags = f"{lab.transport_flags} {flags}"
    nodes = [Node(a, b.address, flags, device), Node(b, a.address, flags, device)]
    a.run(f"[[ -e {SHARED_KEY} ]] || twinpoint key generate {SHARED_KEY}")
    for node in nodes:
        node.give_key()
    made = nodes[0].format()
    nodes[1].format(like=made)
    nodes[1].serve("secondary")
    nodes[0].serve("primary")
    nodes[0].wait_connected()
    nodes[0].create_volume(volume)
    return nodes


def _json(text):
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise Failed(f"no JSON: {text[-300:]!r}") from error
