# SPDX-License-Identifier: MIT
"""What a caller asks for: the keys of `spec`, checked and given their D-Bus types before anything is sent.

Checks keys and types only. Whether a value makes sense (a fourcc, a size, a contradiction) is the service's to say.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypedDict

from udmabufd_base.codec import Variant
from udmabufd_client.contract import SPEC_TYPES, WRAP_TYPES
from udmabufd_client.errors import InvalidSpec


class SpecKeys(TypedDict, total=False):
    """Keyword arguments of allocate(), allocate_many() and create(): the keys of `spec`.

    Either `size` (bytes) or `width`, `height` (pixels) and `format` (a DRM fourcc of four bytes, such as "XR24").
    """

    size: int
    width: int
    height: int
    format: str
    name: str
    kind: str
    cache: str
    cache_policy: str
    allocator: str
    request_id: str


_LIMITS: Final[dict[str, int]] = {"u": 2**32 - 1, "t": 2**64 - 1}
_WORDS: Final[dict[str, str]] = {"u": "an integer of 32 bits", "t": "an integer of 64 bits", "s": "a string"}


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
        for key, value in source.items():
            if key not in SPEC_TYPES:
                raise InvalidSpec(f"{key}: no such key; there are {', '.join(SPEC_TYPES)}.")
            if value is None:
                continue
            if key in marshalled:
                raise InvalidSpec(f"{key}: given twice, in the mapping and as a keyword.")
            marshalled[key] = Variant(SPEC_TYPES[key], _plain(key, SPEC_TYPES[key], value))
    return marshalled


def marshal_wrap(**options: object) -> dict[str, Variant]:
    """Return the options of WrapMemfd as its `a{sv}`; None stands for an absent key. Raises InvalidSpec."""
    return {
        key: Variant(WRAP_TYPES[key], _plain(key, WRAP_TYPES[key], value))
        for key, value in options.items()
        if value is not None
    }


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
            [int(_plain(*item)) for item in zip(names, ("u", "t", "t"), (index, offset, size), strict=True)]
        )
    return marshalled


def check_count(count: object) -> int:
    """Return `count` as a D-Bus `u`. Raises InvalidSpec naming it."""
    return int(_plain("count", "u", count))


def check_text(key: str, value: object) -> str:
    """Return `value` as a D-Bus `s`. Raises InvalidSpec naming `key`."""
    return str(_plain(key, "s", value))


def _plain(key: str, signature: str, value: object) -> int | str:
    if signature == "s":
        if not isinstance(value, str):
            raise InvalidSpec(f"{key}: must be {_WORDS['s']}, not {type(value).__name__}.")
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
        raise InvalidSpec(f"{key}: must be {_WORDS[signature]}, not {type(value).__name__}.")
    if not 0 <= number <= _LIMITS[signature]:
        raise InvalidSpec(f"{key}: {number} is outside 0..{_LIMITS[signature]}.")
    return number
