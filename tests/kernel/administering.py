# SPDX-License-Identifier: MIT
"""The steps of a history that no holder asks for: an allocator is drained, memory is short, what was evicted is
swapped out, the service is killed while memory moves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from tests.bus.peer import Peer, spec
from tests.kernel.books import charged
from tests.kernel.comparison import FAR, LARGE, MIB, SLICE
from tests.kernel.demands import get_fd
from tests.kernel.histories import SIZES, WEIGHTS
from tests.kernel.relocating import Relocating
from tests.kernel.witness import CGROUP
from tests.unit.books import ORDINARY, Client, Known, Payer
from udmabufd_client.contract import ADMIN_INTERFACE, buffer_id

RESERVE: Final = 32 * MIB
"""Bytes below the limit of memory that the service never gives away."""

WANTING: Final = 1 * MIB
"""Bytes by which memory is short: half of the smallest buffer, and more than what else comes and goes."""

ROOT: Final = Payer(0, "")

MOVES: Final = {
    "importer": 10,
    "move": 12,
    "evict": 8,
    "drain": 3,
    "shortage": 4,
    "swap_out": 3,
    "attach": 5,
    "detach": 2,
    "pin": 3,
    "fill": 5,
}


class Administered(Relocating):
    """See the module."""

    weights = WEIGHTS | MOVES

    def __init__(self, seed: int, address: str, users: dict[int, Peer]) -> None:
        super().__init__(seed, address, users)
        self._spared: set[Known] = set()
        """Buffers that could not be evicted once, and may not be asked again."""

    def idle(self, known: Known) -> bool:
        """Whether nobody needs `known` where it is."""
        return known.movable and not known.evicted and not known.held_in_place(time.monotonic())

    async def drain(self) -> None:
        """Drain: whatever an allocator has moves elsewhere, if nothing holds it."""
        free = [known.allocator for known in self.books.buffers if self.idle(known)]
        allocator = self.rng.choice(free if free and self.rng.random() < 0.75 else [ORDINARY, FAR, LARGE])
        here = [each for each in self.books.buffers if each.movable and each.allocator == allocator]
        here = [known for known in here if not known.evicted]
        # A device that takes nothing else keeps it there.
        staying = [known for known in here if not self.idle(known) or (known.demanding and allocator == FAR)]
        outcome = await self.outcome(self.root.call("Drain", "s", allocator, interface=ADMIN_INTERFACE))
        listed, left = await self.listed(), bool(staying)
        for known in here:
            entry, missing = listed[known.id], self.missing(known)
            if known in staying or entry["serial"] == known.serial:
                assert outcome.cut_off or known in staying or missing or self.belated(outcome), f"not drained: {known}"
                left = True
                continue
            assert not missing, f"drained, though somebody has not answered: {known}"
            assert entry["allocator"] in ({LARGE, FAR} if allocator == ORDINARY else {ORDINARY}), entry
            self.moved(known, entry["allocator"], ROOT)
            self.happened["drained"] += 1
        # If nothing held any in place, it is that somebody has not answered.
        refusal = "Busy" if staying else "MoveTimedOut" if left else ""
        assert outcome.cut_off or outcome.refusal == refusal, outcome
        await self.over()
        for known in here:
            if known not in staying:
                await self.catch_up(known)

    async def shortage(self) -> None:
        """Memory is short when somebody allocates: what is idle is evicted for it, unless somebody keeps it."""
        if any(known.free for known in self.books.buffers):
            await self.settled()
        idle = [k for k in self.books.buffers if self.idle(k) and k.allocator == ORDINARY]
        idle = [known for known in idle if known.attachments or not known.fds]
        if not idle and self.rng.random() < 0.8:
            return
        await self.closed()
        size = SIZES[-1]
        self.keeping = self.rng.random() < 0.3
        client = self.client()
        values = spec(size=size, allocator=ORDINARY, name="wanted")
        with limited(await self._present() + RESERVE + size - WANTING):
            outcome = await self.outcome(self.peers[client].call("Allocate", "a{sv}", values))
        self.keeping = False
        evicted = {own for own, entry in (await self.listed()).items() if entry["state"] == "evicted"}
        gone = [known for known in self.books.buffers if known.id in evicted and not known.evicted]
        for known in gone:
            assert known in idle, f"evicted, and in use: {known}"
            assert not known.fds, f"evicted, with descriptors: {known}"
            assert not self.missing(known), f"evicted, though somebody has not answered: {known}"
            self.evicted(known)
            self.happened["relieved"] += 1
        for known in idle:
            willing = not (known in gone or known.fds or self.missing(known) or known in self._spared)
            assert gone or not willing or self.belated(outcome), f"not evicted for {outcome}: {known}"
        self._spared.update(known for known in idle if known not in gone)
        assert outcome.refusal == ("" if gone else "OutOfMemory"), f"{outcome}, with {gone} evicted"
        self.happened[outcome.refusal] += bool(outcome.refusal)
        if not outcome.refusal:
            await self._give_back(client, size, outcome.answer)

    async def _present(self) -> int:
        """Return how many bytes the service reckons with that it has, beside those that could be swapped out."""
        heaps = sum(known.size for known in self.books.buffers if known.allocator == FAR)
        evicted = sum(known.size for known in self.books.buffers if known.evicted)
        swappable = max(evicted - await self.swapped(), 0)
        return charged() + heaps - swappable

    async def _give_back(self, client: Client, size: int, answer: list[object]) -> None:
        path, fd, _ = answer
        known = Known(size, "dma-buf", "wanted", client.owner, id=buffer_id(str(path)))
        known.back(ORDINARY)
        self.known.append(known)
        self.books.made(client, [known])
        fd.close()  # type: ignore[attr-defined]
        self.books.release(known, client, time.monotonic())
        await self.peers[client].call("Release", path=self.at(known))

    async def swap_out(self) -> None:
        """The kernel takes what is evicted out of memory."""
        if not any(known.evicted for known in self.books.buffers):
            await self.evict()
            await self.over()
        evicted = sum(known.size for known in self.books.buffers if known.evicted)
        if evicted:
            # However little the count is short by.
            with suppress(BlockingIOError):
                (CGROUP / SLICE / "memory.reclaim").write_text(f"{evicted} swappiness=200")
            swapped = int((CGROUP / SLICE / "memory.swap.current").read_text())
            self.happened["swapped out"] += swapped > evicted // 2

    async def kill_move(self) -> None:
        """SIGKILL while memory moves, goes or comes back."""
        self.kill_in = self.rng.uniform(0, 0.3)
        evicted = [known for known in self.held_buffers() if known.evicted]
        if evicted and self.rng.random() < 0.7:
            known = self.rng.choice(evicted)
            client = self.client(known.shares)
            outcome = await self.outcome(get_fd(self.peers[client], self.at(known)))
            if not outcome.cut_off:
                self.taken(known, client, None, *outcome.answer)
            elif (await self.listed())[known.id]["serial"] > known.serial:
                self.came(known)
                self.happened["came back before a kill"] += 1
            # Whether it is known that a descriptor was on its way, nobody can tell: it is now.
            await self.take(known, client, None)
        else:
            await self.rng.choice([self.move, self.evict, self.drain, self.attach])()
        if self.kill_in is not None:
            self.kill_in = None
            await self.kill()


@contextmanager
def limited(byte_count: int) -> Iterator[None]:
    """Have the slice have no more memory than this."""
    file = CGROUP / SLICE / "memory.max"
    before = file.read_text()
    file.write_text(str(byte_count))
    try:
        yield
    finally:
        file.write_text(before)
