# SPDX-License-Identifier: MIT
"""Outbox: messages on their way to a stream socket, and the fds that ride with them.

It writes what the socket takes and says when it must wait. Waiting, and what becomes of a broken socket, is left to
transport.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from udmabufd_base.errors import QueueFull
from udmabufd_base.fd import OwnedFd, close_all

_TURN_MESSAGES: Final = 64
_TURN_BYTES: Final = 1 << 18
"""What one write() takes on before it lets others run."""


class Outbox:
    """A bounded queue of encoded messages. It owns their fds, and closes them as soon as the kernel has its own."""

    def __init__(self, sock: socket.socket, max_backlog: int) -> None:
        self._socket = sock
        self._max_backlog = max_backlog
        self._queue: deque[tuple[memoryview, list[OwnedFd]]] = deque()
        self.backlog = 0
        """Bytes that wait."""

    def put(self, data: bytes, fds: Sequence[OwnedFd]) -> None:
        """Append a message and take its `fds`: the objects passed own nothing afterwards.

        Raises QueueFull when more than the bound would wait, and ValueError when an fd is closed or there twice; then
        the message is not queued, and the fds not taken yet remain the caller's.
        """
        if self.backlog + len(data) > self._max_backlog:
            raise QueueFull(
                f"{self.backlog} bytes wait for the bus to read them and {self._max_backlog} may; try again later"
            )
        taken: list[OwnedFd] = []
        try:
            taken.extend(OwnedFd(fd.steal()) for fd in fds)
        except ValueError:
            close_all(taken)
            raise
        self._queue.append((memoryview(data), taken))
        self.backlog += len(data)

    def write(self) -> None:
        """Write until nothing is left or one turn's share is done.

        Raises BlockingIOError when the socket takes no more now, another OSError when it broke or the kernel is short
        of something. What was not sent stays queued.
        """
        budget = _TURN_BYTES
        for _ in range(_TURN_MESSAGES):
            if not self._queue or budget <= 0:
                return
            data, fds = self._queue[0]
            ancillary = []
            if fds:
                numbers = array.array("i", [fd.fileno() for fd in fds])
                ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers))
            sent = self._socket.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            # The fds went with the first byte; sent again with the rest, they would arrive twice.
            close_all(fds)
            budget -= sent
            self.backlog -= sent
            if sent == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[sent:], [])

    def close(self) -> None:
        """Forget what waits and close its fds."""
        self.backlog = 0
        while self._queue:
            close_all(self._queue.popleft()[1])
