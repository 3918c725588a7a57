# SPDX-License-Identifier: MIT
"""Pair: a connection at one end of a socket pair and at the other a peer that may do anything.

What the tests of connections share that need no bus; whether the connection stands it is left to them.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from tests.bus.echo_service import INTERFACE, PATH, until
from tests.bus.silent_fuse import silent_file
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType, pack_header
from udmabufd_base.selective import ReceiveFds

MODES: Final[dict[str, ReceiveFds]] = {"no fds": False, "all fds": True, "chosen fds": lambda header: True}
"""The values of `receive_fds`, by name."""


class Pulse:
    """Measures the longest turn of the loop, in seconds of `clock`, while it is entered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.longest = 0.0
        self.beats = 0

    async def _beat(self) -> None:
        before = self._clock()
        while True:
            await asyncio.sleep(0.002)
            now = self._clock()
            self.longest = max(self.longest, now - before)
            self.beats += 1
            before = now

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.002)
        self._task.cancel()


class Pair:
    """A socket pair with the connection under test at one end and a peer that writes what it likes at the other."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self._ours: socket.socket | None = ours
        self._connection: Connection | None = None
        self.heard: list[Incoming] = []

    def take(self) -> socket.socket:
        """Return our end and stop owning it."""
        assert self._ours is not None
        ours, self._ours = self._ours, None
        return ours

    async def connection(
        self, *, receive_fds: ReceiveFds, handler: Callable[[Incoming], None] | None = None, **arguments: Any
    ) -> Connection:
        """Make the connection; messages are kept in `heard` unless there is a handler."""
        handler = handler or self.heard.append
        self._connection = await Connection.adopt(self.take(), receive_fds=receive_fds, handler=handler, **arguments)
        return self._connection

    def write(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        """Write what the socket takes at once, which must be all of it."""
        numbers = array.array("i", [fd.fileno() for fd in fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
        assert self.peer.sendmsg([data], ancillary) == len(data)

    async def stream(self, *chunks: bytes) -> None:
        """Write any amount, waiting for the connection to read."""
        for chunk in chunks:
            await asyncio.get_running_loop().sock_sendall(self.peer, chunk)

    async def answers(self, connection: Connection) -> bool:
        """Whether the connection reads all that was written so far, and one more call."""
        heard = len(self.heard)
        await self.stream(pack_header(call_message(member="Marker"), 0))
        await until(lambda: connection.lost is not None or "Marker" in [i.header.member for i in self.heard[heard:]])
        return connection.lost is None

    def close(self) -> None:
        """Close both ends."""
        for end in (self._ours, self.peer, self._connection):
            if end is not None:
                end.close()


def call_message(destination: str = "", **fields: Any) -> Message:
    defaults: dict[str, Any] = {"path": PATH, "interface": INTERFACE, "member": "Echo", "flags": NO_REPLY_EXPECTED}
    return Message(MessageType.METHOD_CALL, destination=destination, **({"serial": 1} | defaults | fields))


@contextlib.contextmanager
def hanging_fds(sock: socket.socket, directory: Path, message: bytes) -> Iterator[None]:
    """Let another process write `message` 25 times, each time with 8 descriptors of a file system that is silent.

    This process never has any but those that it receives. At the end the file system dies; nothing hangs any more.
    """
    program = """if True:
        import array, os, socket, sys
        sock = socket.socket(fileno=int(sys.argv[1]))
        message = bytes.fromhex(sys.argv[3])
        fds = array.array("i", [os.open(sys.argv[2], os.O_RDWR) for _ in range(200)])
        for start in range(0, 200, 8):
            sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds[start : start + 8])])
        sys.stdin.read()
    """
    with silent_file(directory) as file:
        peer = subprocess.Popen(
            [sys.executable, "-c", program, str(sock.fileno()), str(file), message.hex()],
            stdin=subprocess.PIPE,
            pass_fds=[sock.fileno()],
        )
        assert peer.stdin is not None
        try:
            yield
        finally:
            # It ends when the file system does.
            peer.kill()
            peer.stdin.close()
    peer.wait()
