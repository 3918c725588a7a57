# SPDX-License-Identifier: MIT
"""Pages of 2 MiB, set aside for a block of a test and given back by it: the one place that changes their pool.

A page that is in use when the pool is made smaller stays, as surplus, until it is free. So what the pool has beside
those is what is put back, and whoever leaves a page in use fails, not the test after it. Sources:
Documentation/admin-guide/mm/hugetlbpage.rst and set_max_huge_pages in mm/hugetlb.c of Linux.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.kernel.witness import bufinfo

HUGE: Final = 2 << 20
"""Bytes of a page."""

POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

PATIENCE: Final = 60.0
"""Seconds for pages to come back after the last descriptor was closed; an emulated machine is slow."""

SetPool = Callable[[int, int], None]
"""Sets how many pages there are, and how many may be made when asked for."""

_COMPACT: Final = Path("/proc/sys/vm/compact_memory")
_AREA: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
"""What the line of /proc/PID/smaps that names an area begins with."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What the kernel tells of the pool, in pages. Surplus ones are part of `total`, reserved ones of `free`."""

    total: int
    free: int
    reserved: int
    surplus: int

    @property
    def persistent(self) -> int:
        """How many there are whether somebody uses them or not."""
        return self.total - self.surplus

    @property
    def used(self) -> int:
        """How many somebody has, or was promised."""
        return self.total - self.free + self.reserved


def read() -> Pool:
    """Return how it is now."""
    return Pool(*(int((POOL / f"{name}_hugepages").read_text()) for name in ("nr", "free", "resv", "surplus")))


def free_huge_pages() -> int:
    """Return how many pages nobody has."""
    return read().free


@contextmanager
def huge_pages(count: int, patience: float = PATIENCE) -> Iterator[None]:
    """Have `count` more free pages until the end of the block, when all must be free again: raises AssertionError with
    who has them otherwise.
    """
    before = read()
    wanted = max(before.persistent, before.used) + count
    with _put_back(before, patience):
        _write(wanted)
        if read().persistent < wanted:
            # What the page cache has spread over all of memory can be moved together.
            _COMPACT.write_text("1\n")
            _write(wanted)
        assert read().persistent == wanted, f"memory is too fragmented for {count} huge pages: {read()}"
        yield


@contextmanager
def pool(patience: float = PATIENCE) -> Iterator[SetPool]:
    """A function that sets what the pool has and may have, until the end of the block, which is as in huge_pages().
    Nobody may have any of its pages before.
    """
    overcommit = POOL / "nr_overcommit_hugepages"
    before, beyond = read(), overcommit.read_text()
    await_return(0, patience)

    def change(pages: int, more: int) -> None:
        overcommit.write_text(f"{more}\n")
        _write(pages)
        assert read().total == pages, f"memory is too fragmented for {pages} huge pages: {read()}"

    with _put_back(before, patience):
        try:
            yield change
        finally:
            overcommit.write_text(beyond)


@contextmanager
def _put_back(before: Pool, patience: float) -> Iterator[None]:
    try:
        yield
        # Only of a block that ended as it should: what a failed one still has is not what failed.
        await_return(before.used, patience)
    finally:
        _write(before.persistent)


def await_return(used: int, patience: float = PATIENCE) -> None:
    """Wait until no more than `used` pages are in use. Raises AssertionError."""
    deadline = time.monotonic() + patience
    while read().used > used:
        assert time.monotonic() < deadline, (
            f"{read().used - used} huge pages are in use still, {patience:.0f} s after the last use that there should "
            f"be ({read()}): " + ("; ".join(holders()) or "by no process and no dma-buf")
        )
        time.sleep(0.05)


def _write(persistent: int) -> None:
    (POOL / "nr_hugepages").write_text(f"{persistent}\n")


def holders() -> list[str]:
    """Return who has huge pages: files and mappings of processes; and all dma-bufs, of which it cannot be told."""
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        with suppress(OSError):  # It has ended meanwhile.
            who = f"{(process / 'comm').read_text().strip()} ({process.name})"
            found += [f"{who} has {what}" for what in (*_files(process), *_mappings(process))]
    return found + [f"there is the dma-buf {one}" for one in bufinfo().values()]


def _files(process: Path) -> list[str]:
    found = []
    for entry in (process / "fd").iterdir():
        with suppress(OSError):  # Closed meanwhile.
            # Of files of hugetlbfs, the block is a page.
            if entry.stat().st_blksize == HUGE or str(entry.readlink()).startswith("/dmabuf:"):
                found.append(f"descriptor {entry.name} of {entry.readlink()}")
    return found


def _mappings(process: Path) -> list[str]:
    found, area = [], ""
    for line in (process / "smaps").read_text().splitlines():
        if _AREA.match(line):
            area = line
        elif line.split() == ["KernelPageSize:", "2048", "kB"]:
            found.append(f"mapping {area}")
    return found
