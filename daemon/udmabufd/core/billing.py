# SPDX-License-Identifier: MIT
"""Who is charged for a buffer, and for what: the tokens that it keeps of the ledger.

Who has a share is the registry's; what a charge may come to, the ledger's.
"""

from __future__ import annotations

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.ledger import Ledger, Resource
from udmabufd.core.memory import Accounting, Memory
from udmabufd_client.contract import WRAPPED


class Billing:
    """See the module. `unaccounted` is the bytes of memory for which the kernel charges no control group."""

    def __init__(self, ledger: Ledger) -> None:
        self.unaccounted = 0
        self._ledger = ledger

    def charge_memory(self, buffer: Buffer, size: int) -> None:
        """Charge the payer for `size` bytes that are about to be made. Raises QuotaExceeded, NoSuchBuffer."""
        if buffer.ended:
            raise NoSuchBuffer
        assert buffer.memory_charge is None
        buffer.memory_charge = self._ledger.charge(buffer.payer, _resource(buffer), size)

    def impose_memory(self, buffer: Buffer) -> None:
        """Charge the payer for memory of a former life of the service: what is there is there."""
        buffer.memory_charge = self._ledger.impose(buffer.payer, _resource(buffer), buffer.size)
        buffer.memory_charge.linger(buffer.ended)

    def refund_memory(self, buffer: Buffer) -> None:
        """Take the charge back: there is no memory."""
        if buffer.memory_charge is not None:
            buffer.memory_charge.release()
            buffer.memory_charge = None

    def arrived(self, memory: Memory) -> None:
        """Take notice of memory that was made, or taken over from a former life of the service."""
        if memory.accounting is Accounting.SYSTEM:
            self.unaccounted += memory.size

    def gone(self, memory: Memory) -> None:
        """Take notice of memory that was closed."""
        if memory.accounting is Accounting.SYSTEM:
            self.unaccounted -= memory.size

    def charge_share(self, buffer: Buffer, holder: Holder) -> None:
        """Charge `holder` for its first share of `buffer`. Raises QuotaExceeded, and charges nothing."""
        buffer.share_charges[holder] = self._ledger.charge(holder.owner, Resource.SHARES)
        try:
            if holder.owner not in buffer.counted:
                buffer.counted[holder.owner] = self._ledger.charge(holder.owner, Resource.BUFFERS)
        except QuotaExceeded:
            buffer.share_charges.pop(holder).release()
            raise

    def impose_share(self, buffer: Buffer, holder: Holder | None) -> None:
        """Charge `holder`, or the payer alone, for a share or a buffer of a former life of the service."""
        owner = buffer.payer if holder is None else holder.owner
        if holder is not None:
            buffer.share_charges[holder] = self._ledger.impose(owner, Resource.SHARES)
        if owner not in buffer.counted:
            buffer.counted[owner] = self._ledger.impose(owner, Resource.BUFFERS)

    def settle(self, buffer: Buffer) -> bool:
        """Charge whoever has to pay by now, and nobody who holds nothing but the last payer; return whether another
        pays than before.
        """
        owners = [holder.owner for holder in buffer.shares]
        moved = bool(owners) and buffer.payer not in owners
        if moved:
            same_user = [owner for owner in owners if owner.uid == buffer.payer.uid]
            buffer.payer = (same_user or owners)[0]
            if buffer.memory_charge is not None:
                buffer.memory_charge = self._ledger.move(buffer.memory_charge, buffer.payer)
        for owner in tuple(buffer.counted):
            if owner != buffer.payer and owner not in owners:
                buffer.counted.pop(owner).release()
        return moved

    def end(self, buffer: Buffer) -> None:
        """Charge nobody for the buffer itself any more."""
        for charge in buffer.counted.values():
            charge.release()
        buffer.counted.clear()


def _resource(buffer: Buffer) -> Resource:
    return Resource.WRAPPED if buffer.request.allocator == WRAPPED else Resource.BYTES
