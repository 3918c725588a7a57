# SPDX-License-Identifier: MIT
"""The allocator udmabuf-2M by itself: whole, zeroed, contiguous huge pages, and a pool that is whole again."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kernel import frames, hugepools
from tests.kernel.buffers import MIB, PAGE, mapped
from tests.kernel.given import (
    assert_as_told,
    assert_nothing_left_without_descriptors,
    bytes_not_zero,
    charged,
    given,
    request,
)
from tests.kernel.hugepools import HUGE, Pool, SetPool
from tests.kernel.witness import bufinfo
from udmabufd.core.errors import KernelLimit, NoAllocator, OutOfMemory, UdmabufUnavailable
from udmabufd.core.hugetlb_allocator import HugetlbAllocator
from udmabufd.core.memory import Accounting
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import hugepages, memfd, udmabuf
from udmabufd_client.contract import UDMABUF_1G, UDMABUF_2M

pytestmark = pytest.mark.guest

PAGES = 8

_MAP_HUGETLB = 0x40000


@pytest.fixture
def set_pool() -> Iterator[SetPool]:
    """A function that sets how many huge pages there are, and how many may be made when asked for."""
    with hugepools.pool() as change:
        yield change


@pytest.fixture
def exporter() -> Iterator[UdmabufAllocator]:
    """The allocator udmabuf, probed."""
    allocator = UdmabufAllocator(Path(udmabuf.DEVICE), Path(udmabuf.PARAMETERS))
    assert allocator.probe()
    yield allocator
    allocator.close()


@pytest.fixture
def huge(exporter: UdmabufAllocator, set_pool: SetPool) -> HugetlbAllocator:
    """udmabuf-2M with a pool of 8 pages."""
    set_pool(PAGES, 0)
    return HugetlbAllocator(UDMABUF_2M, HUGE, exporter)


def whole() -> bool:
    """Whether nothing of the pool is used, as the kernel tells."""
    return hugepools.read() == Pool(total=PAGES, free=PAGES, reserved=0, surplus=0)


@pytest.mark.parametrize(("size", "pages"), [(1, 1), (HUGE, 1), (HUGE + 1, 2), (PAGES * HUGE, PAGES)])
def test_gives_whole_huge_pages(huge: HugetlbAllocator, size: int, pages: int) -> None:
    """Rounded up, taken from the pool, charged to nobody; given back with the last descriptor."""
    before = charged()
    with given(huge, size) as memory:
        assert_as_told(memory, huge, pages * HUGE, "udmabuf")
        assert memory.accounting is Accounting.POOL
        assert huge.free == (PAGES - pages) * HUGE
        assert charged() - before < 1 * MIB
    assert whole()
    assert huge.free == huge.max_size == PAGES * HUGE


def test_memory_is_zero_and_one_with_its_memfd(huge: HugetlbAllocator) -> None:
    """Though what the pool's pages held before is not zero, and whichever side writes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB
    with mmap.mmap(-1, PAGES * HUGE, flags) as dirt:
        for offset in range(0, len(dirt), MIB):
            dirt[offset : offset + MIB] = b"\xa5" * MIB
    with given(huge, PAGES * HUGE) as memory:
        assert bytes_not_zero(memory) == 0
        assert memory.memfd is not None
        with mapped(memory.exported, memory.size) as shown, mapped(memory.memfd, memory.size) as backing:
            for page in range(memory.size // PAGE):
                shown[page * PAGE] = page % 255 + 1
                backing[page * PAGE + PAGE - 1] = page % 254 + 2
            for page in range(memory.size // PAGE):
                assert backing[page * PAGE] == page % 255 + 1
                assert shown[page * PAGE + PAGE - 1] == page % 254 + 2


def test_each_huge_page_is_one_aligned_run(huge: HugetlbAllocator) -> None:
    """By the page frames of the memfd, which root can read. Ordinary pages are not like that."""
    with given(huge, PAGES * HUGE) as memory:
        assert memory.memfd is not None
        addresses = frames.of_file(memory.memfd.fileno(), memory.size)
        for page in range(PAGES):
            of_page = addresses[page * HUGE // PAGE : (page + 1) * HUGE // PAGE]
            assert frames.runs(of_page) == 1
            assert of_page[0] % huge.capabilities.granule == 0
    with frames.scattered(32 * MIB), memfd.create("ordinary", HUGE) as ordinary:
        memfd.populate(ordinary.fileno(), HUGE)
        assert frames.runs(frames.of_file(ordinary.fileno(), HUGE)) > 1


def test_a_pool_that_is_too_small_is_whole_again(huge: HugetlbAllocator) -> None:
    """ENOSPC with part of the pages taken: they are given back at once, and no dma-buf is left."""
    with given(huge, (PAGES - 2) * HUGE):
        dma_bufs = set(bufinfo())
        with pytest.raises(OSError, match="pool of huge pages has no") as caught:
            huge.allocate(request(3 * HUGE), "too large", memfd.populate)
        assert caught.value.errno == errno.ENOSPC
        assert huge.free == 2 * HUGE
        assert set(bufinfo()) == dma_bufs
        with given(huge, 2 * HUGE):
            assert huge.free == 0
    assert whole()


def test_more_than_the_pool_ever_has(huge: HugetlbAllocator) -> None:
    """Refused beforehand, with what would help."""
    (refusal,) = huge.match(request(PAGES * HUGE + 1))
    assert refusal.field == "size"
    assert isinstance(refusal.error, OutOfMemory)
    assert "vm.nr_hugepages" in refusal.remedy


def test_the_proof_that_it_is_free(huge: HugetlbAllocator) -> None:
    """F_SEAL_WRITE is refused while a client has the dma-buf, mapped or not, and granted when nobody has."""
    with ExitStack() as client:
        with given(huge, 2 * HUGE) as memory:
            assert memory.provable
            assert memory.memfd is not None
            backing = memory.memfd.dup()
            client.callback(backing.close)
            theirs = client.enter_context(memory.dup())
        # The service has closed its own.
        assert not memfd.prove_free(backing.fileno())
        with mapped(theirs, 2 * HUGE):
            theirs.close()
            assert not memfd.prove_free(backing.fileno())
        assert memfd.prove_free(backing.fileno())
        assert huge.free == (PAGES - 2) * HUGE
    assert whole()


def test_no_descriptor_left(huge: HugetlbAllocator) -> None:
    """Wherever it fails, nothing is left, neither here nor of the pool."""
    assert_nothing_left_without_descriptors(huge, 2 * HUGE)
    assert whole()


def test_pages_made_when_asked_for(exporter: UdmabufAllocator, set_pool: SetPool) -> None:
    """vm.nr_overcommit_hugepages alone makes it available, and such pages are gone again afterwards."""
    set_pool(0, 2)
    huge = HugetlbAllocator(UDMABUF_2M, HUGE, exporter)
    assert huge.free == huge.max_size == 2 * HUGE
    with given(huge, 2 * HUGE) as memory:
        assert bytes_not_zero(memory) == 0
        assert huge.free == 0
        assert huge.max_size == 2 * HUGE
        with pytest.raises(OSError) as caught:
            huge.allocate(request(HUGE), "too many", memfd.populate)
        assert caught.value.errno == errno.ENOSPC
    assert huge.free == 2 * HUGE
    assert hugepages.read_pool(HUGE).total == 0


def test_without_a_pool(exporter: UdmabufAllocator, set_pool: SetPool) -> None:
    """Unavailable, with the sysctl that would help; available as soon as there are pages."""
    set_pool(0, 0)
    huge = HugetlbAllocator(UDMABUF_2M, HUGE, exporter)
    (refusal,) = huge.match(request(PAGE))
    assert "vm.nr_hugepages" in refusal.remedy
    assert isinstance(refusal.error, NoAllocator)
    assert (huge.max_size, huge.free) == (0, 0)
    set_pool(1, 0)
    with given(huge, PAGE):
        pass
    gigantic = HugetlbAllocator(UDMABUF_1G, 1 << 30, exporter)
    assert gigantic.unavailable is not None
    assert "hugepages-1048576kB" in gigantic.unavailable.remedy


def test_limits_of_the_driver(huge: HugetlbAllocator, set_parameter: Callable[[str, int], None]) -> None:
    """size_limit_mb counts whole huge pages, and is named beforehand."""
    set_parameter("size_limit_mb", 3)
    assert huge.max_size == HUGE
    assert huge.match(request(HUGE)) == ()
    (refusal,) = huge.match(request(HUGE + 1))
    assert isinstance(refusal.error, KernelLimit)
    with pytest.raises(KernelLimit, match="4194304 bytes exceed udmabuf's parameter size_limit_mb of 3"):
        huge.allocate(request(HUGE + 1), "too large", memfd.populate)
    assert whole()


def test_without_udmabuf(set_pool: SetPool, tmp_path: Path) -> None:
    """Its reason is udmabuf's."""
    set_pool(1, 0)
    exporter = UdmabufAllocator(tmp_path / "udmabuf", Path(udmabuf.PARAMETERS))
    assert not exporter.probe()
    huge = HugetlbAllocator(UDMABUF_2M, HUGE, exporter)
    (refusal,) = huge.match(request(HUGE))
    assert isinstance(refusal.error, UdmabufUnavailable)
    assert huge.max_size == 0
    with pytest.raises(UdmabufUnavailable):
        huge.allocate(request(HUGE), "none", memfd.populate)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 (names are wanted)
    assert hugepages.read_pool(HUGE).available == HUGE
