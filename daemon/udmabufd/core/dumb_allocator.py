# SPDX-License-Identifier: MIT
"""The allocators `dumb:<card>`: dumb buffers of DRM cards. Some drivers map them write-combined.

Only of cards that an administrator has named. To open a card is to become its master, if it has none, and would keep a
compositor from starting: that is given up at once.
"""

from __future__ import annotations

import contextlib
import errno
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.database import DumbFacts
from udmabufd.core.errors import NoAllocator
from udmabufd.core.matching import decisive, refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.node import NOTHING_KNOWN, Node, Unusable, describe, passing_shortage
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.linux import boot, drm
from udmabufd.linux.addresses import highest_address_bits
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import DUMB_PREFIX, Cache, CacheEvidence, Kind

_ROW: Final = 4096
"""Bytes from row to row: a multiple of whatever drivers round up to."""

_BYTES_PER_PIXEL: Final = 4
"""virtio_gpu takes no other."""

_MAX_SIZE: Final = ((1 << 32) - 1) // max(_ROW, PAGE_SIZE) * max(_ROW, PAGE_SIZE)
"""Bytes: drm_mode_create_dumb (drivers/gpu/drm/drm_dumb_buffers.c) computes the size with 32 bits."""


class DumbAllocator:
    """See the module. `path` is the card's node, `facts` what is known of its dumb buffers, None for nothing. The
    node is not opened before probe().
    """

    free: int | None = None

    def __init__(self, path: Path, facts: DumbFacts | None) -> None:
        self.name = f"{DUMB_PREFIX}{path.name}"
        self._path = path
        self._facts = facts
        self.capabilities = NOTHING_KNOWN
        """What its memory is like, as a probe has found out; nothing of one that is not used."""
        self._node = Node(self.name)

    @property
    def unavailable(self) -> Refusal | None:
        """Why it cannot be used, with what to do, or None."""
        return self._node.unavailable

    @property
    def max_size(self) -> int:
        """Bytes of the largest dumb buffer that DRM makes; 0 while unavailable."""
        return 0 if self.unavailable else _MAX_SIZE

    def probe(self) -> bool:
        """Open the card anew and make a small buffer; return whether it can be used. Blocks: for a worker thread."""
        return self._node.probe(self._open)

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """Return why it does not suit `request`, or is not there."""
        unsuitable = refusals(self.name, capabilities or self.capabilities, request, highest_address_bits)
        return decisive(unsuitable, self.unavailable) or tuple(filter(None, (self._exceeds(request.size),)))

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make a dumb buffer of request.size bytes, which the kernel zeroes: `populate` is not called. Its pages are
        there, and charged, when this returns. Raises OSError, NoAllocator.
        """
        if refusal := self._exceeds(request.size):
            raise refusal.error
        with self._node.lend() as card, ExitStack() as undo:
            dma_buf = undo.enter_context(_make(card.fileno(), request.size))
            hold = Hold(dma_buf.fileno(), request.size)
            undo.callback(hold.close)
            memory = describe(self.name, self.capabilities, dma_buf, request.size, name, hold=hold)
            undo.pop_all()
        return memory

    def close(self) -> None:
        """Close the card; what it has given stays as it is."""
        self._node.close()

    def _open(self) -> OwnedFd:
        if self._facts is not None:
            # Here, not when it is made: files are read for it.
            self.capabilities = dumb_capabilities(self._facts)
        with ExitStack() as undo:
            card = undo.enter_context(drm.open_card(str(self._path)))
            _resign(card.fileno())
            if self._facts is None:
                driver = drm.driver_name(card.fileno())
                raise Unusable(
                    f"what dumb buffers of the driver {driver} are like is not known",
                    f"if it is known to you, add an entry with dumb = … for {driver} to devices.d",
                )
            with passing_shortage(), _make(card.fileno(), PAGE_SIZE) as dma_buf:
                # Some drivers' can be exported, but not mapped.
                Hold(dma_buf.fileno(), PAGE_SIZE).close()
            undo.pop_all()
        return card

    def _exceeds(self, size: int) -> Refusal | None:
        if size <= _MAX_SIZE:
            return None
        reason = f"{size} bytes exceed DRM's limit for dumb buffers, {_MAX_SIZE}"
        return Refusal("size", "", reason, "", NoAllocator(f"size: {reason}"))


def dumb_capabilities(facts: DumbFacts) -> Capabilities:
    """Return what memory of which `facts` are known is like on this machine."""
    cache, source = facts.cache, facts.source
    if cache is Cache.WRITE_COMBINE and not boot.write_combining():
        cache, source = Cache.UNCACHED, f"{source}; this machine is not known to combine writes"
    # Contiguous ones come from the DMA API, which charges nobody; the others are pages of shmem.
    accounting = Accounting.SYSTEM if facts.contiguous else Accounting.SERVICE
    return Capabilities(
        kind=Kind.DMA_BUF,
        contiguous=facts.contiguous,
        cache=cache,
        evidence=CacheEvidence.DRIVER,
        accounting=accounting,
        sources={
            "cache": source,
            "contiguous": facts.source,
            "accounting": "where DRM's helpers allocate such memory",
        },
    )


def _resign(card: int) -> None:
    """Give up the right to set modes that opening `card` may have brought. Raises OSError, Unusable."""
    # Refused where there is nothing to give up, and before Linux 5.8 to all but root: what counts is the outcome.
    with contextlib.suppress(OSError):
        drm.drop_master(card)
    if drm.is_master(card):
        raise Unusable(
            "the kernel lets only root give up the right to set modes, and the service would keep it from compositors",
            "it needs Linux 5.8",
        )


def _make(card: int, size: int) -> OwnedFd:
    """Return a dumb buffer of `size` bytes as a dma-buf. Raises OSError."""
    dumb = drm.create_dumb(card, _ROW // _BYTES_PER_PIXEL, size // _ROW, 8 * _BYTES_PER_PIXEL)
    try:
        if dumb.size != size:
            raise OSError(errno.EPROTO, f"{size} bytes were asked for, and the driver made {dumb.size}")
        return drm.export(card, dumb.handle)
    finally:
        drm.destroy_dumb(card, dumb.handle)
