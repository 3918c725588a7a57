# SPDX-License-Identifier: MIT
"""The installed service killed, restarted and stopped: dma-bufs, their bytes and their books come through."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.bus.peer import Peer, spec
from tests.bus.service import RunningService
from tests.kernel import unit
from tests.kernel.accord import PATIENCE, look, settled, usage
from tests.kernel.crowd import Crowd, paint
from tests.kernel.witness import bufinfo, main_pid
from tests.system import stepper
from tests.system.books import Entries, entries
from udmabufd_base.errors import RemoteError
from udmabufd_client import aio
from udmabufd_client.contract import buffer_id

pytestmark = pytest.mark.guest

PAGE = mmap.PAGESIZE
MIB = 1 << 20
SLICE = "udmabufd.slice"
INSTALLED = Path("/usr/lib/udmabufd/python")


TRAP = f"""\
[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I {Path(stepper.__file__)}
Environment={stepper.SOCKET}=udmabufd-stepper
"""


async def cut_off(call: Any) -> None:
    """Make a call during which the service is killed."""
    with pytest.raises(RemoteError) as caught:
        await call
    assert caught.value.name in unit.AWAY


async def test_a_kill_between_two_steps(root: Peer, service: RunningService, long_run: bool) -> None:
    trap = stepper.Stepper("udmabufd-stepper")
    pattern = b"kept all along!!"
    starts = 0
    with unit.drop_in("trap", TRAP):
        await unit.killed()
        await unit.serving(root)
        held, held_fd, _ = await root.allocate(size=PAGE, name="held")
        paint(held_fd.fileno(), pattern, PAGE)
        (ticket,) = await root.call("GetTicket", path=held)
        before = await settled(root)

        async def back() -> Entries:
            nonlocal starts
            starts += 1
            await unit.serving(root)
            listed = await settled(root)
            assert listed[buffer_id(held)] == before[buffer_id(held)]
            assert await root.call("GetTicket", path=held) == [ticket]
            fd, _ = await root.call("GetFd", "a{sv}", {}, path=held)
            assert look(fd) == look(held_fd) == pattern
            fd.close()
            return listed

        # Stored and not recorded: given up. Recorded and not answered: the caller's.
        for step, made in ((2, 0), (6, 1))[: 2 if long_run else 1]:
            client = await Peer.connect(service.address)
            await client.get("Version")
            trap.arm(step)
            await cut_off(client.allocate(size=MIB, name="made"))
            assert len(await back()) == 1 + made, step
            client.close()

        # The kernel knows the new name, the record the old one.
        trap.arm(2)
        await cut_off(root.call("SetName", "s", "cut off", path=held))
        assert len(await back()) == 1

        # A second descriptor of the memory is stored; it is recorded; the memory is proven free; it is forgotten.
        steps = (6, "state"), (11, "state"), (8, "store: FDSTOREREMOVE"), (13, "store: FDSTOREREMOVE")
        for step, what in steps[: 4 if long_run else 2]:
            client = await Peer.connect(service.address)
            path, fd, _ = await client.allocate(size=MIB, name="released")
            fd.close()
            trap.arm(step)
            release = asyncio.ensure_future(client.call("Release", path=path))
            await asyncio.wait((release,))
            release.exception()
            assert len(await back()) == 1, what
            client.close()

        # The share of an import is recorded, and not yet that the buffer lives again.
        client = await Peer.connect(service.address)
        path, fd, info = await client.allocate(size=PAGE, name="revived")
        await client.call("Release", path=path)
        trap.arm(3)
        await cut_off(client.import_fd(fd))
        assert (await back())[buffer_id(path)]["inode"] == info["inode"]
        assert await client.get("State", path=path) == "backed"
        client.close()
        fd.close()
    await unit.killed()
    await unit.serving(root)
    print(f"{starts} kills between steps")
    await root.call("Release", path=held)
    held_fd.close()


async def test_a_restart_a_watchdog_and_an_upgrade_leave_everything(root: Peer, service: RunningService) -> None:
    with ExitStack() as closing:
        client, other, mortal = [await Peer.connect(service.address) for _ in range(3)]
        for peer in (client, other, mortal):
            closing.callback(peer.close)
        pattern = b"through restarts"
        path, fd, _ = await client.allocate(size=MIB, name="first")
        paint(fd.fileno(), pattern, MIB)
        await client.call("SetName", "s", "renamed", path=path)
        (ticket,) = await client.call("GetTicket", path=path)
        await other.call("ImportTicket", "s", ticket)
        await client.call("CreateBuffer", "a{sv}", spec(size=PAGE, name="empty"))
        await other.allocate(size=PAGE, kind="memfd", name="memfd")
        lingers, kept, _ = await other.allocate(size=PAGE, name="lingers")
        await other.call("Release", path=lingers)
        before = await entries(root)
        figures = await usage(root), await asyncio.to_thread(unit.stored)

        async def as_before(what: str) -> None:
            await unit.serving(root)
            assert await entries(root) == before, what
            assert (await usage(root), await asyncio.to_thread(unit.stored)) == figures, what
            for peer in (client, other):
                assert await peer.call("GetTicket", path=path) == [ticket]
            again, _ = await other.call("GetFd", "a{sv}", {}, path=path)
            assert look(again, MIB) == look(fd, MIB) == pattern
            again.close()
            assert bufinfo()[before[buffer_id(path)]["inode"]].name == "renamed"

        with unit.drop_in("watchdog", "[Service]\nWatchdogSec=4s\n"):
            # What systemd/install does where it is installed already, without fetching packages: a restart in the end.
            copy = INSTALLED.with_name("python.new")
            shutil.copytree(INSTALLED, copy, symlinks=True)
            INSTALLED.rename(INSTALLED.with_name("python.old"))
            copy.rename(INSTALLED)
            shutil.rmtree(INSTALLED.with_name("python.old"))
            for command in ("daemon-reload", f"restart {unit.UNIT}"):
                await asyncio.to_thread(unit.systemctl, *command.split())
            await as_before("upgrade and restart")

            # While the service hangs somebody dies; it is noticed by the next start.
            _, _, info = await mortal.allocate(size=PAGE, name="orphan")
            orphan = info["inode"]
            then, pid = time.monotonic(), main_pid(unit.UNIT)
            os.kill(pid, signal.SIGSTOP)
            mortal.close()
            await unit.active_since(then)
            assert main_pid(unit.UNIT) != pid
            await unit.serving(root)
            await unit.until(lambda: orphan not in bufinfo())
            await as_before("watchdog")

        # A stop ends all, whatever clients still have open.
        await asyncio.to_thread(unit.systemctl, "stop", unit.UNIT)
        assert unit.stored() == 0
        fd.close()
        kept.close()
        for peer in (client, other):
            peer.close()
        assert not [one for one in bufinfo().values() if one.exporter == "udmabuf"]
        await asyncio.to_thread(unit.systemctl, "start", unit.UNIT)
        assert await settled(root) == {}


def state_of(pid: int) -> int:
    """Open the state of the service's process."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if str(entry.readlink()).startswith("/memfd:udmabufd-state"):
            return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    raise AssertionError("no state is open")


def damage(own: str) -> None:
    """Damage the record of one buffer."""
    fd = state_of(main_pid(unit.UNIT))
    try:
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        place = data.index(f'"id":"{own}"'.encode())
        os.pwrite(fd, b"x" * 8, place)
    finally:
        os.close(fd)


async def test_many_stored_buffers(root: Peer, service: RunningService, long_run: bool) -> None:
    config = Path("/run/udmabufd/udmabufd.toml")
    config.parent.mkdir(exist_ok=True)
    count = 992 if long_run else 496
    with ExitStack() as closing:
        closing.callback(config.unlink, missing_ok=True)
        if long_run:
            config.write_text("[limits]\nmax_buffers_per_user = 1000\n")
            await unit.killed()
            await unit.serving(root)
        client = await Peer.connect(service.address)
        closing.callback(client.close)
        _, fd, _ = await client.allocate(size=PAGE, name="first")
        paint(fd.fileno(), b"one among many!!", PAGE)
        for _ in range(count // 16):
            _, fds, _ = await client.call("AllocateMany", "a{sv}u", spec(size=PAGE), 16)
            for one in fds:
                one.close()
        await client.allocate(size=PAGE, name="last")
        before = await settled(root)
        assert len(before) == count + 2
        seconds = await unit.killed()
        await unit.serving(root)
        print(f"started with {unit.stored()} descriptors of {len(before)} buffers in {seconds:.1f} s")
        assert await entries(root) == before

        # A maximum whose descriptors would not fit is refused, and costs nothing.
        config.write_text("[limits]\nmax_buffers = 2000\n")
        then = time.monotonic()
        await asyncio.to_thread(unit.kill)
        await unit.until(lambda: "status=78/CONFIG" in unit.journal())
        told = unit.journal()
        assert "max_buffers is 2000, which takes 6008 descriptors" in told
        assert "room for 3008: set FileDescriptorStoreMax=6008" in told
        if long_run:
            config.write_text("[limits]\nmax_buffers_per_user = 1000\n")
        else:
            config.unlink()
        damaged = next(own for own, entry in before.items() if entry["name"] == "first")
        await unit.active_since(then)
        await unit.serving(root)
        assert await entries(root) == before

        # One record that cannot be read: everything is kept, and given back by root's decision.
        damage(damaged)
        await unit.killed()
        await unit.serving(root)
        assert (await entries(root), unit.stored()) == ({}, 1 + 2 * len(before))
        with pytest.raises(RemoteError, match="is damaged.*udmabufctl recover"):
            await client.allocate(size=PAGE)
        said = subprocess.run(["udmabufctl", "recover"], check=True, stdout=subprocess.PIPE, text=True).stdout
        print("\n".join(said.splitlines()[-3:]))
        del before[damaged]
        now = await entries(root)
        assert {own: now[own] for own in before} == before
        (kept,) = set(now) - set(before)
        assert (now[kept]["state"], now[kept]["holders"], now[kept]["name"]) == ("lingering", 0, "first")
        again, _ = await client.import_fd(fd)
        assert buffer_id(again) == kept
        assert look(fd) == b"one among many!!"
        assert len(await settled(root)) == len(before) + 1


async def test_the_client_goes_on_after_a_restart_of_the_bus(service: RunningService) -> None:
    pattern = b"over two buses!!"
    async with aio.Client.connect(service.address, timeout=PATIENCE) as client:
        buffer = await client.allocate(size=MIB, name="survives")
        paint(buffer.fileno(), pattern, MIB)
        empty = await client.create(size=PAGE, name="empty")
        path = buffer.path
        then = time.monotonic()
        # Debian's unit refuses to be restarted.
        await asyncio.to_thread(unit.systemctl, "kill", "--signal=KILL", "--kill-whom=main", "dbus.service")
        await buffer.refresh()
        await empty.refresh()
        print(f"held again {time.monotonic() - then:.1f} s after the end of the bus")
        assert not buffer.lost
        assert not empty.lost
        assert (buffer.path, buffer.state, empty.state) == (path, "backed", "empty")
        listed = {entry.name: entry for entry in await client.list_buffers()}
        assert listed["survives"].holders == listed["empty"].holders == 1
        await empty.get_fd()
        crowd = Crowd(service.address)
        crowd.check(buffer.fileno(), pattern, MIB)
        buffer.close()
        empty.close()
    root = await Peer.connect(service.address)
    try:
        assert await settled(root) == {}
    finally:
        root.close()
