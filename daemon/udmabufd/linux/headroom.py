# SPDX-License-Identifier: MIT
"""How much memory and how many descriptors may still be had before the kernel refuses, or kills.

Memory of a dma-buf cannot be swapped or reclaimed, and is charged to the control group of the process that allocates
it; beyond memory.max the kernel kills a process of the group instead of answering ENOMEM. What to do with the figures,
and how much slack to leave, is left to the caller: others allocate at the same time.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")

_LIMITS: Final = ("memory.max", "memory.high")

_SLICE: Final = "udmabufd.slice"


@dataclass(frozen=True, slots=True)
class Room:
    """`available` bytes may be allocated under the strictest limit, or, if negative, are in use beyond it.

    `limit_name` is that limit as an administrator knows it (`memory.max of udmabufd.slice`, `MemAvailable`), `limit`
    its bytes (for MemAvailable, of all memory), `present` the bytes in use.
    """

    available: int
    limit_name: str
    limit: int
    present: int


class Headroom:
    """Reads the limits of this process's control group and of all above it, and of the machine.

    `cgroup_root` is where the cgroup v2 hierarchy is mounted, `proc` where proc is. Without cgroup v2, or without its
    memory controller, there is the machine's limit alone.
    """

    def __init__(self, cgroup_root: Path = _CGROUPS, proc: Path = _PROC) -> None:
        self._root = cgroup_root
        self._proc = proc

    def read(self, beside: int = 0) -> Room:
        """Return the least room there is at present; a few small files are read. Raises OSError without /proc.

        `beside` bytes are counted as used by the control groups, though the kernel charges them to none.

        Page cache that is charged to a group counts as in use, though the kernel would drop it before it kills: some
        20 MiB for a service in Python (its modules), to the safe side, and memory.stat would cost more to read.
        """
        rooms = [self._machine()]
        for group in self._groups():
            rooms += _of_group(group, group.name if group != self._root else "the root control group", beside)
        return min(rooms, key=lambda room: room.available)

    def reclaimable(self, evicted: int) -> int:
        """Return how much the kernel could swap out of `evicted` bytes of memfds that this process and its former
        lives are charged for, before it refuses or kills: what is in memory of them, and fits into swap. Raises
        OSError without /proc.
        """
        free = self._memory_info("SwapFree")
        for group in self._groups():
            if (limit := _figure(group / "memory.swap.max")) is not None:
                free = min(free, limit - (_figure(group / "memory.swap.current") or 0))
        own = self._own_group()
        swapped = 0 if own is None else _figure(own / "memory.swap.current") or 0
        # What an idle process has lost of its own memory is none of theirs.
        swapped = max(swapped - self._own_swap(), 0)
        return max(min(evicted - swapped, free), 0)

    def shared_memory(self) -> int | None:
        """Return the bytes of memfds that this process and its former lives are charged for, None if nothing tells.

        Those of a slice of its own: what a former life has allocated is counted there and not in its own group.
        """
        own = self._own_group()
        if own is None:
            return None
        try:
            for line in (own / "memory.stat").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "shmem":
                    return int(value)
        except OSError:
            pass
        return None

    def _machine(self) -> Room:
        total, available = self._memory_info("MemTotal"), self._memory_info("MemAvailable")
        return Room(available, "MemAvailable", total, total - available)

    def _memory_info(self, field: str) -> int:
        """Return the bytes of a line of /proc/meminfo."""
        for line in (self._proc / "meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
        raise OSError(errno.ENODATA, f"/proc/meminfo has no {field}")

    def _own_swap(self) -> int:
        """Return the bytes of this process's own memory that are swapped out: not those of memfds (VmSwap in
        Documentation/filesystems/proc.rst).
        """
        try:
            status = (self._proc / "self/status").read_text(errors="replace")
        except OSError:
            return 0
        _, found, line = status.partition("\nVmSwap:")
        return int(line.split()[0]) * 1024 if found else 0

    def _own_group(self) -> Path | None:
        """Return the slice of the service's own: what a former life has allocated is counted there; or else the group
        of this process.
        """
        groups = self._groups()
        return next((group for group in groups if group.name == _SLICE), groups[0] if groups else None)

    def _groups(self) -> list[Path]:
        """Return the directories of this process's control group and those above it, the outermost too.

        The machine's root group has no limits, that of a container's cgroup namespace may.
        """
        for line in (self._proc / "self/cgroup").read_text(errors="surrogateescape").split("\n"):
            if line.startswith("0::/"):
                group = self._root / line.removeprefix("0::/").removesuffix(" (deleted)")
                # Seen from a namespace that this process has been moved out of, the path begins with "/..".
                if ".." in group.parts:
                    return [self._root]
                return [group, *(above for above in group.parents if above.is_relative_to(self._root))]
        return []


def free_fds(proc: Path = _PROC) -> int:
    """Return how many more descriptors this process may open: its soft RLIMIT_NOFILE less those open. Raises OSError.

    The directory's size has been their number since Linux 6.2; before, it is 0 and they are counted.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    directory = proc / "self/fd"
    # One less: that of the listing itself.
    count = directory.stat().st_size or len(os.listdir(directory)) - 1  # noqa: PTH208 (names are wanted)
    return soft - count


def _figure(file: Path) -> int | None:
    """Return the figure in a file of a control group; None without one, or where it is `max`."""
    try:
        text = file.read_bytes().strip()
    except OSError:
        return None
    return None if text == b"max" else int(text)


def _of_group(group: Path, name: str, beside: int) -> list[Room]:
    try:
        present = int((group / "memory.current").read_bytes()) + beside
    except OSError:
        return []  # No memory controller here, or the root; a limit without a figure of its own is one of those above.
    rooms = []
    for file in _LIMITS:
        try:
            text = (group / file).read_bytes().strip()
        except OSError:
            continue
        if text != b"max":
            limit = int(text)
            rooms.append(Room(limit - present, f"{file} of {name}", limit, present))
    return rooms
