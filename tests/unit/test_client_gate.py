# SPDX-License-Identifier: MIT
"""The gate before a buffer's memory: who is let in while it is closed, who waits, and when nobody is inside."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator

import pytest

from udmabufd_client.errors import Busy, MoveTimedOut
from udmabufd_client.gate import Closing, Gate


class Keeper:
    """Closes a gate as a loop on another thread does, and counts how often it is woken."""

    def __init__(self, *, limit: float = 10.0) -> None:
        self.woken = 0
        self.here = False
        self.alive = True
        self.closing = Closing(limit, wake=self._wake, here=lambda: self.here, alive=lambda: self.alive)

    def _wake(self) -> None:
        self.woken += 1


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        yield memory


class Visitor(threading.Thread):
    """Goes through a gate in a thread of its own."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        self.inside = threading.Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.gate.passing("buffer 1"):
                self.inside.set()
        except Exception as error:
            self.error = error


def test_an_open_gate_lets_everybody_in(gate: Gate) -> None:
    with gate.passing("buffer 1"), gate.passing("buffer 1"):
        assert not gate.idle
    assert gate.idle


def test_who_comes_waits_until_the_last_reason_is_gone(gate: Gate) -> None:
    one, two = Keeper(), Keeper()
    gate.close(one.closing)
    gate.close(two.closing)
    assert gate.shut_if_idle()
    visitor = Visitor(gate)
    gate.open(one.closing)
    gate.open(one.closing)
    assert gate.shut
    assert not visitor.inside.wait(0.05)
    gate.open(two.closing)
    visitor.join(10)
    assert visitor.inside.is_set()
    assert not gate.shut


@pytest.mark.parametrize("shut", [True, False])
def test_who_comes_waits_even_before_it_is_shut_and_for_so_long_only(gate: Gate, shut: bool) -> None:
    gate.close(Keeper(limit=0.05).closing)
    if shut:
        gate.shut_if_idle()
    begun = time.monotonic()
    with pytest.raises(MoveTimedOut, match=r"buffer 1 is being moved, .* within 0.05 s"):
        gate.passing("buffer 1").__enter__()
    assert time.monotonic() - begun >= 0.05
    assert gate.idle


def test_what_is_being_mapped_counts_before_it_is_mapped(gate: Gate, memory: mmap.mmap) -> None:
    keeper = Keeper()
    with gate.passing("buffer 1"):
        gate.close(keeper.closing)
        assert not gate.shut_if_idle()
        gate.mapped(memory)
    assert not gate.shut_if_idle()
    woken = keeper.woken
    gate.unmapped(memory)
    assert keeper.woken == woken + 1
    assert gate.shut_if_idle()


def test_the_end_of_an_object_that_nobody_closed_counts_too(gate: Gate) -> None:
    keeper = Keeper()
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    gate.mapped(memory)
    gate.close(keeper.closing)
    part = memoryview(memory)[:8]
    del memory
    assert not gate.shut_if_idle()
    del part
    assert keeper.woken == 1
    assert gate.shut_if_idle()


def test_a_thread_that_is_inside_goes_further_in_and_others_do_not(gate: Gate, memory: mmap.mmap) -> None:
    handle = object()
    gate.mapped(memory)
    gate.opened(handle)
    gate.close(Keeper().closing)
    with gate.passing("buffer 1"):
        pass
    visitor = Visitor(gate)
    assert not visitor.inside.wait(0.05)
    gate.ended(handle)
    gate.unmapped(memory)
    assert gate.shut_if_idle()
    assert not visitor.inside.wait(0.05)
    gate.open(gate._closings[0])
    visitor.join(10)
    assert visitor.inside.is_set()


def test_while_only_arrays_are_inside_everybody_gets_in(gate: Gate, memory: mmap.mmap) -> None:
    gate.mapped(memory)
    keeper = Keeper(limit=0.01)
    gate.close(keeper.closing)
    visitor = Visitor(gate)
    visitor.join(10)
    assert visitor.inside.is_set()
    gate.unmapped(memory)
    with pytest.raises(MoveTimedOut):
        gate.passing("buffer 1").__enter__()


def test_who_opens_it_never_waits_for_it(gate: Gate, memory: mmap.mmap) -> None:
    keeper = Keeper()
    keeper.here = True
    gate.mapped(memory)
    gate.opened(memory)
    gate.close(keeper.closing)
    visitor = threading.Thread(target=lambda: gate.passing("buffer 1").__enter__())
    visitor.start()
    visitor.join(10)
    assert not visitor.is_alive(), "in the thread of the loop: others are inside anyway"
    with gate._changed:
        gate._entering = 0
    gate.unmapped(memory)
    for _ in range(2):
        with pytest.raises(Busy, match=r"buffer 1 is being moved.*get_fd\(\)"):
            gate.passing("buffer 1").__enter__()
        assert gate.shut_if_idle()


def test_a_gate_that_nobody_will_open_is_open(gate: Gate) -> None:
    keeper = Keeper(limit=0.01)
    gate.close(keeper.closing)
    gate.shut_if_idle()
    # As in a child, after fork(), or when the client is gone.
    keeper.alive = False
    with gate.passing("buffer 1"):
        pass


def test_who_waits_elsewhere_is_told_once_when_it_opens(gate: Gate) -> None:
    told: list[int] = []
    keeper = Keeper()
    assert not gate.tell_opened(lambda: told.append(0))
    gate.close(keeper.closing)
    assert not gate.tell_opened(lambda: told.append(0)), "closed is not shut: it would wait for itself"
    gate.shut_if_idle()
    assert gate.tell_opened(lambda: told.append(1))
    gate.open(keeper.closing)
    gate.close(keeper.closing)
    gate.open(keeper.closing)
    assert told == [1]
