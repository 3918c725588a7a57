# SPDX-License-Identifier: MIT
"""`udmabufctl list`: the buffers of this user; root sees all."""

from __future__ import annotations

import argparse
import sys

from udmabufd_client.cli.show import as_json, picture
from udmabufd_client.cli.text import Column, human_size, table, width_of, write

VERB = "list"
SUMMARY = "list the buffers of this user; root sees all"
DESCRIPTION = (
    "List the buffers of this user, whichever program holds them; root sees those of all users. HOLDERS counts the "
    "connections that hold shares of a buffer. A narrow terminal shows fewer columns: 'udmabufctl info ID' shows all."
)
EPILOG = """\
examples:
  udmabufctl list
  udmabufctl list --json | jq 'map(.charged) | add'
"""

_COLUMNS = (
    Column("ID", 0),
    Column("NAME", 9, soft=True),
    Column("STATE", 6),
    Column("KIND", 5),
    Column("SIZE", 8, right=True),
    Column("PICTURE", 7),
    Column("ALLOCATOR", 3),
    Column("HOLDERS", 4, right=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print the list; return the exit status."""
    from udmabufd_client.sync import Client

    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        buffers = [buffer.as_dict() for buffer in client.list_buffers()]
    if arguments.json:
        print(as_json(buffers))
        return 0
    rows = [
        (
            shown["id"],
            shown.get("name", "-"),
            shown.get("state", "-"),
            shown.get("kind", "-"),
            human_size(shown.get("size")),
            picture(shown),
            shown.get("allocator", "-"),
            str(shown.get("holders", "-")),
        )
        for shown in buffers
    ]
    write(table(_COLUMNS, rows, width_of(sys.stdout)), sys.stdout, heading=True)
    return 0
