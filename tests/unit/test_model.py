# SPDX-License-Identifier: MIT
"""Ledger, registry and moves against a model of their own: whatever happens in whatever order, who is charged with
what, where each buffer is, and what is in it.

Each history is checked after each of its steps (see tests/unit/histories.py, relocations.py and books.py).
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.histories import play, shortened, steps_of

EXPECTED = {
    "AccessDenied",
    "Busy",
    "InvalidSpec",
    "MoveTimedOut",
    "NoAllocator",
    "NoSuchBuffer",
    "NoSuchDevice",
    "NotSupported",
    "answered again",
    "attached",
    "attached again",
    "attached with a buffer",
    "came back",
    "came back elsewhere",
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
    "killed during a call",
    "lingers with a descriptor",
    "lingers with a shadow",
    "lingers with nothing",
    "lives again",
    "moved",
    "pinned",
    "refused for a quota",
    "relieved",
    "unplugged",
    "waited for a move",
    "waits after a bus",
    "waits after a request",
    "was waited for",
}
"""What comes about in any number of histories: else they would show nothing about it."""

HISTORIES, LONG_HISTORIES = 500, 10_000
STEPS = 48
BATCHES = 5


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_histories(batch: int, long_run: bool) -> None:
    count = (LONG_HISTORIES if long_run else HISTORIES) // BATCHES
    happened: Counter[str] = Counter()
    for seed in range(batch * count, (batch + 1) * count):
        steps = steps_of(seed, STEPS)
        try:
            happened += play(seed, steps)
        except Exception as error:
            short = shortened(seed, steps)
            listed = "\n".join(f"    {tuple(step)}" for step in short)
            pytest.fail(f"history {seed}: {error!r}; it fails with these steps, too:\n{listed}")
    assert not (missing := EXPECTED - set(happened)), f"never seen: {missing}"
