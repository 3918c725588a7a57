# SPDX-License-Identifier: MIT
"""`udmabufctl top`: who holds how much, again and again. The screen and the keyboard are screen.py's."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from udmabufd_client.cli.text import Column, human_size, table
from udmabufd_client.cli.user import WHO, administrator, can_ask, user_name
from udmabufd_client.errors import CallTimedOut, ServiceUnavailable

if TYPE_CHECKING:
    from udmabufd_client.info import Usage

VERB = "top"
SUMMARY = "watch who holds how much, by user and application"
DESCRIPTION = (
    "Show what each user and application holds, the largest first, again and again until q, Ctrl-C or SIGTERM. BYTES "
    "are those that are charged; LINGERING is the part of them that nobody holds any more and the kernel has not "
    "freed yet, because a descriptor, a mapping or a device still uses it. EVICTED bytes are counted apart from them, "
    "and of all users together: they can be swapped out. REFUSALS counts calls that were refused for a limit or for "
    f"want of memory since the service started. {WHO}"
)
EPILOG = """\
keys, on a terminal:
  q  end

output:
  On a terminal one screen is redrawn, as many rows as fit; elsewhere each
  refresh is a table of its own with an empty line after it. With --json each
  refresh is one line with one document: {"time": seconds since 1970, "usage":
  [rows as in org.udmabufd.Allocator1(5), and "user"], "evicted": bytes}. A
  service that is restarted meanwhile is waited for.

examples:
  udmabufctl top
  udmabufctl top --sort lingering --interval 0.5
  udmabufctl top -n 1 --json | jq '.usage[0].user'
"""

_SORTS: Final = ("bytes", "buffers", "lingering", "refusals", "user", "application")
_LONGEST_INTERVAL: Final = 86_400.0

_COLUMNS: Final = (
    Column("USER", 0),
    Column("APPLICATION", 5, soft=True),
    Column("BUFFERS", 4, right=True),
    Column("BYTES", 0, right=True),
    Column("LINGERING", 7, right=True),
    Column("EVICTED", 3, right=True),
    Column("REFUSALS", 6, right=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "-d",
        "--interval",
        metavar="SECONDS",
        type=_interval,
        default=2.0,
        help="seconds from refresh to refresh (default: 2, at least 0.1)",
    )
    parser.add_argument(
        "-n", "--iterations", metavar="NUMBER", type=_count, help="end after this many refreshes (default: never)"
    )
    parser.add_argument(
        "--sort",
        choices=_SORTS,
        default="bytes",
        help="what to sort by: figures with the largest first, names in their order (default: bytes)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show usage until told to end; return the exit status."""
    from udmabufd_client.cli.screen import Screen
    from udmabufd_client.sync import Client

    done = 0
    with Screen(sys.stdout, drawn=not arguments.json) as screen:
        with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
            while not screen.ended:
                try:
                    with administrator("top"):
                        rows = client.usage(interactive=can_ask())
                    evicted = client.properties().get("EvictedBytes")
                except (CallTimedOut, ServiceUnavailable) as error:
                    # From the first time on it is there; later it may be restarted.
                    if not done:
                        raise
                    screen.note(str(error))
                else:
                    if arguments.json:
                        document = {
                            "time": round(time.time(), 3),
                            "usage": as_shown(rows, arguments.sort),
                            "evicted": evicted,
                        }
                        screen.line(json.dumps(document))
                    else:
                        screen.show(lines(as_shown(rows, arguments.sort), evicted, screen.width))
                    done += 1
                if done == arguments.iterations:
                    break
                screen.wait(arguments.interval)
    return 0


def as_shown(rows: Sequence[Usage], sort: str) -> list[dict[str, Any]]:
    """Return the rows with their users' names, sorted."""
    named = [{"user": user_name(row.uid), **row.as_dict()} for row in rows]
    named.sort(key=lambda row: (row["user"], row["application"]))
    if sort in ("user", "application"):
        named.sort(key=lambda row: str(row[sort]))
    else:
        named.sort(key=lambda row: int(row[sort]), reverse=True)
    return named


def lines(rows: Sequence[dict[str, Any]], evicted: int | None, width: int | None) -> list[str]:
    """Return a table of the rows under a heading, and their sums beneath, with what is `evicted` of all."""
    cells = [_cells(row) for row in rows]
    cells.append(_cells({"user": f"total ({len(rows)})", "application": "", **totals(rows), "evicted": evicted}))
    return table(_COLUMNS, cells, width)


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the sums of the figures."""
    return {key: sum(row[key] for row in rows) for key in ("buffers", "bytes", "lingering", "refusals")}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["user"],
        row["application"] or "-",
        str(row["buffers"]),
        human_size(row["bytes"]),
        human_size(row["lingering"]),
        human_size(row.get("evicted")),
        str(row["refusals"]),
    )


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= _LONGEST_INTERVAL:
        raise argparse.ArgumentTypeError(f"invalid number of seconds: {text!r} is not 0.1 to {_LONGEST_INTERVAL:g}")
    return seconds


_interval.__name__ = "number of seconds"
"""argparse names the type in its message."""


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_count.__name__ = "number of refreshes"
