# SPDX-License-Identifier: MIT
"""The installed unit as tests handle it: killed, started, changed by drop-ins; and how long its starts take."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bus.peer import Peer
from udmabufd_base.errors import RemoteError

UNIT = "udmabufd.service"
DROP_INS = Path("/run/systemd/system/udmabufd.service.d")
PATIENCE = 120.0
"""Seconds for a start in an emulated machine that is busy with other things."""

AWAY = {
    "org.freedesktop.DBus.Error.NoReply",
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
}
"""What a caller is told of a service that ends or starts."""


def systemctl(*arguments: str) -> str:
    """Run systemctl and return what it says. Raises CalledProcessError."""
    return subprocess.run(["systemctl", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def show(*names: str) -> dict[str, str]:
    """Return properties of the unit."""
    lines = systemctl("show", *(f"--property={name}" for name in names), UNIT).splitlines()
    return dict(line.split("=", 1) for line in lines)


def journal() -> str:
    """Return what the service, and systemd about it, have said since the machine was booted."""
    command = ["journalctl", f"--unit={UNIT}", "--boot", "--output=cat"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def stored() -> int:
    """Return how many descriptors systemd keeps."""
    return int(show("NFileDescriptorStore")["NFileDescriptorStore"])


def kill() -> None:
    """End the service's process at once; nothing if there is none at present."""
    command = ["systemctl", "kill", "--signal=KILL", "--kill-whom=main", UNIT]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


async def active_since(then: float, pause: float = 0.25) -> float:
    """Wait until the unit is active, and has become so after `then`; return when. Seconds of the monotonic clock."""
    async with asyncio.timeout(PATIENCE):
        while True:
            said = await asyncio.to_thread(show, "ActiveState", "SubState", "ActiveEnterTimestampMonotonic")
            entered = int(said["ActiveEnterTimestampMonotonic"]) / 1e6
            if (said["ActiveState"], said["SubState"]) == ("active", "running") and entered > then:
                return entered
            await asyncio.sleep(pause)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what systemd or the kernel tells, which is asked in a thread."""
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "this did not come about"
        await asyncio.sleep(0.2)


async def killed() -> float:
    """Kill the service and wait until it serves again; return the seconds that it took."""
    then = time.monotonic()
    await asyncio.to_thread(kill)
    return await active_since(then) - then


async def serving(peer: Peer) -> None:
    """Wait until a call is answered by the service."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await peer.get("Version")
                return
            except RemoteError as error:
                assert error.name in AWAY, error
                await asyncio.sleep(0.1)


@contextmanager
def drop_in(name: str, text: str) -> Iterator[None]:
    """Add to the unit's files; what is changed comes into force at the next start."""
    file = DROP_INS / f"{name}.conf"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    systemctl("daemon-reload")
    try:
        yield
    finally:
        file.unlink()
        systemctl("daemon-reload")
