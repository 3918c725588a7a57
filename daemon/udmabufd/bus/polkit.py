# SPDX-License-Identifier: MIT
"""Asks polkit whether a connection may do what is for administrators (org.freedesktop.PolicyKit1.Authority).

Where polkit is not there, does not answer, or does not know the action, nobody may. Whom one need not ask about, root
above all, is left to the caller; who may on this machine to polkit's rules and to org.udmabufd.policy, which also
makes the service's user, who is not root, one who may ask about others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import Final

from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection
from udmabufd_base.errors import BusError, RemoteError
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType

ACTION: Final = "org.udmabufd.admin"

AUTHORITY: Final = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY_INTERFACE: Final = "org.freedesktop.PolicyKit1.Authority"

ALLOW_USER_INTERACTION: Final = 1
"""Of CheckAuthorizationFlags: let polkit ask for a password."""

TIMEOUT: Final = 25.0
"""Seconds for an answer that needs nobody; the bus may have to start polkit."""

INTERACTIVE_TIMEOUT: Final = 300.0
"""Seconds for somebody to find the dialogue and type a password."""

MAX_DIALOGUES: Final = 32
"""Connections for which polkit may be asking somebody at the same time; for others it then answers at once."""

_ABSENT: Final = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in ("ServiceUnknown", "NameHasNoOwner", "Spawn.ServiceNotFound", "Spawn.Disabled", "NoReply")
)
CANCELLED: Final = "org.freedesktop.PolicyKit1.Error.Cancelled"

log = logging.getLogger(__name__)


class Authority:
    """polkit, on the bus of `connection`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        # Connections that polkit asks somebody about -> what the question is cancelled by.
        self._dialogues: dict[str, str] = {}

    async def allowed(self, sender: str, interactive: bool) -> bool:
        """Return whether the connection `sender` (a unique name) may do ACTION. Never raises for what polkit does.

        Only where `interactive` may polkit ask the user for a password, and then the answer can take minutes: to be
        set where the message had the flag ALLOW_INTERACTIVE_AUTHORIZATION. A connection has one such dialogue at a
        time; what it calls meanwhile is answered as if it had not asked for one. A cancelled call, and one that is
        not answered in time, closes its dialogue.
        """
        cancellation_id = ""
        if interactive and sender not in self._dialogues and len(self._dialogues) < MAX_DIALOGUES:
            cancellation_id = self._dialogues[sender] = f"udmabufd-{next(self._numbers)}"
        try:
            return await self._check(sender, cancellation_id)
        except RemoteError as error:
            # To have no polkit is a way to run a machine; any other refusal is something to mend.
            expected = error.name in _ABSENT or error.name == CANCELLED
            level = logging.DEBUG if expected else logging.WARNING
            log.log(level, "polkit does not tell whether %s may do %s: %s", sender, ACTION, error)
            return False
        except BusError as error:
            log.warning("polkit cannot be asked whether %s may do %s: %s", sender, ACTION, error)
            return False
        finally:
            if cancellation_id:
                del self._dialogues[sender]

    def ended(self, sender: str) -> None:
        """Close the dialogue about a connection that has ended, if there is one; the answer is no."""
        if sender in self._dialogues:
            self._cancel(self._dialogues[sender])

    async def _check(self, sender: str, cancellation_id: str) -> bool:
        """Ask; with a `cancellation_id`, unique among our questions, polkit may ask the user in turn."""
        subject = ["system-bus-name", {"name": Variant("s", sender)}]
        flags = ALLOW_USER_INTERACTION if cancellation_id else 0
        try:
            reply = await self._connection.call(
                AUTHORITY,
                AUTHORITY_PATH,
                AUTHORITY_INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [subject, ACTION, {}, flags, cancellation_id],
                timeout=INTERACTIVE_TIMEOUT if cancellation_id else TIMEOUT,
            )
        except (BusError, asyncio.CancelledError) as error:
            if cancellation_id and not isinstance(error, RemoteError):
                self._cancel(cancellation_id)
            raise
        for fd in reply.fds:
            fd.close()
        if reply.signature != "(bba{ss})":
            log.warning("polkit answered with the signature %r", reply.signature)
            return False
        (is_authorized, _, _), *_ = reply.body
        return is_authorized is True

    def _cancel(self, cancellation_id: str) -> None:
        """Have polkit close the dialogue."""
        message = Message(
            MessageType.METHOD_CALL,
            flags=NO_REPLY_EXPECTED,
            path=AUTHORITY_PATH,
            interface=AUTHORITY_INTERFACE,
            member="CancelCheckAuthorization",
            destination=AUTHORITY,
            signature="s",
            body=[cancellation_id],
        )
        with contextlib.suppress(BusError):
            self._connection.send(message)
