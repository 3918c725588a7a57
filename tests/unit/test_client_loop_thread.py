# SPDX-License-Identifier: MIT
"""The loop on a thread: results and errors come back, nothing is lost when a caller gives up, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from udmabufd_client.errors import ServiceUnavailable
from udmabufd_client.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    made = LoopThread("test-loop")
    yield made
    made.stop(lambda: None)


async def answer(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_a_result_comes_back(loop: LoopThread) -> None:
    assert loop.run(answer(42)) == 42


def test_an_error_comes_back(loop: LoopThread) -> None:
    async def fail() -> None:
        raise LookupError("there")

    with pytest.raises(LookupError, match="there"):
        loop.run(fail())


def test_many_threads_get_each_their_own(loop: LoopThread) -> None:
    results: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda number=number: results.append((number, loop.run(answer(number)))))
        for number in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(number, number) for number in range(32)]


def test_a_caller_that_is_interrupted_cancels_its_coroutine(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def wait_for_ever() -> None:
        # The main thread waits by now, or soon: the interrupt comes either way.
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        loop.run(wait_for_ever())
    assert cancelled.wait(10)
    assert loop.run(answer(1)) == 1


def test_a_result_that_comes_in_spite_of_the_interrupt_is_disposed_of(loop: LoopThread) -> None:
    disposed: list[int] = []

    async def stubborn() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return 7
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        loop.run(stubborn(), disposed.append)
    loop.stop(lambda: None)
    assert disposed == [7]


def test_stopping_ends_calls_that_others_wait_for(loop: LoopThread) -> None:
    entered = threading.Event()
    seen: list[BaseException] = []

    async def wait_for_ever() -> None:
        entered.set()
        await asyncio.Event().wait()

    def caller() -> None:
        try:
            loop.run(wait_for_ever())
        except ServiceUnavailable as error:
            seen.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    entered.wait()
    order: list[str] = []
    loop.stop(lambda: order.append("last"))
    thread.join(10)
    assert not thread.is_alive()
    assert "closed during the call" in str(seen[0])
    assert order == ["last"]
    loop.stop(lambda: order.append("again"))
    assert order == ["last"]


def test_a_stopped_loop_refuses_and_does_not_hang(loop: LoopThread) -> None:
    loop.stop(lambda: None)
    with pytest.raises(ServiceUnavailable, match="closed"):
        loop.run(answer(1))


def test_a_call_on_the_loops_own_thread_is_refused(loop: LoopThread) -> None:
    async def recurse() -> None:
        loop.run(answer(1))

    with pytest.raises(RuntimeError, match="own thread"):
        loop.run(recurse())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_left_waiting(loop: LoopThread) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            loop.run(answer(1))
        except ServiceUnavailable as error:
            loop.stop(lambda: None)
            os._exit(7 if "fork" in str(error) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert loop.run(answer(1)) == 1
