# SPDX-License-Identifier: MIT
"""Moves and evictions that the service asks this client about: each answered when nobody uses the memory any more.

Whoever cares (notice.py) is asked first. Calls of this client's own that move a buffer are in own_moves.py, getting
the new descriptor in descriptors.py.

All attachments of a connection to one buffer are answered for together: none before all users have answered, and no
Buffer of this client has the buffer's memory mapped. Until it is known how the move ended nobody gets in again.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from udmabufd_client.attachment import Attached
from udmabufd_client.attachments import Attachments
from udmabufd_client.background import pauses
from udmabufd_client.contract import BUFFER_INTERFACE, MOVE_TIMEOUT_MAX, State
from udmabufd_client.descriptors import Descriptors
from udmabufd_client.errors import NoSuchBuffer, RateLimited, UdmabufError
from udmabufd_client.notice import CANCELLED, MOVED, MoveKind, Notice
from udmabufd_client.relocation import Relocation
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares
from udmabufd_client.stillness import Stillness, either

log = logging.getLogger(__name__)


class Moves:
    """The moves of one session's buffers. Belongs to the loop."""

    def __init__(self, session: Session, shares: Shares, attachments: Attachments, descriptors: Descriptors) -> None:
        self._session = session
        self._shares = shares
        self._attachments = attachments
        self._descriptors = descriptors
        self._going: dict[str, Relocation] = {}
        self._early: dict[tuple[str, int], tuple[MoveKind, int, int]] = {}
        """What attachments were asked that are not known yet: whose they are is not either."""

    # What the service says

    def move_notify(self, path: str, number: int, serial: int, timeout_ms: int) -> None:
        """MoveNotify: the buffer is about to get other memory."""
        self._ask(path, number, MoveKind.MOVE, serial, timeout_ms)

    def evict_notify(self, path: str, number: int, serial: int, timeout_ms: int) -> None:
        """EvictNotify: the buffer is about to lose its memory until its next use."""
        self._ask(path, number, MoveKind.EVICT, serial, timeout_ms)

    def moved(self, path: str, number: int, serial: int) -> None:
        """Moved: the buffer has other memory. It can come again after a restart of the service."""
        self._early.pop((path, number), None)
        going = self._going.get(path)
        if going is not None and going.serial == serial:
            going.end(MOVED)
        else:
            self._follow_soon(path, serial)

    def cancelled(self, path: str, number: int, serial: int) -> None:
        """MoveCancelled: everything is as before. It can come again after a restart of the service."""
        self._early.pop((path, number), None)
        going = self._going.get(path)
        if going is not None and going.serial == serial:
            going.end(CANCELLED)

    def told(self, path: str, serial: int | None, state: str | None) -> None:
        """The service has said that the buffer has this serial, this state, or both, from now on."""
        if state == State.EVICTED:
            # It has waited for no answer of this client's: of that nothing more is told.
            self._early = {key: asked for key, asked in self._early.items() if key[0] != path}
        going = self._going.get(path)
        if going is None:
            if serial:
                self._follow_soon(path, serial)
        elif state == State.EVICTED or (serial and serial >= going.serial):
            going.end(going.done)

    def resume(self, share: Share) -> None:
        """After a restart of the service or of the bus the buffer's properties were read anew."""
        for former in [each for each in self._going.values() if not self._shares.of(each.path)]:
            # Its buffer is known by another id now.
            former.end(CANCELLED)
        going = self._going.get(share.path)
        if going is not None:
            self._judge(going, share)
        elif (serial := share.info.serial) and share.memory.other_than(serial) and share.state != State.EVICTED:
            self._session.background.start(self._descriptors.follow(share.path, serial, other=True))

    def left(self, path: str) -> None:
        """A share of the buffer, or an attachment to it, has ended."""
        if (going := self._going.get(path)) is not None:
            going.look_whether_alone()
            for share in [share for share in going.caring if not self._can_answer(going, share)]:
                self._ready(going, share)

    def lost(self) -> None:
        """Nothing is heard any more; memory and descriptors stay valid."""
        self._early.clear()
        for share in self._shares.all():
            share.watch.end()
        for going in self._going.values():
            going.end(CANCELLED)

    def came(self) -> None:
        """An attachment that was not known yet may be, or none is to come any more."""
        for path, number in list(self._early):
            if self._known(path, number) or not self._attachments.expected:
                asked = self._early.pop((path, number), None)
                # Whom the one before was told to can have ended the client.
                if asked is not None:
                    self._ask(path, number, *asked)

    # Asked

    def _ask(self, path: str, number: int, kind: MoveKind, serial: int, timeout_ms: int) -> None:
        known = self._known(path, number)
        if known is None and self._attachments.expected:
            # A signal is seen as soon as it is read, the reply to an Attach before it some turns of the loop later.
            self._early[path, number] = kind, serial, timeout_ms
            return
        going = self._going.get(path)
        if going is not None and (going.over.done() or (going.kind, going.serial) != (kind, serial)):
            # One at a time: if the end of the former one was not told, this tells it.
            going.end(CANCELLED)
            going = None
        if going is None:
            timeout = min(timeout_ms, MOVE_TIMEOUT_MAX) / 1000
            going = self._going[path] = Relocation(path, kind, serial, timeout)
            going.asked[number] = known
            self._begin(going)
        elif number not in going.asked:
            going.asked[number] = known
            if going.answering:
                self._answer(going, number)

    def _known(self, path: str, number: int) -> Attached | None:
        known = [each for share in self._shares.of(path) for each in share.attachments if each.number == number]
        return known[0] if known else None

    def _begin(self, going: Relocation) -> None:
        shares = self._shares.of(going.path)
        # They answer for all descriptors of this client, also those of a Buffer that has attached nothing itself.
        dynamic = [each for share in shares for each in share.attachments if each.dynamic and each.live]
        for share in shares:
            own = [each for each in dynamic if each.share is share]
            if dynamic and share.watch.cares:
                going.caring.add(share)
                going.notices[share] = Notice(
                    share,
                    (own or dynamic)[0],
                    going.kind,
                    going.serial,
                    going.timeout,
                    lambda share=share: self._ready(going, share),  # type: ignore[misc]
                )
        if not going.caring:
            going.cleared.set()
        going.look_whether_alone()
        # Also of one that is cancelled before it began.
        self._session.background.start(self._go(going)).add_done_callback(lambda _: self._finish(going, CANCELLED))
        for share, notice in list(going.notices.items()):
            # One who was told before can have ended others.
            if not share.watch.tell(notice):
                self._ready(going, share)

    def _ready(self, going: Relocation, share: Share) -> None:
        """The user of one Buffer has said that its importer has stopped."""
        if share not in going.caring:
            return
        going.caring.discard(share)
        if not going.caring:
            going.cleared.set()
        else:
            # The service is told later: if the others ended, which answers for them, this answer would be the last.
            going.notices[share].answered()

    def _can_answer(self, going: Relocation, share: Share) -> bool:
        """Whether a Buffer's user has something to answer for still."""
        shares = self._shares.of(going.path)
        if share not in shares:
            return False
        asked = [share] if going.notices[share].asked.share is share else shares
        return any(each.live for one in asked for each in one.attachments)

    def _answer(self, going: Relocation, number: int) -> None:
        """MoveReady, without waiting for it; again if it was refused for its rate."""
        link = self._session.link

        async def answer() -> None:
            call = "MoveReady", [number, going.serial], DEFAULT_TIMEOUT
            for pause in pauses():
                try:
                    await self._session.ask(going.path, BUFFER_INTERFACE, *call, again=True, only=link)
                except UdmabufError as error:
                    # Late, or ended: what became of the move is told in any case.
                    log.debug("MoveReady of attachment %d of %s: %s", number, going.path, error)
                    if isinstance(error, RateLimited):
                        await asyncio.wait({going.over}, timeout=pause)
                        if not going.over.done():
                            continue
                return

        task = self._session.background.start(answer())
        going.answers.add(task)
        task.add_done_callback(going.answers.discard)

    # From being asked to how it ended

    async def _go(self, going: Relocation) -> None:
        stillness: Stillness | None = None
        outcome = CANCELLED
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(going.overdue):
                    if await either(going.cleared, before=going.over):
                        gates = (share.memory.gate for share in self._shares.of(going.path))
                        stillness = Stillness(self._session, gates, going.timeout)
                        if await self._still(going, stillness):
                            await self._give_up(going)
            outcome = await self._outcome(going)
            if outcome == MOVED:
                await self._descriptors.follow(going.path, going.serial)
            elif outcome == CANCELLED and going.answering and going.kind == MoveKind.EVICT:
                await self._descriptors.restore(going.path)
        finally:
            if stillness is not None:
                stillness.end()
            self._finish(going, outcome)

    def _finish(self, going: Relocation, outcome: str) -> None:
        """It is over, and all has been done about it; a second time does nothing."""
        going.end(outcome)
        if self._going.get(going.path) is going:
            del self._going[going.path]
        for notice in going.notices.values():
            notice.finish(outcome)

    async def _still(self, going: Relocation, stillness: Stillness) -> bool:
        """Wait until nobody uses the memory; False if it is over before."""
        reached = asyncio.Event()

        async def wait() -> None:
            await stillness.wait()
            reached.set()

        if stillness.reached:
            return not going.over.done()
        waiting = asyncio.ensure_future(wait())
        try:
            return await either(reached, before=going.over)
        finally:
            waiting.cancel()

    async def _give_up(self, going: Relocation) -> None:
        """Nobody uses the memory: answer. For an eviction the descriptors, which would keep it, are closed first."""
        if going.kind == MoveKind.EVICT:
            await self._know_tickets(going)
            if going.over.done():
                return
            for share in self._shares.of(going.path):
                share.memory.send_away()
        going.answering = True
        for number in going.asked:
            self._answer(going, number)

        def answered(_: object) -> None:
            for notice in going.notices.values():
                notice.answered()

        asyncio.gather(*going.answers, return_exceptions=True).add_done_callback(answered)

    async def _know_tickets(self, going: Relocation) -> None:
        for share in self._shares.of(going.path):
            try:
                await self._descriptors.learn_ticket(share, going.timeout / 2)
            except UdmabufError as error:
                log.debug("Buffer %s goes without its ticket: %s", share.id, error)

    async def _outcome(self, going: Relocation) -> str:
        """Wait until it is told how it ended; ask when that is overdue, or when nobody would be told."""
        try:
            async with asyncio.timeout_at(going.overdue):
                if not await either(going.alone, before=going.over):
                    return going.over.result()
        except TimeoutError:
            log.debug("How the %s of %s ended was not told in time", going.kind, going.path)
        for pause in pauses():
            await self._look(going)
            if going.over.done():
                break
            await asyncio.wait({going.over}, timeout=pause)
        return going.over.result()

    async def _look(self, going: Relocation) -> None:
        shares = self._shares.of(going.path)
        if not shares:
            going.end(CANCELLED)
            return
        try:
            await self._attachments.read(shares[0], shares[0], DEFAULT_TIMEOUT)
        except NoSuchBuffer:
            going.end(CANCELLED)
        except UdmabufError as error:
            log.debug("Properties of buffer %s could not be read: %s", shares[0].id, error)
        else:
            self._judge(going, shares[0])

    def _judge(self, going: Relocation, share: Share) -> None:
        if share.state == State.MOVING:
            return
        if share.state == State.EVICTED or (share.info.serial or 0) >= going.serial:
            going.end(going.done)
        else:
            going.end(CANCELLED)

    def _follow_soon(self, path: str, serial: int) -> None:
        if any(share.memory.older_than(serial) for share in self._shares.of(path)):
            self._session.background.start(self._descriptors.follow(path, serial))
