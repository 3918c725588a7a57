# SPDX-License-Identifier: MIT
"""The allocator heap:system by itself: what it gives, what it leaves when it cannot, and what it does not touch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.buffers import MIB, PAGE, mapped, poison_free_memory
from tests.kernel.given import (
    assert_as_told,
    assert_nothing_left_without_descriptors,
    bytes_not_zero,
    charged,
    given,
    request,
)
from tests.kernel.witness import bufinfo
from udmabufd.core.errors import NoAllocator, OutOfMemory
from udmabufd.core.heap_allocator import HeapAllocator, HeapRoles
from udmabufd.core.memory import Accounting
from udmabufd.linux import dma_heap, memfd

pytestmark = pytest.mark.guest

NODE = Path(dma_heap.DIRECTORY, "system")


@pytest.fixture
def heap() -> Iterator[HeapAllocator]:
    """heap:system, probed."""
    allocator = HeapAllocator(NODE, HeapRoles())
    assert allocator.probe()
    yield allocator
    allocator.close()


@pytest.mark.parametrize("pages", [1, 3, 256, 8192])
def test_gives_what_it_tells(heap: HeapAllocator, pages: int) -> None:
    """Size, exporter, name, attributes, descriptors; and bytes that can be written."""
    with given(heap, pages * PAGE) as memory:
        assert_as_told(memory, heap, pages * PAGE, "system")
        assert memory.memfd is None
        assert memory.hold is None
        with mapped(memory.exported, memory.size) as view:
            view[-1] = 7
        with mapped(memory.exported, memory.size) as view:
            assert view[-1] == 7
    assert memory.inode not in bufinfo()


def test_memory_is_zero(heap: HeapAllocator) -> None:
    """Also when what lies about is not. (With init_on_alloc=0 this shows that the heap zeroes by itself.)"""
    poison_free_memory(256 * MIB)
    with given(heap, 16 * MIB) as memory:
        assert bytes_not_zero(memory) == 0


def test_charged_to_nobody(heap: HeapAllocator) -> None:
    """Neither when it is made nor when it is touched."""
    before = charged()
    with given(heap, 64 * MIB) as memory:
        assert heap.capabilities.accounting is Accounting.SYSTEM
        assert charged() - before < 4 * MIB
        with mapped(memory.exported, memory.size) as view:
            view[::PAGE] = bytes(memory.size // PAGE)
            assert charged() - before < 4 * MIB


def test_no_descriptor_left(heap: HeapAllocator) -> None:
    """Wherever it fails, nothing is left."""
    assert_nothing_left_without_descriptors(heap, 16 * PAGE)


def test_more_than_the_machine_has_is_not_asked_for(heap: HeapAllocator) -> None:
    """The kernel's answer would be to kill processes."""
    asked = request(heap.max_size + PAGE)
    (refusal,) = heap.match(asked)
    assert refusal.field == "size"
    assert isinstance(refusal.error, OutOfMemory)
    with pytest.raises(OutOfMemory, match="exceed the machine's memory"):
        heap.allocate(asked, "too much", memfd.populate)
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        total = int(meminfo.readline().split()[1]) << 10
    assert total <= heap.max_size < 2 * total


def test_unavailable_until_probed_and_after_closing() -> None:
    """With a reason, and not by a crash."""
    allocator = HeapAllocator(NODE, HeapRoles())
    for _ in range(2):
        assert allocator.max_size == 0
        (refusal,) = allocator.match(request(PAGE))
        assert refusal.reason in ("it was not probed yet", "it was closed")
        with pytest.raises(NoAllocator, match="heap:system cannot be used"):
            allocator.allocate(request(PAGE), "none", memfd.populate)
        for _ in range(2):
            assert allocator.probe()
            assert allocator.match(request(PAGE)) == ()
        allocator.close()


def test_a_heap_that_is_not_there(tmp_path: Path) -> None:
    """Absent, no device, or no heap: each has its reason."""
    (tmp_path / "system").write_bytes(b"")
    for folder, reason in ((tmp_path / "none", "the node is not there"), (tmp_path, "Inappropriate ioctl")):
        allocator = HeapAllocator(folder / "system", HeapRoles())
        assert not allocator.probe()
        assert allocator.unavailable is not None
        assert reason in allocator.unavailable.reason


def test_a_heap_of_unknown_kind_is_not_touched(tmp_path: Path) -> None:
    """Not even opened: a FIFO would have opening wait for ever."""
    os.mkfifo(tmp_path / "protected,secure-video")
    allocator = HeapAllocator(tmp_path / "protected,secure-video", HeapRoles())
    assert not allocator.probe()
    assert allocator.unavailable is not None
    assert "is not known" in allocator.unavailable.reason
    assert "[heaps]" in allocator.unavailable.remedy
    assert not HeapAllocator(NODE, replace(HeapRoles(), system=())).probe()


def test_another_heap_behind_the_name(tmp_path: Path) -> None:
    """What the kernel calls otherwise is not taken for what the name says."""
    link = tmp_path / "default_cma_region"
    link.symlink_to(NODE)
    allocator = HeapAllocator(link, HeapRoles())
    assert not allocator.probe()
    assert allocator.unavailable is not None
    assert "'system'" in allocator.unavailable.reason


def test_what_the_kernel_answers() -> None:
    """To 0 bytes, to part of a page, and for a descriptor that is no heap."""
    with dma_heap.open_heap(str(NODE)) as fd:
        with pytest.raises(OSError) as caught:
            dma_heap.allocate(fd.fileno(), 0)
        assert caught.value.errno == errno.EINVAL
        with dma_heap.allocate(fd.fileno(), 1) as rounded:
            assert os.fstat(rounded.fileno()).st_size == PAGE
    with open("/dev/null", "rb") as null, pytest.raises(OSError, match="no dma-heap") as caught:
        dma_heap.allocate(null.fileno(), PAGE)
    assert caught.value.errno == errno.ENOTTY
