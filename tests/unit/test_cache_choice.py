# SPDX-License-Identifier: MIT
"""Which cache attribute a buffer gets, by whom, and what Explain says of it: every case against the plain rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.bus.info import verdict
from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.errors import AllocatorError, CacheUnavailable, NoAllocator
from udmabufd.core.matching import effective_cache, refusals
from udmabufd.core.memory import Memory
from udmabufd.core.pool import Pool
from udmabufd.core.spec import Request
from udmabufd_base.codec import Variant
from udmabufd_client.contract import VERDICT_TYPES, Cache, CacheEvidence, CachePolicy, Kind

ORDER = ("udmabuf", "udmabuf-2M", "heap:*", "dumb:*", "memfd")
NAMES = ("udmabuf", "udmabuf-2M", "heap:system", "heap:uncached", "dumb:card0")


def request(cache: Cache, policy: CachePolicy, accepted: frozenset[Cache] | None = None) -> Request:
    constraints = {} if accepted is None else {"cache": sorted(accepted)}
    return Request.from_spec({"size": 1, "cache": str(cache), "cache_policy": str(policy), "constraints": constraints})


def capabilities() -> st.SearchStrategy[Capabilities]:
    return st.builds(
        Capabilities,
        st.just(Kind.DMA_BUF),
        cache=st.none() | st.sampled_from(Cache),
        caches=st.frozensets(st.sampled_from(Cache)),
        evidence=st.sampled_from(CacheEvidence),
    )


def accepted() -> st.SearchStrategy[frozenset[Cache] | None]:
    return st.none() | st.frozensets(st.sampled_from(Cache), min_size=1)


class Source:
    """An allocator that judges as all do."""

    free: int | None = None
    unavailable: Refusal | None = None
    max_size = 1 << 30

    def __init__(self, name: str, own: Capabilities) -> None:
        self.name = name
        self.capabilities = own

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        return refusals(self.name, capabilities or self.capabilities, request, lambda: None)

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        raise AssertionError("nothing is allocated here")

    def close(self) -> None:
        pass


# ---- one allocator --------------------------------------------------------------------------------------------------


def may_be(own: Capabilities, accepted: frozenset[Cache] | None) -> set[Cache]:
    """What memory could be, by the words of the contract alone."""
    return {cache for cache in Cache if cache in {own.cache, *own.caches} and (accepted is None or cache in accepted)}


@pytest.mark.parametrize("policy", CachePolicy)
@pytest.mark.parametrize("asked", Cache)
def test_every_case(asked: Cache, policy: CachePolicy) -> None:
    """Of all capabilities and all sets that are accepted: 3 attributes asked for, 3 usual ones, 8 sets, 8 sets."""
    sets = [frozenset(some) for length in range(4) for some in itertools.combinations(Cache, length)]
    for usual, caches, wanted in itertools.product(Cache, sets, [None, *sets[1:]]):
        own = Capabilities(Kind.DMA_BUF, cache=usual, caches=caches)
        wish = request(asked, policy, wanted)
        possible = may_be(own, wanted)
        found = effective_cache(own, wish)
        if not possible:
            assert found is None
        elif asked in possible:
            assert found is asked
        else:
            assert found in possible
            assert found is usual or usual not in possible
        refused = refusals("udmabuf", own, wish, lambda: None)
        fits = bool(possible) and (policy is CachePolicy.PREFER or asked in possible)
        assert bool(refused) is not fits, (own, wish)
        assert {refusal.field for refusal in refused} <= {"cache"}
        for refusal in refused:
            # Whose demand it is, and the error that goes with it.
            required = refusal.device == "spec" and isinstance(refusal.error, CacheUnavailable)
            assert required or (isinstance(refusal.error, NoAllocator) and wanted is not None)
            assert all(str(cache) in refusal.reason for cache in own.obtainable)


@given(capabilities())
def test_what_can_be_had_is_the_usual_one_and_what_can_be_asked_for(own: Capabilities) -> None:
    assert own.obtainable == {own.cache, *own.caches} - {None}


@given(capabilities(), st.sampled_from(Cache), st.sampled_from(CachePolicy), accepted())
def test_nothing_is_promised_that_cannot_be_had(
    own: Capabilities, asked: Cache, policy: CachePolicy, wanted: frozenset[Cache] | None
) -> None:
    found = effective_cache(own, request(asked, policy, wanted))
    assert found is None or (found in own.obtainable and (wanted is None or found in wanted))
    # More that can be had makes nothing worse for who asks.
    more = Capabilities(Kind.DMA_BUF, cache=own.cache, caches=frozenset(Cache))
    if found is asked:
        assert effective_cache(more, request(asked, policy, wanted)) is asked


def test_the_one_that_is_asked_for_comes_before_the_usual_one() -> None:
    own = Capabilities(Kind.DMA_BUF, caches=frozenset(Cache))
    for cache in Cache:
        assert effective_cache(own, request(cache, CachePolicy.PREFER)) is cache
    # The usual one before any that nobody asked for.
    some = frozenset({Cache.CACHED, Cache.UNCACHED})
    assert effective_cache(own, request(Cache.WRITE_COMBINE, CachePolicy.PREFER, some)) is Cache.CACHED
    assert effective_cache(own, request(Cache.CACHED, CachePolicy.PREFER, frozenset({Cache.UNCACHED}))) is (
        Cache.UNCACHED
    )


def test_a_refusal_tells_all_that_can_be_had() -> None:
    own = Capabilities(Kind.DMA_BUF, caches=frozenset({Cache.CACHED, Cache.UNCACHED}))
    (refusal,) = refusals("udmabuf", own, request(Cache.WRITE_COMBINE, CachePolicy.REQUIRE), lambda: None)
    assert refusal.reason == "its memory is mapped cached or uncached, and spec requires write-combine"
    assert refusal.remedy == "ask with cache_policy prefer"


# ---- all of them ----------------------------------------------------------------------------------------------------


def pool_of(owns: Sequence[Capabilities]) -> Pool:
    return Pool(ORDER, [Source(name, own) for name, own in zip(NAMES, owns, strict=False)])


CACHED = Capabilities(Kind.DMA_BUF)
COMBINED = Capabilities(Kind.DMA_BUF, cache=Cache.WRITE_COMBINE, evidence=CacheEvidence.DRIVER)
UNCACHED = Capabilities(Kind.DMA_BUF, cache=Cache.UNCACHED, evidence=CacheEvidence.DRIVER)
ANY = Capabilities(Kind.DMA_BUF, caches=frozenset(Cache), evidence=CacheEvidence.PROBE)


@pytest.mark.parametrize(
    ("owns", "asked", "names"),
    [
        ([CACHED, CACHED, CACHED, UNCACHED, COMBINED], Cache.CACHED, NAMES),
        (
            [CACHED, CACHED, CACHED, UNCACHED, COMBINED],
            Cache.WRITE_COMBINE,
            ("dumb:card0", "udmabuf", "udmabuf-2M", "heap:system", "heap:uncached"),
        ),
        (
            [CACHED, CACHED, CACHED, UNCACHED, COMBINED],
            Cache.UNCACHED,
            ("heap:uncached", "udmabuf", "udmabuf-2M", "heap:system", "dumb:card0"),
        ),
        # With a device that does what it is asked for the configured order is the order again.
        (
            [ANY, ANY, CACHED, UNCACHED, COMBINED],
            Cache.WRITE_COMBINE,
            ("udmabuf", "udmabuf-2M", "dumb:card0", "heap:system", "heap:uncached"),
        ),
        # One whose memory is never cached is not taken for who did not ask for that, while there is another.
        ([COMBINED, CACHED], Cache.CACHED, ("udmabuf-2M", "udmabuf")),
    ],
)
def test_who_gives_what_is_asked_for_comes_first(
    owns: list[Capabilities], asked: Cache, names: tuple[str, ...]
) -> None:
    pool = pool_of(owns)
    wish = request(asked, CachePolicy.PREFER)
    assert tuple(allocator.name for allocator in pool.in_order(wish)) == names
    assert tuple(allocator.name for allocator in pool.select(wish)) == names
    assert tuple(row.allocator.name for row in pool.explain(lambda: wish)) == names
    # ListAllocators has the configured order, whoever asks.
    assert tuple(allocator.name for allocator in pool.allocators) == NAMES[: len(owns)]


@given(st.lists(capabilities(), max_size=5), st.sampled_from(Cache), st.sampled_from(CachePolicy), accepted())
def test_the_order_by_what_is_asked_for(
    owns: list[Capabilities], asked: Cache, policy: CachePolicy, wanted: frozenset[Cache] | None
) -> None:
    pool = pool_of(owns)
    wish = request(asked, policy, wanted)
    order = [allocator.name for allocator in pool.in_order(wish)]
    as_asked = {name for name, own in zip(NAMES, owns, strict=False) if effective_cache(own, wish) is asked}
    assert order == [name for name in NAMES[: len(owns)] if name in as_asked] + [
        name for name in NAMES[: len(owns)] if name not in as_asked
    ]
    try:
        chosen = [allocator.name for allocator in pool.select(wish)]
    except AllocatorError:
        chosen = []
    rows = pool.explain(lambda: wish)
    assert [row.allocator.name for row in rows] == order
    assert [row.allocator.name for row in rows if not row.refusals] == chosen
    for row in rows:
        assert row.cache is effective_cache(row.allocator.capabilities, wish)
        assert row.evidence is (None if row.cache is None else row.allocator.capabilities.evidence)
        if not row.refusals:
            unknown = not row.allocator.capabilities.obtainable
            assert (row.cache is None) is unknown
            assert wanted is None or not unknown
            assert policy is CachePolicy.PREFER or row.cache is asked
    if chosen and as_asked:
        assert chosen[0] in as_asked


@pytest.mark.parametrize("policy", CachePolicy)
@pytest.mark.parametrize("asked", Cache)
def test_where_nothing_is_known(asked: Cache, policy: CachePolicy) -> None:
    """No demand is met by it, and no preference; who has none is served, and told nothing."""
    own = Capabilities(Kind.DMA_BUF, cache=None, evidence=None)
    for wanted in (None, *(frozenset({cache}) for cache in Cache), frozenset(Cache)):
        wish = request(asked, policy, wanted)
        assert effective_cache(own, wish) is None
        found = refusals("heap:vendor", own, wish, lambda: None)
        assert bool(found) is (wanted is not None or policy is CachePolicy.REQUIRE)
        assert all(refusal.reason.startswith("how its memory is mapped is not known, and ") for refusal in found)
    assert pool_of([own, CACHED]).in_order(request(Cache.CACHED, policy))[0].name == "udmabuf-2M"
    if policy is CachePolicy.PREFER:
        assert row_of(own, request(asked, policy)) == {"allocator": "udmabuf", "ok": True}


def test_what_is_not_there_has_its_place() -> None:
    """Nothing is known of it, and that is no reason to tell of it last."""
    own = Capabilities(Kind.DMA_BUF, cache=None, evidence=None)
    pool = pool_of([own, CACHED, own])
    wish = request(Cache.CACHED, CachePolicy.PREFER)
    absent = Refusal("", "", "it is not there", "", NoAllocator("it is not there"))
    assert [allocator.name for allocator in pool.in_order(wish)] == ["udmabuf-2M", "udmabuf", "heap:system"]
    for allocator in pool.allocators:
        allocator.unavailable = absent if allocator.name == "udmabuf" else None  # type: ignore[misc]
    assert [row.allocator.name for row in pool.explain(lambda: wish)] == ["udmabuf", "udmabuf-2M", "heap:system"]


class Changing(Source):
    """One whose device is another each time that it is looked at: a probe runs in a thread of its own."""

    def __init__(self, name: str, owns: Sequence[Capabilities]) -> None:
        self._owns = itertools.cycle(owns)
        super().__init__(name, owns[0])

    @property
    def capabilities(self) -> Capabilities:
        return next(self._owns)

    @capabilities.setter
    def capabilities(self, own: Capabilities) -> None:
        pass


@pytest.mark.parametrize("shift", range(3))
@pytest.mark.parametrize("policy", CachePolicy)
def test_a_row_is_of_one_device(policy: CachePolicy, shift: int) -> None:
    """Never what one would give, known in the way of another; nor that one suits which does not."""
    owns = [ANY, CACHED, UNCACHED]
    possible = [row_of(own, request(Cache.UNCACHED, policy)) for own in owns]
    for wanted in range(6):
        source = Changing("udmabuf", owns[shift:] + owns[:shift] + [CACHED] * (wanted % 2))
        for _ in range(wanted):
            _ = source.capabilities
        (found,) = Pool(ORDER, [source]).explain(lambda: request(Cache.UNCACHED, policy))
        row = {key: variant.value for key, variant in verdict(found).items()}
        assert row in possible


# ---- Explain's rows -------------------------------------------------------------------------------------------------


def row_of(own: Capabilities, wish: Request) -> dict[str, object]:
    (found,) = Pool(ORDER, [Source("udmabuf", own)]).explain(lambda: wish)
    row = verdict(found)
    assert all(variant == Variant(VERDICT_TYPES[key], variant.value) for key, variant in row.items())
    return {key: variant.value for key, variant in row.items()}


def test_a_row_tells_what_would_be_and_how_that_is_known() -> None:
    prefer = CachePolicy.PREFER
    for own, asked, cache, evidence in (
        (CACHED, Cache.CACHED, "cached", "default"),
        (CACHED, Cache.WRITE_COMBINE, "cached", "default"),
        (COMBINED, Cache.CACHED, "write-combine", "driver"),
        (ANY, Cache.UNCACHED, "uncached", "probe"),
        (ANY, Cache.CACHED, "cached", "probe"),
    ):
        assert row_of(own, request(asked, prefer)) == {
            "allocator": "udmabuf",
            "ok": True,
            "cache_effective": cache,
            "cache_evidence": evidence,
        }


@pytest.mark.parametrize(
    "wish",
    [
        request(Cache.UNCACHED, CachePolicy.REQUIRE),
        request(Cache.CACHED, CachePolicy.PREFER, frozenset({Cache.UNCACHED})),
        Request.from_spec({"size": 1, "kind": "memfd"}),
    ],
)
def test_a_row_of_a_refusal_tells_nothing_of_memory_that_there_would_not_be(wish: Request) -> None:
    row = row_of(CACHED, wish)
    assert row["ok"] is False
    assert set(row) == {"allocator", "ok", "field", "device", "reason", "remedy"}
