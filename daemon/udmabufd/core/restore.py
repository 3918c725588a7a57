# SPDX-License-Identifier: MIT
"""From the state and the stored descriptors of a former life of the service to its buffers.

What a kill has left between two steps is given its meaning here: descriptors without a record were handed to nobody, a
buffer without a share has ended, a share without a buffer is void, and a buffer whose descriptors did not come back is
lost. Times that run out are the service's matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from udmabufd.core import records
from udmabufd.core.attachments import reconsider
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.memory import Memory
from udmabufd.core.records import StoredAttachment, StoredBuffer, StoredMemory, StoredShare
from udmabufd.core.registry import Registry
from udmabufd.core.state import StateFile, Unreadable
from udmabufd.core.store import Store
from udmabufd.linux import fdstat, memfd
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd, close_all

log = logging.getLogger(__name__)

Inherited = dict[str, list[OwnedFd]]
"""Stored descriptors by name, owned by whoever has the dictionary."""


@dataclass(slots=True)
class Records:
    """What a state says, parsed."""

    bus: tuple[int, str] | None = None
    buffers: list[StoredBuffer] = field(default_factory=list)
    shares: list[StoredShare] = field(default_factory=list)
    attachments: list[StoredAttachment] = field(default_factory=list)


@dataclass(slots=True)
class Restored:
    """What came of it."""

    buffers: list[Buffer] = field(default_factory=list)
    holders: dict[str, Holder] = field(default_factory=dict)
    lost: list[StoredBuffer] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


def parse(state: StateFile, *, salvage: bool = False) -> Records:
    """Return the records of `state`. Raises Unreadable; to `salvage` is to pass over what makes no sense."""
    found = Records()
    for slot, record in state.records.items():
        try:
            match record.get("is"):
                case records.BUS:
                    found.bus = slot, records.bus_of(record)
                case records.BUFFER:
                    found.buffers.append(records.buffer_of(slot, record))
                case records.SHARE:
                    found.shares.append(records.share_of(slot, record))
                case records.ATTACHMENT:
                    found.attachments.append(records.attachment_of(slot, record))
                case other:
                    raise Unreadable(f"slot {slot} holds a record of the unknown kind {other!r}")
        except Unreadable as error:
            if not salvage:
                raise
            log.warning("A record is passed over: %s", error)
            state.erase(slot)
    found.buffers.sort(key=lambda buffer: buffer.order)
    found.shares.sort(key=lambda share: share.order)
    found.attachments.sort(key=lambda attachment: attachment.order)
    return found


def nobody(_name: str) -> Holder | None:
    """Know no holder."""
    return None


def restore(
    found: Records,
    registry: Registry,
    inherited: Inherited,
    store: Store,
    known: Callable[[str], Holder | None] = nobody,
) -> Restored:
    """Have `registry` adopt the buffers that `found` tells of, with their descriptors from `inherited`.

    Takes the descriptors that it needs; names that no record speaks of are left there and listed as orphans. `known`
    returns the holder of a connection that has called this run already.
    """
    result = Restored()
    shares: dict[str, list[StoredShare]] = {}
    for share in found.shares:
        shares.setdefault(share.buffer, []).append(share)
    attachments: dict[str, list[StoredAttachment]] = {}
    for attachment in found.attachments:
        attachments.setdefault(attachment.buffer, []).append(attachment)
    there = {stored.stored_as for stored in found.buffers if not stored.origin}
    for stored in found.buffers:
        if stored.origin and stored.stored_as in there:
            # The move that it is left of was cut off: the buffer has that memory still.
            registry.recorder.state.erase(stored.slot)
            continue
        memory = None
        if stored.memory is not None:
            memory = _find(stored.memory, inherited.pop(stored.stored_as, []))
            if memory is None:
                result.lost.append(stored)
                registry.recorder.state.erase(stored.slot)
                store.drop(stored.stored_as)
                continue
            # A renaming may have been cut off between the kernel's name and the record's; busy is busy.
            with suppress(OSError):
                memory.set_name(stored.name)
        buffer = _buffer(stored, memory)
        holders = []
        held = shares.pop(stored.id, [])
        if held:
            # An import had been recorded, and not yet that it brought the buffer back to life.
            buffer.ended = buffer.kept = False
        for share in held:
            holder = result.holders.get(share.holder) or known(share.holder) or Holder(share.holder, share.owner)
            result.holders[share.holder] = holder
            holders.append((holder, share.count, (share.slot, share.order)))
            if share.answered:
                buffer.answered.add(holder)
            if share.loose:
                buffer.loose.add(holder)
        registry.adopt(buffer, holders)
        _attach(registry, buffer, attachments.pop(stored.id, []), result.holders)
        if (buffer.ended, buffer.kept, buffer.attached) != (stored.ended, stored.kept, stored.attached):
            registry.record(buffer)
        result.buffers.append(buffer)
    for void_shares in shares.values():
        for share in void_shares:
            registry.recorder.state.erase(share.slot)
    for void in attachments.values():
        for attachment in void:
            registry.recorder.state.erase(attachment.slot)
    result.orphans = list(inherited)
    return result


def _attach(registry: Registry, buffer: Buffer, stored: list[StoredAttachment], holders: Mapping[str, Holder]) -> None:
    """Have `buffer` have its attachments again; one without a share of its holder ended with that share."""
    for attachment in stored:
        holder = holders.get(attachment.holder)
        if holder is None or holder not in buffer.shares:
            registry.recorder.state.erase(attachment.slot)
            continue
        record = attachment.slot, attachment.order
        registry.attachments.adopt(buffer, holder, attachment.wish, attachment.number, attachment.pins, record)
    reconsider(buffer)


def sort_descriptors(fds: list[OwnedFd]) -> tuple[list[OwnedFd], list[OwnedFd]]:
    """Return the memfds and the dma-bufs among descriptors of our own; consumes `fds`, closes what is neither."""
    memfds, dma_bufs = [], []
    for fd in fds:
        try:
            memfd.get_seals(fd.fileno())
        except OSError:
            dma_bufs.append(fd)
        else:
            memfds.append(fd)
    return memfds, dma_bufs


def _find(stored: StoredMemory, fds: list[OwnedFd]) -> Memory | None:
    """Return the memory whose descriptors are among `fds`, which are consumed; None if one is missing.

    The inode tells which is which; numbers of memfds and dma-bufs overlap, so they are told apart first.
    """
    memfds, dma_bufs = sort_descriptors(fds)
    own = _take(memfds, stored.memfd)
    exported = _take(dma_bufs, stored.dma_buf)
    close_all([*memfds, *dma_bufs])
    if (own is None) != (stored.memfd is None) or (exported is None) != (stored.dma_buf is None):
        close_all(fd for fd in (own, exported) if fd is not None)
        return None
    seen = exported or own
    assert seen is not None
    identity = fdstat.look(seen.fileno())
    return Memory(
        allocator=stored.allocator,
        size=stored.size,
        memfd=own,
        dma_buf=exported,
        device=identity.device,
        inode=identity.inode,
        cache=stored.cache,
        evidence=stored.evidence,
        needs_sync=stored.needs_sync,
        stored=True,
        accounting=stored.accounting,
        hold=_hold(stored, exported),
    )


def _hold(stored: StoredMemory, dma_buf: OwnedFd | None) -> Hold | None:
    """Return what keeps the pages, which nothing did since the former run ended but whoever uses them."""
    if not stored.held or dma_buf is None:
        return None
    try:
        return Hold(dma_buf.fileno(), stored.size)
    except OSError as error:
        log.error("The pages of a dma-buf of %s cannot be kept from being dropped: %s", stored.allocator, error)
        return None


def _take(fds: list[OwnedFd], inode: int | None) -> OwnedFd | None:
    for fd in fds:
        if fdstat.look(fd.fileno()).inode == inode:
            fds.remove(fd)
            return fd
    return None


def _buffer(stored: StoredBuffer, memory: Memory | None) -> Buffer:
    return Buffer(
        request=stored.request,
        payer=stored.payer,
        repeat=stored.repeat,
        id=stored.id,
        ticket=stored.ticket,
        name=stored.name,
        serial=stored.serial,
        memory=memory,
        ended=stored.ended,
        kept=stored.kept,
        awaited=stored.awaited,
        stored_as=stored.stored_as,
        attached=stored.attached,
        cut_off=stored.moving,
        called_off=stored.called_off,
        origin=stored.origin,
        order=stored.order,
        slot=stored.slot,
    )
