# SPDX-License-Identifier: MIT
"""The attachments that a client has: made, ended, told to be gone, and had again after a restart.

An Attach that a service left unanswered when it ended is made again: each attachment is known by its number, so one
that had taken effect all the same is found among the connection's own and ended first. When shares are had again is
left to keeper.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final
from weakref import WeakValueDictionary

from udmabufd_base.codec import Variant
from udmabufd_base.connection import Reply
from udmabufd_client import replies
from udmabufd_client.attachment import Attached
from udmabufd_client.contract import BUFFER_INTERFACE
from udmabufd_client.errors import CallTimedOut, InvalidSpec, NoSuchBuffer, ServiceRestarted, UdmabufError
from udmabufd_client.info import AttachmentInfo, parse_properties
from udmabufd_client.interface import PROPERTIES_INTERFACE
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares

log = logging.getLogger(__name__)

_MAX_EARLY: Final = 64
"""Ends of attachments that are kept while a reply that can bring the attachment is under way."""

_READS: Final = 4
"""How often refresh() reads what changes meanwhile."""

_GONE: Final = "the service does not have it any more"


Rows = tuple[AttachmentInfo, ...] | None
"""All that is attached to a buffer; None where the service does not say."""


class Attachments:
    """The attachments of one session. `on_detached` is told of each that ended otherwise than by this client."""

    def __init__(self, session: Session, shares: Shares) -> None:
        self.on_detached: Callable[[Attached], object] | None = None
        self.left: Callable[[str], object] = lambda path: None
        """Called with the path of a buffer when an attachment of this client to it has ended, for whatever reason."""
        self.came: Callable[[], object] = lambda: None
        """Called when a call has ended that could bring attachments."""
        self._session = session
        self._shares = shares
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._arriving = 0
        self._early: dict[tuple[str, int], str] = {}

    async def attach(
        self, share: Share, device: str, options: Mapping[str, Variant], left: Callable[[], float]
    ) -> Attached:
        """Attach a device; `left` tells the seconds left. Raises UdmabufError; nothing is attached then."""
        # One at a time for each buffer: what an unanswered call has left behind could not be told from another's.
        lock = self._locks.setdefault(share.path, asyncio.Lock())
        limit = left()
        try:
            async with asyncio.timeout(limit):
                await lock.acquire()
        except TimeoutError:
            raise CallTimedOut(f"Attach: the attachments before this one took longer than {limit:g} s.") from None
        try:
            attached = Attached(share, 0, device, options)
            while True:
                try:
                    await self._place(attached, share, left())
                except ServiceRestarted:
                    if not left():
                        raise
                    await self._drop_strays(share, left())
                else:
                    break
        finally:
            lock.release()
        if share.released:
            self.leave(share)
        return attached

    async def detach(self, attached: Attached, timeout: float | None) -> None:
        """Detach; harmless when it has ended. Raises UdmabufError."""
        if not attached.live or attached.share.released:
            return
        attached.leaving = True

        def body() -> list[int]:
            if not attached.number:
                raise _NotThere
            return [attached.number]

        try:
            await self._session.ask(attached.share, BUFFER_INTERFACE, "Detach", body, timeout, again=True)
        except (_NotThere, InvalidSpec, NoSuchBuffer):
            # It ended with its device, with its connection, or by an attempt whose answer was lost.
            pass
        except UdmabufError:
            attached.leaving = False
            if not attached.number:
                # Meanwhile others were had again, and this one was not.
                self._end(attached, "it was being detached when its connection was lost")
            raise
        attached.end("it was detached")
        self._forget(attached)
        self._shares.attachments_changed(attached.share.path)

    def unwanted(self, attached: Attached) -> None:
        """Nobody takes what attach() has returned any more: end it without waiting for an answer."""
        if attached.live and attached.number:
            self._take_back(attached.share.path, attached.number)
        attached.end("nobody waited for it any more")
        self._forget(attached)

    async def read(self, share: Share, target: Share | str, timeout: float | None) -> Rows:
        """Read a buffer's properties anew, and return what is attached, None if the service does not say; `target` is
        its path where the share is not known to be held.

        What was attached before and is missing in the answer has ended: a signal was missed. The share has no rows if
        there was a change meanwhile, which the answer may be older than. Raises UdmabufError.
        """
        attached, changes = list(share.attachments), share.changes
        share.expect()
        (raw,) = await self._session.ask(
            target, PROPERTIES_INTERFACE, "GetAll", [BUFFER_INTERFACE], timeout, again=True
        )
        properties = parse_properties(BUFFER_INTERFACE, raw)
        rows: Rows = properties.pop("Attachments", None)
        share.told_reply(properties)
        if share.changes == changes:
            share.attachment_rows = rows
        own = own_numbers(rows)
        for each in attached:
            if rows is not None and each.live and each.number and each.number not in own:
                self._end(each, _GONE)
        return rows

    async def refresh(self, share: Share, left: Callable[[], float]) -> None:
        """read(), and again if what is attached changes meanwhile. Raises UdmabufError."""
        for _ in range(_READS):
            changes = share.changes
            await self.read(share, share, left())
            if share.changes == changes or not left():
                break

    async def learn(self, shares: Sequence[Share], spec: Mapping[str, Variant], left: Callable[[], float]) -> None:
        """Learn what new buffers alike demand, which no reply that brings them tells, and what is attached to them."""
        if "request_id" not in spec and "devices" not in spec and "constraints" not in spec:
            for share in shares:
                share.told_reply({"Constraints": {}, "Attachments": ()})
            return
        for share in shares:
            rows: Rows = None
            if share is shares[0] or "request_id" in spec:
                try:
                    rows = await self.read(share, share, left())
                except UdmabufError as error:
                    # The buffer is there all the same.
                    log.info("Properties of buffer %s could not be read: %s", share.id, error)
            else:
                share.constraints, share.attachment_rows = shares[0].constraints, shares[0].attachment_rows
            self.of_spec(share, spec, rows)

    def of_spec(self, share: Share, spec: Mapping[str, Variant], rows: Rows) -> None:
        """The service has attached the devices of `spec`: numbered from 1 in their order, to a new buffer.

        One that it knew again by its request_id may have others' too: then the connection's own among `rows` count
        that no other share has.
        """
        devices = spec["devices"].value if "devices" in spec else []
        numbered = list(enumerate(devices, start=1))
        if "request_id" in spec and rows is not None:
            taken = {each.number for other in self._shares.of(share.path) for each in other.attachments}
            own = [row for row in rows if row.own and row.number not in taken]
            numbered = [(row.number, row.device) for row in own if row.device in devices]
        for number, device in numbered:
            attached = Attached(share, 0, device, {})
            attached.constraints = share.constraints or {}
            self._is(attached, number)

    def leave(self, share: Share) -> None:
        """A share is given back. What it has attached ends with it, also where the client has others of the buffer."""
        others = self._shares.of(share.path)
        for attached in share.attachments:
            if attached.live and attached.number and any(other is not share for other in others):
                self._take_back(share.path, attached.number)
            attached.end("its buffer was closed or released")
        share.attachments.clear()
        self.left(share.path)

    def lost(self, share: Share) -> None:
        """A share is lost, and what it had attached."""
        for attached in share.attachments:
            attached.end("its buffer was lost in a restart of the service or of the bus")
        share.attachments.clear()
        self.left(share.path)

    @property
    def expected(self) -> bool:
        """Whether a call is under way that can bring attachments: signals can be about one that is not known yet."""
        return self._arriving > 0

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """While a call is under way that can bring attachments: a signal can say that one ended before it is known."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1
            if not self._arriving:
                self._early.clear()
            self.came()

    def detached(self, path: str, number: int, reason: str) -> None:
        """The service says that an attachment has ended."""
        self._shares.attachments_changed(path)
        known = [each for share in self._shares.of(path) for each in share.attachments if each.number == number]
        for attached in known:
            self._end(attached, reason or "the service gives no reason")
        if not known and self.expected and len(self._early) < _MAX_EARLY:
            self._early[path, number] = reason or "the service gives no reason"

    async def again(self, attached: Attached, there: Collection[int]) -> None:
        """Have an attachment again on a share that was had again, unless it is `there`. Raises UdmabufError."""
        share = attached.share
        if attached.number in there:
            return
        attached.number = 0
        try:
            await self._place(attached, share.path, DEFAULT_TIMEOUT)
        except ServiceRestarted:
            # While the user's own are under way, those are not known either.
            if share.path not in self._locks:
                await self._drop_strays(share.path, DEFAULT_TIMEOUT)
            raise
        if share.released:
            self.leave(share)

    def give_up(self, attached: Attached, why: str) -> None:
        """An attachment could not be had again."""
        self._end(attached, f"it could not be attached again: {why}")

    # Parts of the above

    async def _place(self, attached: Attached, target: Share | str, timeout: float) -> None:
        share = attached.share
        share.expect()

        def take(reply: Reply) -> None:
            number, merged = reply.body
            attached.constraints = replies.constraints(merged)
            share.told_reply({"Constraints": attached.constraints})
            self._is(attached, number)
            # At once, though the signal that says it, too, may come later.
            self._shares.attachments_changed(share.path)

        def refuse(reply: Reply) -> None:
            if reply.signature == "ua{sv}":
                self._take_back(share.path, reply.body[0])

        with self.arriving():
            await self._session.bring(
                target,
                BUFFER_INTERFACE,
                "Attach",
                [attached.device, attached.options],
                timeout,
                again=False,
                take=take,
                refuse=refuse,
            )

    def _is(self, attached: Attached, number: int) -> None:
        attached.number = number
        if attached not in attached.share.attachments:
            attached.share.attachments.append(attached)
        if early := self._early.pop((attached.share.path, number), ""):
            self._end(attached, early)

    async def _drop_strays(self, target: Share | str, timeout: float) -> None:
        """End the connection's attachments that nobody here knows: an unanswered call has made them."""
        left = asyncio.get_running_loop().time() + timeout
        (raw,) = await self._session.ask(
            target, PROPERTIES_INTERFACE, "GetAll", [BUFFER_INTERFACE], timeout, again=True
        )
        path = target if isinstance(target, str) else target.path
        known = {each.number for share in self._shares.of(path) for each in share.attachments}
        for row in parse_properties(BUFFER_INTERFACE, raw).get("Attachments", ()):
            if row.own and row.number not in known:
                seconds = max(left - asyncio.get_running_loop().time(), 0.0)
                try:
                    await self._session.ask(target, BUFFER_INTERFACE, "Detach", [row.number], seconds, again=True)
                except InvalidSpec as error:
                    log.debug("Attachment %d of %s has ended: %s", row.number, path, error)

    def _take_back(self, path: str, number: int) -> None:
        """Detach without waiting for an answer."""
        link = self._session.link

        async def detach() -> None:
            try:
                await self._session.ask(
                    path, BUFFER_INTERFACE, "Detach", [number], DEFAULT_TIMEOUT, again=True, only=link
                )
            except UdmabufError as error:
                log.debug("Attachment %d of %s was not ended: %s", number, path, error)

        if self._session.alive and link.lost is None:
            self._session.background.post(detach())

    def _end(self, attached: Attached, reason: str) -> None:
        if not attached.end(reason):
            return
        self._forget(attached)
        if self.on_detached is not None and not attached.leaving:
            try:
                self.on_detached(attached)
            except Exception:
                log.exception("on_detached failed")

    def _forget(self, attached: Attached) -> None:
        if attached in attached.share.attachments:
            attached.share.attachments.remove(attached)
        self.left(attached.share.path)


def own_numbers(rows: Rows) -> frozenset[int]:
    """Return the numbers of the attachments that are this connection's."""
    return frozenset(row.number for row in rows or () if row.own)


class _NotThere(Exception):
    """The attachment ended with its connection."""
