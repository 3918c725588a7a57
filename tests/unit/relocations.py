# SPDX-License-Identifier: MIT
"""The steps of a history in which memory moves: by a holder, a device, an administrator, or for want of memory; and
the importers, who answer, late or wrongly, not at all, or go.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest

from tests.unit.books import ORDINARY, PICKY, Client, Known, Payer, Verdict
from tests.unit.calls import Call, Calls, Errors, Meanwhile, nothing
from tests.unit.comparison import FAR, LARGE, ROOT, STEP, Wrong, same
from tests.unit.machine import Told
from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import (
    AllocatorError,
    Busy,
    InvalidSpec,
    MoveTimedOut,
    NoAllocator,
    NoSuchBuffer,
    NotSupported,
)
from udmabufd.core.ledger import Owner
from udmabufd.core.moves import Notice
from udmabufd.core.relief import PATIENCE

ANSWERS = {"ready": 7, "late": 3, "twice": 1, "stale": 1, "never": 3}
"""How often importers answer in which way."""

GOINGS = {"detach": 1, "leave": 1}
"""And how those do that do not answer, and that need not."""

LATE = 3.5
"""Seconds after which an answer still counts."""


class Relocations(Calls):
    """See the module."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._manners = random.Random(seed + 3)
        self._staying: set[Client] | None = None
        self._never: set[tuple[str, int]] = set()
        self._pending: dict[tuple[str, int], Told] = {}
        self._news: list[Told] = []
        self._wrong: list[str] = []
        self._detaching: list[tuple[Client, asyncio.Future[None]]] = []
        self.machine.hear = self._hear

    def compare(self) -> None:
        """Also: whoever was told that memory is to move was told what came of it, and that was so."""
        super().compare()
        by_id = {known.id: known for known in self.books.buffers}
        for key, asked in self._pending.items():
            known = by_id.get(asked.buffer)
            if known is None or asked.attachment not in known.attachments:
                continue
            if asked.notice is not Notice.EVICT or not (known.evicted or known.serial >= asked.serial):
                raise Wrong(f"{key} was never told what came of {asked}")
        for told in self._news:
            known = by_id.get(told.buffer)
            if known is not None and not known.is_so(told.notice.value, told.serial):
                raise Wrong(f"{told} is not so: {known.serial}")
        for client, detaching in self._detaching:
            # Another attachment of it may have had it leave at the same moment.
            if client in self.clients:
                detaching.result()
            else:
                detaching.exception()
        self._detaching.clear()
        if self._wrong:
            raise Wrong("; ".join(self._wrong))
        self._pending.clear()
        self._news.clear()
        self._never.clear()

    # Importers.

    def _hear(self, told: Told) -> None:
        key = told.buffer, told.attachment
        if told.notice not in (Notice.MOVE, Notice.EVICT):
            self._news.append(told)
            for known in self.books.buffers:
                if known.id == told.buffer and told.notice is Notice.CANCELLED:
                    known.cancelled = told.serial
            if key in self._pending and self._pending[key].serial == told.serial:
                del self._pending[key]
            return
        self._pending[key] = told
        manners = dict(ANSWERS)
        client = next(client for client in self.clients if client.name == told.client)
        if self._staying is not None and client not in self._staying and self.kill_in is None:
            manners |= GOINGS
        (manner,) = self._manners.choices(list(manners), list(manners.values()))
        self.happened[f"importer: {manner}"] += 1
        if manner == "never":
            self._never.add(key)
            return
        delay = LATE * self._manners.random() if manner == "late" else 0.0
        asyncio.get_running_loop().call_later(delay, self._answer, told, client, manner, self.life)

    def _answer(self, told: Told, client: Client, manner: str, life: Any) -> None:
        if life is not self.life or self.machine.killed or client not in self.clients:
            return
        known = next((b for b in self.books.buffers if b.id == told.buffer), None)
        if known is None or told.attachment not in known.attachments:
            return
        if manner == "leave":
            self.clients.remove(client)
            life.service.drop(self.holder(client))
            life.holders.pop(client.name, None)
            self.books.gone(client, self.now)
        elif manner == "detach":
            detaching = life.service.attaching.detach(self.holder(client), told.buffer, told.attachment)
            # It does not wait: it is what is waited for.
            self._detaching.append((client, asyncio.ensure_future(detaching)))
            del known.attachments[told.attachment]
        else:
            for serial in {"stale": (told.serial - 1, told.serial), "twice": (told.serial, told.serial)}.get(
                manner, (told.serial,)
            ):
                self._ready(told, client, serial)

    def _ready(self, told: Told, client: Client, serial: int) -> None:
        under_way = self._there_by_id(told.buffer).moving == told.serial
        try:
            self.life.service.moving.ready(self.holder(client), told.buffer, told.attachment, serial)
        except Busy as error:
            if under_way and serial == told.serial:
                self._wrong.append(f"{told} was not answered by that: {error}")
        else:
            if serial != told.serial:
                self._wrong.append(f"{told} was answered by {serial}")

    def _there_by_id(self, buffer_id: str) -> Any:
        return next(buffer for buffer in self.life.custody.registry if buffer.id == buffer_id)

    def _missing(self, known: Known, without: Client | None = None) -> bool:
        """Whether somebody has not answered; an importer that has gone has."""
        return any(
            (known.id, number) in self._never and row.client is not without
            for number, row in known.attachments.items()
        )

    # What has moved.

    def _moved(self, known: Known, allocator: str, causer: Payer | None) -> None:
        """`known` has memory of `allocator` now; what it had lingers."""
        former = self.books.moved(known, allocator, rounded(known.size, allocator), causer)
        former.since = self.now
        self.known.append(former)
        ids = {other.id for other in self.known}
        found = [b for b in self.life.custody.registry if b.origin == known.id and b.id not in ids]
        if found:
            former.id, former.ticket = found[0].id, found[0].ticket
        elif former.free:
            self.books.buffers.remove(former)
            former.id = "gone"
        else:
            raise Wrong(f"former memory of {known.id} is not charged, with {former.fds} and {former.paths}")

    def _returned(self, known: Known, allocator: str | None = None) -> None:
        """`known` was evicted, and is back."""
        target = allocator or (FAR if known.demanding else ORDINARY)
        known.evicted = False
        if target != ORDINARY:
            self._moved(known, target, None)
        known.advance()
        self.happened["came back" if target == ORDINARY else "came back elsewhere"] += 1

    def _moves(
        self, known: Known, client: Client, allocator: str, done: Callable[[Any], None], cut_off: Callable[[], None]
    ) -> tuple[Callable[[Any], None], Callable[[], None]]:
        """Return what it means if a call that moves `known` for `client` is answered, or cut off, and then done()."""
        causer = None if client.owner.uid == known.payer.uid else client.owner

        def moved(answer: Any) -> None:
            self._moved(known, allocator, causer)
            known.advance()
            self.happened["moved"] += 1
            done(answer)

        def perhaps() -> None:
            if self._there(known).serial > known.serial:
                self._moved(known, allocator, causer)
                known.advance()
                self.happened["moved before a kill"] += 1
            cut_off()

        return moved, perhaps

    def _meanwhile(self, known: Known, asking: Client, chosen: int) -> Meanwhile | None:
        """Return what somebody else who has attached the buffer asks for meanwhile, and waits for, perhaps."""
        others = [(n, row.client) for n, row in known.attachments.items() if row.client is not asking]
        if not others or chosen % 3 or self.kill_in is not None:
            return None
        number, client = others[chosen // 3 % len(others)]
        assert self._staying is not None
        self._staying.add(client)
        holder, service = self.holder(client), self.life.service
        return Meanwhile(lambda: service.get_fd(holder, known.id, number), lambda: self._get(known, client, number))

    def _get(self, known: Known, client: Client, number: int | None) -> Call:
        """GetFd by a holder."""
        holder, service = self.holder(client), self.life.service
        copied = known.evicted and known.demanding
        more = {"bytes": known.size} if known.evicted or not known.backed else {}

        def came() -> None:
            if not known.backed:
                first = FAR if known.demanding else ORDINARY
                known.back(first if known.kind == "dma-buf" else known.kind)
            elif known.evicted:
                self._returned(known)

        def done(grant: Any) -> None:
            came()
            known.fds.append(grant.fd)
            same("what is read", self.machine.read(grant.fd), known.content)
            if number is None:
                known.loosen(client)

        def cut_off() -> None:
            buffer = self._there(known)
            if buffer.serial > known.serial:
                self.happened["came back before a kill"] += known.evicted
                came()
            self._loose_by_half(known, client)

        verdict = self.books.moving(known, known.size) if copied else self.books.verdict(known.payer, more)
        return Call(lambda: service.get_fd(holder, known.id, number), done, cut_off, verdict)

    # The steps: each takes four numbers that say how.

    async def move(self, a: int, b: int, c: int, d: int) -> None:
        """Move."""
        if not (found := self._some(a, b, d)):
            return
        known, client = found
        allocator = (None, None, ORDINARY, FAR, LARGE)[c % 5]
        holder, moving = self.holder(client), self.life.service.moving
        call = Call(lambda: moving.move(holder, known.id, allocator), nothing, lambda: None)
        target = allocator or (FAR if known.demanding else ORDINARY)
        unsuitable = known.demanding and target != FAR
        if client not in known.shares:
            call.error = NoSuchBuffer
        elif not known.movable:
            call.error = NotSupported
        else:
            size = rounded(known.size, target)
            call.verdict = self.books.moving(known, size, None if known.evicted else client.owner)
            if known.evicted:
                if target == ORDINARY:
                    call.verdict = self.books.verdict(known.payer, {"bytes": size})
                call.error = NoAllocator if unsuitable else None
                call.done = lambda _: self._returned(known, target)

                def cut_off() -> None:
                    if self._there(known).serial > known.serial:
                        self._returned(known, target)

                call.cut_off = cut_off
            else:
                self._moving(call, known, client, None, NoAllocator if unsuitable else None)
                call.done, call.cut_off = self._moves(known, client, target, call.done, call.cut_off)
                call.meanwhile = self._meanwhile(known, client, d)
        await self._call(call)
        self._staying = None

    def _moving(
        self, call: Call, known: Known, client: Client, answering: Client | None, error: type[AllocatorError] | None
    ) -> None:
        """Have `call` be expected to move `known` unless it is held in place, somebody does not answer, or for
        `error`.
        """
        self._staying = {client}
        reasons = [Busy] if known.held_in_place(self.now, answering) else []
        errors: Errors = (*reasons, error) if error is not None else tuple(reasons)
        self.happened["held in place"] += bool(reasons)

        def expected() -> Errors | None:
            if not errors and self._missing(known):
                return MoveTimedOut
            return errors or None

        call.expected = expected

    async def evict(self, a: int, b: int, c: int, d: int) -> None:
        """Evict, mostly of what nobody has a descriptor of."""
        if not (found := self._some(a, b, d)):
            return
        known, client = found
        if c % 4 and not known.held_in_place(self.now):
            for fd in known.fds:
                fd.close()
            known.fds.clear()
        holder, moving = self.holder(client), self.life.service.moving
        call = Call(lambda: moving.evict(holder, known.id), nothing, lambda: None)
        if client not in known.shares:
            call.error = NoSuchBuffer
        elif not known.movable:
            call.error = NotSupported
        elif not known.evicted:
            self._staying = {client}
            held = known.held_in_place(self.now)
            call.verdict = self._evictable(known)

            def expected() -> Errors | None:
                if held:
                    return Busy
                # Whoever asks is not waited for when nobody has a descriptor any more.
                if self._missing(known, None if known.fds else client):
                    return MoveTimedOut
                return Busy if known.fds else None

            call.expected = expected
            call.done = lambda _: self._evicted(known)

            def cut_off() -> None:
                if self._there(known).evicted:
                    self._evicted(known)
                    self.happened["evicted before a kill"] += 1

            call.cut_off = cut_off
            if known.allocator == ORDINARY and not known.demanding:
                call.meanwhile = self._meanwhile(known, client, d)
        await self._call(call)
        self._staying = None

    def _evictable(self, known: Known) -> Verdict:
        verdict = self.books.verdict(known.payer, {"evicted": known.size}, swept=False)
        if known.allocator != ORDINARY and verdict is Verdict.ALLOWED:
            return self.books.moving(known, known.size)
        return verdict

    def _evicted(self, known: Known) -> None:
        if known.allocator != ORDINARY:
            self._moved(known, ORDINARY, None)
        known.evicted = True
        self.happened["evicted"] += 1

    async def kill_move(self, a: int, b: int, c: int, d: int) -> None:
        """SIGKILL while memory moves, goes or comes back."""
        self.kill_in = 1 + a // 64 % 14
        evicted = [known for known in self.books.buffers if known.evicted and known.shares]
        if evicted and c % 3:
            known = evicted[b % len(evicted)]
            client = self._someone(known, a, stranger=False)
            await self._call(self._get(known, client, None))
        else:
            await (self.move if c % 2 else self.evict)(a, b, c // 8, d)
        self.kill_in = None

    async def pin(self, a: int, b: int, c: int, d: int) -> None:
        """Pin or Unpin, by who attached or somebody else."""
        having = [known for known in self.books.buffers if known.attachments]
        if not having or not self.clients:
            return
        known = having[b % len(having)]
        number = list(known.attachments)[c % len(known.attachments)]
        row = known.attachments[number]
        client = row.client if d % 4 else self.clients[a % len(self.clients)]
        holder, attaching, by = (
            self.holder(client),
            self.life.service.attaching,
            -1 if (row.pins and d % 3) or d % 16 == 0 else 1,
        )

        async def run() -> None:
            if by > 0:
                await attaching.pin(holder, known.id, number)
            else:
                attaching.unpin(holder, known.id, number)

        call = Call(run, nothing, lambda: None)
        if client not in known.shares:
            call.error = NoSuchBuffer
        elif client is not row.client or row.pins + by < 0:
            call.error = InvalidSpec
        else:

            def done(_: Any) -> None:
                known.attachments[number] = row._replace(pins=row.pins + by)
                self.happened["pinned" if by > 0 else "unpinned"] += 1

            def cut_off() -> None:
                known.attachments[number] = row._replace(pins=self._there(known).attachments[number].pins)

            call.done, call.cut_off = done, cut_off
        await self._call(call)

    async def write(self, a: int, b: int, c: int, d: int) -> None:
        """A client writes into what it has, which may be former memory."""
        if having := [known for known in self.known if known.fds]:
            known = having[a % len(having)]
            known.content = f"{b} {c}"
            self.machine.write(known.fds[0], known.content)

    async def drain(self, a: int, b: int, c: int, d: int) -> None:
        """Drain."""
        free = [b.allocator for b in self.books.buffers if b.movable and not b.held_in_place(self.now)]
        allocator = free[a % len(free)] if free and b % 4 else (ORDINARY, FAR, LARGE)[a % 3]
        target = FAR if allocator == ORDINARY else ORDINARY
        here = [known for known in self.books.buffers if known.movable and known.allocator == allocator]
        here = [known for known in here if not known.evicted]
        moving = self.life.service.moving
        staying = [b for b in here if b.held_in_place(self.now) or (b.demanding and target != FAR)]
        rest = [known for known in here if known not in staying]
        fits = all(
            self.books.verdict(b.payer, {"bytes": sum(o.size for o in rest if o.payer.uid == b.payer.uid)})
            is Verdict.ALLOWED
            for b in rest
        )

        def settle() -> Errors | None:
            """See what has moved; return what is raised if anything has not."""
            left = bool(staying)
            # Several move at the same time.
            order = {buffer.origin: index for index, buffer in enumerate(self.life.custody.registry)}
            for known in sorted(rest, key=lambda known: order.get(known.id, 0)):
                moved = self._there(known).serial > known.serial
                if self._missing(known) if moved else fits and not self._missing(known) and not call_cut_off:
                    raise Wrong(f"{known.id} was {'moved' if moved else 'not moved'} by drain")
                left = left or not moved
                if moved:
                    self._moved(known, target, ROOT)
                    known.advance()
                    self.happened["drained"] += 1
            late: Errors = MoveTimedOut if fits else (Busy, MoveTimedOut)
            return (Busy if staying else late) if left else None

        call_cut_off = False

        def cut_off() -> None:
            nonlocal call_cut_off
            call_cut_off = True
            settle()

        call = Call(lambda: moving.drain(Owner(*ROOT), allocator), nothing, cut_off, expected=settle)
        await self._call(call)

    async def pressure(self, a: int, b: int, c: int, d: int) -> None:
        """Memory is short."""
        wanted = (1 + a % 8) * STEP // 4
        moving = self.life.service.moving
        idle = [
            b
            for b in self.books.buffers
            if b.movable
            and b.allocator == ORDINARY
            and not b.evicted
            and not b.held_in_place(self.now)
            and (b.attachments or not b.fds)
            and self._there(b).spared <= self.now
        ]
        begun = self.now
        failing = any(known.fds or self._evictable(known) is not Verdict.ALLOWED for known in idle)
        slow, sizes = self.happened["importer: late"], list[int]()
        relief = moving._relief
        evict_if_idle = relief._evict_if_idle

        async def counted(buffer: Buffer) -> int:
            sizes.append(await evict_if_idle(buffer))
            return sizes[-1]

        async def relieve() -> int:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(relief, "_evict_if_idle", counted)
                freed = await moving.evict_idle(wanted)
                # Some may have been asked in vain, and go when enough is free already.
                if relief._late:
                    await asyncio.wait(relief._late)
            return freed

        def settle() -> list[Known]:
            """See what was evicted, and return it."""
            there = {buffer.id: buffer for buffer in self.life.custody.registry if buffer.evicted}
            gone = [known for known in self.books.buffers if known.id in there and not known.evicted]
            for known in gone:
                if known not in idle or known.fds or self._missing(known):
                    raise Wrong(f"{known.id} was evicted, and is in use")
                self._evicted(known)
                self.happened["relieved"] += 1
            return gone

        def done(freed: Any) -> None:
            gone = settle()
            same("freed bytes", sum(sizes), sum(known.size for known in gone))
            if freed not in accumulate(sizes, initial=0):
                raise Wrong(f"{freed} bytes are told of {sizes}, which were evicted one after the other")
            # Where one of them does not make room at once, more than may be needed are asked.
            failed = failing or bool(self._never) or self.happened["importer: late"] > slow
            if gone and not failed and freed - max(known.size for known in gone) >= wanted:
                raise Wrong(f"{freed} bytes were evicted, and {wanted} wanted")
            for known in idle:
                spared = known.evicted or known.fds or self._missing(known)
                # All are charged for at the same time, before it is known which of them go.
                together = sum(other.size for other in idle if other.payer.uid == known.payer.uid)
                spared = spared or self.books.verdict(known.payer, {"evicted": together}) is not Verdict.ALLOWED
                hurried = self.now >= begun + PATIENCE
                if freed < wanted and not spared and not hurried and self._evictable(known) is Verdict.ALLOWED:
                    raise Wrong(f"{known.id} was not evicted")

        def cut_off() -> None:
            settle()

        await self._call(Call(relieve, done, cut_off))

    def _some(self, a: int, b: int, d: int) -> tuple[Known, Client] | None:
        """Return a buffer and a holder of it, or somebody else; mostly one that may move, and about which somebody is
        to be asked.
        """
        buffers = [known for known in self.books.buffers if known.state != "lingering"]
        attached = [known for known in buffers if any(row.dynamic for row in known.attachments.values())]
        free = [known for known in attached if not known.held_in_place(self.now)]
        buffers = (free or attached if d % 8 > 1 else attached if d % 8 else buffers) or buffers
        if not self.clients or not buffers:
            return None
        known = buffers[b % len(buffers)]
        return known, self._someone(known, a, stranger=d % 16 == 0)

    def _someone(self, known: Known, a: int, *, stranger: bool) -> Client:
        holders = [client for client in known.shares if client in self.clients]
        choice = self.clients if stranger or not holders else holders
        return choice[a % len(choice)]

    def _needs_a_move(self, known: Known, device: str) -> bool:
        """Whether `device` can be attached only after a move."""
        return device == PICKY and known.movable and not known.evicted and known.allocator != FAR


def rounded(size: int, allocator: str) -> int:
    """Return how large memory of `allocator` for so many bytes is."""
    return -(-size // STEP) * STEP if allocator == LARGE else size
