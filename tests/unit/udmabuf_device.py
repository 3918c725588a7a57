# SPDX-License-Identifier: MIT
"""A udmabuf device in the place of the kernel's: what it thinks of flags is made up, what it is asked is noted.

It stands behind the ioctls, so that what is noted is what a kernel would have read. Its dma-bufs are memfds.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest

from udmabufd.linux import dmabuf, selftest, udmabuf

UDMABUF_CREATE = 0x40187542  # include/uapi/linux/udmabuf.h
UDMABUF_CREATE_LIST = 0x40087543
CLOEXEC = 0x01
CACHED, UNCACHED, WRITE_COMBINE = 0x02, 0x04, 0x08
KNOWN = CLOEXEC | CACHED | UNCACHED | WRITE_COMBINE

Judge = Callable[[int], int]
"""Returns the error for flags, 0 for none."""


def ignoring(flags: int) -> int:
    """Mainline, in every version."""
    return 0


def refusing_unknown(flags: int) -> int:
    """It looks at flags, but has not thought of two attributes at once."""
    return errno.EINVAL if flags & ~KNOWN else 0


def refusing_all(flags: int) -> int:
    """It knows CLOEXEC and nothing else."""
    return errno.EINVAL if flags & ~CLOEXEC else 0


def honest(flags: int) -> int:
    """One attribute at most, and no bit that it does not know."""
    several = (flags & (CACHED | UNCACHED | WRITE_COMBINE)).bit_count() > 1
    return errno.EINVAL if several or flags & ~KNOWN else 0


class Call(NamedTuple):
    """A call of the device: which, the flags, and how many parts of memfds it is of."""

    request: int
    flags: int
    items: int


class FakeDevice:
    """See the module. `exporter` is what its dma-bufs are told to be of, from the time that they are made."""

    def __init__(self, patch: pytest.MonkeyPatch, judge: Judge, exporter: str = "udmabuf") -> None:
        self.judge = judge
        self.exporter = exporter
        self.calls: list[Call] = []
        self.between: Callable[[], None] = lambda: None
        """Called once, when the next dma-buf has been made."""
        self._exporters: dict[int, str] = {}
        self._ioctl = fcntl.ioctl
        patch.setattr(fcntl, "ioctl", self._answer)
        patch.setattr(udmabuf, "_libc", self)
        # What these find is another test's matter; and here each dma-buf has pages of its own.
        patch.setattr(selftest, "check", lambda device: self.exporter)
        patch.setattr(selftest, "single_fallocate_flaw", lambda device: False)
        patch.setattr(dmabuf, "set_name", lambda fd, name: None)
        patch.setattr(dmabuf, "fdinfo", self._fdinfo)

    @property
    def flags(self) -> list[int]:
        """The flags of all calls, in order."""
        return [call.flags for call in self.calls]

    def ioctl(self, device: int, request: int, argument: ctypes.Array[ctypes.c_char]) -> int:
        """As the C library's, for the call that has a list."""
        assert request == UDMABUF_CREATE_LIST
        flags, count = struct.unpack_from("=II", argument)
        sizes = [struct.unpack_from("=IIQQ", argument, 8 + 24 * item)[3] for item in range(count)]
        try:
            return self._make(Call(request, flags, count), sum(sizes))
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    def _answer(self, fd: int, request: int, argument: bytes | bytearray = b"", *rest: object) -> object:
        if request == UDMABUF_CREATE:
            _, flags, _, size = struct.unpack("=IIQQ", argument)
            return self._make(Call(request, flags, 1), size)
        return self._ioctl(fd, request, argument, *rest)  # type: ignore[call-overload]

    def _make(self, call: Call, size: int) -> int:
        self.calls.append(call)
        if code := self.judge(call.flags):
            raise OSError(code, os.strerror(code))
        fd = os.memfd_create("dma-buf")
        os.ftruncate(fd, size)
        self._exporters[os.fstat(fd).st_ino] = self.exporter
        between, self.between = self.between, lambda: None
        between()
        return fd

    def _fdinfo(self, fd: int) -> dmabuf.Fdinfo:
        state = os.fstat(fd)
        return dmabuf.Fdinfo(1, state.st_size, self._exporters[state.st_ino], "", state.st_ino)
