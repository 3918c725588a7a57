# SPDX-License-Identifier: MIT
"""org.udmabufd.Admin1: what root may, and whom polkit allows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from udmabufd.bus.objects import Call, Exported, Reply
from udmabufd.bus.values import unwrap, wrap
from udmabufd.core.errors import AccessDenied
from udmabufd.core.ledger import ROOT, Ledger, Owner
from udmabufd_base.codec import Variant
from udmabufd_client.contract import ADMIN_INTERFACE, RECOVER_TYPES, RECOVERED_TYPES, USAGE_TYPES

Drain = Callable[[Owner, str], Awaitable[None]]
Recover = Callable[[bool, int], Awaitable[list[dict[str, Any]]]]


class AdminObject:
    """Handlers of the methods; each asks first whether the caller may."""

    def __init__(
        self, ledger: Ledger, allowed: Callable[[str, bool], Awaitable[bool]], recover: Recover, drain: Drain
    ) -> None:
        """`allowed` asks polkit about a connection; `recover` takes whether to discard, and who asks for it; `drain`
        who asks for it, and the allocator.
        """
        self._ledger = ledger
        self._allowed = allowed
        self._recover = recover
        self._drain = drain
        self.exported = Exported(
            ADMIN_INTERFACE,
            methods={"GetUsage": self.get_usage, "Drain": self.drain, "Recover": self.recover},
        )

    async def get_usage(self, call: Call) -> Reply:
        """See the XML."""
        await self._check(call)
        rows = [
            {
                "uid": row.owner.uid,
                "application": row.owner.application,
                "buffers": row.buffers,
                "bytes": row.bytes,
                "lingering": row.lingering,
                "refusals": row.refusals,
            }
            for row in self._ledger.usage()
        ]
        return Reply([[wrap(row, USAGE_TYPES) for row in rows]])

    async def drain(self, call: Call, allocator: str) -> Reply:
        """See the XML."""
        await self._check(call)
        await self._drain(call.holder.owner, allocator)
        return Reply()

    async def recover(self, call: Call, options: dict[str, Variant]) -> Reply:
        """See the XML."""
        await self._check(call)
        discard = unwrap(options, RECOVER_TYPES).get("discard", False)
        rows = await self._recover(discard, call.holder.uid)
        return Reply([[wrap(row, RECOVERED_TYPES) for row in rows]])

    async def _check(self, call: Call) -> None:
        if call.holder.uid != ROOT and not await self._allowed(call.holder.name, call.interactive):
            raise AccessDenied("Only root may do this, and whom polkit allows org.udmabufd.admin")
