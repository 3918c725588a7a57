# SPDX-License-Identifier: MIT
"""Reports of what takes long: none of what does not, one line on a terminal, and work that ends with its caller."""

from __future__ import annotations

import asyncio
import io

import pytest

from udmabufd_client.cli import progress
from udmabufd_client.errors import Busy, ServiceUnavailable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.02)
    monkeypatch.setattr(progress, "_AGAIN", 0.001)


class Awaited:
    """Work that ends when a text was reported."""

    def __init__(self, stream: io.StringIO, text: str) -> None:
        self._stream = stream
        self._text = text
        self._looked = asyncio.Event()

    async def work(self) -> str:
        async with asyncio.timeout(20):
            while self._text not in self._stream.getvalue():
                self._looked.clear()
                await self._looked.wait()
        return "done"

    def look(self, told: str) -> str:
        """Pass on what is reported next; it is there a turn later."""
        asyncio.get_running_loop().call_soon(self._looked.set)
        return told


async def test_what_is_quick_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)

    async def work() -> int:
        return 7

    async def say() -> str:
        raise AssertionError

    assert await progress.reported(work(), say) == 7
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("soon")
async def test_a_terminal_has_one_line_which_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "20")
    left = iter(["2 are left", "2 are left", *["1 is\x1b left"] * 1000])

    async def say() -> str:
        return awaited.look(next(left))

    awaited = Awaited(stream, "1 is")
    assert await progress.reported(awaited.work(), say) == "done"
    shown = stream.getvalue()
    assert "\n" not in shown
    # Drawn anew for each change, cut to less than the width, and cleared.
    assert shown.split("\r\x1b[K") == ["", "udmabufctl: 2 are …", "udmabufctl: 1 is\N{REPLACEMENT CHARACTER} …", ""]


@pytest.mark.usefixtures("soon")
async def test_elsewhere_each_change_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    left = iter(["2", "2", *["1"] * 1000])

    async def say() -> str:
        return awaited.look(next(left))

    awaited = Awaited(stream, "1")
    await progress.reported(awaited.work(), say)
    assert stream.getvalue() == "udmabufctl: 2\nudmabufctl: 1\n"


@pytest.mark.usefixtures("soon")
async def test_a_report_that_fails_or_hangs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    asked = 0

    async def say() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ServiceUnavailable("restarting")
        if asked == 2:
            await asyncio.Event().wait()
        return awaited.look("here")

    awaited = Awaited(stream, "here")
    await progress.reported(awaited.work(), say)
    assert stream.getvalue() == "udmabufctl: here\n"


@pytest.mark.usefixtures("soon")
async def test_the_work_fails_and_ends_as_its_caller_sees_it() -> None:
    async def say() -> str:
        return "x"

    async def refused() -> None:
        raise Busy("held")

    with pytest.raises(Busy):
        await progress.reported(refused(), say)
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    caller = asyncio.create_task(progress.reported(endless(), say))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()
