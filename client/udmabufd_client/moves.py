# SPDX-License-Identifier: MIT
"""Moves and evictions that the service asks this client about: each answered when nobody uses the memory any more.

Whoever cares (notice.py) is asked first. Calls of this client's own that move a buffer are in own_moves.py, getting
the new descriptor in descriptors.py.

All attachments of a connection to one buffer are answered for together: the last answer is sent only when no Buffer of
this client has the buffer's memory mapped. Until it is known how the move ended nobody gets in again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from udmabufd_client.attachment import Attached
from udmabufd_client.background import pauses
from udmabufd_client.contract import BUFFER_INTERFACE, MOVE_TIMEOUT_MAX, State
from udmabufd_client.descriptors import Descriptors
from udmabufd_client.errors import NoSuchBuffer, UdmabufError
from udmabufd_client.notice import CANCELLED, EVICTED, MOVED, MoveKind, Notice
from udmabufd_client.session import DEFAULT_TIMEOUT, Session
from udmabufd_client.share import Share, Shares
from udmabufd_client.stillness import Stillness, either

log = logging.getLogger(__name__)

Read = Callable[[Share], Awaitable[object]]
"""Reads a buffer's properties anew. Raises UdmabufError."""

_OVERDUE: Final = 1.0
"""Seconds after the time to answer in which the end of a move is told, unless the copying takes longer."""


class _Relocation:
    """One move or eviction of one buffer."""

    def __init__(self, path: str, kind: MoveKind, serial: int, timeout: float) -> None:
        self.path = path
        self.kind = kind
        self.serial = serial
        self.timeout = timeout
        self.overdue = asyncio.get_running_loop().time() + timeout + _OVERDUE
        """When its end should have been told, in the loop's time."""
        self.done = MOVED if kind == MoveKind.MOVE else EVICTED
        """How it ends if it takes place."""
        self.asked: dict[int, Attached | None] = {}
        self.notices: dict[Share, Notice] = {}
        self.caring: set[Share] = set()
        """Those whose users have not answered yet."""
        self.cleared = asyncio.Event()
        """Set when no user is to be waited for any more."""
        self.alone = asyncio.Event()
        """Set when nothing is attached any more that was asked: the end of the move is not told then."""
        self.answering = False
        self.answered: set[int] = set()
        self.answers: set[asyncio.Task[None]] = set()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, outcome: str) -> None:
        if not self.over.done():
            self.over.set_result(outcome)

    def look_whether_alone(self) -> None:
        if self.asked and not any(attached is None or attached.live for attached in self.asked.values()):
            self.alone.set()


class Moves:
    """The moves of one session's buffers. Belongs to the loop."""

    def __init__(self, session: Session, shares: Shares, descriptors: Descriptors, read: Read) -> None:
        self._session = session
        self._shares = shares
        self._descriptors = descriptors
        self._read = read
        self._going: dict[str, _Relocation] = {}

    # What the service says

    def move_notify(self, path: str, number: int, serial: int, timeout_ms: int) -> None:
        """MoveNotify: the buffer is about to get other memory."""
        self._ask(MoveKind.MOVE, path, number, serial, timeout_ms)

    def evict_notify(self, path: str, number: int, serial: int, timeout_ms: int) -> None:
        """EvictNotify: the buffer is about to lose its memory until its next use."""
        self._ask(MoveKind.EVICT, path, number, serial, timeout_ms)

    def moved(self, path: str, number: int, serial: int) -> None:
        """Moved: the buffer has other memory. It can come again after a restart of the service."""
        going = self._going.get(path)
        if going is not None and going.serial == serial:
            going.end(MOVED)
        else:
            self._follow_soon(path, serial)

    def cancelled(self, path: str, number: int, serial: int) -> None:
        """MoveCancelled: everything is as before. It can come again after a restart of the service."""
        going = self._going.get(path)
        if going is not None and going.serial == serial:
            going.end(CANCELLED)

    def told(self, path: str, serial: int | None, state: str | None) -> None:
        """The service has said that the buffer has this serial, this state, or both, from now on."""
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
            for share in [share for share in going.caring if not any(each.live for each in share.attachments)]:
                self._ready(going, share)

    # Asked

    def _ask(self, kind: MoveKind, path: str, number: int, serial: int, timeout_ms: int) -> None:
        going = self._going.get(path)
        if going is not None and (going.over.done() or (going.kind, going.serial) != (kind, serial)):
            # One at a time: if the end of the former one was not told, this tells it.
            going.end(CANCELLED)
            going = None
        if going is None:
            timeout = min(timeout_ms, MOVE_TIMEOUT_MAX) / 1000
            going = self._going[path] = _Relocation(path, kind, serial, timeout)
            self._begin(going)
        if number not in going.asked:
            known = [each for share in self._shares.of(path) for each in share.attachments if each.number == number]
            going.asked[number] = known[0] if known else None
            if going.answering or (known and self._answers_early(going, known[0].share)):
                self._answer(going, number)

    def _begin(self, going: _Relocation) -> None:
        for share in self._shares.of(going.path):
            dynamic = [each for each in share.attachments if each.dynamic and each.live]
            if dynamic and share.watch.cares:
                going.caring.add(share)
                going.notices[share] = Notice(
                    share,
                    dynamic[0],
                    going.kind,
                    going.serial,
                    going.timeout,
                    lambda share=share: self._ready(going, share),  # type: ignore[misc]
                )
        if not going.caring:
            going.cleared.set()
        self._session.background.start(self._go(going))
        if not self._session.reconnect:
            self._session.background.start(self._end_when_lost(going))
        for share, notice in list(going.notices.items()):
            share.watch.tell(notice)

    def _ready(self, going: _Relocation, share: Share) -> None:
        """The user of one Buffer has said that its importer has stopped."""
        if share not in going.caring:
            return
        going.caring.discard(share)
        if not going.caring:
            going.cleared.set()
            return
        for number, attached in going.asked.items():
            if attached is not None and attached.share is share:
                self._answer(going, number)
        going.notices[share].answered()

    def _answers_early(self, going: _Relocation, share: Share) -> bool:
        """Whether a Buffer's user has answered while another's has not: the buffer waits for that one anyway."""
        return bool(going.caring) and share in going.notices and share not in going.caring

    def _answer(self, going: _Relocation, number: int) -> None:
        """MoveReady, once, without waiting for it."""
        if number in going.answered:
            return
        going.answered.add(number)
        link = self._session.link

        async def answer() -> None:
            try:
                await self._session.ask(
                    going.path,
                    BUFFER_INTERFACE,
                    "MoveReady",
                    [number, going.serial],
                    DEFAULT_TIMEOUT,
                    again=True,
                    only=link,
                )
            except UdmabufError as error:
                # Late, or ended: what became of the move is told in any case.
                log.debug("MoveReady of attachment %d of %s: %s", number, going.path, error)

        task = self._session.background.start(answer())
        going.answers.add(task)
        task.add_done_callback(going.answers.discard)

    # From being asked to how it ended

    async def _go(self, going: _Relocation) -> None:
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
            going.end(outcome)
            if self._going.get(going.path) is going:
                del self._going[going.path]
            if stillness is not None:
                stillness.end()
            for notice in going.notices.values():
                notice.finish(outcome)

    async def _end_when_lost(self, going: _Relocation) -> None:
        """Without another connection nothing is to be heard any more; memory and descriptors stay valid."""
        lost = asyncio.ensure_future(self._session.wait_lost())
        both: set[asyncio.Future[Any]] = {lost, going.over}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        going.end(CANCELLED)

    async def _still(self, going: _Relocation, stillness: Stillness) -> bool:
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

    async def _give_up(self, going: _Relocation) -> None:
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

    async def _know_tickets(self, going: _Relocation) -> None:
        for share in self._shares.of(going.path):
            try:
                await self._descriptors.learn_ticket(share, going.timeout / 2)
            except UdmabufError as error:
                log.debug("Buffer %s goes without its ticket: %s", share.id, error)

    async def _outcome(self, going: _Relocation) -> str:
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

    async def _look(self, going: _Relocation) -> None:
        shares = self._shares.of(going.path)
        if not shares:
            going.end(CANCELLED)
            return
        try:
            await self._read(shares[0])
        except NoSuchBuffer:
            going.end(CANCELLED)
        except UdmabufError as error:
            log.debug("Properties of buffer %s could not be read: %s", shares[0].id, error)
        else:
            self._judge(going, shares[0])

    def _judge(self, going: _Relocation, share: Share) -> None:
        if share.state == State.MOVING:
            return
        if share.state == State.EVICTED or (share.info.serial or 0) >= going.serial:
            going.end(going.done)
        else:
            going.end(CANCELLED)

    def _follow_soon(self, path: str, serial: int) -> None:
        if any(share.memory.older_than(serial) for share in self._shares.of(path)):
            self._session.background.start(self._descriptors.follow(path, serial))
