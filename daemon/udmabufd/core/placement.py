# SPDX-License-Identifier: MIT
"""Which memory a buffer may have: the demands of its devices, brought together with what the allocators give.

Finds the devices that a caller names, asks the pool, and judges memory that is there already. What becomes of the
answer is the service's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from udmabufd.core.allocator import Allocator, Capabilities
from udmabufd.core.attachments import Wish, check_count
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.constraints import Constraints, Demand, merge
from udmabufd.core.device import Devices
from udmabufd.core.errors import Busy, InvalidSpec, NoAllocator, NoSuchDevice, NotSupported, QuotaExceeded
from udmabufd.core.maker import Source
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.pool import Pool, allocate_all
from udmabufd.core.spec import Request
from udmabufd.linux import fill, memfd
from udmabufd.linux.addresses import highest_address_bits
from udmabufd_client.contract import MAX_ATTACHMENTS, UDMABUF, WRAPPED, Kind

DEVICE_NAME_MAX: Final = 256
"""Characters of a device's name: it goes into a record of a fixed size."""

GROWTH: Final = 1 << 20
"""Bytes beyond twice its size that devices of other users than the one who pays may make a buffer larger."""


class Needed(NamedTuple):
    """Memory that a buffer has to move to, and why what it has does not do: a clause that begins with the key."""

    request: Request
    reason: str


WRAPPED_MEMORY: Final = Capabilities(
    kind=Kind.DMA_BUF,
    accounting=Accounting.CLIENT,
    sources={"granule": "pages of a memfd need not be adjacent"},
)
"""What is known of the memory that a client brings."""


class Placement:
    """See the module."""

    def __init__(self, pool: Pool, devices: Devices) -> None:
        self.pool = pool
        self.devices = devices
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    async def wishes(self, uid: int, spec: Mapping[str, Any], *, repeated: bool = False) -> list[Wish]:
        """Return what spec.devices asks for, looked up for user `uid`; a `repeated` call does without devices that
        are gone by now. Raises InvalidSpec, NoSuchDevice, IncompatibleConstraints.
        """
        names = spec.get("devices", [])
        if names and spec.get("kind") == Kind.MEMFD:
            raise InvalidSpec("devices", f"contradicts kind {Kind.MEMFD}, which no device imports")
        if len(names) > MAX_ATTACHMENTS:
            raise InvalidSpec("devices", f"names {len(names)} devices; a buffer has at most {MAX_ATTACHMENTS}")
        # Each once, however often it is named.
        found: dict[str, Wish] = {}
        for name in dict.fromkeys(names):
            try:
                found[name] = await self.wish(uid, "devices", name)
            except NoSuchDevice:
                if not repeated:
                    raise
        return [found[name] for name in names if name in found]

    async def wish(
        self, uid: int, key: str, name: str, constraints: Mapping[str, Any] | None = None, *, dynamic: bool = False
    ) -> Wish:
        """Return the wish to attach the device `name`, the argument `key`, with `constraints` beside what is known of
        it. Raises InvalidSpec, NoSuchDevice, IncompatibleConstraints.
        """
        asked = Constraints.from_values(constraints or {})
        if len(name) > DEVICE_NAME_MAX:
            raise InvalidSpec(key, f"may have at most {DEVICE_NAME_MAX} characters")
        try:
            async with self.turn(uid):
                device = await self.devices.find(name)
        except InvalidSpec as error:
            raise InvalidSpec(key, str(error).partition(": ")[2]) from error
        both = merge((Demand(name, device.constraints), Demand(f"the options for {name}", asked))).constraints
        # What is recorded must be readable again.
        return Wish(name, device.path, Constraints.from_values(both.values()), dynamic, found=device)

    def turn(self, uid: int) -> asyncio.Lock:
        """Return what a look-up for user `uid` holds: one that has many waits for itself."""
        return self._turns.setdefault(uid, asyncio.Lock())

    def check(self, request: Request) -> None:
        """Raise what forbids that there is memory for `request`."""
        self.pool.select(request)

    def sources(self, request: Request) -> Callable[[Sequence[str]], Iterable[Source]]:
        """Return what tells where memory for `request` may come from, a buffer of each of some names, best first; to
        be called once. Raises why none can.
        """
        suitable = self.pool.select(request)
        return lambda names: (_source(allocator, request, names) for allocator in suitable)

    def check_attach(self, buffer: Buffer, holder: Holder, wishes: Sequence[Wish]) -> Needed | None:
        """Return what memory `buffer` has to move to before `wishes` of `holder` are met, or None
        where they are. Raises IncompatibleConstraints, NoAllocator and the like, Busy, QuotaExceeded or NotSupported
        where they cannot be.
        """
        if buffer.request.kind is Kind.MEMFD:
            raise NotSupported(f"The buffer is of kind {Kind.MEMFD}, which no device imports")
        check_count(buffer, len(wishes))
        demands = [attachment.wish.demand for attachment in buffer.attachments.values()]
        demands += [wish.demand for wish in wishes]
        if buffer.memory is None:
            self.check_grown(buffer, holder, buffer.request.under(demands))
            return None
        request = buffer.request.grown(buffer.memory.size, demands)
        unsuitable = self.unsuitable(buffer.memory, request)
        if unsuitable is None:
            return None
        if key := request.misfit(request.size, request.merged):
            raise Busy(
                f"{key}: the buffer has its memory, which was laid out without {request.merged.by[key]}; attach "
                "before the first GetFd, or make another buffer"
            )
        if not buffer.evicted:
            return Needed(request, unsuitable)
        self.check_grown(buffer, holder, request)
        return None

    def check_grown(self, buffer: Buffer, holder: Holder, request: Request) -> None:
        """Raise what forbids that `buffer` gets memory for `request`, which a device of `holder` demands."""
        if holder.uid != buffer.payer.uid:
            _check_growth(buffer, request)
        self.check(request)

    def check_wrapped(self, request: Request, size: int) -> None:
        """Raise NoAllocator unless `size` bytes that a client brings suit `request`."""
        if request.size != size:
            raise NoAllocator(f"ranges: {size} bytes are given, and what is demanded takes {request.size}")
        udmabuf, memory = self.pool.find(UDMABUF), WRAPPED_MEMORY
        if udmabuf is not None and udmabuf.unavailable is None and udmabuf.capabilities.cache is None:
            memory = replace(memory, cache=None, evidence=None)
        for refusal in refusals(WRAPPED, memory, request, highest_address_bits):
            raise NoAllocator(f"{refusal.field}: {refusal.reason}; memory of the caller's own cannot be chosen")

    def unsuitable(self, memory: Memory, request: Request) -> str | None:
        """Return why `memory` is not as `request` wants it, as a clause that begins with the key, or None."""
        if key := request.misfit(memory.size, request.merged):
            return f"{key}: the buffer has {memory.size} bytes, laid out without {request.merged.by[key]}"
        for refusal in refusals(
            memory.allocator,
            self._capabilities(memory),
            replace(request, size=memory.size),
            highest_address_bits,
        ):
            return (
                f"{refusal.field}: the buffer has its memory, of {memory.allocator}, which does not suit "
                f"{refusal.device}: {refusal.reason}"
            )
        return None

    def _capabilities(self, memory: Memory) -> Capabilities:
        allocator = self.pool.find(memory.allocator)
        # Of an allocator that is gone nothing is known but what it gave.
        capabilities = WRAPPED_MEMORY if allocator is None else allocator.capabilities
        # Whatever can be had of it now, this memory is mapped as it was made.
        return replace(capabilities, cache=memory.cache, caches=frozenset(), evidence=memory.evidence)


def _check_growth(buffer: Buffer, request: Request) -> None:
    """Raise QuotaExceeded if what other users than the one who pays demand makes the buffer much larger."""
    attached = buffer.attachments.values()
    own = buffer.request.under([a.wish.demand for a in attached if a.holder.uid == buffer.payer.uid]).size
    limit = 2 * own + GROWTH
    if request.size > limit:
        raise QuotaExceeded(
            f"size: the attachments of other users than its creator may make this buffer of {own} bytes {limit} bytes "
            f"large, and this one would make it {request.size}"
        )


def not_much_larger(sources: Iterable[Source], size: int) -> Iterator[Source]:
    """Return those of `sources` that make a buffer of `size` bytes not much larger: it is another user who pays.
    Raises QuotaExceeded if there is none.
    """
    limit, found = 2 * size + GROWTH, False
    for source in sources:
        if source.size <= limit:
            found = True
            yield source
    if not found:
        raise QuotaExceeded(
            f"size: users other than its creator may make this buffer of {size} bytes {limit} bytes large at most"
        )


def under(request: Request, wishes: Iterable[Wish]) -> Request:
    """Return `request` for memory that suits the wished devices, too. Raises IncompatibleConstraints, InvalidSpec."""
    return request.under([wish.demand for wish in wishes])


def _source(allocator: Allocator, request: Request, names: Sequence[str]) -> Source:
    capabilities = allocator.capabilities
    step = capabilities.size_step

    def make(close: bool) -> list[Memory]:
        return allocate_all(allocator, request, names, fill.populate_in_child if close else memfd.populate)

    return Source(allocator.name, -(-request.size // step) * step, capabilities.accounting, make)
