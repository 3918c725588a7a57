# SPDX-License-Identifier: MIT
"""core.udmabuf_allocator and core.memfd_allocator without the device: what they ask of it, and its refusals."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from udmabufd.core.errors import KernelLimit, UdmabufUnavailable
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.memory import Accounting
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import cacheprobe, dmabuf, memfd, selftest, udmabuf
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd

SIZE = 8 * PAGE_SIZE
MIB = 1 << 20


class Driver:
    """In the place of /dev/udmabuf, the kernel's own: exports a duplicate of the memfd, notes the items, and may
    refuse. No call of it may have another flag than CLOEXEC.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parameters: Path) -> None:
        self.asked: list[tuple[str, list[Item]]] = []
        self.error: OSError | None = None
        self.flaw: bool | OSError = False
        self.parameters = parameters
        self.limit(1024, 64)
        monkeypatch.setattr(udmabuf, "create", self.create)
        monkeypatch.setattr(udmabuf, "create_list", self.create_list)
        monkeypatch.setattr(selftest, "check", lambda device: "udmabuf")
        monkeypatch.setattr(cacheprobe, "honours_cache_flags", lambda device: False)
        monkeypatch.setattr(selftest, "single_fallocate_flaw", self.single_fallocate_flaw)
        monkeypatch.setattr(dmabuf, "set_name", lambda fd, name: None)
        monkeypatch.setattr(
            dmabuf, "fdinfo", lambda fd: dmabuf.Fdinfo(1, os.fstat(fd).st_size, "udmabuf", "", os.fstat(fd).st_ino)
        )

    def limit(self, items: int, mib: int) -> None:
        """Set the parameters."""
        (self.parameters / "list_limit").write_text(f"{items}\n")
        (self.parameters / "size_limit_mb").write_text(f"{mib}\n")

    def create(self, device: int, fd: int, offset: int, size: int, flags: int, *_: object) -> OwnedFd:
        assert flags == 1
        return self._answer("create", [Item(fd, offset, size)])

    def create_list(self, device: int, items: Sequence[Item], flags: int, *_: object) -> OwnedFd:
        assert flags == 1
        return self._answer("create_list", list(items))

    def single_fallocate_flaw(self, device: int) -> bool:
        if isinstance(self.flaw, OSError):
            raise self.flaw
        return self.flaw

    def _answer(self, call: str, items: list[Item]) -> OwnedFd:
        self.asked.append((call, items))
        if self.error:
            raise self.error
        return OwnedFd(os.dup(items[0].memfd))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """See the class."""
    return Driver(monkeypatch, tmp_path)


@pytest.fixture
def allocator(driver: Driver) -> UdmabufAllocator:
    """One that was not probed yet."""
    return UdmabufAllocator(Path("/dev/null"), driver.parameters)


def request_of(**spec: object) -> Request:
    return Request.from_spec({"size": SIZE, **spec})


def test_allocates(driver: Driver, allocator: UdmabufAllocator) -> None:
    """The memfd is populated by the function given, before it is exported; both fds and the identity come out."""
    assert allocator.probe()
    populated = []

    def populate(fd: int, size: int) -> None:
        assert not driver.asked
        populated.append((fd, size))

    memory = allocator.allocate(request_of(), "name", populate)
    allocator.close()
    try:
        assert memory.memfd is not None
        assert populated == [(memory.memfd.fileno(), SIZE)]
        assert driver.asked == [("create", [Item(memory.memfd.fileno(), 0, SIZE)])]
        seals = memfd.get_seals(memory.memfd.fileno()) & ~memfd.F_SEAL_EXEC
        assert seals == memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW, "SEAL or WRITE would spoil the later proof"
        state = os.fstat(memory.exported.fileno())
        assert (memory.device, memory.inode) == ((os.major(state.st_dev), os.minor(state.st_dev)), state.st_ino)
        assert (memory.allocator, memory.stored) == ("udmabuf", False)
        assert (memory.size, memory.accounting, memory.provable) == (SIZE, Accounting.SERVICE, True)
    finally:
        memory.close()


def test_a_failure_to_populate_leaves_nothing(driver: Driver, allocator: UdmabufAllocator) -> None:
    """Nothing is exported; that no descriptor is left is checked after every test."""
    assert allocator.probe()

    def populate(fd: int, size: int) -> None:
        raise OSError(errno.ENOMEM, "killed")

    with pytest.raises(OSError, match="killed"):
        allocator.allocate(request_of(), "name", populate)
    assert not driver.asked
    allocator.close()


def test_memfds_are_left_to_the_client() -> None:
    """No page is touched: whoever writes first pays."""

    def populate(fd: int, size: int) -> None:
        raise AssertionError("populated")

    memory = MemfdAllocator(1 << 40).allocate(request_of(kind="memfd"), "name", populate)
    try:
        state = os.fstat(memory.exported.fileno())
        assert (state.st_size, state.st_blocks) == (SIZE, 0)
        assert (memory.device, memory.inode) == ((os.major(state.st_dev), os.minor(state.st_dev)), state.st_ino)
    finally:
        memory.close()


def test_lists(driver: Driver, allocator: UdmabufAllocator) -> None:
    """One item needs no list, and does not come under its limit; several go out as they are."""
    assert allocator.probe()
    with memfd.create("items", SIZE) as fd:
        items = [Item(fd.fileno(), 0, PAGE_SIZE), Item(fd.fileno(), 2 * PAGE_SIZE, PAGE_SIZE)]
        allocator.export_list(items).dma_buf.close()
        driver.limit(0, 64)
        allocator.export_list(items[:1]).dma_buf.close()
        driver.limit(1, 64)
        assert driver.asked == [("create_list", items), ("create", items[:1])]
        with pytest.raises(KernelLimit, match="^ranges: 2 exceed .* list_limit of 1;"):
            allocator.export_list(items)
        driver.limit(-1, 64)
        allocator.export_list(items).dma_buf.close()
        driver.limit(1024, 1)
        with pytest.raises(KernelLimit, match=f"^size: {MIB + PAGE_SIZE} bytes exceed .* size_limit_mb of 1;"):
            allocator.export_list([Item(fd.fileno(), 0, MIB), Item(fd.fileno(), 0, PAGE_SIZE)])
        assert len(driver.asked) == 3
    allocator.close()


def test_limits_that_change_meanwhile(
    driver: Driver, allocator: UdmabufAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL is explained by the parameters as they are afterwards; without such a cause it arrives as it is."""
    assert allocator.probe()
    driver.error = OSError(errno.EINVAL, "one of six causes")
    with memfd.create("items", SIZE) as fd:
        items = [Item(fd.fileno(), 0, PAGE_SIZE)] * 2
        with pytest.raises(OSError, match="one of six causes"):
            allocator.export_list(items)
        answers = [udmabuf.Limits(1024, 64), udmabuf.Limits(1, 64)]
        monkeypatch.setattr(udmabuf, "read_limits", lambda directory: answers.pop(0))
        with pytest.raises(KernelLimit, match="list_limit of 1;"):
            allocator.export_list(items)
    allocator.close()


def test_unavailable(allocator: UdmabufAllocator) -> None:
    """Before a probe, and after the end, nothing is exported."""
    for _ in range(2):
        with pytest.raises(UdmabufUnavailable):
            allocator.export_list([Item(0, 0, PAGE_SIZE)])
        allocator.close()


def test_whether_unzeroed_pages_show(driver: Driver, allocator: UdmabufAllocator) -> None:
    """True until a probe has found otherwise, and again when that cannot be found out or the device is gone."""
    assert allocator.shows_unzeroed
    for flaw, expected in ((False, False), (True, True), (False, False), (OSError(errno.ENOMEM, "none"), True)):
        driver.flaw = flaw
        assert allocator.probe()
        assert allocator.shows_unzeroed is expected
    driver.flaw = False
    assert allocator.probe()
    gone = UdmabufAllocator(Path("/nonexistent"), driver.parameters)
    assert not gone.probe()
    assert gone.shows_unzeroed
    allocator.close()


def test_what_it_says_of_a_request(driver: Driver, allocator: UdmabufAllocator) -> None:
    """First whether its memory would suit, which does not change; then what hinders it at present."""
    unsuited = request_of(constraints={"contiguous": True})
    assert [refusal.field for refusal in allocator.match(unsuited)] == ["contiguous"]
    (absent,) = allocator.match(request_of())
    assert "it was not probed yet" in absent.reason
    assert isinstance(absent.error, UdmabufUnavailable)
    assert absent.remedy in str(absent.error)
    assert allocator.max_size == 0
    assert allocator.probe()
    assert allocator.match(request_of()) == ()
    assert allocator.max_size == 64 * MIB
    driver.limit(1024, 1)
    (limit,) = allocator.match(request_of(size=MIB + 1))
    assert (limit.field, limit.device) == ("size", "")
    assert "size_limit_mb of 1" in limit.reason
    assert isinstance(limit.error, KernelLimit)
    assert allocator.match(request_of(size=MIB)) == ()
    assert [refusal.field for refusal in allocator.match(request_of(kind="memfd"))] == ["kind"]
    allocator.close()
    assert allocator.unavailable is not None


def test_what_the_memfd_allocator_says_of_a_request() -> None:
    allocator = MemfdAllocator(1 << 40)
    assert allocator.match(request_of(kind="memfd")) == ()
    assert [refusal.field for refusal in allocator.match(request_of())] == ["kind"]
    constraints = {"alignment": 2 * PAGE_SIZE}
    assert [r.field for r in allocator.match(request_of(kind="memfd", constraints=constraints))] == ["alignment"]
    memory = allocator.allocate(request_of(kind="memfd"), "name", memfd.populate)
    assert (memory.size, memory.accounting, memory.provable) == (SIZE, Accounting.CLIENT, False)
    memory.close()
