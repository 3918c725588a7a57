# SPDX-License-Identifier: MIT
"""One move or eviction of one buffer, as far as this client has come with it: who was asked, who has answered.

What is done about it is left to moves.py.
"""

from __future__ import annotations

import asyncio
from typing import Final

from udmabufd_client.attachment import Attached
from udmabufd_client.notice import EVICTED, MOVED, MoveKind, Notice
from udmabufd_client.share import Share

_OVERDUE: Final = 1.0
"""Seconds after the time to answer in which the end of a move is told, unless the copying takes longer."""


class Relocation:
    """From being asked to how it ended. Belongs to the loop."""

    def __init__(self, path: str, kind: MoveKind, serial: int, timeout: float) -> None:
        self.path = path
        self.kind = kind
        self.serial = serial
        self.timeout = timeout
        self.overdue = asyncio.get_running_loop().time() + timeout + _OVERDUE
        """When its end should have been told, in the loop's time."""
        self.done = MOVED if kind == MoveKind.MOVE else EVICTED
        """How it ends if it takes place."""
        self.asked: dict[int, Attached | None] = {}
        self.notices: dict[Share, Notice] = {}
        self.caring: set[Share] = set()
        """Those whose users have not answered yet."""
        self.cleared = asyncio.Event()
        """Set when no user is to be waited for any more."""
        self.alone = asyncio.Event()
        """Set when nothing that was asked is known to be attached: the end of the move is perhaps not told then."""
        self.answering = False
        self.answers: set[asyncio.Task[None]] = set()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, outcome: str) -> None:
        """It is over; a second time does nothing."""
        if not self.over.done():
            self.over.set_result(outcome)

    def look_whether_alone(self) -> None:
        """To be called when something that was asked may have ended."""
        if self.asked and not any(attached is not None and attached.live for attached in self.asked.values()):
            self.alone.set()
