# SPDX-License-Identifier: MIT
"""The dictionaries that tell of a buffer: `info`, and an entry of ListBuffers."""

from __future__ import annotations

from typing import Any

from udmabufd.bus.values import wrap
from udmabufd.core.buffer import Buffer
from udmabufd_base.codec import Variant
from udmabufd_client.contract import INFO_TYPES, LIST_TYPES, buffer_path

MODIFIER_LINEAR = 0
"""DRM_FORMAT_MOD_LINEAR of include/uapi/drm/drm_fourcc.h."""


def _plain(buffer: Buffer) -> dict[str, Any]:
    request, memory = buffer.request, buffer.memory
    values: dict[str, Any] = {
        "size": request.size,
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
        values |= {
            "allocator": memory.allocator,
            "cache_effective": memory.cache.value,
            "cache_evidence": memory.evidence.value,
            "needs_sync": memory.needs_sync,
            "serial": buffer.serial,
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
