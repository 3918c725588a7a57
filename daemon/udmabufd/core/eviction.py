# SPDX-License-Identifier: MIT
"""Evictions: an idle buffer is freed from its pins, so that the kernel can swap it out, and comes back when used.

Of a buffer of ordinary pages the dma-buf is given up and the memfd kept: it comes back without a copy. Other memory is
copied to a memfd first. Which ones go when memory is short is relief.py's matter; who else asks, and the moves from
one memory to another, moving.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property, partial

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import Busy, NoSuchBuffer, from_oserror
from udmabufd.core.events import Event, emit
from udmabufd.core.ledger import Charge
from udmabufd.core.maker import Source
from udmabufd.core.memories import MEMORY_PROPERTIES
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.moves import Notice, check_free
from udmabufd.core.relief import Relief, plain
from udmabufd.core.relocation import Relocation, movable, request_of
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import unexported
from udmabufd.core.withdrawing import withdraw
from udmabufd.linux import fill, memfd, residency
from udmabufd_client.contract import UDMABUF

log = logging.getLogger(__name__)


class Eviction(Relocation):
    """See the module."""

    @cached_property
    def _relief(self) -> Relief:
        return Relief(self._registry, partial(self._evict, asking=None))

    async def evict_idle(self, wanted: int) -> int:
        """Free at least `wanted` bytes of idle buffers from their pins, if that can be done; return how many are."""
        return await self._relief.relieve(wanted)

    async def evict(self, holder: Holder, buffer_id: str) -> None:
        """Free a buffer's memory from its pins."""
        async with self._turn(holder, buffer_id) as buffer:
            memory = movable(buffer)
            if not buffer.evicted:
                await self._evict(buffer, memory, holder)

    async def bring_back(self, buffer: Buffer, asking: Holder, wanted: Request | None = None) -> None:
        """Give `buffer`, which is evicted and whose backing lock the caller has, memory that clients can have, and
        that suits what is `wanted`, or what it was asked to be.
        """
        memory = buffer.memory
        assert memory is not None
        request = wanted or request_of(buffer, memory)
        if request.size > memory.size or self._exporter.match(request):
            # The pages themselves cannot be had, or are not enough.
            sources = self._placement.sources(request)([buffer.name])
            if wanted is not None:
                sources = self._within_reason(buffer, asking, sources)
            await self._copy_back(buffer, asking, sources)
        else:
            absent = await self._workers.submit(_absent, memory)
            export = partial(self._export, memory, request, buffer.name)
            source = Source(UDMABUF, memory.size, Accounting.SERVICE, export, absent)
            other = await self._maker.make_beside(buffer, [source], asking)
            try:
                if buffer.ended:
                    raise NoSuchBuffer
                self._registry.bring_back(buffer, other, None)
            finally:
                # Either what was made in vain, or what there was before.
                self._give_up(other)
        log.info("Buffer %s of %d bytes is back", buffer.id, buffer.size)
        self._registry.changed(buffer, MEMORY_PROPERTIES)

    async def _copy_back(self, buffer: Buffer, asking: Holder, sources: Iterable[Source]) -> None:
        """Give `buffer` memory of `sources` with the contents of its memfd, which lingers: an O_PATH descriptor of the
        dma-buf that it was once may pin it.
        """
        with self._registry.room_for_former(buffer, buffer.payer) as bill:
            other = await self._maker.make_beside(buffer, sources, asking)
            try:
                await self._copy(buffer, other)
                if buffer.ended:
                    raise NoSuchBuffer
                self._registry.bring_back(buffer, other, bill)
            finally:
                self._give_up(other)

    async def _evict(self, buffer: Buffer, memory: Memory, asking: Holder | None) -> None:
        check_free(buffer, None)
        self._count(asking, buffer)
        charge = self._maker.charge_evicted(buffer, asking)
        try:
            with self.moves.under_way(buffer):
                await self._let_go(buffer, memory, asking, charge)
        except BaseException:
            if buffer.memory_charge is not charge:
                charge.release()
            raise
        emit(log, Event.BUFFER_EVICTED, buffer=buffer.id, uid=buffer.payer.uid, size=memory.size)
        self._registry.changed(buffer, ("State", "Allocator"))

    async def _let_go(self, buffer: Buffer, memory: Memory, asking: Holder | None, charge: Charge) -> None:
        """Have nothing but a memfd of the service's own have the contents of `buffer`, at the cost of `charge`."""
        if plain(memory):
            async with self.moves.announced(buffer, Notice.EVICT, asking):
                _check_unused(buffer, memory)
                await self._withdraw(buffer, memory, charge)
            return
        source = Source(UDMABUF, memory.size, Accounting.SERVICE, partial(_unexported, buffer.name, memory.size))
        with self._registry.room_for_former(buffer, buffer.payer) as bill:
            other = await self._maker.make_beside(buffer, [source], asking)
            try:
                async with self.moves.announced(buffer, Notice.EVICT, asking):
                    _check_unused(buffer, memory)
                    await self._copy(buffer, other)
                    if buffer.ended:
                        raise NoSuchBuffer
                    self._registry.exchange(buffer, other, bill)
                    self._registry.billing.evicted(buffer, charge)
            finally:
                self._give_up(other)

    async def _withdraw(self, buffer: Buffer, memory: Memory, charge: Charge) -> None:
        """Give up the dma-buf and keep the memfd. Raises Busy if somebody has got hold of it meanwhile."""
        in_use = False

        def commit(kept: Memory, stored_as: str) -> bool:
            nonlocal in_use
            in_use = not buffer.ended and memory.references() != 0
            if in_use or buffer.ended:
                return False
            self._registry.evict(buffer, kept, stored_as)
            # In the same turn: the buffer may end before the rest is closed.
            self._registry.billing.evicted(buffer, charge)
            return True

        try:
            done = await withdraw(self._store, self._workers, memory, buffer.stored_as, buffer.payer.uid, commit)
        except OSError as error:
            raise from_oserror(error, "keeping an evicted buffer's memory") from error
        if not done:
            raise _in_use(memory) if in_use else NoSuchBuffer

    def _export(self, evicted: Memory, request: Request, name: str, near: bool) -> list[Memory]:
        populate = fill.populate_in_child if near else memfd.populate
        try:
            return [self._exporter.export_again(evicted, request, name, populate)]
        except OSError as error:
            raise from_oserror(error, "exporting an evicted buffer") from error


def _check_unused(buffer: Buffer, memory: Memory) -> None:
    if buffer.ended:
        raise NoSuchBuffer
    if memory.references() != 0:
        raise _in_use(memory)


def _in_use(memory: Memory) -> Busy:
    return Busy(f"The buffer is in use: {memory.references()} descriptors, mappings or imports of it are left")


def _absent(memory: Memory) -> int:
    assert memory.memfd is not None
    return residency.missing(memory.memfd.fileno(), memory.size)


def _unexported(name: str, size: int, near: bool) -> list[Memory]:
    try:
        return [unexported(name, size, fill.populate_in_child if near else memfd.populate)]
    except OSError as error:
        raise from_oserror(error, "making memory for an evicted buffer") from error
