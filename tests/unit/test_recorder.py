# SPDX-License-Identifier: MIT
"""core.recorder: each thing has one record, written anew in its place, and none when it is over."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from udmabufd.core import restore
from udmabufd.core.attachments import Attachment, Wish
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.constraints import NONE
from udmabufd.core.errors import OutOfMemory
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.recorder import Recorder
from udmabufd.core.spec import Request
from udmabufd.core.state import StateFile

OWNER = Owner(1000, "app")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """One with an empty state."""
    recorder = Recorder(StateFile.create())
    yield recorder
    recorder.state.close()


def found(recorder: Recorder) -> restore.Records:
    copy = StateFile.open(recorder.state.fd.dup())
    records = restore.parse(copy)
    copy.close()
    return records


def a_buffer(recorder: Recorder) -> tuple[Buffer, Holder, Attachment]:
    buffer, holder = Buffer(Request.from_spec({"size": 1}), OWNER), Holder(":1.1", OWNER)
    buffer.order = recorder.next_order()
    buffer.shares[holder] = 1
    charge = Ledger(Limits(), lambda: 0.0).charge(OWNER, Resource.ATTACHMENTS)
    return buffer, holder, Attachment(1, holder, Wish("gpu", "/sys/x", NONE), charge)


def test_what_is_written_anew_keeps_its_slot_and_its_order(recorder: Recorder) -> None:
    buffer, holder, attachment = a_buffer(recorder)
    for number in range(1, 4):
        buffer.serial = buffer.shares[holder] = attachment.pins = number
        recorder.write(buffer)
        recorder.write_attachment(buffer, attachment)
        recorder.write_share(buffer, holder)
        records = found(recorder)
        ((one,), (share,), (other,)) = records.buffers, records.shares, records.attachments
        assert (one.slot, share.slot, other.slot) == (1, 3, 2)
        assert (one.order, other.order, share.order) == (1, 2, 3)
        assert (one.serial, share.count, other.pins) == (number,) * 3
        assert (buffer.slot, buffer.share_records[holder], attachment.record) == (1, (3, 3), (2, 2))


def test_what_is_over_has_no_record(recorder: Recorder) -> None:
    buffer, holder, attachment = a_buffer(recorder)
    for _ in range(2):
        # What was never written is erased, too, and what was erased already.
        recorder.erase(buffer)
        recorder.erase_share(buffer, holder)
        recorder.erase_attachment(attachment)
        assert not recorder.state.records
        recorder.write(buffer)
        recorder.write_share(buffer, holder)
        recorder.write_attachment(buffer, attachment)
        assert found(recorder).attachments
        recorder.erase_attachment(attachment)
        assert (found(recorder).attachments, attachment.record) == ([], None)
        assert found(recorder).shares
        recorder.erase_share(buffer, holder)
        assert (found(recorder).shares, buffer.share_records) == ([], {})
        assert found(recorder).buffers
        recorder.erase(buffer)
        assert (found(recorder).buffers, buffer.slot) == ([], None)


def test_orders_grow_beyond_those_of_a_former_life(recorder: Recorder) -> None:
    assert [recorder.next_order(), recorder.next_order()] == [1, 2]
    recorder.passed(40)
    recorder.passed(7)
    assert recorder.next_order() == 41


def test_without_memory_for_records_nothing_begins(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "")

    recorder.reserve(3)
    monkeypatch.setattr(recorder.state, "_grow", full)
    recorder.reserve(64)
    with pytest.raises(OutOfMemory, match="no memory for its own records"):
        recorder.reserve(65)
    buffer, *_ = a_buffer(recorder)
    recorder.write(buffer)
    assert len(found(recorder).buffers) == 1
