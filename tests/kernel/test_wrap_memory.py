# SPDX-License-Identifier: MIT
"""core.wrap on the real driver: what is exported, what is refused and why; and core.wrap with memory that runs out."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.kernel.buffers import MIB, PAGE, mapped, one_fallocate, poison_free_memory, sealed_memfd
from tests.kernel.witness import bufinfo
from udmabufd.core import wrap
from udmabufd.core.errors import AccessDenied, BadMemfd, KernelLimit
from udmabufd.core.memory import Memory
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import boot, memfd, selftest, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

SEALS = memfd.F_SEAL_SHRINK | memfd.F_SEAL_SEAL
SIZE = 8 * PAGE


@pytest.fixture(scope="module")
def allocator() -> Iterator[UdmabufAllocator]:
    """The allocator as the service makes it."""
    allocator = UdmabufAllocator(Path(udmabuf.DEVICE), Path(udmabuf.PARAMETERS))
    assert allocator.probe()
    yield allocator
    allocator.close()


def clients_memfd(size: int = SIZE, seals: int = SEALS) -> OwnedFd:
    """A memfd as a client makes one: every page written to, sealed."""
    fd = memfd.create("clients", size)
    os.pwrite(fd.fileno(), secrets.token_bytes(size), 0)
    memfd.add_seals(fd.fileno(), seals)
    return fd


@contextmanager
def wrapped(
    allocator: UdmabufAllocator, fds: list[OwnedFd], ranges: list[wrap.Range], *, privileged: bool = True
) -> Iterator[Memory]:
    """Check and export, as root does."""
    size = wrap.check(fds, ranges, [PAGE] * len(fds))
    memory = wrap.export(allocator, fds, ranges, "wrapped", privileged=privileged, populate=memfd.populate_ranges)
    try:
        assert memory.dma_buf is not None
        entry = bufinfo()[memory.inode]
        assert (entry.size, entry.exporter, entry.name) == (size, "udmabuf", "wrapped")
        yield memory
    finally:
        memory.close()


def test_ranges_of_several_memfds(allocator: UdmabufAllocator) -> None:
    """The bytes are those of the ranges in their order, overlapping ones too, and stay shared with the memfds."""
    with clients_memfd() as first, clients_memfd() as second:
        ranges = [(1, 4 * PAGE, 2 * PAGE), (0, 0, PAGE), (0, 0, 2 * PAGE), (1, 5 * PAGE, 3 * PAGE)]
        fds = [first, second]
        with wrapped(allocator, fds, ranges) as memory:
            assert memory.allocator == "wrapped"
            assert memory.memfd is None
            with mapped(memory.exported, 8 * PAGE) as view:
                parts = [os.pread(fds[index].fileno(), size, offset) for index, offset, size in ranges]
                assert view.tobytes() == b"".join(parts)
                view[2 * PAGE : 2 * PAGE + 4] = b"back"
                assert view[3 * PAGE : 3 * PAGE + 4].tobytes() == b"back", "the same page once more"
            assert os.pread(first.fileno(), 4, 0) == b"back"


def test_one_memfd(allocator: UdmabufAllocator, set_parameter: Callable[[str, int], None]) -> None:
    """A single range needs no list; of several, no more than list_limit; and no more bytes than size_limit_mb."""
    set_parameter("list_limit", 0)
    with clients_memfd() as fd:
        with wrapped(allocator, [fd], [(0, 0, SIZE)]):
            pass
        with pytest.raises(KernelLimit, match="list_limit of 0"):
            with wrapped(allocator, [fd], [(0, 0, PAGE), (0, PAGE, PAGE)]):
                pass
        set_parameter("size_limit_mb", 0)
        with pytest.raises(KernelLimit, match="size_limit_mb of 0"):
            with wrapped(allocator, [fd], [(0, 0, SIZE)]):
                pass


@contextmanager
def reopened(flags: int, seals: int = SEALS) -> Iterator[OwnedFd]:
    with clients_memfd(seals=seals) as fd:
        with OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", flags | os.O_CLOEXEC)) as other:
            yield other


@pytest.mark.parametrize(
    ("flags", "seals", "cause"),
    [
        (os.O_RDONLY, SEALS, "memfd 1 is not open for reading and writing"),
        (os.O_WRONLY, SEALS, "memfd 1 is not open for reading and writing"),
        (os.O_PATH, SEALS, "memfd 1 is an O_PATH descriptor"),
        (os.O_RDWR, memfd.F_SEAL_SEAL, "memfd 1 lacks the seal F_SEAL_SHRINK"),
        (os.O_RDWR, memfd.F_SEAL_SHRINK, "memfd 1 lacks the seal F_SEAL_SEAL"),
        (os.O_RDWR, SEALS | memfd.F_SEAL_WRITE, "memfd 1 has the seal F_SEAL_WRITE"),
        (os.O_RDWR, SEALS | memfd.F_SEAL_FUTURE_WRITE, "memfd 1 has the seal F_SEAL_FUTURE_WRITE"),
    ],
)
def test_memfds_that_are_refused(allocator: UdmabufAllocator, flags: int, seals: int, cause: str) -> None:
    """Mode and seals, each named; SEAL_EXEC, which newer kernels add, is none of them."""
    with clients_memfd() as good, reopened(flags, seals) as bad:
        with pytest.raises(BadMemfd, match=f"^{cause}"):
            with wrapped(allocator, [good, bad], [(0, 0, PAGE), (1, 0, PAGE)]):
                pass


@pytest.mark.parametrize(
    ("offset", "size", "cause"),
    [
        (1, PAGE, "range 1: offset 1 and size 4096 must be multiples of 4096"),
        (0, PAGE - 1, "range 1: offset 0 and size 4095 must be multiples of 4096"),
        (512, 512, "range 1: offset 512 and size 512 must be multiples of 4096"),
        (PAGE, 0, "range 1 is empty"),
        (0, SIZE + PAGE, "range 1: bytes 0 to 36864 of a memfd of 32768"),
        (SIZE, PAGE, "range 1: bytes 32768 to 36864 of a memfd of 32768"),
        (2**64 - PAGE, 2 * PAGE, "range 1: bytes 18446744073709547520 to 18446744073709555712 of a memfd"),
    ],
)
def test_ranges_that_are_refused(allocator: UdmabufAllocator, offset: int, size: int, cause: str) -> None:
    """Alignment, emptiness, the end of the memfd, and sums that 64 bits cannot hold."""
    with clients_memfd() as fd, pytest.raises(BadMemfd, match=f"^{cause}"):
        with wrapped(allocator, [fd], [(0, 0, PAGE), (0, offset, size)]):
            pass


def test_holes_are_refused(allocator: UdmabufAllocator) -> None:
    """Never written, or allocated by one fallocate: named by memfd and byte. Outside of the ranges they may be."""
    with sealed_memfd(SIZE, SEALS, prepare=one_fallocate) as allocated, memfd.create("hole", SIZE) as holey:
        os.pwrite(holey.fileno(), bytes(3 * PAGE), 0)
        memfd.add_seals(holey.fileno(), SEALS)
        for fd, hole in ((allocated, 0), (holey, 3 * PAGE)):
            with pytest.raises(BadMemfd, match=f"memfd 0 has a hole at byte {hole};"):
                with wrapped(allocator, [fd], [(0, 0, SIZE)]):
                    pass
        with wrapped(allocator, [holey], [(0, 0, PAGE), (0, 2 * PAGE, PAGE)]):
            pass
        assert os.fstat(holey.fileno()).st_blocks * 512 == 3 * PAGE, "nothing outside of the ranges was populated"


@pytest.mark.unzeroed
def test_only_root_where_pages_are_not_zeroed(allocator: UdmabufAllocator) -> None:
    """Where the kernel has the flaw and does not zero pages, a user is refused, and told why; else not."""
    assert not boot.zeroed_at_allocation()
    with clients_memfd() as fd:
        if selftest.single_fallocate_flaw(udmabuf_device(allocator)):
            assert allocator.shows_unzeroed
            with pytest.raises(AccessDenied, match="Only root .* boot with init_on_alloc=1"):
                with wrapped(allocator, [fd], [(0, 0, SIZE)], privileged=False):
                    pass
        else:
            assert not allocator.shows_unzeroed
            with wrapped(allocator, [fd], [(0, 0, SIZE)], privileged=False):
                pass


def udmabuf_device(allocator: UdmabufAllocator) -> int:
    assert allocator._device is not None
    return allocator._device.fd.fileno()


def test_users_may_where_pages_are_zeroed(allocator: UdmabufAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of the kernel's command line is what decides."""
    monkeypatch.setattr(wrap, "_zeroed_at_allocation", lambda: True)
    with clients_memfd() as fd, wrapped(allocator, [fd], [(0, 0, SIZE)], privileged=False):
        pass


@pytest.mark.unzeroed
def test_root_sees_nothing_stale(allocator: UdmabufAllocator) -> None:
    """A memfd of zeros, made of poisoned memory, is zeros through the dma-buf."""
    size = 8 * MIB
    poison_free_memory(256 * MIB)
    with sealed_memfd(size, SEALS) as fd, wrapped(allocator, [fd], [(0, 0, size)]) as memory:
        with mapped(memory.exported, size) as view:
            assert not np.count_nonzero(np.frombuffer(view, dtype=np.uint8))


# ---- memory that runs out -------------------------------------------------------------------------------------------

GROUP = Path("/sys/fs/cgroup/udmabufd-fill-test")

FILL = """
import os, sys
sys.path[:0] = ["daemon", "client"]
from pathlib import Path
from udmabufd.linux import fill, headroom, memfd
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
print(headroom.Headroom().read().limit_name)
with memfd.create("small", 8 << 20) as small, memfd.create("large", 256 << 20) as large:
    fill.populate_in_child(small.fileno(), 8 << 20)
    print(memfd.first_hole(small.fileno(), 0, 8 << 20))
    room = headroom.Headroom().read()
    print(room.present > 8 << 20)
    try:
        fill.populate_in_child(large.fileno(), 256 << 20)
    except OSError as error:
        print(error)
print("alive")
"""


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group that may have 64 MiB."""
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    GROUP.mkdir()
    (GROUP / "memory.max").write_text(str(64 * MIB))
    (GROUP / "memory.swap.max").write_text("0")
    yield GROUP
    GROUP.rmdir()


def test_the_child_dies_in_our_place(small_group: Path) -> None:
    """What fits is filled, and charged to the group; what does not kills the child, and its parent lives."""
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(small_group)], stdout=subprocess.PIPE, text=True, check=False
    )
    limit, hole, charged, error, *rest = done.stdout.splitlines()
    assert limit == f"memory.max of {GROUP.name}"
    assert (hole, charged) == ("None", "True")
    assert "killed by signal 9" in error
    assert "ENOMEM" in error
    assert rest == ["alive"]
    assert done.returncode == 0
    events = dict(line.split() for line in (small_group / "memory.events").read_text().splitlines())
    assert events["oom_kill"] == "1"


def test_without_the_child_we_die(small_group: Path) -> None:
    """The contrast: the same in the process itself is its end."""
    code = FILL.replace("fill.populate_in_child(large", "memfd.populate(large")
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_group)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -9
    assert "alive" not in done.stdout
