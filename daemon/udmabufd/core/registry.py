# SPDX-License-Identifier: MIT
"""The buffers: by id, ticket and holder; shares, their charges and records, and the end of a buffer.

What memory a buffer has is in memories.py.

Everything here is done on the event loop, at once and whole: no await, so no half-done change is ever seen. Each
change is recorded in the state in such an order that what a kill leaves between two records has one meaning, which
restore.py gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from udmabufd.core.attachments import Attachment, Wish
from udmabufd.core.billing import Bill
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.ledger import Ledger, Owner
from udmabufd.core.memories import Memories, step
from udmabufd.core.spec import Request
from udmabufd.core.state import StateFile
from udmabufd.core.states import Step, after
from udmabufd_client.contract import Kind

ATTACHMENT_PROPERTIES = ("Attachments", "Constraints", "Size")
"""Properties that change when a device attaches or detaches."""


class Registry(Memories):
    """The buffers and their holders. `unheld` is told of each buffer whose last share is gone; it calls end() for it,
    now or later, unless somebody has a share again by then.
    """

    def __init__(self, ledger: Ledger, max_buffers: int, state: StateFile, unheld: Callable[[Buffer], None]) -> None:
        super().__init__(ledger, state)
        self._max_buffers = max_buffers
        self._unheld = unheld
        self._uses = 0
        self._promised = 0
        self._by_holder: dict[Holder, dict[Buffer, None]] = {}

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
        self.check_room()
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

    def check_room(self) -> None:
        """Raise QuotaExceeded if there are as many buffers as there may be."""
        if len(self._by_id) + self._promised >= self._max_buffers:
            raise QuotaExceeded(f"The service has {len(self._by_id)} buffers of all users, its limit max_buffers")

    @contextmanager
    def room_for_former(self, buffer: Buffer, causer: Owner, *, imposed: bool = False) -> Iterator[Bill]:
        """Room for what `buffer` has now, when it has moved because of `causer`, and what pays for it, `imposed`
        whatever the limits of a user say. Raises QuotaExceeded.
        """
        self.check_room()
        bill = self.billing.former(buffer, causer, imposed=imposed)
        self._promised += 1
        try:
            yield bill
        finally:
            self._promised -= 1
            bill.release()

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

    def visible_to(self, owner: Owner | None) -> list[Buffer]:
        """Return the buffers that `owner` holds or is charged for, oldest first; all of them for None."""
        return [b for b in self._by_id.values() if owner is None or owner == b.payer or owner in b.counted]

    def ask(self, buffer: Buffer, request: Request) -> None:
        """Have `request` be what the buffer is asked to be from now on."""
        buffer.request = request
        self.record(buffer)

    def use(self, buffer: Buffer) -> None:
        """Take notice that somebody uses `buffer` now."""
        self._uses += 1
        buffer.used = self._uses

    def loosen(self, buffer: Buffer, holder: Holder, beside: Attachment | None = None) -> None:
        """Take notice that `holder` gets, or keeps, a descriptor that none of its attachments is told of, `beside` the
        one that is about to end.
        """
        if (
            holder in buffer.shares
            and holder not in buffer.loose
            and not self.attachments.answers(buffer, holder, beside)
        ):
            buffer.loose.add(holder)
            if holder in buffer.share_records:
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
        if holder in buffer.loose and self.attachments.answers(buffer, holder):
            buffer.loose.remove(holder)
            if holder in buffer.share_records:
                self.recorder.write_share(buffer, holder)
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

    def void(self, buffer: Buffer, until: float) -> None:
        """Take all shares of `buffer`, whose holders have ended with their bus, and keep it and its charge. They may
        have it still, and come back `until` then.
        """
        buffer.kept, buffer.awaited = True, until
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
        lingers = buffer.memory is not None and buffer.request.kind is not Kind.MEMFD
        after(buffer.state, Step.UNHELD if lingers else Step.DISCARDED)
        buffer.ended = True
        if not lingers:
            self.finish(buffer)
            return False
        buffer.repeat = None
        self.billing.stays(buffer)
        if buffer.memory_charge is not None:
            buffer.memory_charge.linger(True)
        self.record(buffer)
        return True

    def finish(self, buffer: Buffer) -> None:
        """Forget a buffer that has ended, with its charges: the kernel has freed it, or is not asked."""
        assert buffer.ended
        del self._by_id[buffer.id]
        self._by_ticket.pop(buffer.ticket, None)
        if buffer.memory is not None:
            if buffer.origin:
                self.files.remove(buffer.memory)
            # Memory that is just being made is charged until it is closed.
            self.billing.refund_memory(buffer)
        self.files.forget(buffer)
        self.recorder.erase(buffer)
        self.billing.end(buffer)

    def adopt(self, buffer: Buffer, holders: Iterable[tuple[Holder, int, tuple[int, int]]]) -> None:
        """Take a buffer of a former life of the service, with (holder, shares, record) of each that has any.

        Charges are imposed, not asked for: what is there is there.
        """
        self.recorder.passed(buffer.order)
        self._by_id[buffer.id] = buffer
        if buffer.memory is not None:
            if not buffer.origin:
                self.files.add(buffer, buffer.memory)
            elif (moved := self._by_id.get(buffer.origin)) is not None:
                self.files.add_former(moved, buffer.memory)
            self.billing.arrived(buffer.memory)
            self.billing.impose_memory(buffer)
        self.billing.impose_share(buffer, None)
        if not buffer.withdrawn and not buffer.origin:
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

    def _drop_shares(self, buffer: Buffer, holder: Holder) -> None:
        self._forget_share(buffer, holder)
        self._settle_payer(buffer)
        if not buffer.shares:
            self._unheld(buffer)

    def _forget_share(self, buffer: Buffer, holder: Holder) -> None:
        del buffer.shares[holder]
        buffer.share_charges.pop(holder).release()
        buffer.loose.discard(holder)
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
        with step(buffer, Step.IMPORTED):
            buffer.ended = False
        if buffer.memory_charge is not None:
            buffer.memory_charge.linger(False)
        self._settle_payer(buffer)
        self.record(buffer)

    def _record_all(self, buffer: Buffer) -> None:
        """Write the records of the buffer and of all its shares: the buffer's first, for without a share it ends."""
        self.recorder.write(buffer)
        self.record_shares(buffer)
