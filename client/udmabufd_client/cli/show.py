# SPDX-License-Identifier: MIT
"""How a buffer is shown, to people and as JSON; shared by the verbs that show one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TextIO

from udmabufd_client.cli.constraint import constraints_text
from udmabufd_client.cli.text import human_size, pairs, width_of, write
from udmabufd_client.contract import State

if TYPE_CHECKING:
    from udmabufd_client.buffer import BufferBase

_SIZES = ("size", "size_requested", "charged")

_STATES: Final[dict[str, str]] = {
    State.MOVING: " (it is about to get other memory; calls that need it wait)",
    State.EVICTED: " (its memory can be swapped out; the next use brings it back)",
}
"""Remarks on states that are not the usual ones."""


def as_json(value: Any) -> str:
    """Return `value` as the text that --json prints."""
    return json.dumps(value, indent=2)


def described(buffer: BufferBase) -> dict[str, Any]:
    """Return what is known of a buffer that this process holds, by key; constraints and attachments if it has any."""
    known: dict[str, Any] = {"id": buffer.id, "buffer": buffer.path, **buffer.info.as_dict()}
    if buffer.constraints:
        known["constraints"] = dict(buffer.constraints)
    if buffer.attachments:
        known["attachments"] = [row.as_dict() for row in buffer.attachments]
    return known


def show(shown: Mapping[str, Any], *, json_wanted: bool, stream: TextIO) -> None:
    """Print what is known of one buffer, keys as in the interface."""
    if json_wanted:
        print(as_json(shown), file=stream)
        return
    lines = [(key, _value(key, value)) for key, value in shown.items()]
    write(pairs([(key, text + _remark(key, shown)) for key, text in lines], width_of(stream)), stream)


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
    if isinstance(value, Mapping):
        return constraints_text(value)
    if key == "attachments":
        return ", ".join(_attachment(row) for row in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value)


def _remark(key: str, shown: Mapping[str, Any]) -> str:
    """Return what is to be said behind a value: what a state means, that memory is mapped otherwise than asked for."""
    if key == "state":
        return _STATES.get(shown["state"], "")
    if key == "charged" and shown.get("state") == State.EVICTED:
        return ", apart from what is in memory"
    if key != "cache_effective" or shown["cache_effective"] == shown.get("cache_requested", shown["cache_effective"]):
        return ""
    return f" (not {shown['cache_requested']} as requested)"


def _attachment(row: Mapping[str, Any]) -> str:
    """Return an attachment in a few words."""
    pinned = f", {row['pins']} pins" if row.get("pins") else ""
    return f"{row['attachment']}: {row.get('device', '?')}{' (dynamic)' if row.get('dynamic') else ''}{pinned}"
