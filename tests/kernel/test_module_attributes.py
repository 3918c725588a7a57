# SPDX-License-Identifier: MIT
"""What the module promises of a buffer's pages, by the page tables: the attribute in each mapping, and WB afterwards.

Also that buffers hold what was written from either side, and that no page is promised to two that cannot both have
it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.kernel import areas, frames, modules
from tests.kernel.areas import area
from tests.kernel.buffers import MIB, PAGE, exported, holes, mapped
from tests.kernel.cachebuffers import (
    ATTRIBUTES,
    EXCLUSIVE,
    KINDS,
    SEALS,
    Part,
    at,
    create,
    create_list,
    is_free,
    memory,
)
from tests.kernel.given import charged, discharged
from tests.kernel.hugepools import HUGE, POOL, free_huge_pages, huge_pages
from tests.kernel.pagetables import PageTables
from udmabufd.linux import dmabuf, memfd, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

ME = os.getpid()
PAGES = 32
SIZE = PAGES * PAGE
_MREMAP_MAYMOVE = 1


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[None]:
    """The module, loaded for the tests of this file, none of which the kernel may warn of."""
    watch = modules.Watch()
    with modules.udmabuf_cache():
        yield
    watch.assert_silent()


@pytest.fixture
def cache() -> Iterator[OwnedFd]:
    """/dev/udmabuf_cache, opened for reading."""
    with udmabuf.open_device(str(modules.NODE)) as fd:
        yield fd


@pytest.fixture(scope="module")
def tables() -> Iterator[PageTables]:
    """The witness."""
    with PageTables() as tables:
        yield tables


def kinds(tables: PageTables, address: int, size: int, pid: int = ME) -> set[str]:
    """Return the attributes of the pages at an address, which are all there."""
    return {page.kind for page in tables.attributes(pid, address, size)}


def kinds_of_kernel(tables: PageTables, addresses: list[int]) -> set[str]:
    """Return those of the kernel's own mapping of these pages."""
    return {page.kind for page in tables.direct_maps(address // PAGE for address in addresses)}


def refused(code: int, device: OwnedFd, parts: list[Part], attribute: str) -> None:
    """Have the device refuse these parts, with that error."""
    with pytest.raises(OSError) as caught:
        create_list(device, parts, attribute).close()
    assert caught.value.errno == code


def ends(backing: OwnedFd, size: int) -> list[int]:
    """Return the last byte of each page of a memfd, read without a mapping."""
    return list(os.pread(backing.fileno(), size, 0)[PAGE - 1 :: PAGE])


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("call", ["create", "list"])
@pytest.mark.parametrize("kind", ["shmem", "thp", "hugetlb"])
def test_attribute_and_content(cache: OwnedFd, tables: PageTables, kind: str, call: str, attribute: str) -> None:
    """Each page as asked for, in the kernel's mapping as well; one memory with the memfd; all ordinary afterwards."""
    size = SIZE if kind == "shmem" else HUGE
    with memory(kind, size) as backing:
        where = frames.of_file(backing.fileno(), size)
        assert kind == "shmem" or frames.runs(where) == 1
        marks = np.arange(size // PAGE) % 255 + 1
        with mapped(backing, size) as view:
            view[::PAGE] = bytes(marks.tolist())
        # The second half first.
        parts = [(backing, size // 2, size // 2), (backing, 0, size // 2)]
        made = create(cache, backing, attribute, size) if call == "create" else create_list(cache, parts, attribute)
        turn = 0 if call == "create" else size // PAGE // 2
        with made, area(made.fileno(), size) as address:
            dmabuf.sync_start(made.fileno(), dmabuf.DMA_BUF_SYNC_READ | dmabuf.DMA_BUF_SYNC_WRITE)
            assert np.array_equal(at(address, size)[::PAGE], np.roll(marks, turn))
            assert kinds(tables, address, size) == kinds_of_kernel(tables, where) == {KINDS[attribute]}
            found = [page.pfn * PAGE for page in tables.attributes(ME, address, size)]
            assert np.array_equal(found, np.roll(where, turn))
            at(address, size)[PAGE - 1 :: PAGE] = np.roll(marks[::-1], turn)
            dmabuf.sync_end(made.fileno(), dmabuf.DMA_BUF_SYNC_READ | dmabuf.DMA_BUF_SYNC_WRITE)
            assert ends(backing, size) == marks[::-1].tolist()
            if kind != "hugetlb":  # which has no write()
                os.pwrite(backing.fileno(), b"\xff" * PAGE, size // 2)
                assert set(at(address, size)[(size // 2 + turn * PAGE) % size :][:PAGE].tolist()) == {0xFF}
        assert kinds_of_kernel(tables, where) == {"WB"}
        assert is_free(backing)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_holes_and_pages_listed_again(cache: OwnedFd, tables: PageTables, attribute: str) -> None:
    """Holes are filled with zeros; the same page in several places is one page, and is let go once."""
    with memory("shmem", 2 * PAGE, holes) as backing:
        one, other = (backing, 0, PAGE), (backing, PAGE, PAGE)
        with create_list(cache, [one, other, one, one], attribute) as made, area(made.fileno(), 4 * PAGE) as address:
            assert not at(address, 4 * PAGE).any()
            at(address, PAGE)[:] = 7
            assert at(address, 4 * PAGE)[::PAGE].tolist() == [7, 0, 7, 7]
            assert kinds(tables, address, 4 * PAGE) == {KINDS[attribute]}
        where = frames.of_file(backing.fileno(), 2 * PAGE)
        assert kinds_of_kernel(tables, where) == {"WB"}
        for again in ATTRIBUTES:
            create_list(cache, [one, one, other], again).close()
        assert is_free(backing)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_mappings_that_change(cache: OwnedFd, tables: PageTables, attribute: str) -> None:
    """Two at once, moved, protected, in a child, and touched only when the descriptor is gone."""
    kind = {KINDS[attribute]}
    with memory("shmem", SIZE) as backing, ExitStack() as stack:
        where = frames.of_file(backing.fileno(), SIZE)
        with create(cache, backing, attribute, SIZE) as made:
            first = stack.enter_context(area(made.fileno(), SIZE))
            second = stack.enter_context(area(made.fileno(), SIZE // 2, SIZE // 2))
            areas.write(first, SIZE)
            with area(made.fileno(), SIZE, protection=mmap.PROT_READ) as third:
                areas.read(third, SIZE)
                assert kinds(tables, third, SIZE) == kind
                areas.protect(third, SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
                areas.write(third, SIZE)
                assert kinds(tables, third, SIZE) == kind
        assert kinds(tables, first, SIZE) == kind
        areas.read(second, SIZE // 2)
        assert kinds(tables, second, SIZE // 2) == kind
        # What was touched before is copied for the child, the rest it has to fault in by itself.
        with areas.child(second, SIZE // 2) as pid:
            assert kinds(tables, second, SIZE // 2, pid) == kinds(tables, first, SIZE, pid) == kind
        with areas.moved(second, SIZE // 2) as there:
            assert kinds(tables, there, SIZE // 2) == kind
            assert at(there, SIZE // 2)[::PAGE].tolist() == [1] * (PAGES // 2)
        assert not is_free(backing)
        stack.close()
        assert kinds_of_kernel(tables, where) == {"WB"}
        assert is_free(backing)


def test_mappings_that_are_refused(cache: OwnedFd) -> None:
    """Private ones, longer ones, ones beyond the end; none grows."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    with memory("shmem", SIZE) as backing, create(cache, backing, "write-combine", SIZE) as made:
        for arguments in (
            {"flags": mmap.MAP_PRIVATE},
            {"size": SIZE + PAGE},
            {"offset": PAGE},
            {"offset": SIZE, "size": PAGE},
        ):
            with pytest.raises(OSError) as caught, area(made.fileno(), **{"size": SIZE} | arguments):
                pass
            assert caught.value.errno == errno.EINVAL
        with area(made.fileno(), PAGE) as address:
            grown = libc.mremap(
                ctypes.c_void_p(address), ctypes.c_size_t(PAGE), ctypes.c_size_t(SIZE), _MREMAP_MAYMOVE
            )
            assert grown == ctypes.c_void_p(-1).value
            assert ctypes.get_errno() == errno.EFAULT


def test_no_page_is_promised_twice(cache: OwnedFd, tables: PageTables) -> None:
    """EINVAL for pages that another buffer has with another attribute, or has to itself; nothing is kept of that."""
    with memory("shmem", SIZE) as backing, memory("shmem", PAGE) as fresh:
        every = [(fresh, 0, PAGE), (backing, 0, SIZE)]
        some = (backing, SIZE - PAGE, PAGE)
        for exclusive in EXCLUSIVE:
            with create_list(cache, [some], exclusive):
                for attribute in ATTRIBUTES:
                    refused(errno.EINVAL, cache, every, attribute)
            for shared in ("none", "cached"):
                with create_list(cache, [some], shared), create_list(cache, every, "cached") as made:
                    refused(errno.EINVAL, cache, every, exclusive)
                    with area(made.fileno(), SIZE + PAGE) as address:
                        areas.read(address, SIZE + PAGE)
                        assert kinds(tables, address, SIZE + PAGE) == {"WB"}
                create_list(cache, every, exclusive).close()
        where = frames.of_file(backing.fileno(), SIZE)
        assert kinds_of_kernel(tables, where) == {"WB"}
        assert is_free(fresh)
        assert is_free(backing)


def test_huge_pages_without_room_for_the_attribute(cache: OwnedFd, tables: PageTables) -> None:
    """Hugetlb may keep one descriptor for all pages of a huge one: such can be cached, and nothing else."""
    switch = Path("/proc/sys/vm/hugetlb_optimize_vmemmap")
    before = switch.read_text()
    switch.write_text("1\n")
    try:
        with memory("hugetlb", HUGE) as backing:
            for exclusive in EXCLUSIVE:
                refused(errno.EINVAL, cache, [(backing, 0, HUGE)], exclusive)
            with create(cache, backing, "cached", HUGE) as made, area(made.fileno(), HUGE) as address:
                areas.read(address, HUGE)
                assert kinds(tables, address, HUGE) == {"WB"}
            assert is_free(backing)
    finally:
        switch.write_text(before)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_memory_comes_back(cache: OwnedFd, attribute: str) -> None:
    """Charged until the dma-buf's last mapping is gone, and no longer; then also free in the whole machine."""
    size = 32 * MIB
    before, free = charged(), free_memory()
    with memory("shmem", size) as backing, ExitStack() as stack:
        with create(cache, backing, attribute, size) as made:
            address = stack.enter_context(area(made.fileno(), size))
        backing.close()
        areas.read(address, size)
        assert charged() - before >= size - 8 * MIB
        assert free_memory() < free - size // 4
    assert discharged(before, 2 * MIB)
    assert free_memory() > free - size // 4


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_huge_pages_come_back(cache: OwnedFd, tables: PageTables, attribute: str) -> None:
    """To the pool, whole, when the dma-buf is gone, though the memfd went before it; a part holds a whole page."""
    with huge_pages(2):
        free = free_huge_pages()
        with memfd.create("huge", 2 * HUGE, huge_page=HUGE) as backing:
            memfd.populate(backing.fileno(), 2 * HUGE)
            memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK)
            where = frames.of_file(backing.fileno(), 2 * HUGE)
            part = create(cache, backing, attribute, 2 * PAGE, HUGE - PAGE)
        with part:
            assert free_huge_pages() == free - 2
            assert kinds_of_kernel(tables, where[HUGE // PAGE - 1 : HUGE // PAGE + 1]) == {KINDS[attribute]}
            assert kinds_of_kernel(tables, where[: HUGE // PAGE - 1]) == {"WB"}
        assert free_huge_pages() == free
        assert (POOL / "resv_hugepages").read_text() == "0\n"
        assert kinds_of_kernel(tables, where) == {"WB"}


@pytest.mark.parametrize("attribute", EXCLUSIVE)
def test_pages_are_ordinary_before_they_are_free(cache: OwnedFd, tables: PageTables, attribute: str) -> None:
    """When the first is back in the pool, the last to be changed back has been: nobody gets one that is not."""
    size = 32 * HUGE
    with huge_pages(32):
        free = free_huge_pages()
        with memfd.create("huge", size, huge_page=HUGE) as backing:
            memfd.populate(backing.fileno(), size)
            memfd.add_seals(backing.fileno(), SEALS)
            last = frames.of_file(backing.fileno(), size)[-1] // PAGE
            made = create(cache, backing, attribute, size)
        held = free_huge_pages()
        assert tables.direct_map(last).kind == KINDS[attribute]
        end = threading.Thread(target=made.close)
        end.start()
        deadline = time.monotonic() + 60
        while free_huge_pages() == held:
            assert time.monotonic() < deadline, "the buffer's pages have not come back"
        assert tables.direct_map(last).kind == "WB"
        end.join()
        assert (held, free_huge_pages()) == (free - 32, free)


def free_memory() -> int:
    """Return the bytes of memory that nobody uses: what is free for all, and what each processor has freed and keeps
    to itself for some seconds, which /proc/meminfo does not count.
    """
    counts = re.findall(r"^ +(?:nr_free_pages|count:) +(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return sum(map(int, counts)) * PAGE


def test_stock_udmabuf_is_always_cached(device: OwnedFd, tables: PageTables) -> None:
    """What the witness says of the driver that ignores flags: the tests above could fail."""
    with exported(device, SIZE) as (backing, _):
        for attribute in ATTRIBUTES:
            with create(device, backing, attribute, SIZE) as made, area(made.fileno(), SIZE) as address:
                areas.read(address, SIZE)
                assert kinds(tables, address, SIZE) == {"WB"}
