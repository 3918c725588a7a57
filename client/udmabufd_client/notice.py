# SPDX-License-Identifier: MIT
"""A move or an eviction as a Buffer's user is told of it, and who wants to be told.

What follows from the answer is left to moves.py; aio and sync add the verbs to MoveBase.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from udmabufd_client.attachment import Attached
    from udmabufd_client.share import Share

log = logging.getLogger(__name__)


class MoveKind(StrEnum):
    """What is about to happen to a buffer's memory."""

    MOVE = "move"
    EVICT = "evict"


MOVED: Final = "moved"
CANCELLED: Final = "cancelled"
EVICTED: Final = "evicted"
"""How it ended, as done() returns it."""


class Notice:
    """One move of one buffer, as one Buffer is asked about it. Belongs to the loop.

    `sent` is done when the service has the answer, `finished` with how it all ended.
    """

    def __init__(
        self, share: Share, asked: Attached, kind: MoveKind, serial: int, timeout: float, ready: Callable[[], object]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.share = share
        self.asked = asked
        self.kind = kind
        self.serial = serial
        self.timeout = timeout
        self.ready = ready
        self.sent: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[str] = loop.create_future()

    def answered(self) -> None:
        """The service has the answer, or wants none any more."""
        if not self.sent.done():
            self.sent.set_result(None)

    def finish(self, outcome: str) -> None:
        """It is over."""
        self.answered()
        if not self.finished.done():
            self.finished.set_result(outcome)


UNREAD_MAX: Final = 16
"""Notices that a listener keeps which nobody reads: all but the last are over."""


class Listener(Protocol):
    """What takes notices one after another."""

    def put(self, notice: Notice | None) -> None:
        """Take one; None: there are no more. Called on the loop."""
        ...


class Watch:
    """Who wants to be asked about one Buffer's memory: a callback, and listeners while anybody refers to them."""

    def __init__(self) -> None:
        self.callback: Callable[[Notice], object] | None = None
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._ended = False

    @property
    def cares(self) -> bool:
        """Whether there is anybody."""
        return not self._ended and (self.callback is not None or bool(self._listeners))

    def add(self, listener: Listener) -> None:
        """Have a listener told from now on."""
        if self._ended:
            listener.put(None)
        else:
            self._listeners.add(listener)

    def remove(self, listener: Listener) -> None:
        """Have a listener told no longer."""
        self._listeners.discard(listener)

    def tell(self, notice: Notice) -> bool:
        """Ask them all; the first answer counts. False if there is nobody any more."""
        if not self.cares:
            return False
        for listener in list(self._listeners):
            listener.put(notice)
        if self.callback is not None:
            try:
                self.callback(notice)
            except Exception:
                log.exception("on_move failed")
        return True

    def end(self) -> None:
        """There will be no more: the share is given back, or lost, or nothing is heard of it any more."""
        self._ended = True
        for listener in list(self._listeners):
            listener.put(None)
        self._listeners.clear()


class MoveBase:
    """A move, or an eviction, that the user of a Buffer is asked about: by Buffer.on_move, or Buffer.moves().

    ready() says that the importer has stopped using the memory. Until then nothing is changed; without it the service
    cancels the move, after `timeout` seconds.
    """

    def __init__(self, notice: Notice) -> None:
        self._notice = notice

    @property
    def kind(self) -> MoveKind:
        """`move`: the buffer gets other memory; `evict`: it loses its place in memory until somebody needs it."""
        return self._notice.kind

    @property
    def serial(self) -> int:
        """The serial that the buffer will have: after an eviction, when it comes back."""
        return self._notice.serial

    @property
    def timeout(self) -> float:
        """Seconds that there were for the answer, from when the service asked."""
        return self._notice.timeout

    def __repr__(self) -> str:
        return f"<{self.kind} of buffer {self._notice.share.id} to serial {self.serial}>"
