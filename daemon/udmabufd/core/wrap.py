# SPDX-License-Identifier: MIT
"""Dma-bufs of memory that a client brings: which memfds are taken, and the export of them.

The caller of check() knows that the descriptors are memfds, from their devices (linux.fdstat): what is done to them
here could hang on anything else. Admission, charges and what becomes of the result are the service's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import groupby
from operator import itemgetter

from udmabufd.core.errors import AccessDenied, BadMemfd, InvalidSpec, from_oserror
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import MAX_SIZE
from udmabufd.core.udmabuf_allocator import UdmabufAllocator, describe
from udmabufd.linux import boot, fdstat, fill, memfd
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import WRAPPED

Range = tuple[int, int, int]
"""Index of a memfd, offset and size in bytes."""

PopulateRanges = Callable[[int, Sequence[tuple[int, int]]], None]
"""Fills pairs of offset and size of a memfd: linux.memfd.populate_ranges, or linux.fill.populate_ranges_in_child."""

MAX_RANGES = 1024
"""The driver's default list_limit; a call's arguments have no room for many more (bus.dispatch.MAX_CALL_BYTES)."""

CHUNK = 8 << 20
"""Bytes that are looked at for holes and filled together."""

_WANTED = {memfd.F_SEAL_SHRINK: "F_SEAL_SHRINK", memfd.F_SEAL_SEAL: "F_SEAL_SEAL"}
_UNWANTED = {memfd.F_SEAL_WRITE: "F_SEAL_WRITE", memfd.F_SEAL_FUTURE_WRITE: "F_SEAL_FUTURE_WRITE"}


def check(fds: Sequence[OwnedFd], ranges: Sequence[Range], pages: Sequence[int]) -> int:
    """Return the bytes of `ranges` together, if they can be exported from the memfds `fds` as far as shows at once.
    `pages` has the bytes of a page of each memfd: of a huge page the kernel would pin all for any part of it.

    What is checked here stays true: F_SEAL_SEAL fixes the seals, F_SEAL_SHRINK the length. Calls only what cannot
    block on a memfd. Raises InvalidSpec (`memfds`, `ranges`), and BadMemfd naming memfd or range, and cause.
    """
    if not fds:
        raise InvalidSpec("memfds", "at least one is needed")
    if not 1 <= len(ranges) <= MAX_RANGES:
        raise InvalidSpec("ranges", f"must be 1 to {MAX_RANGES}, not {len(ranges)}")
    lengths = [_check_memfd(index, fd.fileno()) for index, fd in enumerate(fds)]
    total = 0
    for number, (index, offset, size) in enumerate(ranges):
        if index >= len(lengths):
            raise InvalidSpec("ranges", f"range {number} is of memfd {index}, and there are {len(lengths)}")
        _check_range(number, offset, size, lengths[index], pages[index])
        total += size
        if total > MAX_SIZE:
            raise InvalidSpec("ranges", f"together more than {MAX_SIZE} bytes")
    if unused := set(range(len(fds))) - {index for index, _, _ in ranges}:
        raise InvalidSpec("memfds", f"memfd {min(unused)} is in no range")
    return total


def export(
    allocator: UdmabufAllocator,
    fds: Sequence[OwnedFd],
    ranges: Sequence[Range],
    name: str,
    *,
    privileged: bool,
    populate: PopulateRanges,
) -> Memory:
    """Export `ranges` of the memfds `fds`, which check() has passed, as one dma-buf named `name`; for a worker thread.

    `privileged` callers may where the kernel exports pages that were never zeroed; others could by a race with this
    call read what such pages held before. Keeps none of `fds`. Raises BadMemfd for holes, AccessDenied, and what the
    allocator and the kernel refuse with, as typed errors; nothing is left behind then.
    """
    if not privileged and allocator.shows_unzeroed and not _zeroed_at_allocation():
        raise AccessDenied(
            "Only root may wrap memfds on this kernel: udmabuf exports pages that were allocated, but never zeroed, "
            "and the kernel is not known to zero pages when it allocates them; boot with init_on_alloc=1"
        )
    size = sum(size for _, _, size in ranges)
    try:
        for index, parts in _parts(ranges):
            _refuse_holes(index, fds[index].fileno(), parts)
        for index, parts in _parts(ranges):
            for some in _chunks(parts):
                # Again: what was punched since would be filled at the service's cost, now only a chunk of it.
                _refuse_holes(index, fds[index].fileno(), some)
                populate(fds[index].fileno(), some)
        items = [Item(fds[index].fileno(), offset, length) for index, offset, length in ranges]
        # As usual, which is cached if it is known: so the client has the same pages mapped.
        exported = allocator.export_list(items)
        try:
            return describe(exported, WRAPPED, None, size, name, Accounting.CLIENT)
        except BaseException:
            exported.dma_buf.close()
            raise
    except OSError as error:
        raise from_oserror(error, f"wrapping {size} bytes of memfds") from error


def exporter(
    allocator: UdmabufAllocator, fds: Sequence[OwnedFd], ranges: Sequence[Range], *, privileged: bool
) -> Callable[[Sequence[str], bool], list[Memory]]:
    """Return the job that does export(): of the first of some names, in a child if the memory limit is `close`."""

    def job(names: Sequence[str], close: bool) -> list[Memory]:
        populate = fill.populate_ranges_in_child if close else memfd.populate_ranges
        with ExitStack() as own:
            # It may outlast the call, and with it the caller's descriptors.
            duplicates = [own.enter_context(fd.dup()) for fd in fds]
            return [export(allocator, duplicates, ranges, names[0], privileged=privileged, populate=populate)]

    return job


def _check_memfd(index: int, fd: int) -> int:
    """Return the length in bytes of memfd `index`."""
    state = fdstat.look(fd)
    if state.path_only:
        raise BadMemfd(f"memfd {index} is an O_PATH descriptor; open it for reading and writing")
    if not (state.readable and state.writable):
        # The dma-buf could be written to all the same.
        raise BadMemfd(f"memfd {index} is not open for reading and writing (O_RDWR)")
    seals = memfd.get_seals(fd)
    for seal, seal_name in _WANTED.items():
        if not seals & seal:
            raise BadMemfd(f"memfd {index} lacks the seal {seal_name}")
    for seal, seal_name in _UNWANTED.items():
        if seals & seal:
            raise BadMemfd(f"memfd {index} has the seal {seal_name}, and a dma-buf can always be written to")
    return state.size


def _check_range(number: int, offset: int, size: int, length: int, page: int) -> None:
    if offset % page or size % page:
        raise BadMemfd(f"range {number}: offset {offset} and size {size} must be multiples of {page}")
    if not size:
        raise BadMemfd(f"range {number} is empty")
    if offset + size > length:
        raise BadMemfd(f"range {number}: bytes {offset} to {offset + size} of a memfd of {length}")


def _parts(ranges: Sequence[Range]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield each memfd's index with the parts of it that are in any range, in order, none twice."""
    for index, group in groupby(sorted(ranges), key=itemgetter(0)):
        parts: list[tuple[int, int]] = []
        for _, offset, size in group:
            end = offset + size
            if parts and offset <= (last := sum(parts[-1])):
                parts[-1] = parts[-1][0], max(end, last) - parts[-1][0]
            else:
                parts.append((offset, size))
        yield index, parts


def _chunks(parts: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield `parts` in lists of CHUNK bytes at most."""
    chunk: list[tuple[int, int]] = []
    room = CHUNK
    for offset, size in parts:
        end = offset + size
        while offset < end:
            step = min(end - offset, room)
            chunk.append((offset, step))
            offset, room = offset + step, room - step
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _refuse_holes(index: int, fd: int, parts: Sequence[tuple[int, int]]) -> None:
    for offset, size in parts:
        if (hole := memfd.first_hole(fd, offset, size)) is not None:
            raise BadMemfd(f"memfd {index} has a hole at byte {hole}; write to every page of a range beforehand")


@cache
def _zeroed_at_allocation() -> bool:
    return boot.zeroed_at_allocation()
