"""Scenario 7: DRBD 8.4, protocol C, beside ours in sync mode: the same jobs, guests, network and run; the ratios.

DRBD with protocol C answers a write when both nodes have it; ours answers a flush when both nodes have committed it. So
the jobs with flushes compare equal promises. The two take turns, and what counts is the better of two turns each. What
the figures say of hardware is nothing: see docs/LAB.md.
"""

from labkit import load
from labkit.guest import ADDRESSES
from labkit.node import make_pair

TITLE = "DRBD 8.4 protocol C beside ours: the same fio jobs in the same run"
SECONDS_MAX = 480
TURNS = 2
JOBS = {
    "4 KiB, depth 16, flush each 16": {"iodepth": 16, "fsync": 16},
    "4 KiB, depth 1, flush each": {"iodepth": 1, "fsync": 1},
    "4 KiB, depth 16, no flush": {"iodepth": 16},
}
SECONDS = 6
MEBIBYTES = 128
CONFIGURATION = """
global { usage-count no; }
resource lab {
  protocol C;
  net { max-buffers 8000; max-epoch-size 8000; }
  disk { resync-rate 100M; al-extents 1237; }
  device /dev/drbd0; disk /dev/disk1; meta-disk internal;
%s}
""" % "".join(f"  on {name} {{ address {address}:7789; }}\n" for name, address in ADDRESSES.items())


def play(lab):
    guests = lab.pair(
        [lab.disk("a-ours", 512), lab.disk("a-drbd", 256)], [lab.disk("b-ours", 512), lab.disk("b-drbd", 256)]
    )
    a = guests[0]
    nodes = make_pair(lab, guests, volume=f"{MEBIBYTES}MiB")
    set_up_drbd(guests)
    nodes[0].attach()
    devices = {"ours": "/dev/nbd0", "DRBD": "/dev/drbd0"}
    for device in devices.values():
        # Both have all blocks allocated before anything is measured.
        load.fio(a, device, rw="write", bs="64k", iodepth=4, size=f"{MEBIBYTES}m", seconds_max=240)
    best = {}
    for _ in range(1 if lab.options.short else TURNS):
        for what, job in JOBS.items():
            for name, device in devices.items():
                done = load.fio(a, device, rw="randwrite", size=f"{MEBIBYTES}m", runtime=SECONDS, time_based=1,
                                norandommap=1, **job)
                best[what, name] = max(best.get((what, name), 0), load.writes_per_second(done))
    for what in JOBS:
        ours, theirs = best[what, "ours"], best[what, "DRBD"]
        lab.note(f"{what}: ours {ours:.0f}, DRBD {theirs:.0f} writes/s: {ours / max(theirs, 1):.2f}")
    a.run("cat /proc/drbd; drbdadm secondary lab; drbdadm down lab")
    nodes[0].detach()
    for node in nodes:
        node.stop()


def set_up_drbd(guests):
    for guest in guests:
        guest.run(f"modprobe drbd; cat >/etc/drbd.conf <<'END'\n{CONFIGURATION}END\n")
        guest.run("yes yes | drbdadm create-md --force lab || drbdadm dump-md lab >/dev/null")
    for guest in guests:
        guest.run("drbdadm up lab")
    for guest in guests:
        guest.run("timeout 40 drbdadm wait-connect lab", seconds=60)
    # Both devices are empty: nothing has to be copied before the first write.
    guests[0].run("drbdadm new-current-uuid --clear-bitmap lab/0; drbdadm primary lab")
