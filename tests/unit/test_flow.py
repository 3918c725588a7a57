# SPDX-License-Identifier: MIT
"""Who waits, who is let through, and when the bus is asked, with a bus of which the test says what it answers."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from udmabufd.bus.allowance import STUCK_CALLS, USER_CALLS, Account
from udmabufd.bus.callers import CallerGone
from udmabufd.bus.flow import ASK_AT, Flow
from udmabufd.core.errors import RateLimited
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection, Reply
from udmabufd_base.errors import BusError, CallTimedOut, ConnectionLost, RemoteError

OWN = ":1.0"
BOUND = 47
DENIED = RemoteError("org.freedesktop.DBus.Error.AccessDenied", "no")


class Bus:
    """Answers GetConnectionStats in the place of Connection.call; holds what clients leave unread."""

    unique_name = OWN

    def __init__(self) -> None:
        self.unread: Counter[str] = Counter()
        self.room: dict[str, int] = {}
        """How many more descriptors the socket of a connection that does not read takes."""
        self.asked: list[str] = []
        self.failure: BusError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.late = 1
        """Turns of the loop that an answer takes."""
        self.peak = 0

    def deliver(self, name: str, count: int) -> None:
        """Take a message with `count` descriptors to `name`."""
        if name in self.room:
            if self.room[name] > 0:
                self.room[name] -= count
            else:
                self.unread[name] += count
        self.peak = max(self.peak, self.unread.total())

    def read(self, name: str) -> None:
        """Let `name` read everything, and go on reading."""
        self.room.pop(name, None)
        del self.unread[name]

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        **options: Any,
    ) -> Reply:
        assert (interface, member) == ("org.freedesktop.DBus.Debug.Stats", "GetConnectionStats")
        (name,) = body
        self.asked.append(name)
        # As the bus: true for what came before the question.
        figures = {"OutgoingFDs": self.unread[name], "IncomingFDs": self.unread.total() if name == OWN else 0}
        for _ in range(self.late):
            await asyncio.sleep(0)
        await self.answers.wait()
        if self.failure is not None:
            raise self.failure
        return Reply([{key: Variant("u", value) for key, value in figures.items()}], [], destination, "a{sv}")


class Rig:
    """A flow and its bus."""

    def __init__(self, patience: float = 20.0) -> None:
        self.bus = Bus()
        self.flow = Flow(cast(Connection, self.bus), patience=patience)

    async def send(self, name: str, uid: int = 1, count: int = 1) -> None:
        """Do what the dispatcher does for a reply with descriptors."""
        await self.flow.wait(name, uid, count)
        assert self.flow.on_their_way <= BOUND
        self.bus.deliver(name, count)
        self.flow.sent(name, count, count)

    def start(self, name: str, uid: int = 1, count: int = 1) -> asyncio.Task[None]:
        """Do it in a task."""
        return asyncio.create_task(self.send(name, uid, count))

    async def stick(self, name: str, uid: int = 1, count: int = 1, room: int = 0) -> list[asyncio.Task[None]]:
        """Make `name` a client that reads nothing, and return its calls that wait."""
        self.bus.room[name] = room
        calls = [self.start(name, uid, count) for _ in range(room // count + 2 * STUCK_CALLS)]
        await until(lambda: self.flow_knows(name))
        await settle()
        return [call for call in calls if not call.done()]

    def flow_knows(self, name: str) -> bool:
        """Whether the answer has come that `name` is stuck."""
        account = self.flow._accounts.get(name)
        return account is not None and account.stuck


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until `condition` holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - there is no event for what is asked here
            await asyncio.sleep(0)


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """End tasks."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_who_reads_is_never_held_up_and_the_bus_is_asked_now_and_then() -> None:
    rig = Rig()
    for _ in range(800):
        await rig.send(":1.5")
        await asyncio.sleep(0)
    assert len(rig.bus.asked) <= 800 // ASK_AT + 1
    assert rig.flow.on_their_way < ASK_AT + 4


async def test_nobody_gets_more_than_the_allowance_without_an_answer() -> None:
    rig = Rig()
    rig.bus.answers.clear()
    calls = [rig.start(":1.5") for _ in range(40)]
    await settle()
    assert sum(call.done() for call in calls) == 16
    assert rig.flow.on_their_way == 16
    # One question, however many wait.
    assert rig.bus.asked == [":1.5"]
    rig.bus.answers.set()
    await asyncio.gather(*calls)


async def test_calls_of_a_connection_go_in_their_order() -> None:
    rig = Rig()
    done: list[int] = []

    async def one(number: int) -> None:
        await rig.send(":1.5")
        done.append(number)

    await asyncio.gather(*(one(number) for number in range(100)))
    assert done == list(range(100))


async def test_who_leaves_its_replies_unread_gets_no_more_and_goes_on_when_it_has_read() -> None:
    rig = Rig()
    waiting = await rig.stick(":1.5", room=280)
    assert 0 < rig.bus.unread[":1.5"] <= 16
    before = rig.bus.unread[":1.5"]
    await asyncio.sleep(0.2)
    assert rig.bus.unread[":1.5"] == before
    rig.bus.read(":1.5")
    await asyncio.gather(*waiting)
    await settle()
    assert len(rig.flow) <= 1


async def test_a_stuck_connection_is_asked_about_ever_less_often_and_not_at_all_when_nobody_waits() -> None:
    rig = Rig()
    waiting = await rig.stick(":1.5")
    rig.bus.asked.clear()
    await asyncio.sleep(0.8)
    assert 2 <= len(rig.bus.asked) <= 5
    await cancel(*waiting)
    rig.bus.asked.clear()
    await asyncio.sleep(1.2)
    assert rig.bus.asked == []


async def test_only_so_many_calls_of_a_stuck_connection_wait() -> None:
    rig = Rig()
    rig.bus.room[":1.5"] = 0
    calls = [rig.start(":1.5") for _ in range(100)]
    await until(lambda: rig.flow_knows(":1.5"))
    await settle()
    refused = [call for call in calls if call.done() and call.exception()]
    assert all(isinstance(call.exception(), RateLimited) for call in refused)
    assert sum(not call.done() for call in calls) == STUCK_CALLS
    with pytest.raises(RateLimited, match=f"{STUCK_CALLS} calls wait"):
        await rig.send(":1.5")
    await cancel(*(call for call in calls if not call.done()))


async def test_only_so_many_calls_of_a_user_with_a_stuck_connection_wait() -> None:
    rig = Rig()
    for number in range(9):
        await rig.flow.wait(f":1.{number}", 1, 1)
        rig.bus.deliver(f":1.{number}", 1)
        rig.flow.sent(f":1.{number}", 1, 1)
    # While nobody is stuck, all may wait; and another user's may at any time.
    rig.bus.answers.clear()
    calls = [rig.start(f":2.{number}") for number in range(USER_CALLS)]
    await settle()
    assert not any(call.done() for call in calls)
    calls.append(rig.start(":2.last"))
    await settle()
    assert not calls[-1].done()
    rig.flow._accounts.open(":1.0", 1).stuck = True
    known = len(rig.flow)
    for name in (":2.0", ":3.1"):
        with pytest.raises(RateLimited, match=f"of this user .* {USER_CALLS} calls"):
            await rig.send(name)
    assert len(rig.flow) == known
    await rig.flow.wait(":4.1", 2, 1)
    # As soon as one has gone, another may wait.
    await cancel(*calls[:2])
    another = rig.start(":3.1")
    await settle()
    assert not another.done()
    await cancel(another, *calls)
    assert not rig.flow._calls


async def test_patience_ends_with_the_figure() -> None:
    rig = Rig(patience=0.05)
    rig.bus.room[":1.5"] = 0
    with pytest.raises(RateLimited, match=r"left \d+ file descriptors unread for 0.05 s"):
        while True:
            await rig.send(":1.5")
    assert rig.flow.on_their_way == rig.bus.unread[":1.5"]


async def test_patience_ends_for_who_waits_for_others_too() -> None:
    rig = Rig(patience=0.1)
    await asyncio.gather(*await rig.stick(":1.5", count=16), return_exceptions=True)
    with pytest.raises(RateLimited, match="16 more file descriptors within 0.1 s"):
        await rig.send(":1.6", count=16)


@pytest.mark.parametrize("uids", [[1] * 8, [1, 2] * 4])
@pytest.mark.parametrize("count", [1, 16])
async def test_beside_eight_stuck_connections_everybody_goes_on(uids: list[int], count: int) -> None:
    rig = Rig()
    waiting = []
    for number, uid in enumerate(uids):
        waiting += await rig.stick(f":2.{number}", uid, count if number < 2 and uids[0] != uids[1] else 1, room=170)
    async with asyncio.timeout(10):
        for uid in {*uids, 3}:
            for _ in range(100):
                await rig.send(f":1.{uid}", uid)
            await asyncio.gather(*(rig.send(f":1.{uid}", uid) for _ in range(128)))
    assert rig.bus.peak <= BOUND
    await cancel(*waiting)


async def test_all_eight_at_once_leave_room_for_the_others() -> None:
    rig = Rig()
    names = [f":2.{number}" for number in range(8)]
    rig.bus.room = dict.fromkeys(names, 170)
    calls = [rig.start(name, 1 + number % 2) for _ in range(300) for number, name in enumerate(names)]
    await until(lambda: all(rig.flow_knows(name) for name in names))
    async with asyncio.timeout(10):
        await asyncio.gather(*(rig.send(f":1.{uid}", uid) for uid in (1, 2, 3) for _ in range(128)))
    assert rig.bus.peak <= BOUND
    await cancel(*calls)


async def test_full_messages_of_many_users_take_turns() -> None:
    rig = Rig()
    done: list[int] = []

    async def many(uid: int) -> None:
        for _ in range(30):
            await rig.send(f":1.{uid}", uid, 16)
            done.append(uid)

    async with asyncio.timeout(10):
        await asyncio.gather(*(many(uid) for uid in range(6)))
    # Nobody is far behind: when the first is done, each of the others has had most of its turns.
    first = next(index for index in range(len(done)) if 30 in Counter(done[: index + 1]).values())
    assert min(Counter(done[: first + 1])[uid] for uid in range(6)) >= 20


@pytest.mark.parametrize(("name", "uid"), [(":3.1", 1), (":3.2", 7)], ids=["of the same user", "of another"])
async def test_a_full_message_is_not_starved_by_streams_of_small_ones(name: str, uid: int) -> None:
    rig = Rig()
    # Never all answered, and never so many that they have to wait.
    rig.bus.late = 3
    running = True

    async def stream(name: str, uid: int) -> None:
        while running:
            await rig.send(name, uid)
            await asyncio.sleep(0)

    streams = [asyncio.create_task(stream(f":1.{n}", n)) for n in (1, 2) for _ in range(4)]
    await settle()
    async with asyncio.timeout(5):
        for _ in range(10):
            await rig.send(name, uid, 16)
    running = False
    await asyncio.gather(*streams)


async def test_small_messages_overtake_a_full_one_that_a_stuck_connection_holds_up() -> None:
    rig = Rig()
    waiting = await rig.stick(":1.5", 1, 16)
    full = rig.start(":1.6", 1, 16)
    await settle()
    async with asyncio.timeout(5):
        for _ in range(20):
            await rig.send(":1.6", 1)
    assert not full.done()
    await cancel(full, *waiting)


async def test_many_connections_that_read_are_asked_about_together() -> None:
    rig = Rig()
    for _ in range(20):
        await asyncio.gather(*(rig.send(f":1.{number}", number % 4) for number in range(1, 20)))
        await settle()
    assert set(rig.bus.asked) & {OWN}
    assert len(rig.bus.asked) <= 20 * 19 / 4


async def test_the_end_of_a_connection_gives_everything_back() -> None:
    rig = Rig()
    waiting = await rig.stick(":1.5", 1, 16)
    waiting += await rig.stick(":1.6", 2, 16)
    full = rig.start(":1.7", 3, 16)
    await settle()
    assert not full.done()
    rig.flow.ended(":1.5")
    del rig.bus.unread[":1.5"]
    await full
    results = await asyncio.gather(
        *(call for call in waiting if call.done() or call in waiting[:STUCK_CALLS]), return_exceptions=True
    )
    assert any(isinstance(result, CallerGone) for result in results)
    rig.flow.ended(":1.6")
    rig.flow.ended(":1.7")
    await settle()
    assert (len(rig.flow), rig.flow.on_their_way) == (0, 0)
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_was_reserved_and_not_sent_comes_back() -> None:
    rig = Rig()
    await rig.flow.wait(":1.5", 1, 16)
    second = rig.start(":1.5")
    await settle()
    assert not second.done()
    rig.flow.sent(":1.5", 0, 16)
    await second
    assert rig.flow.on_their_way == 1


async def test_a_call_that_is_cancelled_leaves_nothing() -> None:
    rig = Rig()
    await rig.flow.wait(":1.5", 1, 16)
    second = rig.start(":1.5")
    await settle()
    await cancel(second)
    rig.flow.sent(":1.5", 0, 16)
    assert (len(rig.flow), rig.flow.on_their_way) == (0, 0)


async def test_a_call_that_is_cancelled_as_it_is_let_through_leaves_nothing() -> None:
    rig = Rig()
    await rig.flow.wait(":1.5", 1, 16)
    second = rig.start(":1.5")
    await settle()
    rig.flow.sent(":1.5", 0, 16)
    await cancel(second)
    assert (len(rig.flow), rig.flow.on_their_way) == (0, 0)


async def test_a_connection_that_is_unknown_to_the_bus_has_nothing_unread() -> None:
    rig = Rig()
    rig.bus.failure = RemoteError("org.freedesktop.DBus.Error.NameHasNoOwner", "gone")
    async with asyncio.timeout(5):
        for _ in range(50):
            await rig.send(":1.5")
    # That was no reason to give up asking.
    rig.bus.failure = None
    await cancel(*await rig.stick(":1.6"))


async def test_where_an_answer_for_all_is_not_zero_each_is_asked_about() -> None:
    rig = Rig()
    names = {":1.5": 1, ":1.6": 2}
    rig.bus.room = dict.fromkeys(names, 0)
    for _ in range(ASK_AT - 1):
        for name, uid in names.items():
            await rig.send(name, uid)
    assert rig.bus.asked == []
    await rig.flow.wait(":1.7", 3, 1)
    rig.flow.sent(":1.7", 1, 1)
    calls = [rig.start(name, uid) for name, uid in names.items() for _ in range(20)]
    await until(lambda: all(rig.flow_knows(name) for name in names))
    assert rig.bus.asked[0] == OWN
    await cancel(*calls)


async def test_what_others_left_with_a_client_is_not_counted_as_ours() -> None:
    rig = Rig()
    rig.bus.room[":1.5"] = 0
    rig.bus.unread[":1.5"] = 64
    calls = [rig.start(":1.5") for _ in range(20)]
    await until(lambda: rig.flow_knows(":1.5"))
    assert rig.flow.on_their_way <= 16
    await cancel(*calls)


async def test_a_bus_that_denies_the_question_is_told_of_once_and_holds_nobody_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig()
    rig.bus.failure = DENIED
    with caplog.at_level(logging.WARNING):
        async with asyncio.timeout(5):
            await asyncio.gather(*(rig.send(f":1.{n}") for n in range(10) for _ in range(100)))
    (record,) = caplog.records
    assert "install org.udmabufd.Allocator1.conf and reload the bus" in record.getMessage()
    assert len(rig.flow) == 0


async def test_a_bus_that_denied_the_question_is_asked_again_later() -> None:
    now = 0.0
    bus = Bus()
    bus.failure = DENIED
    flow = Flow(cast(Connection, bus), clock=lambda: now)
    for _ in range(40):
        await flow.wait(":1.5", 1, 1)
        flow.sent(":1.5", 1, 1)
        await asyncio.sleep(0)
    assert len(bus.asked) == 1
    bus.failure = None
    now = 61.0
    for _ in range(40):
        await flow.wait(":1.5", 1, 1)
        flow.sent(":1.5", 1, 1)
        await asyncio.sleep(0)
    assert len(bus.asked) > 2


async def test_dbus_broker_is_asked_once_and_never_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.bus.failure = RemoteError("org.freedesktop.DBus.Error.Failed", "Unimplemented functionality")
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            await asyncio.gather(*(rig.send(":1.5") for _ in range(100)))
    assert (len(rig.bus.asked), caplog.records) == (1, [])


async def test_a_bus_that_does_not_answer_in_time_is_asked_again() -> None:
    rig = Rig()
    rig.bus.failure = CallTimedOut("late")
    call = [rig.start(":1.5") for _ in range(20)]
    await settle()
    assert not all(one.done() for one in call)
    rig.bus.failure = None
    async with asyncio.timeout(5):
        await asyncio.gather(*call)


async def test_the_end_of_the_bus_ends_what_waits() -> None:
    rig = Rig()
    rig.bus.failure = ConnectionLost("gone")
    calls = [rig.start(":1.5") for _ in range(40)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(result, CallerGone) for result in results) == 24


@pytest.mark.parametrize("count", [0, 17])
async def test_a_message_has_one_to_sixteen(count: int) -> None:
    with pytest.raises(ValueError, match=f"not {count}"):
        await Rig().flow.wait(":1.5", 1, count)


class Looks:
    """Counts how often a flow looks at an account: the reads of any account's user, or of whether it is stuck."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for attribute in ("uid", "stuck"):
            monkeypatch.setattr(Account, attribute, self._counted(getattr(Account, attribute)))

    def take(self) -> int:
        """Return how often since last time."""
        count, self.count = self.count, 0
        return count

    def _counted(self, slot: Any) -> property:
        def read(account: Account) -> Any:
            self.count += 1
            return slot.__get__(account)

        return property(read, slot.__set__)


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("users", [1, 4])
async def test_many_connections_that_wait_cost_others_little(
    monkeypatch: pytest.MonkeyPatch, count: int, users: int
) -> None:
    looks = Looks(monkeypatch)
    for waiting in (64, 1024):
        rig = Rig()
        # The bus does not tell yet that anything was read, so each user comes to its bound.
        rig.bus.answers.clear()
        first = [rig.start(f":1.{number}", number % users, 16) for number in range(2)]
        if count == 1:
            first += [rig.start(f":2.{number}", number % users) for number in range(10 * users)]
        await settle()
        looks.take()
        calls = [rig.start(f":3.{number}", number % users, count) for number in range(waiting)]
        await settle()
        assert not any(call.done() for call in calls)
        came = looks.take()
        rig.flow._turn()
        turn = looks.take()
        # However many wait: to come costs a few looks at those that owe, 17 at most, and each costs a turn a few.
        assert came / waiting < 40
        assert turn / waiting < 20
        await cancel(*first, *calls)
