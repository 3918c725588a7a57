# SPDX-License-Identifier: MIT
"""The typed errors of the service, one class for each name of the contract, and the one table from errno to them.

A message is one sentence that names the field, the limit and the present figure. It never holds a path, a traceback
or another user's data, for it goes to the caller as it is.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from udmabufd_client.contract import ErrorName


class AllocatorError(Exception):
    """Base of every error that a caller may see."""

    name: ClassVar[ErrorName]
    scarce: ClassVar[bool] = False
    """Whether it refuses for a limit or for want of memory, and is counted as a refusal."""


class InvalidSpec(AllocatorError):
    """A key or argument is unknown, of the wrong type, out of range, or contradicts another."""

    name = ErrorName.INVALID_SPEC

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


class IncompatibleConstraints(AllocatorError):
    """Two demands exclude each other. `field` is the constraint's key, `devices` whose demands they are."""

    name = ErrorName.INCOMPATIBLE_CONSTRAINTS

    def __init__(self, field: str, devices: tuple[str, str], reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.devices = devices


class NoSuchDevice(AllocatorError):
    """The device is not known to udev, or is gone."""

    name = ErrorName.NO_SUCH_DEVICE


class NoAllocator(AllocatorError):
    """No enabled allocator matches."""

    name = ErrorName.NO_ALLOCATOR


class NoSuchBuffer(AllocatorError):
    """There is no such buffer for this caller."""

    name = ErrorName.NO_SUCH_BUFFER

    def __init__(self) -> None:
        # One text for absent and foreign alike: whether an id exists is nobody else's business.
        super().__init__("No such buffer, or the caller holds no share of it")


class AccessDenied(AllocatorError):
    """The caller may not do this."""

    name = ErrorName.ACCESS_DENIED


class NotSupported(AllocatorError):
    """This kernel or this kind of buffer cannot do it."""

    name = ErrorName.NOT_SUPPORTED


class QuotaExceeded(AllocatorError):
    """The caller's user would hold more than its limit."""

    name = ErrorName.QUOTA_EXCEEDED
    scarce = True


class RateLimited(AllocatorError):
    """Too many calls, or too many under way."""

    name = ErrorName.RATE_LIMITED
    scarce = True


class OutOfMemory(AllocatorError):
    """No memory or no file descriptor left."""

    name = ErrorName.OUT_OF_MEMORY
    scarce = True


class KernelLimit(AllocatorError):
    """A parameter of the kernel's udmabuf driver forbids it."""

    name = ErrorName.KERNEL_LIMIT


class UdmabufUnavailable(AllocatorError):
    """/dev/udmabuf is absent or failed its test."""

    name = ErrorName.UDMABUF_UNAVAILABLE


class Busy(AllocatorError):
    """The buffer is held in place."""

    name = ErrorName.BUSY


class MoveTimedOut(AllocatorError):
    """An importer did not answer a move in time."""

    name = ErrorName.MOVE_TIMED_OUT


class CacheUnavailable(AllocatorError):
    """The required cache attribute cannot be had."""

    name = ErrorName.CACHE_UNAVAILABLE


class BadMemfd(AllocatorError):
    """A memfd lacks a seal, a mode, alignment or pages; the message says which."""

    name = ErrorName.BAD_MEMFD


_FROM_ERRNO: dict[int, tuple[type[AllocatorError], str]] = {
    errno.ENOMEM: (OutOfMemory, "The kernel has no memory for it"),
    errno.ENOSPC: (OutOfMemory, "The kernel has no memory for it"),
    errno.EMFILE: (
        OutOfMemory,
        "The service has no file descriptor left; close buffers or raise LimitNOFILE=",
    ),
    errno.ENFILE: (OutOfMemory, "The system has no file descriptor left; see fs.file-max"),
    # DMA_BUF_SET_NAME before Linux 5.19.
    errno.EBUSY: (Busy, "The buffer is attached to a device"),
    errno.EFBIG: (OutOfMemory, "The kernel cannot make a file of that size"),
}


def from_oserror(error: OSError, doing: str) -> AllocatorError:
    """Return the typed error for what the kernel answered while `doing` (a gerund phrase without names)."""
    kind, reason = _FROM_ERRNO.get(error.errno or 0, (NotSupported, "The kernel refused"))
    return kind(f"{reason} ({errno.errorcode.get(error.errno or 0, 'unknown error')} while {doing})")
