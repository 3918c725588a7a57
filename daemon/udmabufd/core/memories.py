# SPDX-License-Identifier: MIT
"""The memory of buffers: what each has, gets, exchanges and gives up, with the charges, files and records of it.

The half of the registry that knows no holders but where a record has to follow. As there, everything is done at once
and whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from udmabufd.core.attachments import Attachments
from udmabufd.core.billing import Bill, Billing
from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import NoSuchBuffer
from udmabufd.core.files import Files
from udmabufd.core.ledger import Ledger
from udmabufd.core.memory import Memory
from udmabufd.core.recorder import Recorder
from udmabufd.core.state import StateFile
from udmabufd.core.states import Step, after

MEMORY_PROPERTIES = ("State", "Serial", "Allocator", "Size")
"""Properties that change when a buffer gets memory, or other memory."""


class Memories:
    """Owns every Buffer, and through it the descriptors, charges and records.

    `changed` is told of a buffer and those of its properties that have changed.
    """

    def __init__(self, ledger: Ledger, state: StateFile) -> None:
        self.recorder = Recorder(state)
        self.attachments = Attachments(ledger, self.recorder)
        self.changed: Callable[[Buffer, tuple[str, ...]], None] = lambda _buffer, _properties: None
        self.billing = Billing(ledger)
        self.files = Files()
        self._by_id: dict[str, Buffer] = {}
        self._by_ticket: dict[str, Buffer] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Buffer]:
        """All buffers, oldest first; it may end some meanwhile."""
        return iter(tuple(self._by_id.values()))

    def __contains__(self, buffer: Buffer) -> bool:
        return self._by_id.get(buffer.id) is buffer

    def back(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Give `buffer` its memory, whose descriptors are in the store; record_shares() is to follow. Raises
        NoSuchBuffer, and takes nothing, when the buffer has ended meanwhile; OutOfMemory.
        """
        if buffer.ended:
            raise NoSuchBuffer
        self.recorder.reserve(1 + len(buffer.shares) + len(buffer.attachments))
        with step(buffer, Step.ALLOCATED):
            buffer.memory, buffer.stored_as = memory, stored_as
            buffer.serial += 1
        self.files.add(buffer, memory)
        self.recorder.write(buffer)

    def exchange(self, buffer: Buffer, other: Buffer, bill: Bill | None = None, serial: int | None = None) -> None:
        """Give `buffer` the memory of `other`, which has the former from now on, with what each costs.

        With a `bill`, `other` becomes a buffer that lingers, for descriptors and mappings of the former memory may be
        left. Raises OutOfMemory, and exchanges nothing.
        """
        self.recorder.reserve(2)
        assert buffer.memory is not None
        assert other.memory is not None
        former = buffer.memory
        buffer.memory, other.memory = other.memory, former
        buffer.stored_as, other.stored_as = other.stored_as, buffer.stored_as
        self.billing.exchange(buffer, other)
        if bill is None:
            self.files.remove(former)
        else:
            # Its record first: a kill in between leaves one that tells of what the buffer's own record has.
            other.ended, other.origin, other.serial = True, buffer.id, buffer.serial
            other.order = self.recorder.next_order()
            self._by_id[other.id] = other
            self.billing.linger_for(other, buffer, bill)
            self.recorder.write(other)
            self.files.add_former(buffer, former)
        self.files.add(buffer, buffer.memory)
        buffer.serial = buffer.serial if serial is None else serial
        self.recorder.write(buffer)

    def evict(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Have `buffer` have nothing but `memory`, a memfd that nobody else has."""
        assert buffer.memory is not None
        self.files.remove(buffer.memory)
        buffer.memory, buffer.stored_as = memory, stored_as
        self.record(buffer)

    def moves(self, buffer: Buffer, serial: int, tell: Callable[[], None] = lambda: None) -> None:
        """Take notice that `buffer` is to have this serial, or with 0 that this has happened or is off: then `tell`
        tells its importers, as long as the record says that they are to be told.
        """
        if buffer.moving == serial or buffer.ended:
            buffer.moving = serial
            return
        if serial:
            what = Step.MOVE_BEGUN
        elif buffer.evicted:
            what = Step.EVICTED
        else:
            what = Step.MOVED if buffer.serial >= buffer.moving else Step.MOVE_CANCELLED
        with step(buffer, what):
            buffer.moving = serial
        self.changed(buffer, ("State",))
        tell()
        self.record(buffer)

    def bring_back(self, buffer: Buffer, other: Buffer, bill: Bill | None) -> None:
        """Give `buffer`, which is evicted, the memory of `other` under its next serial; with a `bill` that is other
        memory, and what it had lingers. Raises OutOfMemory.
        """
        with step(buffer, Step.BROUGHT_BACK):
            self.exchange(buffer, other, bill, buffer.next_serial)

    def withdraw(self, buffer: Buffer, memory: Memory, stored_as: str) -> None:
        """Put `memory`, the witness that remains of a lingering buffer, in the place of what clients had."""
        assert buffer.memory is not None
        self.files.remove(buffer.memory)
        self._by_ticket.pop(buffer.ticket, None)
        buffer.memory, buffer.stored_as = memory, stored_as
        self.record(buffer)

    def record(self, buffer: Buffer) -> None:
        """Write the buffer's record anew, if it has one."""
        if buffer.slot is not None:
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


@contextmanager
def step(buffer: Buffer, what: Step) -> Iterator[None]:
    """Do `what`, which the table of states allows, to `buffer`. Raises ImpossibleStep beforehand."""
    expected = after(buffer.state, what)
    yield
    assert buffer.state is expected
