# SPDX-License-Identifier: MIT
"""Writes what the registry changes to the state: which record of which kind, in which slot, in which order.

What a record says is in records.py, how it outlives a kill in state.py.
"""

from __future__ import annotations

from udmabufd.core import records
from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import OutOfMemory
from udmabufd.core.state import StateFile


class Recorder:
    """The state file, and the order of what is in it. `state` is changed only to recover a damaged one."""

    def __init__(self, state: StateFile) -> None:
        self.state = state
        self._order = 0

    def next_order(self) -> int:
        """Return a number that is greater than all before."""
        self._order += 1
        return self._order

    def passed(self, order: int) -> None:
        """Take notice of a number that a former life of the service gave."""
        self._order = max(self._order, order)

    def reserve(self, count: int) -> None:
        """Make sure that so many records can be written, before anything is changed. Raises OutOfMemory."""
        try:
            self.state.reserve(count)
        except OSError as error:
            raise OutOfMemory("The service has no memory for its own records") from error

    def write(self, buffer: Buffer) -> None:
        """Write the buffer's record, the first time or anew."""
        buffer.slot = self.state.write(buffer.slot, records.of_buffer(buffer, buffer.order))

    def write_share(self, buffer: Buffer, holder: Holder) -> None:
        """Write the record of the shares that `holder` has of `buffer`, the first time or anew."""
        slot, order = buffer.share_records.get(holder) or (None, self.next_order())
        buffer.share_records[holder] = self.state.write(slot, records.of_share(buffer, holder, order)), order

    def write_attachment(self, buffer: Buffer, attachment: Attachment) -> None:
        """Write the record of `attachment`, the first time or anew."""
        slot, order = attachment.record or (None, self.next_order())
        attachment.record = self.state.write(slot, records.of_attachment(buffer, attachment, order)), order

    def erase(self, buffer: Buffer) -> None:
        """Erase the buffer's record, if it has one."""
        if buffer.slot is not None:
            self.state.erase(buffer.slot)
            buffer.slot = None

    def erase_share(self, buffer: Buffer, holder: Holder) -> None:
        """Erase the record of the shares of `holder`, if there is one."""
        if holder in buffer.share_records:
            self.state.erase(buffer.share_records.pop(holder)[0])

    def erase_attachment(self, attachment: Attachment) -> None:
        """Erase the attachment's record, if it has one."""
        if attachment.record is not None:
            self.state.erase(attachment.record[0])
            attachment.record = None
