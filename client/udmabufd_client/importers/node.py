# SPDX-License-Identifier: MIT
"""A device node, opened as the caller: looked at before it is opened, so that nothing but an importer's kind ever is.

Opening a pipe would wait, opening a tape would wind it: only nodes of DRM and V4L2 are opened. What they are asked
then is left to drm.py and v4l2.py.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from udmabufd_base.fd import OwnedFd

DRM: Final = "drm"
V4L2: Final = "video4linux"

SUBSYSTEMS: Final = (DRM, V4L2)
"""The kernel's names of the subsystems whose devices import dma-bufs, as /sys/dev/char leads to them."""

_SYS: Final = Path("/sys/dev/char")


class NotAnImporter(Exception):
    """The path leads to nothing that imports dma-bufs; the text is a sentence that says what it is instead."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that was looked at, and not opened yet: `fd` is an O_PATH descriptor of it, and its owner's to close."""

    path: str
    fd: OwnedFd
    subsystem: str

    def open(self) -> OwnedFd:
        """Open the device, for reading and writing, close-on-exec and without waiting.

        By the descriptor, so that it is what was looked at. Raises OSError: EACCES by the node's mode, EPERM by a
        device policy, ENODEV or ENXIO when the device is gone, EBUSY for one that only one program can open.
        """
        path = f"/proc/self/fd/{self.fd.fileno()}"
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))


def look_at(path: str) -> Node:
    """Find out what kind of device `path` leads to, without opening it.

    Raises NotAnImporter for what is no node of DRM or V4L2; OSError when the path cannot be followed.
    """
    try:
        fd = OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC))
    except ValueError as error:  # a NUL in it
        raise NotAnImporter(f"{path!r} is no path ({error}).") from error
    try:
        return Node(path, fd, _subsystem(path, os.fstat(fd.fileno())))
    except BaseException:
        fd.close()
        raise


def _subsystem(path: str, found: os.stat_result) -> str:
    if not stat.S_ISCHR(found.st_mode):
        raise NotAnImporter(
            f"{path} is {_kind(found.st_mode)}, no device node: name one such as /dev/dri/renderD128 or /dev/video0; "
            "'udmabufctl devices' lists those that there are."
        )
    numbers = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    try:
        name = (_SYS / numbers / "subsystem").resolve(strict=True).name
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "")
        raise NotAnImporter(
            f"{path} is a node for device {numbers}, which the kernel does not have now ({code}): it was unplugged, "
            "or its driver is not loaded."
        ) from error
    if name not in SUBSYSTEMS:
        raise NotAnImporter(
            f"{path} belongs to the subsystem {name}: only DRM devices (/dev/dri/*) and V4L2 devices (/dev/video*) "
            "can be asked whether they take a buffer."
        )
    return name


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
