# SPDX-License-Identifier: MIT
"""The use cases: allocate, create, wrap, import, hand out, list, rename, release: all that is decided on a call.

The order is the same in each: check what was asked, charge for it, do it, record it, answer; whatever fails is undone
before the error leaves. Runs on one event loop; what blocks goes to a worker thread. Attachments are attaching.py's,
moves moving.py's; what becomes of buffers that nobody holds, and of all of them over a restart, is in custody.py.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from udmabufd.core import wrap
from udmabufd.core.attaching import Attaching
from udmabufd.core.attachments import Wish
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.creation import Creation
from udmabufd.core.custody import Custody
from udmabufd.core.device import Device
from udmabufd.core.errors import InvalidSpec, NoSuchBuffer, from_oserror
from udmabufd.core.events import Event, emit
from udmabufd.core.identity import Identity
from udmabufd.core.ledger import ROOT, Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.maker import Maker
from udmabufd.core.moving import Moving
from udmabufd.core.placement import Placement, under
from udmabufd.core.pool import Explained
from udmabufd.core.requests import repeat_of
from udmabufd.core.spec import Request, check_name
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.core.wrapping import Wrapping
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE

log = logging.getLogger(__name__)

LISTED_PER_CALL: Final = 4
"""Buffers in a list whose making takes as long as a call does otherwise."""


@dataclass(slots=True)
class Grant:
    """A buffer, and a descriptor of it that belongs to whoever has the grant."""

    buffer: Buffer
    fd: OwnedFd


class Service:
    """What the daemon does, for callers that are known by now."""

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        placement: Placement,
        wrapper: UdmabufAllocator,
        custody: Custody,
        maker: Maker,
        identity: Identity,
        moving: Moving,
    ) -> None:
        """`wrapper` exports the memfds of clients."""
        self.limits = limits
        self.placement = placement
        self.custody = custody
        self.attaching = Attaching(custody.registry, ledger, placement, moving)
        self.moving = moving
        self._registry = custody.registry
        self._creation = Creation(custody, maker, self.attaching)
        self._ledger = ledger
        self._wrapper = wrapper
        self._maker = maker
        self._identity = identity
        self._wrapping = Wrapping(self._creation, maker, placement, wrapper, identity)

    @property
    def changed(self) -> Callable[[Buffer, tuple[str, ...]], None]:
        """Called with a buffer and those of its properties that have changed."""
        return self._registry.changed

    @changed.setter
    def changed(self, changed: Callable[[Buffer, tuple[str, ...]], None]) -> None:
        self._registry.changed = changed

    @property
    def udmabuf_available(self) -> bool:
        """Whether /dev/udmabuf can be used."""
        return self._wrapper.unavailable is None

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
        member = "Allocate" if count is None else "AllocateMany"
        asked = repeat_of(holder.owner, member, request.canonical(spec), number)

        async def make() -> list[Buffer]:
            wishes = await self._wishes(holder, spec)
            sources = self.placement.sources(under(request, wishes))
            return await self._creation.make(request, holder, wishes, asked, number, sources)

        buffers, made = await self._creation.once(
            holder, asked, make, partial(self._wishes, holder, spec, repeated=True)
        )
        with ExitStack() as undo:
            grants = []
            for buffer in buffers:
                undo.callback(self._creation.abandon, buffer, holder)
            for buffer in buffers:
                grants.append(Grant(buffer, undo.enter_context(await self._hand_out(buffer, holder))))
                _log_of(buffer, holder, "allocated" if made else "asked for again")
            undo.pop_all()
        if made:
            for buffer in buffers:
                if len(buffer.shares) > 1:
                    # Somebody imported it by ticket while it had no memory.
                    self._tell_of_memory(buffer)
        return grants

    async def create(self, holder: Holder, spec: Mapping[str, Any]) -> Buffer:
        """Make a buffer without memory, one share of it for `holder`."""
        request = self._check(spec)
        asked = repeat_of(holder.owner, "CreateBuffer", request.canonical(spec), 1)

        async def make() -> list[Buffer]:
            wishes = await self._wishes(holder, spec)
            self.placement.check(under(request, wishes))
            return [await self._creation.create(request, holder, wishes, asked, recorded=True)]

        return await self._one(holder, spec, asked, make, "created without memory")

    async def explain(self, holder: Holder, spec: Mapping[str, Any]) -> list[Explained]:
        """Return what allocate() would decide on `spec`: for each allocator, in order, why it would not be asked."""
        self.custody.check_serving()
        wishes = await self._wishes(holder, spec)
        return self.placement.pool.explain(lambda: under(Request.from_spec(spec), wishes))

    async def wrap(
        self,
        holder: Holder,
        memfds: Sequence[OwnedFd],
        ranges: Sequence[wrap.Range],
        options: Mapping[str, Any],
    ) -> Buffer:
        """Export parts of the caller's own `memfds` (borrowed) as one dma-buf, one share of it for `holder`."""
        self.custody.check_serving()
        request, given = self._wrapping.check(memfds, ranges, options)
        asked = repeat_of(holder.owner, "WrapMemfd", given, 1)

        async def make() -> list[Buffer]:
            wishes = await self._wishes(holder, options)
            return await self._wrapping.make(request, holder, wishes, asked, memfds, ranges)

        return await self._one(holder, options, asked, make, "wrapped")

    async def import_fd(self, holder: Holder, fd: OwnedFd) -> Buffer:
        """Make `holder` a holder of the buffer whose file `fd` (borrowed) is; one that lingers lives again."""
        self.custody.check_serving()
        try:
            found = self._identity.identify("fd", fd.fileno(), self._registry.files.knows)
        except OSError as error:
            raise InvalidSpec("fd", f"is no descriptor that can be looked at ({error.strerror})") from error
        lingered = False

        def share() -> Buffer:
            nonlocal lingered
            buffer = find()
            lingered = buffer.ended
            self._registry.share(buffer, holder)
            self._registry.loosen(buffer, holder)
            self._registry.use(buffer)
            return buffer

        def find() -> Buffer:
            return self._registry.files.find(found.device, found.inode)

        # Not while it moves: what the caller has would be stale by the answer.
        buffer = await self._creation.swept(holder, share, lambda: self.moving.moves.over(find()))
        if lingered:
            emit(log, Event.BUFFER_REVIVED, buffer=buffer.id, uid=holder.uid)
        _log_of(buffer, holder, "imported by its descriptor")
        return buffer

    async def import_ticket(self, holder: Holder, ticket: str) -> Buffer:
        """Make `holder` a holder of the buffer that `ticket` stands for."""
        self.custody.check_serving()

        def find() -> Buffer:
            return self._registry.by_ticket(ticket)

        def share() -> Buffer:
            # Looked up anew each time: between the two the buffer may have ended.
            buffer = find()
            self._registry.share(buffer, holder)
            return buffer

        buffer = await self._creation.swept(holder, share, lambda: self.moving.moves.over(find()))
        _log_of(buffer, holder, "imported by ticket")
        return buffer

    async def get_fd(self, holder: Holder, buffer_id: str, attachment: int | None = None) -> Grant:
        """Hand out a descriptor, for an `attachment` of the holder's if it says so; the first time, allocate."""
        buffer = self._registry.held(buffer_id, holder)
        async with buffer.backing:
            # Others may have released it, or made the memory, while this call waited.
            self._registry.held(buffer_id, holder)
            if attachment is not None:
                self._registry.attachments.of(buffer, holder, attachment)
            if buffer.memory is None:
                sources = self.placement.sources(buffer.request)([buffer.name])
                await self._maker.make([buffer], sources, asking=holder)
                _log_of(buffer, holder, "allocated")
                self._tell_of_memory(buffer)
            return Grant(buffer, await self._given(buffer, holder, loose=attachment is None))

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

    async def list_devices(self, holder: Holder) -> list[Device]:
        """Return the devices that buffers are meant for, with what is known of each."""
        async with self.placement.turn(holder.uid):
            found = await self.placement.devices.all()
        self._ledger.add_to_window(holder.owner, len(found))
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

    async def _wishes(self, holder: Holder, spec: Mapping[str, Any], *, repeated: bool = False) -> list[Wish]:
        """Look up the devices of a spec, each of which counts as a call."""
        self._ledger.add_to_window(holder.owner, len(spec.get("devices", [])))
        return await self.placement.wishes(holder.uid, spec, repeated=repeated)

    async def _one(
        self,
        holder: Holder,
        spec: Mapping[str, Any],
        asked: Repeat | None,
        make: Callable[[], Awaitable[list[Buffer]]],
        what: str,
    ) -> Buffer:
        """Make one buffer, or give `holder` a share of the one that was made when this was asked before."""
        wishes_again = partial(self._wishes, holder, spec, repeated=True)
        (buffer,), made = await self._creation.once(holder, asked, make, wishes_again)
        _log_of(buffer, holder, what if made else "asked for again")
        return buffer

    def _tell_of_memory(self, buffer: Buffer) -> None:
        rounded_up = buffer.size != buffer.request.size
        self.changed(buffer, ("State", "Serial", "Allocator", *(("Size",) if rounded_up else ())))

    async def _hand_out(self, buffer: Buffer, holder: Holder) -> OwnedFd:
        """Return a descriptor of a buffer that was made by now."""
        async with buffer.backing:
            if buffer.memory is None or holder not in buffer.shares:
                raise NoSuchBuffer
            return await self._given(buffer, holder, loose=True)

    async def _given(self, buffer: Buffer, holder: Holder, *, loose: bool) -> OwnedFd:
        """Return a descriptor for `holder`, which with `loose` none of its attachments need answer for; bring the
        memory back first if it was evicted. With the backing lock held.
        """
        if buffer.evicted:
            await self.moving.bring_back(buffer, holder)
        self._registry.use(buffer)
        memory = buffer.memory
        if memory is None or buffer.withdrawn or holder not in buffer.shares:
            raise NoSuchBuffer
        try:
            fd = memory.dup()
        except OSError as error:
            raise from_oserror(error, "duplicating a descriptor") from error
        with ExitStack() as undo:
            undo.enter_context(fd)
            if loose:
                self._registry.loosen(buffer, holder)
            undo.pop_all()
        return fd


def _log_of(buffer: Buffer, holder: Holder, what: str) -> None:
    """Log what happened to a buffer, with the journal fields by which it can be found."""
    uid, application = holder.owner
    fields = {"buffer": buffer.id, "uid": uid, "application": application, "client": holder.name}
    log.debug("Buffer %s of %d bytes: %s", buffer.id, buffer.size, what, extra=fields)
