# SPDX-License-Identifier: MIT
"""A dma-buf's own interface: size, inode, name, reference count, sync (drivers/dma-buf/dma-buf.c).

Mapping it, and what a reference count means for its owner, is left to others.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from udmabufd.linux.errors import HintedOSError
from udmabufd_base.dmabuf_sync import (
    DMA_BUF_IOCTL_SYNC,
    DMA_BUF_SYNC_END,
    DMA_BUF_SYNC_READ,
    DMA_BUF_SYNC_START,
    DMA_BUF_SYNC_WRITE,
    sync_end,
    sync_start,
)

__all__ = [
    "DMA_BUF_IOCTL_SYNC",
    "DMA_BUF_NAME_LEN",
    "DMA_BUF_SET_NAME_A",
    "DMA_BUF_SET_NAME_B",
    "DMA_BUF_SYNC_END",
    "DMA_BUF_SYNC_READ",
    "DMA_BUF_SYNC_START",
    "DMA_BUF_SYNC_WRITE",
    "Fdinfo",
    "fdinfo",
    "inode",
    "parse_fdinfo",
    "set_name",
    "size",
    "sync_end",
    "sync_start",
]

DMA_BUF_NAME_LEN: Final = 32
"""Bytes of a name with its terminating NUL."""

# include/uapi/linux/dma-buf.h: _IOW('b', 1, __u32) and _IOW('b', 1, __u64), for the size of a pointer was once in it.
DMA_BUF_SET_NAME_A: Final = 0x40046201
DMA_BUF_SET_NAME_B: Final = 0x40086201


@dataclass(frozen=True, slots=True)
class Fdinfo:
    """What /proc/self/fdinfo tells of a dma-buf.

    `count` is the number of references to the open file: descriptors here and in other processes, mappings,
    descriptors on their way in a socket, importers. O_PATH descriptors are not among them. `size` is in bytes;
    `exporter` is `udmabuf` or a heap's name; `ino` its unique st_ino. `name` is "" if there is none; whoever holds
    the dma-buf can set it, to any bytes (newlines too; what is not UTF-8 comes as \\xNN): escape before logging.
    """

    count: int
    size: int
    exporter: str
    name: str
    ino: int


def size(fd: int) -> int:
    """Return the bytes of the dma-buf `fd`. Raises OSError."""
    return os.lseek(fd, 0, os.SEEK_END)


def inode(fd: int) -> int:
    """Return the number that identifies the dma-buf until the next boot: st_ino, a counter since Linux 5.13."""
    return os.fstat(fd).st_ino


def set_name(fd: int, name: str) -> None:
    """Name the dma-buf `fd` in /sys/kernel/debug/dma_buf/bufinfo and fdinfo: at most 31 bytes of UTF-8; "" clears.

    Raises OSError: EINVAL for a longer name or one with a NUL, ENOTTY if `fd` is no dma-buf or the kernel is older
    than 5.3, EBUSY while a device is attached before Linux 5.19.
    """
    encoded = name.encode()
    if len(encoded) >= DMA_BUF_NAME_LEN or 0 in encoded:
        hint = f"{name!r} is longer than {DMA_BUF_NAME_LEN - 1} bytes, or has a NUL in it"
        raise HintedOSError(errno.EINVAL, "DMA_BUF_SET_NAME", hint)
    try:
        _set_name(fd, encoded)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            hint = "the descriptor is no dma-buf, or the kernel is older than 5.3"
        elif error.errno == errno.EBUSY:
            hint = "a device is attached; Linux before 5.19 names dma-bufs only when none is"
        else:
            raise
        raise HintedOSError(error.errno, "DMA_BUF_SET_NAME", hint) from error


def fdinfo(fd: int) -> Fdinfo:
    """Return what the kernel tells of the dma-buf `fd` of this process.

    Two threads that read it for one dma-buf at a time may see each other in `count`. Raises OSError: EINVAL if `fd`
    is no dma-buf, ENOENT if it is closed, EACCES for an undumpable process that is not root up to Linux 5.10.
    """
    return parse_fdinfo(Path(f"/proc/self/fdinfo/{fd}").read_bytes(), inode(fd))


def parse_fdinfo(text: bytes, ino: int = 0) -> Fdinfo:
    """Parse the contents of an fdinfo file of a dma-buf; `ino` is taken if it does not say (before Linux 5.14).

    Only the lines up to the first `exp_name:` count: dma_buf_show_fdinfo prints the name after it, unescaped, and a
    name may forge lines. Raises HintedOSError: EINVAL if these lines are not a dma-buf's.
    """
    match = re.search(rb"^exp_name:\t(.*)\n", text, re.MULTILINE)
    if match is None:
        raise HintedOSError(errno.EINVAL, "fdinfo", "the descriptor is no dma-buf")
    fields: dict[bytes, bytes] = {}
    for line in text[: match.start()].splitlines():
        key, _, value = line.partition(b":\t")
        fields.setdefault(key, value)
    rest = text[match.end() :]
    name = rest.removeprefix(b"name:\t").removesuffix(b"\n") if rest.startswith(b"name:\t") else b""
    try:
        return Fdinfo(
            count=int(fields[b"count"]),
            size=int(fields[b"size"]),
            exporter=match[1].decode("utf-8", "backslashreplace"),
            name=name.decode("utf-8", "backslashreplace"),
            ino=int(fields.get(b"ino", ino)),
        )
    except (KeyError, ValueError) as error:
        raise HintedOSError(errno.EINVAL, "fdinfo", f"no size or count of a dma-buf in {text[:256]!r}") from error


def _set_name(fd: int, name: bytes) -> None:
    # fcntl.ioctl adds the terminating NUL to a bytes argument (Modules/fcntlmodule.c).
    try:
        fcntl.ioctl(fd, DMA_BUF_SET_NAME_B, name)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        fcntl.ioctl(fd, DMA_BUF_SET_NAME_A, name)
