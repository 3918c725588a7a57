# SPDX-License-Identifier: MIT
"""How a buffer is shown, to people and as JSON; shared by the verbs that show one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TextIO

from udmabufd_client.cli.text import human_size, pairs, width_of, write

_SIZES = ("size", "size_requested", "charged")


def as_json(value: Any) -> str:
    """Return `value` as the text that --json prints."""
    return json.dumps(value, indent=2)


def show(shown: Mapping[str, Any], *, json_wanted: bool, stream: TextIO) -> None:
    """Print what is known of one buffer, keys as in the interface."""
    if json_wanted:
        print(as_json(shown), file=stream)
        return
    write(pairs([(key, _value(key, value)) for key, value in shown.items()], width_of(stream)), stream)


def picture(shown: Mapping[str, Any]) -> str:
    """Return width, height and format in a few letters; "-" for a buffer that was asked for by size."""
    if "format" not in shown:
        return "-"
    return f"{shown.get('width', '?')}x{shown.get('height', '?')} {shown['format']}"


def _value(key: str, value: Any) -> str:
    if key in _SIZES:
        return f"{value} ({human_size(value)})"
    if key == "modifier":
        return f"{value:#018x}{' (LINEAR)' if value == 0 else ''}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value)
