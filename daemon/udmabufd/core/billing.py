# SPDX-License-Identifier: MIT
"""Who is charged for a buffer, and for what: the tokens that it keeps of the ledger.

Who has a share is the registry's; what a charge may come to, the ledger's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.ledger import Charge, Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.memory import Accounting, Memory
from udmabufd_client.contract import WRAPPED

WORKED_PER_CALL: Final = 64 << 10
"""Bytes whose copying takes as long as a call does otherwise."""

TOLD_PER_CALL: Final = 4
"""Whom to tell of a change takes as long as a call does otherwise."""


@dataclass(slots=True)
class Bill:
    """What is paid beforehand for former memory; `memory` unless whoever paid for it goes on."""

    buffers: Charge
    memory: Charge | None
    used: bool = False

    def release(self) -> None:
        """Give back what was paid, unless it was used."""
        if not self.used:
            self.buffers.release()
            if self.memory is not None:
                self.memory.release()


class Billing:
    """See the module. `unaccounted` is the bytes of memory for which the kernel charges no control group."""

    def __init__(self, ledger: Ledger) -> None:
        self.unaccounted = 0
        self._ledger = ledger

    @property
    def limits(self) -> Limits:
        """What the ledger holds everybody to."""
        return self._ledger.limits

    def count_work(self, owner: Owner, byte_count: int) -> None:
        """Count the call of `owner` that had so many bytes copied, or read back, as as many more as that is worth."""
        self._ledger.add_to_window(owner, byte_count // WORKED_PER_CALL)

    def count_told(self, owner: Owner, count: int) -> None:
        """Count the call of `owner` of which so many are told as as many more as that is worth."""
        self._ledger.add_to_window(owner, count // TOLD_PER_CALL)

    @property
    def evicted_bytes(self) -> int:
        """What is charged to all users for evicted buffers."""
        return self._ledger.total(Resource.EVICTED)

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

    def charge_evicted(self, buffer: Buffer) -> Charge:
        """Charge the payer for the buffer's memory as it will be when it can be swapped out, for evicted() to take.
        Raises QuotaExceeded.
        """
        return self._ledger.charge(buffer.payer, Resource.EVICTED, buffer.size)

    def evicted(self, buffer: Buffer, charge: Charge) -> None:
        """Have `charge` be all that is charged for the buffer's memory."""
        self.refund_memory(buffer)
        buffer.memory_charge = self._to_payer(buffer, charge)

    def stays(self, buffer: Buffer) -> None:
        """Have evicted memory be charged as any other: it will not come back, and lingers until it is free."""
        if buffer.memory_charge is not None and buffer.memory_charge.resource is Resource.EVICTED:
            amount = buffer.memory_charge.amount
            self.refund_memory(buffer)
            buffer.memory_charge = self._ledger.impose(buffer.payer, Resource.BYTES, amount)

    def exchange(self, buffer: Buffer, other: Buffer) -> None:
        """Have each of the two be charged for what the other's memory cost: they exchange their memory."""
        mine, others = buffer.memory_charge, other.memory_charge
        buffer.memory_charge = None if others is None else self._to_payer(buffer, others)
        other.memory_charge = mine

    def former(self, buffer: Buffer, causer: Owner, *, imposed: bool = False) -> Bill:
        """Charge beforehand for what the buffer's memory will be when it has moved: a buffer that lingers, at the cost
        of `causer`, or of whoever pays now if that is the same user. Raises QuotaExceeded, but if it is `imposed`.
        """
        other_user = causer.uid != buffer.payer.uid
        owner = causer if other_user else buffer.payer
        charge = self._ledger.impose if imposed else self._ledger.charge
        buffers = charge(owner, Resource.BUFFERS)
        try:
            return Bill(buffers, charge(owner, Resource.BYTES, buffer.size) if other_user else None)
        except QuotaExceeded:
            buffers.release()
            raise

    def linger_for(self, former: Buffer, buffer: Buffer, bill: Bill) -> None:
        """Have `bill` pay for `former`, which has the memory that `buffer` had, until the kernel has freed it."""
        bill.used = True
        if bill.memory is None:
            former.payer = buffer.payer
            self.stays(former)
            if former.memory_charge is not None:
                former.memory_charge = self._to_payer(former, former.memory_charge)
        else:
            assert bill.memory.owner is not None
            former.payer = bill.memory.owner
            self.refund_memory(former)
            former.memory_charge = bill.memory
        if former.memory_charge is not None:
            former.memory_charge.linger(True)
        former.counted[former.payer] = self._to_payer(former, bill.buffers)

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

    def _to_payer(self, buffer: Buffer, charge: Charge) -> Charge:
        return charge if charge.owner == buffer.payer else self._ledger.move(charge, buffer.payer)

    def end(self, buffer: Buffer) -> None:
        """Charge nobody for the buffer itself any more."""
        for charge in buffer.counted.values():
            charge.release()
        buffer.counted.clear()


def _resource(buffer: Buffer) -> Resource:
    if buffer.evicted:
        return Resource.EVICTED
    return Resource.WRAPPED if buffer.request.allocator == WRAPPED else Resource.BYTES
