# SPDX-License-Identifier: MIT
"""What the service says of buffers, users and its limits, as frozen dataclasses.

Pure data: asks nobody. Devices and allocators are in inventory.py, the check of every value's type in replies.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from udmabufd_base.codec import Variant
from udmabufd_client import contract
from udmabufd_client.contract import Kind, State
from udmabufd_client.errors import BadReply
from udmabufd_client.interface import interface
from udmabufd_client.replies import typed


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one plane of an image lies in its buffer; `offset`, `stride` and `size` in bytes.

    `size` reaches to the next plane, or to the end of the buffer: it can hold more rows than the image has.
    """

    index: int
    offset: int
    stride: int
    size: int

    def of(self, view: memoryview) -> memoryview:
        """Return this plane's part of `view`, which is a view of the whole buffer."""
        return view[self.offset : self.offset + self.size]


@dataclass(frozen=True, kw_only=True)
class BufferInfo:
    """The keys of `info`; None where the service gave none, because it does not apply or there is no memory yet.

    Sizes, offsets and strides in bytes, width and height in pixels.
    """

    size: int | None = None
    size_requested: int | None = None
    kind: str | None = None
    allocator: str | None = None
    cache_requested: str | None = None
    cache_effective: str | None = None
    cache_evidence: str | None = None
    needs_sync: bool | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    modifier: int | None = None
    offsets: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    serial: int | None = None
    inode: int | None = None
    name: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return `info` from its `a{sv}`. Raises BadReply naming a key whose type is not the interface's."""
        return cls(**_checked_planes(typed(raw, contract.INFO_TYPES)))

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of an image in the fourcc's order; none for a buffer that was asked for by size."""
        if not self.offsets or not self.strides or self.size is None:
            return ()
        ends = [*self.offsets[1:], self.size]
        return tuple(
            Plane(index, offset, stride, end - offset)
            for index, (offset, stride, end) in enumerate(zip(self.offsets, self.strides, ends, strict=True))
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by key: for JSON."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }


@dataclass(frozen=True, kw_only=True)
class ListedBuffer(BufferInfo):
    """One buffer as ListBuffers shows it: `info`, its object, who holds it and what it is charged in bytes."""

    buffer: str
    state: str | None = None
    holders: int | None = None
    references: int | None = None
    charged: int | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one entry of ListBuffers. Raises BadReply as BufferInfo.parse(), and without a buffer's path."""
        entry = _checked_planes(typed(raw, contract.LIST_TYPES))
        if not str(entry.get("buffer", "")).startswith(contract.BUFFER_PATH_PREFIX):
            raise BadReply("ListBuffers: an entry names no buffer.")
        return cls(**entry)

    @property
    def id(self) -> str:
        """The buffer's id: the last part of its object path."""
        return self.buffer.removeprefix(contract.BUFFER_PATH_PREFIX)

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by key, the id and the path first: for JSON."""
        known = super().as_dict()
        return {"id": self.id, "buffer": known.pop("buffer"), **known}


@dataclass(frozen=True, kw_only=True)
class AttachmentInfo:
    """A device that is attached to a buffer, by whichever holder: one row of the property Attachments.

    `own` says whether this connection attached it: only then its number is of use here.
    """

    attachment: int
    device: str = ""
    dynamic: bool = False
    pins: int = 0
    own: bool = False

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one row of Attachments. Raises BadReply on a wrong type, and without a number."""
        row = typed(raw, contract.ATTACHMENT_TYPES)
        if "attachment" not in row:
            raise BadReply("Attachments: a row has no attachment.")
        return cls(**row)

    @property
    def number(self) -> int:
        """The attachment's number, as Attachment.number."""
        return self.attachment

    def as_dict(self) -> dict[str, Any]:
        """Return all by key: for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits that apply to this user's calls, in bytes, numbers and microseconds; None: the service has none."""

    max_buffer_size: int | None = None
    max_bytes_per_user: int | None = None
    max_buffers_per_user: int | None = None
    max_buffers: int | None = None
    max_fds_per_message: int | None = None
    max_calls_per_window: int | None = None
    call_window_usec: int | None = None
    max_calls_in_flight_per_user: int | None = None
    max_bytes_per_application: int | None = None
    max_wrapped_bytes_per_user: int | None = None
    max_evicted_bytes_per_user: int | None = None
    max_fds_in_flight_per_user: int | None = None
    max_shares_per_user: int | None = None
    max_attachments_per_user: int | None = None

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> Self:
        """Return the limits among the properties of the allocator."""
        names = {_snake(name): name for name in interface(contract.ALLOCATOR_INTERFACE).properties}
        return cls(**{field.name: properties.get(names[field.name]) for field in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one application of one user holds, as GetUsage shows it: `bytes` and `lingering` in bytes."""

    uid: int
    application: str = ""
    buffers: int = 0
    bytes: int = 0
    lingering: int = 0
    refusals: int = 0

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one row of GetUsage. Raises BadReply on a wrong type, and without a uid."""
        row = typed(raw, contract.USAGE_TYPES)
        if "uid" not in row:
            raise BadReply("GetUsage: a row names no user.")
        return cls(**row)

    def as_dict(self) -> dict[str, Any]:
        """Return all by key: for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class RecoveredBuffer:
    """What Recover did with one buffer; None where that is not known. `size` in bytes."""

    buffer: str | None = None
    size: int | None = None
    kind: str | None = None
    name: str | None = None
    inode: int | None = None
    action: str | None = None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one row of Recover. Raises BadReply on a wrong type."""
        return cls(**typed(raw, contract.RECOVERED_TYPES))

    @property
    def id(self) -> str | None:
        """The buffer's id, where it is known."""
        return None if self.buffer is None else contract.buffer_id(self.buffer)

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by key, the id first: for JSON."""
        known = {"id": self.id, **dataclasses.asdict(self)}
        return {key: value for key, value in known.items() if value is not None}


def parse_properties(interface_name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return properties by name with plain values, those that the XML knows; Attachments as AttachmentInfo.

    Raises BadReply on a wrong type.
    """
    types = {name: known.signature for name, known in interface(interface_name).properties.items()}
    rows = raw.get("Attachments")
    properties = typed(raw, types)
    if "Attachments" in properties and isinstance(rows, Variant):
        properties["Attachments"] = tuple(AttachmentInfo.parse(row) for row in rows.value)
    return properties


def state_of(info: BufferInfo) -> State:
    """Return the state that `info` shows: only memory has a serial above 0, and then only what is evicted no inode."""
    if not info.serial:
        return State.EMPTY
    return State.EVICTED if info.kind == Kind.DMA_BUF and info.inode is None else State.BACKED


def _checked_planes(known: dict[str, Any]) -> dict[str, Any]:
    """Refuse planes that do not lie in the buffer, so that nobody after this has to."""
    offsets, strides, size = known.get("offsets", ()), known.get("strides", ()), known.get("size")
    if len(offsets) != len(strides):
        raise BadReply(f"offsets, strides: {len(offsets)} and {len(strides)} planes.")
    if size is not None and list(offsets) != sorted(offset for offset in offsets if offset < size):
        raise BadReply("offsets: not in order, or outside the buffer.")
    return known


def _snake(name: str) -> str:
    """Return a property's name as Python spells attributes: CallWindowUSec is call_window_usec."""
    words = name.replace("USec", "Usec")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in words).lstrip("_")
