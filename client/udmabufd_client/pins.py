# SPDX-License-Identifier: MIT
"""Pins of attachments: each call counts once, also when its answer was lost, or nobody waits for it any more.

Pins end with their attachment; when that had to be attached anew, keeper.py has them set again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary

from udmabufd_base.connection import Reply
from udmabufd_client.attachment import Attached
from udmabufd_client.attachments import Attachments, Rows
from udmabufd_client.contract import BUFFER_INTERFACE
from udmabufd_client.errors import CallTimedOut, InvalidSpec, NoSuchBuffer, ServiceRestarted, UdmabufError
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share

log = logging.getLogger(__name__)

Left = Callable[[], float]
"""Tells how many seconds are left."""


class Pins:
    """The pins of one session. Belongs to the loop; all raise UdmabufError."""

    def __init__(self, session: Session, attachments: Attachments) -> None:
        self._session = session
        self._attachments = attachments
        self._locks: WeakKeyDictionary[Attached, asyncio.Lock] = WeakKeyDictionary()

    async def pin(self, attached: Attached, left: Left) -> None:
        """Pin: hold the buffer in place once more. Waits while it is being moved. InvalidSpec when it has ended."""
        await self._change(attached, "Pin", 1, left)

    async def unpin(self, attached: Attached, left: Left) -> None:
        """Unpin: take back one pin. Nothing when the attachment has ended: its pins have with it."""
        if not attached.reason and not attached.share.released:
            try:
                await self._change(attached, "Unpin", -1, left)
            except (InvalidSpec, NoSuchBuffer):
                if not attached.reason and not attached.share.released:
                    raise

    async def restore(self, attached: Attached) -> None:
        """Pin as often as before what had to be attached anew, on a share that is not known to be held yet."""
        share, left = attached.share, self._session.home.countdown(DEFAULT_TIMEOUT)
        present = attached.pins and self._present(attached, await self._attachments.read(share, share.path, left()))
        for before in range(present, attached.pins):
            while not await self._attempt(attached, share.path, "Pin", before + 1, left):
                pass

    async def _change(self, attached: Attached, member: str, by: int, left: Left) -> None:
        # One at a time: whether an unanswered one has taken effect shows in the number of pins.
        lock = self._locks.setdefault(attached, asyncio.Lock())
        limit = left()
        try:
            async with asyncio.timeout(limit):
                await lock.acquire()
        except TimeoutError:
            raise CallTimedOut(f"{member}: the pins before this one took longer than {limit:g} s.") from None
        try:
            while not await self._attempt(attached, attached.share, member, attached.pins + by, left):
                pass
            attached.pins += by
        finally:
            lock.release()

    async def _attempt(self, attached: Attached, target: Share | str, member: str, expected: int, left: Left) -> bool:
        """Make the call once, after which there are so many pins; False if it had no effect for want of a service."""

        def body() -> list[int]:
            if attached.reason or attached.share.released or not attached.number:
                raise InvalidSpec(f"attachment: that of {attached.device} has ended: {attached.reason or 'released'}.")
            return [attached.number]

        def late(_: Reply) -> None:
            # A Pin waits for moves, its caller perhaps not so long: nobody would take it back. One of restore()'s is
            # found by its next attempt, and counts.
            if member == "Unpin":
                attached.pins -= 1
            elif isinstance(target, Share) and attached.live and not attached.share.released:
                self._session.background.post(self._take_back(attached))

        try:
            await self._session.bring(
                target, BUFFER_INTERFACE, member, body, left(), again=False, take=lambda _: None, refuse=late
            )
        except ServiceRestarted:
            if not left():
                raise
            rows = await self._attachments.read(attached.share, target, left())
            return self._present(attached, rows) == expected
        return True

    async def _take_back(self, attached: Attached) -> None:
        link, body = self._session.link, [attached.number]
        try:
            await self._session.ask(
                attached.share.path, BUFFER_INTERFACE, "Unpin", body, DEFAULT_TIMEOUT, again=False, only=link
            )
        except UdmabufError as error:
            log.info("Attachment %d of buffer %s stays pinned: %s", attached.number, attached.share.id, error)

    def _present(self, attached: Attached, rows: Rows) -> int:
        """Return how often the service says that it is pinned."""
        return sum(row.pins for row in rows or () if row.own and row.number == attached.number)
