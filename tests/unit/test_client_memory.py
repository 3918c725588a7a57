# SPDX-License-Identifier: MIT
"""A Buffer's descriptor over moves and evictions: what replaces it, what is closed, and what its maps are of."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client.info import BufferInfo
from udmabufd_client.mapping import Map
from udmabufd_client.memory import Memory

SIZE = mmap.PAGESIZE


def made(text: bytes = b"") -> OwnedFd:
    fd = OwnedFd(os.memfd_create("memory", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), SIZE)
    os.pwrite(fd.fileno(), text, 0)
    return fd


def of(serial: int, size: int = SIZE) -> BufferInfo:
    return BufferInfo(size=size, serial=serial)


def spare(memory: Memory) -> OwnedFd:
    fd = memory.spare()
    assert fd is not None
    return fd


def test_the_first_descriptor_of_some_memory_stays() -> None:
    memory = Memory()
    assert (memory.has_fd, memory.fileno(), memory.spare(), memory.steal()) == (False, None, None, None)
    first, second = made(), made()
    memory.take(first, of(1))
    memory.take(second, of(1))
    assert second.closed
    assert memory.fileno() == first.fileno()
    memory.close()
    assert first.closed


def test_a_descriptor_of_other_memory_replaces_it_and_maps_stay_with_the_old() -> None:
    memory = Memory()
    memory.take(made(b"old"), of(1, SIZE))
    with Map(memory.mapping, lambda: spare(memory), SIZE, writable=True, label="buffer 1") as old:
        memory.take(made(b"new"), of(2, 2 * SIZE))
        assert (memory.serial, memory.size) == (2, 2 * SIZE)
        with Map(memory.mapping, lambda: spare(memory), SIZE, writable=True, label="buffer 1") as new:
            assert (bytes(old[:3]), bytes(new[:3])) == (b"old", b"new")
        idle = memory.gate.idle
    assert (idle, memory.gate.idle) == (False, True)
    memory.close()


def test_what_was_sent_away_comes_back_and_has_another_mapping() -> None:
    memory = Memory()
    memory.send_away()
    assert not memory.away, "without a descriptor there is nothing to come back"
    fd = made()
    memory.take(fd, of(1))
    before = memory.mapping
    memory.send_away()
    memory.send_away()
    assert (fd.closed, memory.away, memory.has_fd) == (True, True, False)
    memory.replace(made(), of(2))
    assert (memory.away, memory.has_fd, memory.serial) == (False, True, 2)
    assert memory.mapping is not before
    memory.close()


def closed(memory: Memory) -> None:
    memory.close()


def stolen(memory: Memory) -> None:
    number = memory.steal()
    assert number is not None
    os.close(number)


@pytest.mark.parametrize("ended", [closed, stolen])
def test_a_replacement_that_comes_too_late_is_closed(ended: Callable[[Memory], None]) -> None:
    memory = Memory()
    memory.take(made(), of(1))
    ended(memory)
    late = made()
    memory.replace(late, of(2))
    assert late.closed
    assert not memory.has_fd
    memory.close()
    later = made()
    memory.take(later, of(3))
    assert later.closed
    memory.send_away()
    assert not memory.away


def test_which_memory_it_is_of() -> None:
    memory = Memory()
    assert not memory.older_than(2)
    assert not memory.other_than(2)
    memory.take(made(), of(2))
    assert [memory.older_than(serial) for serial in (1, 2, 3)] == [False, False, True]
    assert [memory.other_than(serial) for serial in (1, 2, 3)] == [True, False, True]
    _, before = memory.end()
    assert (before, memory.end()) == (False, (None, True))
    assert _ is not None
    _.close()


def test_buffers_of_one_memory_have_one_gate() -> None:
    one, two = Memory(), Memory()
    two.join(one.gate)
    two.take(made(), of(1))
    with Map(two.mapping, lambda: spare(two), SIZE, writable=True, label="buffer 1"):
        idle = one.gate.idle
    assert (idle, one.gate.idle) == (False, True)
    two.close()


class Lingering(OwnedFd):
    """Gives its number away slowly."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.asked = threading.Event()
        self.replaced = threading.Event()

    def fileno(self) -> int:
        self.asked.set()
        self.replaced.wait(0.2)
        return super().fileno()


def test_a_number_is_borrowed_while_a_move_replaces_the_descriptor() -> None:
    memory = Memory()
    old = Lingering(made().steal())
    memory.take(old, of(1))

    def move() -> None:
        assert old.asked.wait(10)
        memory.take(made(), of(2))
        old.replaced.set()

    moving = threading.Thread(target=move)
    moving.start()
    assert memory.fileno() is not None
    moving.join()
    memory.close()
