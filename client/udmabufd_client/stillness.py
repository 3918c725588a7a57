# SPDX-License-Identifier: MIT
"""A while in which nobody in this process uses a buffer's memory: its gates closed, waited for, and opened again.

What happens meanwhile is left to moves.py and own_moves.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from udmabufd_client.gate import Closing, Gate
from udmabufd_client.session import Session


class Stillness:
    """Gates that are closed from now until end(). Whoever comes waits `limit` seconds at most.

    Belongs to the session's loop.
    """

    def __init__(self, session: Session, gates: Iterable[Gate], limit: float) -> None:
        self._left = asyncio.Event()
        self._gates = list(dict.fromkeys(gates))
        self._closing = Closing(
            limit,
            wake=lambda: session.soon(self._left.set),
            here=lambda: session.home.here,
            alive=lambda: session.alive,
        )
        for gate in self._gates:
            gate.close(self._closing)

    @property
    def reached(self) -> bool:
        """Whether nobody is inside: from then on nobody gets in."""
        return all(gate.shut_if_idle() for gate in self._gates)

    async def wait(self) -> None:
        """Return when nobody is inside."""
        while not self.reached:
            await self._left.wait()
            self._left.clear()

    def end(self) -> None:
        """Open the gates. Harmless when repeated."""
        for gate in self._gates:
            gate.open(self._closing)


async def opened(gate: Gate) -> None:
    """Return when the gate is not shut, on the loop of those who shut it."""
    event = asyncio.Event()
    while gate.tell_opened(event.set):
        await event.wait()
        event.clear()


async def either(event: asyncio.Event, *, before: asyncio.Future[str]) -> bool:
    """Wait for `event`, or for the end of something; return whether the event came first."""
    if event.is_set() or before.done():
        return not before.done()
    waiting = asyncio.ensure_future(event.wait())
    both: set[asyncio.Future[Any]] = {waiting, before}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return event.is_set() and not before.done()
