# SPDX-License-Identifier: MIT
"""core.wrap without the device: what is checked and named, in which order things are done, and what is undone.

The memfds are real; in the place of the driver is one that notes what it is asked for (tests/kernel has the real one).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from udmabufd.core import wrap
from udmabufd.core.errors import AccessDenied, AllocatorError, BadMemfd, InvalidSpec, KernelLimit, OutOfMemory
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import Exported, UdmabufAllocator
from udmabufd.linux import dmabuf, memfd
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import Cache, CacheEvidence

PAGE = os.sysconf("SC_PAGESIZE")
LENGTH = 8 * PAGE
SEALS = memfd.F_SEAL_SHRINK | memfd.F_SEAL_SEAL


def brought(seals: int = SEALS, written: int = LENGTH) -> OwnedFd:
    """A memfd as a client brings one, of which so many bytes were written."""
    fd = memfd.create("brought", LENGTH)
    os.pwrite(fd.fileno(), b"\1" * written, 0)
    memfd.add_seals(fd.fileno(), seals)
    return fd


@pytest.fixture
def fds() -> Iterator[list[OwnedFd]]:
    """Two good ones."""
    with brought() as first, brought() as second:
        yield [first, second]


class Recorder(UdmabufAllocator):
    """Exports nothing: hands out a memfd in the place of the dma-buf."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"), Path("/nonexistent"))
        self.exported: list[list[Item]] = []
        self.error: Exception | None = None

    def export_list(self, items: Sequence[Item], request: Request | None = None) -> Exported:
        assert request is None, "what a client has mapped itself is cached, whatever is asked for"
        self.exported.append(list(items))
        if self.error:
            raise self.error
        made = memfd.create("exported", sum(item.size for item in items))
        return Exported(made, "udmabuf", Cache.CACHED, CacheEvidence.DEFAULT)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """An allocator whose dma-bufs pass for udmabuf's."""

    def fdinfo(fd: int) -> dmabuf.Fdinfo:
        state = os.fstat(fd)
        return dmabuf.Fdinfo(1, state.st_size, "udmabuf", "", state.st_ino)

    monkeypatch.setattr(dmabuf, "fdinfo", fdinfo)
    monkeypatch.setattr(dmabuf, "set_name", lambda fd, name: None)
    monkeypatch.setattr(wrap, "_zeroed_at_allocation", lambda: False)
    return Recorder()


def export(
    allocator: UdmabufAllocator,
    fds: Sequence[OwnedFd],
    ranges: Sequence[wrap.Range],
    privileged: bool = True,
    populate: wrap.PopulateRanges = memfd.populate_ranges,
) -> Memory:
    return wrap.export(allocator, fds, ranges, "name", privileged=privileged, populate=populate)


# ---- check ----------------------------------------------------------------------------------------------------------


def test_bytes_together(fds: list[OwnedFd]) -> None:
    """Each range counts, also where they overlap: each is pinned."""
    assert wrap.check(fds, [(0, 0, PAGE), (1, PAGE, 2 * PAGE), (0, 0, LENGTH)], [PAGE] * 2) == 3 * PAGE + LENGTH


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "ranges: must be 1 to 1024, not 0"),
        ([(0, 0, PAGE)] * 1025, "ranges: must be 1 to 1024, not 1025"),
        ([(0, 0, PAGE), (2, 0, PAGE)], "ranges: range 1 is of memfd 2, and there are 2"),
        ([(0, 0, PAGE)], "memfds: memfd 1 is in no range"),
        ([(1, 0, PAGE)], "memfds: memfd 0 is in no range"),
    ],
)
def test_arguments_that_do_not_fit_together(fds: list[OwnedFd], ranges: list[wrap.Range], message: str) -> None:
    """They are InvalidSpec with the argument's name."""
    with pytest.raises(InvalidSpec, match=f"^{re.escape(message)}$"):
        wrap.check(fds, ranges, [PAGE] * 2)


def test_no_memfds() -> None:
    """Nothing to wrap."""
    with pytest.raises(InvalidSpec, match="^memfds: at least one"):
        wrap.check([], [(0, 0, PAGE)], [])


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (1, PAGE, f"range 0: offset 1 and size {PAGE} must be multiples of {PAGE}"),
        (0, PAGE + 1, f"range 0: offset 0 and size {PAGE + 1} must be multiples of {PAGE}"),
        (0, 0, "range 0 is empty"),
        (LENGTH, PAGE, f"range 0: bytes {LENGTH} to {LENGTH + PAGE} of a memfd of {LENGTH}"),
        (2**64 - PAGE, PAGE, f"range 0: bytes {2**64 - PAGE} to {2**64} of a memfd of {LENGTH}"),
    ],
)
def test_ranges(offset: int, size: int, message: str) -> None:
    """What is wrong with a range is BadMemfd with its number and the figures."""
    with brought() as fd, pytest.raises(BadMemfd, match=f"^{re.escape(message)}$"):
        wrap.check([fd], [(0, offset, size)], [PAGE])


def test_a_part_of_a_huge_page_is_refused() -> None:
    """The kernel would pin the whole of it, and the range alone is charged."""
    huge = 2 * PAGE  # As if: what counts is what the caller says.
    with brought() as fd:
        assert wrap.check([fd], [(0, 0, huge)], [huge]) == huge
        with pytest.raises(BadMemfd, match=f"range 0: offset {PAGE} and size {huge} must be multiples of {huge}"):
            wrap.check([fd], [(0, PAGE, huge)], [huge])


def test_more_than_a_file_can_have() -> None:
    """The sum stays below what the kernel's types hold."""
    with memfd.create("huge", (1 << 63) - PAGE) as fd:
        memfd.add_seals(fd.fileno(), SEALS)
        assert wrap.check([fd], [(0, 0, (1 << 63) - PAGE)], [PAGE]) == (1 << 63) - PAGE
        with pytest.raises(InvalidSpec, match="^ranges: together more than"):
            wrap.check([fd], [(0, 0, (1 << 63) - PAGE), (0, 0, PAGE)], [PAGE])


@pytest.mark.parametrize(
    ("seals", "message"),
    [
        (memfd.F_SEAL_SEAL, "lacks the seal F_SEAL_SHRINK"),
        (memfd.F_SEAL_SHRINK, "lacks the seal F_SEAL_SEAL"),
        (SEALS | memfd.F_SEAL_WRITE, "has the seal F_SEAL_WRITE,"),
        (SEALS | memfd.F_SEAL_FUTURE_WRITE, "has the seal F_SEAL_FUTURE_WRITE,"),
        (SEALS | memfd.F_SEAL_GROW, None),
        (SEALS | memfd.F_SEAL_EXEC, None),
    ],
)
def test_seals(seals: int, message: str | None) -> None:
    """Which are needed, which must not be, and which do not matter."""
    with brought(seals) as fd:
        if message is None:
            assert wrap.check([fd], [(0, 0, PAGE)], [PAGE]) == PAGE
        else:
            with pytest.raises(BadMemfd, match=f"^memfd 0 {message}"):
                wrap.check([fd], [(0, 0, PAGE)], [PAGE])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (os.O_RDONLY, "is not open for reading and writing"),
        (os.O_WRONLY, "is not open for reading and writing"),
        (os.O_PATH, "is an O_PATH descriptor"),
    ],
)
def test_access(fds: list[OwnedFd], flags: int, message: str) -> None:
    """A dma-buf can be written to: only who can write to the memfd may have one. The index is that of the bad one."""
    with OwnedFd(os.open(f"/proc/self/fd/{fds[1].fileno()}", flags | os.O_CLOEXEC)) as other:
        with pytest.raises(BadMemfd, match=f"^memfd 1 {message}"):
            wrap.check([fds[0], other], [(0, 0, PAGE), (1, 0, PAGE)], [PAGE])


# ---- export ---------------------------------------------------------------------------------------------------------


def test_exports_what_was_asked_for(allocator: Recorder, fds: list[OwnedFd]) -> None:
    """The items in the order of the ranges; the memory has no memfd, and the descriptors are still the caller's."""
    ranges = [(1, PAGE, PAGE), (0, 0, 2 * PAGE), (1, 0, PAGE)]
    memory = export(allocator, fds, ranges)
    with memory.exported as dma_buf:
        assert allocator.exported == [[Item(fds[index].fileno(), offset, size) for index, offset, size in ranges]]
        assert (memory.allocator, memory.memfd, memory.needs_sync) == ("wrapped", None, True)
        state = os.fstat(dma_buf.fileno())
        assert (memory.device, memory.inode) == ((os.major(state.st_dev), os.minor(state.st_dev)), state.st_ino)
        assert not any(fd.closed for fd in fds)


def test_each_page_is_populated_once(allocator: Recorder, fds: list[OwnedFd]) -> None:
    """One call for each memfd, with what is in any of its ranges, joined; and before the export."""
    calls = []

    def populate(fd: int, parts: Sequence[tuple[int, int]]) -> None:
        assert not allocator.exported
        calls.append((fd, list(parts)))

    ranges = [(1, 4 * PAGE, PAGE), (0, PAGE, 2 * PAGE), (0, 2 * PAGE, 3 * PAGE), (1, 0, PAGE), (0, 0, PAGE)]
    ranges += [(0, 6 * PAGE, PAGE), (0, 3 * PAGE, PAGE)]
    export(allocator, fds, ranges, populate=populate).close()
    assert calls == [
        (fds[0].fileno(), [(0, 5 * PAGE), (6 * PAGE, PAGE)]),
        (fds[1].fileno(), [(0, PAGE), (4 * PAGE, PAGE)]),
    ]


def test_a_page_punched_meanwhile_is_populated(allocator: Recorder, fds: list[OwnedFd]) -> None:
    """A client that punches after the look leaves no hole to the driver."""

    def populate(fd: int, parts: Sequence[tuple[int, int]]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(PAGE)) == 0
        memfd.populate_ranges(fd, parts)

    export(allocator, fds[:1], [(0, 0, LENGTH)], populate=populate).close()
    assert memfd.first_hole(fds[0].fileno(), 0, LENGTH) is None


def test_holes(allocator: Recorder) -> None:
    """Named by memfd and byte; nothing is populated or exported then. Outside of the ranges they do not matter."""

    def populate(fd: int, parts: Sequence[tuple[int, int]]) -> None:
        raise AssertionError("populated before all holes were looked for")

    with brought() as good, brought(written=3 * PAGE) as bad:
        with pytest.raises(BadMemfd, match=f"^memfd 1 has a hole at byte {3 * PAGE};"):
            export(allocator, [good, bad], [(0, 0, PAGE), (1, 0, PAGE), (1, 2 * PAGE, 2 * PAGE)], populate=populate)
        assert not allocator.exported
        export(allocator, [bad], [(0, 0, 3 * PAGE)]).close()


@pytest.mark.parametrize(
    ("privileged", "shows", "zeroed", "allowed"),
    [
        (True, True, False, True),
        (False, True, False, False),
        (False, True, True, True),
        (False, False, False, True),
    ],
)
def test_who_may(
    allocator: Recorder,
    fds: list[OwnedFd],
    monkeypatch: pytest.MonkeyPatch,
    privileged: bool,
    shows: bool,
    zeroed: bool,
    allowed: bool,
) -> None:
    """Users may unless the kernel shows unzeroed pages and has them; root always. Untested, a kernel may show them."""
    assert allocator.shows_unzeroed
    allocator.shows_unzeroed = shows
    monkeypatch.setattr(wrap, "_zeroed_at_allocation", lambda: zeroed)
    if allowed:
        export(allocator, fds[:1], [(0, 0, PAGE)], privileged).close()
    else:
        with pytest.raises(AccessDenied, match="Only root may wrap .* init_on_alloc=1"):
            export(allocator, fds[:1], [(0, 0, PAGE)], privileged)
        assert not allocator.exported


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOMEM, "no memory"), OutOfMemory),
        (OSError(errno.EMFILE, "no descriptor"), OutOfMemory),
        (KernelLimit("ranges: too many"), KernelLimit),
    ],
)
def test_errors_are_typed(
    allocator: Recorder, fds: list[OwnedFd], error: Exception, expected: type[AllocatorError]
) -> None:
    """The kernel's become ours, with the figure; ours stay."""
    allocator.error = error
    with pytest.raises(expected, match=f"wrapping {PAGE} bytes of memfds|too many"):
        export(allocator, fds[:1], [(0, 0, PAGE)])


def test_nothing_is_left_behind(allocator: Recorder, fds: list[OwnedFd], monkeypatch: pytest.MonkeyPatch) -> None:
    """A dma-buf that is not what was asked for is closed; that no descriptor stays is checked after every test."""
    monkeypatch.setattr(dmabuf, "fdinfo", lambda fd: dmabuf.Fdinfo(1, PAGE, "somebody", "", 1))
    with pytest.raises(AllocatorError, match="EPROTO"):
        export(allocator, fds[:1], [(0, 0, PAGE)])


def test_chunks_cover_the_parts_and_are_small() -> None:
    parts = [(0, PAGE), (3 * PAGE, 2 * wrap.CHUNK), (10 * wrap.CHUNK, wrap.CHUNK - PAGE)]
    chunks = list(wrap._chunks(parts))
    assert all(sum(size for _, size in chunk) <= wrap.CHUNK for chunk in chunks)
    covered = [page for chunk in chunks for offset, size in chunk for page in range(offset, offset + size, PAGE)]
    assert covered == [page for offset, size in parts for page in range(offset, offset + size, PAGE)]
