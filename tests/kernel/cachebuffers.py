# SPDX-License-Identifier: MIT
"""Buffers of /dev/udmabuf_cache for the tests of it: flags, what the page tables must say, memfds of both kinds.

The flags are written down here once more, for the tests to have the ABI from nobody that they test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from tests.kernel.buffers import Preparation, sealed_memfd
from tests.kernel.hugepools import HUGE, huge_pages
from udmabufd.linux import memfd, udmabuf
from udmabufd_base.fd import OwnedFd

CLOEXEC: Final = 0x01
ATTRIBUTES: Final = {"none": 0x00, "cached": 0x02, "uncached": 0x04, "write-combine": 0x08}
EXCLUSIVE: Final = ("uncached", "write-combine")
"""Those that a page can have in one buffer only."""

_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_NOPAT: Final = "nopat" in Path("/proc/cmdline").read_text().split()
KINDS: Final = {"none": "WB", "cached": "WB", "uncached": "UC-", "write-combine": "UC-" if _NOPAT else "WC"}
"""What the page tables have to say of each. Without PAT the kernel has no write-combining."""

SEALS: Final = memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW

Part = tuple[OwnedFd, int, int]
"""A memfd, an offset in it, and a size, both in bytes."""


def create(device: OwnedFd, backing: OwnedFd, attribute: str, size: int, offset: int = 0) -> OwnedFd:
    """Return a buffer of part of a memfd."""
    return udmabuf.create(device.fileno(), backing.fileno(), offset, size, CLOEXEC | ATTRIBUTES[attribute])


def create_list(device: OwnedFd, parts: Sequence[Part], attribute: str) -> OwnedFd:
    """Return a buffer of several parts."""
    items = [udmabuf.Item(backing.fileno(), offset, size) for backing, offset, size in parts]
    return udmabuf.create_list(device.fileno(), items, CLOEXEC | ATTRIBUTES[attribute])


@contextmanager
def memory(kind: str, size: int, prepare: Preparation = memfd.populate) -> Iterator[OwnedFd]:
    """A memfd: `shmem`; `thp`, of large folios where the size allows it; or `hugetlb`, with the pool for it."""
    if kind != "hugetlb":
        with large_folios() if kind == "thp" else nullcontext(), sealed_memfd(size, SEALS, prepare) as backing:
            yield backing
        return
    with huge_pages(-(-size // HUGE)), memfd.create("huge", size, huge_page=HUGE) as backing:
        prepare(backing.fileno(), size)
        memfd.add_seals(backing.fileno(), SEALS)
        yield backing


@contextmanager
def large_folios() -> Iterator[None]:
    """Have memfds of ordinary pages allocated in large folios until the end of the block."""
    before = _SHMEM_ENABLED.read_text()
    _SHMEM_ENABLED.write_text("always\n")
    try:
        yield
    finally:
        # The present setting stands in brackets.
        _SHMEM_ENABLED.write_text(before[before.index("[") + 1 : before.index("]")])


def at(address: int, size: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of this process's memory at an address; not to be used when the mapping has moved or gone."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def is_free(backing: OwnedFd) -> bool:
    """Whether nothing has a reference to the memfd's pages, which must not be mapped; final if so."""
    return memfd.prove_free(backing.fileno())
