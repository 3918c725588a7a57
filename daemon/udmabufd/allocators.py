# SPDX-License-Identifier: MIT
"""Which allocators there are: the one place where they are made, from the configuration and from the devices that come
and go.

A new allocator is a file in core and a line here. Their order is the configuration's, the choice the pool's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from weakref import WeakValueDictionary

from udmabufd.config import Config
from udmabufd.core.database import Database
from udmabufd.core.device import Devices
from udmabufd.core.dumb_allocator import DumbAllocator
from udmabufd.core.errors import AllocatorError
from udmabufd.core.events import Event, emit
from udmabufd.core.heap_allocator import HeapAllocator
from udmabufd.core.hugetlb_allocator import HugetlbAllocator
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.pool import Pool
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.system.devices import DeviceEvent
from udmabufd_client.contract import DUMB_PREFIX, HEAP_PREFIX, UDMABUF_1G, UDMABUF_2M

log = logging.getLogger(__name__)


class Allocators:
    """Fills `pool`, and keeps it in step with the devices."""

    def __init__(
        self,
        config: Config,
        udmabuf: UdmabufAllocator,
        submit: Callable[[Callable[[], bool]], Awaitable[bool]],
        database: Database,
    ) -> None:
        """`submit` runs what blocks in a worker thread."""
        self._config = config
        self._submit = submit
        self._database = database
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.pool = Pool(
            config.allocators.order,
            [
                udmabuf,
                HugetlbAllocator(UDMABUF_2M, 2 << 20, udmabuf),
                HugetlbAllocator(UDMABUF_1G, 1 << 30, udmabuf),
                MemfdAllocator(config.limits.max_bytes_per_user),
            ],
        )

    def concerns(self, event: DeviceEvent) -> bool:
        """Whether an allocator is of this device, or would be: a heap, or a card that is configured."""
        return event.subsystem == "dma_heap" or (event.subsystem == "drm" and event.sysname in self._config.drm.cards)

    async def follow(self, action: str, event: DeviceEvent, devices: Devices, *, tell: bool = True) -> None:
        """Take notice that a device that concerns an allocator has come, changed or gone; `tell` the journal of what
        it brings.
        """
        name = (HEAP_PREFIX if event.subsystem == "dma_heap" else DUMB_PREFIX) + event.sysname
        async with self._turns.setdefault(name, asyncio.Lock()):
            if action == "remove":
                if self.pool.remove(name):
                    emit(log, Event.ALLOCATOR_GONE, allocator=name, reason="its device is gone")
                return
            found = self.pool.find(name)
            if found is None or found.unavailable is not None:
                await self._add(name, event, devices, tell=tell)

    async def _add(self, name: str, event: DeviceEvent, devices: Devices, *, tell: bool) -> None:
        assert event.node is not None
        allocator: HeapAllocator | DumbAllocator
        if event.subsystem == "dma_heap":
            allocator = HeapAllocator(Path(event.node), self._config.heaps)
        else:
            try:
                device = await devices.find(event.path)
            except AllocatorError as error:
                log.warning("%s cannot be looked at: %s", name, error)
                return
            allocator = DumbAllocator(Path(event.node), self._database.dumb_of(device))
        await self._submit(allocator.probe)
        if not self.pool.add(allocator):
            return
        if allocator.unavailable is not None:
            emit(log, Event.ALLOCATOR_GONE, allocator=name, reason=allocator.unavailable.reason)
        elif tell:
            emit(log, Event.ALLOCATOR_ADDED, allocator=name)
