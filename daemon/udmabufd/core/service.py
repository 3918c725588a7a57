# SPDX-License-Identifier: MIT
"""The use cases: allocate, create, wrap, import, hand out, list, rename, release: all that is decided on a call.

The order is the same in each: check what was asked, charge for it, do it, record it, answer; whatever fails is undone
before the error leaves. Runs on one event loop; what blocks goes to a worker thread. What becomes of buffers that
nobody holds, and of all of them over a restart, is in custody.py.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from udmabufd.core import wrap
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.custody import Custody
from udmabufd.core.errors import BadMemfd, InvalidSpec, NoSuchBuffer, QuotaExceeded, from_oserror
from udmabufd.core.events import Event, emit
from udmabufd.core.identity import Identity
from udmabufd.core.lanes import Lanes
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.maker import Maker, Run
from udmabufd.core.memory import Memory
from udmabufd.core.pool import Pool
from udmabufd.core.requests import numbered, repeat_of
from udmabufd.core.spec import Request, check_name
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.linux import fill, memfd
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE

log = logging.getLogger(__name__)

ROOT: Final = 0

LISTED_PER_CALL: Final = 4
"""Buffers in a list whose making takes as long as a call does otherwise."""

T = TypeVar("T")


@dataclass(slots=True)
class Grant:
    """A buffer, and a descriptor of it that belongs to whoever has the grant."""

    buffer: Buffer
    fd: OwnedFd


class Service:
    """What the daemon does, for callers that are known by now.

    `changed(buffer, properties)` is called after properties of a buffer have changed.
    """

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        pool: Pool,
        wrapper: UdmabufAllocator,
        custody: Custody,
        maker: Maker,
        identity: Identity,
    ) -> None:
        """`wrapper` exports the memfds of clients."""
        self.limits = limits
        self.pool = pool
        self.custody = custody
        self._registry = custody.registry
        self._ledger = ledger
        self._wrapper = wrapper
        self._maker = maker
        self._identity = identity
        self._lanes = Lanes()
        self.changed: Callable[[Buffer, tuple[str, ...]], None] = lambda _buffer, _properties: None

    @property
    def buffer_count(self) -> int:
        """Buffers of all users, lingering ones included."""
        return len(self._registry)

    @property
    def byte_count(self) -> int:
        """Bytes charged to all users."""
        return self._ledger.total(Resource.BYTES) + self._ledger.total(Resource.WRAPPED)

    async def allocate(self, holder: Holder, spec: Mapping[str, Any], count: int | None = None) -> list[Grant]:
        """Make a buffer with memory, or `count` alike, one share of each for `holder`: all of them or none."""
        number = 1 if count is None else count
        if not 1 <= number <= MAX_FDS_PER_MESSAGE:
            raise InvalidSpec("count", f"must be 1 to {MAX_FDS_PER_MESSAGE}, not {number}")
        request = self._check(spec)
        asked = repeat_of(holder.owner, "Allocate" if count is None else "AllocateMany", spec, number)

        async def make() -> list[Buffer]:
            self.pool.select(request)  # A refusal that is known now is told now.
            return await self._make(request, holder, asked, number, partial(self._fill, request))

        buffers, made = await self.custody.requests.once(asked, make)
        with ExitStack() as undo:
            grants = []
            for buffer in buffers:
                if not made:
                    self._registry.share(buffer, holder, repeated=True)
                undo.callback(self._abandon, buffer, holder)
                grants.append(Grant(buffer, undo.enter_context(self._dup(buffer))))
                _log_of(buffer, holder, "allocated" if made else "asked for again")
            undo.pop_all()
        if made:
            for buffer in buffers:
                if len(buffer.shares) > 1:
                    # Somebody imported it by ticket while it had no memory.
                    self.changed(buffer, ("State", "Serial", "Allocator"))
        return grants

    async def create(self, holder: Holder, spec: Mapping[str, Any]) -> Buffer:
        """Make a buffer without memory, one share of it for `holder`."""
        request = self._check(spec)
        asked = repeat_of(holder.owner, "CreateBuffer", spec, 1)

        async def make() -> list[Buffer]:
            self.pool.select(request)
            return [await self._create(request, holder, asked, recorded=True)]

        return await self._one(holder, asked, make, "created without memory")

    async def wrap(
        self,
        holder: Holder,
        memfds: Sequence[OwnedFd],
        ranges: Sequence[wrap.Range],
        options: Mapping[str, Any],
    ) -> Buffer:
        """Export parts of the caller's own `memfds` (borrowed) as one dma-buf, one share of it for `holder`."""
        self.custody.check_serving()
        pages = []
        for index, fd in enumerate(memfds):
            if (page := self._identity.memfd_page(fd.fileno())) is None:
                raise BadMemfd(f"memfd {index} is no memfd")
            pages.append(page)
        size = wrap.check(memfds, ranges, pages)
        named = {key: value for key, value in options.items() if key == "name"}
        request = Request.from_spec({"size": size, **named}).wrapping()
        files = [self._identity.of(fd.fileno()) for fd in memfds]
        asked = repeat_of(holder.owner, "WrapMemfd", {**options, "memfds": files, "ranges": list(ranges)}, 1)

        async def make() -> list[Buffer]:
            if (refusal := self._wrapper.refusal(size, len(ranges))) is not None:
                raise refusal
            if holder.uid != ROOT:
                self._maker.check_left_behind()
            export = wrap.exporter(self._wrapper, memfds, ranges, privileged=holder.uid == ROOT)
            async with self._lanes.turn(holder.uid):
                return await self._make(request, holder, asked, 1, export, partial(self._lanes.run, holder.uid))

        return await self._one(holder, asked, make, "wrapped")

    async def import_fd(self, holder: Holder, fd: OwnedFd) -> Buffer:
        """Make `holder` a holder of the buffer whose file `fd` (borrowed) is; one that lingers lives again."""
        self.custody.check_serving()
        try:
            found = self._identity.identify("fd", fd.fileno(), self._registry.knows_file)
        except OSError as error:
            raise InvalidSpec("fd", f"is no descriptor that can be looked at ({error.strerror})") from error
        lingered = False

        def share() -> Buffer:
            nonlocal lingered
            buffer = self._registry.by_file(found.device, found.inode)
            lingered = buffer.ended
            self._registry.share(buffer, holder)
            return buffer

        buffer = await self._swept(holder, share)
        if lingered:
            emit(log, Event.BUFFER_REVIVED, buffer=buffer.id, uid=holder.uid)
        _log_of(buffer, holder, "imported by its descriptor")
        return buffer

    async def import_ticket(self, holder: Holder, ticket: str) -> Buffer:
        """Make `holder` a holder of the buffer that `ticket` stands for."""
        self.custody.check_serving()

        def share() -> Buffer:
            # Looked up anew each time: between the two the buffer may have ended.
            buffer = self._registry.by_ticket(ticket)
            self._registry.share(buffer, holder)
            return buffer

        buffer = await self._swept(holder, share)
        _log_of(buffer, holder, "imported by ticket")
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
                    await self._maker.make([buffer], partial(self._fill, buffer.request, [buffer.name]))
                except QuotaExceeded:
                    if holder.uid == buffer.payer.uid:
                        raise
                    # The figures are another user's.
                    limit = self.limits.max_bytes_per_user
                    raise QuotaExceeded(
                        f"size: the user who created the buffer would exceed the limit max_bytes_per_user of {limit}"
                    ) from None
                _log_of(buffer, holder, "allocated")
                self.changed(buffer, ("State", "Serial", "Allocator"))
        return Grant(buffer, self._dup(buffer))

    def answered(self, holder: Holder, buffers: Sequence[Buffer]) -> None:
        """Take notice that the call by which `holder` has `buffers` was answered: one that may be repeated matters."""
        for buffer in buffers:
            if buffer.repeat is not None:
                self._registry.answered(buffer, holder)

    def get(self, holder: Holder, buffer_id: str) -> Buffer:
        """Return a buffer that `holder` has a share of."""
        return self._registry.held(buffer_id, holder)

    def list_for(self, owner: Owner) -> list[Buffer]:
        """Return the buffers that `owner` holds or is charged for, oldest first; all for root."""
        found = self._registry.visible_to(None if owner.uid == ROOT else owner)
        self._ledger.add_to_window(owner, len(found) // LISTED_PER_CALL)
        return found

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
            self._registry.rename(buffer, name)
            self.changed(buffer, ("Name",))

    async def release(self, holder: Holder, buffer_id: str) -> None:
        """Take back one share; answers when memory that nobody references any more has been given up."""
        buffer = self._registry.held(buffer_id, holder)
        _log_of(buffer, holder, "a share is released")
        self._registry.release(buffer, holder)
        # So that the caller's next request finds the charge gone.
        await self.custody.lingering.looked(buffer)
        if buffer.ended and buffer not in self._registry:
            await self.custody.settled()

    def drop(self, holder: Holder) -> None:
        """Take back all shares of a connection that has ended."""
        self._registry.drop(holder)

    def _check(self, spec: Mapping[str, Any]) -> Request:
        self.custody.check_serving()
        return Request.from_spec(spec)

    async def _one(
        self, holder: Holder, asked: Repeat | None, make: Callable[[], Awaitable[list[Buffer]]], what: str
    ) -> Buffer:
        """Make one buffer, or give `holder` a share of the one that was made when this was asked before."""
        (buffer,), made = await self.custody.requests.once(asked, make)
        if not made:
            self._registry.share(buffer, holder, repeated=True)
        _log_of(buffer, holder, what if made else "asked for again")
        return buffer

    async def _make(
        self,
        request: Request,
        holder: Holder,
        asked: Repeat | None,
        count: int,
        make_memory: Callable[[Sequence[str], bool], list[Memory]],
        run: Run | None = None,
    ) -> list[Buffer]:
        """Make `count` buffers with memory: all or none."""
        with ExitStack() as locks, ExitStack() as undo:
            buffers = []
            for index in range(count):
                buffer = await self._create(request, holder, numbered(asked, index))
                undo.callback(self.custody.abandon, buffer, holder)
                # At once: nobody else may give it memory while the others are made.
                await buffer.backing.acquire()
                locks.callback(buffer.backing.release)
                buffers.append(buffer)
            names = [buffer.name for buffer in buffers]
            await self._maker.make(buffers, partial(make_memory, names), run)
            if any(holder not in buffer.shares for buffer in buffers):
                # Released while the others were made; its memory may be a mere witness by now.
                raise NoSuchBuffer
            undo.pop_all()
        return buffers

    async def _create(
        self, request: Request, holder: Holder, repeat: Repeat | None, *, recorded: bool = False
    ) -> Buffer:
        return await self._swept(
            holder, lambda: self._registry.create(request, holder, repeat=repeat, recorded=recorded)
        )

    async def _swept(self, holder: Holder, step: Callable[[], T]) -> T:
        """Do `step`; if a quota forbids it, once more after what the user has let go of was looked at."""
        try:
            return step()
        except QuotaExceeded:
            await self.custody.lingering.look_again(holder.uid)
            return step()

    def _fill(self, request: Request, names: Sequence[str], close: bool) -> list[Memory]:
        """Make memory for each name, or none; in a child if the limit is `close`. In a worker thread."""
        return self.pool.allocate_all(request, names, fill.populate_in_child if close else memfd.populate)

    def _dup(self, buffer: Buffer) -> OwnedFd:
        if buffer.memory is None:
            raise NoSuchBuffer
        try:
            return buffer.memory.dup()
        except OSError as error:
            raise from_oserror(error, "duplicating a descriptor") from error

    def _abandon(self, buffer: Buffer, holder: Holder) -> None:
        """Undo a share of a call that failed; the holder may have released it, or be gone, already."""
        with suppress(NoSuchBuffer):
            self._registry.release(buffer, holder)


def _log_of(buffer: Buffer, holder: Holder, what: str) -> None:
    """Log what happened to a buffer, with the journal fields by which it can be found."""
    uid, application = holder.owner
    fields = {"buffer": buffer.id, "uid": uid, "application": application, "client": holder.name}
    log.debug("Buffer %s of %d bytes: %s", buffer.id, buffer.request.size, what, extra=fields)
