# SPDX-License-Identifier: MIT
"""`udmabufctl explain`: which allocator would serve, and why the others would not. Allocates nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from udmabufd_client.cli.constraint import constraints_text, exact_size, keys_text
from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import Column, notes, paragraph, printable, table, width_of, write
from udmabufd_client.cli.wanted import add_wanted, parse_picture, spec_of
from udmabufd_client.contract import Cache

if TYPE_CHECKING:
    from udmabufd_client.inventory import Verdict

VERB = "explain"
SUMMARY = "say which allocator would serve devices and constraints, and why others would not"
DESCRIPTION = (
    "Have the service decide where memory would come from, without allocating any: by the same code as 'udmabufctl "
    "alloc'. Say how much by --size, or by --format and WIDTHxHEIGHT. The allocators are listed in the order in which "
    "they are asked. The one with the star would serve; one that suits, too, is asked when those before it have run "
    "out. What stands against the others is named with the device that demands it, and below with the figures and "
    "what would help. Where --cache is given, or memory would be mapped otherwise than asked for, CACHE says what CPU "
    "mappings would be, and EVIDENCE how that is known."
)
EPILOG = f"""\
constraints:
{keys_text()}

exit status:
  0 an allocator suits, 1 none does, or devices have no memory in common

examples:
  udmabufctl explain --device /dev/video0 --format NV12 1920x1080
  udmabufctl explain --device /dev/dri/card0 --device /dev/video0 --size 8M
  udmabufctl explain --size 8M --constraint max_segments=8
  udmabufctl explain --size 1M --cache uncached --cache-policy require --json
"""

_COLUMNS: Final = (
    Column("", 0),
    Column("ALLOCATOR", 0),
    Column("VERDICT", 0),
    Column("CACHE", 10),
    Column("EVIDENCE", 7),
    Column("BECAUSE OF", 9),
    Column("DEMANDED BY", 8, soft=True),
)

_OF_CACHE: Final = ("CACHE", "EVIDENCE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments: those keys of `spec` on which memory depends."""
    add_wanted(parser.add_argument_group("what is wanted"), "name", "request_id")
    parser.add_argument(
        "picture", metavar="WIDTHxHEIGHT", nargs="?", type=parse_picture, help="the picture, in pixels"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the verdicts; return 1 if no allocator suits."""
    from udmabufd_client.sync import Client

    wanted = spec(arguments)
    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        verdicts = client.explain(wanted)
    if arguments.json:
        print(as_json([verdict.as_dict() for verdict in verdicts]))
    else:
        width = width_of(sys.stdout)
        cache = wanted.get("cache", Cache.CACHED)
        for line in paragraph(printable(asked(wanted)), 0, width):
            print(line)
        print()
        telling = [verdict for verdict in verdicts if "cache" in wanted or _otherwise(verdict, cache)]
        with_cache = any(verdict.cache_effective for verdict in telling)
        write(rows(verdicts, width, with_cache=with_cache), sys.stdout, heading=True)
        notes([(verdict.allocator, _said(verdict)) for verdict in verdicts if not verdict.ok], sys.stdout)
        print()
        for line in paragraph(printable(conclusion(verdicts, cache)), 0, width):
            print(line)
    return 0 if any(verdict.ok for verdict in verdicts) else 1


def spec(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is wanted as `spec`. Ends on wrong usage."""
    wanted = spec_of(arguments)
    if arguments.picture is not None:
        if "width" in wanted or "height" in wanted:
            arguments.parser.error("WIDTHxHEIGHT goes without --width and --height")
        wanted["width"], wanted["height"] = arguments.picture
    if "size" not in wanted and not {"width", "height", "format"} <= set(wanted):
        arguments.parser.error("say what is wanted: --size BYTES, or --format FOURCC WIDTHxHEIGHT")
    return wanted


def asked(wanted: dict[str, Any]) -> str:
    """Return what was asked as a line for people."""
    what = [exact_size(wanted["size"])] if "size" in wanted else []
    what += [f"{wanted['width']}x{wanted['height']}"] if {"width", "height"} <= set(wanted) else []
    parts = [" ".join([*what, wanted.get("format", "")]).strip(), wanted.get("kind", "dma-buf")]
    if "cache" in wanted:
        parts.append(f"{wanted['cache']} ({wanted.get('cache_policy', 'prefer')})")
    if "constraints" in wanted:
        parts.append(constraints_text(wanted["constraints"]))
    if "allocator" in wanted:
        parts.append(f"by {wanted['allocator']}")
    if "devices" in wanted:
        parts.append(f"for {' and '.join(wanted['devices'])}")
    return ", ".join(parts)


def rows(verdicts: Sequence[Verdict], width: int | None, *, with_cache: bool) -> list[str]:
    """Return the table; the first that suits has the star."""
    first = next((verdict for verdict in verdicts if verdict.ok), None)
    words = [("*", "serves") if each is first else ("", "suits" if each.ok else "no") for each in verdicts]
    cells = [
        (
            star,
            each.allocator,
            word,
            each.cache_effective,
            each.cache_evidence,
            each.field or ("" if each.ok else "(see below)"),
            each.device,
        )
        for (star, word), each in zip(words, verdicts, strict=True)
    ]
    shown = [index for index, column in enumerate(_COLUMNS) if with_cache or column.title not in _OF_CACHE]
    return table([_COLUMNS[index] for index in shown], [[row[index] for index in shown] for row in cells], width)


def conclusion(verdicts: Sequence[Verdict], wanted: str = Cache.CACHED) -> str:
    """Return the answer as a sentence; `wanted` is the cache attribute that was asked for."""
    suiting = [verdict for verdict in verdicts if verdict.ok]
    if not suiting:
        return "No allocator suits."
    first, *others = suiting
    cache = f", with memory that is mapped {first.cache_effective}, not {wanted}" if _otherwise(first, wanted) else ""
    after = f" When it has run out: {', then '.join(each.allocator for each in others)}." if others else ""
    return f"{first.allocator} would serve{cache}.{after}"


def _otherwise(verdict: Verdict, wanted: str) -> bool:
    """Return whether the allocator would give memory that is mapped otherwise than `wanted`."""
    return verdict.cache_effective not in ("", wanted)


def _said(verdict: Verdict) -> list[str]:
    remedy = [f"What would help: {verdict.remedy}"] if verdict.remedy else []
    return [verdict.reason or "It gives no reason.", *remedy]
