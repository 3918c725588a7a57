# SPDX-License-Identifier: MIT
"""The buffers: by id, ticket, file and holder; shares, charges and records, and the end of a buffer.

Everything here is done on the event loop, at once and whole: no await, so no half-done change is ever seen. Each
change is recorded in the state in such an order that what a kill leaves between two records has one meaning, which
restore.py gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from udmabufd.core import records
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.errors import NoSuchBuffer, OutOfMemory, QuotaExceeded
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd.core.state import StateFile
from udmabufd_client.contract import WRAPPED, Kind

FileId = tuple[tuple[int, int], int]
"""Device and inode of an open file."""


class Registry:
    """Owns every Buffer, and through it the descriptors, charges and records.

    `unheld` is told of each buffer whose last share is gone; it calls end() for it, now or later, unless somebody
    has a share again by then.
    """

    def __init__(self, ledger: Ledger, max_buffers: int, state: StateFile, unheld: Callable[[Buffer], None]) -> None:
        self.state = state
        self._ledger = ledger
        self._max_buffers = max_buffers
        self._unheld = unheld
        self._order = 0
        self._by_id: dict[str, Buffer] = {}
        self._by_ticket: dict[str, Buffer] = {}
        self._by_file: dict[FileId, Buffer] = {}
        self._by_holder: dict[Holder, dict[Buffer, None]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Buffer]:
        """All buffers, oldest first; it may end some meanwhile."""
        return iter(tuple(self._by_id.values()))

    def __contains__(self, buffer: Buffer) -> bool:
        return self._by_id.get(buffer.id) is buffer

    def create(
        self, request: Request, holder: Holder, *, repeat: Repeat | None = None, recorded: bool = False
    ) -> Buffer:
        """Make an empty buffer of which `holder` has one share. Raises QuotaExceeded, NoSuchBuffer.

        Unless `recorded`, the state learns of it when it has memory: a restart forgets what nobody was told of.
        """
        self._reserve(2)
        if len(self._by_id) >= self._max_buffers:
            raise QuotaExceeded(f"The service has {len(self._by_id)} buffers of all users, its limit max_buffers")
        buffer = Buffer(request, holder.owner, repeat)
        while buffer.id in self._by_id:  # 64 random bits: once in a very long life.
            buffer = Buffer(request, holder.owner, repeat)
        buffer.order = self._next_order()
        self.share(buffer, holder)
        self._by_id[buffer.id] = buffer
        self._by_ticket[buffer.ticket] = buffer
        if recorded:
            self._record_all(buffer)
        return buffer

    def share(self, buffer: Buffer, holder: Holder, *, repeated: bool = False) -> None:
        """Give `holder` one more share, also of a buffer that lingers, which lives again then.

        A call that is `repeated` after a restart has its share already if the former run had recorded it: that run was
        killed before it answered. Raises QuotaExceeded; NoSuchBuffer when either has ended meanwhile.
        """
        if holder.gone or buffer.withdrawn or (buffer.ended and buffer not in self):
            raise NoSuchBuffer
        if repeated and holder in buffer.unanswered:
            buffer.unanswered.remove(holder)
            return
        self._reserve(1)
        if holder not in buffer.shares:
            buffer.share_charges[holder] = self._ledger.charge(holder.owner, Resource.SHARES)
            try:
                if holder.owner not in buffer.counted:
                    buffer.counted[holder.owner] = self._ledger.charge(holder.owner, Resource.BUFFERS)
            except QuotaExceeded:
                buffer.share_charges.pop(holder).release()
                raise
        buffer.shares[holder] += 1
        self._by_holder.setdefault(holder, {})[buffer] = None
        if buffer.slot is not None:
            self._record_share(buffer, holder)
        if buffer.kept:
            buffer.kept = False
            self.record(buffer)
        if buffer.ended:
            self._revive(buffer)
        else:
            # While nobody held it, whoever had last went on paying.
            self._settle_payer(buffer)

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

    def by_file(self, device: tuple[int, int], inode: int) -> Buffer:
        """Return the buffer whose file this is; it may linger. Raises NoSuchBuffer."""
        try:
            return self._by_file[device, inode]
        except KeyError:
            raise NoSuchBuffer from None

    def knows_file(self, device: tuple[int, int], inode: int) -> bool:
        """Whether this is the file of a buffer."""
        return (device, inode) in self._by_file

    def visible_to(self, owner: Owner | None) -> list[Buffer]:
        """Return the buffers that `owner` holds or is charged for, oldest first; all of them for None."""
        return [b for b in self._by_id.values() if owner is None or owner == b.payer or owner in b.counted]

    def charge_memory(self, buffer: Buffer) -> None:
        """Charge the payer for the memory that is about to be made. Raises QuotaExceeded, NoSuchBuffer."""
        if buffer.ended:
            raise NoSuchBuffer
        assert buffer.memory_charge is None
        resource = Resource.WRAPPED if buffer.request.allocator == WRAPPED else Resource.BYTES
        buffer.memory_charge = self._ledger.charge(buffer.payer, resource, buffer.request.size)

    def refund_memory(self, buffer: Buffer) -> None:
        """Take the charge back: there is no memory."""
        if buffer.memory_charge is not None:
            buffer.memory_charge.release()
            buffer.memory_charge = None

    def back(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Give `buffer` its memory, whose descriptors are in the store; record_shares() is to follow. Raises
        NoSuchBuffer, and takes nothing, when the buffer has ended meanwhile; OutOfMemory.
        """
        if buffer.ended:
            raise NoSuchBuffer
        self._reserve(1 + len(buffer.shares))
        buffer.memory, buffer.stored_as = memory, stored_as
        buffer.serial += 1
        self._by_file[memory.device, memory.inode] = buffer
        buffer.slot = self.state.write(buffer.slot, records.of_buffer(buffer, buffer.order))

    def record_shares(self, buffer: Buffer) -> None:
        """Record the shares of a buffer that was recorded before any of them: without one it ends at a restart. Of
        buffers that are made together, when all are recorded: so all of them are there after a restart, or none.
        """
        for holder in buffer.shares:
            if holder not in buffer.share_records:
                self._record_share(buffer, holder)

    def answered(self, buffer: Buffer, holder: Holder) -> None:
        """Record that the call with the request_id by which `holder` has `buffer` was answered."""
        if holder in buffer.shares and holder not in buffer.answered:
            buffer.answered.add(holder)
            self._record_share(buffer, holder)

    def rename(self, buffer: Buffer, name: str) -> None:
        """Give `buffer` another name."""
        buffer.name = name
        self.record(buffer)

    def forget_repeat(self, buffer: Buffer) -> None:
        """Have the buffer's request_id stand for it no longer."""
        if buffer.repeat is not None:
            buffer.repeat = None
            self.record(buffer)

    def release(self, buffer: Buffer, holder: Holder) -> None:
        """Take one share of `holder`. Raises NoSuchBuffer."""
        if holder not in buffer.shares:
            raise NoSuchBuffer
        buffer.shares[holder] -= 1
        if not buffer.shares[holder]:
            self._drop_shares(buffer, holder)
        elif buffer.slot is not None:
            self._record_share(buffer, holder)

    def drop(self, holder: Holder) -> None:
        """Take all shares of a connection that has ended."""
        holder.gone = True
        for buffer in tuple(self._by_holder.get(holder, ())):
            self._drop_shares(buffer, holder)

    def void(self, buffer: Buffer) -> None:
        """Take all shares of `buffer`, whose holders have ended with their bus, and keep it and its charge."""
        buffer.kept = True
        self.record(buffer)
        for holder in tuple(buffer.shares):
            holder.gone = True
            self._forget_share(buffer, holder)
        self._settle_payer(buffer)

    def holders(self) -> list[Holder]:
        """Return all connections that have a share of anything."""
        return list(self._by_holder)

    def end(self, buffer: Buffer) -> bool:
        """End a buffer that nobody holds; return whether it lingers.

        It does if the kernel may still have references to its memory: the charge stays until finish(). All else is
        forgotten at once, and what is in `memory` is the caller's to close.
        """
        assert not buffer.shares
        if buffer.ended:
            return buffer in self
        buffer.ended = True
        if buffer.memory is None or buffer.request.kind is Kind.MEMFD:
            self.finish(buffer)
            return False
        buffer.repeat = None
        if buffer.memory_charge is not None:
            buffer.memory_charge.linger(True)
        self.record(buffer)
        return True

    def withdraw(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Put `memory`, the witness that remains of a lingering buffer, in the place of what clients had."""
        assert buffer.memory is not None
        self._by_file.pop((buffer.memory.device, buffer.memory.inode), None)
        self._by_ticket.pop(buffer.ticket, None)
        buffer.memory, buffer.stored_as = memory, stored_as
        self.record(buffer)

    def finish(self, buffer: Buffer) -> None:
        """Forget a buffer that has ended, with its charges: the kernel has freed it, or is not asked."""
        assert buffer.ended
        del self._by_id[buffer.id]
        self._by_ticket.pop(buffer.ticket, None)
        if buffer.memory is not None:
            self._by_file.pop((buffer.memory.device, buffer.memory.inode), None)
            # Memory that is just being made is charged until it is closed.
            self.refund_memory(buffer)
        if buffer.slot is not None:
            self.state.erase(buffer.slot)
            buffer.slot = None
        for charge in buffer.counted.values():
            charge.release()
        buffer.counted.clear()

    def adopt(self, buffer: Buffer, holders: Iterable[tuple[Holder, int, tuple[int, int]]]) -> None:
        """Take a buffer of a former life of the service, with (holder, shares, record) of each that has any.

        Charges are imposed, not asked for: what is there is there.
        """
        self._order = max(self._order, buffer.order)
        self._by_id[buffer.id] = buffer
        if buffer.memory is not None:
            self._by_file[buffer.memory.device, buffer.memory.inode] = buffer
            resource = Resource.WRAPPED if buffer.request.allocator == WRAPPED else Resource.BYTES
            buffer.memory_charge = self._ledger.impose(buffer.payer, resource, buffer.request.size)
            buffer.memory_charge.linger(buffer.ended)
        buffer.counted[buffer.payer] = self._ledger.impose(buffer.payer, Resource.BUFFERS)
        if not buffer.withdrawn:
            self._by_ticket[buffer.ticket] = buffer
        for holder, count, record in holders:
            buffer.shares[holder] = count
            buffer.share_records[holder] = record
            buffer.share_charges[holder] = self._ledger.impose(holder.owner, Resource.SHARES)
            self._order = max(self._order, record[1])
            self._by_holder.setdefault(holder, {})[buffer] = None
            if holder.owner not in buffer.counted:
                buffer.counted[holder.owner] = self._ledger.impose(holder.owner, Resource.BUFFERS)
        if buffer.slot is None:
            buffer.order = self._next_order()
            self._record_all(buffer)
        self._settle_payer(buffer)

    def record(self, buffer: Buffer) -> None:
        """Write the buffer's record anew, if it has one."""
        if buffer.slot is not None:
            self.state.write(buffer.slot, records.of_buffer(buffer, buffer.order))

    def _drop_shares(self, buffer: Buffer, holder: Holder) -> None:
        self._forget_share(buffer, holder)
        self._settle_payer(buffer)
        if not buffer.shares:
            self._unheld(buffer)

    def _forget_share(self, buffer: Buffer, holder: Holder) -> None:
        del buffer.shares[holder]
        buffer.share_charges.pop(holder).release()
        buffer.unanswered.discard(holder)
        buffer.answered.discard(holder)
        if holder in buffer.share_records:
            self.state.erase(buffer.share_records.pop(holder)[0])
        held = self._by_holder[holder]
        del held[buffer]
        if not held:
            del self._by_holder[holder]

    def _settle_payer(self, buffer: Buffer) -> None:
        """Charge whoever has to pay by now, and nobody who holds nothing but the last payer."""
        owners = [holder.owner for holder in buffer.shares]
        if owners and buffer.payer not in owners:
            same_user = [owner for owner in owners if owner.uid == buffer.payer.uid]
            buffer.payer = (same_user or owners)[0]
            if buffer.memory_charge is not None:
                buffer.memory_charge = self._ledger.move(buffer.memory_charge, buffer.payer)
            self.record(buffer)
        for owner in tuple(buffer.counted):
            if owner != buffer.payer and owner not in owners:
                buffer.counted.pop(owner).release()

    def _revive(self, buffer: Buffer) -> None:
        buffer.ended = False
        if buffer.memory_charge is not None:
            buffer.memory_charge.linger(False)
        self._settle_payer(buffer)
        self.record(buffer)

    def _record_all(self, buffer: Buffer) -> None:
        """Write the records of the buffer and of all its shares: the buffer's first, for without a share it ends."""
        buffer.slot = self.state.write(buffer.slot, records.of_buffer(buffer, buffer.order))
        self.record_shares(buffer)

    def _record_share(self, buffer: Buffer, holder: Holder) -> None:
        slot, order = buffer.share_records.get(holder) or (None, self._next_order())
        buffer.share_records[holder] = self.state.write(slot, records.of_share(buffer, holder, order)), order

    def _reserve(self, records_: int) -> None:
        """Make sure that so many records can be written, before anything is changed. Raises OutOfMemory."""
        try:
            self.state.reserve(records_)
        except OSError as error:
            raise OutOfMemory("The service has no memory for its own records") from error

    def _next_order(self) -> int:
        self._order += 1
        return self._order
