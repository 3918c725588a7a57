# SPDX-License-Identifier: MIT
"""The installed service sees, from inside its sandbox, which application of which user calls it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.bus.peer import Peer, plain
from udmabufd_client.contract import ADMIN_INTERFACE

pytestmark = [pytest.mark.guest, pytest.mark.root]

ALICE = 1000

HOLDER = """\
import asyncio, sys
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUS_NAME, OBJECT_PATH

async def main():
    connection = await Connection.open("system", receive_fds=True)
    spec = {"size": Variant("t", 12288), "kind": Variant("s", "memfd")}
    reply = await connection.call(BUS_NAME, OBJECT_PATH, ALLOCATOR_INTERFACE, "Allocate", "a{sv}", [spec], timeout=60)
    print("holding", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for fd in reply.fds:
        fd.close()
    connection.close()

asyncio.run(main())
"""


@contextmanager
def holder(*unit: str) -> Iterator[None]:
    """A program of alice's, in a unit of its own, that holds a buffer."""
    command = ["systemd-run", "--quiet", "--collect", "--uid=alice", *unit, "python3", "-c", HOLDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield
        process.communicate()
    assert process.returncode == 0


async def usage(peer: Peer) -> dict[tuple[int, str], dict[str, Any]]:
    (rows,) = await peer.call("GetUsage", interface=ADMIN_INTERFACE)
    return {(row["uid"], row["application"]): row for row in map(plain, rows)}


@pytest.mark.parametrize(
    ("unit", "application"),
    [
        (["--scope", "--unit=app-flatpak-org.example.Painter-4711.scope"], "flatpak:org.example.Painter"),
        (["--scope", "--unit=app-gnome-org.example.My\\x2dEditor-4711.scope"], "org.example.My-Editor"),
        (["--pipe", "--wait", "--unit=snap.camera.daemon.service"], "snap:camera"),
        (["--pipe", "--wait", "--unit=recorder@7.service"], "recorder@7.service"),
    ],
)
async def test_a_buffer_is_of_the_application_that_asked_for_it(peer: Peer, unit: list[str], application: str) -> None:
    with holder(*unit):
        rows = await usage(peer)
        assert rows[ALICE, application]["buffers"] == 1
        assert rows[ALICE, application]["bytes"] == 12288
    # As the tests themselves, who are root in some unit.
    assert all(key[0] != 0 or key[1] for key in rows)
