# SPDX-License-Identifier: MIT
"""A holder of buffers by remote control: a process of its own, as a user of its own, that a test tells what to do.

Reads a command per line of stdin, a JSON list of a name and its arguments, and answers each with one JSON line: the
result, or the error's class and text. Buffers are numbered from 0 in the order in which they came.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from udmabufd_client.errors import UdmabufError
from udmabufd_client.sync import Buffer, Client


class Agent:
    """What can be commanded, a method each."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._buffers: list[Buffer] = []

    def allocate(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Allocate a buffer."""
        return self._keep([self._client.allocate(spec)])

    def allocate_many(self, count: int, spec: dict[str, Any]) -> dict[str, Any]:
        """Allocate several in one call."""
        return self._keep(self._client.allocate_many(count, spec))

    def create(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Create a buffer without memory."""
        return self._keep([self._client.create(spec)])

    def import_ticket(self, ticket: str) -> dict[str, Any]:
        """Become a holder of another's buffer."""
        return self._keep([self._client.import_ticket(ticket)])

    def ticket(self, number: int) -> str:
        """The ticket of a buffer."""
        return self._buffers[number].get_ticket()

    def get_fd(self, number: int) -> dict[str, Any]:
        """Make sure that a buffer has memory and its descriptor; tell what is known of it."""
        fd = self._buffers[number].get_fd()
        return {"inode": os.fstat(fd).st_ino, "size": os.lseek(fd, 0, os.SEEK_END)}

    def attach(self, number: int, device: str, constraints: dict[str, Any], dynamic: bool = False) -> dict[str, Any]:
        """Attach a device to a buffer; tell the merged constraints, and how many seconds the answer took."""
        began = time.monotonic()
        attachment = self._buffers[number].attach(device, constraints, dynamic)
        seconds = time.monotonic() - began
        return {"number": attachment.number, "constraints": dict(attachment.constraints), "seconds": seconds}

    def info(self, number: int) -> dict[str, Any]:
        """What the service said of a buffer."""
        buffer = self._buffers[number]
        return buffer.info.as_dict() | {"path": buffer.path, "state": buffer.state}

    def write(self, number: int, offset: int, data: str) -> None:
        """Write bytes, given in hexadecimal digits."""
        content = bytes.fromhex(data)
        with self._buffers[number].cpu_access(read=False, write=True) as view:
            view[offset : offset + len(content)] = content

    def read(self, number: int, offset: int, length: int) -> str:
        """Read bytes."""
        with self._buffers[number].cpu_access(read=True, write=False) as view:
            return bytes(view[offset : offset + length]).hex()

    def release(self, number: int) -> None:
        """Give the share back; the descriptor stays."""
        self._buffers[number].release()

    def close(self, number: int) -> None:
        """Close a buffer."""
        self._buffers[number].close()

    def cloexec(self) -> list[bool]:
        """Of each buffer, and of a second descriptor of it: whether it is closed at exec."""
        found = []
        for buffer in self._buffers:
            second = buffer.dup()
            found += [bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) for fd in (buffer.fileno(), second)]
            os.close(second)
        return found

    def own_descriptors(self) -> list[str]:
        """What the descriptors of this process lead to."""
        return [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]

    def child_descriptors(self) -> list[str]:
        """What those lead to that a program started from here has inherited, by its own account."""
        listing = ["find", "/proc/self/fd", "-type", "l", "-printf", "%l\n"]
        return subprocess.run(listing, stdout=subprocess.PIPE, close_fds=False, text=True).stdout.splitlines()

    def end(self) -> None:
        """Close every buffer."""
        for buffer in self._buffers:
            buffer.close()

    def _keep(self, buffers: Sequence[Buffer]) -> dict[str, Any]:
        first = len(self._buffers)
        self._buffers += buffers
        return {"first": first, "paths": [buffer.path for buffer in buffers], "info": buffers[0].info.as_dict()}


def main() -> None:
    """Obey until stdin ends."""
    with ExitStack() as stack:
        agent = Agent(stack.enter_context(Client.connect()))
        stack.callback(agent.end)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"result": getattr(agent, name)(*arguments)}
            except (UdmabufError, OSError, ValueError) as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
