# SPDX-License-Identifier: MIT
"""core.pool: which allocators are asked, in which order, and which one error a call is refused with if none suits."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.constraints import Constraints, Demand
from udmabufd.core.errors import (
    AllocatorError,
    CacheUnavailable,
    IncompatibleConstraints,
    KernelLimit,
    NoAllocator,
    OutOfMemory,
    UdmabufUnavailable,
)
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Memory
from udmabufd.core.pool import Pool, allocate_all
from udmabufd.core.spec import Request
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import Cache, CacheEvidence, Kind

MIB = 1 << 20

ORDER = ("udmabuf", "udmabuf-2M", "heap:*", "dumb:*", "memfd")

LIMIT = Refusal(
    "size", "", "exceeds size_limit_mb of 64", "raise it", KernelLimit("size: exceeds size_limit_mb of 64")
)
ABSENT = Refusal("", "", "there is no device", "", UdmabufUnavailable("/dev/udmabuf cannot be used"))
NO_POOL = Refusal("", "", "no huge pages are set aside", "vm.nr_hugepages", NoAllocator("no huge pages are set aside"))
NO_MEMORY = Refusal("size", "", "exceeds the machine's memory", "", OutOfMemory("size: exceeds the machine's memory"))


class Source:
    """An allocator of given capabilities; `circumstance` is what it refuses with though it would suit."""

    free: int | None = None

    def __init__(self, name: str, capabilities: Capabilities, circumstance: Refusal | None = None) -> None:
        self.name = name
        self.capabilities = capabilities
        self.circumstance = circumstance
        self.closed = 0
        self.made: list[Memory] = []
        self.failures: list[Exception | None] = []

    @property
    def unavailable(self) -> Refusal | None:
        return self.circumstance if self.circumstance and not self.circumstance.field else None

    @property
    def max_size(self) -> int:
        return 0 if self.unavailable else 64 * MIB

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        unsuitable = refusals(self.name, capabilities or self.capabilities, request, lambda: 36)
        return unsuitable or ((self.circumstance,) if self.circumstance else ())

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        fd = OwnedFd(os.memfd_create(name))
        self.made.append(
            Memory(self.name, request.size, fd, None, (0, 1), 1, Cache.CACHED, CacheEvidence.DEFAULT, False)
        )
        return self.made[-1]

    def close(self) -> None:
        self.closed += 1


def udmabuf(circumstance: Refusal | None = None) -> Source:
    return Source("udmabuf", Capabilities(Kind.DMA_BUF), circumstance)


def huge(circumstance: Refusal | None = None) -> Source:
    return Source("udmabuf-2M", Capabilities(Kind.DMA_BUF, granule=2 * MIB, size_step=2 * MIB), circumstance)


def heap(name: str, circumstance: Refusal | None = None, *, contiguous: bool = False) -> Source:
    return Source(f"heap:{name}", Capabilities(Kind.DMA_BUF, contiguous=contiguous), circumstance)


def card(circumstance: Refusal | None = None) -> Source:
    return Source("dumb:card0", Capabilities(Kind.DMA_BUF, cache=Cache.WRITE_COMBINE), circumstance)


def memfd(circumstance: Refusal | None = None) -> Source:
    return Source("memfd", Capabilities(Kind.MEMFD), circumstance)


def request(*demands: Demand, **spec: object) -> Request:
    return Request.from_spec({"size": 8 * MIB, **spec}).under(demands)


def demand(device: str, **values: object) -> Demand:
    return Demand(device, Constraints.from_values(values))


def names(pool: Pool, asked: Request) -> list[str]:
    return [allocator.name for allocator in pool.select(asked)]


def refused(sources: Sequence[Source], asked: Request) -> AllocatorError:
    with pytest.raises(AllocatorError) as caught:
        Pool(ORDER, sources).select(asked)
    return caught.value


# ---- order and members ----------------------------------------------------------------------------------------------


def test_the_order_is_the_configured_one_and_by_name_within_a_pattern() -> None:
    pool = Pool(ORDER, [memfd(), heap("system"), heap("reserved"), card(), udmabuf()])
    assert names(pool, request()) == ["udmabuf", "heap:reserved", "heap:system", "dumb:card0"]
    assert names(pool, request(kind="memfd")) == ["memfd"]
    pool.add(heap("cma"))
    assert names(pool, request())[1:3] == ["heap:cma", "heap:reserved"]
    other = Pool(("heap:system", "udmabuf", "heap:*"), [udmabuf(), heap("a"), heap("system")])
    assert names(other, request()) == ["heap:system", "udmabuf", "heap:a"]


def test_what_is_not_in_the_order_is_not_enabled_and_is_closed() -> None:
    source = heap("system")
    pool = Pool(("udmabuf",), [udmabuf()])
    assert not pool.add(source)
    assert source.closed == 1
    assert pool.names == ["udmabuf"]


def test_each_is_closed_once_when_it_is_replaced_or_leaves() -> None:
    first, second, other = heap("system"), heap("system"), udmabuf()
    pool = Pool(ORDER, [first, other])
    assert pool.add(second)
    assert (first.closed, second.closed, pool.find("heap:system")) == (1, 0, second)
    assert pool.remove("heap:system")
    assert not pool.remove("heap:system")
    assert (first.closed, second.closed) == (1, 1)
    assert names(pool, request()) == ["udmabuf"]
    pool.close()
    assert (other.closed, second.closed, pool.allocators) == (1, 1, ())


def test_names_are_of_those_that_can_serve() -> None:
    pool = Pool(ORDER, [udmabuf(ABSENT), huge(NO_POOL), heap("system", LIMIT), memfd()])
    assert pool.names == ["heap:system", "memfd"]
    assert pool.max_size == 64 * MIB


# ---- the one error --------------------------------------------------------------------------------------------------

CONTIGUOUS = demand("/dev/video1", contiguous=True)
NOT_HERE = demand("gpu", allocators=["wrapped"])
HEAPS = demand("gpu", allocators=["heap:*"])


@pytest.mark.parametrize(
    ("sources", "asked", "error"),
    [
        # By a limit of the driver, only if no allocator that would suit is refused by anything else.
        ([udmabuf(LIMIT)], request(), KernelLimit),
        ([udmabuf(LIMIT), huge(LIMIT), memfd()], request(), KernelLimit),
        ([udmabuf(LIMIT), heap("cma")], request(demand("gpu", allocators=["udmabuf"])), KernelLimit),
        ([udmabuf(LIMIT), huge(NO_POOL)], request(), KernelLimit),
        ([udmabuf(LIMIT), heap("cma", NO_MEMORY)], request(), NoAllocator),
        ([udmabuf(LIMIT), card(ABSENT)], request(), NoAllocator),
        ([udmabuf(LIMIT), heap("system")], request(HEAPS, cache="uncached", cache_policy="require"), CacheUnavailable),
        # It is not the limit that keeps udmabuf from serving here.
        ([udmabuf(LIMIT)], request(CONTIGUOUS), NoAllocator),
        ([udmabuf(LIMIT), heap("system", LIMIT)], request(NOT_HERE), NoAllocator),
        # Without the device.
        ([udmabuf(ABSENT)], request(), UdmabufUnavailable),
        ([udmabuf(ABSENT), huge(ABSENT), memfd()], request(), UdmabufUnavailable),
        ([udmabuf(ABSENT), huge(ABSENT), heap("cma")], request(demand("gpu", cache=["uncached"])), NoAllocator),
        ([udmabuf(ABSENT), huge(ABSENT), heap("system")], request(CONTIGUOUS, size=2 * MIB), UdmabufUnavailable),
        ([udmabuf(ABSENT), heap("system")], request(CONTIGUOUS), NoAllocator),
        # The required cache attribute.
        ([udmabuf(), heap("system")], request(cache="uncached", cache_policy="require"), CacheUnavailable),
        ([udmabuf(), card()], request(cache="uncached", cache_policy="require"), CacheUnavailable),
        (
            [udmabuf(), heap("cma", contiguous=True)],
            request(CONTIGUOUS, cache="uncached", cache_policy="require"),
            CacheUnavailable,
        ),
        ([udmabuf()], request(CONTIGUOUS, cache="uncached", cache_policy="require"), NoAllocator),
        ([udmabuf(), card(LIMIT)], request(cache="write-combine", cache_policy="require"), NoAllocator),
        # Accepted caches are no request for one.
        ([udmabuf()], request(demand("gpu", cache=["uncached"])), NoAllocator),
        # Nothing of that kind.
        ([udmabuf()], request(kind="memfd"), NoAllocator),
        ([memfd()], request(), NoAllocator),
        ([], request(), NoAllocator),
        # The named one's own error, whatever the others say.
        ([udmabuf(LIMIT), heap("system", NO_MEMORY)], request(allocator="udmabuf"), KernelLimit),
        ([udmabuf(ABSENT), heap("system")], request(allocator="udmabuf"), UdmabufUnavailable),
        ([udmabuf(), heap("system", NO_MEMORY)], request(allocator="heap:system"), OutOfMemory),
        ([udmabuf(), heap("system", LIMIT)], request(CONTIGUOUS, allocator="heap:system"), NoAllocator),
        ([udmabuf(LIMIT)], request(allocator="heap:system"), NoAllocator),
    ],
)
def test_the_one_error(sources: list[Source], asked: Request, error: type[AllocatorError]) -> None:
    assert type(refused(sources, asked)) is error


def test_no_allocator_tells_every_reason() -> None:
    text = str(refused([udmabuf(LIMIT), heap("system"), heap("other"), huge(NO_POOL), memfd()], request(CONTIGUOUS)))
    for part in ("udmabuf", "heap:system", "heap:other", "udmabuf-2M", "contiguous", "2048 segments", "/dev/video1"):
        assert part in text
    assert "memfd" not in text, "nobody asked for that kind"


def test_a_named_allocator_that_is_not_enabled_is_told_with_those_that_are() -> None:
    text = str(refused([udmabuf(), memfd()], request(allocator="heap:system")))
    assert "'heap:system'" in text
    assert "udmabuf, memfd" in text


def test_one_that_suits_is_enough() -> None:
    pool = Pool(ORDER, [udmabuf(LIMIT), huge(NO_POOL), heap("reserved", contiguous=True), heap("system"), card()])
    assert names(pool, request(CONTIGUOUS)) == ["heap:reserved"]
    assert names(pool, request(cache="write-combine", cache_policy="require")) == ["dumb:card0"]
    # Who gives what is preferred comes first, the others all the same.
    assert names(pool, request(cache="write-combine")) == ["dumb:card0", "heap:reserved", "heap:system"]
    assert names(pool, request(cache="uncached")) == ["heap:reserved", "heap:system", "dumb:card0"]
    assert names(pool, request(allocator="heap:system")) == ["heap:system"]


# ---- explain decides as select does ---------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from((udmabuf, huge, card, memfd)), unique=True),
    st.lists(st.sampled_from((None, None, LIMIT, ABSENT, NO_MEMORY)), min_size=4, max_size=4),
    st.lists(
        st.sampled_from(
            (
                CONTIGUOUS,
                HEAPS,
                demand("codec", alignment=1 << 20),
                demand("nic", address_bits=32),
                demand("x", cache=["cached"]),
            )
        ),
        max_size=2,
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "kind": st.just("memfd"),
            "cache": st.sampled_from(("write-combine", "uncached", "cached")),
            "cache_policy": st.just("require"),
        },
    ),
)
def test_explain_and_select_agree(
    kinds: list[Callable[[Refusal | None], Source]],
    circumstances: list[Refusal | None],
    demands: list[Demand],
    spec: dict[str, str],
) -> None:
    sources = [make(circumstance) for make, circumstance in zip(kinds, circumstances, strict=False)]
    pool = Pool(ORDER, sources)
    asked = request(*demands, **spec)
    verdicts = pool.explain(lambda: asked)
    # In the order of the configuration, but whose memory would be as asked for comes first.
    as_asked = [row.cache is asked.cache for row in verdicts]
    assert as_asked == sorted(as_asked, reverse=True)
    for like in (True, False):
        of_a_kind = [row.allocator for row in verdicts if (row.cache is asked.cache) is like]
        assert of_a_kind == [allocator for allocator in pool.allocators if allocator in of_a_kind]
    assert {row.allocator.name for row in verdicts} == {allocator.name for allocator in pool.allocators}
    assert len(verdicts) == len(pool.allocators)
    suitable = [row.allocator for row in verdicts if not row.refusals]
    try:
        assert list(pool.select(asked)) == suitable
    except AllocatorError as error:
        assert not suitable
        told = [refusal.error for row in verdicts for refusal in row.refusals[:1]]
        assert type(error) in {NoAllocator, *map(type, told)}


def test_explain_tells_whose_demands_exclude_each_other() -> None:
    pool = Pool(ORDER, [udmabuf(), memfd()])
    demands = [demand("gpu", cache=["cached"]), demand("camera", cache=["uncached"])]
    verdicts = pool.explain(lambda: request(*demands))
    assert [row.allocator.name for row in verdicts] == ["udmabuf", "memfd"]
    for _, (refusal,), *cache in verdicts:
        assert cache == [None, None]
        assert (refusal.field, refusal.device) == ("cache", "gpu")
        assert isinstance(refusal.error, IncompatibleConstraints)
        assert "camera" in refusal.reason
        assert "gpu" in refusal.reason
        assert not refusal.reason.startswith("cache: "), "the field is told beside it"


# ---- allocating -----------------------------------------------------------------------------------------------------


def populate(fd: int, size: int) -> None:
    """In the place of one that fills memory."""


def test_all_or_none_are_made() -> None:
    source = udmabuf()
    source.failures = [None, None, OSError(errno.ENOSPC, "no space")]
    with pytest.raises(OutOfMemory):
        allocate_all(source, request(), ["a", "b", "c"], populate)
    assert [memory.memfd is not None and memory.memfd.closed for memory in source.made] == [True, True]
    memories = allocate_all(source, request(), ["a", "b"], populate)
    assert memories == source.made[2:]
    for memory in memories:
        assert memory.memfd is not None
        assert not memory.memfd.closed
        memory.close()


def test_typed_errors_pass_as_they_are() -> None:
    source = udmabuf()
    source.failures = [KernelLimit("size: changed meanwhile")]
    with pytest.raises(KernelLimit, match="changed meanwhile"):
        allocate_all(source, request(), ["a"], populate)
