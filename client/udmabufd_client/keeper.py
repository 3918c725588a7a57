# SPDX-License-Identifier: MIT
"""What becomes of shares when the service or the bus was restarted: they are looked after, had again, or lost.

Restarted, the service holds a connection's shares as before; what its signals would have told meanwhile is read anew.
With the bus the shares themselves are gone: each buffer is imported again, by its descriptor or its ticket, within the
time for which the service keeps it, and what was attached to it is attached again. When calls are made and repeated is
left to session.py, attaching to attachments.py.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from udmabufd_base.connection import Reply
from udmabufd_base.fd import OwnedFd
from udmabufd_client.arrivals import Arrivals, new_share
from udmabufd_client.attachments import Attachments, Rows, own_numbers
from udmabufd_client.background import pauses
from udmabufd_client.contract import BUS_GRACE
from udmabufd_client.errors import (
    AccessDenied,
    CallTimedOut,
    InvalidSpec,
    NoSuchBuffer,
    NotSupported,
    OutOfMemory,
    QuotaExceeded,
    RateLimited,
    ServiceRestarted,
    ServiceUnavailable,
    UdmabufError,
    UdmabufUnavailable,
)
from udmabufd_client.info import BufferInfo
from udmabufd_client.pins import Pins
from udmabufd_client.releases import Releases
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares

log = logging.getLogger(__name__)

T = TypeVar("T")

_AWAY: Final = (ServiceUnavailable, CallTimedOut, RateLimited, UdmabufUnavailable)
"""These say nothing of the buffer: they are waited out."""

_AWAY_ATTACHING: Final = (ServiceUnavailable, CallTimedOut, RateLimited)
"""A service that has let a buffer be imported knows its state; without /dev/udmabuf it says of a device that no memory
suits it."""

_SHORT: Final = (QuotaExceeded, OutOfMemory)
"""So do these, but they may last longer than the buffer is kept."""


class Keeper:
    """Looks after the shares of one session. `done` is called after each restart, when every share is held or lost.

    `resume` is called with each share of which it is known again what memory the buffer has.
    """

    def __init__(
        self,
        session: Session,
        shares: Shares,
        arrivals: Arrivals,
        releases: Releases,
        attachments: Attachments,
        pins: Pins,
        done: Callable[[], object] | None,
        resume: Callable[[Share], object],
    ) -> None:
        self._session = session
        self._shares = shares
        self._arrivals = arrivals
        self._releases = releases
        self._attachments = attachments
        self._pins = pins
        self._done = done
        self._resume = resume
        self._pass: asyncio.Task[None] | None = None
        self._once_more = False

    def restarted(self) -> None:
        """The service was started anew: it knows our shares, but what it signalled meanwhile is not known."""
        if self._pass is None or self._pass.done():
            self._begin()
        else:
            # It waits for the new service by itself, and alone knows what it has asked of the former one.
            self._once_more = True

    def reconnected(self) -> None:
        """The bus was started anew, or has dropped this client: its shares are gone."""
        for share in self._shares.all():
            share.void()
            for attached in share.attachments:
                attached.number = 0
        if self._pass is not None:
            self._pass.cancel()
        self._begin()

    def _begin(self) -> None:
        self._pass = self._session.background.start(self._look_after())

    async def _look_after(self) -> None:
        """Go through the shares one by one: all at once would exceed the limits of calls."""
        self._once_more = True
        while self._once_more:
            self._once_more = False
            for share in self._shares.all():
                if not share.released:
                    await (self._read(share) if share.held else self._regain(share))
        if self._done is not None:
            try:
                self._done()
            except Exception:
                log.exception("on_reconnect failed")

    async def _read(self, share: Share) -> None:
        try:
            await self._patiently(lambda: self._properties(share))
            self._resume(share)
        except NoSuchBuffer:
            if not share.released:
                share.void()
                await self._regain(share)
        except UdmabufError as error:
            log.info("Properties of buffer %s could not be read: %s", share.id, error)

    async def _regain(self, share: Share) -> None:
        """Have a share again, or find it lost."""
        try:
            path, info = await self._patiently(self._importing(share))
        except (UdmabufError, OSError) as error:
            log.info("Buffer %s is lost: %s", share.id, error)
            self._shares.remove(share)
            share.watch.end()
            share.settle(lost=True)
            self._attachments.lost(share)
            return
        if not share.released:
            # A service that did not know its former state may know the buffer by another id.
            self._shares.remove(share)
            share.path = path
            self._shares.add(share)
            if info is not None:
                share.told_info(info)
            await self._attach_again(share)
            self._resume(share)
        # Its close(), meanwhile, has found nothing to give back.
        if share.released:
            self._releases.give_back(path)
        share.settle()

    async def _attach_again(self, share: Share) -> None:
        """Have the attachments of a share again; end those that cannot be had."""
        live = [attached for attached in share.attachments if attached.live]
        if not live:
            return
        share.attachment_rows = None
        there: frozenset[int] = frozenset()
        try:
            there = own_numbers(await self._patiently(lambda: self._properties(share)))
        except UdmabufError as error:
            log.info("Properties of buffer %s could not be read: %s", share.id, error)
        for attached in live:
            if share.released or not attached.live:
                continue
            try:
                again = functools.partial(self._attachments.again, attached, there)
                await self._patiently(again, away=_AWAY_ATTACHING)
                await self._patiently(functools.partial(self._pins.restore, attached), away=_AWAY_ATTACHING)
            except UdmabufError as error:
                self._attachments.give_up(attached, str(error))

    def _importing(self, share: Share) -> Callable[[], Awaitable[tuple[str, BufferInfo | None]]]:
        """Return what imports the buffer, or finds that the service knows us as a holder already."""
        perhaps = False

        async def attempt() -> tuple[str, BufferInfo | None]:
            nonlocal perhaps
            if perhaps:
                try:
                    await self._properties(share)
                    return share.path, None
                except NoSuchBuffer:
                    perhaps = False
            try:
                return await self._import(share)
            except ServiceRestarted:
                # Whether it took the share shows in whether it knows us, unless it knew us before.
                if any(other.held for other in self._shares.of(share.path)):
                    self._releases.doubt(self._session.link, share.path)
                else:
                    perhaps = True
                raise
            except UdmabufUnavailable:
                # It cannot read its former state. An administrator will have it restore our share, or not.
                perhaps = True
                raise

        return attempt

    async def _import(self, share: Share) -> tuple[str, BufferInfo]:
        share.expect()
        fd = share.memory.spare()
        if fd is not None:
            with fd:
                try:
                    return await self._reimport("Import", 0, fd)
                except (NoSuchBuffer, InvalidSpec, AccessDenied, NotSupported):
                    if not share.ticket:
                        raise
        if not share.ticket:
            raise NoSuchBuffer("it has neither a descriptor nor a ticket")
        return await self._reimport("ImportTicket", share.ticket)

    async def _reimport(self, member: str, argument: object, *fds: OwnedFd) -> tuple[str, BufferInfo]:
        def take(reply: Reply) -> tuple[str, BufferInfo]:
            path, info = reply.body
            share = new_share(path, BufferInfo.parse(info))
            return share.path, share.info

        return await self._arrivals.bring(member, [argument], take, DEFAULT_TIMEOUT, again=False, fds=fds)

    async def _properties(self, share: Share) -> Rows:
        """Read the buffer's properties anew, whether the share is held or not; return what is attached."""
        return await self._attachments.read(share, share.path, DEFAULT_TIMEOUT)

    async def _patiently(self, call: Callable[[], Awaitable[T]], away: tuple[type[UdmabufError], ...] = _AWAY) -> T:
        """Make a call until its answer says something of the buffer."""
        short_since: float | None = None
        for pause in pauses():
            try:
                return await call()
            except away as error:
                log.debug("The service is away or busy: %s", error)
            except _SHORT:
                now = asyncio.get_running_loop().time()
                short_since = now if short_since is None else short_since
                if now - short_since > BUS_GRACE:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("pauses() has no end")
