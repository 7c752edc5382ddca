"""Scenario 5: every state that a power cut may leave, taken from a log of all writes; and devices that fail.

Both nodes run over dm-log-writes. On the host each log is played again: at every flush the image up to there has to
hold a whole store, not older than what had been answered by then; and from many flushes on also with any part of the
writes up to the next flush, in any order, some of them torn. Then dm-flakey: a device that answers errors for a while,
under the primary and under the secondary.
"""

import json
import random

from labkit import load, write_log
from labkit.guest import Failed
from labkit.node import VOLUME, make_pair

TITLE = "every flush-bounded prefix of the writes is a whole store, on both sides; failing devices"
SECONDS_MAX = 600
DEVICE_MIB = 64
LOG_MIB = 512
# The only mapped device of a guest; nobody makes names under /dev/mapper there.
MAPPED = "/dev/dm-0"
FLUSHES = 40
# How many flushes are looked at also with parts of what followed them; and so many parts of each.
BROKEN_ENDS = 40
# So often one durable write is left out, to see that looking would notice.
LOST_WRITES = 12


def play(lab):
    if not lab.options.short:
        failing_devices(lab)
    disks = {name: lab.disk(name, DEVICE_MIB) for name in ("a", "b")}
    logs = {name: lab.disk(f"{name}-log", LOG_MIB) for name in ("a", "b")}
    guests = lab.pair([disks["a"], logs["a"]], [disks["b"], logs["b"]])
    for guest in guests:
        guest.run(
            "modprobe -a dm_mod dm_log_writes; "
            f"dmsetup create --noudevsync logged --table \"0 $(blockdev --getsz /dev/disk0) log-writes /dev/disk0 /dev/disk1\""
        )
    nodes = make_pair(lab, guests, volume="32MiB", device=MAPPED)
    write_and_mark(guests, nodes)
    for node in nodes:
        node.stop()
    for guest in guests:
        guest.run("dmsetup message logged 0 mark stopped; dmsetup remove --noudevsync logged; sync")
        guest.stop()
    for name in ("a", "b"):
        replay(lab, name, logs[name])


def write_and_mark(guests, nodes):
    """Flushed writes; after each flush that was answered, both logs get a mark with the CP that is durable there."""
    nodes[0].attach()
    for guest, node in zip(guests, nodes):
        guest.run(f"dmsetup message logged 0 mark cp-{node.status()['cp']['local']}")
    for number in range(FLUSHES // 4):
        load.fio(guests[0], "/dev/nbd0", rw="randwrite", size="32m", number_ios=24, bsrange="4k-32k", bs="4k", fsync=6,
                 randseed=number)
        for guest, node in zip(guests, nodes):
            guest.run(f"dmsetup message logged 0 mark cp-{node.status()['cp']['local']}")
    nodes[0].detach()


def replay(lab, name, log):
    chance = random.Random(lab.options.seed)
    entries = list(write_log.read(log.path))
    boundaries = [index for index, entry in enumerate(entries) if entry.is_boundary]
    marks = [index for index, entry in enumerate(entries) if entry.mark]
    # Before the first mark the store was being made.
    start = marks[0]
    image = lab.disk(f"{name}-replayed", DEVICE_MIB)
    applied, answered, looked, broken = 0, 0, 0, 0
    wanted = [index for index in boundaries if index > start]
    ends = set(chance.sample(wanted, min(BROKEN_ENDS, len(wanted))))
    for at, boundary in enumerate(wanted):
        with open(image.path, "r+b") as file:
            for entry in entries[applied : boundary + 1]:
                entry.apply(file)
                if entry.mark and entry.mark.startswith("cp-"):
                    answered = max(answered, int(entry.mark[3:]))
        applied = boundary + 1
        look(lab, image, answered, f"{name}: at entry {boundary} of {len(entries)}")
        looked += 1
        if boundary in ends:
            following = wanted[at + 1] if at + 1 < len(wanted) else len(entries)
            broken_end(lab, image, entries[applied:following], chance, answered, f"{name}: behind entry {boundary}")
            broken += 1
    missed = sharpness(lab, entries, chance)
    lab.say(f"{name}: of {LOST_WRITES} trials with one durable write lost, {missed} went unnoticed")
    lab.check(missed <= LOST_WRITES // 2, f"{name}: lost writes go unnoticed, so the prefixes prove nothing")
    lab.note(f"{'primary' if name == 'a' else 'secondary'}: {looked} prefixes whole, {broken} of them also with a broken end; "
             f"CP {answered} answered")


def broken_end(lab, image, following, chance, answered, where):
    """Any part of the writes that no flush covers may be there, in any order, each whole or in part."""
    spoilt = lab.copy(image, "broken-end")
    chosen = [entry for entry in following if entry.sectors and not entry.flags & write_log.DISCARD and chance.random() < 0.6]
    chance.shuffle(chosen)
    with open(spoilt.path, "r+b") as file:
        for entry in chosen:
            # A device keeps its own sectors whole: what is torn is torn between them.
            kept = entry.sectors if chance.random() < 0.7 else chance.randrange(entry.sectors)
            write_log.Entry(entry.sector, kept, 0, entry.data[: kept * write_log.SECTOR]).apply(file)
    look(lab, spoilt, answered, f"{where}, with {len(chosen)} of {len(following)} later writes")


def sharpness(lab, entries, chance):
    """How often a lost durable write is not noticed right after the CP that it belongs to was answered.

    Some losses do not matter: one copy of two, a block that the same CP frees again.
    """
    missed = 0
    marks = [index for index, entry in enumerate(entries) if (entry.mark or "").startswith("cp-")]
    for mark in chance.choices(marks[1:], k=LOST_WRITES):
        lost = chance.choice([index for index in range(mark) if entries[index].sectors][-10:])
        spoilt = lab.disk("spoilt", DEVICE_MIB)
        with open(spoilt.path, "r+b") as file:
            for index in range(mark):
                if index != lost:
                    entries[index].apply(file)
        try:
            look(lab, spoilt, int(entries[mark].mark[3:]), "a lost write", keep=False)
            missed += 1
        except Failed:
            pass
    return missed


def look(lab, image, answered, where, keep=True):
    status, said = lab.on_host(lab.programs["twinpoint"], "verify", "--buffered", "--json", image.path)
    if status != 0:
        if keep:
            lab.preserve(image, "failed.raw")
        raise Failed(f"{where}: verify ended with {status}: {said.strip()[-500:]}")
    store = json.loads(said)["stores"][0]
    if store["cp"] < answered:
        if keep:
            lab.preserve(image, "failed.raw")
        raise Failed(f"{where}: CP {store['cp']}, and CP {answered} had been answered")


def failing_devices(lab):
    """A device answers errors to writes for a while: its store fails, says so, and is whole after a restart."""
    disks = [lab.disk("a-flaky", DEVICE_MIB), lab.disk("b-flaky", DEVICE_MIB)]
    guests = lab.pair([disks[0]], [disks[1]])
    for guest in guests:
        guest.run(
            "modprobe -a dm_mod dm_flakey; "
            "dmsetup create --noudevsync flaky --table \"0 $(blockdev --getsz /dev/disk0) linear /dev/disk0 0\""
        )
    nodes = make_pair(lab, guests, volume="32MiB", device=MAPPED)
    client = guests[0]
    nodes[0].attach()
    load.verified(client, "/dev/nbd0", 2, fsync=16)

    # The secondary: the primary's flushes wait, and are answered when it is back.
    set_table(guests[1], "flakey /dev/disk0 0 0 3600 1 error_writes")
    waiting = client.start(load.command("/dev/nbd0", rw="randwrite", size="512k", fsync=4), seconds=120)
    nodes[1].wait_status(lambda status: status["failed"], "the secondary's store failed")
    lab.check(waiting.running, "flushes were answered without the secondary")
    set_table(guests[1], "linear /dev/disk0 0")
    nodes[1].restart("secondary")
    nodes[0].wait_connected()
    waiting.wait()

    # The primary: its client gets errors, and after a restart everything that was flushed.
    load.verified(client, "/dev/nbd0", 2, fsync=16)
    set_table(client, "flakey /dev/disk0 0 0 3600 1 error_writes")
    told = client.run(load.command("/dev/nbd0", rw="randwrite", size="512k", fsync=4, randseed=9), seconds=120, check=False)
    lab.check('"error" : 0' not in told, "writes to a failing device were answered as good")
    lab.check(nodes[0].status()["failed"], "the primary does not say that its store failed")
    client.run("nbd-client -d /dev/nbd0")
    set_table(client, "linear /dev/disk0 0")
    nodes[0].restart("primary")
    nodes[0].wait_connected()
    nodes[0].attach()
    load.verified(client, "/dev/nbd0", 2, fsync=16)
    nodes[0].detach()
    for node in nodes:
        node.stop()
    for guest in guests:
        guest.stop()
    lab.compare(*disks)
    lab.note(f"devices that fail: both stores failed as they should, volume {VOLUME} was verified after each restart")


def set_table(guest, table):
    guest.run(
        f"dmsetup suspend --noudevsync --nolockfs flaky; "
        f"dmsetup load flaky --table \"0 $(blockdev --getsz /dev/disk0) {table}\"; dmsetup resume --noudevsync flaky"
    )
