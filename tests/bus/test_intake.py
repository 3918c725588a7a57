# SPDX-License-Identifier: MIT
"""Descriptors that callers send: those that hang whoever closes them cost their sender, and nobody else.

A real dbus-daemon hangs itself on such a descriptor, so a bus of the tests' own passes them on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus.fake_bus import FakeBus, service_on
from tests.bus.peer import PROPERTIES, error, spec
from tests.bus.service import TIMEOUT, RunningService
from tests.bus.silent_fuse import silent_file
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType
from udmabufd_client.contract import ALLOCATOR_INTERFACE, OBJECT_PATH

pytestmark = [pytest.mark.host, pytest.mark.root]


@contextlib.contextmanager
def silent_fds(directory: Path, count: int) -> Iterator[list[int]]:
    """Yield descriptors of a file system that never answers; it dies at the end, which lets go whoever waits."""
    with contextlib.ExitStack() as stack:
        with silent_file(directory) as file:
            fds = [OwnedFd(os.open(file, os.O_RDWR | os.O_CLOEXEC)) for _ in range(count)]
            for fd in fds:
                stack.callback(close_dead, fd)
            yield [fd.fileno() for fd in fds]


def close_dead(fd: OwnedFd) -> None:
    """Close a descriptor of a file system that has died: that fails, and closes it all the same."""
    with contextlib.suppress(OSError):
        fd.close()


def silent_count(service: RunningService) -> int:
    """How many descriptors of the silent file the service has."""
    return sum(target.endswith("/silent") for target in service.fds().values())


async def get(bus: FakeBus, name: str, member: str) -> object:
    """Read a property of the allocator."""
    reply = await bus.call(name, OBJECT_PATH, PROPERTIES, "Get", "ss", [ALLOCATOR_INTERFACE, member])
    return reply.body[0].value


async def make(bus: FakeBus, name: str) -> tuple[str, OwnedFd]:
    """Allocate a memfd; return path and descriptor."""
    arguments = [spec(size=4096, kind="memfd")]
    reply = await bus.call(name, OBJECT_PATH, ALLOCATOR_INTERFACE, "Allocate", "a{sv}", arguments)
    return reply.body[0], reply.fds[0]


async def send_import(bus: FakeBus, name: str, fd: int) -> str:
    """Import; return the buffer's path, or the name of the error."""
    try:
        reply = await bus.call(name, OBJECT_PATH, ALLOCATOR_INTERFACE, "Import", "h", [0], fds=[fd])
    except RemoteError as refusal:
        return refusal.name
    path: str = reply.body[0]
    return path


async def ended(pid: int, timeout: float = TIMEOUT) -> None:
    """Wait for the end of a child, and leave its status to be fetched. Raises TimeoutError."""
    with OwnedFd(os.pidfd_open(pid)) as pidfd:
        poll = select.poll()
        poll.register(pidfd.fileno(), select.POLLIN)
        if not await asyncio.to_thread(poll.poll, timeout * 1000):
            raise TimeoutError(f"process {pid} has not ended within {timeout:g} s")


@pytest.mark.parametrize(
    ("connections", "known", "most"),
    [
        pytest.param(1, False, 16, id="first calls of one connection"),
        pytest.param(1, True, 64, id="later calls of one connection"),
        pytest.param(40, True, 64, id="later calls of 40 connections"),
        pytest.param(200, False, 128, id="first calls of 200 connections"),
    ],
)
async def test_200_imports_of_fds_that_hang_whoever_closes_them(
    tmp_path: Path, connections: int, known: bool, most: int
) -> None:
    """`known`: the service has learned from an earlier call whose connection it is."""
    async with FakeBus(tmp_path) as bus, service_on(bus) as service:
        bad, good, other = [bus.join(1001) for _ in range(connections)], bus.join(1002), bus.join(1002)
        path, fd = await make(bus, good)
        for name in (*(bad if known else ()), other):
            assert await get(bus, name, "Buffers") == 1
        with fd, silent_fds(tmp_path, 200) as fds:
            names = itertools.cycle(bad)
            calls = [asyncio.create_task(send_import(bus, next(names), number)) for number in fds]
            while not all(call.done() for call in calls):
                start = time.monotonic()
                assert await send_import(bus, other, fd.fileno()) == path
                assert await get(bus, good, "Buffers") == 1
                assert time.monotonic() - start < 2
            answers = {call.result() for call in calls}
            assert answers == {error("InvalidSpec"), error("RateLimited")}
            # One is out of the table already, and its close() hangs.
            assert silent_count(service) + 1 <= most
            # What was taken hangs; that is now its sender's trouble and nobody else's, newcomers included.
            assert await send_import(bus, bad[0], fds[0]) in answers
            for name in (other, bus.join(1002)):
                assert await send_import(bus, name, fd.fileno()) == path
            # All of its part is over while what hangs still does; only the process cannot end.
            os.kill(service.pid, signal.SIGTERM)
            await asyncio.wait_for(bus.gone.wait(), TIMEOUT)
            with pytest.raises(TimeoutError):
                await ended(service.pid, 0)
        await ended(service.pid)


IMPORT: dict[str, Any] = {
    "type": MessageType.METHOD_CALL,
    "path": OBJECT_PATH,
    "interface": ALLOCATOR_INTERFACE,
    "member": "Import",
    "signature": "h",
    "body": [0],
}

STRAYS: dict[str, dict[str, Any]] = {
    "property": {
        "interface": PROPERTIES,
        "member": "Get",
        "signature": "ss",
        "body": [ALLOCATOR_INTERFACE, "Buffers"],
    },
    "allocate": {"member": "Allocate", "signature": "a{sv}", "body": [spec(size=1, kind="memfd")]},
    "another signature": {"signature": "hh", "body": [0, 0]},
    "another object": {"path": "/org/udmabufd"},
    "another interface": {"interface": "org.udmabufd.Admin1"},
    "unknown member": {"member": "Export"},
    "nobody waits": {"flags": NO_REPLY_EXPECTED},
    "signal": {"type": MessageType.SIGNAL},
    "reply": {"type": MessageType.METHOD_RETURN, "reply_serial": 1},
    "one too many": {},
    "oversize": {
        "member": "WrapMemfd",
        "signature": "aha(utt)a{sv}",
        "body": [[0], [[0, 0, 4096]] * 3000, {}],
    },
}


async def test_fds_of_other_messages_are_never_received(tmp_path: Path) -> None:
    """Not for a moment: whoever received one could not even end any more."""
    async with FakeBus(tmp_path) as bus, service_on(bus) as service:
        name = bus.join(1001)
        with silent_fds(tmp_path, 2) as fds:
            for fields in STRAYS.values():
                message = Message(destination=bus.service, sender=name, **(IMPORT | fields))
                await bus.send(message, fds if fields is STRAYS["one too many"] else fds[:1])
                assert await get(bus, bus.join(1002), "Version")
                assert silent_count(service) == 0, fields
            os.kill(service.pid, signal.SIGTERM)
            # It can end while the file system still lives.
            await ended(service.pid)
