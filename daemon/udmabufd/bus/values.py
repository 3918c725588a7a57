# SPDX-License-Identifier: MIT
"""Between D-Bus dictionaries and plain ones: exact types coming in, variants going out.

Knows the tables of the contract; what a value means is for core to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from udmabufd.core.errors import InvalidSpec
from udmabufd_base.codec import Variant
from udmabufd_client.contract import CONSTRAINT_TYPES

_NESTED: Final[Mapping[str, Mapping[str, str]]] = {"constraints": CONSTRAINT_TYPES}
"""The types of the keys of those values that are dictionaries themselves."""

_SHOWN: Final = 32
"""Characters of a caller's unknown key that an error repeats."""


def unwrap(values: Mapping[str, Variant], types: Mapping[str, str], within: str = "") -> dict[str, Any]:
    """Return the plain values, of dictionaries in them too. Raises InvalidSpec, naming the key, `within` the key of a
    dictionary before it, for one that is not in `types` or of another D-Bus type.
    """
    plain = {}
    for key, variant in values.items():
        if key not in types:
            known = ", ".join(types) or "none"
            raise InvalidSpec(within + ascii(key[:_SHOWN])[1:-1], f"is not a known key; there are: {known}")
        if variant.signature != types[key]:
            raise InvalidSpec(
                within + key, f"must have the D-Bus type {types[key]!r}, not {variant.signature[:_SHOWN]!r}"
            )
        nested = _NESTED.get(key) if variant.signature == "a{sv}" else None
        plain[key] = variant.value if nested is None else unwrap(variant.value, nested, f"{key}.")
    return plain


def wrap(values: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Variant]:
    """Return `values`, and those of dictionaries in them, as variants of the types of the table; None stands for a key
    that does not apply.
    """
    return {
        key: Variant(types[key], wrap(value, _NESTED[key]) if types[key] == "a{sv}" else value)
        for key, value in values.items()
        if value is not None
    }
