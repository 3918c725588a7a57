# SPDX-License-Identifier: MIT
"""What the state says of buffers and shares, as records, and back.

Keys may be added: a reader passes over those that it does not know, and takes a default for those that an older
writer did not have. What is missing without a default, or is no such value, makes the state unreadable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from udmabufd.core.attachments import Attachment, Wish
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.constraints import Constraints
from udmabufd.core.errors import InvalidSpec
from udmabufd.core.layout import Layout
from udmabufd.core.ledger import Owner
from udmabufd.core.memory import Accounting
from udmabufd.core.spec import Request
from udmabufd.core.state import Unreadable
from udmabufd_client.contract import MEMFD, WRAPPED, Cache, CacheEvidence, CachePolicy, Kind

BUS: Final = "bus"
BUFFER: Final = "buffer"
SHARE: Final = "share"
ATTACHMENT: Final = "attachment"
"""Kinds of records, in their key `is`."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredMemory:
    """Which descriptors of the store are the memory of a buffer; inode numbers, None for a part that it has not."""

    allocator: str
    size: int
    memfd: int | None
    dma_buf: int | None
    cache: Cache | None
    evidence: CacheEvidence | None
    needs_sync: bool
    accounting: Accounting
    held: bool


@dataclass(frozen=True, slots=True)
class StoredBuffer:
    """A buffer as its record has it."""

    slot: int
    order: int
    id: str
    ticket: str
    name: str
    payer: Owner
    request: Request
    repeat: Repeat | None
    serial: int
    ended: bool
    kept: bool
    awaited: float
    stored_as: str
    attached: int
    moving: int
    called_off: int
    origin: str
    memory: StoredMemory | None


@dataclass(frozen=True, slots=True)
class StoredShare:
    """A connection's shares of a buffer as their record has them."""

    slot: int
    order: int
    buffer: str
    holder: str
    owner: Owner
    count: int
    answered: bool
    loose: bool


@dataclass(frozen=True, slots=True)
class StoredAttachment:
    """An attachment as its record has it."""

    slot: int
    order: int
    buffer: str
    holder: str
    number: int
    wish: Wish
    pins: int


def of_buffer(buffer: Buffer, order: int) -> dict[str, Any]:
    """Return the record of `buffer`."""
    request, memory, repeat = buffer.request, buffer.memory, buffer.repeat
    layout = request.layout
    record: dict[str, Any] = {
        "is": BUFFER,
        "order": order,
        "id": buffer.id,
        "ticket": buffer.ticket,
        "name": buffer.name,
        "payer": list(buffer.payer),
        "serial": buffer.serial,
        "stored_as": buffer.stored_as,
        "attached": buffer.attached,
        "request": {
            "size": request.size,
            "size_requested": request.size_requested,
            "width": request.width,
            "height": request.height,
            "format": request.format,
            "layout": None if layout is None else [layout.offsets, layout.strides, layout.size],
            "name": request.name,
            "kind": request.kind,
            "cache": request.cache,
            "cache_policy": request.cache_policy,
            "allocator": request.allocator,
            "constraints": request.constraints.values(),
        },
    }
    rare = {
        "ended": buffer.ended,
        "kept": buffer.kept,
        "awaited": round(buffer.awaited, 3),
        "moving": buffer.moving or buffer.cut_off,
        "called_off": buffer.called_off,
        "origin": buffer.origin,
    }
    # The longest records are nearly as long as can be.
    record.update({key: value for key, value in rare.items() if value})
    if memory is not None:
        record["memory"] = {
            "allocator": memory.allocator,
            "size": memory.size,
            "memfd": memory.memfd_inode,
            "dma_buf": None if memory.dma_buf is None else memory.inode,
            "cache": memory.cache,
            "evidence": memory.evidence,
            "needs_sync": memory.needs_sync,
            "accounting": memory.accounting,
            "held": memory.hold is not None,
        }
    if repeat is not None:
        record["repeat"] = [list(repeat.owner), *dataclasses.astuple(repeat)[1:]]
    return record


def of_share(buffer: Buffer, holder: Holder, order: int) -> dict[str, Any]:
    """Return the record of the shares that `holder` has of `buffer`."""
    return {
        "is": SHARE,
        "order": order,
        "buffer": buffer.id,
        "holder": holder.name,
        "owner": list(holder.owner),
        "count": buffer.shares[holder],
        "answered": holder in buffer.answered,
        "loose": holder in buffer.loose,
    }


def of_attachment(buffer: Buffer, attachment: Attachment, order: int) -> dict[str, Any]:
    """Return the record of `attachment`."""
    wish = attachment.wish
    return {
        "is": ATTACHMENT,
        "order": order,
        "buffer": buffer.id,
        "holder": attachment.holder.name,
        "number": attachment.number,
        "device": wish.device,
        "path": wish.path,
        "constraints": wish.constraints.values(),
        "dynamic": wish.dynamic,
        "pins": attachment.pins,
    }


def of_bus(bus_id: str) -> dict[str, Any]:
    """Return the record of the bus whose connections hold the shares."""
    return {"is": BUS, "id": bus_id}


def bus_of(record: Mapping[str, Any]) -> str:
    """Return the bus's id."""
    return _parse(lambda: str(record["id"]))


def buffer_of(slot: int, record: Mapping[str, Any]) -> StoredBuffer:
    """Return the buffer. Raises Unreadable."""
    return _parse(lambda: _buffer_of(slot, record))


def share_of(slot: int, record: Mapping[str, Any]) -> StoredShare:
    """Return the shares. Raises Unreadable."""
    return _parse(
        lambda: StoredShare(
            slot,
            int(record["order"]),
            str(record["buffer"]),
            str(record["holder"]),
            _owner(record["owner"]),
            int(record["count"]),
            bool(record.get("answered", True)),
            # An older state does not tell who has descriptors: perhaps everybody.
            bool(record.get("loose", True)),
        )
    )


def attachment_of(slot: int, record: Mapping[str, Any]) -> StoredAttachment:
    """Return the attachment. Raises Unreadable."""
    return _parse(
        lambda: StoredAttachment(
            slot,
            int(record["order"]),
            str(record["buffer"]),
            str(record["holder"]),
            int(record["number"]),
            Wish(
                str(record["device"]),
                str(record["path"]),
                Constraints.from_values(record["constraints"]),
                bool(record["dynamic"]),
            ),
            int(record["pins"]),
        )
    )


def _parse(parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (KeyError, TypeError, ValueError, AttributeError, InvalidSpec) as error:
        raise Unreadable(f"a record does not make sense ({type(error).__name__}: {error})") from error


def _buffer_of(slot: int, record: Mapping[str, Any]) -> StoredBuffer:
    memory = record.get("memory")
    repeat = record.get("repeat")
    return StoredBuffer(
        slot=slot,
        order=int(record["order"]),
        id=str(record["id"]),
        ticket=str(record["ticket"]),
        name=str(record["name"]),
        payer=_owner(record["payer"]),
        request=_request(record["request"]),
        repeat=None if repeat is None else Repeat(_owner(repeat[0]), *repeat[1:]),
        serial=int(record["serial"]),
        ended=bool(record.get("ended", False)),
        kept=bool(record.get("kept", False)),
        awaited=float(record.get("awaited", 0.0)),
        stored_as=str(record["stored_as"]),
        attached=int(record.get("attached", 0)),
        moving=int(record.get("moving", 0)),
        called_off=int(record.get("called_off", 0)),
        origin=str(record.get("origin", "")),
        memory=None
        if memory is None
        else StoredMemory(
            allocator=str(memory["allocator"]),
            size=int(memory.get("size", record["request"]["size"])),
            memfd=memory["memfd"],
            dma_buf=memory["dma_buf"],
            cache=None if memory["cache"] is None else Cache(memory["cache"]),
            evidence=None if memory["evidence"] is None else CacheEvidence(memory["evidence"]),
            needs_sync=bool(memory["needs_sync"]),
            accounting=_accounting(memory),
            held=bool(memory.get("held", False)),
        ),
    )


def _request(record: Mapping[str, Any]) -> Request:
    layout = record["layout"]
    return Request(
        size=int(record["size"]),
        size_requested=int(record["size_requested"]),
        width=record["width"],
        height=record["height"],
        format=record["format"],
        layout=None if layout is None else Layout(tuple(layout[0]), tuple(layout[1]), layout[2]),
        name=record["name"],
        kind=Kind(record["kind"]),
        cache=Cache(record["cache"]),
        cache_policy=CachePolicy(record["cache_policy"]),
        allocator=record["allocator"],
        constraints=Constraints.from_values(record.get("constraints", {})),
    )


def _accounting(memory: Mapping[str, Any]) -> Accounting:
    # Older states know only udmabuf, memfd and wrapped.
    older = Accounting.CLIENT if memory["allocator"] in (MEMFD, WRAPPED) else Accounting.SERVICE
    return Accounting(memory.get("accounting", older))


def _owner(value: Any) -> Owner:
    uid, application = value
    return Owner(int(uid), str(application))
