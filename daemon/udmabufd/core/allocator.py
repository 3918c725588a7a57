# SPDX-License-Identifier: MIT
"""What an allocator is: a name, a kind, a largest size, a verdict on a request, and the allocation itself.

One file per allocator beside this one, one line for it in app.py. Order and choice are the pool's.
"""

from __future__ import annotations

from typing import Protocol

from udmabufd.core.errors import AllocatorError, CacheUnavailable
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd_client.contract import Cache, CachePolicy, Kind


class Populate(Protocol):
    """Fills `size` bytes of a new memfd with zeroed pages: linux.memfd.populate in this process, which the kernel may
    kill for it where memory is short, or linux.fill.populate_in_child in one that it takes instead. Raises OSError.
    """

    def __call__(self, fd: int, size: int) -> None: ...


class Allocator(Protocol):
    """A source of memory. match() must not block and may be called from any thread; allocate() blocks."""

    @property
    def name(self) -> str:
        """One of the allocator names of the contract."""

    @property
    def kind(self) -> Kind:
        """What it hands out."""

    @property
    def unavailable(self) -> AllocatorError | None:
        """Why it can serve nothing at present, or None."""

    @property
    def max_size(self) -> int:
        """Bytes of the largest buffer it gives at present; 0 while unavailable."""

    def match(self, request: Request) -> AllocatorError | None:
        """Return why it cannot serve `request`, or None if it can."""

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make the memory, named `name`, owned by the caller; `populate` fills it, if it is to be filled. Raises
        OSError, AllocatorError; nothing is left behind then.
        """


def refuse_other_caches(request: Request) -> AllocatorError | None:
    """Return the refusal of an allocator whose mappings are cached, if `request` requires anything else."""
    if request.cache_policy is CachePolicy.REQUIRE and request.cache is not Cache.CACHED:
        return CacheUnavailable(f"cache: {request.cache} is required, and the enabled allocators map memory cached")
    return None
