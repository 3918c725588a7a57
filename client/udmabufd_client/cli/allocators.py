# SPDX-License-Identifier: MIT
"""`udmabufctl allocators`: where memory can come from, what it is like, and why a source cannot serve."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Final

from udmabufd_client.cli.constraint import exact_size
from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import Column, human_size, notes, table, width_of, write

if TYPE_CHECKING:
    from udmabufd_client.inventory import AllocatorInfo

VERB = "allocators"
SUMMARY = "list where memory can come from, and what it is like"
DESCRIPTION = (
    "List the allocators in the order in which they are asked. PIECES is the size of the physically contiguous pieces "
    "that a buffer consists of, or 'one run' where a whole buffer is contiguous; ADDRESSES how many bits its physical "
    "addresses have at most, where that is known; CACHE the cache attributes that CPU mappings of its memory can "
    "have, the usual one first, and EVIDENCE how that is known; CHARGED says whom the kernel charges: the service, a "
    "pool of huge pages, nobody's control group (system), or the client that touches it. Below the list is why those "
    "that cannot serve cannot. A narrow terminal shows fewer columns."
)
EPILOG = """\
examples:
  udmabufctl allocators
  udmabufctl allocators --json | jq '.[] | select(.available) | .allocator'
"""

_COLUMNS: Final = (
    Column("ALLOCATOR", 0),
    Column("SERVES", 0),
    Column("KIND", 4),
    Column("LARGEST", 6, right=True),
    Column("PIECES", 8, right=True),
    Column("ADDRESSES", 3, right=True),
    Column("CACHE", 7, soft=True),
    Column("EVIDENCE", 1),
    Column("CHARGED", 2),
    Column("FREE", 5, right=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print the allocators; return the exit status."""
    from udmabufd_client.sync import Client

    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        allocators = client.allocators()
    if arguments.json:
        print(as_json([allocator.as_dict() for allocator in allocators]))
        return 0
    rows = [_cells(allocator) for allocator in allocators]
    write(table(_COLUMNS, rows, width_of(sys.stdout)), sys.stdout, heading=True)
    absent = [allocator for allocator in allocators if not allocator.available]
    notes([(each.allocator, [each.reason or "It gives no reason."]) for each in absent], sys.stdout)
    return 0


def _cells(allocator: AllocatorInfo) -> tuple[str, ...]:
    granule = "-" if allocator.granule is None else exact_size(allocator.granule)
    return (
        allocator.allocator,
        "yes" if allocator.available else "no",
        allocator.kind or "-",
        human_size(allocator.max_size),
        "one run" if allocator.contiguous else granule,
        f"{allocator.address_bits} bits" if allocator.address_bits is not None else "-",
        ", ".join(allocator.obtainable) or "-",
        allocator.cache_evidence or "-",
        allocator.accounting or "-",
        human_size(allocator.free),
    )
