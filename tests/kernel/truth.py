# SPDX-License-Identifier: MIT
"""Whether what the service says of a buffer's cache attribute is what the page tables have; settings for the service.

Nothing of the daemon is used: what is said comes over the bus, what is comes from tests/kernel/pagetables.py.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

from tests.bus.peer import Peer
from tests.kernel import areas, modules, unit
from tests.kernel.areas import PAGE, area
from tests.kernel.pagetables import PageTables
from udmabufd_base.fd import OwnedFd

BUS: Final = "unix:path=/run/dbus/system_bus_socket"
NOPAT: Final = "nopat" in Path("/proc/cmdline").read_text(encoding="ascii").split()

KINDS: Final = {"cached": "WB", "write-combine": "WC", "uncached": "UC-"}
"""What an entry of the page table has to be for each word of the contract. Linux maps no memory stronger than UC-."""

COMBINED: Final = "uncached" if NOPAT else "write-combine"
"""What memory really is of which a driver says that it is write-combined."""

ATTRIBUTES: Final = tuple(KINDS)
POLICIES: Final = ("prefer", "require")

CONFIG: Final = f'[udmabuf]\ndevice = "{modules.NODE}"\nparameters = "{modules.PARAMETERS}"\n'
"""What has the service take the device of tests/module in the place of the kernel's own."""

HAD: Final = {attribute: attribute for attribute in ATTRIBUTES} | ({"write-combine": "cached"} if NOPAT else {})
"""What that device gives who prefers an attribute. Without PAT write-combining cannot be had, and what is not known to
be so is not asked for."""

_CONFIG: Final = Path("/run/udmabufd/udmabufd.toml.d/90-cache.toml")


def kinds(tables: PageTables, address: int, size: int, pid: int | None = None) -> set[str]:
    """Return the attributes of all pages at an address, of this process or another: all must be there."""
    return {page.kind for page in tables.attributes(os.getpid() if pid is None else pid, address, size)}


def assert_true(tables: PageTables, fd: OwnedFd, info: Mapping[str, Any]) -> None:
    """Map a buffer, and see that each page of it is as `info` says, for this process, for a child that has inherited
    the mapping, and where the mapping was moved to.
    """
    size, expected = info["size"], {KINDS[info["cache_effective"]]}
    with area(fd.fileno(), size) as address:
        areas.write(address, size)
        assert kinds(tables, address, size) == expected, f"{info['allocator']} is told to be {info['cache_effective']}"
        with without_warning_of_threads(), areas.child(address, size) as pid:
            assert kinds(tables, address, size, pid) == expected
        # Only some pages: into a larger hole the interpreter could map memory, which would go with the mapping.
        part = min(size, 8 * PAGE)
        with areas.moved(address + size - part, part) as there:
            areas.read(there, part)
            assert kinds(tables, there, part) == expected
    with area(fd.fileno(), size, protection=mmap.PROT_READ) as address:
        areas.read(address, size)
        assert kinds(tables, address, size) == expected


@contextmanager
def without_warning_of_threads() -> Iterator[None]:
    """Have Python fork as it is told: the child reads memory and waits for its end, whatever threads there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def frames_of(tables: PageTables, fd: OwnedFd, size: int) -> list[int]:
    """Return the frame numbers of a buffer's pages."""
    with area(fd.fileno(), size) as address:
        areas.read(address, size)
        return [page.pfn for page in tables.attributes(os.getpid(), address, size)]


def kernels_kinds(tables: PageTables, frames: list[int]) -> set[str]:
    """Return how the kernel itself has these pages mapped."""
    return {page.kind for page in tables.direct_maps(frames)}


@contextmanager
def configured(text: str) -> Iterator[None]:
    """Have the installed service started anew with more configuration, and without it afterwards."""
    _CONFIG.parent.mkdir(parents=True, exist_ok=True)
    _CONFIG.write_text(text)
    try:
        unit.systemctl("restart", unit.UNIT)
        yield
    finally:
        _CONFIG.unlink()
        unit.systemctl("restart", unit.UNIT)


@asynccontextmanager
async def connected(address: str = BUS) -> AsyncIterator[Peer]:
    """A connection to a service, by default the installed one, that answers."""
    peer = await Peer.connect(address)
    try:
        await unit.serving(peer)
        yield peer
    finally:
        peer.close()


def announce(node: Path) -> None:
    """Have udev tell everybody that a device has changed."""
    subprocess.run(["udevadm", "trigger", "--action=change", "--settle", node], check=True)
