# SPDX-License-Identifier: MIT
"""The client over restarts of the bus: it connects again, imports its buffers again, and says which are lost."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.bus.fake_allocator import ID, PAGE, PATH, FakeAllocator, info, page
from tests.bus.private_bus import OPEN_POLICY, PrivateBus
from tests.bus.test_client_restart import TICKET, answer_all, calls, deaf
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming
from udmabufd_client import errors, new_request_id, sync
from udmabufd_client.aio import Client
from udmabufd_client.contract import buffer_path

pytestmark = pytest.mark.host

OTHER = "fedcba9876543210"


class MortalBus(PrivateBus):
    """A bus that can be started again at the same address, as systemd does it."""

    def again(self) -> None:
        """Start it; returns when it listens. It knows nothing of its former connections."""
        ready, announce = os.pipe()
        with open(ready) as announcement:
            self._process = subprocess.Popen(
                [
                    "dbus-daemon",
                    f"--config-file={self._directory / 'bus.conf'}",
                    "--nofork",
                    "--nopidfile",
                    f"--print-address={announce}",
                ],
                pass_fds=[announce],
                stderr=self._log,
            )
            os.close(announce)
            assert announcement.readline()


@pytest.fixture
def bus() -> Iterator[MortalBus]:
    with MortalBus(policies=[], extra_policy=OPEN_POLICY) as bus:
        yield bus


Start = Callable[..., Awaitable[FakeAllocator]]


@pytest.fixture
async def start(bus: MortalBus) -> AsyncIterator[Start]:
    """Start a service that knows the same buffer as every other."""
    started: list[FakeAllocator] = []

    async def start(prepare: Callable[[FakeAllocator], object] = answer_all) -> FakeAllocator:
        started.append(await FakeAllocator.start(bus.address, prepare))
        return started[-1]

    yield start
    for fake in started:
        fake.close()


def taking(fake: FakeAllocator, taken: asyncio.Event) -> None:
    """Have the service take imports and never answer."""
    answer_all(fake).answers["Import"] = lambda incoming: taken.set()


class Told:
    """Counts what on_reconnect tells."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._event.set()

    async def wait(self) -> None:
        async with asyncio.timeout(20):
            await self._event.wait()
        self._event.clear()


async def test_a_buffer_is_imported_again_by_its_descriptor(bus: MortalBus, start: Start) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer, buffer.map() as view:
            view[0] = 7
            inode = os.fstat(buffer.fileno()).st_ino
            bus.kill()
            async with asyncio.timeout(20):
                await client.wait_lost()
            # Made while there is no bus: it waits for it.
            waiting = asyncio.ensure_future(buffer.get_ticket())
            bus.again()
            again = await start()
            assert await waiting == TICKET
            await told.wait()
            assert not buffer.lost
            assert told.count == 1
            assert client.unique_name.startswith(":")
            members = [header.member for header, _ in again.calls]
            assert members[:2] == ["Import", "GetTicket"], "the share first"
            assert again.inodes[0] == [inode]
            view[1] = 8
            again.changed(client.unique_name, {"Name": Variant("s", "renamed")})
            await client.list_buffers()
            assert buffer.name == "renamed"
        assert (await again.called("Release"))[0].path == PATH


async def test_each_share_is_had_again_once(bus: MortalBus, start: Start) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as one, await client.allocate(size=PAGE) as two:
            assert one.path == two.path
            bus.kill()
            bus.again()
            again = await start()
            await told.wait()
            await client.list_buffers()
            assert calls(again, "Import") == 2
        await again.called("Release", 2)


@pytest.mark.parametrize("kind", ["created", "imported", "wrapped", "stolen"])
async def test_a_buffer_without_a_descriptor_is_had_again_by_its_ticket(
    bus: MortalBus, start: Start, kind: str
) -> None:
    first = await start()
    first.answers["CreateBuffer"] = lambda incoming: first.reply(incoming.header, "o", PATH)
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        if kind == "created":
            buffer = await client.create(size=PAGE)
        elif kind == "imported":
            buffer = await client.import_ticket(TICKET)
        elif kind == "wrapped":
            with page() as memfd:
                buffer = await client.wrap([memfd])
        else:
            buffer = await client.allocate(size=PAGE)
            os.close(buffer.steal_fd())
            await first.called("GetTicket")
            await client.list_buffers()
        with buffer:
            assert not buffer.has_fd
            bus.kill()
            bus.again()
            again = await start()
            await told.wait()
            (body,) = [body for header, body in again.calls if header.member == "ImportTicket"]
            assert body == [TICKET]
            assert calls(again, "Import") == 0
            assert not buffer.lost
            await buffer.get_fd()


async def test_a_buffer_that_cannot_be_had_again_is_lost(bus: MortalBus, start: Start) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        lost = await client.allocate(size=PAGE)
        bus.kill()
        bus.again()

        def too_late(again: FakeAllocator) -> None:
            answer_all(again).answers["Import"] = lambda incoming: again.fail(
                incoming.header, "org.udmabufd.Error.NoSuchBuffer", "the grace is over"
            )

        again = await start(too_late)
        await told.wait()
        assert lost.lost
        with pytest.raises(errors.NoSuchBuffer, match="lost in a restart"):
            await lost.get_ticket()
        with lost.map() as view:
            view[0] = 1
        lost.close()
        (await client.allocate(size=PAGE)).close()
        await again.called("Release")
        await client.list_buffers()
        assert calls(again, "Release") == 1


async def test_refusals_that_pass_are_waited_out(bus: MortalBus, start: Start) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer:
            bus.kill()
            bus.again()
            refusals = ["RateLimited", "QuotaExceeded", "OutOfMemory"]

            def busy(again: FakeAllocator) -> None:
                def refuse(incoming: Incoming) -> None:
                    if refusals:
                        again.fail(incoming.header, f"org.udmabufd.Error.{refusals.pop()}", "not now")
                    else:
                        again.reply(incoming.header, "oa{sv}", PATH, info())

                answer_all(again).answers["Import"] = refuse

            await start(busy)
            await told.wait()
            assert (buffer.lost, refusals) == (False, [])


@pytest.mark.parametrize("took_effect", [True, False])
async def test_a_service_that_ends_over_an_import_is_asked_what_it_did(
    bus: MortalBus, start: Start, took_effect: bool
) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer:
            bus.kill()
            bus.again()
            taken = asyncio.Event()
            second = await start(lambda fake: taking(fake, taken))
            async with asyncio.timeout(20):
                await taken.wait()
            second.close()

            def unaware(third: FakeAllocator) -> None:
                know, grant = answer_all(third).answers["GetAll"], third.answers["Import"]

                def take(incoming: Incoming) -> None:
                    third.answers["GetAll"] = know
                    grant(incoming)

                third.answers["Import"] = take
                third.answers["GetAll"] = lambda incoming: third.fail(
                    incoming.header, "org.udmabufd.Error.NoSuchBuffer", "you hold none"
                )

            third = await start(answer_all if took_effect else unaware)
            await told.wait()
            assert not buffer.lost
            assert calls(third, "Import") == (0 if took_effect else 1)


async def test_a_buffer_that_is_closed_meanwhile_is_not_had_again(bus: MortalBus, start: Start) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        buffer = await client.allocate(size=PAGE)
        bus.kill()
        await client.wait_lost()
        buffer.close()
        bus.again()
        again = await start()
        await told.wait()
        await client.list_buffers()
        assert calls(again, "Import") == 0
        assert calls(again, "Release") == 0


async def test_a_buffer_that_is_closed_over_its_import_is_given_back(bus: MortalBus, start: Start) -> None:
    await start()
    async with Client.connect(bus.address, timeout=20) as client:
        buffer = await client.allocate(size=PAGE)
        bus.kill()
        bus.again()
        held: list[Incoming] = []

        def holding(again: FakeAllocator) -> None:
            answer_all(again).answers["Import"] = held.append

        again = await start(holding)
        await again.called("Import")
        buffer.close()
        again.reply(held[0].header, "oa{sv}", PATH, info())
        assert (await again.called("Release"))[0].path == PATH


async def test_a_bus_that_dies_twice_is_survived_twice(bus: MortalBus, start: Start) -> None:
    await start()
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer:
            bus.kill()
            bus.again()
            taken = asyncio.Event()
            await start(lambda fake: taking(fake, taken))
            async with asyncio.timeout(20):
                await taken.wait()
            # Over the import of the first time.
            bus.kill()
            bus.again()
            third = await start()
            await told.wait()
            assert (buffer.lost, told.count) == (False, 1)
            assert calls(third, "Import") == 1
            assert await buffer.get_ticket() == TICKET


async def test_calls_that_meet_the_loss(bus: MortalBus, start: Start) -> None:
    first = await start()
    async with Client.connect(bus.address, timeout=20) as client:
        for member in ("ListBuffers", "Allocate", "ImportTicket"):
            deaf(first, member)
        reading = asyncio.ensure_future(client.list_buffers())
        repeating = asyncio.ensure_future(client.allocate(size=PAGE, request_id=new_request_id()))
        plain = asyncio.ensure_future(client.allocate(size=PAGE))
        importing = asyncio.ensure_future(client.import_ticket(TICKET))
        await first.called("ListBuffers")
        await first.called("Allocate", 2)
        await first.called("ImportTicket")
        bus.kill()
        for lost in (plain, importing):
            with pytest.raises(errors.ServiceRestarted, match="ended with the connection"):
                await lost
        bus.again()
        again = await start()
        assert await reading == []
        (await repeating).close()
        assert calls(again, "Allocate") == 1
        assert calls(again, "ImportTicket") == 0


async def test_a_bus_that_does_not_return_is_told_in_time(bus: MortalBus, start: Start) -> None:
    await start()
    async with Client.connect(bus.address, timeout=20) as client:
        with await client.allocate(size=PAGE) as buffer:
            bus.kill()
            await client.wait_lost()
            verbs: list[Callable[[], Awaitable[Any]]] = [
                lambda: client.list_buffers(timeout=0.2),
                lambda: client.allocate(size=PAGE, timeout=0.2),
                lambda: buffer.get_ticket(timeout=0.2),
                lambda: buffer.release(timeout=0.2),
            ]
            for verb in verbs:
                began = time.monotonic()
                with pytest.raises(errors.ServiceUnavailable, match=r"not back within 0\.2 s"):
                    await verb()
                assert time.monotonic() - began < 5
            assert not buffer.released
            waiting = asyncio.ensure_future(client.list_buffers())
            await asyncio.sleep(0)
            await client.close()
            with pytest.raises(errors.ServiceUnavailable, match="closed"):
                await waiting
        with pytest.raises(errors.ServiceUnavailable, match="closed"):
            await client.limits()


async def test_a_callback_that_fails_is_logged_and_harms_nothing(
    bus: MortalBus, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    await start()
    told = Told()

    def fail() -> None:
        told()
        raise LookupError("in the callback")

    async with Client.connect(bus.address, timeout=20, on_reconnect=fail) as client:
        bus.kill()
        bus.again()
        await start()
        await told.wait()
        await client.list_buffers()
    assert "on_reconnect failed" in caplog.text


async def test_without_reconnect_the_loss_is_final(bus: MortalBus, start: Start) -> None:
    await start()
    async with Client.connect(bus.address, timeout=20, reconnect=False) as client:
        created = await client.create(size=PAGE)
        bus.kill()
        await client.wait_lost()
        bus.again()
        again = await start()
        for verb in (client.limits, created.get_ticket, created.get_fd):
            with pytest.raises(errors.ServiceUnavailable, match="connect anew"):
                await verb()
        created.close()
        assert again.calls == []


async def test_the_blocking_client_survives_too(bus: MortalBus, start: Start) -> None:
    await start()
    told = threading.Event()
    client = await asyncio.to_thread(sync.Client.connect, bus.address, timeout=20, on_reconnect=told.set)
    buffer = await asyncio.to_thread(client.allocate, size=PAGE)
    bus.kill()
    waiting = asyncio.ensure_future(asyncio.to_thread(buffer.get_ticket))
    await asyncio.to_thread(client.wait_lost)
    bus.again()
    again = await start()
    assert await waiting == TICKET
    assert await asyncio.to_thread(told.wait, 20)
    assert (buffer.lost, buffer.id) == (False, ID)
    await asyncio.to_thread(buffer.close)
    await again.called("Release")
    again.answers["Allocate"] = lambda incoming: again.grant(incoming.header, OTHER)
    other = await asyncio.to_thread(client.allocate, size=PAGE)
    assert other.path == buffer_path(OTHER)
    other.close()
    await asyncio.to_thread(client.close)
