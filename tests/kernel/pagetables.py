# SPDX-License-Identifier: MIT
"""The cache attribute of any process's mapping, as the page tables say it: a witness that no driver fools.

    python3 -m tests.kernel.pagetables PID ADDRESS|PATH

PageTables finds a process's tables by /proc/kallsyms, BTF and /proc/kcore, walks them as the processor does (four or
five levels, large pages), and translates the attribute's index by the processor's own register IA32_PAT. x86-64 only,
without memory encryption; root. The MTRRs are left out: of memory they say WB, and then the entry decides (and UC- is
as UC). Nothing of the daemon is used.

Tables are read while the kernel may change them: for an answer of one moment the process is to leave its mappings
alone, or to be stopped. What may be expected of a mapping is left to the tests.
"""

from __future__ import annotations

import argparse
import functools
import re
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple, Self

from tests.kernel import btf
from tests.kernel.kernel_memory import KernelMemory, Kind, page_attribute_table, symbols
from tests.kernel.walk import PAGE, Attribute, NotPresentError, Walk, attribute_of

__all__ = ["Attribute", "Mapping", "NotPresentError", "PageTables", "mappings", "rows", "Row"]

PAGE_SIZES: Final = {1: "4K", 2: "2M", 3: "1G"}

_SYMBOLS: Final = ("init_task", "init_mm", "page_offset_base", "pgdir_shift")
_MEMBERS: Final = {"task_struct": ("tasks", "mm", "pid"), "mm_struct": ("pgd",)}
_LEVELS: Final = {39: 4, 48: 5}
"""Levels of the tables by the lowest bit of an address that selects in the uppermost one."""

_ATTEMPTS: Final = 5
_MAPS_LINE: Final = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>\S+) (?P<offset>[0-9a-f]+) (?P<device>\S+) "
    r"(?P<inode>[0-9]+) *(?P<path>.*)"
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps: addresses and offset in bytes, `device` as MAJOR:MINOR of the file's st_dev."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def size(self) -> int:
        """Bytes of the mapping."""
        return self.end - self.start


class Layout(NamedTuple):
    """What stays while the machine runs: addresses, offsets in task_struct and of mm_struct.pgd, the PAT."""

    symbols: dict[str, int]
    task: dict[str, int]
    pgd: int
    pat: tuple[Kind, ...]


@functools.cache
def _layout() -> Layout:
    offsets = btf.member_offsets(btf.VMLINUX.read_bytes(), _MEMBERS)
    return Layout(symbols(_SYMBOLS), offsets["task_struct"], offsets["mm_struct"]["pgd"], page_attribute_table())


class PageTables:
    """The page tables of every process and of the kernel, until close().

    What stays while the machine runs (see Layout) is read when the first one is made, which takes some seconds in the
    emulated guest; tables are read anew by each call, in some milliseconds. Raises OSError without root, and
    LookupError if the kernel is not as this expects: another architecture, or without BTF.
    """

    def __init__(self) -> None:
        layout = _layout()
        self._task = layout.task
        self._pgd = layout.pgd
        self._init_task = layout.symbols["init_task"]
        self.pat = layout.pat
        self._memory = KernelMemory()
        try:
            self._kernel_root = self._memory.word(layout.symbols["init_mm"] + self._pgd)
            self._direct_map = self._memory.word(layout.symbols["page_offset_base"])
            self.levels = _LEVELS[self._memory.word(layout.symbols["pgdir_shift"], 4)]
            # Two sources for where physical memory is: wrong symbols would give wrong answers, not errors.
            if not any(segment.start == self._direct_map + segment.physical for segment in self._memory.segments):
                raise LookupError(f"page_offset_base is {self._direct_map:#x}, where /proc/kcore has no memory")
        except BaseException:
            self._memory.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; may be called again."""
        self._memory.close()

    def attribute(self, pid: int, address: int) -> Attribute:
        """Return how process `pid` has the page at `address` mapped.

        Raises NotPresentError if there is none, ProcessLookupError if there is no such process or it has no memory of
        its own (kernel threads, zombies).
        """
        return attribute_of(self._walk_of(pid).leaf(address), address, self.pat)

    def attributes(self, pid: int, start: int, length: int) -> list[Attribute]:
        """Return how process `pid` has each page of `length` bytes from `start` mapped, in order.

        Raises as attribute() does, NotPresentError if any page is missing; ValueError if there is no page in question.
        """
        found = []
        for address, attribute in self.pages(pid, start, length):
            if attribute is None:
                raise NotPresentError(f"no page at {address:#x} of process {pid}")
            found.append(attribute)
        return found

    def pages(self, pid: int, start: int, length: int) -> Iterator[tuple[int, Attribute | None]]:
        """Yield the address of each page of `length` bytes from `start`, and how it is mapped, None if it is not.

        Raises ProcessLookupError as attribute() does; ValueError if there is no page in question.
        """
        if length <= 0:
            raise ValueError(f"{length} bytes have no page")
        walk = self._walk_of(pid)
        for address in range(start - start % PAGE, start + length, PAGE):
            try:
                yield address, attribute_of(walk.leaf(address), address, self.pat)
            except NotPresentError:
                yield address, None

    def kernel(self, address: int) -> Attribute:
        """Return how the kernel has the page at one of its own addresses mapped. Raises NotPresentError."""
        return attribute_of(self.kernel_walk().leaf(address), address, self.pat)

    def kernel_walk(self) -> Walk:
        """Return the kernel's tables, to be walked many times; they are as when each is first needed."""
        return self._walk(self._kernel_root)

    def direct_map(self, pfn: int, walk: Walk | None = None) -> Attribute:
        """Return the kernel's own mapping of the page with frame number `pfn`, in its map of all memory.

        Another kind than a process's mapping of that page has is an alias. `walk`: a kernel_walk(), if there are many
        to ask for. Raises NotPresentError if the kernel has none: of what is no memory, such as a device's, and of
        pages taken out (secretmem).
        """
        address = self._direct_map + pfn * PAGE
        found = attribute_of((walk or self.kernel_walk()).leaf(address), address, self.pat)
        if found.pfn != pfn:
            raise LookupError(f"the direct map has page {found.pfn:#x} where {pfn:#x} belongs: a wrong base")
        return found

    def direct_maps(self, pfns: Iterable[int]) -> list[Attribute]:
        """Return direct_map() of each page."""
        walk = self.kernel_walk()
        return [self.direct_map(pfn, walk) for pfn in pfns]

    @staticmethod
    def mappings_of(pid: int, inode: int) -> list[Mapping]:
        """Return the mappings that process `pid` has of files with this inode number, by rising address.

        Numbers of memfds and dma-bufs overlap: Mapping.device tells them apart. Raises OSError: ENOENT.
        """
        return [mapping for mapping in mappings(pid) if mapping.inode == inode]

    def _walk(self, root: int) -> Walk:
        return Walk(lambda table: self._memory.read(table, PAGE), root, self.levels, self._direct_map)

    def _walk_of(self, pid: int) -> Walk:
        mm = self._mm_of(pid)
        if mm == 0:
            raise ProcessLookupError(f"process {pid} has no memory of its own")
        return self._walk(self._memory.word(mm + self._pgd))

    def _mm_of(self, pid: int) -> int:
        for _ in range(_ATTEMPTS):
            # Whoever ends while the list is followed may lead astray.
            try:
                mm = next((mm for number, mm in self._processes() if number == pid), None)
            except OSError:
                continue
            if mm is not None:
                return mm
            if not Path(f"/proc/{pid}").exists():
                break
        raise ProcessLookupError(f"no process {pid} in the kernel's list")

    def _processes(self) -> Iterator[tuple[int, int]]:
        """Yield number and address of the mm_struct of each process, from the list that begins at init_task."""
        links = self._task["tasks"]
        first = min(self._task.values())
        size = max(self._task.values()) + 8 - first
        task = self._init_task
        while True:
            data = self._memory.read(task + first, size)
            (following,) = struct.unpack_from("=Q", data, links - first)
            task = following - links
            if task == self._init_task:
                return
            data = self._memory.read(task + first, size)
            (mm,) = struct.unpack_from("=Q", data, self._task["mm"] - first)
            (number,) = struct.unpack_from("=i", data, self._task["pid"] - first)
            yield number, mm


def mappings(pid: int) -> list[Mapping]:
    """Return the mappings of process `pid`, by rising address. Raises OSError: ENOENT."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text("utf-8", "backslashreplace").split("\n")[:-1]:
        match = _MAPS_LINE.fullmatch(line)
        assert match is not None, line
        found.append(
            Mapping(
                start=int(match["start"], 16),
                end=int(match["end"], 16),
                permissions=match["permissions"],
                offset=int(match["offset"], 16),
                device=match["device"],
                inode=int(match["inode"]),
                path=match["path"],
            )
        )
    return found


class Row(NamedTuple):
    """A page in the command's table: attribute and size of the process's mapping, attribute of the direct map."""

    kind: str
    size: str
    direct: str


def rows(tables: PageTables, pid: int, mapping: Mapping) -> Iterator[tuple[int, int, Row]]:
    """Yield address, number of pages and Row of each run of like pages in a mapping."""
    kernel = tables.kernel_walk()

    def row(page: tuple[int, Attribute | None]) -> Row:
        found = page[1]
        if found is None:
            return Row("-", "-", "-")
        try:
            direct: str = tables.direct_map(found.pfn, kernel).kind
        except NotPresentError:
            direct = "-"
        return Row(found.kind, PAGE_SIZES[found.level], direct)

    for like, run in groupby(tables.pages(pid, mapping.start, mapping.size), key=row):
        addresses = [address for address, _ in run]
        yield addresses[0], len(addresses), like


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.kernel.pagetables", description=__doc__.split("\n")[0])
    parser.add_argument("pid", metavar="PID", type=int)
    parser.add_argument("where", metavar="ADDRESS|PATH", help="hexadecimal, or what /proc/PID/maps shows last")
    arguments = parser.parse_args(argv)
    try:
        chosen = [mapping for mapping in mappings(arguments.pid) if _is_meant(mapping, arguments.where)]
        if not chosen:
            raise LookupError(f"process {arguments.pid} has no mapping of {arguments.where}; see /proc/PID/maps")
        with PageTables() as tables:
            print(f"PAT: {' '.join(tables.pat)}; {tables.levels} levels")
            for mapping in chosen:
                print(f"{mapping.start:x}-{mapping.end:x} {mapping.permissions} {mapping.path}".rstrip())
                print(f"  {'address':<16}{'pages':>10}  {'kind':<6}{'size':<6}direct map")
                for address, count, row in rows(tables, arguments.pid, mapping):
                    print(f"  {address:<16x}{count:>10}  {row.kind:<6}{row.size:<6}{row.direct}")
    except (OSError, LookupError, subprocess.SubprocessError) as error:
        print(f"pagetables: {error}", file=sys.stderr)
        return 1
    return 0


def _is_meant(mapping: Mapping, where: str) -> bool:
    if re.fullmatch(r"(0x)?[0-9a-fA-F]+", where):
        return mapping.start <= int(where, 16) < mapping.end
    return mapping.path.removesuffix(" (deleted)") == where


if __name__ == "__main__":
    sys.exit(main())
