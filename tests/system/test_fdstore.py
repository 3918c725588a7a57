# SPDX-License-Identifier: MIT
"""The service manager's store as the daemon uses it, against one in PID 1's place."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.fake_store import FakeStore, same_file
from udmabufd.core.events import Event
from udmabufd.core.store import STATE_NAME
from udmabufd.system import fdstore, listen_fds
from udmabufd.system.fdstore import MAX_BARRIERS, MAX_FDS, STRIDE, FdStore
from udmabufd.system.store_capacity import (
    MAX_BUFFERS,
    MAX_FDNAMES,
    SPARE_FDS,
    StoreError,
    check_capacity,
    stored_fds,
)
from udmabufd.system.store_names import LONGEST, StoreNames
from udmabufd.system.store_queue import PRUNE_AT, Pace
from udmabufd_base.fd import OwnedFd, close_all

pytestmark = pytest.mark.host

BOUND = STRIDE * (MAX_BARRIERS + 1)
"""Messages that may be on their way."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeStore]:
    with FakeStore(tmp_path / "notify") as made:
        yield made


@pytest.fixture
async def store(manager: FakeStore) -> AsyncIterator[FdStore]:
    # Not paced, but where a test says so.
    yield (made := FdStore(manager.address, rate=1e9, burst=10**9))
    made.close()


def memfds(count: int) -> list[OwnedFd]:
    return [OwnedFd(os.memfd_create(f"test-{number}")) for number in range(count)]


def inode(fd: OwnedFd) -> int:
    return os.fstat(fd.fileno()).st_ino


def puts(store: FdStore, fds: list[OwnedFd], uid: int) -> dict[str, asyncio.Task[None]]:
    """Store each under a name of its own; return what goes on."""
    names = [store.take_name() for _ in fds]
    return {name: asyncio.create_task(store.put(name, [fd], uid)) for name, fd in zip(names, fds, strict=True)}


async def turns(count: int = 20) -> None:
    """Let the loop go on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def reached(manager: FakeStore, count: int) -> None:
    """Wait until the manager has been told `count` things, and let it show that there are no more."""
    await asyncio.to_thread(manager.wait_until, lambda: len(manager.messages) >= count, f"told {count} things")
    await asyncio.sleep(0.05)


# ---- what is said -------------------------------------------------------------------------------------------------


async def test_what_is_put_is_stored_and_what_is_dropped_is_not(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(4)
    first, second = store.take_name(), store.take_name()
    await store.put(first, fds[:3], 1000)
    await store.put(second, fds[3:], 1000)
    await store.settled()
    assert manager.stored == {first: [inode(fd) for fd in fds[:3]], second: [inode(fds[3])]}
    store.drop(first)
    await store.settled()
    assert manager.stored == {second: [inode(fds[3])]}
    assert manager.messages == [
        f"FDSTORE=1\nFDNAME={first}\nFDPOLL=0",
        f"FDSTORE=1\nFDNAME={second}\nFDPOLL=0",
        "BARRIER=1",
        f"FDSTOREREMOVE=1\nFDNAME={first}",
        "BARRIER=1",
    ]
    # Borrowed.
    assert not any(fd.closed for fd in fds)
    close_all(fds)


async def test_nothing_to_settle_sends_nothing(manager: FakeStore, store: FdStore) -> None:
    await store.settled()
    (fd,) = memfds(1)
    await store.put("a", [fd], 0)
    await store.settled()
    said = list(manager.messages)
    await store.settled()
    assert manager.messages == said == ["FDSTORE=1\nFDNAME=a\nFDPOLL=0", "BARRIER=1"]
    fd.close()


async def test_dropping_a_name_that_was_never_used_frees_it_without_a_message(
    manager: FakeStore, store: FdStore
) -> None:
    name = store.take_name()
    assert store.take_name() != name
    store.drop(name)
    assert store.take_name() == name
    manager.drain()
    assert manager.messages == []


@pytest.mark.parametrize("count", [0, MAX_FDS + 1])
async def test_what_does_not_fit_into_a_message_is_refused(store: FdStore, count: int) -> None:
    fds = memfds(1)
    with pytest.raises(ValueError, match="1 to 253"):
        await store.put("a", fds * count, 0)
    close_all(fds)


async def test_as_many_as_fit_into_a_message(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(MAX_FDS)
    await store.put("a", fds, 0)
    await store.settled()
    assert manager.stored == {"a": [inode(fd) for fd in fds]}
    close_all(fds)


async def test_a_closed_descriptor_is_the_callers_error_and_nobody_elses(manager: FakeStore, store: FdStore) -> None:
    closed, good = memfds(2)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        await store.put("a", [closed], 0)
    await store.put("b", [good], 0)
    await store.settled()
    assert manager.stored == {"b": [inode(good)]}
    good.close()


# ---- order --------------------------------------------------------------------------------------------------------


async def test_a_name_is_free_when_its_removal_was_sent(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(200)
    with manager.paused():
        waiting = puts(store, fds[:-1], 1000)
        await turns()
        last = list(waiting)[-1]
        assert not waiting[last].done(), "the socket took all"
        store.drop(last)
        assert store.take_name() != last
    await asyncio.gather(*waiting.values())
    await store.settled()
    # Of two free names the shorter is taken: the other one's turn comes only now.
    assert last not in manager.stored
    assert store.take_name() == last
    await store.put(last, fds[-1:], 1000)
    await store.settled()
    assert manager.stored[last] == [inode(fds[-1])]
    assert len(manager.stored) == len(fds) - 1
    close_all(fds)


@pytest.mark.parametrize("uids", [(1, 1), (1, 2)])
async def test_messages_of_one_name_keep_their_order(
    manager: FakeStore, store: FdStore, uids: tuple[int, int]
) -> None:
    # The state has the same name for ever.
    old, new = memfds(2)
    crowd = memfds(100)
    with manager.paused():
        waiting = puts(store, crowd, uids[0])
        tasks = [asyncio.create_task(store.put(STATE_NAME, [old], uids[0]))]
        await turns()
        store.drop(STATE_NAME)
        tasks.append(asyncio.create_task(store.put(STATE_NAME, [new], uids[1])))
        await turns()
        assert not any(task.done() for task in tasks)
    await asyncio.gather(*tasks, *waiting.values())
    await store.settled()
    assert manager.stored[STATE_NAME] == [inode(new)]
    said = [message.split("\n")[0] for message in manager.messages if f"FDNAME={STATE_NAME}" in message]
    assert said == ["FDSTORE=1", "FDSTOREREMOVE=1", "FDSTORE=1"]
    close_all([old, new, *crowd])


async def test_a_put_that_is_cancelled_while_it_waits_is_not_sent(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(100)
    with manager.paused():
        waiting = puts(store, fds, 1000)
        await turns()
        name = next(name for name, task in waiting.items() if not task.done())
        waiting[name].cancel()
        fds[list(waiting).index(name)].close()
        await asyncio.wait([waiting.pop(name)])
        store.drop(name)
    await asyncio.gather(*waiting.values())
    await store.settled()
    assert manager.stored.keys() == waiting.keys()
    close_all(fds)


async def test_a_put_whose_cancellation_is_under_way_is_not_sent(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(100)
    with manager.paused():
        waiting = puts(store, fds, 1000)
        await turns()
        name = next(name for name, task in waiting.items() if not task.done())
        manager.drain()  # the socket has room, and the loop has not looked yet
        waiting[name].cancel()
        assert store._socket is not None
        store._socket._again()
    await asyncio.wait(waiting.values())
    assert waiting.pop(name).cancelled()
    await store.settled()
    assert manager.stored.keys() == waiting.keys()
    close_all(fds)


# ---- pace ---------------------------------------------------------------------------------------------------------


async def test_a_full_socket_delays_and_the_loop_goes_on(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(200)
    with manager.paused():
        waiting = puts(store, fds, 1000)
        await turns()
        sent = sum(task.done() for task in waiting.values())
        assert 0 < sent < len(fds)
        cpu, before = time.process_time(), time.monotonic()
        await asyncio.sleep(0.5)
        # It waits for the socket; it does not ask again and again.
        assert time.process_time() - cpu < 0.2
        assert time.monotonic() - before < 5
        assert sum(task.done() for task in waiting.values()) == sent
    await asyncio.gather(*waiting.values())
    await store.settled()
    assert len(manager.stored) == len(fds)
    close_all(fds)


async def test_no_more_is_on_its_way_than_the_manager_may_have_before_it(manager: FakeStore, store: FdStore) -> None:
    fds = memfds(4 * BOUND)
    with manager.holding_barriers():
        waiting = puts(store, fds, 1000)
        settled = asyncio.create_task(store.settled())
        await reached(manager, BOUND + MAX_BARRIERS)
        said = list(manager.messages)
        assert len(said) == BOUND + MAX_BARRIERS
        assert [at for at, message in enumerate(said) if message == "BARRIER=1"] == [STRIDE, 2 * STRIDE + 1]
        assert not settled.done()
    await asyncio.gather(*waiting.values())
    await settled
    assert len(manager.stored) == len(fds)
    close_all(fds)


async def test_settled_waits_for_what_was_before_it_and_no_longer(manager: FakeStore, store: FdStore) -> None:
    (fd,) = memfds(1)
    await store.put("a", [fd], 0)
    with manager.holding_barriers():
        settled = asyncio.create_task(store.settled())
        await reached(manager, 2)
        assert not settled.done()
        given_up = asyncio.create_task(store.settled())
        await turns()
        given_up.cancel()
    await settled
    assert "a" in manager.stored
    fd.close()


async def test_users_take_turns(manager: FakeStore, store: FdStore) -> None:
    greedy, modest = memfds(300), memfds(3)
    with manager.holding_barriers():
        many = puts(store, greedy, 1000)
        await reached(manager, BOUND + MAX_BARRIERS)
        for name in list(many)[:BOUND]:
            store.drop(name)
        few = puts(store, modest, 1001)
        await turns()
        before = len(manager.messages)
    await asyncio.gather(*many.values(), *few.values())
    await store.settled()
    after = [message for message in manager.messages[before:] if message != "BARRIER=1"]
    removals = [message.startswith("FDSTOREREMOVE=1\n") for message in after]
    # What is dropped goes first: the store must not fill up with what is not there any more.
    assert removals == sorted(removals, reverse=True)
    rest = after[removals.count(True) :]
    # Each turn: one put of the one, one of the other.
    places = [rest.index(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0") for name in few]
    assert max(places) <= 2 * len(few), places
    close_all(greedy + modest)


async def test_a_user_beyond_the_burst_is_paced_and_another_is_not(manager: FakeStore) -> None:
    store = FdStore(manager.address, rate=20, burst=5)
    fds = memfds(11)
    start = time.monotonic()
    waiting = puts(store, fds[:10], 1000)
    await turns()
    assert sum(task.done() for task in waiting.values()) == 5
    await store.put(store.take_name(), fds[10:], 1001)
    assert time.monotonic() - start < 0.2
    await asyncio.gather(*waiting.values())
    assert 0.24 <= time.monotonic() - start < 5
    await store.settled()
    assert len(manager.stored) == 11
    store.close()
    close_all(fds)


def test_pace() -> None:
    pace = Pace(10, 3)
    for _ in range(3):
        assert pace.wait(1, 100.0) == 0
        pace.take(1, 100.0)
    assert pace.wait(1, 100.0) == pytest.approx(0.1)
    assert pace.wait(2, 100.0) == 0
    assert pace.wait(1, 100.1) == 0
    pace.take(1, 100.1)
    assert pace.wait(1, 100.1) == pytest.approx(0.1)
    # The whole burst again, and no more than that.
    for _ in range(3):
        assert pace.wait(1, 200.0) == 0
        pace.take(1, 200.0)
    assert pace.wait(1, 200.0) == pytest.approx(0.1)


def test_pace_forgets_whom_it_need_not_remember() -> None:
    pace = Pace(10, 3)
    for uid in range(100 * PRUNE_AT):
        pace.take(uid, float(uid))
    assert len(pace._paid) <= PRUNE_AT
    assert pace.wait(100 * PRUNE_AT - 1, 100.0 * PRUNE_AT - 1) == 0


@pytest.mark.parametrize("how", ["does not read", "does not answer"])
async def test_a_manager_that_takes_nothing_is_told_of_once(
    manager: FakeStore, store: FdStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    told: list[Event] = []
    monkeypatch.setattr(fdstore, "DELAY", 0.1)
    monkeypatch.setattr(fdstore, "emit", lambda _log, event, **fields: told.append(event))
    fds = memfds(2 * BOUND)
    for times in (1, 2):
        with manager.paused() if how == "does not read" else manager.holding_barriers():
            waiting = puts(store, fds, 1000)
            await turns()
            await asyncio.sleep(0.35)
            assert told == [Event.STORE_DELAYED] * times
        await asyncio.gather(*waiting.values())
        await store.settled()
    # As much as may be on its way, and nothing that waits for more.
    with manager.holding_barriers():
        await asyncio.gather(*puts(store, fds[:BOUND], 1000).values())
        await asyncio.sleep(0.2)
    await store.settled()
    assert told == [Event.STORE_DELAYED] * 2
    close_all(fds)


# ---- trouble ------------------------------------------------------------------------------------------------------


async def test_a_manager_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fds = memfds(2)
    with FakeStore(tmp_path / "notify") as first:
        store = FdStore(first.address)
        await store.put("a", fds[:1], 0)
        await store.settled()
    with pytest.raises(ConnectionRefusedError):
        await store.put("b", fds[1:], 0)
    assert "could not be stored" in caplog.text
    store.drop("a")
    assert "stored as a could not be removed" in caplog.text
    await store.settled()
    # It is there again, under the same name.
    Path(first.address).unlink()
    with FakeStore(tmp_path / "notify") as second:
        await store.put("c", fds[1:], 0)
        await store.settled()
        assert second.stored == {"c": [inode(fds[1])]}
    store.close()
    close_all(fds)


async def test_a_name_whose_removal_failed_stays_in_use(tmp_path: Path) -> None:
    (fd,) = memfds(1)
    with FakeStore(tmp_path / "notify") as manager:
        store = FdStore(manager.address)
        name = store.take_name()
        await store.put(name, [fd], 0)
    store.drop(name)
    assert store.take_name() != name
    store.close()
    fd.close()


async def test_a_manager_that_goes_before_it_has_answered(
    manager: FakeStore, store: FdStore, caplog: pytest.LogCaptureFixture
) -> None:
    fds = memfds(100)
    with manager.paused():
        waiting = puts(store, fds, 0)
        settled = asyncio.create_task(store.settled())
        await turns()
        store.close()
        store.close()
        outcomes = await asyncio.gather(*waiting.values(), settled, return_exceptions=True)
    assert any(isinstance(outcome, OSError) and outcome.errno == errno.ESHUTDOWN for outcome in outcomes)
    assert any(outcome is None for outcome in outcomes)
    assert not store.enabled
    close_all(fds)


@pytest.mark.parametrize("where", ["pipe", "send"])
async def test_a_shortage_is_waited_out(
    manager: FakeStore,
    store: FdStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    (fd,) = memfds(1)
    failures = iter([True] * 2)

    def scarce(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if next(failures, False):
                raise OSError(errno.EMFILE if where == "pipe" else errno.ETOOMANYREFS, "short")
            return function(*arguments)

        return call

    if where == "pipe":
        monkeypatch.setattr(os, "pipe2", scarce(os.pipe2))
    else:
        assert store._socket is not None
        monkeypatch.setattr(store._socket, "_send", scarce(store._socket._send))
    await store.put("a", [fd], 0)
    await store.settled()
    assert manager.stored == {"a": [inode(fd)]}
    assert sum("tried again" in record.message for record in caplog.records) == 2
    fd.close()


async def test_a_barrier_that_cannot_be_sent_fails_who_waits_for_it(
    manager: FakeStore, store: FdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fd,) = memfds(1)
    await store.put("a", [fd], 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", lambda flags: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no pipes")))
        with pytest.raises(OSError, match="no pipes"):
            await store.settled()
    await store.put("a", [fd], 0)
    await store.settled()
    fd.close()


# ---- whether there is one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "enabled"),
    [
        ({"FDSTORE": "3008"}, True),
        ({"FDSTORE": "0"}, False),
        ({}, False),
        ({"SYSTEMD_EXEC_PID": str(os.getpid())}, True),
        ({"SYSTEMD_EXEC_PID": str(os.getppid())}, False),
        ({"SYSTEMD_EXEC_PID": str(os.getpid()), "FDSTORE": "0"}, False),
    ],
)
async def test_the_environment_says_whether_there_is_a_store(
    manager: FakeStore, environ: dict[str, str], enabled: bool
) -> None:
    store = FdStore.from_environment(manager.address, environ)
    assert store.enabled is enabled
    store.close()
    assert FdStore.from_environment(None, environ).enabled is False


async def test_without_a_store_nothing_happens() -> None:
    store = FdStore(None)
    (fd,) = memfds(1)
    assert store.take_name() == ""
    await store.put("", [fd], 0)
    store.drop("")
    await store.settled()
    store.close()
    fd.close()


def test_an_unusable_address_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for address in ("vsock:2:1234", str(tmp_path / "absent")):
        assert not FdStore.from_environment(address, {"FDSTORE": "10"}).enabled
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


# ---- names --------------------------------------------------------------------------------------------------------


def test_names_are_short_different_and_printable() -> None:
    names = StoreNames()
    taken = [names.take() for _ in range(62 + 62**2 + 62**3)]
    assert len(set(taken)) == len(taken)
    assert [len(name) for name in taken] == sorted(len(name) for name in taken)
    assert {len(name) for name in taken} == {1, 2, LONGEST}
    assert all(name.isascii() and name.isalnum() for name in taken)
    with pytest.raises(RuntimeError):
        names.take()
    for name in ("zz", "Z", "zzz", "5"):
        names.free(name)
        names.free(name)
    assert [names.take() for _ in range(4)] == ["5", "Z", "zz", "zzz"]


def test_reserved_names_are_not_given() -> None:
    names = StoreNames()
    for name in ("0", "2", "00", STATE_NAME, "unknown", "a:b", ""):
        names.reserve(name)
    assert [name for name in ("0", "2", "00", STATE_NAME, "unknown", "") if name in names] == ["0", "2", "00"]
    assert [names.take() for _ in range(3)] == ["1", "3", "4"]
    names.free("2")
    names.free("00")
    names.free("1")
    names.reserve("1")
    assert names.take() == "2"
    names.free("1")
    assert names.take() == "1"
    assert [name for name in (names.take() for _ in range(59)) if len(name) > 1] == ["00", "01"]


# ---- what is inherited --------------------------------------------------------------------------------------------

AT = 700
"""Where the tests' inherited descriptors are: 3 and the next are somebody else's here."""


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Five descriptors from AT on, as a service manager leaves them; their inodes."""
    monkeypatch.setattr(listen_fds, "FIRST", AT)
    fds = memfds(5)
    for number, fd in enumerate(fds, AT):
        os.dup2(fd.fileno(), number, inheritable=True)
    yield [inode(fd) for fd in fds]
    for number, fd in enumerate(fds, AT):
        fd.close()
        try:
            os.close(number)
        except OSError as error:
            assert error.errno == errno.EBADF


def environment(count: str = "5", names: str | None = "a:b:a:_s:c", pid: str | None = None) -> dict[str, str]:
    found = {"LISTEN_PID": pid or str(os.getpid()), "LISTEN_FDS": count, "PATH": "/bin", "LISTEN_PIDFDID": "7"}
    return found if names is None else found | {"LISTEN_FDNAMES": names}


def test_what_is_inherited_is_taken_once(passed: list[int]) -> None:
    store = FdStore(None)
    environ = environment()
    found = store.inherited(environ)
    assert environ == {"PATH": "/bin"}
    assert {name: [inode(fd) for fd in fds] for name, fds in found.items()} == {
        "a": [passed[0], passed[2]],
        "b": [passed[1]],
        "_s": [passed[3]],
        "c": [passed[4]],
    }
    assert not any(os.get_inheritable(fd.fileno()) for fds in found.values() for fd in fds)
    assert store.inherited(environ) == {}
    for fds in found.values():
        close_all(fds)


async def test_inherited_names_are_in_use_until_dropped(passed: list[int], manager: FakeStore, store: FdStore) -> None:
    found = store.inherited(environment(names="0:2:2:_s:unknown"))
    assert [store.take_name() for _ in range(3)] == ["1", "3", "4"]
    store.drop("2")
    store.drop("unknown")
    await store.settled()
    assert manager.messages[:2] == ["FDSTOREREMOVE=1\nFDNAME=2", "FDSTOREREMOVE=1\nFDNAME=unknown"]
    assert store.take_name() == "2"
    for fds in found.values():
        close_all(fds)


@pytest.mark.parametrize("pid", ["1", "0", "", "x", "-1", f"{os.getpid()} "])
def test_what_was_passed_to_another_process_is_not_ours(passed: list[int], pid: str) -> None:
    environ = environment() | {"LISTEN_PID": pid}
    assert listen_fds.take(environ) == {}
    assert environ == {"PATH": "/bin"}
    assert os.get_inheritable(AT)


@pytest.mark.parametrize("count", ["", "x", "-1", "5x", "\u0665"])
def test_a_count_that_is_none(passed: list[int], count: str, caplog: pytest.LogCaptureFixture) -> None:
    assert listen_fds.take(environment(count)) == {}
    assert "LISTEN_FDS" in caplog.text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ["unknown"] * 5),
        ("a:b:c:d:e", ["a", "b", "c", "d", "e"]),
        ("a:::d:", ["a", "", "", "d", ""]),
        (r"a\:b:\\:\x:d:e", ["a:b", "\\", "x", "d", "e"]),
        ("a:b:c", ["unknown"] * 5),
        ("a:b:c:d:e:f", ["unknown"] * 5),
        ("", ["unknown"] * 5),
    ],
)
def test_names_of_what_is_inherited(passed: list[int], text: str | None, names: list[str]) -> None:
    found = listen_fds.take(environment(names=text))
    by_inode = {inode(fd): name for name, fds in found.items() for fd in fds}
    assert [by_inode[number] for number in passed] == names
    for fds in found.values():
        close_all(fds)


def test_a_number_that_is_not_open(passed: list[int], caplog: pytest.LogCaptureFixture) -> None:
    os.close(AT + 1)
    found = listen_fds.take(environment())
    assert sorted(found) == ["_s", "a", "c"]
    assert f"Descriptor {AT + 1}" in caplog.text
    for fds in found.values():
        close_all(fds)


# ---- capacity -----------------------------------------------------------------------------------------------------


def test_capacity_is_checked_to_the_descriptor() -> None:
    fds = stored_fds(1000)
    check_capacity(1000, {"FDSTORE": str(fds)}, fds + SPARE_FDS)
    check_capacity(1000, {}, -1)
    with pytest.raises(StoreError, match=f"room for {fds - 1}: set FileDescriptorStoreMax={fds} "):
        check_capacity(1000, {"FDSTORE": str(fds - 1)}, fds + SPARE_FDS)
    with pytest.raises(StoreError, match=f"LimitNOFILE={fds + SPARE_FDS} "):
        check_capacity(1000, {"FDSTORE": str(fds)}, fds + SPARE_FDS - 1)


def test_capacity_ends_where_the_names_do_not_fit() -> None:
    assert stored_fds(MAX_BUFFERS) * (LONGEST + 1) <= MAX_FDNAMES < stored_fds(MAX_BUFFERS + 1) * (LONGEST + 1)
    check_capacity(MAX_BUFFERS, {}, -1)
    with pytest.raises(StoreError, match=f"max_buffers in udmabufd.toml to {MAX_BUFFERS} or less"):
        check_capacity(MAX_BUFFERS + 1, {}, -1)


# ---- the stand-in -------------------------------------------------------------------------------------------------


def test_the_same_file_is_told_from_its_like() -> None:
    first, second = memfds(2)
    copy = first.dup()
    again = OwnedFd(os.open(f"/proc/self/fd/{first.fileno()}", os.O_RDWR | os.O_CLOEXEC))
    assert same_file(first.fileno(), copy.fileno())
    assert not same_file(first.fileno(), again.fileno())
    assert not same_file(first.fileno(), second.fileno())
    close_all([first, second, copy, again])
