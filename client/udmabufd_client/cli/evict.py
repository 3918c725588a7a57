# SPDX-License-Identifier: MIT
"""`udmabufctl evict`: have a buffer's memory be swappable until somebody uses it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from udmabufd_client.cli.buffer_id import HELP_OR_TICKET, parse_named
from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import human_size
from udmabufd_client.contract import State

if TYPE_CHECKING:
    from udmabufd_client.aio import Buffer

VERB = "evict"
TIMEOUT = 120.0
SUMMARY = "free an idle buffer's memory until its next use"
DESCRIPTION = (
    "Free the memory of a buffer that nobody uses at present from its pins, so that the kernel can swap it out. "
    "Everybody who has attached to it dynamically is asked to unmap it and to close its descriptor, and has some "
    "seconds to answer. The next use brings the buffer back, with its contents. The service does the same by itself "
    "when memory is short. Refused, and nothing changed, where 'udmabufctl move' would be, and while anybody has a "
    "descriptor, a mapping or an import left."
)
EPILOG = """\
which buffers:
  As for 'udmabufctl move'. Wrapped memory and memfds are not evicted: they
  are the clients' own.

examples:
  udmabufctl evict 0123456789abcdef
  udmabufctl list --json | jq '.[] | select(.state == "evicted") | .id'
  udmabufctl limits --json | jq .EvictedBytes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's argument."""
    parser.add_argument("buffer", metavar="BUFFER", type=parse_named, help=HELP_OR_TICKET)


def run(arguments: argparse.Namespace) -> int:
    """Evict the buffer and say so; return the exit status."""
    from udmabufd_client.cli.relocation import relocate

    async def evict(buffer: Buffer) -> dict[str, Any]:
        await buffer.evict()
        return {}

    shown = relocate(arguments, "Evicting", evict)
    if arguments.json:
        print(as_json(shown))
    elif shown["state"] == State.EVICTED:
        print(f"Buffer {shown['id']} is evicted: {human_size(shown['size'])} can be swapped out until its next use.")
    else:
        print(f"Buffer {shown['id']} was evicted, and somebody uses it again.")
    return 0
