# SPDX-License-Identifier: MIT
"""Packaged Debian kernels: found by version or suite, fetched, made into what a boot needs."""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from . import host
from .cache import cache_root, cached
from .chroot import run_in_root
from .image import SUITE, make_ext4
from .report import Report, VmError, run_step

KERNELS_KEPT = 4
META = "linux-image-amd64"
# --kernel also takes these; an exact version is looked for in all of them, in this order.
SUITES = (SUITE, f"{SUITE}-backports", "bookworm-backports", "sid")
SHORTHANDS = {"backports": f"{SUITE}-backports", "unstable": "sid", "bookworm": "bookworm-backports"}
# cloud kernels have neither udmabuf nor the drivers; rt ones differ in nothing that matters here but are named apart
PACKAGE = re.compile(r"linux-image-(?P<version>\d\S*-amd64)$")
# What guest/init needs before modprobe is there; what these depend on is added.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4", "virtio_console", "9pnet_virtio", "9p")
# ext4 asks for it by an alias, which modules.dep does not know; newer kernels have it built in.
BOOT_MODULES_IF_ANY = ("crc32c_generic",)
# Raise when what _make() leaves changes.
LAYOUT = "1"


class Kernel:
    """A kernel made ready below its directory: vmlinuz, config, modules.img (ext4), boot-modules/ (in load order)."""

    def __init__(self, version: str, directory: Path) -> None:
        self.version = version
        self.directory = directory

    @property
    def image(self) -> Path:
        """The bootable kernel."""
        return self.directory / "vmlinuz"


def get_kernel(report: Report, root: Path, wanted: str | None) -> Kernel:
    """The kernel of that version, or a suite's current one; None: the image's suite's, as it was when first asked for.

    Raises VmError (status 2) with the list of available ones if there is none such.
    """
    if wanted is None:
        default = root.parent / "default-kernel"
        if not default.exists():
            fresh = default.with_suffix(f".{os.getpid()}")
            fresh.write_text(_newest_of(report, root, SUITE))
            fresh.rename(default)
        wanted = default.read_text()
    suite = SHORTHANDS.get(wanted, wanted)
    if suite in SUITES:
        wanted = _newest_of(report, root, suite)
    version = wanted
    if not re.fullmatch(r"[A-Za-z0-9.+~_-]+", version):
        raise VmError(f"--kernel {version}: not a kernel version", 2)
    family = cache_root() / "kernels"
    key = f"{version}_{LAYOUT}"
    return Kernel(
        version, cached(report, family, key, KERNELS_KEPT, lambda target: _make(report, root, version, target))
    )


class Apt:
    """This machine's apt on one suite's package lists, which are kept apart from the machine's own."""

    def __init__(self, root: Path, suite: str) -> None:
        self.suite = suite
        self._state = state = cache_root() / "apt" / suite
        for folder in ("lists/partial", "archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        sources = state / "sources.list"
        sources.write_text(f"deb [signed-by={host.ARCHIVE_KEYS}] {_mirror(root)} {suite} main\n")
        settings = {
            "Dir::State": state,
            "Dir::State::status": "/dev/null",
            "Dir::Cache": state,
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        self._options = [f"-o{name}={value}" for name, value in settings.items()]

    def update(self) -> bool:
        """Fetches the suite's lists; False if no kernel is known then, neither from the mirror nor from earlier."""
        with open(self._state / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._run("apt-get", "-qq", "update")
        return bool(self.versions())

    def versions(self) -> list[str]:
        """Every amd64 kernel of the suite but the cloud and rt flavours, oldest first."""
        names = self._run("apt-cache", "pkgnames", "linux-image-").stdout.split()
        found = [match["version"] for name in names if (match := PACKAGE.match(name))]
        found = [version for version in found if not re.search(r"-(cloud|rt|unsigned)-", version)]
        return sorted(found, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])

    def depends(self, package: str) -> list[str]:
        """The names that package depends on."""
        text = self._run("apt-cache", "depends", "--important", package).stdout
        return re.findall(r"^\s*\|?Depends: (\S+)", text, re.MULTILINE)

    def download(self, report: Report, packages: list[str], target: Path) -> None:
        """Puts the packages' files into target."""
        words = ["apt-get", *self._options, "-q", "download", *packages]
        run_step(report, f"fetching {', '.join(packages)} ({self.suite})", ["env", "-C", target, *words])

    def _run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [program, *self._options, *words]
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _mirror(root: Path) -> str:
    mirror = host.archive_mirrors().get("main")
    if mirror is None:
        # this machine's apt knows none: the one the image was made from
        listed = (root / "etc/apt/sources.list").read_text()
        found = re.search(rf"^deb (?:\[.*?\] )?(\S+) {SUITE} ", listed, re.MULTILINE)
        if found is None:
            raise VmError(f"{root}/etc/apt/sources.list names no mirror of {SUITE}")
        mirror = found[1]
    return mirror


def _newest_of(report: Report, root: Path, suite: str) -> str:
    report.detail(f"looking up the current kernel of {suite}")
    apt = Apt(root, suite)
    if apt.update():
        for name in apt.depends(META):
            if match := PACKAGE.match(name):
                return match["version"]
    raise VmError(f"no kernel of {suite}: does this machine's Debian mirror have that suite, and is it reachable?", 2)


def find_kernel(report: Report, root: Path, version: str) -> Apt:
    """The suite that has a kernel of that exact version; VmError (status 2) with what there is if none has it."""
    available: list[str] = []
    for suite in SUITES:
        apt = Apt(root, suite)
        report.detail(f"looking for {version} in {suite}")
        if not apt.update():
            available.append(f"    {suite}: not on this machine's mirror")
            continue
        versions = apt.versions()
        if version in versions:
            return apt
        available.append(f"    {suite}: {', '.join(reversed(versions))}")
    raise VmError(f"no packaged kernel {version}. There are:\n" + "\n".join(available), 2)


def _make(report: Report, root: Path, version: str, target: Path) -> None:
    apt = find_kernel(report, root, version)
    package = f"linux-image-{version}"
    # newer kernels are split into several packages, all named by the version
    parts = [name for name in apt.depends(package) if name.startswith("linux-") and name.endswith(version)]
    tree = target / "tree"
    tree.mkdir()
    apt.download(report, [package, *parts], target)
    for archive in target.glob("*.deb"):
        run_step(report, f"unpacking {archive.name}", ["dpkg-deb", "-x", archive, tree])
        archive.unlink()
    modules = tree / "usr/lib/modules" / version
    if not modules.is_dir():
        modules.parent.mkdir(parents=True, exist_ok=True)
        (tree / "lib/modules" / version).rename(modules)
    for name in ("vmlinuz", "config"):
        # newer packages keep them beside the modules
        beside = modules / name
        (beside if beside.exists() else tree / f"boot/{name}-{version}").rename(target / name)
    shared = {f"/usr/lib/modules/{version}": modules}
    run_in_root(report, "depmod", root, ["depmod", version], shared)
    take_boot_modules(modules, target / "boot-modules")
    make_ext4(report, "mke2fs: the kernel's modules", modules, target / "modules.img", "1G")
    run_step(report, "clearing up", ["rm", "-r", tree])


def take_boot_modules(modules: Path, target: Path) -> None:
    """Copies BOOT_MODULES and what they need, unpacked, with a file "order" for insmod."""
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[_module_name(path)] = (path, [_module_name(word) for word in needed.split()])
    built_in = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}

    def ordered(name: str) -> Iterator[str]:
        if name in built_in or (name in BOOT_MODULES_IF_ANY and name not in needs):
            return
        if name not in needs:
            raise VmError(f"kernel {modules.name} has no module {name}, which the guest boots with")
        # modules.dep lists what is needed, directly or not, nearest first
        yield from (name for name in reversed(needs[name][1]))
        yield name

    target.mkdir()
    order = list(dict.fromkeys(name for module in BOOT_MODULES_IF_ANY + BOOT_MODULES for name in ordered(module)))
    for name in order:
        packed = modules / needs[name][0]
        data = packed.read_bytes()
        if packed.suffix == ".xz":
            data = lzma.decompress(data)
        elif packed.suffix != ".ko":
            raise VmError(f"{packed}: modules packed in this way are not known here")
        (target / f"{name}.ko").write_bytes(data)
    (target / "order").write_text("".join(f"{name}.ko\n" for name in order))


def _module_name(path: str) -> str:
    return Path(path).name.split(".", 1)[0].replace("-", "_")
