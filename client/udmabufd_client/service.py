# SPDX-License-Identifier: MIT
"""The members of the service as coroutines, each once, for both clients; and the signals that tell of buffers.

Knows what each member means, and whether it can be repeated. How calls survive is left to session.py, shares to
keeper.py and releases.py; buffers as objects, mappings and threads to aio, sync and buffer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming, Reply
from udmabufd_base.errors import BusError
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.message import ALLOW_INTERACTIVE_AUTHORIZATION
from udmabufd_client.arrivals import Arrivals, new_share
from udmabufd_client.contract import (
    ADMIN_INTERFACE,
    ALLOCATOR_INTERFACE,
    BUFFER_INTERFACE,
    OBJECT_PATH,
)
from udmabufd_client.errors import BadReply, CallTimedOut, NoSuchBuffer, ServiceUnavailable, UdmabufError
from udmabufd_client.info import BufferInfo, ListedBuffer, RecoveredBuffer, Usage, parse_properties
from udmabufd_client.interface import PROPERTIES_INTERFACE, interface
from udmabufd_client.keeper import Keeper
from udmabufd_client.link import fds_of, steal_fds
from udmabufd_client.releases import Releases
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares

log = logging.getLogger(__name__)


class Service:
    """The service at the other end, and the shares that this end holds.

    Belongs to the loop that opened it; only what is called `..._soon` may be called from other threads.
    """

    def __init__(
        self, bus: str, timeout: float, *, reconnect: bool, on_reconnect: Callable[[], object] | None
    ) -> None:
        """For open()."""
        self._timeout = timeout
        self._shares = Shares()
        self._session = Session(
            bus,
            timeout,
            reconnect=reconnect,
            signal=self._signal,
            restarted=lambda: self._keeper.restarted(),
            reconnected=lambda: self._keeper.reconnected(),
        )
        self._releases = Releases(self._session, self._shares)
        self._arrivals = Arrivals(self._session, self._shares, self._releases)
        self._keeper = Keeper(self._session, self._shares, self._arrivals, self._releases, on_reconnect)

    @classmethod
    async def open(
        cls,
        bus: str,
        timeout: float = DEFAULT_TIMEOUT,
        *,
        reconnect: bool = True,
        on_reconnect: Callable[[], object] | None = None,
    ) -> Service:
        """Connect to `bus`: "system", "session" or a D-Bus address. Raises ServiceUnavailable, CallTimedOut."""
        service = cls(bus, timeout, reconnect=reconnect, on_reconnect=on_reconnect)
        await service._session.open()
        return service

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._session.unique_name

    @property
    def alive(self) -> bool:
        """Whether calls can be made: not closed, and still in the process that connected."""
        return self._session.alive

    async def wait_lost(self) -> None:
        """Return when the connection to the bus has been lost for the first time, or is closed."""
        await self._session.wait_lost()

    async def close(self) -> None:
        """End the connection; the service takes back all shares of it. Harmless when repeated."""
        await self._session.close()

    def abandon(self) -> None:
        """close() at once, without a turn of the loop, on the loop's thread."""
        self._session.abandon()

    def abandon_soon(self) -> None:
        """abandon() from any thread: for finalizers."""
        self._session.soon(self._session.abandon)

    # Members of the allocator that bring shares: repeated only with a request_id, by which the service knows them

    async def allocate(self, spec: Mapping[str, Variant], timeout: float | None) -> tuple[Share, OwnedFd]:
        """Allocate: one buffer with memory."""

        def take(reply: Reply) -> tuple[Share, OwnedFd]:
            path, index, info = reply.body
            share = new_share(path, BufferInfo.parse(info))
            fd = steal_fds(reply, [index])[0]
            return self._hold(share), fd

        return await self._arrivals.bring("Allocate", [spec], take, timeout, again="request_id" in spec)

    async def allocate_many(
        self, spec: Mapping[str, Variant], count: int, timeout: float | None
    ) -> list[tuple[Share, OwnedFd]]:
        """AllocateMany: `count` buffers alike, all or none."""

        def take(reply: Reply) -> list[tuple[Share, OwnedFd]]:
            paths, indexes, infos = reply.body
            if not len(paths) == len(indexes) == len(infos) == count:
                raise BadReply(f"AllocateMany: {len(paths)} buffers and {len(indexes)} descriptors for {count}.")
            shares = [new_share(path, BufferInfo.parse(info)) for path, info in zip(paths, infos, strict=True)]
            fds = steal_fds(reply, indexes)
            return [(self._hold(share), fd) for share, fd in zip(shares, fds, strict=True)]

        return await self._arrivals.bring("AllocateMany", [spec, count], take, timeout, again="request_id" in spec)

    async def create(self, spec: Mapping[str, Variant], timeout: float | None) -> Share:
        """CreateBuffer, its properties and its ticket: a buffer without memory."""
        left = self._countdown(timeout)

        def take(reply: Reply) -> Share:
            return self._hold(new_share(reply.body[0], BufferInfo()))

        share = await self._arrivals.bring("CreateBuffer", [spec], take, left(), again="request_id" in spec)
        try:
            await self.refresh(share, left())
            await self._learn_ticket(share, left())
        except BaseException:
            self.give_back(share)
            raise
        return share

    async def wrap(
        self,
        fds: Sequence[OwnedFd],
        ranges: Sequence[Sequence[int]],
        options: Mapping[str, Variant],
        timeout: float | None,
    ) -> Share:
        """WrapMemfd: a buffer of the caller's own memory. Consumes `fds`."""
        left = self._countdown(timeout)
        try:
            body = [list(range(len(fds))), ranges, options]
            again = "request_id" in options
            share = await self._arrivals.bring("WrapMemfd", body, self._take, left(), again=again, fds=fds)
        finally:
            close_all(fds)
        try:
            await self._learn_ticket(share, left())
        except BaseException:
            self.give_back(share)
            raise
        return share

    async def import_fd(self, fd: OwnedFd, timeout: float | None) -> tuple[Share, OwnedFd]:
        """Import: a share of the buffer that `fd` is of. Consumes `fd`, and returns it beside the share."""
        try:
            return await self._arrivals.bring("Import", [0], self._take, timeout, again=False, fds=[fd]), fd
        except BaseException:
            fd.close()
            raise

    async def import_ticket(self, ticket: str, timeout: float | None) -> Share:
        """ImportTicket: a share of another holder's buffer, in whatever state it is."""
        share = await self._arrivals.bring("ImportTicket", [ticket], self._take, timeout, again=False)
        share.ticket = ticket
        return share

    # Members of the allocator that tell

    async def list_buffers(self, timeout: float | None) -> list[ListedBuffer]:
        """ListBuffers: the buffers of the caller's user; root sees all."""
        (entries,) = await self._tell(ALLOCATOR_INTERFACE, "ListBuffers", [], timeout)
        return [ListedBuffer.parse(entry) for entry in entries]

    async def properties(self, timeout: float | None) -> dict[str, Any]:
        """Return every property of the allocator that the interface has and the service gives, by name."""
        return await self._get_all(OBJECT_PATH, ALLOCATOR_INTERFACE, timeout)

    async def usage(self, interactive: bool, timeout: float | None) -> list[Usage]:
        """GetUsage, for administrators: who holds how much."""
        flags = ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        (rows,) = await self._tell(ADMIN_INTERFACE, "GetUsage", [], timeout, flags=flags)
        return [Usage.parse(row) for row in rows]

    async def recover(self, discard: bool, interactive: bool, timeout: float | None) -> list[RecoveredBuffer]:
        """Recover, for administrators: keep or give up the buffers of a state that could not be read."""
        options = {"discard": Variant("b", bool(discard))}
        flags = ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        (rows,) = await self._tell(ADMIN_INTERFACE, "Recover", [options], timeout, again=False, flags=flags)
        return [RecoveredBuffer.parse(row) for row in rows]

    # Members of a buffer

    async def get_fd(self, share: Share, timeout: float | None) -> OwnedFd:
        """GetFd: a descriptor of the buffer; the first call allocates its memory."""
        share.expect()
        reply = await self._session.call(share, BUFFER_INTERFACE, "GetFd", [{}], timeout, again=True)
        with fds_of(reply):
            index, info = reply.body
            share.told_info(BufferInfo.parse(info))
            return steal_fds(reply, [index])[0]

    async def get_ticket(self, share: Share, timeout: float | None) -> str:
        """GetTicket: the secret that stands for the buffer in import_ticket()."""
        (ticket,) = await self._session.ask(share, BUFFER_INTERFACE, "GetTicket", [], timeout, again=True)
        share.ticket = str(ticket)
        return share.ticket

    def want_ticket_soon(self, share: Share) -> None:
        """Get the ticket of a buffer that has no descriptor any more, from any thread: see Keeper."""

        async def learn() -> None:
            try:
                await self._learn_ticket(share, None)
            except UdmabufError as error:
                log.debug("Buffer %s goes without its ticket: %s", share.id, error)

        self._session.soon(lambda: self._session.background.start(learn()))

    async def set_name(self, share: Share, name: str, timeout: float | None) -> None:
        """SetName: rename the buffer, in the kernel's listings too."""
        share.expect()
        await self._session.ask(share, BUFFER_INTERFACE, "SetName", [name], timeout, again=True)
        if not share.heard("Name"):
            share.told_properties({"Name": name})

    async def refresh(self, share: Share, timeout: float | None) -> None:
        """Read the buffer's properties anew."""
        share.expect()
        said = await self._get_all(share, BUFFER_INTERFACE, timeout)
        share.told_reply(said)

    async def release(self, share: Share, timeout: float | None) -> None:
        """Release: give back the share and wait for the answer. Nothing when it was given back before."""
        left = self._countdown(timeout)
        if share.released:
            return
        link = await self._session.standing("Release", left(), share)
        if not self._mark_released(share):
            return
        try:
            await self._releases.release(link, share.path, left())
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
        if not self._mark_released(share):
            return
        if share.held:
            self._releases.give_back(share.path)
        self._forget(share)

    def give_back_soon(self, share: Share) -> None:
        """give_back() from any thread, also from a finalizer. Nothing once the connection has ended."""
        self._session.soon(self.give_back, share)

    # Parts of the above

    def _countdown(self, timeout: float | None) -> Callable[[], float]:
        """Return what tells the seconds left, for what takes several calls."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._timeout if timeout is None else timeout)
        return lambda: max(deadline - loop.time(), 0.0)

    async def _tell(
        self,
        interface_name: str,
        member: str,
        body: list[Any],
        timeout: float | None,
        *,
        again: bool = True,
        flags: int = 0,
    ) -> list[Any]:
        return await self._session.ask(OBJECT_PATH, interface_name, member, body, timeout, again=again, flags=flags)

    async def _get_all(self, target: Share | str, interface_name: str, timeout: float | None) -> dict[str, Any]:
        (raw,) = await self._session.ask(target, PROPERTIES_INTERFACE, "GetAll", [interface_name], timeout, again=True)
        return parse_properties(interface_name, raw)

    async def _learn_ticket(self, share: Share, timeout: float | None) -> None:
        if self._session.reconnect and not share.ticket:
            await self.get_ticket(share, timeout)

    def _take(self, reply: Reply) -> Share:
        """Take the one share of a reply that has a path and info."""
        path, info = reply.body
        return self._hold(new_share(path, BufferInfo.parse(info)))

    def _hold(self, share: Share) -> Share:
        self._shares.add(share)
        return share

    def _mark_released(self, share: Share) -> bool:
        """Mark a share as given back; False if it was before."""
        before, share.released = share.released, True
        return not before

    def _forget(self, share: Share) -> None:
        self._shares.remove(share)
        self._releases.settle()

    def _signal(self, incoming: Incoming) -> None:
        """Pass on what the service says of a buffer. Anybody can send signals: only the name's owner counts."""
        header = incoming.header
        path, sender = header.path, header.sender
        if (
            sender != self._session.link.owner
            or not self._shares.awaits(path)
            or (header.interface, header.member) != (PROPERTIES_INTERFACE, "PropertiesChanged")
            or header.signature != interface(PROPERTIES_INTERFACE).signals["PropertiesChanged"]
        ):
            return
        try:
            interface_name, changed, _ = incoming.body()
            properties = parse_properties(BUFFER_INTERFACE, changed) if interface_name == BUFFER_INTERFACE else {}
        except (BusError, BadReply) as error:
            log.debug("PropertiesChanged of %s from %s passed over: %s", path, sender, error)
            return
        self._shares.told(path, properties)
