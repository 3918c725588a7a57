# SPDX-License-Identifier: MIT
"""Where memory really lies: page frames as the kernel's pagemap tells them to root, and how to have it lie scattered.

A mapping of a dma-buf of udmabuf shows no frames there, one of the memfd behind it does.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from udmabufd_base.fd import OwnedFd

PAGE: Final = mmap.PAGESIZE

_PRESENT: Final = 1 << 63  # Documentation/admin-guide/mm/pagemap.rst
_FRAME: Final = (1 << 55) - 1
_MADV_NOHUGEPAGE: Final = 15


def of_buffer(pid: int, name: str, size: int) -> list[int]:
    """Return the physical addresses of the pages of the memfd that the service's process has for a buffer."""
    (link,) = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if _leads_to(fd, f"/memfd:{name}")]
    with OwnedFd(os.open(link, os.O_RDWR | os.O_CLOEXEC)) as memfd:
        return of_file(memfd.fileno(), size)


def _leads_to(link: Path, name: str) -> bool:
    try:
        return str(link.readlink()).removesuffix(" (deleted)") == name
    except FileNotFoundError:
        return False  # Closed meanwhile.


def of_file(fd: int, size: int) -> list[int]:
    """Return the physical addresses of the pages of a memfd."""
    # All of it: a part of a huge page can be mapped, and not be unmapped; munmap(2) fails, and mmap.close() is silent.
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)[:size]
        # Only what this process has touched is in its page table.
        view[::PAGE].sum()
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            table = os.pread(pagemap.fileno(), size // PAGE * 8, view.ctypes.data // PAGE * 8)
        del view
    entries = struct.unpack(f"={size // PAGE}Q", table)
    assert all(entry & _PRESENT and entry & _FRAME for entry in entries), "pagemap shows frames to root alone"
    return [(entry & _FRAME) * PAGE for entry in entries]


def runs(frames: list[int]) -> int:
    """Return how many physically adjacent runs these pages make up."""
    return 1 + sum(after - before != PAGE for before, after in itertools.pairwise(frames))


def highest_address() -> int:
    """Return the physical address of the last byte of the machine's memory, as the firmware told the kernel."""
    lines = Path("/proc/iomem").read_text().splitlines()
    ends = [int(line.split(" : ")[0].split("-")[1], 16) for line in lines if line.endswith(" : System RAM")]
    return max(ends)


@contextmanager
def scattered(size: int) -> Iterator[None]:
    """Leave `size` bytes of free memory in single pages, no two of them adjacent, which the kernel gives out first."""
    with mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(_MADV_NOHUGEPAGE)
        view = np.frombuffer(memory, dtype=np.uint8)
        view[::PAGE] = 1
        address = view.ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        for offset in range(0, 2 * size, 2 * PAGE):
            given = libc.madvise(ctypes.c_void_p(address + offset), ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED)
            assert given == 0, os.strerror(ctypes.get_errno())
        del view
        yield
