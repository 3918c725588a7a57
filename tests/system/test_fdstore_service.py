# SPDX-License-Identifier: MIT
"""What a service finds again of what it stored: under systemd in the guest, and under its stand-in elsewhere.

Both run the same tests, so that the stand-in can be believed where the daemon's own tests use it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.system.fake_manager import ROOT, FakeManager

SCRIPT = Path(__file__).with_name("store_service.py")
UNIT = "udmabufd-test-store.service"
UNIT_FILE = Path("/run/systemd/system") / UNIT
PATIENCE = 120.0
"""Seconds; a guest without hardware virtualisation needs some of them."""

SIZE = 700


class Manager(Protocol):
    """A service manager that runs store_service.py."""

    def stored(self) -> dict[str, list[int]]: ...

    def crash(self) -> None:
        """Kill the service, and return when it runs again."""

    def restart(self) -> None:
        """As systemctl restart."""

    def stop_and_start(self) -> None:
        """As systemctl stop, then start."""

    def turn_round(self) -> None:
        """Have the store handed over in the other order from now on, as after a daemon-reload."""


class Service:
    """A running store_service.py."""

    def __init__(self, control: Path, manager: Manager) -> None:
        self.control = control
        self.manager = manager

    def do(self, action: str, **arguments: Any) -> Any:
        """Have it do one thing; return its answer."""
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.control))
            connection.sendall(json.dumps({"do": action, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as answer:
                return json.loads(answer.readline())

    def put(self, count: int, each: int = 2, uid: int = 0) -> dict[str, list[int]]:
        """Store `count` times `each` new memfds; return their inodes by name."""
        found = self.do("put", count=count, each=each, uid=uid)
        assert isinstance(found, dict)
        return found

    def inherited(self) -> dict[str, list[int]]:
        """Return what it was given at its start: inodes by name."""
        found = self.do("ask")["inherited"]
        assert isinstance(found, dict)
        return found


class Fake:
    """FakeManager, as a Manager."""

    def __init__(self, manager: FakeManager) -> None:
        self.manager = manager

    def stored(self) -> dict[str, list[int]]:
        return self.manager.stored

    def crash(self) -> None:
        self.manager.kill()
        self.manager.start()

    def restart(self) -> None:
        self.manager.kill()  # store_service.py has no other end
        self.manager.start()

    def stop_and_start(self) -> None:
        self.manager.stop()
        self.manager.start()

    def turn_round(self) -> None:
        self.manager.store.oldest_first = not self.manager.store.oldest_first


class Systemd:
    """The guest's, as a Manager."""

    def stored(self) -> dict[str, list[int]]:
        shown = json.loads(run("systemd-analyze", "fdstore", "--json=short", UNIT) or "[]")
        found: dict[str, list[int]] = {}
        for row in shown:
            found.setdefault(row["fdname"], []).append(int(row["inode"]))
        return found

    def crash(self) -> None:
        before = show("MainPID")
        run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
        deadline = time.monotonic() + PATIENCE
        while show("MainPID") in ("0", before) or show("ActiveState") != "active":
            assert time.monotonic() < deadline, "the service was not started again"
            time.sleep(0.2)

    def restart(self) -> None:
        run("systemctl", "restart", UNIT)

    def stop_and_start(self) -> None:
        run("systemctl", "stop", UNIT)
        run("systemctl", "start", UNIT)

    def turn_round(self) -> None:
        run("systemctl", "daemon-reload")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def show(name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, UNIT).strip()


@contextmanager
def under_systemd(control: Path) -> Iterator[Systemd]:
    UNIT_FILE.write_text(
        "[Unit]\nStartLimitIntervalSec=0\n"
        "[Service]\nType=notify\nNotifyAccess=main\nRestart=always\nRestartSec=100ms\n"
        f"FileDescriptorStoreMax={SIZE}\nLimitNOFILE=5056\n"
        f"Environment=PYTHONPATH={ROOT / 'daemon'}:{ROOT / 'client'}\n"
        f"ExecStart={sys.executable} {SCRIPT} {control}\n"
    )
    run("systemctl", "daemon-reload")
    try:
        run("systemctl", "start", UNIT)
        yield Systemd()
    except subprocess.CalledProcessError as error:
        print(error.stdout, error.stderr, run("journalctl", "-u", UNIT, "-n", "50", "--no-pager"), sep="\n")
        raise
    finally:
        subprocess.run(["systemctl", "stop", UNIT], check=False)
        UNIT_FILE.unlink()
        run("systemctl", "daemon-reload")


@pytest.fixture(
    params=[
        pytest.param("stand-in", marks=pytest.mark.host),
        pytest.param("systemd", marks=[pytest.mark.guest, pytest.mark.root]),
    ]
)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    control = tmp_path / "control"
    if request.param == "systemd":
        with under_systemd(control) as systemd:
            yield Service(control, systemd)
        return
    command = [sys.executable, str(SCRIPT), str(control)]
    with FakeManager("unused", command=command, store_size=SIZE) as manager:
        manager.start()
        yield Service(control, Fake(manager))
        manager.kill()


def unordered(found: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: sorted(inodes) for name, inodes in found.items()}


def test_what_is_stored_comes_back(service: Service) -> None:
    asked = service.do("ask")
    assert asked["enabled"] is True
    assert asked["size"] == str(SIZE)
    assert asked["inherited"] == {}
    # 200 are put, and the end comes at once.
    put = service.put(200)
    assert len({inode for inodes in put.values() for inode in inodes}) == 400
    service.manager.crash()
    again = service.do("ask")
    assert again["pid"] != asked["pid"]
    assert unordered(again["inherited"]) == unordered(put) == unordered(service.manager.stored())
    assert again["inheritable"] == []
    assert again["left"] == []

    # Names go on where they were, and what is dropped does not come back.
    more = service.put(3)
    assert not more.keys() & put.keys()
    gone = list(put)[50:150]
    service.do("drop", names=gone)
    service.do("settled")
    left = {name: inodes for name, inodes in (put | more).items() if name not in gone}
    assert unordered(service.manager.stored()) == unordered(left)
    service.manager.crash()
    assert unordered(service.inherited()) == unordered(left)


def test_names_that_are_used_again_mean_the_new(service: Service) -> None:
    old = service.put(20)
    for _ in range(3):
        service.do("drop", names=list(old))
        new = service.put(20)
        # Some: a name is free when its removal has been sent, and the socket may be full.
        assert new.keys() & old.keys()
        assert not {inode for inodes in new.values() for inode in inodes} & {
            inode for inodes in old.values() for inode in inodes
        }
        old = new
    service.manager.crash()
    assert unordered(service.inherited()) == unordered(old)


def test_a_restart_keeps_what_is_stored_and_a_stop_does_not(service: Service) -> None:
    put = service.put(10)
    service.manager.restart()
    assert unordered(service.inherited()) == unordered(put)
    service.manager.stop_and_start()
    assert service.inherited() == {}
    assert service.manager.stored() == {}


def test_the_order_of_what_comes_back(service: Service) -> None:
    """Shown for the stand-in's sake: the daemon does not rely on it."""
    put = list(service.put(5, each=1))
    service.manager.crash()
    assert list(service.inherited()) == put[::-1]
    service.manager.turn_round()
    service.manager.crash()
    assert list(service.inherited()) == put


def test_the_same_open_file_is_stored_once(service: Service) -> None:
    put = service.put(1, each=2)
    (name,) = put
    service.do("again", name=name, other="zz")
    service.do("settled")
    assert unordered(service.manager.stored()) == unordered(put)


def test_what_exceeds_the_store_is_closed_without_a_word(service: Service) -> None:
    put = service.put(SIZE // 2 + 10)
    service.do("settled")
    found = service.manager.stored()
    assert sum(len(inodes) for inodes in found.values()) == SIZE
    assert unordered(found) == unordered({name: put[name] for name in list(put)[: SIZE // 2]})
