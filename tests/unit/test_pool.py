# SPDX-License-Identifier: MIT
"""core.pool: which allocators are asked, in which order, why none is, and that what is explained is what is done."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence

import pytest

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.constraints import Constraints, Demand
from udmabufd.core.errors import (
    AllocatorError,
    CacheUnavailable,
    InvalidSpec,
    KernelLimit,
    NoAllocator,
    OutOfMemory,
    UdmabufUnavailable,
)
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.memory import Memory
from udmabufd.core.pool import Pool, allocate_all
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.linux import memfd
from udmabufd_client.contract import Cache, Kind

REQUEST = Request.from_spec({"size": 1})
ORDER = ("udmabuf", "udmabuf-2M", "heap:cma*", "heap:*", "dumb:*", "memfd")


def refusal(error: AllocatorError, field: str = "", reason: str = "it does not suit") -> Refusal:
    return Refusal(field, "", reason, "", error)


class Stub:
    """An allocator that answers as it is told to."""

    free: int | None = None

    def __init__(
        self,
        name: str,
        refusals: Sequence[Refusal] = (),
        *,
        kind: Kind = Kind.DMA_BUF,
        unavailable: Refusal | None = None,
        max_size: int = 1 << 30,
    ) -> None:
        self.name = name
        self.capabilities = Capabilities(kind=kind)
        self.refusals = tuple(refusals)
        self.unavailable = unavailable
        self.max_size = 0 if unavailable else max_size
        self.closed = 0
        self.judged = 0

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        assert request.size
        self.judged += 1
        return self.refusals

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        raise AssertionError("nothing is allocated here")

    def close(self) -> None:
        self.closed += 1


def pool_of(*allocators: Stub) -> Pool:
    return Pool(ORDER, allocators)


# ---- which there are ------------------------------------------------------------------------------------------------


def test_the_order_is_the_configured_one_in_whatever_order_they_come() -> None:
    names = ["udmabuf", "udmabuf-2M", "heap:cma", "heap:cma2", "heap:a", "heap:system", "dumb:card0", "memfd"]
    for shuffled in (names, names[::-1], names[4:] + names[:4]):
        pool = pool_of(*map(Stub, shuffled))
        assert pool.names == [allocator.name for allocator in pool.allocators] == names


def test_what_is_not_in_the_order_is_not_enabled() -> None:
    pool = pool_of()
    stranger, served = Stub("udmabuf-1G"), Stub("heap:x")
    assert not pool.add(stranger)
    assert stranger.closed == 1
    assert pool.add(served)
    assert (pool.names, served.closed) == (["heap:x"], 0)
    assert pool.find("udmabuf-1G") is None
    assert pool.find("heap:x") is served


def test_one_that_comes_back_takes_the_place_of_the_former() -> None:
    pool = pool_of(Stub("heap:a"), Stub("heap:c"))
    first, second = Stub("heap:b"), Stub("heap:b")
    pool.add(first)
    pool.add(second)
    assert (first.closed, second.closed) == (1, 0)
    assert pool.find("heap:b") is second
    assert pool.names == ["heap:a", "heap:b", "heap:c"]
    assert pool.remove("heap:b")
    assert not pool.remove("heap:b")
    assert (second.closed, pool.names) == (1, ["heap:a", "heap:c"])


def test_all_are_closed_at_the_end() -> None:
    stubs = [Stub("heap:a"), Stub("heap:b"), Stub("memfd")]
    pool = pool_of(*stubs)
    pool.close()
    assert ([stub.closed for stub in stubs], pool.allocators) == ([1, 1, 1], ())


def test_what_can_be_had_now() -> None:
    gone = refusal(UdmabufUnavailable("absent"))
    memfd_stub = Stub("memfd", kind=Kind.MEMFD, max_size=1 << 40)
    pool = pool_of(
        Stub("udmabuf", unavailable=gone), Stub("heap:a", max_size=5), Stub("heap:b", max_size=7), memfd_stub
    )
    assert pool.names == ["heap:a", "heap:b", "memfd"]
    assert pool.max_size == 7
    # While there is no dma-buf at all, that of a memfd.
    pool.remove("heap:a")
    pool.remove("heap:b")
    assert pool.max_size == 1 << 40
    pool.remove("memfd")
    assert pool.max_size == 0


# ---- which are asked ------------------------------------------------------------------------------------------------


def test_those_that_suit_are_asked_in_order() -> None:
    no = refusal(NoAllocator("no"))
    pool = pool_of(Stub("memfd"), Stub("heap:a", [no]), Stub("udmabuf"), Stub("dumb:card0"))
    assert [allocator.name for allocator in pool.select(REQUEST)] == ["udmabuf", "dumb:card0", "memfd"]


def test_each_is_judged_when_its_turn_comes() -> None:
    """To judge one is to read what the kernel has of its memory; most calls need the first alone."""
    no = refusal(NoAllocator("no"))
    stubs = (Stub("udmabuf", [no]), Stub("udmabuf-2M"), Stub("heap:a", [no]), Stub("heap:b"), Stub("memfd"))
    pool = pool_of(*stubs)
    suitable = pool.select(REQUEST)
    assert next(suitable).name == "udmabuf-2M"
    assert [stub.judged for stub in stubs] == [1, 1, 0, 0, 0]
    # What becomes unsuitable, or goes, meanwhile.
    stubs[4].refusals = (no,)
    pool.remove("heap:a")
    assert [allocator.name for allocator in suitable] == ["heap:b"]
    assert [stub.judged for stub in stubs] == [1, 1, 1, 1, 1]


def test_what_every_allocator_refused_by_a_kernel_limit_is_a_kernel_limit() -> None:
    limit = refusal(KernelLimit("size: too big"), "size", "too big")
    absent = refusal(UdmabufUnavailable("absent"), reason="absent")
    unsuited = refusal(NoAllocator("contiguous: scattered"), "contiguous", "scattered")
    uncached = refusal(CacheUnavailable("cache: it is cached"), "cache", "cached")
    for refusals, error, text in (
        ([limit, limit], KernelLimit, "^size: too big$"),
        ([absent], UdmabufUnavailable, "^absent$"),
        ([uncached, uncached], CacheUnavailable, "^cache: it is cached$"),
        # Whoever is unsuited would not have served without the limit.
        ([limit, unsuited], KernelLimit, "^size: too big$"),
        ([unsuited, absent], UdmabufUnavailable, "^absent$"),
        ([unsuited, unsuited], NoAllocator, "udmabuf, udmabuf-2M: contiguous: scattered$"),
        ([limit, absent], NoAllocator, "udmabuf: size: too big; udmabuf-2M: unavailable: absent$"),
    ):
        pool = pool_of(*(Stub(name, [each]) for name, each in zip(ORDER, refusals, strict=False)))
        with pytest.raises(error, match=text):
            pool.select(REQUEST)


def test_a_named_allocator_answers_alone() -> None:
    limit, unsuited = refusal(KernelLimit("size: too big")), refusal(NoAllocator("scattered"))
    pool = pool_of(Stub("udmabuf", [unsuited, limit]), Stub("heap:a", [limit]))
    for name, error, text in (
        ("udmabuf", NoAllocator, "^scattered$"),
        ("heap:a", KernelLimit, "^size: too big$"),
        ("heap:b", NoAllocator, "^allocator: 'heap:b' is not among the enabled allocators udmabuf, heap:a$"),
    ):
        with pytest.raises(error, match=text):
            pool.select(Request.from_spec({"size": 1, "allocator": name}))


def test_allocators_of_another_kind_are_not_spoken_of() -> None:
    other = refusal(NoAllocator("kind: no"), "kind", "it hands out memfds")
    pool = pool_of(Stub("memfd", [other], kind=Kind.MEMFD))
    with pytest.raises(NoAllocator, match="^No allocator of kind dma-buf is enabled$"):
        pool.select(REQUEST)
    pool.add(Stub("udmabuf", [refusal(NoAllocator("x"), "alignment", "too small")]))
    with pytest.raises(NoAllocator, match="suits. udmabuf: alignment: too small$"):
        pool.select(REQUEST)


# ---- what is explained ----------------------------------------------------------------------------------------------


def test_what_is_explained_is_what_is_done() -> None:
    """Whatever each of them says."""
    answers: tuple[list[Refusal], ...] = (
        [],
        [refusal(NoAllocator("no"), "contiguous")],
        [refusal(KernelLimit("size: no"), "size")],
        [refusal(UdmabufUnavailable("absent")), refusal(KernelLimit("size: no"), "size")],
    )
    for chosen in itertools.product(answers, repeat=3):
        pool = pool_of(*(Stub(name, each) for name, each in zip(("udmabuf", "heap:a", "memfd"), chosen, strict=True)))
        explained = pool.explain(lambda: REQUEST)
        assert [(row.allocator.name, list(row.refusals)) for row in explained] == list(
            zip(pool.names, chosen, strict=True)
        )
        assert {row.cache for row in explained} == {Cache.CACHED}
        suitable = [row.allocator for row in explained if not row.refusals]
        if suitable:
            assert list(pool.select(REQUEST)) == suitable
        else:
            with pytest.raises(AllocatorError):
                pool.select(REQUEST)


def test_demands_that_exclude_each_other_are_each_allocators_refusal() -> None:
    pool = pool_of(Stub("udmabuf"), Stub("heap:a"))
    demands = [
        Demand("gpu", Constraints.from_values({"allocators": ["udmabuf"]})),
        Demand("camera", Constraints.from_values({"allocators": ["heap:*"]})),
    ]
    rows = pool.explain(lambda: REQUEST.under(demands))
    assert [(row.allocator.name, row.cache) for row in rows] == [("udmabuf", None), ("heap:a", None)]
    for _, (found,), *_ in rows:
        assert (found.field, found.device) == ("allocators", "gpu")
        assert found.reason == "udmabuf, demanded by gpu, and heap:*, demanded by camera, have none in common"
        assert found.remedy == "use separate buffers for gpu and camera"
    # What is no question of demands is the caller's error.
    with pytest.raises(InvalidSpec):
        pool.explain(lambda: Request.from_spec({"size": 0}))


# ---- making it ------------------------------------------------------------------------------------------------------


class Failing(MemfdAllocator):
    """Raises what it is told to, in turn; None is success."""

    def __init__(self, *failures: Exception | None) -> None:
        super().__init__(1 << 40)
        self.failures = list(failures)
        self.made: list[Memory] = []

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        if (failure := self.failures.pop(0)) is not None:
            raise failure
        self.made.append(super().allocate(request, name, populate))
        return self.made[-1]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.ENOMEM, ""), OutOfMemory),
        (OSError(errno.ENOSPC, ""), OutOfMemory),
        (OSError(errno.EINVAL, ""), AllocatorError),
        (KernelLimit("size: no"), KernelLimit),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_all_are_made_or_none(failure: Exception, error: type[Exception]) -> None:
    request = Request.from_spec({"size": 1, "kind": "memfd"})
    allocator = Failing(None, None, failure)
    with pytest.raises(error) as caught:
        allocate_all(allocator, request, ["a", "b", "c"], memfd.populate)
    assert isinstance(failure, OSError) or caught.value is failure
    assert len(allocator.made) == 2
    assert all(memory.memfd is not None and memory.memfd.closed for memory in allocator.made)
    memories = allocate_all(Failing(None, None), request, ["a", "b"], memfd.populate)
    assert [memory.size for memory in memories] == [PAGE_SIZE] * 2
    for memory in memories:
        memory.close()
