# SPDX-License-Identifier: MIT
"""What a caller asks for: `spec` checked for range and contradiction, and turned into sizes.

D-Bus types were checked before (bus/values.py); which allocator can serve is the pool's decision.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

from udmabufd.core.constraints import ALLOCATOR_NAME, NONE, Constraints, Demand, Merged, merge
from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec
from udmabufd.core.layout import FORMATS, STRIDE_ALIGNMENT, Layout, linear
from udmabufd_client.contract import MEMFD, NAME_MAX, WRAPPED, Cache, CachePolicy, Kind

PAGE_SIZE = mmap.PAGESIZE

_NAME = re.compile(r"[\x20-\x7e]+")

MAX_SIZE = (1 << 63) - PAGE_SIZE
"""Bytes: the largest file that off_t can describe, in whole pages."""

SPEC: Final = "spec"
"""Whose demands those of spec.constraints are."""

_Choice = TypeVar("_Choice", bound=StrEnum)


def check_name(key: str, name: str) -> str:
    """Return `name` if the kernel can carry it and a listing can show it. Raises InvalidSpec naming `key`."""
    if not 1 <= len(name) <= NAME_MAX:
        raise InvalidSpec(key, f"must have 1 to {NAME_MAX} bytes, not {len(name.encode())}")
    if not _NAME.fullmatch(name):
        raise InvalidSpec(key, "may only have bytes 0x20 to 0x7e")
    return name


def check_allocator(name: str, kind: Kind) -> str:
    """Return `name` if an allocator of `kind` may be called so. Raises InvalidSpec naming the key `allocator`."""
    if not ALLOCATOR_NAME.fullmatch(name):
        raise InvalidSpec("allocator", "is no allocator name, such as 'udmabuf' or 'memfd'")
    if (name == MEMFD) != (kind is Kind.MEMFD):
        raise InvalidSpec("allocator", f"{name!r} contradicts kind {kind!s}")
    return name


@dataclass(frozen=True, slots=True)
class Request:
    """A checked `spec`, under the demands of the devices that are to use the buffer.

    `size` is the bytes that the memory must have, in whole pages, `size_requested` those asked for, by size or as a
    picture that no device demands anything of. `constraints` are the spec's own, `merged` those and the devices'.
    """

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
    constraints: Constraints = NONE
    merged: Merged = field(default_factory=lambda: merge(()))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Request:
        """Check `spec`, whose keys and value types are known to be right. Raises InvalidSpec naming the key,
        IncompatibleConstraints.
        """
        kind = _choice(spec, "kind", Kind.DMA_BUF)
        layout, size_requested = _geometry(spec)
        request = cls(
            size=size_requested,
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
            constraints=Constraints.from_values(spec.get("constraints", {})),
        )
        return request.under(())

    def under(self, demands: Iterable[Demand]) -> Request:
        """Return the same request for memory that suits `demands` too. Raises IncompatibleConstraints, InvalidSpec."""
        merged = self.merge(demands)
        wanted, layout = merged.constraints, self.layout
        if self.format is not None:
            assert self.width is not None
            assert self.height is not None
            layout = linear(
                self.format,
                self.width,
                self.height,
                stride_alignment=math.lcm(STRIDE_ALIGNMENT, wanted.stride_alignment),
                height_alignment=wanted.height_alignment,
            )
            longest = max(layout.strides)
            if wanted.max_stride is not None and longest > wanted.max_stride:
                device = merged.by["max_stride"]
                raise IncompatibleConstraints(
                    "max_stride",
                    (device, SPEC),
                    f"{device} takes rows of {wanted.max_stride} bytes at most, and those of spec, {self.width} "
                    f"pixels of {self.format}, have {longest}",
                )
        step = math.lcm(wanted.size_alignment, PAGE_SIZE)
        size = -(-_needed(self.size_requested, layout, wanted) // step) * step
        if size > MAX_SIZE:
            key = "constraints" if self.size_requested <= MAX_SIZE else "size" if layout is None else "height"
            raise InvalidSpec(key, f"makes a buffer of {size} bytes; the largest possible is {MAX_SIZE}")
        return replace(self, size=size, layout=layout, merged=merged)

    def merge(self, demands: Iterable[Demand]) -> Merged:
        """Return the spec's own demands and `demands` together. Raises IncompatibleConstraints."""
        return merge((Demand(SPEC, self.constraints), *demands))

    def grown(self, size: int, demands: Iterable[Demand]) -> Request:
        """Return the same request for memory of at least `size` bytes that suits `demands` too, in which everything
        stays where it is laid out. Raises IncompatibleConstraints; misfit() tells what could not be met.
        """
        merged = self.merge(demands)
        step = math.lcm(merged.constraints.size_alignment, PAGE_SIZE)
        needed = max(size, self._ends(merged.constraints)[-1] + merged.constraints.tail_padding)
        return replace(self, size=-(-needed // step) * step, merged=merged)

    def _ends(self, wanted: Constraints) -> list[int]:
        """Return where each plane ends whose rows are padded as `wanted`, or where the bytes asked for do."""
        if self.layout is None or self.format is None or self.height is None:
            return [self.size_requested]
        rows = -(-self.height // wanted.height_alignment) * wanted.height_alignment
        planes = zip(FORMATS[self.format], self.layout.offsets, self.layout.strides, strict=True)
        return [offset + stride * plane.rows(rows) for plane, offset, stride in planes]

    def misfit(self, size: int, merged: Merged) -> str | None:
        """Return the first key of `merged` that memory of `size` bytes, laid out as this request is, does not meet, or
        None.
        """
        wanted, layout, ends = merged.constraints, self.layout, self._ends(merged.constraints)
        if layout is not None:
            if any(stride % wanted.stride_alignment for stride in layout.strides):
                return "stride_alignment"
            if wanted.max_stride is not None and max(layout.strides) > wanted.max_stride:
                return "max_stride"
            if any(end > limit for end, limit in zip(ends, (*layout.offsets[1:], size), strict=True)):
                return "height_alignment"
        if ends[-1] + wanted.tail_padding > size:
            return "tail_padding"
        return "size_alignment" if size % wanted.size_alignment else None

    def canonical(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return `spec`, which this was made from, with its constraints such that equal demands are equal values."""
        return {**spec, "constraints": self.constraints.values()} if "constraints" in spec else dict(spec)

    def wrapping(self) -> Request:
        """Return the same request for memory that the caller brings."""
        return replace(self, allocator=WRAPPED)


def _needed(size_requested: int, layout: Layout | None, wanted: Constraints) -> int:
    return (size_requested if layout is None else layout.size) + wanted.tail_padding


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
    return None if name is None else check_allocator(name, kind)
