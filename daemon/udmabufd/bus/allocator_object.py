# SPDX-License-Identifier: MIT
"""org.udmabufd.Allocator1: its members, each one call of the service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from udmabufd.bus.info import allocator_row, device_row, entry, info, verdict
from udmabufd.bus.objects import Call, Exported, Reply
from udmabufd.bus.values import unwrap
from udmabufd.core.buffer import Buffer
from udmabufd.core.service import Service
from udmabufd_base.codec import Variant
from udmabufd_client.contract import (
    ALLOCATOR_INTERFACE,
    MAX_FDS_PER_MESSAGE,
    SPEC_TYPES,
    VERSION,
    WRAP_TYPES,
    buffer_path,
)


class AllocatorObject:
    """Handlers of the methods; properties are read off the service."""

    def __init__(self, service: Service, room: Callable[[], Awaitable[None]]) -> None:
        """`room` waits until the bus takes more."""
        self._service = service
        self._room = room
        self._listing = asyncio.Lock()
        limits, pool = service.limits, service.placement.pool
        self.exported = Exported(
            ALLOCATOR_INTERFACE,
            methods={
                "Allocate": self.allocate,
                "AllocateMany": self.allocate_many,
                "CreateBuffer": self.create_buffer,
                "WrapMemfd": self.wrap_memfd,
                "Import": self.import_fd,
                "ImportTicket": self.import_ticket,
                "ListBuffers": self.list_buffers,
                "Explain": self.explain,
                "ListDevices": self.list_devices,
                "ListAllocators": self.list_allocators,
            },
            getters={
                "Version": lambda _: VERSION,
                "UdmabufAvailable": lambda _: service.udmabuf_available,
                "Allocators": lambda _: pool.names,
                "MaxBufferSize": lambda _: pool.max_size,
                "MaxBytesPerUser": lambda _: limits.max_bytes_per_user,
                "MaxBytesPerApplication": lambda _: limits.max_bytes_per_application,
                "MaxEvictedBytesPerUser": lambda _: limits.max_evicted_bytes_per_user,
                "MaxWrappedBytesPerUser": lambda _: limits.max_wrapped_bytes_per_user,
                "MaxBuffersPerUser": lambda _: limits.max_buffers_per_user,
                "MaxBuffers": lambda _: limits.max_buffers,
                "MaxFdsPerMessage": lambda _: MAX_FDS_PER_MESSAGE,
                "MaxCallsPerWindow": lambda _: limits.max_calls_per_window,
                "CallWindowUSec": lambda _: limits.call_window_usec,
                "MaxCallsInFlightPerUser": lambda _: limits.max_calls_in_flight_per_user,
                "MaxFdsInFlightPerUser": lambda _: limits.max_fds_in_flight_per_user,
                "MaxSharesPerUser": lambda _: limits.max_shares_per_user,
                "MaxAttachmentsPerUser": lambda _: limits.max_attachments_per_user,
                "Buffers": lambda _: service.buffer_count,
                "Bytes": lambda _: service.byte_count,
                "EvictedBytes": lambda _: service.custody.registry.billing.evicted_bytes,
            },
        )

    async def allocate(self, call: Call, spec: dict[str, Variant]) -> Reply:
        """See the XML."""
        (grant,) = await self._service.allocate(call.holder, unwrap(spec, SPEC_TYPES))
        told = self._told(call, [grant.buffer])
        return Reply([buffer_path(grant.buffer.id), 0, info(grant.buffer)], [grant.fd], told)

    async def allocate_many(self, call: Call, spec: dict[str, Variant], count: int) -> Reply:
        """See the XML."""
        grants = await self._service.allocate(call.holder, unwrap(spec, SPEC_TYPES), count)
        paths = [buffer_path(grant.buffer.id) for grant in grants]
        infos: list[Any] = [info(grant.buffer) for grant in grants]
        told = self._told(call, [grant.buffer for grant in grants])
        return Reply([paths, list(range(len(grants))), infos], [grant.fd for grant in grants], told)

    async def create_buffer(self, call: Call, spec: dict[str, Variant]) -> Reply:
        """See the XML."""
        buffer = await self._service.create(call.holder, unwrap(spec, SPEC_TYPES))
        return Reply([buffer_path(buffer.id)], sent=self._told(call, [buffer]))

    async def wrap_memfd(
        self, call: Call, memfds: list[int], ranges: list[Sequence[int]], options: dict[str, Variant]
    ) -> Reply:
        """See the XML."""
        fds = [call.fd(index) for index in memfds]
        parts = [(index, offset, size) for index, offset, size in ranges]
        return self._shared(call, await self._service.wrap(call.holder, fds, parts, unwrap(options, WRAP_TYPES)))

    async def import_fd(self, call: Call, fd: int) -> Reply:
        """See the XML."""
        return self._shared(call, await self._service.import_fd(call.holder, call.fd(fd)))

    async def import_ticket(self, call: Call, ticket: str) -> Reply:
        """See the XML."""
        return self._shared(call, await self._service.import_ticket(call.holder, ticket))

    async def list_buffers(self, call: Call) -> Reply:
        """See the XML."""
        # A long list takes long: one in each turn of the loop, so that others are served in between.
        async with self._listing:
            await asyncio.sleep(0)
            await self._room()
            return Reply([[entry(buffer) for buffer in self._service.list_for(call.holder.owner)]])

    async def explain(self, call: Call, spec: dict[str, Variant]) -> Reply:
        """See the XML."""
        return Reply([[verdict(each) for each in await self._service.explain(call.holder, unwrap(spec, SPEC_TYPES))]])

    async def list_devices(self, call: Call) -> Reply:
        """See the XML."""
        return Reply([[device_row(device) for device in await self._service.list_devices(call.holder)]])

    def list_allocators(self, call: Call) -> Reply:
        """See the XML."""
        return Reply([[allocator_row(allocator) for allocator in self._service.placement.pool.allocators]])

    def _shared(self, call: Call, buffer: Buffer) -> Reply:
        return Reply([buffer_path(buffer.id), info(buffer)], sent=self._told(call, [buffer]))

    def _told(self, call: Call, buffers: list[Buffer]) -> Callable[[], None]:
        return lambda: self._service.answered(call.holder, buffers)
