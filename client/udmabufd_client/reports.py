# SPDX-License-Identifier: MIT
"""The members of the service that tell: of buffers, users, limits, devices and allocators, and what Allocate would do.

None of them brings a share or needs one: those are service.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from udmabufd_base.codec import Variant
from udmabufd_base.message import ALLOW_INTERACTIVE_AUTHORIZATION
from udmabufd_client.contract import ADMIN_INTERFACE, ALLOCATOR_INTERFACE, OBJECT_PATH
from udmabufd_client.info import ListedBuffer, RecoveredBuffer, Usage, parse_properties
from udmabufd_client.interface import PROPERTIES_INTERFACE
from udmabufd_client.inventory import AllocatorInfo, DeviceInfo, Verdict
from udmabufd_client.session import Session


class Reports:
    """What one session can ask. `timeout` is in seconds; None: the session's. All raise UdmabufError."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def list_buffers(self, timeout: float | None) -> list[ListedBuffer]:
        """ListBuffers: the buffers of the caller's user; root sees all."""
        return [ListedBuffer.parse(entry) for entry in await self._rows("ListBuffers", [], timeout)]

    async def explain(self, spec: Mapping[str, Variant], timeout: float | None) -> list[Verdict]:
        """Explain: what each allocator says to a spec, in the order in which they are asked."""
        return [Verdict.parse(row) for row in await self._rows("Explain", [spec], timeout)]

    async def devices(self, timeout: float | None) -> list[DeviceInfo]:
        """ListDevices: those that import dma-bufs."""
        return [DeviceInfo.parse(row) for row in await self._rows("ListDevices", [], timeout)]

    async def allocators(self, timeout: float | None) -> list[AllocatorInfo]:
        """ListAllocators: in the order in which they are asked."""
        return [AllocatorInfo.parse(row) for row in await self._rows("ListAllocators", [], timeout)]

    async def properties(self, timeout: float | None) -> dict[str, Any]:
        """Return every property of the allocator that the interface has and the service gives, by name."""
        (raw,) = await self._session.ask(
            OBJECT_PATH, PROPERTIES_INTERFACE, "GetAll", [ALLOCATOR_INTERFACE], timeout, again=True
        )
        return parse_properties(ALLOCATOR_INTERFACE, raw)

    async def usage(self, interactive: bool, timeout: float | None) -> list[Usage]:
        """GetUsage, for administrators: who holds how much."""
        flags = ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        return [Usage.parse(row) for row in await self._rows("GetUsage", [], timeout, ADMIN_INTERFACE, flags=flags)]

    async def recover(self, discard: bool, interactive: bool, timeout: float | None) -> list[RecoveredBuffer]:
        """Recover, for administrators: keep or give up the buffers of a state that could not be read."""
        options = {"discard": Variant("b", bool(discard))}
        flags = ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        rows = await self._rows("Recover", [options], timeout, ADMIN_INTERFACE, again=False, flags=flags)
        return [RecoveredBuffer.parse(row) for row in rows]

    async def drain(self, allocator: str, interactive: bool, timeout: float | None) -> None:
        """Drain, for administrators: move every buffer whose memory is of an allocator to others."""
        flags = ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        # Once more does no harm: what has moved is not there any more.
        await self._session.ask(OBJECT_PATH, ADMIN_INTERFACE, "Drain", [allocator], timeout, again=True, flags=flags)

    async def _rows(
        self,
        member: str,
        body: list[Any],
        timeout: float | None,
        interface_name: str = ALLOCATOR_INTERFACE,
        *,
        again: bool = True,
        flags: int = 0,
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]]
        (rows,) = await self._session.ask(OBJECT_PATH, interface_name, member, body, timeout, again=again, flags=flags)
        return rows
