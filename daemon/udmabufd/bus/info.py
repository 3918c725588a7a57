# SPDX-License-Identifier: MIT
"""The dictionaries that tell of things: `info` of a buffer, its attachments, and the rows of the lists."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from udmabufd.bus.values import wrap
from udmabufd.core.allocator import Allocator
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.device import Device
from udmabufd.core.pool import Explained
from udmabufd_base.codec import Variant
from udmabufd_client.contract import (
    ALLOCATOR_TYPES,
    ATTACHMENT_TYPES,
    CONSTRAINT_TYPES,
    DEVICE_TYPES,
    INFO_TYPES,
    LIST_TYPES,
    VERDICT_TYPES,
    buffer_path,
)

MODIFIER_LINEAR = 0
"""DRM_FORMAT_MOD_LINEAR of include/uapi/drm/drm_fourcc.h."""


def _value(member: StrEnum | None) -> str | None:
    """Return what is told of `member`, None for a key that does not apply."""
    return None if member is None else member.value


def _plain(buffer: Buffer) -> dict[str, Any]:
    request, memory = buffer.request, buffer.memory
    values: dict[str, Any] = {
        "size": buffer.size,
        "size_requested": request.size_requested,
        "kind": request.kind.value,
        "cache_requested": request.cache.value,
        "name": buffer.name,
    }
    if request.layout is not None:
        values |= {
            "width": request.width,
            "height": request.height,
            "format": request.format,
            "modifier": MODIFIER_LINEAR,
            "offsets": list(request.layout.offsets),
            "strides": list(request.layout.strides),
        }
    if memory is not None:
        values |= {"allocator": memory.allocator, "serial": buffer.serial, "needs_sync": True}
        # Of one that is evicted nobody has a descriptor, and the next one will be of other memory.
        if not buffer.evicted:
            values |= {
                "cache_effective": _value(memory.cache),
                "cache_evidence": _value(memory.evidence),
                "needs_sync": memory.needs_sync,
                "inode": memory.inode,
            }
    return values


def info(buffer: Buffer) -> dict[str, Variant]:
    """Return `info` of `buffer`; what only memory gives a value to is absent while it has none."""
    return wrap(_plain(buffer), INFO_TYPES)


def entry(buffer: Buffer) -> dict[str, Variant]:
    """Return the entry of `buffer` in ListBuffers; `references` is absent where the kernel counts none."""
    return wrap(
        {
            "buffer": buffer_path(buffer.id),
            **_plain(buffer),
            "state": buffer.state.value,
            "holders": len(buffer.shares),
            "references": None if buffer.memory is None else buffer.memory.references(),
            "charged": buffer.charged,
        },
        LIST_TYPES,
    )


def constraints(buffer: Buffer) -> dict[str, Variant]:
    """Return the merged constraints of `buffer`."""
    return wrap(buffer.request.merged.constraints.values(), CONSTRAINT_TYPES)


def attachments(buffer: Buffer, asking: Holder) -> list[dict[str, Variant]]:
    """Return the attachments of `buffer`, as `asking` sees them."""
    return [
        wrap(
            {
                "attachment": attachment.number,
                "device": attachment.wish.device,
                "dynamic": attachment.wish.dynamic,
                "pins": attachment.pins,
                "own": attachment.holder is asking,
            },
            ATTACHMENT_TYPES,
        )
        for attachment in buffer.attachments.values()
    ]


def verdict(of: Explained) -> dict[str, Variant]:
    """Return a row of Explain."""
    row: dict[str, Any] = {"allocator": of.allocator.name, "ok": not of.refusals}
    for refusal in of.refusals[:1]:
        row |= {
            "field": refusal.field,
            "device": refusal.device,
            "reason": refusal.reason,
            "remedy": refusal.remedy,
        }
    if not of.refusals:
        row |= {"cache_effective": _value(of.cache), "cache_evidence": _value(of.evidence)}
    return wrap(row, VERDICT_TYPES)


def device_row(device: Device) -> dict[str, Variant]:
    """Return a row of ListDevices."""
    return wrap(
        {
            "device": device.node or f"{device.subsystem}:{device.sysname}",
            "subsystem": device.subsystem,
            "label": device.label,
            "driver": device.driver,
            "dma_device": f"{device.dma_subsystem}:{device.dma_sysname}",
            "dma_mask_bits": device.dma_mask_bits,
            "iommu_group": device.iommu_group,
            "iommu_type": device.iommu_type,
            "numa_node": device.numa_node,
            "constraints": device.constraints.values(),
            "sources": dict(device.sources),
        },
        DEVICE_TYPES,
    )


def allocator_row(allocator: Allocator) -> dict[str, Variant]:
    """Return a row of ListAllocators."""
    capabilities, unavailable = allocator.capabilities, allocator.unavailable
    return wrap(
        {
            "allocator": allocator.name,
            "kind": capabilities.kind.value,
            "available": unavailable is None,
            "reason": None if unavailable is None else unavailable.reason,
            "max_size": allocator.max_size,
            "granule": capabilities.granule,
            "contiguous": capabilities.contiguous,
            "address_bits": capabilities.address_bits,
            "cache": _value(capabilities.cache),
            "caches": sorted(capabilities.obtainable),
            "cache_evidence": _value(capabilities.evidence),
            "accounting": capabilities.accounting.value,
            "free": allocator.free,
            "sources": dict(capabilities.sources),
        },
        ALLOCATOR_TYPES,
    )
