# SPDX-License-Identifier: MIT
"""Gives buffers their memory: charge, admit, fill, store, record, in this order, all of a call's buffers or none.

Which memory, and how it is filled, is the caller's choice; who may have it, the service's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial

from udmabufd.core.admission import Admission
from udmabufd.core.buffer import Buffer
from udmabufd.core.custody import Custody
from udmabufd.core.errors import NoSuchBuffer, OutOfMemory, QuotaExceeded
from udmabufd.core.events import Event, emit
from udmabufd.core.memory import Memory
from udmabufd.core.store import Store
from udmabufd.core.workers import Workers
from udmabufd_client.contract import Kind

log = logging.getLogger(__name__)

FDS_PER_BUFFER = 3
"""A memfd, a dma-buf, and the witness that takes the place of both, or a duplicate for the reply."""

Fill = Callable[[bool], list[Memory]]
"""Makes a memory for each buffer, or none, and raises; blocks. To be called with whether the limit is near, so that a
child had better fill the memory."""

Run = Callable[[Callable[[], list[Memory]]], Awaitable[Sequence[Memory]]]
"""Runs a job off the event loop."""


class Maker:
    """See the module."""

    def __init__(self, custody: Custody, admission: Admission, store: Store, workers: Workers) -> None:
        self._custody = custody
        self._admission = admission
        self._store = store
        self._workers = workers

    async def make(self, buffers: list[Buffer], make: Fill, run: Run | None = None) -> None:
        """Give `buffers`, alike and with their backing locks held by the caller, the memory that `make` makes, in one
        of the workers or where `run` runs it.

        Raises QuotaExceeded, OutOfMemory, what `make` raises, and NoSuchBuffer if one ended meanwhile; the others
        have their memory then.
        """
        await self._charge(buffers)
        try:
            memories = await self._fill(buffers, make, run or self._workers.submit)
        except BaseException:
            self._refund(buffers)
            raise
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
            buffer.request.size
            for buffer in self._custody.registry
            if buffer.memory is not None and buffer.memory.provable
        )
        self._admission.check_left_behind(own)

    async def _charge(self, buffers: list[Buffer]) -> None:
        try:
            self._charge_all(buffers)
        except QuotaExceeded:
            # Some of what is charged may be free by now.
            await self._custody.lingering.look_again(buffers[0].payer.uid)
            self._charge_all(buffers)

    def _charge_all(self, buffers: list[Buffer]) -> None:
        with ExitStack() as undo:
            for buffer in buffers:
                self._custody.registry.charge_memory(buffer)
                undo.callback(self._custody.registry.refund_memory, buffer)
            undo.pop_all()

    def _refund(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            self._custody.registry.refund_memory(buffer)

    async def _fill(self, buffers: list[Buffer], make: Fill, run: Run) -> Sequence[Memory]:
        request = buffers[0].request
        # Pages of a memfd that is handed out are their first toucher's.
        byte_count = 0 if request.kind is Kind.MEMFD else request.size * len(buffers)
        with self._admission.admit(byte_count, FDS_PER_BUFFER * len(buffers)) as reservation:
            try:
                return await run(partial(make, reservation.close))
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
