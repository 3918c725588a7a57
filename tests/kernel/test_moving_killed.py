# SPDX-License-Identifier: MIT
"""The installed service killed while a buffer moves or is evicted: afterwards the buffer is whole in one place, its
importers know which, and nothing else is left.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.bus.memfds import until
from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.kernel import unit
from tests.kernel.books import agreed, usage
from tests.kernel.buffers import MIB
from tests.kernel.demands import create, numbers, share
from tests.kernel.dynamic import ALICE, FULL, Importer, contents, fill, pattern
from tests.kernel.test_restart import TRAP
from tests.kernel.unit import AWAY
from tests.kernel.witness import bufinfo
from tests.system import stepper
from tests.system.books import entries
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import ATTACH_TYPES, CONSTRAINT_TYPES, MOVE_TYPES, buffer_id

pytestmark = [pytest.mark.guest, pytest.mark.root]

OTHER = {"udmabuf": "heap:system", "heap:system": "udmabuf"}


class Subject:
    """A buffer that alice and bob use, and what must be true of it at any time."""

    def __init__(self, alice: Importer, bob: Importer, size: int) -> None:
        self.alice, self.bob, self.size = alice, bob, size
        self.both = (alice, bob)
        self.path = ""
        self.serial = 1
        self.next = 2
        """The serial that it will have: nobody was told that it will not."""
        self.allocator = "udmabuf"
        self.seed = 0

    async def make(self) -> None:
        """Create it, with memory, and fill it."""
        self.path = await create(self.alice, size=self.size, name="survives")
        await share(self.alice, self.path, self.bob)
        for one in self.both:
            await one.attach(self.path)
            await one.renew(self.path)
        fill(self.alice.uses[self.path].own, pattern(self.size, self.seed))

    async def move(self) -> None:
        """Have alice move it to the other of two allocators. Raises RemoteError."""
        options = {"allocator": Variant(MOVE_TYPES["allocator"], OTHER[self.allocator])}
        await self.alice.call("Move", "a{sv}", options, path=self.path)

    async def attach(self) -> None:
        """Have alice attach a device that cannot use the memory that there is; it is detached at once."""
        demand = {"allocators": Variant(CONSTRAINT_TYPES["allocators"], [OTHER[self.allocator]])}
        options = {
            "dynamic": Variant(ATTACH_TYPES["dynamic"], True),
            "constraints": Variant(ATTACH_TYPES["constraints"], demand),
        }
        number, _ = await self.alice.call("Attach", "sa{sv}", FULL, options, path=self.path)
        await self.alice.call("Detach", "u", number, path=self.path)

    async def evict(self) -> None:
        """Have bob evict it."""
        await self.bob.call("Evict", path=self.path)

    async def come_back(self) -> None:
        """Have bob fetch it back."""
        await self.bob.renew(self.path)

    async def evict_and_return(self) -> None:
        """Have bob evict it, and fetch it back."""
        await self.evict()
        await self.come_back()

    async def whole(self) -> bool:
        """Hold what is said of the buffer against what is true, and change its contents; return whether it has moved,
        or was evicted, since the last time.
        """
        await until(self._still)
        serial = int(await self.bob.get("Serial", path=self.path))
        evicted = await self.bob.get("State", path=self.path) == "evicted"
        changed = evicted or serial > self.serial
        for one in self.both:
            use = one.uses[self.path]
            # Whoever was asked is told how it ended, and the truth; of an eviction its state tells.
            asked = {member for member, of in use.told if of == self.next}
            if "MoveNotify" in asked or ("EvictNotify" in asked and not changed):
                assert await one.over(self.path, self.next) == ("Moved" if changed else "MoveCancelled")
            await one.renew(self.path)
            assert use.info["serial"] == (self.next if changed else self.serial)
        called_off = any(("MoveCancelled", self.next) in one.uses[self.path].told for one in self.both)
        if changed:
            self.serial = self.next
        self.next += changed or called_off
        await self._detach_others()
        mine, his = (one.uses[self.path].info for one in self.both)
        assert mine == his
        if mine["allocator"] != self.allocator:
            assert changed
            self.allocator = mine["allocator"]
        for one in self.both:
            assert contents(one.uses[self.path].own, self.size) == pattern(self.size, self.seed)
            one.uses[self.path].told.clear()
        # They go on with it, each with what the other wrote.
        self.seed += 1
        fill(self.both[self.seed % 2].uses[self.path].own, pattern(self.size, self.seed))
        return changed

    async def _still(self) -> bool:
        return bool(await self.bob.get("State", path=self.path) != "moving")

    async def _detach_others(self) -> None:
        """End the attachment of a call that was cut off before its answer."""
        for number in await numbers(self.alice, self.path):
            if number not in [one.uses[self.path].number for one in self.both]:
                await self.alice.call("Detach", "u", number, path=self.path)

    async def leave(self) -> None:
        """Give it back."""
        for one in self.both:
            await one.leave(self.path)


async def whole(root: Peer, *subjects: Subject) -> list[bool]:
    """Wait until the service serves; hold what service, systemd and kernel say against what is true; return of each of
    the buffers whether it has changed its place.
    """
    await unit.serving(root)
    changed = [await subject.whole() for subject in subjects]
    listed = await agreed(root)
    assert listed.keys() == {buffer_id(subject.path) for subject in subjects}
    for subject in subjects:
        entry = listed[buffer_id(subject.path)]
        inode = subject.alice.uses[subject.path].info["inode"]
        assert (entry["state"], entry["serial"], entry["inode"]) == ("backed", subject.serial, inode)
    assert await usage(root) == {ALICE: (sum(subject.size for subject in subjects), 0)}
    return changed


async def ended(pid: int) -> None:
    """Wait until a process has ended."""
    await unit.until(lambda: not Path(f"/proc/{pid}").exists())


async def cut_off(call: Coroutine[Any, Any, Any]) -> None:
    """Make a call during which the service is killed."""
    with pytest.raises(RemoteError) as caught:
        await call
    assert caught.value.name in AWAY


@asynccontextmanager
async def trapped(root: Peer) -> AsyncIterator[stepper.Stepper]:
    """The installed service with a trap in it, and without afterwards."""
    try:
        with unit.drop_in("trap", TRAP):
            await unit.killed()
            await unit.serving(root)
            yield stepper.Stepper("udmabufd-stepper")
    finally:
        await unit.killed()
        await unit.serving(root)


PHASES = [
    (Subject.move, "bus: MoveNotify", 1, "backed", False),
    (Subject.move, "copy: piece", 1, "backed", False),
    (Subject.move, "bus: Moved", 1, "backed", True),
    (Subject.move, "bus: Moved", 2, "backed", True),
    (Subject.evict, "store: FDSTOREREMOVE", 1, "evicted", False),
    (Subject.come_back, "store: FDSTORE=1", 1, "evicted", False),
    (Subject.come_back, "store: FDSTOREREMOVE", 1, "backed", True),
]
"""What is done, the step before which the service is killed, and how the buffer is found: what it is, and whether
under another serial.

Before anybody is asked; in the midst of the copy; when it has moved and nobody has been told yet; when one has been
and the other has not; when the memfd alone is what there is; before and after it is exported again.
"""

MORE_PHASES = [
    (Subject.move, "copy: begin", 1, "backed", False),
    (Subject.evict, "bus: EvictNotify", 1, "backed", False),
    (Subject.evict, "store: FDSTORE=1", 1, "backed", False),
]
"""Those that are like others."""


async def test_in_each_phase(root: Peer, alice: Importer, bob: Importer, long_run: bool) -> None:
    async with trapped(root) as trap:
        subject = Subject(alice, bob, 2 * stepper.PIECE)
        await subject.make()
        for work, of, step, state, later in PHASES + (MORE_PHASES if long_run else []):
            began = time.monotonic()
            if work is Subject.come_back:
                await subject.evict()
            trap.arm(step, of)
            await cut_off(work(subject))
            await unit.serving(root)
            expected = OTHER[subject.allocator] if work is Subject.move and later else subject.allocator
            found = (await entries(root)).get(buffer_id(subject.path), {})
            assert [found.get(key) for key in ("state", "serial", "allocator")] == [
                state,
                subject.next if later else subject.serial,
                expected,
            ], (of, step)
            assert await whole(root, subject) == [later or state == "evicted"]
            print(f"{work.__name__}, {of} {step}: {time.monotonic() - began:.1f} s")
        await subject.leave()


async def test_while_an_importer_takes_its_time(
    root: Peer, service: RunningService, alice: Importer, bob: Importer
) -> None:
    """Before it has answered; and when it has the former memory still, which is charged as before."""
    subject = Subject(alice, bob, 4 * MIB)
    await subject.make()
    use = bob.uses[subject.path]
    use.obeys = False

    moving = asyncio.create_task(cut_off(subject.move()))
    await bob.told(subject.path, "MoveNotify", 2)
    os.kill(service.pid, signal.SIGKILL)
    await moving
    assert await whole(root, subject) == [False]

    first = asyncio.create_task(subject.move())
    await bob.told(subject.path, "MoveNotify", subject.next)
    await bob.call("MoveReady", "ut", use.number, subject.next, path=subject.path)
    await bob.told(subject.path, "Moved", subject.next)
    await first
    pid = service.pid
    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    await unit.serving(root)
    assert await usage(root) == {ALICE: (2 * subject.size, subject.size)}
    rows = sorted((row["state"], row["allocator"]) for row in (await entries(root)).values())
    assert rows == [("backed", "heap:system"), ("lingering", "udmabuf")]
    assert contents(use.own, subject.size) == pattern(subject.size, subject.seed)
    assert await whole(root, subject) == [True]
    await subject.leave()


def spread(steps: int, count: int) -> list[int]:
    """Return `count` of the steps from 1 to `steps`, evenly spread, or all of them."""
    return sorted({round(1 + (steps - 1) * each / (count - 1)) for each in range(min(count, steps))})


class Three:
    """Three buffers of which one moves for its holder, one goes out of memory and back, and one moves for a device
    that attaches, all at the same time.
    """

    def __init__(self, alice: Importer, bob: Importer, size: int) -> None:
        self.subjects = [Subject(alice, bob, size) for _ in range(3)]

    async def make(self) -> None:
        """Create them."""
        for subject in self.subjects:
            await subject.make()

    async def go(self) -> None:
        """Move them; the service may be killed meanwhile."""
        one, two, three = self.subjects
        results = await asyncio.gather(one.move(), two.evict_and_return(), three.attach(), return_exceptions=True)
        for error in results:
            assert error is None or (isinstance(error, RemoteError) and error.name in AWAY), error

    async def leave(self) -> None:
        """Give them back."""
        for subject in self.subjects:
            await subject.leave()


@pytest.fixture
def three(alice: Importer, bob: Importer) -> Three:
    """Three buffers, not yet made."""
    return Three(alice, bob, MIB)


async def test_between_two_steps(root: Peer, service: RunningService, three: Three, long_run: bool) -> None:
    """A kill before each of the things that the service does to its state, its store and its callers, or some."""
    subjects = three.subjects
    async with trapped(root) as trap:

        async def attempt(step: int) -> tuple[int, list[bool]]:
            """Kill it before this step; return how many there were without a kill, and which buffers have moved."""
            pid, taken = service.pid, 0
            trap.arm(step)
            await three.go()
            # Until it has ended, or has done all that follows.
            await unit.until(lambda: not Path(f"/proc/{pid}").exists() or len(bufinfo()) == len(subjects))
            # One that has ended by now does not listen.
            with suppress(ConnectionError):
                taken = len(trap.trail())
                trap.arm(0)
            return taken, await whole(root, *subjects)

        await three.make()
        steps, changed = await attempt(0)
        assert steps > 50
        assert all(changed)
        outcomes = []
        for step in spread(steps, 100 if long_run else 5):
            taken, changed = await attempt(step)
            outcomes.append((step, taken, changed))
        print(f"{steps} steps: {outcomes}")
        assert sum(not taken for _, taken, _ in outcomes) > 0.7 * len(outcomes), "the trap does not kill"
        for moved in zip(*(changed for _, taken, changed in outcomes if not taken), strict=True):
            assert set(moved) == {False, True}, "none was killed before it had moved, or none after"
        await three.leave()


async def test_at_any_moment(root: Peer, service: RunningService, three: Three, long_run: bool) -> None:
    """A kill whenever it comes, also in the midst of what is one step elsewhere."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    await three.make()
    began = time.monotonic()
    await three.go()
    lasts = time.monotonic() - began
    assert all(await whole(root, *three.subjects))
    for _ in range(100 if long_run else 7):
        pid, after = service.pid, chance.uniform(0, lasts)
        asyncio.get_running_loop().call_later(after, os.kill, pid, signal.SIGKILL)
        await three.go()
        await ended(pid)
        print(f"killed after {after:.3f} of {lasts:.3f} s: {await whole(root, *three.subjects)}")
    await three.leave()
