"""Scenario 2: a mirrored store on NVMe under ext4 and xfs, through the kernel's own NBD client.

The lanes run over SoftRoCE, or over TCP with `--transport tcp`. fio writes blocks with checksums through each file system and reads them back; then both nodes stop in order, and the
two devices are compared on the host, block for block.
"""

from labkit import load, rdma
from labkit.node import make_pair

TITLE = "a mirror on NVMe: ext4 and xfs over nbd.ko, fio verify, stores compared"
SECONDS_MAX = 480
FILE_SYSTEMS = {
    "ext4": ("mkfs.ext4 -q -E lazy_itable_init=0 /dev/nbd0", "e2fsck -fn /dev/nbd0"),
    "xfs": ("mkfs.xfs -q -f -m crc=1 /dev/nbd0", "xfs_repair -n /dev/nbd0"),
}


def play(lab):
    disks = [lab.disk("a", 512), lab.disk("b", 512)]
    guests = lab.pair([disks[0]], [disks[1]])
    over = "tcp" if lab.options.transport == "tcp" else "rdma"
    if over == "rdma":
        for guest in guests:
            rdma.link_up(guest)
    nodes = make_pair(lab, guests, volume="320MiB")
    a = guests[0]
    megabytes = 8 if lab.options.short else 24
    for name, (make, check) in FILE_SYSTEMS.items():
        nodes[0].attach()
        a.run(f"modprobe {name}; {make}; mount -t {name} /dev/nbd0 /mnt/a", seconds=120)
        random = load.verified(a, "/mnt/a/random", megabytes, fsync=64)
        load.verified(a, "/mnt/a/large", megabytes, bs="64k", iodepth=2)
        a.run("for name in $(seq 100); do echo $name >/mnt/a/$name; done; sync; umount /mnt/a", seconds=120)
        a.run(check, seconds=120)
        nodes[0].detach()
        lab.note(f"{name}: 2 x {megabytes} MiB verified, checked; {load.writes_per_second(random):.0f} writes/s of 4 KiB")
    status = nodes[0].status()
    lab.check(status["peer"]["transport"] == over, f"not over {over}: {status['peer']}")
    lab.note(f"replicated over {status['peer']['transport']}: {status['traffic']['wire_bytes_sent']['data'] >> 20} MiB of data")
    for node in nodes:
        node.stop()
    for guest in guests:
        guest.stop()
    lab.compare(*disks)
