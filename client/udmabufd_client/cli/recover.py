# SPDX-License-Identifier: MIT
"""`udmabufctl recover`: what becomes of the buffers of a former run whose state the service could not read."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import Column, human_size, table, width_of, write
from udmabufd_client.cli.user import WHO, administrator, can_ask

VERB = "recover"
SUMMARY = "keep or give up the buffers of a state that the service could not read"
DESCRIPTION = (
    "After a restart the service has its buffers and their state from systemd. When it cannot read the state, it "
    "keeps the buffers, allocates nothing, and says so in its log. This makes it serve again: it restores what can be "
    "understood and keeps every other buffer, without an owner, for whoever still has a descriptor of it and imports "
    "it. With --discard it gives all of them up instead; descriptors and mappings that programs have stay valid. "
    f"Shows what became of each. {WHO}"
)
EPILOG = """\
examples:
  sudo udmabufctl recover
  sudo udmabufctl recover --discard --yes
  sudo udmabufctl recover --json | jq 'group_by(.action) | map(length)'
"""

_COLUMNS: Final = (
    Column("ID", 0),
    Column("NAME", 4, soft=True),
    Column("KIND", 3),
    Column("SIZE", 5, right=True),
    Column("INODE", 1, right=True),
    Column("ACTION", 0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--discard", action="store_true", help="give up the buffers instead of keeping them")
    parser.add_argument("--yes", action="store_true", help="do not ask before --discard")


def run(arguments: argparse.Namespace) -> int:
    """Recover and show what became of each buffer; return the exit status."""
    from udmabufd_client.sync import Client

    if arguments.discard and not arguments.yes:
        if not sys.stdin.isatty():
            arguments.parser.error("--discard cannot be undone, and there is no terminal to ask on: add --yes")
        if not _confirmed():
            print("Nothing was done.", file=sys.stderr)
            return 1
    with Client.connect(arguments.bus, timeout=arguments.timeout) as client, administrator(VERB):
        buffers = [buffer.as_dict() for buffer in client.recover(arguments.discard, interactive=can_ask())]
    if arguments.json:
        print(as_json(buffers))
        return 0
    rows = [
        (
            shown.get("id", "-"),
            shown.get("name", "-"),
            shown.get("kind", "-"),
            human_size(shown.get("size")),
            str(shown.get("inode", "-")),
            shown.get("action", "-"),
        )
        for shown in buffers
    ]
    write(table(_COLUMNS, rows, width_of(sys.stdout)), sys.stdout, heading=True)
    return 0


def _confirmed() -> bool:
    print("Give up every buffer of the former run? What was not handed out is gone for good. [y/N] ", end="")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
