# SPDX-License-Identifier: MIT
"""The use cases: allocate, create, hand out, share, list, rename, release. Everything that is decided on a call.

The order is the same in each: check what was asked, charge for it, do it, answer; whatever fails is undone before
the error leaves. Runs on one event loop; what blocks goes to a worker thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import InvalidSpec, NoSuchBuffer, QuotaExceeded, from_oserror
from udmabufd.core.ledger import Charge, Ledger
from udmabufd.core.limits import Limits
from udmabufd.core.memory import Memory
from udmabufd.core.pool import Pool
from udmabufd.core.registry import Registry
from udmabufd.core.spec import Request, check_name
from udmabufd.core.workers import Workers
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE

log = logging.getLogger(__name__)

ROOT = 0


@dataclass(slots=True)
class Grant:
    """A buffer, and a descriptor of it that belongs to whoever has the grant."""

    buffer: Buffer
    fd: OwnedFd


class Service:
    """What the daemon does, for callers that are known by now.

    `changed(buffer, properties)` is called after properties of a buffer have changed.
    """

    def __init__(self, limits: Limits, ledger: Ledger, pool: Pool, workers: Workers) -> None:
        self.limits = limits
        self.pool = pool
        self._ledger = ledger
        self._workers = workers
        self._registry = Registry(ledger, limits.max_buffers, self._dispose)
        self._disposals: set[asyncio.Future[None]] = set()
        self.changed: Callable[[Buffer, tuple[str, ...]], None] = lambda _buffer, _properties: None

    @property
    def buffer_count(self) -> int:
        """Live buffers of all users."""
        return len(self._registry)

    @property
    def byte_count(self) -> int:
        """Bytes charged to all users."""
        return self._ledger.total_bytes

    async def allocate(self, holder: Holder, spec: Mapping[str, Any], count: int = 1) -> list[Grant]:
        """Make `count` buffers alike with memory, one share each for `holder`: all of them or none."""
        if not 1 <= count <= MAX_FDS_PER_MESSAGE:
            raise InvalidSpec("count", f"must be 1 to {MAX_FDS_PER_MESSAGE}, not {count}")
        request = self._check(spec)
        with ExitStack() as undo:
            buffers = []
            for _ in range(count):
                buffer = self._registry.create(request, holder)
                undo.callback(self._abandon, buffer, holder)
                buffers.append(buffer)
            await self._back(buffers)
            grants = []
            for buffer in buffers:
                grants.append(Grant(buffer, undo.enter_context(self._dup(buffer))))
            undo.pop_all()
        for buffer in buffers:
            _log_of(buffer, holder, "allocated")
            if len(buffer.shares) > 1:
                # Somebody imported it by ticket while it had no memory.
                self.changed(buffer, ("State", "Serial", "Allocator"))
        return grants

    def create(self, holder: Holder, spec: Mapping[str, Any]) -> Buffer:
        """Make a buffer without memory, one share of it for `holder`."""
        buffer = self._registry.create(self._check(spec), holder)
        _log_of(buffer, holder, "created without memory")
        return buffer

    async def get_fd(self, holder: Holder, buffer_id: str) -> Grant:
        """Hand out a descriptor; the first time, allocate."""
        buffer = self._registry.held(buffer_id, holder)
        async with buffer.backing:
            # Others may have released it, or made the memory, while this call waited.
            self._registry.held(buffer_id, holder)
            if buffer.memory is None:
                self.pool.select(buffer.request)
                try:
                    await self._make_memory([buffer])
                except QuotaExceeded:
                    if holder.uid == buffer.creator:
                        raise
                    # The figures are another user's.
                    limit = self.limits.max_bytes_per_user
                    raise QuotaExceeded(
                        f"size: the user who created the buffer would exceed the limit max_bytes_per_user of {limit}"
                    ) from None
                _log_of(buffer, holder, "allocated")
                self.changed(buffer, ("State", "Serial", "Allocator"))
        return Grant(buffer, self._dup(buffer))

    def get(self, holder: Holder, buffer_id: str) -> Buffer:
        """Return a buffer that `holder` has a share of."""
        return self._registry.held(buffer_id, holder)

    def import_ticket(self, holder: Holder, ticket: str) -> Buffer:
        """Make `holder` a holder of the buffer that `ticket` stands for."""
        buffer = self._registry.by_ticket(ticket)
        self._registry.share(buffer, holder)
        _log_of(buffer, holder, "imported by ticket")
        return buffer

    def list_for(self, uid: int) -> list[Buffer]:
        """Return the buffers that `uid` created or holds, oldest first; all for root."""
        return self._registry.of_uid(None if uid == ROOT else uid)

    async def set_name(self, holder: Holder, buffer_id: str, name: str) -> None:
        """Rename a buffer, in the kernel's listings too."""
        buffer = self._registry.held(buffer_id, holder)
        check_name("name", name)
        # Not while the memory is being made: that has the old name by now.
        async with buffer.backing:
            self._registry.held(buffer_id, holder)
            if name == buffer.name:
                return
            if buffer.memory is not None:
                try:
                    buffer.memory.set_name(name)
                except OSError as error:
                    raise from_oserror(error, "naming the dma-buf") from error
            buffer.name = name
            self.changed(buffer, ("Name",))

    async def release(self, holder: Holder, buffer_id: str) -> None:
        """Take back one share; answers when memory that nobody holds any more has been given up."""
        buffer = self._registry.held(buffer_id, holder)
        _log_of(buffer, holder, "a share is released")
        others = set(self._disposals)
        self._registry.release(buffer, holder)
        if own := self._disposals - others:
            # So that the caller's next request finds the charge gone.
            await asyncio.wait(own)

    def drop(self, holder: Holder) -> None:
        """Take back all shares of a connection that has ended."""
        self._registry.drop(holder)

    async def settled(self) -> None:
        """Wait until the memory of every buffer that has ended so far is given up."""
        if self._disposals:
            await asyncio.wait(tuple(self._disposals))

    async def close(self) -> None:
        """End every buffer."""
        self._registry.close()
        await self.settled()

    def _check(self, spec: Mapping[str, Any]) -> Request:
        request = Request.from_spec(spec)
        self.pool.select(request)  # A refusal that is known now is told now.
        return request

    async def _back(self, buffers: list[Buffer]) -> None:
        """Make the memory of new buffers, whose locks nobody can hold yet."""
        with ExitStack() as locks:
            for buffer in buffers:
                await buffer.backing.acquire()
                locks.callback(buffer.backing.release)
            await self._make_memory(buffers)

    async def _make_memory(self, buffers: list[Buffer]) -> None:
        """Charge for and make the memory of `buffers`, whose backing locks the caller holds: all or none."""
        request = buffers[0].request
        charged: list[Buffer] = []
        try:
            for buffer in buffers:
                self._registry.charge_memory(buffer)
                charged.append(buffer)
            memories = await self._workers.submit(self._fill, request, [buffer.name for buffer in buffers])
        except BaseException:
            for buffer in charged:
                self._registry.refund_memory(buffer)
            raise
        ended = False
        for buffer, memory in zip(buffers, memories, strict=True):
            try:
                self._registry.back(buffer, memory)
            except NoSuchBuffer:
                ended = True
        if ended:
            raise NoSuchBuffer

    def _fill(self, request: Request, names: list[str]) -> list[Memory]:
        """Make memory for each name, or none. In a worker thread."""
        with ExitStack() as undo:
            memories = []
            for name in names:
                memory = self.pool.allocate(request, name)
                undo.callback(memory.close)
                memories.append(memory)
            undo.pop_all()
        return memories

    def _dup(self, buffer: Buffer) -> OwnedFd:
        if buffer.memory is None:
            raise NoSuchBuffer
        try:
            return buffer.memory.dup()
        except OSError as error:
            raise from_oserror(error, "duplicating a descriptor") from error

    def _abandon(self, buffer: Buffer, holder: Holder) -> None:
        """Undo a creation whose allocation failed; the holder may have released it, or be gone, already."""
        with suppress(NoSuchBuffer):
            self._registry.release(buffer, holder)

    def _dispose(self, memory: Memory, charge: Charge) -> None:
        """Close `memory` in a worker, for the last close frees the pages, and give the charge back after it."""
        disposal = self._workers.submit(memory.close)
        self._disposals.add(disposal)

        def done(future: asyncio.Future[None]) -> None:
            self._disposals.discard(future)
            charge.release()
            if error := future.exception():
                log.error("Closing the memory of a buffer failed", exc_info=error)

        disposal.add_done_callback(done)


def _log_of(buffer: Buffer, holder: Holder, what: str) -> None:
    """Log what happened to a buffer, with the journal fields by which it can be found."""
    fields = {"buffer": buffer.id, "uid": holder.uid, "client": holder.name}
    log.debug("Buffer %s of %d bytes: %s", buffer.id, buffer.request.size, what, extra=fields)
