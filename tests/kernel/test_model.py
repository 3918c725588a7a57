# SPDX-License-Identifier: MIT
"""Random histories of the installed service on the real kernel, with moves, evictions and kills: its list and its
ledger against books that the test keeps, the contents of each buffer, what the kernel charges, and that nothing is
left over.

Each history is checked after each of its steps (see histories.py, relocating.py and administering.py, and the books
in tests/unit/books.py). UDMABUFD_HISTORIES=17-17 runs the one that failed alone.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.kernel import unit
from tests.kernel.administering import Administered
from tests.kernel.comparison import FAR, MIB, TOO_MUCH
from tests.kernel.demands import made_up
from tests.kernel.histories import UIDS
from tests.kernel.hugepools import huge_pages
from tests.kernel.importers import TIMEOUT
from tests.kernel.truth import configured
from tests.system.test_policy import as_user

pytestmark = [pytest.mark.guest, pytest.mark.root]

HISTORIES, LONG_HISTORIES = 200, 2000
STEPS = 5
KILLS = {3: "kill", 11: "kill_move", 25: "kill_move"}
"""What is done beside the other steps in some of each 48 histories: starts take long."""

CONFIG = f"""
[limits]
move_timeout_msec = {round(TIMEOUT * 1000)}
max_bytes_per_user = {TOO_MUCH - MIB}
max_calls_per_window = 1000000
"""

NO_PRESSURE = """
[Service]
MemoryPressureWatch=off
InaccessiblePaths=/proc/pressure
"""
"""What the kernel tells of the whole machine's memory would come at any time."""

EXPECTED = {
    "Busy",
    "MoveTimedOut",
    "OutOfMemory",
    "attached",
    "came back",
    "charge passed on",
    "detached",
    "drained",
    "evicted",
    "held in place",
    "importer: late",
    "importer: never",
    "importer: ready",
    "importer: stale",
    "importer: twice",
    "lingers with a descriptor",
    "lingers with a shadow",
    "moved",
    "pinned",
    "relieved",
    "waited for a move",
    "written before the answer",
}
"""What comes about in any number of histories: else they would show nothing about it."""

RARE = {"came back elsewhere", "importer: leave", "killed during a call", "swapped out", "unpinned"}
"""What comes about some times in the usual number, or by the moment that was hit: in the full number it must."""


@pytest.fixture
def prepared(service: RunningService) -> Iterator[None]:
    """The service with importers that have little time, a device that is particular, huge pages, and swap."""
    with ExitStack() as stack:
        stack.enter_context(huge_pages(64))
        subprocess.run(["swapon", "/swapfile"], check=True)
        stack.callback(subprocess.run, ["swapoff", "/swapfile"], check=True)
        stack.enter_context(unit.drop_in("no-pressure", NO_PRESSURE))
        stack.enter_context(made_up({"full": {"allocators": [FAR]}}))
        stack.enter_context(configured(CONFIG))
        yield


@pytest.fixture
async def users(service: RunningService, prepared: None) -> AsyncIterator[dict[int, Peer]]:
    """Each user that takes part; root sees all."""
    found = {}
    for uid in (0, *UIDS):
        with as_user(uid):
            found[uid] = await Peer.connect(service.address)
    await unit.serving(found[0])
    yield found
    for peer in found.values():
        peer.close()


def seeds(long_run: bool) -> range:
    """Return which histories to run."""
    chosen = os.environ.get("UDMABUFD_HISTORIES")
    if chosen is None:
        return range(LONG_HISTORIES if long_run else HISTORIES)
    first, last = map(int, chosen.split("-"))
    return range(first, last + 1)


@pytest.mark.timeout(7200)
async def test_histories_on_the_real_kernel(service: RunningService, users: dict[int, Peer], long_run: bool) -> None:
    started, worst, chosen = time.monotonic(), 0, seeds(long_run)
    happened: Counter[str] = Counter()
    async with asyncio.timeout(120):
        # Of the tests before.
        while (await users[0].call("ListBuffers"))[0]:  # noqa: ASYNC110 (the service tells nobody of what others hold)
            await asyncio.sleep(0.1)
    held = await Administered(-1, service.address, users).held()
    for seed in chosen:
        if seed % 50 == 0:
            print(f"history {seed}, {time.monotonic() - started:.0f} s", flush=True)
        history = Administered(seed, service.address, users)
        try:
            more = {seed // 48 % STEPS: KILLS[seed % 48]} if seed % 48 in KILLS else {}
            worst = max(worst, abs(await history.run(STEPS, more, held)))
        except BaseException as error:
            error.add_note(f"history {seed}: {' '.join(history.done)}")
            raise
        finally:
            history.close_all()
            for peer in history.peers.values():
                peer.close()
        happened += history.happened
    print(f"{len(chosen)} histories in {time.monotonic() - started:.0f} s; the slice was off by {worst} bytes at most")
    print(", ".join(f"{what}: {count}" for what, count in sorted(happened.items())))
    expected = EXPECTED | RARE if long_run else EXPECTED
    assert len(chosen) < HISTORIES or not (missing := expected - set(happened)), f"never seen: {missing}"
