# SPDX-License-Identifier: MIT
"""The options by which a verb is told what is wanted: the keys of `spec`, alike for every verb that has them."""

from __future__ import annotations

import argparse
import re
from typing import Any, Final

from udmabufd_client.cli.constraint import parse_constraint, parse_device, parse_size
from udmabufd_client.contract import SPEC_KEYS, Cache, CachePolicy, Kind

_SUFFIXED: Final = " Suffixes K, M, G, T: 1024s."

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "size": {"type": parse_size, "metavar": "BYTES", "more": _SUFFIXED},
    "width": {"type": int, "metavar": "PIXELS"},
    "height": {"type": int, "metavar": "PIXELS"},
    "format": {"metavar": "FOURCC"},
    "name": {},
    "kind": {"choices": [*map(str, Kind)]},
    "cache": {"choices": [*map(str, Cache)]},
    "cache_policy": {"choices": [*map(str, CachePolicy)]},
    "devices": {
        "flag": "--device",
        "action": "append",
        "type": parse_device,
        "metavar": "DEVICE",
        "more": " One for each time the option is given.",
    },
    "constraints": {
        "flag": "--constraint",
        "action": "append",
        "type": parse_constraint,
        "metavar": "KEY=VALUE",
        "more": " One for each time the option is given, such as max_segments=8, contiguous, alignment=64K or "
        "cache=write-combine,uncached; 'udmabufctl explain --help' lists them.",
    },
    "allocator": {},
    "request_id": {"metavar": "ID"},
}


def add_wanted(group: argparse._ActionsContainer, *without: str) -> None:
    """Add an option for each key of `spec`, but for those `without`."""
    for key, given in _OPTIONS.items():
        if key in without:
            continue
        option = dict(given)
        flag = option.pop("flag", "--" + key.replace("_", "-"))
        meaning = SPEC_KEYS[key].meaning + option.pop("more", "")
        assert "%" not in meaning  # argparse would take it for a format
        group.add_argument(flag, dest=key, help=meaning, **option)


def spec_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of `spec` that were given. Ends on a constraint that was given twice."""
    spec = {key: value for key in SPEC_KEYS if (value := getattr(arguments, key, None)) is not None}
    if "constraints" in spec:
        constraints: dict[str, object] = {}
        for key, value in spec["constraints"]:
            if key in constraints:
                arguments.parser.error(f"--constraint {key} is given twice")
            constraints[key] = value
        spec["constraints"] = constraints
    return spec


def parse_picture(text: str) -> tuple[int, int]:
    """Return "1920x1080" as width and height in pixels. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,10})[xX]([0-9]{1,10})", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]), int(match[2])


parse_picture.__name__ = "picture size, WIDTHxHEIGHT"
"""argparse names the type in its message."""
