# SPDX-License-Identifier: MIT
"""The steps of a history in which memory moves: by a holder, a device, an administrator, or for want of memory, and
with the service killed in the midst of it.
"""

from __future__ import annotations

import time
from typing import Final

from tests.kernel.calls import Calls
from tests.kernel.comparison import DEVICES, FAR, LARGE, MIB
from tests.kernel.contents import difference
from tests.kernel.demands import attach, detach, numbers
from tests.unit.books import ORDINARY, PICKY, Client, Known, Payer
from udmabufd_base.codec import Variant
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MOVE_TYPES

HUGE: Final = 2 * MIB


class Relocating(Calls):
    """See the module."""

    attached_by_halves = False

    async def begin(self) -> None:
        """Two users share a buffer, attached dynamically by both; others come later."""
        await super().begin()
        await self.importer()
        await self.importer()
        await self.fill()
        await self.compare()

    # What moves mean.

    def came(self, known: Known) -> None:
        """Also: what was evicted is back."""
        super().came(known)
        if known.evicted:
            self.returned(known, FAR if known.demanding else ORDINARY)

    def returned(self, known: Known, target: str) -> None:
        """`known` was evicted, and is back, in memory of `target`."""
        known.evicted, self.giving_up = False, True
        if target != ORDINARY:
            # Of what it was out in, nobody was told the inode.
            self._inodes.pop(known, None)
            self.relocated(known, target, None)
        known.advance()
        self.happened["came back" if target == ORDINARY else "came back elsewhere"] += 1

    def relocated(self, known: Known, target: str, causer: Payer | None) -> None:
        """`known` has memory of `target`; what it had lingers."""
        size = -(-known.size // HUGE) * HUGE if target == LARGE else known.size
        former = self.books.moved(known, target, size, causer)
        former.since = time.monotonic()
        self.known.append(former)
        if known in self._inodes:
            self._inodes[former] = self._inodes.pop(known)

    def moved(self, known: Known, target: str, causer: Payer | None) -> None:
        """`known` has moved to `target` because of `causer`."""
        self.relocated(known, target, None if causer is None or causer.uid == known.payer.uid else causer)
        known.advance()
        self.happened["moved"] += 1

    def evicted(self, known: Known) -> None:
        """`known` is evicted."""
        if known.allocator != ORDINARY:
            self.relocated(known, ORDINARY, None)
        known.evicted = True
        self.happened["evicted"] += 1

    def some(self) -> tuple[Known, Client] | None:
        """Return a buffer and a holder, mostly of what may move and has importers."""
        held = self.held_buffers()
        free = [known for known in held if known.movable and not known.held_in_place(time.monotonic())]
        attached = [known for known in free if known.attachments]
        chosen = (attached or free or held) if self.rng.random() < 0.85 else held
        if not chosen:
            return None
        known = self.rng.choice(chosen)
        return known, self.client(known.shares)

    def busy(self, known: Known, answering: Client | None = None) -> set[str]:
        """Return the refusal if `known` has to stay where it is."""
        held = known.held_in_place(time.monotonic(), answering)
        self.happened["held in place"] += held
        return {"Busy"} if held else set()

    async def catch_up(self, known: Known) -> None:
        """Those who have attached `known` get its new memory; most let go of the old."""
        if self.rng.random() < 0.8:
            for former in [each for each in self.known if each.origin is known]:
                self.let_go(former)
                former.since = time.monotonic()
        for number, row in list(known.attachments.items()):
            if row.dynamic and self.rng.random() < 0.7:
                await self.take(known, row.client, number)

    # The steps.

    async def importer(self) -> None:
        """Somebody gets a share, attaches dynamically, and has a descriptor for that, as importers do."""
        buffers = [known for known in self.held_buffers() if known.kind == "dma-buf"]
        if buffers:
            # Who has a descriptor for nothing would keep it in place.
            known = next((each for each in buffers if each.loose), None) or self.rng.choice(buffers)
            client = next(iter(known.loose), None) or self.client()
            if client not in known.shares:
                await self.share(known, client)
            before = known.attached
            await self.attach_device(known, client, self.rng.choice(["zero", "null", "null"]), dynamic=True)
            if known.attached > before and known.attached in known.attachments:
                await self.take(known, client, known.attached)

    async def attach(self) -> None:
        """Attach, also a device for which the memory has to move."""
        if held := self.held_buffers():
            known = self.rng.choice(held)
            device = self.rng.choice(["zero", PICKY, PICKY])
            await self.attach_device(known, self.client(known.shares), device, dynamic=self.rng.random() < 0.8)

    async def attach_device(self, known: Known, client: Client, device: str, *, dynamic: bool) -> None:
        """Attach a device for a holder."""
        refusals: set[str] = set()
        moves = device == PICKY and known.movable and not known.evicted and known.allocator != FAR
        causer = client.owner
        self.staying = {client}
        if moves:
            refusals = self.busy(known, client if dynamic else None)
        elif device == PICKY and known.kind == "wrapped":
            refusals = {"Busy"}
        run = attach(self.peers[client], self.at(known), DEVICES[device], dynamic=dynamic)
        loose = client in known.loose
        outcome = await self.outcome(run, known if moves else None, client)
        self.staying = None
        if outcome.cut_off:
            entry = (await self.listed())[known.id]
            if entry["serial"] > known.serial:
                self.moved(known, FAR, causer)
            for number in await numbers(self.peers[client], self.at(known)):
                if number not in known.attachments:
                    await detach(self.peers[client], self.at(known), number)
                    known.attached = number
            self.attached_by_halves = True
            if loose:
                await self.take(known, client, None)
        elif self.judge(outcome, refusals, moves and self.missing(known)):
            if moves:
                self.moved(known, FAR, causer)
            self.books.attach(known, client, [device], dynamic=dynamic)
            number, _ = outcome.answer
            if self.attached_by_halves:
                # Numbers that were given to who was never told are spent.
                row = known.attachments.pop(known.attached)
                known.attached = max(number, known.attached)
                known.attachments[known.attached] = row
            assert number == known.attached
            self.happened["attached"] += 1
        await self.waited(known)
        if moves and known.shares:
            await self.over()
            await self.catch_up(known)

    async def detach(self) -> None:
        """Detach."""
        if having := [known for known in self.books.buffers if known.attachments]:
            known = self.rng.choice(having)
            number = self.rng.choice(list(known.attachments))
            await detach(self.peers[known.attachments.pop(number).client], self.at(known), number)
            self.happened["detached"] += 1

    async def pin(self) -> None:
        """Pin or Unpin."""
        if having := [known for known in self.books.buffers if known.attachments]:
            pinned = [known for known in having if any(row.pins for row in known.attachments.values())]
            known = self.rng.choice(pinned or having)
            number, row = self.rng.choice(list(known.attachments.items()))
            by = -1 if row.pins and self.rng.random() < 0.8 else 1
            await self.peers[row.client].call("Pin" if by > 0 else "Unpin", "u", number, path=self.at(known))
            known.attachments[number] = row._replace(pins=row.pins + by)
            self.happened["pinned" if by > 0 else "unpinned"] += 1

    async def fill(self) -> None:
        """A client writes into what it has, which may be former memory; another one reads it."""
        if having := self.with_fds():
            known = self.rng.choice(having)
            self.write(known)
            others = [fd for fd in known.fds if isinstance(fd, OwnedFd)]
            assert not (wrong := difference(others[-1], known.size, known.content)), wrong

    async def move(self) -> None:
        """Move."""
        if not (found := self.some()):
            return
        known, client = found
        allocator = self.rng.choice([None, ORDINARY, FAR, LARGE])
        target = allocator or (FAR if known.demanding else ORDINARY)
        unsuitable = {"NoAllocator"} if known.demanding and target != FAR else set()
        if not known.movable:
            refusals = {"NotSupported"}
        elif known.evicted:
            refusals = unsuitable
        else:
            refusals = self.busy(known) | unsuitable
        options = {} if allocator is None else {"allocator": Variant(MOVE_TYPES["allocator"], allocator)}
        self.staying, was, causer = {client}, known.evicted, client.owner
        paid = None if causer.uid == known.payer.uid else causer
        run = self.peers[client].call("Move", "a{sv}", options, path=self.at(known))
        outcome = await self.outcome(run, known, client)
        self.staying = None
        if outcome.cut_off:
            done = (await self.listed())[known.id]["serial"] > known.serial
        else:
            done = self.judge(outcome, refusals, not was and self.missing(known))
        if done:
            if was:
                self.returned(known, target)
            else:
                self.moved(known, target, paid)
            assert outcome.cut_off or outcome.answer == [known.serial]
        await self.waited(known)
        await self.over()
        await self.catch_up(known)

    async def evict(self) -> None:
        """Evict; mostly whoever has a descriptor lets go of it when asked, or has none."""
        if not (found := self.some()):
            return
        known, client = found
        refusals = self.busy(known) if known.movable else {"NotSupported"}
        if known.evicted:
            refusals = set()
        self.keeping = self.rng.random() < 0.2
        if not known.attachments and not self.keeping and not refusals:
            self.let_go(known)
        self.staying, was = {client}, known.evicted
        run = self.peers[client].call("Evict", path=self.at(known))
        outcome = await self.outcome(run, known, client)
        self.staying, self.keeping = None, False
        if outcome.cut_off:
            done = (await self.listed())[known.id]["state"] == "evicted"
        else:
            # Whoever asks is not waited for when nobody has a descriptor any more.
            missing = not was and self.missing(known, None if known.fds else client)
            done = self.judge(outcome, refusals, missing, in_use=not was and bool(known.fds))
        if done and not was:
            self.evicted(known)
        await self.waited(known)
