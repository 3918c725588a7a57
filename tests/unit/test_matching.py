# SPDX-License-Identifier: MIT
"""What suits a request: bounds against every place that memory can have in a small machine; reasons, their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.unit.demands import constraints as any_constraints
from udmabufd.core.allocator import Capabilities, Refusal
from udmabufd.core.constraints import Constraints, Demand, merge
from udmabufd.core.errors import CacheUnavailable, IncompatibleConstraints, NoAllocator
from udmabufd.core.matching import refusals, segments
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd_client.contract import CONSTRAINT_KEYS, Cache, CachePolicy, Kind

MIB = 1 << 20

PAGES = Capabilities(Kind.DMA_BUF)
HUGE = Capabilities(Kind.DMA_BUF, granule=2 * MIB, size_step=2 * MIB)
CMA = Capabilities(Kind.DMA_BUF, contiguous=True)
MEMFD = Capabilities(Kind.MEMFD)


def unknown() -> int | None:
    raise AssertionError("the highest address was asked for where it decides nothing")


def wanted(**values: Any) -> Constraints:
    return Constraints.from_values(values)


def request(size: int = 8 * MIB, *demands: Demand, **spec: Any) -> Request:
    return Request.from_spec({"size": size, **spec}).under(demands)


def judge(
    capabilities: Capabilities,
    asked: Request,
    name: str = "udmabuf",
    highest: Callable[[], int | None] = unknown,
) -> tuple[Refusal, ...]:
    return refusals(name, capabilities, asked, highest)


def fields(found: Sequence[Refusal]) -> list[str]:
    return [refusal.field for refusal in found]


# ---- segments: against every place in a small machine ---------------------------------------------------------------
#
# Pages are the unit: runs are (first page, pages), everything else in pages too.

Run = tuple[int, int]


def places(pages: int, granule: int, contiguous: bool, memory: int) -> Iterator[list[Run]]:
    """Yield every place that so many pages can have in a machine of `memory` pages, as runs in the buffer's order."""
    starts = range(0, memory, granule)
    if contiguous:
        yield from ([(start, pages)] for start in starts)
        return
    lengths = [granule] * (pages // granule) + ([pages % granule] if pages % granule else [])
    for chosen in itertools.permutations(starts, len(lengths)):
        runs: list[Run] = []
        for start, length in zip(chosen, lengths, strict=True):
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((start, length))
        yield runs


def cut(runs: list[Run], longest: int, boundary: int, alignment: int) -> int | None:
    """Return the segments that `runs` make, each as long as allowed; None if one would begin unaligned."""
    count = 0
    for start, length in runs:
        end = start + length
        while start < end:
            if start % alignment:
                return None
            count += 1
            stop = min(end, start + longest, (start // boundary + 1) * boundary)
            if stop < end and stop % alignment and stop - stop % alignment > start:
                stop -= stop % alignment
            start = stop
    return count


NEVER = 1 << 20
"""Pages: a cut so far apart that it cuts nothing."""


Case = tuple[int, int, bool, int, int, int]
"""Pages of the buffer and of a granule, whether it is one run, the longest segment, the boundary, the alignment."""


def scattered() -> Iterator[Case]:
    limits = list(itertools.product((1, 2, 3, 4, 5, NEVER), (1, 2, 4, 8, NEVER), (1, 2, 4)))
    for granule in (1, 2, 4):
        for pages, limit in itertools.product(range(1, 3 * granule + 2), limits):
            yield pages, granule, False, *limit


def contiguous() -> Iterator[Case]:
    sizes = itertools.product(range(1, 34), (1, 2, 4), (*range(1, 7), NEVER), (1, 2, 4, 8, 16, 32, NEVER), (1, 2, 4))
    for pages, granule, longest, boundary, alignment in sizes:
        yield pages, granule, True, longest, boundary, alignment


def bound(pages: int, granule: int, in_one: bool, longest: int, boundary: int, alignment: int) -> int | None:
    """Return segments() of it, None if refusals() says that segments would begin unaligned."""
    capabilities = Capabilities(Kind.DMA_BUF, granule=granule * PAGE_SIZE, contiguous=in_one)
    constraints = Constraints(
        alignment=alignment * PAGE_SIZE,
        max_segment_size=None if longest == NEVER else longest * PAGE_SIZE,
        segment_boundary=None if boundary == NEVER else boundary * PAGE_SIZE,
    )
    asked = request(pages * PAGE_SIZE, Demand("gpu", constraints))
    if judge(capabilities, asked):
        return None
    return segments(asked.size, capabilities, constraints)


def worst(pages: int, granule: int, in_one: bool, longest: int, boundary: int, alignment: int) -> int | None:
    """Return the most segments that any place makes, None if any begins unaligned."""
    # Room for a place where no two granules are adjacent, and for every start between two boundaries.
    memory = 32 if in_one else 2 * granule * -(-pages // granule)
    counts = {cut(runs, longest, boundary, alignment) for runs in places(pages, granule, in_one, memory)}
    return None if None in counts else max(count for count in counts if count is not None)


@pytest.mark.parametrize("cases", [scattered, contiguous])
def test_segments_in_every_place(cases: Callable[[], Iterator[Case]]) -> None:
    admitted = refused = loose = 0
    for case in cases():
        _, granule, in_one, longest, _, alignment = case
        told, most = bound(*case), worst(*case)
        if told is None or most is None:
            # Nothing is admitted that begins unaligned, nothing refused that never does.
            assert told is None, case
            assert most is None, case
            refused += 1
            continue
        admitted += 1
        assert told >= most, case
        if told != most:
            # Only where a segment can end where the longest one could not.
            assert longest % alignment or (in_one and longest % granule), case
            loose += 1
    assert admitted > 100
    assert refused > 100
    assert loose < admitted / 10, (loose, admitted)


@pytest.mark.parametrize(
    ("size", "capabilities", "constraints", "count"),
    [
        (PAGE_SIZE, PAGES, {}, 1),
        (8 * MIB, PAGES, {}, 2048),
        (8 * MIB, HUGE, {}, 4),
        # Rounded up to whole huge pages.
        (2 * MIB + PAGE_SIZE, HUGE, {}, 2),
        (PAGE_SIZE, HUGE, {"max_segment_size": MIB}, 2),
        (8 * MIB, CMA, {}, 1),
        (8 * MIB, CMA, {"max_segment_size": MIB}, 8),
        (8 * MIB, CMA, {"max_segment_size": MIB + 1}, 8),
        (8 * MIB, CMA, {"segment_boundary": 4 * MIB}, 3),
        (8 * MIB, CMA, {"segment_boundary": 1 << 32}, 2),
        (PAGE_SIZE, CMA, {"segment_boundary": PAGE_SIZE}, 1),
        # The kernel cuts whole pages: 15 of them are less than 65535 bytes.
        (16 * PAGE_SIZE, CMA, {"max_segment_size": 65535}, 2),
        (8 * MIB, HUGE, {"max_segment_size": 3 * MIB}, 4),
        (PAGE_SIZE, PAGES, {"max_segment_size": 512}, PAGE_SIZE // 512),
        (PAGE_SIZE, PAGES, {"max_segment_size": 1000}, PAGE_SIZE // 512),
        (PAGE_SIZE, PAGES, {"segment_boundary": 1024, "max_segment_size": 1000}, 2 * PAGE_SIZE // 1024),
        (PAGE_SIZE, PAGES, {"max_segment_size": 1}, PAGE_SIZE),
        # As far as numbers go.
        (1 << 62, PAGES, {"max_segment_size": (1 << 64) - 1, "segment_boundary": 1 << 63}, (1 << 62) // PAGE_SIZE),
        (1 << 62, CMA, {"max_segment_size": (1 << 64) - 1, "segment_boundary": 1 << 63}, 2),
    ],
)
def test_known_counts(size: int, capabilities: Capabilities, constraints: dict[str, Any], count: int) -> None:
    assert segments(size, capabilities, wanted(**constraints)) == count


# ---- reasons --------------------------------------------------------------------------------------------------------


def test_what_demands_nothing_suits_all() -> None:
    for capabilities in (PAGES, HUGE, CMA):
        assert judge(capabilities, request()) == ()
    assert judge(MEMFD, request(kind="memfd"), "memfd") == ()


def test_another_kind() -> None:
    (refusal,) = judge(MEMFD, request(), "memfd")
    assert (refusal.field, refusal.device) == ("kind", "spec")
    assert "memfd" in refusal.reason
    assert "dma-buf" in refusal.reason
    assert isinstance(refusal.error, NoAllocator)


def test_another_allocator() -> None:
    (refusal,) = judge(HUGE, request(allocator="udmabuf"), "udmabuf-2M")
    assert (refusal.field, refusal.device) == ("allocator", "spec")
    assert judge(PAGES, request(allocator="udmabuf")) == ()


def test_the_opaque_set() -> None:
    asked = request(8 * MIB, Demand("vgem", wanted(allocators=["heap:*", "memfd"])))
    (refusal,) = judge(PAGES, asked)
    assert (refusal.field, refusal.device, refusal.reason) == ("allocators", "vgem", "vgem accepts only heap:*, memfd")
    assert judge(PAGES, asked, "heap:system") == ()


def test_contiguous() -> None:
    asked = request(8 * MIB, Demand("/dev/video1", wanted(contiguous=True)))
    (refusal,) = judge(PAGES, asked)
    assert (refusal.field, refusal.device) == ("contiguous", "/dev/video1")
    assert refusal.reason == "8388608 bytes of its memory may be 2048 segments, and /dev/video1 takes one segment"
    assert refusal.remedy == (
        "detach /dev/video1, or provide a dma-heap of contiguous memory or huge pages of 1 GiB for udmabuf-1G"
    )
    assert str(refusal.error) == f"contiguous: udmabuf does not suit: {refusal.reason}"
    assert judge(CMA, asked) == ()
    assert judge(PAGES, request(PAGE_SIZE, Demand("/dev/video1", wanted(contiguous=True)))) == ()


@pytest.mark.parametrize(
    ("pages", "limit", "suits"), [(1, 1, True), (2, 1, False), (2, 2, True), (3, 2, False), (2048, 2047, False)]
)
def test_the_last_segment_that_is_taken(pages: int, limit: int, suits: bool) -> None:
    asked = request(pages * PAGE_SIZE, Demand("gpu", wanted(max_segments=limit)))
    assert fields(judge(PAGES, asked)) == ([] if suits else ["contiguous" if limit == 1 else "max_segments"])


@pytest.mark.parametrize(
    ("size", "constraints", "helps"),
    [
        (2 * MIB, {"contiguous": True}, "udmabuf-2M"),
        (4 * MIB, {"max_segments": 2}, "udmabuf-2M"),
        (4 * MIB, {"contiguous": True}, "udmabuf-1G"),
        (1 << 30, {"contiguous": True}, "udmabuf-1G"),
        (4 * MIB, {"alignment": 1 << 21}, "udmabuf-2M"),
        (4 * MIB, {"alignment": 1 << 22}, "udmabuf-1G"),
    ],
)
def test_the_remedy_helps(size: int, constraints: dict[str, Any], helps: str) -> None:
    asked = request(size, Demand("gpu", wanted(**constraints)))
    (refusal,) = judge(PAGES, asked)
    assert helps in refusal.remedy.partition(" or provide ")[2]
    granule = {"udmabuf-2M": 1 << 21, "udmabuf-1G": 1 << 30}[helps]
    assert judge(Capabilities(Kind.DMA_BUF, granule=granule, size_step=granule), asked, helps) == ()


def test_no_remedy_is_made_up() -> None:
    (refusal,) = judge(PAGES, request(constraints={"max_segment_size": PAGE_SIZE, "contiguous": True}))
    assert refusal.remedy == "leave contiguous out of spec.constraints"
    (refusal,) = judge(PAGES, request(constraints={"alignment": 3}))
    assert refusal.remedy == "leave alignment out of spec.constraints"


def test_cuts_are_named_with_whose_they_are() -> None:
    asked = request(
        8 * MIB,
        Demand("gpu", wanted(max_segments=4)),
        Demand("camera", wanted(max_segment_size=MIB)),
        Demand("codec", wanted(segment_boundary=1 << 32)),
    )
    (refusal,) = judge(CMA, asked)
    assert (refusal.field, refusal.device) == ("max_segments", "gpu")
    assert "9 segments" in refusal.reason
    assert "1048576 of camera (max_segment_size)" in refusal.reason
    assert "takes 4" in refusal.reason
    assert "codec" not in refusal.reason, "what cuts nothing"


def test_those_that_demand_together_are_told_apart() -> None:
    asked = request(8 * MIB, Demand("gpu", wanted(alignment=3 << 12)), constraints={"alignment": 5 << 12})
    (refusal,) = judge(PAGES, asked)
    assert (refusal.field, refusal.device) == ("alignment", "spec and gpu")
    assert refusal.remedy == "leave alignment out of spec.constraints or detach gpu"


@pytest.mark.parametrize("field", ["max_segment_size", "segment_boundary"])
def test_a_cut_short_of_the_alignment(field: str) -> None:
    def asked(size: int) -> Request:
        return request(size, Demand("gpu", wanted(alignment=1 << 16)), Demand("camera", wanted(**{field: PAGE_SIZE})))

    heap = Capabilities(Kind.DMA_BUF, granule=1 << 16)
    (refusal,) = judge(heap, asked(2 * PAGE_SIZE))
    assert (refusal.field, refusal.device) == (field, "camera")
    assert "65536" in refusal.reason
    assert "gpu" in refusal.reason
    # One page is never cut.
    assert judge(heap, asked(PAGE_SIZE)) == ()


@pytest.mark.parametrize(
    ("own", "highest", "bits", "suits"),
    [
        (None, 35, 36, True),
        (None, 35, 35, True),
        (None, 35, 34, False),
        (None, None, 63, False),
        (32, 35, 32, True),
        (32, 35, 31, False),
        (32, 31, 31, True),
        (36, None, 35, False),
        (36, None, 36, True),
    ],
)
def test_address_bits(own: int | None, highest: int | None, bits: int, suits: bool) -> None:
    capabilities = Capabilities(Kind.DMA_BUF, address_bits=own)
    found = judge(capabilities, request(PAGE_SIZE, Demand("nic", wanted(address_bits=bits))), highest=lambda: highest)
    assert fields(found) == ([] if suits else ["address_bits"])
    for refusal in found:
        assert f"nic reaches {bits}" in refusal.reason
        assert refusal.device == "nic"
        figures = [figure for figure in (own, highest) if figure is not None]
        assert f"up to {min(figures)} bits" in refusal.reason if figures else "cannot be found out" in refusal.reason


def test_the_machine_is_not_asked_where_that_decides_nothing() -> None:
    assert judge(PAGES, request(PAGE_SIZE, constraints={"address_bits": 64})) == ()
    below = Capabilities(Kind.DMA_BUF, address_bits=32)
    assert judge(below, request(PAGE_SIZE, constraints={"address_bits": 32})) == ()


def test_accepted_caches() -> None:
    asked = request(8 * MIB, Demand("gpu", wanted(cache=["uncached", "write-combine"])))
    (refusal,) = judge(PAGES, asked)
    assert (refusal.field, refusal.device) == ("cache", "gpu")
    assert refusal.reason == "its memory is mapped cached, and gpu accepts only uncached, write-combine"
    assert isinstance(refusal.error, NoAllocator)
    assert judge(Capabilities(Kind.DMA_BUF, cache=Cache.UNCACHED), asked) == ()


@pytest.mark.parametrize("cache", list(Cache))
@pytest.mark.parametrize("policy", list(CachePolicy))
def test_a_required_cache(cache: Cache, policy: CachePolicy) -> None:
    found = judge(PAGES, request(cache=str(cache), cache_policy=str(policy)))
    if cache is Cache.CACHED or policy is CachePolicy.PREFER:
        assert found == ()
    else:
        (refusal,) = found
        assert (refusal.field, refusal.device) == ("cache", "spec")
        assert isinstance(refusal.error, CacheUnavailable)
        assert f"mapped cached, and spec requires {cache}" in refusal.reason


def test_the_order_of_reasons() -> None:
    asked = request(
        8 * MIB,
        Demand("a", wanted(alignment=1 << 20, address_bits=32, allocators=["heap:*"])),
        Demand("b", wanted(max_segments=2, max_segment_size=1 << 16, segment_boundary=1 << 17)),
        Demand("c", wanted(cache=["write-combine"])),
        allocator="heap:system",
        cache="uncached",
        cache_policy="require",
    )
    contiguous = request(
        8 * MIB,
        Demand("a", wanted(alignment=1 << 20, address_bits=32, allocators=["heap:*"])),
        Demand("b", wanted(contiguous=True, max_segment_size=1 << 16, segment_boundary=1 << 17)),
        Demand("c", wanted(cache=["write-combine"])),
        allocator="heap:system",
    )
    heap = Capabilities(Kind.MEMFD, granule=1 << 18)
    found = judge(heap, asked, "memfd", lambda: 40)
    assert fields(found) == [
        "kind",
        "allocator",
        "allocators",
        "address_bits",
        "alignment",
        "max_segments",
        "max_segment_size",
        "segment_boundary",
        "cache",
        "cache",
    ]
    assert [refusal.device for refusal in found[-2:]] == ["c", "spec"]
    assert fields(judge(heap, contiguous, "memfd", lambda: 40))[5:] == [
        "max_segment_size",
        "segment_boundary",
        "contiguous",
        "cache",
    ]


# ---- properties -----------------------------------------------------------------------------------------------------


def capabilities() -> st.SearchStrategy[Capabilities]:
    return st.builds(
        Capabilities,
        st.just(Kind.DMA_BUF),
        granule=st.sampled_from((PAGE_SIZE, 1 << 16, 1 << 21, 1 << 30)),
        contiguous=st.booleans(),
        address_bits=st.none() | st.integers(12, 64),
        size_step=st.sampled_from((PAGE_SIZE, 1 << 21)),
        cache=st.sampled_from(Cache),
        caches=st.frozensets(st.sampled_from(Cache)),
    )


def modest() -> st.SearchStrategy[Constraints]:
    """Constraints that an allocator may well meet; those of sizes and layouts are not judged here."""
    return any_constraints().map(
        lambda one: Constraints(
            address_bits=one.address_bits,
            alignment=one.alignment & -one.alignment & ((1 << 31) - 1) or 1,
            max_segments=one.max_segments,
            max_segment_size=one.max_segment_size,
            segment_boundary=one.segment_boundary,
            cache=one.cache,
            allocators=one.allocators,
        )
    )


NAMES = ("udmabuf", "heap:system", "dumb:card0")

PLAIN: dict[str, tuple[Any, ...]] = {
    "address_bits": (32, 36, 40),
    "alignment": (4096, 1 << 16, 1 << 21, 3 << 12),
    "max_segments": (1, 4, 4096),
    "max_segment_size": (4096, 1 << 16, 1 << 20),
    "segment_boundary": (1 << 16, 1 << 20, 1 << 32),
    "cache": (["cached"], ["uncached"], ["cached", "write-combine"]),
    "allocators": (["udmabuf"], ["heap:*"], ["heap:*", "udmabuf"], ["heap:system", "dumb:*"]),
}
"""Values that some allocators meet and others do not."""


def plain(key: str) -> st.SearchStrategy[Constraints]:
    return st.sampled_from(PLAIN[key]).map(lambda value: Constraints.from_values({key: value}))


def plain_parts() -> st.SearchStrategy[list[Constraints]]:
    """The demands of some devices, on one and the same key, or on any."""
    alike = st.sampled_from(tuple(PLAIN)).flatmap(lambda key: st.lists(plain(key), min_size=2, max_size=3))
    return alike | st.lists(st.sampled_from(tuple(PLAIN)).flatmap(plain), min_size=1, max_size=3)


@given(
    capabilities(),
    st.sampled_from(NAMES),
    plain_parts() | st.lists(modest(), min_size=1, max_size=4),
    st.integers(1, 1 << 32),
    st.none() | st.integers(30, 52),
)
def test_what_suits_all_together_suits_each(
    own: Capabilities, name: str, parts: list[Constraints], size: int, highest: int | None
) -> None:
    demands = [Demand(f"device{i}", part) for i, part in enumerate(parts)]
    try:
        whole = request(size, *demands)
    except IncompatibleConstraints:
        return
    found = judge(own, whole, name, lambda: highest)
    if not found:
        for demand in demands:
            assert judge(own, request(size, demand), name, lambda: highest) == ()
    for refusal in found:
        assert refusal.field in CONSTRAINT_KEYS
        assert refusal.reason
        assert refusal.remedy
        # Those named are indeed in the way: without them, this reason or its figures are others.
        named = refusal.device.split(" and ")
        assert named
        assert set(named) <= {demand.device for demand in demands}
        assert (
            merge([demand for demand in demands if demand.device in named]).constraints.values()[refusal.field]
            == (whole.merged.constraints.values()[refusal.field])
        )


@given(capabilities(), modest(), modest(), st.integers(1, 1 << 32))
def test_more_demands_make_no_fewer_segments(
    own: Capabilities, one: Constraints, other: Constraints, size: int
) -> None:
    try:
        both = merge([Demand("a", one), Demand("b", other)]).constraints
    except IncompatibleConstraints:
        return
    # What begins unaligned is refused, whatever its number of segments.
    limits = (own.granule, both.max_segment_size, both.segment_boundary)
    assume(all(limit is None or limit >= both.alignment for limit in limits))
    assert segments(size, own, both) >= max(segments(size, own, one), segments(size, own, other))


@given(capabilities(), modest(), st.integers(1, 1 << 32))
def test_larger_buffers_make_no_fewer_segments(own: Capabilities, one: Constraints, size: int) -> None:
    assert segments(size + PAGE_SIZE, own, one) >= segments(size, own, one) >= 1
