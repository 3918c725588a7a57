# SPDX-License-Identifier: MIT
"""bus.intake: how many descriptors are received of whom, and that all that were are closed."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from udmabufd.bus import intake
from udmabufd.bus.intake import Intake
from udmabufd.core.closer import Closer
from udmabufd_base.fd import OwnedFd, close_all

ALICE, BOB = 1000, 1001
HANGING, TOTAL = 16, 512


class StuckCloser(Closer):
    """Closes nothing until told so."""

    def __init__(self) -> None:
        super().__init__(per_uid=HANGING, total=TOTAL)
        self.given: dict[int | None, list[OwnedFd]] = {}

    def close(self, fds: Iterable[OwnedFd], uid: int | None) -> None:
        """Keep them."""
        self.given.setdefault(uid, []).extend(fds)

    def unclosed(self, uid: int | None) -> int:
        """How many are kept of `uid`."""
        return len(self.given.get(uid, []))

    def unclosed_in_all(self) -> int:
        """How many are kept."""
        return sum(map(len, self.given.values()))

    def full(self, uid: int | None) -> bool:
        """Whether too many of `uid`, or in all, are kept."""
        return self.unclosed(uid) >= HANGING or self.unclosed_in_all() >= TOTAL

    def go_on(self) -> None:
        """Close them all."""
        for fds in self.given.values():
            close_all(fds)
        self.given.clear()


class Bus:
    """An Intake whose callers are known when `users` has them."""

    def __init__(self) -> None:
        self.users: dict[str, int] = {}
        self.closer = StuckCloser()
        self.intake = Intake(self.closer, self.users.get)

    def send(self, sender: str, count: int = 1) -> list[OwnedFd] | None:
        """Receive a call with `count` descriptors and return them, or None if they are refused."""
        if not self.intake.admits(sender, count):
            return None
        fds = [OwnedFd(os.memfd_create("sent", os.MFD_CLOEXEC)) for _ in range(count)]
        self.intake.hold(sender, fds)
        return fds

    def answer(self, sender: str, fds: list[OwnedFd]) -> None:
        """End the call, by when its sender is known."""
        self.intake.let_go(sender, fds, self.users.get(sender))


@pytest.fixture
def bus() -> Bus:
    return Bus()


def test_a_user_has_so_many_in_calls_that_are_served(bus: Bus) -> None:
    bus.users.update({":1": ALICE, ":2": ALICE, ":3": BOB})
    calls = [(sender, bus.send(sender, 16)) for sender in (":1", ":2", ":1", ":2")]
    assert bus.send(":1") is None
    assert bus.send(":2") is None
    for sender, fds in [*calls, (":3", bus.send(":3", 16))]:
        assert fds is not None
        bus.answer(sender, fds)
    bus.closer.go_on()
    again = bus.send(":1", 16)
    assert again is not None
    bus.answer(":1", again)
    bus.closer.go_on()


def test_a_user_whose_descriptors_do_not_close_gets_no_more_in(bus: Bus) -> None:
    bus.users.update({":1": ALICE, ":2": BOB})
    for _ in range(HANGING):
        fds = bus.send(":1")
        assert fds is not None
        bus.answer(":1", fds)
    assert bus.send(":1") is None
    fds = bus.send(":2", 16)
    assert fds is not None
    bus.answer(":2", fds)
    bus.closer.go_on()
    assert bus.intake.admits(":1", 16)


def test_of_a_connection_that_is_not_known_one_call_is_let_in(bus: Bus) -> None:
    fds = bus.send(":1", 16)
    assert fds is not None
    assert bus.send(":1") is None
    bus.users[":1"] = ALICE
    assert bus.intake.admits(":1", 16)
    bus.answer(":1", fds)
    assert bus.closer.unclosed(ALICE) == 16
    assert not bus.intake.admits(":1", 1)
    bus.closer.go_on()


def test_those_not_known_share_a_bound(bus: Bus) -> None:
    calls = {}
    for number in range(intake.UNKNOWN // 16 + 1):
        calls[f":{number}"] = bus.send(f":{number}", 16)
    assert [fds is not None for fds in calls.values()] == [True] * (intake.UNKNOWN // 16) + [False]
    bus.users[":known"] = BOB
    assert bus.intake.admits(":known", 16)
    for sender, fds in calls.items():
        bus.answer(sender, fds or [])
    bus.closer.go_on()


def test_nothing_of_those_not_known_while_much_does_not_close(bus: Bus) -> None:
    bus.users[":known"] = BOB
    for number in range(intake.CALM // 64):
        name = f":{number}"
        bus.users[name] = 2000 + number
        fds = [bus.send(name, 16) for _ in range(4)]
        for received in fds:
            assert received is not None
            bus.answer(name, received)
    assert not bus.intake.admits(":new", 1)
    assert bus.intake.admits(":known", 16)
    bus.closer.go_on()
    assert bus.intake.admits(":new", 1)


def test_there_is_a_bound_for_all(bus: Bus) -> None:
    for number in range(TOTAL // 64):
        name = f":{number}"
        bus.users[name] = 2000 + number
        for received in [bus.send(name, 16) for _ in range(4)]:
            assert received is not None
            bus.answer(name, received)
    bus.users[":last"] = BOB
    assert not bus.intake.admits(":last", 1)
    bus.closer.go_on()
    assert bus.intake.admits(":last", 1)


def test_what_is_not_served_is_closed_for_its_sender(bus: Bus) -> None:
    bus.users[":1"] = ALICE
    for sender in (":1", ":2"):
        bus.intake.discard(sender, [OwnedFd(os.memfd_create("sent", os.MFD_CLOEXEC))])
    assert (bus.closer.unclosed(ALICE), bus.closer.unclosed(None)) == (1, 1)
    bus.closer.go_on()
