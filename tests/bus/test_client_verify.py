# SPDX-License-Identifier: MIT
"""udmabufctl verify without a device: where the buffer comes from, wrong usage, what is said when nothing is tried.

What real devices answer is in tests/kernel/test_verify.py and test_verdicts.py.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from tests.bus.service import RunningService
from udmabufd_client import cli, importers, sync

Said = tuple[int, str, str]
Ctl = Callable[..., Said]

NO_DEVICE = "/dev/null"


@pytest.fixture
def ctl(service: RunningService, capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Run udmabufctl in this process; return status, output and errors."""

    def run(*words: str) -> Said:
        status = cli.main(["--bus", service.address, "--timeout", "60", *words])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def held(service: RunningService, ctl: Ctl) -> Iterator[dict[str, Any]]:
    """A buffer that an udmabufctl of this user holds in the background."""
    command = [sys.executable, "-m", "udmabufd_client.cli", "--bus", service.address, "alloc", "--size", "8K"]
    run = subprocess.run(
        [*command, "--kind", "memfd", "--background", "--json"],
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    shown: dict[str, Any] = json.loads(run.stdout)
    yield shown
    assert ctl("release", shown["id"])[0] == 0


def test_a_held_buffer_by_its_id(ctl: Ctl, held: dict[str, Any]) -> None:
    """The holder gives its ticket: the import is refused, and all that was learnt is shown."""
    status, out, err = ctl("verify", "--json", held["id"], NO_DEVICE)
    assert (status, err) == (1, "")
    shown = json.loads(out)
    assert (shown["buffer"], shown["device"]) == (held["buffer"], NO_DEVICE)
    assert (shown["taken"], shown["tried"], shown["agree"]) == (False, False, None)
    assert "is a memfd" in shown["reason"]
    # The object path does, too.
    status, out, err = ctl("verify", held["buffer"], NO_DEVICE)
    assert status == 1
    assert f"buffer   {held['id']} (8 KiB, memfd)\n" in out
    assert "kernel   refused\n" in out
    assert "agree    -\n" in out
    assert err.startswith("udmabufctl: The buffer is a memfd")
    assert ctl("info", held["id"])[0] == 0, "the holder still has it"


def test_a_buffer_by_its_ticket(service: RunningService, ctl: Ctl) -> None:
    """Of whoever gives it."""
    with (
        sync.Client.connect(service.address, timeout=60) as client,
        client.allocate(size=4096, kind="memfd") as buffer,
    ):
        ticket = buffer.get_ticket()
        for spelling in (ticket, ticket.upper()):
            status, out, _ = ctl("verify", "--json", spelling, NO_DEVICE)
            assert (status, json.loads(out)["buffer"]) == (1, buffer.path)
        (listed,) = [one for one in client.list_buffers() if one.id == buffer.id]
        assert listed.holders == 1, "its share was given back"
    status, out, err = ctl("verify", ticket, NO_DEVICE)
    assert (status, out) == (1, "")
    assert "udmabufctl: " in err


def test_an_id_that_nobody_holds(ctl: Ctl) -> None:
    status, out, err = ctl("verify", "0" * 16, NO_DEVICE)
    assert (status, out) == (1, "")
    assert err.startswith(f"udmabufctl: No udmabufctl holds buffer {'0' * 16}.")


@pytest.mark.parametrize(
    "words",
    [
        (),
        (NO_DEVICE,),
        ("--format", "NV12", NO_DEVICE),
        ("640x480", NO_DEVICE),
        ("--size", "4K", "0" * 16, NO_DEVICE),
        ("--allocator", "udmabuf", "0" * 32, NO_DEVICE),
        ("--width", "640", "--format", "NV12", "640x480", NO_DEVICE),
        ("nonsense", NO_DEVICE),
        ("0" * 31, NO_DEVICE),
        ("--format", "NV12", "640x480x2", NO_DEVICE),
        ("--device", NO_DEVICE, "--size", "4K", NO_DEVICE),
    ],
)
def test_wrong_usage(ctl: Ctl, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ctl("verify", *words)
    assert caught.value.code == 2
    assert "usage: udmabufctl " in capsys.readouterr().err


@pytest.mark.root
def test_another_user_gets_no_ticket(held: dict[str, Any]) -> None:
    nobody = pwd.getpwnam("nobody")
    ask = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("\\0udmabufctl/" + sys.argv[1])
    try:
        sock.sendall(b"ticket\\n")
        print(sock.recv(100))
    except ConnectionError:
        print(b"")
"""

    def asked(**user: Any) -> str:
        command = ["/usr/bin/python3", "-c", ask, held["id"]]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60, cwd="/", **user)
        return str(run.stdout).strip()

    assert asked(user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[]) == "b''"
    assert asked().startswith("b'ticket ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_it_tidy_up(
    service: RunningService, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A device is set back as it was: whoever imports is left by an exception, not by the end of the process."""
    tidied = []

    def import_and_wait(*arguments: object) -> NoReturn:
        try:
            signal.raise_signal(number)
            raise AssertionError("the signal was lost")
        finally:
            tidied.append(number)

    before = signal.getsignal(number)
    monkeypatch.setattr(importers, "verify", import_and_wait)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--bus", service.address, "verify", held["id"], NO_DEVICE])
    assert caught.value.code == 128 + number
    assert tidied == [number]
    assert signal.getsignal(number) == before
