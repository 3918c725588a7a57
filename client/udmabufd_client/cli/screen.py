# SPDX-License-Identifier: MIT
"""A screen that is drawn again and again, and how it ends: q, Ctrl-C, SIGTERM. What is on it is the verb's choice.

Escape sequences go to terminals alone, and what was changed there (cursor, keyboard) is put back at the end.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Final, Self, TextIO

from udmabufd_client.cli.signals import heeded
from udmabufd_client.cli.text import bold, printable, width_of

_HIDE_CURSOR: Final = "\x1b[?25l"
_SHOW_CURSOR: Final = "\x1b[?25h"
_CLEAR: Final = "\x1b[H\x1b[2J"
_HOME: Final = "\x1b[H"
_END_OF_LINE: Final = "\x1b[K"
_BELOW: Final = "\x1b[J"


class _Ended(BaseException):
    """A signal has come; swallowed by the Screen around it."""


class Screen:
    """`with Screen(sys.stdout, drawn=True) as screen`; a signal ends the block as if it had come to its end.

    Where `stream` is no terminal, or `drawn` is false, everything is written one after the other.
    """

    def __init__(self, stream: TextIO, *, drawn: bool) -> None:
        self._stream = stream
        self._drawn = drawn and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._keyboard: int | None = None
        self._mode: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._fresh = True
        self.ended = False
        """Whether q was pressed."""

    @property
    def width(self) -> int | None:
        """The columns that a line may take; None where nothing limits it."""
        return width_of(self._stream)

    def show(self, lines: Sequence[str]) -> None:
        """Show a table in place of what was shown before; the first line is its heading."""
        if not self._drawn:
            self._write("".join(f"{line}\n" for line in [bold(lines[0], self._stream), *lines[1:], ""]))
            return
        # A terminal that does not know its size says 0.
        rows = max((os.get_terminal_size(self._stream.fileno()).lines or 24) - 1, 2)
        shown = list(lines) if len(lines) <= rows else [*lines[: rows - 1], lines[-1]]
        text = "".join(f"{line}{_END_OF_LINE}\n" for line in [bold(shown[0], self._stream), *shown[1:]])
        self._write((_CLEAR if self._fresh else _HOME) + text + _BELOW)
        self._fresh = False

    def note(self, text: str) -> None:
        """Show one line beneath, or on standard error where nothing is drawn."""
        if self._drawn:
            self._write(f"{printable(text)}{_END_OF_LINE}\r")
        else:
            print(f"udmabufctl: {printable(text)}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Write one line."""
        self._write(f"{text}\n")

    def wait(self, seconds: float) -> None:
        """Wait, or until q is pressed: then `ended` is set."""
        if self._keyboard is None:
            time.sleep(seconds)
            return
        deadline = time.monotonic() + seconds
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            if select.select([self._keyboard], [], [], left)[0]:
                pressed = os.read(self._keyboard, 64)
                self.ended = b"q" in pressed or b"Q" in pressed or not pressed

    def __enter__(self) -> Self:
        def end(number: int, frame: FrameType | None) -> None:
            raise _Ended

        if self._drawn and sys.stdin.isatty():
            self._keyboard = sys.stdin.fileno()
            self._mode = termios.tcgetattr(self._keyboard)
        self._handlers = {number: signal.signal(number, end) for number in heeded()}
        if self._keyboard is not None:
            tty.setcbreak(self._keyboard)
        if self._drawn:
            self._write(_HIDE_CURSOR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # What comes from here on must not keep the terminal from being put back.
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        try:
            if self._keyboard is not None and self._mode is not None:
                termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._mode)
            if self._drawn:
                self._write(_SHOW_CURSOR)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        return kind is _Ended

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
