# SPDX-License-Identifier: MIT
"""linux.copy on memfds; the bracket of dma-bufs on memfds that pass for some. And that populating keeps contents."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import open_fds
from udmabufd.linux import memfd
from udmabufd.linux.copy import PIECE, busy, copy
from udmabufd.linux.dmabuf import (
    DMA_BUF_IOCTL_SYNC,
    DMA_BUF_SYNC_END,
    DMA_BUF_SYNC_READ,
    DMA_BUF_SYNC_START,
    DMA_BUF_SYNC_WRITE,
)
from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

PAGE = 4096
NAME = "copied-by-the-test"


def nothing(done: int) -> None:
    """Take a progress."""


def never() -> bool:
    """Go on."""
    return False


def mappings() -> int:
    """Count this process's mappings of memfds of these tests."""
    return Path("/proc/self/maps").read_text().count(NAME)


@contextmanager
def pair(size: int) -> Iterator[tuple[int, int, bytes]]:
    """Two memfds, the first with random bytes, which come third."""
    content = random.Random(size).randbytes(size)
    with memfd.create(NAME, size) as source, memfd.create(NAME, size) as target:
        os.pwrite(source.fileno(), content, 0)
        yield source.fileno(), target.fileno(), content


@pytest.mark.parametrize(
    ("size", "piece", "told"),
    [
        (PAGE, PIECE, [PAGE]),
        (3 * PAGE, PAGE, [PAGE, 2 * PAGE, 3 * PAGE]),
        (3 * PAGE, 2 * PAGE, [2 * PAGE, 3 * PAGE]),
        (PAGE, 1000, [1000, 2000, 3000, 4000, 4096]),
    ],
)
def test_every_byte_is_copied(size: int, piece: int, told: list[int]) -> None:
    done: list[int] = []
    with pair(size) as (source, target, content):
        before = open_fds()
        assert copy(source, target, size, progress=done.append, cancelled=never, piece=piece)
        assert (os.pread(target, size, 0), os.pread(source, size, 0)) == (content, content)
        assert (open_fds(), mappings()) == (before, 0)
    assert done == told


def test_a_target_that_is_larger() -> None:
    with pair(PAGE) as (source, _, content), memfd.create(NAME, 2 * PAGE) as target:
        os.pwrite(target.fileno(), b"\x07" * (2 * PAGE), 0)
        assert copy(source, target.fileno(), PAGE, progress=nothing, cancelled=never)
        assert os.pread(target.fileno(), 2 * PAGE, 0) == content + b"\x07" * PAGE


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_cancelled_between_pieces(asked: int) -> None:
    """What was copied until then is told, nothing more is, and nothing stays mapped."""
    done: list[int] = []
    with pair(3 * PAGE) as (source, target, content):
        cancelled = iter([False] * asked + [True]).__next__
        assert not copy(source, target, 3 * PAGE, progress=done.append, cancelled=cancelled, piece=PAGE)
        assert os.pread(target, 3 * PAGE, 0) == content[: asked * PAGE] + bytes((3 - asked) * PAGE)
        assert mappings() == 0
    assert done == [PAGE * (number + 1) for number in range(asked)]


@pytest.mark.parametrize("raising", ["progress", "cancelled"])
def test_unmapped_when_a_function_raises(raising: str) -> None:
    def fail(*_: object) -> bool:
        assert mappings() == 2
        raise ZeroDivisionError

    functions = {"progress": nothing, "cancelled": never, raising: fail}
    with pair(PAGE) as (source, target, _), pytest.raises(ZeroDivisionError):
        copy(source, target, PAGE, **functions)  # type: ignore[arg-type]
    assert mappings() == 0


@pytest.mark.parametrize("short", [0, 1])
def test_a_file_that_is_too_short(short: int) -> None:
    """It would be mapped, and end the process."""
    with pair(PAGE) as (source, target, _):
        os.ftruncate((source, target)[short], PAGE - 1)
        with pytest.raises(HintedOSError, match=f"4095 bytes, and {PAGE} are to be copied") as caught:
            copy(source, target, PAGE, progress=nothing, cancelled=never)
        assert caught.value.errno == errno.EINVAL
        assert mappings() == 0


def test_what_the_kernel_refuses() -> None:
    with pair(PAGE) as (source, target, _):
        with pytest.raises(OSError) as caught:
            copy(source, target, 0, progress=nothing, cancelled=never)
        assert caught.value.errno == errno.EINVAL
        memfd.add_seals(target, memfd.F_SEAL_WRITE)
        with pytest.raises(OSError) as caught:
            copy(source, target, PAGE, progress=nothing, cancelled=never)
        assert caught.value.errno == errno.EPERM
        with OwnedFd(os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)) as reading:
            with pytest.raises(OSError) as caught:
                copy(source, reading.fileno(), PAGE, progress=nothing, cancelled=never)
        assert caught.value.errno == errno.EACCES
        assert mappings() == 0


class Brackets:
    """Has memfds pass for dma-bufs: notes their brackets, and answers the first calls with errors."""

    def __init__(self, patch: pytest.MonkeyPatch, *errors: int) -> None:
        self.calls: list[tuple[int, int]] = []
        self._errors = list(errors)
        patch.setattr(fcntl, "ioctl", self._ioctl)

    def _ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert request == DMA_BUF_IOCTL_SYNC
        (flags,) = struct.unpack("=Q", argument)
        if self._errors and (code := self._errors.pop(0)):
            raise OSError(code, os.strerror(code))
        self.calls.append((fd, flags))
        return 0


def test_a_source_that_devices_write_to_is_waited_for() -> None:
    """For so long as is said, and not at all if it is only asked. A pipe that nothing is in stands for the dma-buf."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with OwnedFd(reader) as source, OwnedFd(writer) as device, pair(PIECE) as (memory, target, _):
        assert not busy(memory)
        assert busy(source.fileno())
        assert busy(source.fileno(), 0.01)
        with pytest.raises(TimeoutError, match="write to the buffer still"):
            copy(source.fileno(), target, PIECE, progress=nothing, cancelled=never, patience=0.0)
        ending = threading.Timer(0.05, os.write, [device.fileno(), b"!"])
        ending.start()
        assert not busy(source.fileno(), None)
        ending.join()
        assert not busy(source.fileno())


def test_each_piece_is_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the source to read, of the target to write, and nothing is copied outside of both."""
    with pair(2 * PAGE) as (source, target, content):
        brackets = Brackets(monkeypatch)
        at: list[int] = []
        real = ctypes.memmove

        def memmove(to: int, origin: int, size: int) -> None:
            at.append(len(brackets.calls))
            real(to, origin, size)

        monkeypatch.setattr(ctypes, "memmove", memmove)
        assert copy(source, target, 2 * PAGE, progress=nothing, cancelled=never, piece=PAGE)
        one = [
            (source, DMA_BUF_SYNC_READ | DMA_BUF_SYNC_START),
            (target, DMA_BUF_SYNC_WRITE | DMA_BUF_SYNC_START),
            (target, DMA_BUF_SYNC_WRITE | DMA_BUF_SYNC_END),
            (source, DMA_BUF_SYNC_READ | DMA_BUF_SYNC_END),
        ]
        assert brackets.calls == 2 * one
        assert at == [2, 6]
        assert os.pread(target, 2 * PAGE, 0) == content


def test_a_bracket_that_must_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(PAGE) as (source, target, content):
        brackets = Brackets(monkeypatch, errno.EINTR, errno.EAGAIN, 0, errno.EINTR, 0, errno.EAGAIN)
        assert copy(source, target, PAGE, progress=nothing, cancelled=never)
        assert len(brackets.calls) == 4
        assert os.pread(target, PAGE, 0) == content


def test_a_bracket_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's: nothing is copied, and the source's is ended."""
    with pair(PAGE) as (source, target, _):
        brackets = Brackets(monkeypatch, 0, errno.EIO)
        with pytest.raises(OSError) as caught:
            copy(source, target, PAGE, progress=nothing, cancelled=never)
        assert caught.value.errno == errno.EIO
        assert [flags for _, flags in brackets.calls] == [DMA_BUF_SYNC_READ, DMA_BUF_SYNC_READ | DMA_BUF_SYNC_END]
        assert os.pread(target, PAGE, 0) == bytes(PAGE)
        assert mappings() == 0


def beats_while_copying(source: int, target: int, size: int) -> int:
    """Copy in one piece, and return how often another thread of Python ran in the middle half of that time."""
    beats: list[float] = []
    begun: list[float] = []
    ended: list[float] = []
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.001):
            beats.append(time.monotonic())

    def begin() -> bool:
        begun.append(time.monotonic())
        return False

    def end(done: int) -> None:
        ended.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        copy(source, target, size, progress=end, cancelled=begin, piece=size)
    finally:
        over.set()
        thread.join()
    quarter = (ended[0] - begun[0]) / 4
    # The interpreter's lock changes hands after 5 ms, at either end of what is measured.
    assert quarter > 0.010, "too little to measure"
    return sum(begun[0] + quarter < at < ended[0] - quarter for at in beats)


def test_other_threads_run_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """And would not if it were done with the interpreter's lock, which is seen here."""
    size = 192 << 20
    with memfd.create(NAME, size) as source, memfd.create(NAME, size) as target:
        assert beats_while_copying(source.fileno(), target.fileno(), size) > 0
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    monkeypatch.setattr(ctypes, "memmove", prototype(("memmove", ctypes.CDLL(None))))
    with memfd.create(NAME, size) as source, memfd.create(NAME, size) as target:
        assert beats_while_copying(source.fileno(), target.fileno(), size) == 0


def test_populating_keeps_what_there_is() -> None:
    """So it can bring a memfd back that was swapped out in parts."""
    with pair(8 * PAGE) as (source, _, content):
        os.ftruncate(source, 12 * PAGE)
        memfd.populate(source, 12 * PAGE)
        memfd.populate(source, 12 * PAGE)
        assert os.pread(source, 12 * PAGE, 0) == content + bytes(4 * PAGE)
        assert memfd.first_hole(source, 0, 12 * PAGE) is None
