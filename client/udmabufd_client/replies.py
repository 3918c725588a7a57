# SPDX-License-Identifier: MIT
"""Dictionaries of the service as plain values, every value's D-Bus type checked against the contract.

What the keys mean is left to info.py and inventory.py. A key that this version does not know is passed over, so that a
newer service can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from udmabufd_base.codec import Variant
from udmabufd_client import contract
from udmabufd_client.errors import BadReply


def typed(raw: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Return the known keys of an `a{sv}` with plain values; arrays of numbers come as tuples.

    Raises BadReply naming a key whose type is not that of `types`.
    """
    known: dict[str, Any] = {}
    for key, signature in types.items():
        variant = raw.get(key)
        if variant is None:
            continue
        if not isinstance(variant, Variant) or variant.signature != signature:
            found = variant.signature if isinstance(variant, Variant) else type(variant).__name__
            raise BadReply(f"{key}: the service answers type {found} where the interface has {signature}.")
        if key.lower() == "constraints":
            known[key] = constraints(variant.value)
        else:
            known[key] = tuple(variant.value) if signature == "at" else _unpacked(variant.value)
    return known


def constraints(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `constraints` with plain values, in the contract's order. Raises BadReply naming a key."""
    return typed(raw, contract.CONSTRAINT_TYPES)


def _unpacked(value: Any) -> Any:
    """Return `value` with the variants inside it replaced by what they hold."""
    if isinstance(value, Variant):
        return _unpacked(value.value)
    if isinstance(value, dict):
        return {key: _unpacked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_unpacked(inner) for inner in value]
    return value
