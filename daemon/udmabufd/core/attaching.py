# SPDX-License-Identifier: MIT
"""The use cases of attachments: attach, detach, and what becomes of them when a device is gone.

Nothing is allocated here. Whether a device's demands can be met is placement.py's decision; memory that does not suit
it is moved by moving.py, while everybody who needs that memory waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from udmabufd.core.attachments import Attachment, Wish
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import AllocatorError, Busy, MoveTimedOut, NoSuchDevice
from udmabufd.core.events import Event, emit
from udmabufd.core.ledger import Ledger, Resource
from udmabufd.core.moving import Moving
from udmabufd.core.placement import Placement
from udmabufd.core.registry import ATTACHMENT_PROPERTIES, Registry

log = logging.getLogger(__name__)

T = TypeVar("T")


class Attached(NamedTuple):
    """A device that was attached. `moved_to` is the serial that the buffer got for it, 0 if it has not moved."""

    buffer: Buffer
    attachment: Attachment
    moved_to: int


class Attaching:
    """See the module.

    `detached(buffer, attachment, reason)` is called when an attachment has ended with its device, for its holder to be
    told.
    """

    def __init__(self, registry: Registry, ledger: Ledger, placement: Placement, moving: Moving) -> None:
        self._registry = registry
        self._ledger = ledger
        self._placement = placement
        self._moving = moving
        registry.attachments.unused = placement.devices.unwatch
        self.detached: Callable[[Buffer, Attachment, str], None] = lambda _buffer, _attachment, _reason: None

    async def attach(
        self, holder: Holder, buffer_id: str, name: str, constraints: Mapping[str, Any], dynamic: bool
    ) -> Attached:
        """Attach the device `name` for `holder`; nothing changes if that is refused. answered() is to follow."""
        self._registry.held(buffer_id, holder)
        wish = await self._placement.wish(holder.uid, "device", name, constraints, dynamic=dynamic)
        buffer = self._registry.held(buffer_id, holder)
        since = asyncio.get_running_loop().time()
        async with buffer.backing:
            self._registry.held(buffer_id, holder)
            before = buffer.serial
            (attachment,) = await self._attach(buffer, holder, [wish], since)
            moved = buffer.serial != before
        self._count(holder, buffer)
        return Attached(buffer, attachment, buffer.serial if moved else 0)

    def answered(self, attached: Attached) -> None:
        """Take notice that the caller of attach() knows the number of its attachment: if the buffer has moved for it,
        it is told so as all others were.
        """
        if attached.moved_to and attached.attachment.wish.dynamic:
            self._moving.moves.tell_moved(attached.buffer, attached.attachment, attached.moved_to)

    async def detach(self, holder: Holder, buffer_id: str, number: int) -> None:
        """End an attachment of `holder`."""
        registry = self._registry
        buffer = registry.held(buffer_id, holder)
        if buffer in self._moving.moves:
            # It is what the move waits for.
            self._detach(buffer, holder, number)
        else:
            # Not while the memory is made that suits it.
            async with buffer.backing:
                self._detach(registry.held(buffer_id, holder), holder, number)
        self._count(holder, buffer)

    async def pin(self, holder: Holder, buffer_id: str, number: int) -> None:
        """Hold a buffer in place for an attachment of `holder`."""
        buffer = self._registry.held(buffer_id, holder)
        async with buffer.backing:
            self._registry.held(buffer_id, holder)
            self._pin(buffer, holder, number, 1)

    def unpin(self, holder: Holder, buffer_id: str, number: int) -> None:
        """Take back a pin."""
        self._pin(self._registry.held(buffer_id, holder), holder, number, -1)

    async def attach_again(self, buffer: Buffer, holder: Holder, wishes: Sequence[Wish]) -> list[Attachment]:
        """Have `holder`, which asked again for what was made for it or for another of its user's connections, have the
        attachments that it asks for; return those that it had not, for it may have some of them.
        """
        if not wishes:
            return []
        async with buffer.backing:
            there = Counter(a.wish.device for a in buffer.attachments.values() if a.holder is holder)
            missing = []
            for wish in wishes:
                if there[wish.device]:
                    there[wish.device] -= 1
                else:
                    missing.append(wish)
            return await self._attach(buffer, holder, missing) if missing else []

    def undo(self, buffer: Buffer, attachments: Iterable[Attachment]) -> None:
        """End what a call attached that failed afterwards, as far as it is there yet."""
        for attachment in attachments:
            if buffer.attachments.get(attachment.number) is attachment:
                self._registry.detach(buffer, attachment)
                self._registry.changed(buffer, ATTACHMENT_PROPERTIES)

    def watched(self, wishes: Sequence[Wish], attach: Callable[[], T]) -> T:
        """Do `attach`, which attaches the wished devices, with their end told from now on. Raises NoSuchDevice when
        one has gone since it was found, and what `attach` does.
        """
        try:
            for wish in wishes:
                if wish.found is not None:
                    self._placement.devices.watch(wish.found)
            return attach()
        except BaseException:
            for wish in wishes:
                if not self._registry.attachments.at(wish.path):
                    self._placement.devices.unwatch(wish.path)
            raise

    def _count(self, holder: Holder, buffer: Buffer) -> None:
        """Count the call as as many as the holders that are told of it are worth."""
        self._registry.billing.count_told(holder.owner, len(buffer.shares))

    def _detach(self, buffer: Buffer, holder: Holder, number: int) -> None:
        self._registry.detach(buffer, self._registry.attachments.of(buffer, holder, number))
        self._registry.changed(buffer, ATTACHMENT_PROPERTIES)

    def _pin(self, buffer: Buffer, holder: Holder, number: int, by: int) -> None:
        attachments = self._registry.attachments
        attachments.pin(buffer, attachments.of(buffer, holder, number), by)
        self._registry.changed(buffer, ("Attachments",))

    async def _attach(
        self, buffer: Buffer, holder: Holder, wishes: Sequence[Wish], since: float = math.inf
    ) -> list[Attachment]:
        """Attach all of `wishes` or none, with the backing lock held, for which the call has waited `since` then."""
        needed = self._placement.check_attach(buffer, holder, wishes)
        if needed is not None:
            if since <= buffer.timed_out:
                # Else as many moves as calls have waited would keep everybody waiting, each as long as the first.
                raise MoveTimedOut("The importers did not answer the move that this call has waited for; try again")
            dynamic = all(wish.dynamic for wish in wishes)
            # Before anything moves for it: there will be room for the attachments, too.
            with self._ledger.charge(holder.owner, Resource.ATTACHMENTS, len(wishes)):
                await self._moving.make_room(buffer, holder, needed, dynamic=dynamic)
            if (still := self._placement.check_attach(buffer, holder, wishes)) is not None:
                raise Busy(f"{still.reason}, also after the buffer has moved for it")
        attachments = self.watched(wishes, lambda: self._registry.attach(buffer, holder, wishes))
        self._registry.changed(buffer, ATTACHMENT_PROPERTIES)
        return attachments

    def gone(self, path: str) -> None:
        """End what is attached to the device that sysfs had at `path`, and tell the holders."""
        ended = self._registry.attachments.at(path)
        if not ended:
            return
        buffers = defaultdict(list)
        for buffer, attachment in ended:
            if buffer.memory is not None and not buffer.evicted:
                # What it may have got for this device is nobody's to answer for any more. Recorded first: a kill in
                # between must not leave it with a descriptor and without either.
                self._registry.loosen(buffer, attachment.holder, beside=attachment)
            self._registry.detach(buffer, attachment)
            self.detached(buffer, attachment, f"{attachment.wish.device} is gone")
            buffers[buffer].append(attachment)
        for buffer in buffers:
            self._registry.changed(buffer, ATTACHMENT_PROPERTIES)
        emit(log, Event.DEVICE_GONE, device=ended[0][1].wish.device, count=len(ended))

    async def resume(self) -> None:
        """Follow the devices of the former run's attachments; those that went meanwhile are gone."""
        attachments, devices = self._registry.attachments, self._placement.devices
        for path in attachments:
            try:
                device = await devices.find(path)
                # Whoever attached it may be gone by now.
                if attachments.at(path):
                    devices.watch(device)
            except NoSuchDevice as error:
                log.info("A device that buffers are attached to is gone: %s", error)
                self.gone(path)
            except AllocatorError as error:
                # What was demanded when it was attached stands.
                log.warning("A device that buffers are attached to cannot be followed: %s", error)
