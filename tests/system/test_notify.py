# SPDX-License-Identifier: MIT
"""The messages to the service manager, read by a socket in its place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from pathlib import Path

import pytest

from udmabufd.system.notify import MAX_WAITING, Notifier

from .conftest import Listener

pytestmark = pytest.mark.host


def test_each_message_is_one_datagram(listener: Listener) -> None:
    notifier = Notifier(listener.address)
    assert notifier.enabled
    notifier.status("1 buffer")
    notifier.ready("serving")
    notifier.watchdog()
    notifier.failed("no bus", number=2, bus_error="org.freedesktop.DBus.Error.NoServer")
    notifier.stopping()
    notifier.close()
    assert listener.messages() == [
        "STATUS=1 buffer",
        "READY=1\nSTATUS=serving",
        "WATCHDOG=1",
        "STATUS=no bus\nERRNO=2\nBUSERROR=org.freedesktop.DBus.Error.NoServer",
        "STOPPING=1",
    ]


def test_reloading_carries_the_monotonic_clock(listener: Listener) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier = Notifier(listener.address)
    notifier.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.close()
    (message,) = listener.messages()
    match = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", message)
    assert match is not None
    assert before <= int(match[1]) <= after


def test_abstract_address() -> None:
    listener = Listener(f"@udmabufd-test-{secrets.token_hex(8)}")
    notifier = Notifier(listener.address)
    notifier.ready()
    assert listener.messages() == ["READY=1"]
    notifier.close()
    listener.close()


@pytest.mark.parametrize("text", ["a\nREADY=1", "a\r\nREADY=1", "a\x0bREADY=1", "a\u2028READY=1"])
def test_a_status_cannot_become_another_assignment(listener: Listener, text: str) -> None:
    notifier = Notifier(listener.address)
    notifier.status(text)
    notifier.close()
    assert listener.messages() == ["STATUS=a READY=1"]


def test_undecodable_text_is_sent_escaped(listener: Listener) -> None:
    notifier = Notifier(listener.address)
    notifier.status("name \udcff")
    notifier.close()
    assert listener.messages() == ["STATUS=name \\udcff"]


def test_the_variable_is_taken_from_the_environment(listener: Listener) -> None:
    environ = {"NOTIFY_SOCKET": listener.address, "PATH": "/bin"}
    notifier = Notifier.from_environment(environ)
    notifier.ready()
    notifier.close()
    assert listener.messages() == ["READY=1"]
    assert environ == {"PATH": "/bin"}


def test_without_a_service_manager_nothing_happens() -> None:
    notifier = Notifier.from_environment({})
    assert not notifier.enabled
    notifier.ready("serving")
    notifier.watchdog()
    notifier.close()


@pytest.mark.parametrize("address", ["relative", "@", "/", "vsock:2:1234", "/a\0b"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="NOTIFY_SOCKET"):
        Notifier(address)


def test_an_unusable_address_is_logged_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for address in ("vsock:2:1234", str(tmp_path / "absent")):
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
        assert not notifier.enabled
        notifier.ready()
    assert len(caplog.records) == 2


def open_sockets() -> set[int]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            if str(path.readlink()).startswith("socket:"):
                found.add(int(path.name))
    return found


def test_the_socket_is_closed_on_exec(listener: Listener) -> None:
    before = open_sockets()
    notifier = Notifier(listener.address)
    opened = open_sockets() - before
    assert len(opened) == 1
    assert not any(os.get_inheritable(fd) for fd in opened)
    notifier.close()
    notifier.close()
    assert open_sockets() == before


def fill(notifier: Notifier) -> int:
    """Send until the listener's queue is full; return how many messages are in it."""
    for count in range(100_000):
        notifier.status(str(count))
        if notifier._waiting:
            return count
    raise AssertionError("the queue of a datagram socket has no end")


async def test_a_manager_that_does_not_read_is_waited_for_off_the_loop(listener: Listener) -> None:
    notifier = Notifier(listener.address)
    sent = fill(notifier)
    notifier.watchdog()
    notifier.stopping("bye")
    # The full queue, then what was kept, in order and without the pulse, as soon as there is room.
    received: list[str] = []
    async with asyncio.timeout(10):
        while "STOPPING=1\nSTATUS=bye" not in received:
            received += listener.messages()
            await asyncio.sleep(0)
    assert received == [f"STATUS={number}" for number in range(sent + 1)] + ["STOPPING=1\nSTATUS=bye"]
    notifier.ready()
    assert listener.messages() == ["READY=1"]
    notifier.close()


async def test_what_is_kept_is_bounded_and_loses_a_status_first(listener: Listener) -> None:
    notifier = Notifier(listener.address)
    fill(notifier)
    notifier.ready()
    for number in range(10 * MAX_WAITING):
        notifier.status(f"late {number}")
    received: list[str] = []
    async with asyncio.timeout(10):
        while f"STATUS=late {10 * MAX_WAITING - 1}" not in received:
            received += listener.messages()
            await asyncio.sleep(0)
    assert "READY=1" in received
    assert sum(message.startswith("STATUS=late") for message in received) == MAX_WAITING - 1
    notifier.close()


def test_without_a_loop_the_next_message_takes_the_waiting_ones_along(listener: Listener) -> None:
    notifier = Notifier(listener.address)
    sent = fill(notifier)
    received = listener.messages()
    notifier.ready()
    received += listener.messages()
    assert received == [f"STATUS={number}" for number in range(sent + 1)] + ["READY=1"]
    notifier.close()


def test_a_socket_made_anew_is_found(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    first = Listener(address)
    notifier = Notifier(address)
    first.close()
    Path(address).unlink()
    second = Listener(address)
    notifier.ready()
    assert second.messages() == ["READY=1"]
    notifier.close()
    second.close()


def test_a_socket_that_is_gone_is_logged(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(listener.address)
    listener.close()
    Path(listener.address).unlink()
    notifier.ready()
    assert "could not be told" in caplog.text
    notifier.close()
