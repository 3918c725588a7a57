# SPDX-License-Identifier: MIT
"""`udmabufctl move`: give a buffer other memory, with the same contents."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from udmabufd_client.cli.buffer_id import HELP_OR_TICKET, parse_named
from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import human_size, printable

if TYPE_CHECKING:
    from udmabufd_client.aio import Buffer

VERB = "move"
TIMEOUT = 120.0
SUMMARY = "give a buffer other memory, with the same contents"
DESCRIPTION = (
    "Move a buffer to another allocator while it is in use. Everybody who has attached to it dynamically is asked to "
    "let go of the memory, and has some seconds to answer; then the contents are copied, and each gets a descriptor "
    "of the new memory. What holds a buffer in place is refused at once: a device that is attached otherwise, a pin, "
    "or a program that has a descriptor and no dynamic attachment. Nothing has changed when it fails."
)
EPILOG = """\
which buffers:
  Those that a 'udmabufctl alloc --hold' or '--background' of this user holds,
  by their id, root's choice of anybody's; any other by its ticket. Without
  --allocator it is the first allocator that suits all that are attached, as
  'udmabufctl explain' shows them; it can be the one that it is in.

examples:
  udmabufctl alloc --size 2M --device drm:card0 --dynamic --background
  udmabufctl move 0123456789abcdef --allocator udmabuf-2M
  udmabufctl move --json 0123456789abcdef | jq .serial
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("buffer", metavar="BUFFER", type=parse_named, help=HELP_OR_TICKET)
    parser.add_argument(
        "--allocator",
        metavar="NAME",
        help="the allocator to move to, as 'udmabufctl allocators' names it; the first that suits if absent",
    )


def run(arguments: argparse.Namespace) -> int:
    """Move the buffer and show where it is; return the exit status."""
    from udmabufd_client.cli.relocation import relocate

    async def move(buffer: Buffer) -> dict[str, Any]:
        return {"serial": await buffer.move(arguments.allocator)}

    shown = relocate(arguments, "Moving", move)
    if arguments.json:
        print(as_json(shown))
    else:
        where = f"{human_size(shown['size'])} of {shown['allocator']}, serial {shown['serial']}"
        print(printable(f"Buffer {shown['id']} has moved: {where}."))
    return 0
