# SPDX-License-Identifier: MIT
"""udmabufd_base.dmabuf_sync: what is asked of the kernel, and what happens when it says try again.

That the ioctl does what it should is shown on real dma-bufs, in tests/kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

import pytest

from udmabufd_base import dmabuf_sync
from udmabufd_base.dmabuf_sync import DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE, sync_end, sync_start
from udmabufd_base.fd import OwnedFd


class Kernel:
    """Stands in for ioctl() and the clock: fails with `errors` in turn, then succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, errors: list[int]) -> None:
        self.errors = errors
        self.asked: list[tuple[int, int, int]] = []
        self.now = 0.0
        self.pauses: list[float] = []
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        self.asked.append((fd, request, struct.unpack("=Q", argument)[0]))
        if self.errors:
            error = self.errors.pop(0)
            raise OSError(error, os.strerror(error))
        return argument

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_flags_are_those_of_dma_buf_h(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [])
    sync_start(7, DMA_BUF_SYNC_READ)
    sync_start(7, DMA_BUF_SYNC_READ | DMA_BUF_SYNC_WRITE)
    sync_end(7, DMA_BUF_SYNC_WRITE)
    assert kernel.asked == [(7, 0x40086200, 1), (7, 0x40086200, 3), (7, 0x40086200, 6)]


def test_interruptions_and_busy_fences_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [errno.EINTR, errno.EAGAIN, errno.EINTR, errno.EAGAIN, errno.EAGAIN])
    sync_start(7, DMA_BUF_SYNC_READ)
    assert len(kernel.asked) == 6
    assert kernel.pauses == [0.001, 0.002, 0.004]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [errno.EAGAIN] * 10_000)
    with pytest.raises(BlockingIOError):
        sync_end(7, DMA_BUF_SYNC_READ)
    assert 4.9 < kernel.now <= 5.0
    assert max(kernel.pauses) == dmabuf_sync._LONGEST_DELAY
    assert len(kernel.asked) < 200


def test_other_errors_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [errno.EINVAL])
    with pytest.raises(OSError, match="Invalid argument"):
        sync_start(7, 0)
    assert len(kernel.asked) == 1


def test_what_is_no_dma_buf_is_enotty() -> None:
    with OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC)) as fd, pytest.raises(OSError, match="ioctl") as caught:
        sync_start(fd.fileno(), DMA_BUF_SYNC_READ)
    assert caught.value.errno == errno.ENOTTY
