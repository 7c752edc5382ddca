"""SoftRoCE in a guest: the verbs device rxe0 over the private network."""

import re

from labkit.guest import Failed

LINK_UP = "modprobe -a rdma_rxe ib_uverbs rdma_ucm; rdma link add rxe0 type rxe netdev eth0"


def link_up(guest):
    """Adds rxe0 and waits until its port is active. Its GID 1 is the guest's IPv4 address."""
    active = "rdma link show | grep -q 'rxe0/1 state ACTIVE'"
    guest.run(f"{LINK_UP}; for try in $(seq 50); do {active} && exit; sleep 0.1; done; exit 1")


def link_down(guest):
    guest.run("rdma link delete rxe0")


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
