# SPDX-License-Identifier: MIT
"""The buffers: by id, ticket, file and holder; shares, charges and records, and the end of a buffer.

Everything here is done on the event loop, at once and whole: no await, so no half-done change is ever seen. Each
change is recorded in the state in such an order that what a kill leaves between two records has one meaning, which
restore.py gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from udmabufd.core.attachments import Attachment, Attachments, Wish
from udmabufd.core.billing import Billing
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.ledger import Ledger, Owner
from udmabufd.core.memory import Memory
from udmabufd.core.recorder import Recorder
from udmabufd.core.spec import Request
from udmabufd.core.state import StateFile
from udmabufd_client.contract import Kind

ATTACHMENT_PROPERTIES = ("Attachments", "Constraints", "Size")
"""Properties that change when a device attaches or detaches."""

FileId = tuple[tuple[int, int], int]
"""Device and inode of an open file."""


class Registry:
    """Owns every Buffer, and through it the descriptors, charges and records.

    `changed` is told of a buffer and those of its properties that have changed. `unheld` is told of each buffer whose
    last share is gone; it calls end() for it, now or later, unless somebody has a share again by then.
    """

    def __init__(self, ledger: Ledger, max_buffers: int, state: StateFile, unheld: Callable[[Buffer], None]) -> None:
        self.recorder = Recorder(state)
        self.attachments = Attachments(ledger, self.recorder)
        self.changed: Callable[[Buffer, tuple[str, ...]], None] = lambda _buffer, _properties: None
        self.billing = Billing(ledger)
        self._max_buffers = max_buffers
        self._unheld = unheld
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
        self,
        request: Request,
        holder: Holder,
        *,
        wishes: Sequence[Wish] = (),
        repeat: Repeat | None = None,
        recorded: bool = False,
    ) -> Buffer:
        """Make an empty buffer of which `holder` has one share, with the attachments that it wishes for. Raises
        QuotaExceeded, NoSuchBuffer.

        Unless `recorded`, the state learns of it when it has memory: a restart forgets what nobody was told of.
        """
        self.recorder.reserve(2 + len(wishes))
        if len(self._by_id) >= self._max_buffers:
            raise QuotaExceeded(f"The service has {len(self._by_id)} buffers of all users, its limit max_buffers")
        buffer = Buffer(request, holder.owner, repeat)
        while buffer.id in self._by_id:  # 64 random bits: once in a very long life.
            buffer = Buffer(request, holder.owner, repeat)
        buffer.order = self.recorder.next_order()
        self.attachments.attach(buffer, holder, wishes)
        try:
            self.share(buffer, holder)
        except BaseException:
            self.attachments.drop(buffer, holder)
            raise
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
        self.recorder.reserve(1)
        if holder not in buffer.shares:
            self.billing.charge_share(buffer, holder)
        buffer.shares[holder] += 1
        self._by_holder.setdefault(holder, {})[buffer] = None
        if buffer.slot is not None:
            self.recorder.write_share(buffer, holder)
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

    def back(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Give `buffer` its memory, whose descriptors are in the store; record_shares() is to follow. Raises
        NoSuchBuffer, and takes nothing, when the buffer has ended meanwhile; OutOfMemory.
        """
        if buffer.ended:
            raise NoSuchBuffer
        self.recorder.reserve(1 + len(buffer.shares) + len(buffer.attachments))
        buffer.memory, buffer.stored_as = memory, stored_as
        buffer.serial += 1
        self._by_file[memory.device, memory.inode] = buffer
        self.recorder.write(buffer)

    def record_shares(self, buffer: Buffer) -> None:
        """Record the shares of a buffer that was recorded before any of them: without one it ends at a restart. Of
        buffers that are made together, when all are recorded: so all of them are there after a restart, or none.
        """
        # Before the share: a buffer that a holder has, has all its attachments.
        self.attachments.record(buffer)
        for holder in buffer.shares:
            if holder not in buffer.share_records:
                self.recorder.write_share(buffer, holder)

    def attach(self, buffer: Buffer, holder: Holder, wishes: Sequence[Wish]) -> list[Attachment]:
        """Attach devices for `holder`, whose wishes are known to be met. Raises QuotaExceeded, NoSuchBuffer."""
        if holder not in buffer.shares:
            raise NoSuchBuffer
        self.recorder.reserve(len(wishes))
        attachments = self.attachments.attach(buffer, holder, wishes)
        if buffer.slot is not None:
            self.attachments.record(buffer)
            self.record(buffer)
        return attachments

    def detach(self, buffer: Buffer, attachment: Attachment) -> None:
        """End an attachment."""
        self.attachments.detach(buffer, attachment)
        self.record(buffer)

    def answered(self, buffer: Buffer, holder: Holder) -> None:
        """Record that the call with the request_id by which `holder` has `buffer` was answered."""
        if holder in buffer.shares and holder not in buffer.answered:
            buffer.answered.add(holder)
            self.recorder.write_share(buffer, holder)

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
            self.recorder.write_share(buffer, holder)

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
            self.billing.refund_memory(buffer)
        self.recorder.erase(buffer)
        self.billing.end(buffer)

    def adopt(self, buffer: Buffer, holders: Iterable[tuple[Holder, int, tuple[int, int]]]) -> None:
        """Take a buffer of a former life of the service, with (holder, shares, record) of each that has any.

        Charges are imposed, not asked for: what is there is there.
        """
        self.recorder.passed(buffer.order)
        self._by_id[buffer.id] = buffer
        if buffer.memory is not None:
            self._by_file[buffer.memory.device, buffer.memory.inode] = buffer
            self.billing.arrived(buffer.memory)
            self.billing.impose_memory(buffer)
        self.billing.impose_share(buffer, None)
        if not buffer.withdrawn:
            self._by_ticket[buffer.ticket] = buffer
        for holder, count, record in holders:
            buffer.shares[holder] = count
            buffer.share_records[holder] = record
            self.billing.impose_share(buffer, holder)
            self.recorder.passed(record[1])
            self._by_holder.setdefault(holder, {})[buffer] = None
        if buffer.slot is None:
            buffer.order = self.recorder.next_order()
            self._record_all(buffer)
        self._settle_payer(buffer)

    def record(self, buffer: Buffer) -> None:
        """Write the buffer's record anew, if it has one."""
        if buffer.slot is not None:
            self.recorder.write(buffer)

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
        self.recorder.erase_share(buffer, holder)
        held = self._by_holder[holder]
        del held[buffer]
        if not held:
            del self._by_holder[holder]
        # After the share: attachments without one are void at a restart.
        if self.attachments.drop(buffer, holder):
            self.changed(buffer, ATTACHMENT_PROPERTIES)

    def _settle_payer(self, buffer: Buffer) -> None:
        if self.billing.settle(buffer):
            self.record(buffer)

    def _revive(self, buffer: Buffer) -> None:
        buffer.ended = False
        if buffer.memory_charge is not None:
            buffer.memory_charge.linger(False)
        self._settle_payer(buffer)
        self.record(buffer)

    def _record_all(self, buffer: Buffer) -> None:
        """Write the records of the buffer and of all its shares: the buffer's first, for without a share it ends."""
        self.recorder.write(buffer)
        self.record_shares(buffer)
