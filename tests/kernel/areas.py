# SPDX-License-Identifier: MIT
"""Mappings by address, as the kernel gives them: made, touched, moved, protected, and had by a child as well."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

PAGE: Final = mmap.PAGESIZE

READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
PROT_NONE: Final = 0
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_address, _size = ctypes.c_void_p, ctypes.c_size_t
_libc.mmap.restype = _address
_libc.mmap.argtypes = (_address, _size, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (_address, _size)
_libc.mprotect.argtypes = (_address, _size, ctypes.c_int)
_libc.madvise.argtypes = (_address, _size, ctypes.c_int)
_libc.mremap.restype = _address
_libc.mremap.argtypes = (_address, _size, _size, ctypes.c_int, _address)


@contextmanager
def area(
    fd: int, size: int, offset: int = 0, protection: int = READ_WRITE, flags: int = mmap.MAP_SHARED
) -> Iterator[int]:
    """Yield the address of a mapping of `size` bytes; it ends with the block wherever it was moved from."""
    address = _mapped(_libc.mmap(None, size, protection, flags, fd, offset))
    try:
        yield address
    finally:
        _libc.munmap(address, size)


@contextmanager
def anonymous(size: int) -> Iterator[int]:
    """Yield the address of private memory that no page is there of yet."""
    with area(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as address:
        yield address


@contextmanager
def moved(address: int, size: int) -> Iterator[int]:
    """Yield where a mapping went by mremap(); what was there before it ends with the block."""
    with area(-1, size, protection=PROT_NONE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as to:
        assert _mapped(_libc.mremap(address, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, to)) == to
        yield to


def protect(address: int, size: int, protection: int) -> None:
    """Change what is allowed."""
    _check(_libc.mprotect(address, size, protection))


def advise(address: int, size: int, advice: int) -> None:
    """Give advice (madvise)."""
    _check(_libc.madvise(address, size, advice))


def read(address: int, size: int) -> None:
    """Read a byte of each page, so that it is in the page table."""
    for page in range(address, address + size, PAGE):
        ctypes.string_at(page, 1)


def write(address: int, size: int) -> None:
    """Write a byte of each page, so that it is there and in the page table."""
    for page in range(address, address + size, PAGE):
        ctypes.c_ubyte.from_address(page).value = 1


@contextmanager
def child(address: int, size: int) -> Iterator[int]:
    """Yield the pid of a fork of this process that has read `size` bytes from `address` and waits."""
    ours, its = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            read(address, size)
            os.write(its, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(its)
        assert os.read(ours, 1) == b"x", "the child cannot read the mapping"
        yield pid
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _mapped(address: int | None) -> int:
    if address is None or address == _FAILED:
        raise _last_error()
    return address


def _check(result: int) -> None:
    if result != 0:
        raise _last_error()


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
