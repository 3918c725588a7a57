# SPDX-License-Identifier: MIT
"""A device node that dma-bufs come from, opened once: whether it can be used, and what came of it, as Memory.

How it is opened and asked is the allocator's matter.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Final

from udmabufd.core.allocator import Capabilities, Refusal
from udmabufd.core.errors import NoAllocator
from udmabufd.core.memory import Memory
from udmabufd.linux import dmabuf, fdstat
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import Kind

log = logging.getLogger(__name__)

_HINTS = {
    errno.ENOENT: ("the node is not there", "check the device"),
    errno.EACCES: ("the service may not open it", "check the node's group and the unit's SupplementaryGroups="),
    errno.EPERM: ("the unit's device policy forbids it", "check DeviceAllow="),
    errno.ENODEV: ("the device has gone", ""),
}


NOTHING_KNOWN: Final = Capabilities(kind=Kind.DMA_BUF, cache=None, evidence=None)
"""Of an allocator that was not probed, or is not used for want of knowledge of it."""


class Unusable(Exception):
    """A device cannot be used, and what would help ("" if nothing would)."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


class Node:
    """The node of the allocator `allocator`; unusable until it was probed. For any thread."""

    def __init__(self, allocator: str) -> None:
        self._allocator = allocator
        self._device: OwnedFd | None = None
        self._reason, self._remedy = "it was not probed yet", "ask again in a moment"
        # A probe may replace the device while a worker thread makes a buffer with it.
        self._lock = threading.Lock()

    @property
    def unavailable(self) -> Refusal | None:
        """Why it cannot be used, or None."""
        if self._device is not None:
            return None
        reason, remedy = self._reason, self._remedy
        told = f"{reason}; {remedy}" if remedy else reason
        return Refusal("", "", reason, remedy, NoAllocator(f"{self._allocator} cannot be used: {told}"))

    def probe(self, opened: Callable[[], OwnedFd]) -> bool:
        """Take what `opened` returns, or remember why it raised OSError or Unusable; return whether it can be used."""
        device, reason, remedy = None, "", ""
        try:
            device = opened()
        except Unusable as error:
            reason, remedy = str(error), error.remedy
        except OSError as error:
            reason, remedy = _HINTS.get(error.errno or 0, (error.strerror or "it cannot be opened", ""))
        self._replace(device, reason, remedy)
        if device is None:
            log.debug("%s cannot be used: %s", self._allocator, reason)
        return device is not None

    def lend(self) -> OwnedFd:
        """Return a duplicate of the device, the caller's. Raises NoAllocator, OSError (EMFILE)."""
        with self._lock:
            if (gone := self.unavailable) is not None:
                raise gone.error
            assert self._device is not None
            return self._device.dup()

    def close(self) -> None:
        """Close the device."""
        self._replace(None, "it was closed", "")

    def _replace(self, device: OwnedFd | None, reason: str, remedy: str) -> None:
        with self._lock:
            before, self._device, self._reason, self._remedy = self._device, device, reason, remedy
            if before is not None:
                before.close()


@contextlib.contextmanager
def passing_shortage() -> Iterator[None]:
    """Go on where a device has no memory for a trial: that says nothing against it, and passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.ENOSPC):
            raise


def describe(
    allocator: str,
    capabilities: Capabilities,
    dma_buf: OwnedFd,
    size: int,
    name: str,
    exporter: str | None = None,
    hold: Hold | None = None,
) -> Memory:
    """Check that `dma_buf` is of `size` bytes and by `exporter`, if that is told; name it, and return it as Memory.
    Raises OSError; `dma_buf` and `hold` are the caller's then.
    """
    info = dmabuf.fdinfo(dma_buf.fileno())
    if (info.size, info.exporter) != (size, exporter or info.exporter):
        raise OSError(errno.EPROTO, f"{size} bytes by {exporter} were asked for, {info.size} by {info.exporter} made")
    dmabuf.set_name(dma_buf.fileno(), name)
    identity = fdstat.look(dma_buf.fileno())
    return Memory(
        allocator=allocator,
        size=size,
        memfd=None,
        dma_buf=dma_buf,
        device=identity.device,
        inode=identity.inode,
        cache=capabilities.cache,
        evidence=capabilities.evidence,
        # What the importers' caches do is not known here.
        needs_sync=True,
        accounting=capabilities.accounting,
        hold=hold,
    )
