# SPDX-License-Identifier: MIT
"""The members of the service as coroutines, each once, for both clients; and the signals that tell of buffers.

Knows what each member means. How a call travels and fails is left to link.py; buffers as objects, mappings and
threads to aio, sync and buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, TypeVar

from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming, Reply
from udmabufd_base.errors import BusError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import (
    ALLOCATOR_INTERFACE,
    BUFFER_INTERFACE,
    BUFFER_PATH_PREFIX,
    BUS_NAME,
    OBJECT_PATH,
)
from udmabufd_client.errors import BadReply, CallTimedOut, NoSuchBuffer, ServiceUnavailable, UdmabufError
from udmabufd_client.info import BufferInfo, ListedBuffer, parse_properties
from udmabufd_client.interface import interface
from udmabufd_client.link import Link, fds_of, steal_fds
from udmabufd_client.share import Share

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT: Final = 25.0
"""Seconds that a call may take unless it is told otherwise; libdbus's default."""

_PROPERTIES: Final = "org.freedesktop.DBus.Properties"

_MAX_EARLY: Final = 64
"""Buffers whose signals are kept while a reply that can bring the buffer is under way."""


class Service:
    """The service at the other end of a link, and the shares that this end holds.

    Belongs to the loop that opened it; only what is called `..._soon` may be called from other threads.
    """

    def __init__(self) -> None:
        self._link: Link
        self._owner = ""
        self._shares: dict[str, list[Share]] = {}
        self._opening = 0
        self._early: dict[tuple[str, str], dict[str, Any]] = {}

    @classmethod
    async def open(cls, bus: str, timeout: float) -> Service:
        """Connect to `bus`: "system", "session" or a D-Bus address. Raises ServiceUnavailable, CallTimedOut."""
        service = cls()
        service._link = await Link.open(bus, timeout, service._signal)
        return service

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._link.unique_name

    @property
    def alive(self) -> bool:
        """Whether calls can be made: not closed, and still in the process that connected."""
        return self._link.alive

    async def wait_lost(self) -> None:
        """Return when the connection to the bus is lost."""
        await self._link.wait_lost()

    async def close(self) -> None:
        """End the connection; the service takes back all shares of it. Harmless when repeated."""
        await self._link.close()

    def abandon(self) -> None:
        """close() at once, without a turn of the loop, on the loop's thread."""
        self._link.abandon()

    def abandon_soon(self) -> None:
        """abandon() from any thread: for finalizers."""
        self._link.soon(self._link.abandon)

    # Members of the allocator

    async def allocate(self, spec: Mapping[str, Variant], timeout: float | None) -> tuple[Share, OwnedFd]:
        """Allocate: one buffer with memory."""

        def take(reply: Reply) -> tuple[Share, OwnedFd]:
            path, index, info = reply.body
            share = _new_share(path, reply, BufferInfo.parse(info))
            return share, steal_fds(reply, [index])[0]

        share, fd = await self._bring("Allocate", [spec], take, timeout)
        return self._hold(share), fd

    async def allocate_many(
        self, spec: Mapping[str, Variant], count: int, timeout: float | None
    ) -> list[tuple[Share, OwnedFd]]:
        """AllocateMany: `count` buffers alike, all or none."""

        def take(reply: Reply) -> list[tuple[Share, OwnedFd]]:
            paths, indexes, infos = reply.body
            if not len(paths) == len(indexes) == len(infos) == count:
                raise BadReply(f"AllocateMany: {len(paths)} buffers and {len(indexes)} descriptors for {count}.")
            shares = [_new_share(path, reply, BufferInfo.parse(info)) for path, info in zip(paths, infos, strict=True)]
            return list(zip(shares, steal_fds(reply, indexes), strict=True))

        return [
            (self._hold(share), fd) for share, fd in await self._bring("AllocateMany", [spec, count], take, timeout)
        ]

    async def create(self, spec: Mapping[str, Variant], timeout: float | None) -> Share:
        """CreateBuffer, and its properties: a buffer without memory."""
        share = await self._bring(
            "CreateBuffer", [spec], lambda reply: _new_share(reply.body[0], reply, BufferInfo()), timeout
        )
        self._hold(share)
        try:
            await self.refresh(share, timeout)
        except BaseException:
            self.give_back(share)
            raise
        return share

    async def import_ticket(self, ticket: str, timeout: float | None) -> Share:
        """ImportTicket: a share of another holder's buffer, in whatever state it is."""

        def take(reply: Reply) -> Share:
            path, info = reply.body
            return _new_share(path, reply, BufferInfo.parse(info))

        return self._hold(await self._bring("ImportTicket", [ticket], take, timeout))

    async def list_buffers(self, timeout: float | None) -> list[ListedBuffer]:
        """ListBuffers: the buffers of the caller's user; root sees all."""
        (entries,) = await self._link.ask(BUS_NAME, OBJECT_PATH, ALLOCATOR_INTERFACE, "ListBuffers", [], timeout)
        return [ListedBuffer.parse(entry) for entry in entries]

    async def properties(self, timeout: float | None) -> dict[str, Any]:
        """Return every property of the allocator that the interface has and the service gives, by name."""
        return await self._get_all(BUS_NAME, OBJECT_PATH, ALLOCATOR_INTERFACE, timeout)

    # Members of a buffer

    async def get_fd(self, share: Share, timeout: float | None) -> OwnedFd:
        """GetFd: a descriptor of the buffer; the first call allocates its memory."""
        share.expect()
        reply = await self._link.call(share.owner, share.path, BUFFER_INTERFACE, "GetFd", [{}], timeout)
        with fds_of(reply):
            index, info = reply.body
            share.told_info(BufferInfo.parse(info))
            return steal_fds(reply, [index])[0]

    async def get_ticket(self, share: Share, timeout: float | None) -> str:
        """GetTicket: the secret that stands for the buffer in import_ticket()."""
        (ticket,) = await self._link.ask(share.owner, share.path, BUFFER_INTERFACE, "GetTicket", [], timeout)
        return str(ticket)

    async def set_name(self, share: Share, name: str, timeout: float | None) -> None:
        """SetName: rename the buffer, in the kernel's listings too."""
        share.expect()
        await self._link.ask(share.owner, share.path, BUFFER_INTERFACE, "SetName", [name], timeout)
        if not share.heard("Name"):
            share.told_properties({"Name": name})

    async def refresh(self, share: Share, timeout: float | None) -> None:
        """Read the buffer's properties anew."""
        share.expect()
        said = await self._get_all(share.owner, share.path, BUFFER_INTERFACE, timeout)
        share.told_properties({name: value for name, value in said.items() if not share.heard(name)})

    async def release(self, share: Share, timeout: float | None) -> None:
        """Release: give back the share and wait for the answer. Nothing when it was given back before."""
        if share.released:
            return
        share.released = True
        try:
            await self._link.ask(share.owner, share.path, BUFFER_INTERFACE, "Release", [], timeout)
        except (CallTimedOut, NoSuchBuffer, ServiceUnavailable):
            # Gone, or perhaps gone: asking twice could take the share of another Buffer of the same path.
            raise
        except UdmabufError:
            share.released = False
            raise
        finally:
            if share.released:
                self._forget(share)

    def give_back(self, share: Share) -> None:
        """Release without waiting for an answer: for close(), which must neither block nor fail."""
        if not share.released:
            share.released = True
            self._forget(share)
            self._send_release(share.path, share.owner)

    def give_back_soon(self, share: Share) -> None:
        """give_back() from any thread, also from a finalizer. Nothing once the connection has ended."""
        self._link.soon(self.give_back, share)

    # Parts of the above

    async def _get_all(
        self, destination: str, path: str, interface_name: str, timeout: float | None
    ) -> dict[str, Any]:
        (raw,) = await self._link.ask(destination, path, _PROPERTIES, "GetAll", [interface_name], timeout)
        return parse_properties(interface_name, raw)

    async def _bring(self, member: str, body: list[Any], take: Callable[[Reply], T], timeout: float | None) -> T:
        """Make a call of the allocator that brings shares."""
        if not self._opening:
            self._early.clear()
        self._opening += 1
        try:
            return await self._link.bring(
                OBJECT_PATH, ALLOCATOR_INTERFACE, member, body, timeout, take=take, refuse=self._give_back_all
            )
        finally:
            self._opening -= 1

    def _hold(self, share: Share) -> Share:
        """Keep a share that a reply brought, and tell it what signals have said of it since."""
        self._owner = share.owner
        self._shares.setdefault(share.path, []).append(share)
        share.told_properties(self._early.pop((share.path, share.owner), {}))
        return share

    def _forget(self, share: Share) -> None:
        held = self._shares.get(share.path, [])
        with suppress(ValueError):
            held.remove(share)
        if not held:
            self._shares.pop(share.path, None)

    def _give_back_all(self, reply: Reply) -> None:
        """Release the buffers of a reply that is not used: all members that bring shares name them first."""
        named = reply.body[0] if reply.body else []
        for path in [named] if isinstance(named, str) else named if isinstance(named, list) else []:
            if isinstance(path, str) and path.startswith(BUFFER_PATH_PREFIX):
                self._send_release(path, reply.sender)

    def _send_release(self, path: str, owner: str) -> None:
        if not self._link.alive:
            return
        try:
            self._link.send(owner, path, BUFFER_INTERFACE, "Release")
        except BusError as error:
            # A lost connection has no shares. A full queue keeps this one until the connection ends.
            log.debug("Release of %s was not sent: %s", path, error)

    # What comes unasked

    def _signal(self, incoming: Incoming) -> None:
        """Pass on what the service says of a buffer. Anybody can send signals: only the buffer's owner counts."""
        header = incoming.header
        path, sender = header.path, header.sender
        shares = [share for share in self._shares.get(path, ()) if share.owner == sender]
        early = self._opening > 0 and self._owner in ("", sender)
        if (
            not (shares or early)
            or header.interface != _PROPERTIES
            or header.member != "PropertiesChanged"
            or header.signature != interface(_PROPERTIES).signals["PropertiesChanged"]
        ):
            return
        try:
            interface_name, changed, _ = incoming.body()
            properties = parse_properties(BUFFER_INTERFACE, changed) if interface_name == BUFFER_INTERFACE else {}
        except (BusError, BadReply) as error:
            log.debug("PropertiesChanged of %s from %s passed over: %s", path, sender, error)
            return
        for share in shares:
            share.told_properties(properties)
        if early and properties and ((path, sender) in self._early or len(self._early) < _MAX_EARLY):
            self._early.setdefault((path, sender), {}).update(properties)


def _new_share(path: str, reply: Reply, info: BufferInfo) -> Share:
    if not path.startswith(BUFFER_PATH_PREFIX):
        raise BadReply(f"{path} is not the path of a buffer.")
    return Share(path, reply.sender, info)
