# SPDX-License-Identifier: MIT
"""DRM cards: the driver's name, dumb buffers, their export as dma-bufs, and the right to set modes.

Whoever opens a card that has no master becomes its master, and keeps others from setting modes (drm_master_open,
drivers/gpu/drm/drm_auth.c): a program that only wants memory drops that right at once. What the memory of a driver's
dumb buffers is like is left to the caller.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final, NamedTuple

from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

# include/uapi/drm/drm.h, drm_mode.h: DRM_IO, DRM_IOW and DRM_IOWR of the type 'd'.
DRM_IOCTL_AUTH_MAGIC: Final = 0x40046411
DRM_IOCTL_SET_MASTER: Final = 0x641E
DRM_IOCTL_DROP_MASTER: Final = 0x641F
DRM_IOCTL_PRIME_HANDLE_TO_FD: Final = 0xC00C642D
DRM_IOCTL_MODE_CREATE_DUMB: Final = 0xC02064B2
DRM_IOCTL_MODE_DESTROY_DUMB: Final = 0xC00464B4

_VERSION: Final = struct.Struct("@iiiNPNPNP")  # major, minor, patch; length and address of name, date, description
DRM_IOCTL_VERSION: Final = 0xC0006400 | _VERSION.size << 16

_DUMB: Final = struct.Struct("=IIIIIIQ")  # height, width, bits per pixel, flags, handle, pitch, size
_HANDLE: Final = struct.Struct("=I")
_PRIME: Final = struct.Struct("=IIi")  # handle, flags, descriptor

_NAME_MAX: Final = 64


class Dumb(NamedTuple):
    """A dumb buffer: its handle in the open card that made it, bytes from row to row, bytes in all."""

    handle: int
    pitch: int
    size: int


def open_card(path: str) -> OwnedFd:
    """Open a card, close-on-exec; see the module for what else that does.

    Raises OSError: ENOENT, EACCES by the node's mode, EPERM by a device policy, EBUSY or ENODEV by the driver.
    """
    return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def is_master(card: int) -> bool:
    """Return whether the open `card` is its device's master. Raises OSError."""
    # Only a master may authenticate others; 0 is nobody's magic.
    try:
        _ioctl(card, DRM_IOCTL_AUTH_MAGIC, bytearray(_HANDLE.pack(0)))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL):
            raise
        return error.errno == errno.EINVAL
    return True


def set_master(card: int) -> None:
    """Make the open `card` its device's master. Raises OSError: EBUSY while another is, EACCES if it never was and has
    no CAP_SYS_ADMIN.
    """
    _ioctl(card, DRM_IOCTL_SET_MASTER)


def drop_master(card: int) -> None:
    """Make the open `card` its device's master no longer.

    Raises OSError: EINVAL if it is not, or EACCES if it never was and has no CAP_SYS_ADMIN; before Linux 5.8 EACCES
    without CAP_SYS_ADMIN, whatever it is.
    """
    _ioctl(card, DRM_IOCTL_DROP_MASTER)


def driver_name(card: int) -> str:
    """Return the name of the open card's driver, such as `vgem`. Raises OSError."""
    name = ctypes.create_string_buffer(_NAME_MAX)
    argument = bytearray(_VERSION.pack(0, 0, 0, _NAME_MAX - 1, ctypes.addressof(name), 0, 0, 0, 0))
    _ioctl(card, DRM_IOCTL_VERSION, argument)
    return name.value.decode("ascii", "backslashreplace")


def create_dumb(card: int, width: int, height: int, bits_per_pixel: int = 32) -> Dumb:
    """Make a dumb buffer of `width` times `height` pixels. Its memory may be allocated later.

    The driver may lengthen the rows and the buffer. Raises OSError: ENOTSUP if the driver has no dumb buffers, EINVAL
    for a size that it does not make, 4 GiB and more among them, ENOMEM, ENOSPC.
    """
    argument = bytearray(_DUMB.pack(height, width, bits_per_pixel, 0, 0, 0, 0))
    try:
        _ioctl(card, DRM_IOCTL_MODE_CREATE_DUMB, argument)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            hint = "the card's driver has no dumb buffers"
            raise HintedOSError(errno.ENOTSUP, "DRM_IOCTL_MODE_CREATE_DUMB", hint) from error
        raise
    *_, handle, pitch, size = _DUMB.unpack(argument)
    return Dumb(handle, pitch, size)


def destroy_dumb(card: int, handle: int) -> None:
    """Give up the handle of a dumb buffer; a dma-buf of it keeps the memory. Raises OSError: EINVAL for no handle."""
    _ioctl(card, DRM_IOCTL_MODE_DESTROY_DUMB, bytearray(_HANDLE.pack(handle)))


def export(card: int, handle: int) -> OwnedFd:
    """Return a dma-buf of the buffer `handle`, readable, writable and close-on-exec.

    Raises OSError: ENOSYS if the driver exports none, ENOENT for no handle, EMFILE, ENOMEM.
    """
    argument = bytearray(_PRIME.pack(handle, os.O_RDWR | os.O_CLOEXEC, -1))
    _ioctl(card, DRM_IOCTL_PRIME_HANDLE_TO_FD, argument)
    return OwnedFd(_PRIME.unpack(argument)[2])


def _ioctl(card: int, request: int, argument: bytearray | int = 0) -> None:
    # A driver may be interrupted by a signal that is none of its business, and is asked again (drmIoctl, libdrm).
    while True:
        try:
            fcntl.ioctl(card, request, argument)
        except InterruptedError:
            continue
        return
