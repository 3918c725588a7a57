# SPDX-License-Identifier: MIT
"""`udmabufctl list`: the buffers of this user; root sees all, and with --all what each user has together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from udmabufd_client.cli.show import as_json, picture
from udmabufd_client.cli.text import Column, human_size, table, width_of, write
from udmabufd_client.cli.top import totals
from udmabufd_client.cli.user import administrator, can_ask, user_name
from udmabufd_client.contract import State

if TYPE_CHECKING:
    from udmabufd_client.info import Usage

VERB = "list"
SUMMARY = "list the buffers of this user; root sees all"
DESCRIPTION = (
    "List the buffers of this user, whichever program holds them; root sees those of all users. HOLDERS counts the "
    "connections that hold shares of a buffer; one that is 'lingering' has none, but the kernel has not freed its "
    "memory yet, one that is 'moving' about to get other memory, and of one that is 'evicted' the memory can be "
    "swapped out until somebody uses it. A narrow terminal shows fewer columns: 'udmabufctl info ID' shows all. With "
    "--all there is more of each buffer, CHARGED bytes and REFERENCES (descriptors, mappings and imports of others, "
    "as the kernel counts them), and beneath it the sums for each user; EVICTED bytes are not among BYTES."
)
EPILOG = """\
with --all:
  For root, and for those whom polkit allows org.udmabufd.admin. Whose a
  reference is the kernel does not tell: that sum, and that of what is
  evicted, is of all buffers above. With --json the answer is {"buffers":
  [...], "users": [...], "total": {...}}.

examples:
  udmabufctl list
  udmabufctl list --json | jq 'map(.charged) | add'
  sudo udmabufctl list --all
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


_ALL_COLUMNS = (*_COLUMNS, Column("REFERENCES", 2, right=True), Column("CHARGED", 8, right=True))

_USER_COLUMNS = (
    Column("USER", 0),
    Column("BUFFERS", 4, right=True),
    Column("BYTES", 0, right=True),
    Column("LINGERING", 3, right=True),
    Column("EVICTED", 3, right=True),
    Column("REFERENCES", 1, right=True),
    Column("REFUSALS", 2, right=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's option."""
    parser.add_argument(
        "--all", action="store_true", help="show more of each buffer, and the sums for each user (administrators)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the list; return the exit status."""
    from udmabufd_client.sync import Client

    users: list[dict[str, Any]] = []
    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        if arguments.all:
            with administrator("list --all"):
                users = by_user(client.usage(interactive=can_ask()))
        buffers = [buffer.as_dict() for buffer in client.list_buffers()]
    total: dict[str, Any] = dict(totals(users))
    if counted := [shown["references"] for shown in buffers if "references" in shown]:
        total["references"] = sum(counted)
    total["evicted"] = sum(shown.get("charged", 0) for shown in buffers if shown.get("state") == State.EVICTED)
    if arguments.json:
        print(as_json({"buffers": buffers, "users": users, "total": total} if arguments.all else buffers))
        return 0
    columns = _ALL_COLUMNS if arguments.all else _COLUMNS
    rows = [_cells(shown)[: len(columns)] for shown in buffers]
    write(table(columns, rows, width_of(sys.stdout)), sys.stdout, heading=True)
    if arguments.all:
        print()
        sums = [_sums(user["user"], user) for user in users] + [_sums("total", total)]
        write(table(_USER_COLUMNS, sums, width_of(sys.stdout)), sys.stdout, heading=True)
    return 0


def by_user(rows: Sequence[Usage]) -> list[dict[str, Any]]:
    """Return the sums of each user's applications, the users by their names."""
    users: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        users.setdefault(row.uid, []).append(row.as_dict())
    summed = [{"user": user_name(uid), "uid": uid, **totals(theirs)} for uid, theirs in users.items()]
    return sorted(summed, key=lambda user: str(user["user"]))


def _cells(shown: dict[str, Any]) -> tuple[str, ...]:
    return (
        shown["id"],
        shown.get("name", "-"),
        shown.get("state", "-"),
        shown.get("kind", "-"),
        human_size(shown.get("size")),
        picture(shown),
        shown.get("allocator", "-"),
        str(shown.get("holders", "-")),
        str(shown.get("references", "-")),
        human_size(shown.get("charged")),
    )


def _sums(name: str, sums: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        str(sums["buffers"]),
        human_size(sums["bytes"]),
        human_size(sums["lingering"]),
        human_size(sums.get("evicted")),
        str(sums.get("references", "-")),
        str(sums["refusals"]),
    )
