# SPDX-License-Identifier: MIT
"""What an allocator is: its capabilities as data, whether it can serve at present, a verdict on a request, and the
allocation itself.

One file per allocator beside this one, one line for it in udmabufd/allocators.py. What the capabilities mean for a
request is judged in matching.py, alike for all; order and choice are the pool's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from udmabufd.core.errors import AllocatorError
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd_client.contract import Cache, CacheEvidence, Kind


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What all memory of an allocator is like.

    `granule` (bytes, a power of two) is the size of the physically contiguous and naturally aligned pieces that it
    consists of; `contiguous` that a whole buffer is one run, aligned to the granule; `address_bits` how many bits its
    physical addresses have at most, None for those of the machine's memory. Sizes are multiples of `size_step` bytes.
    `cache` is what CPU mappings are unless another attribute is asked for that is among `caches`; `evidence` how that
    is known; both None where nothing is. `sources` tells, by key of the contract's
    ALLOCATOR_KEYS, where a figure is known from.
    """

    kind: Kind
    granule: int = PAGE_SIZE
    contiguous: bool = False
    address_bits: int | None = None
    size_step: int = PAGE_SIZE
    cache: Cache | None = Cache.CACHED
    caches: frozenset[Cache] = frozenset()
    evidence: CacheEvidence | None = CacheEvidence.DEFAULT
    accounting: Accounting = Accounting.SERVICE
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def obtainable(self) -> frozenset[Cache]:
        """Every cache attribute that can be had."""
        return self.caches if self.cache is None else self.caches | {self.cache}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an allocator does not suit: the key of `constraints` or `spec` that decides, whose demand it is (a device,
    or "spec"; "" for nobody's), what does not suit, with the figures, and what would help ("" if nothing would).

    `error` is what a call is refused with if no other allocator suits.
    """

    field: str
    device: str
    reason: str
    remedy: str
    error: AllocatorError


class Populate(Protocol):
    """Fills `size` bytes of a new memfd with zeroed pages: linux.memfd.populate in this process, which the kernel may
    kill for it where memory is short, or linux.fill.populate_in_child in one that it takes instead. Raises OSError.
    """

    def __call__(self, fd: int, size: int) -> None: ...


class Allocator(Protocol):
    """A source of memory. Only allocate() and close() block; all else may be called from any thread."""

    @property
    def name(self) -> str:
        """One of the allocator names of the contract."""

    @property
    def capabilities(self) -> Capabilities:
        """What its memory is like."""

    @property
    def unavailable(self) -> Refusal | None:
        """Why it can serve nothing at present, or None."""

    @property
    def max_size(self) -> int:
        """Bytes of the largest buffer it gives at present; 0 while unavailable."""

    @property
    def free(self) -> int | None:
        """Bytes left in its pool; None where it has none."""

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """Return why it cannot serve `request`, the reason that decides first; nothing if it can. `capabilities` are
        those to judge by, read before; by default those that it has now.

        That a pool is empty shows only when allocating.
        """

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make the memory, of at least request.size bytes rounded up to whole size_steps, named `name`, owned by the
        caller; `populate` fills it, if it is to be filled. Blocks. Raises OSError, AllocatorError; nothing is left
        behind then. ENOMEM and ENOSPC, and OutOfMemory, say that another allocator may have some.
        """

    def close(self) -> None:
        """Close its device; what it has given stays as it is."""
