# SPDX-License-Identifier: MIT
"""The allocators `udmabuf-2M` and `udmabuf-1G`: memfds of huge pages, exported by /dev/udmabuf.

Each huge page is one physically contiguous, naturally aligned run. The pages are the administrator's, set aside by
vm.nr_hugepages; whether any is free shows when they are taken.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import ExitStack

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.errors import NoAllocator, OutOfMemory
from udmabufd.core.matching import decisive, refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import MAX_SIZE, Request
from udmabufd.core.udmabuf_allocator import UdmabufAllocator, describe
from udmabufd.core.udmabuf_device import Device, mapped_by
from udmabufd.linux import hugepages, memfd, udmabuf
from udmabufd.linux.addresses import highest_address_bits
from udmabufd_client.contract import Kind

log = logging.getLogger(__name__)


class HugetlbAllocator:
    """See the module. `huge_page` is bytes; `udmabuf` exports what it makes, and `pools` has the kernel's pools."""

    def __init__(
        self,
        name: str,
        huge_page: int,
        udmabuf: UdmabufAllocator,
        pools: str | os.PathLike[str] = hugepages.DIRECTORY,
    ) -> None:
        self.name = name
        self._capabilities = Capabilities(
            kind=Kind.DMA_BUF,
            granule=huge_page,
            size_step=huge_page,
            accounting=Accounting.POOL,
            sources={
                "granule": "the size of its huge pages",
                "accounting": "huge pages are set aside by vm.nr_hugepages, and charged to no memory.max",
                "free": hugepages.DIRECTORY,
            },
        )
        self._huge_page = huge_page
        self._udmabuf = udmabuf
        self._pools = pools
        self._not_exported_by: Device | None = None
        """The device that turned out not to export huge pages."""
        self._filling = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        """What its memory is like: huge pages, mapped as asked by a device that honours the flags."""
        return mapped_by(self._udmabuf.device, self._capabilities)

    @property
    def unavailable(self) -> Refusal | None:
        """Why it can serve nothing at present, with what to do, or None."""
        if (refusal := self._udmabuf.unavailable) is not None:
            return refusal
        if self._not_exported_by is not None and self._not_exported_by is self._udmabuf.device:
            return self._refusal("this kernel's udmabuf does not export huge pages", "it needs Linux 6.11")
        pool = self._pool()
        if pool is None:
            return self._refusal(f"the machine has no huge pages of {self._huge_page} bytes", "")
        if pool.capacity == 0:
            return self._refusal(f"no huge pages of {self._huge_page} bytes are set aside", self._remedy)
        return None

    @property
    def max_size(self) -> int:
        """Bytes, whole huge pages: what the pool has, used or not, or the driver's limit; 0 while unavailable."""
        if self.unavailable is not None:
            return 0
        largest = min(self._capacity(), self._udmabuf.max_size, MAX_SIZE)
        return largest // self._huge_page * self._huge_page

    @property
    def free(self) -> int | None:
        """Bytes left in the pool; None where there is no such pool."""
        pool = self._pool()
        return None if pool is None else pool.available

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """Return why it does not suit `request`, is not there, or why the driver or the whole pool could not serve."""
        unsuitable = refusals(self.name, capabilities or self.capabilities, request, highest_address_bits)
        if decided := decisive(unsuitable, self.unavailable):
            return decided
        size = self._real_size(request.size)
        return (*self._udmabuf.refusals(size, 1), *filter(None, (self._exceeds(size),)))

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make a sealed memfd of whole huge pages, all taken from the pool, which zeroes them, and export it:
        `populate` is not called. Raises OSError, KernelLimit, UdmabufUnavailable, CacheUnavailable, NoAllocator,
        OutOfMemory.
        """
        size = self._real_size(request.size)
        with ExitStack() as undo:
            fd = undo.enter_context(memfd.create(name, size, huge_page=self._huge_page))
            # One after the other: two that take what is left by turns would both go short.
            with self._filling:
                hugepages.fill(fd.fileno(), size)
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
            # If another comes right now, this one is blamed for it, and the other is asked once more.
            device = self._udmabuf.device
            try:
                exported = self._udmabuf.export_list([udmabuf.Item(fd.fileno(), 0, size)], request)
            except OSError as error:
                if error.errno != errno.EBADFD:
                    raise
                # Only now it shows. Another allocator may serve this call, and this one is not asked again.
                self._not_exported_by = device
                log.warning("%s: udmabuf does not export huge pages: %s", self.name, error)
                raise OutOfMemory(f"This kernel's udmabuf does not export huge pages of {self._huge_page}") from error
            undo.enter_context(exported.dma_buf)
            memory = describe(exported, self.name, fd, size, name, self._capabilities.accounting)
            undo.pop_all()
        return memory

    def close(self) -> None:
        """Do nothing: the device is the allocator udmabuf's."""

    @property
    def _remedy(self) -> str:
        if self._huge_page == 2 << 20:
            return "root can set some aside with sysctl vm.nr_hugepages=N"
        kib = self._huge_page >> 10
        return f"root can set some aside in /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages, best at boot"

    def _pool(self) -> hugepages.Pool | None:
        try:
            return hugepages.read_pool(self._huge_page, self._pools)
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.warning("%s: cannot read the pool of huge pages: %s", self.name, error)
            return None

    def _capacity(self) -> int:
        pool = self._pool()
        return 0 if pool is None else pool.capacity

    def _real_size(self, size: int) -> int:
        return -(-size // self._huge_page) * self._huge_page

    def _exceeds(self, size: int) -> Refusal | None:
        capacity = self._capacity()
        if size <= capacity:
            return None
        reason = f"{size} bytes exceed the pool of {capacity}, used and free"
        return Refusal("size", "", reason, self._remedy, OutOfMemory(f"size: {reason}; {self._remedy}"))

    def _refusal(self, reason: str, remedy: str) -> Refusal:
        told = f"{reason}; {remedy}" if remedy else reason
        return Refusal("", "", reason, remedy, NoAllocator(f"{self.name} cannot be used: {told}"))
