# SPDX-License-Identifier: MIT
"""The allocator `memfd`: sealed memfds for wl_shm and CPU sharing, for machines without udmabuf too.

Handed out as holes and never touched by the service: the kernel charges each page to the client that touches it
first.
"""

from __future__ import annotations

from contextlib import ExitStack

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import MAX_SIZE, Request
from udmabufd.linux import fdstat, memfd
from udmabufd.linux.addresses import highest_address_bits
from udmabufd_client.contract import MEMFD, Cache, CacheEvidence, Kind


class MemfdAllocator:
    """See the module; `max_size` bytes is what a user may hold in all."""

    name = MEMFD
    capabilities = Capabilities(kind=Kind.MEMFD, accounting=Accounting.CLIENT)
    unavailable: Refusal | None = None
    free: int | None = None

    def __init__(self, max_size: int) -> None:
        self.max_size = min(max_size, MAX_SIZE)

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """Return why it does not suit; sizes are the ledger's matter."""
        return refusals(self.name, capabilities or self.capabilities, request, highest_address_bits)

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make a memfd of request.size bytes, sealed SHRINK, GROW and SEAL, and leave its pages to the client:
        `populate` is not called. Raises OSError.
        """
        with ExitStack() as undo:
            fd = undo.enter_context(memfd.create(name, request.size))
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW | memfd.F_SEAL_SEAL)
            identity = fdstat.look(fd.fileno())
            undo.pop_all()
        return Memory(
            allocator=self.name,
            size=request.size,
            memfd=fd,
            dma_buf=None,
            device=identity.device,
            inode=identity.inode,
            cache=Cache.CACHED,
            evidence=CacheEvidence.DEFAULT,
            needs_sync=False,
            accounting=Accounting.CLIENT,
        )

    def close(self) -> None:
        """Do nothing: there is no device."""
