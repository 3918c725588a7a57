# SPDX-License-Identifier: MIT
"""What takes long is reported on standard error while it lasts; what it is, and how far, its verb knows."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from udmabufd_client.cli.text import cut, printable, width_of
from udmabufd_client.errors import UdmabufError

T = TypeVar("T")

FIRST: Final = 2.0
"""Seconds after which there is a report."""

_AGAIN: Final = 1.0
_PATIENCE: Final = 5.0
"""Seconds from one report to the next, and those that finding out may take."""

_CLEAR_LINE: Final = "\r\x1b[K"


async def reported(work: Coroutine[Any, Any, T], progress: Callable[[], Awaitable[str]]) -> T:
    """Return what `work` does; from two seconds on say how far it is.

    On a terminal that is one line, which is gone afterwards; elsewhere one for each change.
    """
    line = _Line()
    task = asyncio.ensure_future(work)
    try:
        pause = FIRST
        while not (await asyncio.wait({task}, timeout=pause))[0]:
            pause = _AGAIN
            with suppress(UdmabufError, TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    line.say(await progress())
        return task.result()
    finally:
        line.clear()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, UdmabufError):
                await task


class _Line:
    """The last line of standard error."""

    def __init__(self) -> None:
        self._drawn = sys.stderr.isatty()
        self._said = ""

    def say(self, text: str) -> None:
        if text == self._said:
            return
        self._said = text
        shown = f"udmabufctl: {printable(text)}"
        if self._drawn:
            # A line that is as wide as the terminal could not be cleared.
            width = width_of(sys.stderr)
            shown = _CLEAR_LINE + cut(shown, None if width is None else max(width - 1, 1))
        print(shown, end="" if self._drawn else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._drawn and self._said:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
