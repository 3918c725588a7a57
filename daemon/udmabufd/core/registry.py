# SPDX-License-Identifier: MIT
"""The live buffers: by id, by ticket, by holder; shares, and the end of a buffer with its last share.

Everything here is done on the event loop, at once and whole: no await, so no half-done change is ever seen.
"""

from __future__ import annotations

from collections.abc import Callable

from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.ledger import Charge, Ledger
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request


class Registry:
    """Owns every Buffer, and through it the descriptors and charges.

    When a buffer ends, `dispose` is given its memory and the charge for it, as the new owner of both: freeing pages
    takes time that the event loop does not have.
    """

    def __init__(self, ledger: Ledger, max_buffers: int, dispose: Callable[[Memory, Charge], None]) -> None:
        self._ledger = ledger
        self._max_buffers = max_buffers
        self._dispose = dispose
        self._by_id: dict[str, Buffer] = {}
        self._by_ticket: dict[str, Buffer] = {}
        self._by_holder: dict[Holder, set[Buffer]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def create(self, request: Request, holder: Holder) -> Buffer:
        """Make an empty buffer of which `holder` has one share. Raises QuotaExceeded, NoSuchBuffer."""
        if len(self._by_id) >= self._max_buffers:
            raise QuotaExceeded(f"The service holds {len(self._by_id)} buffers of all users, its limit max_buffers")
        buffer = Buffer(request, holder.uid)
        while buffer.id in self._by_id:  # 64 random bits: once in a very long life.
            buffer = Buffer(request, holder.uid)
        self.share(buffer, holder)
        self._by_id[buffer.id] = buffer
        self._by_ticket[buffer.ticket] = buffer
        return buffer

    def share(self, buffer: Buffer, holder: Holder) -> None:
        """Give `holder` one more share. Raises QuotaExceeded; NoSuchBuffer when either has ended meanwhile."""
        if buffer.ended or holder.gone:
            raise NoSuchBuffer
        if holder.uid not in buffer.counted:
            buffer.counted[holder.uid] = self._ledger.charge_buffer(holder.uid)
        buffer.shares[holder] += 1
        self._by_holder.setdefault(holder, set()).add(buffer)

    def held(self, buffer_id: str, holder: Holder) -> Buffer:
        """Return the buffer with this id if `holder` has a share of it. Raises NoSuchBuffer."""
        buffer = self._by_id.get(buffer_id)
        if buffer is None or holder not in buffer.shares:
            raise NoSuchBuffer
        return buffer

    def by_ticket(self, ticket: str) -> Buffer:
        """Return the buffer that `ticket` stands for. Raises NoSuchBuffer."""
        try:
            return self._by_ticket[ticket]
        except KeyError:
            raise NoSuchBuffer from None

    def of_uid(self, uid: int | None) -> list[Buffer]:
        """Return the buffers that `uid` created or holds, oldest first; all of them for None."""
        return [b for b in self._by_id.values() if uid is None or uid == b.creator or uid in b.counted]

    def charge_memory(self, buffer: Buffer) -> None:
        """Charge the creator for the memory that is about to be made. Raises QuotaExceeded, NoSuchBuffer."""
        if buffer.ended:
            raise NoSuchBuffer
        assert buffer.bytes_charge is None
        buffer.bytes_charge = self._ledger.charge_bytes(buffer.creator, buffer.request.size)

    def refund_memory(self, buffer: Buffer) -> None:
        """Take the charge back: no memory could be made."""
        if buffer.bytes_charge is not None:
            buffer.bytes_charge.release()
            buffer.bytes_charge = None

    def back(self, buffer: Buffer, memory: Memory) -> None:
        """Give `buffer` its memory, which is consumed. Raises NoSuchBuffer when the buffer ended meanwhile."""
        buffer.memory = memory
        buffer.serial += 1
        if buffer.ended:
            self._give_up_memory(buffer)
            raise NoSuchBuffer

    def release(self, buffer: Buffer, holder: Holder) -> None:
        """Take one share of `holder`; with the last of all, the buffer ends. Raises NoSuchBuffer."""
        if holder not in buffer.shares:
            raise NoSuchBuffer
        buffer.shares[holder] -= 1
        if not buffer.shares[holder]:
            self._drop_shares(buffer, holder)

    def drop(self, holder: Holder) -> None:
        """Take all shares of a connection that has ended."""
        holder.gone = True
        for buffer in tuple(self._by_holder.get(holder, ())):
            self._drop_shares(buffer, holder)

    def close(self) -> None:
        """End every buffer: the service stops."""
        for holder in tuple(self._by_holder):
            self.drop(holder)

    def _drop_shares(self, buffer: Buffer, holder: Holder) -> None:
        del buffer.shares[holder]
        held = self._by_holder[holder]
        held.discard(buffer)
        if not held:
            del self._by_holder[holder]
        if not any(other.uid == holder.uid for other in buffer.shares):
            buffer.counted.pop(holder.uid).release()
            if holder.uid == buffer.creator and buffer.shares:
                # The earliest of those who stay pays from now on.
                buffer.creator = next(iter(buffer.shares)).uid
                if buffer.bytes_charge is not None:
                    buffer.bytes_charge = self._ledger.move(buffer.bytes_charge, buffer.creator)
        if not buffer.shares:
            self._end(buffer)

    def _end(self, buffer: Buffer) -> None:
        buffer.ended = True
        del self._by_id[buffer.id]
        del self._by_ticket[buffer.ticket]
        # Memory that is just being made is given up by back(), its charge by back() or refund_memory().
        if buffer.memory is not None:
            self._give_up_memory(buffer)

    def _give_up_memory(self, buffer: Buffer) -> None:
        memory, charge = buffer.memory, buffer.bytes_charge
        assert memory is not None
        assert charge is not None
        buffer.memory = buffer.bytes_charge = None
        self._dispose(memory, charge)
