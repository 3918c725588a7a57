# SPDX-License-Identifier: MIT
"""`udmabufctl info`: all that the service says of some buffers."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

from udmabufd_client.cli.buffer_id import HELP, parse_buffer
from udmabufd_client.cli.show import as_json, show
from udmabufd_client.errors import NoSuchBuffer, UdmabufError

VERB = "info"
SUMMARY = "show all that the service says of a buffer"
DESCRIPTION = (
    "Show all that the service says of a buffer of this user; root sees those of all users. Takes no share of it: it "
    "is the entry of 'udmabufctl list', complete. What is attached to a buffer, and the constraints that come of it, "
    "the service tells its holders alone: they are shown where a 'udmabufctl alloc --hold' or '--background' of this "
    "user holds it."
)
EPILOG = """\
examples:
  udmabufctl info 0123456789abcdef
  udmabufctl info --json /org/udmabufd/Allocator1/buffer/0123456789abcdef
"""


_PATIENCE = 5.0
"""Seconds that a holder may take to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's argument."""
    parser.add_argument("buffer", metavar="BUFFER", type=parse_buffer, help=HELP)


def run(arguments: argparse.Namespace) -> int:
    """Print the buffer; return the exit status."""
    from udmabufd_client.sync import Client

    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        known = {buffer.id: buffer for buffer in client.list_buffers()}
    if arguments.buffer not in known:
        raise NoSuchBuffer(f"No buffer {arguments.buffer} of this user: 'udmabufctl list' shows those that there are.")
    from udmabufd_client.cli.hold import ask_demands

    shown = known[arguments.buffer].as_dict()
    with suppress(UdmabufError, OSError):
        shown |= ask_demands(arguments.buffer, min(arguments.timeout, _PATIENCE))
    if arguments.json:
        print(as_json(shown))
    else:
        show(shown, json_wanted=False, stream=sys.stdout)
    return 0
