# SPDX-License-Identifier: MIT
"""`udmabufctl drain`: move every buffer out of an allocator."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import human_size, printable
from udmabufd_client.cli.user import WHO, administrator, can_ask
from udmabufd_client.contract import State

if TYPE_CHECKING:
    from udmabufd_client.aio import Client
    from udmabufd_client.info import ListedBuffer

VERB = "drain"
TIMEOUT = 3600.0
SUMMARY = "move every buffer out of an allocator, to others"
DESCRIPTION = (
    "Move all buffers whose memory is of an allocator to others that suit them: before a heap's driver is removed, "
    "say, or to have huge pages back. Meanwhile nothing new is allocated there. Buffers that are held in place stay, "
    f"and the error says how many and why; what has moved stays moved. {WHO}"
)
EPILOG = """\
how it goes on:
  How many are left is shown on standard error from two seconds on. Ctrl-C
  ends this command alone: the service goes on draining. Afterwards it
  allocates there again; to keep an allocator empty, take it out of 'order'
  in udmabufd.toml(5) first, and restart the service.

what is counted:
  Root's figures are of all buffers, another administrator's of those of its
  own user. With --json the answer is {"allocator": ..., "moved": number,
  "bytes": bytes}.

examples:
  sudo udmabufctl drain udmabuf-2M
  sudo udmabufctl drain heap:reserved --timeout 60
"""

_SHOWN: Final = 4
"""Buffers that are named when they stay."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's argument."""
    parser.add_argument(
        "allocator", metavar="ALLOCATOR", help="the allocator to empty, as 'udmabufctl allocators' names it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Drain and say what has moved; return the exit status."""
    import asyncio

    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    from udmabufd_client.aio import Client
    from udmabufd_client.cli.progress import reported
    from udmabufd_client.errors import Busy, MoveTimedOut

    allocator: str = arguments.allocator
    async with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        before = await _there(client, allocator)

        async def progress() -> str:
            left = len(await _there(client, allocator))
            return f"Draining {allocator}: {left} of {len(before)} buffers are left"

        with administrator(VERB):
            try:
                await reported(client.drain(allocator, interactive=can_ask()), progress)
            except (Busy, MoveTimedOut) as error:
                raise type(error)(f"{str(error).rstrip('.')}. {await _next_step(client, allocator)}") from error
        # Others have ended meanwhile, or were evicted.
        elsewhere = {buffer.id for buffer in await _in_memory(client) if buffer.allocator != allocator}
    moved = [buffer for buffer in before if buffer.id in elsewhere]
    byte_count = sum(buffer.size or 0 for buffer in moved)
    if arguments.json:
        print(as_json({"allocator": allocator, "moved": len(moved), "bytes": byte_count}))
        return 0
    whose = "" if os.geteuid() == 0 else " of this user"
    number = f"{len(moved)} buffer{'' if len(moved) == 1 else 's'}{whose}"
    print(printable(f"{allocator} is drained: {number} moved, {human_size(byte_count)}."))
    return 0


async def _there(client: Client, allocator: str) -> Sequence[ListedBuffer]:
    """Return the buffers that have memory of the allocator, as far as this user is told."""
    return [buffer for buffer in await _in_memory(client) if buffer.allocator == allocator]


async def _in_memory(client: Client) -> Sequence[ListedBuffer]:
    return [buffer for buffer in await client.list_buffers() if buffer.state in (State.BACKED, State.MOVING)]


async def _next_step(client: Client, allocator: str) -> str:
    """Return what can be done about those that stay, and which they are."""
    from udmabufd_client.cli.relocation import MOVABLE
    from udmabufd_client.errors import UdmabufError

    left: Sequence[Any] = ()
    with suppress(UdmabufError):
        left = await _there(client, allocator)
    names = ", ".join(buffer.id for buffer in left[:_SHOWN])
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    which = f"Left are {names}{more}. " if left else ""
    return (
        f"What has moved stays moved. {which}Have their programs end, or attach their devices dynamically, {MOVABLE}, "
        "and drain it again."
    )
