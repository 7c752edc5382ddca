"""One guest: an emulator's process, and the jobs that run in it.

A guest has its console's log, a share with the host, a private network with the other guest, and NVMe devices. It ends
when its scenario ends, when the lab is told to stop, and when the lab's own process is killed.
"""

import ctypes
import os
import pathlib
import select
import signal
import socket
import subprocess
import threading
import time

READY_SECONDS_MAX = 120
# Emulated processors of a busy host were seen to lose a timer before anything of ours ran: such a guest is started anew.
BOOTS_MAX = 2
JOB_SECONDS = 60
NETWORK_MTU = 9000
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}
PEERS = {"a": "b", "b": "a"}
WAIT_FOR = 'wait_for() { for try in $(seq 100); do [[ -e $1 ]] && return; sleep 0.1; done; echo "no $1"; exit 1; }'
# What of an overlay is in memory only, until a flush.
OVERLAY_CACHE = "8M"


class Failed(Exception):
    """A check that did not hold, or a step that did not work; one line."""


class GuestLost(Failed):
    """The guest ended while something was asked of it."""


class Job:
    """A script that runs in a guest."""

    def __init__(self, guest, number, script, seconds):
        self.guest = guest
        self.number = number
        self.script = script
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.status = None
        self.finished = threading.Event()

    @property
    def output(self):
        path = self.guest.folder / f"{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, check=True):
        """Waits for the end and answers the output. Raises Failed at a status other than 0, unless not `check`ed."""
        while not self.finished.wait(0.5):
            if time.monotonic() > self.deadline:
                self.end()
                raise Failed(f"{self.guest.name}: no end after {self.seconds} s: {self._first_line()}{self._tail()}")
        if self.status is None:
            raise GuestLost(f"{self.guest.name} ended during: {self._first_line()}{self._tail()}")
        if check and self.status != 0:
            raise Failed(f"{self.guest.name}: status {self.status}: {self._first_line()}{self._tail()}")
        return self.output

    def wait_for(self, text, seconds=60):
        """Waits until the output has the text."""
        limit = time.monotonic() + seconds
        while text not in self.output:
            if self.finished.is_set() or time.monotonic() > limit:
                raise Failed(f"{self.guest.name}: {text!r} was not said: {self._first_line()}{self._tail()}")
            time.sleep(0.1)
        return self.output

    @property
    def running(self):
        return not self.finished.is_set()

    def end(self):
        """Kills it in the guest."""
        if self.running and self.guest.running:
            self.guest.send(f"end {self.number}")

    def end_and_wait(self):
        self.end()
        self.wait(check=False)

    def _first_line(self):
        return self.script.strip().splitlines()[-1][:120]

    def _tail(self):
        lines = self.output.strip().splitlines()[-6:]
        return "".join(f"\n    | {line[:200]}" for line in lines)


class Disk:
    """A backing file of an emulated NVMe device."""

    def __init__(self, path, form="raw", metadata_bytes=0):
        self.path = pathlib.Path(path)
        self.form = form
        self.metadata_bytes = metadata_bytes

    def words(self, index, name):
        # writeback: a flush in the guest is one fdatasync here, on any file system, O_DIRECT or not.
        options = f"if=none,id=disk{index},file={self.path},format={self.form},discard=unmap,detect-zeroes=off"
        options += ",cache=writeback,aio=threads" + (f",l2-cache-size={OVERLAY_CACHE}" if self.form == "qcow2" else "")
        controller = f"nvme,id=nvme{index},serial=lab-{name}-{index},max_ioqpairs=4,subsys=subsystem{index}"
        namespace = f"nvme-ns,drive=disk{index},bus=nvme{index},ms={self.metadata_bytes}"
        subsystem = f"nvme-subsys,id=subsystem{index}"
        return ["-drive", options, "-device", subsystem, "-device", controller, "-device", namespace]


class Guest:
    """Starts at once; `run` and `start` wait until it is ready."""

    def __init__(self, image, name, folder, sockets, accelerator, disks=(), memory_mib=640, cores=1):
        self.name = name
        self.address = ADDRESSES[name]
        self.share = pathlib.Path(folder) / "share"
        self.folder = self.share / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = pathlib.Path(folder) / f"{name}.console"
        self.disks = len(disks)
        self.jobs = {}
        self.numbers = len(list(self.folder.glob("*.sh")))
        self.ready = threading.Event()
        self.lock = threading.Lock()
        self.agent = None
        self._hardware = (image, sockets, accelerator, disks, memory_mib, cores)
        self._boot()

    def _boot(self):
        self.started = time.monotonic()
        self.ready.clear()
        self._listener = self._listen(self._hardware[1])
        self.process = self._start(*self._hardware)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _listen(self, sockets):
        self.agent_path = f"{sockets}/{self.name}.agent"
        if os.path.exists(self.agent_path):
            os.unlink(self.agent_path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.agent_path)
        listener.listen(1)
        return listener

    def _start(self, image, sockets, accelerator, disks, memory_mib, cores):
        if os.path.exists(f"{sockets}/{self.name}.net"):
            os.unlink(f"{sockets}/{self.name}.net")
        words = emulator_words(image, self.name, self.share, sockets, accelerator, disks, memory_mib, cores)
        words += [
            "-chardev", f"socket,id=agent,path={self.agent_path}", "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=agent,name=lab.agent",
        ]
        with open(self.console, "ab") as console:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=console, stderr=console, preexec_fn=_die_with_parent
            )

    def _read(self):
        """Reads what the agent says, until the guest is gone; then nothing that is asked of it waits any longer."""
        connection = None
        while connection is None and self.running:
            if select.select([self._listener], [], [], 0.5)[0]:
                connection, _ = self._listener.accept()
        self._listener.close()
        rest = b""
        while connection is not None:
            self.agent = connection
            try:
                data = connection.recv(4096)
            except OSError:
                break
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._hear(line.decode(errors="replace").split())
        self.process.wait()
        with self.lock:
            for job in self.jobs.values():
                job.finished.set()
        self.ready.set()

    def _hear(self, words):
        if words == ["ready"]:
            self.ready_seconds = time.monotonic() - self.started
            self.ready.set()
        elif len(words) == 3 and words[0] == "done" and int(words[1]) in self.jobs:
            job = self.jobs[int(words[1])]
            job.status = int(words[2])
            job.finished.set()

    @property
    def running(self):
        return self.process.poll() is None

    def wait_ready(self, seconds=READY_SECONDS_MAX, boots_max=BOOTS_MAX):
        """Raises GuestLost when it ended, Failed when it does not come up in time, however often it is started."""
        boots = 1
        while not self.ready.wait(seconds):
            if boots == boots_max:
                raise Failed(f"guest {self.name} is not up after {seconds} s, {boots} times, see {self.console}")
            boots += 1
            self.cut_power()
            self.console.rename(self.console.with_suffix(".console-hung"))
            self._boot()
        if not self.running:
            raise GuestLost(f"guest {self.name} ended, see {self.console}")

    def send(self, line):
        with self.lock:
            try:
                self.agent.sendall(line.encode() + b"\n")
            except OSError as error:
                raise GuestLost(f"guest {self.name} does not listen: {error}") from error

    def start(self, script, seconds=JOB_SECONDS):
        """Starts a bash script in the guest and answers the Job. It is ended after its limit in seconds, if waited for."""
        self.wait_ready()
        self.numbers += 1
        number = self.numbers
        job = Job(self, number, script, seconds)
        (self.folder / f"{number}.sh").write_text(script.strip() + "\n")
        self.jobs[number] = job
        if not self.running:
            job.finished.set()
        self.send(f"run {number}")
        return job

    def run(self, script, seconds=JOB_SECONDS, check=True):
        """Runs a bash script in the guest and answers what it wrote."""
        return self.start(script, seconds).wait(check)

    def set_up(self):
        """Brings up the private network and the devices. Jumbo frames: SoftRoCE's MTU is 4096 with them, and 1024 without."""
        self.run(f"""
          modprobe virtio_net
          {WAIT_FOR}
          wait_for /sys/class/net/eth0
          ip link set eth0 mtu {NETWORK_MTU} up
          ip address add {self.address}/24 dev eth0
        """)
        self.find_disks()

    def find_disks(self, parameters=""):
        """Loads the NVMe driver and names the devices /dev/disk0 and on, in the order they were given.

        The kernel numbers them as it finds them, so they are told apart by serial numbers.
        """
        self.run(f"""
          modprobe nvme {parameters}
          {WAIT_FOR}
          for number in $(seq 0 {self.disks - 1}); do
            for try in $(seq 100); do
              for found in /sys/block/nvme*; do
                [[ $(cat $found/device/serial 2>/dev/null) == lab-{self.name}-$number* ]] || continue
                ln -sf ${{found##*/}} /dev/disk$number
              done
              [[ -b /dev/disk$number ]] && break
              sleep 0.1
            done
            wait_for /dev/disk$number
          done
        """)

    def cut_power(self):
        """Kills the emulator: what a device held in its volatile cache is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join(10)

    def stop(self):
        """Asks the guest to turn itself off, and kills it when it does not."""
        if self.running and self.agent is not None:
            try:
                self.send("off")
                self.process.wait(10)
            except (Failed, subprocess.TimeoutExpired):
                pass
        self.cut_power()

    def troubles(self):
        """Lines of the console in which the guest's kernel tells of trouble of its own."""
        words = ("BUG:", "Oops", "Kernel panic", "Call Trace", "WARNING:", "hung_task", "blocked for more")
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return [line.strip() for line in text.splitlines() if any(word in line for word in words)]


def emulator_words(image, name, share, sockets, accelerator, disks, memory_mib=640, cores=1):
    """The command that runs a guest with its console on the standard streams."""
    own, other = f"{sockets}/{name}.net", f"{sockets}/{PEERS[name]}.net"
    words = image.emulator() + [
        "-M", "q35", "-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "max",
        "-smp", str(cores), "-m", str(memory_mib), "-nographic", "-nodefaults", "-no-user-config", "-no-reboot",
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
        "-kernel", str(image.kernel), "-initrd", str(image.initramfs),
        "-drive", f"if=none,id=root,file={image.root},format=raw,readonly=on,file.locking=off",
        "-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci",
        "-virtfs", f"local,path={share},mount_tag=lab,security_model=none,id=lab",
        # Unix datagrams between the two emulators: nothing else is on this network, and nothing was seen to get lost.
        "-netdev", f"dgram,id=net,local.type=unix,local.path={own},remote.type=unix,remote.path={other}",
        "-device", f"virtio-net-pci,netdev=net,romfile=,mac=52:54:00:12:34:0{name}",
    ]
    for index, disk in enumerate(disks):
        words += disk.words(index, name)
    # The emulated timer may be late on a busy host: the kernel is not to take that for a broken board.
    kernel = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off no_timer_check nvme_core.multipath=N"
    return words + ["-append", f"{kernel} lab.name={name}"]


def _die_with_parent():
    """In the child, before it is the emulator: a new group, so that an operator's Ctrl-C is ours to deal with."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
