# SPDX-License-Identifier: MIT
"""Calls for which importers are asked: how each of them ends, by when, and who is kept waiting meanwhile. What it
means that one has succeeded is relocating.py's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable
from typing import Any, NamedTuple

from tests.kernel.comparison import PATIENCE
from tests.kernel.demands import get_fd
from tests.kernel.histories import History
from tests.kernel.importers import TIMEOUT
from tests.kernel.unit import AWAY
from tests.unit.books import Client, Known
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import ERROR_PREFIX


class Outcome(NamedTuple):
    """How a call ended: `refusal` is the error's short name, "" for none; `cut_off` if the service was killed before
    it had answered.
    """

    answer: Any
    refusal: str
    began: float
    seconds: float
    cut_off: bool


class Calls(History):
    """See the module. With `kill_in` set, the service is killed so many seconds after the next call began."""

    kill_in: float | None = None
    _other: tuple[Client, int, asyncio.Future[Any]] | None = None

    async def outcome(self, run: Awaitable[Any], known: Known | None = None, asking: Client | None = None) -> Outcome:
        """Do a call of `asking`, perhaps with somebody else wanting `known` meanwhile, or with the service killed."""
        self.asked.clear()
        other, pid = None, 0
        if self.kill_in is not None:
            pid = await self.pid()
            # Who goes meanwhile, and whether it was noticed, is not looked into.
            self.staying = None
        began = time.monotonic()
        call = asyncio.ensure_future(run)
        if self.kill_in is not None:
            await asyncio.sleep(self.kill_in)
            os.kill(pid, signal.SIGKILL)
        elif known is not None and asking is not None:
            other = await self._meanwhile(call, known, asking)
        await asyncio.wait((call,), timeout=PATIENCE)
        assert call.done(), "a call waits for ever"
        seconds = time.monotonic() - began
        answer, refusal, cut_off = None, "", False
        try:
            answer = call.result()
        except RemoteError as failure:
            cut_off = self.kill_in is not None and failure.name in AWAY
            refusal = failure.name.removeprefix(ERROR_PREFIX)
        if self.kill_in is not None:
            self.kill_in = None
            await self.serving()
            self.books.restarted(time.monotonic())
            self.happened["killed during a call"] += cut_off
        self._other, self.giving_up = other, True
        return Outcome(answer, refusal, began, seconds, cut_off)

    async def _meanwhile(
        self, call: asyncio.Future[Any], known: Known, asking: Client
    ) -> tuple[Client, int, asyncio.Future[Any]] | None:
        """Once somebody has been asked to let go of `known`, have one who has attached it, too, call GetFd."""
        rows = [(number, row.client) for number, row in known.attachments.items() if row.client is not asking]
        if not rows or self.rng.random() < 0.6:
            return None
        number, client = self.rng.choice(rows)
        assert self.staying is not None
        self.staying.add(client)
        while not call.done() and not self.asked:
            self.heard.clear()
            heard = asyncio.ensure_future(self.heard.wait())
            await asyncio.wait((call, heard), return_when=asyncio.FIRST_COMPLETED)
            heard.cancel()
        if call.done():
            return None
        self.happened["waited for a move"] += 1
        return client, number, asyncio.ensure_future(get_fd(self.peers[client], self.at(known), number))

    async def waited(self, known: Known) -> None:
        """Take what the one who called meanwhile has got, now that the move is over."""
        if self._other is not None:
            client, number, call = self._other
            self._other = None
            fd, info = await call
            self.taken(known, client, number, fd, info)

    def judge(self, outcome: Outcome, refusals: set[str], missing: bool, in_use: bool = False) -> bool:
        """Hold the outcome of a call that moves a buffer against what it had to be; return whether it has moved.
        `missing` tells whether somebody has not answered.
        """
        self.happened[outcome.refusal] += bool(outcome.refusal)
        if refusals:
            assert outcome.refusal in refusals, f"{outcome}, and had to be {refusals}"
            assert not self.asked, f"{self.asked} for nothing"
        elif missing:
            assert outcome.refusal == "MoveTimedOut", f"{outcome}, and somebody has not answered"
            assert outcome.seconds >= TIMEOUT, f"after {outcome.seconds} s nobody was late"
        elif outcome.refusal != ("Busy" if in_use else ""):
            assert outcome.refusal == "MoveTimedOut", outcome
            assert self.belated(outcome), outcome
        return not outcome.refusal

    def belated(self, outcome: Outcome) -> bool:
        """Whether an answer may have been taken when it was too late already: the machine was busy."""
        return self.answered - outcome.began >= TIMEOUT
