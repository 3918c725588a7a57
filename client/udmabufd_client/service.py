# SPDX-License-Identifier: MIT
"""The members of the service as coroutines, each once, for both clients; and the signals that tell of buffers.

Knows what each member means, and whether it can be repeated. What only tells is in reports.py, descriptors are in
descriptors.py, moves in moves.py and own_moves.py. How calls survive is left to session.py, shares to keeper.py and
releases.py; buffers as objects, mappings and threads to aio, sync and buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming, Reply
from udmabufd_base.errors import BusError
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_client.arrivals import Arrivals, new_share
from udmabufd_client.attachments import Attachments
from udmabufd_client.contract import BUFFER_INTERFACE
from udmabufd_client.descriptors import Descriptors
from udmabufd_client.errors import BadReply, CallTimedOut, NoSuchBuffer, ServiceUnavailable, UdmabufError
from udmabufd_client.info import BufferInfo, parse_properties
from udmabufd_client.interface import PROPERTIES_INTERFACE, interface
from udmabufd_client.keeper import Keeper
from udmabufd_client.link import steal_fds
from udmabufd_client.moves import Moves
from udmabufd_client.own_moves import OwnMoves
from udmabufd_client.pins import Pins
from udmabufd_client.releases import Releases
from udmabufd_client.reports import Reports
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
        self.session = Session(
            bus,
            timeout,
            reconnect=reconnect,
            signal=self._signal,
            restarted=lambda: self._keeper.restarted(),
            reconnected=lambda: self._keeper.reconnected(),
            over=lambda: self._moves.lost(),
        )
        self._releases = Releases(self.session, self._shares)
        self._arrivals = Arrivals(self.session, self._shares, self._releases)
        self.attachments = Attachments(self.session, self._shares)
        self.pins = Pins(self.session, self.attachments)
        self.descriptors = Descriptors(self.session, self._shares, timeout)
        self.own_moves = OwnMoves(self.session, self._shares, self.attachments, self.pins, self.descriptors)
        self._moves = Moves(self.session, self._shares, self.attachments, self.descriptors)
        self.attachments.left = self._moves.left
        self.attachments.came = self._moves.came
        self.reports = Reports(self.session)
        self._tellers: dict[tuple[str, str], Callable[..., None]] = {
            (PROPERTIES_INTERFACE, "PropertiesChanged"): self._changed,
            (BUFFER_INTERFACE, "Detached"): self.attachments.detached,
            (BUFFER_INTERFACE, "MoveNotify"): self._moves.move_notify,
            (BUFFER_INTERFACE, "EvictNotify"): self._moves.evict_notify,
            (BUFFER_INTERFACE, "Moved"): self._moves.moved,
            (BUFFER_INTERFACE, "MoveCancelled"): self._moves.cancelled,
        }
        self._keeper = Keeper(
            self.session,
            self._shares,
            self._arrivals,
            self._releases,
            self.attachments,
            self.pins,
            on_reconnect,
            self._moves.resume,
        )

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
        await service.session.open()
        return service

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self.session.unique_name

    @property
    def alive(self) -> bool:
        """Whether calls can be made: not closed, and still in the process that connected."""
        return self.session.alive

    async def wait_lost(self) -> None:
        """Return when the connection to the bus has been lost for the first time, or is closed."""
        await self.session.wait_lost()

    async def close(self) -> None:
        """End the connection; the service takes back all shares of it. Harmless when repeated."""
        await self.session.close()

    def abandon(self) -> None:
        """close() at once, without a turn of the loop, on the loop's thread."""
        self.session.abandon()

    def abandon_soon(self) -> None:
        """abandon() from any thread: for finalizers."""
        self.session.soon(self.session.abandon)

    # Members of the allocator that bring shares: repeated only with a request_id, by which the service knows them

    async def allocate(self, spec: Mapping[str, Variant], timeout: float | None) -> Share:
        """Allocate: one buffer with memory."""

        def take(reply: Reply) -> list[Share]:
            path, index, info = reply.body
            share = new_share(path, BufferInfo.parse(info))
            return [self._hold(share, steal_fds(reply, [index])[0])]

        return (await self._allocate("Allocate", [spec], take, timeout))[0]

    async def allocate_many(self, spec: Mapping[str, Variant], count: int, timeout: float | None) -> list[Share]:
        """AllocateMany: `count` buffers alike, all or none."""

        def take(reply: Reply) -> list[Share]:
            paths, indexes, infos = reply.body
            if not len(paths) == len(indexes) == len(infos) == count:
                raise BadReply(f"AllocateMany: {len(paths)} buffers and {len(indexes)} descriptors for {count}.")
            shares = [new_share(path, BufferInfo.parse(info)) for path, info in zip(paths, infos, strict=True)]
            fds = steal_fds(reply, indexes)
            return [self._hold(share, fd) for share, fd in zip(shares, fds, strict=True)]

        return await self._allocate("AllocateMany", [spec, count], take, timeout)

    async def _allocate(
        self, member: str, body: list[Any], take: Callable[[Reply], list[Share]], timeout: float | None
    ) -> list[Share]:
        left = self.countdown(timeout)
        spec = body[0]
        with self.attachments.arriving():
            made = await self._arrivals.bring(member, body, take, left(), again="request_id" in spec)
            try:
                await self.attachments.learn(made, spec, left)
            except BaseException:
                for share in made:
                    self.drop(share)
                raise
        return made

    async def create(self, spec: Mapping[str, Variant], timeout: float | None) -> Share:
        """CreateBuffer, its properties and its ticket: a buffer without memory."""
        left = self.countdown(timeout)

        def take(reply: Reply) -> Share:
            return self._hold(new_share(reply.body[0], BufferInfo()))

        with self.attachments.arriving():
            share = await self._arrivals.bring("CreateBuffer", [spec], take, left(), again="request_id" in spec)
            try:
                rows = await self.attachments.read(share, share, left())
                self.attachments.of_spec(share, spec, rows)
                await self.descriptors.learn_ticket(share, left())
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
        left = self.countdown(timeout)
        try:
            body = [list(range(len(fds))), ranges, options]
            again = "request_id" in options
            with self.attachments.arriving():
                share = await self._arrivals.bring("WrapMemfd", body, self._take, left(), again=again, fds=fds)
                try:
                    await self.attachments.learn([share], options, left)
                    await self.descriptors.learn_ticket(share, left())
                except BaseException:
                    self.give_back(share)
                    raise
        finally:
            close_all(fds)
        return share

    async def import_fd(self, fd: OwnedFd, timeout: float | None) -> Share:
        """Import: a share of the buffer that `fd` is of, whichever memory it had then. Consumes `fd`."""
        left = self.countdown(timeout)
        try:
            share = await self._arrivals.bring("Import", [0], self._take, left(), again=False, fds=[fd])
        except BaseException:
            fd.close()
            raise
        try:
            await self.descriptors.refresh(share, fd, share.info, left)
        except BaseException:
            self.drop(share)
            raise
        return share

    async def import_ticket(self, ticket: str, timeout: float | None) -> Share:
        """ImportTicket: a share of another holder's buffer, in whatever state it is."""
        share = await self._arrivals.bring("ImportTicket", [ticket], self._take, timeout, again=False)
        share.ticket = ticket
        return share

    # Members of a buffer

    def want_ticket_soon(self, share: Share) -> None:
        """Get the ticket of a buffer that has no descriptor any more, from any thread: see Keeper."""
        self.descriptors.want_ticket_soon(share)

    async def set_name(self, share: Share, name: str, timeout: float | None) -> None:
        """SetName: rename the buffer, in the kernel's listings too."""
        share.expect()
        await self.session.ask(share, BUFFER_INTERFACE, "SetName", [name], timeout, again=True)
        if not share.heard("Name"):
            share.told_properties({"Name": name})

    async def refresh(self, share: Share, timeout: float | None) -> None:
        """Read the buffer's properties anew."""
        await self.attachments.refresh(share, self.countdown(timeout))

    async def release(self, share: Share, timeout: float | None) -> None:
        """Release: give back the share and wait for the answer. Nothing when it was given back before."""
        left = self.countdown(timeout)
        if share.released:
            return
        link = await self.session.standing("Release", left(), share)
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
                self.attachments.leave(share)
                self._forget(share)

    def give_back(self, share: Share) -> None:
        """Release without waiting for an answer: for close(), which must neither block nor fail."""
        if not self._mark_released(share):
            return
        self.attachments.leave(share)
        if share.held:
            self._releases.give_back(share.path)
        self._forget(share)

    def give_back_soon(self, share: Share) -> None:
        """give_back() from any thread, also from a finalizer. Nothing once the connection has ended."""
        self.session.soon(self.give_back, share)

    def drop(self, share: Share) -> None:
        """give_back() what never became a Buffer, and close its descriptor."""
        share.memory.close()
        self.give_back(share)

    def countdown(self, timeout: float | None) -> Callable[[], float]:
        """Return what tells the seconds left, for what takes several calls."""
        return self.session.home.countdown(self._timeout if timeout is None else timeout)

    # Parts of the above

    def _take(self, reply: Reply) -> Share:
        """Take the one share of a reply that has a path and info."""
        path, info = reply.body
        return self._hold(new_share(path, BufferInfo.parse(info)))

    def _hold(self, share: Share, fd: OwnedFd | None = None) -> Share:
        self._shares.add(share)
        if fd is not None:
            share.memory.take(fd, share.info)
        return share

    def _mark_released(self, share: Share) -> bool:
        """Mark a share as given back; False if it was before."""
        before, share.released = share.released, True
        return not before

    def _forget(self, share: Share) -> None:
        self._shares.remove(share)
        share.watch.end()
        self._moves.left(share.path)
        self._releases.settle()

    def _signal(self, incoming: Incoming) -> None:
        """Pass on what the service says of a buffer. Anybody can send signals: only the name's owner counts."""
        header = incoming.header
        path, sender = header.path, header.sender
        if sender != self.session.link.owner or not self._shares.awaits(path):
            return
        told = self._tellers.get((header.interface, header.member))
        if told is None or header.signature != interface(header.interface).signals[header.member]:
            return
        try:
            told(path, *incoming.body())
        except (BusError, BadReply) as error:
            log.debug("%s of %s from %s passed over: %s", header.member, path, sender, error)

    def _changed(self, path: str, interface_name: str, changed: Mapping[str, Any], invalidated: list[str]) -> None:
        if interface_name == BUFFER_INTERFACE:
            if "Attachments" in (*changed, *invalidated):
                self._shares.attachments_changed(path)
            properties = parse_properties(BUFFER_INTERFACE, changed)
            self._shares.told(path, properties)
            self._moves.told(path, properties.get("Serial"), properties.get("State"))
