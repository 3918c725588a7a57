# SPDX-License-Identifier: MIT
"""Run a command that inherits a buffer's descriptor, and become its exit status. What it does there is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final

from udmabufd_client.buffer import BufferBase
from udmabufd_client.cli.signals import heeded
from udmabufd_client.cli.text import printable

_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126
_BY_SIGNAL: Final = 128
"""What a shell answers for the same ends."""


def run_with(buffer: BufferBase, command: Sequence[str]) -> int:
    """Run `command` with the buffer's descriptor and environment; return the status to end with."""
    fd = buffer.fileno()
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        # Ctrl-C reaches the command by itself: the terminal sends it to both.
        elif number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in heeded()}
    try:
        try:
            process = subprocess.Popen(
                [word.replace("{}", str(fd)) for word in command],
                pass_fds=(fd,),
                env={**os.environ, **environment(buffer)},
            )
        except OSError as error:
            print(f"udmabufctl: {printable(command[0])}: {error.strerror}", file=sys.stderr)
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        # Ctrl-C too: it may have come before the command was there.
        for number in early:
            process.send_signal(number)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else _BY_SIGNAL - status


def environment(buffer: BufferBase) -> dict[str, str]:
    """Return what a command is told of its buffer: UDMABUF_FD, UDMABUF_ID and every key of info in capitals."""
    known = {"fd": buffer.fileno(), "id": buffer.id, **buffer.info.as_dict()}
    return {f"UDMABUF_{key.upper()}": _text(value) for key, value in known.items()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value)
