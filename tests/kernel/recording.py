# SPDX-License-Identifier: MIT
"""A program: the service, which also writes down what it asks a udmabuf device for, one line for each call.

Started as `python -m udmabufd` is, by tests.bus.service.own_service(); the lines go to the file that UDMABUFD_RECORD
names: the ioctl's number and the flags in its argument, as the kernel is about to read them. Nothing else is changed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
from typing import Any, Final

CREATE: Final = 0x40187542  # include/uapi/linux/udmabuf.h
CREATE_LIST: Final = 0x40087543
_FLAGS_AT: Final = {CREATE: 4, CREATE_LIST: 0}

_ioctl = fcntl.ioctl


def ioctl(fd: int, request: int, argument: Any = 0, *rest: Any) -> Any:
    """Note it, and do it."""
    note(request, argument)
    return _ioctl(fd, request, argument, *rest)


def note(request: int, argument: Any) -> None:
    """Write down a call of udmabuf."""
    if request in _FLAGS_AT:
        (flags,) = struct.unpack_from("=I", argument, _FLAGS_AT[request])
        # Opened here: tests import this module for its numbers, and have no such file.
        with open(os.environ["UDMABUFD_RECORD"], "ab", buffering=0) as file:
            file.write(f"{request:#x} {flags:#x}\n".encode())


class Library:
    """The C library, whose ioctl() is noted, too."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def ioctl(self, device: int, request: int, argument: Any) -> int:
        """Note it, and do it."""
        note(request, argument)
        result: int = self._library.ioctl(device, request, argument)
        return result


def main() -> int:
    """Listen, and run the service."""
    from udmabufd.linux import udmabuf

    fcntl.ioctl = ioctl  # type: ignore[assignment]
    udmabuf._libc = Library(udmabuf._libc)  # type: ignore[assignment]
    from udmabufd.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
