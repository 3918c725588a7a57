# SPDX-License-Identifier: MIT
"""/dev/udmabuf: memfds exported as dma-bufs, and the driver's limits (drivers/dma-buf/udmabuf.c).

The driver answers EINVAL for at least six causes; after one, the likely causes are looked up for the message. Checking
beforehand, populating the memfd (see memfd.populate) and sealing it (the driver wants F_SEAL_SHRINK and refuses
F_SEAL_WRITE; newer ones F_SEAL_FUTURE_WRITE too) is left to the caller.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from udmabufd.linux import memfd as memfds
from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

DEVICE: Final = "/dev/udmabuf"
PARAMETERS: Final = "/sys/module/udmabuf/parameters"

# include/uapi/linux/udmabuf.h: _IOW('u', 0x42, struct udmabuf_create), _IOW('u', 0x43, struct udmabuf_create_list),
# as include/uapi/asm-generic/ioctl.h encodes them; alpha, mips, powerpc and sparc differ.
UDMABUF_CREATE: Final = 0x40187542
UDMABUF_CREATE_LIST: Final = 0x40087543
UDMABUF_FLAGS_CLOEXEC: Final = 0x01

UDMABUF_FLAGS_CACHED: Final = 0x02
UDMABUF_FLAGS_UNCACHED: Final = 0x04
UDMABUF_FLAGS_WRITE_COMBINE: Final = 0x08
"""Cache attributes of mappings. No mainline kernel knows them: the header has CLOEXEC alone, up to Linux 7.2.

In the proposal of 2019-07-31 (patches 2 and 3 of 6, message ids 20190801022517.1903-3 and -4) the bits 0x02, 0x04 and
0x08 were called PROT_NONE, PROT_READ and PROT_WRITE. Review asked for names of cache attributes instead, since no
dma-buf is only readable, and CACHED, UNCACHED and WRITE_COMBINE were agreed on; no version with those names, and so no
numbers, were posted. These numbers are this project's. A device is sent them only after cacheprobe.py."""

_CREATE: Final = struct.Struct("=IIQQ")  # memfd, flags, offset, size
_LIST_HEAD: Final = struct.Struct("=II")  # flags, count
_LIST_ITEM: Final = struct.Struct("=IIQQ")  # memfd, padding, offset, size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int


class Item(NamedTuple):
    """A part of a buffer: `size` bytes from `offset` of the memfd `memfd`, both multiples of the page size."""

    memfd: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The driver's parameters as they stand: `list_limit` items in a list, `size_limit_mb` MiB in a buffer.

    Both are signed 32-bit ints that root may change at any time, unvalidated, effective at once.
    """

    list_limit: int
    size_limit_mb: int

    @property
    def max_size(self) -> int:
        """Bytes of the largest buffer, a multiple of the page size.

        Computed as fixed kernels do, `((u64)size_limit_mb * 1024 * 1024) >> PAGE_SHIFT`: a negative parameter means
        no limit, and the largest size of a file is given. Before 5.10.237, 5.15.181, 6.1.136, 6.6.89, 6.12.57,
        6.14.5 and 6.15 (CVE-2025-37803) the driver multiplies as int: from 2048 on it wraps, 4096 becomes 0,
        and creation may be refused below this figure.
        """
        product = (self.size_limit_mb % 2**64) * 2**20 % 2**64
        return min(product, 2**63 - 1) // mmap.PAGESIZE * mmap.PAGESIZE

    @property
    def max_items(self) -> int:
        """Most items in a list; the driver compares as unsigned int, so that a negative parameter is no limit."""
        return self.list_limit % 2**32


DEFAULT_LIMITS: Final = Limits(list_limit=1024, size_limit_mb=64)
"""Constants in the driver before Linux 5.15, and the parameters' initial values since."""


def open_device(path: str = DEVICE) -> OwnedFd:
    """Open the device, close-on-exec. Reading is enough for the ioctls, so that `DeviceAllow=char-misc r` is.

    Raises OSError: ENOENT without CONFIG_UDMABUF, EACCES by the node's mode, EPERM by a device policy.
    """
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def read_limits(directory: str | os.PathLike[str] = PARAMETERS) -> Limits:
    """Return the driver's limits as they are now.

    A parameter that does not exist has its default: that is so before Linux 5.15 (and without the driver, where
    nothing depends on it). Raises OSError: EACCES if it cannot be read, EINVAL if it is not an int.
    """
    return Limits(
        list_limit=_read_parameter(Path(directory, "list_limit"), DEFAULT_LIMITS.list_limit),
        size_limit_mb=_read_parameter(Path(directory, "size_limit_mb"), DEFAULT_LIMITS.size_limit_mb),
    )


def create(
    device: int,
    memfd: int,
    offset: int,
    size: int,
    flags: int = UDMABUF_FLAGS_CLOEXEC,
    parameters: str | os.PathLike[str] = PARAMETERS,
) -> OwnedFd:
    """Export `size` bytes from `offset` of `memfd`, both multiples of the page size, as a new dma-buf.

    The dma-buf is readable and writable whatever the mode of `memfd`. Mainline ignores flags that it does not know.
    Pins every page, and fills holes at the caller's cost; runs without the interpreter's lock: for a worker thread.

    Raises OSError: EINVAL for all that is wrong with the range, the seals or the limits (the hint names what was
    found, by the driver's `parameters`), EBADFD for a descriptor that is no memfd, ENOTTY if `device` is none, EMFILE,
    ENOMEM.
    """
    # A bytearray, because only for a mutable argument does fcntl.ioctl return the result: the descriptor.
    argument = bytearray(_CREATE.pack(memfd, flags, offset, size))
    try:
        return OwnedFd(fcntl.ioctl(device, UDMABUF_CREATE, argument))
    except OSError as error:
        raise _explain(error, "UDMABUF_CREATE", [Item(memfd, offset, size)], flags, parameters) from error


def create_list(
    device: int,
    items: Sequence[Item],
    flags: int = UDMABUF_FLAGS_CLOEXEC,
    parameters: str | os.PathLike[str] = PARAMETERS,
) -> OwnedFd:
    """Export `items`, one after the other, as one new dma-buf. The same page may be listed more than once.

    Otherwise as create(); EINVAL also for no items or more than Limits.max_items.
    """
    parts = [_LIST_ITEM.pack(item.memfd, 0, item.offset, item.size) for item in items]
    argument = ctypes.create_string_buffer(_LIST_HEAD.pack(flags, len(items)) + b"".join(parts))
    # Not fcntl.ioctl: before CPython 3.14 it keeps the interpreter's lock for more than 1024 bytes, 42 items.
    fd = _libc.ioctl(device, UDMABUF_CREATE_LIST, argument)
    if fd < 0:
        code = ctypes.get_errno()
        raise _explain(OSError(code, os.strerror(code)), "UDMABUF_CREATE_LIST", items, flags, parameters)
    return OwnedFd(fd)


def _read_parameter(path: Path, default: int) -> int:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return default
    if re.fullmatch(rb"-?[0-9]{1,10}\n?", text) and -(2**31) <= (value := int(text)) < 2**31:
        return value
    raise HintedOSError(errno.EINVAL, f"read {path}", f"expected an int, found {text[:32]!r}")


def _explain(
    error: OSError, call: str, items: Sequence[Item], flags: int, parameters: str | os.PathLike[str]
) -> OSError:
    if error.errno == errno.EINVAL:
        hint = _causes(call, items, parameters)
        if not hint:
            other = f", or it does not take the flags {flags:#x}" if flags != UDMABUF_FLAGS_CLOEXEC else ""
            hint = f"no cause found; the memfd or the limits changed meanwhile{other}"
    elif error.errno == errno.EBADFD:
        hint = "a descriptor that is no memfd, or one of huge pages, which some kernels before 6.11 cannot export"
    elif error.errno == errno.ENOTTY:
        hint = "the descriptor is not /dev/udmabuf"
    else:
        return error
    return HintedOSError(error.errno, call, hint)


def _causes(call: str, items: Sequence[Item], parameters: str | os.PathLike[str]) -> str:
    """Name what is wrong with `items` as far as it shows now, for a message after the kernel said EINVAL; "" for
    nothing.
    """
    causes: list[str] = []
    try:
        limits = read_limits(parameters)
        if call == "UDMABUF_CREATE_LIST" and not 0 < len(items) <= limits.max_items:
            causes.append(f"{len(items)} items with a list_limit of {limits.list_limit}")
        total = sum(item.size for item in items)
        if total > limits.max_size:
            causes.append(f"{total} bytes with a size_limit_mb of {limits.size_limit_mb}")
        elif limits.size_limit_mb >= 2048:
            causes.append(f"a size_limit_mb of {limits.size_limit_mb}, which unfixed kernels wrap (CVE-2025-37803)")
        for item in items:
            causes += _causes_of_item(item)
    except OSError as error:
        causes.append(f"(looking for the cause failed: {error})")
    return "; ".join(dict.fromkeys(causes))


def _causes_of_item(item: Item) -> list[str]:
    if item.size <= 0 or item.size % mmap.PAGESIZE or item.offset % mmap.PAGESIZE:
        return [f"offset {item.offset} or size {item.size} is not a positive multiple of {mmap.PAGESIZE}"]
    causes = []
    length = os.fstat(item.memfd).st_size
    if item.offset + item.size > length:
        causes.append(f"bytes {item.offset} to {item.offset + item.size} of a memfd of {length}")
    seals = memfds.get_seals(item.memfd)
    if not seals & memfds.F_SEAL_SHRINK:
        causes.append("F_SEAL_SHRINK is missing")
    if seals & (memfds.F_SEAL_WRITE | memfds.F_SEAL_FUTURE_WRITE):
        causes.append("F_SEAL_WRITE or F_SEAL_FUTURE_WRITE is set")
    return causes
