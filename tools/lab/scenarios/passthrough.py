"""Scenario 10: a store driven by NVMe commands, beside the block path, with and without polled completions.

One guest, its driver loaded without poll queues, with several paths, and with poll queues. What cannot be is refused in
one line; ext4 and fio verify over nbd.ko, also while the controller is reset; the device is claimed meanwhile; a node
killed under load is opened again in the other mode, with every flushed byte; and the same jobs run in all three modes in
turns, with what each costs counted by the guest's kernel.
"""

import json

from labkit import load
from labkit.guest import Failed, Guest
from labkit.node import CONTROL, NBD_SOCKET, Node
from labkit.session import NotRun

TITLE = "NVMe passthrough: ext4 and fio verify, killed and reopened by the block path, costs counted"
SECONDS_MAX = 1200
STORE, TRIAL, WITH_METADATA = "/dev/disk0", "/dev/disk1", "/dev/disk2"
VOLUME_BLOCK = "/dev/nbd0"
VOLUME_MEBIBYTES = 200
# A polling thread takes from an emulated guest what its devices need too.
READY_SECONDS = 180
RESETS_MAX = 10
# Each waits three seconds for the device.
STARTS_MAX = 10
MODES = {
    "block": "--device-mode block",
    "passthrough": "--device-mode passthrough",
    "polled": "--device-mode passthrough --device-poll",
}
# Fixed work, so that counts are comparable; the flushes see to it that the device has part in every job.
JOBS = {
    "write 4 KiB, depth 16, flush each 16": {"rw": "randwrite", "iodepth": 16, "fsync": 16},
    "write 256 KiB, depth 4, flush each 8": {"rw": "write", "iodepth": 4, "bs": "256k", "fsync": 8},
    "read 4 KiB, depth 16": {"rw": "randread", "iodepth": 16},
}
JOB_OPERATIONS, SHORT_JOB_OPERATIONS = {"4k": 2048, "256k": 64}, {"4k": 256, "256k": 16}
FILLED_MEBIBYTES = 16
TRACING = "/sys/kernel/tracing"
# What is counted, each in a buffer of its own: event, filter, and whether of the node's threads alone.
COUNTED = {
    "calls": ("raw_syscalls/sys_enter", "id == 426", True),  # io_uring_enter
    "completions": ("io_uring/io_uring_complete", "", True),
    "commands": ("nvme/nvme_setup_cmd", "qid != 0", False),
    "flushes": ("nvme/nvme_setup_cmd", "qid != 0 && opcode == 0", False),
}


class Single(Node):
    """A node without a peer, in one of the modes."""

    def __init__(self, guest, store=STORE):
        super().__init__(guest, guest.address, device=store)

    def serve(self, mode, more=""):
        self.serving = self.guest.start(
            f"RUST_BACKTRACE=1 twinpoint serve --store {self.device} --replication single --nbd unix:{NBD_SOCKET} "
            f"--control {CONTROL} --memory 64MiB {MODES[mode]} {self.flags} {more}",
            seconds=3600,
        )
        self.serving.wait_for("ready", READY_SECONDS)

    def serve_when_free(self, mode):
        """As the systemd unit starts it: again, as long as the io_uring of a killed process still has the device."""
        for _ in range(STARTS_MAX):
            try:
                return self.serve(mode)
            except Failed:
                if "in use" not in self.serving.output:
                    raise
        raise Failed(f"the device is still in use after {STARTS_MAX} starts")


def play(lab):
    status, usage = lab.on_host(lab.programs["twinpoint"], "serve", "--help")
    if status != 0 or "--device-mode" not in usage:
        raise NotRun("this twinpoint has no --device-mode")
    disks = [lab.disk("a", 512), lab.disk("trial", 64), lab.disk("metadata", 64, metadata_bytes=8)]
    guest = boot(lab, disks)
    refused(lab, guest)
    conforms(lab, guest, "passthrough")
    node = Single(guest)
    node.format()
    unprivileged(lab, guest)
    node.serve("passthrough")
    node.create_volume(f"{VOLUME_MEBIBYTES}MiB")
    claimed(lab, guest)
    file_system(lab, node, "passthrough")
    reset_under_load(lab, node, "passthrough")
    killed_under_load(lab, node, "passthrough", "block")

    # As a drive of several controllers is seen: a path may be there or not.
    driver_anew(guest, "multipath=Y")
    node = Single(guest)
    node.serve("passthrough")
    file_system(lab, node, "passthrough, by paths")
    reset_under_load(lab, node, "passthrough, by paths")
    node.stop()

    # What nvme.poll_queues is on the kernel's command line.
    driver_anew(guest, "", "poll_queues=2")
    conforms(lab, guest, "polled")
    # By its generic device this time.
    node = Single(guest, generic(guest, STORE))
    node.serve("polled")
    file_system(lab, node, "polled")
    reset_under_load(lab, node, "polled")
    # The kernel ends the rings of a process that polled by polling itself: decisions/0014.
    killed_under_load(lab, node, "polled", "passthrough", kills=5)
    beside_each_other(lab, Single(guest))
    guest.stop()
    lab.verify(disks[0])


def boot(lab, disks):
    """A guest with two processors, so that a polling thread has one to itself."""
    guest = Guest(lab.image, "a", lab.folder, lab.sockets, lab.accelerator, disks, cores=2)
    lab.guests.append(guest)
    guest.set_up()
    # Programs from the guest's memory: a shared folder is read anew at every start of one.
    guest.run("mkdir /run/bin; cp /lab/bin/* /run/bin/; mount --bind /run/bin /lab/bin", seconds=120)
    return guest


def driver_anew(guest, core_parameters, parameters=""):
    guest.run(f"rm -f /dev/disk[0-9]; modprobe -r nvme nvme_core; modprobe nvme_core {core_parameters}")
    guest.find_disks(parameters)


def generic(guest, block):
    """The generic device of a namespace, as /dev/ng0n1."""
    return guest.run(f"readlink -f {block}").strip().replace("/nvme", "/ng")


def refused(lab, guest):
    """What cannot be is said in one line, with the exit code of wrong usage, and nothing is touched."""
    guest.run(f"truncate -s 64M /tmp/file; addpart {TRIAL} 1 2048 65536; ln -sf $(readlink -f {TRIAL})p1 /dev/part; "
              "for try in $(seq 50); do [[ -b /dev/part ]] && exit; sleep 0.1; done; exit 1")
    cases = {
        "/tmp/file --device-mode passthrough": "no namespace of an NVMe device",
        "/dev/null --device-mode passthrough": "no namespace of an NVMe device",
        "/dev/vda --device-mode passthrough": "no namespace of an NVMe device",
        "/dev/part --device-mode passthrough": "it is a partition",
        f"{WITH_METADATA} --device-mode passthrough": "8 bytes of metadata",
        f"{STORE} --device-mode passthrough --device-poll": "nvme.poll_queues",
        f"{STORE} --device-poll": "give --device-mode passthrough",
        f"{STORE} --device-mode passthrough --buffered": "--buffered is for files",
    }
    tries = [f"twinpoint serve --replication single --store {flags} 2>&1 && echo status 0 || echo status $?" for flags in cases]
    told = iter(guest.run("\n".join(tries), seconds=120).splitlines())
    for flags, wanted in cases.items():
        # One line each, and the status behind it.
        line, status = next(told, ""), next(told, "")
        lab.check(wanted in line and status == "status 2", f"serve --store {flags}: {line!r}, {status!r}")
    guest.run(f"delpart {TRIAL} 1; rm /dev/part")
    lab.note(f"{len(cases)} wrong ways to ask for it are refused in one line, exit code 2")


def unprivileged(lab, guest):
    """Access to both device nodes is all that the service's user needs, and without it one line says so."""
    serve = f"setpriv --reuid=65534 --regid=65534 --clear-groups twinpoint serve --store {STORE} --control /tmp/nobody.sock " \
            "--replication single --device-mode passthrough --memory 64MiB"
    for allowed, refusing in (("", STORE), (STORE, generic(guest, STORE))):
        told = guest.run(f"chmod 666 {allowed or '/dev/null'}; {serve} 2>&1 && echo status 0 || echo status $?")
        line, status = (told.splitlines() + ["", ""])[:2]
        wanted = f"cannot open {refusing}: Permission denied"
        lab.check(wanted in line and "check its permissions" in line and status == "status 1", f"by nobody: {told!r}")
    guest.run(f"chmod 666 {generic(guest, STORE)}")
    job = guest.start(serve)
    job.wait_for("ready")
    guest.run("twinpoint stop --control /tmp/nobody.sock")
    job.wait()
    lab.note("a user who may open both device nodes can serve, without any privilege; else one line says which node is closed")


def conforms(lab, guest, mode):
    """The bodies that the simulated disk and the real file pass too."""
    if "device_conformance" not in lab.programs:
        return
    told = guest.run(f"TWINPOINT_NVME={TRIAL} device_conformance --test-threads=1 --ignored {mode}:: 2>&1", seconds=240)
    passed = next((line for line in told.splitlines() if line.startswith("test result: ok")), "")
    lab.check(passed and " 0 passed" not in passed, f"the suite did not say that it passed: {told[-300:]!r}")
    lab.note(f"{mode}: device conformance {passed.removeprefix('test result: ').split(';')[0]}")


def claimed(lab, guest):
    """While commands drive it nobody mounts the device, and no other node takes it, by whatever path and mode."""
    for words in (f"mount -t ext4 {STORE} /mnt/b", f"mkfs.ext4 -q -F {STORE}"):
        told = guest.run(f"{words} 2>&1 && echo status 0 || echo status $?")
        lab.check("status 0" not in told, f"the device could be taken: {words}: {told!r}")
    for mode in ("--device-mode block", "--device-mode passthrough"):
        words = f"twinpoint serve --store {STORE} --control /run/other.sock --replication single {mode}"
        told = guest.run(f"{words} 2>&1 && echo status 0 || echo status $?")
        lab.check("in use" in told and "status 6" in told, f"a second node, {mode}: {told!r}")
    lab.note("driven by commands: the block device cannot be mounted, and no second node opens it")


def file_system(lab, node, mode):
    guest, megabytes = node.guest, 2 if lab.options.short else 24
    node.attach()
    guest.run(f"modprobe ext4; mkfs.ext4 -q -F -E lazy_itable_init=0 {VOLUME_BLOCK}; mount {VOLUME_BLOCK} /mnt/a", seconds=120)
    load.verified(guest, "/mnt/a/random", megabytes, iodepth=32, fsync=64)
    load.verified(guest, "/mnt/a/large", megabytes, bs="1m", iodepth=2)
    guest.run("for name in $(seq 100); do echo $name >/mnt/a/$name; done; sync; umount /mnt/a", seconds=120)
    guest.run(f"e2fsck -fn {VOLUME_BLOCK}", seconds=120)
    node.detach()
    lab.note(f"{mode}: ext4 over nbd.ko, 2 x {megabytes} MiB verified by fio, sound")


def reset_under_load(lab, node, mode):
    """What a reset of the controller ends is sent again: no client sees one."""
    guest, resets = node.guest, 0
    node.attach()
    guest.run(f"mount {VOLUME_BLOCK} /mnt/a")
    words = load.command("/mnt/a/reset", rw="randwrite", size="16m" if lab.options.short else "48m", iodepth=16, fsync=32,
                         verify="crc32c", do_verify=1, verify_fatal=1)
    job = guest.start(words, seconds=240)
    while job.running and resets < RESETS_MAX:
        lab.sleep(0.3)
        # Of the namespace's own controller, or of the path that leads to a subsystem's.
        guest.run(f"cd /sys/block/$(basename $(readlink -f {STORE}))/device; echo 1 >$(ls reset_controller nvme*/reset_controller 2>/dev/null)")
        resets += 1
    job.wait()
    lab.check(resets > 1, "the load was over before the controller was reset")
    lab.check(not node.status()["failed"], "the store failed")
    guest.run(f"rm /mnt/a/reset; umount /mnt/a; e2fsck -fn {VOLUME_BLOCK}", seconds=120)
    node.detach()
    lab.note(f"{mode}: controller reset {resets} times under load: every block verified")


def killed_under_load(lab, node, mode, then, kills=1):
    """What was flushed is there after kills, when another way to drive the device opens the store at last."""
    guest = node.guest
    node.attach()
    guest.run(f"mount {VOLUME_BLOCK} /mnt/a; head -c 8M /dev/urandom >/mnt/a/kept; sync /mnt/a/kept; md5sum /mnt/a/kept >/tmp/sums")
    for kill in range(1, kills + 1):
        job = guest.start(load.command("/mnt/a/load", rw="randwrite", size="32m", iodepth=16, fsync=32, time_based=1, runtime=60), seconds=120)
        lab.sleep(3)
        lab.check(job.running, "the load was over before the node was killed")
        guest.run("pkill -KILL -x twinpoint")
        node.serving.wait(check=False)
        node.serve_when_free(then if kill == kills else mode)
        # What the client had sent waits for an answer until it is disconnected, and the load with it.
        node.detach()
        job.end_and_wait()
        guest.run("umount /mnt/a || umount -l /mnt/a", check=False)
        node.attach()
        guest.run(f"mount {VOLUME_BLOCK} /mnt/a; md5sum --quiet -c /tmp/sums", seconds=120)
    guest.run(f"umount /mnt/a; e2fsck -fn {VOLUME_BLOCK}", seconds=120)
    node.detach()
    node.stop()
    guest.run(f"twinpoint verify {STORE}", seconds=120)
    times = "once" if kills == 1 else f"{kills} times"
    lab.note(f"{mode}: killed under load {times}, opened again as {then}: what was flushed is there, every block verified")


def beside_each_other(lab, node):
    """Every job in every mode, with what it costs. Speed is not looked at: all of this is emulated."""
    guest, counts = node.guest, {}
    guest.run(prepare_counters())
    operations = SHORT_JOB_OPERATIONS if lab.options.short else JOB_OPERATIONS
    for mode in MODES:
        node.serve(mode)
        node.attach()
        if not counts:
            load.fio(guest, VOLUME_BLOCK, rw="write", bs="256k", iodepth=4, size=f"{FILLED_MEBIBYTES}m", fsync=8, seconds_max=240)
        for what, job in JOBS.items():
            counts[mode, what] = counted(node, {**job, "number_ios": operations[job.get("bs", "4k")]})
        node.detach()
        node.stop()
    for what in JOBS:
        for mode in MODES:
            check_counts(lab, mode, what, counts[mode, what])
        told = [f"{mode} {ratios(counts[mode, what])}" for mode in MODES]
        lab.note(f"{what}, for each: {'; '.join(told)}")


def check_counts(lab, mode, what, count):
    said = f"{what}, {mode}: {count}"
    lab.check(count["commands"] > 0, f"the device had no part in it: {said}")
    lab.check("write" not in what or count["flushes"] > 0, f"no flush came to the device: {said}")
    lab.check((count["block"] > 0) == (mode == "block"), f"the block layer's count is not this mode's: {said}")
    lab.check((count["interrupts"] > 0) == (mode != "polled"), f"interrupts are not this mode's: {said}")
    lab.check((count["our polls"] > 0) == (mode == "polled"), f"looks for completions are not this mode's: {said}")
    # The node's own count has what came just before and after the job too.
    ours, kernels = count["our commands"], count["commands"] if mode != "block" else 0
    lab.check(kernels <= ours <= kernels * 1.1 + 50 * (mode != "block"), f"the node counts its commands otherwise: {said}")


def ratios(count):
    names = ("calls", "commands", "completions", "interrupts")
    return ", ".join(f"{count[name] / count['operations']:.2f} {name}" for name in names)


def prepare_counters():
    lines = [f"mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}"]
    for name, (event, condition, _) in COUNTED.items():
        folder = f"{TRACING}/instances/{name}"
        lines += [f"mkdir -p {folder}; echo 1024 >{folder}/buffer_size_kb"]
        if condition:
            lines += [f"echo '{condition}' >{folder}/events/{event}/filter"]
        lines += [f"echo 1 >{folder}/events/{event}/enable"]
    return "\n".join(lines)


def counted(node, job):
    """Runs the job and answers what it cost, by the guest's kernel and by the node itself."""
    guest, device_before = node.guest, node.status()["efficiency"]["device"]
    begin = "\n".join(
        [f"cat /proc/$(pgrep -x twinpoint)/task/*/stat | cut -d' ' -f1 >{TRACING}/instances/{name}/set_event_pid"
         for name, (_, _, is_own) in COUNTED.items() if is_own]
        + [f"echo >{TRACING}/instances/{name}/trace" for name in COUNTED])
    words = load.command(VOLUME_BLOCK, size=f"{FILLED_MEBIBYTES}m", **job)
    text = guest.run(f"{begin}\n{read_counters('before')}\n{words}\n{read_counters('after')}", seconds=240)
    device_after = node.status()["efficiency"]["device"]
    fio = json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"][0]
    if fio["error"] != 0:
        raise Failed(f"fio ended with error {fio['error']}")
    before, after = (dict(line.split()[1:] for line in text.splitlines() if line.startswith(when)) for when in ("before", "after"))
    count = {name: int(after[name]) - int(before[name]) for name in after}
    count["operations"] = fio["read"]["total_ios"] + fio["write"]["total_ios"]
    count |= {f"our {name}": device_after[name] - device_before[name] for name in ("commands", "polls")}
    return count


def read_counters(when):
    """Lines of `when NAME NUMBER`: events, interrupts of the store's queues, and reads and writes of its block device."""
    sums = f"for name in {' '.join(COUNTED)}; do awk -v name=$name '/^(entries|overrun):/ {{ sum += $2 }} END {{ print \"{when}\", name, sum + 0 }}' " \
           f"{TRACING}/instances/$name/per_cpu/cpu*/stats; done"
    disk = f"disk=$(basename $(readlink -f {STORE})); queue=${{disk%n1}}q"
    interrupts = f"awk -v queue=\"^$queue[1-9]\" '$NF ~ queue {{ sum += $2 + $3 }} END {{ print \"{when} interrupts\", sum + 0 }}' /proc/interrupts"
    blocks = f"awk '{{ print \"{when} block\", $1 + $5 }}' /sys/block/$disk/stat"
    return "\n".join([sums, disk, interrupts, blocks])
