# SPDX-License-Identifier: MIT
"""udmabufctl's verbs for administrators, and holders over restarts, as processes: what they show and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import termios
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.bus.fake_allocator import PAGE, PATH, FakeAllocator
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_reconnect import Start, bus, start
from tests.bus.test_client_restart import answer_all, calls
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming
from udmabufd_client.contract import USAGE_TYPES, buffer_path

pytestmark = pytest.mark.host

__all__ = ["bus", "start"]

ROWS: list[dict[str, Any]] = [
    {"uid": 0, "application": "encoder.service", "buffers": 2, "bytes": 8 << 20, "lingering": 0, "refusals": 0},
    {"uid": 0, "application": "", "buffers": 1, "bytes": 4096, "lingering": 4096, "refusals": 7},
    {"uid": 4_000_000_000, "application": "a\x1b[2J", "buffers": 3, "bytes": 9 << 20, "lingering": 1, "refusals": 1},
]

Ctl = Callable[..., Awaitable[tuple[int, str, str]]]


def administers(fake: FakeAllocator) -> FakeAllocator:
    rows = [{key: Variant(USAGE_TYPES[key], value) for key, value in row.items()} for row in ROWS]
    listed = [
        {"buffer": Variant("o", buffer_path(str(n) * 16)), "references": Variant("u", n), "size": Variant("t", PAGE)}
        for n in (1, 2)
    ]
    recovered = [
        {"buffer": Variant("o", PATH), "size": Variant("t", PAGE), "action": Variant("s", "restored")},
        {"size": Variant("t", 8192), "inode": Variant("t", 42), "action": Variant("s", "kept")},
    ]
    answer_all(fake).answers |= {
        "GetUsage": lambda incoming: fake.reply(incoming.header, "aa{sv}", rows),
        "ListBuffers": lambda incoming: fake.reply(incoming.header, "aa{sv}", listed),
        "Recover": lambda incoming: fake.reply(incoming.header, "aa{sv}", recovered),
    }
    return fake


@pytest.fixture
async def fake(open_bus: PrivateBus) -> AsyncIterator[FakeAllocator]:
    fake = await FakeAllocator.start(open_bus.address, administers)
    yield fake
    fake.close()


def words(address: str, *verb: str) -> list[str]:
    return [sys.executable, "-m", "udmabufd_client.cli", "--bus", address, "--timeout", "20", *verb]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return kept | {"PYTHONPATH": ":".join(sys.path), "TERM": "xterm"}


async def begin(address: str, *verb: str, columns: int | None = None, **streams: Any) -> Process:
    chosen = {"stdin": asyncio.subprocess.DEVNULL, "stdout": PIPE, "stderr": PIPE} | streams
    env = environment() | ({} if columns is None else {"COLUMNS": str(columns)})
    return await asyncio.create_subprocess_exec(*words(address, *verb), env=env, **chosen)


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


# top


async def test_top_shows_users_and_applications_the_largest_first(ctl: Ctl) -> None:
    status, out, err = await ctl("top", "-n", "1")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    assert lines == [
        ["USER", "APPLICATION", "BUFFERS", "BYTES", "LINGERING", "EVICTED", "REFUSALS"],
        ["4000000000", "a\ufffd[2J", "3", "9", "MiB", "1", "B", "-", "1"],
        ["root", "encoder.service", "2", "8", "MiB", "0", "B", "-", "0"],
        ["root", "-", "1", "4", "KiB", "4", "KiB", "-", "7"],
        ["total", "(3)", "-", "6", "17.0", "MiB", "4.0", "KiB", "-", "8"],
        [],
    ]


@pytest.mark.parametrize(
    ("sort", "buffers"),
    [
        ("bytes", [3, 2, 1]),
        ("buffers", [3, 2, 1]),
        ("lingering", [1, 3, 2]),
        ("refusals", [1, 3, 2]),
        ("user", [3, 1, 2]),
        ("application", [1, 3, 2]),
    ],
)
async def test_top_sorts(ctl: Ctl, sort: str, buffers: list[int]) -> None:
    status, out, _ = await ctl("top", "-n", "1", "--json", "--sort", sort)
    assert status == 0
    assert [row["buffers"] for row in json.loads(out)["usage"]] == buffers


async def test_top_gives_one_document_a_refresh(ctl: Ctl) -> None:
    before = time.time()
    status, out, _ = await ctl("top", "-n", "3", "-d", "0.1", "--json")
    documents = [json.loads(line) for line in out.splitlines()]
    assert (status, len(documents)) == (0, 3)
    assert before - 1 < documents[0]["time"] < documents[2]["time"] < time.time() + 1
    rows = sorted(documents[0]["usage"], key=lambda row: row["bytes"])
    assert rows[0] == {"user": "root", **ROWS[1]}
    assert set(rows[0]) == {"user", *USAGE_TYPES}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_top_cleanly(open_bus: PrivateBus, fake: FakeAllocator, number: signal.Signals) -> None:
    process = await begin(open_bus.address, "top", "-d", "3600")
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"USER" in await process.stdout.readline()
    process.send_signal(number)
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert await process.stderr.read() == b""


async def test_top_goes_on_over_a_restart_of_the_service(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    process = await begin(open_bus.address, "top", "-d", "0.1", "-n", "1000", "--json")
    assert process.stdout is not None
    await process.stdout.readline()
    fake.close()
    again = await FakeAllocator.start(open_bus.address, administers)
    await again.called("GetUsage", 2)
    process.terminate()
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    again.close()


@pytest.mark.parametrize("end", [b"q", b"\x03"])
async def test_top_draws_one_screen_on_a_terminal_and_leaves_it_as_it_was(
    open_bus: PrivateBus, fake: FakeAllocator, end: bytes
) -> None:
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (5, 60))
    before = termios.tcgetattr(inner)
    process = await begin(
        open_bus.address, "top", "-d", "0.1", stdin=inner, stdout=inner, stderr=inner, preexec_fn=_control(inner)
    )
    shown = bytearray()
    loop = asyncio.get_running_loop()
    redrawn, put_back = asyncio.Event(), asyncio.Event()

    def read() -> None:
        shown.extend(os.read(outer, 4096))
        if shown.count(b"\x1b[J") >= 3:
            redrawn.set()
        if b"\x1b[?25h" in shown:
            put_back.set()

    loop.add_reader(outer, read)
    try:
        async with asyncio.timeout(60):
            await redrawn.wait()
            os.write(outer, end)
            assert await process.wait() == 0
            await put_back.wait()
    finally:
        loop.remove_reader(outer)
    assert termios.tcgetattr(inner) == before
    os.close(outer)
    os.close(inner)
    text = shown.decode()
    assert text.count("\x1b[2J") == 1, "cleared once, drawn over afterwards"
    assert "\x1b[1mUSER" in text
    first = text.split("\x1b[J")[0].split("\x1b[2J")[1].splitlines()
    # The heading, two of three rows, and the sums: four lines of five, for the last one scrolls.
    assert len(first) == 4
    assert "total" in first[-1]
    assert "a\x1b[2J" not in text


def _control(terminal: int) -> Callable[[], None]:
    """Return what makes `terminal` the controlling terminal of a new process, so that Ctrl-C is a signal there."""

    def control() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(terminal), os.O_RDWR))

    return control


@pytest.mark.parametrize("verb", [["top"], ["list", "--all"], ["recover"]])
async def test_who_may_not_is_told_who_may(fake: FakeAllocator, ctl: Ctl, verb: list[str]) -> None:
    for member in ("GetUsage", "Recover"):
        fake.answers[member] = lambda incoming: fake.fail(
            incoming.header, "org.udmabufd.Error.AccessDenied", "Only root may do this"
        )
    status, out, err = await ctl(*verb)
    assert (status, out) == (1, "")
    assert err.startswith(f"udmabufctl: {' '.join(verb)} is for root and for those whom polkit allows")
    assert "try sudo" in err
    assert err.count("\n") == 1


# list --all


async def test_list_all_shows_references_and_the_sums_of_each_user(ctl: Ctl) -> None:
    status, out, _ = await ctl("list", "--all")
    assert status == 0
    buffers, users = (part.splitlines() for part in out.split("\n\n"))
    assert buffers[0].split()[-3:] == ["HOLDERS", "REFERENCES", "CHARGED"]
    assert [line.split()[-2] for line in buffers[1:]] == ["1", "2"]
    assert [line.split() for line in users] == [
        ["USER", "BUFFERS", "BYTES", "LINGERING", "EVICTED", "REFERENCES", "REFUSALS"],
        ["4000000000", "3", "9", "MiB", "1", "B", "-", "-", "1"],
        ["root", "3", "8.0", "MiB", "4", "KiB", "-", "-", "7"],
        ["total", "6", "17.0", "MiB", "4.0", "KiB", "0", "B", "3", "8"],
    ]
    document = json.loads((await ctl("list", "--all", "--json"))[1])
    assert document["total"] == {
        "buffers": 6,
        "bytes": (17 << 20) + 4096,
        "lingering": 4097,
        "refusals": 8,
        "references": 3,
        "evicted": 0,
    }
    assert [user["user"] for user in document["users"]] == ["4000000000", "root"]
    assert [buffer["references"] for buffer in document["buffers"]] == [1, 2]


# recover


async def test_recover_shows_what_became_of_each_buffer(fake: FakeAllocator, ctl: Ctl) -> None:
    status, out, _ = await ctl("recover")
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["ID", "NAME", "KIND", "SIZE", "INODE", "ACTION"],
        ["0123456789abcdef", "-", "-", "4", "KiB", "-", "restored"],
        ["-", "-", "-", "8", "KiB", "42", "kept"],
    ]
    shown = json.loads((await ctl("recover", "--json"))[1])
    assert shown[1] == {"size": 8192, "inode": 42, "action": "kept"}
    assert shown[0]["id"] == "0123456789abcdef"
    sent = [body[0]["discard"].value for header, body in fake.calls if header.member == "Recover"]
    assert sent == [False, False]


async def test_discard_asks_first(open_bus: PrivateBus, fake: FakeAllocator, ctl: Ctl) -> None:
    status, _, err = await ctl("recover", "--discard")
    assert status == 2
    assert "add --yes" in err
    assert calls(fake, "Recover") == 0
    for answer, expected in ((b"n\n", 1), (b"\n", 1), (b"y\n", 0)):
        outer, inner = pty.openpty()
        process = await begin(open_bus.address, "recover", "--discard", stdin=inner)
        os.write(outer, answer)
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
        os.close(outer)
        os.close(inner)
        assert process.returncode == expected
        assert b"[y/N]" in out
        assert calls(fake, "Recover") == 1 - expected
    assert (await ctl("recover", "--discard", "--yes"))[0] == 0
    sent = [(body[0]["discard"].value, header.flags & 4) for header, body in fake.calls if header.member == "Recover"]
    # A polkit agent may ask where somebody is there to answer it.
    assert sent == [(True, 4), (True, 0)]


# A holder


async def test_a_holder_survives_restarts_of_bus_and_service(bus: Any, start: Start) -> None:
    first = await start()
    process = await begin(bus.address, "alloc", "--size", "4K", "--hold", "--json")
    assert process.stderr is not None
    await first.called("Allocate")
    assert process.stdout is not None
    while await process.stdout.readline() != b"}\n":
        pass
    bus.kill()
    bus.again()
    second = await start()
    await second.called("Import")
    second.close()
    third = await start()
    await third.called("GetAll")
    assert process.returncode is None
    process.terminate()
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert await process.stderr.read() == b""


async def test_a_holder_whose_buffer_is_lost_says_so_and_ends(bus: Any, start: Start) -> None:
    await start()
    process = await begin(bus.address, "alloc", "--size", "4K", "--hold", "--json")
    assert process.stderr is not None
    assert process.stdout is not None
    while await process.stdout.readline() != b"}\n":
        pass

    def forgetful(fake: FakeAllocator) -> None:
        def refuse(incoming: Incoming) -> None:
            fake.fail(incoming.header, "org.udmabufd.Error.NoSuchBuffer", "too late")

        answer_all(fake).answers["Import"] = refuse

    bus.kill()
    bus.again()
    await start(forgetful)
    async with asyncio.timeout(30):
        assert await process.wait() == 1
    assert (await process.stderr.read()).startswith(b"udmabufctl: Buffer 0123456789abcdef was lost in a restart")
