# SPDX-License-Identifier: MIT
"""A service that keeps descriptors: does with FdStore what it is told on a socket, one JSON object a line.

store_service.py CONTROL_SOCKET [IGNORED ...]
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from udmabufd.system.fdstore import FdStore
from udmabufd.system.notify import Notifier
from udmabufd_base.fd import OwnedFd, close_all


class StoreService:
    """What is stored, and what can be done with it."""

    def __init__(self) -> None:
        self.notifier = Notifier.from_environment()
        self.size = os.environ.get("FDSTORE")
        self.store = FdStore.from_environment(self.notifier.address)
        self.fds = self.store.inherited()
        # Read before any other descriptor can get its number.
        self.inherited = self.inodes()
        self.inheritable = [fd.fileno() for fds in self.fds.values() for fd in fds if os.get_inheritable(fd.fileno())]

    def inodes(self) -> dict[str, list[int]]:
        return {name: [os.fstat(fd.fileno()).st_ino for fd in fds] for name, fds in self.fds.items()}

    async def put(self, count: int, each: int, uid: int) -> dict[str, list[int]]:
        """Store `count` times `each` new memfds; return their inodes by name."""
        made = {}
        for _ in range(count):
            fds = [OwnedFd(os.memfd_create("stored")) for _ in range(each)]
            made[self.store.take_name()] = fds
        self.fds |= made
        await asyncio.gather(*(self.store.put(name, fds, uid) for name, fds in made.items()))
        return {name: [os.fstat(fd.fileno()).st_ino for fd in fds] for name, fds in made.items()}

    def drop(self, names: list[str]) -> None:
        """Remove `names` and close what this process has of them."""
        for name in names:
            self.store.drop(name)
            close_all(self.fds.pop(name))

    async def again(self, name: str, other: str) -> None:
        """Store a descriptor of `name` under another name, too."""
        await self.store.put(other, self.fds[name][:1], 0)

    async def do(self, order: dict[str, Any]) -> object:
        action = order.pop("do")
        if action == "ask":
            return {
                "pid": os.getpid(),
                "enabled": self.store.enabled,
                "size": self.size,
                "inherited": self.inherited,
                "inheritable": self.inheritable,
                "left": [name for name in os.environ if name.startswith(("LISTEN_", "NOTIFY_"))],
            }
        if action == "settled":
            await self.store.settled()
            return None
        answer = getattr(self, action)(**order)
        return await answer if asyncio.iscoroutine(answer) else answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                answer = await self.do(json.loads(line))
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def run(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self.serve, path, limit=1 << 20)
        path.chmod(0o666)
        self.notifier.ready("serving")
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(StoreService().run(Path(sys.argv[1])))
