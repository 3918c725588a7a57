# SPDX-License-Identifier: MIT
"""Buffers that nobody holds any more, until the kernel has freed their memory.

A cheap hint says when to look: the reference count of the dma-buf's file, in which descriptors, mappings, descriptors
on their way and imports show, but no O_PATH descriptor. When nobody but the service and its store is left, the dma-buf
is given up, and the memfd that remains is the witness: it takes F_SEAL_WRITE when nothing references its pages any
more. The charge ends then and not before. Memory that is not the service's own has the hint alone.

Each lingering buffer has one task that looks ever more rarely; without any, nothing wakes up.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from weakref import WeakValueDictionary

from udmabufd.core.buffer import Buffer
from udmabufd.core.events import Event, emit
from udmabufd.core.memory import Memory
from udmabufd.core.registry import Registry
from udmabufd.core.store import Store
from udmabufd.core.withdrawing import settled, withdraw
from udmabufd.core.workers import Workers
from udmabufd.linux import memfd

log = logging.getLogger(__name__)

FIRST_LOOK = 0.01
LAST_LOOK = 5.0
"""Seconds between looks at the reference count: doubled from the first to the last."""

LONG = 10.0
"""Seconds after which the journal is told that a buffer lingers, and of its end."""

SWEEP = 1.0
"""Seconds that a call waits for what its user has let go of to be looked at."""

FIRST_PROOF = 0.2
LAST_PROOF = 60.0
"""Seconds between attempts at the proof, each of which occupies a thread for up to 190 ms."""


class _Watch:
    """One buffer that is followed. `waiters` want the next round that begins to be over."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.waiters: list[asyncio.Future[None]] = []
        self.task: asyncio.Task[None] | None = None
        self.since = asyncio.get_running_loop().time()
        self.told = False

    @property
    def seconds(self) -> float:
        return asyncio.get_running_loop().time() - self.since

    def round_over(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(future)
        self.wake.set()
        return future


class Lingering:
    """Follows each buffer that it is given to its end, or back to life."""

    def __init__(self, registry: Registry, store: Store, workers: Workers, prover: Workers) -> None:
        """`prover` has a thread of its own: proofs that fail take long."""
        self._registry = registry
        self._store = store
        self._workers = workers
        self._prover = prover
        self._watches: dict[Buffer, _Watch] = {}
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._sweeps: dict[int, asyncio.Future[Any]] = {}

    def __len__(self) -> int:
        return len(self._watches)

    def follow(self, buffer: Buffer) -> None:
        """Take over `buffer`, which has begun to linger, or lingers since a former life of the service."""
        watch = self._watches.get(buffer)
        if watch is not None and watch.task is not None and not watch.task.done():
            # It lived again and has ended again before its task noticed.
            watch.wake.set()
            return
        watch = self._watches[buffer] = _Watch()
        watch.task = asyncio.get_running_loop().create_task(self._follow(buffer, watch))

    async def looked(self, buffer: Buffer) -> None:
        """Look at `buffer` once more and wait for it: then it is gone, unless somebody references it."""
        if (watch := self._watches.get(buffer)) is not None:
            await watch.round_over()

    async def look_again(self, uid: int) -> None:
        """The same for all buffers that `uid` is charged for, all together and for a limited time."""
        sweep = self._sweeps.get(uid)
        if sweep is None:
            mine = [watch.round_over() for buffer, watch in self._watches.items() if buffer.payer.uid == uid]
            if not mine:
                return
            sweep = self._sweeps[uid] = asyncio.ensure_future(asyncio.wait(mine, timeout=SWEEP))
            sweep.add_done_callback(lambda _: self._sweeps.pop(uid, None))
        await asyncio.wait((sweep,))

    async def close(self) -> None:
        """Follow nothing any more; what lingers stays as it is."""
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, buffer: Buffer, watch: _Watch) -> None:
        delay, waiters = FIRST_LOOK, watch.waiters
        try:
            while True:
                watch.wake.clear()
                waiters, watch.waiters = watch.waiters, []
                exported = buffer.memory is not None and buffer.memory.dma_buf is not None
                if await self._looked_at(buffer):
                    if watch.told and buffer not in self._registry:
                        self._tell(Event.LINGERING_FREED, buffer, seconds=round(watch.seconds))
                    return
                _wake(waiters)
                if not watch.told and watch.seconds > LONG:
                    watch.told = True
                    self._tell(Event.BUFFER_LINGERS, buffer)
                if exported and buffer.memory is not None and buffer.memory.dma_buf is None:
                    delay = FIRST_PROOF
                try:
                    async with asyncio.timeout(delay):
                        await watch.wake.wait()
                except TimeoutError:
                    delay = min(2 * delay, LAST_LOOK if exported else LAST_PROOF)
        except Exception:
            log.exception("Buffer %s lingers and can be followed no further; it stays charged", buffer.id)
        finally:
            _wake(waiters + watch.waiters)
            if self._watches.get(buffer) is watch:
                del self._watches[buffer]

    @staticmethod
    def _tell(event: Event, buffer: Buffer, **fields: Any) -> None:
        uid, application = buffer.payer
        emit(log, event, buffer=buffer.id, uid=uid, application=application, size=buffer.size, **fields)

    async def _looked_at(self, buffer: Buffer) -> bool:
        """Look once; return whether there is nothing more to follow."""
        try:
            return await self._round(buffer)
        except OSError as error:
            # No descriptor is left, or the store takes none at present.
            log.warning("Buffer %s lingers and cannot be looked at now: %s", buffer.id, error)
            return buffer not in self._registry

    async def _round(self, buffer: Buffer) -> bool:
        if not buffer.ended:
            return True
        memory = buffer.memory
        assert memory is not None
        if memory.dma_buf is not None:
            if memory.references() != 0:
                return False
            if not memory.provable:
                await self._finish(buffer)
                return True
            if not await self._withdraw(buffer, memory):
                return not buffer.ended
            memory = buffer.memory
            assert memory is not None
        assert memory.memfd is not None
        # Users take turns: one with many proofs that fail, each of which takes long, holds up nobody else's.
        async with self._turns.setdefault(buffer.payer.uid, asyncio.Lock()):
            if not await self._prover.submit(memfd.prove_free, memory.memfd.fileno()):
                return False
        await self._finish(buffer)
        return True

    async def _withdraw(self, buffer: Buffer, memory: Memory) -> bool:
        """Give up the dma-buf and keep the witness; return whether that was done."""

        def commit(witness: Memory, stored_as: str) -> bool:
            if not buffer.ended or memory.references() != 0:
                # Somebody imported it meanwhile, or is about to.
                return False
            self._registry.withdraw(buffer, witness, stored_as)
            return True

        return await withdraw(self._store, self._workers, memory, buffer.stored_as, buffer.payer.uid, commit)

    async def _finish(self, buffer: Buffer) -> None:
        memory = buffer.memory
        assert memory is not None
        # The record first: what is stored without a record is given up at the next start. The charge last: the pages
        # are free when the store's and our own descriptor are closed.
        charge, buffer.memory_charge = buffer.memory_charge, None
        try:
            self._registry.finish(buffer)
            self._store.drop(buffer.stored_as)
            await settled(self._store, buffer.stored_as)
            await self._workers.submit(memory.close)
        finally:
            self._registry.billing.gone(memory)
            if charge is not None:
                charge.release()


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
