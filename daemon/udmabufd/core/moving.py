# SPDX-License-Identifier: MIT
"""The use cases of moves: to other memory, out of memory and back, for a holder, an importer or an administrator.

The order is the same in each: nothing holds the buffer in place, new memory is made and charged beside the old, the
importers let go, the contents are copied, the two are exchanged in one step; whatever fails before that is undone, and
nothing has changed. A dma-buf cannot get other memory behind it, so what was before lingers until the last descriptor
and mapping of it is gone.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import AllocatorError, Busy, MoveTimedOut, NoAllocator, NoSuchBuffer, NotSupported
from udmabufd.core.events import Event, emit
from udmabufd.core.eviction import Eviction
from udmabufd.core.ledger import Owner
from udmabufd.core.memories import MEMORY_PROPERTIES
from udmabufd.core.moves import Notice, check_free, held_in_place
from udmabufd.core.placement import Needed
from udmabufd.core.relocation import movable, request_of
from udmabufd.core.spec import Request, check_allocator
from udmabufd_client.contract import Kind

log = logging.getLogger(__name__)

DRAINED_AT_ONCE = 4
"""Buffers that a drain moves at the same time: while the importers of one take their time, others go on."""


class Moving(Eviction):
    """See the module."""

    async def move(self, holder: Holder, buffer_id: str, allocator: str | None) -> int:
        """Move a buffer to `allocator`, or to the first that matches; return its serial."""
        if allocator is not None:
            check_allocator(allocator, Kind.DMA_BUF)
        async with self._turn(holder, buffer_id) as buffer:
            memory = movable(buffer)
            request = request_of(buffer, memory)
            if allocator is not None:
                request = replace(request, allocator=allocator)
            if buffer.evicted:
                await self.bring_back(buffer, holder, request)
            else:
                await self._relocate(buffer, request, holder, holder.owner)
            if allocator is not None and buffer.request.allocator is not None:
                # What was asked for first would have it go back.
                self._registry.ask(buffer, replace(buffer.request, allocator=allocator))
        return buffer.serial

    async def make_room(self, buffer: Buffer, holder: Holder, needed: Needed, *, dynamic: bool) -> None:
        """Move `buffer`, whose backing lock the caller has, to memory that a device of `holder` needs before it can be
        attached, with `dynamic` as an importer that can be told of moves. Raises Busy.
        """
        try:
            movable(buffer)
        except NotSupported as error:
            raise Busy(f"{needed.reason}; {error}") from error
        if reason := held_in_place(buffer, holder if dynamic else None):
            raise Busy(f"{needed.reason}; and it cannot move: {reason}")
        self._placement.check_grown(buffer, holder, needed.request)
        await self._relocate(buffer, needed.request, holder, holder.owner, dynamic=dynamic)

    def ready(self, holder: Holder, buffer_id: str, number: int, serial: int) -> None:
        """Take the answer of an importer of `holder`."""
        buffer = self._registry.held(buffer_id, holder)
        attachment = self._registry.attachments.of(buffer, holder, number)
        self.moves.ready(buffer, attachment, serial)
        self._registry.use(buffer)

    async def drain(self, owner: Owner, allocator: str) -> None:
        """Move all buffers whose memory is of `allocator` to others, and allocate nothing there meanwhile. Raises
        MoveTimedOut when some stay because importers did not answer, and Busy when any does for another reason.
        """
        pool = self._placement.pool
        here = [b for b in self._registry if b.memory is not None and b.memory.allocator == allocator and not b.ended]
        if not here and pool.find(allocator) is None:
            raise NoAllocator(f"allocator: there is no {allocator!r}")
        if allocator in pool.drained:
            raise Busy(f"{allocator} is being drained")
        pool.drained.add(allocator)
        limit = asyncio.Semaphore(DRAINED_AT_ONCE)
        reasons: list[AllocatorError] = []
        count = 0

        async def move(buffer: Buffer) -> None:
            nonlocal count
            async with limit, buffer.backing:
                if buffer.ended or buffer.evicted or buffer.memory is None or buffer.memory.allocator != allocator:
                    return
                try:
                    memory = movable(buffer)
                    await self._relocate(buffer, request_of(buffer, memory), None, owner)
                except NoSuchBuffer:
                    pass
                except AllocatorError as error:
                    reasons.append(error)
                else:
                    count += 1

        try:
            await asyncio.gather(*(move(buffer) for buffer in here if not buffer.evicted))
        finally:
            pool.drained.discard(allocator)
        emit(log, Event.DRAINED, allocator=allocator, count=count, uid=owner.uid)
        if reasons:
            stay, all_ = len(reasons), len(reasons) + count
            late = all(isinstance(reason, MoveTimedOut) for reason in reasons)
            raise (MoveTimedOut if late else Busy)(
                f"{stay} of {all_} buffers stay in {allocator}; the first because: {reasons[0]}"
            )

    async def _relocate(
        self, buffer: Buffer, request: Request, asking: Holder | None, causer: Owner, *, dynamic: bool = False
    ) -> None:
        """Give `buffer` memory for `request`, with the contents of what it has. `causer` pays for what is left of the
        former memory, if that is not the payer's own user.
        """
        check_free(buffer, asking if dynamic else None)
        self._count(asking, buffer)
        before = buffer.memory
        assert before is not None
        # An administrator who clears an allocator is held to no quota of his own.
        room = self._registry.room_for_former(buffer, causer, imposed=asking is None)
        with self.moves.under_way(buffer), room as bill:
            sources = self._within_reason(buffer, asking, self._placement.sources(request)([buffer.name]))
            other = await self._maker.make_beside(buffer, sources, asking)
            try:
                async with self.moves.announced(buffer, Notice.MOVE, asking, asking if dynamic else None) as serial:
                    await self._copy(buffer, other)
                    if buffer.ended:
                        raise NoSuchBuffer
                    self._registry.exchange(buffer, other, bill, serial)
                    # Before the importers are told: they may look what it has.
                    self._registry.changed(buffer, MEMORY_PROPERTIES)
            finally:
                self._give_up(other)
        self._registry.use(buffer)
        assert buffer.memory is not None
        emit(
            log,
            Event.BUFFER_MOVED,
            buffer=buffer.id,
            uid=causer.uid,
            size=buffer.size,
            former=before.allocator,
            allocator=buffer.memory.allocator,
        )
