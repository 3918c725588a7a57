# SPDX-License-Identifier: MIT
"""Calls of this client that can give a buffer other memory by themselves: Move, Attach, and Evict.

To the service such a call says that its caller has stopped using the memory, so nobody in this process may use it
meanwhile. Moves that others cause are moves.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from udmabufd_base.codec import Variant
from udmabufd_client.attachment import Attached
from udmabufd_client.attachments import Attachments
from udmabufd_client.background import pauses
from udmabufd_client.contract import BUFFER_INTERFACE, MOVE_TIMEOUT_MAX, State
from udmabufd_client.descriptors import Descriptors
from udmabufd_client.errors import Busy, CallTimedOut, NoSuchBuffer, ServiceUnavailable, UdmabufError
from udmabufd_client.pins import Pins
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares
from udmabufd_client.stillness import Stillness

log = logging.getLogger(__name__)

Left = Callable[[], float]
"""Tells how many seconds are left."""

_LONGEST_WAIT: Final = MOVE_TIMEOUT_MAX / 1000
"""Seconds that others would have, too, to stop using the memory."""


class OwnMoves:
    """The calls of one session. Belongs to the loop; all raise UdmabufError."""

    def __init__(
        self, session: Session, shares: Shares, attachments: Attachments, pins: Pins, descriptors: Descriptors
    ) -> None:
        self._session = session
        self._shares = shares
        self._attachments = attachments
        self._pins = pins
        self._descriptors = descriptors

    async def move(self, share: Share, options: Mapping[str, Variant], left: Left) -> int:
        """Move: give the buffer other memory, and return its serial."""
        async with self._still(share, left):
            (serial,) = await self._session.ask(share, BUFFER_INTERFACE, "Move", [options], left(), again=False)
            await self._descriptors.follow(share.path, serial)
        return int(serial)

    async def evict(self, share: Share, left: Left) -> None:
        """Evict: free the memory until its next use. This client's own attachments are asked like others'."""
        await self._session.ask(share, BUFFER_INTERFACE, "Evict", [], left(), again=False)
        # The signal that tells of the state may come after the reply.
        with suppress(UdmabufError):
            await self._attachments.read(share, share, left())

    async def attach(self, share: Share, device: str, options: Mapping[str, Variant], left: Left) -> Attached:
        """Attach. What may move the buffer is first tried so that it cannot, while the memory is mapped here."""
        mine = self._movable(share)
        dynamic = "dynamic" in options and bool(options["dynamic"].value)
        if not (mine or dynamic):
            # A static attachment beside a descriptor holds the buffer in place: it is never moved for that.
            return await self._attachments.attach(share, device, options, left)
        why = ""
        if not all(each.memory.gate.idle for each in self._all(share)):
            try:
                return await self._attach_in_place(share, device, options, mine, left)
            except Busy as error:
                why = f" Without a move the service says: {error}"
        async with self._still(share, left, why) as go_on:
            attached = await self._attachments.attach(share, device, options, left)
            if not self._has_fd(share):
                return attached
            try:
                await self._learn(share, left())
            except UdmabufError as error:
                log.debug("Properties of buffer %s could not be read: %s", share.id, error)
                go_on()
            except asyncio.CancelledError:
                self._attachments.unwanted(attached)
                raise
        return attached

    async def _attach_in_place(
        self, share: Share, device: str, options: Mapping[str, Variant], mine: Attached | None, left: Left
    ) -> Attached:
        """Attach if the memory suits as it is: Busy otherwise."""
        if mine is not None:
            await self._pins.pin(mine, left)
            let_go = self._unpin(mine)
        else:
            static = {key: value for key, value in options.items() if key != "dynamic"}
            let_go = self._detach(await self._attachments.attach(share, device, static, left))
        try:
            attached = await self._attachments.attach(share, device, options, left)
        finally:
            gone = self._session.background.post(let_go)
        try:
            # What follows on this call, here or in another program, is not to find the buffer held in place by it.
            await asyncio.wait([gone], timeout=left())
        except asyncio.CancelledError:
            self._attachments.unwanted(attached)
            raise
        return attached

    # Parts of the above

    async def _unpin(self, attached: Attached) -> None:
        try:
            await self._pins.unpin(attached, self._session.home.countdown(DEFAULT_TIMEOUT))
        except UdmabufError as error:
            log.info("Attachment %d of buffer %s stays pinned: %s", attached.number, attached.share.id, error)

    async def _detach(self, attached: Attached) -> None:
        try:
            await self._attachments.detach(attached, DEFAULT_TIMEOUT)
        except UdmabufError as error:
            log.info("Attachment %d of buffer %s stays: %s", attached.number, attached.share.id, error)

    def _all(self, share: Share) -> list[Share]:
        return [share, *(other for other in self._shares.of(share.path) if other is not share)]

    def _has_fd(self, share: Share) -> bool:
        return any(each.memory.has_fd for each in self._all(share))

    def _movable(self, share: Share) -> Attached | None:
        known = [each for one in self._all(share) for each in one.attachments if each.dynamic and each.live]
        return known[0] if known else None

    @asynccontextmanager
    async def _still(self, share: Share, left: Left, why: str = "") -> AsyncIterator[Callable[[], None]]:
        """Have nobody of this process use the memory in the block, nor afterwards if that failed in a way that leaves
        open what memory there is, or what is yielded was called: not before it is known.
        """
        gates = [each.memory.gate for each in self._all(share)]
        stillness = Stillness(self._session, gates, left())
        handed_on = False

        def go_on() -> None:
            nonlocal handed_on
            if self._session.alive and not handed_on and self._has_fd(share):
                handed_on = True
                self._session.background.start(self._until_known(share, stillness))

        try:
            try:
                async with asyncio.timeout(min(left(), _LONGEST_WAIT)):
                    await stillness.wait()
            except TimeoutError:
                raise Busy(
                    f"Buffer {share.id} would have to move and is mapped in this process: let go of maps and arrays."
                    f"{why}"
                ) from None
            try:
                yield go_on
            except (CallTimedOut, ServiceUnavailable, asyncio.CancelledError):
                go_on()
                raise
        finally:
            if not handed_on:
                stillness.end()

    async def _until_known(self, share: Share, stillness: Stillness) -> None:
        try:
            for pause in pauses():
                try:
                    await self._learn(share, DEFAULT_TIMEOUT)
                except NoSuchBuffer:
                    return
                except UdmabufError as error:
                    log.debug("Properties of buffer %s could not be read: %s", share.id, error)
                    if not self._session.reconnect and self._session.link.lost is not None:
                        return
                else:
                    if share.state != State.MOVING:
                        return
                if share.released:
                    return
                await asyncio.sleep(pause)
        finally:
            stillness.end()

    async def _learn(self, share: Share, timeout: float) -> None:
        """Read which memory the buffer has, and have the descriptor of that."""
        await self._attachments.read(share, share, timeout)
        if share.info.serial and share.state != State.MOVING:
            await self._descriptors.follow(share.path, share.info.serial)
