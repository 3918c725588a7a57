# SPDX-License-Identifier: MIT
"""Gives buffers their memory: charge, admit, fill, store, record, in this order, all of a call's buffers or none.

Which sources are asked, and in which order, is the caller's choice; who may have memory, the service's. A source that
has run out is followed by the next.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from udmabufd.core.admission import Admission
from udmabufd.core.buffer import Buffer
from udmabufd.core.custody import Custody
from udmabufd.core.errors import (
    AllocatorError,
    CacheUnavailable,
    KernelLimit,
    NoAllocator,
    NoSuchBuffer,
    NotSupported,
    OutOfMemory,
    QuotaExceeded,
    UdmabufUnavailable,
)
from udmabufd.core.events import Event, emit
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.store import Store
from udmabufd.core.workers import Workers

log = logging.getLogger(__name__)

FDS_PER_BUFFER = 3
"""A memfd, a dma-buf, and the witness that takes the place of both, or a duplicate for the reply."""

Fill = Callable[[bool], list[Memory]]
"""Makes a memory for each buffer, or none, and raises; blocks. To be called with whether the limit is near, so that a
child had better fill the memory."""

_NEXT = (OutOfMemory, UdmabufUnavailable, KernelLimit, NoAllocator, NotSupported, CacheUnavailable)
"""What a source refuses with that another one need not: it has run out, has gone, or its kernel driver refused."""


@dataclass(frozen=True, slots=True)
class Source:
    """One way to get the memory: of the allocator `name`, `size` bytes for each buffer, charged by the kernel as
    `accounting` says, made by `fill`.
    """

    name: str
    size: int
    accounting: Accounting
    fill: Fill


Run = Callable[[Callable[[], list[Memory]]], Awaitable[Sequence[Memory]]]
"""Runs a job off the event loop."""


class Maker:
    """See the module."""

    def __init__(self, custody: Custody, admission: Admission, store: Store, workers: Workers) -> None:
        self._custody = custody
        self._admission = admission
        self._store = store
        self._workers = workers

    async def make(self, buffers: list[Buffer], sources: Iterable[Source], run: Run | None = None) -> None:
        """Give `buffers`, alike and with their backing locks held by the caller, the memory of the first of `sources`
        that has some, made in one of the workers or where `run` runs it.

        Raises QuotaExceeded, OutOfMemory, what the first source refused with if none has any, and NoSuchBuffer if a
        buffer ended meanwhile; the others have their memory then.
        """
        memories = await self._first(buffers, sources, run or self._workers.submit)
        # From here on each memory belongs to its buffer, or is disposed of with its charge.
        ended = False
        for done, (buffer, memory) in enumerate(zip(buffers, memories, strict=True)):
            try:
                await self._back(buffer, memory)
            except NoSuchBuffer:
                ended = True
            except BaseException:
                for rest, unused in zip(buffers[done + 1 :], memories[done + 1 :], strict=True):
                    self._custody.dispose(rest, unused, "")
                raise
        if ended:
            raise NoSuchBuffer
        for buffer in buffers:
            self._custody.registry.record_shares(buffer)

    def check_left_behind(self) -> None:
        """Raise OutOfMemory when clients have left too much of their memory to the service; see admission."""
        own = sum(
            buffer.memory.size
            for buffer in self._custody.registry
            if buffer.memory is not None and buffer.memory.accounting is Accounting.SERVICE
        )
        self._admission.check_left_behind(own)

    async def _first(self, buffers: list[Buffer], sources: Iterable[Source], run: Run) -> Sequence[Memory]:
        """Return the memories of the first source that has them, charged."""
        failure: AllocatorError | None = None
        short: tuple[str, AllocatorError] | None = None
        for source in sources:
            if short is not None:
                name, reason = short
                uid = buffers[0].payer.uid
                emit(log, Event.ALLOCATOR_SHORT, allocator=name, uid=uid, reason=str(reason))
            try:
                await self._charge(buffers, source.size)
            except QuotaExceeded as error:
                # The next may round up less.
                failure, short = failure or error, None
                continue
            try:
                return await self._fill(buffers, source, run)
            except _NEXT as error:
                self._refund(buffers)
                failure, short = failure or error, (source.name, error)
            except BaseException:
                self._refund(buffers)
                raise
        assert failure is not None
        raise failure

    async def _charge(self, buffers: list[Buffer], size: int) -> None:
        try:
            self._charge_all(buffers, size)
        except QuotaExceeded:
            # Some of what is charged may be free by now.
            await self._custody.lingering.look_again(buffers[0].payer.uid)
            self._charge_all(buffers, size)

    def _charge_all(self, buffers: list[Buffer], size: int) -> None:
        billing = self._custody.registry.billing
        with ExitStack() as undo:
            for buffer in buffers:
                billing.charge_memory(buffer, size)
                undo.callback(billing.refund_memory, buffer)
            undo.pop_all()

    def _refund(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            self._custody.registry.billing.refund_memory(buffer)

    async def _fill(self, buffers: list[Buffer], source: Source, run: Run) -> Sequence[Memory]:
        # A pool is full or empty, and pages of a memfd that is handed out are their first toucher's.
        ours = source.accounting in (Accounting.SERVICE, Accounting.SYSTEM)
        byte_count = source.size * len(buffers) if ours else 0
        unaccounted = self._custody.registry.billing.unaccounted
        with self._admission.admit(byte_count, FDS_PER_BUFFER * len(buffers), unaccounted) as reservation:
            try:
                memories = await run(partial(source.fill, reservation.close))
                for memory in memories:
                    # Before the reservation ends: from here on it is counted as what there is.
                    self._custody.registry.billing.arrived(memory)
                return memories
            except OutOfMemory as error:
                if reservation.close:
                    emit(log, Event.FILL_KILLED, size=byte_count, uid=buffers[0].payer.uid, reason=str(error))
                raise

    async def _back(self, buffer: Buffer, memory: Memory) -> None:
        stored_as = self._store.take_name()
        try:
            fds = [fd for fd in (memory.memfd, memory.dma_buf) if fd is not None]
            await self._store.put(stored_as, fds, buffer.payer.uid)
            memory.stored = self._store.enabled
            self._custody.registry.back(buffer, memory, stored_as)
        except OSError as error:
            emit(log, Event.STORE_FAILED, buffer=buffer.id, uid=buffer.payer.uid, reason=str(error))
            self._custody.dispose(buffer, memory, stored_as)
            raise OutOfMemory("The service manager does not keep any more descriptors for the service") from error
        except BaseException:
            self._custody.dispose(buffer, memory, stored_as)
            raise
