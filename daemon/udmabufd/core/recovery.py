# SPDX-License-Identifier: MIT
"""The buffers of a former run whose state cannot be read: kept as they are until an administrator decides.

What the state still tells is taken from it; a buffer that it does not tell of any more is known by its descriptors
alone. It belongs to nobody then, is charged to root, and waits for somebody who has a descriptor of it to import it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from udmabufd.core import restore
from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import InvalidSpec
from udmabufd.core.ledger import Owner
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import Request, check_name
from udmabufd.core.state import StateFile, Unreadable
from udmabufd.core.store import Store
from udmabufd.linux import dmabuf, fdstat, memfd
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_client.contract import (
    DUMB_PREFIX,
    HEAP_PREFIX,
    MEMFD,
    UDMABUF,
    WRAPPED,
    Cache,
    CacheEvidence,
    Kind,
    buffer_path,
)

log = logging.getLogger(__name__)

_NOBODY = Owner(0, "")

Maps = Callable[[str], tuple[Cache | None, CacheEvidence | None]]
"""Tells how all dma-bufs of an exporter are mapped, and how that is known; None where it is not."""


def nothing_known(_exporter: str) -> tuple[Cache | None, CacheEvidence | None]:
    """Know of no exporter."""
    return None, None


DRM_EXPORTER = "drm"
"""Exporter of the dma-bufs of all DRM drivers that use drm_prime.c."""


@dataclass(slots=True)
class Former:
    """What the former run left: its state, if there was one, its descriptors by name, and why it cannot be read; and
    what the present one knows of exporters.
    """

    state: OwnedFd | None
    inherited: restore.Inherited
    reason: str
    maps: Maps = nothing_known

    def salvage(self) -> tuple[StateFile, restore.Records] | None:
        """Return the state without what is damaged in it, and what it tells; None if it tells nothing."""
        if self.state is None:
            return None
        try:
            state = StateFile.open(self.state, salvage=True)
        except Unreadable:
            return None
        return state, restore.parse(state, salvage=True)

    def strangers(self) -> list[tuple[str, Buffer]]:
        """Return buffers for all descriptors that are left, with their names in the store; consumes them."""
        found = []
        for name, fds in self.inherited.items():
            buffer = _stranger(name, *restore.sort_descriptors(fds), self.maps)
            if buffer is not None:
                found.append((name, buffer))
        self.inherited.clear()
        return found

    def discard(self, store: Store) -> list[dict[str, Any]]:
        """Give all of it up; return a row for each buffer."""
        rows = []
        for name, buffer in self.strangers():
            rows.append(row(buffer, "discarded") | {"buffer": None, "name": None})
            assert buffer.memory is not None
            buffer.memory.close()
            store.drop(name)
        return rows

    def close(self) -> None:
        """Close all of it here; the store keeps it."""
        if self.state is not None:
            self.state.close()
        for fds in self.inherited.values():
            close_all(fds)


def row(buffer: Buffer, action: str) -> dict[str, Any]:
    """Return what is told of a buffer, with the keys of the contract."""
    return {
        "buffer": buffer_path(buffer.id),
        "size": buffer.size,
        "kind": buffer.request.kind.value,
        "name": buffer.name,
        "inode": None if buffer.memory is None else buffer.memory.inode,
        "action": action,
    }


def _stranger(name: str, memfds: list[OwnedFd], dma_bufs: list[OwnedFd], maps: Maps = nothing_known) -> Buffer | None:
    """Return the buffer that these descriptors, which are consumed, must have been of."""
    own = memfds.pop() if memfds else None
    exported = dma_bufs.pop() if dma_bufs else None
    close_all([*memfds, *dma_bufs])
    seen = exported or own
    if seen is None:
        return None
    identity = fdstat.look(seen.fileno())
    # Of what is handed out as a memfd nobody may change the seals; the witness of a dma-buf that is gone has no such.
    handed_out = exported is None and bool(memfd.get_seals(seen.fileno()) & memfd.F_SEAL_SEAL)
    allocator = MEMFD if handed_out else UDMABUF if own is not None else _allocator_of(seen)
    spec: dict[str, Any] = {"size": identity.size if exported is None else dmabuf.size(seen.fileno())}
    if handed_out:
        spec["kind"] = Kind.MEMFD
    request = Request.from_spec(spec)
    # What a dma-buf was asked to be is not known any more, but where all of them are alike.
    known = (Cache.CACHED, CacheEvidence.DEFAULT) if handed_out else (None, None)
    cache, evidence = known if exported is None else maps(_exporter_of(exported))
    return Buffer(
        request=request.wrapping() if allocator == WRAPPED else request,
        payer=_NOBODY,
        name="" if exported is None else _name_of(exported),
        serial=1,
        memory=Memory(
            allocator=allocator,
            size=request.size,
            memfd=own,
            dma_buf=exported,
            device=identity.device,
            inode=identity.inode,
            cache=cache,
            evidence=evidence,
            needs_sync=not handed_out,
            stored=True,
            accounting=_accounting(allocator),
            hold=_hold(allocator, exported),
        ),
        ended=not handed_out,
        kept=handed_out,
        stored_as=name,
    )


def _allocator_of(dma_buf: OwnedFd) -> str:
    """Return the allocator that must have given a dma-buf without a memfd of ours, as its exporter tells."""
    exporter = _exporter_of(dma_buf)
    if exporter == DRM_EXPORTER:
        return DUMB_PREFIX + "unknown"
    return WRAPPED if not exporter or exporter.startswith(UDMABUF) else HEAP_PREFIX + exporter


def _exporter_of(dma_buf: OwnedFd) -> str:
    """Return what the kernel calls the exporter of `dma_buf`, "" if that cannot be read."""
    try:
        return dmabuf.fdinfo(dma_buf.fileno()).exporter
    except (OSError, ValueError):
        return ""


def _hold(allocator: str, dma_buf: OwnedFd | None) -> Hold | None:
    """Return what keeps the pages of a dumb buffer; see linux/hold.py."""
    if dma_buf is None or not allocator.startswith(DUMB_PREFIX):
        return None
    try:
        return Hold(dma_buf.fileno(), dmabuf.size(dma_buf.fileno()))
    except OSError as error:
        log.error("The pages of a dumb buffer cannot be kept from being dropped: %s", error)
        return None


def _accounting(allocator: str) -> Accounting:
    if allocator in (MEMFD, WRAPPED):
        return Accounting.CLIENT
    return Accounting.SYSTEM if allocator.startswith(HEAP_PREFIX) else Accounting.SERVICE


def _name_of(dma_buf: OwnedFd) -> str:
    """Return the name that the kernel shows for it, "" if it is none that a buffer can have."""
    try:
        return check_name("name", dmabuf.fdinfo(dma_buf.fileno()).name)
    except (OSError, InvalidSpec):
        return ""
