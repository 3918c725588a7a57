# SPDX-License-Identifier: MIT
"""Text for terminals: sizes for people, names made harmless, tables and lists cut to a width.

Knows widths and strings, not buffers: what is shown is each verb's choice.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TextIO

_GAP: Final = "  "
_NOTE: Final = 4
"""Columns by which a note is indented under its title."""

_LEAST: Final = 10
"""Letters below which a column is left out rather than cut further."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. `keep` orders what a narrow terminal loses: the lowest first, 0 never.

    Only `soft` columns are cut: of most values a part says nothing.
    """

    title: str
    keep: int
    right: bool = False
    soft: bool = False


def human_size(size: int | None) -> str:
    """Return bytes as people read them: 4 KiB, 1.2 MiB; "-" for None."""
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    exact = value == int(value)
    return f"{value:.0f} {unit}" if exact or value >= 100 else f"{value:.1f} {unit}"


def printable(text: str) -> str:
    """Return `text` with what could steer a terminal replaced; it may come from other users."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def width_of(stream: TextIO) -> int | None:
    """Return the columns that output may take; None where nothing limits it."""
    if not stream.isatty() and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size().columns


def bold(text: str, stream: TextIO) -> str:
    """Return `text` as a heading: bold on a terminal."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[1m{text}\x1b[0m"


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Return a heading and one line per row, none longer than `width`.

    Too wide a table first loses letters of its soft columns, which an ellipsis shows, then whole columns.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = {
        index: max([len(column.title), *(len(row[index]) for row in cells)]) for index, column in enumerate(columns)
    }
    while width is not None and sum(widths.values()) + len(_GAP) * (len(widths) - 1) > width:
        excess = sum(widths.values()) + len(_GAP) * (len(widths) - 1) - width
        soft = [index for index in widths if columns[index].soft and widths[index] > _LEAST]
        losable = [index for index in widths if columns[index].keep]
        if excess <= sum(widths[index] - _LEAST for index in soft):
            widest = max(soft, key=lambda index: widths[index])
            widths[widest] -= 1
        elif losable:
            del widths[min(losable, key=lambda index: columns[index].keep)]
        else:
            break
    lines = []
    for row in [[column.title for column in columns], *cells]:
        line = [
            cut(row[index], room).rjust(room) if columns[index].right else cut(row[index], room).ljust(room)
            for index, room in widths.items()
        ]
        lines.append(cut(_GAP.join(line).rstrip(), width))
    return lines


def pairs(items: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """Return one line per item, values aligned, none longer than `width`."""
    room = max((len(key) for key, _ in items), default=0)
    return [cut(f"{key.ljust(room)}{_GAP}{printable(value)}", width) for key, value in items]


def paragraph(text: str, indent: int, width: int | None) -> list[str]:
    """Return `text` as indented lines, none longer than `width`."""
    space = " " * indent
    if width is None:
        return [space + text]
    return textwrap.wrap(text, max(width, indent + 1), initial_indent=space, subsequent_indent=space)


def notes(items: Sequence[tuple[str, Sequence[str]]], stream: TextIO) -> None:
    """Print each title with its paragraphs beneath; those of whom the same is said have one heading."""
    width = width_of(stream)
    titles: dict[tuple[str, ...], list[str]] = {}
    for title, texts in items:
        titles.setdefault(tuple(texts), []).append(title)
    for said, group in titles.items():
        print(file=stream)
        for line in paragraph(printable(", ".join(group)), 0, width):
            print(bold(line, stream), file=stream)
        for text in said:
            for line in paragraph(printable(text), _NOTE, width):
                print(line, file=stream)


def cut(text: str, width: int | None) -> str:
    """Return `text`, with an ellipsis for its end if it is longer than `width`."""
    return text if width is None or len(text) <= width else text[: max(width - 1, 0)] + "…"


def write(lines: Sequence[str], stream: TextIO, *, heading: bool = False) -> None:
    """Print `lines`, the first as a heading if `heading`."""
    for number, line in enumerate(lines):
        print(bold(line, stream) if heading and number == 0 else line, file=stream)
