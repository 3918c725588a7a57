# SPDX-License-Identifier: MIT
"""The service on a bus that the tests play themselves: it must not see the difference."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.bus.echo_service import fd_count
from tests.bus.fake_bus import FakeBus, service_on
from tests.bus.peer import PROPERTIES, plain
from udmabufd_base.codec import Variant
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH, Connection
from udmabufd_base.errors import ConnectionLost, RemoteError
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUS_NAME, OBJECT_PATH

pytestmark = pytest.mark.host


async def get(bus: FakeBus, name: str, member: str) -> object:
    reply = await bus.call(name, OBJECT_PATH, PROPERTIES, "Get", "ss", [ALLOCATOR_INTERFACE, member])
    return reply.body[0].value


async def test_the_service_serves_on_it(tmp_path: Path) -> None:
    async with FakeBus(tmp_path) as bus:
        async with service_on(bus) as service:
            assert bus.names == {BUS_NAME: bus.service}
            name = bus.join(1000)
            assert await get(bus, name, "Buffers") == 0
            spec = {"size": Variant("t", 4096), "kind": Variant("s", "memfd")}
            reply = await bus.call(name, OBJECT_PATH, ALLOCATOR_INTERFACE, "Allocate", "a{sv}", [spec])
            with reply.fds[0] as fd:
                assert plain(reply.body[2])["size"] == 4096
                assert str(Path(f"/proc/self/fd/{fd.fileno()}").readlink()).startswith("/memfd:")
            assert bus.asked.count("GetConnectionCredentials") == 1
            await bus.leave(name)
            with pytest.raises(RemoteError):
                await bus.call(name, OBJECT_PATH, ALLOCATOR_INTERFACE, "CreateBuffer", "a{sv}", [spec])
            other = bus.join(1000)
            async with asyncio.timeout(20):
                while await get(bus, other, "Buffers"):
                    pass
            pid = service.pid
        assert not Path(f"/proc/{pid}/status").exists()


async def test_what_it_answers(tmp_path: Path) -> None:
    before = fd_count()
    async with FakeBus(tmp_path) as bus:
        name = bus.join(4711, process_fd=True)
        bus.clients[name].outgoing_fds = 3
        connection = await Connection.open(bus.address, receive_fds=True)
        assert connection.unique_name == bus.service

        async def ask(member: str, *arguments: str, interface: str = BUS) -> object:
            reply = await connection.call(BUS, BUS_PATH, interface, member, "s" * len(arguments), list(arguments))
            fds.extend(reply.fds)
            return plain(reply.body[0]) if isinstance(reply.body[0], dict) else reply.body[0]

        fds: list[OwnedFd] = []
        await connection.request_name("org.example.Mine")
        await connection.add_match("type='signal'")
        assert await ask("GetNameOwner", "org.example.Mine") == connection.unique_name
        assert await ask("NameHasOwner", name) is True
        assert await ask("NameHasOwner", ":1.99") is False
        credentials = await ask("GetConnectionCredentials", name)
        assert isinstance(credentials, dict)
        assert (credentials["UnixUserID"], credentials["ProcessFD"], len(fds)) == (4711, 0, 1)
        stats = await ask("GetConnectionStats", name, interface="org.freedesktop.DBus.Debug.Stats")
        assert stats == {"IncomingFDs": 0, "OutgoingFDs": 3}
        for member in ("GetConnectionCredentials", "GetNameOwner"):
            with pytest.raises(RemoteError, match="NameHasNoOwner"):
                await ask(member, ":1.99")
        with pytest.raises(RemoteError, match="ServiceUnknown"):
            await connection.call("org.example.Nobody", "/", "org.example.I", "M")
        close_all(fds)
        connection.close()
    assert fd_count() == before


async def test_a_service_that_goes_fails_the_calls(tmp_path: Path) -> None:
    async with FakeBus(tmp_path) as bus:
        for _ in range(2):
            arrived = asyncio.Event()
            connection = await Connection.open(
                bus.address,
                receive_fds=False,
                handler=lambda i, arrived=arrived: arrived.set(),  # type: ignore[misc]
            )
            name = bus.join(0)
            call = asyncio.create_task(bus.call(name, "/", "org.example.I", "Never"))
            await arrived.wait()
            connection.close()
            with pytest.raises(ConnectionLost):
                await call
