"""Scenario 11: what can go wrong with RDMA alone, while the network between the nodes is well.

SoftRoCE gets a network for itself, as hosts with a card for storage have it, so the card's way can fail without TCP's.
Each fault strikes under load, and the contents are verified after it:

* the network's neighbours are forgotten before each session: the kernel then misses its answer now and then, and must be
  asked again;
* the port goes down, at the secondary and at the primary: the pair goes on over TCP, and returns to RDMA;
* small packets pass and large ones are lost, as with a wrong MTU on the way: RDMA connects, and carries nothing; after two
  sessions that broke so, TCP is used, with the reason;
* the secondary vanishes in the middle of writes, and comes back over RDMA;
* the secondary may not lock memory: one line says so, the pair runs over TCP, and with --transport rdma not at all;
* a device that is not there is told at the start.
"""

from labkit import load, rdma
from labkit.node import KEY, make_pair
from labkit.session import NotRun

TITLE = "faults of RDMA alone: port down, peer vanished in the middle, no memory to lock, no such device"
SECONDS_MAX = 480
MEBIBYTES = 8
NOBODY = 65534
SESSIONS = 10
# A session asks again after a second or two.
TRIES_SECONDS = 30


def play(lab):
    if lab.options.transport != "auto":
        raise NotRun("it is about --transport auto")
    disks = [lab.disk("a", 384), lab.disk("b", 384)]
    guests = lab.pair([disks[0]], [disks[1]])
    indexes = [rdma.own_network(guest) for guest in guests]
    nodes = make_pair(lab, guests)
    for node, index in zip(nodes, indexes):
        node.flags += f" --rdma-device rxe0 --rdma-gid-index {index}"
    serve_anew(nodes)
    nodes[0].attach()
    neighbours_forgotten(lab, nodes)
    for node in nodes[:0:-1] if lab.options.short else nodes[::-1]:
        port_down(lab, nodes, node)
    large_packets_lost(lab, nodes)
    vanished(lab, nodes, disks[1])
    no_memory_to_lock(lab, nodes)
    no_such_device(lab, nodes)
    nodes[0].detach()
    for node in nodes:
        node.stop()
    for guest in (nodes[0].guest, nodes[1].guest):
        guest.stop()
    lab.compare(*disks)


def serve_anew(nodes):
    for node in nodes[::-1]:
        node.stop()
    for node, role in zip(nodes[::-1], ("secondary", "primary")):
        node.serve(role)
    nodes[0].wait_transport("rdma")


def neighbours_forgotten(lab, nodes):
    sessions = 3 if lab.options.short else SESSIONS
    for _ in range(sessions):
        nodes[1].serving.end_and_wait()
        nodes[0].guest.run("ip neigh flush all", check=False)
        nodes[1].serve("secondary")
        status = nodes[0].wait_connected()
        lab.check(status["peer"]["transport"] == "rdma", f"no RDMA: {nodes[0].serving.output[-300:]}")
    lab.note(f"{sessions} sessions over RDMA, each with its neighbours to be found anew")


def writing(lab, nodes):
    """A load that goes on when a fault strikes, and reads all of it back."""
    words = load.command("/dev/nbd0", rw="randwrite", size=f"{MEBIBYTES}m", fsync=16, verify="crc32c", do_verify=1, verify_fatal=1)
    job = nodes[0].guest.start(words, seconds=240)
    lab.sleep(2)
    lab.check(job.running, "the load was over before the fault")
    return job


def port_down(lab, nodes, node):
    guest = node.guest
    job = writing(lab, nodes)
    guest.run(f"ip link set {rdma.OWN_NETWORK} down")
    nodes[0].wait_transport("tcp")
    job.wait()
    lab.check("port went down" in node.serving.output, f"{guest.name} does not say what happened: {node.serving.output[-400:]}")
    told = [line for line in nodes[0].serving.output.splitlines() if "replicating over TCP" in line]
    lab.check(told, "the primary does not say why TCP is used")
    guest.run(f"ip link set {rdma.OWN_NETWORK} up")
    rdma.wait_active(guest)
    # A session keeps its transport: it returns to RDMA when it begins anew.
    if rdma.survived(guest):
        anew = ""
        nodes[1].restart("secondary")
    else:
        anew = " (SoftRoCE's driver did not survive it: its link made anew)"
        link_anew(nodes, node)
    nodes[0].wait_transport("rdma")
    load.verified(nodes[0].guest, "/dev/nbd0", MEBIBYTES // 4, fsync=32)
    lab.note(f"port of guest {guest.name} down: over TCP ({told[-1].partition('over TCP: ')[2]}); up{anew}: over RDMA again; verified")


def link_anew(nodes, node):
    """With the node stopped: the failed driver keeps it from letting go of the link."""
    is_primary = node is nodes[0]
    if is_primary:
        node.detach()
    node.stop()
    rdma.link_down(node.guest)
    rdma.link_up(node.guest, rdma.OWN_NETWORK)
    node.serve("primary" if is_primary else "secondary")
    if is_primary:
        node.attach()


def large_packets_lost(lab, nodes):
    guest, before = nodes[0].guest, len(nodes[0].serving.output)
    # A bucket that a large packet does not fit into.
    guest.run(f"modprobe sch_tbf; tc qdisc add dev {rdma.OWN_NETWORK} root tbf rate 1gbit burst 1600 limit 100000")
    nodes[1].restart("secondary")
    job = guest.start(load.command("/dev/nbd0", rw="randwrite", size="1m", fsync=4, verify="crc32c", do_verify=1, verify_fatal=1), seconds=240)
    nodes[0].wait_transport("tcp")
    job.wait()
    told = [line for line in nodes[0].serving.output[before:].splitlines() if "no data came through" in line]
    lab.check(told, f"the primary does not say why TCP is used: {nodes[0].serving.output[before:][-400:]}")
    guest.run(f"tc qdisc delete dev {rdma.OWN_NETWORK} root")
    # A node that starts anew knows nothing of what went wrong before.
    nodes[0].detach()
    serve_anew(nodes)
    nodes[0].attach()
    load.verified(guest, "/dev/nbd0", MEBIBYTES // 4, fsync=32)
    lab.note(f"large packets lost: {told[-1].partition('over TCP: ')[2]}; over RDMA again once they pass; verified")


def vanished(lab, nodes, disk):
    job = writing(lab, nodes)
    nodes[1].guest.cut_power()
    nodes[0].wait_status(lambda status: status["peer"]["state"] == "absent", "the peer is lost")
    told = [line for line in nodes[0].serving.output.splitlines() if "lane" in line]
    lab.check(job.running, "flushes were answered without the secondary, in sync mode that stalls")
    nodes[1].guest = lab.guest("b", [disk])
    nodes[1].guest.set_up()
    rdma.own_network(nodes[1].guest)
    nodes[1].give_key()
    nodes[1].serve("secondary")
    nodes[0].wait_transport("rdma")
    job.wait()
    lab.note(f"secondary vanished under load: caught up over RDMA, verified; {told[-1] if told else 'no lane spoke'}")


def no_memory_to_lock(lab, nodes):
    guest, before = nodes[1].guest, len(nodes[0].serving.output)
    nodes[1].stop()
    guest.run(f"chown {NOBODY} {KEY}; chmod 777 /run; chmod 666 $(readlink -f {nodes[1].device}) /dev/infiniband/*; "
              "rm -f /run/*.sock")
    nodes[1].before = f"prlimit --memlock=65536:65536 setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
    nodes[1].serve("secondary")
    nodes[0].wait_transport("tcp")
    told = nodes[0].serving.output[before:]
    lab.check("raise the limit of locked memory" in told, f"the primary does not say why there is no RDMA: {told[-400:]}")
    load.verified(nodes[0].guest, "/dev/nbd0", MEBIBYTES // 4, fsync=32)

    nodes[1].stop()
    before = len(nodes[0].serving.output)
    flags = nodes[1].flags
    nodes[1].flags = flags.replace("--transport auto", "--transport rdma")
    nodes[1].serve("secondary")
    lab.wait(lambda: "no RDMA, which" in nodes[0].serving.output[before:], "the primary says that there is no session", TRIES_SECONDS)
    lab.check(nodes[0].status()["peer"]["state"] == "absent", "there is a session without RDMA, which was asked for")
    nodes[1].stop()
    nodes[1].flags, nodes[1].before = flags, ""
    guest.run(f"chown 0 {KEY}")
    nodes[1].serve("secondary")
    nodes[0].wait_transport("rdma")
    lab.note("no memory to lock: said in one line; over TCP, or with --transport rdma no session; unlimited: over RDMA again")


def no_such_device(lab, nodes):
    nodes[1].stop()
    flags = nodes[1].flags
    nodes[1].flags = flags.replace("--rdma-device rxe0", "--rdma-device rxe7")
    nodes[1].serve("secondary")
    wanted = "RDMA cannot be used now: there is no RDMA device rxe7"
    lab.check(wanted in nodes[1].serving.output, f"not said at the start: {nodes[1].serving.output!r}")
    nodes[0].wait_transport("tcp")
    nodes[1].stop()
    nodes[1].flags = flags
    nodes[1].serve("secondary")
    nodes[0].wait_transport("rdma")
    lab.note("a device that is not there: said at the start, and the pair runs over TCP")
