"""What the guests boot: programs, kernel and image, made of Debian packages and kept under target/lab.

Nothing is installed on the host and nothing needs root: packages are unpacked into folders, the emulator runs from
there with its own libraries, and no package's script is run. Each product has a key, a hash of what it is made of; a
product with another key is made anew, and becomes visible whole or not at all.
"""

import hashlib
import json
import lzma
import os
import pathlib
import shutil
import subprocess

SUITE = "bookworm"
# Where packages come from, as mmdebstrap takes it: a mirror or a sources file; by default Debian's own, security too.
SOURCES = os.environ.get("LAB_SOURCES", "").split()

# What runs on the host, out of its own folder: never mixed with the host's packages.
HOST_PACKAGES = ["qemu-system-x86", "qemu-utils", "e2fsprogs", "zstd"]
KERNEL_PACKAGE = "linux-image-6.12-amd64"
GUEST_PACKAGES = [
    KERNEL_PACKAGE,
    # A system small enough to start in seconds: no service manager, no udev.
    "base-files", "base-passwd", "bash", "coreutils", "util-linux", "mount", "kmod", "iproute2", "iputils-ping",
    "procps", "sed", "grep", "mawk", "findutils", "gzip", "tar", "diffutils", "hostname", "libc-bin", "ncurses-base",
    "busybox-static", "strace",
    # RDMA, and programs that prove that it works before ours does.
    "rdma-core", "libibverbs1", "ibverbs-providers", "librdmacm1", "rdmacm-utils", "ibverbs-utils", "perftest",
    # Block devices, file systems, load.
    "fio", "nbd-client", "libnbd-bin", "xfsprogs", "e2fsprogs", "dmsetup", "nvme-cli", "drbd-utils",
]

# Needed before the image is mounted, in the initramfs; ext4 asks for a crc32c by name.
BOOT_MODULES = ["virtio_blk", "crc32c_generic", "ext4", "overlay"]
# Needed by scenarios; each comes with what it depends on. crc32_generic: SoftRoCE asks for it by name, and without it
# `rdma link add` fails with "No such file or directory".
GUEST_MODULES = [
    "virtio_net", "9pnet_virtio", "9p", "virtio_rng", "crc32_generic", "crc32c_intel", "crc32_pclmul",
    "rdma_rxe", "ib_uverbs", "rdma_ucm", "nvme", "nbd", "ublk_drv", "xfs", "loop", "brd", "null_blk", "dummy", "macvlan",
    "sch_netem", "sch_tbf", "dm_mod", "dm_log_writes", "dm_flakey", "dm_delay", "dm_snapshot", "drbd", "lru_cache", "tls",
]
# Not read by anything in a guest.
PRUNED = [
    "boot", "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/perl", "usr/lib/python3",
    "usr/lib/python3.11", "usr/share/bash-completion", "usr/share/initramfs-tools", "var/cache", "var/lib/apt",
    "var/lib/dpkg", "usr/lib/modules", "lib/modules",
]
FOLDERS = ["lab", "proc", "sys", "dev", "run", "tmp", "mnt/a", "mnt/b", "root", "var/lib/drbd"]

FETCH_SECONDS_MAX = 900


class BuildError(Exception):
    """What could not be made; one line for the operator."""


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Image:
    """The products under one folder. `build` makes what is missing; the properties are valid after it."""

    def __init__(self, cache, guest_files, say=print):
        self.cache = pathlib.Path(cache)
        self.guest_files = pathlib.Path(guest_files)
        self.say = say
        sources = [*SOURCES, SUITE]
        self.host = self.cache / f"host-{key_of(HOST_PACKAGES, sources)}"
        self.packages = self.cache / f"packages-{key_of(GUEST_PACKAGES, sources)}"
        scripts = {path.name: path.read_text() for path in sorted(self.guest_files.iterdir())}
        parts = [self.packages.name, scripts, BOOT_MODULES, GUEST_MODULES, PRUNED, FOLDERS]
        self.boot = self.cache / f"boot-{key_of(*parts, pathlib.Path(__file__).read_text())}"

    @property
    def kernel(self):
        return self.boot / "vmlinux"

    @property
    def initramfs(self):
        return self.boot / "initramfs"

    @property
    def root(self):
        return self.boot / "root.ext4"

    def host_program(self, path):
        """The command words that start a program of the host's folder, with the libraries it was built with."""
        return _started_from(self.host, path)

    def emulator(self):
        data = [word for folder in ("qemu", "seabios") for word in ("-L", str(self.host / "usr/share" / folder))]
        modules = f"QEMU_MODULE_DIR={self.host / 'usr/lib/x86_64-linux-gnu/qemu'}"
        return ["env", modules] + self.host_program("usr/bin/qemu-system-x86_64") + data

    def build(self):
        """Makes what is missing. Raises BuildError."""
        self.cache.mkdir(parents=True, exist_ok=True)
        self._fetch(self.host, HOST_PACKAGES, "emulator and programs")
        self._fetch(self.packages, GUEST_PACKAGES, "kernel and the guests' programs")
        if not self.boot.exists():
            self.say(f"lab: packing kernel, initramfs and image into {self.boot}")
            with _whole_or_nothing(self.boot) as folder:
                self._pack(folder)
        self._drop_old()

    def _fetch(self, target, packages, what):
        if target.exists():
            return
        if shutil.which("mmdebstrap") is None:
            raise BuildError("mmdebstrap is missing: install the package mmdebstrap")
        self.say(f"lab: fetching {what} ({len(packages)} packages and what they need)")
        with _whole_or_nothing(target) as folder:
            # Running as root is not needed: nothing is executed in the tree.
            mode = "root" if os.geteuid() == 0 else "chrootless"
            command = ["mmdebstrap", f"--mode={mode}", "--variant=extract", "--architectures=amd64"]
            command += [f"--include={','.join(packages)}", SUITE, str(folder), *SOURCES]
            log = self.cache / f"{target.name}.log"
            with open(log, "w") as output:
                try:
                    status = subprocess.run(
                        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=FETCH_SECONDS_MAX
                    ).returncode
                except subprocess.TimeoutExpired:
                    status = f"no end after {FETCH_SECONDS_MAX} s"
            if status != 0:
                end = "".join(open(log).readlines()[-5:])
                raise BuildError(f"mmdebstrap failed ({status}), see {log}\n{end}")

    def _pack(self, folder):
        tree = folder / "tree"
        shutil.copytree(self.packages, tree, symlinks=True, ignore=self._without_devices)
        modules = next((self.packages / "lib/modules").iterdir())
        for name in PRUNED:
            shutil.rmtree(tree / name, ignore_errors=True)
        for name in FOLDERS:
            (tree / name).mkdir(parents=True, exist_ok=True)
        (tree / "usr/bin/awk").symlink_to("mawk")
        (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
        (tree / "etc/group").write_text("root:x:0:\n")
        (tree / "etc/hosts").write_text("127.0.0.1 localhost\n10.0.0.1 a\n10.0.0.2 b\n")
        shutil.copy(self.guest_files / "agent", tree / "lab-agent")
        (tree / "lab-agent").chmod(0o755)
        order = self._unpack_modules(modules, tree)
        self._write_initramfs(folder, tree / "lib/modules" / modules.name, order)
        self._extract_kernel(folder, modules.name)
        self._write_root(folder, tree)
        shutil.rmtree(tree)

    def _without_devices(self, path, names):
        """Device nodes have no end when they are copied, and guests get theirs from the kernel."""
        return {"dev", "proc", "sys"} & set(names) if pathlib.Path(path) == self.packages else set()

    def _depmod(self, base, version):
        program = _started_from(self.packages, "bin/kmod", as_name="depmod")
        _checked(program + ["-b", str(base), version], "depmod")

    def _unpack_modules(self, source, tree):
        """Puts the wanted modules into the tree, uncompressed, and answers those to load at boot, in order."""
        version = source.name
        # Debian runs depmod at installation. Its result names what each module needs.
        if not (source / "modules.dep").exists():
            self._depmod(self.packages, version)
        needs = {}
        for line in (source / "modules.dep").read_text().splitlines():
            path, _, rest = line.partition(":")
            needs[_module_name(path)] = (path, rest.split())
        target = tree / "lib/modules" / version
        for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        boot = []
        for wanted in BOOT_MODULES + GUEST_MODULES:
            if wanted not in needs:
                if wanted in _built_in(source):
                    continue
                raise BuildError(f"the kernel {version} has no module {wanted}")
            path, rest = needs[wanted]
            for needed in [*reversed(rest), path]:
                plain = needed.removesuffix(".xz")
                if not (target / plain).exists():
                    (target / plain).parent.mkdir(parents=True, exist_ok=True)
                    packed = (source / needed).read_bytes()
                    (target / plain).write_bytes(lzma.decompress(packed) if needed != plain else packed)
                if wanted in BOOT_MODULES and plain not in boot:
                    boot.append(plain)
        self._depmod(tree, version)
        return boot

    def _write_initramfs(self, folder, modules, order):
        archive = Archive()
        for name in ("bin", "dev", "proc", "sys", "modules", "image", "changes", "root"):
            archive.add(name, 0o040755)
        archive.add("dev/console", 0o020600, device=(5, 1))
        archive.add("bin/busybox", 0o100755, (self.packages / "bin/busybox").read_bytes())
        archive.add("bin/sh", 0o120777, b"busybox")
        archive.add("init", 0o100755, (self.guest_files / "init").read_bytes())
        names = [f"modules/{pathlib.Path(path).name}" for path in order]
        for name, path in zip(names, order):
            archive.add(name, 0o100644, (modules / path).read_bytes())
        archive.add("modules.order", 0o100644, "".join(f"/{name}\n" for name in names).encode())
        (folder / "initramfs").write_bytes(archive.finish())

    def _extract_kernel(self, folder, version):
        """The kernel without its wrapper: the emulator enters it directly, and nothing is decompressed at boot."""
        wrapped = (self.packages / f"boot/vmlinuz-{version}").read_bytes()
        start = wrapped.find(b"\x28\xb5\x2f\xfd")
        while start >= 0:
            packed = folder / "packed"
            packed.write_bytes(wrapped[start:])
            # What follows the kernel in the wrapper is no zstd: the program ends with an error after the kernel.
            command = self.host_program("usr/bin/zstd") + ["-dcqf", str(packed)]
            plain = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            packed.unlink()
            if plain.startswith(b"\x7fELF"):
                (folder / "vmlinux").write_bytes(plain)
                return
            start = wrapped.find(b"\x28\xb5\x2f\xfd", start + 1)
        raise BuildError(f"no kernel was found in vmlinuz-{version}: is it still packed with zstd?")

    def _write_root(self, folder, tree):
        used = sum(path.lstat().st_blocks * 512 for path in tree.rglob("*") if not path.is_symlink())
        image = folder / "root.ext4"
        with open(image, "w") as file:
            file.truncate(used + used // 4 + (32 << 20))
        make = self.host_program("sbin/mke2fs")
        _checked(make + ["-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(image)], "mke2fs")

    def _drop_old(self):
        """Removes products of other keys."""
        kept = {self.host.name, self.packages.name, self.boot.name}
        for path in self.cache.iterdir():
            if path.is_dir() and path.name.split("-")[0] in ("host", "packages", "boot") and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


class Archive:
    """A cpio archive of the form that the kernel unpacks; written here, as a device node in it needs root elsewhere."""

    def __init__(self):
        self.parts = []
        self.count = 0

    def add(self, name, mode, data=b"", device=(0, 0)):
        self.count += 1
        path = name.encode() + b"\0"
        fields = [self.count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self.parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]

    def finish(self):
        self.add("TRAILER!!!", 0)
        return b"".join(self.parts)


class _whole_or_nothing:
    """A folder that gets its name when all of it was made."""

    def __init__(self, target):
        self.target = target
        self.unfinished = target.with_name(target.name + ".unfinished")

    def __enter__(self):
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True)
        return self.unfinished

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.unfinished.rename(self.target)
        else:
            shutil.rmtree(self.unfinished, ignore_errors=True)


def _started_from(folder, path, as_name=None):
    libraries = ":".join(str(folder / name) for name in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
    words = [str(folder / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"), "--library-path", libraries]
    return words + (["--argv0", as_name] if as_name else []) + [str(folder / path)]


def _checked(command, name):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise BuildError(f"{name} failed: {done.stdout.decode(errors='replace')[-500:]}")


def _module_name(path):
    return pathlib.Path(path).name.split(".ko")[0].replace("-", "_")


def _built_in(source):
    return {_module_name(line) for line in (source / "modules.builtin").read_text().splitlines()}
