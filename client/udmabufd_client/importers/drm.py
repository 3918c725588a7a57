# SPDX-License-Identifier: MIT
"""DRM devices as importers: PRIME (include/uapi/drm/drm.h), and the verdict of one import.

Most drivers attach to the dma-buf and map it for their device here. Those with dynamic attachments (amdgpu, i915, xe)
map it when it is first used: that they took it does not say that they can.
"""

from __future__ import annotations

import ctypes
import fcntl
from contextlib import suppress
from typing import Final

from udmabufd_base.fd import OwnedFd
from udmabufd_client.importers.outcome import Outcome, Refused, Step

# Numbers as include/uapi/asm-generic/ioctl.h encodes them; alpha, mips, powerpc and sparc differ.
DRM_IOCTL_GEM_CLOSE: Final = 0x40086409
DRM_IOCTL_DROP_MASTER: Final = 0x0000641F
DRM_IOCTL_PRIME_FD_TO_HANDLE: Final = 0xC00C642E

_NAME_ROOM: Final = 64


class DrmVersion(ctypes.Structure):
    """struct drm_version."""

    _fields_ = (
        ("version_major", ctypes.c_int),
        ("version_minor", ctypes.c_int),
        ("version_patchlevel", ctypes.c_int),
        ("name_len", ctypes.c_size_t),
        ("name", ctypes.c_void_p),
        ("date_len", ctypes.c_size_t),
        ("date", ctypes.c_void_p),
        ("desc_len", ctypes.c_size_t),
        ("desc", ctypes.c_void_p),
    )


class DrmPrimeHandle(ctypes.Structure):
    """struct drm_prime_handle."""

    _fields_ = (("handle", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("fd", ctypes.c_int32))


class DrmGemClose(ctypes.Structure):
    """struct drm_gem_close."""

    _fields_ = (("handle", ctypes.c_uint32), ("pad", ctypes.c_uint32))


DRM_IOCTL_VERSION: Final = 0xC0006400 | ctypes.sizeof(DrmVersion) << 16


def take(device: OwnedFd, fd: int) -> Outcome:
    """Import the dma-buf `fd` into the DRM device, and let it go again. Raises Refused.

    Whoever opens a card node that nobody else has open becomes its master; that is given up first, so that a
    compositor that starts meanwhile finds the place free. Nothing is left: the handle is closed here, and whatever a
    failure left goes with the device's descriptor, which is the caller's to close.
    """
    with suppress(OSError):  # EINVAL: it is not, as nearly always; EACCES: a render node has none.
        fcntl.ioctl(device.fileno(), DRM_IOCTL_DROP_MASTER)
    how = f"PRIME import by {driver(device)}"
    handle = prime_fd_to_handle(device, fd, how)
    gem_close(device, handle)
    return Outcome(True, how)


def driver(device: OwnedFd) -> str:
    """Return the driver's name. Raises Refused for what does not speak DRM."""
    name = ctypes.create_string_buffer(_NAME_ROOM)
    version = DrmVersion(name_len=_NAME_ROOM - 1, name=ctypes.addressof(name))
    try:
        fcntl.ioctl(device.fileno(), DRM_IOCTL_VERSION, version)
    except OSError as error:
        raise Refused(Step.USE, error, "DRM_IOCTL_VERSION") from error
    return name.value.decode(errors="backslashreplace")


def prime_fd_to_handle(device: OwnedFd, fd: int, how: str) -> int:
    """Import the dma-buf `fd`; return its GEM handle, the caller's to close. Raises Refused.

    A device that imports the same dma-buf twice answers with the same handle, and has it once.
    """
    request = DrmPrimeHandle(fd=fd)
    try:
        fcntl.ioctl(device.fileno(), DRM_IOCTL_PRIME_FD_TO_HANDLE, request)
    except OSError as error:
        raise Refused(Step.IMPORT, error, how) from error
    return int(request.handle)


def gem_close(device: OwnedFd, handle: int) -> None:
    """Give back a GEM handle. Raises OSError: EINVAL for one that is not there."""
    fcntl.ioctl(device.fileno(), DRM_IOCTL_GEM_CLOSE, DrmGemClose(handle=handle))
