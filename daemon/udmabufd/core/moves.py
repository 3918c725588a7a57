# SPDX-License-Identifier: MIT
"""What importers are told of a move or an eviction that is under way, and what they answer.

A move asks each dynamic attachment to let go of the memory and waits until all have. Why a buffer moves, and to what,
is moving.py's matter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import Busy, MoveTimedOut
from udmabufd.core.events import Event, emit
from udmabufd.core.registry import Registry

log = logging.getLogger(__name__)


class Notice(StrEnum):
    """The signals of Buffer1 that tell of a move."""

    MOVE = "MoveNotify"
    MOVED = "Moved"
    CANCELLED = "MoveCancelled"
    EVICT = "EvictNotify"


Tell = Callable[[Buffer, Attachment, Notice, int, int], None]
"""Tells the connection of an attachment, with the serial, and the milliseconds that it has to answer."""


def held_in_place(buffer: Buffer, answering: Holder | None = None) -> str | None:
    """Return why the memory of `buffer` has to stay where it is, as a clause, or None. `answering` attaches a dynamic
    importer, which will answer for all descriptors of that connection.
    """
    if buffer.kept or buffer.awaited > asyncio.get_running_loop().time():
        return "the bus was restarted, and clients that use it may not be back yet"
    for attachment in buffer.attachments.values():
        which = f"attachment {attachment.number} ({attachment.wish.device})"
        if not attachment.wish.dynamic:
            return f"{which} is not dynamic"
        if attachment.pins:
            return f"{which} is pinned"
    if buffer.loose - {answering}:
        return (
            "a connection has a descriptor and no dynamic attachment that would answer for it: it has to attach with "
            "dynamic=true, or release the buffer"
        )
    return None


def check_free(buffer: Buffer, answering: Holder | None) -> None:
    """Raise Busy if the memory of `buffer` has to stay where it is."""
    if reason := held_in_place(buffer, answering):
        raise Busy(f"The buffer is held in place: {reason}")


@dataclass(eq=False, slots=True)
class Move:
    """A move or eviction under way. `told` are the attachments that were asked, `waiting` those that have not
    answered; `asking` is the connection whose call it is.
    """

    buffer: Buffer
    notice: Notice
    serial: int
    asking: Holder | None
    told: list[Attachment]
    waiting: set[Attachment]
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Note whether all that have to answer have answered."""
        waiting = self.waiting
        if waiting and all(a.holder is self.asking for a in waiting):
            # Whoever asks for an eviction may be waiting for the reply; that nobody has a descriptor says it all.
            memory = self.buffer.memory
            waiting = waiting if memory is None or memory.references() != 0 else set()
        if not waiting:
            self.answered.set()


class Moves:
    """The moves under way, one for each buffer at most.

    `tell` sends a notice to the connection of an attachment.
    """

    def __init__(self, registry: Registry, timeout_ms: int) -> None:
        """`timeout_ms` is how long importers have to answer."""
        self.tell: Tell = lambda _buffer, _attachment, _notice, _serial, _timeout: None
        self._registry = registry
        self.timeout_ms = timeout_ms
        self._moves: dict[Buffer, Move] = {}
        self._under_way: set[Buffer] = set()
        registry.attachments.ended = self._left

    def __contains__(self, buffer: Buffer) -> bool:
        return buffer in self._under_way

    @contextmanager
    def under_way(self, buffer: Buffer) -> Iterator[None]:
        """Have it known that `buffer`, whose backing lock is held, is about to move."""
        self._under_way.add(buffer)
        try:
            yield
        finally:
            self._under_way.remove(buffer)

    async def over(self, buffer: Buffer) -> None:
        """Wait for the end of a move of `buffer`, if there is one."""
        while buffer in self:
            async with buffer.backing:
                pass

    @asynccontextmanager
    async def announced(
        self, buffer: Buffer, notice: Notice, asking: Holder | None, answering: Holder | None = None
    ) -> AsyncIterator[int]:
        """Ask the importers of `buffer` to let go of its memory, and go on when all have, with the serial that it is
        to have; what is raised inside is told them as a cancelled move. `answering` as for held_in_place(). Raises
        MoveTimedOut, Busy.
        """
        # Calls are served before resume().
        self._tell_cut_off(buffer)
        importers = [a for a in buffer.attachments.values() if a.wish.dynamic]
        if notice is Notice.MOVE:
            # The call that asks for it is its caller's own answer.
            importers = [a for a in importers if a.holder is not asking]
        serial = buffer.next_serial
        move = self._moves[buffer] = Move(buffer, notice, serial, asking, importers, set(importers))
        done = False

        def tell() -> None:
            if not done:
                self._call_off(buffer, importers, serial)
            elif notice is Notice.MOVE:
                everybody = [a for a in buffer.attachments.values() if a.wish.dynamic]
                self._tell_rest(buffer, everybody, Notice.MOVED, serial)

        try:
            self._registry.moves(buffer, serial)
            for attachment in importers:
                attachment.presumed = 0
                self.tell(buffer, attachment, notice, serial, self.timeout_ms)
            await self._answers(move)
            # An importer whose device has gone answers for nothing any more.
            check_free(buffer, answering)
            yield serial
            done = True
            for attachment in move.waiting:
                attachment.presumed = serial
        except BaseException as error:
            if not buffer.ended:
                emit(log, Event.MOVE_CANCELLED, buffer=buffer.id, uid=buffer.payer.uid, reason=str(error))
            raise
        finally:
            del self._moves[buffer]
            self._registry.moves(buffer, 0, tell)

    def ready(self, buffer: Buffer, attachment: Attachment, serial: int) -> None:
        """Take an importer's answer. Raises Busy if nothing waits for it."""
        move = self._moves.get(buffer)
        if move is None or move.serial != serial or attachment not in move.told:
            if attachment.presumed and attachment.presumed == serial >= buffer.serial:
                # It was asked, and answers.
                attachment.presumed = 0
                return
            raise Busy(f"serial: no move to {serial} waits for attachment {attachment.number}")
        move.waiting.discard(attachment)
        move.check()

    def tell_moved(self, buffer: Buffer, attachment: Attachment, serial: int) -> None:
        """Tell `attachment`, which was not there yet, of the move that took place for it."""
        self._tell_rest(buffer, [attachment], Notice.MOVED, serial)

    def resume(self) -> None:
        """Tell what became of the moves that the end of the former run has cut off."""
        for buffer in self._registry:
            self._tell_cut_off(buffer)

    async def _answers(self, move: Move) -> None:
        move.check()
        try:
            async with asyncio.timeout(self.timeout_ms / 1000):
                await move.answered.wait()
        except TimeoutError:
            move.buffer.timed_out = asyncio.get_running_loop().time()
            raise MoveTimedOut(
                f"{len(move.waiting)} of {len(move.told)} importers did not answer within {self.timeout_ms} ms"
            ) from None

    def _left(self, buffer: Buffer, attachment: Attachment) -> None:
        """Take notice of an attachment that has ended: that is an answer, too."""
        move = self._moves.get(buffer)
        if move is not None and attachment in move.waiting:
            move.waiting.remove(attachment)
            move.check()

    def _tell_cut_off(self, buffer: Buffer) -> None:
        if serial := buffer.cut_off:
            importers = [a for a in buffer.attachments.values() if a.wish.dynamic]
            if buffer.serial >= serial:
                self._tell_rest(buffer, importers, Notice.MOVED, serial)
            elif not buffer.evicted:
                self._call_off(buffer, importers, serial)
            buffer.cut_off = 0
            self._registry.record(buffer)

    def _call_off(self, buffer: Buffer, importers: list[Attachment], serial: int) -> None:
        """Tell those of `importers` that are attached still that the move to `serial` will not take place."""
        if self._tell_rest(buffer, importers, Notice.CANCELLED, serial):
            buffer.called_off = serial

    def _tell_rest(self, buffer: Buffer, importers: list[Attachment], notice: Notice, serial: int) -> bool:
        """Tell those of `importers` that are attached still; return whether there are any."""
        rest = [attachment for attachment in importers if buffer.attachments.get(attachment.number) is attachment]
        for attachment in rest:
            self.tell(buffer, attachment, notice, serial, 0)
        return bool(rest)
