# SPDX-License-Identifier: MIT
"""linux.cacheprobe: no device passes but one that refuses what it must and accepts what it must."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from pathlib import Path

import pytest

from tests.unit.udmabuf_device import (
    CACHED,
    CLOEXEC,
    UNCACHED,
    WRITE_COMBINE,
    FakeDevice,
    Judge,
    honest,
    ignoring,
    refusing_all,
    refusing_unknown,
)
from udmabufd.linux import cacheprobe

SINGLE = (CACHED, UNCACHED, WRITE_COMBINE)
PAIRS = (CACHED | UNCACHED, CACHED | WRITE_COMBINE, UNCACHED | WRITE_COMBINE)


def honours(patch: pytest.MonkeyPatch, judge: Judge) -> tuple[bool, FakeDevice]:
    device = FakeDevice(patch, judge)
    return cacheprobe.honours_cache_flags(-1), device


def test_mainline_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it accepts a bit without a meaning tells all; the flags proper are never sent."""
    passed, device = honours(monkeypatch, ignoring)
    assert not passed
    assert device.flags == [CLOEXEC, CLOEXEC | 1 << 31]


def test_one_that_refuses_unknown_flags_only(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, device = honours(monkeypatch, refusing_unknown)
    assert not passed
    assert device.flags == [CLOEXEC, CLOEXEC | 1 << 31, CLOEXEC, CLOEXEC | PAIRS[0]]


def test_one_that_refuses_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel might that checks flags some day, and has none for this."""
    passed, device = honours(monkeypatch, refusing_all)
    assert not passed
    assert device.flags[-1] == CLOEXEC | CACHED


def test_one_that_honours_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is tried, close-on-exec."""
    passed, device = honours(monkeypatch, honest)
    assert passed
    assert set(device.flags) == {CLOEXEC | flags for flags in (0, 1 << 31, *PAIRS, *SINGLE)}
    assert {call.items for call in device.calls} == {1}


@pytest.mark.parametrize("odd", [1 << 31, *PAIRS, *SINGLE])
def test_a_single_answer_that_is_wrong_decides(monkeypatch: pytest.MonkeyPatch, odd: int) -> None:
    """Whichever it is."""

    def judge(flags: int) -> int:
        return 0 if (flags == CLOEXEC | odd) == bool(honest(flags)) else errno.EINVAL

    assert not honours(monkeypatch, judge)[0]


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EMFILE, errno.ENOTTY, errno.EBADFD])
@pytest.mark.parametrize("at", [1 << 31, PAIRS[1], UNCACHED])
def test_another_refusal_tells_nothing(monkeypatch: pytest.MonkeyPatch, code: int, at: int) -> None:
    """It is the caller's, whenever it comes; that nothing is left open is seen after each test."""

    def judge(flags: int) -> int:
        return code if flags == CLOEXEC | at else honest(flags)

    with pytest.raises(OSError) as caught:
        honours(monkeypatch, judge)
    assert caught.value.errno == code


@pytest.mark.parametrize("judge", [ignoring, refusing_unknown, refusing_all])
@pytest.mark.parametrize("first", range(13))
@pytest.mark.parametrize("length", [1, 2, 3, 4, 100])
def test_refusals_that_have_another_cause(
    monkeypatch: pytest.MonkeyPatch, judge: Judge, first: int, length: int
) -> None:
    """Root may set size_limit_mb to 0 and back at any time, and the driver answers EINVAL to that, too: no device
    passes by it, and none is sent an attribute for it.
    """
    calls = itertools.count()
    device = FakeDevice(
        monkeypatch, lambda flags: errno.EINVAL if first <= next(calls) < first + length else judge(flags)
    )
    with contextlib.suppress(OSError):
        assert not cacheprobe.honours_cache_flags(-1)
    if judge is ignoring:
        assert set(device.flags) <= {CLOEXEC, CLOEXEC | 1 << 31, CLOEXEC | PAIRS[0]}


def test_one_that_refuses_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for nothing else."""
    device = FakeDevice(monkeypatch, lambda flags: errno.EINVAL)
    with pytest.raises(OSError, match="without flags") as caught:
        cacheprobe.honours_cache_flags(-1)
    assert caught.value.errno == errno.EINVAL
    assert device.flags == [CLOEXEC]


def test_each_is_tried_with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left for a moment of the one before, as in a child that a thread forks, is no reason to refuse."""
    device = FakeDevice(monkeypatch, honest)
    seen: set[tuple[int, int]] = set()
    answer = device._answer

    def look(fd: int, request: int, argument: bytes | bytearray = b"", *rest: object) -> object:
        state = os.fstat(int.from_bytes(argument[:4], "little"))
        assert (state.st_dev, state.st_ino) not in seen
        assert state.st_size == state.st_blocks * 512, "a page is not populated"
        seen.add((state.st_dev, state.st_ino))
        # Kept open, so that no inode number comes twice.
        kept.append(os.dup(int.from_bytes(argument[:4], "little")))
        return answer(fd, request, argument, *rest)

    kept: list[int] = []
    monkeypatch.setattr("fcntl.ioctl", look)
    assert cacheprobe.honours_cache_flags(-1)
    assert len(seen) == 7 + 5
    for fd in kept:
        os.close(fd)


def test_what_is_no_udmabuf() -> None:
    with Path("/dev/null").open("rb") as null, pytest.raises(OSError) as caught:
        cacheprobe.honours_cache_flags(null.fileno())
    assert caught.value.errno == errno.ENOTTY
