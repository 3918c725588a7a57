# SPDX-License-Identifier: MIT
"""Shares on their way to this client: calls that bring some, and what becomes of those that nobody waits for any more.

Which members those are is left to service.py, the way back to releases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from udmabufd_base.connection import Reply
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUFFER_PATH_PREFIX, OBJECT_PATH
from udmabufd_client.errors import BadReply, ServiceRestarted
from udmabufd_client.info import BufferInfo
from udmabufd_client.releases import Releases
from udmabufd_client.session import Session
from udmabufd_client.share import Share, Shares

T = TypeVar("T")

_LOST_WITH_THE_BUS: Final = "What it brought ended with the connection. The client connects again: repeat the call."
_IMPORT_AGAIN: Final = (
    "A share that it brought, if any, ends with this connection. The service is starting again: repeat the call."
)
_CREATE_AGAIN: Final = (
    f"{_IMPORT_AGAIN} One with a request_id (new_request_id()) is repeated by itself, and creates nothing twice."
)
_HINTS: Final = dict.fromkeys(("Allocate", "AllocateMany", "CreateBuffer", "WrapMemfd"), _CREATE_AGAIN)


class Arrivals:
    """The calls of one session that bring shares."""

    def __init__(self, session: Session, shares: Shares, releases: Releases) -> None:
        self._session = session
        self._shares = shares
        self._releases = releases

    async def bring(
        self,
        member: str,
        body: Sequence[Any],
        take: Callable[[Reply], T],
        timeout: float | None,
        *,
        again: bool,
        fds: Sequence[OwnedFd] = (),
    ) -> T:
        """Make a call of the allocator that brings shares, which `take` adds to those that are held.

        With `again` it is repeated when the service ended before it answered: only for calls that the service knows
        again. Sends duplicates of `fds`. Raises UdmabufError, OSError; ServiceRestarted for a call that was not
        repeated: a share that it has taken all the same cannot be told from others, and ends with the connection.
        """
        self._shares.open()
        try:
            return await self._session.bring(
                OBJECT_PATH,
                ALLOCATOR_INTERFACE,
                member,
                body,
                timeout,
                again=again,
                take=take,
                refuse=self._give_back,
                fds=fds,
            )
        except ServiceRestarted as error:
            hint = _LOST_WITH_THE_BUS if not error.dbus_name else _HINTS.get(member, _IMPORT_AGAIN)
            raise ServiceRestarted(f"{error} {hint}", dbus_name=error.dbus_name) from error
        finally:
            self._shares.opened()
            self._releases.settle()

    def _give_back(self, reply: Reply) -> None:
        """Release the buffers of a reply that is not used: all members that bring shares name them first."""
        named = reply.body[0] if reply.body else []
        for path in [named] if isinstance(named, str) else named if isinstance(named, list) else []:
            if isinstance(path, str) and path.startswith(BUFFER_PATH_PREFIX):
                self._releases.give_back(path)


def new_share(path: str, info: BufferInfo) -> Share:
    """Return the share that a reply brings. Raises BadReply."""
    if not path.startswith(BUFFER_PATH_PREFIX):
        raise BadReply(f"{path} is not the path of a buffer.")
    return Share(path, info)
