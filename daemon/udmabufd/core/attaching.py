# SPDX-License-Identifier: MIT
"""The use cases of attachments: attach, detach, and what becomes of them when a device is gone.

Nothing is allocated here, and nothing moved. Whether a device's demands can be met is placement.py's decision.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from udmabufd.core.attachments import Attachment, Wish
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import AllocatorError, NoSuchDevice
from udmabufd.core.events import Event, emit
from udmabufd.core.ledger import Ledger
from udmabufd.core.placement import Placement
from udmabufd.core.registry import ATTACHMENT_PROPERTIES, Registry

log = logging.getLogger(__name__)

T = TypeVar("T")

TOLD_PER_CALL: Final = 4
"""Holders whom to tell of a change takes as long as a call does otherwise."""


class Attaching:
    """See the module.

    `detached(buffer, attachment, reason)` is called when an attachment has ended with its device, for its holder to be
    told.
    """

    def __init__(self, registry: Registry, ledger: Ledger, placement: Placement) -> None:
        self._registry = registry
        self._ledger = ledger
        self._placement = placement
        registry.attachments.unused = placement.devices.unwatch
        self.detached: Callable[[Buffer, Attachment, str], None] = lambda _buffer, _attachment, _reason: None

    async def attach(
        self, holder: Holder, buffer_id: str, name: str, constraints: Mapping[str, Any], dynamic: bool
    ) -> tuple[Buffer, Attachment]:
        """Attach the device `name` for `holder`; nothing changes if that is refused."""
        self._registry.held(buffer_id, holder)
        wish = await self._placement.wish(holder.uid, "device", name, constraints, dynamic=dynamic)
        buffer = self._registry.held(buffer_id, holder)
        async with buffer.backing:
            self._registry.held(buffer_id, holder)
            (attachment,) = self._attach(buffer, holder, [wish])
        self._count(holder, buffer)
        return buffer, attachment

    async def detach(self, holder: Holder, buffer_id: str, number: int) -> None:
        """End an attachment of `holder`."""
        registry = self._registry
        buffer = registry.held(buffer_id, holder)
        # Not while the memory is made that suits it.
        async with buffer.backing:
            registry.held(buffer_id, holder)
            registry.detach(buffer, registry.attachments.of(buffer, holder, number))
        registry.changed(buffer, ATTACHMENT_PROPERTIES)
        self._count(holder, buffer)

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
            return self._attach(buffer, holder, missing) if missing else []

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
        self._ledger.add_to_window(holder.owner, len(buffer.shares) // TOLD_PER_CALL)

    def _attach(self, buffer: Buffer, holder: Holder, wishes: Sequence[Wish]) -> list[Attachment]:
        """Attach all of `wishes` or none, while nobody makes the buffer's memory."""
        self._placement.check_attach(buffer, holder, wishes)
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
