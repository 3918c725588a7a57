# SPDX-License-Identifier: MIT
"""Which allocator serves a request: the first in order that matches and does not run out."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from contextlib import ExitStack

from udmabufd.core.allocator import Allocator, Populate
from udmabufd.core.errors import AllocatorError, KernelLimit, NoAllocator, UdmabufUnavailable, from_oserror
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd_client.contract import Kind

log = logging.getLogger(__name__)

_EXHAUSTED = {errno.ENOMEM, errno.ENOSPC}
"""This allocator has run out; another may serve."""


class Pool:
    """The enabled allocators in order of preference."""

    def __init__(self, allocators: Sequence[Allocator]) -> None:
        self._allocators = tuple(allocators)

    @property
    def names(self) -> list[str]:
        """Names of those that can serve now, in order."""
        return [allocator.name for allocator in self._allocators if allocator.unavailable is None]

    @property
    def max_size(self) -> int:
        """Bytes of the largest dma-buf that can be had now; of the largest memfd while no dma-buf can."""
        for kind in (Kind.DMA_BUF, Kind.MEMFD):
            if size := max((a.max_size for a in self._allocators if a.kind is kind), default=0):
                return size
        return 0

    def select(self, request: Request) -> list[Allocator]:
        """Return the allocators that can serve `request`, best first. Raises why none can."""
        candidates = [
            allocator
            for allocator in self._allocators
            if allocator.kind is request.kind and request.allocator in (None, allocator.name)
        ]
        if not candidates:
            enabled = ", ".join(allocator.name for allocator in self._allocators)
            raise NoAllocator(f"allocator: {request.allocator!r} is not among the enabled allocators {enabled}")
        verdicts = [(allocator, allocator.match(request)) for allocator in candidates]
        if matching := [allocator for allocator, refusal in verdicts if refusal is None]:
            return matching
        raise _sum_up([refusal for _, refusal in verdicts if refusal is not None])

    def allocate_all(self, request: Request, names: Sequence[str], populate: Populate) -> list[Memory]:
        """Make memory for each of `names`, all of them or none; otherwise as allocate()."""
        with ExitStack() as undo:
            memories = []
            for name in names:
                memory = self.allocate(request, name, populate)
                undo.callback(memory.close)
                memories.append(memory)
            undo.pop_all()
        return memories

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make memory for `request` with the first allocator that has some, filled by `populate` where it is to be
        filled. Blocks: for worker threads.

        Raises the typed error of the last one tried; nothing is left behind then.
        """
        failure: AllocatorError | None = None
        for allocator in self.select(request):
            try:
                return allocator.allocate(request, name, populate)
            except UdmabufUnavailable as error:
                # The device went away since it was selected.
                failure = error
            except OSError as error:
                log.warning("Allocator %s: %d bytes: %s", allocator.name, request.size, error)
                failure = from_oserror(error, f"making a buffer of {request.size} bytes")
                if error.errno not in _EXHAUSTED:
                    break
        assert failure is not None
        raise failure


def _sum_up(refusals: list[AllocatorError]) -> AllocatorError:
    """Return the one error for what every candidate refused."""
    if len(refusals) == 1 or all(isinstance(refusal, KernelLimit) for refusal in refusals):
        return refusals[0]
    return NoAllocator("No enabled allocator matches: " + "; ".join(map(str, refusals)))
