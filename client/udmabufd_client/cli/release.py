# SPDX-License-Identifier: MIT
"""`udmabufctl release`: end what `udmabufctl alloc --hold` or `--background` holds."""

from __future__ import annotations

import argparse

from udmabufd_client.cli.buffer_id import HELP, parse_buffer

VERB = "release"
SUMMARY = "end a buffer that 'alloc --hold' or 'alloc --background' holds"
DESCRIPTION = (
    "Make a 'udmabufctl alloc --hold' or '--background' of this user give back its share and end; root may do so to "
    "anybody's. The buffer ends with its last share, its memory with its last file descriptor. Other programs' "
    "shares cannot be released from outside: a share belongs to the connection that holds it, and ends with it."
)
EPILOG = """\
how it works:
  The holder listens on the abstract Unix socket @udmabufctl/ID, leaves
  nothing in any file system, and obeys its own user and root alone, as the
  kernel names them (SO_PEERCRED). Both must be in the same network namespace.

examples:
  udmabufctl release 0123456789abcdef
  id=$(udmabufctl alloc --size 1M --background --json | jq -r .id)
  udmabufctl release "$id"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's argument."""
    parser.add_argument("buffer", metavar="BUFFER", nargs="+", type=parse_buffer, help=HELP)


def run(arguments: argparse.Namespace) -> int:
    """Ask each buffer's holder to release it; return the exit status."""
    import sys

    from udmabufd_client.cli.hold import ask_holder
    from udmabufd_client.cli.show import as_json
    from udmabufd_client.cli.text import printable
    from udmabufd_client.errors import UdmabufError

    released, status = [], 0
    for buffer_id in arguments.buffer:
        try:
            ask_holder(buffer_id, arguments.timeout)
        except UdmabufError as error:
            print(f"udmabufctl: {printable(str(error))}", file=sys.stderr)
            status = 1
        else:
            released.append(buffer_id)
    if arguments.json:
        print(as_json({"released": released}))
    return status
