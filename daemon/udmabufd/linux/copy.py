# SPDX-License-Identifier: MIT
"""Copies the contents of one buffer's memory to another's: dma-bufs and memfds, by the CPU, through mappings.

Who may use either of them meanwhile, and what a copy that was cut short means, is left to the caller.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from udmabufd.linux.dmabuf import DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE, sync_end, sync_start
from udmabufd.linux.errors import HintedOSError

PIECE: Final = 8 << 20
"""Bytes between two questions whether to go on: some milliseconds of cached memory, 0.1 s of uncached."""

_FAILED: Final = ctypes.c_void_p(-1).value

# mmap.mmap would keep a duplicate of the descriptor, which counts as one more reference to the dma-buf.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def copy(
    source: int,
    target: int,
    size: int,
    *,
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
    piece: int = PIECE,
    patience: float | None = None,
) -> bool:
    """Copy the first `size` bytes of `source` to `target`, each a dma-buf or a memfd; return whether all were copied.

    Both are borrowed. Devices that write to `source` still have `patience` seconds to end that, None for as long as it
    takes: their fences are awaited before the copy. Before each `piece` bytes `cancelled` is asked, and if it says so
    the answer is False: what `target` holds then is a beginning. After each piece `progress` is told how many bytes
    are done. Each piece is within DMA_BUF_IOCTL_SYNC, to read the source and to write the target. On machines whose
    devices do not see the CPU's caches each bracket costs as much as the whole buffer, however small the piece.

    For a worker thread, in which it calls both functions; it copies without the interpreter's lock. Meanwhile there is
    a mapping of each, which is one reference to a dma-buf; afterwards, however it ends, none.

    A page that is not there when it is touched is SIGBUS, which ends the process. Memory of the service's own has all
    of its pages: it was populated, dma-bufs of it pin them, and F_SEAL_SHRINK forbids that a memfd loses any. A memfd
    of somebody else's must have that seal. One with F_SEAL_WRITE can be mapped since Linux 6.7, to read.

    Raises OSError: EINVAL if either is shorter than `size` or `size` is 0, EACCES if a mode does not allow it, ENODEV
    or ENOTSUP for what cannot be mapped, ENOMEM, EPERM if `target` is sealed, TimeoutError when devices do not end;
    and what `cancelled` and `progress` raise.
    """
    if busy(source, patience):
        raise TimeoutError(errno.ETIMEDOUT, "devices write to the buffer still")
    with _mapped(source, size, mmap.PROT_READ) as read_from, _mapped(target, size, mmap.PROT_WRITE) as write_to:
        for offset in range(0, size, piece):
            if cancelled():
                return False
            length = min(piece, size - offset)
            with _bracket(source, DMA_BUF_SYNC_READ), _bracket(target, DMA_BUF_SYNC_WRITE):
                # As every function of CFUNCTYPE's, it runs without the interpreter's lock (Lib/ctypes/__init__.py).
                ctypes.memmove(write_to + offset, read_from + offset, length)
            progress(offset + length)
    return True


def busy(fd: int, patience: float | None = 0.0) -> bool:
    """Whether devices write to the dma-buf or memfd `fd`, also after `patience` seconds; None for as long as they do.

    While they do, a selector waits for the end of that as for something to be read.
    """
    poller = select.poll()
    # A dma-buf is readable when nothing writes to it any more (dma_buf_poll in drivers/dma-buf/dma-buf.c), a memfd is.
    poller.register(fd, select.POLLIN)
    return not poller.poll(None if patience is None else patience * 1000)


@contextmanager
def _mapped(fd: int, size: int, protection: int) -> Iterator[int]:
    """The address of a mapping of the first `size` bytes. Raises OSError."""
    # The kernel checks it for dma-bufs alone; a memfd would be mapped beyond its end.
    if (present := os.fstat(fd).st_size) < size:
        raise HintedOSError(errno.EINVAL, "mmap", f"the file has {present} bytes, and {size} are to be copied")
    address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
    if address in (None, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        yield address
    finally:
        _libc.munmap(address, size)


@contextmanager
def _bracket(fd: int, flags: int) -> Iterator[None]:
    """Bracket CPU access if `fd` is a dma-buf; a memfd needs none. Raises OSError."""
    try:
        sync_start(fd, flags)
        is_dma_buf = True
    except OSError as error:
        # Each dma-buf knows it since Linux 4.6.
        if error.errno != errno.ENOTTY:
            raise
        is_dma_buf = False
    try:
        yield
    finally:
        if is_dma_buf:
            sync_end(fd, flags)
