# SPDX-License-Identifier: MIT
"""What a caller asks for: `spec` checked for range and contradiction, and turned into sizes.

D-Bus types were checked before (bus/values.py); which allocator can serve is the pool's decision.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from udmabufd.core.errors import InvalidSpec
from udmabufd.core.layout import FORMATS, Layout, linear
from udmabufd_client.contract import MEMFD, NAME_MAX, WRAPPED, Cache, CachePolicy, Kind

PAGE_SIZE = mmap.PAGESIZE

_NAME = re.compile(r"[\x20-\x7e]+")
_ALLOCATOR = re.compile(r"udmabuf(-2M|-1G)?|memfd|wrapped|(heap|dumb):[\x21-\x7e]{1,64}")

MAX_SIZE = (1 << 63) - PAGE_SIZE
"""Bytes: the largest file that off_t can describe, in whole pages."""

_Choice = TypeVar("_Choice", bound=StrEnum)


def check_name(key: str, name: str) -> str:
    """Return `name` if the kernel can carry it and a listing can show it. Raises InvalidSpec naming `key`."""
    if not 1 <= len(name) <= NAME_MAX:
        raise InvalidSpec(key, f"must have 1 to {NAME_MAX} bytes, not {len(name.encode())}")
    if not _NAME.fullmatch(name):
        raise InvalidSpec(key, "may only have bytes 0x20 to 0x7e")
    return name


@dataclass(frozen=True, slots=True)
class Request:
    """A checked `spec`. `size` is bytes in whole pages; `size_requested` bytes before rounding up."""

    size: int
    size_requested: int
    width: int | None
    height: int | None
    format: str | None
    layout: Layout | None
    name: str | None
    kind: Kind
    cache: Cache
    cache_policy: CachePolicy
    allocator: str | None

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Request:
        """Check `spec`, whose keys and value types are known to be right. Raises InvalidSpec naming the key."""
        kind = _choice(spec, "kind", Kind.DMA_BUF)
        layout, size_requested = _geometry(spec)
        if size_requested > MAX_SIZE:
            key = "size" if layout is None else "height"
            raise InvalidSpec(key, f"makes a buffer of {size_requested} bytes; the largest possible is {MAX_SIZE}")
        return cls(
            size=-(-size_requested // PAGE_SIZE) * PAGE_SIZE,
            size_requested=size_requested,
            width=spec.get("width"),
            height=spec.get("height"),
            format=spec.get("format"),
            layout=layout,
            name=check_name("name", spec["name"]) if "name" in spec else None,
            kind=kind,
            cache=_choice(spec, "cache", Cache.CACHED),
            cache_policy=_choice(spec, "cache_policy", CachePolicy.PREFER),
            allocator=_allocator(spec, kind),
        )

    def wrapping(self) -> Request:
        """Return the same request for memory that the caller brings."""
        return replace(self, allocator=WRAPPED)


def _geometry(spec: Mapping[str, Any]) -> tuple[Layout | None, int]:
    """Return the layout, if any, and the bytes asked for."""
    picture = [key for key in ("width", "height", "format") if key in spec]
    if "size" in spec:
        if picture:
            raise InvalidSpec("size", f"contradicts {picture[0]}; give either size or width, height and format")
        if spec["size"] < 1:
            raise InvalidSpec("size", "must be at least 1 byte, not 0")
        return None, spec["size"]
    for key in ("width", "height", "format"):
        if key not in spec:
            missing = key if picture else "size"
            raise InvalidSpec(missing, "is missing; give either size or width, height and format")
    for key in ("width", "height"):
        if spec[key] < 1:
            raise InvalidSpec(key, "must be at least 1 pixel, not 0")
    fourcc = spec["format"]
    if fourcc not in FORMATS:
        raise InvalidSpec("format", f"{fourcc[:8]!r} is not one of the known linear fourccs, such as 'XR24' or 'NV12'")
    layout = linear(fourcc, spec["width"], spec["height"])
    return layout, layout.size


def _choice(spec: Mapping[str, Any], key: str, default: _Choice) -> _Choice:
    if key not in spec:
        return default
    choices = type(default)
    try:
        return choices(spec[key])
    except ValueError:
        raise InvalidSpec(key, f"must be one of {', '.join(choices)}") from None


def _allocator(spec: Mapping[str, Any], kind: Kind) -> str | None:
    name = spec.get("allocator")
    if name is None:
        return None
    if not isinstance(name, str) or not _ALLOCATOR.fullmatch(name):
        raise InvalidSpec("allocator", "is no allocator name, such as 'udmabuf' or 'memfd'")
    if (name == MEMFD) != (kind is Kind.MEMFD):
        raise InvalidSpec("allocator", f"{name!r} contradicts kind {kind!s}")
    return name
