# SPDX-License-Identifier: MIT
"""Copies between memory of every kind: the same bytes, no reference left. And what comes back from swap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import open_fds
from tests.kernel.buffers import MIB, mapped
from tests.kernel.given import given
from tests.kernel.hugepools import huge_pages
from tests.kernel.witness import bufinfo
from tests.unit.test_linux_copy import beats_while_copying
from udmabufd.core.allocator import Allocator
from udmabufd.core.database import DumbFacts
from udmabufd.core.dumb_allocator import DumbAllocator
from udmabufd.core.heap_allocator import HeapAllocator, HeapRoles
from udmabufd.core.hugetlb_allocator import HugetlbAllocator
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import dma_heap, udmabuf
from udmabufd.linux.copy import copy
from udmabufd_client.contract import UDMABUF_2M, Cache

pytestmark = pytest.mark.guest

SIZE = 4 * MIB
KINDS = ("udmabuf", "udmabuf-2M", "heap:system", "dumb:vgem")


@pytest.fixture
def allocators(vgem: Path) -> Iterator[dict[str, Allocator]]:
    """One of each kind."""
    with ExitStack() as undo:
        undo.enter_context(huge_pages(2 * SIZE // (2 * MIB)))
        exporter = UdmabufAllocator(Path(udmabuf.DEVICE), Path(udmabuf.PARAMETERS))
        heap = HeapAllocator(Path(dma_heap.DIRECTORY, "system"), HeapRoles())
        dumb = DumbAllocator(vgem, DumbFacts(Cache.WRITE_COMBINE, False, "a test"))
        for allocator in (exporter, heap, dumb):
            assert allocator.probe()
            undo.callback(allocator.close)
        huge = HugetlbAllocator(UDMABUF_2M, 2 * MIB, exporter)
        yield dict(zip(KINDS, (exporter, huge, heap, dumb), strict=True))


def test_between_all_kinds(allocators: dict[str, Allocator]) -> None:
    """Into other memory, and into more of the same."""
    for source_kind in KINDS:
        with given(allocators[source_kind], SIZE) as source:
            content = os.urandom(SIZE)
            with mapped(source.exported, SIZE) as view:
                view[:] = content
            for target_kind in KINDS:
                with given(allocators[target_kind], SIZE) as target:
                    fds = open_fds()
                    counts = {memory.inode: bufinfo()[memory.inode].count for memory in (source, target)}
                    during: list[tuple[int | None, int | None]] = []

                    def cancelled(source=source, target=target, during=during) -> bool:  # type: ignore[no-untyped-def]
                        during.append((source.references(), target.references()))
                        return False

                    done: list[int] = []
                    ends = source.exported.fileno(), target.exported.fileno()
                    assert copy(*ends, SIZE, progress=done.append, cancelled=cancelled, piece=MIB)
                    assert done == [MIB, 2 * MIB, 3 * MIB, 4 * MIB]
                    assert during == [(1, 1)] * 4
                    assert {inode: bufinfo()[inode].count for inode in counts} == counts
                    assert (source.references(), target.references()) == (0, 0)
                    assert open_fds() == fds
                    for memory in (source, target):
                        with mapped(memory.exported, SIZE) as view:
                            assert view.tobytes() == content, f"{source_kind} to {target_kind}"


def test_cancelled(allocators: dict[str, Allocator]) -> None:
    """A beginning is copied, and no reference is left."""
    with given(allocators["udmabuf"], SIZE) as source, given(allocators["udmabuf-2M"], SIZE) as target:
        with mapped(source.exported, SIZE) as view:
            view[:] = b"\x07" * SIZE
        asked = iter((False, True)).__next__
        ends = source.exported.fileno(), target.exported.fileno()
        assert not copy(*ends, SIZE, progress=lambda done: None, cancelled=asked, piece=MIB)
        assert (source.references(), target.references()) == (0, 0)
        with mapped(target.exported, SIZE) as view:
            assert view.tobytes() == b"\x07" * MIB + bytes(SIZE - MIB)


def test_more_than_there_is(allocators: dict[str, Allocator]) -> None:
    """Of either end."""
    with given(allocators["udmabuf"], SIZE) as small, given(allocators["heap:system"], 2 * SIZE) as large:
        for source, target in ((small, large), (large, small)):
            with pytest.raises(OSError, match="are to be copied"):
                copy(
                    source.exported.fileno(),
                    target.exported.fileno(),
                    SIZE + 1,
                    progress=lambda done: None,
                    cancelled=lambda: False,
                )
        assert (small.references(), large.references()) == (0, 0)


def test_other_threads_run_meanwhile(allocators: dict[str, Allocator]) -> None:
    """Of write-combined memory, which is slow to read."""
    size = 32 * MIB
    with given(allocators["dumb:vgem"], size) as source, given(allocators["udmabuf"], size) as target:
        assert beats_while_copying(source.exported.fileno(), target.exported.fileno(), size) > 0


# ---- swap -----------------------------------------------------------------------------------------------------------

GROUP = Path("/sys/fs/cgroup/udmabufd-copy-test")
SWAPPED = 16 * MIB

IN_GROUP = """
import hashlib, os, sys
sys.path[:0] = ["daemon", "client"]
from pathlib import Path
from udmabufd.linux import memfd, udmabuf
from udmabufd.linux.copy import copy

how, group, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
(group / "cgroup.procs").write_text(str(os.getpid()))

def digest(fd):
    found = hashlib.sha256()
    for offset in range(0, size, 1 << 20):
        found.update(os.pread(fd, 1 << 20, offset))
    return found.hexdigest()

def swapped():
    return int((group / "memory.swap.current").read_text())

never = {"progress": lambda done: None, "cancelled": lambda: False}
with memfd.create("swapped", size) as backing, memfd.create("target", size) as target:
    memfd.populate(backing.fileno(), size)
    for offset in range(0, size, 1 << 20):
        os.pwrite(backing.fileno(), os.urandom(1 << 20), offset)
    memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
    before = digest(backing.fileno())
    while True:
        try:
            (group / "memory.reclaim").write_text(str(size))
        except OSError:
            pass  # Less than that was found.
        if swapped() > 0.8 * size:
            break
    print("out", swapped())
    if how == "populated":
        memfd.populate(backing.fileno(), size)
        print("in", swapped())
        print(digest(backing.fileno()) == before)
    elif how == "exported":
        with udmabuf.open_device() as device:
            with udmabuf.create(device.fileno(), backing.fileno(), 0, size) as dma_buf:
                print("in", swapped())
                copy(dma_buf.fileno(), target.fileno(), size, **never)
                print(digest(target.fileno()) == before)
    else:
        copy(backing.fileno(), target.fileno(), size, **never)
        print("in", swapped())
        print(digest(target.fileno()) == before)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group, on a machine with swap."""
    active = len(Path("/proc/swaps").read_text().splitlines()) > 1
    if not active:
        subprocess.run(["swapon", "/swapfile"], check=True)
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    GROUP.mkdir()
    yield GROUP
    GROUP.rmdir()
    if not active:
        subprocess.run(["swapoff", "/swapfile"], check=True)


@pytest.mark.parametrize("how", ["populated", "exported", "copied"])
def test_what_was_swapped_out_comes_back(group: Path, how: str) -> None:
    """Byte for byte: by populating it, by exporting it at once, by copying it."""
    done = subprocess.run(
        [sys.executable, "-c", IN_GROUP, how, str(group), str(SWAPPED)], stdout=subprocess.PIPE, text=True, check=True
    )
    out, back, equal = done.stdout.splitlines()
    assert int(out.removeprefix("out ")) > 0.8 * SWAPPED
    assert int(back.removeprefix("in ")) < 0.1 * SWAPPED
    assert equal == "True"
