"""Scenario 6: delay and loss on the network between the nodes.

For each disturbance, on both guests' sending sides: blocks with checksums are written through the mirror and read back,
and the pair is in step at the end. Then the network is gone for longer than the peer's timeout and comes back. At last
the stores are compared, and the wire's own traffic goes over RDMA through the same disturbances.
"""

import re

from labkit import load, rdma
from labkit.node import make_pair

TITLE = "delay, jitter, loss, reordering, and a network that is gone for a while"
SECONDS_MAX = 480
DISTURBANCES = [
    "delay 5ms",
    "delay 10ms 5ms",
    "loss 1%",
    "loss 3% delay 5ms",
    "delay 10ms reorder 25% duplicate 2%",
]
# SoftRoCE sends all of a window again for one lost packet: it needs a network that seldom loses any.
DISTURBANCES_OF_RDMA = ["delay 5ms", "loss 0.5%"]
RDMA_SECONDS = 15
GONE_SECONDS = 15


def play(lab):
    disks = [lab.disk("a", 384), lab.disk("b", 384)]
    guests = lab.pair([disks[0]], [disks[1]])
    a, b = guests
    nodes = make_pair(lab, guests)
    nodes[0].attach()
    for guest in guests:
        guest.run("modprobe sch_netem")
    rates = []
    for disturbance in ["", *(DISTURBANCES[:2] if lab.options.short else DISTURBANCES)]:
        if disturbance:
            disturb(guests, disturbance)
        job = load.verified(a, "/dev/nbd0", 3, seconds_max=120, fsync=16)
        nodes[0].wait_connected()
        prove_disturbed(lab, guests, disturbance)
        rates.append(f"{disturbance or 'undisturbed'}: {load.writes_per_second(job):.0f} writes/s")
        lab.say(rates[-1])
    disturb(guests, "loss 100%")
    writing = a.start(load.command("/dev/nbd0", rw="randwrite", size="1m", fsync=4), seconds=120)
    lab.sleep(GONE_SECONDS)
    lab.check(writing.running, "flushes were answered without the secondary, in sync mode that stalls")
    for guest in guests:
        guest.run("tc qdisc delete dev eth0 root")
    writing.wait()
    nodes[0].wait_connected()
    nodes[0].detach()
    for node in nodes:
        node.stop()
    lab.note("; ".join(rates))
    lab.note(f"gone for {GONE_SECONDS} s: flushes waited, then all were answered")
    over_rdma(lab, guests)
    for guest in guests:
        guest.stop()
    lab.compare(*disks)


def over_rdma(lab, guests):
    for guest in guests:
        rdma.link_up(guest)
    counts = []
    for disturbance in DISTURBANCES_OF_RDMA[:1] if lab.options.short else DISTURBANCES_OF_RDMA:
        disturb(guests, disturbance)
        jobs = rdma.wire_traffic(*guests, RDMA_SECONDS, "rdma")
        for job in jobs:
            lab.check("wire: RDMA over rxe0" in job.wait(), f"no RDMA under {disturbance}: {job.output[-300:]}")
        counts.append(f"{disturbance}: {min(rdma.messages_checked(job) for job in jobs)} messages")
        lab.check(not counts[-1].endswith(" 0 messages"), f"nothing was checked: {counts[-1]}")
    lab.note(f"the wire over RDMA: {'; '.join(counts)}")


def prove_disturbed(lab, guests, disturbance):
    """The network counted what it dropped, and a packet that comes back was delayed twice."""
    a, b = guests
    if "loss" in disturbance:
        dropped = [int(re.search(r"dropped (\d+)", guest.run("tc -s qdisc show dev eth0"))[1]) for guest in guests]
        lab.check(max(dropped) > 0, f"nothing was dropped under {disturbance}")
    if disturbance.startswith("delay 5ms"):
        told = a.run(f"ping -c 4 -i 0.2 {b.address}")
        least_ms = float(re.search(r"= ([\d.]+)/", told)[1])
        lab.check(least_ms >= 10, f"a round trip of {least_ms} ms under {disturbance}")


def disturb(guests, disturbance):
    for guest in guests:
        guest.run(f"tc qdisc replace dev eth0 root netem {disturbance}")
