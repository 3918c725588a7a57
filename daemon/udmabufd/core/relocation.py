# SPDX-License-Identifier: MIT
"""What every move, eviction and return is made of: whose turn it is, whether the memory may move at all, the copy of
its contents, and what becomes of the memory that is left over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.custody import Custody
from udmabufd.core.errors import Busy, MoveTimedOut, NoSuchBuffer, NotSupported, from_oserror
from udmabufd.core.maker import Maker, Source
from udmabufd.core.memory import Memory
from udmabufd.core.moves import Moves
from udmabufd.core.placement import Placement, not_much_larger
from udmabufd.core.spec import Request
from udmabufd.core.store import Store
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.core.workers import Workers
from udmabufd.linux import copy
from udmabufd_client.contract import WRAPPED, Kind, State

log = logging.getLogger(__name__)

REPORT = 2.0
"""Seconds between reports of a copy's progress."""


class Relocation:
    """See the module."""

    def __init__(
        self,
        custody: Custody,
        maker: Maker,
        placement: Placement,
        exporter: UdmabufAllocator,
        store: Store,
        workers: Workers,
        movers: Workers,
        timeout_ms: int,
    ) -> None:
        """`exporter` brings evicted memory back; `movers` copy, which may wait for devices that use the memory."""
        self.moves = Moves(custody.registry, timeout_ms)
        self._custody = custody
        self._registry = custody.registry
        self._maker = maker
        self._placement = placement
        self._exporter = exporter
        self._store = store
        self._workers = workers
        self._movers = movers

    @asynccontextmanager
    async def _turn(self, holder: Holder, buffer_id: str) -> AsyncIterator[Buffer]:
        """A buffer of `holder`, whose backing lock is held meanwhile. Raises Busy while another move is under way."""
        buffer = self._registry.held(buffer_id, holder)
        if buffer in self.moves:
            now = "moving already" if buffer.state is State.MOVING else "about to move"
            raise Busy(f"The buffer is {now}: wait for the end of that")
        async with buffer.backing:
            self._registry.held(buffer_id, holder)
            yield buffer

    async def _copy(self, buffer: Buffer, other: Buffer) -> None:
        """Copy the contents of `buffer` to the memory of `other`. Raises NoSuchBuffer when the buffer ends."""
        if buffer.ended:
            raise NoSuchBuffer
        before, after = buffer.memory, other.memory
        assert before is not None
        assert after is not None
        size = min(before.size, after.size)
        progress = _Progress(buffer.id, size)
        try:
            # Of one's own: the buffer may end, and its descriptors be closed, meanwhile.
            with before.exported.dup() as source, after.exported.dup() as target:
                # Here and not in one of the threads: there, others' copies would wait, too.
                await _quiet(source.fileno(), self.moves.timeout_ms / 1000)
                done = await self._movers.submit(
                    partial(
                        copy.copy,
                        source.fileno(),
                        target.fileno(),
                        size,
                        progress=progress.report,
                        cancelled=lambda: buffer.ended,
                        patience=0.0,
                    )
                )
        except TimeoutError as error:
            raise MoveTimedOut(
                f"The devices that use the buffer did not finish within {self.moves.timeout_ms} ms"
            ) from error
        except OSError as error:
            raise from_oserror(error, "copying a buffer") from error
        if not done:
            raise NoSuchBuffer

    def _count(self, holder: Holder | None, buffer: Buffer) -> None:
        """Count a call as as many as what is done for it, and who is told of it, is worth."""
        if holder is not None:
            billing = self._registry.billing
            billing.count_work(holder.owner, buffer.size)
            billing.count_told(holder.owner, len(buffer.shares) + len(buffer.attachments))

    def _within_reason(self, buffer: Buffer, asking: Holder | None, sources: Iterable[Source]) -> Iterable[Source]:
        """Return those of `sources` that `asking` may have `buffer` moved to, at the cost of who pays for it."""
        if asking is None or asking.uid == buffer.payer.uid:
            return sources
        return not_much_larger(sources, buffer.size)

    def _give_up(self, other: Buffer) -> None:
        """Close the memory that `other` has, or follow it to its end if it is what a buffer had before."""
        assert other.memory is not None
        if other.origin:
            self._custody.lingering.follow(other)
        else:
            self._custody.dispose(other, other.memory, other.stored_as)


async def _quiet(fd: int, seconds: float) -> None:
    """Wait until no device writes to the dma-buf or memfd `fd` any more. Raises TimeoutError."""
    if not copy.busy(fd):
        return
    loop = asyncio.get_running_loop()
    quiet = asyncio.Event()
    loop.add_reader(fd, quiet.set)
    try:
        async with asyncio.timeout(seconds):
            await quiet.wait()
    finally:
        loop.remove_reader(fd)


class _Progress:
    """Tells the log of a copy that takes long; called in the thread that copies."""

    def __init__(self, buffer_id: str, size: int) -> None:
        self._buffer_id = buffer_id
        self._size = size
        self._last = time.monotonic()

    def report(self, done: int) -> None:
        """Take notice that so many bytes are copied."""
        now = time.monotonic()
        if now - self._last >= REPORT:
            self._last = now
            log.info("Moving buffer %s: %d of %d bytes are copied", self._buffer_id, done, self._size)


def movable(buffer: Buffer) -> Memory:
    """Return the buffer's memory. Raises NotSupported if it cannot be moved at all."""
    memory = buffer.memory
    if memory is None:
        raise NotSupported("The buffer has no memory yet: the first GetFd allocates it")
    if buffer.request.kind is Kind.MEMFD or memory.allocator == WRAPPED:
        raise NotSupported(f"Memory of {memory.allocator} is the clients' own and stays where it is")
    return memory


def request_of(buffer: Buffer, memory: Memory) -> Request:
    """Return the request for other memory: laid out as this is, and not smaller."""
    return buffer.request.grown(memory.size, [a.wish.demand for a in buffer.attachments.values()])
