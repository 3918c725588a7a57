# SPDX-License-Identifier: MIT
"""core.closer: whoever gives a descriptor whose close() hangs waits no longer, and nobody else does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bus.silent_fuse import silent_file
from udmabufd.core.closer import Closer
from udmabufd_base.fd import OwnedFd

PATIENCE = 20.0
ALICE, BOB = 1000, 1001


class Hanging:
    """os.close() in which chosen descriptors wait for a word."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: set[int] = set()
        self.word = threading.Event()
        self.entered = threading.Semaphore(0)
        self.closed: list[int] = []
        self._close = os.close
        monkeypatch.setattr(os, "close", self)

    def __call__(self, fd: int) -> None:
        if fd in self.chosen:
            self.entered.release()
            assert self.word.wait(PATIENCE)
        self._close(fd)
        self.closed.append(fd)

    def choose(self, fds: list[OwnedFd]) -> None:
        """Let these hang."""
        self.chosen.update(fd.fileno() for fd in fds)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    """See the class; at the end all goes on, and all threads have ended."""
    hanging = Hanging(monkeypatch)
    yield hanging
    hanging.word.set()
    await_true(lambda: not closers())


def closers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "closer"]


def await_true(condition: Callable[[], bool]) -> None:
    """There is nothing to wait on: the threads tell nobody that they end."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def descriptors(count: int) -> list[OwnedFd]:
    return [OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) for _ in range(count)]


def test_closes(hanging: Hanging) -> None:
    """Every descriptor, in another thread, which ends; the owner has given them away at once."""
    fds = descriptors(5)
    numbers = [fd.fileno() for fd in fds]
    closer = Closer()
    closer.close(fds, ALICE)
    assert all(fd.closed for fd in fds)
    await_true(lambda: hanging.closed == numbers and not closers())
    assert not closer.full(ALICE)


@pytest.mark.root
def test_a_server_that_never_answers(tmp_path: Path) -> None:
    """The real thing: the descriptors of one user hang, another's are closed; the death of the server frees all."""
    closer = Closer(per_uid=16)
    with silent_file(tmp_path) as path:
        hanging = [OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC)) for _ in range(16)]
        closer.close(hanging, ALICE)
        closer.close(descriptors(3), BOB)
        await_true(lambda: len(closers()) == 1)
        assert closer.full(ALICE)
        assert not closer.full(BOB)
    await_true(lambda: not closers())
    assert not closer.full(ALICE)


def test_nothing_to_do() -> None:
    """No descriptors, or closed ones: no thread."""
    fds = descriptors(1)
    fds[0].close()
    closer = Closer()
    closer.close([], ALICE)
    closer.close(fds, ALICE)
    assert not closers()


def test_one_that_hangs_holds_up_its_uid_alone(hanging: Hanging) -> None:
    """The one behind it waits; those of others and of nobody known are closed. The caller never waits."""
    closer = Closer()
    stuck, behind, others, unknown = descriptors(4)
    numbers = [fd.fileno() for fd in (stuck, behind, others, unknown)]
    hanging.choose([stuck])
    closer.close([stuck, behind], ALICE)
    assert hanging.entered.acquire(timeout=PATIENCE)
    closer.close([others], BOB)
    closer.close([unknown], None)
    await_true(lambda: sorted(hanging.closed) == sorted(numbers[2:]))
    hanging.word.set()
    await_true(lambda: set(hanging.closed) == set(numbers))


def test_full_for_one(hanging: Hanging) -> None:
    """At the bound the uid is full and another is not; when its descriptors are closed it may send again."""
    closer = Closer(per_uid=3, total=100)
    fds = descriptors(3)
    hanging.choose(fds)
    closer.close(fds[:2], ALICE)
    assert not closer.full(ALICE)
    closer.close(fds[2:], ALICE)
    assert closer.full(ALICE)
    assert not closer.full(BOB)
    assert not closer.full(None)
    assert len(closers()) == 1
    hanging.word.set()
    await_true(lambda: not closer.full(ALICE))


def test_the_descriptors_of_several_calls_may_be_open_still(hanging: Hanging) -> None:
    """A client that brings 16 with each of its calls, as fast as they are answered, is not refused."""
    closer = Closer()
    for _ in range(3):
        assert not closer.full(ALICE)
        fds = descriptors(16)
        hanging.choose(fds)
        closer.close(fds, ALICE)
    assert closer.full(ALICE)
    assert not closer.full(BOB)
    hanging.word.set()
    await_true(lambda: not closer.full(ALICE))


def test_those_that_are_closed_no_longer_count(hanging: Hanging) -> None:
    """While the thread hangs on a later one."""
    closer = Closer(per_uid=2)
    quick, stuck = descriptors(2)
    hanging.choose([stuck])
    closer.close([quick, stuck], ALICE)
    assert hanging.entered.acquire(timeout=PATIENCE)
    assert not closer.full(ALICE)


def test_full_for_all(hanging: Hanging) -> None:
    """Many uids together reach the other bound."""
    closer = Closer(per_uid=3, total=4)
    fds = descriptors(4)
    hanging.choose(fds)
    for uid, fd in enumerate(fds):
        assert not closer.full(BOB)
        closer.close([fd], uid)
    assert closer.full(BOB)
    hanging.word.set()
    await_true(lambda: not closer.full(BOB))


def test_one_that_hangs_is_told(hanging: Hanging, caplog: pytest.LogCaptureFixture) -> None:
    """After a second, when more come or no more can; not while closing takes no time."""
    now = 0.0
    closer = Closer(per_uid=2, clock=lambda: now)
    uid = 7001  # Of each uid there is one entry a minute.
    stuck, second, third = descriptors(3)
    hanging.choose([stuck])
    closer.close([stuck], uid)
    assert hanging.entered.acquire(timeout=PATIENCE)
    closer.close([second], uid)
    assert closer.full(uid)
    assert not caplog.records
    now = 1.0
    assert not closer.full(BOB)
    assert not caplog.records
    assert closer.full(uid)
    assert "2 of 2 foreign file descriptors of user 7001 hang" in caplog.text
    closer.close([third], uid + 1)
    await_true(lambda: len(hanging.closed) == 1)
    assert len(caplog.records) == 1


def test_an_error_of_close_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones behind it are closed."""
    closed: list[int] = []
    real = os.close

    def fail(fd: int) -> None:
        real(fd)
        closed.append(fd)
        raise OSError(5, "of a disk that is not ours")

    monkeypatch.setattr(os, "close", fail)
    closer = Closer(per_uid=1)
    closer.close(descriptors(3), ALICE)
    await_true(lambda: len(closed) == 3 and not closers())
    assert not closer.full(ALICE)


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They wait, counted, and go with the next ones."""
    closer = Closer(per_uid=2)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        closer.close(descriptors(2), ALICE)
    assert "TasksMax=" in caplog.text
    assert closer.full(ALICE)
    closer.close(descriptors(1), ALICE)
    await_true(lambda: not closers())
    assert not closer.full(ALICE)
