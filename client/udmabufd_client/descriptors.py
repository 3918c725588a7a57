# SPDX-License-Identifier: MIT
"""Descriptors and tickets of buffers: asked for, replaced when the memory was, and had back after an eviction.

When memory is given up is left to moves.py, what a Buffer does with its descriptor to buffer.py and memory.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

from udmabufd_base.codec import Variant
from udmabufd_base.fd import OwnedFd
from udmabufd_client.attachment import Attached
from udmabufd_client.background import pauses
from udmabufd_client.contract import BUFFER_INTERFACE, Kind
from udmabufd_client.errors import (
    CallTimedOut,
    InvalidSpec,
    MoveTimedOut,
    NoSuchBuffer,
    OutOfMemory,
    QuotaExceeded,
    RateLimited,
    ServiceUnavailable,
    UdmabufError,
)
from udmabufd_client.info import BufferInfo
from udmabufd_client.link import fds_of, steal_fds
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares
from udmabufd_client.stillness import opened

log = logging.getLogger(__name__)

_PASSING: Final = (RateLimited, QuotaExceeded, OutOfMemory, ServiceUnavailable, CallTimedOut)
"""What may be otherwise a little later."""

_PATIENCE: Final = 10.0
"""Seconds for which the descriptor of new memory is asked for, while those who want to map it wait."""

_SLACK: Final = 2.0


class Descriptors:
    """The descriptors of one session's buffers. Belongs to the loop, but for what says otherwise."""

    def __init__(self, session: Session, shares: Shares, timeout: float) -> None:
        self._session = session
        self._shares = shares
        self._timeout = timeout
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def obtain(self, share: Share, attachment: Attached | int | None, left: Callable[[], float]) -> None:
        """Have the Buffer own a descriptor: GetFd, also when it has one if it is for an attachment.

        The first call allocates the buffer's memory; one of an evicted buffer brings it back. Waits while the memory
        is given up. Raises UdmabufError.
        """
        limit = left()
        try:
            async with asyncio.timeout(limit):
                await opened(share.memory.gate)
        except TimeoutError:
            raise MoveTimedOut(
                f"Buffer {share.id} is being moved, and was not to be had in {limit:g} s. Try again, or give it more "
                "time: a copy that takes longer goes on."
            ) from None
        if attachment is not None or not share.memory.has_fd:
            fd, info = await self._get_fd(share, attachment, left())
            share.memory.take(fd, info)

    def bring_back(self, share: Share) -> None:
        """obtain() for one whose descriptor was given up with its memory, from any thread but the loop's.

        Raises UdmabufError, and ValueError on the loop, which must not wait for itself.
        """
        if self._session.home.here:
            raise ValueError(f"buffer {share.id} was evicted, and the event loop must not wait: await get_fd() first")
        self._session.check()
        left = self._session.home.countdown(self._timeout)
        self._session.home.wait(self.obtain(share, None, left), self._timeout + _SLACK)

    async def refresh(self, share: Share, fd: OwnedFd, info: BufferInfo, left: Callable[[], float]) -> None:
        """Take `fd`, with which somebody else passed the buffer on: it may be of memory that it no longer has.

        Of a dma-buf that is evicted no inode is told: whatever `fd` is of, it is not that.
        """
        share.memory.take(fd, info)
        number = share.memory.fileno()
        known = info.inode is not None or info.kind == Kind.DMA_BUF
        if known and number is not None and os.fstat(number).st_ino != info.inode:
            share.memory.send_away()
            await self.obtain(share, None, left)

    async def follow(self, path: str, serial: int, *, other: bool = False) -> None:
        """Replace the descriptors that are of older memory, or with `other` of any other, than `serial`'s.

        One whose replacement cannot be had is closed, and comes back at the next use; it stays if there is nothing
        to ask for any more.
        """
        async with self._locks.setdefault(path, asyncio.Lock()):
            stale = [
                share
                for share in self._shares.of(path)
                if (share.memory.other_than(serial) if other else share.memory.older_than(serial))
            ]
            await self._replace(stale)

    async def restore(self, path: str) -> None:
        """Have back what was closed for an eviction that did not take place."""
        async with self._locks.setdefault(path, asyncio.Lock()):
            await self._replace([share for share in self._shares.of(path) if share.memory.away])

    async def _replace(self, stale: list[Share]) -> None:
        if not stale:
            return
        try:
            fd, info = await self._patiently(stale[0])
            with fd:
                for share in stale:
                    share.memory.replace(fd.dup(), info)
        except NoSuchBuffer as error:
            log.info("Buffer %s has no new descriptor: %s", stale[0].id, error)
        except (UdmabufError, OSError) as error:
            log.warning("Buffer %s has no descriptor until its next use: %s", stale[0].id, error)
            if self._served:
                for share in stale:
                    share.memory.send_away()

    @property
    def _served(self) -> bool:
        """Whether there is a service to be called, now or when the bus is back."""
        return self._session.alive and (self._session.reconnect or self._session.link.lost is None)

    async def _patiently(self, share: Share) -> tuple[OwnedFd, BufferInfo]:
        left = self._session.home.countdown(_PATIENCE)
        for pause in pauses():
            try:
                return await self._get_fd(share, None, max(left(), 1.0))
            except _PASSING as error:
                if not left() or not self._served or share.released:
                    raise
                log.debug("GetFd of %s is made again: %s", share.id, error)
            await asyncio.sleep(pause)
        raise AssertionError("pauses() has no end")

    async def _get_fd(
        self, share: Share, attachment: Attached | int | None, timeout: float
    ) -> tuple[OwnedFd, BufferInfo]:
        """GetFd: a descriptor, and what the service says of the memory behind it, which all shares are told."""
        if isinstance(attachment, Attached) and attachment.share.path != share.path:
            raise InvalidSpec(f"attachment: {attachment.device} is attached to another buffer.")

        def body() -> list[dict[str, Variant]]:
            if isinstance(attachment, Attached) and (attachment.reason or not attachment.number):
                raise InvalidSpec(f"attachment: that of {attachment.device} has ended: {attachment.reason}.")
            wanted = self._movable(share) if attachment is None else attachment
            number = wanted.number if isinstance(wanted, Attached) else wanted
            return [{} if number is None else {"attachment": Variant("u", number)}]

        told = {*self._shares.of(share.path), share}
        for each in told:
            each.expect()
        reply = await self._session.call(share, BUFFER_INTERFACE, "GetFd", body, timeout, again=True)
        with fds_of(reply):
            index, raw = reply.body
            info = BufferInfo.parse(raw)
            fd = steal_fds(reply, [index])[0]
        for each in told:
            each.told_info(info)
        return fd, info

    def _movable(self, share: Share) -> Attached | None:
        """Return an attachment that answers for the descriptor when the buffer is moved: without one it could not."""
        shares = [share, *self._shares.of(share.path)]
        known = [each for one in shares for each in one.attachments if each.dynamic and each.live and each.number]
        return known[0] if known else None

    # Tickets

    async def get_ticket(self, share: Share, timeout: float | None) -> str:
        """GetTicket: the secret that stands for the buffer in import_ticket()."""
        (ticket,) = await self._session.ask(share, BUFFER_INTERFACE, "GetTicket", [], timeout, again=True)
        share.ticket = str(ticket)
        return share.ticket

    async def learn_ticket(self, share: Share, timeout: float | None) -> None:
        """Know the ticket of a buffer that has no descriptor, by which it is had again after a restart of the bus."""
        if self._session.reconnect and not share.ticket:
            await self.get_ticket(share, timeout)

    def want_ticket_soon(self, share: Share) -> None:
        """learn_ticket() from any thread, without waiting for it."""

        async def learn() -> None:
            try:
                await self.learn_ticket(share, DEFAULT_TIMEOUT)
            except UdmabufError as error:
                log.debug("Buffer %s goes without its ticket: %s", share.id, error)

        self._session.soon(lambda: self._session.background.start(learn()))
