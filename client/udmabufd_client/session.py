# SPDX-License-Identifier: MIT
"""The conversation with the service, over restarts of it and of the bus: a link, and another when that is lost.

Repeats what is safe to repeat and turns every failure into an exception of errors.py. Which members those are, and
what they mean, is left to service.py; what becomes of shares to keeper.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from udmabufd_base.connection import Incoming, Reply
from udmabufd_base.errors import BodyTooLarge, BusError, ProtocolError, QueueFull, RemoteError
from udmabufd_base.errors import CallTimedOut as BusCallTimedOut
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_client.background import Background, pauses
from udmabufd_client.errors import (
    ENDED,
    BadReply,
    CallTimedOut,
    ServiceRestarted,
    ServiceUnavailable,
    from_remote,
    not_taken,
)
from udmabufd_client.home import Home
from udmabufd_client.link import Link
from udmabufd_client.share import Share

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT: Final = 25.0
"""Seconds that a call may take unless it is told otherwise; libdbus's default."""

Body = Sequence[Any] | Callable[[], Sequence[Any]]
"""What a call sends, or what is asked for it at each attempt."""

_TICK: Final = 0.001


class Session:
    """A link that is replaced when it is lost. Belongs to the loop and the process that opened it.

    `restarted` is called when another service has taken the place of the former one on the same link, `reconnected`
    when there is another link, before any call that waited for it goes on; `over` when nothing will be heard any more,
    perhaps twice.
    """

    def __init__(
        self,
        bus: str,
        timeout: float,
        *,
        reconnect: bool,
        signal: Callable[[Incoming], None],
        restarted: Callable[[], None],
        reconnected: Callable[[], None],
        over: Callable[[], None],
    ) -> None:
        """For open()."""
        self.link: Link
        self._bus = bus
        self._timeout = timeout
        self.reconnect = reconnect
        """Whether a lost bus is connected to again."""
        self._signal = signal
        self._restarted = restarted
        self._reconnected = reconnected
        self._over = over
        self._loop = asyncio.get_running_loop()
        self.home = Home()
        self._closed = False
        self._met = False
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self.background = Background()

    async def open(self) -> None:
        """Connect. Raises ServiceUnavailable, CallTimedOut."""
        self.link = await self._open_link(self._timeout)
        self.background.start(self._keep())

    @property
    def alive(self) -> bool:
        """Whether calls can be made: not closed, and still in the process that connected."""
        return not self._closed and self.home.ours

    @property
    def unique_name(self) -> str:
        """The connection's name on the bus; another one after each loss. Raises ServiceUnavailable when closed."""
        self.check()
        return self.link.unique_name

    async def wait_lost(self) -> None:
        """Return when the connection to the bus has been lost for the first time, or is closed."""
        self.check()
        await self._lost.wait()

    async def close(self) -> None:
        """End the conversation. Harmless when repeated."""
        if not self.alive:
            return
        ended = self._end()
        await self.link.close()
        await asyncio.gather(*ended, return_exceptions=True)

    def abandon(self) -> None:
        """End the conversation at once, without a turn of the loop."""
        # A forked child has a copy of the parent's socket: what it shut down there would hit the parent.
        if self.alive:
            self._end()

    def _end(self) -> list[asyncio.Task[None]]:
        self._closed = True
        self.link.abandon()
        self._lost.set()
        self._changed.set()
        self._over()
        return self.background.cancel()

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` on the loop: at once when this is the loop's thread. Nothing when not alive."""
        if self.alive:
            self.home.soon(callback, *args)

    async def call(
        self,
        target: Share | str,
        interface_name: str,
        member: str,
        body: Body,
        timeout: float | None,
        *,
        again: bool,
        only: Link | None = None,
        flags: int = 0,
    ) -> Reply:
        """Make one call and return its reply, whose fds the caller owns.

        `target` is an object's path, or a share: then the call waits until the share is held. A function as `body` is
        called for each attempt. A call that reached no service is made again within its time, one that a service took
        and left unanswered only if it may be made `again`. With `only`, never on another link. Raises UdmabufError.
        """

        def attempt(link: Link, left: float) -> Awaitable[Reply]:
            sent = body() if callable(body) else body
            return link.call(str(target), interface_name, member, sent, left, flags)

        return await self._made(member, timeout, attempt, again=again, target=target, only=only)

    async def ask(
        self,
        target: Share | str,
        interface_name: str,
        member: str,
        body: Body,
        timeout: float | None,
        *,
        again: bool,
        only: Link | None = None,
        flags: int = 0,
    ) -> list[Any]:
        """Make one call whose reply brings no descriptor, and return its body; see call()."""
        reply = await self.call(target, interface_name, member, body, timeout, again=again, only=only, flags=flags)
        close_all(reply.fds)
        return reply.body

    async def bring(
        self,
        target: Share | str,
        interface_name: str,
        member: str,
        body: Body,
        timeout: float | None,
        *,
        again: bool,
        take: Callable[[Reply], T],
        refuse: Callable[[Reply], None],
        fds: Sequence[OwnedFd] = (),
    ) -> T:
        """Make a call that brings something which must be given back if nobody wants it; see Link.bring().

        Each attempt sends duplicates of `fds`. Raises UdmabufError, and OSError where there is no room for those.
        """

        def attempt(link: Link, left: float) -> Awaitable[T]:
            sent = body() if callable(body) else body
            duplicates: list[OwnedFd] = []
            try:
                duplicates.extend(fd.dup() for fd in fds)
            except BaseException:
                close_all(duplicates)
                raise
            return link.bring(str(target), interface_name, member, sent, left, duplicates, take=take, refuse=refuse)

        return await self._made(member, timeout, attempt, again=again, target=target, brings=True)

    # How a call survives

    async def _made(
        self,
        member: str,
        timeout: float | None,
        attempt: Callable[[Link, float], Awaitable[T]],
        *,
        again: bool,
        target: Share | str,
        only: Link | None = None,
        brings: bool = False,
    ) -> T:
        limit = self._timeout if timeout is None else timeout
        deadline = self._loop.time() + limit
        failure: ServiceUnavailable | None = None
        for pause in pauses():
            try:
                async with asyncio.timeout_at(deadline):
                    link = await self._ready(target if isinstance(target, Share) else None, only)
            except TimeoutError:
                raise failure or self._absent(member, limit) from None
            try:
                return await attempt(link, max(deadline - self._loop.time(), 0.0))
            except BusCallTimedOut as error:
                late = "; what it brings later is given back" if brings else ""
                raise CallTimedOut(f"{member}: no answer within {round(limit, 3):g} s{late}.") from error
            except (BodyTooLarge, ProtocolError) as error:
                raise BadReply(f"{member}: {error}.") from error
            except QueueFull as error:
                raise ServiceUnavailable(f"{member}: {error}.") from error
            except RemoteError as error:
                remote = from_remote(error.name, error.message)
                if not isinstance(remote, ServiceUnavailable):
                    raise remote from error
                if error.name in ENDED and not again:
                    raise ServiceRestarted(_unanswered(member, "service"), dbus_name=error.name) from error
                # A service that was never there is not about to return.
                if not_taken(error.name) and not (self._met or link.met):
                    raise remote from error
                failure = remote
            except BusError as error:
                self.check()
                if not self.reconnect:
                    raise self._final(member, error) from error
                if not again:
                    raise ServiceRestarted(_unanswered(member, "bus")) from error
                failure = ServiceUnavailable(f"{member}: the connection to the bus was lost ({error}).")
            await self._pause(link, min(pause, max(deadline - self._loop.time(), 0.0)))
            # Timers may be early by a clock tick; an attempt without time would say that the service is slow.
            if self._loop.time() >= deadline - _TICK:
                raise failure
        raise AssertionError("pauses() has no end")

    async def standing(self, member: str, seconds: float, share: Share) -> Link:
        """Wait for a link on which `share` is held, and return it. Raises ServiceUnavailable, NoSuchBuffer."""
        try:
            async with asyncio.timeout(seconds):
                return await self._ready(share)
        except TimeoutError:
            raise self._absent(member, seconds) from None

    async def _ready(self, share: Share | None, only: Link | None = None) -> Link:
        """Wait for a link that stands, and for the share to be held on it. Raises ServiceUnavailable, NoSuchBuffer."""
        if only is None:
            await self.background.passed()
        while True:
            self.check()
            if only is not None and (self.link is not only or only.lost is not None):
                raise ServiceRestarted("The connection that the call was for is lost, and what it was about with it.")
            if self.link.lost is None:
                link = self.link
                if share is not None:
                    await share.settled()
                if link is self.link and link.lost is None:
                    return link
            elif self.reconnect:
                changed = self._changed
                await changed.wait()
            else:
                raise self._final("The call", self.link.lost)

    async def _pause(self, link: Link, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if link.lost is None and not link.owner:
                    await link.present.wait()
                else:
                    await asyncio.sleep(seconds)

    def check(self) -> None:
        """Raise ServiceUnavailable if no calls can be made any more."""
        if not self.home.ours:
            raise ServiceUnavailable("This client was made before fork(): connect anew in the child.")
        if self._closed:
            raise ServiceUnavailable("This client is closed: connect anew.")

    def _absent(self, member: str, limit: float) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"{member}: the bus, or the service on it, was not back within {round(limit, 3):g} s."
        )

    def _final(self, member: str, error: BusError) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"{member}: the connection to the bus is lost ({error}), and all shares with it. Descriptors and "
            "mappings stay valid; connect anew to allocate again."
        )

    # How the link does

    async def _open_link(self, timeout: float) -> Link:
        return await Link.open(self._bus, timeout, self._signal, self._restarted)

    async def _keep(self) -> None:
        """Connect again whenever the link is lost."""
        while True:
            await self.link.wait_lost()
            self._lost.set()
            if self._closed or not self.reconnect:
                self._over()
                return
            log.info("The connection to the bus is lost (%s); connecting again", self.link.lost)
            await self.link.close()
            self.link = await self._connected_again()
            self._met = True
            self._reconnected()
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def _connected_again(self) -> Link:
        for pause in pauses():
            try:
                return await self._open_link(DEFAULT_TIMEOUT)
            except (ServiceUnavailable, CallTimedOut) as error:
                log.debug("Still no connection: %s", error)
            await asyncio.sleep(pause)
        raise AssertionError("pauses() has no end")


def _unanswered(member: str, what: str) -> str:
    return f"{member}: the {what} ended before it answered, and whether the call took effect is not known."
