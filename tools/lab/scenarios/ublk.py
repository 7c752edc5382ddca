"""Scenario 8: volumes as block devices of the kernel's ublk driver, beside nbd.ko.

ext4 and xfs with fio's verification; the server killed under load and started again, while the mounted file system and
fio wait and then find every byte; an orderly stop with and without --ublk-keep; promotions, after which the device is
on the other node, though the old primary lives and is written to; and the same jobs through nbd.ko and ublk in turns.
"""

import re

from labkit import load
from labkit.guest import Guest
from labkit.node import NBD_SOCKET, VOLUME, make_pair

TITLE = "ublk: ext4, xfs and fio verify, the server killed under load, and beside nbd.ko"
SECONDS_MAX = 720
BLOCK = "/dev/ublkb0"
VOLUME_MEBIBYTES = 320
FILE_SYSTEMS = {
    "ext4": (f"mkfs.ext4 -q -E lazy_itable_init=0 {BLOCK}", f"e2fsck -fn {BLOCK}"),
    "xfs": (f"mkfs.xfs -q -f -m crc=1 {BLOCK}", f"xfs_repair -n {BLOCK}"),
}
# A plain device answers a write when it is durable, so the second and third jobs compare equal promises.
JOBS = {
    "write 4 KiB, depth 16": {"rw": "randwrite", "iodepth": 16},
    "write 4 KiB, depth 16, each durable": {"rw": "randwrite", "iodepth": 16, "sync": "dsync"},
    "write 4 KiB, depth 1, flush each": {"rw": "randwrite", "iodepth": 1, "fsync": 1},
    "read 4 KiB, depth 16": {"rw": "randread", "iodepth": 16},
}
# One worker, and so one queue, for each.
TWO_CORES = "--cores 0,1"
JOB_SECONDS = 3
JOB_MEBIBYTES = 64
TURNS = 2


def play(lab):
    disks = [lab.disk("a", 512), lab.disk("b", 512)]
    # The first guest has two processors: two workers, two queues.
    a = Guest(lab.image, "a", lab.folder, lab.sockets, lab.accelerator, [disks[0]], cores=2)
    lab.guests.append(a)
    guests = [a, lab.guest("b", [disks[1]])]
    for guest in guests:
        guest.set_up()
    told = guests[0].run("twinpoint serve --store /dev/disk0 --replication single --ublk disk 2>&1", check=False)
    lab.check("modprobe ublk_drv" in told and len(told.splitlines()) == 1, f"without the driver: {told!r}")
    for guest in guests:
        guest.run("modprobe ublk_drv")
    nodes = make_pair(lab, guests, flags="--ublk disk=0", volume=f"{VOLUME_MEBIBYTES}MiB")
    nodes[0].stop()
    nodes[0].serve("primary", TWO_CORES)
    nodes[0].wait_connected()
    appear(guests[0])
    absent(lab, guests[1], "on a secondary")
    queues = guests[0].run("ls /sys/block/ublkb0/mq").split()
    lab.check(queues == ["0", "1"], f"not a queue for each worker: {queues}")
    prove_attributes(lab, guests[0])
    refused_id(lab, guests[0])
    file_systems(lab, guests[0])
    killed_under_load(lab, nodes[0])
    stopped_and_kept(lab, nodes[0])
    kept_without_peer(lab, nodes)
    beside_nbd(lab, nodes[0])
    promoted(lab, nodes)
    deposed(lab, nodes)
    nodes[0].stop()
    absent(lab, guests[0], "after the promoted node stopped")
    for guest in guests:
        guest.stop()


def appear(guest):
    guest.run(f"for try in $(seq 300); do [[ -b {BLOCK} ]] && exit; sleep 0.1; done; echo no {BLOCK}; exit 1")


def present(guest):
    return "there" in guest.run(f"[[ ! -e {BLOCK} ]] || echo there")


def absent(lab, guest, when):
    lab.check(not present(guest), f"{BLOCK} is there {when}")


def prove_attributes(lab, guest):
    queue = "/sys/block/ublkb0/queue"
    names = ["logical_block_size", "physical_block_size", "discard_granularity", "write_cache"]
    said = guest.run("; ".join(f"cat {queue}/{name}" for name in names)).splitlines()
    lab.check(said == ["512", "4096", "4096", "write through"], f"attributes: {said}")
    # A write of half a block, and zeroes that unmap: both through the block device's page cache.
    guest.run(f"""
      head -c 1048576 /dev/urandom >/tmp/pattern; dd if=/tmp/pattern of={BLOCK} bs=64k oflag=direct status=none
      dd if=/dev/zero of={BLOCK} bs=512 seek=3 count=2 oflag=direct conv=notrunc status=none
      dd if=/dev/zero of=/tmp/pattern bs=512 seek=3 count=2 conv=notrunc status=none
      dd if=/dev/zero of=/tmp/pattern bs=64k seek=2 count=1 conv=notrunc status=none
      blkdiscard -z -o 131072 -l 65536 {BLOCK}
      cmp -n 1048576 /tmp/pattern {BLOCK}
      blkdiscard -o 0 -l 1048576 {BLOCK}
      cmp -n 1048576 /dev/zero {BLOCK}
    """)


def refused_id(lab, guest):
    """Another store's device is left alone, in one line."""
    serve = "twinpoint serve --store /tmp/other --control /tmp/other.sock --replication single --buffered --memory 16MiB"
    told = guest.run(f"""
      twinpoint format /tmp/other --size 64MiB >/dev/null
      {serve} >/tmp/other.log 2>&1 &
      for try in $(seq 100); do grep -q ready /tmp/other.log && break; sleep 0.1; done
      twinpoint volume create other 8MiB --control /tmp/other.sock >/dev/null
      twinpoint stop --control /tmp/other.sock >/dev/null; wait
      if {serve} --ublk other=0 2>&1; then echo served; fi
    """)
    lab.check("id 0 is used by another device" in told and len(told.splitlines()) == 1, f"an id in use: {told!r}")


def file_systems(lab, guest):
    megabytes = 8 if lab.options.short else 16
    for name, (make, check) in FILE_SYSTEMS.items():
        guest.run(f"modprobe {name}; {make}; mount -t {name} -o discard {BLOCK} /mnt/a", seconds=120)
        job = load.verified(guest, "/mnt/a/random", megabytes, fsync=64)
        load.verified(guest, "/mnt/a/large", megabytes, bs="256k", iodepth=2)
        guest.run("for name in $(seq 100); do echo $name >/mnt/a/$name; done; rm /mnt/a/large; sync; umount /mnt/a", seconds=120)
        guest.run(check, seconds=120)
        lab.note(f"{name}: 2 x {megabytes} MiB verified, checked; {load.writes_per_second(job):.0f} writes/s of 4 KiB")


def killed_under_load(lab, node):
    """What was answered is there, flushed or not, though the process that answered is gone."""
    guest = node.guest
    guest.run(f"mkfs.ext4 -q -F -E lazy_itable_init=0 {BLOCK}; mount -t ext4 {BLOCK} /mnt/a", seconds=120)
    rounds = 1 if lab.options.short else 2
    for number in range(rounds):
        words = load.command(f"/mnt/a/load{number}", rw="randwrite", size="12m", verify="crc32c", do_verify=1,
                             verify_fatal=1, iodepth=16, **({"fsync": 32} if number == 1 else {}))
        job = guest.start(words, seconds=240)
        lab.sleep(2 + 0.7 * number)
        lab.check(job.running, "the load was over before the server was killed")
        guest.run("pkill -KILL -x twinpoint")
        node.serving.wait(check=False)
        lab.sleep(1)
        lab.check(job.running, f"fio did not wait for the server: {job.output[-300:]}")
        # Both queues go to one worker, or to two as before.
        node.serve("primary", TWO_CORES if number % 2 else "")
        lab.check("taken over" in node.serving.output, f"not taken over: {node.serving.output[-300:]}")
        job.wait()
        found = re.search(r'"error" : (\d+)', job.output)
        lab.check(found is not None and found[1] == "0", f"fio after the kill: {job.output[-300:]}")
    guest.run("cd /mnt/a; md5sum load* >/tmp/sums; cd /; umount /mnt/a; echo 3 >/proc/sys/vm/drop_caches")
    guest.run(f"e2fsck -fn {BLOCK}; mount -t ext4 {BLOCK} /mnt/a; cd /mnt/a; md5sum --quiet -c /tmp/sums; cd /; umount /mnt/a",
              seconds=120)
    lab.note(f"server killed {rounds} times under load with ext4 mounted: taken over, every block verified, sound")


def stopped_and_kept(lab, node):
    guest = node.guest
    node.stop()
    absent(lab, guest, "after an orderly stop")
    node.serve("primary", "--ublk-keep")
    appear(guest)
    guest.run(f"mount -t ext4 {BLOCK} /mnt/a; echo kept >/mnt/a/kept")
    node.stop()
    writing = guest.start("sync; cat /mnt/a/kept; echo again >/mnt/a/again; sync; umount /mnt/a", seconds=120)
    lab.sleep(1)
    lab.check(writing.running, "a sync did not wait for the stopped server")
    node.serve("primary")
    lab.check("taken over" in node.serving.output, "the device that was kept was not taken over")
    lab.check("kept" in writing.wait(), "what was written before the stop is gone")
    lab.note("an orderly stop deletes the device; with --ublk-keep a mounted ext4 waits for the next start")


def kept_without_peer(lab, nodes):
    """A write that waits for the peer waits for the next start too: the stop answers it to nobody."""
    guest = nodes[0].guest
    nodes[0].stop()
    nodes[0].serve("primary", f"{TWO_CORES} --ublk-keep")
    nodes[0].wait_connected()
    appear(guest)
    guest.run(f"mount -t ext4 {BLOCK} /mnt/a; echo before >/mnt/a/before; sync /mnt/a/before")
    nodes[1].stop()
    nodes[0].wait_status(lambda status: status["peer"]["state"] == "absent", "the peer is gone")
    # Both queues have something that waits.
    writing = [guest.start(f"head -c 1048576 /dev/urandom | tee /tmp/sent{cpu} >/mnt/a/sent{cpu}; "
                           f"taskset -c {cpu} sync /mnt/a/sent{cpu}", seconds=120) for cpu in range(2)]
    lab.sleep(2)
    lab.check(all(job.running for job in writing), "a write did not wait for the peer")
    nodes[0].stop()
    lab.sleep(1)
    lab.check(all(job.running for job in writing), "the stop answered a write of a device that is kept")
    nodes[1].serve("secondary")
    nodes[0].serve("primary")
    lab.check("taken over" in nodes[0].serving.output, "the device that was kept without its peer was not taken over")
    for job in writing:
        job.wait()
    guest.run("umount /mnt/a; echo 3 >/proc/sys/vm/drop_caches")
    guest.run(f"e2fsck -fn {BLOCK}; mount -t ext4 -o ro {BLOCK} /mnt/a; cmp /tmp/sent0 /mnt/a/sent0; "
              "cmp /tmp/sent1 /mnt/a/sent1; umount /mnt/a", seconds=120)
    errors = guest.run("dmesg | grep -i 'I/O error' || true")
    lab.check(errors == "", f"the file system got errors: {errors[:300]}")
    lab.note("stopped without its peer and with --ublk-keep: writes that waited go on at the next start, without an error")


def beside_nbd(lab, node):
    best = {}
    guest = node.guest
    for flags, name in (("", "ublk"), ("--ublk-volatile", "ublk volatile")):
        node.stop()
        node.serve("primary", f"{TWO_CORES} {flags}")
        node.wait_connected()
        appear(guest)
        node.attach()
        devices = {"nbd": "/dev/nbd0", name: BLOCK}
        load.fio(guest, BLOCK, rw="write", bs="64k", iodepth=4, size=f"{JOB_MEBIBYTES}m", seconds_max=240)
        for _ in range(1 if lab.options.short else TURNS):
            for what, job in JOBS.items():
                for device_name, device in devices.items():
                    done = load.fio(guest, device, size=f"{JOB_MEBIBYTES}m", runtime=JOB_SECONDS, time_based=1,
                                    norandommap=1, **job)
                    rate = done["write"]["iops"] + done["read"]["iops"]
                    best[what, device_name] = max(best.get((what, device_name), 0), rate)
        node.detach()
    for what in JOBS:
        nbd = max(best[what, "nbd"], 1)
        rates = [f"{name} {best[what, name]:.0f} ({best[what, name] / nbd:.2f})" for name in ("ublk", "ublk volatile")]
        lab.note(f"{what}: nbd.ko {nbd:.0f}/s, {', '.join(rates)}")


def promoted(lab, nodes):
    """The device goes with the volume: the other node has it after a promotion, with what was flushed."""
    a, b = nodes[0].guest, nodes[1].guest
    a.run(f"dd if=/tmp/pattern of={BLOCK} bs=64k oflag=direct conv=fsync status=none")
    a.run("pkill -KILL -x twinpoint")
    nodes[0].serving.wait(check=False)
    gone(a, "a volatile device outlived its server")
    a.run("cp /tmp/pattern /lab/pattern")
    nodes[1].promote()
    appear(b)
    b.run(f"cmp -n 1048576 /lab/pattern {BLOCK}")
    lab.note("after a promotion the device is on the other node, with what was flushed")


def deposed(lab, nodes):
    """A primary whose volume is open as a block device is deposed by force: the device ends there, and is here."""
    a, b = nodes[0].guest, nodes[1].guest
    nodes[0].serve("secondary")
    nodes[1].wait_status(lambda status: status["alone_since"] is None, "the peer is in step")
    nodes[1].attach()
    b.run(f"tr '\\0-\\377' '\\1-\\377\\0' </lab/pattern >/tmp/turned; dd if=/tmp/turned of={BLOCK} bs=64k oflag=direct conv=fsync status=none")
    words = load.command(BLOCK, rw="randwrite", offset="64m", size="32m", time_based=1, runtime=300)
    writing = b.start(f"cp /tmp/turned /lab/turned; {words}", seconds=400)
    lab.sleep(2)
    nodes[0].promote("--force")
    appear(a)
    a.run(f"cmp -n 1048576 /lab/turned {BLOCK}")
    gone(b, "the deposed primary still has the device")
    writing.wait(check=False)
    lab.check(writing.status != 0, "writes of a deposed primary were answered")
    lab.check("deposed" in nodes[1].serving.output, f"the old primary does not say what it is: {nodes[1].serving.output[-300:]!r}")
    # NBD: errors for who is connected, and nothing for who comes.
    told = b.run(f"dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct 2>&1 || nbd-client -unix {NBD_SOCKET} /dev/nbd1 "
                 f"-name {VOLUME} 2>&1 || echo refused", check=False)
    lab.check("refused" in told.splitlines(), f"NBD of the deposed primary: {told!r}")
    nodes[1].detach()
    nodes[1].restart("secondary")
    lab.note("a primary deposed by force under load: its device ended with errors, the other node has it, with what was flushed")


def gone(guest, otherwise):
    guest.run(f"for try in $(seq 300); do [[ ! -e {BLOCK} ]] && exit; sleep 0.1; done; echo {otherwise}; exit 1")
