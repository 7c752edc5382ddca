"""Scenario 9: what the wire costs, counted: the same fio jobs over TCP and over SoftRoCE, in the same guests and run.

Before and after each job both nodes' counters are read. What has to hold is about counts: no data byte is copied by us on
its way to a card, nor on its way to the socket; few requests ask for a completion; no receiver was ever not ready. The
table is made by `twinpoint-bench wire --readings`. The rates say how two software paths compare on a starved host, and
nothing about cards: see docs/WIRE_EFFICIENCY.md.
"""

import json
import os
import re
import subprocess

from labkit import load, rdma
from labkit.guest import Failed
from labkit.node import make_pair
from labkit.session import NotRun

TITLE = "the wire's cost, counted: copies, system calls and verbs, over TCP and SoftRoCE in one run"
SECONDS_MAX = 1200
TURNS = 1
VOLUME_MEBIBYTES = 128
JOBS = {
    "rand4k-q01": {"rw": "randwrite", "iodepth": 1},
    "rand4k-q01-f1": {"rw": "randwrite", "iodepth": 1, "fsync": 1},
    "rand4k-q16": {"rw": "randwrite", "iodepth": 16},
    "rand4k-q64": {"rw": "randwrite", "iodepth": 64},
    "seq1m-q04": {"rw": "write", "bs": "1m", "iodepth": 4},
    "seq64k-q16": {"rw": "write", "bs": "64k", "iodepth": 16},
}
SHORT_JOBS = ["rand4k-q01-f1", "rand4k-q64", "seq1m-q04"]
JOB_SECONDS, SHORT_JOB_SECONDS = 5, 3
# What the verbs device counts when a message found no receive waiting: the sender retries, and credit is there to prevent it.
NOT_READY = ["rcvd_rnr_err", "send_rnr_err", "retry_rnr_exceeded_err"]
# Of the requests to send, at most so many may ask for a completion: the last of each call, and every 16th post. A call has
# a write and a message at least; with many posts waiting it has many.
SIGNALLED_MAX, SIGNALLED_MAX_OF_DEEP = 0.51, {"rand4k-q64": 0.34}
# System calls of the wires on both nodes for each 4 KiB, with 64 commands under way.
WIRE_CALLS_MAX = 0.25


def play(lab):
    if lab.options.transport != "auto":
        raise NotRun("it is about both transports")
    bench = bench_program(lab)
    disks = [lab.disk("a", 512), lab.disk("b", 512)]
    guests = lab.pair([disks[0]], [disks[1]])
    for guest in guests:
        rdma.link_up(guest)
    nodes = make_pair(lab, guests, volume=f"{VOLUME_MEBIBYTES}MiB")
    nodes[0].attach()
    load.fio(guests[0], "/dev/nbd0", rw="write", bs="64k", iodepth=4, size=f"{VOLUME_MEBIBYTES}m", end_fsync=1, seconds_max=240)
    stop(nodes)
    readings = lab.folder / "readings"
    not_ready = 0
    for turn in range(TURNS):
        for transport in ("tcp", "rdma"):
            serve(nodes, transport)
            before = card_counts(guests)
            for name in SHORT_JOBS if lab.options.short else JOBS:
                measure(lab, nodes, readings / f"{name}.{transport}.{turn}", name)
            not_ready += sum(card_counts(guests)[count] - before[count] for count in NOT_READY)
            if turn == 0:
                prove_counts(lab, nodes, transport)
            stop(nodes)
    lab.check(not_ready == 0, f"credit: {not_ready} times a message found no receive")
    lab.note("credit: no message ever found no receive waiting (the verbs devices' RNR counters did not move)")
    check_readings(lab, readings)
    status, said = lab.on_host(bench, "wire", "--readings", readings)
    lab.check(status == 0, f"the table could not be made: {said[-300:]}")
    for line in (readings / "wire.md").read_text().splitlines():
        if line.startswith("|"):
            lab.say(line)
    for guest in guests:
        guest.stop()
    lab.compare(*disks)


def bench_program(lab):
    """What makes the table; it runs on the host."""
    program = lab.programs["twinpoint"].parent / "twinpoint-bench"
    if lab.options.programs is None:
        repository = lab.image.guest_files.parent.parent.parent
        words = [os.environ.get("CARGO", "cargo"), "build", "--release", "--locked", "--package", "twinpoint-bench"]
        # As the lab builds its other programs, so that nothing is built twice.
        environment = {**os.environ, "CARGO_PROFILE_RELEASE_LTO": "off"}
        done = subprocess.run(words, cwd=repository, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        lab.check(done.returncode == 0, f"twinpoint-bench does not build: {done.stdout.decode(errors='replace')[-300:]}")
    if not program.exists():
        raise NotRun(f"no {program}")
    return program


def serve(nodes, transport):
    for node, role in ((nodes[1], "secondary"), (nodes[0], "primary")):
        node.flags = f"--transport {transport}"
        node.serve(role)
    nodes[0].wait_transport(transport)
    nodes[0].attach()


def stop(nodes):
    nodes[0].detach()
    for node in nodes:
        node.stop()


def settled(nodes):
    """Both nodes' status once both have everything. All loads end with a flush."""
    primary = nodes[0].wait_status(
        lambda status: status["lag"]["points"] == 0 and status["cp"]["secondary"] >= status["cp"]["local"], "the pair is in step"
    )
    return [primary, nodes[1].status()]


def measure(lab, nodes, folder, name):
    """One turn of one job, kept as `twinpoint-bench wire --readings` wants it."""
    seconds = SHORT_JOB_SECONDS if lab.options.short else JOB_SECONDS
    before = settled(nodes)
    job = load.fio(nodes[0].guest, "/dev/nbd0", size=f"{VOLUME_MEBIBYTES}m", runtime=seconds, time_based=1, norandommap=1,
                   end_fsync=1, **JOBS[name])
    after = settled(nodes)
    folder.mkdir(parents=True)
    for when, statuses in (("before", before), ("after", after)):
        for node, status in zip(("primary", "secondary"), statuses):
            (folder / f"{node}-{when}.json").write_text(json.dumps(status))
    (folder / "fio.json").write_text(json.dumps({"jobs": [job]}))
    lab.say(f"{folder.name}: {load.writes_per_second(job):.0f} writes/s")


def card_counts(guests):
    """Of both guests' verbs devices."""
    found = {}
    for guest in guests:
        told = guest.run("cd /sys/class/infiniband/rxe0/ports/1/hw_counters; grep . *")
        for name, count in re.findall(r"^(\w+):(\d+)$", told, re.MULTILINE):
            found[name] = found.get(name, 0) + int(count)
    missing = [name for name in NOT_READY if name not in found]
    if missing:
        raise Failed(f"the verbs device does not count {missing}: {sorted(found)}")
    return found


def grown(folder, node, *path):
    values = []
    for when in ("before", "after"):
        value = json.loads((folder / f"{node}-{when}.json").read_text())
        for name in path:
            value = value[name]
        values.append(value)
    return values[1] - values[0]


def check_readings(lab, readings):
    moved = {"tcp": 0, "rdma": 0}
    for folder in sorted(readings.iterdir()):
        name, transport, _turn = folder.name.split(".")
        sent = grown(folder, "primary", "traffic", "wire_bytes_sent", "data")
        lab.check(sent > 0, f"{folder.name}: nothing was replicated")
        moved[transport] += sent
        copied = {node: grown(folder, node, "efficiency", "copied_bytes", "wire_data") for node in ("primary", "secondary")}
        lab.check(copied["primary"] == 0, f"{folder.name}: the sender copied {copied['primary']} bytes of data")
        verbs = {count: grown(folder, "primary", "efficiency", "verbs", count) for count in ("requests", "send_completions")}
        if transport == "tcp":
            lab.check(verbs["requests"] == 0, f"{folder.name}: verbs over TCP")
        else:
            lab.check(copied["secondary"] == 0, f"{folder.name}: the receiver copied {copied['secondary']} bytes of data")
            share = verbs["send_completions"] / max(verbs["requests"], 1)
            most = SIGNALLED_MAX_OF_DEEP.get(name, SIGNALLED_MAX)
            lab.check(share <= most, f"{folder.name}: {share:.2f} of the requests asked for a completion, {most} is the most")
        if name == "rand4k-q64":
            # Without wire_clock, which comes with time and not with work.
            calls = sum(grown(folder, node, "efficiency", "system_calls", kind) for node in ("primary", "secondary")
                        for kind in ("wire_send", "wire_receive", "wire_watch"))
            blocks = grown(folder, "primary", "traffic", "client_bytes_written") / 4096
            each = calls / blocks
            lab.check(each <= WIRE_CALLS_MAX, f"{folder.name}: {each:.3f} system calls of wires for each 4 KiB")
    rdma_mib, tcp_mib = moved["rdma"] >> 20, moved["tcp"] >> 20
    lab.note(f"data copied by us: 0 of {rdma_mib} MiB over RDMA on both sides, 0 of {tcp_mib} MiB sent over TCP")


def prove_counts(lab, nodes, transport):
    """strace counts the primary's calls during a small job: what we count has to be what the kernel was asked."""
    guest = nodes[0].guest
    tracing = guest.start("strace -f -c -S calls -o /tmp/trace -p $(pgrep -x twinpoint) 2>&1", seconds=300)
    tracing.wait_for("attached", 30)
    before = settled(nodes)[0]
    load.fio(guest, "/dev/nbd0", rw="randwrite", iodepth=16, number_ios=400, size="16m", fsync=50, seconds_max=240)
    after = settled(nodes)[0]
    guest.run("pkill -INT -x strace")
    tracing.wait(check=False)
    traced = {}
    for line in guest.run("cat /tmp/trace").splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit():
            traced[words[-1]] = int(words[3])
    kinds = {"ring_enter": "io_uring_enter", "yield_core": "sched_yield", "wire_send": "sendmsg", "wire_receive": "readv"}
    for kind, call in kinds.items():
        ours = after["efficiency"]["system_calls"][kind] - before["efficiency"]["system_calls"][kind]
        theirs = traced.get(call, 0)
        # strace also saw what came just before and after the two readings.
        lab.check(ours <= theirs <= ours * 1.1 + 200, f"{call} over {transport}: strace saw {theirs}, we counted {ours}")
    verbs = {name: after["efficiency"]["verbs"][name] - before["efficiency"]["verbs"][name]
             for name in ("request_calls", "receive_calls", "armings")}
    most = ", ".join(f"{name} {count}" for name, count in sorted(traced.items(), key=lambda one: -one[1])[:7])
    lab.say(f"strace over {transport}: {most}; calls to the card: {verbs}")
    if transport == "rdma":
        # SoftRoCE's driver enters the kernel once for each call that posts requests, and once for each arming.
        for count, call in (("request_calls", "write"), ("armings", "ioctl")):
            ours, theirs = verbs[count], traced.get(call, 0)
            lab.check(ours <= theirs <= ours * 1.1 + 50, f"{count}: strace saw {theirs} {call}, we counted {ours}")
    lab.note(f"strace over {transport} saw what we counted: {', '.join(kinds.values())}")
