"""Scenario 4: the RDMA link is removed under load, and comes back.

First at the wire alone, whose traffic is connected anew whenever it breaks. Then under a pair of nodes, started with
`--transport auto`: they begin over RDMA, go on over TCP when the verbs device of one is removed, let that of the other go
too, and return to RDMA after both are there again and the session began anew. Nothing that was flushed may be lost on the
way.
"""

from labkit import load, rdma
from labkit.node import make_pair
from labkit.session import NotRun

TITLE = "the RDMA link removed under load: falls back to TCP, returns to RDMA"
SECONDS_MAX = 300
MEBIBYTES = 8
WIRE_SECONDS = 40


def play(lab):
    if lab.options.transport != "auto":
        raise NotRun("it is about --transport auto")
    disks = [lab.disk("a", 384), lab.disk("b", 384)]
    guests = lab.pair([disks[0]], [disks[1]])
    for guest in guests:
        rdma.link_up(guest)
    wire_alone(lab, guests)
    if not lab.transport_flags:
        raise NotRun("under nodes: `twinpoint serve` has no --transport, its only transport is TCP")
    under_nodes(lab, guests, disks)


def wire_alone(lab, guests):
    a, b = guests
    jobs = rdma.wire_traffic(a, b, WIRE_SECONDS, "auto")
    for job in jobs:
        job.wait_for("wire: RDMA over rxe0", 60)
    lab.sleep(3)
    rdma.link_down(b)
    for job in jobs:
        job.wait_for("wire: TCP", 60)
    rdma.link_up(b)
    for job in jobs:
        job.wait()
    counts = [rdma.messages_checked(job) for job in jobs]
    lab.note(f"the wire alone: from RDMA to TCP when the link was removed; {counts[0]} and {counts[1]} messages checked")


def under_nodes(lab, guests, disks):
    a, b = guests
    nodes = make_pair(lab, guests)
    nodes[0].wait_transport("rdma")
    nodes[0].attach()
    load.verified(a, "/dev/nbd0", MEBIBYTES // 2, fsync=32)

    for guest in ([b] if lab.options.short else [b, a]):
        writing = a.start(load.command("/dev/nbd0", rw="randwrite", size=f"{MEBIBYTES}m", fsync=16, verify="crc32c",
                                       do_verify=1, verify_fatal=1), seconds=180)
        lab.sleep(2)
        lab.check(writing.running, "the load was over before the link was removed")
        rdma.link_down(guest)
        nodes[0].wait_transport("tcp")
        writing.wait()
        lab.say(f"link of guest {guest.name} removed: went on over TCP, contents verified")
        # The other node has no connection over its device any more, and lets go of it all the same.
        other = a if guest is b else b
        rdma.link_down(other)
        for each in (other, guest):
            rdma.link_up(each)
        # A session keeps its transport: it returns to RDMA when it begins anew.
        nodes[1].restart("secondary")
        nodes[0].wait_transport("rdma")
        load.verified(a, "/dev/nbd0", MEBIBYTES // 2, fsync=32)
        lab.note(f"guest {guest.name}: fell back to TCP, returned to RDMA; contents verified on both")
    nodes[0].detach()
    for node in nodes:
        node.stop()
    for guest in guests:
        guest.stop()
    lab.compare(*disks)
