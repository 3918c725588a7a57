# SPDX-License-Identifier: MIT
"""The file in which the service's state outlives it: records in slots of fixed size, in a memfd that the store keeps.

A change writes one slot, whatever the number of records. Each slot has two halves that are written in turn, with a
checksum and a number that grows, the head last: a write that a kill cuts short leaves the older half. What the records
mean is left to records.py.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final, Self

from udmabufd.linux import memfd
from udmabufd_base.fd import OwnedFd

VERSION: Final = 1
"""Version of the format; raised when an older reader would misunderstand a record. Keys may be added without that."""

MAGIC: Final = b"udmabufd-state\0\0"
HALF: Final = 2048
"""Bytes. The longest record of a buffer, with names all of characters that JSON escapes, has some 1,250."""

SLOT: Final = 2 * HALF

_FILE_HEAD: Final = struct.Struct("<16sII")  # magic, version, bytes of a slot
_HEAD: Final = struct.Struct("<IIQ")  # checksum of the rest, bytes of the payload, number of the write
MAX_PAYLOAD: Final = HALF - _HEAD.size

_GROWTH: Final = 64
"""Slots by which the file grows."""


class Unreadable(Exception):
    """The file is none of ours, is of a later version, or is damaged; the text says which."""


class StateFile:
    """An open state file. `records` are those that it had when it was opened, by slot."""

    def __init__(self, fd: OwnedFd, records: dict[int, dict[str, Any]], numbers: dict[int, int], slots: int) -> None:
        """For create() and open()."""
        self.fd = fd
        self.records = records
        self._numbers = numbers
        self._slots = slots
        self._free = [slot for slot in range(1, slots + 1) if slot not in records]
        """A heap: the lowest first."""

    @classmethod
    def create(cls) -> Self:
        """Make an empty one. Raises OSError."""
        fd = memfd.create("udmabufd-state", SLOT)
        os.pwrite(fd.fileno(), _FILE_HEAD.pack(MAGIC, VERSION, SLOT), 0)
        return cls(fd, {}, {}, 0)

    @classmethod
    def open(cls, fd: OwnedFd, *, salvage: bool = False) -> Self:
        """Read one, and consume `fd`. Raises Unreadable, with `fd` as it was; OSError.

        To `salvage` is to read what can be read, and to take damaged slots for unused ones.
        """
        size = os.fstat(fd.fileno()).st_size
        _check_head(os.pread(fd.fileno(), _FILE_HEAD.size, 0))
        records: dict[int, dict[str, Any]] = {}
        numbers: dict[int, int] = {}
        slots = size // SLOT - 1
        for slot in range(1, slots + 1):
            data = os.pread(fd.fileno(), SLOT, slot * SLOT)
            try:
                found = _read_slot(slot, data)
            except Unreadable:
                if not salvage:
                    raise
                os.pwrite(fd.fileno(), bytes(SLOT), slot * SLOT)
                continue
            if found is not None:
                numbers[slot], record = found
                if record is not None:
                    records[slot] = record
        return cls(OwnedFd(fd.steal()), records, numbers, slots)

    def write(self, slot: int | None, record: Mapping[str, Any]) -> int:
        """Write `record` into `slot`, or into a free one for None; return the slot. Raises ValueError if too long."""
        payload = json.dumps(record, separators=(",", ":")).encode()
        if not 0 < len(payload) <= MAX_PAYLOAD:
            raise ValueError(f"a record of {len(payload)} bytes; {MAX_PAYLOAD} fit")
        if slot is None:
            self.reserve(1)
            slot = heapq.heappop(self._free)
        self._put(slot, payload)
        return slot

    def reserve(self, count: int) -> None:
        """Make sure that `count` more records can be written. Raises OSError when there is no memory for them, or it
        is closed.
        """
        if self.fd.closed:
            raise OSError(errno.EBADF, "the state is closed")
        while len(self._free) < count:
            self._grow()

    def erase(self, slot: int) -> None:
        """Forget the record in `slot`."""
        self._put(slot, b"")
        heapq.heappush(self._free, slot)

    def close(self) -> None:
        """Close the file; the store's descriptor keeps its contents."""
        self.fd.close()

    def _put(self, slot: int, payload: bytes) -> None:
        number = self._numbers.get(slot, 0) + 1
        offset = slot * SLOT + (number % 2) * HALF
        os.pwrite(self.fd.fileno(), payload, offset + _HEAD.size)
        os.pwrite(self.fd.fileno(), _head(number, payload), offset)
        self._numbers[slot] = number

    def _grow(self) -> None:
        first = self._slots + 1
        # With its memory, so that no later write can fail for want of it.
        os.posix_fallocate(self.fd.fileno(), first * SLOT, _GROWTH * SLOT)
        self._slots += _GROWTH
        for slot in range(first, self._slots + 1):
            heapq.heappush(self._free, slot)


def _head(number: int, payload: bytes) -> bytes:
    rest = _HEAD.pack(0, len(payload), number)[4:]
    return struct.pack("<I", zlib.crc32(payload, zlib.crc32(rest))) + rest


def _check_head(head: bytes) -> None:
    if len(head) < _FILE_HEAD.size:
        raise Unreadable("it is too short")
    magic, version, slot_size = _FILE_HEAD.unpack(head)
    if magic != MAGIC:
        raise Unreadable("it does not begin as a state of this service does")
    if version > VERSION or slot_size != SLOT:
        raise Unreadable(f"it has version {version}, and this service knows versions up to {VERSION}")


def _read_slot(slot: int, data: bytes) -> tuple[int, dict[str, Any] | None] | None:
    """Return the number of the last write and its record, None for an erased one; None for a slot never used."""
    best: tuple[int, bytes] | None = None
    damaged = 0
    for half in (data[:HALF], data[HALF:]):
        _, length, number = _HEAD.unpack_from(half)
        payload = half[_HEAD.size : _HEAD.size + length]
        whole = length <= MAX_PAYLOAD and half.startswith(_head(number, payload))
        if not whole:
            damaged = max(damaged, number)
        elif number and (best is None or number > best[0]):
            best = number, payload
    # One that was cut short still has the head of the write before the last, for the head is written last, and whole.
    if damaged > (0 if best is None else best[0]):
        raise Unreadable(f"slot {slot} is damaged")
    if best is None:
        return None
    number, payload = best
    if not payload:
        return number, None
    try:
        record = json.loads(payload)
    except ValueError:
        raise Unreadable(f"slot {slot} holds no record") from None
    if not isinstance(record, dict):
        raise Unreadable(f"slot {slot} holds no record")
    return number, record
