# SPDX-License-Identifier: MIT
"""Shares on their way back to the service: each is given back once, whatever the service does meanwhile.

A share that is not given back keeps its buffer alive until the connection ends. So a Release that reached no service,
or was refused for its rate, is made again. One that a service left unanswered may have taken effect: made again while
this client holds another share of that buffer, it could take that one. It is made again when none is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from udmabufd_client.background import pauses
from udmabufd_client.contract import BUFFER_INTERFACE
from udmabufd_client.errors import (
    CallTimedOut,
    NoSuchBuffer,
    RateLimited,
    ServiceRestarted,
    ServiceUnavailable,
    UdmabufError,
)
from udmabufd_client.link import Link
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Shares

log = logging.getLogger(__name__)

_UNKNOWN: Final = (ServiceRestarted, CallTimedOut)
"""After these it is not known whether the share was given back."""


class Releases:
    """The shares of one session that are being given back. A lost link has no shares: nothing is done for it."""

    def __init__(self, session: Session, shares: Shares) -> None:
        self._session = session
        self._shares = shares
        self._doubts: Counter[tuple[Link, str]] = Counter()

    def give_back(self, path: str) -> None:
        """Give back one share of the buffer at `path`, without waiting; before any call that is made from now on."""
        link = self._session.link
        if self._session.alive and link.lost is None:
            self._session.background.post(self._give_back(link, path, sure=True))

    async def release(self, link: Link, path: str, timeout: float | None) -> None:
        """Give back one share and wait for the answer. Raises UdmabufError; ServiceRestarted also when `link` is lost.

        After ServiceRestarted and CallTimedOut nothing is left to be done: see doubt().
        """
        try:
            await self._session.ask(path, BUFFER_INTERFACE, "Release", [], timeout, again=False, only=link)
        except ServiceRestarted as error:
            self.doubt(link, path)
            raise ServiceRestarted(
                "Release: the service, or the bus, ended before it answered. Nothing is left to be done: if need be, "
                "the share is given back again by itself.",
                dbus_name=error.dbus_name,
            ) from error
        except CallTimedOut:
            self.doubt(link, path)
            raise

    def doubt(self, link: Link, path: str) -> None:
        """Perhaps the service still counts a share that is not ours any more: give it back as soon as that is safe."""
        self._doubts[link, path] += 1
        self.settle()

    def settle(self) -> None:
        """Give back what is in doubt, where this client has no other share of the buffer and is not getting one.

        To be called after a share was forgotten, and after a call that could bring one.
        """
        if not self._doubts or self._shares.opening:
            return
        for link, path in list(self._doubts):
            if link.lost is not None or link is not self._session.link:
                del self._doubts[link, path]
            elif not self._shares.of(path):
                for _ in range(self._doubts.pop((link, path))):
                    self._session.background.post(self._give_back(link, path, sure=False))

    async def _give_back(self, link: Link, path: str, *, sure: bool) -> None:
        for pause in pauses():
            try:
                # Not the client's time-out: nobody waits for it.
                await self._session.ask(path, BUFFER_INTERFACE, "Release", [], DEFAULT_TIMEOUT, again=False, only=link)
                return
            except _UNKNOWN:
                self.doubt(link, path)
                return
            except NoSuchBuffer:
                return
            except (RateLimited, ServiceUnavailable) as error:
                if link.lost is not None or not self._session.alive:
                    return
                log.debug("Release of %s is made again: %s", path, error)
            except UdmabufError as error:
                log.debug("Release of %s was refused: %s", path, error)
                return
            await asyncio.sleep(pause)
            if not sure:
                # Another share of it may have been had meanwhile.
                self.doubt(link, path)
                return
