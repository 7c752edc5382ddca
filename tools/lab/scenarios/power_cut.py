"""Scenario 3: the power is cut, at the primary, at the secondary, at both, again and again.

The emulator is killed while files are written and flushed through ext4. The devices have a volatile write cache: a cut
loses what was not flushed since the guest's start, which the first cut proves. After each cut:

* the cut store is whole by itself, before any node has opened it; after a cut of both, the two are compared as they are;
* every file whose flush was answered is there with its content, read anew, and the file system is sound;
* the pair is in step again, by catching up, or, where the old primary had committed what nobody else has, by copying
  the survivor, which is what an operator would do.
"""

import random
import shutil

from labkit.guest import Failed
from labkit.node import make_pair

TITLE = "power cuts at the primary, the secondary and both, on devices that lose what was not flushed"
SECONDS_MAX = 1500
KINDS = ["primary", "secondary", "both"]
ROUNDS_SHORT = 3
# Flushed files before a cut; and how many of the newest are looked at after it, older ones are deleted meanwhile.
FILES_BEFORE_CUT = 12
FILES_KEPT = 60
CACHE_BLOCKS = 256

WRITER = """
number=$(tail -n 1 /lab/ledger 2>/dev/null || echo 0)
while true; do
  number=$((number + 1))
  seq $number $((number + 2500)) | dd of=/mnt/a/$number bs=16k conv=fsync iflag=fullblock status=none
  echo $number >>/lab/ledger
  rm -f /mnt/a/$((number - %d))
done
""" % (FILES_KEPT + 5)
NOISE = """
fio --thread --name=noise --filename=/mnt/a/noise --size=8m --rw=randwrite --bs=4k --rate_iops=60 --time_based --runtime=600 \
  --fallocate=none >/dev/null
"""
COMPARE = """
for number in $(tail -n %d /lab/ledger); do
  cmp <(seq $number $((number + 2500))) /mnt/a/$number
done
""" % FILES_KEPT


def play(lab):
    rounds = ROUNDS_SHORT if lab.options.short else lab.options.rounds
    cutter = Cutter(lab, random.Random(lab.options.seed))
    cutter.set_up()
    for number in range(rounds):
        cutter.cut(number, KINDS[number % len(KINDS)])
    cutter.finish()
    lab.note(f"{rounds} rounds, seed {lab.options.seed}: {cutter.flushed_files()} flushed files, none lost or changed; "
             "file system sound, stores whole and equal")
    lab.note(f"the old primary caught up {cutter.caught_up} times, had a branch and was copied anew {cutter.copied} times")


class Cutter:
    """The pair and its devices: a raw file under each, and over it an overlay that is new at each start."""

    def __init__(self, lab, chance):
        self.lab = lab
        self.chance = chance
        self.raw = {name: lab.disk(name, 384) for name in ("a", "b")}
        self.over = {}
        self.marks = lab.overlay(lab.disk("marks", 8), "marks-cache")
        self.caught_up = 0
        self.copied = 0

    def set_up(self):
        guests = [self.start("a", self.marks), self.start("b")]
        for guest in guests:
            guest.set_up()
        self.primary, self.secondary = make_pair(self.lab, guests, volume="160MiB")
        self.primary.attach()
        self.primary.guest.run("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0; sync /dev/nbd0", seconds=120)
        self.mount(self.primary)

    def start(self, name, *more):
        self.over[name] = self.lab.overlay(self.raw[name], f"{name}-cache")
        return self.lab.guest(name, [self.over[name], *more])

    def settle(self, name):
        """Moves what a guest's device holds after its end into the raw file under it."""
        self.lab.image_tool("commit", "-q", str(self.over[name].path))
        self.lab.drop(self.over[name])

    def mount(self, node):
        node.guest.run("mount -t ext4 /dev/nbd0 /mnt/a")

    def unmount(self, node):
        """Waits for what was killed and still has a file open."""
        node.guest.run("for try in $(seq 100); do umount /mnt/a && exit; sleep 0.2; done; exit 1", seconds=120)

    def flushed_files(self):
        ledger = self.lab.folder / "share" / "ledger"
        return len(ledger.read_text().splitlines()) if ledger.exists() else 0

    def cut(self, number, kind):
        writer = self.primary.guest.start(WRITER, 3600)
        noise = self.primary.guest.start(NOISE, 3600)
        self.wait_flushed(self.flushed_files() + FILES_BEFORE_CUT, writer)
        self.lab.sleep(self.chance.uniform(0, 2.0))
        cut = [node for node, who in ((self.primary, "primary"), (self.secondary, "secondary")) if kind in (who, "both")]
        if number == 0:
            self.write_marks()
        for node in cut:
            node.guest.process.kill()
        flushed = self.flushed_files()
        for node in cut:
            node.guest.cut_power()
            self.settle(node.guest.name)
        if number == 0:
            self.prove_loss()
        self.look_at_stores(cut)
        getattr(self, f"after_{kind}")(writer)
        if kind == "secondary":
            for job in (writer, noise):
                job.end_and_wait()
            self.remount(self.primary)
        self.lab.say(f"round {number + 1}: {kind} cut after {flushed} flushed files: all there")

    def wait_flushed(self, count, writer, seconds=90):
        def enough():
            if not writer.running:
                raise Failed(f"the writer ended: {writer.output[-300:]}")
            return self.flushed_files() >= count

        self.lab.wait(enough, f"{count} flushed files", seconds)

    def look_at_stores(self, cut):
        """The stores as the cut left them; no node has opened them since."""
        if len(cut) == 2:
            self.lab.compare(self.raw["a"], self.raw["b"])
        else:
            self.lab.verify(self.raw[cut[0].guest.name])

    def after_primary(self, _writer):
        old, new = self.primary, self.secondary
        new.wait_status(lambda status: status["peer"]["state"] == "absent", "the peer is lost")
        new.promote()
        self.primary, self.secondary = new, old
        self.remount(new, attached=False)
        self.restart(old, "secondary")
        if new.wait_in_step_or_refused():
            self.caught_up += 1
        else:
            self.copy_anew()

    def after_secondary(self, writer):
        flushed = self.flushed_files()
        self.restart(self.secondary, "secondary")
        self.primary.wait_connected()
        self.wait_flushed(flushed + 3, writer)

    def after_both(self, _writer):
        for node in (self.secondary, self.primary):
            node.guest = self.start(node.guest.name)
        self.serve(self.secondary, "secondary")
        self.serve(self.primary, "primary")
        self.primary.wait_connected()
        self.remount(self.primary, attached=False)

    def restart(self, node, role):
        node.guest = self.start(node.guest.name)
        self.serve(node, role)

    def serve(self, node, role):
        node.guest.set_up()
        node.give_key()
        node.serve(role)

    def remount(self, node, attached=True):
        """Checks the file system and the flushed files as a client finds them that knows nothing of before."""
        if attached:
            self.unmount(node)
            node.detach()
        node.attach()
        self.mount(node)
        node.guest.run(COMPARE, seconds=120)
        # The first mount replayed the file system's own log; what is checked is what it made of it.
        node.guest.run("umount /mnt/a; e2fsck -fn /dev/nbd0", seconds=120)
        self.mount(node)

    def copy_anew(self):
        """The operator's way when the old primary has a branch: stop, copy the survivor's store, start both."""
        new, old = self.primary, self.secondary
        self.unmount(new)
        new.detach()
        new.stop()
        for node in (new, old):
            node.guest.stop()
            self.settle(node.guest.name)
        shutil.copy(self.raw[new.guest.name].path, self.raw[old.guest.name].path)
        self.restart(old, "secondary")
        self.restart(new, "primary")
        new.wait_connected()
        new.attach()
        self.mount(new)
        self.copied += 1

    def write_marks(self):
        """On a device beside the store's: blocks that are flushed, then as many that are not."""
        self.primary.guest.run(f"""
          head -c {CACHE_BLOCKS * 4096} /dev/zero | tr '\\0' F >/tmp/flushed
          tr F U </tmp/flushed >/tmp/unflushed
          dd if=/tmp/flushed of=/dev/disk1 bs=4k oflag=direct conv=fsync status=none
          dd if=/tmp/unflushed of=/dev/disk1 bs=4k oflag=direct seek={CACHE_BLOCKS} status=none
        """)

    def prove_loss(self):
        """A cut has to lose something that was answered and not flushed, or the rounds prove nothing."""
        found = self.lab.flattened(self.marks, "marks-after").path.read_bytes()
        flushed, unflushed = found.count(b"F" * 4096), found.count(b"U" * 4096)
        self.lab.check(flushed == CACHE_BLOCKS, f"{CACHE_BLOCKS - flushed} flushed blocks are gone: the emulated device lies")
        self.lab.check(unflushed < CACHE_BLOCKS, "the cut lost no unflushed block: the device has no volatile cache")
        self.lab.note(f"the devices lose: {CACHE_BLOCKS - unflushed} of {CACHE_BLOCKS} unflushed blocks, no flushed one")

    def finish(self):
        self.unmount(self.primary)
        self.primary.detach()
        for node in (self.primary, self.secondary):
            node.stop()
        for node in (self.primary, self.secondary):
            node.guest.stop()
            self.settle(node.guest.name)
        self.lab.compare(self.raw["a"], self.raw["b"])
