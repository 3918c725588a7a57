# SPDX-License-Identifier: MIT
"""The allocators over udmabuf and a device's flags: who is sent which, what is claimed of memory, and for how long.

Flags are read from the argument of the ioctl, as a kernel would (tests/unit/udmabuf_device.py).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.heaps import MadeUpAllocator
from tests.unit.scenes import World, play
from tests.unit.udmabuf_device import (
    CACHED,
    CLOEXEC,
    UDMABUF_CREATE,
    UDMABUF_CREATE_LIST,
    UNCACHED,
    WRITE_COMBINE,
    Call,
    FakeDevice,
    Judge,
    honest,
    ignoring,
    refusing_all,
    refusing_unknown,
)
from udmabufd.core import maker, wrap
from udmabufd.core.allocator import Populate
from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import AllocatorError, Busy, CacheUnavailable, NoAllocator, UdmabufUnavailable
from udmabufd.core.hugetlb_allocator import HugetlbAllocator
from udmabufd.core.memory import Memory
from udmabufd.core.pool import allocate_all
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import boot, hugepages, memfd, selftest
from udmabufd.linux import udmabuf as driver
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import UDMABUF_2M, Cache, CacheEvidence

SIZE = 4 * PAGE_SIZE
HUGE = 2 << 20
FLAG = {Cache.CACHED: CACHED, Cache.UNCACHED: UNCACHED, Cache.WRITE_COMBINE: WRITE_COMBINE}
DISHONEST = (ignoring, refusing_unknown, refusing_all)

DEFAULT, PROBE = CacheEvidence.DEFAULT, CacheEvidence.PROBE
UNKNOWN = None, None
NOTHING = frozenset[Cache]()

Asked = UdmabufAllocator | HugetlbAllocator


@pytest.fixture(autouse=True)
def combining(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A machine that combines writes, and a function for one that does not."""

    def use(combines: bool) -> None:
        monkeypatch.setattr(boot, "write_combining", lambda: combines)

    use(True)
    return use


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """One that honours flags, until a test changes that."""
    return FakeDevice(monkeypatch, honest, "udmabuf_cache")


@pytest.fixture
def udmabuf(device: FakeDevice, tmp_path: Path) -> Iterator[UdmabufAllocator]:
    """The allocator of that device, not probed."""
    allocator = UdmabufAllocator(Path("/dev/null"), tmp_path)
    yield allocator
    allocator.close()


@pytest.fixture
def huge(udmabuf: UdmabufAllocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HugetlbAllocator:
    """That of huge pages over it."""
    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    for name in ("nr", "free", "resv", "surplus", "nr_overcommit"):
        (pool / f"{name}_hugepages").write_text("4\n" if name in ("nr", "free") else "0\n")
    create = memfd.create

    def instead(name: str, size: int, huge_page: int | None = None) -> object:
        return create(name, size)

    monkeypatch.setattr(memfd, "create", instead)
    monkeypatch.setattr(hugepages, "fill", lambda fd, size: None)
    return HugetlbAllocator(UDMABUF_2M, HUGE, udmabuf, tmp_path)


@pytest.fixture(params=["udmabuf", "udmabuf-2M"])
def asked(request: pytest.FixtureRequest, udmabuf: UdmabufAllocator, huge: HugetlbAllocator) -> Asked:
    """Either of the two."""
    return udmabuf if request.param == "udmabuf" else huge


def request_of(cache: Cache, policy: str = "prefer", **spec: object) -> Request:
    return Request.from_spec({"size": SIZE, "cache": str(cache), "cache_policy": policy, **spec})


@contextmanager
def made(allocator: Asked, request: Request) -> Iterator[Memory]:
    memory = allocator.allocate(request, "name", memfd.populate)
    try:
        yield memory
    finally:
        memory.close()


def claims(allocator: Asked, cache: Cache) -> tuple[Cache | None, CacheEvidence | None]:
    """What is said of memory for which `cache` was preferred."""
    with made(allocator, request_of(cache)) as memory:
        return memory.cache, memory.evidence


def replaced(device: FakeDevice, allocator: UdmabufAllocator, judge: Judge, exporter: str = "udmabuf") -> None:
    """Have another device in the place of the former, and udev tell of it."""
    device.judge, device.exporter = judge, exporter
    assert allocator.probe()
    device.calls.clear()


# ---- who is sent which ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", Cache)
def test_a_device_that_passed_is_sent_what_is_asked_for(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, cache: Cache
) -> None:
    assert udmabuf.probe()
    device.calls.clear()
    for policy in ("prefer", "require"):
        request = request_of(cache, policy)
        assert asked.match(request) == ()
        with made(asked, request) as memory:
            assert (memory.cache, memory.evidence, memory.allocator) == (cache, PROBE, asked.name)
    assert device.calls == [Call(UDMABUF_CREATE, CLOEXEC | FLAG[cache], 1)] * 2
    assert asked.capabilities.obtainable == set(Cache)
    assert asked.capabilities.cache is Cache.CACHED
    assert asked.capabilities.evidence is PROBE


@pytest.mark.parametrize("cache", Cache)
@pytest.mark.parametrize("judge", DISHONEST)
def test_no_other_is_sent_any_flag(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, judge: Judge, cache: Cache
) -> None:
    """Memory is cached then, and `require` is refused beforehand."""
    replaced(device, udmabuf, judge)
    assert claims(asked, cache) == (Cache.CACHED, DEFAULT)
    assert device.calls == [Call(UDMABUF_CREATE, CLOEXEC, 1)]
    refused = asked.match(request_of(cache, "require"))
    assert bool(refused) is (cache is not Cache.CACHED)
    assert all(isinstance(refusal.error, CacheUnavailable) for refusal in refused)
    assert asked.capabilities.obtainable == {Cache.CACHED}
    assert asked.capabilities.evidence is DEFAULT


def test_a_device_of_which_it_cannot_be_told_is_sent_none(device: FakeDevice, udmabuf: UdmabufAllocator) -> None:
    """It serves all the same."""
    device.judge = lambda flags: errno.ENOMEM if flags & ~CLOEXEC else 0
    assert udmabuf.probe()
    device.calls.clear()
    assert claims(udmabuf, Cache.UNCACHED) == UNKNOWN
    assert device.flags == [CLOEXEC]
    # The kernel's own maps cached what it is told nothing of, but perhaps was told something before.
    device.exporter = "udmabuf"
    assert udmabuf.probe()
    assert claims(udmabuf, Cache.UNCACHED) == (Cache.CACHED, DEFAULT)
    assert udmabuf.maps("udmabuf") == UNKNOWN
    replaced(device, udmabuf, ignoring)
    assert udmabuf.maps("udmabuf") == (Cache.CACHED, DEFAULT)
    assert udmabuf.maps("udmabuf_cache") == UNKNOWN


@pytest.mark.parametrize("judge", DISHONEST)
def test_of_another_driver_that_does_not_pass_nothing_is_known(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, judge: Judge
) -> None:
    """What all versions of the kernel's own do says nothing of it: it serves whom that does not matter to."""
    replaced(device, udmabuf, judge, "udmabuf_other")
    assert (asked.capabilities.obtainable, asked.capabilities.cache, asked.capabilities.evidence) == (
        NOTHING,
        *UNKNOWN,
    )
    assert "cache" not in asked.capabilities.sources
    for cache in Cache:
        assert asked.match(request_of(cache)) == ()
        assert claims(asked, cache) == UNKNOWN
        for unmet in (request_of(cache, "require"), request_of(cache, constraints={"cache": [str(cache)]})):
            (refusal, *_) = asked.match(unmet)
            assert (refusal.field, refusal.reason.split(",")[0]) == ("cache", "how its memory is mapped is not known")
    assert set(device.flags) == {CLOEXEC}
    with memfd.create("brought", SIZE) as fd:
        memfd.populate(fd.fileno(), SIZE)
        brought = wrap.export(udmabuf, [fd], [(0, 0, SIZE)], "name", privileged=True, populate=lambda fd, parts: None)
        brought.close()
    assert (brought.cache, brought.evidence) == UNKNOWN


@pytest.mark.parametrize(
    ("judge", "flags", "evidence"), [(honest, CLOEXEC | CACHED, PROBE), (ignoring, CLOEXEC, DEFAULT)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_what_clients_bring_is_cached(
    device: FakeDevice, udmabuf: UdmabufAllocator, judge: Judge, flags: int, evidence: CacheEvidence, count: int
) -> None:
    """They have it mapped themselves, cached. Several ranges go out in a list."""
    replaced(device, udmabuf, judge)
    with memfd.create("brought", SIZE) as fd:
        memfd.populate(fd.fileno(), SIZE)
        ranges = [(0, number * PAGE_SIZE, PAGE_SIZE) for number in range(count)]
        memory = wrap.export(udmabuf, [fd], ranges, "name", privileged=True, populate=lambda fd, parts: None)
        assert (memory.cache, memory.evidence) == (Cache.CACHED, evidence)
        memory.close()
    assert device.calls == [Call(UDMABUF_CREATE_LIST if count > 1 else UDMABUF_CREATE, flags, count)]


@pytest.mark.parametrize("cache", Cache)
def test_a_list_is_sent_what_is_asked_for(device: FakeDevice, udmabuf: UdmabufAllocator, cache: Cache) -> None:
    assert udmabuf.probe()
    device.calls.clear()
    with memfd.create("parts", SIZE) as fd:
        items = [Item(fd.fileno(), 0, PAGE_SIZE)] * 2
        exported = udmabuf.export_list(items, request_of(cache))
        exported.dma_buf.close()
    assert (exported.cache, exported.evidence, exported.exporter) == (cache, PROBE, "udmabuf_cache")
    assert device.calls == [Call(UDMABUF_CREATE_LIST, CLOEXEC | FLAG[cache], 2)]


def test_what_the_constraints_accept_is_asked_for(device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked) -> None:
    """Where the preferred one is not among that."""
    assert udmabuf.probe()
    device.calls.clear()
    request = request_of(Cache.CACHED, constraints={"cache": ["uncached"]})
    with made(asked, request) as memory:
        assert memory.cache is Cache.UNCACHED
    assert device.flags == [CLOEXEC | UNCACHED]


# ---- without write-combining ----------------------------------------------------------------------------------------


def test_nopat_leaves_write_combining_out(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, combining: Callable[[bool], None]
) -> None:
    """Whatever the device says: it would be uncached. What is not there is not asked for either."""
    combining(False)
    assert udmabuf.probe()
    device.calls.clear()
    assert asked.capabilities.obtainable == {Cache.CACHED, Cache.UNCACHED}
    assert "not known to combine writes" in asked.capabilities.sources["cache"]
    assert claims(asked, Cache.WRITE_COMBINE) == (Cache.CACHED, PROBE)
    assert claims(asked, Cache.UNCACHED) == (Cache.UNCACHED, PROBE)
    assert device.flags == [CLOEXEC | CACHED, CLOEXEC | UNCACHED]
    (refusal,) = asked.match(request_of(Cache.WRITE_COMBINE, "require"))
    assert isinstance(refusal.error, CacheUnavailable)
    with pytest.raises(CacheUnavailable):
        asked.allocate(request_of(Cache.WRITE_COMBINE, "require"), "name", memfd.populate)


def test_the_machine_is_looked_at_once(udmabuf: UdmabufAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the probe, in its thread: calls do not wait for files to be read."""
    assert udmabuf.probe()
    monkeypatch.setattr(boot, "write_combining", lambda: pytest.fail("read anew"))
    assert udmabuf.capabilities.obtainable == set(Cache)
    assert udmabuf.match(request_of(Cache.WRITE_COMBINE, "require")) == ()
    assert claims(udmabuf, Cache.WRITE_COMBINE) == (Cache.WRITE_COMBINE, PROBE)


# ---- devices that come and go ---------------------------------------------------------------------------------------


def test_before_any_probe_nothing_is_claimed(udmabuf: UdmabufAllocator, asked: Asked) -> None:
    assert (asked.capabilities.obtainable, asked.capabilities.evidence) == (NOTHING, None)
    with pytest.raises(UdmabufUnavailable):
        asked.allocate(request_of(Cache.UNCACHED), "name", memfd.populate)
    # That it is not there is what is told, also to whom an attribute matters; what suits in no case comes first.
    for request in (
        request_of(Cache.CACHED, "require"),
        request_of(Cache.UNCACHED, "require"),
        request_of(Cache.CACHED),
    ):
        (refusal,) = asked.match(request)
        assert isinstance(refusal.error, UdmabufUnavailable)
    assert asked.match(request_of(Cache.CACHED, kind="memfd"))[0].field == "kind"


def test_an_honest_device_and_the_kernels_own_after_it(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked
) -> None:
    """Nothing of the former is claimed of the latter, nor is it sent a flag."""
    assert udmabuf.probe()
    assert claims(asked, Cache.WRITE_COMBINE) == (Cache.WRITE_COMBINE, PROBE)
    replaced(device, udmabuf, ignoring)
    assert claims(asked, Cache.WRITE_COMBINE) == (Cache.CACHED, DEFAULT)
    assert device.flags == [CLOEXEC]
    assert asked.capabilities.obtainable == {Cache.CACHED}
    assert asked.match(request_of(Cache.WRITE_COMBINE, "require"))


def test_the_kernels_own_and_an_honest_device_after_it(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked
) -> None:
    replaced(device, udmabuf, ignoring)
    assert claims(asked, Cache.UNCACHED) == (Cache.CACHED, DEFAULT)
    replaced(device, udmabuf, honest, "udmabuf_cache")
    assert claims(asked, Cache.UNCACHED) == (Cache.UNCACHED, PROBE)
    assert device.flags == [CLOEXEC | UNCACHED]


def test_a_device_that_goes_takes_its_attributes_along(
    udmabuf: UdmabufAllocator, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is there, but fails its test, and at the service's end."""
    assert udmabuf.probe()
    assert asked.capabilities.obtainable == set(Cache)

    def fail(device: int) -> str:
        raise selftest.SelfTestFailed("it lost a byte")

    with monkeypatch.context() as patch:
        patch.setattr(selftest, "check", fail)
        assert not udmabuf.probe()
        assert (asked.capabilities.obtainable, asked.capabilities.evidence) == (NOTHING, None)
    assert udmabuf.probe()
    assert asked.capabilities.obtainable == set(Cache)
    udmabuf.close()
    assert (asked.capabilities.obtainable, asked.capabilities.evidence) == (NOTHING, None)


@pytest.mark.parametrize("before", [honest, ignoring])
def test_a_device_that_is_replaced_while_a_buffer_is_made(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, before: Judge
) -> None:
    """Between the call and its description: what is said is of the device that made it, exporter included."""
    after, names = (ignoring, ("udmabuf_cache", "udmabuf")) if before is honest else (honest, ("udmabuf", "cache"))
    replaced(device, udmabuf, before, names[0])
    device.between = lambda: replaced(device, udmabuf, after, names[1])
    expected = (Cache.UNCACHED, PROBE) if before is honest else (Cache.CACHED, DEFAULT)
    assert claims(asked, Cache.UNCACHED) == expected
    expected = (Cache.CACHED, DEFAULT) if before is honest else (Cache.UNCACHED, PROBE)
    assert claims(asked, Cache.UNCACHED) == expected


def populating(then: Callable[[], None]) -> Populate:
    """A populate during which something else happens."""

    def populate(fd: int, size: int) -> None:
        memfd.populate(fd, size)
        then()

    return populate


@pytest.mark.parametrize(
    ("request_", "refused"),
    [
        (request_of(Cache.UNCACHED), None),
        (request_of(Cache.UNCACHED, "require"), (CacheUnavailable, "spec requires uncached")),
        (
            request_of(Cache.CACHED, constraints={"cache": ["uncached", "write-combine"]}),
            (NoAllocator, "spec accepts only uncached, write-combine"),
        ),
        (request_of(Cache.CACHED, "require"), None),
    ],
)
def test_a_device_that_is_replaced_after_a_request_was_judged(
    device: FakeDevice,
    udmabuf: UdmabufAllocator,
    request_: Request,
    refused: tuple[type[AllocatorError], str] | None,
) -> None:
    """Who only prefers gets cached memory, who insists gets none: never what he does not want, or is not told of. What
    he is refused with is what he would be if he asked now.
    """
    assert udmabuf.probe()
    assert udmabuf.match(request_) == ()
    populate = populating(lambda: replaced(device, udmabuf, ignoring))
    if refused is None:
        memory = udmabuf.allocate(request_, "name", populate)
        assert (memory.cache, memory.evidence) == (Cache.CACHED, DEFAULT)
        memory.close()
        assert device.flags == [CLOEXEC]
    else:
        error, demand = refused
        with pytest.raises(error) as caught:
            udmabuf.allocate(request_, "name", populate)
        assert str(caught.value) == f"cache: udmabuf does not suit: its memory is mapped cached, and {demand}"
        assert [str(refusal.error) for refusal in udmabuf.match(request_)] == [str(caught.value)]
        assert device.flags == []


@pytest.mark.parametrize("before", [honest, ignoring])
def test_flags_go_to_the_device_that_they_were_chosen_for(
    device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Judge
) -> None:
    """Also where another takes its place while it is about to be asked: what is then looked at is the driver."""
    node = tmp_path / "node"
    node.touch()
    udmabuf = UdmabufAllocator(node, tmp_path)
    names = "udmabuf_cache" if before is honest else "udmabuf", "udmabuf" if before is honest else "udmabuf_cache"
    replaced(device, udmabuf, before, names[0])
    own, read_limits, asked = node.stat().st_ino, driver.read_limits, list[tuple[int, int]]()

    def replace(directory: str | os.PathLike[str] = "") -> driver.Limits:
        monkeypatch.setattr(driver, "read_limits", read_limits)
        node.rename(tmp_path / "former")
        node.touch()
        replaced(device, udmabuf, ignoring if before is honest else honest, names[1])
        # Whoever is asked now is the former, and answers as that.
        device.judge, device.exporter = before, names[0]
        return read_limits(directory)

    create = driver.create

    def look(fd: int, memfd: int, offset: int, size: int, flags: int = 0, *rest: object) -> OwnedFd:
        asked.append((os.fstat(fd).st_ino, flags))
        return create(fd, memfd, offset, size, flags)

    monkeypatch.setattr(driver, "read_limits", replace)
    monkeypatch.setattr(driver, "create", look)
    with memfd.create("pages", SIZE) as fd:
        exported = udmabuf.export_list([Item(fd.fileno(), 0, SIZE)], request_of(Cache.UNCACHED))
        exported.dma_buf.close()
    udmabuf.close()
    assert node.stat().st_ino != own
    if before is honest:
        assert asked[-1] == (own, CLOEXEC | UNCACHED)
        assert (exported.cache, exported.evidence, exported.exporter) == (Cache.UNCACHED, PROBE, names[0])
    else:
        assert asked[-1] == (own, CLOEXEC)
        assert (exported.cache, exported.evidence, exported.exporter) == (Cache.CACHED, DEFAULT, names[0])


# ---- pages that a device has no attribute for -----------------------------------------------------------------------


def only_cached(flags: int) -> int:
    """An honest device that is asked for pages that it can only map cached."""
    return errno.EINVAL if flags & (UNCACHED | WRITE_COMBINE) else 0


@pytest.mark.parametrize("cache", [Cache.UNCACHED, Cache.WRITE_COMBINE])
def test_who_prefers_gets_cached_memory_of_pages_that_have_no_other(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, cache: Cache
) -> None:
    assert udmabuf.probe()
    device.calls.clear()
    device.judge = only_cached
    assert asked.match(request_of(cache)) == ()
    assert claims(asked, cache) == (Cache.CACHED, PROBE)
    assert device.flags == [CLOEXEC | FLAG[cache], CLOEXEC | CACHED]


@pytest.mark.parametrize(
    "request_",
    [
        request_of(Cache.UNCACHED, "require"),
        request_of(Cache.UNCACHED, constraints={"cache": ["uncached", "write-combine"]}),
    ],
)
def test_who_insists_is_told_what_there_is_not(
    device: FakeDevice, udmabuf: UdmabufAllocator, asked: Asked, request_: Request
) -> None:
    """With an error that lets another allocator be asked; see maker._NEXT."""
    assert udmabuf.probe()
    device.calls.clear()
    device.judge = only_cached
    with pytest.raises(CacheUnavailable, match="^cache: the kernel refused to map this memory uncached") as caught:
        asked.allocate(request_, "name", memfd.populate)
    assert isinstance(caught.value, maker._NEXT)
    assert device.flags == [CLOEXEC | UNCACHED]


def test_a_refusal_that_has_another_cause(device: FakeDevice, udmabuf: UdmabufAllocator) -> None:
    """It is told as it is: cached memory is refused, too, or it is no question of flags."""
    assert udmabuf.probe()
    for code in (errno.EINVAL, errno.ENOMEM):
        device.calls.clear()
        device.judge = lambda flags, code=code: code  # type: ignore[misc]
        with pytest.raises(OSError) as caught:
            udmabuf.allocate(request_of(Cache.UNCACHED), "name", memfd.populate)
        assert caught.value.errno == code
        assert len(device.flags) == (2 if code == errno.EINVAL else 1)


# ---- several --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(honest, ignoring), (ignoring, honest)])
def test_several_are_alike(device: FakeDevice, udmabuf: UdmabufAllocator, before: Judge, after: Judge) -> None:
    """Where the device is replaced after some of them, all are made anew; what was made is closed."""
    replaced(device, udmabuf, before)
    count = 0

    def populate(fd: int, size: int) -> None:
        nonlocal count
        memfd.populate(fd, size)
        count += 1
        if count == 2:
            replaced(device, udmabuf, after)

    memories = allocate_all(udmabuf, request_of(Cache.UNCACHED), ["a", "b", "c"], populate)
    for memory in memories:
        memory.close()
    expected = (Cache.UNCACHED, PROBE) if after is honest else (Cache.CACHED, DEFAULT)
    assert [(memory.cache, memory.evidence) for memory in memories] == [expected] * 3
    assert count == 6


def test_several_of_which_some_have_no_attribute(device: FakeDevice, udmabuf: UdmabufAllocator) -> None:
    """Cached, all of them, for who prefers; none for who insists."""
    assert udmabuf.probe()
    asked = 0

    def judge(flags: int) -> int:
        nonlocal asked
        if not flags & UNCACHED:
            return 0
        asked += 1
        return 0 if asked % 2 else errno.EINVAL

    device.judge = judge
    memories = allocate_all(udmabuf, request_of(Cache.UNCACHED), ["a", "b"], memfd.populate)
    for memory in memories:
        memory.close()
    assert [(memory.cache, memory.evidence) for memory in memories] == [(Cache.CACHED, PROBE)] * 2
    with pytest.raises(CacheUnavailable):
        allocate_all(udmabuf, request_of(Cache.UNCACHED, "require"), ["a", "b"], memfd.populate)


def test_what_is_required_stays_so_when_several_are_made_anew(
    udmabuf: UdmabufAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often they turn out unlike, here by what is known of them."""
    assert udmabuf.probe()
    own, asked = udmabuf.allocate, list[Cache]()
    evidence = itertools.cycle([PROBE, CacheEvidence.DRIVER])

    def allocate(request: Request, name: str, populate: Populate) -> Memory:
        asked.append(request.cache)
        memory = own(request, name, populate)
        memory.evidence = next(evidence)
        return memory

    monkeypatch.setattr(udmabuf, "allocate", allocate)
    with pytest.raises(CacheUnavailable, match="now one way and now another"):
        allocate_all(udmabuf, request_of(Cache.UNCACHED, "require"), ["a", "b"], memfd.populate)
    assert asked == [Cache.UNCACHED] * 6


def test_several_that_are_never_alike(device: FakeDevice, udmabuf: UdmabufAllocator) -> None:
    """A device that changes with every buffer: an error that lets another allocator be asked."""
    assert udmabuf.probe()
    judges = itertools.cycle([ignoring, honest])
    populate = populating(lambda: replaced(device, udmabuf, next(judges)))
    with pytest.raises(CacheUnavailable, match="now one way and now another"):
        allocate_all(udmabuf, request_of(Cache.UNCACHED), ["a", "b"], populate)


# ---- what is told of a device that is configured --------------------------------------------------------------------


def test_limits_are_told_of_where_they_are(device: FakeDevice, tmp_path: Path) -> None:
    """In the folder that is configured, before the device is asked and after it has refused."""
    udmabuf = UdmabufAllocator(Path("/dev/null"), tmp_path)
    assert udmabuf.probe()
    (tmp_path / "size_limit_mb").write_text("1\n")
    (refusal,) = udmabuf.match(request_of(Cache.CACHED, size=2 << 20))
    assert refusal.remedy == f"root can raise it in {tmp_path}"
    device.judge = only_cached
    with memfd.create("pages", 2 << 20) as fd:
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK)
        for make, item in ((driver.create, (fd.fileno(), 0, 2 << 20)), (driver.create, (fd.fileno(), 0, PAGE_SIZE))):
            with pytest.raises(OSError, match="UDMABUF_CREATE") as caught:
                make(-1, *item, CLOEXEC | UNCACHED, tmp_path)
            told = "size_limit_mb of 1" if item[2] > PAGE_SIZE else "it does not take the flags 0x5"
            assert told in str(caught.value)
        with pytest.raises(OSError, match="1 items with a list_limit of 0"):
            (tmp_path / "list_limit").write_text("0\n")
            driver.create_list(-1, [Item(fd.fileno(), 0, PAGE_SIZE)], CLOEXEC | UNCACHED, tmp_path)
    udmabuf.close()


def test_a_node_that_is_not_there(tmp_path: Path) -> None:
    """What would help is not the same for the kernel's own and for one that is configured."""
    for path, told in (("/dev/udmabuf", "CONFIG_UDMABUF"), (str(tmp_path / "other"), "[udmabuf] device")):
        udmabuf = UdmabufAllocator(Path(path), tmp_path)
        if Path(path).exists():
            continue
        assert not udmabuf.probe()
        assert udmabuf.unavailable is not None
        assert udmabuf.unavailable.reason.startswith(f"{path} cannot be used: ")
        assert told in udmabuf.unavailable.reason


def test_huge_pages_as_well(
    device: FakeDevice, udmabuf: UdmabufAllocator, huge: HugetlbAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it happens while the pages are taken from the pool."""
    assert udmabuf.probe()
    monkeypatch.setattr(hugepages, "fill", lambda fd, size: replaced(device, udmabuf, ignoring))
    with pytest.raises(CacheUnavailable):
        huge.allocate(request_of(Cache.UNCACHED, "require"), "name", memfd.populate)
    replaced(device, udmabuf, honest)
    assert claims(huge, Cache.UNCACHED) == (Cache.CACHED, DEFAULT)
    assert device.flags == [CLOEXEC]


# ---- what is recorded -----------------------------------------------------------------------------------------------


def fact(world: World, buffer: Buffer) -> tuple[Cache | None, CacheEvidence | None]:
    """What is known of a buffer's memory, in whichever life."""
    memory = world.buffer(buffer.id).memory
    assert memory is not None
    return memory.cache, memory.evidence


def test_what_was_established_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It outlives the service, and the device that it was established of."""

    async def scene(world: World) -> None:
        buffers, fds = [], []
        world.machine.honours_flags = True
        assert world.life.udmabuf.probe()
        for cache in Cache:
            buffer, fd = await world.allocate(cache=str(cache))
            buffers.append((buffer, cache, PROBE))
            fds.append(fd)
        world.machine.honours_flags = False
        assert world.life.udmabuf.probe()
        buffer, fd = await world.allocate(cache="uncached")
        buffers.append((buffer, Cache.CACHED, DEFAULT))
        fds.append(fd)
        for honours in (False, True, False):
            for each, cache, evidence in buffers:
                assert fact(world, each) == (cache, evidence)
            world.machine.honours_flags = honours
            await world.again()
        for fd in fds:
            fd.close()

    play(scene, monkeypatch)


def test_a_buffer_that_is_there_is_judged_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as one would be that is made now: devices attach to what is mapped as they accept, whatever came since."""

    async def scene(world: World) -> None:
        for device, cache in (("reader", "cached"), ("writer", "uncached")):
            world.machine.devices.come(device, cache=[cache])
        world.machine.honours_flags = True
        assert world.life.udmabuf.probe()
        uncached, one = await world.allocate(cache="uncached", cache_policy="require")
        cached, two = await world.allocate()
        for honours in (True, False):
            world.machine.honours_flags = honours
            assert world.life.udmabuf.probe()
            for buffer, suits, not_ in ((uncached, "writer", "reader"), (cached, "reader", "writer")):
                await world.detach(buffer, (await world.attach(buffer, suits)).number)
                with pytest.raises(Busy, match=f"^cache: .* does not suit {not_}: its memory is mapped "):
                    await world.attach(buffer, not_)
        one.close()
        two.close()

    play(scene, monkeypatch)


def test_a_device_that_changes_between_two_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next allocator is asked, where one gives what is required."""

    async def scene(world: World) -> None:
        world.machine.honours_flags = True
        assert world.life.udmabuf.probe()
        MadeUpAllocator(world.life, "heap:uncached", cache=Cache.UNCACHED, evidence=CacheEvidence.DRIVER)

        def change(fd: int, size: int) -> None:
            memfd_populate(fd, size)
            world.machine.honours_flags = False
            assert world.life.udmabuf.probe()

        memfd_populate = memfd.populate
        monkeypatch.setattr(memfd, "populate", change)
        buffer, fd = await world.allocate(cache="uncached", cache_policy="require")
        assert buffer.memory is not None
        assert (buffer.memory.allocator, buffer.memory.cache) == ("heap:uncached", Cache.UNCACHED)
        fd.close()

    play(scene, monkeypatch)
