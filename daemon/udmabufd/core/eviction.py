# SPDX-License-Identifier: MIT
"""Evictions: an idle buffer is freed from its pins, so that the kernel can swap it out, and comes back when used.

Of a buffer of ordinary pages the dma-buf is given up and the memfd kept: it comes back without a copy. Other memory is
copied to a memfd first. Who asks, and the moves from one memory to another, are moving.py's.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import AllocatorError, Busy, NoSuchBuffer, from_oserror
from udmabufd.core.events import Event, emit
from udmabufd.core.ledger import Charge
from udmabufd.core.maker import Source
from udmabufd.core.memories import MEMORY_PROPERTIES
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.moves import Notice, check_free, held_in_place
from udmabufd.core.relocation import Relocation, movable, request_of
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import unexported
from udmabufd.core.withdrawing import withdraw
from udmabufd.linux import fill, memfd, residency
from udmabufd_client.contract import UDMABUF

log = logging.getLogger(__name__)


PATIENCE = 10.0
"""Seconds for which further buffers are asked to make room."""

ASKED_AT_ONCE = 64
"""Buffers, at least, that are asked at the same time once some have not made room."""

SPARED = 600.0
"""Seconds for which a buffer that could not be evicted is not asked again."""


class Eviction(Relocation):
    """See the module."""

    _relief: asyncio.Future[int] | None = None

    async def evict(self, holder: Holder, buffer_id: str) -> None:
        """Free a buffer's memory from its pins."""
        async with self._turn(holder, buffer_id) as buffer:
            memory = movable(buffer)
            if not buffer.evicted:
                await self._evict(buffer, memory, holder)

    async def bring_back(self, buffer: Buffer, asking: Holder, request: Request | None = None) -> None:
        """Give `buffer`, which is evicted and whose backing lock the caller has, memory that clients can have, and
        that suits `request`, or what it was asked to be.
        """
        memory = buffer.memory
        assert memory is not None
        request = request or request_of(buffer, memory)
        if request.size > memory.size or self._exporter.match(request):
            # The pages themselves cannot be had, or are not enough.
            await self._copy_back(buffer, asking, request)
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

    async def _copy_back(self, buffer: Buffer, asking: Holder, request: Request) -> None:
        """Give `buffer` memory for `request` with the contents of its memfd, which lingers: an O_PATH descriptor of
        the dma-buf that it was once may pin it.
        """
        sources = self._placement.sources(request)([buffer.name])
        with self._registry.room_for_former(buffer, buffer.payer) as bill:
            other = await self._maker.make_beside(buffer, sources, asking)
            try:
                await self._copy(buffer, other)
                if buffer.ended:
                    raise NoSuchBuffer
                self._registry.bring_back(buffer, other, bill)
            finally:
                self._give_up(other)

    async def evict_idle(self, wanted: int) -> int:
        """Evict buffers that nobody needs in place, the least recently used first, until at least `wanted` bytes are
        free from their pins, or until that has taken too long; return how many are. One at a time: whoever comes
        meanwhile waits for the same end.
        """
        if self._relief is None:
            self._relief = asyncio.ensure_future(self._relieve(wanted))
            self._relief.add_done_callback(lambda _: setattr(self, "_relief", None))
        return await asyncio.shield(self._relief)

    async def _relieve(self, wanted: int) -> int:
        now = asyncio.get_running_loop().time
        deadline = now() + PATIENCE
        idle = [b for b in self._registry if not b.backing.locked() and self._idle(b)]
        idle.sort(key=lambda buffer: buffer.used)
        freed, least = 0, 1
        while idle and freed < wanted and now() < deadline:
            # All that may be needed are asked at the same time: each of their importers may let us wait.
            chosen: list[Buffer] = []
            while idle and (len(chosen) < least or sum(buffer.size for buffer in chosen) < wanted - freed):
                chosen.append(idle.pop(0))
            freed += sum(await asyncio.gather(*(self._evict_if_idle(buffer) for buffer in chosen)))
            # Some do not answer: many of those are not to keep the others from being asked.
            least = ASKED_AT_ONCE
        return freed

    async def _evict_if_idle(self, buffer: Buffer) -> int:
        """Evict `buffer` if it is still idle; return the bytes that are free of pins then."""
        # Whoever has the lock may wait for memory, and so for this.
        if buffer.backing.locked() or not self._idle(buffer):
            return 0
        async with buffer.backing:
            memory = movable(buffer)
            try:
                await self._evict(buffer, memory, None)
            except AllocatorError as error:
                buffer.spared = asyncio.get_running_loop().time() + SPARED
                log.info("Buffer %s is not evicted: %s", buffer.id, error)
                return 0
            return memory.size

    def _idle(self, buffer: Buffer) -> bool:
        memory = buffer.memory
        return (
            memory is not None
            and not buffer.ended
            and buffer.spared <= asyncio.get_running_loop().time()
            and _plain(memory)
            and memory.dma_buf is not None
            and held_in_place(buffer) is None
            # Without an importer that could be asked, nobody may have a descriptor.
            and (bool(buffer.attachments) or memory.references() == 0)
        )

    async def _evict(self, buffer: Buffer, memory: Memory, asking: Holder | None) -> None:
        check_free(buffer, None)
        self._count(asking, memory.size)
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
        if _plain(memory):
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


def _plain(memory: Memory) -> bool:
    """Whether it is a memfd of ordinary pages, which can be swapped out once nothing pins them."""
    return memory.allocator == UDMABUF and memory.memfd is not None


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
