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

from udmabufd.core.admission import Admission, Reservation
from udmabufd.core.buffer import Buffer, Holder
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
from udmabufd.core.ledger import Charge
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
    `accounting` says, made by `fill`. `fresh` of these bytes are not in memory yet, all of them if it is None.
    """

    name: str
    size: int
    accounting: Accounting
    fill: Fill
    fresh: int | None = None


Run = Callable[[Callable[[], list[Memory]]], Awaitable[Sequence[Memory]]]
"""Runs a job off the event loop."""


async def _relieve_nothing(_byte_count: int) -> None:
    pass


class Maker:
    """See the module."""

    def __init__(self, custody: Custody, admission: Admission, store: Store, workers: Workers) -> None:
        self._custody = custody
        self._admission = admission
        self._store = store
        self._workers = workers
        self.relieve: Callable[[int], Awaitable[object]] = _relieve_nothing
        """Evicts so many bytes, if it can, when memory is short."""

    async def make(
        self,
        buffers: list[Buffer],
        sources: Iterable[Source],
        run: Run | None = None,
        asking: Holder | None = None,
    ) -> None:
        """Give `buffers`, alike and with their backing locks held by the caller, the memory of the first of `sources`
        that has some, made in one of the workers or where `run` runs it. `asking` wants it, if not the payer.

        Raises QuotaExceeded, OutOfMemory, what the first source refused with if none has any, and NoSuchBuffer if a
        buffer ended meanwhile; the others have their memory then.
        """
        memories = await self._first(buffers, sources, run or self._workers.submit, asking)
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

    async def make_beside(self, buffer: Buffer, sources: Iterable[Source], asking: Holder | None) -> Buffer:
        """Return a buffer that is not registered, with memory of the first of `sources` that has some, charged to the
        payer of `buffer` and stored: memory beside that of `buffer`. It is the caller's to hand over, or to give up by
        Custody.dispose(). Raises what make() does.
        """
        other = Buffer(buffer.request, buffer.payer, name=buffer.name)
        (memory,) = await self._first([other], sources, self._workers.submit, asking)
        other.memory = memory
        other.stored_as = await self._stored(other, memory, of=buffer)
        return other

    def check_left_behind(self) -> None:
        """Raise OutOfMemory when clients have left too much of their memory to the service; see admission."""
        own = sum(
            buffer.memory.size
            for buffer in self._custody.registry
            if buffer.memory is not None and buffer.memory.accounting is Accounting.SERVICE
        )
        self._admission.check_left_behind(own)

    async def _first(
        self, buffers: list[Buffer], sources: Iterable[Source], run: Run, asking: Holder | None
    ) -> Sequence[Memory]:
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
                failure, short = failure or self._told(error, buffers[0], asking), None
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

    def charge_evicted(self, buffer: Buffer, asking: Holder | None) -> Charge:
        """Charge the payer for memory that will be evicted, as `asking` wants. Raises QuotaExceeded."""
        billing = self._custody.registry.billing
        try:
            return billing.charge_evicted(buffer)
        except QuotaExceeded as error:
            raise self._told(error, buffer, asking, "max_evicted_bytes_per_user") from None

    def _told(
        self, error: QuotaExceeded, buffer: Buffer, asking: Holder | None, limit: str = "max_bytes_per_user"
    ) -> QuotaExceeded:
        """Return what to tell `asking` of a quota of the payer: the figures are no other user's business."""
        if asking is None or asking.uid == buffer.payer.uid:
            return error
        value = getattr(self._custody.registry.billing.limits, limit)
        return QuotaExceeded(f"size: the user who created the buffer would exceed the limit {limit} of {value}")

    def _swappable(self) -> int:
        """Return the bytes of evicted buffers, but for those that are coming back."""
        return sum(b.size for b in self._custody.registry if b.evicted and not b.backing.locked())

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
        fresh = source.size if source.fresh is None else source.fresh
        byte_count = fresh * len(buffers) if ours else 0
        billing = self._custody.registry.billing
        with await self._admitted(byte_count, FDS_PER_BUFFER * len(buffers)) as reservation:
            try:
                memories = await run(partial(source.fill, reservation.close))
                for memory in memories:
                    # Before the reservation ends: from here on it is counted as what there is.
                    billing.arrived(memory)
                return memories
            except OutOfMemory as error:
                if reservation.close:
                    emit(log, Event.FILL_KILLED, size=byte_count, uid=buffers[0].payer.uid, reason=str(error))
                raise

    async def _admitted(self, byte_count: int, descriptors: int) -> Reservation:
        """Return room for so much; make some by evicting what is idle, if that is what is wanting."""
        billing = self._custody.registry.billing
        try:
            return self._admission.admit(byte_count, descriptors, billing.unaccounted, self._swappable)
        except OutOfMemory:
            if not byte_count or not self._admission.lacks(byte_count, billing.unaccounted, self._swappable):
                raise
        await self.relieve(byte_count)
        return self._admission.admit(byte_count, descriptors, billing.unaccounted, self._swappable)

    async def _back(self, buffer: Buffer, memory: Memory) -> None:
        stored_as = await self._stored(buffer, memory, of=buffer)
        try:
            self._custody.registry.back(buffer, memory, stored_as)
        except BaseException:
            self._custody.dispose(buffer, memory, stored_as)
            raise

    async def _stored(self, buffer: Buffer, memory: Memory, of: Buffer) -> str:
        """Store the descriptors of `memory`, and return under which name; dispose of it where that fails. The journal
        is told that it is `of` that buffer.
        """
        stored_as = self._store.take_name()
        try:
            fds = [fd for fd in (memory.memfd, memory.dma_buf) if fd is not None]
            await self._store.put(stored_as, fds, buffer.payer.uid)
            memory.stored = self._store.enabled
        except OSError as error:
            emit(log, Event.STORE_FAILED, buffer=of.id, uid=buffer.payer.uid, reason=str(error))
            self._custody.dispose(buffer, memory, stored_as)
            raise OutOfMemory("The service manager does not keep any more descriptors for the service") from error
        except BaseException:
            self._custody.dispose(buffer, memory, stored_as)
            raise
        return stored_as
