# SPDX-License-Identifier: MIT
"""Between D-Bus dictionaries and plain ones: exact types coming in, variants going out.

Knows the tables of the contract; what a value means is for core to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from udmabufd.core.errors import InvalidSpec
from udmabufd_base.codec import Variant

_SHOWN = 32
"""Characters of a caller's unknown key that an error repeats."""


def unwrap(values: Mapping[str, Variant], types: Mapping[str, str]) -> dict[str, Any]:
    """Return the plain values. Raises InvalidSpec for a key that is not in `types` or of another D-Bus type."""
    plain = {}
    for key, variant in values.items():
        if key not in types:
            known = ", ".join(types) or "none"
            raise InvalidSpec(ascii(key[:_SHOWN])[1:-1], f"is not a known key; there are: {known}")
        if variant.signature != types[key]:
            raise InvalidSpec(key, f"must have the D-Bus type {types[key]!r}, not {variant.signature[:_SHOWN]!r}")
        plain[key] = variant.value
    return plain


def wrap(values: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Variant]:
    """Return `values` as variants of the types of the table; None stands for a key that does not apply."""
    return {key: Variant(types[key], value) for key, value in values.items() if value is not None}
