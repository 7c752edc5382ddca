"""What a scenario is given: guests, disks, programs, and a place for checks and figures.

A scenario is a module with TITLE, SECONDS_MAX and `play(lab)`. It raises Failed when a check does not hold and
NotRun when the host lacks something; what it started is ended for it.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from labkit.guest import Disk, Failed, Guest

TCG = "tcg,thread=multi,tb-size=256"
PROBE_SECONDS_MAX = 25
# Folders of sockets, each with the number of the lab's process that made it.
SOCKETS = "twinpoint-lab-"


class NotRun(Exception):
    """Why a scenario could not be run here; one line."""


class TimeLimit(BaseException):
    """The scenario's or the whole run's time is over. No ordinary error: nothing that is caught by a step."""


class Session:
    """One scenario's surroundings."""

    def __init__(self, image, programs, accelerator, folder, options):
        self.image = image
        self.programs = programs
        self.accelerator = accelerator
        self.folder = pathlib.Path(folder)
        self.options = options
        self.notes = []
        self.guests = []
        self._disks = []
        # The path of a unix socket has 107 bytes at most.
        self.sockets = tempfile.mkdtemp(prefix=f"{SOCKETS}{os.getpid()}-")
        shared = self.folder / "share" / "bin"
        shared.mkdir(parents=True)
        for name, path in programs.items():
            shutil.copy(path, shared / name)

    @property
    def transport_flags(self):
        """For `twinpoint serve`; nothing where the program has no such flag yet."""
        _, usage = self.on_host(self.programs["twinpoint"], "serve", "--help")
        return f"--transport {self.options.transport}" if "--transport" in usage else ""

    def guest(self, name, disks=(), memory_mib=640):
        """Starts guest "a" or "b"; it may be started again after it ended."""
        self.guests = [guest for guest in self.guests if guest.name != name]
        guest = Guest(self.image, name, self.folder, self.sockets, self.accelerator, disks, memory_mib)
        self.guests.append(guest)
        return guest

    def pair(self, disks_of_a=(), disks_of_b=()):
        """Both guests with their network up."""
        guests = [self.guest("a", disks_of_a), self.guest("b", disks_of_b)]
        for guest in guests:
            guest.set_up()
        return guests

    def disk(self, name, mib, metadata_bytes=0):
        """An NVMe device of zeroes that keeps all that was written to it when the power is cut.

        It may have bytes of metadata beside each of its logical blocks.
        """
        path = self.folder / f"{name}.raw"
        with open(path, "wb") as file:
            file.truncate(mib << 20)
        self._disks.append(path)
        return Disk(path, metadata_bytes=metadata_bytes)

    def overlay(self, disk, name):
        """A device over another one that loses, when the power is cut, what was not flushed; see docs/LAB.md."""
        path = self.folder / f"{name}.qcow2"
        options = f"cluster_size=4k,lazy_refcounts=on,backing_file={disk.path},backing_fmt={disk.form}"
        self.image_tool("create", "-q", "-f", "qcow2", "-o", options, str(path))
        self._disks.append(path)
        return Disk(path, "qcow2")

    def flattened(self, overlay, name):
        """The content of an overlay and what is under it as a device of its own."""
        path = self.folder / f"{name}.raw"
        self.image_tool("convert", "-O", "raw", str(overlay.path), str(path))
        self._disks.append(path)
        return Disk(path)

    def copy(self, disk, name):
        """A copy of a raw device that nothing uses; one of the same name is replaced."""
        path = self.folder / f"{name}.raw"
        shutil.copy(disk.path, path)
        self._disks.append(path)
        return Disk(path)

    def preserve(self, disk, name):
        """Keeps a device's content beside the logs, for whoever looks into a failure."""
        shutil.copy(disk.path, self.folder / name)

    def drop(self, disk):
        """Removes a device that nothing uses any more."""
        disk.path.unlink(missing_ok=True)

    def image_tool(self, *words):
        command = self.image.host_program("usr/bin/qemu-img") + list(words)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise Failed(f"qemu-img {words[0]}: {done.stdout.decode(errors='replace').strip()}")

    def on_host(self, *words, seconds=120):
        """Runs a program on the host and answers its status and output."""
        done = subprocess.run(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=seconds,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    def compare(self, first, second):
        """Checks both stopped stores, and that they hold the same blocks at the newest CP both have."""
        status, said = self.on_host(self.programs["twinpoint"], "verify", "--buffered", first.path, second.path)
        self.check(status == 0, f"verify A B ended with {status}: {said.strip()[-600:]}")
        return said

    def verify(self, disk):
        """Checks one stopped store: every structure, and the checksum of every block."""
        status, said = self.on_host(self.programs["twinpoint"], "verify", "--buffered", disk.path)
        self.check(status == 0, f"verify ended with {status}: {said.strip()[-600:]}")

    def wait(self, holds, what, seconds=60):
        """Waits until `holds()`; for things that no guest announces."""
        limit = time.monotonic() + seconds
        while not holds():
            self.check(time.monotonic() < limit, f"after {seconds} s not so: {what}")
            time.sleep(0.2)

    def sleep(self, seconds):
        """For moments that are to be arbitrary, never in place of a condition."""
        time.sleep(seconds)

    def check(self, holds, what):
        if not holds:
            raise Failed(what)

    def say(self, text):
        """A line on the terminal and in the scenario's log."""
        print(f"  {text}", flush=True)
        with open(self.folder / "scenario.log", "a") as log:
            log.write(text + "\n")

    def note(self, text):
        """A figure or a fact for the table at the end."""
        self.notes.append(text)
        self.say(text)

    def troubles(self):
        return [f"guest {guest.name}: {line}" for guest in self.guests for line in guest.troubles()]

    def panics(self):
        """The first line of each panic of our programs, and the next, which says why; and in whose log."""
        found = []
        for path in sorted((self.folder / "share").glob("*/*.out")):
            lines = path.read_text(errors="replace").splitlines()
            for at, line in enumerate(lines):
                if "panicked at" in line:
                    found.append(f"{path.parent.name}/{path.name}: {' '.join(lines[at : at + 2])}")
        return found

    def end(self, keep_disks=False):
        """Ends all guests and removes the devices' files; logs stay."""
        for guest in self.guests:
            guest.stop()
        if not keep_disks:
            for path in self._disks:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "share" / "bin", ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)


def sweep_sockets():
    """Removes what labs left that were killed."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{SOCKETS}*"):
        process = folder.name.removeprefix(SOCKETS).partition("-")[0]
        if process.isdecimal() and not pathlib.Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def probe_accelerator(image, folder, asked):
    """KVM where it boots our kernel within its limit, software emulation everywhere else; and why, as one line."""
    if asked != "auto":
        return (TCG if asked == "tcg" else asked), f"{asked}, as asked for"
    try:
        open("/dev/kvm", "r+b", buffering=0).close()
    except OSError as error:
        return TCG, f"software emulation: /dev/kvm: {error.strerror}"
    # What was found holds until the host is started anew, or another image is to be booted.
    known = image.cache / "accelerator"
    situation = f"{image.boot.name} {pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if known.exists() and known.read_text() == situation:
        return TCG, "software emulation: a guest did not come up on KVM before"
    with tempfile.TemporaryDirectory(prefix=f"{SOCKETS}{os.getpid()}-") as sockets:
        guest = Guest(image, "a", folder, sockets, "kvm")
        try:
            guest.wait_ready(PROBE_SECONDS_MAX, boots_max=1)
            return "kvm", f"KVM, a guest was up after {guest.ready_seconds:.1f} s"
        except Failed:
            known.write_text(situation)
            return TCG, "software emulation: a guest did not come up on KVM"
        finally:
            guest.cut_power()
