# SPDX-License-Identifier: MIT
"""What `udmabufctl move` and `evict` have in common: a share of the buffer, patience, and why it has to stay.

Only a holder can have a buffer moved. The share that is taken for it has no descriptor, which would itself hold the
buffer in place, and ends with the command.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from udmabufd_client.aio import Buffer, Client
from udmabufd_client.cli.hold import ask_ticket
from udmabufd_client.cli.progress import reported
from udmabufd_client.cli.text import human_size
from udmabufd_client.contract import State
from udmabufd_client.errors import Busy, MoveTimedOut, NoSuchBuffer, UdmabufError

Call = Callable[[Buffer], Coroutine[Any, Any, dict[str, Any]]]

MOVABLE: Final = "as 'udmabufctl alloc --dynamic' does"

_PATIENCE: Final = 5.0
"""Seconds for finding out why a buffer stays where it is."""


def relocate(arguments: argparse.Namespace, doing: str, call: Call) -> dict[str, Any]:
    """Have `call` relocate the buffer that the arguments name, and return it as it is then, with what `call` returned.

    `doing` says what for, in reports of progress. Raises UdmabufError; Busy and MoveTimedOut with what to do.
    """
    return asyncio.run(_relocate(arguments, _ticket(arguments), doing, call))


def _ticket(arguments: argparse.Namespace) -> str:
    if arguments.buffer.ticket:
        return str(arguments.buffer.ticket)
    try:
        return ask_ticket(arguments.buffer.id, arguments.timeout)
    except NoSuchBuffer as error:
        raise NoSuchBuffer(
            f"No udmabufctl holds buffer {arguments.buffer.id}, and a buffer is moved by its holders alone: name it "
            "by its ticket (GetTicket), which its program has; administrators empty an allocator with 'udmabufctl "
            "drain'."
        ) from error


async def _relocate(arguments: argparse.Namespace, ticket: str, doing: str, call: Call) -> dict[str, Any]:
    async with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        with await client.import_ticket(ticket) as buffer:

            async def progress() -> str:
                return (
                    f"{doing} buffer {buffer.id}, {human_size(buffer.info.size)}: those who use it have to let go of "
                    "it first"
                )

            try:
                told = await reported(call(buffer), progress)
            except (Busy, MoveTimedOut) as error:
                step = await _next_step(error, buffer)
                raise type(error)(f"{str(error).rstrip('.')}. {step}", dbus_name=error.dbus_name) from error
            await buffer.refresh()
            known = {"state": buffer.state, "allocator": buffer.info.allocator, "size": buffer.info.size}
            return {"id": buffer.id, "buffer": buffer.path, **told, **known}


async def _next_step(error: UdmabufError, buffer: Buffer) -> str:
    """Return what can be done about it, as a sentence."""
    if isinstance(error, MoveTimedOut):
        return (
            "Nothing has changed. Try again, or end the program that does not answer; move_timeout_msec in "
            "udmabufd.toml(5) is how long it has."
        )
    with suppress(UdmabufError):
        await buffer.refresh(timeout=_PATIENCE)
    rows = buffer.attachments or ()
    if buffer.state == State.MOVING:
        return "Try again when that is over."
    if any(not row.dynamic for row in rows):
        return f"Its program has to detach the device, or to attach it dynamically, {MOVABLE}."
    if any(row.pins for row in rows):
        return "It is free when the program that pinned it takes the pin back, or ends."
    return (
        f"'udmabufctl info {buffer.id}' counts its holders and references; a buffer that 'udmabufctl alloc --dynamic' "
        "holds can move."
    )
