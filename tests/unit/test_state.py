# SPDX-License-Identifier: MIT
"""core.state and core.records: what was written is read, whatever was cut short; what cannot be read is refused."""

from __future__ import annotations

import base64
import os
import random
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from udmabufd.core import records, restore
from udmabufd.core import state as state_module
from udmabufd.core.attachments import Attachment, Wish
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.constraints import ALLOCATOR_NAME, MAX_ALLOCATORS, MAX_ALLOCATORS_CHARACTERS, Constraints
from udmabufd.core.layout import FORMATS
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.records import StoredBuffer
from udmabufd.core.spec import Request
from udmabufd.core.state import HALF, MAX_PAYLOAD, SLOT, StateFile, Unreadable
from udmabufd.linux import memfd
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import Cache, CacheEvidence

Records = dict[int, dict[str, Any]]


@pytest.fixture
def state() -> Iterator[StateFile]:
    """An empty one."""
    state = StateFile.create()
    yield state
    state.close()


def contents(state: StateFile) -> bytes:
    return os.pread(state.fd.fileno(), os.fstat(state.fd.fileno()).st_size, 0)


def file_of(data: bytes) -> OwnedFd:
    fd = memfd.create("copy", len(data))
    os.pwrite(fd.fileno(), data, 0)
    return fd


def read(data: bytes, *, salvage: bool = False) -> Records:
    """Return the records by slot that a next life of the service would read."""
    with file_of(data) as fd:
        state = StateFile.open(fd, salvage=salvage)
        state.close()
        return state.records


def test_what_was_written_is_read(state: StateFile) -> None:
    assert read(contents(state)) == {}
    slots = [state.write(None, {"n": n}) for n in range(200)]
    assert len(set(slots)) == 200
    for n in range(0, 200, 2):
        state.erase(slots[n])
    state.write(slots[1], {"n": "anew"})
    expected = {slots[n]: {"n": n} for n in range(3, 200, 2)} | {slots[1]: {"n": "anew"}}
    assert read(contents(state)) == expected
    # What was erased is used again before the file grows.
    size = len(contents(state))
    again = [state.write(None, {"m": n}) for n in range(100)]
    assert len(contents(state)) == size
    assert read(contents(state)) == expected | {slot: {"m": n} for n, slot in enumerate(again)}


def test_a_reader_goes_on_where_the_writer_stopped(state: StateFile) -> None:
    slot = state.write(None, {"n": 1})
    gone = state.write(None, {"n": 2})
    state.erase(gone)
    for n in range(5):
        with file_of(contents(state)) as fd:
            copy = StateFile.open(fd)
            assert fd.closed
        copy.write(slot, {"n": n})
        other = copy.write(None, {"other": n})
        assert read(contents(copy)) == {slot: {"n": n}, other: {"other": n}}
        state.close()
        state.fd = OwnedFd(copy.fd.steal())
        state._numbers = copy._numbers
        state._free = copy._free
        state._slots = copy._slots
        state.erase(other)


def test_killed_between_any_two_writes(state: StateFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many changes is seen whole or not at all, whatever half the slot is written to."""
    copies: list[bytes] = []

    class Os:
        """In the place of `os`: keeps the file as it is after each write."""

        def pwrite(self, fd: int, data: bytes, offset: int) -> int:
            # A write that is cut short, too: SIGKILL does not wait for the copying of a page.
            os.pwrite(fd, data[: len(data) // 2], offset)
            copies.append(contents(state))
            written = os.pwrite(fd, data, offset)
            copies.append(contents(state))
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    monkeypatch.setattr(state_module, "os", Os())
    expected: Records = {}
    rng = random.Random(7)
    for number in range(300):
        before = dict(expected)
        copies.clear()
        kind = rng.choice(["new", "again", "again", "erase"]) if expected else "new"
        record = {"n": number, "padding": "x" * rng.randrange(900)}
        if kind == "new":
            expected[state.write(None, record)] = record
        elif kind == "again":
            slot = rng.choice(list(expected))
            expected[slot] = record
            state.write(slot, record)
        else:
            slot = rng.choice(list(expected))
            del expected[slot]
            state.erase(slot)
        assert len(copies) == 4
        for copy in copies:
            assert read(copy) in (before, expected), f"change {number}, {kind}"
        assert read(copies[-1]) == expected


def test_every_slot_costs_the_same(state: StateFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change writes one slot, however many there are."""
    slots = [state.write(None, {"n": n}) for n in range(1000)]
    before = contents(state)
    state.write(slots[500], {"n": "anew"})
    after = contents(state)
    changed = {
        offset // SLOT for offset in range(0, len(before), HALF) if before[offset:][:HALF] != after[offset:][:HALF]
    }
    assert changed == {slots[500]}


def test_a_record_that_is_too_long_is_refused_and_nothing_is_written(state: StateFile) -> None:
    before = contents(state)
    with pytest.raises(ValueError, match=f"{MAX_PAYLOAD} fit"):
        state.write(None, {"text": "x" * MAX_PAYLOAD})
    assert contents(state) == before
    text = "x" * (MAX_PAYLOAD - len('{"text":""}'))
    slot = state.write(None, {"text": text})
    assert read(contents(state)) == {slot: {"text": text}}


class TestDamage:
    """What no kill can do, but a fault could."""

    @pytest.fixture
    def written(self, state: StateFile) -> bytes:
        for n in range(3):
            slot = state.write(None, {"n": n})
            state.write(slot, {"n": n + 10})
        return contents(state)

    def test_a_slot_with_both_halves_damaged(self, written: bytes) -> None:
        for half in (0, HALF):
            offset = 2 * SLOT + half + 20
            written = written[:offset] + b"\xff" + written[offset + 1 :]
        with pytest.raises(Unreadable, match="slot 2 is damaged"):
            read(written)
        assert read(written, salvage=True) == {1: {"n": 10}, 3: {"n": 12}}

    def test_salvage_makes_it_whole(self, written: bytes) -> None:
        data = bytearray(written)
        data[2 * SLOT : 3 * SLOT] = b"\xff" * SLOT
        with file_of(bytes(data)) as fd:
            state = StateFile.open(fd, salvage=True)
        slot = state.write(None, {"new": 1})
        assert slot == 2
        assert read(contents(state)) == {1: {"n": 10}, 2: {"new": 1}, 3: {"n": 12}}
        state.close()

    def test_a_record_that_is_none(self, written: bytes) -> None:
        for payload in (b"[1]", b"{", b"\xff\xfe", b"12"):
            number = 9
            head = (0).to_bytes(4, "little") + len(payload).to_bytes(4, "little") + number.to_bytes(8, "little")
            crc = zlib.crc32(payload, zlib.crc32(head[4:]))
            half = crc.to_bytes(4, "little") + head[4:] + payload
            data = written[: 2 * SLOT] + half + written[2 * SLOT + len(half) :]
            with pytest.raises(Unreadable, match="slot 2 holds no record"):
                read(data)
            assert read(data, salvage=True) == {1: {"n": 10}, 3: {"n": 12}}

    @pytest.mark.parametrize("length", [0, 1, 23])
    def test_too_short(self, written: bytes, length: int) -> None:
        for salvage in (False, True):
            with pytest.raises(Unreadable, match="too short"):
                read(written[:length], salvage=salvage)

    def test_something_else(self, written: bytes) -> None:
        for salvage in (False, True):
            with pytest.raises(Unreadable, match="does not begin as a state"):
                read(b"\x7fELF" + written[4:], salvage=salvage)

    def test_a_later_version_is_refused_and_left_as_it_is(self, written: bytes) -> None:
        later = written[:16] + (state_module.VERSION + 1).to_bytes(4, "little") + written[20:]
        for salvage in (False, True):
            with file_of(later) as fd:
                with pytest.raises(Unreadable, match=f"version {state_module.VERSION + 1}, and this service knows"):
                    StateFile.open(fd, salvage=salvage)
                assert not fd.closed
                assert os.pread(fd.fileno(), len(later), 0) == later

    def test_noise_never_raises_anything_else(self, written: bytes) -> None:
        rng = random.Random(3)
        for _ in range(200):
            data = bytearray(written)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(24, 4 * SLOT)] = rng.randrange(256)
            try:
                found = read(bytes(data))
            except Unreadable:
                found = read(bytes(data), salvage=True)
            # Whatever is believed was written once.
            assert all(record["n"] % 10 == slot - 1 for slot, record in found.items())


OLD_BUFFER: dict[str, Any] = {
    "is": "buffer",
    "order": 1,
    "id": "00112233aabbccdd",
    "ticket": "0123456789abcdef0123456789abcdef",
    "name": "camera",
    "payer": [1000, "org.example.Camera"],
    "serial": 1,
    "stored_as": "0a",
    "request": {
        "size": 1536000,
        "size_requested": 1536000,
        "width": 640,
        "height": 800,
        "format": "NV12",
        "layout": [[0, 614400], [768, 768], 921600],
        "name": "camera",
        "kind": "dma-buf",
        "cache": "cached",
        "cache_policy": "prefer",
        "allocator": None,
    },
    "memory": {
        "allocator": "udmabuf",
        "memfd": 77,
        "dma_buf": 4711,
        "cache": "cached",
        "evidence": "default",
        "needs_sync": True,
    },
    "a key of a later version": [1, 2, 3],
}
"""A buffer's record as the first version wrote it, without what may be absent; and with what it cannot know."""

OLD_SHARE = {
    "is": "share",
    "order": 2,
    "buffer": "00112233aabbccdd",
    "holder": ":1.42",
    "owner": [1000, "org.example.Camera"],
    "count": 2,
}
ATTACHMENT = {
    "is": "attachment",
    "order": 3,
    "buffer": "00112233aabbccdd",
    "holder": ":1.42",
    "number": 7,
    "device": "/dev/video0",
    "path": "/sys/devices/platform/vivid.0/video4linux/video0",
    "constraints": {"alignment": 4096, "max_segments": 1, "contiguous": True, "cache": ["cached"]},
    "dynamic": True,
    "pins": 2,
}
OLD_BUS = {"is": "bus", "id": "0af9e2f1d4c34cbb8bdd6c1e67a4b1a2"}

OLD_FILE = zlib.decompress(
    base64.b64decode(
        "eNrt2k2O0zAUB/AyC9ZoTlB5nRnFaSb92LJnyaaqqhf7ZRpNEhcnmaGM5hicAbFG7BASnIEdC67AEXhuO2LEVGKHVPT/SZXjj9i1vYiek97WlPeF"
        "PWs76ngweDIQzwYAAAAAAAAA8B95//HH51TSk33+VpWtmqm8b1WkSiuXMRVTTgptUzNKTZ5PcmszozkbU5prStQdVhEAAOC45G+/vlOD/bn/wec/"
        "NUMmX5Xsh65hPO0BAAAAAAAAjs/pJ/dUnRyI/4uCvYqU81bSmb5/GRBrnSSjEVGeG2OttOhKc8VdqNPJKL3IxpMp5cZy8Wde2jZUs7Q0kniS/Jo2"
        "ofe5juM4jHV5zq+pXld8/nzXZBGpln1J1fYvtJ3zbJfUbl9LyP2eX/XcyuC3qi3fSNf6YpRt+wrZ5b6a7YOKm9J2KzXLUrlecXm5krsnoaJwvqYw"
        "jxcvdSJ9V7RxveTn8zjKdJrG8SKaj7NJJL9FNE10FkoeTemqbMJC2ZrOZBGlwJBZ7VpIau8LlmtXlWYj5WvPu6WmqnKGZIpq1vRVdRepmmvnN2F2"
        "D+pUv/tkU23rCxlsPI7CeMtQOEvHWh8YlK9Ly40JZbIV1Fdd2A5m2y7bTWPUrPM9y5A0vOLN0BVDGlbUsR9es29L14RNipJotMD5DwAAAAAAwFGq"
        "Pnz/1g4exf/tijz/Dv+T6P5E4OARwMpV22YSZp+nIXZ2N81f43rj+kbC6wQBJQAAwL92+uXnNKQnWAoAAADE/4j/AQAAAAAAAAAAAACO1i+uvR0D"
    )
)
"""A file of the first version with these three records, an overwritten and an erased one; never to be made anew."""


def test_records_of_the_first_version_are_read() -> None:
    assert read(OLD_FILE) == {1: OLD_BUS, 2: OLD_BUFFER, 3: OLD_SHARE}
    with file_of(OLD_FILE) as fd:
        copy = StateFile.open(fd)
    found = restore.parse(copy)
    assert copy.write(None, {"is": "later"}) == 4
    copy.close()
    assert found.bus == (1, OLD_BUS["id"])
    (buffer,) = found.buffers
    assert (buffer.id, buffer.payer, buffer.ended, buffer.kept, buffer.repeat) == (
        OLD_BUFFER["id"],
        Owner(1000, "org.example.Camera"),
        False,
        False,
        None,
    )
    assert buffer.request.layout is not None
    assert (buffer.request.layout.strides, buffer.request.layout.size) == ((768, 768), 921600)
    assert buffer.memory is not None
    assert (buffer.memory.memfd, buffer.memory.dma_buf, buffer.memory.needs_sync) == (77, 4711, True)
    # What it did not write.
    assert (buffer.memory.size, buffer.memory.accounting, buffer.memory.held) == (1536000, Accounting.SERVICE, False)
    assert (buffer.attached, buffer.request.constraints) == (0, Constraints())
    assert found.attachments == []
    (share,) = found.shares
    assert (share.buffer, share.holder, share.count) == (OLD_BUFFER["id"], ":1.42", 2)


@pytest.mark.parametrize(
    ("allocator", "accounting"),
    [("udmabuf", Accounting.SERVICE), ("memfd", Accounting.CLIENT), ("wrapped", Accounting.CLIENT)],
)
def test_whom_the_kernel_charges_for_memory_of_the_first_version(allocator: str, accounting: Accounting) -> None:
    memory = OLD_BUFFER["memory"] | {"allocator": allocator}
    found = records.buffer_of(1, OLD_BUFFER | {"memory": memory})
    assert found.memory is not None
    assert found.memory.accounting is accounting


@pytest.mark.parametrize("key", ["id", "ticket", "name", "payer", "serial", "stored_as", "request", "order"])
def test_a_record_without_what_it_must_have_is_unreadable(state: StateFile, key: str) -> None:
    state.write(None, {k: v for k, v in OLD_BUFFER.items() if k != key})
    with pytest.raises(Unreadable, match=f"does not make sense .*{key}"):
        restore.parse(_reopened(state))
    assert restore.parse(_reopened(state), salvage=True).buffers == []


@pytest.mark.parametrize(
    "record",
    [
        {"is": "thing"},
        {},
        {"is": "attachment"},
        ATTACHMENT | {"pins": None},
        ATTACHMENT | {"constraints": {"alignment": 0}},
        ATTACHMENT | {"constraints": {"later": 1}},
        ATTACHMENT | {"number": "first"},
        {"is": "share", "order": 1, "buffer": "x", "holder": "y", "owner": 5, "count": 1},
        {"is": "share", "order": 1, "buffer": "x", "holder": "y", "owner": [1, "a"], "count": "many"},
        {"is": "bus"},
        OLD_BUFFER | {"memory": {"allocator": "udmabuf"}},
        OLD_BUFFER | {"payer": [1]},
        OLD_BUFFER | {"request": OLD_BUFFER["request"] | {"kind": "scroll"}},
        OLD_BUFFER | {"repeat": [[1, ""], "id"]},
    ],
)
def test_a_record_that_makes_no_sense_is_unreadable(state: StateFile, record: dict[str, Any]) -> None:
    state.write(None, record)
    good = state.write(None, OLD_SHARE)
    with pytest.raises(Unreadable):
        restore.parse(_reopened(state))
    copy = _reopened(state)
    assert [share.slot for share in restore.parse(copy, salvage=True).shares] == [good]


_copies: list[StateFile] = []


@pytest.fixture(autouse=True)
def _close_copies() -> Iterator[None]:
    yield
    while _copies:
        _copies.pop().close()


def _reopened(state: StateFile) -> StateFile:
    with file_of(contents(state)) as fd:
        _copies.append(StateFile.open(fd))
    return _copies[-1]


def _buffer(request: Request, owner: Owner, repeat: Repeat | None) -> Buffer:
    buffer = Buffer(request, owner, repeat, stored_as="0aZ", order=1 << 50, serial=1 << 32)
    buffer.memory = Memory(
        allocator="udmabuf-2M",
        size=1 << 62,
        memfd=None,
        dma_buf=None,
        device=(0, 1),
        inode=1 << 62,
        cache=Cache.WRITE_COMBINE,
        evidence=CacheEvidence.MEASURED,
        needs_sync=False,
        accounting=Accounting.POOL,
    )
    return buffer


def letter(filler: str) -> str:
    """Return `filler`, or another where names of allocators cannot have that."""
    return filler if ALLOCATOR_NAME.fullmatch(f"heap:{filler}") else "a"


def longest_constraints(filler: str) -> dict[str, Any]:
    """Return demands whose record is as long as any: all keys, the largest figures, and the longest names."""
    short = [f"heap:{n:x}" for n in range(MAX_ALLOCATORS)]
    left, more = divmod(MAX_ALLOCATORS_CHARACTERS - sum(map(len, short)), MAX_ALLOCATORS)
    names = [name + letter(filler) * (left + (n < more)) for n, name in enumerate(short)]
    assert sum(map(len, names)) == MAX_ALLOCATORS_CHARACTERS
    return {
        "address_bits": 64,
        "alignment": 1 << 51,
        "size_alignment": 4096,
        "tail_padding": 1 << 40,
        "stride_alignment": 1 << 24,
        "height_alignment": 1 << 20,
        "max_stride": (1 << 32) - 1,
        "max_segments": 1,
        "max_segment_size": (1 << 64) - 1,
        "segment_boundary": 1 << 63,
        "contiguous": True,
        "cache": ["cached", "write-combine", "uncached"],
        "allocators": names,
    }


@pytest.mark.parametrize("filler", ['"', "\\", "a"])
def test_the_longest_records_fit(state: StateFile, filler: str) -> None:
    """Names, ids and applications that JSON doubles the length of, all at their limits, and the largest figures."""
    owner = Owner((1 << 32) - 2, filler * 64)
    longest = max(FORMATS, key=lambda fourcc: len(FORMATS[fourcc]))
    request = Request.from_spec(
        {
            "width": 1 << 20,
            "height": 1 << 20,
            "format": longest,
            "name": filler * 31,
            "cache": "write-combine",
            "cache_policy": "require",
            "allocator": f"heap:{letter(filler) * 64}",
            "constraints": longest_constraints(filler),
        }
    )
    repeat = Repeat(owner, filler * 64, "AllocateMany", "f" * 32, 15, 16)
    buffer = _buffer(request, owner, repeat)
    buffer.attached = 1 << 32
    buffer.serial = buffer.called_off = buffer.moving = 1 << 26
    buffer.kept, buffer.awaited = True, 1e7 + 1 / 3
    record = records.of_buffer(buffer, buffer.order)
    record["memory"]["dma_buf"] = record["memory"]["memfd"] = 1 << 62
    slot = state.write(None, record)
    assert records.buffer_of(slot, read(contents(state))[slot]).repeat == repeat
    holder = Holder(":1." + "9" * 250, owner)
    buffer.shares[holder] = 1 << 62
    state.write(None, records.of_share(buffer, holder, 1 << 62))
    # Names of devices and their paths are bounded where they are found.
    wish = Wish(filler * 256, "/" * 512, Constraints.from_values(longest_constraints(filler)), dynamic=False)
    charge = Ledger(Limits(), lambda: 0.0).charge(owner, Resource.ATTACHMENTS)
    attachment = Attachment(1 << 32, holder, wish, charge, pins=1 << 32)
    state.write(None, records.of_attachment(buffer, attachment, 1 << 62))


def test_a_buffer_is_read_as_it_was_written(state: StateFile) -> None:
    request = Request.from_spec({"width": 64, "height": 48, "format": "NV12", "name": "front"})
    repeat = Repeat(Owner(5, "app"), "0123456789abcdef", "AllocateMany", "ab", 2, 3)
    buffer = _buffer(request, Owner(5, "app"), repeat)
    buffer.ended, buffer.attached = True, 5
    slot = state.write(None, records.of_buffer(buffer, 9))
    found: StoredBuffer = records.buffer_of(slot, read(contents(state))[slot])
    assert (found.request, found.payer, found.repeat, found.order) == (request, buffer.payer, repeat, 9)
    assert (found.id, found.ticket, found.name, found.ended, found.kept, found.serial) == (
        buffer.id,
        buffer.ticket,
        "front",
        True,
        False,
        1 << 32,
    )
    assert found.attached == 5
    assert found.memory is not None
    assert (found.memory.size, found.memory.accounting, found.memory.held) == (1 << 62, Accounting.POOL, False)


def test_what_a_spec_demands_is_read_as_it_was_written(state: StateFile) -> None:
    demanded = {
        "alignment": 6,
        "tail_padding": 5,
        "cache": ["cached", "uncached"],
        "allocators": ["heap:*", "udmabuf"],
    }
    request = Request.from_spec({"size": 1, "constraints": demanded})
    buffer = Buffer(request, Owner(5, "app"), stored_as="0")
    slot = state.write(None, records.of_buffer(buffer, 1))
    found = records.buffer_of(slot, read(contents(state))[slot])
    assert found.request.constraints == request.constraints != Constraints()
    # What is merged follows from the attachments, which have records of their own.
    assert found.request.under(()) == request


def test_an_attachment_is_read_as_it_was_written(state: StateFile) -> None:
    owner = Owner(5, "app")
    buffer = Buffer(Request.from_spec({"size": 1}), owner)
    wish = Wish("drm:card0", "/sys/devices/x", Constraints(alignment=8, max_segments=1), dynamic=True)
    ledger = Ledger(Limits(), lambda: 0.0)
    charge = ledger.charge(owner, Resource.ATTACHMENTS)
    attachment = Attachment(3, Holder(":1.9", owner), wish, charge, pins=4)
    slot = state.write(None, records.of_attachment(buffer, attachment, 12))
    found = records.attachment_of(slot, read(contents(state))[slot])
    assert (found.slot, found.order, found.buffer, found.holder) == (slot, 12, buffer.id, ":1.9")
    assert (found.number, found.wish, found.pins) == (3, wish, 4)
    state.write(None, ATTACHMENT)
    parsed = restore.parse(_reopened(state))
    # In the order in which they were made.
    assert [each.number for each in parsed.attachments] == [7, 3]
