# SPDX-License-Identifier: MIT
"""Constraints and devices on the command line: KEY=VALUE as it is typed, and how people read what was merged.

Whether a value makes sense is the service's to say.
"""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from udmabufd_client.contract import CONSTRAINT_KEYS, CONSTRAINT_TYPES

_SUFFIXES: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_COUNTS: Final = {"address_bits": "bits", "height_alignment": "rows", "max_segments": ""}
"""What is no number of bytes."""

_ANSWERS: Final = {"": True, "yes": True, "true": True, "no": False, "false": False}


def parse_size(text: str) -> int:
    """Return "4096", "64K" or "8MiB" as bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(text)
    return int(match[1]) << _SUFFIXES[match[2].upper()]


parse_size.__name__ = "size"
"""argparse names the type in its message."""


def parse_constraint(text: str) -> tuple[str, object]:
    """Return "max_segments=8", "contiguous" or "cache=cached,uncached" as key and value.

    Raises argparse.ArgumentTypeError naming the key.
    """
    name, separator, value = text.partition("=")
    key = name.strip().replace("-", "_")
    if key not in CONSTRAINT_TYPES:
        raise argparse.ArgumentTypeError(f"no such constraint: {name!r}; there are {', '.join(CONSTRAINT_TYPES)}")
    if CONSTRAINT_TYPES[key] == "b":
        if value not in _ANSWERS or (separator and not value):
            raise argparse.ArgumentTypeError(f"{key} stands alone, or is {key}=no")
        return key, _ANSWERS[value]
    if not value:
        raise argparse.ArgumentTypeError(f"{key} needs a value: {key}=...")
    if CONSTRAINT_TYPES[key] == "as":
        return key, [item.strip() for item in value.split(",")]
    try:
        return key, parse_size(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{key}: invalid number: {value!r}") from None


def parse_device(text: str) -> str:
    """Return a device as the service takes it: a path in full, for the service does not know this directory."""
    return os.path.abspath(text) if "/" in text else text  # noqa: PTH100 (Path would keep "..")


def constraint_text(key: str, value: Any) -> str:
    """Return one constraint as people read it."""
    if isinstance(value, bool):
        return key if value else f"not {key}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{key} {', '.join(map(str, value))}"
    if key in _COUNTS:
        return f"{key} {value} {_COUNTS[key]}".rstrip()
    return f"{key} {exact_size(value)}"


def constraints_text(constraints: Mapping[str, Any]) -> str:
    """Return merged constraints on one line; "any" for none."""
    shown = dict(constraints)
    if shown.get("contiguous"):
        # It is the same twice.
        shown.pop("max_segments", None)
    return "; ".join(constraint_text(key, value) for key, value in shown.items()) or "any"


def exact_size(size: int) -> str:
    """Return bytes in the largest unit of which there is a whole number."""
    unit = 0
    while size and size % 1024 == 0 and unit + 1 < len(_UNITS):
        size, unit = size >> 10, unit + 1
    return f"{size} {_UNITS[unit]}"


def keys_text() -> str:
    """Return what the keys mean, laid out for an epilog."""
    room = max(map(len, CONSTRAINT_KEYS))
    lines = []
    for name, key in CONSTRAINT_KEYS.items():
        lines += textwrap.wrap(
            key.meaning,
            78,
            initial_indent=f"  {name.ljust(room)}  ",
            subsequent_indent=" " * (room + 4),
            break_on_hyphens=False,
        )
    return "\n".join(lines)
