# SPDX-License-Identifier: MIT
"""udmabufctl move, evict and drain, holders whose buffer moves, and what is shown of it all, as processes."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.bus.fake_allocator import ID, PAGE, PATH, Backing, FakeAllocator
from tests.bus.moving_buffer import Mover
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_cli_admin import begin
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming
from udmabufd_client.cli.progress import FIRST
from udmabufd_client.contract import ATTACHMENT_TYPES, ERROR_PREFIX, LIST_TYPES, buffer_path

pytestmark = pytest.mark.host

TICKET = "c0ffee" * 5 + "00"
CARD = "drm:card0"

Ctl = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def backing() -> AsyncIterator[Backing]:
    backing = Backing()
    yield backing
    backing.close()


@pytest.fixture
async def mover(open_bus: PrivateBus, backing: Backing) -> AsyncIterator[Mover]:
    movers: list[Mover] = []

    def prepare(fake: FakeAllocator) -> None:
        movers.append(Mover(fake, backing))
        movers[0].answer()
        fake.answers["GetTicket"] = lambda incoming: fake.reply(incoming.header, "s", TICKET)
        for member in ("Move", "Evict", "Drain"):
            fake.answers.pop(member, None)

    fake = await FakeAllocator.start(open_bus.address, prepare)
    yield movers[0]
    fake.close()


@pytest.fixture
def fake(mover: Mover) -> FakeAllocator:
    return mover.fake


@pytest.fixture
def ctl(open_bus: PrivateBus, fake: FakeAllocator) -> Ctl:
    """Run udmabufctl; return its status and what it said."""

    async def run(*verb: str) -> tuple[int, str, str]:
        process = await begin(open_bus.address, *verb)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    return run


@asynccontextmanager
async def holder(address: str, *more: str) -> AsyncIterator[tuple[Process, dict[str, Any]]]:
    """A `udmabufctl alloc --hold` and what it has shown; ends with status 0."""
    process = await begin(address, "alloc", "--size", "4K", "--hold", "--json", *more)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines: list[bytes] = []
        async with asyncio.timeout(30):
            while not lines or lines[-1] not in (b"}\n", b""):
                lines.append(await process.stdout.readline())
        if lines[-1] != b"}\n":
            pytest.fail((await process.stderr.read()).decode())
        yield process, json.loads(b"".join(lines))
        process.terminate()
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        # It would keep its name, which the next one needs.
        if process.returncode is None:
            process.kill()
            await process.wait()


async def said(process: Process) -> str:
    """Return the next line of standard error."""
    assert process.stderr is not None
    async with asyncio.timeout(30):
        return (await process.stderr.readline()).decode()


def rows(*those: dict[str, Any]) -> Variant:
    """Return the property Attachments."""
    return Variant("aa{sv}", [{key: Variant(ATTACHMENT_TYPES[key], value) for key, value in r.items()} for r in those])


def has_properties(fake: FakeAllocator, **properties: Variant) -> None:
    fake.answers["GetAll"] = lambda incoming: fake.reply(incoming.header, "a{sv}", properties)


def refuses(fake: FakeAllocator, member: str, error: str, text: str) -> None:
    fake.answers[member] = lambda incoming: fake.fail(incoming.header, ERROR_PREFIX + error, text)


# alloc --dynamic


async def test_a_dynamic_holder_attaches_before_it_has_a_descriptor(open_bus: PrivateBus, mover: Mover) -> None:
    async with holder(open_bus.address, "--device", CARD, "--device", "mem:null", "--dynamic") as (_, shown):
        assert shown["id"] == ID
        assert mover.bodies("Allocate") == []
        (spec,) = mover.bodies("CreateBuffer")[0]
        assert {key: value.value for key, value in spec.items()} == {"size": PAGE}
        attached = [(device, options["dynamic"].value) for device, options in mover.bodies("Attach")]
        assert attached == [(CARD, True), ("mem:null", True)]
        # An unattached descriptor would hold the buffer in place.
        assert [options["attachment"].value for (options,) in mover.bodies("GetFd")] == [1]


async def test_a_dynamic_holder_goes_along_and_says_so(
    open_bus: PrivateBus, mover: Mover, fake: FakeAllocator
) -> None:
    async with holder(open_bus.address, "--device", CARD, "--dynamic") as (process, _):
        mover.ask(1)
        assert await mover.ready() == [[1, 2]]
        # Where it is now may be signalled later.
        has_properties(fake, Allocator=Variant("s", "udmabuf-2M"), Serial=Variant("t", 2))
        mover.move(1)
        assert await said(process) == f"udmabufctl: Buffer {ID} has moved to udmabuf-2M, serial 2.\n"
        await fake.called("GetFd", 2)
        mover.ask(1)
        assert await mover.ready(2) == [[1, 2], [1, 3]]
        mover.cancel(1)
        assert "stays where it is" in await said(process)
        mover.ask(1, evict=True)
        assert await mover.ready(3) == [[1, 2], [1, 3], [1, 3]]
        # Nothing here keeps the memory.
        assert mover.backing.references() == 0
        mover.evict()
        assert "is evicted: its memory can be swapped out" in await said(process)


async def test_a_dynamic_holder_that_gets_nothing_says_why(mover: Mover, ctl: Ctl) -> None:
    refuses(mover.fake, "Attach", "NoSuchDevice", "There is no drm:card0")
    status, out, err = await ctl("alloc", "--size", "4K", "--device", CARD, "--dynamic", "--hold")
    assert (status, out, err) == (1, "", "udmabufctl: There is no drm:card0\n")


# move


async def test_a_held_buffer_is_moved_by_a_share_without_a_descriptor(
    open_bus: PrivateBus, mover: Mover, fake: FakeAllocator, ctl: Ctl
) -> None:
    callers: list[str] = []

    def move(incoming: Incoming) -> None:
        callers.append(incoming.header.sender)
        mover.move(1)
        fake.reply(incoming.header, "t", mover.backing.serial)

    fake.answers["Move"] = move
    async with holder(open_bus.address, "--device", CARD, "--dynamic"):
        status, out, err = await ctl("move", ID, "--allocator", "udmabuf-2M")
        assert (status, err) == (0, "")
        assert out.startswith(f"Buffer {ID} has moved: 4 KiB of ")
        assert out.endswith(", serial 2.\n")
        status, out, _ = await ctl("move", PATH, "--json")
        assert status == 0
        shown = json.loads(out)
        assert (shown["id"], shown["buffer"], shown["serial"], shown["size"]) == (ID, PATH, 3, PAGE)
        assert (shown["state"], set(shown)) == (
            "backed",
            {"id", "buffer", "serial", "state", "allocator", "size"},
        )
        assert [{key: value.value for key, value in options.items()} for (options,) in mover.bodies("Move")] == [
            {"allocator": "udmabuf-2M"},
            {},
        ]
        assert mover.bodies("ImportTicket") == [[TICKET], [TICKET]]
        askers = {header.sender for header, _ in fake.calls if header.member in ("GetFd", "Attach")}
        assert len(set(callers)) == 2
        assert askers == {mover.client}, "who moves has neither descriptor nor attachment"


async def test_any_buffer_is_moved_by_its_ticket(mover: Mover, fake: FakeAllocator, ctl: Ctl) -> None:
    fake.answers["Move"] = lambda incoming: fake.reply(incoming.header, "t", 2)
    status, _, err = await ctl("move", TICKET.upper())
    assert (status, err) == (0, "")
    assert mover.bodies("ImportTicket") == [[TICKET]]


@pytest.mark.parametrize("verb", ["move", "evict"])
async def test_whose_holder_is_no_udmabufctl_is_named_by_ticket(verb: str, fake: FakeAllocator, ctl: Ctl) -> None:
    status, out, err = await ctl(verb, "f" * 16)
    assert (status, out) == (1, "")
    assert err.startswith(f"udmabufctl: No udmabufctl holds buffer {'f' * 16}")
    assert "ticket" in err
    assert err.count("\n") == 1


BUSY = "The buffer is held in place: attachment 1 (drm:card0) is in the way"


@pytest.mark.parametrize("verb", ["move", "evict"])
@pytest.mark.parametrize(
    ("properties", "step"),
    [
        ({"Attachments": rows({"attachment": 1, "device": CARD, "dynamic": False})}, "attach it dynamically"),
        ({"Attachments": rows({"attachment": 1, "device": CARD, "dynamic": True, "pins": 2})}, "takes the pin back"),
        (
            {"Attachments": rows({"attachment": 1, "device": CARD, "dynamic": True})},
            "counts its holders and references; ",
        ),
        ({"Attachments": rows()}, f"'udmabufctl info {ID}'"),
        ({"State": Variant("s", "moving"), "Attachments": rows()}, "Try again when that is over."),
        ({}, "counts its holders and references; "),
    ],
)
async def test_a_buffer_that_stays_is_explained(
    verb: str, properties: dict[str, Variant], step: str, fake: FakeAllocator, ctl: Ctl
) -> None:
    has_properties(fake, **properties)
    refuses(fake, verb.capitalize(), "Busy", BUSY)
    status, out, err = await ctl(verb, TICKET)
    assert (status, out) == (1, "")
    assert err.startswith(f"udmabufctl: {BUSY}. ")
    assert step in err
    assert err.count("\n") == 1


async def test_an_importer_that_does_not_answer_is_named_as_the_cause(fake: FakeAllocator, ctl: Ctl) -> None:
    refuses(fake, "Move", "MoveTimedOut", "1 of 2 importers did not answer within 5000 ms")
    status, _, err = await ctl("move", TICKET)
    assert status == 1
    assert err.startswith("udmabufctl: 1 of 2 importers did not answer within 5000 ms. Nothing has changed. Try again")
    assert "move_timeout_msec" in err


async def test_other_refusals_are_as_the_service_says_them(fake: FakeAllocator, ctl: Ctl) -> None:
    refuses(fake, "Move", "NotSupported", "Memory of memfd is the clients' own and stays where it is")
    assert await ctl("move", TICKET) == (
        1,
        "",
        "udmabufctl: Memory of memfd is the clients' own and stays where it is\n",
    )


async def test_a_move_that_takes_long_is_reported(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    before = asyncio.get_running_loop().time()
    process = await begin(open_bus.address, "move", TICKET, "--json")
    (header,) = await fake.called("Move")
    assert await said(process) == (
        f"udmabufctl: Moving buffer {ID}, 4 KiB: those who use it have to let go of it first\n"
    )
    assert asyncio.get_running_loop().time() - before >= FIRST
    fake.reply(header, "t", 2)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert (process.returncode, json.loads(out)["serial"], err) == (0, 2, b"")


# evict


async def test_evict_says_what_has_become_of_it(mover: Mover, fake: FakeAllocator, ctl: Ctl) -> None:
    def evict(incoming: Incoming) -> None:
        mover.backing.state = "evicted"
        fake.reply(incoming.header)

    fake.answers["Evict"] = evict
    status, out, err = await ctl("evict", TICKET)
    assert (status, err) == (0, "")
    assert out == f"Buffer {ID} is evicted: 4 KiB can be swapped out until its next use.\n"
    shown = json.loads((await ctl("evict", TICKET, "--json"))[1])
    assert (shown["id"], shown["state"], shown["size"]) == (ID, "evicted", PAGE)
    assert mover.bodies("GetFd") == [], "which would bring it back"

    fake.answers["Evict"] = lambda incoming: fake.reply(incoming.header)
    mover.backing.state = "backed"
    assert (await ctl("evict", TICKET))[1] == f"Buffer {ID} was evicted, and somebody uses it again.\n"


# drain


def listed(number: int, allocator: str, state: str = "backed", size: int = PAGE) -> dict[str, Any]:
    row = {"buffer": buffer_path(f"{number:016x}"), "allocator": allocator, "state": state, "size": size}
    return {key: Variant(LIST_TYPES[key], value) for key, value in (row | {"charged": size}).items()}


class Draining:
    """A service that has buffers, which move when a test says so."""

    def __init__(self, fake: FakeAllocator) -> None:
        self.rows = [listed(1, "udmabuf"), *(listed(n, "heap:a", size=n << 20) for n in range(2, 9))]
        self.rows += [listed(9, "heap:a", "evicted"), listed(10, "heap:a", "lingering")]
        fake.answers["ListBuffers"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", self.rows)

    def move(self, *numbers: int) -> None:
        for number in numbers:
            self.rows[number - 1] = listed(number, "udmabuf", size=number << 20)


async def test_drain_says_what_has_moved(fake: FakeAllocator, ctl: Ctl) -> None:
    draining = Draining(fake)

    def drain(incoming: Incoming) -> None:
        draining.move(*range(2, 9))
        fake.reply(incoming.header)

    fake.answers["Drain"] = drain
    status, out, err = await ctl("drain", "heap:a")
    assert (status, err) == (0, "")
    assert out.startswith("heap:a is drained: 7 buffers")
    assert out.endswith(" moved, 35 MiB.\n")
    draining.rows[1] = listed(2, "heap:a", size=3)
    status, out, _ = await ctl("drain", "heap:a", "--json")
    assert json.loads(out) == {"allocator": "heap:a", "moved": 1, "bytes": 3}
    assert [body for header, body in fake.calls if header.member == "Drain"] == [["heap:a"], ["heap:a"]]


async def test_what_ends_or_is_evicted_during_a_drain_has_not_moved(fake: FakeAllocator, ctl: Ctl) -> None:
    draining = Draining(fake)

    def drain(incoming: Incoming) -> None:
        draining.move(*range(3, 9))
        draining.rows[2] = listed(3, "udmabuf", "evicted", 3 << 20)
        del draining.rows[1]
        fake.reply(incoming.header)

    fake.answers["Drain"] = drain
    _, out, _ = await ctl("drain", "heap:a", "--json")
    assert json.loads(out) == {"allocator": "heap:a", "moved": 5, "bytes": 30 << 20}


async def test_a_drain_that_takes_long_says_how_many_are_left(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    draining = Draining(fake)
    process = await begin(open_bus.address, "drain", "heap:a")
    (header,) = await fake.called("Drain")
    draining.move(2, 3)
    assert await said(process) == "udmabufctl: Draining heap:a: 5 of 7 buffers are left\n"
    # Once for each change, and not once for each look.
    looks = [header.member for header, _ in fake.calls].count("ListBuffers")
    await fake.called("ListBuffers", looks + 1)
    draining.move(4, 5, 6, 7, 8)
    assert await said(process) == "udmabufctl: Draining heap:a: 0 of 7 buffers are left\n"
    fake.reply(header)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"heap:a is drained: 7 buffers")


@pytest.mark.parametrize("error", ["Busy", "MoveTimedOut"])
async def test_buffers_that_cannot_leave_are_counted_and_named(fake: FakeAllocator, ctl: Ctl, error: str) -> None:
    draining = Draining(fake)

    def drain(incoming: Incoming) -> None:
        draining.move(2)
        text = "6 of 7 buffers stay in heap:a; the first because: The buffer is held in place: it is pinned"
        fake.fail(incoming.header, ERROR_PREFIX + error, text)

    fake.answers["Drain"] = drain
    status, out, err = await ctl("drain", "heap:a")
    assert (status, out) == (1, "")
    assert err.startswith("udmabufctl: 6 of 7 buffers stay in heap:a; the first because: The buffer is held in place:")
    assert "What has moved stays moved. Left are 0000000000000003, " in err
    assert "0000000000000006 and 2 more. " in err
    assert "0000000000000002" not in err
    assert err.endswith("drain it again.\n")
    assert err.count("\n") == 1


async def test_who_may_not_drain_is_told_who_may(fake: FakeAllocator, ctl: Ctl) -> None:
    refuses(fake, "Drain", "AccessDenied", "Only root may do this")
    status, _, err = await ctl("drain", "heap:a")
    assert status == 1
    assert err.startswith(
        "udmabufctl: drain is for root and for those whom polkit allows org.udmabufd.admin: try sudo"
    )


async def test_ctrl_c_ends_a_drain_at_once(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    Draining(fake)
    process = await begin(open_bus.address, "drain", "heap:a")
    await fake.called("Drain")
    process.send_signal(2)
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")


# What is shown


async def test_list_and_info_show_what_is_moving_and_evicted(fake: FakeAllocator, ctl: Ctl) -> None:
    some = [listed(1, "udmabuf", "moving"), listed(2, "udmabuf", "evicted", 3 << 20), listed(3, "udmabuf", "evicted")]
    fake.answers |= {
        "ListBuffers": lambda incoming: fake.reply(incoming.header, "aa{sv}", some),
        "GetUsage": lambda incoming: fake.reply(incoming.header, "aa{sv}", []),
    }
    _, out, _ = await ctl("list")
    assert [line.split()[2] for line in out.splitlines()] == ["STATE", "moving", "evicted", "evicted"]
    _, out, _ = await ctl("list", "--all")
    sums = out.split("\n\n")[1].splitlines()
    assert sums[0].split() == ["USER", "BUFFERS", "BYTES", "LINGERING", "EVICTED", "REFERENCES", "REFUSALS"]
    assert sums[1].split() == ["total", "0", "0", "B", "0", "B", "3.0", "MiB", "-", "0"]
    assert json.loads((await ctl("list", "--all", "--json"))[1])["total"]["evicted"] == (3 << 20) + PAGE
    moving, evicted = [(await ctl("info", f"{number:016x}"))[1] for number in (1, 2)]
    assert "moving (it is about to get other memory; calls that need it wait)\n" in moving
    assert "evicted (its memory can be swapped out; the next use brings it back)\n" in evicted
    assert "3145728 (3 MiB), apart from what is in memory\n" in evicted
    assert json.loads((await ctl("info", f"{2:016x}", "--json"))[1])["state"] == "evicted"


async def test_top_shows_what_is_evicted_beside_what_is_charged(fake: FakeAllocator, ctl: Ctl) -> None:
    has_properties(fake, EvictedBytes=Variant("t", 5 << 20))
    _, out, _ = await ctl("top", "-n", "1")
    heading, user, total = (line.split() for line in out.splitlines()[:3])
    assert heading == ["USER", "APPLICATION", "BUFFERS", "BYTES", "LINGERING", "EVICTED", "REFUSALS"]
    assert user[-2:] == ["-", "0"], "whose they are is not told"
    assert total[-3:] == ["5", "MiB", "0"]
    assert json.loads((await ctl("top", "-n", "1", "--json"))[1])["evicted"] == 5 << 20
    has_properties(fake)
    assert json.loads((await ctl("top", "-n", "1", "--json"))[1])["evicted"] is None
