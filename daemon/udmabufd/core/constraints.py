# SPDX-License-Identifier: MIT
"""What memory must be like for a device, as a value, and what several devices together demand.

Only the algebra: which allocator suits is judged in matching.py, what sizes and layouts follow is the spec's, and who
demands what is told by the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Final

from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec
from udmabufd_client.contract import CONSTRAINT_KEYS, CONSTRAINT_TYPES, DUMB_PREFIX, HEAP_PREFIX, Cache

ALLOCATOR_NAME: Final = re.compile(r"udmabuf(-2M|-1G)?|memfd|wrapped|(heap|dumb):[!#-)+-\[\]-~]{1,64}")
"""The name of one allocator. A heap or card has no '*' in its name, which stands for all of them, nor what JSON would
escape, so that a name takes as many bytes in a record as it has characters."""

MAX_ALLOCATORS: Final = 16
MAX_ALLOCATORS_CHARACTERS: Final = 160
"""What one demand may name, all names together: records have a fixed size. A merge of patterns with names may have
more, at most as much as both."""

_PATTERNS: Final = {f"{prefix}*": prefix for prefix in (HEAP_PREFIX, DUMB_PREFIX)}

_MAX: Final = {"u": (1 << 32) - 1, "t": (1 << 64) - 1}


@dataclass(frozen=True, slots=True)
class Constraints:
    """What memory must be like, in normal form: equal demands are equal values. The fields are keys of the contract's
    CONSTRAINT_KEYS, in their units; None, an alignment of 1 and a padding of 0 demand nothing.

    `contiguous` has no field: it is max_segments 1. An allocator that a pattern in `allocators` covers is left out.
    """

    address_bits: int | None = None
    alignment: int = 1
    size_alignment: int = 1
    tail_padding: int = 0
    stride_alignment: int = 1
    height_alignment: int = 1
    max_stride: int | None = None
    max_segments: int | None = None
    max_segment_size: int | None = None
    segment_boundary: int | None = None
    cache: frozenset[Cache] | None = None
    allocators: frozenset[str] | None = None

    @property
    def contiguous(self) -> bool:
        """Whether the memory must be one physically contiguous run."""
        return self.max_segments == 1

    @classmethod
    def from_values(cls, values: Mapping[str, Any], key: str = "constraints") -> Constraints:
        """Return what `values` demand: keys, types and units of CONSTRAINT_KEYS, in any order.

        Raises InvalidSpec naming `key`.<the key at fault>: unknown, of another type, out of range, in contradiction to
        another, or a set that is empty, too large, or has an unknown member.
        """
        checked = {name: _check(f"{key}.{name}", name, value) for name, value in values.items()}
        if checked.pop("contiguous", False):
            checked["max_segments"] = 1
        constraints = cls(**checked)
        if constraints.max_stride is not None and constraints.stride_alignment > constraints.max_stride:
            raise InvalidSpec(
                f"{key}.max_stride",
                f"{constraints.max_stride} contradicts the stride_alignment of {constraints.stride_alignment}",
            )
        return constraints

    def values(self) -> dict[str, Any]:
        """Return what is demanded, in the contract's keys, order and types; sets as sorted lists."""
        demanded: dict[str, Any] = {}
        for key in CONSTRAINT_KEYS:
            if key == "contiguous":
                if self.contiguous:
                    demanded[key] = True
            elif (value := getattr(self, key)) != _ABSENT[key]:
                demanded[key] = sorted(map(str, value)) if isinstance(value, frozenset) else value
        return demanded


_ABSENT: Final[dict[str, Any]] = {field.name: field.default for field in fields(Constraints)}

NONE: Final = Constraints()
"""Demands nothing."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Constraints, and whose they are: a device, or "spec" for those that the caller named without one."""

    device: str
    constraints: Constraints


@dataclass(frozen=True, slots=True)
class Merged:
    """What all demands together come to. `by` has, for each key of constraints.values(), whose demand decides it.

    That is the strictest, the earliest of equals. Where no demand alone is as strict as all of them together, it is
    those that make it so, in order, joined by " and ".
    """

    constraints: Constraints
    by: Mapping[str, str]


_NOTHING: Final = Merged(NONE, {})


def merge(demands: Iterable[Demand]) -> Merged:
    """Return the constraints that suit every one of `demands`, in the order in which they were made.

    Raises IncompatibleConstraints naming the first key, in the contract's order, for which nothing does, and two
    devices whose demands exclude each other.
    """
    # Most requests demand nothing.
    demands = tuple(demand for demand in demands if demand.constraints != NONE)
    if not demands:
        return _NOTHING
    merged: dict[str, Any] = {}
    by: dict[str, str] = {}
    for key, absent in _ABSENT.items():
        values = [
            (demand.device, value) for demand in demands if (value := getattr(demand.constraints, key)) != absent
        ]
        if values:
            merged[key], by[key] = _decide(key, values)
    if merged.get("max_segments") == 1:
        by["contiguous"] = by["max_segments"]
    constraints = Constraints(**merged)
    if constraints.max_stride is not None and constraints.stride_alignment > constraints.max_stride:
        devices = by["stride_alignment"], by["max_stride"]
        raise IncompatibleConstraints(
            "max_stride",
            devices,
            f"{constraints.max_stride} bytes, demanded by {devices[1]}, are less than the stride_alignment of "
            f"{constraints.stride_alignment} demanded by {devices[0]}",
        )
    return Merged(constraints, {key: by[key] for key in CONSTRAINT_KEYS if key in by})


def accepts(allocators: frozenset[str], name: str) -> bool:
    """Return whether the set of names and patterns has the allocator `name`."""
    return name in allocators or any(
        pattern in allocators and name.startswith(prefix) for pattern, prefix in _PATTERNS.items()
    )


_Combine = Callable[[Any, Any], Any]
"""Returns the value that suits two demands, None if none does. Commutative, associative, idempotent."""


def _minimum(one: int, other: int) -> int:
    return min(one, other)


def _maximum(one: int, other: int) -> int:
    return max(one, other)


def _common_multiple(key: str) -> _Combine:
    largest = _MAX[CONSTRAINT_TYPES[key]]

    def combine(one: int, other: int) -> int | None:
        multiple = math.lcm(one, other)
        return multiple if multiple <= largest else None

    return combine


def _common_caches(one: frozenset[Cache], other: frozenset[Cache]) -> frozenset[Cache] | None:
    return one & other or None


def _common_allocators(one: frozenset[str], other: frozenset[str]) -> frozenset[str] | None:
    return (
        frozenset({name for name in one if accepts(other, name)} | {name for name in other if accepts(one, name)})
        or None
    )


_RULES: Final[dict[str, _Combine]] = {
    "address_bits": _minimum,
    "alignment": _common_multiple("alignment"),
    "size_alignment": _common_multiple("size_alignment"),
    "tail_padding": _maximum,
    "stride_alignment": _common_multiple("stride_alignment"),
    "height_alignment": _common_multiple("height_alignment"),
    "max_stride": _minimum,
    "max_segments": _minimum,
    "max_segment_size": _minimum,
    "segment_boundary": _minimum,
    "cache": _common_caches,
    "allocators": _common_allocators,
}


def _decide(key: str, values: Sequence[tuple[str, Any]]) -> tuple[Any, str]:
    """Return what all `values` (each with its device) come to, and whose decide that."""
    combine = _RULES[key]
    # Those that made it stricter, in order. Each at least doubles a multiple or shrinks a set, so that they are few,
    # however many the demands are.
    deciders: list[tuple[str, Any]] = []
    result: Any = None
    for device, value in values:
        stricter = value if result is None else combine(result, value)
        if stricter is None:
            raise _incompatible(key, values, deciders, (device, value))
        if stricter != result:
            deciders.append((device, value))
            result = stricter
    alone = next((device for device, value in values if value == result), None)
    if alone is not None:
        return result, alone
    for decider in tuple(deciders):
        others = [value for other, value in deciders if (other, value) != decider]
        if others and reduce(combine, others) == result:
            deciders.remove(decider)
    return result, _names(deciders)


def _incompatible(
    key: str, values: Sequence[tuple[str, Any]], deciders: Sequence[tuple[str, Any]], last: tuple[str, Any]
) -> IncompatibleConstraints:
    """Return the error for `last`, which does not suit those before it: the earliest that excludes it, or, where only
    several together do, all of those.
    """
    device, value = last
    earliest = next(((other, theirs) for other, theirs in values if _RULES[key](theirs, value) is None), None)
    excluding = deciders if earliest is None else [earliest]
    devices = _names(excluding), device
    theirs = " and ".join(_shown(v) for _, v in excluding)
    if isinstance(value, frozenset):
        reason = f"{theirs}, demanded by {devices[0]}, and {_shown(value)}, demanded by {device}, have none in common"
    else:
        reason = (
            f"the least common multiple of {theirs}, demanded by {devices[0]}, and {value}, demanded by {device}, "
            f"exceeds {_MAX[CONSTRAINT_TYPES[key]]}"
        )
    return IncompatibleConstraints(key, devices, reason)


def _names(values: Iterable[tuple[str, Any]]) -> str:
    return " and ".join(dict.fromkeys(device for device, _ in values))


def _shown(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, frozenset) else str(value)


def _check(key: str, name: str, value: Any) -> Any:
    """Return the value of one key in normal form. Raises InvalidSpec naming `key`."""
    match CONSTRAINT_TYPES.get(name):
        case None:
            raise InvalidSpec(key, f"is none of the constraints {', '.join(CONSTRAINT_KEYS)}")
        case "b":
            if not isinstance(value, bool):
                raise InvalidSpec(key, "must be true or false")
            return value
        case "as":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise InvalidSpec(key, "must be a list of names")
            return _caches(key, value) if name == "cache" else _allocators(key, value)
        case type_:
            return _number(key, name, value, _MAX[type_])


def _number(key: str, name: str, value: Any, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidSpec(key, "must be a whole number")
    least, most = (0 if name == "tail_padding" else 1), (64 if name == "address_bits" else largest)
    if not least <= value <= most:
        raise InvalidSpec(key, f"must be {least} to {most}, not {value}")
    if name == "segment_boundary" and value & (value - 1):
        raise InvalidSpec(key, f"must be a power of two, not {value}")
    return value


def _caches(key: str, names: Sequence[Any]) -> frozenset[Cache]:
    if not names:
        raise InvalidSpec(key, "is empty, which no memory could be; leave it out to accept any")
    try:
        return frozenset(map(Cache, names))
    except ValueError:
        raise InvalidSpec(key, f"may only name {', '.join(Cache)}") from None


def _allocators(key: str, names: Sequence[Any]) -> frozenset[str]:
    if not names:
        raise InvalidSpec(key, "is empty, which no allocator could meet; leave it out to accept any")
    if len(names) > MAX_ALLOCATORS:
        raise InvalidSpec(key, f"may name at most {MAX_ALLOCATORS} allocators, not {len(names)}")
    for name in names:
        if not isinstance(name, str) or not (name in _PATTERNS or ALLOCATOR_NAME.fullmatch(name)):
            raise InvalidSpec(
                key,
                f"{str(name)[:80]!r} is no allocator name, such as 'udmabuf' or 'heap:system', nor heap:* or dumb:*",
            )
    if (length := sum(map(len, names))) > MAX_ALLOCATORS_CHARACTERS:
        raise InvalidSpec(key, f"may have at most {MAX_ALLOCATORS_CHARACTERS} characters, not {length}")
    given = frozenset(names)
    return frozenset(name for name in given if name in _PATTERNS or not accepts(given & _PATTERNS.keys(), name))
