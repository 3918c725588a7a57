# SPDX-License-Identifier: MIT
"""Which allocators may serve a request, in which order, and why the others may not.

The one place of that decision: a call that allocates and one that only asks (Explain) are answered by the same lines.
What turns out only when allocating is the maker's matter: it goes on to the next.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from udmabufd.core.allocator import Allocator, Capabilities, Populate, Refusal
from udmabufd.core.errors import (
    AllocatorError,
    CacheUnavailable,
    IncompatibleConstraints,
    KernelLimit,
    NoAllocator,
    OutOfMemory,
    UdmabufUnavailable,
    from_oserror,
)
from udmabufd.core.matching import effective_cache
from udmabufd.core.memory import Memory
from udmabufd.core.spec import SPEC, Request
from udmabufd_client.contract import Cache, CacheEvidence, CachePolicy, Kind

log = logging.getLogger(__name__)

Verdict = tuple[Allocator, tuple[Refusal, ...]]
"""An allocator, and why it does not suit: nothing if it does."""


class Explained(NamedTuple):
    """A verdict, and the cache attribute that the allocator's memory would have, with how that is known; all by the
    same capabilities.
    """

    allocator: Allocator
    refusals: tuple[Refusal, ...]
    cache: Cache | None
    evidence: CacheEvidence | None


_CIRCUMSTANCES = (UdmabufUnavailable, KernelLimit, CacheUnavailable, OutOfMemory)
"""What an allocator refuses with that would suit otherwise."""


class Pool:
    """The enabled allocators in order of preference."""

    def __init__(self, order: Sequence[str], allocators: Iterable[Allocator] = ()) -> None:
        """`order` has names of allocators, or patterns such as `heap:*`; what is not in it is not enabled."""
        self._order = tuple(order)
        self._allocators: list[Allocator] = []
        self.drained: set[str] = set()
        """Names of those that are asked for nothing at present, because buffers are being moved away from them."""
        for allocator in allocators:
            self.add(allocator)

    def add(self, allocator: Allocator) -> bool:
        """Take `allocator`, in place of one of the same name, or close it; return whether it is enabled."""
        self.remove(allocator.name)
        if self._rank(allocator.name) is None:
            allocator.close()
            return False
        # Among those of one pattern the order is that of their names.
        self._allocators = sorted((*self._allocators, allocator), key=lambda a: (self._rank(a.name) or 0, a.name))
        return True

    def remove(self, name: str) -> bool:
        """Close and forget the allocator `name`; return whether there was one."""
        found = self.find(name)
        if found is not None:
            self._allocators.remove(found)
            found.close()
        return found is not None

    def find(self, name: str) -> Allocator | None:
        """Return the allocator `name`, if it is there and enabled."""
        return next((allocator for allocator in self._allocators if allocator.name == name), None)

    def close(self) -> None:
        """Close all of them."""
        for allocator in tuple(self._allocators):
            self.remove(allocator.name)

    @property
    def allocators(self) -> tuple[Allocator, ...]:
        """All of them, in order."""
        return tuple(self._allocators)

    @property
    def names(self) -> list[str]:
        """Names of those that can serve now, in order."""
        return [allocator.name for allocator in self._allocators if allocator.unavailable is None]

    @property
    def max_size(self) -> int:
        """Bytes of the largest dma-buf that can be had now; of the largest memfd while no dma-buf can."""
        for kind in (Kind.DMA_BUF, Kind.MEMFD):
            if size := max((a.max_size for a in self._allocators if a.capabilities.kind is kind), default=0):
                return size
        return 0

    def in_order(self, request: Request) -> list[Allocator]:
        """Return all allocators as they are asked for `request`: those first whose mappings have the cache attribute
        that it asks for, and those that are not there, of which it is not known, where they would be.
        """

        def otherwise(allocator: Allocator) -> bool:
            capabilities = allocator.capabilities
            gone = not capabilities.obtainable and allocator.unavailable is not None
            return not gone and effective_cache(capabilities, request) is not request.cache

        return sorted(self._allocators, key=otherwise)

    def verdicts(self, request: Request) -> list[Explained]:
        """Return what each allocator says to `request`, in the order in which they are asked."""
        verdicts = []
        for allocator in self.in_order(request):
            # Once: a probe may replace what they are of at any time.
            capabilities = allocator.capabilities
            cache = effective_cache(capabilities, request)
            refusals = self._refusals(allocator, request, capabilities)
            verdicts.append(Explained(allocator, refusals, cache, None if cache is None else capabilities.evidence))
        return verdicts

    def explain(self, make_request: Callable[[], Request]) -> list[Explained]:
        """Return verdicts() of the request that `make_request` makes, and the cache attribute that each would give; if
        its demands exclude each other, each allocator refuses for that.
        """
        try:
            request = make_request()
        except IncompatibleConstraints as error:
            _, reason = str(error).split(": ", 1)
            one, other = error.devices
            remedy = f"use separate buffers for {one} and {other}"
            if SPEC in error.devices:
                remedy = f"leave {error.field} out of spec.constraints, or use a smaller picture"
            refusal = Refusal(error.field, error.devices[0], reason, remedy, error)
            return [Explained(allocator, (refusal,), None, None) for allocator in self._allocators]
        return self.verdicts(request)

    def select(self, request: Request) -> Iterator[Allocator]:
        """Return the allocators that can serve `request`, best first. Raises why none can.

        Each is judged when its turn comes: most calls need the first one alone.
        """
        verdicts: list[Verdict] = []
        rest = iter(self.in_order(request))
        for allocator in rest:
            refusals = self._refusals(allocator, request)
            if not refusals:
                return chain((allocator,), (other for other in rest if not self._refusals(other, request)))
            verdicts.append((allocator, refusals))
        raise self._sum_up(request, verdicts)

    def _sum_up(self, request: Request, verdicts: Sequence[Verdict]) -> AllocatorError:
        """Return the one error for what every allocator refused."""
        if request.allocator is not None:
            for allocator, refusals in verdicts:
                if allocator.name == request.allocator:
                    return refusals[0].error
            enabled = ", ".join(allocator.name for allocator in self._allocators)
            return NoAllocator(f"allocator: {request.allocator!r} is not among the enabled allocators {enabled}")
        reasons = [(a.name, refusals[0]) for a, refusals in verdicts if a.capabilities.kind is request.kind]
        circumstances = [refusal.error for _, refusal in reasons if isinstance(refusal.error, _CIRCUMSTANCES)]
        if circumstances and all(type(error) is type(circumstances[0]) for error in circumstances):
            return circumstances[0]
        if not reasons:
            return NoAllocator(f"No allocator of kind {request.kind} is enabled")
        alike: dict[str, list[str]] = {}
        for name, refusal in reasons:
            alike.setdefault(f"{refusal.field or 'unavailable'}: {refusal.reason}", []).append(name)
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in alike.items())
        return NoAllocator(f"No enabled allocator suits. {told}")

    def _refusals(
        self, allocator: Allocator, request: Request, capabilities: Capabilities | None = None
    ) -> tuple[Refusal, ...]:
        if allocator.name not in self.drained:
            return allocator.match(request, capabilities)
        reason = "its buffers are being moved away"
        error = NoAllocator(f"{allocator.name}: {reason}")
        return (Refusal("", "", reason, "try again when udmabufctl drain has ended", error),)

    def _rank(self, name: str) -> int | None:
        """Return the place of `name` in the order, None if it has none."""
        return next((i for i, pattern in enumerate(self._order) if fnmatch.fnmatchcase(name, pattern)), None)


def allocate_all(allocator: Allocator, request: Request, names: Sequence[str], populate: Populate) -> list[Memory]:
    """Have `allocator` make memory for each of `names`, all of them or none, filled by `populate` where it is to be
    filled; all of it mapped alike. Blocks: for worker threads. Raises typed errors; nothing is left behind then.
    """
    # The device may have been replaced in the midst, or not have an attribute for all pages.
    prefers = request.cache_policy is CachePolicy.PREFER
    for attempt in (request, request, replace(request, cache=Cache.CACHED) if prefers else request):
        memories = _allocate_each(allocator, attempt, names, populate)
        if len({(memory.cache, memory.evidence) for memory in memories}) < 2:
            return memories
        for memory in memories:
            memory.close()
    raise CacheUnavailable(f"cache: {allocator.name} maps what it makes now one way and now another; ask again")


def _allocate_each(allocator: Allocator, request: Request, names: Sequence[str], populate: Populate) -> list[Memory]:
    try:
        with ExitStack() as undo:
            memories = []
            for name in names:
                memory = allocator.allocate(request, name, populate)
                undo.callback(memory.close)
                memories.append(memory)
            undo.pop_all()
        return memories
    except OSError as error:
        log.warning("Allocator %s: %d bytes: %s", allocator.name, request.size, error)
        raise from_oserror(error, f"making a buffer of {request.size} bytes") from error
