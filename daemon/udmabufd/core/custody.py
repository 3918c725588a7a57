# SPDX-License-Identifier: MIT
"""Buffers beyond the calls about them: who is left when a holder goes, what outlives whom, and how all of it comes
back after a restart.

Owns the registry, what was inherited from the former run, and the times that run out. What a client may ask for is
the service's matter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any

from udmabufd.core import restore
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import NotSupported, UdmabufUnavailable
from udmabufd.core.events import Event, emit
from udmabufd.core.ledger import Ledger
from udmabufd.core.lingering import Lingering
from udmabufd.core.memory import Memory
from udmabufd.core.records import of_bus
from udmabufd.core.recovery import Former, Maps, nothing_known, row
from udmabufd.core.registry import Registry
from udmabufd.core.requests import Requests
from udmabufd.core.state import StateFile, Unreadable
from udmabufd.core.store import STATE_NAME, Store
from udmabufd.core.workers import Workers
from udmabufd_base.fd import close_all
from udmabufd_client.contract import BUS_GRACE, REQUEST_GRACE

log = logging.getLogger(__name__)


class Custody:
    """See the module. To be made on the event loop; start() before anything is served."""

    def __init__(
        self,
        ledger: Ledger,
        max_buffers: int,
        store: Store,
        workers: Workers,
        prover: Workers,
        inherited: restore.Inherited,
        maps: Maps = nothing_known,
    ) -> None:
        """`inherited` are the stored descriptors of the former run by name, which are consumed. `prover` is for what
        takes long and hurries nobody. `maps` is asked of exporters of which no record is left. Raises OSError.
        """
        self._maps = maps
        self._store = store
        self._workers = workers
        self._inherited = inherited
        self._former: Former | None = None
        self._recovering = False
        self._timers: dict[Buffer, asyncio.TimerHandle] = {}
        self._disposals: set[asyncio.Future[None]] = set()
        self._bus: tuple[int, str] | None = None
        self._found: restore.Records | None = None
        self.registry = Registry(ledger, max_buffers, self._open_state(), self._unheld)
        self.requests = Requests()
        self.lingering = Lingering(self.registry, store, workers, prover)

    async def start(self) -> None:
        """Take over what the former run had, or begin a new state. Raises OSError."""
        if self._former is not None:
            count = sum(len(fds) for fds in self._former.inherited.values())
            emit(log, Event.STATE_UNREADABLE, reason=self._former.reason, count=count)
        elif self._found is None:
            await self._store.put(STATE_NAME, [self.registry.recorder.state.fd], 0)
        else:
            self._restore(self._found, self._inherited)
            self._drop_orphans(self._inherited)

    @property
    def refusal(self) -> str | None:
        """Why nothing is made until an administrator has decided what becomes of the former run's buffers, or None."""
        return None if self._former is None else self._former.reason

    def check_serving(self) -> None:
        """Raise UdmabufUnavailable while there is a refusal."""
        if self._former is not None:
            raise UdmabufUnavailable(
                f"The state of the service's former run cannot be read ({self._former.reason}); its buffers are kept "
                "until root decides: udmabufctl recover"
            )

    def connected(self, bus_id: str, names: Collection[str]) -> list[Holder]:
        """Take notice of the bus and the connections that it has; return those that still hold something.

        Holders that ended meanwhile lose their shares. On another bus than that of the former run all names belong to
        others: every holder is void, and the buffers wait to be imported again.
        """
        registry = self.registry
        # Whose names those are that came without a bus, of a damaged state, nobody knows.
        if self._bus is None or self._bus[1] != bus_id:
            waiting = [buffer for buffer in registry if buffer.shares]
            for buffer in waiting:
                registry.void(buffer, until=asyncio.get_running_loop().time() + BUS_GRACE)
                self._retain(buffer, BUS_GRACE)
            if waiting:
                emit(log, Event.BUS_RESTARTED, count=len(waiting), seconds=BUS_GRACE)
        else:
            holders = registry.holders()
            ended = [holder for holder in holders if holder.name not in names]
            for holder in ended:
                registry.drop(holder)
            if ended:
                emit(log, Event.HOLDERS_ENDED, count=len(ended), holders=len(holders))
        slot = registry.recorder.state.write(None if self._bus is None else self._bus[0], of_bus(bus_id))
        self._bus = slot, bus_id
        return registry.holders()

    async def recover(
        self,
        discard: bool,
        bus_id: str,
        names: Collection[str],
        uid: int,
        known: Callable[[str], Holder | None] = restore.nobody,
    ) -> list[dict[str, Any]]:
        """Keep what can be kept of the former run's buffers, or give them up; serve again. Raises NotSupported.

        `known` returns the holder of a connection to this bus that has called already. Returns a row for each buffer,
        with the keys of the contract.
        """
        former = self._former
        if former is None or self._recovering:
            raise NotSupported("There is nothing to recover: the state of the former run was read")
        self._recovering = True
        try:
            rows = await self._recover(former, discard, bus_id, known)
        finally:
            self._recovering = False
        emit(log, Event.STATE_DISCARDED if discard else Event.STATE_RECOVERED, count=len(rows), uid=uid)
        # In one turn: nobody who has come since can hold anything yet.
        self.connected(bus_id, names)
        self._former = None
        return rows

    async def _recover(
        self, former: Former, discard: bool, bus_id: str, known: Callable[[str], Holder | None]
    ) -> list[dict[str, Any]]:
        salvaged = None if discard else former.salvage()
        if salvaged is not None:
            self.registry.recorder.state.close()
            self.registry.recorder.state, found = salvaged
            same_bus = found.bus is not None and found.bus[1] == bus_id
            self._restore(found, former.inherited, known if same_bus else restore.nobody)
            rows = [row(buffer, "restored") for buffer in self.registry]
        else:
            rows = former.discard(self._store) if discard else []
        for _, buffer in former.strangers():
            self.registry.adopt(buffer, ())
            # A memfd alone is nothing that anybody could import.
            rows.append(row(buffer, "discarded" if buffer.withdrawn else "kept"))
            self._settle(buffer)
        if salvaged is None:
            # Last: what a state that can be read does not tell of is given up at the next start.
            self._store.drop(STATE_NAME)
            await self._store.put(STATE_NAME, [self.registry.recorder.state.fd], 0)
        former.close()
        return rows

    def end(self, buffer: Buffer) -> None:
        """End a buffer that nobody holds, now."""
        self._forget_timer(buffer)
        for other in self.requests.forget(buffer):
            # Nobody can ask for it again; if the id is used again, it stands for other buffers.
            self.registry.forget_repeat(other)
        memory, stored_as = buffer.memory, buffer.stored_as
        if self.registry.end(buffer):
            self.lingering.follow(buffer)
        elif memory is not None:
            self.dispose(buffer, memory, stored_as)

    def abandon(self, buffer: Buffer, holder: Holder) -> None:
        """Undo the making of `buffer` for `holder`, in a call that failed: nobody may ask for it again."""
        self.registry.forget_repeat(buffer)
        if holder in buffer.shares:
            self.registry.release(buffer, holder)
        elif not buffer.shares and not buffer.ended and not buffer.kept:
            # The holder had gone, and the buffer was waiting to be asked for again.
            self.end(buffer)

    def dispose(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Close memory that nobody else is waited for, in a worker, and end its charge after that."""
        self._store.drop(stored_as)
        closing = self._workers.submit(memory.close)
        self._disposals.add(closing)

        def closed(future: asyncio.Future[None]) -> None:
            self._disposals.discard(future)
            self.registry.billing.gone(memory)
            self.registry.billing.refund_memory(buffer)
            if error := future.exception():
                log.error("Closing the memory of a buffer failed", exc_info=error)

        closing.add_done_callback(closed)

    async def settled(self) -> None:
        """Wait until what was given up so far is closed."""
        if self._disposals:
            await asyncio.wait(tuple(self._disposals))

    async def close(self) -> None:
        """Stop. What the store keeps stays as it is for the next run; without a store everything ends."""
        for buffer in tuple(self._timers):
            self._forget_timer(buffer)
        await self.lingering.close()
        await self.settled()
        for buffer in self.registry:
            if buffer.memory is not None:
                await self._workers.submit(buffer.memory.close)
        if self._former is not None:
            self._former.close()
        self.registry.recorder.state.close()

    def _open_state(self) -> StateFile:
        """Return the former run's state, or a new one where there is none or it cannot be read."""
        fds = self._inherited.pop(STATE_NAME, [])
        if not fds and not self._inherited:
            return StateFile.create()
        state = fds.pop() if fds else None
        close_all(fds)
        try:
            if state is None:
                raise Unreadable("it is missing")
            opened = StateFile.open(state)
            self._found = restore.parse(opened)
        except Unreadable as error:
            if state is not None and state.closed:
                # It was opened; what it says makes no sense.
                state = opened.fd
            self._former = Former(state, self._inherited, str(error), self._maps)
            return StateFile.create()
        return opened

    def _restore(
        self,
        found: restore.Records,
        inherited: restore.Inherited,
        known: Callable[[str], Holder | None] = restore.nobody,
    ) -> None:
        result = restore.restore(found, self.registry, inherited, self._store, known)
        self._bus = found.bus
        for buffer in self.requests.restore(result.buffers):
            self.registry.forget_repeat(buffer)
        for lost in result.lost:
            reason = "its descriptors did not come back from the service manager"
            emit(log, Event.BUFFER_LOST, buffer=lost.id, uid=lost.payer.uid, reason=reason)
        if result.buffers:
            emit(log, Event.STATE_RESTORED, count=len(result.buffers), holders=len(result.holders))
        for buffer in result.buffers:
            self._settle(buffer)

    def _drop_orphans(self, inherited: restore.Inherited) -> None:
        """Give up what was stored and never recorded, or recorded as ended and not yet dropped."""
        if inherited:
            emit(log, Event.ORPHANS_DROPPED, count=sum(len(fds) for fds in inherited.values()))
        for name, fds in inherited.items():
            self._store.drop(name)
            close_all(fds)
        inherited.clear()

    def _settle(self, buffer: Buffer) -> None:
        """Go on with what was under way for a buffer of the former run."""
        if buffer.ended:
            self.lingering.follow(buffer)
        elif not buffer.shares:
            self._unheld(buffer)

    def _unheld(self, buffer: Buffer) -> None:
        """Decide what becomes of a buffer whose last share is gone."""
        if buffer.kept:
            self._retain(buffer, BUS_GRACE)
        elif buffer.repeat is not None and buffer.slot is not None:
            # A caller that was told of it, or would have been, may ask again.
            self._retain(buffer, REQUEST_GRACE)
        else:
            self.end(buffer)

    def _retain(self, buffer: Buffer, seconds: float) -> None:
        self._forget_timer(buffer)
        self._timers[buffer] = asyncio.get_running_loop().call_later(seconds, self._time_over, buffer)

    def _time_over(self, buffer: Buffer) -> None:
        self._forget_timer(buffer)
        if not buffer.shares and not buffer.ended:
            if buffer.kept:
                emit(log, Event.GRACE_ENDED, count=1)
            self.end(buffer)

    def _forget_timer(self, buffer: Buffer) -> None:
        if (timer := self._timers.pop(buffer, None)) is not None:
            timer.cancel()
