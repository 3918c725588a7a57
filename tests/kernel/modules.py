# SPDX-License-Identifier: MIT
"""The kernel module of tests/module, found or built in the guest, and loaded for a test.

    with modules.udmabuf_cache(size_limit_mb=128) as node: ...      # /dev/udmabuf_cache until the end of the block
    python3 -m tests.kernel.modules                                 # builds and loads it, and leaves it loaded

tests/vm/run has built the module before it booted (tests/vm/vmlib/module.py). One whose source has changed since is
built in /run, once, with the headers from a disk that is mounted for that. Watch tells whether the kernel has warned
of what a test did with a module.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.kernel.importing import settle
from tests.vm.vmlib.module import BUILT, sources_digest

SOURCES: Final = Path(__file__).parents[1] / "module"
NAME: Final = "udmabuf_cache"
NODE: Final = Path("/dev", NAME)
PARAMETERS: Final = Path("/sys/module", NAME, "parameters")

_HEADERS_DISK: Final = Path("/dev/disk/by-id/virtio-headers")
_BUILDS: Final = Path("/run/udmabufd-modules")
_PATIENCE: Final = 60.0

# Documentation/admin-guide/tainted-kernels.rst: a module that is not the kernel's own, and one without a signature.
_TAINTS_OF_LOADING: Final = 1 << 12 | 1 << 13
_TROUBLE: Final = re.compile(
    rf"WARNING:|BUG|cut here|Oops|bad page|Bad page|lockup|blocked for more than|call trace|x86/PAT|CPA |{NAME}:",
    re.IGNORECASE,
)
_EXPECTED: Final = re.compile(r"loading out-of-tree module|module verification failed|no PAT on this machine")


class Watch:
    """What the kernel has said and how it is tainted since this was made, for a test to find nothing of."""

    def __init__(self) -> None:
        self._tainted = _tainted()
        self._mark = time.clock_gettime(time.CLOCK_MONOTONIC)

    def assert_silent(self) -> None:
        """Fail if the kernel has warned, or is tainted by more than the loading of modules, or the module spoke."""
        said = [line for line in self._lines() if _TROUBLE.search(line) and not _EXPECTED.search(line)]
        assert not said, "\n".join(said)
        assert _tainted() & ~_TAINTS_OF_LOADING == self._tainted & ~_TAINTS_OF_LOADING

    def _lines(self) -> list[str]:
        lines: list[str] = []
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while True:
                try:
                    record = os.read(fd, 8192).decode(errors="replace")
                except BlockingIOError:
                    return lines
                except BrokenPipeError:
                    continue  # Overwritten before it was read: the next one follows.
                # Documentation/ABI/testing/dev-kmsg: "level,sequence,microseconds,flags;text"
                head, _, text = record.partition(";")
                if int(head.split(",")[2]) / 1e6 >= self._mark:
                    lines.append(text.splitlines()[0])
        finally:
            os.close(fd)


def build() -> Path:
    """Return the module's file, built for the kernel that runs. Raises RuntimeError with the compiler's words."""
    version = sources_digest(SOURCES.iterdir())
    built = Path("/", BUILT, version, f"{NAME}.ko")
    if built.exists():
        return built
    folder = _BUILDS / version
    built = folder / f"{NAME}.ko"
    _BUILDS.mkdir(exist_ok=True)
    with open(_BUILDS / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(SOURCES, folder)
            print(f"building {NAME}.ko, once: a minute or two in an emulated machine", file=sys.stderr, flush=True)
            _make(folder)
    return built


def load(**parameters: int) -> None:
    """Load the module: its node is there at once. Raises CalledProcessError, with the reason on stderr."""
    words = [f"{name}={value}" for name, value in parameters.items()]
    subprocess.run(["insmod", build(), *words], check=True)


def unload() -> None:
    """Unload the module when its last buffer is gone, which the kernel releases a moment after the last close."""
    references = Path("/sys/module", NAME, "refcnt")
    deadline = time.monotonic() + _PATIENCE
    while int(references.read_text()):
        assert time.monotonic() < deadline, f"buffers of {NAME} or its device are still open"
        time.sleep(0.01)
    subprocess.run(["rmmod", NAME], check=True)


@contextmanager
def udmabuf_cache(**parameters: int) -> Iterator[Path]:
    """Have the module loaded with these parameters until the end of the block, and udev know of it before and after.

    The node belongs to root alone, unless a rule says otherwise.
    """
    load(**parameters)
    try:
        settle()
        yield NODE
    finally:
        unload()
        settle()


def _tainted() -> int:
    return int(Path("/proc/sys/kernel/tainted").read_text())


def _make(folder: Path) -> None:
    headers = _headers()
    result = subprocess.run(
        ["make", "-C", folder, f"KDIR={headers}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{NAME} cannot be built against {headers}:\n{result.stdout}")


def _headers() -> Path:
    """Return the folder with the headers of the kernel that runs, with the disk mounted and all of it linked to."""
    headers = Path("/usr/src", f"linux-headers-{os.uname().release}")
    if headers.exists():
        return headers
    if not _HEADERS_DISK.exists():
        raise RuntimeError(
            f"no {_HEADERS_DISK}: tests/vm/run could not fetch the headers, and said why before it booted"
        )
    mount = _BUILDS / "headers"
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "ro", _HEADERS_DISK, mount], check=True)
    for there in [*mount.glob("usr/src/linux-*"), *mount.glob("usr/lib/linux-kbuild-*")]:
        here = Path("/", there.relative_to(mount))
        if not here.exists():
            here.symlink_to(there)
    return headers


if __name__ == "__main__":
    load()
