# SPDX-License-Identifier: MIT
"""The watchdog's pulses, on a loop whose clock runs as fast as its timers let it."""

from __future__ import annotations

import asyncio
import os
import selectors
from typing import TYPE_CHECKING, Any

import pytest

from udmabufd.system.notify import Notifier
from udmabufd.system.watchdog import Watchdog, WatchdogError, timeout_from_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Listener

pytestmark = pytest.mark.host


class VirtualSelector(selectors.DefaultSelector):
    """Instead of waiting, tells the loop that the time is over."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is not None:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = VirtualSelector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


@pytest.fixture
def notifier(listener: Listener) -> Iterator[Notifier]:
    made = Notifier(listener.address)
    yield made
    made.close()


def test_a_pulse_at_half_the_timeout(loop: VirtualLoop, notifier: Notifier, listener: Listener) -> None:
    pulses: list[float] = []

    async def scenario() -> None:
        def check() -> None:
            pulses.append(loop.time())

        with Watchdog(notifier, check, 30.0):
            await asyncio.sleep(61)
        await asyncio.sleep(100)

    loop.run_until_complete(scenario())
    assert pulses == pytest.approx([1000, 1015, 1030, 1045, 1060])
    assert listener.messages() == ["WATCHDOG=1"] * 5


def test_no_pulse_while_the_check_finds_fault(
    loop: VirtualLoop, notifier: Notifier, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[str | None] = [None, "no bus", "no bus", None]

    async def scenario() -> None:
        with Watchdog(notifier, lambda: answers.pop(0), 4.0):
            await asyncio.sleep(7)

    caplog.set_level("INFO")
    loop.run_until_complete(scenario())
    assert answers == []
    assert listener.messages() == ["WATCHDOG=1"] * 2
    assert caplog.text.count("no bus") == 1  # said once, not at each pulse
    assert "passes again" in caplog.text


def test_a_check_that_raises_is_no_pulse_and_not_the_end(
    loop: VirtualLoop, notifier: Notifier, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("unexpected")

    async def scenario() -> None:
        with Watchdog(notifier, check, 4.0):
            await asyncio.sleep(3)

    loop.run_until_complete(scenario())
    assert calls == 2
    assert listener.messages() == ["WATCHDOG=1"]
    assert "unexpected" in caplog.text


def test_a_loop_that_stands_still_does_not_pulse(loop: VirtualLoop, notifier: Notifier, listener: Listener) -> None:
    async def scenario() -> None:
        with Watchdog(notifier, lambda: None, 4.0):
            loop.virtual.now += 40  # a callback that takes so long
            assert listener.messages() == ["WATCHDOG=1"]
            await asyncio.sleep(0.001)
            # One pulse for the time that was lost, not ten.
            assert listener.messages() == ["WATCHDOG=1"]

    loop.run_until_complete(scenario())


def test_nothing_happens_where_nobody_watches(loop: VirtualLoop, notifier: Notifier, listener: Listener) -> None:
    async def scenario() -> None:
        with Watchdog(notifier, lambda: pytest.fail("checked"), None):
            await asyncio.sleep(100)

    loop.run_until_complete(scenario())
    assert listener.messages() == []


def test_stop_and_start_may_be_repeated(loop: VirtualLoop, notifier: Notifier, listener: Listener) -> None:
    async def scenario() -> None:
        watchdog = Watchdog(notifier, lambda: None, 4.0)
        watchdog.start()
        watchdog.start()
        watchdog.stop()
        watchdog.stop()
        await asyncio.sleep(10)

    loop.run_until_complete(scenario())
    assert listener.messages() == ["WATCHDOG=1"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_what_the_service_manager_asks_for(environ: dict[str, str], expected: float | None) -> None:
    assert timeout_from_environment(environ) == expected


@pytest.mark.parametrize("text", ["1999999", "0", "-5", "30s", "1e9", "٣٠٠٠٠٠٠٠"])
def test_what_cannot_be_served_is_refused(text: str) -> None:
    with pytest.raises(WatchdogError, match=r"WATCHDOG_USEC|WatchdogSec= is .*; set it to 2 s or more"):
        timeout_from_environment({"WATCHDOG_USEC": text})
