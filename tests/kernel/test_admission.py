# SPDX-License-Identifier: MIT
"""No request gets the service killed: what does not fit is refused before it is made, with figures."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bus.memfds import until
from tests.bus.peer import Peer, spec
from tests.bus.service import RunningService
from tests.kernel.witness import CGROUP
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ERROR_PREFIX

pytestmark = pytest.mark.guest

MIB = 1 << 20
SLICE = "udmabufd.slice"
UNIT = "udmabufd.service"


@contextmanager
def memory_max(value: str) -> Iterator[None]:
    """Give the slice another limit for a while, as an administrator would."""
    try:
        subprocess.run(["systemctl", "set-property", "--runtime", SLICE, f"MemoryMax={value}"], check=True)
        yield
    finally:
        # The kernel learns of a limit that is set, not of one that is taken back.
        subprocess.run(["systemctl", "set-property", "--runtime", SLICE, "MemoryMax=50%"], check=True)
        subprocess.run(["systemctl", "revert", SLICE], check=True)


def limit() -> str:
    return (CGROUP / SLICE / "memory.max").read_text().strip()


def charged() -> int:
    """As memory_current(), without asking systemd each time."""
    return int((CGROUP / SLICE / "memory.current").read_text())


def kills() -> int:
    """Processes of the slice that the kernel has killed for memory."""
    return int(dict(line.split() for line in (CGROUP / SLICE / "memory.events").read_text().splitlines())["oom_kill"])


def restarts() -> str:
    command = ["systemctl", "show", "--property", "NRestarts", "--value", UNIT]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_the_slice_is_the_services_and_has_half_of_the_machine(service: RunningService) -> None:
    command = ["systemctl", "show", "--property", "ControlGroup", "--value", UNIT]
    group = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    assert group == f"/{SLICE}/{UNIT}"
    with open("/proc/meminfo") as meminfo:
        (total,) = re.findall(r"^MemTotal:\s+([0-9]+) kB$", meminfo.read(), re.MULTILINE)
    assert abs(int(limit()) / (int(total) * 1024) - 0.5) < 0.01


async def settled(peer: Peer) -> None:
    async def nothing() -> bool:
        return bool(await peer.get("Buffers") == 0)

    await until(nothing)


async def test_too_small_a_limit_ends_in_typed_errors_and_no_kill(
    service: RunningService, peer: Peer, long_run: bool
) -> None:
    await settled(peer)
    pid, before = service.pid, restarts()
    count = 10_000 if long_run else 2_000
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    told: Counter[str] = Counter()
    held: list[tuple[str, OwnedFd]] = []
    with memory_max("192M"):
        assert limit() == str(192 * MIB)

        async def ask(count: int) -> None:
            """Ask for `count` buffers alike in one call, for a single one by Allocate."""
            # Near the limit each buffer is filled by a process of its own: few and large ones are quicker to reach it.
            size = chance.choice([4 * MIB, 8 * MIB, 16 * MIB] if count > 1 else [65536, MIB, 16 * MIB, 64 * MIB])
            try:
                if count == 1:
                    path, fd, _ = await peer.allocate(size=size, allocator="udmabuf")
                    made = [(path, fd)]
                else:
                    asked = spec(size=size, allocator="udmabuf")
                    paths, fds, _ = await peer.call("AllocateMany", "a{sv}u", asked, count)
                    made = list(zip(paths, fds, strict=True))
            except RemoteError as error:
                told[error.name.removeprefix(ERROR_PREFIX)] += count
                if error.name == f"{ERROR_PREFIX}OutOfMemory":
                    text = rf"{size * count} more bytes .* memory.max of {SLICE} of {192 * MIB}; [0-9]+ are in use"
                    assert re.search(text, str(error))
            else:
                told["served"] += count
                held.extend(made)

        async def give_back(number: int) -> None:
            await asyncio.gather(*(release(*held.pop(chance.randrange(len(held)))) for _ in range(number)))

        async def release(path: str, fd: OwnedFd) -> None:
            await peer.call("Release", path=path)
            fd.close()

        # Several in flight, so that what is promised counts beside what is charged; all below the user's quota.
        while told.total() < count:
            await asyncio.gather(*(ask(many) for many in (16, 4, 16, 2, 1, 1)))
            assert charged() <= 192 * MIB
            if chance.random() < 0.12:
                await give_back(len(held))
        print(f"{dict(told)}; processes killed in the service's place: {kills()}")
        assert told.keys() <= {"served", "OutOfMemory"}
        assert told["served"] > 30
        assert told["OutOfMemory"] > count / 2
        await give_back(len(held))
        await settled(peer)
    assert (service.pid, restarts()) == (pid, before)


async def test_what_fits_no_more_is_told_with_figures(peer: Peer) -> None:
    await settled(peer)
    with memory_max("128M"):
        with pytest.raises(RemoteError, match=f"size: .* more bytes would exceed memory.max of {SLICE}") as caught:
            await peer.allocate(size=64 * MIB, allocator="udmabuf")
            await peer.allocate(size=64 * MIB, allocator="udmabuf")
        assert caught.value.name == f"{ERROR_PREFIX}OutOfMemory"
        # Memory that the clients pay for themselves is no matter of the service's limit.
        path, fd, _ = await peer.allocate(size=256 * MIB, kind="memfd")
        await peer.call("Release", path=path)
        fd.close()
