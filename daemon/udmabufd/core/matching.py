# SPDX-License-Identifier: MIT
"""Whether what an allocator gives suits a request, and if not, why: one judgement for all allocators.

From their capabilities alone, for the worst memory that these allow: what this admits suits wherever the pages turn
out to lie. Sizes, strides and padding are the request's own matter, limits of a driver its allocator's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from udmabufd.core.allocator import Capabilities, Refusal
from udmabufd.core.constraints import Constraints, accepts
from udmabufd.core.errors import CacheUnavailable, NoAllocator
from udmabufd.core.spec import PAGE_SIZE, SPEC, Request
from udmabufd_client.contract import UDMABUF_1G, UDMABUF_2M, Cache, CachePolicy

_Found = Iterator[tuple[str, str, str, str]]
"""Field, device, reason and remedy of refusals."""

_OTHERS: Final[tuple[tuple[str, int, bool], ...]] = (
    (f"huge pages for {UDMABUF_2M} (vm.nr_hugepages)", 2 << 20, False),
    ("a dma-heap of contiguous memory", PAGE_SIZE, True),
    (f"huge pages of 1 GiB for {UDMABUF_1G}", 1 << 30, False),
)
"""What may help where memory is in too small pieces: its name, granule, and whether it is contiguous."""


def refusals(
    allocator: str, capabilities: Capabilities, request: Request, highest_address_bits: Callable[[], int | None]
) -> tuple[Refusal, ...]:
    """Return why `allocator` does not suit `request`, what decides first; nothing if it does.

    First what is said of kinds and allocators, then the constraints in the contract's order, then the cache attribute
    that spec requires. `highest_address_bits` tells how many bits the machine's physical addresses have, None where
    that is not known; it is asked only where that decides.
    """
    found = [
        Refusal(field, device, reason, remedy, NoAllocator(f"{field}: {allocator} does not suit: {reason}"))
        for judged in (
            _named(allocator, capabilities, request),
            _address_bits(capabilities, request, highest_address_bits),
            _alignment(capabilities, request),
            _segments(capabilities, request),
        )
        for field, device, reason, remedy in judged
    ]
    return (*found, *cache_refusals(allocator, capabilities, request))


def cache_refusals(allocator: str, capabilities: Capabilities, request: Request) -> tuple[Refusal, ...]:
    """Return those of refusals() that are about the cache attribute."""
    found = [
        Refusal(field, device, reason, remedy, NoAllocator(f"{field}: {allocator} does not suit: {reason}"))
        for field, device, reason, remedy in _cache(capabilities, request)
    ]
    if request.cache_policy is CachePolicy.REQUIRE and effective_cache(capabilities, request) is not request.cache:
        reason = f"{_caches(capabilities)}, and spec requires {request.cache}"
        error = CacheUnavailable(f"cache: {allocator} does not suit: {reason}")
        found.append(Refusal("cache", SPEC, reason, "ask with cache_policy prefer", error))
    return tuple(found)


def decisive(unsuitable: tuple[Refusal, ...], unavailable: Refusal | None) -> tuple[Refusal, ...]:
    """Return `unsuitable`, or `unavailable` where nothing but the cache attribute does not suit: of what is not there
    it is not known.
    """
    if unavailable is not None and all(refusal.field == "cache" for refusal in unsuitable):
        return (unavailable,)
    return unsuitable


def effective_cache(capabilities: Capabilities, request: Request) -> Cache | None:
    """Return the cache attribute that memory for `request` would have: the one that is asked for, else the allocator's
    usual one, else any that the constraints accept; None if they accept none of those that can be had, or where it is
    not known.
    """
    accepted = request.merged.constraints.cache
    usual: tuple[Cache, ...] = () if capabilities.cache is None else (capabilities.cache,)
    for cache in (request.cache, *usual, *sorted(capabilities.caches)):
        if cache in capabilities.obtainable and (accepted is None or cache in accepted):
            return cache
    return None


def segments(size: int, capabilities: Capabilities, constraints: Constraints) -> int:
    """Return how many segments a buffer of `size` bytes comes to at worst: physically adjacent runs of memory, cut
    at max_segment_size and segment_boundary, but nowhere else than where a segment may begin.

    The least number that does for the worst place of such memory, if max_segment_size is a multiple of the alignment
    and of a page, or of the granule of contiguous memory; otherwise it may be more than that.
    """
    size = _real_size(size, capabilities)
    boundary = constraints.segment_boundary
    longest = _longest(constraints, capabilities, boundary or size)
    granule = capabilities.granule
    if not capabilities.contiguous:
        # At worst no two pieces are adjacent; each begins at a multiple of the granule, and of a smaller boundary.
        whole, rest = divmod(size, granule)
        return whole * _from_boundary(granule, longest, boundary) + _from_boundary(rest, longest, boundary)
    if boundary is None:
        return _ceil(size, longest)
    # The run begins at any multiple of the granule, so that a larger boundary cuts off a part at each end: together as
    # long as what exceeds whole blocks, or one block more.
    blocks, rest = divmod(size, boundary)
    counts = [blocks * _ceil(boundary, longest) + _two_parts(rest, longest, granule)]
    if blocks:
        counts.append((blocks - 1) * _ceil(boundary, longest) + _two_parts(rest + boundary, longest, granule))
    return max(counts)


def _real_size(size: int, capabilities: Capabilities) -> int:
    return _ceil(size, capabilities.size_step) * capabilities.size_step


def _ceil(size: int, part: int) -> int:
    return -(-size // part)


def _longest(constraints: Constraints, capabilities: Capabilities, otherwise: int) -> int:
    """Return the bytes of the longest segment that another can follow, `otherwise` if there is no such limit.

    The next must begin aligned. Whole pages, as the kernel cuts (sg_alloc_table_from_pages_segment,
    lib/scatterlist.c), of one run whole granules; less than that is a power of two.
    """
    size = constraints.max_segment_size
    if size is None:
        return otherwise
    step = math.lcm(constraints.alignment, capabilities.granule if capabilities.contiguous else PAGE_SIZE)
    longest = size - size % step if size >= step else 1 << (size.bit_length() - 1)
    return min(longest, otherwise)


def _from_boundary(size: int, longest: int, boundary: int | None) -> int:
    """Return the segments of a run that begins at a multiple of `boundary`, or crosses none."""
    if boundary is None:
        return _ceil(size, longest)
    blocks, rest = divmod(size, boundary)
    return blocks * _ceil(boundary, longest) + _ceil(rest, longest)


def _two_parts(size: int, longest: int, granule: int) -> int:
    """Return the segments of two parts, together of `size` bytes, the first of whole granules.

    At most one more than of one part: not if the first is a whole number of the longest segments, nor if what the
    last segment of one part would leave free holds the least that the first can end with.
    """
    more = size > granule and longest > granule and not 0 < size % longest <= granule
    return _ceil(size, longest) + more


def _named(allocator: str, capabilities: Capabilities, request: Request) -> _Found:
    if capabilities.kind is not request.kind:
        reason = f"it hands out kind {capabilities.kind}, and spec asks for {request.kind}"
        yield "kind", SPEC, reason, f"ask for kind {capabilities.kind}"
    if request.allocator not in (None, allocator):
        yield "allocator", SPEC, f"spec asks for {request.allocator} alone", "leave allocator out of spec"
    accepted = request.merged.constraints.allocators
    if accepted is not None and not accepts(accepted, allocator):
        device = request.merged.by["allocators"]
        reason = f"{device} accepts only {', '.join(sorted(accepted))}"
        yield "allocators", device, reason, _without(device, "allocators")


def _address_bits(
    capabilities: Capabilities, request: Request, highest_address_bits: Callable[[], int | None]
) -> _Found:
    wanted, own = request.merged.constraints.address_bits, capabilities.address_bits
    if wanted is None or wanted == 64 or (own is not None and own <= wanted):
        return
    highest = highest_address_bits()
    if highest is not None and highest <= wanted:
        return
    device = request.merged.by["address_bits"]
    known = [bits for bits in (own, highest) if bits is not None]
    if known:
        reason = f"its memory has physical addresses of up to {min(known)} bits, and {device} reaches {wanted}"
    else:
        reason = f"how high its physical addresses reach cannot be found out, and {device} reaches {wanted} bits"
    yield "address_bits", device, reason, f"{_without(device, 'address_bits')}, or provide a dma-heap of low memory"


def _alignment(capabilities: Capabilities, request: Request) -> _Found:
    constraints = request.merged.constraints
    if capabilities.granule % constraints.alignment:
        device = request.merged.by["alignment"]
        reason = (
            f"its memory begins at multiples of {capabilities.granule} bytes, and {device} needs multiples of "
            f"{constraints.alignment}"
        )
        yield "alignment", device, reason, _remedy(capabilities, request, "alignment")


def _segments(capabilities: Capabilities, request: Request) -> _Found:
    constraints, by = request.merged.constraints, request.merged.by
    count = segments(request.size, capabilities, constraints)
    too_many = constraints.max_segments is not None and count > constraints.max_segments
    if too_many and not constraints.contiguous:
        yield _too_many("max_segments", count, capabilities, request)
    # A segment that is cut short of the alignment leaves the next one to begin unaligned.
    size = _real_size(request.size, capabilities)
    piece = size if capabilities.contiguous else min(size, capabilities.granule)
    for field, limit in (
        ("max_segment_size", constraints.max_segment_size),
        ("segment_boundary", constraints.segment_boundary),
    ):
        if limit is not None and limit < piece and limit < constraints.alignment:
            reason = (
                f"its memory of {piece} bytes in one piece, cut at the {limit} of {by[field]}, does not begin at "
                f"multiples of the {constraints.alignment} bytes that {by['alignment']} needs"
            )
            yield field, by[field], reason, _without(by[field], field)
    if too_many and constraints.contiguous:
        yield _too_many("contiguous", count, capabilities, request)


def _too_many(field: str, count: int, capabilities: Capabilities, request: Request) -> tuple[str, str, str, str]:
    constraints, by = request.merged.constraints, request.merged.by
    size = _real_size(request.size, capabilities)
    cuts = "".join(
        f", cut at the {limit} of {by[key]} ({key})"
        for key, limit in (
            ("max_segment_size", constraints.max_segment_size),
            ("segment_boundary", constraints.segment_boundary),
        )
        if limit is not None and limit < size
    )
    takes = "one segment" if constraints.contiguous else f"{constraints.max_segments} segments"
    reason = f"{size} bytes of its memory may be {count} segments{cuts}, and {by[field]} takes {takes}"
    return field, by[field], reason, _remedy(capabilities, request, field)


def _cache(capabilities: Capabilities, request: Request) -> _Found:
    accepted = request.merged.constraints.cache
    if accepted is not None and effective_cache(capabilities, request) is None:
        device = request.merged.by["cache"]
        reason = f"{_caches(capabilities)}, and {device} accepts only {', '.join(sorted(accepted))}"
        yield "cache", device, reason, _without(device, "cache")


def _caches(capabilities: Capabilities) -> str:
    if not capabilities.obtainable:
        return "how its memory is mapped is not known"
    return f"its memory is mapped {' or '.join(sorted(capabilities.obtainable))}"


def _without(device: str, field: str) -> str:
    """Return what to do for the demand of `device` to go."""
    return " or ".join(
        f"leave {field} out of spec.constraints" if name == SPEC else f"detach {name}"
        for name in device.split(" and ")
    )


def _remedy(capabilities: Capabilities, request: Request, field: str) -> str:
    """Return what to do against memory in too small pieces."""
    constraints = request.merged.constraints
    helping = []
    for name, granule, contiguous in _OTHERS:
        other = replace(capabilities, granule=granule, contiguous=contiguous, size_step=granule)
        count = segments(request.size, other, constraints)
        if granule % constraints.alignment == 0 and count <= (constraints.max_segments or count):
            helping.append(name)
    enable = f", or provide {' or '.join(helping[:2])}" if helping else ""
    return _without(request.merged.by[field], field) + enable
