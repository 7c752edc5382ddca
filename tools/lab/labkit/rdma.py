"""SoftRoCE in a guest: the verbs device rxe0 over the private network."""

import re

from labkit.guest import NETWORK_MTU, Failed

# A network for RDMA alone, beside the one that TCP uses, over the same emulated wire.
OWN_NETWORK = "rd0"
OWN_ADDRESSES = {"a": "10.0.1.1", "b": "10.0.1.2"}
OWN_HARDWARE = {"a": "52:54:00:12:35:0a", "b": "52:54:00:12:35:0b"}


def link_up(guest, interface="eth0"):
    """Adds rxe0 over a network interface and waits until its port is active."""
    guest.run(f"modprobe -a rdma_rxe ib_uverbs rdma_ucm; rdma link add rxe0 type rxe netdev {interface}")
    wait_active(guest)


def wait_active(guest):
    guest.run("for try in $(seq 50); do rdma link show | grep -q 'rxe0/1 state ACTIVE' && exit; sleep 0.1; done; exit 1")


def own_network(guest):
    """Makes the network for RDMA alone, with rxe0 on it. Answers the index of its IPv4 address among rxe0's own.

    Each interface answers for its own address only, or packets for this one arrive at the other. Its hardware address is
    the same after a boot, as a card's is, or the other guest asks for it at the old one.
    """
    guest.run(f"""
      modprobe macvlan
      echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
      echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce
      ip link add {OWN_NETWORK} link eth0 address {OWN_HARDWARE[guest.name]} type macvlan mode bridge
      ip link set {OWN_NETWORK} mtu {NETWORK_MTU} up
      ip address add {OWN_ADDRESSES[guest.name]}/24 dev {OWN_NETWORK}
    """)
    link_up(guest, OWN_NETWORK)
    gids = guest.run("cd /sys/class/infiniband/rxe0/ports/1/gids; for index in $(seq 0 9); do cat $index; done").splitlines()
    wanted = "0000:0000:0000:0000:0000:ffff:" + "{:02x}{:02x}:{:02x}{:02x}".format(*map(int, OWN_ADDRESSES[guest.name].split(".")))
    if wanted not in gids:
        raise Failed(f"rxe0 of guest {guest.name} has no GID {wanted}: {gids}")
    return gids.index(wanted)


def link_down(guest):
    guest.run("rdma link delete rxe0")


def survived(guest):
    """Whether rxe0 can connect after its port was down.

    SoftRoCE of Linux 6.12 loses the queue pair of its connection manager when that has something to say while the port
    is down. No connection comes about any more, whoever asks for it, until the link is made anew.
    """
    return not re.search(r"type GSI state ERR", guest.run("rdma res show qp"))


def ping(server, client, rounds=20):
    """Both ends through librdmacm, with reads and writes of remote memory, and contents compared."""
    listening = server.start(f"rping -s -a {server.address} -C {rounds} -S 4096", seconds=60)
    # Its status tells nothing: when the server is the first to disconnect, it ends with an error after the last round.
    told = client.run(
        f"sleep 1; timeout 50 rping -c -a {server.address} -C {rounds} -S 4096 -v -V", seconds=60, check=False
    )
    done = told.count("ping data: rdma-ping-")
    if done != rounds or "mismatch" in told:
        raise Failed(f"rping from {client.name} to {server.name}: {done} of {rounds} rounds: {told[-300:]}")
    listening.wait(check=False)


def wire_traffic(listener, dialler, seconds, transport):
    """Starts the wire's own traffic between two guests: both ways, every byte checked. Answers both sides' jobs.

    Each side says a line for each connection, "wire: RDMA over rxe0" or "wire: TCP: reason", and one for its end.
    """
    address = f"{listener.address}:7100"
    words = f"TWINPOINT_WIRE_SECONDS={seconds} TWINPOINT_WIRE_TRANSPORT={transport} two_hosts --nocapture"
    jobs = [listener.start(f"TWINPOINT_WIRE_LISTEN={address} {words}", seconds + 90)]
    jobs.append(dialler.start(f"sleep 1; TWINPOINT_WIRE_DIAL={address} {words}", seconds + 90))
    return jobs


def messages_checked(job):
    """Of a side's all connections."""
    ends = re.findall(r"^wire: (\d+) messages checked", job.output, re.MULTILINE)
    return sum(int(count) for count in ends)
