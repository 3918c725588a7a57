# SPDX-License-Identifier: MIT
"""What a caller asks for: the keys of `spec` and `constraints`, given their D-Bus types before anything is sent.

Checks keys and types only. Whether a value makes sense (a fourcc, a size, a contradiction) is the service's to say.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final, TypedDict

from udmabufd_base.codec import Variant
from udmabufd_client.contract import ATTACH_TYPES, CONSTRAINT_TYPES, MOVE_TYPES, SPEC_TYPES, WRAP_TYPES
from udmabufd_client.errors import InvalidSpec


class SpecKeys(TypedDict, total=False):
    """Keyword arguments of allocate(), allocate_many(), create() and explain(): the keys of `spec`.

    Either `size` (bytes) or `width`, `height` (pixels) and `format` (a DRM fourcc of four bytes, such as "XR24").
    `constraints` has the keys of contract.CONSTRAINT_KEYS; `devices` are device nodes, sysfs paths or subsystem:name.
    """

    size: int
    width: int
    height: int
    format: str
    name: str
    kind: str
    cache: str
    cache_policy: str
    constraints: Mapping[str, object]
    devices: Sequence[str]
    allocator: str
    request_id: str


_LIMITS: Final[dict[str, int]] = {"u": 2**32 - 1, "t": 2**64 - 1}
_WORDS: Final[dict[str, str]] = {
    "u": "an integer of 32 bits",
    "t": "an integer of 64 bits",
    "s": "a string",
    "b": "a bool",
    "as": "a list of strings",
    "a{sv}": "a mapping of keys to values",
}


def new_request_id() -> str:
    """Return a new random value for the key request_id: 128 bits in hexadecimal.

    With it a call that creates buffers can be repeated, by the client itself after a restart of the service or by its
    caller after any failure, and still creates no buffer twice. A new one for each set of buffers that is wanted.
    """
    return secrets.token_hex(16)


def marshal_spec(spec: Mapping[str, object] | None, keys: Mapping[str, object]) -> dict[str, Variant]:
    """Return `spec` and `keys` together as the `a{sv}` of the interface.

    A value of None stands for an absent key. Raises InvalidSpec naming the key that is unknown, given twice, of the
    wrong type or outside its type's range.
    """
    marshalled: dict[str, Variant] = {}
    for source in (spec or {}, keys):
        for key, value in _marshalled(source, SPEC_TYPES).items():
            if key in marshalled:
                raise InvalidSpec(f"{key}: given twice, in the mapping and as a keyword.")
            marshalled[key] = value
    return marshalled


def marshal_wrap(**options: object) -> dict[str, Variant]:
    """Return the options of WrapMemfd as its `a{sv}`; None stands for an absent key. Raises InvalidSpec."""
    return _marshalled(options, WRAP_TYPES)


def marshal_attach(**options: object) -> dict[str, Variant]:
    """Return the options of Attach as its `a{sv}`; None stands for an absent key. Raises InvalidSpec."""
    return _marshalled(options, ATTACH_TYPES)


def marshal_move(**options: object) -> dict[str, Variant]:
    """Return the options of Move as its `a{sv}`; None stands for an absent key. Raises InvalidSpec."""
    return _marshalled(options, MOVE_TYPES)


def marshal_ranges(ranges: Iterable[Sequence[object]]) -> list[list[int]]:
    """Return ranges (index, offset, size) as an `a(utt)`. Raises InvalidSpec naming the value that is none."""
    marshalled = []
    for number, given in enumerate(ranges):
        try:
            index, offset, size = given
        except (TypeError, ValueError):
            raise InvalidSpec(f"ranges[{number}]: must be (index into memfds, offset, size in bytes).") from None
        names = (f"ranges[{number}]: index", f"ranges[{number}]: offset", f"ranges[{number}]: size")
        marshalled.append(
            [int(_scalar(*item)) for item in zip(names, ("u", "t", "t"), (index, offset, size), strict=True)]
        )
    return marshalled


def check_count(count: object) -> int:
    """Return `count` as a D-Bus `u`. Raises InvalidSpec naming it."""
    return int(_scalar("count", "u", count))


def check_number(key: str, value: object) -> int:
    """Return `value` as a D-Bus `u`. Raises InvalidSpec naming `key`."""
    return int(_scalar(key, "u", value))


def check_text(key: str, value: object) -> str:
    """Return `value` as a D-Bus `s`. Raises InvalidSpec naming `key`."""
    return str(_scalar(key, "s", value))


def _marshalled(values: Mapping[str, object], types: Mapping[str, str], prefix: str = "") -> dict[str, Variant]:
    """Return `values` with the types of a table of the contract. Raises InvalidSpec naming the key after `prefix`."""
    marshalled: dict[str, Variant] = {}
    for key, value in values.items():
        if key not in types:
            raise InvalidSpec(f"{prefix}{key}: no such key; there are {', '.join(types)}.")
        if value is not None:
            marshalled[key] = Variant(types[key], _value(prefix + key, types[key], value))
    return marshalled


def _value(key: str, signature: str, value: object) -> Any:
    if signature == "a{sv}":
        # The one dictionary in another one is that of constraints.
        if not isinstance(value, Mapping):
            raise _not(key, signature, value)
        return _marshalled(value, CONSTRAINT_TYPES, f"{key}.")
    if signature == "as":
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise _not(key, signature, value)
        # A set has no order, and the same request must be the same message each time.
        items = sorted(value, key=str) if isinstance(value, Set) else value
        return [_scalar(f"{key}[{number}]", "s", item) for number, item in enumerate(items)]
    if signature == "b":
        if not isinstance(value, bool):
            raise _not(key, signature, value)
        return value
    return _scalar(key, signature, value)


def _not(key: str, signature: str, value: object) -> InvalidSpec:
    return InvalidSpec(f"{key}: must be {_WORDS[signature]}, not {type(value).__name__}.")


def _scalar(key: str, signature: str, value: object) -> int | str:
    if signature == "s":
        if not isinstance(value, str):
            raise _not(key, signature, value)
        # A str subclass (an enum) travels as its plain value; what UTF-8 or D-Bus cannot carry never leaves.
        text = str.__str__(value)
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InvalidSpec(f"{key}: holds a character that D-Bus strings cannot carry.")
        return text
    try:
        # bool is an int to Python and a different type to D-Bus.
        number = operator.index(value) if not isinstance(value, bool) else None  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise _not(key, signature, value)
    if not 0 <= number <= _LIMITS[signature]:
        raise InvalidSpec(f"{key}: {number} is outside 0..{_LIMITS[signature]}.")
    return number
