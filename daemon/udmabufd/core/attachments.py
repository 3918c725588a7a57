# SPDX-License-Identifier: MIT
"""The attachments of buffers: which devices will touch them, for whom, and what that demands of their memory.

Owns their numbers, charges and records. Which memory suits, and whether what a buffer has does, is decided in
placement.py; when shares end, in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from udmabufd.core.constraints import Constraints, Demand
from udmabufd.core.device import Device
from udmabufd.core.errors import InvalidSpec, QuotaExceeded
from udmabufd.core.ledger import Charge, Ledger, Resource
from udmabufd_client.contract import MAX_ATTACHMENTS

if TYPE_CHECKING:
    from udmabufd.core.buffer import Buffer, Holder
    from udmabufd.core.recorder import Recorder


MAX_PINS: Final = (1 << 32) - 1
"""Pins of an attachment: the property that tells of them is of type u."""


MAX_NUMBER: Final = (1 << 32) - 1
"""The last number of an attachment, which is of type u; each buffer gives each once."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A device that is to be attached: `device` as its user named it, `path` where sysfs has it, and what it demands
    of the memory.
    """

    device: str
    path: str
    constraints: Constraints
    dynamic: bool = False
    found: Device | None = field(default=None, compare=False)
    """The device as it was found; None after a restart."""

    @property
    def demand(self) -> Demand:
        """What it demands, in its name."""
        return Demand(self.device, self.constraints)


@dataclass(eq=False, slots=True)
class Attachment:
    """A wish that was met, for `holder`, under a number that the buffer never gives again."""

    number: int
    holder: Holder
    wish: Wish
    charge: Charge
    pins: int = 0
    record: tuple[int, int] | None = None
    """Slot and order of its record, once it has one."""
    presumed: int = 0
    """The serial of an eviction that took place without its answer, which may come yet; 0 for none."""


class Attachments:
    """Attaches and detaches."""

    def __init__(self, ledger: Ledger, recorder: Recorder) -> None:
        self._ledger = ledger
        self._recorder = recorder
        self._by_path: dict[str, dict[Attachment, Buffer]] = {}
        self.ended: Callable[[Buffer, Attachment], None] = lambda _buffer, _attachment: None
        """Told of each attachment that has ended, for whatever reason."""
        self.unused: Callable[[str], None] = lambda _path: None
        """Told of the path of a device that nothing is attached to any more."""

    def attach(self, buffer: Buffer, holder: Holder, wishes: Sequence[Wish]) -> list[Attachment]:
        """Attach `wishes`, which are known to be met, in this order. Raises QuotaExceeded, and attaches none."""
        check_count(buffer, len(wishes))
        charges: list[Charge] = []
        try:
            for _ in wishes:
                charges.append(self._ledger.charge(holder.owner, Resource.ATTACHMENTS))
        except QuotaExceeded:
            for charge in charges:
                charge.release()
            raise
        made = []
        for wish, charge in zip(wishes, charges, strict=True):
            buffer.attached += 1
            made.append(Attachment(buffer.attached, holder, wish, charge))
            self._add(buffer, made[-1])
        reconsider(buffer)
        return made

    def adopt(
        self, buffer: Buffer, holder: Holder, wish: Wish, number: int, pins: int, record: tuple[int, int]
    ) -> None:
        """Take an attachment of a former life of the service; reconsider() is to follow the last one of a buffer."""
        charge = self._ledger.impose(holder.owner, Resource.ATTACHMENTS)
        self._recorder.passed(record[1])
        buffer.attached = max(buffer.attached, number)
        self._add(buffer, Attachment(number, holder, wish, charge, pins, record))

    def of(self, buffer: Buffer, holder: Holder, number: int) -> Attachment:
        """Return attachment `number` of `holder`. Raises InvalidSpec."""
        found = buffer.attachments.get(number)
        if found is None or found.holder is not holder:
            raise InvalidSpec("attachment", f"this connection has no attachment {number} of the buffer")
        return found

    def answers(self, buffer: Buffer, holder: Holder, beside: Attachment | None = None) -> bool:
        """Whether `holder` has a dynamic attachment of `buffer`, `beside` that one, which answers for all descriptors
        that it has.
        """
        return any(a.wish.dynamic and a.holder is holder and a is not beside for a in buffer.attachments.values())

    def pin(self, buffer: Buffer, attachment: Attachment, by: int) -> None:
        """Pin `attachment` once more, or with -1 once less. Raises InvalidSpec."""
        pins = attachment.pins + by
        if not 0 <= pins <= MAX_PINS:
            reason = "has no pin to take back" if pins < 0 else f"has {attachment.pins} pins, which is all it can have"
            raise InvalidSpec("attachment", f"{attachment.number} {reason}")
        attachment.pins = pins
        if attachment.record is not None:
            self._recorder.write_attachment(buffer, attachment)

    def detach(self, buffer: Buffer, attachment: Attachment) -> None:
        """End `attachment`."""
        self._remove(buffer, attachment)
        reconsider(buffer)

    def drop(self, buffer: Buffer, holder: Holder) -> bool:
        """End all attachments of `holder` to `buffer`; return whether there were any."""
        its = [attachment for attachment in buffer.attachments.values() if attachment.holder is holder]
        for attachment in its:
            self._remove(buffer, attachment)
        if its:
            reconsider(buffer)
        return bool(its)

    def record(self, buffer: Buffer) -> None:
        """Record those that have no record yet."""
        for attachment in buffer.attachments.values():
            if attachment.record is None:
                self._recorder.write_attachment(buffer, attachment)

    def at(self, path: str) -> list[tuple[Buffer, Attachment]]:
        """Return what is attached to the device that sysfs has, or had, at `path`."""
        return [(buffer, attachment) for attachment, buffer in self._by_path.get(path, {}).items()]

    def __iter__(self) -> Iterator[str]:
        """The sysfs paths of all devices that anything is attached to."""
        return iter(tuple(self._by_path))

    def _add(self, buffer: Buffer, attachment: Attachment) -> None:
        buffer.attachments[attachment.number] = attachment
        self._by_path.setdefault(attachment.wish.path, {})[attachment] = buffer

    def _remove(self, buffer: Buffer, attachment: Attachment) -> None:
        del buffer.attachments[attachment.number]
        there = self._by_path[attachment.wish.path]
        del there[attachment]
        if not there:
            del self._by_path[attachment.wish.path]
            self.unused(attachment.wish.path)
        attachment.charge.release()
        self._recorder.erase_attachment(attachment)
        self.ended(buffer, attachment)


def check_count(buffer: Buffer, wanted: int) -> None:
    """Raise QuotaExceeded if `wanted` more attachments are too many for one buffer."""
    present = len(buffer.attachments)
    if present + wanted > MAX_ATTACHMENTS:
        raise QuotaExceeded(
            f"A buffer has at most {MAX_ATTACHMENTS} attachments; there are {present}, and {wanted} more are wanted"
        )
    if buffer.attached + wanted > MAX_NUMBER:
        raise QuotaExceeded(
            f"The buffer has had {buffer.attached} attachments, and numbers end at {MAX_NUMBER}; make another buffer"
        )


def reconsider(buffer: Buffer) -> None:
    """Have the buffer's request say what its attachments demand now; memory that it has stays laid out as it is.

    Nothing is refused: what is attached was found compatible, and less of it is.
    """
    demands = [attachment.wish.demand for attachment in buffer.attachments.values()]
    if buffer.memory is None:
        buffer.request = buffer.request.under(demands)
    else:
        buffer.request = replace(buffer.request, merged=buffer.request.merge(demands))
